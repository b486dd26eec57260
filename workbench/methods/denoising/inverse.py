"""Inverse problems without training: samples of the data given a part of it, its grey values or its class.

Each function makes a `Condition` for `pc_sample`, which then draws from the data's law under it. Of them `inpaint` is a
method, for a problem can bring the known part by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import torch
from torch import Tensor

from workbench.knob import Knob
from workbench.methods.denoising.ddim import Guidance, Steps, Which
from workbench.methods.denoising.score_sde import (
    Condition,
    Corrections,
    Corrector,
    Denoise,
    End,
    Length,
    Noise,
    Predictor,
    SdeName,
    SigmaMax,
    Snr,
    corrections,
    nfe,  # noqa: F401 (in the cost formula)
    pc_sample,
)
from workbench.problems.denoising import Denoising, Point
from workbench.problems.mixtures import Mixture
from workbench.registry import Step, method
from workbench.rng import Rng

Known = Annotated[float, Knob(low=0.0, high=1.0, step=0.05, unit="of the width",
                              help="known part: this share of a state's last axis, from its first entry on")]

# Columns of an orthonormal basis of colours; the first, along (1, 1, 1), carries the grey value.
COLOURS = torch.tensor([[1 / math.sqrt(3), 1 / math.sqrt(2), 1 / math.sqrt(6)],
                        [1 / math.sqrt(3), -1 / math.sqrt(2), 1 / math.sqrt(6)],
                        [1 / math.sqrt(3), 0.0, -2 / math.sqrt(6)]], dtype=torch.float64)


def known_part(data: Tensor, mask: Tensor) -> Condition:
    """Inpainting: the entries of data (B, *shape) where mask is 1 are known, the others (0) are to be drawn.

    mask: of data's shape or one that broadcasts to it. After every update the known part is replaced by alpha data +
    sigma z with fresh z. This draws from the law given the noisy known part at each level, which comes to the posterior
    given the data only where corrections have time at the last levels: for two coordinates of correlation .8 the
    predictor alone ends at a mean of .05 where the posterior's is .26.
    Raises ValueError for a mask of other values or of a shape that does not fit.
    Source: arXiv 2011.13456, section 5 and appendix I.2.
    """
    try:
        known = mask.to(torch.bool).expand(data.shape)
    except RuntimeError:
        raise ValueError(f"mask {tuple(mask.shape)}: expected one that broadcasts to {tuple(data.shape)}") from None
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("mask: expected 1 where the data is known and 0 where it is not, found other values")

    def impose(x: Tensor, at: Point, noise: Noise) -> Tensor:
        if at.sigma == 0:
            return torch.where(known, data, x)
        return torch.where(known, at.alpha * data + at.sigma * noise(), x)

    return Condition(impose=impose)


def left_part(shape: Sequence[int], known: float) -> Tensor:
    """The mask (*shape) of `inpaint`: 1 on the first floor(known * width) entries of the last axis, 0 elsewhere."""
    mask = torch.zeros(tuple(shape))
    mask[..., : math.floor(known * shape[-1] + 1e-9)] = 1
    return mask


def pictures(problem: Denoising, rng: Rng) -> Tensor | None:
    """What a run of `inpaint` is given: n_samples draws of the problem's true law (n_samples, *shape), or None.

    Sample i's is fixed by (seed, i), whatever the batch. None where the problem cannot draw from its law.
    """
    if problem.data is None:
        return None
    seeds = ((rng.seed * 1_000_003 + rng.first + i) % 2**32 for i in range(rng.n_samples))
    return torch.cat([problem.data(1, seed) for seed in seeds]).to(problem.device, problem.dtype)


@method(version=1, source="Score SDE, arXiv 2011.13456, sec. 5 and app. I.2",
        cost="2 * nfe(n_steps, predictor, corrector, n_corrector) * branches", at_most=True)
def inpaint(problem: Denoising, rng: Rng, *, n_steps: Steps = 20, known: Known = 0.5, sde: SdeName = "vp",
            predictor: Predictor = "reverse_diffusion", corrector: Corrector = "langevin", n_corrector: Corrections = 1,
            snr: Snr = 0.16, length: Length = "norms", denoise: Denoise = True, t_end: End = 1e-3,
            sigma_max: SigmaMax = 50.0, guidance: Guidance = 1.0, model: Which = "best") -> Iterator[Step]:
    """Inpainting: the left part of each state is given, the rest is drawn by predictor and corrector.

    State (n_samples, *problem.shape) on the SDE's own scale. The given states are `pictures(problem, rng)`, draws of
    the true law, so that right answers follow that law too; a problem that has none gives states that the same sampler
    has drawn before, unconditionally, at the same price again. What is known of them is `left_part`, and it is imposed
    as `known_part` says. Its answer is exact in the known part only: the corrector decides how near the rest comes to
    the posterior, so it is on by default. Knobs otherwise as in `score_sde`.
    Cost: at most ``2 * nfe(n_steps, predictor, corrector, n_corrector) * branches`` evaluations per sample, where
    branches is 2 with guidance and 1 without; half of that where the problem has data.
    Raises ValueError as `score_sde` does.
    """
    asked = problem.models[-1 if model == "best" else 0]

    def drawn(condition: Condition | None) -> Iterator[Step]:
        return pc_sample(problem, rng, n_steps=n_steps, sde=sde, predictor=predictor,
                         n_corrections=corrections(corrector, n_corrector), snr=snr, length=length, denoise=denoise,
                         t_end=t_end, sigma_max=sigma_max, guidance=guidance, model=asked, condition=condition)

    given = pictures(problem, rng)
    if given is None:
        *_, last = drawn(None)
        assert isinstance(last.state, Tensor)
        given = last.state
    yield from drawn(known_part(given, left_part(problem.shape, known).to(problem.device)))


def known_grey(grey: Tensor) -> Condition:
    """Colourisation: the mean over the three channels of a state (B, 3, ...) is known, grey (B, 1, ...) or (B, ...).

    The channels are rotated by an orthonormal matrix whose first column is (1, 1, 1) / sqrt 3; the first channel is
    then sqrt 3 times the grey value and treated as in `known_part`. Raises ValueError where the states that it is
    applied to have no three channels, or other pictures than grey. Source: arXiv 2011.13456, appendix I.3.
    """

    def impose(x: Tensor, at: Point, noise: Noise) -> Tensor:
        if x.ndim < 3 or x.shape[1] != 3 or grey.numel() * 3 != x.numel():
            raise ValueError(f"states {tuple(x.shape)} and grey values {tuple(grey.shape)}: expected (B, 3, ...) and "
                             f"(B, 1, ...) or (B, ...)")
        basis = COLOURS.to(x)
        rotated = torch.einsum("bc...,cd->bd...", x, basis)
        first = math.sqrt(3) * at.alpha * grey.reshape(x[:, :1].shape)
        if at.sigma != 0:
            first = first + at.sigma * noise()[:, :1]
        return torch.einsum("bd...,cd->bc...", torch.cat((first, rotated[:, 1:]), 1), basis)

    return Condition(impose=impose)


def guided_by(log_prob: Callable[[Tensor, Point], Tensor], weight: float = 1.0) -> Condition:
    """Class-conditional sampling: weight * gradient of log_prob(x (B, *shape), here) -> (B,) is added to the score.

    log_prob: log p_t(y | x) of a classifier of noisy states, row by row and differentiable; weight 1 is Bayes' rule.
    Costs one forward and backward pass of the classifier per evaluation, which the models' cost does not count.
    Source: arXiv 2011.13456, section 5 and appendix I.1.
    """

    def gradient(x: Tensor, here: Point) -> Tensor:
        with torch.enable_grad():
            own = x.detach().requires_grad_()
            return weight * torch.autograd.grad(log_prob(own, here).sum(), own)[0]

    return Condition(gradient=gradient)


def mixture_classifier(law: Mixture, groups: Sequence[Sequence[int]], labels: Tensor
                       ) -> Callable[[Tensor, Point], Tensor]:
    """The exact log p_t(y | x) of a mixture whose class k is its components groups[k]; labels (B,): the wanted classes.

    Returned: log_prob(x (B, *shape), here) -> (B,). Raises ValueError for labels that name no class.
    """
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= len(groups):
        raise ValueError(f"labels={labels.tolist()}: expected numbers from 0 to {len(groups) - 1}")
    member = torch.full((len(groups), len(law.weights)), -math.inf, dtype=torch.float64)
    for k, group in enumerate(groups):
        member[k, list(group)] = 0.0

    def log_prob(x: Tensor, here: Point) -> Tensor:
        identity = torch.eye(law.means.shape[1], dtype=torch.float64)
        covariances = here.alpha**2 * law.covariances + here.sigma**2 * identity
        each = torch.distributions.MultivariateNormal(here.alpha * law.means, covariances)
        joint = each.log_prob(x.double().flatten(1)[:, None]) + law.weights.log()
        return ((joint + member[labels]).logsumexp(1) - joint.logsumexp(1)).to(x.dtype)

    return log_prob
