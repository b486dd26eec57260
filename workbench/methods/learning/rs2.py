"""Repeated random sampling: a new random part of the pool every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from workbench.knob import Knob
from workbench.methods.learning._training import (
    Batch,
    Epochs,
    Keep,
    Rate,
    Schedule,
    n_kept,  # noqa: F401 (in the cost formula)
    streams,
    training,
)
from workbench.problems.learning import Learning
from workbench.registry import Step, method
from workbench.rng import Rng

VARIANTS = ("without", "with", "static")


@method(version=1, source="RS2, arXiv 2305.18424, sec. 3 and alg. 1", cost="n_epochs * n_kept(keep, n_pool)")
def rs2(problem: Learning, rng: Rng, *, keep: Keep = 0.1,
        variant: Annotated[str, Knob(choices=VARIANTS, help="over epochs: no example again before all were seen, each "
                                     "epoch by itself, or the first epoch's part for good")] = "without",
        n_epochs: Epochs = 20, learning_rate: Rate = 0.1, batch_size: Batch = 25, schedule: Schedule = "cosine"
        ) -> Iterator[Step]:
    """Repeated random sampling: every epoch learns from another random part of the pool; nothing is scored.

    After t epochs "with" has seen 1 - (1 - keep)^t of the pool on average, "without" min(1, t keep) of it where the
    parts divide the pool, "static", the usual random subset, keep. The schedule of the learning rate is stretched over
    the n_epochs ceil(n_kept / batch_size) steps that are made. State: "logits" (n_samples, T, C) on the test set,
    "taken" (n_samples, N) how often each example was learned from.
    Cost: ``n_epochs * n_kept(keep, n_pool)`` evaluations per sample, all of them gradients.
    Raises ValueError never, beyond knobs out of their bounds.
    """
    parameters, sources = problem.start(streams(rng))
    yield from training(problem, rng, parameters, sources, keep=keep, n_epochs=n_epochs, learning_rate=learning_rate,
                        batch_size=batch_size, schedule=schedule, variant=variant)
