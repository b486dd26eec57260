"""TracIn self-influence: how much a step on an example changes its own loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch

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

LAYERS = {"last": "last_norms", "all": "norms"}


@method(version=1, source="TracInCP, arXiv 2002.08484, sec. 3.2, as used in arXiv 2311.16298, sec. 3",
        cost="2 * score_epochs * n_pool + n_epochs * n_kept(keep, n_pool)")
def tracin(problem: Learning, rng: Rng, *, keep: Keep = 0.3, end: End = "hardest", drop: Drop = 0.1,
           layers: Annotated[str, Knob(choices=tuple(LAYERS), help="whose weights the gradient is taken by: the last "
                                       "layer's alone, which is cheaper, or all")] = "last",
           score_epochs: ScoreEpochs = 5, n_epochs: Epochs = 20, learning_rate: Rate = 0.1, batch_size: Batch = 25,
           schedule: Schedule = "cosine") -> Iterator[Step]:
    """TracIn: keep examples by their influence on themselves, the squared norm of their own gradient.

    Score: sum over checkpoints k, one after each of score_epochs, of eta_k |grad_w loss(w_k, z)|^2 with eta_k the
    learning rate. State: "scores" (n_samples, N), one step per checkpoint; then as `training`, with them.
    Cost: ``2 * score_epochs * n_pool + n_epochs * n_kept(keep, n_pool)`` evaluations per sample, all gradients; one by
    the last layer's weights costs little more than a forward pass.
    Raises ValueError never, beyond knobs out of their bounds.
    """
    start, scores = problem.start(streams(rng)), torch.zeros((), dtype=problem.dtype, device=problem.device)
    for k, epoch in enumerate(scoring(problem, streams(rng), score_epochs, learning_rate, batch_size)):
        scores = scores + epoch.rate * over_pool(problem, epoch.parameters, lambda x, y, w: problem.gradient(
            x, y, w, LAYERS[layers])[0])
        yield scored(k, scores)
    yield from train_on_kept(problem, rng, start, scores, score_epochs, keep=keep, end=end, drop=drop,
                             n_epochs=n_epochs, learning_rate=learning_rate, batch_size=batch_size, schedule=schedule)
