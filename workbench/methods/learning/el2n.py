"""EL2N: the error of an example early in training, averaged over learners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from workbench.knob import Knob
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


def error_norm(logits: Tensor, y: Tensor) -> Tensor:
    """|softmax(logits) - onehot(y)|_2 of logits (..., C) and labels (...): 0 for certainty, sqrt 2 for its opposite."""
    return (logits.softmax(-1) - one_hot(y, logits.shape[-1])).norm(dim=-1)


@method(version=1, source="EL2N, arXiv 2107.07075, eq. 2, as used in arXiv 2311.16298, sec. 3",
        cost="n_seeds * (score_epochs + 1) * n_pool + n_epochs * n_kept(keep, n_pool)")
def el2n(problem: Learning, rng: Rng, *, keep: Keep = 0.3, end: End = "hardest", drop: Drop = 0.1,
         n_seeds: Annotated[int, Knob(low=1, high=20, soft=(1, 10), step=1, unit="learners", small=2,
                                      help="learners of other initial weights that the score is averaged over")] = 3,
         score_epochs: ScoreEpochs = 2, n_epochs: Epochs = 20, learning_rate: Rate = 0.1, batch_size: Batch = 25,
         schedule: Schedule = "cosine") -> Iterator[Step]:
    """EL2N: keep examples by the norm of their error vector early in training, averaged over several learners.

    Score: the mean over n_seeds learners of |softmax(f(x)) - onehot(y)| after score_epochs over the pool.
    State: "scores" (n_samples, N), one step per learner; then as `training`, with them.
    Cost: ``n_seeds * (score_epochs + 1) * n_pool + n_epochs * n_kept(keep, n_pool)`` evaluations per sample: gradients,
    but for a forward pass over the pool by each learner.
    Raises ValueError never, beyond knobs out of their bounds.
    """
    start, total = problem.start(streams(rng)), torch.zeros((), dtype=problem.dtype, device=problem.device)
    for seed in range(n_seeds):
        *_, last = scoring(problem, streams(rng), score_epochs, learning_rate, batch_size)
        total = total + over_pool(problem, last.parameters, lambda x, y, w: error_norm(problem.forward(x, w), y))
        yield scored(seed, total / (seed + 1))
    yield from train_on_kept(problem, rng, start, total / n_seeds, n_seeds, keep=keep, end=end, drop=drop,
                             n_epochs=n_epochs, learning_rate=learning_rate, batch_size=batch_size, schedule=schedule)
