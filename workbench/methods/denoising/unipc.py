"""UniPC: predictors and correctors of any order from one formula, the corrector at no further evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Annotated

import numpy as np
from torch import Tensor

from workbench.knob import Knob
from workbench.methods.denoising._dpm import linear, phi
from workbench.methods.denoising._march import Advance, Evaluated, combined, march
from workbench.methods.denoising.ddim import Guidance, Spacing, Steps, Which
from workbench.methods.denoising.dpm_solver import Estimate, Final
from workbench.problems.denoising import Denoising, Point, grid, with_signal
from workbench.registry import Step, method
from workbench.rng import Rng


def coefficients(offsets: tuple[float, ...], g: float, variant: str) -> tuple[float, ...]:
    """B(g) a_m for the distances r_m of other estimates from the step's start, in steps of log-SNR.

    With D_m their differences from the estimate at the start, B(g) sum_m a_m D_m / r_m stands for the integral of
    what the estimate gains within the step. g: minus the step in log-SNR for "x0", plus for "eps". variant: B(g) is g
    ("bh1") or expm1(g) ("bh2"). The a_m solve a Vandermonde system, and B cancels; but one estimate alone has 1/2 in
    place of its solution, so that B matters: in predictors of order 2 and correctors of order 1.
    Source: arXiv 2302.04867, theorem 3.1 and algorithms 1 and 2.
    """
    if len(offsets) == 1:
        return (0.5 * (g if variant == "bh1" else math.expm1(g)),)
    n = len(offsets)
    rows = [[r**k for r in offsets] for k in range(n)]
    wanted = [g * phi(k + 1, g) * math.factorial(k) for k in range(1, n + 1)]
    return tuple(np.linalg.solve(np.array(rows), np.array(wanted)).tolist())


@lru_cache(maxsize=8192)
def weights(levels: tuple[Point, ...], there: Point, prediction: str, variant: str) -> tuple[float, ...]:
    """c, c_0, ... of the step c x + sum_j c_j D_j from x at levels[0] to `there`, with estimates D_j at all levels."""
    start = levels[0]
    form, h = linear(start, there, prediction), there.log_snr - start.log_snr
    offsets = tuple((level.log_snr - start.log_snr) / h for level in levels[1:])
    slopes = [a / r for a, r in zip(coefficients(offsets, form.g, variant), offsets, strict=True)] if offsets else []
    return form.decay, *(-form.scale * w for w in (math.expm1(form.g) - sum(slopes), *slopes))


def advanced(x: Tensor, known: Sequence[Evaluated], there: Point, prediction: str, variant: str) -> Tensor:
    """x (B, *shape) carried from known[0].point to `there`, with the estimates of all of `known`.

    Predicts where they are former ones, corrects where the one at `there` is among them. Order len(known), and one
    more if it corrects.
    """
    found = weights(tuple(k.point for k in known), there, prediction, variant)
    return combined(x, [getattr(k, prediction) for k in known], found)


def unipc_step(x: Tensor, step: Advance, *, order: int = 2, prediction: str = "x0", variant: str = "bh2",
               corrector: bool = True, lower_order_final: bool = True) -> tuple[Tensor, Evaluated]:
    """One UniPC step: x (B, *shape), as predicted for step.here -> x as predicted for step.there. 1 evaluation per row.

    The evaluation at the predicted state first corrects that state (UniC, with the order that predicted it), then
    serves the next prediction (UniP) as it is; Evaluated.x is the corrected state. The order is lower while there are
    too few former evaluations and, with lower_order_final, towards the end. Into sigma 0 the answer is the data
    estimate, to which a correction would add nothing. From alpha 0 the step on "x0" is DDIM's, its limit, and what was
    estimated there serves no later step, being infinitely far; on "eps" there is none: raises ValueError.
    Source: arXiv 2302.04867, algorithms 1 and 2.
    """
    if prediction == "eps":
        with_signal(step.schedule, step.here, "unipc, prediction='eps'")
    now = step.denoise(x, step.here)
    if step.there.sigma == 0:
        return now.x0, now
    past = [p for p in step.past if p.point.alpha > 0]
    if corrector and past:
        used = min(order, len(past), step.n_left + 1 if lower_order_final else order)
        known = (*past[:used], now)
        now = now.changed(x=advanced(past[0].x, known, step.here, prediction, variant))
    used = min(order, len(past) + 1, step.n_left if lower_order_final else order)
    return advanced(now.x, (now, *past[: used - 1]), step.there, prediction, variant), now


@method(version=2, source="UniPC, arXiv 2302.04867, alg. 1 and 2",
        cost="n_steps * branches")
def unipc(
    problem: Denoising, rng: Rng, *, n_steps: Steps = 20, guidance: Guidance = 1.0, spacing: Spacing = "trailing",
    order: Annotated[int, Knob(low=1, high=4, step=1, help=(
        "order of accuracy of the predictor; the corrector adds one"))] = 2,
    prediction: Estimate = "x0",
    variant: Annotated[str, Knob(choices=("bh1", "bh2"), help=(
        "B(h) where one other estimate is at hand: h, or exp(h) - 1, which is for guided sampling"))] = "bh2",
    corrector: Annotated[bool, Knob(help="correct states by the evaluation that the next step makes anyway")] = True,
    lower_order_final: Annotated[bool, Knob(needs={"order": (3, 4, 2)}, help=(
        "lower the order to the number of steps that are left"))] = True,
    final: Final = "zero", model: Which = "best",
) -> Iterator[Step]:
    """UniPC: a predictor of order 1 to 4 and a corrector of one order more that costs nothing.

    State (n_samples, *problem.shape), as predicted. Updates into sigma 0 give the data estimate.
    Cost: ``n_steps * branches`` evaluations per sample, where branches is 2 with guidance and 1 without.
    Raises ValueError where n_steps exceeds the schedule's levels or guidance needs a null label that is not there.
    """
    points = grid(problem.schedule, n_steps, spacing, final)
    owner = problem.models[-1 if model == "best" else 0]
    yield from march(problem, rng, points, [owner] * n_steps, unipc_step, guidance=guidance, order=order,
                     prediction=prediction, variant=variant, corrector=corrector, lower_order_final=lower_order_final)
