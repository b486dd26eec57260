"""Metrics against closed forms, brute force and their own spread over replicates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import linalg, stats

from widgets import explorer
from workbench import METRICS, cheapest, points, run
from workbench.problems.mixtures import two_dim, two_modes
from workbench.quality import (
    Drawn,
    Metric,
    Quality,
    combined,
    difference,
    drift,
    energy_distance,
    frechet,
    frechet_distance,
    kernel_distance,
    nearest_training,
    proportion,
    ratio,
    register_metric,
    wasserstein_1,
)
from workbench.runs import JudgeError
from workbench.zoo import glyphs, load_classifier


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


def test_energy_distance_by_loops():
    x, y = normal(43, 2, 0) + 0.7, normal(30, 2, 1)

    def mean(a, b, pairs):
        return sum(math.dist(p, q) for p in a.tolist() for q in b.tolist()) / pairs

    square = 2 * mean(x, y, 43 * 30) - mean(x, x, 43 * 42) - mean(y, y, 30 * 29)
    made = energy_distance(x, y)
    assert made.value == pytest.approx(math.sqrt(square), rel=1e-9) and made.n == 43
    assert made.low < made.value < made.high and math.isnan(energy_distance(x[:2], y).stderr) is False


def stratified_by_loops(k, x, labels, shares, y):
    """The estimate of the squared discrepancy, class by class, from its definition."""
    classes = range(len(shares))
    of = [[i for i, label in enumerate(labels) if label == c] for c in classes]
    xx = sum(shares[c] ** 2 * np.mean([k(x[i], x[j]) for i in of[c] for j in of[c] if i != j]) for c in classes)
    xx += sum(shares[c] * shares[d] * np.mean([k(x[i], x[j]) for i in of[c] for j in of[d]])
              for c in classes for d in classes if c != d)
    xy = sum(shares[c] * np.mean([k(x[i], q) for i in of[c] for q in y]) for c in classes)
    return xx + np.mean([k(p, q) for i, p in enumerate(y) for j, q in enumerate(y) if i != j]) - 2 * xy


def by_class(x, y, labels, shares):
    return kernel_distance(x, y, Drawn(len(x), labels, shares)).value


def blind_to_classes(x, y, labels, shares):
    """Broken twin: classes in turn taken for independent draws."""
    return kernel_distance(x, y).value


def check_stratified(distance):
    labels, shares = torch.arange(11) % 3, (0.5, 0.3, 0.2)
    x, y = normal(11, 3, 0) + labels[:, None], normal(6, 3, 1)
    truth = stratified_by_loops(lambda a, b: (float(a @ b) / 3 + 1) ** 3, x, labels.tolist(), shares, y)
    assert distance(x, y, labels, shares) == pytest.approx(1000 * truth, rel=1e-9)


def test_kernel_distance_of_classes_by_loops():
    check_stratified(by_class)
    with pytest.raises(AssertionError):
        check_stratified(blind_to_classes)


def check_letters(distance):
    """Real letters, classes in turn, against real letters: 0 within four of the spread over draws."""
    classifier = load_classifier()
    pictures, labels = glyphs(3000, "held_out", seed=11)
    other, theirs = glyphs(700, "held_out", seed=12)
    reference, known = classifier.judge(other)[0].double(), Drawn(700, theirs)
    features, of = classifier.judge(pictures)[0].double(), [(labels == c).nonzero()[:, 0] for c in range(36)]
    made = []
    for k in range(12):  # disjoint sets of four letters of each class
        at = torch.stack([of[c][4 * k : 4 * k + 4] for c in range(36)]).T.flatten()
        made.append(distance(features[at], reference, Drawn(144, labels[at]), known).value)
    mean, spread = np.mean(made), np.std(made, ddof=1)
    # the reference's own sampling adds the error of 700 to that of a mean of 12 x 144
    assert abs(mean) < 4 * math.sqrt(12 * 144 / 700 + 1) * spread / math.sqrt(12), (mean, spread)


def test_real_letters_are_at_no_distance_from_real_letters():
    check_letters(kernel_distance)
    with pytest.raises(AssertionError):
        check_letters(lambda x, y, drawn, known: kernel_distance(x, y))


def test_labelled_draws_of_the_true_law_are_not_all_at_distance_zero():
    problem = two_dim(has_labels=True)
    values, blind = [], []
    for seed in range(6):  # a round of draws from each class: those of the true law sorted into classes
        x = problem.data(600, seed)
        angle = (torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi / 8)).round() % 8 // 2
        at = torch.stack([(angle == c).nonzero()[:50, 0] for c in range(4)]).T.flatten()
        values.append(problem.judge(x[at], problem.labels(200))["energy_distance"].value)
        blind.append(energy_distance(x[at], problem.data(1000, 999)).value)
    assert sum(v > 0 for v in values) > 0
    assert sum(v > 0 for v in blind) < sum(v > 0 for v in values)  # taken for independent, nearly all are shown as 0


def test_energy_distance_is_near_zero_only_under_one_law():
    """For N(0,1) and N(2,1): E|X-X'| = 2/sqrt(pi), E|X-Y| that of N(2, 2), a folded normal."""
    shift, n = 2.0, 2000
    folded = 2 * math.exp(-shift**2 / 4) / math.sqrt(math.pi) + shift * math.erf(shift / 2)
    truth = math.sqrt(2 * folded - 4 / math.sqrt(math.pi))
    apart = energy_distance(normal(n, 1, 0) + shift, normal(n, 1, 1))
    assert apart.value == pytest.approx(truth, abs=0.1)  # spread of the difference of two means of 2000: 0.03
    same = [energy_distance(normal(n, 1, i), normal(n, 1, 100 + i)) for i in range(6)]
    assert max(q.value for q in same) < 0.1 < apart.value
    assert max(q.high for q in same) > 0  # a distance shown as 0 is not shown as certain


def on_quantiles(x, y):
    """Broken twin: quantile functions compared at 2000 interpolated places."""
    q = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    return float((torch.quantile(x, q, dim=0) - torch.quantile(y, q, dim=0)).abs().mean())


def check_wasserstein(distance):
    for n, m, seed in ((2, 2, 3), (7, 5, 4), (2000, 2000, 0), (500, 3000, 1)):
        x, y = normal(n, 1, seed) * 1.3 + 0.4, normal(m, 1, seed + 9)
        truth = stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
        assert distance(x, y) == pytest.approx(truth, rel=1e-9)
    two, middle = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[0.5], [0.5]]).double()
    assert distance(two, middle) == pytest.approx(0.5, rel=1e-12)


def test_wasserstein_1_is_exact():
    check_wasserstein(lambda x, y: wasserstein_1(x, y).value)
    with pytest.raises(AssertionError):
        check_wasserstein(on_quantiles)
    x = normal(800, 3, 2)
    assert wasserstein_1(x + torch.tensor([1.0, 0.0, -2.0]), x).value == pytest.approx(1.0, rel=1e-9)  # mean over axes
    assert wasserstein_1(x, x).value < 800 * 1e-15  # a sum of 800 weights, each rounded


def test_wasserstein_1_of_classes_weighs_them_by_their_share():
    x, labels = torch.tensor([[0.0], [0.0], [1.0], [1.0], [1.0]]).double(), torch.tensor([0, 0, 1, 1, 1])
    y = torch.tensor([[0.0]]).double()
    assert wasserstein_1(x, y, Drawn(5, labels)).value == pytest.approx(0.5, rel=1e-12)
    assert wasserstein_1(x, y, Drawn(5, labels, (0.9, 0.1))).value == pytest.approx(0.1, rel=1e-12)
    assert wasserstein_1(x, y).value == pytest.approx(0.6, rel=1e-12)


def test_frechet_distance_of_classes_is_that_of_the_whole_law():
    """Class means apart by far more than the classes are wide: the covariance of the law is that of the means."""
    shares, means = (0.5, 0.25, 0.25), torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]).double()
    p = torch.tensor(shares).double()
    centre = p @ means
    cov = (means - centre).T @ ((means - centre) * p[:, None]) + 0.01 * torch.eye(2).double()
    labels = torch.arange(600) % 3  # every class as often, whatever its share
    x = means[labels] + 0.1 * normal(600, 2, 5)
    assert frechet_distance(x, centre, cov, Drawn(600, labels, shares)) < 1e-3
    assert frechet_distance(x, centre, cov) > 0.1  # taken for independent draws


def test_errors_of_clusters_and_of_ratios():
    """A mean over windows is a ratio of sums over documents; its error is that of documents."""
    x, clusters = torch.arange(12).double(), torch.arange(12) // 3
    made = Drawn(12, clusters=clusters).mean(x)
    sums = x.reshape(4, 3).sum(1)
    assert made.value == pytest.approx(5.5)
    assert made.stderr == pytest.approx(float(sums.std()) / 3 / 2) and made.df == 3
    assert Drawn(12).mean(x).stderr < 0.7 * made.stderr  # taken for independent


def test_the_error_within_classes():
    labels = torch.arange(12) % 3
    x = 100.0 * labels + normal(12, 1, 3)[:, 0]
    made = Drawn(12, labels).mean(x)
    parts = [float(x[labels == c].var()) / 9 / 4 for c in range(3)]
    assert made.value == pytest.approx(float(x.mean())) and made.stderr == pytest.approx(math.sqrt(sum(parts)))
    assert 3 < made.df <= 9 and Drawn(12).mean(x).stderr > 10 * made.stderr
    assert Drawn(3, labels[:3]).mean(x[:3]).stderr == Drawn(3).mean(x[:3]).stderr  # a class seen once has no spread


def test_what_cannot_be_a_design_is_refused():
    for wrong, words in (({"strata": torch.arange(3)}, "strata of 3 samples: expected 4"),
                         ({"clusters": torch.arange(5)}, "clusters of 5 samples: expected 4"),
                         ({"strata": torch.arange(4), "clusters": torch.arange(4)}, "at once"),
                         ({"strata": torch.arange(4), "shares": (0.5, 0.5)}, "shares of 2 classes")):
        with pytest.raises(ValueError, match=words):
            Drawn(4, **wrong)


def test_figures_read_like_figures():
    assert str(Quality(1.0, 0.0277777, 17)) == "1.000 +- 0.028 (n = 17)"
    assert str({"accuracy": Quality(1.0, 0.0277777, 17)}) == "{'accuracy': 1.000 +- 0.028 (n = 17)}"
    assert str(Quality(145.2, 61.3, 144)) == "145 +- 61 (n = 144)"
    assert str(Quality(0.0, 0.0, 6)) == "0.0 +- 0.0 (n = 6)"
    assert str(Quality(0.5, math.nan, 1)) == "0.5 (n = 1, no error)"
    assert str(Quality(2.0, 1e-9, 6)) == "2 +- 1e-09 (n = 6)"


def test_figures_carry_the_interval_of_their_degrees_of_freedom():
    made = Quality(2.0, 0.5, 5)
    assert made.high - 2 == pytest.approx(0.5 * stats.t.ppf(0.975, 4), rel=1e-9) and made.df == 4
    assert Quality(2.0, 0.5, 500).high - 2 == pytest.approx(0.98, abs=0.01)
    assert math.isnan(Quality(2.0, math.nan, 5).low)
    assert Quality(2.0, math.nan, 5) == Quality(2.0, math.nan, 5) != Quality(2.0, math.nan, 6)


def seeds_only(figures):
    """Broken twin: 1.96 x the spread between seeds."""
    values = [q.value for q in figures]
    half = 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half


def check_seeds(interval):
    """Means of 40 over 2 or 3 seeds, 600 repeats: 95 % is held to four errors of a share, 3.6 %."""
    for k in (2, 3):
        stream = torch.Generator().manual_seed(k)
        held = 0
        for _ in range(600):
            low, high = interval([Drawn(40).mean(torch.randn(40, generator=stream)) for _ in range(k)])
            held += low <= 0 <= high
        assert abs(held / 600 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 600), held


def test_seeds_are_combined_with_the_runs_own_errors():
    def shown(figures):
        made = combined(figures)
        return made.low, made.high

    check_seeds(shown)
    with pytest.raises(AssertionError):
        check_seeds(seeds_only)


def test_seeds_that_agree_by_chance_are_not_certain():
    made = combined([proportion(torch.ones(36) > 0)] * 3)
    assert made.value == 1 and made.stderr > 0.005 and made.low < 0.99 and made.high == pytest.approx(1.0)
    apart = combined([Quality(v, 0.01, 40) for v in (1.0, 2.0, 6.0)])  # seeds that differ by more than their errors
    assert apart.stderr == pytest.approx(math.sqrt(7 / 3)) and apart.df == 2


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
    assert (made.value, made.stderr, made.n) == (0.75, pytest.approx(abs(high - low) / 2), 4)
    assert proportion(torch.ones(16) > 0).stderr > 0.02  # all of a few hit: no certainty


def test_metrics_say_what_they_need():
    for name, metric in METRICS.items():
        assert metric.name == name and metric.label and metric.help and metric.min_n >= 2


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e150])
def test_degrees_of_freedom_do_not_hang_on_the_unit(scale):
    """Spreads whose squares are too small for a float are spreads all the same; none at all is no error."""
    labels, x = torch.arange(12) % 3, torch.arange(12.0, dtype=torch.float64).square()
    of = Drawn(12, labels).mean(x)
    scaled = Drawn(12, labels).mean(scale * x)
    assert scaled.df == pytest.approx(of.df) and scaled.stderr / scale == pytest.approx(of.stderr)
    constant = Drawn(12, labels).mean(torch.full((12,), scale, dtype=torch.float64))
    assert constant.stderr == 0 and constant.df == pytest.approx(9.0)


def test_metrics_of_ones_own_are_judged_compared_and_shown():
    own = Metric("sharpness", "sharpness", "", True, 4, "spread of the samples")
    problem = replace(two_modes(), judge=lambda answer, labels: {
        "sharpness": Quality(float(answer.std()), 0.1, len(answer))})
    with pytest.raises(JudgeError, match="gave 'sharpness': expected one of"):
        run("ddim", problem, n_samples=4, n_steps=2)
    try:
        assert register_metric(own) is own is METRICS["sharpness"]
        made = [run("ddim", problem, n_samples=4, n_steps=n) for n in (2, 8)]
        best = max(points(made, "sharpness"), key=lambda p: p.value)
        assert cheapest(points(made, "sharpness"), "sharpness", within=0.0) == best  # more is better
        panel = explorer(problem, ("ddim",), n_samples=4, n_steps=2)
        panel.wait()
        assert panel.published["spec"]["metrics"]["sharpness"]["min_n"] == 4
        assert "sharpness" in panel.view["shown"]["quality"]
    finally:
        METRICS.pop("sharpness", None)
    for wrong, kind in (({"name": "a b"}, ValueError), ({"label": ""}, ValueError), ({"min_n": 0}, ValueError)):
        with pytest.raises(kind, match=next(iter(wrong))):
            register_metric(replace(own, **wrong))
    with pytest.raises(TypeError, match="expected a Metric"):
        register_metric("sharpness")


def figures_of_all_kinds():
    """Figures with values, each with the samples that it came of, stratified and not."""
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=source, dtype=torch.float64) + shift for n, shift in ((60, 0.3), (90, 0.0)))
    for drawn in (Drawn(60), Drawn(60, torch.arange(60) % 3, (0.5, 0.3, 0.2)),
                  Drawn(60, clusters=torch.arange(60) // 4)):
        yield proportion(x[:, 0] > 0.2, drawn), drawn
        yield drift(x, x + 0.1 * x.square(), drawn), drawn
        yield ratio(x[:, 0] + 2, x[:, 1].square() + 1, Drawn(60, clusters=drawn.clusters)), Drawn(
            60, clusters=drawn.clusters)
        if drawn.clusters is None:
            yield wasserstein_1(x, y, drawn), drawn
            yield energy_distance(x, y, drawn), drawn
            yield kernel_distance(x, y, drawn), drawn


def test_the_mean_of_a_figures_values_is_the_figure_and_their_spread_its_error():
    n = 0
    for figure, drawn in figures_of_all_kinds():
        told = drawn.mean(figure.values)
        assert figure.drawn is not None and figure.drawn.equals(drawn) and figure.values.shape == (60,)
        assert told.value == pytest.approx(figure.value, rel=1e-6)
        assert 0.7 * figure.stderr <= told.stderr <= 1.45 * figure.stderr  # the distances' own take off what noise adds
        n += 1
    assert n == 15


def test_differences_of_values_need_the_same_design():
    one, other = Drawn(6), Drawn(6, clusters=torch.arange(6) // 2)
    x = torch.arange(6.0)
    assert difference(one.mean(x), one.mean(x - 1)).value == 1 and difference(one.mean(x), one.mean(x - 1)).stderr == 0
    assert difference(one.mean(x), other.mean(x)) is None and difference(one.mean(x), Quality(1.0, 0.1, 6)) is None
