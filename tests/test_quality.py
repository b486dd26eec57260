"""Metrics against closed forms, brute force and their own spread over replicates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg, stats

from workbench import METRICS
from workbench.quality import (
    Quality,
    drift,
    energy_distance,
    frechet,
    frechet_distance,
    kernel_distance,
    nearest_training,
    proportion,
    wasserstein_1,
)


def normal(n, d, seed):
    return torch.randn((n, d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d, seed):
    a = normal(d, d, seed)
    return a @ a.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def exactly(n, mean, cov, seed):
    """n rows whose sample mean and covariance are mean and cov to rounding."""
    x = normal(n, len(mean), seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T).reshape(cov.shape))).T
    return x @ torch.linalg.cholesky(cov).T + mean


def without_cross_term(x, mean, cov):
    """Broken twin: the traces are not reduced by the common part."""
    return float((x.mean(0) - mean).square().sum() + torch.cov(x.T).reshape(cov.shape).trace() + cov.trace())


def product_of_roots(x, mean, cov):
    """Broken twin: sqrt(C1) sqrt(C2) for sqrt(C1 C2), right only where they commute."""
    roots = [torch.from_numpy(linalg.sqrtm(c.numpy()).real) for c in (torch.cov(x.T).reshape(cov.shape), cov)]
    return without_cross_term(x, mean, cov) - 2 * float((roots[0] @ roots[1]).trace())


def check_frechet(distance):
    for d, seed in ((1, 0), (3, 1), (8, 2)):
        m1, m2 = normal(1, d, seed)[0], normal(1, d, seed + 50)[0]
        c1, c2 = covariance(d, seed), covariance(d, seed + 50)
        cross = linalg.sqrtm((c1 @ c2).numpy()).real.trace()
        truth = float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * cross
        assert distance(exactly(40, m1, c1, seed), m2, c2) == pytest.approx(truth, rel=1e-8)
        assert distance(exactly(40, m1, c1, seed), m1, c1) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_is_the_matrix_formula():
    check_frechet(frechet_distance)
    # in one dimension (m1 - m2)^2 + (s1 - s2)^2
    one = exactly(9, torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double(), 0)
    assert frechet_distance(one, torch.tensor([3.0]), torch.tensor([[25.0]])) == pytest.approx(4 + 9)


@pytest.mark.parametrize("broken", [without_cross_term, product_of_roots])
def test_frechet_check_fails_for_a_broken_twin(broken):
    with pytest.raises(AssertionError):
        check_frechet(broken)


def test_frechet_distance_with_fewer_samples_than_features():
    x = normal(5, 12, 0)
    assert math.isfinite(frechet_distance(x, torch.zeros(12), torch.eye(12)))
    with pytest.raises(ValueError, match=r"\(1, 12\)"):
        frechet_distance(x[:1], torch.zeros(12), torch.eye(12))


def with_diagonal(x, y):
    """Broken twin: the biased estimate, each sample compared with itself too."""
    def mean(a, b):
        return float(((a @ b.T / a.shape[1] + 1) ** 3).mean())

    return Quality(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), 0.0, len(x))


def check_unbiased(distance):
    values = [distance(normal(40, 4, i), normal(60, 4, 1000 + i)).value for i in range(200)]
    mean, stderr = stats.describe(values).mean, stats.sem(values)
    assert abs(mean) < 4 * stderr
    assert min(values) < 0  # an unbiased estimate of 0 falls on both sides


def test_kernel_distance_has_mean_zero_under_one_law():
    check_unbiased(kernel_distance)


def test_unbiased_check_fails_for_a_broken_twin():
    with pytest.raises(AssertionError):
        check_unbiased(with_diagonal)


def test_kernel_distance_by_loops():
    x, y = normal(5, 3, 0), normal(4, 3, 1) + 1

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    def within(z):
        return sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))

    across = sum(k(a, b) for a in x for b in y) / 20
    assert kernel_distance(x, y).value == pytest.approx(1000 * (within(x) + within(y) - 2 * across), rel=1e-10)


def test_energy_distance_by_loops_with_its_jackknife():
    """Value and standard error from the definition, distances added up one by one and groups left out one by one."""
    x, y = normal(43, 2, 0) + 0.7, normal(30, 2, 1)

    def by_loops(x):
        def mean(a, b, pairs):
            return sum(math.dist(p, q) for p in a.tolist() for q in b.tolist()) / pairs

        n, m = len(x), len(y)
        return 2 * mean(x, y, n * m) - mean(x, x, n * (n - 1)) - mean(y, y, m * (m - 1))

    left_out = [by_loops(x[[i for i in range(43) if i % 20 != g]]) for g in range(20)]
    centre = sum(left_out) / 20
    made = energy_distance(x, y)
    spread = math.sqrt(19 / 20 * sum((v - centre) ** 2 for v in left_out))
    assert made.value == pytest.approx(math.sqrt(by_loops(x)), rel=1e-9)
    assert made.value + made.stderr == pytest.approx(math.sqrt(by_loops(x) + spread), rel=1e-9)
    assert made.n == 43 and math.isnan(energy_distance(x[:39], y).stderr)


def test_energy_distance_is_near_zero_only_under_one_law():
    """For N(0,1) and N(2,1): E|X-X'| = 2/sqrt(pi), E|X-Y| that of N(2, 2), a folded normal."""
    shift, n = 2.0, 2000
    folded = 2 * math.exp(-shift**2 / 4) / math.sqrt(math.pi) + shift * math.erf(shift / 2)
    truth = math.sqrt(2 * folded - 4 / math.sqrt(math.pi))
    apart = energy_distance(normal(n, 1, 0) + shift, normal(n, 1, 1))
    assert apart.value == pytest.approx(truth, abs=0.1)  # spread of the difference of two means of 2000: 0.03
    same = [energy_distance(normal(n, 1, i), normal(n, 1, 100 + i)) for i in range(6)]
    assert max(q.value for q in same) < 0.1 < apart.value
    assert min(q.stderr for q in same) > 0.005  # a distance shown as 0 is not shown as certain


def test_wasserstein_1_against_scipy():
    for n, m, seed in ((2000, 2000, 0), (500, 3000, 1)):
        x, y = normal(n, 1, seed) * 1.3 + 0.4, normal(m, 1, seed + 9)
        truth = stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
        assert wasserstein_1(x, y).value == pytest.approx(truth, rel=0.02)  # 2000 quantiles for an integral
    x = normal(800, 3, 2)
    assert wasserstein_1(x + torch.tensor([1.0, 0.0, -2.0]), x).value == pytest.approx(1.0, rel=1e-9)  # mean over axes
    assert wasserstein_1(x, x).value == 0


REFERENCE = normal(300, 3, 10**6)
REPLICATED = {
    "kernel_distance": lambda x: kernel_distance(x, REFERENCE),
    "energy_distance": lambda x: energy_distance(x, REFERENCE),
    "wasserstein_1": lambda x: wasserstein_1(x, REFERENCE),
    "frechet": lambda x: frechet(x, torch.zeros(3), torch.eye(3)),
    "drift": lambda x: drift(x, torch.zeros_like(x)),
    "proportion": lambda x: proportion(x[:, 0] > 0),
    "nearest_training": lambda x: nearest_training(x, REFERENCE),
}


@pytest.mark.parametrize("name", REPLICATED)
def test_standard_error_is_the_spread_over_replicates(name):
    """Samples of 200 from a law away from the reference's; 60 replicates know their spread to 9 %."""
    made = [REPLICATED[name](1.5 * normal(200, 3, i) + 0.5) for i in range(60)]
    spread = stats.describe([q.value for q in made]).variance ** 0.5
    claimed = stats.describe([q.stderr for q in made]).mean
    assert 0.7 < claimed / spread < 1.4  # a forgotten square root or factor of sqrt(20) is far outside
    assert all(q.n == 200 for q in made)


def test_drift_is_the_root_mean_square_of_pairs():
    x = normal(6, 4, 0).reshape(6, 2, 2)
    assert drift(x, x) == Quality(0.0, 0.0, 6)
    assert drift(x + 0.25, x).value == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"\(6, 2, 2\)"):
        drift(x, x[:5])


def test_nearest_training_is_zero_for_copies_only():
    training = normal(50, 9, 0).reshape(50, 3, 3)
    assert nearest_training(training[:7], training).value == 0
    moved = training[:7].clone()
    moved[:, 0, 0] += 1e-3  # one of nine pixels: RMS 1e-3 / 3
    assert nearest_training(moved, training).value == pytest.approx(1e-3 / 3, rel=1e-6)


def test_proportion():
    made = proportion(torch.tensor([True, True, False, True]))
    low, high = np.roots([1 + 1 / 4, -(2 * 0.75 + 1 / 4), 0.75**2])  # (p - 3/4)^2 = p (1 - p) / 4
    assert made == Quality(0.75, pytest.approx(abs(high - low) / 2), 4)
    assert proportion(torch.ones(16) > 0).stderr > 0.02  # all of a few hit: no certainty


def test_metrics_say_what_they_need():
    for name, metric in METRICS.items():
        assert metric.name == name and metric.label and metric.help and metric.min_n >= 2
