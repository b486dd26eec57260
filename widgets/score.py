"""A long score: answers of many samples, made in batches; it outlives interruptions."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from widgets.view import Stop
from workbench import METHODS, Cancelled, Cost, Inputs, Problem, Run
from workbench.cost import Meter
from workbench.registry import tensors_of
from workbench.rng import Rng
from workbench.runs import environment


@dataclass
class Score:
    """inputs: the settings graded, with all their samples. is_stopped: no more batches, `run` takes what there is."""

    problem: Problem
    inputs: Inputs
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    n_done: int = 0
    seconds: float = 0.0
    is_stopped: bool = False

    @property
    def is_done(self) -> bool:
        return self.is_stopped or self.n_done == self.inputs.n_samples

    def go_on(self, most: int, stop: Stop) -> None:
        """The next batch, of at most `most`. One cut short is drawn again; batching changes no sample."""
        given, first = self.inputs, self.n_done
        begin, size = time.monotonic(), min(most, given.n_samples - first)
        meter = Meter(self.problem.prices, self.problem.counted)
        method, rng = METHODS[given.method].function, Rng(given.seed, size, first)
        answer = None
        for step in method(self.problem.wrapped(meter.wrap), rng, **given.knobs):
            answer = step.state
            if stop():
                raise Cancelled
        self.parts.append(tensors_of(answer))
        self.costs.append(meter.cost)
        self.n_done += size
        self.seconds += time.monotonic() - begin

    def run(self) -> Run | None:
        """The samples made so far, graded as one run; None before the first batch."""
        if not self.parts:
            return None
        whole = {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}
        answer = whole.get("", whole)
        given = replace(self.inputs, n_samples=self.n_done)
        totals = ({name: sum(getattr(c, part)[name] for c in self.costs) for name in getattr(self.costs[0], part)}
                  for part in ("evaluations", "calls", "flops", "counted"))
        quality = self.problem.judge(answer, self.problem.cases(given.seed, given.n_samples))
        return Run(given, Cost(*totals), dict(quality), environment(answer), answer)

    def told(self, title: str) -> dict[str, Any]:
        """How far it is, for the front end; eta: seconds to go."""
        left = self.inputs.n_samples - self.n_done
        return {"done": self.n_done, "n": self.inputs.n_samples, "title": title,
                "eta": self.seconds / self.n_done * left if self.parts else None}
