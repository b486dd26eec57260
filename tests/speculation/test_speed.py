"""Cost curves against isotonic regression and a clock of our own; predicted speed against Leviathan's closed forms."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from workbench.problems.decoding import markov
from workbench.speculation import speed as module
from workbench.speculation.acceptance import arithmetic_factor, speedup
from workbench.speculation.engine import Ask, Warp, speculate
from workbench.speculation.growing import StaticGrower
from workbench.speculation.rules import RULES
from workbench.speculation.speed import CostCurve, measure_curve, measure_engine, predict_speed
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
    monkeypatch.setattr(module.torch.cuda, "is_initialized", lambda: True)
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


# ---- inside the engine: machines whose every second is programmed ----------------------------------------------------

N_TOKENS = 80


class Machine:
    """Two models of one token's memory on a clock: seconds of a pass grow with its tokens and with the cache, and laws
    and rules take time, too. What plain and speculative decoding take on it is known exactly."""

    def __init__(self, law=0.4, verdict=0.3, slope=0.15, price=0.35, cache=0.002):
        self.now, self.law_seconds, self.verdict_seconds = 0.0, law, verdict
        problem = markov(8, divergence=0.9, seed=3)
        self.target = self.on_clock(problem.target, 1.0, slope, cache)
        self.draft = self.on_clock(problem.draft("best"), price, price * slope, price * cache)
        self.rule = SimpleNamespace(drafting=RULES["rrs"].drafting, verify=self.verify)

    def perf_counter(self):
        return self.now

    def on_clock(self, model, first, more, cache):
        def begin(n_rows):
            kept = SimpleNamespace(n=0)
            kept.keep = lambda paths: setattr(kept, "n", kept.n + max(map(len, paths)))
            return kept

        def network(tokens, ask):
            n = max(map(len, ask.tokens))
            self.now += first + more * (n - 1) + cache * (ask.state.n + n)
            return model.network(tokens, ask)

        return replace(model, network=network, begin=begin)

    def law(self, logits, contexts):
        self.now += self.law_seconds * len(logits) ** 0.5
        return Warp()(logits, contexts)

    def verify(self, *arguments):
        self.now += self.verdict_seconds
        return RULES["rrs"].verify(*arguments)

    def decode(self, shape, seeds=range(90, 94)):
        """Seconds per token and tokens per block, of all blocks that take in no prompt and that no end cuts short."""
        seconds, tokens, blocks = np.sum([self.decode_one(shape, seed) for seed in seeds], axis=0)
        return seconds / tokens, tokens / blocks

    def decode_one(self, shape, seed):
        grow = (lambda row, uniform: StaticGrower(shape, self.rule.drafting, uniform)) if shape.n_nodes else None
        laps, left = [], N_TOKENS
        for block in speculate(self.target, self.draft if shape.n_nodes else None, [[0, 1, 2]], N_TOKENS, grow,
                               self.rule, [np.random.default_rng(seed).random], law=self.law):
            if left > shape.depth:
                laps.append((self.now, len(block[0].tokens)))
            left -= len(block[0].tokens)
        tokens = sum(n for _, n in laps[1:])
        return laps[-1][0] - laps[0][0], tokens, len(laps) - 1

    def costs(self):
        return measure_engine(self.target, self.draft, [[0, 1, 2]], SHAPES, self.rule, n_tokens=N_TOKENS, repeats=4,
                              law=self.law)


SHAPES = (chain(1), chain(2), chain(4), widths((2, 2)))
MACHINES: tuple[dict[str, float], ...] = ({}, {"law": 0.0, "slope": 0.01, "price": 0.1})


def assert_predictions_hold(predict, monkeypatch, machines=MACHINES):
    for made in machines:
        machine = Machine(**made)
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=machine.perf_counter))
        costs = machine.costs()
        plain, one = machine.decode(Shape(()))
        assert one == 1
        for shape in SHAPES:
            seconds, tokens = machine.decode(shape)
            predicted = predict(machine, tokens, shape, costs)
            low, high = predicted.interval
            assert low <= plain / seconds <= high, (made, shape)
            assert predicted.speedup == pytest.approx(plain / seconds, rel=0.08)
            assert low <= predicted.speedup <= high < 1.25 * low, (made, shape)


def in_the_engine(machine, tokens, shape, costs):
    return predict_speed(tokens, shape, costs.target, costs.draft)


def test_predictions_from_inside_the_engine_hold(monkeypatch):
    assert_predictions_hold(in_the_engine, monkeypatch)


def on_fresh_state(machine, tokens, shape, costs):
    """Curves of passes by themselves, with the constant of a state made anew, and nothing charged for the block."""
    def pass_of(model, constant):
        def one(n):
            machine.now += constant
            ask = Ask(model.begin(1), [[0] * n], [list(range(-1, n - 1))], [[n - 1]])
            model.network(torch.zeros(n, dtype=torch.int64), ask)
        return one

    curves = [measure_curve(pass_of(model, constant), (1, 2, 3, 5, 9), 3)
              for model, constant in ((machine.target, 3.0), (machine.draft, 0.0))]
    return predict_speed(tokens, shape, *curves)


def test_predictions_from_passes_on_fresh_state_have_the_wrong_sign(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=machine.perf_counter))
    plain, _ = machine.decode(Shape(()))
    seconds, tokens = machine.decode(chain(2))
    assert on_fresh_state(machine, tokens, chain(2), None).interval[0] > 1.05 > 0.95 > plain / seconds
    with pytest.raises(AssertionError):
        assert_predictions_hold(on_fresh_state, monkeypatch, MACHINES[:1])


def test_predictions_that_leave_out_the_block_fail(monkeypatch):
    def bare(machine, tokens, shape, costs):
        idle = Machine(law=0.0, verdict=0.0)
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=idle.perf_counter))
        return in_the_engine(machine, tokens, shape, idle.costs())

    with pytest.raises(AssertionError):
        assert_predictions_hold(bare, monkeypatch, MACHINES[:1])


def test_an_engines_laps_hold_all_its_seconds_but_those_of_prompts(monkeypatch):
    machine = Machine(cache=0.0, slope=0.0)  # then laps of one size are alike, but for verdicts
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=machine.perf_counter))
    costs = machine.costs()
    assert costs.target.sizes == (1, 2, 3, 5, 7) and costs.draft.sizes == (1, 2)
    assert costs.target(1) == pytest.approx(1.0 + 0.4)
    one = costs.target(2) + costs.draft(1)  # a block of one draft, with its one verdict
    assert one == pytest.approx(1.0 + 0.4 * 2**0.5 + 0.3 + 0.35 + 0.4, rel=0.03)


def test_spreads_become_an_interval_and_any_yardstick_will_do():
    curve = CostCurve((1, 3), (1.0, 1.2), (0.1, 0.2))
    assert curve.within(2) == pytest.approx((0.8, 1.4))
    predicted = predict_speed(2.0, chain(2), curve, 0.3, block_seconds=0.1)
    assert predicted.block == pytest.approx((1.2 - 0.4 + 0.6 + 0.1, 1.2 + 0.4 + 0.6 + 0.1))
    assert predicted.interval == pytest.approx((2 * 0.8 / 2.3, 2 * 1.2 / 1.5))
    assert predicted.speedup == pytest.approx(2 / 1.9)
    other = predict_speed(2.0, chain(2), curve, 0.3, block_seconds=0.1, plain_seconds=3.8)
    assert other.speedup == pytest.approx(4.0) and other.plain_tokens_per_second == pytest.approx(1 / 3.8)
    assert predict_speed(1.0, Shape(()), curve, 0.3, block_seconds=9.0).speedup == 1.0


@pytest.mark.parametrize(("make", "named"), [
    (lambda: predict_speed(2.0, chain(2), CURVE, 0.1, block_seconds=-1.0), "block_seconds=-1.0"),
    (lambda: measure_engine(*[None] * 3, (chain(1),), RULES["rrs"], repeats=0), "repeats=0"),
    (lambda: measure_engine(*[None] * 3, (chain(1),), RULES["rrs"], n_tokens=3), "n_tokens=3"),
    (lambda: measure_engine(*[None] * 3, (Shape(()),), RULES["rrs"]), "0 shapes"),
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
