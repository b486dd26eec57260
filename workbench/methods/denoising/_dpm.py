"""Updates of DPM-Solver and DPM-Solver++: exponential integrators in log-SNR of order 1 to 3.

With D the estimate ("x0" or "eps") and h the step in log-SNR, every update is
    x_there = decay x - scale (w0 D + w1 D' + w2 D'') + fresh z,
where D' and D'' are differences that stand for h and h^2 times D's derivatives in log-SNR (arXiv 2206.00927,
proposition 3.1; arXiv 2211.01095, proposition 4.1). Solvers differ in where these differences come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.methods.denoising._march import Advance, Evaluated, combined
from workbench.problems.denoising import Point, Schedule, with_signal


class Linear(NamedTuple):
    """A step with the estimate held fixed: decay x - scale expm1(g) D + fresh z, and the weights of its derivatives."""

    decay: float
    scale: float
    g: float
    fresh: float

    def weight(self, k: int) -> float:
        """w0, w1, w2, ... by Taylor expansion: g phi_(k+1)(g)."""
        if k == 0:  # from alpha 0, where g is minus infinity, the estimate is all there is
            return math.expm1(self.g)
        return self.g * phi(k + 1, self.g)


def phi(k: int, z: float) -> float:
    """phi_0 = e^z, phi_k = (phi_(k-1) - 1 / (k-1)!) / z; by its series where that difference would cancel."""
    if abs(z) < 1:
        return math.fsum(z**j / math.factorial(j + k) for j in range(20))
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def linear(here: Point, there: Point, form: str, is_stochastic: bool = False) -> Linear:
    """The coefficients of the step of the flow, or of the reverse SDE."""
    h = there.log_snr - here.log_snr
    if form == "x0":
        decay, g = there.sigma / here.sigma, -h
        if is_stochastic:
            return Linear(decay * math.exp(-h), there.alpha, 2 * g, there.sigma * math.sqrt(-math.expm1(2 * g)))
        return Linear(decay, there.alpha, g, 0.0)
    decay = there.alpha / here.alpha
    if is_stochastic:
        return Linear(decay, 2 * there.sigma, h, there.sigma * math.sqrt(math.expm1(2 * h)))
    return Linear(decay, there.sigma, h, 0.0)


def multistep_step(x: Tensor, step: Advance, *, order: int = 2, prediction: str = "x0", correction: str = "midpoint",
                   stochastic: bool = False, lower_order_final: bool = True, quantile: float | None = None
                   ) -> tuple[Tensor, Evaluated]:
    """One multistep update: x (B, *shape) at step.here -> x at step.there. 1 evaluation per row.

    Differences come from former steps' estimates; of lower order while there are too few, in the last steps with
    lower_order_final, and into sigma 0, where the answer is the data estimate.
    From alpha 0 the step on "x0" is DDIM's, its limit, and what was estimated there serves no later step, being
    infinitely far; on "eps" there is none: raises ValueError.
    correction, at order 2: the weight of D' by the midpoint rule, or Taylor's. At order 3 all weights are Taylor's, but
    "midpoint" counts the second derivative half, as the authors' code and diffusers do, which makes the error small
    but of second order; "taylor" is of third order.
    Source: arXiv 2211.01095, algorithm 2 and its forms for noise estimates, order 3 and the reverse SDE.
    """
    if prediction == "eps":
        with_signal(step.schedule, step.here, "dpm_solver, prediction='eps'")
    now = estimated(step, x, step.here, quantile)
    if step.there.sigma == 0:
        return now.x0, now
    past = [p for p in step.past if p.point.alpha > 0]
    known = (now, *past[: min(order, step.n_left if lower_order_final else order) - 1])
    weights, fresh = multistep_weights(tuple(e.point for e in known), step.there, prediction, correction, stochastic)
    out = combined(x, [getattr(e, prediction) for e in known], weights)
    return (torch.add(out, step.noise(), alpha=fresh) if stochastic else out), now


@lru_cache(maxsize=8192)
def multistep_weights(levels: tuple[Point, ...], there: Point, prediction: str, correction: str, stochastic: bool
                      ) -> tuple[tuple[float, ...], float]:
    """(c, c_0, ...) and f of an update x_there = c x_here + sum_j c_j D_j + f z with D_j at levels[j], newest first.

    Its order is len(levels), 1 to 3.
    """
    form = linear(levels[0], there, prediction, stochastic)
    w0 = form.weight(0)
    gaps = [(a.log_snr - b.log_snr) / (there.log_snr - levels[0].log_snr) for a, b in pairwise(levels)]
    slopes: list[float] = []  # weights of the differences of neighbours, over their gaps
    if len(levels) == 2:
        slopes = [0.5 * w0 if correction == "midpoint" else form.weight(1)]
    elif len(levels) == 3:  # the difference of the slopes over the gaps' sum is half the second derivative
        w1, w2 = form.weight(1), form.weight(2)
        bend = (w1 * gaps[0] + (w2 if correction == "midpoint" else 2 * w2)) / sum(gaps)
        slopes = [w1 + bend, -bend]
    total = [w0] + [0.0] * len(slopes)
    for j, (slope, gap) in enumerate(zip(slopes, gaps, strict=True)):
        total[j] += slope / gap
        total[j + 1] -= slope / gap
    return (form.decay, *(-form.scale * w for w in total)), form.fresh


def singlestep_step(x: Tensor, step: Advance, *, order: int = 2, prediction: str = "x0", correction: str = "midpoint",
                    quantile: float | None = None, between: Mapping[Point, Sequence[Point]] | None = None
                    ) -> tuple[Tensor, Evaluated]:
    """One singlestep update: x (B, *shape) at step.here -> x at step.there. `order` evaluations per row.

    Differences come from stages within the step, even in log-SNR or, with `between`, at the order - 1 levels that it
    has for step.here. Into sigma 0 the answer is the data estimate, of 1 evaluation. Raises ValueError at alpha 0.
    correction: D' by the midpoint rule (at order 3: from the last stage alone) or by the full Taylor expansion.
    Sources: arXiv 2206.00927, algorithms 1 and 2; arXiv 2211.01095, algorithm 1.
    """
    with_signal(step.schedule, step.here, "dpm_solver, scheme='singlestep'")
    now = estimated(step, x, step.here, quantile)
    here, there = step.here, step.there
    if there.sigma == 0:
        return now.x0, now
    inner = stages(step.schedule, here, there, order) if between is None else tuple(between[here])
    *before, last = singlestep_weights(here, inner, there, prediction, correction)
    values: list[Tensor] = [getattr(now, prediction)]
    for level, weights in zip(inner, before, strict=True):
        values.append(getattr(estimated(step, combined(x, values, weights), level, quantile), prediction))
    return combined(x, values, last), now


@lru_cache(maxsize=8192)
def singlestep_weights(here: Point, inner: tuple[Point, ...], there: Point, prediction: str, correction: str
                       ) -> tuple[tuple[float, ...], ...]:
    """The `combination` that leads to each of the stages `inner`, and at last that of the whole step."""
    levels = (*inner, there)
    spans = [level.log_snr - here.log_snr for level in levels]
    return tuple(combination(here, [s / span for s in spans[:j]], level, prediction,
                             "taylor" if j < len(inner) else correction)
                 for j, (level, span) in enumerate(zip(levels, spans, strict=True)))


def combination(here: Point, shares: Sequence[float], there: Point, prediction: str, correction: str
                ) -> tuple[float, ...]:
    """c, c_0, ... such that a singlestep update is x_there = c x_here + sum_j c_j D_j, D_0 at `here`.

    shares: of the step in log-SNR at which the stages 1, 2, ... lie; as many as the order less one, 0 to 2.
    """
    form = linear(here, there, prediction)
    w0 = form.weight(0)
    later: tuple[float, ...] = ()
    if len(shares) == 1:
        later = ((0.5 * w0 if correction == "midpoint" else form.weight(1)) / shares[0],)
    elif len(shares) == 2 and correction == "midpoint":
        later = (0.0, form.weight(1) / shares[1])
    elif len(shares) == 2:
        w1, w2 = form.weight(1), form.weight(2)
        bend = (2 * w2 - w1 * shares[0]) / (shares[1] - shares[0])  # weight of the difference of the two slopes
        later = ((w1 - bend) / shares[0], bend / shares[1])
    return form.decay, *(-form.scale * w for w in (w0 - sum(later), *later))


def stages(schedule: Schedule, here: Point, there: Point, order: int) -> tuple[Point, ...]:
    """The order - 1 levels that lie evenly in log-SNR between two."""
    a, b = here.log_snr, there.log_snr
    return tuple(schedule.at(schedule.t_at(a + (b - a) * i / order)) for i in range(1, order))


def estimated(step: Advance, x: Tensor, point: Point, quantile: float | None) -> Evaluated:
    """The evaluation of x (B, *shape) at a point, with the data estimate thresholded where there is a quantile.

    Each sample's own quantile of magnitudes, but at least 1, becomes 1, and what is larger is clipped.
    Source: arXiv 2205.11487, section 2.3.
    """
    now = step.denoise(x, point)
    if quantile is None:
        return now
    limit = torch.quantile(now.x0.flatten(1).abs(), quantile, dim=1).clamp(min=1)
    limit = limit.reshape(-1, *[1] * (x.ndim - 1))
    x0 = now.x0.clamp(-limit, limit) / limit
    return Evaluated(point, x, x0)
