"""The unified sampling framework: one exponential-integrator step of which known fast solvers are special cases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np
from torch import Tensor

from workbench.knob import Knob
from workbench.methods.denoising._dpm import phi
from workbench.methods.denoising._march import Advance, Evaluated, combined, march
from workbench.methods.denoising.ddim import Guidance, Spacing, Steps, Which
from workbench.plan import CORRECTORS, PRESETS, Decision, Expansion, Plan, preset_plan
from workbench.problems.denoising import Denoising, Point, grid
from workbench.registry import Step, method
from workbench.rng import Rng


class Weights(NamedTuple):
    """The next state is `state` * the start's x + sum_j values[j] * the `prediction` of the j-th evaluation."""

    state: float
    values: tuple[float, ...]
    prediction: str


def derivative_weights(offsets: Sequence[float], k: int) -> list[float]:
    """a_j such that the k-th derivative of f at 0 is sum_j a_j (f(d_j) - f(0)), d_j = offsets[j], 1 <= k <= m.

    Exact for polynomials of degree m = len(offsets): solves the m x m Vandermonde system sum_j a_j d_j^i / i! =
    [i = k]. Source: arXiv 2312.07243, section 3.2. Raises ValueError where k is above m or offsets coincide.
    """
    if not 1 <= k <= len(offsets):
        raise ValueError(f"k={k}: expected 1 to {len(offsets)}, the number of offsets")
    if len({*offsets, 0.0}) <= len(offsets):
        raise ValueError(f"offsets={tuple(offsets)}: expected distinct numbers other than 0")
    scale = max(map(abs, offsets))  # by which the system is well conditioned whatever the unit
    rows = [[(d / scale) ** i / math.factorial(i) for d in offsets] for i in range(1, len(offsets) + 1)]
    solved = np.linalg.solve(np.array(rows), np.eye(len(offsets))[k - 1])
    return [float(a) / scale**k for a in solved]


def relaxation(kind: str, slope: float, h: float, z: float) -> float:
    """The factor 1 + O(h) of the first derivative; z is h for "eps", -h for "x0". arXiv 2312.07243, section 3.2."""
    if kind == "linear":
        return 1 + slope * h
    if kind in ("bh1", "bh2"):  # B(h) of UniPC, arXiv 2302.04867: z or expm1(z); expm1(z) - z = z^2 phi_2(z)
        return 0.5 * (1 if kind == "bh1" else phi(1, z)) / phi(2, z)
    return 1 + {"none": 0, "plus_half_exp": 0.5, "minus_half_exp": -0.5}[kind] * math.expm1(z)


@lru_cache(maxsize=8192)
def weights(history: tuple[Point, ...], start: int, there: Point, prediction: str, terms: Expansion) -> Weights:
    """The linear combination that takes the state from history[start] to `there`.

    history: points of the evaluations at hand, newest first. Where it is shorter than `terms` asks, the order is lower.
    Into sigma 0 it is the newest data estimate; from alpha 0, where only the data estimate is known, it is DDIM.
    Source: arXiv 2312.07243, equations 5 to 9; for "eps" with h = lambda_t - lambda_s,
    x_t = alpha_t/alpha_s x_s - sigma_t sum_k h^(k+1) phi_(k+1)(h) eps^(k), for "x0"
    x_t = sigma_t/sigma_s x_s + alpha_t sum_k h^(k+1) phi_(k+1)(-h) x0^(k).
    """
    values, here = [0.0] * len(history), history[start]
    if there.sigma == 0:
        values[0] = 1.0
        return Weights(0.0, tuple(values), "x0")
    if here.alpha == 0:
        values[start] = there.alpha
        return Weights(there.sigma / here.sigma, tuple(values), "x0")
    h, is_eps = there.log_snr - here.log_snr, prediction == "eps"
    z, scale = (h, -there.sigma) if is_eps else (-h, there.alpha)
    values[start] = scale * h * phi(1, z)
    active = [j for j, point in enumerate(history) if j != start and point.alpha > 0]
    for k in range(1, min(terms.order, len(active) + 1)):
        used = active[: terms.points[k - 1] if terms.points else terms.order - 1]
        factor = scale * h ** (k + 1) * phi(k + 1, z)
        if k == 1:
            factor *= relaxation(terms.relaxation, terms.slope, h, z)
        elif k == 2:
            factor *= terms.second
        for j, a in zip(used, derivative_weights([history[j].log_snr - here.log_snr for j in used], k), strict=True):
            values[j] += factor * a
            values[start] -= factor * a
    return Weights(there.alpha / here.alpha if is_eps else there.sigma / here.sigma, tuple(values), prediction)


def predicted(history: Sequence[Evaluated], there: Point, decision: Decision) -> Tensor:
    """The state at `there`; history (newest first) starts with the evaluation at the current point."""
    start = min(decision.start, len(history) - 1)
    found = weights(tuple(e.point for e in history), start, there, decision.prediction, decision.expansion)
    return _combined(history, start, found)


def corrected(now: Evaluated, past: Sequence[Evaluated], arrived: Decision) -> Tensor:
    """The state at `now`, to which the step `arrived` led, corrected by the evaluation there."""
    start = 1 + min(arrived.start, len(past) - 1)
    history = (now, *past)
    found = weights(tuple(e.point for e in history), start, now.point, arrived.prediction, arrived.correction)
    return _combined(history, start, found)


def usf_step(x: Tensor, step: Advance, *, decision: Decision, arrived: Decision | None = None
             ) -> tuple[Tensor, Evaluated]:
    """One step as `decision` says: x (B, *shape) at step.here -> x at step.there.

    arrived: the decision of the step that led to step.here; its corrector comes first, once the model's value is known.
    1 evaluation per row, 2 where that corrector is implicit. After a reset of the history nothing is corrected and the
    order is what the history allows.
    """
    now = step.denoise(x, step.here)
    if arrived is not None and arrived.corrector != "none" and step.past:
        better = corrected(now, step.past, arrived)
        # a pseudo corrector keeps the value of the model at the uncorrected state
        now = step.denoise(better, step.here) if arrived.corrector == "implicit" else now.changed(x=better)
    return predicted((now, *step.past), step.there, decision), now


def plan_step(x: Tensor, step: Advance, *, plan: Plan) -> tuple[Tensor, Evaluated]:
    """`usf_step` with the plan's decision of this step, counted from the end; a solver for `march`."""
    i = len(plan.decisions) - step.n_left
    return usf_step(x, step, decision=plan.decisions[i], arrived=plan.decisions[i - 1] if i else None)


def run_plan(problem: Denoising, rng: Rng, plan: Plan, *, guidance: float = 1.0, model: str = "best") -> Iterator[Step]:
    """Yield the steps of a plan on a problem, as a method does. State (n_samples, *problem.shape).

    Spends plan.evaluations * branches evaluations per sample. Raises ValueError where the plan does not fit the
    problem's schedule, or guidance needs a null label that is not there.
    """
    owners = [problem.models[-1 if model == "best" else 0]] * len(plan.decisions)
    yield from march(problem, rng, plan.grid(problem.schedule), owners, plan_step, guidance=guidance, plan=plan)


def nfe(n_steps: int, corrector: str) -> int:
    """Evaluations of n_steps steps of a preset: an implicit corrector evaluates again after each step but the last."""
    return 2 * n_steps - 1 if corrector == "implicit" else n_steps


@method(version=2, source="USF, arXiv 2312.07243, sec. 3",
        cost="nfe(n_steps, corrector) * branches")
def usf(
    problem: Denoising, rng: Rng, *, n_steps: Steps = 20,
    preset: Annotated[str, Knob(choices=tuple(PRESETS), help="the known solver to take the decisions of")] = "dpmpp_2m",
    guidance: Guidance = 1.0, spacing: Spacing = "trailing",
    corrector: Annotated[str, Knob(choices=("preset", *CORRECTORS), help="on arrival: as the preset does, nothing, "
                                   "correct for free, or correct and evaluate again")] = "preset",
    lower_order_final: Annotated[bool, Knob(needs={"preset": "dpmpp_3m"}, help="at most as high an order as there are "
                                            "steps left")] = True,
    model: Which = "best",
) -> Iterator[Step]:
    """The unified sampling framework: a solver chosen step by step, here as one of its presets.

    State (n_samples, *problem.shape). The last step goes to the data estimate (sigma 0). Plans of one's own, and those
    that a search found, run with `run_plan`.
    Cost: ``nfe(n_steps, corrector) * branches`` evaluations per sample, where branches is 2 with guidance, else 1.
    Raises ValueError where n_steps exceeds the schedule's levels or guidance needs a null label that is not there.
    """
    points = grid(problem.schedule, n_steps, spacing)
    plan = preset_plan(preset, points, lower_order_final=lower_order_final, corrector=corrector)
    yield from run_plan(problem, rng, plan, guidance=guidance, model=model)


def _combined(history: Sequence[Evaluated], start: int, found: Weights) -> Tensor:
    values = [e.x0 if found.prediction == "x0" else e.eps for e in history]
    return combined(history[start].x, values, (found.state, *found.values))
