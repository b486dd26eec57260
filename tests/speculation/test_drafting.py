"""Draft tokens against enumerated laws, and warped laws against transformers' processors and against definitions."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from workbench.speculation import drafting as module
from workbench.speculation.drafting import DRAFTINGS, draw, most_likely, warp

PROBS = np.array([0.45, 0.0, 0.3, 0.2, 0.05])
N_DRAWS = 12_000


def tuples(law, n):
    """Every ordered tuple of n distinct tokens with its probability under sequential draws without replacement."""
    possible = [t for t in range(len(law)) if law[t] > 0]
    out = {}
    for drawn in itertools.permutations(possible, n):
        left, out[drawn] = 1.0, 1.0
        for token in drawn:
            out[drawn] *= law[token] / left
            left -= law[token]
    return out


def p_value(counts, law):
    """Of Pearson's chi-square; 0 where something impossible was drawn."""
    if set(counts) - set(law):
        return 0.0
    total = sum(counts.values())
    statistic = sum((counts[key] - total * prob) ** 2 / (total * prob) for key, prob in law.items())
    return float(chi2.sf(statistic, len(law) - 1))


def drawn(probs, n, drafting, seed, n_draws=N_DRAWS):
    uniform = np.random.default_rng(seed).random
    return Counter(tuple(draw(probs, n, drafting, uniform)) for _ in range(n_draws))


def grid(n):
    """A stand-in for the source of randomness: its k-th call gives the k-th midpoint of n cells of [0, 1)."""
    midpoints = iter((np.arange(n) + 0.5) / n)
    return lambda count: np.array([next(midpoints) for _ in range(count)])


# ---- drawing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_without_replacement_has_the_enumerated_law(n):
    law = tuples(PROBS, n)
    assert sum(law.values()) == pytest.approx(1)
    assert p_value(drawn(PROBS, n, "without", n), law) > 1e-3


def with_replacement(probs, n, uniform):
    return draw(probs, n, "iid", uniform)


def replaced_then_made_distinct(probs, n, uniform):
    """Sorted by probability, as a top-k of a sample would be: the right set law would still have the wrong order."""
    return sorted(draw(probs, n, "without", uniform), key=lambda t: -probs[t])


def noise_without_scale(probs, n, uniform):
    possible = np.flatnonzero(probs > 0)
    return possible[np.argsort(uniform(len(possible)) / probs[possible])[:n]].tolist()


@pytest.mark.parametrize("twin", [with_replacement, replaced_then_made_distinct, noise_without_scale])
def test_the_enumerated_law_rejects_broken_twins(twin):
    uniform = np.random.default_rng(0).random
    counts = Counter(tuple(twin(PROBS, 2, uniform)) for _ in range(N_DRAWS))
    assert p_value(counts, tuples(PROBS, 2)) < 1e-9


def test_without_replacement_by_its_clocks():
    """For two tokens of rates q and 1 - q the order is a region of the unit square, whose area a fine grid measures."""
    side = 100
    for q in (0.1, 0.5, 0.83):
        cells = itertools.product((np.arange(side) + 0.5) / side, repeat=2)
        first = sum(draw([q, 1 - q], 1, "without", lambda n, cell=cell: np.array(cell)) == [0] for cell in cells)
        assert first / side**2 == pytest.approx(q, abs=0.01)


def test_iid_and_greedy_invert_the_cumulated_law():
    """On a grid of uniforms every token comes exactly as often as its probability says."""
    assert Counter(draw(PROBS, 100, "iid", grid(100))) == {0: 45, 2: 30, 3: 20, 4: 5}
    uniform = grid(100)
    assert Counter(tuple(draw(PROBS, 2, "greedy", uniform)) for _ in range(100)) == pytest.approx(
        {(0, 2): 100 * 0.3 / 0.55, (0, 3): 100 * 0.2 / 0.55, (0, 4): 100 * 0.05 / 0.55}, abs=1)
    uniform = grid(100)
    assert Counter(tuple(draw(PROBS, 3, "greedy", uniform)) for _ in range(100)) == {(0, 2, 3): 80, (0, 2, 4): 20}
    assert p_value(drawn(PROBS, 3, "iid", 8), {
        t: math.prod(PROBS[list(t)]) for t in itertools.product((0, 2, 3, 4), repeat=3)}) > 1e-3
    assert p_value(drawn(PROBS, 1, "greedy", 9), {(t,): PROBS[t] for t in (0, 2, 3, 4)}) > 1e-3


def test_the_inversion_check_fails_for_a_search_from_the_left(monkeypatch):
    """It would draw a token of probability zero at a uniform that meets its edge."""
    edge = lambda n: np.full(n, 0.5)  # noqa: E731
    law = [0.5, 0.0, 0.5]
    assert draw(law, 1, "iid", edge) == [2]
    assert draw([0.0, 0.5, 0.5], 1, "iid", np.zeros) == [1]
    assert draw([0.5, 0.5, 0.0], 1, "iid", lambda n: np.full(n, 1.0)) == [1]  # rounded up to 1 by somebody's float32
    true = np.searchsorted
    monkeypatch.setattr(module.np, "searchsorted", lambda c, u, side: true(c, u, side="left"))
    assert draw([0.0, 0.5, 0.5], 1, "iid", np.zeros) == [0]


def test_top_tokens_and_ties():
    tied = np.array([0.2, 0.3, 0.0, 0.2, 0.3])
    unused = lambda n: pytest.fail("no uniform is needed")  # noqa: E731
    for n in range(1, 5):
        assert draw(tied, n, "top", unused) == [1, 4, 0, 3][:n]
        assert draw(tied, n + 1, "greedy", np.zeros)[:n] == [1, 4, 0, 3][:n]
    rng = np.random.default_rng(1)
    for _ in range(50):  # many ties, many sizes
        law = rng.integers(0, 4, size=30) / 60
        wanted = [t for t in sorted(range(30), key=lambda t: (-law[t], t)) if law[t] > 0]
        for n in (0, 1, 5, 29, 40):
            assert most_likely(law, n) == wanted[:n]


def test_impossible_tokens_are_never_drawn():
    two = np.array([0.0, 0.7, 0.0, 0.3])
    rng = np.random.default_rng(2)
    for _ in range(200):
        assert set(draw(two, 5, "iid", rng.random)) <= {1, 3}
        assert sorted(draw(two, 5, "without", rng.random)) == [1, 3]
    for drafting in ("greedy", "top"):
        assert draw(two, 5, drafting, rng.random) == [1, 3]
    assert draw([0.0, 1.0], 2, "greedy", rng.random) == [1]
    assert len(draw(two, 5, "iid", rng.random)) == 5


def test_uniforms_are_taken_as_documented():
    for drafting, wanted in (("iid", [3]), ("without", [4]), ("greedy", [1]), ("top", [])):
        asked = []
        draw(PROBS, 3, drafting, lambda n, asked=asked: (asked.append(n), np.linspace(0.1, 0.9, n))[1])
        assert asked == wanted


@pytest.mark.parametrize(("arguments", "named"), [
    (([0.5, 0.5], 0, "iid"), "n=0"),
    (([0.5, 0.5], 1.5, "iid"), "n=1.5"),
    (([0.5, 0.5], 1, "best"), "drafting='best'"),
    (([[0.5, 0.5]], 1, "iid"), "shape"),
    (([0.5, -0.5, 1.0], 1, "iid"), "least -0.5"),
    (([0.0, 0.0], 1, "top"), "sums to 0.0"),
    (([math.nan, 0.5], 1, "top"), "sums to nan"),
    (([], 1, "top"), "sums to 0.0"),
])
def test_bad_laws_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        draw(*arguments, np.random.default_rng(0).random)


# ---- warping ---------------------------------------------------------------------------------------------------------

SETTINGS = [dict(zip(("temperature", "top_k", "top_p", "typical_p"), values, strict=True))
            for values in itertools.product((0.5, 1.0, 1.7), (0, 1, 4, 50), (0.3, 0.9, 1.0), (0.2, 0.8, 1.0))]


def many_logits():
    """(8, 12) in double: smooth, with ties by construction, and with tokens ruled out."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(8, 12)) * 2
    logits[2:5] = np.round(logits[2:5])
    logits[5] = 0.25 * rng.integers(-4, 4, size=12)
    logits[6] = 0.0  # nothing but ties
    logits[7, ::2] = -np.inf
    return logits


def in_transformers(logits, temperature, top_k, top_p, typical_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

    scores = torch.from_numpy(logits)
    for is_on, warper in ((temperature != 1, lambda: TemperatureLogitsWarper(temperature)),
                          (top_k, lambda: TopKLogitsWarper(top_k)), (top_p < 1, lambda: TopPLogitsWarper(top_p)),
                          (typical_p < 1, lambda: TypicalLogitsWarper(typical_p))):
        if is_on:
            scores = warper()(None, scores)
    return scores.softmax(-1).numpy()


def assert_is_transformers(ours=warp):
    logits = many_logits()
    for setting in SETTINGS:
        np.testing.assert_allclose(ours(logits, **setting), in_transformers(logits, **setting), atol=1e-12)


def test_warp_is_transformers():
    assert_is_transformers()


def without_ties(logits, top_k=0, **setting):
    """Exactly top_k tokens, whoever ties with the last."""
    if top_k:
        logits = logits.copy()
        for row in logits:
            row[np.argsort(-row, kind="stable")[top_k:]] = -np.inf
    return warp(logits, **setting)


def temperature_last(logits, temperature, **setting):
    return warp(np.log(np.maximum(warp(logits, **setting), 1e-300)), temperature)


def mass_above_top_p(logits, top_p, **setting):
    """top_p counted from the top with the token that crosses it left out."""
    probs = warp(logits, **setting)
    for row in probs:
        order = np.argsort(-row, kind="stable")
        row[order[1:][np.cumsum(row[order])[1:] > top_p]] = 0
    return probs / probs.sum(-1, keepdims=True)


@pytest.mark.parametrize("twin", [without_ties, temperature_last, mass_above_top_p])
def test_transformers_parity_fails_for_broken_twins(twin):
    with pytest.raises(AssertionError):
        assert_is_transformers(twin)


def assert_fits_the_definitions(ours):
    """By search: the smallest sets of most likely, or most typical, tokens whose mass reaches the setting."""
    rng = np.random.default_rng(4)
    for _ in range(30):
        logits = rng.normal(size=7) * 2
        probs = np.exp(logits) / np.exp(logits).sum()
        entropy = -(probs * np.log(probs)).sum()
        keys = {"top_p": -probs, "typical_p": np.abs(-np.log(probs) - entropy)}
        for (name, key), mass in itertools.product(keys.items(), (0.15, 0.5, 0.85, 0.97)):
            sets = [list(s) for size in range(1, 8) for s in itertools.combinations(range(7), size)]
            closed = [s for s in sets if max(key[s]) <= min(np.delete(key, s), default=9)]
            kept = min((s for s in closed if probs[s].sum() >= mass), key=len)
            wanted = np.where(np.isin(range(7), kept), probs, 0)
            np.testing.assert_allclose(ours(logits, **{name: mass}), wanted / wanted.sum(), atol=1e-12)
        kept = np.argsort(-logits)[:3]
        np.testing.assert_allclose(ours(logits, top_k=3)[kept], probs[kept] / probs[kept].sum(), atol=1e-12)


def test_warp_fits_the_definitions():
    assert_fits_the_definitions(warp)


def test_the_definitions_reject_a_broken_twin():
    with pytest.raises(AssertionError):  # typical taken for nucleus
        assert_fits_the_definitions(lambda logits, typical_p=1.0, **other: warp(logits, top_p=typical_p)
                                    if typical_p < 1 else warp(logits, **other))


def test_warp_takes_any_shape_and_type_and_leaves_its_input():
    logits = many_logits()
    before = logits.copy()
    setting = {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "typical_p": 0.9}
    whole = warp(logits.reshape(2, 4, 12), **setting)
    assert whole.shape == (2, 4, 12) and whole.dtype == np.float64
    for i in range(8):
        assert np.array_equal(whole.reshape(8, 12)[i], warp(logits[i], **setting))
    assert np.array_equal(logits, before)
    half = torch.from_numpy(logits).bfloat16().requires_grad_()
    assert np.array_equal(warp(half), warp(half.detach().double().numpy()))
    np.testing.assert_allclose(whole.sum(-1), 1, atol=1e-14)


def test_temperature_zero_and_other_limits():
    assert np.array_equal(warp([0.0, 1.0, 0.5], top_p=1e-20), [0, 1, 0])
    assert np.array_equal(warp([0.0, 1.0, 0.5], top_k=1), [0, 1, 0])
    logits = np.array([[0.0, 2.0, 2.0, -np.inf], [5.0, 1.0, 4.999, 0.0]])
    assert np.array_equal(warp(logits, 0.0, 2, 0.5, 0.5), [[0, 1, 0, 0], [1, 0, 0, 0]])
    assert np.array_equal(warp(logits, 1e-320)[1], [1, 0, 0, 0])
    assert np.array_equal(warp(logits, 1e-320)[0], [0, 0.5, 0.5, 0])


@pytest.mark.parametrize(("arguments", "setting", "named"), [
    ([0.0, math.nan], {}, "NaN"),
    ([0.0, math.inf], {}, r"\+inf"),
    ([[0.0, 1.0], [-math.inf, -math.inf]], {}, "nothing but -inf"),
    (3.0, {}, "shape"),
    (np.zeros((2, 0)), {}, "shape"),
    ([0.0, 1.0], {"temperature": -1.0}, "temperature=-1.0"),
    ([0.0, 1.0], {"temperature": math.nan}, "temperature=nan"),
    ([0.0, 1.0], {"top_k": -1}, "top_k=-1"),
    ([0.0, 1.0], {"top_k": 1.5}, "top_k=1.5"),
    ([0.0, 1.0], {"top_p": 0.0}, "top_p=0.0"),
    ([0.0, 1.0], {"typical_p": 1.1}, "typical_p=1.1"),
])
def test_bad_logits_and_settings_are_named(arguments, setting, named):
    with pytest.raises(ValueError, match=named):
        warp(arguments, **setting)


def test_every_drafting_draws_from_a_warped_law():
    probs = warp(np.random.default_rng(5).normal(size=2000) * 3, 0.8, top_k=20)
    for drafting in DRAFTINGS:
        tokens = draw(probs, 6, drafting, np.random.default_rng(6).random)
        assert len(tokens) == 6 and (probs[tokens] > 0).all()
