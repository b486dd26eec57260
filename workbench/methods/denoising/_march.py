"""The loop that all samplers share: which model a step asks is decided outside the solver."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.problems.denoising import Denoiser, Denoising, Point, Schedule, data_in, noise_in, time_rows
from workbench.registry import Step
from workbench.rng import Rng


class Evaluated:
    """One evaluation of a trajectory: where, the state there, and the estimates of its data and noise (B, *shape).

    One of the two may be left out: it follows from the other, and is made when it is first asked for.
    """

    __slots__ = ("eps", "point", "x", "x0")
    eps: Tensor
    x0: Tensor

    def __init__(self, point: Point, x: Tensor, x0: Tensor | None = None, eps: Tensor | None = None) -> None:
        self.point, self.x = point, x
        if x0 is not None:
            self.x0 = x0
        if eps is not None:
            self.eps = eps

    def __getattr__(self, name: str) -> Tensor:  # of what has not been set
        if name == "x0":
            self.x0 = data_in(self.x, self.eps, self.point.alpha, self.point.sigma)
            return self.x0
        if name == "eps":
            self.eps = noise_in(self.x, self.x0, self.point.alpha, self.point.sigma)
            return self.eps
        raise AttributeError(name)

    def changed(self, **fields: Tensor) -> Evaluated:
        """A copy with other tensors in some fields; estimates that are not among them stay."""
        return Evaluated(self.point, **{"x": self.x, "x0": self.x0, "eps": self.eps} | fields)


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
    problem.tell(points, owners)
    x = problem.start(rng, points[0])
    schedule, labels = problem.schedule, problem.cases_of(rng)
    times = time_rows((owner.level(point, schedule) for owner, point in zip(owners, points, strict=False)), x)
    past: tuple[Evaluated, ...] = ()
    without_gradients = torch.no_grad()

    def noise() -> Tensor:
        return rng.normal(problem.shape, problem.dtype, problem.device)

    def denoise(x: Tensor, at: Point) -> Evaluated:  # by the owner of the step
        found = owner.estimate(x, at, schedule, labels, guidance, times)
        return Evaluated(at, x, eps=found) if owner.prediction == "eps" else Evaluated(at, x, found)

    for i, (here, there, owner) in enumerate(zip(points[:-1], points[1:], owners, strict=True)):
        with without_gradients:
            step = Advance(denoise, here, there, () if i in restarts else past, len(owners) - i, noise, schedule)
            x, now = solver(x, step, **knobs)
            past = (now, *step.past[: MEMORY - 1])
            x0 = now.x0
        yield Step(x, {"i": i, "model": owner.name, "x0": x0, "there": there})


def combined(x: Tensor, values: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """weights[0] x + weights[1] values[0] + ..., all (B, *shape): what most steps are."""
    out = x if weights[0] == 1 else weights[0] * x
    for value, weight in zip(values, weights[1:], strict=True):
        if weight:
            out = torch.add(out, value, alpha=weight)
    return out
