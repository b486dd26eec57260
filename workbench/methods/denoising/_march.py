"""The loop that all samplers share: which model a step asks is decided outside the solver."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.method import Step
from workbench.problems.denoising import Denoiser, Denoising, Point
from workbench.rng import Rng


class Evaluated(NamedTuple):
    """One evaluation of a trajectory: where, and the data estimate there (B, *shape)."""

    point: Point
    x0: Tensor


class Advance(NamedTuple):
    """What a solver knows in one step: `denoise(x, point) -> (x0, eps)` is the step's model."""

    denoise: Callable[[Tensor, Point], tuple[Tensor, Tensor]]
    here: Point
    there: Point
    past: Evaluated | None  # the previous step's evaluation, None at the start and after a reset
    noise: Callable[[], Tensor]  # a fresh standard normal of the state's shape


Solver = Callable[..., tuple[Tensor, Tensor]]  # (x, Advance, **solver knobs) -> (next x, x0)


def march(problem: Denoising, rng: Rng, points: Sequence[Point], owners: Sequence[Denoiser], solver: Solver, *,
          guidance: float, restarts: Collection[int] = (), **knobs: Any) -> Iterator[Step]:
    """Yield one Step per interval of `points`, step i by owners[i]; at steps in `restarts` the history is dropped.

    state: (n_samples, *shape). info: "i", "model", "x0" (the data estimate), "there" (the point reached).
    """
    x = problem.start(rng)
    labels = problem.labels(rng.n_samples)
    past: Evaluated | None = None

    def noise() -> Tensor:
        return rng.normal(problem.shape, problem.dtype, problem.device)

    for i, (here, there, owner) in enumerate(zip(points[:-1], points[1:], owners, strict=True)):

        def denoise(x: Tensor, at: Point, owner: Denoiser = owner) -> tuple[Tensor, Tensor]:
            return owner.predict(x, at, problem.schedule, labels, guidance)

        with torch.no_grad():
            x, x0 = solver(x, Advance(denoise, here, there, None if i in restarts else past, noise), **knobs)
        past = Evaluated(here, x0)
        yield Step(x, {"i": i, "model": owner.name, "x0": x0, "there": there})
