"""DEIS: exponential integrators that extrapolate the noise estimate as a polynomial, or Runge-Kutta in rho.

With rho = sigma / alpha and v = x / alpha the probability-flow ODE is dv/drho = eps, so a step is exact but for eps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated

import numpy as np
from torch import Tensor

from workbench.knob import Knob
from workbench.methods.denoising._march import Advance, Evaluated, combined, march
from workbench.methods.denoising.ddim import Guidance, Steps, Which
from workbench.problems.denoising import FINALS, PHASES, Denoising, Point, Schedule, noisiest, power_grid, with_signal
from workbench.registry import Step, method
from workbench.rng import Rng

VARIANTS = ("tab", "rho_ab", "log_rho_ab", "ipndm", "rho_rk")
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
# Explicit Runge-Kutta methods: rows of the coefficients of each stage, and the weights. Nodes are the rows' sums.
RUNGE_KUTTA: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "euler": (((),), (1.0,)),
    "midpoint": (((), (1 / 2,)), (0.0, 1.0)),
    "heun": (((), (1.0,)), (1 / 2, 1 / 2)),
    "kutta3": (((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6)),
    "rk4": (((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def nfe(n_steps: int, variant: str, degree: int, final: str) -> int:
    """Evaluations per sample without guidance; the step into sigma 0, where there is one, takes 1 in every variant."""
    stages = degree + 1 if variant == "rho_rk" else 1
    return stages * n_steps if final == "cleanest" else stages * (n_steps - 1) + 1


@lru_cache(maxsize=8192)
def coefficients(schedule: Schedule, variant: str, here: Point, there: Point, past: tuple[Point, ...]
                 ) -> tuple[float, ...]:
    """The weights of the noise estimates at (here, *past), newest first, in a multistep step from here to there.

    x_there = alpha_there / alpha_here x_here + sum_j C_j eps_j, where C_j is the integral of alpha_there times the
    Lagrange polynomial of point j over rho: a polynomial in the schedule's time t ("tab"), in rho ("rho_ab") or in
    log rho ("log_rho_ab", as diffusers' DEISMultistepScheduler). "ipndm" instead gives DDIM's coefficient times the
    Adams-Bashforth weights of even steps: of order degree + 1 on levels even in rho, where they are "rho_ab"'s, and of
    order 2 on all others whatever the degree, for neighbouring steps differ there by a share of their length, and with
    it the weight of the first difference is off. For every variant the sum over j is DDIM's coefficient.
    Gauss-Legendre quadrature in log rho with 64 points: to rounding where t is a smooth function of log rho, to about
    1e-6 for a table of noise levels. Source: arXiv 2204.13902, the coefficients C_ij of tAB-DEIS and rhoAB-DEIS.
    """
    ddim = there.sigma - here.sigma * there.alpha / here.alpha
    if variant == "ipndm" or not past:
        return tuple(ddim * weight for weight in ADAMS_BASHFORTH[len(past)])
    start, end = -here.log_snr, -there.log_snr
    log_rho = (start + end) / 2 + (end - start) / 2 * _NODES
    known = np.array([-p.log_snr for p in (here, *past)])
    if variant == "tab":
        at, known = np.array([schedule.t_at(-r) for r in log_rho]), np.array([p.t for p in (here, *past)])
    elif variant == "rho_ab":
        at, known = np.exp(log_rho), np.exp(known)
    else:
        at = log_rho
    scale = there.alpha * (end - start) / 2 * _WEIGHTS * np.exp(log_rho)
    others = [np.delete(known, j) for j in range(len(known))]
    return tuple(float(scale @ ((at[:, None] - other) / (own - other)).prod(1))
                 for own, other in zip(known, others, strict=True))


def deis_step(x: Tensor, step: Advance, *, variant: str = "tab", degree: int = 3, two_stage: str = "heun"
              ) -> tuple[Tensor, Evaluated]:
    """One DEIS step: x (B, *shape) at step.here -> x at step.there.

    Multistep variants take a polynomial of that degree, less while the history is shorter, for 1 evaluation per row;
    "rho_rk" takes the Runge-Kutta method of degree + 1 stages (Euler, `two_stage` "heun" or "midpoint", Kutta's
    third-order, the classical fourth-order) in rho, 1 evaluation per stage.
    Into sigma 0 every variant goes to the data estimate (first order), for 1 evaluation. Raises ValueError at alpha 0.
    Source: arXiv 2204.13902, tAB-DEIS, rhoAB-DEIS, rhoRK-DEIS and iPNDM.
    """
    here, there = step.here, step.there
    with_signal(step.schedule, here, f"deis, variant={variant!r}")
    now = step.denoise(x, here)
    if there.sigma == 0:
        return now.x0, now
    if variant == "rho_rk":
        return _runge_kutta(x, now, step, ("euler", two_stage, "kutta3", "rk4")[degree]), now
    past = step.past[:degree]
    found = coefficients(step.schedule, variant, here, there, tuple(e.point for e in past))
    return combined(x, [e.eps for e in (now, *past)], (there.alpha / here.alpha, *found)), now


def _runge_kutta(x: Tensor, now: Evaluated, step: Advance, name: str) -> Tensor:
    *stages, (_, last) = runge_kutta_weights(step.schedule, step.here, step.there, name)
    slopes = [now.eps]
    for level, weights in stages:
        slopes.append(step.denoise(combined(x, slopes, weights), level).eps)
    return combined(x, slopes, last)


@lru_cache(maxsize=8192)
def runge_kutta_weights(schedule: Schedule, here: Point, there: Point, name: str
                        ) -> tuple[tuple[Point, tuple[float, ...]], ...]:
    """The level of each later stage and, last, of the step's end, with the weights of x_here and of the noise estimates
    so far that lead to it; of the method of that name in RUNGE_KUTTA, in rho."""
    start, end = (math.exp(-p.log_snr) for p in (here, there))
    rows, last = RUNGE_KUTTA[name]
    found = []
    for row, node in (*((row, sum(row)) for row in rows[1:]), (last, 1.0)):
        to = there if node == 1 else schedule.at(schedule.t_at(-math.log(start + node * (end - start))))
        found.append((to, (to.alpha / here.alpha, *(to.alpha * (end - start) * weight for weight in row))))
    return tuple(found)


@method(version=2, source="DEIS, arXiv 2204.13902, sec. 3 and app. H.3",
        cost="nfe(n_steps, variant, degree, final) * branches")
def deis(
    problem: Denoising, rng: Rng, *, n_steps: Steps = 10, guidance: Guidance = 1.0,
    variant: Annotated[str, Knob(choices=VARIANTS, help=(
        "multistep with the noise as a polynomial in t, rho or log rho, or with weights for even steps (ipndm); or "
        "Runge-Kutta in rho"))] = "tab",
    degree: Annotated[int, Knob(low=0, high=3, step=1, small=1, help=(
        "degree of the polynomial, or stages less one (rho_rk): the order of accuracy less one, but of ipndm on uneven "
        "steps at most 2; 0 is DDIM"))] = 3,
    two_stage: Annotated[str, Knob(choices=("heun", "midpoint"), needs={"variant": "rho_rk", "degree": 1},
                                   help="which Runge-Kutta method of two stages")] = "heun",
    # small: of few steps, those even in powers of t amplify the rounding of float32 networks most
    phase: Annotated[str, Knob(choices=PHASES, small="rho", help="what the steps are even in, up to a power")] = "t",
    t_power: Annotated[float, Knob(low=1.0, high=4.0, step=0.25, needs={"phase": "t"}, help=(
        "levels are even in t ** (1 / this): 1 even in t, more puts more at the data"))] = 2.0,
    rho_power: Annotated[float, Knob(low=1.0, high=20.0, soft=(1, 10), step=0.5, needs={"phase": "rho"}, help=(
        "levels are even in rho ** (1 / this): 1 even in rho, more puts more at the data"))] = 7.0,
    final: Annotated[str, Knob(choices=FINALS, help=(
        "the last level: clean data (one first-order step into it) or the cleanest level that the model knows"
        ))] = "cleanest",
    model: Which = "best",
) -> Iterator[Step]:
    """Diffusion exponential integrator sampler: high order from extrapolated noise estimates, for few steps.

    State (n_samples, *problem.shape). With final "cleanest", as in the paper, the answer still carries the little
    noise of that level. Step i of a multistep variant has degree min(i, degree).
    Cost: ``nfe(n_steps, variant, degree, final) * branches`` evaluations per sample: n_steps for multistep variants,
    (degree + 1) * n_steps for "rho_rk"; a step into sigma 0 (final "zero", n_steps included) takes 1 in all of them.
    branches is 2 with guidance and 1 without. Raises ValueError where guidance needs a null label that is not there, or
    the schedule starts without signal.
    """
    with_signal(problem.schedule, noisiest(problem.schedule), f"deis, variant={variant!r}")
    points = power_grid(problem.schedule, n_steps, phase, t_power if phase == "t" else rho_power, final)
    owner = problem.models[-1 if model == "best" else 0]
    yield from march(problem, rng, points, [owner] * n_steps, deis_step, guidance=guidance, variant=variant,
                     degree=degree, two_stage=two_stage)
