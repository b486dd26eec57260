"""DPM-Solver++(2M), the second-order multistep sampler on data estimates."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.methods.denoising._march import Advance, Evaluated, march
from workbench.methods.denoising.ddim import Guidance, Spacing, Steps, Which
from workbench.problems.denoising import Denoising, grid, mixed
from workbench.registry import Step, method
from workbench.rng import Rng


def dpmpp_2m_step(x: Tensor, step: Advance) -> tuple[Tensor, Evaluated]:
    """One 2M step: x (B, *shape) at step.here -> x at step.there. 1 evaluation per row.

    First order (DDIM) without history, and into sigma 0, where the formula's limit is the data estimate itself. From
    alpha 0 h is infinite: the step is DDIM's, and the next one of first order.
    Source: arXiv 2211.01095, algorithm 2.
    """
    now = step.denoise(x, step.here)
    here, there, x0 = step.here, step.there, now.x0
    if there.sigma == 0:
        return x0, now
    h = there.log_snr - here.log_snr
    towards = x0
    if step.past:
        before = step.past[0]
        r = (here.log_snr - before.point.log_snr) / h
        towards = torch.lerp(before.x0, x0, 1 + 0.5 / r)
    return mixed(there.sigma / here.sigma, x, -there.alpha * math.expm1(-h), towards), now


@method(version=2, source="DPM-Solver++, arXiv 2211.01095, alg. 2",
        cost="n_steps * branches")
def dpmpp_2m(problem: Denoising, rng: Rng, *, n_steps: Steps = 20, guidance: Guidance = 1.0,
             spacing: Spacing = "trailing", model: Which = "best") -> Iterator[Step]:
    """DPM-Solver++(2M): second order from the current and the previous data estimate.

    State (n_samples, *problem.shape). The first step and the last, into sigma 0, are first order.
    Cost: ``n_steps * branches`` evaluations per sample, where branches is 2 with guidance and 1 without.
    Raises ValueError where n_steps exceeds the schedule's levels or guidance needs a null label that is not there.
    """
    points = grid(problem.schedule, n_steps, spacing)
    owner = problem.models[-1 if model == "best" else 0]
    yield from march(problem, rng, points, [owner] * n_steps, dpmpp_2m_step, guidance=guidance)
