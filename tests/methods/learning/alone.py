"""Replicates trained one at a time, by plain modules and torch.optim.SGD: what training side by side must equal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workbench.problems.learning import Learning, perceptron

RATE = 0.05


def begin(problem: Learning, stream: torch.Generator, n_hidden: int) -> tuple[nn.Module, torch.Generator]:
    """A module with the initial weights that this stream gives, in float64, and the generator that goes with them."""
    weights, (source,) = problem.start([stream])
    module = perceptron(problem.pool[0].numel(), n_hidden, len(problem.classes)).double()
    module.load_state_dict({name: w[0] for name, w in weights.items()})
    return module, source


def learn(module: nn.Module, x: Tensor, y: Tensor, epochs: Iterable[Tensor], batch_size: int,
          n_steps: int | None = None, momentum: float = 0.9) -> Iterator[tuple[Tensor, float]]:
    """Train the module on epochs of indices; after each, the logits that its batches had and the rate of its last step.

    n_steps: of a cosine schedule, torch's own; None for a constant rate.
    """
    optimizer = torch.optim.SGD(module.parameters(), RATE, momentum=momentum)
    schedule = None if n_steps is None else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for indices in epochs:
        logits = []
        for at in range(0, len(indices), batch_size):
            batch = indices[at:at + batch_size]
            optimizer.zero_grad()
            out = module(x[batch])
            cross_entropy(out, y[batch]).backward()
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            if schedule is not None:
                schedule.step()
            logits.append(out.detach())
        yield torch.cat(logits), rate


def whole(source: torch.Generator, n_pool: int, n_epochs: int) -> list[Tensor]:
    """The whole pool in a new order every epoch, as a scoring run goes through it."""
    return [torch.randperm(n_pool, generator=source) for _ in range(n_epochs)]


def n_steps_of(n_epochs: int, k: int, batch_size: int) -> int:
    return n_epochs * math.ceil(k / batch_size)
