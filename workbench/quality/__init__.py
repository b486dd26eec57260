"""Metrics: what each means, which direction is better, and how many samples it needs before it means anything.

Every figure carries its sample count and a standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quality:
    """One figure: its value, its standard error (nan where it cannot be had) and the samples it rests on."""

    value: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Metric:
    """A kind of figure. min_n: below this many samples the figure says nothing yet."""

    name: str
    label: str
    unit: str
    higher_is_better: bool
    min_n: int
    help: str


METRICS = {
    m.name: m
    for m in (
        Metric("label_accuracy", "label accuracy", "", True, 16,
               "share of samples that a classifier reads as asked for"),
        Metric("frechet_distance", "Frechet distance", "", False, 500,
               "between Gaussians fitted to classifier features of samples and of held-out data; biased up at small n"),
        Metric("kernel_distance", "kernel distance", "x 1000", False, 100,
               "unbiased squared MMD of classifier features, cubic kernel; may fall below 0 by chance"),
        Metric("drift", "distance from reference", "RMS", False, 4,
               "root mean square difference (of pixels, 0 to 1, or of states that are no pictures) from the reference "
               "run that starts from the same noise"),
        Metric("wasserstein_1", "Wasserstein-1 distance", "data units", False, 500,
               "mean distance by which samples must move to follow the true law, along one axis or averaged over axes"),
        Metric("energy_distance", "energy distance", "data units", False, 200,
               "zero only where samples and held-out data follow one law; works in any dimension"),
        Metric("block_efficiency", "tokens per target pass", "", True, 4,
               "new tokens over passes of the target; 1 is plain decoding"),
        Metric("surprise", "surprise under the target", "bits per token", False, 4,
               "what the target thinks of what was written; a lossless method has that of plain decoding, less is no "
               "better"),
        Metric("nearest_training", "distance to the nearest training sample", "RMS pixel", True, 16,
               "0 where samples are copies of training data; what held-out data has is the mark, more is no better"),
    )
}


def proportion(hits: Tensor) -> Quality:
    """The share of true entries of hits (n,). Its error is half of Wilson's interval at one standard error.

    That is the binomial standard error for large n, and does not claim certainty where all hit or none did.
    """
    n, share = len(hits), float(hits.double().mean())
    return Quality(share, math.sqrt(share * (1 - share) / n + 0.25 / n**2) / (1 + 1 / n), n)


def frechet_distance(features: Tensor, reference_mean: Tensor, reference_cov: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians fitted to features (n, d) and given as (d,), (d, d).

    In float64. Source: arXiv 1706.08500, equation 6. Raises ValueError where features has fewer than 2 rows.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {tuple(features.shape)}: expected (n, d) with n at least 2")
    x, mean, cov = features.double(), reference_mean.double(), reference_cov.double()
    own = torch.cov(x.T).reshape(cov.shape)
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # tr (C1 C2)^(1/2) through the symmetric C2^(1/2) C1 C2^(1/2), which has the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ own @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - mean).square().sum() + own.trace() + cov.trace() - 2 * cross)


def frechet(features: Tensor, reference_mean: Tensor, reference_cov: Tensor) -> Quality:
    """`frechet_distance` with a delete-a-group jackknife standard error over 20 groups."""

    def distance(x: Tensor) -> float:
        return frechet_distance(x, reference_mean, reference_cov)

    return Quality(distance(features), _jackknife(features, distance), len(features))


def kernel_distance(features: Tensor, reference: Tensor) -> Quality:
    """Unbiased squared maximum mean discrepancy x 1000 between features (n, d) and reference (m, d).

    Kernel (x.y / d + 1)^3, arXiv 1801.01401, section 4. Standard error by jackknife over 20 groups of `features`.
    """

    def squared_mmd(x: Tensor) -> float:
        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return (a @ b.T / a.shape[1] + 1) ** 3

        xx, xy = kernel(x, x), kernel(x, y)
        n = len(x)
        return 1000 * float((xx.sum() - xx.trace()) / (n * (n - 1)) + yy - 2 * xy.mean())

    if len(features) < 2:
        raise ValueError(f"features of shape {tuple(features.shape)}: expected (n, d) with n at least 2")
    features, y = features.double(), reference.double()
    m = len(y)
    gram = (y @ y.T / y.shape[1] + 1) ** 3
    yy = float((gram.sum() - gram.trace()) / (m * (m - 1)))
    return Quality(squared_mmd(features), _jackknife(features, squared_mmd), len(features))


def drift(samples: Tensor, reference: Tensor) -> Quality:
    """Root mean square difference of paired samples and reference (n, *D); standard error by the delta method."""
    if samples.shape != reference.shape:
        raise ValueError(f"samples of shape {tuple(samples.shape)} against reference of shape {tuple(reference.shape)}")
    squares = (samples.double() - reference.double()).square().flatten(1).mean(1)
    n, value = len(squares), math.sqrt(float(squares.mean()))
    spread = float(squares.std()) / math.sqrt(n) if n > 1 else math.nan
    return Quality(value, spread / (2 * value) if value > 0 else 0.0, n)


def wasserstein_1(samples: Tensor, reference: Tensor) -> Quality:
    """Distance of the empirical laws of samples (n, D) and reference (m, D), averaged over the D axes.

    Exact in one dimension (quantile functions). Standard error by jackknife over 20 groups of `samples`.
    """

    def distance(x: Tensor) -> float:
        q = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
        return float((torch.quantile(x, q, dim=0) - torch.quantile(y, q, dim=0)).abs().mean())

    x, y = samples.double().flatten(1), reference.double().flatten(1)
    return Quality(distance(x), _jackknife(x, distance), len(x))


def energy_distance(samples: Tensor, reference: Tensor) -> Quality:
    """sqrt(2 E|X-Y| - E|X-X'| - E|Y-Y'|), unbiased inner terms, of samples (n, D) and reference (m, D).

    Values below 0 under the root are shown as 0. Standard error: what one standard error of the square, by jackknife
    over 20 groups of `samples`, adds to the distance (so near 0 it does not vanish).
    """

    x, y = samples.double().flatten(1), reference.double().flatten(1)
    n, m, groups = len(x), len(y), 20
    yy = float(torch.cdist(y, y).sum()) / (m * (m - 1))
    # every sum of distances that the jackknife needs, from one pass: those within and between groups of x, and to y
    member = torch.nn.functional.one_hot(torch.arange(n) % groups, groups).to(x)
    within, across = member.T @ torch.cdist(x, x) @ member, torch.cdist(x, y).sum(1) @ member

    def square(without: int | None = None) -> float:
        kept = torch.ones(groups).to(x)
        if without is not None:
            kept[without] = 0
        k = int(kept @ member.sum(0))
        xx, xy = float(kept @ within @ kept) / max(k * (k - 1), 1), float(across @ kept) / (k * m)
        return 2 * xy - xx - yy

    value = math.sqrt(max(square(), 0.0))
    return Quality(value, math.sqrt(value**2 + _spread(n, groups, square)) - value, n)


def nearest_training(samples: Tensor, training: Tensor) -> Quality:
    """Mean over samples (n, *D) of the root mean square difference from the nearest of training (m, *D)."""
    x, y = samples.double().flatten(1), training.double().flatten(1)
    nearest = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").min(1).values / math.sqrt(x.shape[1])
    return Quality(float(nearest.mean()), float(nearest.std()) / math.sqrt(len(x)) if len(x) > 1 else math.nan, len(x))


def _jackknife(x: Tensor, statistic: Callable[[Tensor], float], groups: int = 20) -> float:
    """Delete-a-group jackknife standard error; nan where there are fewer than two samples per group."""
    label = torch.arange(len(x)) % groups
    return _spread(len(x), groups, lambda g: statistic(x[label != g]))


def _spread(n: int, groups: int, without: Callable[[int], float]) -> float:
    """The jackknife's standard error from the statistic of n samples without group g, g = 0..groups-1."""
    if n < 2 * groups:
        return math.nan
    values = torch.tensor([without(g) for g in range(groups)], dtype=torch.float64)
    return math.sqrt((groups - 1) / groups * float((values - values.mean()).square().sum()))
