"""Repeated random sampling: what is seen, in how many steps, and that training is torch's own SGD."""

from __future__ import annotations

import math

import pytest
import torch
from methods.learning.alone import RATE, begin, learn, n_steps_of

from workbench import points, run, sweep
from workbench.methods.learning._training import n_kept, subsets
from workbench.methods.learning.rs2 import VARIANTS
from workbench.problems.learning import digits, gaussians
from workbench.rng import Rng

SCORED = ("el2n", "vog", "tracin", "forgetting", "pvi")


def streams(n: int, seed: int = 0) -> list[torch.Generator]:
    rng = Rng(seed, n)
    return [rng.stream(i) for i in range(n)]


def seen(variant: str, n_pool: int, k: int, n_epochs: int, n: int) -> torch.Tensor:
    """How often each of the pool's examples came up in each epoch (n_epochs, n, n_pool)."""
    return torch.stack([torch.zeros((n, n_pool)).scatter_add(1, indices, torch.ones(indices.shape))
                        for indices in subsets(streams(n), n_pool, k, n_epochs, variant)])


def test_coverage_with_replacement_is_the_formula():
    """1 - (1 - r)^T of the pool on average. Examples of an epoch exclude each other, so a share varies less than
    that of independent ones; the static subset, which sees r of the pool, fails."""
    n, n_pool, k, n_epochs = 200, 100, 10, 7
    wanted = 1 - (1 - k / n_pool) ** n_epochs
    allowed = 5 * math.sqrt(wanted * (1 - wanted) / (n * n_pool))
    share = {variant: float((seen(variant, n_pool, k, n_epochs, n).sum(0) > 0).float().mean()) for variant in VARIANTS}
    assert abs(share["with"] - wanted) < allowed
    assert abs(share["static"] - wanted) > allowed and abs(share["without"] - wanted) > allowed
    assert share["static"] == pytest.approx(k / n_pool)


@pytest.mark.parametrize(("n_pool", "k"), [(100, 10), (100, 25), (30, 7)])
def test_without_replacement_nothing_comes_twice_before_all_came(n_pool, k):
    """Exactly min(1, rT) where parts divide the pool, and no repeat within floor(1 / r) epochs anywhere."""
    rounds = n_pool // k
    counts = seen("without", n_pool, k, 3 * rounds, 5)
    for first in range(0, 3 * rounds, rounds):
        assert float(counts[first:first + rounds].sum(0).max()) == 1
    for t in range(1, rounds + 1):
        assert torch.equal(counts[:t].sum((0, 2)), torch.full((5,), float(t * k)))
    assert bool((counts.sum(0) >= 3).all()) == (n_pool % k == 0)
    twin = seen("with", n_pool, k, rounds, 5)
    assert float(twin.sum(0).max()) > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_epoch_has_no_example_twice_and_static_ones_are_alike(variant):
    counts = seen(variant, 40, 12, 6, 4)
    assert float(counts.max()) == 1 and torch.equal(counts.sum(2), torch.full((6, 4), 12.0))
    assert all(torch.equal(counts[0], later) for later in counts[1:]) == (variant == "static")
    orders = list(subsets(streams(2), 40, 12, 2, variant))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0][0].sort().values, orders[0][1].sort().values)  # replicates differ


def test_a_share_is_whole_examples():
    assert [n_kept(keep, 50) for keep in (0.001, 0.01, 0.03, 0.05, 0.5, 1.0)] == [1, 1, 2, 3, 25, 50]


@pytest.mark.parametrize(("keep", "batch_size", "n_epochs"), [(0.3, 7, 4), (1.0, 16, 3), (0.02, 50, 5)])
def test_steps_and_rows_are_counted(keep, batch_size, n_epochs):
    """T ceil(rN / b) steps, T rN rows of gradients and no other work."""
    problem = gaussians(60)
    made = run("rs2", problem, 0, 3, keep=keep, batch_size=batch_size, n_epochs=n_epochs)
    k = n_kept(keep, 60)
    assert made.cost.calls == {"forward": 0, "gradient": n_epochs * math.ceil(k / batch_size)}
    assert made.cost.evaluations == {"forward": 0, "gradient": 3 * n_epochs * k}
    assert made.phases == (("training", n_epochs),)
    assert torch.equal(made.answer["taken"].sum(1), torch.full((3,), n_epochs * k))
    assert torch.equal(made.trace["seen"][-1], (made.answer["taken"] > 0).double().mean(1))
    assert torch.equal(made.trace["accuracy"][-1], made.quality["test_accuracy"].values)


def alone(problem, variant, n, schedule, k=12, n_epochs=4, batch_size=5, n_hidden=4, momentum=0.9, steps_of=None):
    """Test logits (n, T, C) of replicates trained one at a time by torch."""
    n_steps = n_steps_of(n_epochs, steps_of or k, batch_size) if schedule == "cosine" else None
    logits = []
    for stream in streams(n, seed=2):
        module, source = begin(problem, stream, n_hidden)
        epochs = [indices[0] for indices in subsets([source], len(problem.pool), k, n_epochs, variant)]
        list(learn(module, problem.pool, problem.labels, epochs, batch_size, n_steps, momentum))
        logits.append(module(problem.test).detach())
    return torch.stack(logits)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_torchs_sgd_one_replicate_at_a_time(variant, schedule):
    problem = gaussians(30, n_hidden=4, n_test=20)
    made = run("rs2", problem, 2, 3, keep=0.4, variant=variant, n_epochs=4, batch_size=5, learning_rate=RATE,
               schedule=schedule)
    wanted = alone(problem, variant, 3, schedule)
    assert float((made.answer["logits"] - wanted).abs().max()) < 1e-10
    twins = [alone(problem, variant, 3, schedule, momentum=0.0)]
    if schedule == "cosine":  # stretched over the steps of the whole pool, of which only a part is made
        twins.append(alone(problem, variant, 3, schedule, steps_of=30))
    for twin in twins:
        assert float((made.answer["logits"] - twin).abs().max()) > 1e-4


def test_all_of_the_pool_is_full_training_whatever_the_method():
    """Bit by bit: no choice is left when everything is kept, and all arms of a seed start alike."""
    problem = digits(60)
    full = run("rs2", problem, 1, 2, keep=1.0, n_epochs=2).answer
    assert torch.equal(full["taken"], torch.full((2, 60), 2))
    for variant in VARIANTS:
        assert torch.equal(run("rs2", problem, 1, 2, keep=1.0, n_epochs=2, variant=variant).answer["logits"],
                           full["logits"])
    for name in SCORED:
        for end in ("hardest", "easiest", "random"):
            made = run(name, problem, 1, 2, keep=1.0, end=end, drop=0.3, n_epochs=2, score_epochs=2).answer
            assert torch.equal(made["logits"], full["logits"]), (name, end)
            assert torch.equal(made["taken"], full["taken"])
    assert not torch.equal(run("rs2", problem, 2, 2, keep=1.0, n_epochs=2).answer["logits"], full["logits"])


def test_without_replacement_is_a_short_training_on_all():
    """Bit by bit, where batches divide a part: 20 epochs of a tenth are 2 epochs of the pool. Parts that are drawn
    anew each epoch are not."""
    problem = digits(200)
    short = run("rs2", problem, 1, 2, keep=1.0, n_epochs=2, batch_size=10).answer
    knobs = {"keep": 0.1, "n_epochs": 20, "batch_size": 10}
    without, anew = (run("rs2", problem, 1, 2, variant=v, **knobs).answer for v in ("without", "with"))
    assert torch.equal(without["logits"], short["logits"]) and torch.equal(without["taken"], short["taken"])
    assert not torch.equal(anew["logits"], short["logits"])


def test_a_random_end_is_the_static_subset():
    problem = digits(60)
    static = run("rs2", problem, 1, 2, keep=0.3, n_epochs=2, variant="static").answer
    for name in SCORED:
        made = run(name, problem, 1, 2, keep=0.3, n_epochs=2, score_epochs=2, end="random").answer
        assert torch.equal(made["logits"], static["logits"]) and torch.equal(made["taken"], static["taken"])


def test_fresh_subsets_beat_the_static_one_on_digits():
    problem = digits(label_noise=0.0)
    runs = [made for variant in VARIANTS for made in sweep("rs2", problem, {}, seeds=[0], n_samples=10,
                                                            variant=variant)]
    found = {p.runs[0].knobs["variant"]: p for p in points(runs, "test_accuracy")}
    for variant in ("with", "without"):
        gap = found[variant].value - found["static"].value
        assert gap > 5 * math.hypot(found[variant].stderr, found["static"].stderr)
    assert len({made.cost.total_flops for made in runs}) == 1
