"""Runs as an explorer tells them: the front end's numbers, a table, a script. Pure functions of what they are given."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import workbench
from widgets.view import View, finite
from workbench import FAMILIES, METRICS, Inputs, Problem, Run, Timing, points
from workbench.knob import BoundKnob


def script_of(problem: Problem, i: Inputs) -> str:
    """Python that makes a run: without the workbench where the problem knows how, else with it."""
    own = problem.code(i) if problem.code else None
    if own:
        return own
    knobs = "".join(f",\n    {name}={value!r}" for name, value in i.knobs.items())
    return (f"import workbench\n{problem.source}\n"
            f"run = workbench.run(\n    {i.method!r}, problem, seed={i.seed}, n_samples={i.n_samples}{knobs},\n)\n"
            "print(run.title, run.cost, dict(run.quality), sep=\"\\n\")\n")


def table(runs: Sequence[Run], timings: Mapping[str, Timing], resources: Sequence[str]) -> str:
    """Runs as comma-separated values: settings, cost per sample, quality with standard error and n."""
    knobs = sorted({name for run in runs for name in run.knobs})
    metrics = sorted({name for run in runs for name in run.quality})
    out = io.StringIO()
    rows = csv.writer(out)
    rows.writerow(["key", "problem", "method", "seed", "n_samples", *knobs, "evaluations_per_sample",
                   "flops_per_sample", *(f"{name}_per_sample" for name in resources), "seconds",
                   *(f"{m}{part}" for m in metrics for part in ("", "_stderr", "_n"))])
    for run in runs:
        i, timing = run.inputs, timings.get(run.inputs.key)
        quality = [run.quality.get(m) for m in metrics]
        rows.writerow([i.key, i.problem, i.method, i.seed, i.n_samples, *(i.knobs.get(name, "") for name in knobs),
                       run.cost.total_evaluations / i.n_samples, run.cost.total_flops / i.n_samples,
                       *(run.cost.counted.get(name, 0) / i.n_samples for name in resources),
                       timing.seconds if timing else "",
                       *(cell for q in quality for cell in ((q.value, q.stderr, q.n) if q else ("", "", "")))])
    return out.getvalue()


def spec(problem: Problem, methods: Sequence[str], family: View, start: Mapping[str, Any]) -> dict[str, Any]:
    """What stays as it is: models, methods with their knobs, metrics. start: values that knobs go back to."""
    def knob(b: BoundKnob) -> dict[str, Any]:
        k = b.knob
        return {"name": b.name, "kind": b.kind.__name__, "help": k.help, "low": k.low, "high": k.high,
                "soft": k.soft, "step": k.step, "scale": k.scale, "unit": k.unit, "choices": k.choices,
                "needs": dict(k.needs), "start": start.get(b.name, b.default)}

    known = [{"name": m.name, "summary": m.summary, "source": m.source, "knobs": [knob(b) for b in m.knobs.values()]}
             for m in map(workbench.get, methods)]
    metrics = {m.name: {"label": m.label, "unit": m.unit, "higher": m.higher_is_better, "min_n": m.min_n,
                        "help": m.help} for m in METRICS.values()}
    return {"problem": problem.name, "methods": known, "metrics": metrics, "scores": family.scores,
            "axes": family.axes(), "main_metric": family.main_metric,
            "sample": FAMILIES[problem.family].sample, **family.spec()}


def card(run: Run, runs: Sequence[Run], family: View, timing: Timing | None, reference: Run | None) -> dict[str, Any]:
    """A run's title, cost per sample and quality; what it lacks in quality is taken from its largest like in `runs`."""
    i = run.inputs
    alike = (r for r in runs if (r.inputs.method, r.inputs.seed, r.inputs.knobs) == (i.method, i.seed, i.knobs))
    larger = max(alike, key=lambda r: r.inputs.n_samples, default=run)
    quality = {**larger.quality, **{k: q for k, q in run.quality.items() if k not in larger.quality}}
    return {
        "key": i.key, "title": family.title(i), "full": run.title, "method": i.method, "knobs": dict(i.knobs),
        "n": i.n_samples, "costs": family.costs(run, timing), "lines": family.lines(run, reference),
        "quality": {k: [finite(q.value), finite(q.stderr), q.n] for k, q in quality.items()},
        "timing": timing and {
            "ms": 1e3 * timing.seconds, "spread": 1e3 * timing.spread, "repeats": timing.repeats,
            "by_model": [1e3 * seconds for seconds in timing.by_model.values()],
            "peak_mb": timing.peak_bytes / 1e6, "machine": timing.machine},
    }


def frontier(runs: Sequence[Run], n: int, family: View, rival: Callable[[str], Inputs | None]) -> dict[str, Any]:
    """Points by metric, of the runs with n samples; seeds of one setting are one point. rival: the settings by name."""
    chosen = [r for r in runs if r.inputs.n_samples == n]
    alike: dict[str, list[Run]] = {}  # of one setting and seed, by the number of samples
    for run in sorted(runs if family.is_pooled else chosen, key=lambda r: r.inputs.n_samples):
        alike.setdefault(replace(run.inputs, n_samples=1).key, []).append(run)
    keys = {one[-1].inputs.key: [r.inputs.key for r in one] for one in alike.values()}
    chosen = [one[-1] for one in alike.values()]
    rivals = {given.key: name for name in ("reference", "baseline") if (given := rival(name))}
    metrics: dict[str, list[dict[str, Any]]] = {}
    for metric in sorted({m for r in chosen for m in r.quality}):
        metrics[metric] = [
            {"keys": [key for r in p.runs for key in keys[r.inputs.key]], "method": p.runs[0].inputs.method,
             **_spent(p.runs, family), "value": p.value, "stderr": finite(p.stderr), "n": p.n,
             "role": next((rivals[k] for r in p.runs for k in keys[r.inputs.key] if k in rivals), "")}
            for p in points(chosen, metric) if math.isfinite(p.value)]
    ns = [] if family.is_pooled else sorted({r.inputs.n_samples for r in runs} | {n})
    titles = {r.inputs.key: family.title(r.inputs) for one in alike.values() for r in one}
    return {"n": n, "ns": ns, "metrics": metrics, "titles": titles}


def _spent(runs: Sequence[Run], family: View) -> dict[str, float]:
    """The means over seeds of the costs of one setting, as far as they are known."""
    each = [family.spent(run) for run in runs]
    return {name: sum(known) / len(known) for name in each[0]
            if (known := [one[name] for one in each if name in one])}
