"""What the methods of this family share: knobs, training along subsets, and keeping part of a pool by its scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Generator, Tensor

from workbench.knob import Knob
from workbench.problems.learning import Learning, Parameters
from workbench.registry import Step
from workbench.rng import Rng

MOMENTUM = 0.9  # of SGD, everywhere
SHOWN = 12  # hardest and easiest examples that a step tells
_ROWS = 1024  # of the pool at a time, where all of it is looked at

Keep = Annotated[float, Knob(low=0.01, high=1.0, step=0.01, unit="of the pool", small=0.5,
                             help="share of the pool that an epoch learns from")]
Epochs = Annotated[int, Knob(low=1, high=200, soft=(1, 60), step=1, unit="epochs", small=3,
                             help="passes over what is kept")]
Rate = Annotated[float, Knob(low=1e-4, high=1.0, soft=(1e-3, 0.5), step=0.001, scale="log",
                             help="learning rate of SGD with momentum .9, at its start")]
Batch = Annotated[int, Knob(low=1, high=1024, soft=(4, 128), step=1, unit="examples", small=6,
                            help="examples per step of SGD")]
Schedule = Annotated[str, Knob(choices=("cosine", "constant"),
                               help="how the learning rate falls over the steps that are really made")]
End = Annotated[str, Knob(choices=("hardest", "easiest", "random"),
                          help="which examples are kept, by their score; random: as many, whatever they score")]
Drop = Annotated[float, Knob(low=0.0, high=0.5, step=0.01, unit="of the pool", needs={"end": "hardest"},
                             help="share of the very hardest that is left out first, as wrong labels are among them")]
ScoreEpochs = Annotated[int, Knob(low=1, high=50, soft=(1, 20), step=1, unit="epochs", small=2,
                                  help="passes over the whole pool before it is scored")]


class Epoch(NamedTuple):
    """What an epoch of n replicates learned from (n, k), the logits (n, k, C) and weights at its end.

    logits are those of the passes that the gradients took: each example's as its batch came up. rate: at the last step.
    """

    indices: Tensor
    logits: Tensor
    parameters: Parameters
    rate: float


def n_kept(keep: float, n_pool: int) -> int:
    """How many examples a share of the pool is: at least one, a half rounded up."""
    return max(1, math.floor(keep * n_pool + 0.5))


def subsets(sources: Sequence[Generator], n_pool: int, k: int, n_epochs: int, variant: str,
            kept: Tensor | None = None) -> Iterator[Tensor]:
    """What each epoch learns from, in the order of its batches: indices (n, k), no index twice in a row of them.

    Each replicate's come of its own source. variant "with": the first k of a fresh permutation of the pool every epoch.
    "without": the next k of one permutation; where fewer are left, of a new one. "static": those of the first epoch
    in another order each time, or, where kept (n, N) marks k examples of each replicate, those.
    """
    left = torch.empty((len(sources), 0), dtype=torch.int64)
    for _ in range(n_epochs):
        if variant != "without" or left.shape[1] < k:
            left = torch.stack([torch.randperm(n_pool, generator=source) for source in sources])
        if kept is not None:
            left = left[kept.gather(1, left)].view(len(sources), k)
        yield left[:, :k]
        if variant == "static" and kept is None:
            kept = torch.zeros((len(sources), n_pool), dtype=torch.bool).scatter(1, left[:, :k], True)
        left = left[:, k:]


def train(problem: Learning, parameters: Parameters, epochs: Iterable[Tensor], n_steps: int, learning_rate: float,
          batch_size: int, schedule: str = "constant", inputs: Callable[[Tensor], Tensor] = lambda x: x
          ) -> Iterator[Epoch]:
    """Train replicates side by side by SGD with momentum, one `Epoch` for each of epochs, indices (n, k).

    n_steps: of all epochs together; over them "cosine" lets the learning rate fall to 0, learning_rate (1 + cos(pi t /
    n_steps)) / 2 at step t from 0. inputs: what is done to inputs first. Spends n k rows of "gradient" per epoch.
    """
    velocity: Parameters = {}
    step, rate = 0, learning_rate
    for indices in epochs:
        logits = []
        for batch in indices.to(problem.device).split(batch_size, 1):
            x, y = problem.rows(batch)
            gradients, out = problem.gradient(inputs(x), y, parameters, "weights")
            if schedule == "cosine":
                rate = learning_rate * (1 + math.cos(math.pi * step / n_steps)) / 2
            velocity = {name: MOMENTUM * velocity[name] + g if velocity else g for name, g in gradients.items()}
            parameters = {name: w - rate * velocity[name] for name, w in parameters.items()}
            logits.append(out)
            step += 1
        yield Epoch(indices, torch.cat(logits, 1), parameters, rate)


def scoring(problem: Learning, streams: Sequence[Generator], n_epochs: int, learning_rate: float, batch_size: int,
            schedule: str = "constant", inputs: Callable[[Tensor], Tensor] = lambda x: x) -> Iterator[Epoch]:
    """Train fresh replicates on the whole pool, as methods do before they score it.

    At a constant learning rate they are what a long training is early on, before its rate falls.
    """
    parameters, sources = problem.start(streams)
    n_pool = len(problem.pool)
    yield from train(problem, parameters, subsets(sources, n_pool, n_pool, n_epochs, "with"),
                     n_epochs * math.ceil(n_pool / batch_size), learning_rate, batch_size, schedule, inputs)


def over_pool(problem: Learning, parameters: Parameters, look: Callable[[Tensor, Tensor, Parameters], Tensor]
              ) -> Tensor:
    """look(x (n, m, *shape), y (n, m), parameters) -> (n, m, ...), over the whole pool in its order: (n, N, ...)."""
    n = len(next(iter(parameters.values())))
    everything = torch.arange(len(problem.pool), device=problem.device).expand(n, -1)
    return torch.cat([look(*problem.rows(part), parameters) for part in everything.split(_ROWS, 1)], 1)


def training(problem: Learning, rng: Rng, parameters: Parameters, sources: Sequence[Generator], *, keep: float,
             n_epochs: int, learning_rate: float, batch_size: int, schedule: str, variant: str = "static",
             kept: Tensor | None = None, i: int = 0, scores: Tensor | None = None) -> Iterator[Step]:
    """The steps of the phase "training", one an epoch, counted from i; `subsets` says what each learns from.

    State: "logits" (n, T, C) on the test set, "taken" (n, N) how often each example was learned from, and "scores"
    (n, N) where given. info: i, epoch from 0, subset (k,) of the first replicate, learning_rate at the epoch's end, and
    what `scored` tells. trace: accuracy, loss, and seen, the share of the pool that was learned from at least once.
    """
    n_pool = len(problem.pool)
    k = n_kept(keep, n_pool)
    taken = torch.zeros((rng.n_samples, n_pool), dtype=torch.int64, device=problem.device)
    made = train(problem, parameters, subsets(sources, n_pool, k, n_epochs, variant, kept),
                 n_epochs * math.ceil(k / batch_size), learning_rate, batch_size, schedule)
    for number, epoch in enumerate(made):
        indices = epoch.indices.to(problem.device)
        taken = taken.scatter_add(1, indices, torch.ones_like(indices))
        logits = problem.assess(epoch.parameters)
        accuracy, loss = problem.graded(logits)
        state = {"logits": logits, "taken": taken}
        info: dict[str, Any] = {"i": i + number, "epoch": number, "subset": indices[0], "learning_rate": epoch.rate}
        if scores is not None:
            told = scored(i + number, scores)
            state, info = state | dict(told.state), info | told.info
        yield Step(state, info, "training",
                   {"accuracy": accuracy, "loss": loss, "seen": (taken > 0).double().mean(1)})


def scored(i: int, scores: Tensor) -> Step:
    """A step of the phase "selecting": "scores" (n, N) so far, the higher the harder.

    info: i, and of the first replicate its scores (N,) and which score highest and lowest, the extreme one first.
    """
    order = scores[0].argsort(descending=True, stable=True)
    return Step({"scores": scores.clone()},
                {"i": i, "scores": scores[0].clone(), "hardest": order[:SHOWN], "easiest": order.flip(0)[:SHOWN]},
                "selecting")


def kept_by(scores: Tensor, streams: Sequence[Generator], k: int, end: str, drop: float) -> Tensor | None:
    """Which k examples of each replicate are kept (n, N), by scores (n, N), the higher the harder; None for "random".

    "hardest" first leaves out the share `drop` of the pool that is hardest, or as many as can be spared. Equal scores
    come in random order, of each replicate's own stream.
    """
    if end == "random":
        return None
    n_pool = scores.shape[1]
    first = min(math.floor(drop * n_pool + 0.5), n_pool - k) if end == "hardest" else 0
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for row, own, stream in zip(kept, scores.cpu(), streams, strict=True):
        order = torch.randperm(n_pool, generator=stream)
        order = order[own[order].argsort(descending=end == "hardest", stable=True)]
        row[order[first:first + k]] = True
    return kept


def train_on_kept(problem: Learning, rng: Rng, start: tuple[Parameters, Sequence[Generator]], scores: Tensor, i: int, *,
                  keep: float, end: str, drop: float, n_epochs: int, learning_rate: float, batch_size: int,
                  schedule: str) -> Iterator[Step]:
    """`training` on what `kept_by` keeps; start: `problem.start`, drawn before any scoring, so that all arms of one
    seed start alike."""
    parameters, sources = start
    kept = kept_by(scores, streams(rng), n_kept(keep, len(problem.pool)), end, drop)
    yield from training(problem, rng, parameters, sources, keep=keep, n_epochs=n_epochs, learning_rate=learning_rate,
                        batch_size=batch_size, schedule=schedule, kept=kept, i=i, scores=scores)


def streams(rng: Rng) -> list[Generator]:
    """Each replicate's own."""
    return [rng.stream(i) for i in range(rng.n_samples)]
