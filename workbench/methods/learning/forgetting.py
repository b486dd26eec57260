"""Forgetting: how often an example that was right comes out wrong the next time."""

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
    scored,
    scoring,
    streams,
    train_on_kept,
)
from workbench.problems.learning import Learning
from workbench.registry import Step, method
from workbench.rng import Rng


def forgetting_events(correct: Tensor) -> Tensor:
    """How often true is followed by false in correct (T, ...), over T: float64 (...), inf where it is never true."""
    events = (correct[:-1] & ~correct[1:]).double().sum(0)
    return torch.where(correct.any(0), events, math.inf)


@method(version=1, source="forgetting events, arXiv 1812.05159, alg. 1, as used in arXiv 2311.16298, sec. 3",
        cost="score_epochs * n_pool + n_epochs * n_kept(keep, n_pool)")
def forgetting(problem: Learning, rng: Rng, *, keep: Keep = 0.3, end: End = "hardest", drop: Drop = 0.1,
               score_epochs: ScoreEpochs = 10, n_epochs: Epochs = 20, learning_rate: Rate = 0.1,
               batch_size: Batch = 25, schedule: Schedule = "cosine") -> Iterator[Step]:
    """Forgetting events: keep examples by how often they were unlearned while a learner trained on all of them.

    Score: transitions from right to wrong between an example's own batches, as the gradient's pass sees it before the
    step; so scoring costs no pass of its own. Examples that were never right come first: they would score infinity, and
    stand here with the number of passes, which no count reaches. Equal counts are in random order.
    State: "scores" (n_samples, N), one step per scoring epoch; then as `training`, with them.
    Cost: ``score_epochs * n_pool + n_epochs * n_kept(keep, n_pool)`` evaluations per sample, all gradients.
    Raises ValueError never, beyond knobs out of their bounds.
    """
    start, seen = problem.start(streams(rng)), []
    for k, epoch in enumerate(scoring(problem, streams(rng), score_epochs, learning_rate, batch_size)):
        indices = epoch.indices.to(problem.device)
        right = epoch.logits.argmax(-1) == problem.labels[indices]
        seen.append(torch.zeros_like(right).scatter(1, indices, right))
        scores = forgetting_events(torch.stack(seen)).clamp(max=k + 1).to(problem.dtype)
        yield scored(k, scores)
    yield from train_on_kept(problem, rng, start, scores, score_epochs, keep=keep, end=end, drop=drop,
                             n_epochs=n_epochs, learning_rate=learning_rate, batch_size=batch_size, schedule=schedule)
