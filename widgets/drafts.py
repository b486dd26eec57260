"""The drafts explorer: sliders on how tokens are drafted and verified, and live what the target makes of them.

`DraftsExplorer` is the controller and knows no toolkit. What it adds to `Explorer` is what decoding needs: text that
appears block by block, each block's draft tree, and every verification rule's acceptance beside the optimum.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import traitlets

import workbench
from widgets.explorer import FRAME, HERE, Explorer, ExplorerWidget, Stop
from widgets.live import script, wish
from workbench import METHODS, Cancelled, Cost, Inputs, Run, Step, Store
from workbench.problems.decoding import Decoding, efficiency
from workbench.speculation.acceptance import optimal
from workbench.speculation.drafting import draw
from workbench.speculation.engine import Block
from workbench.speculation.rules import RULES

FAMILY = ("spectr", "speculative", "spec_infer", "sequoia", "eagle2", "autoregressive")
FIXED = {"speculative": "single", "sequoia": "rrs_without", "eagle2": "top"}  # the rule of methods without that knob
SLOW = ("importance", "optimal")  # rules whose acceptance takes some 10 ms
TRIALS = 200  # draws by which the acceptance of a rule without a closed form is estimated, per block
SCORED = 16  # texts that the settings shown are graded with while idle
SCORES = (64, 256)  # numbers of texts that the panel offers beside
KEPT = 64_000_000  # bytes of laws kept, of runs to which one may return
BACKGROUND = ("top_k", "top_p", "typical_p", "policy", "threshold", "draft", "model")  # in a title only where changed


@dataclass(frozen=True)
class Place:
    """A block's context: laws (V,) of target and draft there, the drafts that stood there, whether one was kept."""

    target_probs: np.ndarray
    draft_probs: np.ndarray
    n_drafts: int
    is_hit: bool


@dataclass
class Trace:
    """What one run wrote in its first text. blocks: as JSON; places: None where nothing was drafted.

    bars: per block, {rule or optimum: (acceptance, standard error)} as far as it is computed; graded: all of it is.
    """

    blocks: list[str] = field(default_factory=list)
    places: list[Place | None] = field(default_factory=list)
    bars: list[dict[str, tuple[float, float]]] = field(default_factory=list)
    graded: set[int] = field(default_factory=set)
    n_tokens: int = 0

    @property
    def n_bytes(self) -> int:
        return sum(p.target_probs.nbytes + p.draft_probs.nbytes for p in self.places if p is not None)


def quick_bars(place: Place) -> dict[str, tuple[float, float]]:
    """Acceptance at a place of every rule and optimum that takes about a millisecond; for one draft, of all."""
    laws, n = (place.target_probs, place.draft_probs), place.n_drafts
    found = {name: rule.acceptance(*laws, n) for name, rule in RULES.items()
             if _takes(name, n) and (name not in SLOW or n == 1)}
    found["optimum iid"] = optimal(*laws, n, "iid").acceptance
    if n <= 2:
        found["optimum without"] = optimal(*laws, n, "without").acceptance
    return {name: (value, 0.0) for name, value in found.items() if value is not None}


def slow_bars(place: Place, rule: str | None) -> dict[str, tuple[float, float]]:
    """The others: convex and linear programs, quadrature, and, for a `rule` of no closed form, TRIALS draws."""
    laws, n = (place.target_probs, place.draft_probs), place.n_drafts
    found: dict[str, tuple[float, float]] = {}
    if n > 1:
        found = {name: (RULES[name].acceptance(*laws, n), 0.0) for name in SLOW if _takes(name, n)}
    if n > 2:
        found["optimum without"] = optimal(*laws, n, "without").acceptance, 0.0
    if rule is not None and RULES[rule].accepted is None:
        rng, chosen = np.random.default_rng(0), RULES[rule]
        hits = sum(chosen.verify(*laws, draw(place.draft_probs, n, chosen.drafting, rng.random),
                                 lambda: float(rng.random())).draft is not None for _ in range(TRIALS))
        share = hits / TRIALS
        found[rule] = share, math.sqrt(share * (1 - share) / TRIALS + 0.25 / TRIALS**2) / (1 + 1 / TRIALS)
    return found


def _takes(rule: str, n: int) -> bool:
    most = RULES[rule].max_drafts
    return most is None or n <= most


class DraftsExplorer(Explorer):
    """Live controller of a decoding problem and several methods. Use `drafts_explorer(...)`.

    As `Explorer`; beside it, `blocks`: of the first text shown, each block's tokens and tree; `bars`: acceptance by
    rule at the selected block's context; `select`: another block. Settings that only the method refuses are refused by
    the run: `wait` raises, the panel shows why.
    """

    problem: Decoding

    def __init__(self, problem: Decoding, methods: Sequence[str] = FAMILY, *, n_samples: int = 1, seed: int = 0,
                 store: Store | None = None, **knobs: Any) -> None:
        if not isinstance(problem, Decoding):
            raise TypeError(f"problem={problem!r}: expected a Decoding problem")
        for name in methods:
            if (family := workbench.get(name).family) != "decoding":
                raise ValueError(f"methods: {name!r} is of the {family} family, expected some of {', '.join(FAMILY)}")
        self._traces: OrderedDict[str, Trace] = OrderedDict()
        self._current: tuple[str, str | None, Trace] = "", None, Trace()  # key, rule and trace of the frame published
        self._selected = 0
        self._texts: dict[int, str] = {}
        self._wish: Inputs | None = None  # a run of more texts that was asked for
        super().__init__(problem, methods, n_samples=n_samples, seed=seed, store=store, **knobs)

    # ---------------------------------------------------------------- what a notebook uses

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """Of the first text shown, per target pass: texts of its tokens, the first n_accepted drafted, and the tree."""
        return [json.loads(block) for block in self._current[2].blocks]

    @property
    def bars(self) -> dict[str, Any]:
        return self.published.get("bars", {})

    def select(self, block: int) -> None:
        """Look at another block. Raises ValueError where the text shown has no such block."""
        n = len(self._current[2].blocks)
        if block not in range(max(n, 1)):
            raise ValueError(f"block={block!r}: expected 0 to {n - 1}, the blocks of the text shown")
        self._selected = block
        self._publish_bars(block)

    def score(self, n_samples: int = SCORES[0]) -> None:
        """Grade the settings with more texts, while idle. `stop_score` gives up."""
        with self._change:
            i = self.inputs
            self._wish = workbench.inputs(i.method, self.problem, i.seed, n_samples, **i.knobs)
            self._wake(quiet=False)
        self._publish_view()

    def stop_score(self) -> None:
        """Give up the grading that `score` asked for."""
        with self._change:
            self._wish = None
            self._wake(quiet=False)

    def receive(self, intent: Mapping[str, Any]) -> None:
        """As `Explorer.receive`, and "select" with "block"."""
        intent = wish(intent)
        if intent["kind"] != "select":
            super().receive(intent)
            return
        self._ack = intent["id"]
        with suppress(Exception):  # no number, or the text has changed since
            self.select(int(intent["block"]))
        self._publish_view()

    # ---------------------------------------------------------------- settings

    def _strip(self, given: Inputs) -> dict[str, Any]:
        return {}  # texts have no trajectory to draw or to refuse

    def _rule(self, given: Inputs) -> str | None:
        return given.knobs.get("rule", FIXED.get(given.method))

    # ---------------------------------------------------------------- the worker

    def _run_with_previews(self, wanted: Inputs, overtaken: Stop) -> Run:
        trace, drawn, interval = Trace(), -math.inf, FRAME

        def on_step(step: Step, cost: Cost) -> None:
            nonlocal drawn, interval
            block = step.info["blocks"].get(0)
            if block is None:  # the first text has ended before others
                return
            self._add(trace, block)
            if not overtaken() and time.monotonic() - drawn >= interval:
                before = time.monotonic()
                self._publish("frame", self._frame(wanted, trace))
                first, drawn = math.isinf(drawn), time.monotonic()
                interval = FRAME if first else max(FRAME, 4 * (drawn - before))  # as in Explorer

        run = self._made(wanted, lambda: self._is_closed or overtaken(), on_step)
        with self._change:
            self._traces[wanted.key] = trace
            while len(self._traces) > 1 and sum(t.n_bytes for t in self._traces.values()) > KEPT:
                self._traces.popitem(last=False)
        return run

    def _made(self, wanted: Inputs, stop: Stop, on_step: Callable[[Step, Cost], object] = lambda step, cost: None
              ) -> Run:
        return workbench.run(wanted.method, self.problem, wanted.seed, wanted.n_samples, stop=stop, on_step=on_step,
                             **wanted.knobs)

    def _add(self, trace: Trace, block: Block) -> None:
        """One more block: its place, and its JSON. Probabilities of the target are known at nodes that it walked to."""
        tree, path = block.tree, block.accepted
        target: dict[int, float] = {}
        for node in (-1, *path):
            for child in tree.children.get(node, ()):
                target[child] = _short(block.laws[node][tree.tokens[child]])
        times = Counter(child for children in tree.children.values() for child in children)
        own = None
        if len(block.tokens) > len(path):
            law, token = block.laws[path[-1] if path else -1], block.tokens[-1]
            own = self._text(token), _short(law[token])
        nodes = range(tree.n_nodes)
        drawn = json.dumps({
            "texts": [self._text(token) for token in block.tokens], "n_accepted": min(len(path), len(block.tokens)),
            "n_passes": block.n_draft_passes, "path": path, "own": own, "parents": tree.parents,
            "nodes": [self._text(token) for token in tree.tokens], "times": [times[node] for node in nodes],
            "draft": [_short(tree.laws[tree.parents[node]][tree.tokens[node]]) for node in nodes],
            "target": [target.get(node) for node in nodes]})
        first = tree.children.get(-1)
        place = Place(np.array(block.laws[-1]), np.array(tree.laws[-1]), len(first), bool(path)) if first else None
        with self._change:
            trace.blocks.append(drawn)
            trace.places.append(place)
            trace.bars.append({})
            trace.n_tokens += len(block.tokens)

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.problem.text([token])
        return self._texts[token]

    def _glimpse(self, wanted: Inputs) -> None:
        """Show at once a run that is remembered."""
        run = self._known(wanted)
        if run is not None:
            self._publish("frame", self._frame(run))

    def _known(self, wanted: Inputs) -> Run | None:
        """A run to be shown is known only where its blocks are; from a store come runs to be compared with."""
        if wanted == self.inputs:
            return self._runs.get(wanted.key) if wanted.key in self._traces else None
        return super()._known(wanted)

    def _keep(self, run: Run) -> Run:
        key = run.inputs.key
        if self.store is not None and key not in self._runs and self.store.get(run.inputs) is None:
            self.store.put(run)
        return self._runs.setdefault(key, run)

    def _rival(self, name: str, like: Inputs) -> Inputs:
        """The reference or the baseline: as many tokens of the same law."""
        method, knobs = getattr(self.problem, name)
        law = ("n_tokens", "temperature", "top_k", "top_p", "typical_p")
        shared = {k: like.knobs[k] for k in law if k in METHODS[method].knobs}
        return workbench.inputs(method, self.problem, like.seed, like.n_samples, **{**knobs, **shared})

    def _task(self) -> Callable[[Stop], None] | None:
        """The next useful thing while nobody asks: all rules at all blocks, the reference, times, more texts."""
        if self.run is None:
            return None
        shown = self.run.inputs
        _, rule, trace = self._current
        open_blocks = [k for k, place in enumerate(trace.places) if place is not None and k not in trace.graded]
        if open_blocks:
            block = self._selected if self._selected in open_blocks else open_blocks[0]
            return lambda stop: self._grade(trace, rule, block)
        reference = self._rival("reference", shown)
        more = replace(shown, n_samples=SCORED)
        if reference.key not in self._runs and reference.key not in self._failed:
            return lambda stop: self._fill(reference, stop, "plain decoding, to compare with")
        for inputs in (shown, reference):
            if inputs.key not in self._timings and inputs.key not in self._failed:
                return lambda stop: self._measure(inputs, stop)
        wish = self._wish
        if wish is not None and (wish.key in self._runs or wish.key in self._failed):
            self._wish = wish = None
        for inputs in (wish, *((more, replace(reference, n_samples=SCORED)) if shown.n_samples < SCORED else ())):
            if inputs is not None and inputs.key not in self._runs and inputs.key not in self._failed:
                return lambda stop: self._fill(inputs, stop, f"grading with {inputs.n_samples} texts")
        return None

    def _grade(self, trace: Trace, rule: str | None, block: int) -> None:
        place = trace.places[block]
        found = quick_bars(place) | slow_bars(place, rule)
        with self._change:
            trace.bars[block] = found
            trace.graded.add(block)
        if block == self._selected or len(trace.graded) % 8 == 0 or len(trace.graded) == sum(map(bool, trace.places)):
            self._publish_bars(self._selected)

    def _measure(self, given: Inputs, stop: Stop) -> None:
        self._tell("measuring time")
        try:
            timing = workbench.timed(given.method, self.problem, given.seed, given.n_samples, stop=stop, **given.knobs)
        except Cancelled:
            raise
        except Exception:
            self._failed.add(given.key)
            raise
        self._timings[given.key] = timing
        self._publish_view()
        self._publish_frontier()

    # ---------------------------------------------------------------- what is drawn

    def _frame(self, of: Run | Inputs, trace: Trace | None = None) -> bytes:
        """JSON of a text: title, prompt and blocks, finished where `of` is a Run. Its bars follow by themselves."""
        given = of.inputs if isinstance(of, Run) else of
        if trace is None:
            trace = self._traces.get(given.key, Trace())
        self._revision += 1
        head = json.dumps({"revision": self._revision, "key": given.key, "title": self._title(given),
                           "prompt": self._prompt, "n_tokens": trace.n_tokens, "of": given.knobs["n_tokens"],
                           "is_done": isinstance(of, Run)})
        if given == self.inputs:
            is_new = self._current[2] is not trace
            self._current = given.key, self._rule(given), trace
            if isinstance(of, Run):
                self._selected = min(self._selected, max(len(trace.blocks) - 1, 0))
            if is_new or isinstance(of, Run):
                self._publish_bars(self._selected)
        return f'{head[:-1]}, "blocks": [{", ".join(trace.blocks)}]}}'.encode()

    @cached_property
    def _prompt(self) -> str:
        return self.problem.text(self.problem.prompts(1)[0])

    def _publish_bars(self, block: int) -> None:
        """The bars of all blocks that are computed, and of this one in any case, with their means."""
        key, rule, trace = self._current
        if block < len(trace.places) and trace.places[block] is not None and not trace.bars[block]:
            found = quick_bars(trace.places[block])
            with self._change:
                trace.bars[block] = trace.bars[block] or found
        with self._change:
            bars = [dict(b) for b in trace.bars]
            graded = [bars[k] for k in sorted(trace.graded)]
            places = [p for p in trace.places if p is not None]
            n_drafts = [0 if p is None else p.n_drafts for p in trace.places]
        names = {name for b in graded for name in b}
        mean = {name: sum(b[name][0] for b in having) / len(having) for name in names
                if (having := [b for b in graded if name in b])}
        self._publish("bars", {"key": key, "rule": rule, "blocks": bars, "n_drafts": n_drafts, "mean": mean,
                               "n_graded": len(graded), "hits": sum(p.is_hit for p in places), "n": len(places)})

    def _spec(self) -> dict[str, Any]:
        """What stays as it is: models, methods with their knobs, rules with the drafting that they are for."""
        def knob(b: Any) -> dict[str, Any]:
            k = b.knob
            return {"name": b.name, "kind": b.kind.__name__, "help": k.help, "low": k.low, "high": k.high,
                    "soft": k.soft, "step": k.step, "scale": k.scale, "unit": k.unit, "choices": k.choices,
                    "needs": dict(k.needs),
                    "start": self._start.knobs.get(b.name, self._preset.get(b.name, b.default))}

        return {"problem": self.problem.name, "scores": SCORES, "scored": SCORED,
                "rules": {name: rule.drafting for name, rule in RULES.items()},
                "methods": [{"name": m.name, "summary": m.summary, "source": m.source,
                             "knobs": [knob(b) for b in m.knobs.values()]} for m in map(workbench.get, self.methods)]}

    def _title(self, given: Inputs) -> str:
        """The settings in a line: all but what only narrows the laws, which is named where it differs from rest."""
        parts = [given.method]
        for name, value in given.knobs.items():
            bound = METHODS[given.method].knobs[name]
            if name in BACKGROUND and value == bound.default:
                continue
            if bound.kind is tuple:
                value = "-".join(f"{entry:g}" for entry in value)
            text = f"{value:g}" if isinstance(value, float) else str(value)
            words = name.removeprefix("n_").replace("_", " ")
            parts.append(f"{text} tokens" if name == "n_tokens" else f"{words} {text}")
        texts = f"{given.n_samples} texts" if given.n_samples > 1 else "1 text"
        return " · ".join([*parts, f"seed {given.seed}", texts])

    def _card(self, run: Run) -> dict[str, Any]:
        """A run's title, cost per token and quality, for the front end."""
        i, timing = run.inputs, self._timings.get(run.inputs.key)
        tokens = int((run.answer[..., 0] >= 0).sum())
        alike = [r for r in self._runs.values() if replace(r.inputs, n_samples=i.n_samples) == i]
        larger = max(alike, key=lambda r: r.inputs.n_samples, default=run)
        return {
            "key": i.key, "title": self._title(i), "full": run.title, "method": i.method, "knobs": dict(i.knobs),
            "n": i.n_samples, "tokens": tokens, "flops": run.cost.total_flops / tokens,
            "efficiency": run.quality["block_efficiency"].value,
            "models": [[m.name, run.cost.calls[m.name], run.cost.evaluations[m.name]] for m in
                       reversed(self.problem.models) if run.cost.calls[m.name]],
            "quality": {name: [q.value, q.stderr if math.isfinite(q.stderr) else None, q.n]
                        for name, q in larger.quality.items()},
            "timing": timing and {"ms": 1e3 * timing.seconds / tokens, "spread": 1e3 * timing.spread / tokens,
                                  "repeats": timing.repeats, "machine": timing.machine}}

    def _view(self) -> dict[str, Any]:
        """All that changes, but for the text, the bars and the frontier's points."""
        i = self.inputs
        reference = self._runs.get(self._rival("reference", self.run.inputs).key) if self.run else None
        return {
            "ack": self._ack, "key": i.key, "is_stale": not self._is_shown, "status": self._status,
            "notice": self._notice,
            "error": "" if self._error is None else f"{type(self._error).__name__}: {self._error}",
            "state": {"method": i.method, "knobs": dict(i.knobs), "seed": i.seed, "n_samples": i.n_samples},
            "can_undo": bool(self._past), "can_redo": bool(self._future), "is_scoring": self._wish is not None,
            "shown": self._card(self.run) if self.run else None,
            "pinned": self._card(self._pinned) if self._pinned else None,
            "reference": self._card(reference) if reference else None}

    def _frontier(self) -> dict[str, Any]:
        """A point per setting: FLOPs and milliseconds per token, tokens per target pass over all its texts."""
        groups: dict[str, dict[int, list[Run]]] = {}
        for run in self._runs.values():
            setting = repr((run.inputs.method, sorted(run.inputs.knobs.items())))
            groups.setdefault(setting, {}).setdefault(run.inputs.seed, []).append(run)
        points = []
        for by_seed in groups.values():
            largest = [max(runs, key=lambda r: r.inputs.n_samples) for runs in by_seed.values()]
            runs = [r for found in by_seed.values() for r in sorted(found, key=lambda r: r.inputs.n_samples)]
            tokens = sum(int((r.answer[..., 0] >= 0).sum()) for r in largest)
            quality = efficiency(torch.cat([r.answer for r in largest]))["block_efficiency"]
            timed = next((self._card(r)["timing"] for r in runs if r.inputs.key in self._timings), None)
            points.append({"keys": [r.inputs.key for r in runs], "method": runs[0].inputs.method,
                           "title": self._title(runs[0].inputs),
                           "flops": sum(r.cost.total_flops for r in largest) / tokens,
                           "ms": timed and timed["ms"], "value": quality.value, "n": quality.n,
                           "stderr": quality.stderr if math.isfinite(quality.stderr) else None,
                           "is_reference": runs[0].inputs.method == self.problem.reference[0]})
        return {"points": points}

    @cached_property
    def widget(self) -> DraftsWidget:
        """The one widget of this explorer; it may be displayed any number of times."""
        return DraftsWidget(self)


class DraftsWidget(ExplorerWidget):
    """A DraftsExplorer in JupyterLab. Its module is the explorer's drawing helpers, then its own panel."""

    _esm = "\n".join((script("ticks.js", "explorer.js").partition(" the panel\n")[0], script("drafts.js")))
    _css = (HERE / "explorer.css").read_text() + (HERE / "drafts.css").read_text()
    bars = traitlets.Dict().tag(sync=True)


def drafts_explorer(problem: Decoding, methods: Sequence[str] = FAMILY, *, n_samples: int = 1, seed: int = 0,
                    store: Store | None = None, **knobs: Any) -> DraftsExplorer:
    """Explore decoding methods: drag draft counts, lengths and temperature; see the text, its trees and the optimum.

    n_samples: texts written side by side; the first is shown. knobs: starting values, for the methods that have them.
    store: where runs are kept. Raises TypeError or ValueError for what is no decoding problem or method, and what
    `workbench.inputs` raises for settings that cannot be.
    """
    return DraftsExplorer(problem, methods, n_samples=n_samples, seed=seed, store=store, **knobs)


def _short(probability: float) -> float:
    """Four digits, so that a frame stays small."""
    return float(f"{probability:.4g}")
