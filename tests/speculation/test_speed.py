"""Cost curves against isotonic regression and a clock of our own; predicted speed against Leviathan's closed forms."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from workbench.speculation import speed as module
from workbench.speculation.acceptance import arithmetic_factor, speedup
from workbench.speculation.speed import CostCurve, measure_curve, predict_speed
from workbench.speculation.trees import Shape, best_tree, chain, expected_tokens, optimal_length, sequoia, widths

CURVE = CostCurve((1, 2, 8, 64), (1.0, 1.1, 1.4, 6.0), (0.0,) * 4)


# ---- curves ----------------------------------------------------------------------------------------------------------

def test_a_curve_is_linear_between_what_was_measured():
    assert [CURVE(n) for n in (1, 2, 5, 8, 36, 64)] == pytest.approx([1.0, 1.1, 1.25, 1.4, 3.7, 6.0])
    grid = [CURVE(n) for n in range(1, 65)]
    assert all(b > a for a, b in itertools.pairwise(grid))  # no flat stretch that was not measured


def noisy(rng):
    sizes = [n for n in (1, 2, 3, 4, 6, 8, 16) for _ in range(int(rng.integers(1, 5)))]
    return [(n, float((1 + 0.02 * n) * rng.lognormal(0, 0.1))) for n in sizes]


def assert_is_isotonic_regression(fit):
    rng = np.random.default_rng(0)
    for _ in range(40):
        measured = noisy(rng)
        sizes = sorted({n for n, _ in measured})
        groups = [[s for n, s in measured if n == size] for size in sizes]
        medians, weights = [np.median(g) for g in groups], [len(g) for g in groups]
        wanted = IsotonicRegression().fit_transform(sizes, medians, sample_weight=weights)
        curve = fit(measured)
        assert curve.sizes == tuple(sizes)
        np.testing.assert_allclose(curve.seconds, wanted, rtol=1e-12)
        assert curve.spread == pytest.approx([np.subtract(*np.quantile(g, (0.75, 0.25))) / 2 for g in groups])


def test_a_fit_is_isotonic_regression_of_medians():
    assert_is_isotonic_regression(CostCurve.fit)


def test_a_fit_is_the_nearest_curve_that_never_falls():
    """By its optimality conditions: within a pooled stretch, no first part lies below the stretch's mean."""
    rng = np.random.default_rng(1)
    for _ in range(40):
        raw = rng.lognormal(0, 0.3, size=9) * np.linspace(1, 1.5, 9)
        fitted = np.array(CostCurve.fit(enumerate(raw, start=1)).seconds)
        assert (np.diff(fitted) >= 0).all()
        for value in set(fitted):
            part = raw[fitted == value]
            assert part.mean() == pytest.approx(value, rel=1e-12)
            assert all(part[:i].mean() >= value - 1e-12 for i in range(1, len(part) + 1))


def test_the_regression_check_fails_for_running_maxima_and_for_means():
    def running_maximum(measured):
        curve = CostCurve.fit(measured)
        medians = [float(np.median([s for n, s in measured if n == size])) for size in curve.sizes]
        return CostCurve(curve.sizes, tuple(np.maximum.accumulate(medians).tolist()), curve.spread)

    def means(measured):
        averaged = {size: np.mean([s for n, s in measured if n == size]) for size, _ in measured}
        return CostCurve.fit([(size, averaged[size]) for size, _ in measured])

    for twin in (running_maximum, means):
        with pytest.raises(AssertionError):
            assert_is_isotonic_regression(twin)


class Clock:
    """Time that passes only as passes of n tokens spend it, n / 10 seconds each; the first pass of a size takes 9."""

    def __init__(self):
        self.now, self.passes, self.slow = 0.0, [], {}

    def perf_counter(self):
        return self.now

    def pass_(self, n):
        self.now += 9.0 if n not in self.passes else n / 10 + self.slow.get(len(self.passes), 0.0)
        self.passes.append(n)


def test_measuring_warms_up_interleaves_and_takes_medians(monkeypatch):
    clock = Clock()
    clock.slow = {5: 3.0, 9: 0.2}  # two hiccups
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    curve = measure_curve(clock.pass_, (1, 4, 16), 3)
    assert clock.passes == [1, 4, 16] * 4
    assert curve.sizes == (1, 4, 16)
    assert curve.seconds == pytest.approx((0.1, 0.4, 1.6))
    assert curve.spread == pytest.approx((0.05, 0.0, 0.75))


def test_measuring_waits_for_the_device(monkeypatch):
    clock, waited = Clock(), []
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "synchronize", lambda: waited.append(len(clock.passes)))
    measure_curve(clock.pass_, (2,), 2)
    assert waited == [1, 2, 2, 3]  # before and after each timed pass


# ---- speed -----------------------------------------------------------------------------------------------------------

def assert_chains_are_leviathans(predict):
    for alpha, length, c, c_hat in itertools.product((0.0, 0.4, 0.9), (1, 3, 7), (0.02, 0.3), (0.01, 0.2)):
        predicted = predict(expected_tokens(chain(length), [alpha]), chain(length), lambda n: 2.5, 2.5 * c, c_hat)
        walltime = (1 - alpha ** (length + 1)) / ((1 - alpha) * (length * c + 1))
        operations = (1 - alpha) * (length * c_hat + length + 1) / (1 - alpha ** (length + 1))
        assert predicted.speedup == pytest.approx(walltime, rel=1e-12)
        assert predicted.arithmetic_factor == pytest.approx(operations, rel=1e-12)
        assert predicted.tokens_per_second == pytest.approx(walltime / 2.5, rel=1e-12)
        assert predicted.plain_tokens_per_second == pytest.approx(1 / 2.5, rel=1e-12)


def test_chains_are_leviathans():
    assert_chains_are_leviathans(predict_speed)


def test_leviathans_forms_reject_a_pass_too_few():
    with pytest.raises(AssertionError):
        assert_chains_are_leviathans(
            lambda tokens, shape, *rest: predict_speed(tokens, chain(shape.n_nodes + 1), *rest))


def test_chains_on_a_measured_curve_are_the_formulas_of_acceptance():
    for alpha, length in itertools.product((0.3, 0.8, 1.0), (0, 2, 9)):
        predicted = predict_speed(expected_tokens(chain(length), [alpha]), chain(length), CURVE, 0.07, 0.1)
        assert predicted.speedup == pytest.approx(speedup(alpha, length, 0.07, CURVE), rel=1e-12)
        assert predicted.arithmetic_factor == pytest.approx(arithmetic_factor(alpha, length, 0.1), rel=1e-12)


def test_a_tree_is_charged_for_its_passes():
    shape = widths((3, 2))
    predicted = predict_speed(2.0, shape, CURVE, lambda n: 0.01 * n, 0.1)
    assert predicted.target_seconds == pytest.approx(CURVE(10))  # 3 + 6 drafted, and the context's last
    assert predicted.draft_seconds == pytest.approx(0.01 + 0.03)  # the leaves are not passed through the draft
    assert predicted.arithmetic_factor == pytest.approx((10 + 0.1 * 4) / 2)
    assert predicted.tokens_per_second == pytest.approx(2 / (CURVE(10) + 0.04))
    plain = predict_speed(1.0, Shape(()), CURVE, 0.3, 0.1)
    assert (plain.speedup, plain.arithmetic_factor, plain.draft_seconds) == (1.0, 1.0, 0.0)
    assert predict_speed(2.0, shape, CURVE, 0.1).arithmetic_factor is None


def test_the_best_tree_and_length_are_the_best_predictions():
    a = (0.6, 0.2, 0.1)
    for draft in (0.05, lambda n: 0.03 + 0.01 * n):
        shape, speed = best_tree(a, CURVE, draft, 32, 8)
        assert predict_speed(expected_tokens(shape, a), shape, CURVE, draft).tokens_per_second == pytest.approx(speed)
        for rival in (chain(1), chain(4), widths((2, 2)), sequoia(a, 32, 8)):
            assert predict_speed(expected_tokens(rival, a), rival, CURVE, draft).tokens_per_second <= speed + 1e-12
    speeds = [predict_speed(expected_tokens(chain(n), [0.8]), chain(n), CURVE, 0.05).speedup for n in range(20)]
    assert optimal_length(0.8, CURVE, 0.05, 19) == int(np.argmax(speeds))
    assert 0 < int(np.argmax(speeds)) < 19


@pytest.mark.parametrize(("make", "named"), [
    (lambda: CURVE(65), "n=65 tokens: measured from 1 to 64"),
    (lambda: CURVE(0), "n=0"),
    (lambda: CostCurve((), (), ()), "at least one"),
    (lambda: CostCurve((1, 2), (1.0,), (0.0, 0.0)), "1 seconds"),
    (lambda: CostCurve((2, 2), (1.0, 1.0), (0.0, 0.0)), r"sizes=\(2, 2\)"),
    (lambda: CostCurve((0, 2), (1.0, 1.0), (0.0, 0.0)), r"sizes=\(0, 2\)"),
    (lambda: CostCurve((1, 2), (1.0, 0.9), (0.0, 0.0)), r"seconds=\(1.0, 0.9\)"),
    (lambda: CostCurve((1,), (0.0,), (0.0,)), "positive"),
    (lambda: CostCurve.fit([]), "at least one"),
    (lambda: CostCurve.fit([(1, -2.0)]), "-2.0 seconds at 1 tokens"),
    (lambda: CostCurve.fit([(1, float("nan"))]), "nan seconds"),
    (lambda: measure_curve(lambda n: None, (1,), 0), "repeats=0"),
    (lambda: measure_curve(lambda n: None, (), 1), r"sizes=\[\]"),
    (lambda: measure_curve(lambda n: None, (0, 1), 1), r"sizes=\[0, 1\]"),
    (lambda: predict_speed(0.5, chain(2), CURVE, 0.1), "expected_tokens=0.5"),
    (lambda: predict_speed(3.5, chain(2), CURVE, 0.1), "depth 2 yields 1 to 3"),
    (lambda: predict_speed(2.0, chain(2), CURVE, 0.1, -1.0), "flop_ratio=-1.0"),
    (lambda: predict_speed(2.0, chain(64), CURVE, 0.1), "n=65"),
])
def test_bad_input_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
