"""What a solver schedule is worth: many plans run as one batch, and the figures that a search can lower.

A fitness is a function of a list of plans; lower is better. It also says what it costs and what it depends on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from workbench.methods.denoising._march import MEMORY
from workbench.methods.denoising.usf import Weights, weights
from workbench.plan import Decision, Plan, preset_plan
from workbench.problems.denoising import Denoising, Point, grid
from workbench.quality import METRICS
from workbench.rng import Rng


class Fitness(Protocol):
    """fitness(plans) -> one number per plan. rows: network rows per evaluation of a plan. key: what it depends on."""

    rows: int
    key: Mapping[str, Any]

    def __call__(self, plans: Sequence[Plan]) -> list[float]: ...


class FlowError:
    """The largest distance from the exact probability flow, over given starting states.

    starts: (n, *shape), states at the schedule's noisiest level; the flow ends at `end`, a time, by default the
    schedule's cleanest. Plans must end there. The truth is the flow of the problem's best model, by `exact_flow`.
    Raises ValueError where a plan begins or ends elsewhere.
    """

    def __init__(self, problem: Denoising, starts: Tensor, end: float | None = None) -> None:
        schedule = problem.schedule
        self.problem, self.starts = problem, starts.to(problem.dtype)
        self.begin = schedule.times(1, "trailing")[0]
        self.end = schedule.cleanest if end is None else end
        self.truth = exact_flow(problem, schedule.at(self.begin), schedule.at(self.end), self.starts)
        self.rows = len(starts)
        self.key = {"fitness": "flow_error", "problem": problem.name, "digest": problem.digest, "end": self.end,
                    "starts": [float(s) for s in self.starts.flatten()]}

    def __call__(self, plans: Sequence[Plan]) -> list[float]:
        for plan in plans:
            if plan.end is None or not (math.isclose(plan.times[0], self.begin, rel_tol=1e-9)
                                        and math.isclose(plan.end, self.end, rel_tol=1e-9)):
                raise ValueError(f"plan from {plan.times[0]} to {plan.end}: expected {self.begin} to {self.end}")
        error = (run_plans(self.problem, plans, self.starts) - self.truth).abs()
        return error.flatten(1).amax(1).tolist()


class Judged:
    """A figure of the problem's own judge on n_samples samples of one seed, e.g. "frechet_distance"; lower is better.

    Figures of few samples are biased alike for all plans: compare them at equal n_samples and seed only, and confirm on
    another seed. Where higher is better, the fitness is the negative. Raises KeyError for a figure the judge has not.
    """

    def __init__(self, problem: Denoising, metric: str, n_samples: int, seed: int, guidance: float = 1.0) -> None:
        self.problem, self.metric, self.n_samples, self.guidance = problem, metric, n_samples, guidance
        self.noise, self.labels = problem.start(Rng(seed, n_samples)), problem.labels(n_samples)
        self.rows = n_samples * problem.branches(guidance)
        self.key = {"fitness": metric, "problem": problem.name, "digest": problem.digest, "n_samples": n_samples,
                    "seed": seed, "guidance": guidance}

    def __call__(self, plans: Sequence[Plan]) -> list[float]:
        sign = -1.0 if METRICS[self.metric].higher_is_better else 1.0
        answers = run_plans(self.problem, plans, self.noise, labels=self.labels, guidance=self.guidance)
        return [sign * self.problem.judge(a, self.labels)[self.metric].value
                if bool(torch.isfinite(a).all()) else math.inf for a in answers]


class Drift:
    """The root mean square distance from what n_reference steps of DPM-Solver++(2M) make of the same noise.

    So the solver's error alone, whatever the model's own; unlike a distance from the data it has no bias at few
    samples, and its least value is 0. Costs n_reference evaluations per sample once, beside those of the plans.
    """

    def __init__(self, problem: Denoising, n_samples: int, seed: int, guidance: float = 1.0, n_reference: int = 50
                 ) -> None:
        self.problem, self.guidance = problem, guidance
        self.noise, self.labels = problem.start(Rng(seed, n_samples)), problem.labels(n_samples)
        self.rows = n_samples * problem.branches(guidance)
        self.key = {"fitness": "drift", "problem": problem.name, "digest": problem.digest, "n_samples": n_samples,
                    "seed": seed, "guidance": guidance, "n_reference": n_reference}
        many = preset_plan("dpmpp_2m", grid(problem.schedule, n_reference, "trailing"))
        self.reference = run_plans(problem, [many], self.noise, labels=self.labels, guidance=guidance)

    def __call__(self, plans: Sequence[Plan]) -> list[float]:
        answers = run_plans(self.problem, plans, self.noise, labels=self.labels, guidance=self.guidance)
        return (answers - self.reference).square().flatten(1).mean(1).sqrt().tolist()


def exact_flow(problem: Denoising, first: Point, last: Point, x: Tensor, n_steps: int = 1000) -> Tensor:
    """x (n, *shape) carried from `first` to `last` by the probability flow of the problem's best model.

    Classical Runge-Kutta of order 4 in log rho, rho = sigma / alpha, on dv/drho = eps, v = x / alpha. Costs 4 n_steps
    evaluations per sample.
    """
    schedule, owner, v = problem.schedule, problem.models[-1], x / first.alpha
    a, b = -first.log_snr, -last.log_snr
    h = (b - a) / n_steps
    labels = problem.labels(len(x))

    def slope(at: Point, v: Tensor) -> Tensor:
        return math.exp(-at.log_snr) * owner.predict(v * at.alpha, at, schedule, labels, 1.0)[1]

    here = first
    with torch.no_grad():
        for i in range(n_steps):
            middle = schedule.at(schedule.t_at(-(a + (i + 0.5) * h)))
            there = last if i == n_steps - 1 else schedule.at(schedule.t_at(-(a + (i + 1) * h)))
            k1 = slope(here, v)
            k2 = slope(middle, v + h / 2 * k1)
            k3 = slope(middle, v + h / 2 * k2)
            v = v + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(there, v + h * k3))
            here = there
    return v * last.alpha


def run_plans(problem: Denoising, plans: Sequence[Plan], noise: Tensor, *, labels: Tensor | None = None,
              guidance: float = 1.0, max_rows: int | None = None) -> Tensor:
    """The answers (n_plans, n, *shape) of many plans from the same noise (n, *shape), by the problem's best model.

    Plans of equal length advance together, one batch of rows per step, at most max_rows at once (default: as many as
    have 65536 numbers), but at least one plan. As `run_plan` for each, up to rounding. Raises ValueError where a plan
    does not fit the problem's schedule.
    """
    out = noise.new_empty((len(plans), *noise.shape))
    lengths: dict[int, list[int]] = {}
    for c, plan in enumerate(plans):
        lengths.setdefault(len(plan.decisions), []).append(c)
    most = 65536 * len(noise) // noise.numel() if max_rows is None else max_rows
    share = max(most // len(noise), 1)
    for members in lengths.values():
        for part in (members[i : i + share] for i in range(0, len(members), share)):
            out[part] = _together(problem, [plans[c] for c in part], noise, labels, guidance)
    return out


def _together(problem: Denoising, plans: Sequence[Plan], noise: Tensor, labels: Tensor | None, guidance: float
              ) -> Tensor:
    n, owner = len(noise), problem.models[-1]
    grids = [plan.grid(problem.schedule) for plan in plans]

    def evaluate(x: Tensor, who: Sequence[int], i: int) -> list[Tensor]:
        points = [grids[c][i] for c in who for _ in range(n)]
        repeated = None if labels is None else labels.repeat(len(who))
        x0, eps = owner.predict(x.flatten(0, 1), points, problem.schedule, repeated, guidance)
        return [x, x0.reshape(x.shape), eps.reshape(x.shape)]

    def history(c: int, i: int) -> tuple[Point, ...]:
        return tuple(grids[c][i - j] for j in range(len(past)))

    def combined(chosen: Sequence[tuple[int, Weights]]) -> Tensor:
        """The linear combinations over `past`, one starting point and weights per plan."""
        mix = torch.zeros((3, len(past), len(plans)), dtype=noise.dtype)
        for c, (start, found) in enumerate(chosen):
            mix[0, start, c] = found.state
            mix[1 if found.prediction == "x0" else 2, :, c] += torch.tensor(found.values, dtype=noise.dtype)
        out = torch.zeros_like(past[0][0])
        for kind, over_past in enumerate(mix.to(noise.device)):
            for values, column in zip(past, over_past, strict=True):
                if bool(column.any()):
                    out += column.reshape(-1, *[1] * noise.ndim) * values[kind]
        return out

    past: list[list[Tensor]] = []  # newest first: [x, x0, eps], each (n_plans, n, *shape)
    x = noise.expand(len(plans), *noise.shape)
    everyone = range(len(plans))
    with torch.no_grad():
        for i in range(len(plans[0].decisions)):
            past = [evaluate(x, everyone, i), *past[:MEMORY]]
            arrived = [plan.decisions[i - 1].corrector if i else "none" for plan in plans]
            if any(kind != "none" for kind in arrived):
                past[0][0] = combined([_correction(plans[c].decisions[i - 1], history(c, i)) for c in everyone])
                again = [c for c in everyone if arrived[c] == "implicit"]
                if again:
                    new, index = evaluate(past[0][0][again], again, i), torch.tensor(again, device=noise.device)
                    past[0] = [old.index_copy(0, index, part) for old, part in zip(past[0], new, strict=True)]
            x = combined([_prediction(plans[c].decisions[i], history(c, i), grids[c][i + 1]) for c in everyone])
    return x


def _correction(arrived: Decision, points: tuple[Point, ...]) -> tuple[int, Weights]:
    if arrived.corrector == "none":
        return 0, Weights(1.0, (0.0,) * len(points), "x0")
    start = 1 + min(arrived.start, len(points) - 2)
    return start, weights(points, start, points[0], arrived.prediction, arrived.correction)


def _prediction(decision: Decision, points: tuple[Point, ...], there: Point) -> tuple[int, Weights]:
    start = min(decision.start, len(points) - 1)
    return start, weights(points, start, there, decision.prediction, decision.expansion)
