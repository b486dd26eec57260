"""DDIM, the first-order sampler of diffusion models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor

from workbench.knob import Knob
from workbench.methods.denoising._march import Advance, Evaluated, march
from workbench.problems.denoising import SPACINGS, Denoising, grid, mixed
from workbench.registry import Step, method
from workbench.rng import Rng

Steps = Annotated[int, Knob(low=1, high=1000, soft=(1, 50), step=1, unit="steps", small=4,
                            help="solver steps from noise to data")]
Guidance = Annotated[float, Knob(low=0.0, high=20.0, soft=(1, 5), step=0.25,
                                 help="classifier-free guidance weight; 1 is off, other values double the evaluations")]
Spacing = Annotated[str, Knob(choices=SPACINGS, help="how the steps are spread over the noise levels")]
Which = Annotated[str, Knob(choices=("best", "cheapest"), help="which of the problem's models takes every step")]
Eta = Annotated[float, Knob(low=0.0, high=1.0, step=0.05,
                            help="fresh noise per step: 0 deterministic, 1 as much as DDPM's ancestral sampling")]


def ddim_step(x: Tensor, step: Advance, *, eta: float = 0.0) -> tuple[Tensor, Evaluated]:
    """One DDIM step: x (B, *shape) at step.here -> x at step.there. 1 evaluation per row.

    The fresh noise is eta times the standard deviation of q(x_there | x_here, x_0), for any alpha and sigma
    sigma_there / sigma_here sqrt(sigma_here^2 - (alpha_here / alpha_there)^2 sigma_there^2); with eta 1 the step is
    DDPM's ancestral one. On VP that is the paper's own, and of VE it is SMLD's (arXiv 2011.13456, appendix F).
    Source: arXiv 2010.02502, equation 12 with sigma_t of equation 16.
    """
    now = step.denoise(x, step.here)
    here, there, x0, eps = step.here, step.there, now.x0, now.eps
    if there.sigma == 0:
        return x0, now
    if eta == 0:
        return mixed(there.alpha, x0, there.sigma, eps), now
    kept = here.alpha / there.alpha * there.sigma  # of the noise in x, what x_there had: factors, against cancellation
    fresh = eta * there.sigma / here.sigma * math.sqrt(max((here.sigma - kept) * (here.sigma + kept), 0.0))
    towards = mixed(there.alpha, x0, math.sqrt(max(there.sigma**2 - fresh**2, 0.0)), eps)
    return torch.add(towards, step.noise(), alpha=fresh), now


@method(version=2, source="DDIM, arXiv 2010.02502, eq. 12 and 16",
        cost="n_steps * branches")
def ddim(problem: Denoising, rng: Rng, *, n_steps: Steps = 20, guidance: Guidance = 1.0, spacing: Spacing = "trailing",
         eta: Eta = 0.0, model: Which = "best") -> Iterator[Step]:
    """Denoising diffusion implicit models: first order, deterministic at eta 0.

    State (n_samples, *problem.shape). The last step goes to the data estimate (sigma 0). Starts without signal too; on
    a rectified flow it is Euler's method.
    Cost: ``n_steps * branches`` evaluations per sample, where branches is 2 with guidance and 1 without.
    Raises ValueError where n_steps exceeds the schedule's levels or guidance needs a null label that is not there.
    """
    points = grid(problem.schedule, n_steps, spacing)
    owner = problem.models[-1 if model == "best" else 0]
    yield from march(problem, rng, points, [owner] * n_steps, ddim_step, guidance=guidance, eta=eta)
