"""What a seed's noise should become, and how far from it solver schedules end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

import workbench
from workbench import Cancelled, Quality
from workbench.plan import Plan
from workbench.problems.denoising import Denoising, Point, noisiest
from workbench.quality import drift
from workbench.rng import Rng
from workbench.search.solver import exact_flow, run_plans

Stop = Callable[[], bool]


class Flow:
    """The exact probability flow of a problem's best model from a seed's noise, at any noise level.

    Solved once on levels NODE apart by `exact_flow`, at steps of NODE / SUBSTEPS in log-SNR: RMS error 1e-8 or less on
    the mixtures of the workbench. It ends at FAR, or at the cleanest level where the schedule is a table; the data is
    the estimate there.
    """

    NODE, SUBSTEPS, FAR = 0.2, 10, 10.0

    def __init__(self, problem: Denoising, start: Tensor) -> None:
        self.problem, schedule = problem, problem.schedule
        first = noisiest(schedule)
        try:
            last = schedule.at(schedule.t_at(self.FAR))
        except ValueError:
            last = schedule.at(schedule.cleanest)
        count = max(math.ceil((last.log_snr - first.log_snr) / self.NODE), 1)
        inner = [first.log_snr + (last.log_snr - first.log_snr) * i / count for i in range(1, count)]
        self._nodes = [first, *(schedule.at(schedule.t_at(v)) for v in inner), last]
        self._states = [start]
        self._known: dict[float, Tensor] = {}

    def solve(self, stop: Stop) -> None:
        """Go on to the end. Raises Cancelled once stop() is true, and keeps what there is."""
        while len(self._states) < len(self._nodes):
            k = len(self._states)
            before, there = self._nodes[k - 1 : k + 1]
            self._states.append(exact_flow(self.problem, before, there, self._states[-1], self.SUBSTEPS))
            if stop():
                raise Cancelled

    def at(self, point: Point) -> Tensor:
        """The state (n, *shape) at a level; at sigma 0 the data."""
        if point.sigma == 0:
            if math.inf not in self._known:
                labels = self.problem.labels(len(self._states[-1]))
                with torch.no_grad():
                    self._known[math.inf] = self.problem.models[-1].predict(
                        self._states[-1], self._nodes[-1], self.problem.schedule, labels, 1.0)[0]
            return self._known[math.inf]
        if point.t not in self._known:
            if len(self._known) > 500:
                self._known.clear()
            k = min(range(len(self._nodes)), key=lambda j: abs(self._nodes[j].log_snr - point.log_snr))
            far = abs(self._nodes[k].log_snr - point.log_snr)
            n_steps = math.ceil(far * self.SUBSTEPS / self.NODE - 1e-9)
            self._known[point.t] = (exact_flow(self.problem, self._nodes[k], point, self._states[k], n_steps)
                                    if n_steps else self._states[k])
        return self._known[point.t]


def has_flow(problem: Denoising) -> bool:
    """Whether the law can be drawn from and is no pictures: a closed form, whose flow can be solved."""
    return problem.data is not None and problem.images is None and problem.preset.get("guidance", 1.0) == 1


class Truth:
    """What the noise of a seed should become: the exact flow where it can be solved, else the problem's reference run.

    Call `find` first.
    """

    def __init__(self, problem: Denoising, seed: int, n_samples: int) -> None:
        self.problem, self.seed, self.n_samples = problem, seed, n_samples
        self.flow = Flow(problem, problem.start(Rng(seed, n_samples))) if has_flow(problem) else None
        self._drawn: Tensor | None = None

    def find(self, stop: Stop) -> None:
        """Solve the flow, or make the reference run. Raises Cancelled once stop() is true."""
        if self.flow is not None:
            self.flow.solve(stop)
            return
        method, knobs = self.problem.reference
        answer = workbench.run(method, self.problem, self.seed, self.n_samples, stop=stop, **knobs).answer
        assert isinstance(answer, Tensor)
        self._answer = answer

    def at(self, point: Point) -> Tensor:
        """The state at a level; of a reference run its answer, whatever the level."""
        return self._answer if self.flow is None else self.flow.at(point)

    @torch.no_grad()
    def error(self, state: Tensor, end: Point, drawn: Tensor | None = None) -> Quality:
        """The distance of an answer that ends at a level; from a reference run that of its pictures, 0 to 1.

        drawn: the answer's pictures, where they are known.
        """
        images = self.problem.images
        if images is None:
            return drift(state, self.at(end))
        if self._drawn is None:
            self._drawn = images(self._answer).double() / 255
        return drift((images(state) if drawn is None else drawn).double() / 255, self._drawn)


def errors_on_seeds(problem: Denoising, plans: Mapping[str, Plan], seeds: Iterable[int], n_samples: int
                    ) -> dict[str, list[Quality]]:
    """The errors at the end of each plan, on each seed, as the schedule editor shows them: {name: [Quality per seed]}.

    Distances from the exact flow where the problem's law is known in closed form, else of pictures from the problem's
    reference run, from the same noise. Costs the sum of the plans' evaluations and one reference per seed.
    """
    guidance = float(problem.preset.get("guidance", 1.0))
    found: dict[str, list[Quality]] = {name: [] for name in plans}
    for seed in seeds:
        noise, labels = problem.start(Rng(seed, n_samples)), problem.labels(n_samples)
        answers = run_plans(problem, list(plans.values()), noise, labels=labels, guidance=guidance, max_rows=512)
        truth = Truth(problem, seed, n_samples)
        truth.find(lambda: False)
        for (name, plan), answer in zip(plans.items(), answers, strict=True):
            found[name].append(truth.error(answer, plan.grid(problem.schedule)[-1]))
    return found
