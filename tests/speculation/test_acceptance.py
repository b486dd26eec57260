"""Optimal acceptance against linear programs over all tuples of drafts, and against exact counts for larger V."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from workbench.speculation import acceptance as module
from workbench.speculation.acceptance import (
    arithmetic_factor,
    block_efficiency,
    check_probs,
    draft_law,
    k_seq_growth,
    k_seq_rho,
    optimal,
    optimal_counts,
    optimal_lp,
    optimal_many,
    remainder,
    speedup,
)
from workbench.speculation.drafting import DRAFTINGS
from workbench.speculation.rules import RULES

TWO = np.array([0.6, 0.4]), np.array([0.9, 0.1])
THREE = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])


def pairs(count, sizes=(2, 3, 4, 5, 6), seed=0):
    """Random target and draft laws, from nearly one-hot to nearly uniform; some tokens of some have no probability."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        size = int(rng.choice(sizes))
        target, draft = (rng.dirichlet(np.full(size, rng.choice([0.2, 1.0, 4.0]))) for _ in range(2))
        if i % 5 == 0:
            (target if i % 2 else draft)[rng.integers(size)] = 0.0
        yield target / target.sum(), draft / draft.sum()


def softmax(logits):
    probs = np.exp(logits - logits.max())
    return probs / probs.sum()


def peaked(size, temperature, seed=0):
    """Laws as of language models: log probabilities normal, the draft's a noisy copy."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=size)
    return softmax(logits / temperature), softmax((logits + 0.7 * rng.normal(size=size)) / temperature)


@pytest.mark.parametrize(("laws", "drafting", "expected"), [
    (TWO, "iid", 0.79), (TWO, "without", 1.0), (TWO, "greedy", 1.0),
    (THREE, "iid", 0.86), (THREE, "without", 0.985714285714286), (THREE, "greedy", 0.9), (THREE, "top", 0.5),
])
def test_worked_values(laws, drafting, expected):
    assert optimal(*laws, 2, drafting).acceptance == pytest.approx(expected, abs=1e-12)


def assert_equals_program(found, drafting):
    """found(target, draft, n, drafting) -> Optimum, on 100 pairs with one to three drafts: the value, and that the set
    named gives it."""
    rng = np.random.default_rng(1)
    for target, draft in pairs(100):
        n = int(rng.integers(1, 4))
        law = draft_law(draft, n, drafting)
        optimum = found(target, draft, n, drafting)
        assert optimum.acceptance == pytest.approx(optimal_lp(target, law), abs=1e-9)
        inside = set(optimum.order[: optimum.subset_size].tolist())
        within = sum(mass for drawn, mass in law.items() if inside.issuperset(drawn))
        assert optimum.acceptance == pytest.approx(1 + target[sorted(inside)].sum() - within, abs=1e-9)


@pytest.mark.parametrize("drafting", DRAFTINGS)
def test_equals_the_linear_program(drafting):
    assert_equals_program(optimal, drafting)


@pytest.mark.parametrize(("broken", "drafting"), [
    (lambda p, q, n, drafting: optimal(q, p, n, drafting), "iid"),  # target and draft swapped
    (lambda p, q, n, drafting: optimal(p, q, n, "iid"), "without"),  # drafts put back
    (lambda p, q, n, drafting: optimal(p, q, n, "top"), "greedy"),  # the random draft forgotten
    (lambda p, q, n, drafting: optimal(p, q, 1, drafting), "iid"),
])
def test_program_check_fails_for_a_broken_twin(broken, drafting):
    with pytest.raises(AssertionError):
        assert_equals_program(broken, drafting)


def test_programs_take_sets_and_tuples_alike():
    law = {(0, 1): 0.3, (1, 0): 0.2, (1, 1): 0.5}
    sets = {frozenset({0, 1}): 0.5, frozenset({1}): 0.5}
    target = np.array([0.7, 0.2, 0.1])
    assert optimal_lp(target, law) == pytest.approx(optimal_lp(target, sets), abs=1e-12) == pytest.approx(0.7)


def stays_inside(sizes, values, inside, n):
    """P(n drafts without replacement all lie in H), where sizes[g] tokens have probability values[g] each and H has
    inside[g] of them: exact, over the numbers drawn of each group."""
    states = {(0,) * len(sizes): 1.0}
    for _ in range(n):
        after: dict[tuple[int, ...], float] = {}
        for drawn, mass in states.items():
            left = math.fsum(v * (s - d) for v, s, d in zip(values, sizes, drawn, strict=True))
            for g, (value, have) in enumerate(zip(values, inside, strict=True)):
                if have > drawn[g]:
                    following = (*drawn[:g], drawn[g] + 1, *drawn[g + 1:])
                    after[following] = after.get(following, 0.0) + mass * value * (have - drawn[g]) / left
        states = after
    return sum(states.values())


def assert_equals_counts(n, tolerance=1e-9):
    """Against exact probabilities of every prefix, for laws of 122 tokens with three values."""
    rng, sizes = np.random.default_rng(n), (2, 20, 100)
    for shares in ((0.2, 0.3, 0.5), (0.9, 0.0999, 0.0001), (0.5, 0.5 - 1e-9, 1e-9), (1 - 1e-6, 0.9e-6, 0.1e-6)):
        values = [share / size for share, size in zip(shares, sizes, strict=True)]
        draft, group = np.repeat(values, sizes), np.repeat(np.arange(3), sizes)
        target = softmax(np.log(draft) + rng.normal(size=len(draft)))
        exact, inside, mass = [0.0], [0, 0, 0], 0.0
        for x in np.argsort(target / draft):
            inside[group[x]] += 1
            mass += target[x]
            exact.append(mass - stays_inside(sizes, values, inside, n))
        found = optimal(target, draft, n, "without")
        assert found.acceptance == pytest.approx(1 + min(exact), abs=tolerance)
        assert exact[found.subset_size] == pytest.approx(min(exact), abs=tolerance)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_without_replacement_equals_exact_counts(n):
    assert_equals_counts(n)


@pytest.mark.parametrize(("name", "value"), [("SPACING", math.log(2)), ("T_FIRST", 2.0), ("_below", lambda x: 0.0)])
def test_count_check_fails_for_a_coarse_quadrature(monkeypatch, name, value):
    monkeypatch.setattr(module, name, value)
    with pytest.raises(AssertionError):
        assert_equals_counts(8)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_bounds_skip_no_prefix_that_matters(monkeypatch, temperature):
    laws = peaked(3000, temperature)
    found = [optimum.acceptance for optimum in optimal_counts(*laws, range(1, 9), "without")]
    monkeypatch.setattr(module, "SEGMENTS", 1)  # every prefix is evaluated
    assert found == pytest.approx([o.acceptance for o in optimal_counts(*laws, range(1, 9), "without")], abs=1e-10)


def test_orders_of_rules_and_optima():
    for target, draft in pairs(60):
        single = RULES["single"].acceptance(target, draft, 1)
        before = dict.fromkeys((*DRAFTINGS, "rrs", "k_seq"), 0.0)
        for n in (1, 2, 3):
            now = {drafting: optimal(target, draft, n, drafting).acceptance for drafting in DRAFTINGS}
            now |= {rule: RULES[rule].acceptance(target, draft, n) for rule in ("rrs", "k_seq")}
            assert single - 1e-12 <= min(now["rrs"], now["k_seq"])
            assert max(now["rrs"], now["k_seq"]) <= now["iid"] + 1e-12 <= now["without"] + 2e-12
            assert now["k_seq"] >= (1 - (1 - 1 / n) ** n) * now["iid"] - 1e-12
            assert all(now[key] >= before[key] - 1e-12 for key in now)
            before = now
        assert optimal(target, draft, 1, "without").acceptance == pytest.approx(single, abs=1e-12)


@pytest.mark.parametrize("drafting", ["iid", "without", "greedy"])
def test_drafts_from_the_target_are_always_accepted(drafting):
    target, _ = peaked(500, 1.0)
    for n in (1, 2, 3, 5):
        assert optimal(target, target, n, drafting).acceptance == pytest.approx(1, abs=1e-10)
    assert optimal(target, target, 2, "top").acceptance == pytest.approx(np.sort(target)[-2:].sum())


@pytest.mark.parametrize("drafting", DRAFTINGS)
def test_many_positions_are_as_one_by_one(drafting):
    targets, drafts = (np.array(laws) for laws in zip(*pairs(20, sizes=(40,)), strict=True))
    one_by_one = [optimal(p, q, 3, drafting).acceptance for p, q in zip(targets, drafts, strict=True)]
    assert optimal_many(targets, drafts, 3, drafting) == pytest.approx(one_by_one, abs=1e-12)


@pytest.mark.parametrize("drafting", DRAFTINGS)
def test_the_law_of_drafts(drafting):
    draft = np.array([0.5, 0.0, 0.3, 0.2])
    law = draft_law(draft, 2, drafting)
    assert sum(law.values()) == pytest.approx(1)
    assert {"iid": law.get((0, 0)), "without": law.get((2, 0)), "greedy": law.get((0, 3)), "top": law.get((0, 2))}[
        drafting] == pytest.approx({"iid": 0.25, "without": 0.3 * 0.5 / 0.7, "greedy": 0.4, "top": 1.0}[drafting])


@pytest.mark.parametrize("drafting", ["without", "greedy", "top"])
def test_only_tokens_with_draft_probability_are_drafted(drafting):
    draft, target = np.array([0.0, 0.6, 0.0, 0.4]), np.array([0.1, 0.2, 0.3, 0.4])
    assert {frozenset(drawn) for drawn in draft_law(draft, 4, drafting)} == {frozenset({1, 3})}
    for n in (2, 3, 9):
        assert optimal(target, draft, n, drafting).acceptance == pytest.approx(0.6, abs=1e-12)
    assert not remainder(draft, (1, 3)).any()


def test_a_nearly_certain_draft_loses_no_digits():
    """q = (1 - 2e, e, e): the second draft without replacement is one of the others, half and half."""
    for tiny in (1e-4, 1e-9, 1e-14):
        draft, target = np.array([1 - 2 * tiny, tiny, tiny]), np.array([0.2, 0.7, 0.1])
        within = {frozenset({0, 1}): 0.5, frozenset({0, 2}): 0.5}  # up to order e
        found = optimal(target, draft, 2, "without").acceptance
        assert found == pytest.approx(optimal_lp(target, within), abs=3 * tiny)


def test_k_seq_factor():
    assert k_seq_rho(*THREE, 2) == pytest.approx(1.4567764362830, abs=1e-12)
    for target, draft in pairs(50):
        assert k_seq_rho(target, draft, 1) == 1
        for n in (2, 3, 8):
            rho = k_seq_rho(target, draft, n)
            assert 1 <= rho <= n and k_seq_growth(target, draft, n, rho) <= rho
            beta = np.minimum(draft, target / rho).sum()
            assert 1 - (1 - beta) ** n == pytest.approx(rho * beta, abs=1e-11)
            assert (target - np.minimum(draft, target / rho) * k_seq_growth(target, draft, n, rho)).min() > -1e-12


def test_a_smaller_k_seq_factor_would_leave_a_negative_residual():
    target, draft = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    beta = np.minimum(draft, target).sum()
    growth = k_seq_growth(target, draft, 2, 1.0)
    residual = (target - np.minimum(draft, target) * growth) / (1 - growth * beta)
    assert residual == pytest.approx([-1.25, 2.25], abs=1e-12)


def test_block_efficiency_is_the_mean_of_its_law():
    for alpha, length in itertools.product((0.0, 0.3, 0.9, 1.0), (0, 1, 4)):
        law = [(1 - alpha) * alpha**j for j in range(length)] + [alpha**length]
        assert block_efficiency(alpha, length) == pytest.approx(1 + sum(j * mass for j, mass in enumerate(law)))
    assert block_efficiency(1.0, 7) == 8


def test_speedup_and_operations():
    assert speedup(0.8, 1, 0.1) == pytest.approx(1.8 / 1.1)
    for alpha, cost in itertools.product((0.2, 0.5, 0.8), (0.1, 0.4, 0.7)):
        assert (max(speedup(alpha, length, cost) for length in range(1, 9)) > 1) == (alpha > cost)
    assert speedup(0.8, 4, 0.1, lambda k: 3.0) == pytest.approx(speedup(0.8, 4, 0.1))  # in any unit
    assert speedup(0.8, 4, 0.1, lambda k: 2.0 * k) == pytest.approx(block_efficiency(0.8, 4) / 5.4)
    assert arithmetic_factor(0.8, 4, 0.1) == pytest.approx((1 - 0.8) * 5.4 / (1 - 0.8**5))
    assert arithmetic_factor(1.0, 4, 0.0) == pytest.approx(1)


GOOD = np.array([0.5, 0.5])


@pytest.mark.parametrize(("call", "message"), [
    (lambda: optimal(np.array([0.5, np.nan]), GOOD, 2), "target_probs has 1 values that are not finite"),
    (lambda: optimal(GOOD, np.array([1.5, -0.5]), 2), "draft_probs has the value -0.5"),
    (lambda: optimal(GOOD, np.array([0.5, 0.4]), 2), "draft_probs sums to 0.9"),
    (lambda: optimal(GOOD, np.array([0.5, 0.25, 0.25]), 2), r"target_probs has shape \(2,\), draft_probs \(3,\)"),
    (lambda: optimal(GOOD[None], GOOD[None], 2), r"target_probs has shape \(1, 2\)"),
    (lambda: check_probs(np.zeros(0), np.zeros(0)), r"target_probs has shape \(0,\)"),
    (lambda: optimal(GOOD, GOOD, 0), "n_drafts is 0"),
    (lambda: optimal_many(GOOD[None], GOOD[None], 1.5), "n_drafts is 1.5"),
    (lambda: optimal(GOOD, GOOD, 2, "gumbel"), "drafting is 'gumbel'"),
    (lambda: draft_law(GOOD, 2, "gumbel"), "drafting is 'gumbel'"),
    (lambda: optimal_lp(GOOD, {(0, 2): 1.0}), r"law has drafts \(0, 2\)"),
    (lambda: optimal_lp(GOOD, {(0, 1): 0.7}), "law sums to 0.7"),
    (lambda: k_seq_rho(GOOD, GOOD, 0), "n is 0"),
    (lambda: block_efficiency(1.2, 3), "alpha is 1.2"),
    (lambda: speedup(0.5, -1, 0.1), "draft_length is -1"),
    (lambda: speedup(0.5, 2, math.nan), "draft_cost is nan"),
    (lambda: speedup(0.5, 2, 0.1, lambda k: 0.0), r"target_cost\(1\) is 0"),
    (lambda: arithmetic_factor(0.5, 2, -1.0), "draft_flops is -1.0"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_laws_in_single_precision_are_rescaled():
    target, draft = (law.astype(np.float32) for law in peaked(2000, 1.0))
    assert optimal(target, draft, 3).acceptance == pytest.approx(optimal(*peaked(2000, 1.0), 3).acceptance, abs=1e-5)
