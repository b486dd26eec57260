"""Metrics: what each means, which direction is better, and how many samples it needs before it means anything.

Every figure carries its sample count, a standard error and an interval; how samples were drawn (`Drawn`) decides them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.quality.statistics import (
    LEVEL,
    Drawn,
    Quality,
    combined,
    difference,
    ratio,
    t_quantile,
    transformed,
)


@dataclass(frozen=True)
class Metric:
    """A kind of figure. min_n: below this many samples the figure says nothing yet."""

    name: str
    label: str
    unit: str
    higher_is_better: bool
    min_n: int
    help: str


METRICS: dict[str, Metric] = {}


def register_metric(metric: Metric) -> Metric:
    """Make a metric known, so that judges may give figures of it; one of the same name is replaced.

    Raises TypeError for no Metric, ValueError for a name that is no identifier, an empty label or min_n below 1.
    """
    if not isinstance(metric, Metric):
        raise TypeError(f"metric={metric!r:.100}: expected a Metric")
    if not metric.name.isidentifier() or not metric.label:
        raise ValueError(f"metric name={metric.name!r}, label={metric.label!r}: expected an identifier and a text")
    if isinstance(metric.min_n, bool) or not isinstance(metric.min_n, int) or metric.min_n < 1:
        raise ValueError(f"metric {metric.name} min_n={metric.min_n!r}: expected an integer of at least 1")
    METRICS[metric.name] = metric
    return metric


register_metric(Metric(
    "drift", "distance from reference", "RMS", False, 48,
    "root mean square difference (of pixels, 0 to 1, or of states that are no pictures) from the reference run that "
    "starts from the same noise"))


def proportion(hits: Tensor, drawn: Drawn | None = None) -> Quality:
    """The share of true entries of hits (n,), with Wilson's interval.

    Stratified, n is raised by what the strata spare (at most twofold). stderr: half of Wilson's interval at one
    standard error, so that all of a few hits are not shown as certain.
    """
    drawn = drawn or Drawn(len(hits))
    plain = drawn.mean(hits)
    share, n = min(max(plain.value, 0.0), 1.0), float(len(hits))
    if drawn.is_stratified and 0 < share < 1:
        n /= min(max(plain.stderr**2 / (share * (1 - share) / n), 0.5), 1.0)

    def wilson(z: float) -> tuple[float, float]:
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        return centre, z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)

    centre, half = wilson(t_quantile(math.inf))
    return Quality(share, wilson(1.0)[1], len(hits), max(centre - half, 0.0), min(centre + half, 1.0),
                   values=plain.values, drawn=drawn)


def frechet_distance(features: Tensor, reference_mean: Tensor, reference_cov: Tensor, drawn: Drawn | None = None
                     ) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians fitted to features (n, d) and given as (d,), (d, d).

    In float64. Source: arXiv 1706.08500, equation 6. Stratified features are weighted by class, and their covariance
    is that of the whole law, unbiased: the weighted one plus the covariance of the weighted mean.
    Raises ValueError where features has fewer than 2 rows.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {tuple(features.shape)}: expected (n, d) with n at least 2")
    x, mean, cov = features.double(), reference_mean.double(), reference_cov.double()
    drawn = drawn or Drawn(len(x))
    index, counts, shares = drawn.classes()
    weights = drawn.weights()
    centre = weights @ x
    spread = x - centre
    own = (spread * weights[:, None]).T @ spread
    means = torch.zeros((len(counts), x.shape[1]), dtype=x.dtype).index_add_(0, index, x) / counts[:, None]
    inner = (x - means[index]) * (shares / (counts * (counts - 1).clamp(min=1)).double().sqrt())[index][:, None]
    own = own + inner.T @ inner
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # tr (C1 C2)^(1/2) through the symmetric C2^(1/2) C1 C2^(1/2), which has the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ own @ root).clamp(min=0).sqrt().sum()
    return float((centre - mean).square().sum() + own.trace() + cov.trace() - 2 * cross)


def frechet(features: Tensor, reference_mean: Tensor, reference_cov: Tensor, drawn: Drawn | None = None) -> Quality:
    """`frechet_distance` with a delete-a-group jackknife error. Its interval is of the figure's mean at this n."""
    drawn = drawn or Drawn(len(features))

    def distance(kept: Tensor) -> float:
        return frechet_distance(features[kept], reference_mean, reference_cov, drawn.kept(kept))

    stderr, df = drawn.jackknife(distance)
    value = frechet_distance(features, reference_mean, reference_cov, drawn)
    return Quality(value, stderr, len(features), df=df)


def kernel_distance(features: Tensor, reference: Tensor, drawn: Drawn | None = None,
                    reference_drawn: Drawn | None = None) -> Quality:
    """Unbiased squared maximum mean discrepancy x 1000 between features (n, d) and reference (m, d).

    Kernel (x.y / d + 1)^3, arXiv 1801.01401, section 4. The reference is taken as it is: the error is that of features.
    Raises ValueError where features has fewer than 2 rows.
    """
    d = features.shape[-1]
    made = _discrepancy(features.double(), reference.double(), lambda a, b: (a @ b.T / d + 1) ** 3, drawn,
                        reference_drawn)
    return transformed(made, lambda v: 1000 * v)


def drift(samples: Tensor, reference: Tensor, drawn: Drawn | None = None) -> Quality:
    """Root mean square difference of paired samples and reference (n, *D); the interval is that of the mean square."""
    if samples.shape != reference.shape:
        raise ValueError(f"samples of shape {tuple(samples.shape)} against reference of shape {tuple(reference.shape)}")
    squares = (samples.double() - reference.double()).square().flatten(1).mean(1)
    return transformed((drawn or Drawn(len(squares))).mean(squares), _root)


def wasserstein_1(samples: Tensor, reference: Tensor, drawn: Drawn | None = None) -> Quality:
    """Distance of the empirical laws of samples (n, D) and reference (m, D), averaged over the D axes; exact.

    W_1 = integral of |F - G|, of the weighted distribution functions. The error is that of its linear part in F; the
    interval is of the figure's mean at this n.
    """
    x, y = samples.double().flatten(1), reference.double().flatten(1)
    drawn = drawn or Drawn(len(x))
    weights, value, influence = drawn.weights(), 0.0, torch.zeros(len(x), dtype=torch.float64)
    for a, b in zip(x.T, y.T, strict=True):
        order, there = a.argsort(), b.sort().values
        here = a[order]
        at = torch.cat((here, there)).sort().values
        ours = torch.cat((torch.zeros(1, dtype=at.dtype), weights[order].cumsum(0)))
        gap = (ours[torch.searchsorted(here, at[:-1].contiguous(), right=True)]
               - torch.searchsorted(there, at[:-1].contiguous(), right=True).double() / len(there))
        value += float((gap.abs() * at.diff()).sum()) / x.shape[1]
        # moving weight to a raises F beyond a: the integral of the sign of F - G from a on
        beyond = torch.cat(((gap.sign() * at.diff()).flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=at.dtype)))
        influence += beyond[torch.searchsorted(at, a.contiguous())] / x.shape[1]
    error = drawn.mean(influence)
    half = t_quantile(error.df) * error.stderr if len(x) > 1 else math.nan
    return Quality(value, error.stderr, len(x), max(value - half, 0.0), value + half, error.df,
                   influence + (value - error.value), drawn)


def energy_distance(samples: Tensor, reference: Tensor, drawn: Drawn | None = None) -> Quality:
    """sqrt(2 E|X-Y| - E|X-X'| - E|Y-Y'|), unbiased inner terms, of samples (n, D) and reference (m, D).

    Values below 0 under the root are shown as 0; the interval is the root of the square's. The reference is taken as it
    is: the error is that of the samples.
    """
    x, y = samples.double().flatten(1), reference.double().flatten(1)
    if len(x) == 1:  # no two samples to compare with each other: no error, and half of the distance is unknown
        yy = torch.cdist(y, y).sum() / (len(y) * (len(y) - 1))
        return Quality(_root(float(2 * torch.cdist(x, y).mean() - yy)), math.nan, 1)
    return transformed(_discrepancy(x, y, lambda a, b: -torch.cdist(a, b), drawn, None), _root)


def nearest_training(samples: Tensor, training: Tensor, drawn: Drawn | None = None) -> Quality:
    """Mean over samples (n, *D) of the root mean square difference from the nearest of training (m, *D)."""
    x, y = samples.double().flatten(1), training.double().flatten(1)
    nearest = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").min(1).values / math.sqrt(x.shape[1])
    return (drawn or Drawn(len(x))).mean(nearest)


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0)) if square == square else math.nan


def _discrepancy(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], drawn: Drawn | None,
                 reference_drawn: Drawn | None) -> Quality:
    """E k(X, X') + E k(Y, Y') - 2 E k(X, Y), unbiased, of x (n, D) and y (m, D) as they were drawn.

    With classes: xx = sum_c p_c^2 mean_{i != j in c} + sum_{c != c'} p_c p_c' mean, xy = sum_c p_c mean. The error is
    that of the projection on single samples, less what the noise of its estimate adds (a U-statistic's second term).
    Memory: a block of 1024 rows of the Gram matrix. Raises ValueError where x has fewer than 2 rows.
    """
    if len(x) < 2:
        raise ValueError(f"features of shape {tuple(x.shape)}: expected (n, d) with n at least 2")
    drawn = drawn or Drawn(len(x))
    theirs = reference_drawn or Drawn(len(y))
    index, counts, shares = drawn.classes()
    weights, means = drawn.weights(), _class_means(x, kernel, drawn)
    to_y = torch.cat([kernel(part, y) @ theirs.weights() for part in x.split(_ROWS)])
    to_x = means @ shares
    yy = theirs.weights() @ (_class_means(y, kernel, theirs) @ theirs.classes()[2])
    value = float(weights @ to_x + yy - 2 * weights @ to_y)
    error = drawn.mean(2 * (to_x - to_y))
    variance = error.stderr**2
    # what no function of one sample explains: the doubly centred Gram matrix, class by class
    member = torch.nn.functional.one_hot(index, len(counts)).double()
    blocks = member.T @ means / counts.double()[:, None]
    others, excess = (counts.double() / (counts - 1).clamp(min=1))[index], 0.0
    for rows in torch.arange(len(x)).split(_ROWS):
        centred = kernel(x[rows], x) - means[rows][:, index] - means.T[index[rows]] + blocks[index[rows]][:, index]
        scale = torch.where(index[rows][:, None] == index, others, 1.0) * weights * weights[rows][:, None]
        scale[torch.arange(len(rows)), rows] = 0.0
        excess += 2 * float((centred * scale).square().sum())
    return Quality(value, math.sqrt(max(variance - excess, variance / 2)), len(x), df=error.df,
                   values=2 * (to_x - to_y) + (value - error.value), drawn=drawn)


_ROWS = 1024  # of a Gram matrix at a time


def _class_means(x: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], drawn: Drawn) -> Tensor:
    """The mean of k(x_i, .) over the samples of each class (n, C), x_i itself left out of its own."""
    index, counts, _ = drawn.classes()
    member = torch.nn.functional.one_hot(index, len(counts)).double()
    sums = []
    for rows in torch.arange(len(x)).split(_ROWS):
        gram = kernel(x[rows], x)
        gram[torch.arange(len(rows)), rows] = 0.0
        sums.append(gram @ member)
    return torch.cat(sums) / (counts.double() - member).clamp(min=1)
