"""Real data without training: scikit-learn's 8x8 handwritten digits, with denoisers that are formulas of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.problems.denoising import ContinuousVP, Denoiser, Denoising, Network, Schedule
from workbench.problems.mixtures import digest, gaussian_mixture_denoiser, levels, mixture_flops
from workbench.quality import Quality, energy_distance, nearest_training

_HELD_OUT = 497  # of the 1797 images; 1300 are left to learn from
_SPLIT_SEED = 0


def digits(schedule: Schedule | None = None) -> Denoising:
    """Grey images of handwritten digits, values in [-1, 1], unlabelled. States (n, 8, 8) float64.

    Models, both formulas of the 1300 training images and exact for what they assume:
    "wiener": the posterior mean if the data were one Gaussian of their mean and covariance (the Wiener filter, linear);
    "empirical": the posterior mean if the data were the training images and nothing else. It is the minimum of the
    training loss of any denoiser, and in its last steps it brings training images back, so it memorises: mixing the
    two shows which steps decide on a copy.
    Judge: `energy_distance` to 497 held-out images, and `nearest_training`: 0 for copies, .27 for the held-out images.
    `data` draws from the held-out images. Source: the test set of UCI's "Optical Recognition of Handwritten Digits",
    as scikit-learn carries it.
    """
    training, held_out = _images()
    source = "from workbench.problems.digits import digits\n\nproblem = digits()" if schedule is None else ""
    schedule = ContinuousVP() if schedule is None else schedule
    rows = training.flatten(1)
    wiener = gaussian_mixture_denoiser(torch.ones(1), rows.mean(0, keepdim=True), torch.cov(rows.T)[None], schedule)
    empirical = empirical_denoiser(rows, schedule)

    def judge(answer: Tensor, labels: Tensor | None) -> dict[str, Quality]:
        return {"energy_distance": energy_distance(answer, held_out),
                "nearest_training": nearest_training(answer, training)}

    def data(n: int, seed: int) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        return held_out[torch.randint(len(held_out), (n,), generator=source)]

    return Denoising(
        name="digits", digest=digest("digits", training, held_out, repr(schedule)), schedule=schedule,
        models=(Denoiser("wiener", wiener, schedule), Denoiser("empirical", empirical, schedule, "x0")),
        shape=(8, 8), labels=lambda n: None, judge=judge, images=to_uint8, dtype=torch.float64,
        flops={"wiener": mixture_flops(1, rows.shape[1]), "empirical": empirical_flops(*rows.shape)},
        reference=("ddim", {"n_steps": 50}), baseline=("ddim", {"n_steps": 50, "model": "cheapest"}),
        preset={"n_steps": 50, "fractions": (0.4,)}, data=data, source=source)


def empirical_denoiser(rows: Tensor, schedule: Schedule) -> Network:
    """The posterior mean where the data is one of rows (M, D), each as likely: network(x (B, *shape), t (B,), None).

    Returns the data estimate ("x0"), (B, *shape) of x's dtype, computed in float64. Cost per row: `empirical_flops`.
    """
    rows = rows.double()
    halves = rows.square().sum(1) / 2

    def network(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        own, half = rows.to(x.device), halves.to(x.device)
        alpha, sigma = (level[:, None] for level in levels(schedule, t))
        # -|x - alpha y|^2 / (2 sigma^2) without the term that all rows share
        share = ((x.double().flatten(1) @ own.T * alpha - alpha**2 * half) / sigma**2).softmax(-1)
        return (share @ own).reshape(x.shape).to(x.dtype)

    return network


def empirical_flops(n_rows: int, n_dims: int) -> float:
    """Operations of `empirical_denoiser` per row, M (4 D + 8): two products with M x D, and 4 + 4 for the softmax."""
    return float(n_rows * (4 * n_dims + 8))


def to_uint8(state: Tensor) -> Tensor:
    """States (n, 8, 8), -1 black and 1 white, as (n, 8, 8) uint8; what lies outside is clipped."""
    return ((state + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def _images() -> tuple[Tensor, Tensor]:
    """Training (1300, 8, 8) and held-out images (497, 8, 8), float64 in [-1, 1]."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).double() / 8 - 1  # 0..16 as it comes
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return images[order[_HELD_OUT:]], images[order[:_HELD_OUT]]
