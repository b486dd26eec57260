"""VoG: how much the gradient by the input changes while a learner trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor

from workbench.knob import Knob
from workbench.methods.learning._training import (
    Batch,
    Drop,
    End,
    Epochs,
    Keep,
    Rate,
    Schedule,
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


def variance_of_gradients(gradients: Tensor) -> Tensor:
    """The deviation over K checkpoints, mean over inputs, of gradients (K, n, N, *shape): (n, N); divided by K."""
    return gradients.std(0, correction=0).flatten(2).mean(2)


def within_classes(scores: Tensor, y: Tensor) -> Tensor:
    """Scores (n, N) less the mean of their class in y (N,), over its deviation; 0 in classes that do not vary."""
    out = torch.zeros_like(scores)
    for c in y.unique():
        own = scores[:, y == c]
        mean, spread = own.mean(1, keepdim=True), own.std(1, correction=0, keepdim=True)
        varies = spread > 100 * torch.finfo(scores.dtype).eps * mean.abs()  # else what varies is rounding
        out[:, y == c] = torch.where(varies, (own - mean) / spread, torch.zeros_like(own))
    return out


@method(version=1, source="VoG, arXiv 2008.11600, sec. 2, as used in arXiv 2311.16298, sec. 3",
        cost="2 * score_epochs * n_pool + n_epochs * n_kept(keep, n_pool)")
def vog(problem: Learning, rng: Rng, *, keep: Keep = 0.3, end: End = "hardest", drop: Drop = 0.1,
        score_epochs: Annotated[int, Knob(low=2, high=50, soft=(2, 20), step=1, unit="epochs", small=3,
                                          help="passes over the whole pool, a checkpoint after each")] = 5,
        n_epochs: Epochs = 20, learning_rate: Rate = 0.1, batch_size: Batch = 25, schedule: Schedule = "cosine"
        ) -> Iterator[Step]:
    """Variance of gradients: keep examples by how much the gradient by their input varies over checkpoints.

    Score: with G_k(x) the gradient of the label's own logit, before the softmax, by the input at checkpoint k, the
    standard deviation of its entries over k, averaged over the entries; then centred and scaled within each class.
    State: "scores" (n_samples, N), one step per checkpoint; then as `training`, with them.
    Cost: ``2 * score_epochs * n_pool + n_epochs * n_kept(keep, n_pool)`` evaluations per sample, all gradients, those
    by the input at 2 / 3 of the FLOPs. Memory: the gradients of all checkpoints.
    Raises ValueError never, beyond knobs out of their bounds.
    """
    start, seen = problem.start(streams(rng)), []
    for k, epoch in enumerate(scoring(problem, streams(rng), score_epochs, learning_rate, batch_size)):
        seen.append(over_pool(problem, epoch.parameters, lambda x, y, w: problem.gradient(x, y, w, "inputs")[0]))
        scores = within_classes(variance_of_gradients(torch.stack(seen)), problem.labels)
        yield scored(k, scores)
    yield from train_on_kept(problem, rng, start, scores, score_epochs, keep=keep, end=end, drop=drop,
                             n_epochs=n_epochs, learning_rate=learning_rate, batch_size=batch_size, schedule=schedule)
