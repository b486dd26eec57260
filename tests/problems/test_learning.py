"""The learning problems: the learner against plain modules, the best possible error, a pool's faults, the judge."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from workbench import run, sweep
from workbench.cost import Meter
from workbench.problems.learning import (
    OF,
    Learner,
    auc,
    digits,
    flip,
    from_torch,
    gaussians,
    glyphs,
    learning_curve,
    perceptron,
    spoiled,
)
from workbench.rng import Rng


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))


def stacked(learner: Learner, n: int) -> dict[str, torch.Tensor]:
    made = [learner.initial(torch.Generator().manual_seed(i)) for i in range(n)]
    return {name: torch.stack([one[name] for one in made]).double() for name in made[0]}


LEARNERS = {"perceptron": (partial(perceptron, 16, 5, 4), (4, 4)), "convolution": (convolution, (1, 4, 4)),
            "linear": (partial(perceptron, 16, 0, 4), (16,))}


@pytest.fixture(params=LEARNERS)
def case(request):
    """A learner, three replicates' weights, five examples for each and their labels."""
    factory, shape = LEARNERS[request.param]
    learner, source = Learner(factory), torch.Generator().manual_seed(1)
    x = torch.randn((3, 5, *shape), generator=source, dtype=torch.float64)
    return learner, stacked(learner, 3), x, torch.randint(4, (3, 5), generator=source)


def one_by_one(learner, weights, x, y):
    """Of every example alone, with plain autograd: logits, gradients by weights {name: (n, m, ...)} and by input."""
    logits, by_weights, by_input = torch.zeros((*y.shape, 4), dtype=torch.float64), {}, torch.zeros_like(x)
    for i in range(len(x)):
        own = {name: w[i].clone().requires_grad_() for name, w in weights.items()}
        for j in range(x.shape[1]):
            row = x[i, j].clone().requires_grad_()
            out = functional_call(learner.module, own, (row[None],))[0]
            logits[i, j] = out.detach()
            by_input[i, j] = torch.autograd.grad(out[y[i, j]], row, retain_graph=True)[0]
            found = torch.autograd.grad(cross_entropy(out, y[i, j]), list(own.values()))
            for name, g in zip(own, found, strict=True):
                by_weights.setdefault(name, torch.zeros((*y.shape, *g.shape), dtype=torch.float64))[i, j] = g
    return logits, by_weights, by_input


def test_replicates_side_by_side_are_replicates_one_by_one(case):
    learner, weights, x, y = case
    logits, by_weights, by_input = one_by_one(learner, weights, x, y)
    torch.testing.assert_close(learner.forward(x, weights), logits)
    gradient, out = learner.gradient(x, y, weights, "weights")
    torch.testing.assert_close(out, logits)
    for name, each in by_weights.items():
        torch.testing.assert_close(gradient[name], each.mean(1))
        with pytest.raises(AssertionError):  # a sum for a mean
            torch.testing.assert_close(gradient[name], each.sum(1))
    torch.testing.assert_close(learner.gradient(x, y, weights, "inputs")[0], by_input)
    norms, out = learner.gradient(x, y, weights, "norms")
    torch.testing.assert_close(out, logits)
    torch.testing.assert_close(norms, sum(g.flatten(2).square().sum(2) for g in by_weights.values()))


def test_the_last_layer_has_a_closed_form(case):
    """|grad|^2 = |p - y|^2 (|h|^2 + 1), h what goes into the last layer."""
    learner, weights, x, y = case
    found, _ = learner.gradient(x, y, weights, "last_norms")
    kept = []
    handle = learner.module.get_submodule(learner.last[0].rpartition(".")[0]).register_forward_pre_hook(
        lambda module, args: kept.append(args[0].detach()))
    logits = torch.stack([functional_call(learner.module, {k: w[i] for k, w in weights.items()}, (x[i],))
                          for i in range(3)])
    handle.remove()
    error = (logits.softmax(-1) - nn.functional.one_hot(y, 4)).square().sum(-1).detach()
    features = torch.stack(kept).square().sum(-1)
    torch.testing.assert_close(found, error * (features + 1))
    with pytest.raises(AssertionError):  # without the bias
        torch.testing.assert_close(found, error * features)


def test_blocks_of_norms_are_the_whole(case, monkeypatch):
    learner, weights, x, y = case
    whole = learner.gradient(x, y, weights, "norms")
    monkeypatch.setattr("workbench.problems.learning._BLOCK", 1)
    torch.testing.assert_close(learner.gradient(x, y, weights, "norms"), whole)


def test_prices_are_what_torch_counts():
    """A gradient costs 3 f: a forward pass and two products of its size per layer, less the first layer's inputs."""
    problem = digits(100, n_hidden=20)
    f = 2 * (64 * 20 + 20 * 10)
    assert problem.flops == {"forward": f, "gradient": 3 * f}
    parameters, _ = problem.start([Rng(0, 2).stream(i) for i in range(2)])
    x, y = problem.rows(torch.arange(10).expand(2, -1))
    priced = {of: problem.prices["gradient"](x, y, parameters, of) for of in OF}
    assert {rows for rows, _ in priced.values()} == {20}
    assert priced["last_norms"][1] == 20 * (f + 2 * (20 * 10 + 10))
    with FlopCounterMode(display=False) as counter:
        problem.learner.gradient(x, y, parameters, "weights")
    assert priced["weights"][1] == counter.get_total_flops() + 20 * 2 * 64 * 20
    with FlopCounterMode(display=False) as counter:
        problem.learner.gradient(x, y, parameters, "inputs")
    assert priced["inputs"][1] == counter.get_total_flops()
    meter = Meter(problem.prices, n_samples=2)
    counted = problem.wrapped(meter.wrap)
    counted.forward(x, parameters)
    counted.gradient(x, y, parameters, "norms")
    counted.assess(parameters)  # judging costs nothing
    assert meter.cost.evaluations == {"forward": 20, "gradient": 20}
    assert meter.cost.flops == {"forward": 20 * f, "gradient": 60 * f}
    assert meter.spent.tolist() == [40 * f, 40 * f]


def test_starts_are_of_each_stream_alone():
    problem = gaussians(20, n_hidden=3)
    weights, sources = problem.start([Rng(5, 3).stream(i) for i in range(3)])
    again, other = problem.start([Rng(5, 1).stream(0)])
    for name, w in weights.items():
        assert torch.equal(w[:1], again[name]) and not torch.equal(w[0], w[1])
    assert torch.equal(torch.randperm(9, generator=sources[0]), torch.randperm(9, generator=other[0]))
    before = torch.get_rng_state()
    problem.start([Rng(5, 1).stream(0)])
    assert torch.equal(torch.get_rng_state(), before)
    scale = weights["1.weight"].abs().max()  # torch's own: uniform within 1 / sqrt(inputs)
    assert 0.5 / math.sqrt(2) < float(scale) <= 1 / math.sqrt(2)


def test_threads_do_not_take_each_others_weights():
    problem = gaussians(50, n_hidden=3)
    parts = [problem.start([Rng(seed, 2).stream(i) for i in range(2)])[0] for seed in range(4)]
    alone = [problem.assess(p) for p in parts]
    wrong = []

    def job(k: int) -> None:
        wrong.extend(k for _ in range(20) if not torch.equal(problem.assess(parts[k]), alone[k]))

    threads = [threading.Thread(target=job, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- closed form -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_learners_reach_the_best_possible_error(noise):
    """On the same 4000 test points, logistic regression errs as often as Bayes' rule, but for few of them."""
    problem = gaussians(4000, n_dims=3, distance=2.0, label_noise=noise, seed=3)
    assert problem.bayes_error == pytest.approx(0.15865525393145707)  # Phi(-1)
    bayes = ((problem.test.sum(1) > 0) != problem.test_labels).double()
    share, n = float(bayes.mean()), len(bayes)
    assert abs(share - problem.bayes_error) < 5 * math.sqrt(problem.bayes_error * (1 - problem.bayes_error) / n)
    made = run("rs2", problem, 0, 4, keep=1.0, n_epochs=3, learning_rate=0.01)
    errors = (made.answer["logits"].argmax(-1) != problem.test_labels).double()
    gap = (errors - bayes).mean(0)
    # a weight vector at an angle a errs Phi(-cos(a)) - Phi(-1), about phi(1) a^2 / 2, more often; 4000 examples
    # without noise leave an angle of about .05 in 3 dimensions, with a fifth of labels wrong twice that
    assert float(gap.mean()) < 0.242 * 0.15**2 / 2 + 5 * float(gap.std()) / math.sqrt(n)
    opposite = (made.answer["logits"].argmin(-1) != problem.test_labels).double() - bayes
    assert float(opposite.mean()) > 0.5


def test_labels_are_flipped_alike():
    """So many exactly, always to another class, and to each as often; the twin may leave a label as it is."""
    y = torch.arange(4000) % 4
    source = torch.Generator().manual_seed(0)
    flipped_y, flipped = flip(y, 4, 0.3, source)
    assert int(flipped.sum()) == 1200
    assert torch.equal(flipped_y != y, flipped)
    moves = ((flipped_y - y) % 4)[flipped].bincount(minlength=4)
    assert moves[0] == 0 and chisquare(moves[1:]).pvalue > 1e-6
    twin = torch.where(flipped, torch.randint(4, (4000,), generator=source), y)
    assert not torch.equal(twin != y, flipped)
    assert torch.equal(flip(y, 4, 0.0, source)[0], y)


def test_pools_are_imbalanced_and_repeat_themselves_as_asked():
    x, y = torch.arange(1000.0)[:, None], torch.arange(1000) % 5
    source = torch.Generator().manual_seed(0)
    kept, labels, _ = spoiled(x, y, 5, source, imbalance=16)
    assert labels.bincount().tolist() == [200, 100, 50, 25, 12]  # 200 / 2^c, a half to the even
    assert torch.equal(kept[:, 0].long() % 5, labels) and len(kept.unique()) == len(kept)
    again, labels, flipped = spoiled(x, y, 5, source, duplicates=0.4, label_noise=0.1)
    assert len(again) == 1000 and len(again.unique()) == 600 and int(flipped.sum()) == 100
    assert torch.equal(again[:, 0].long() % 5 != labels, flipped)
    same = spoiled(x, y, 5, source)
    assert torch.equal(same[0], x) and torch.equal(same[1], y) and not same[2].any()


def test_auc_is_that_of_scikit_learn_with_ties():
    source = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (4, 50), generator=source).double()
    positive = torch.rand(50, generator=source) < 0.3
    wanted = [roc_auc_score(positive, row) for row in scores]
    np.testing.assert_allclose(auc(scores, positive), wanted, rtol=0, atol=1e-12)
    strict = (scores[:, positive, None] > scores[:, None, ~positive]).double().mean((1, 2))
    assert float((strict - torch.tensor(wanted)).abs().max()) > 0.01  # ties not counted


# ---- problems --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "more"), [
    (gaussians, {"n_pool": 30, "label_noise": 0.1}), (digits, {"n_pool": 60, "imbalance": 4.0}),
    (glyphs, {"n_pool": 72, "n_test": 20, "duplicates": 0.5})])
def test_problems_are_what_their_source_says(make, more):
    problem = make(**more)
    names: dict = {}
    exec(problem.source, names)
    assert names["problem"].digest == problem.digest and names["problem"].name == problem.name
    assert make(**more, seed=1).digest != problem.digest
    made = run("el2n", problem, 0, 2, n_epochs=2, score_epochs=1, n_seeds=1)
    right = (made.answer["logits"].argmax(-1) == problem.test_labels).double().mean(1)
    assert made.quality["test_accuracy"].value == pytest.approx(float(right.mean()))
    assert made.quality["test_loss"].value == pytest.approx(
        float(cross_entropy(made.answer["logits"].flatten(0, 1), problem.test_labels.repeat(2))), rel=1e-5)
    assert ("noise_auc" in made.quality) == bool(problem.flipped.any())
    assert "noise_auc" not in run("rs2", problem, 0, 2, n_epochs=1).quality
    with pytest.raises(ValueError, match=r"n_pool=1: expected"):
        make(n_pool=1)


def test_a_learning_curve_is_of_all_replicates_of_all_seeds():
    problem = digits(60)
    runs = sweep("tracin", problem, {}, seeds=[0, 1], n_samples=3, n_epochs=2, score_epochs=2, keep=0.5)
    curve = learning_curve(runs)
    assert [x for x, _, _ in curve] == [2 * 2 * 60 + 30, 2 * 2 * 60 + 60]  # selection comes first
    last = torch.cat([r.quality["test_accuracy"].values for r in runs])
    assert curve[-1][1:] == (pytest.approx(float(last.mean())), pytest.approx(float(last.std()) / math.sqrt(6)))
    assert [x for x, _, _ in learning_curve(runs, "seen", "i")] == [1, 2]
    assert learning_curve(runs, "seen")[0][1] == pytest.approx(0.5)


def test_names_say_what_is_wrong_with_a_pool():
    assert digits(60, label_noise=0.0).name == "digits, 60 examples"
    spoilt = digits(1000, imbalance=10, duplicates=0.5)
    assert spoilt.name == (
        f"digits, {len(spoilt.pool)} examples, 0.1 of labels wrong, imbalance 10, 0.5 copies")
    assert gaussians(20, label_noise=0.2).name == (
        "two Gaussians in 2 dimensions, distance 2, 20 examples, 0.2 of labels wrong")


def test_pool_and_test_set_share_no_example():
    problem = digits(1297)
    both = torch.cat((problem.pool, problem.test)).flatten(1)
    from sklearn.datasets import load_digits

    assert len(both.unique(dim=0)) == len(np.unique(load_digits().data, axis=0))
    assert len(problem.flipped) == 1297 and int(problem.flipped.sum()) == 130


def test_pictures_show_the_pool():
    problem = digits(40)
    shown = problem.pictures(torch.tensor([3, 5]))
    assert shown.shape == (2, 8, 8) and shown.dtype == torch.uint8
    torch.testing.assert_close(shown[0].float() / 255 * 2 - 1, problem.pool[3], rtol=0, atol=1 / 255)
    assert glyphs(36, n_test=2).pictures(torch.tensor([0])).shape == (1, 12, 12)
    assert gaussians(20).pictures(torch.tensor([0])) is None


def test_own_data_and_own_model():
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn((40, 1, 4, 4), generator=source), torch.randint(4, (40,), generator=source)
    problem = from_torch((x, y), TensorDataset(x[:8], y[:8]), convolution, preset={"keep": 0.5})
    same = from_torch(TensorDataset(x, y), (x[:8], y[:8]), convolution)
    assert problem.digest == same.digest and problem.classes == tuple("0123")
    made = run("tracin", problem, 0, 2, n_epochs=2, **problem.preset)
    assert made.answer["logits"].shape == (2, 8, 4) and "noise_auc" not in made.quality
    known = torch.arange(40) < 4
    noisy = from_torch((x, y), (x, y), convolution, flipped=known)
    assert "noise_auc" in run("tracin", noisy, 0, 2, n_epochs=1).quality
    x.zero_()  # what is one's own may change afterwards
    assert problem.pool.any()


@pytest.mark.parametrize(("changed", "said"), [
    ({"factory": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 4))}, "BatchNorm1d"),
    ({"factory": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 4))}, "Dropout"),
    ({"factory": nn.Flatten}, "no weights"),
    ({"factory": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3))}, r"\(1, 3\): expected \(1, 4\)"),
    ({"pool": (torch.randn(6, 4, 4), torch.arange(5))}, r"pool: inputs \(6, 4, 4\), labels \(5,\)"),
    ({"pool": (torch.randn(6, 4, 4), torch.randn(6))}, "pool: .*float32"),
    ({"test": (torch.zeros((6, 4, 4), dtype=torch.int64), torch.arange(6))}, "test: inputs of torch.int64"),
    ({"classes": ["a", "b"]}, "2 classes: expected at least 4"),
    ({"flipped": torch.zeros(5, dtype=torch.bool)}, r"flipped of shape \(5,\)"),
])
def test_what_does_not_fit_is_refused(changed, said):
    data = (torch.randn(6, 4, 4), torch.tensor([0, 1, 2, 3, 0, 1]))
    given = {"pool": data, "test": data, "factory": partial(perceptron, 16, 0, 4)} | changed
    with pytest.raises(ValueError, match=said):
        from_torch(**given)


def test_dropout_of_nothing_is_no_dropout():
    data = (torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]))
    problem = from_torch(data, data, lambda: nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 2)))
    assert replace(problem, dtype=torch.float64).rows(torch.zeros((1, 1), dtype=torch.int64))[0].dtype == torch.float64
