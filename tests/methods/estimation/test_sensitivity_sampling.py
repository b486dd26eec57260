"""Row sampling against exact sensitivities, fixed points, closed sums and unbiasedness."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from workbench import run
from workbench.methods.estimation import sensitivity_sampling as module
from workbench.methods.estimation.sensitivity_sampling import l1_sensitivities, leverage, lewis, shares
from workbench.problems.estimation import fitted, loss, norms, rows


def matrix(n, d, seed=0, heavy=0):
    a = torch.randn((n, d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a[:heavy] *= 30
    return a


@pytest.mark.parametrize("heavy", [0, 3])
def test_leverages_and_lewis_weights_add_up_to_the_rank_and_meet_at_2(heavy):
    a = matrix(300, 5, heavy=heavy)
    assert float(leverage(a).sum()) == pytest.approx(5, abs=1e-10)
    torch.testing.assert_close(leverage(a), ((a @ torch.linalg.inv(a.T @ a)) * a).sum(1), rtol=1e-8, atol=1e-12)
    for p in (1.0, 1.5, 2.0, 3.0):
        assert float(lewis(a, p, 200).sum()) == pytest.approx(5, abs=1e-8)
    torch.testing.assert_close(lewis(a, 2.0), leverage(a), rtol=0, atol=1e-8)
    assert (lewis(a, 1.0) - leverage(a)).abs().max() > 1e-3  # else the comparison would say nothing
    assert float(leverage(torch.cat((a, a[:, :1]), 1)).sum()) == pytest.approx(5, abs=1e-8)


@pytest.mark.parametrize("p", [1.0, 1.5, 3.0])
def test_lewis_weights_are_the_fixed_point(p):
    a = matrix(200, 4, heavy=2)
    w = lewis(a, p, 200)
    inner = torch.linalg.inv(a.T @ (w ** (1 - 2 / p) * a.T).T)
    torch.testing.assert_close(w, (((a @ inner) * a).sum(1)) ** (p / 2), rtol=1e-8, atol=0)
    assert (lewis(a, p, 1) - w).abs().max() > 1e-4  # the broken twin: one round


def test_exact_sensitivities_are_the_largest_share_that_any_vector_gives():
    """By 20,000 directions in two dimensions; and below their bound, the root of the leverage."""
    a = matrix(40, 2, 1, heavy=2)
    angles = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    parts = (a @ torch.stack((angles.cos(), angles.sin()))).abs()
    brute = (parts / parts.sum(0)).max(1).values
    exact = l1_sensitivities(a)
    torch.testing.assert_close(exact, brute, rtol=1e-3, atol=0)
    assert bool((exact >= brute - 1e-9).all()) and bool((exact <= leverage(a).sqrt() + 1e-9).all())
    assert float(exact.sum()) <= 2 + 1e-9
    assert (exact - leverage(a)).abs().max() > 0.01  # the broken twin: l_2's for l_1's


@pytest.mark.parametrize("n_kept", [1, 5, 40, 299, 300, 900])
def test_shares_add_up_to_what_is_to_be_kept_and_keep_the_proportions(n_kept):
    scores = matrix(300, 1, 3, heavy=4).abs()[:, 0]
    q = shares(scores, n_kept)
    assert float(q.sum()) == pytest.approx(min(n_kept, 300)) and bool((q <= 1).all()) and bool((q > 0).all())
    open_ones = q < 1 - 1e-12
    if int(open_ones.sum()) > 1:
        ratio = q[open_ones] / scores[open_ones]
        assert float(ratio.max() / ratio.min()) == pytest.approx(1)


@pytest.mark.parametrize("score", ["lewis", "uniform"])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_estimates_are_unbiased(score, p):
    problem = replace(rows(300, 3, 2, 5.0), judge=lambda a, c: {})
    ratios = run("sensitivity_sampling", problem, 0, 400, score=score, p=p, n_kept=60, n_rounds=2).answer["ratios"]
    far = (ratios.mean(0) - 1) / (ratios.std(0) / math.sqrt(len(ratios)))
    assert far.abs().max() < 5.5  # 64 test vectors
    raw = run("sensitivity_sampling", problem, 0, 400, score=score, p=p, n_kept=60, n_rounds=2)
    assert abs(raw.trace["kept"][-1].mean() - 60) < 5 * math.sqrt(60 / 400)


def test_the_unbiasedness_check_fails_for_unweighted_rows(monkeypatch):
    problem = replace(rows(300, 3, 2, 5.0), judge=lambda a, c: {})
    monkeypatch.setattr(module, "norms", lambda m, v, p, w=None: norms(m, v, p) * (1 if w is None else 5))
    ratios = run("sensitivity_sampling", problem, 0, 400, score="lewis", p=1.0, n_kept=60).answer["ratios"]
    assert ((ratios.mean(0) - 1) / (ratios.std(0) / 20)).abs().max() > 20


def test_heavy_rows_are_what_uniform_sampling_misses():
    """4,000 rows, 8 of them 200 times as large, 150 kept: the weights see them, uniform sampling does not."""
    problem = rows()
    figures = {score: run("sensitivity_sampling", problem, 1, 24, score=score, n_rounds=1).quality["distortion"]
               for score in ("uniform", "leverage", "root_leverage", "lewis")}
    assert figures["uniform"].value > 0.3 and figures["lewis"].high < 0.12 and figures["root_leverage"].high < 0.14
    assert figures["lewis"].value < figures["leverage"].value < figures["uniform"].value


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_the_fit_is_the_best_there_is(p):
    a = matrix(120, 4, 2)
    x = fitted(a, torch.ones(120, dtype=torch.float64), p, 400)
    best = loss(a, x, p)
    source = torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            moved = x + size * torch.randn(3, generator=source, dtype=torch.float64)
            assert loss(a, moved, p) >= best * (1 - 1e-6)
    if p == 2:
        torch.testing.assert_close(x, torch.linalg.lstsq(a[:, :3], a[:, 3:]).solution[:, 0], rtol=1e-9, atol=1e-12)


def test_all_rows_kept_are_exact_and_the_fits_loss_falls_towards_the_best():
    problem = rows(200, 3, 2, 10.0)
    whole = run("sensitivity_sampling", problem, 0, 3, n_kept=5000, n_rounds=1)
    torch.testing.assert_close(whole.answer["ratios"], torch.ones(3, 64, dtype=torch.float64), rtol=1e-12, atol=0)
    assert whole.quality["loss_ratio"].value == pytest.approx(1)
    few, more = (run("sensitivity_sampling", problem, 0, 24, n_kept=n).quality["loss_ratio"] for n in (12, 80))
    assert few.value > more.value > 1


def test_what_is_read_is_counted():
    made = run("sensitivity_sampling", rows(200, 3), 0, 4, n_kept=50, score="leverage")
    kept = float(made.trace["kept"][-1].sum())
    assert made.cost.counted["looks"] == 4 * 200 + kept and made.trace["looks"][-1] == made.cost.counted["looks"]
    with pytest.raises(ValueError, match="n_heavy=9"):
        rows(8, 2, 9)
