"""Thresholdout against its laws, its neutral knobs and the experiment that made it known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from workbench import run
from workbench.methods.estimation import thresholdout as module
from workbench.methods.estimation.thresholdout import Keeper, laplace
from workbench.problems.estimation import holdout

NOISE = holdout(400, 300)  # labels are noise: no classifier is right more often than .5
SIGNAL = holdout(400, 300, 60, 0.2)


def ran(problem, n=12, seed=0, **knobs):
    return run("thresholdout", replace(problem, judge=lambda a, c: {}), seed, n, n_rounds=5, n_features=60, **knobs)


def errors(values, truth):
    """How many standard errors the mean of values (n,) is above the truth."""
    return float((values.mean() - truth) / (values.std() / math.sqrt(len(values))))


def test_noise_is_laplace():
    drawn = laplace(np.random.default_rng(0).random(20_000), 0.7)
    assert stats.kstest(drawn, stats.laplace(scale=0.7).cdf).pvalue > 1e-4
    assert stats.kstest(np.random.default_rng(0).normal(0, 0.7 * math.sqrt(2), 20_000), stats.laplace(scale=0.7).cdf
                        ).pvalue < 1e-6  # the broken twin: normal noise of the same variance


def test_a_keeper_by_hand():
    """Gaps of .1, .3 and .5 at T = .2 without noise, with a budget of one: the second answer spends it."""
    keeper = Keeper(0.2, 0.0, 1, np.array([0.5]))
    given, told = keeper.answers(np.array([0.5, 0.5, 0.5]), np.array([0.6, 0.8, 1.0]), np.full((3, 3), 0.5))
    assert given.tolist() == [0.5, 0.8, 0.5] and told.tolist() == [False, True, False] and keeper.left == 0


def test_answers_of_held_out_data_carry_noise_of_scale_sigma():
    """Always beyond the threshold: answers less means are Lap(sigma)."""
    uniform = np.random.default_rng(1).random((20_000, 3))
    given, told = Keeper(-1e9, 0.3, 10**9, np.array([0.4])).answers(np.zeros(20_000), np.ones(20_000), uniform)
    assert told.all() and stats.kstest(given - 1, stats.laplace(scale=0.3).cdf).pvalue > 1e-4


def test_the_threshold_carries_noise_of_its_own():
    """One question at the threshold itself, asked of 4,000 keepers: half of them tell, as both noises are symmetric;
    half a sigma above it, as many as the law of Lap(2 sigma) + Lap(4 sigma) says."""
    source = np.random.default_rng(2)
    gamma, eta = (source.laplace(0, k * 0.3, 400_000) for k in (2, 4))
    for gap in (1.0, 1.15):
        told = [Keeper(1.0, 0.3, 1, source.random(1)).answers(np.zeros(1), np.full(1, gap), source.random((1, 3)))[1][0]
                for _ in range(4000)]
        share = float((gamma + eta < gap - 1.0).mean())
        assert abs(np.mean(told) - share) < 5 * 0.5 / math.sqrt(4000)


def test_the_naive_holdout_is_fooled_and_thresholdout_is_not():
    naive, kept, fresh = (ran(NOISE, 24, variant=v, sigma=0.25).answer["reported"][:, -1]
                          for v in ("naive", "thresholdout", "fresh"))
    assert errors(naive, 0.5) > 10 and naive.mean() > 0.57
    assert float(kept.mean()) < float(naive.mean()) - 0.03
    assert abs(errors(fresh, 0.5)) < 5
    assert torch.equal(ran(NOISE, variant="naive").answer["true"], torch.full((12, 5), 0.5, dtype=torch.float64))


def test_without_threshold_and_noise_it_is_the_naive_holdout():
    bare = ran(NOISE, variant="thresholdout", threshold=0.0, sigma=0.0, budget=100_000)
    naive = ran(NOISE, variant="naive")
    assert torch.equal(bare.answer["reported"], naive.answer["reported"])
    assert not torch.equal(ran(NOISE, threshold=0.0, sigma=0.1).answer["reported"], naive.answer["reported"])


def test_beyond_any_threshold_and_without_a_budget_the_training_set_answers():
    """Which says .5 + sqrt(k / (2 pi)) x mean of the best correlations: far too much, and all the same for both."""
    never, spent = ran(NOISE, threshold=100.0, sigma=0.0), ran(NOISE, budget=0)
    assert torch.equal(never.answer["reported"], spent.answer["reported"]) and never.cost.counted["looks"] == 0
    naive = ran(NOISE, variant="naive").answer
    assert float(never.answer["reported"][:, -1].mean()) > float(naive["reported"][:, -1].mean())
    assert spent.answer["left"].tolist() == [0] * 12 and never.answer["left"].tolist() == [1000] * 12


@pytest.mark.parametrize("budget", [0, 1, 7, 40])
def test_the_budget_is_kept(budget):
    made = ran(NOISE, budget=budget, threshold=1.0)
    assert bool((made.answer["left"] >= 0).all()) and made.cost.counted["looks"] <= 12 * budget
    assert made.cost.counted["looks"] == 12 * budget - int(made.answer["left"].sum())


def test_planted_signal_is_reported_and_true():
    for variant in ("thresholdout", "fresh"):
        made = ran(SIGNAL, 24, variant=variant)
        assert float(made.answer["true"][:, -1].mean()) > 0.8
        assert abs(float((made.answer["reported"] - made.answer["true"])[:, -1].mean())) < 0.08
    true = made.answer["true"].mean(0)
    assert float(true[-1]) > float(true[0])


def test_the_true_accuracy_is_that_of_new_rows():
    vote = torch.zeros(300, dtype=torch.float64)
    vote[:40] = SIGNAL.shifts[:40].sign()
    vote[100:120] = 1.0
    x = SIGNAL.data(torch.Generator().manual_seed(5))
    hits = torch.cat([SIGNAL.data(torch.Generator().manual_seed(s)) @ vote > 0 for s in range(50)]).double()
    assert abs(float(hits.mean()) - SIGNAL.accuracy(vote)) < 5 * 0.5 / math.sqrt(len(hits)) and x.shape == (400, 300)
    fresh = SIGNAL.fresh(np.random.default_rng(0).random(4000), vote)
    assert abs(fresh.mean() - SIGNAL.accuracy(vote)) < 5 * 0.5 / math.sqrt(400 * 4000)


def test_a_threshold_without_its_own_noise_leaks_more_of_the_budget(monkeypatch):
    """The broken twin of the noise: without gamma and eta the same questions spend another budget."""
    kept = ran(NOISE, threshold=3.0, sigma=1.0).cost.counted["looks"]
    monkeypatch.setattr(module, "laplace", lambda uniform, scale: np.zeros_like(uniform))
    assert ran(NOISE, threshold=3.0, sigma=1.0).cost.counted["looks"] < kept / 2


def test_wrong_sizes_are_named():
    for wrong in ({"n_rows": 5}, {"n_signal": 600}, {"shift": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            holdout(**wrong)
    with pytest.raises(ValueError, match="'sensitivity_sampling' does not run on 'holdout"):
        run("sensitivity_sampling", NOISE)
