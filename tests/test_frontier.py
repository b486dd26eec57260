"""Points, the Pareto front and the cheapest good enough, on made-up runs whose answer is plain."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from workbench import Cost, Inputs, Quality, Run, cheapest, pareto, points
from workbench.frontier import paired
from workbench.quality import Drawn


def made(flops, value, *, seed=0, metric="drift", stderr=0.1, n=10, **different):
    fields = {"method": "m", "problem": "p", "digest": "d", "code": "1", "seed": seed, "n_samples": n,
              "knobs": {"flops": flops}} | different
    cost = Cost({"a": int(flops) * n}, {"a": 1}, {"a": float(flops) * n})
    return Run(Inputs(**fields), cost, {metric: Quality(value, stderr, n)}, {}, torch.zeros(1))


def test_seeds_become_one_point_with_the_error_of_all():
    [point] = points([made(3, v, seed=s) for s, v in enumerate((1.0, 2.0, 6.0))], "drift")
    assert point.flops == 3 and point.evaluations == 3 and point.n == 30 and point.value == 3
    assert point.stderr == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))  # far more than the runs' own errors allow
    [single] = points([made(3, 1.0)], "drift")
    assert single.stderr == 0.1 and single.low < 0.8 and single.high > 1.2  # a single run keeps its own
    [equal] = points([made(3, 1.0, seed=s) for s in range(3)], "drift")
    assert 0.04 < equal.stderr < 0.1 / math.sqrt(3) and equal.low < 1 < equal.high  # no certainty by chance


def test_the_same_run_counts_once():
    [once], [twice] = (points([made(3, 1.0), *([made(3, 1.0)] * k)], "drift") for k in (0, 2))
    assert (once.n, once.stderr, len(once.runs)) == (twice.n, twice.stderr, len(twice.runs)) == (10, 0.1, 1)


def test_figures_that_are_no_numbers_take_no_part():
    candidates = points([made(1, math.nan), made(2, 3.0), made(4, 1.0)], "drift")
    assert [p.value for p in pareto(candidates, "drift")] == [3.0, 1.0]
    assert cheapest(candidates, "drift", 0).value == 1.0
    with pytest.raises(ValueError, match="1 candidates, 0 of them with a number"):
        cheapest(candidates[:1], "drift", 0)
    with pytest.raises(ValueError, match="within=nan"):
        cheapest(candidates, "drift", math.nan)


def test_of_equally_cheap_ones_the_best_is_taken():
    candidates = points([made(2, v, knobs={"i": i}) for i, v in enumerate((5.0, 1.0, 3.0))], "drift")
    assert cheapest(candidates, "drift", within=10).value == 1.0


def test_paired_differences():
    a, b = (points([made(f, v + 10 * s, seed=s) for s, v in enumerate(values)], "drift")[0]
            for f, values in ((1, (1.0, 1.2, 1.1, 1.3)), (2, (0.5, 0.8, 0.6, 0.7))))
    gap = paired(a, b, "drift")  # seeds differ by tens, the settings by a half
    assert gap.value == pytest.approx(0.5) and gap.stderr < 0.1 and gap.df == 3 and gap.low > 0
    few = [points([made(f, v, seed=s) for s in range(2)], "drift")[0] for f, v in ((1, 1.0), (2, 1.5))]
    assert paired(*few, "drift").value == -0.5 and paired(*few, "drift").stderr > few[0].stderr
    with pytest.raises(ValueError, match=r"\[0\] and \[9\]: expected settings that share a seed"):
        paired(points([made(1, 1.0)], "drift")[0], points([made(1, 1.0, seed=9)], "drift")[0], "drift")


@pytest.mark.parametrize("different", [
    {"method": "x"}, {"problem": "x"}, {"digest": "x"}, {"code": "2"}, {"knobs": {"flops": 4}}, {"n": 20}])
def test_what_differs_in_more_than_the_seed_stays_apart(different):
    assert len(points([made(3, 1.0), made(3, 2.0, seed=1, **different)], "drift")) == 2


def test_runs_without_the_metric_are_left_out_and_an_unknown_one_is_an_error():
    assert points([made(1, 1.0, metric="energy_distance")], "drift") == []
    with pytest.raises(KeyError, match="no metric 'driftt'"):
        points([], "driftt")


def by_definition(candidates, sign):
    """Those that no other is at least as good as in both, and better in one."""
    def beats(a, b):
        return (a.flops <= b.flops and sign * a.value <= sign * b.value
                and (a.flops < b.flops or sign * a.value < sign * b.value))

    return {(p.flops, p.value) for p in candidates if not any(beats(q, p) for q in candidates)}


@pytest.mark.parametrize(("metric", "sign"), [("drift", 1), ("label_accuracy", -1)])
def test_pareto_is_the_definition(metric, sign):
    for values in itertools.product((1.0, 2.0, 3.0), repeat=4):
        candidates = points([made(1 + i // 2, v, metric=metric, knobs={"i": i}) for i, v in enumerate(values)], metric)
        front = pareto(candidates, metric)
        assert {(p.flops, p.value) for p in front} == by_definition(candidates, sign)
        assert [p.flops for p in front] == sorted({p.flops for p in front})
    assert pareto([], metric) == []


def test_cheapest_within_the_bar():
    candidates = points([made(f, v) for f, v in ((1, 5.0), (2, 2.0), (4, 1.5), (8, 1.0))], "drift")
    for within, flops in ((0, 8), (0.49, 8), (0.5, 4), (1, 2), (4, 1)):
        assert cheapest(candidates, "drift", within).flops == flops
    shares = points([made(f, v, metric="label_accuracy") for f, v in ((1, 0.5), (2, 0.9), (4, 0.95))], "label_accuracy")
    assert cheapest(shares, "label_accuracy", 0.06).flops == 2 and cheapest(shares, "label_accuracy", 0).flops == 4
    for wrong in (([], 0), (candidates, -1)):
        with pytest.raises(ValueError, match="candidates"):
            cheapest(wrong[0], "drift", wrong[1])


def sampled(values, clusters=None, seed=0, flops=1):
    """A run whose figure is the mean of these values."""
    figure = Drawn(len(values), clusters=clusters).mean(values)
    return replace(made(flops, figure.value, seed=seed), quality={"drift": figure})


def test_settings_that_share_noise_are_compared_sample_by_sample():
    """The same noise moves both by tens, the settings differ by half: two seeds of eight samples show it."""
    noise = 10 * torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wobble = 0.05 * torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = (points([sampled(noise[s] + shift + k * wobble[s], seed=s, flops=1 + k) for s in range(2)], "drift")[0]
            for k, shift in ((0, 0.5), (1, 0.0)))
    gap = paired(a, b, "drift")
    assert abs(gap.value - 0.5) < 5 * 0.05 / 4 and gap.stderr < 0.03 and gap.df == 15
    alone = [points([replace(r, quality={"drift": replace(r.quality["drift"], values=None)}) for r in p.runs],
                    "drift")[0] for p in (a, b)]
    assert paired(*alone, "drift").stderr > 1  # the broken twin: as if the runs were independent


def test_seeds_of_the_same_prompts_are_not_independent():
    """Four prompts of their own level, eight seeds: the levels' spread stays in the error, whatever their number."""
    source = torch.Generator().manual_seed(0)
    levels = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    prompts = torch.arange(16) % 4
    runs = [sampled(levels[prompts] + 0.1 * torch.randn(16, generator=source, dtype=torch.float64), prompts, seed=s)
            for s in range(8)]
    point = points(runs, "drift")[0]
    assert point.stderr == pytest.approx(float(levels.std()) / 2, rel=0.1)
    blind = [replace(r, quality={"drift": replace(r.quality["drift"], drawn=Drawn(16))}) for r in runs]
    assert points(blind, "drift")[0].stderr < point.stderr / 2  # the broken twin: samples as if of no prompt
