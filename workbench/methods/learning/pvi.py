"""PVI: how many bits the input tells of an example's label, to a learner."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.methods.learning._training import (
    Batch,
    Drop,
    End,
    Epochs,
    Keep,
    Rate,
    Schedule,
    ScoreEpochs,
    n_kept,  # noqa: F401 (in the cost formula)
    over_pool,
    scored,
    scoring,
    streams,
    train_on_kept,
)
from workbench.problems.learning import Learning
from workbench.registry import Step, method
from workbench.rng import Rng


def pointwise_information(logits: Tensor, null_logits: Tensor, y: Tensor) -> Tensor:
    """log2 g[y | x] - log2 g0[y | nothing], in bits, of logits (..., C) that broadcast, and labels y (...)."""
    nats = logits.log_softmax(-1) - null_logits.log_softmax(-1)
    return nats.gather(-1, y[..., None])[..., 0] / math.log(2)


@method(version=1, source="PVI, arXiv 2110.08420, sec. 4 and alg. 1, as used in arXiv 2311.16298, sec. 3",
        cost="(2 * score_epochs + 1) * n_pool + 1 + n_epochs * n_kept(keep, n_pool)")
def pvi(problem: Learning, rng: Rng, *, keep: Keep = 0.3, end: End = "hardest", drop: Drop = 0.1,
        score_epochs: ScoreEpochs = 5, n_epochs: Epochs = 20, learning_rate: Rate = 0.1, batch_size: Batch = 25,
        schedule: Schedule = "cosine") -> Iterator[Step]:
    """Pointwise V-information: keep examples by how little their input tells of their label.

    PVI(x -> y) = log2 g[y | x] - log2 g0[y | nothing], of one learner trained on the pool and one on the pool with all
    inputs 0, both to the end: their learning rate falls to 0 by a cosine, as at a constant one g0 would sway with the
    labels of its last batches, and whole classes with it. A low or negative PVI is hard, often a wrong label, so the
    score is -PVI, in bits.
    State: "scores" (n_samples, N), one step; then as `training`, with them.
    Cost: ``(2 * score_epochs + 1) * n_pool + 1 + n_epochs * n_kept(keep, n_pool)`` evaluations per sample: gradients,
    but for a forward pass over the pool and one of the empty input.
    Raises ValueError never, beyond knobs out of their bounds.
    """
    start = problem.start(streams(rng))
    *_, null = scoring(problem, streams(rng), score_epochs, learning_rate, batch_size, "cosine", torch.zeros_like)
    *_, last = scoring(problem, streams(rng), score_epochs, learning_rate, batch_size, "cosine")
    nothing, _ = problem.rows(torch.zeros((rng.n_samples, 1), dtype=torch.int64, device=problem.device))
    null_logits = problem.forward(torch.zeros_like(nothing), null.parameters)
    scores = -over_pool(problem, last.parameters, lambda x, y, w: pointwise_information(
        problem.forward(x, w), null_logits, y))
    yield scored(0, scores)
    yield from train_on_kept(problem, rng, start, scores, 1, keep=keep, end=end, drop=drop, n_epochs=n_epochs,
                             learning_rate=learning_rate, batch_size=batch_size, schedule=schedule)
