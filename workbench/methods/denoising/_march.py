"""The loop that all samplers share: which model a step asks is decided outside the solver."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.method import Step
from workbench.problems.denoising import Denoiser, Denoising, Point, Schedule
from workbench.rng import Rng


class Evaluated(NamedTuple):
    """One evaluation of a trajectory: where, the state there, and the estimates of its data and noise (B, *shape)."""

    point: Point
    x: Tensor
    x0: Tensor
    eps: Tensor


class Advance(NamedTuple):
    """What a solver knows in one step: `denoise(x, point) -> Evaluated` asks the step's model."""

    denoise: Callable[[Tensor, Point], Evaluated]
    here: Point
    there: Point
    past: Sequence[Evaluated]  # the former steps' evaluations at their starts, newest first; empty after a reset
    n_left: int  # steps to go, this one included
    noise: Callable[[], Tensor]  # a fresh standard normal of the state's shape
    schedule: Schedule  # the trajectory's, for levels between here and there


Solver = Callable[..., tuple[Tensor, Evaluated]]  # (x, Advance, **solver knobs) -> (next x, evaluation at step.here)
MEMORY = 4  # evaluations that a solver may look back on


def march(problem: Denoising, rng: Rng, points: Sequence[Point], owners: Sequence[Denoiser], solver: Solver, *,
          guidance: float, restarts: Collection[int] = (), **knobs: Any) -> Iterator[Step]:
    """Yield one Step per interval of `points`, step i by owners[i]; at steps in `restarts` the history is dropped.

    Every sampler starts here, and so from the same law: `Denoising.start` at points[0].
    state: (n_samples, *shape). info: "i", "model", "x0" (the data estimate), "there" (the point reached).
    """
    x = problem.start(rng, points[0])
    labels = problem.cases_of(rng)
    past: tuple[Evaluated, ...] = ()

    def noise() -> Tensor:
        return rng.normal(problem.shape, problem.dtype, problem.device)

    for i, (here, there, owner) in enumerate(zip(points[:-1], points[1:], owners, strict=True)):

        def denoise(x: Tensor, at: Point, owner: Denoiser = owner) -> Evaluated:
            return Evaluated(at, x, *owner.predict(x, at, problem.schedule, labels, guidance))

        with torch.no_grad():
            step = Advance(denoise, here, there, () if i in restarts else past, len(owners) - i, noise,
                           problem.schedule)
            x, now = solver(x, step, **knobs)
        past = (now, *step.past[: MEMORY - 1])
        yield Step(x, {"i": i, "model": owner.name, "x0": now.x0, "there": there})
