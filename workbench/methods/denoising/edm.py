"""EDM: Heun's method in the noise level, with Karras' levels and, where wanted, churn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

from torch import Tensor

from workbench.knob import Knob
from workbench.methods.denoising._march import Advance, Evaluated, combined, march
from workbench.methods.denoising.ddim import Guidance, Steps, Which
from workbench.problems.denoising import Denoising, mixed, noisiest, power_grid, with_signal
from workbench.registry import Step, method
from workbench.rng import Rng


def edm_step(x: Tensor, step: Advance, *, heun: bool = True, gamma: float = 0.0, s_tmin: float = 0.0,
             s_tmax: float = math.inf, s_noise: float = 1.0) -> tuple[Tensor, Evaluated]:
    """One EDM step: x (B, *shape) at step.here -> x at step.there, in x / alpha and rho = sigma / alpha.

    Where s_tmin <= rho <= s_tmax, noise first raises rho to (1 + gamma) rho, at most the schedule's noisiest level;
    s_noise scales that noise. Then Euler's method (which is DDIM) and Heun's correction of it, 2 evaluations per row;
    without heun, and into sigma 0, where Euler's step gives the data estimate, 1. The evaluation returned is the
    one at the raised level.
    Raises ValueError at alpha 0. Source: arXiv 2206.00364, algorithm 2; the paper's sigma is rho here.
    """
    here, there = step.here, step.there
    with_signal(step.schedule, here, "edm_heun")
    rho = math.exp(-here.log_snr)
    if gamma > 0 and s_tmin <= rho <= s_tmax:
        top = noisiest(step.schedule)
        raised = (1 + gamma) * rho
        if raised < math.exp(-top.log_snr):
            top = step.schedule.at(step.schedule.t_at(-math.log(raised)))
        fresh = math.sqrt(max(math.exp(-2 * top.log_snr) - rho**2, 0.0))
        x = mixed(top.alpha / here.alpha, x, top.alpha * fresh * s_noise, step.noise())
        here, rho = top, math.exp(-top.log_snr)
    now = step.denoise(x, here)
    if there.sigma == 0:
        return now.x0, now
    scale, length = there.alpha / here.alpha, there.alpha * (math.exp(-there.log_snr) - rho)
    euler = mixed(scale, x, length, now.eps)
    if not heun:
        return euler, now
    then = step.denoise(euler, there)
    return combined(x, (now.eps, then.eps), (scale, length / 2, length / 2)), now


@method(version=2, source="EDM, arXiv 2206.00364, alg. 2 and eq. 5",
        cost="(2 * n_steps - 1 if heun else n_steps) * branches")
def edm_heun(
    problem: Denoising, rng: Rng, *, n_steps: Steps = 18, guidance: Guidance = 1.0,
    heun: Annotated[bool, Knob(small=False, help=(
        "correct each Euler step to Heun's second-order one, for a second evaluation"))] = True,
    rho_power: Annotated[float, Knob(low=1.0, high=20.0, soft=(1, 10), step=0.5, help=(
        "noise levels are even in sigma ** (1 / this): 1 even, more puts more steps at the data"))] = 7.0,
    stochastic: Annotated[bool, Knob(help="raise the noise level a little before each step (churn)")] = False,
    s_churn: Annotated[float, Knob(low=0.0, high=1000.0, soft=(0, 100), step=5, needs={"stochastic": True}, help=(
        "churn, spread over the steps: each raises its level by min(this / steps, sqrt 2 - 1) of itself"))] = 40.0,
    s_tmin: Annotated[float, Knob(low=0.0, high=1000.0, soft=(0, 1), step=0.01, needs={"stochastic": True},
                                  help="the least sigma / alpha at which there is churn")] = 0.05,
    s_tmax: Annotated[float, Knob(low=0.0, high=1000.0, soft=(0, 80), step=0.5, needs={"stochastic": True},
                                  help="the greatest sigma / alpha at which there is churn")] = 50.0,
    s_noise: Annotated[float, Knob(low=0.9, high=1.1, soft=(1, 1.01), step=0.001, needs={"stochastic": True},
                                   help="standard deviation of churn's noise, above 1 against loss of detail")] = 1.003,
    model: Which = "best",
) -> Iterator[Step]:
    """EDM's sampler: Heun's method in sigma / alpha on Karras' noise levels, deterministic or with churn.

    State (n_samples, *problem.shape). Works on every model through x / alpha. The last step goes to the data estimate
    (sigma 0) and is Euler's. Defaults of the churn are the paper's for its own ImageNet-64 model (table 5).
    Cost: ``(2 * n_steps - 1 if heun else n_steps) * branches`` evaluations per sample, where branches is 2 with
    guidance and 1 without.
    Raises ValueError where guidance needs a null label that is not there, or the schedule starts without signal.
    """
    with_signal(problem.schedule, noisiest(problem.schedule), "edm_heun")
    points = power_grid(problem.schedule, n_steps, "rho", rho_power)
    owner = problem.models[-1 if model == "best" else 0]
    gamma = min(s_churn / n_steps, math.sqrt(2) - 1) if stochastic else 0.0
    yield from march(problem, rng, points, [owner] * n_steps, edm_step, guidance=guidance, heun=heun,
                     gamma=gamma, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
