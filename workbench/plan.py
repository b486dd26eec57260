"""Plans of the unified sampling framework: a time grid and one decision per step, as data and as JSON.

Source: arXiv 2312.07243, section 3. The presets are the points of that space at which known solvers lie. Two things of
the authors are left out: DPM-Solver-v3's learned mix of the predictions, and their later code's analytical first step,
which takes the first data estimate for 0 or for the data's mean, without asking the network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from workbench.methods.denoising._march import MEMORY
from workbench.problems.denoising import CLEAN, Point, Schedule

PREDICTIONS = ("eps", "x0")
RELAXATIONS = ("none", "linear", "plus_half_exp", "minus_half_exp", "bh1", "bh2")
CORRECTORS = ("none", "pseudo", "implicit")
FORMAT = "workbench-usf-plan-1"
MAX_ORDER = 4


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected a whole number from {low} to {high}")


def _finite(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected a finite number")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Expansion:
    """A Taylor expansion of the model's value around the starting point.

    order: number of terms. points: for each of the order - 1 derivatives, how many history points estimate it, newest
    first (k-th: at least k); empty is order - 1 for all ("full order"). relaxation: the factor of the first derivative;
    slope: c of the "linear" one, 1 + c h. second: the factor of the second derivative.
    Raises ValueError that names the field and what was received.
    """

    order: int = 1
    points: tuple[int, ...] = ()
    relaxation: str = "none"
    slope: float = 0.0
    second: float = 1.0

    def __post_init__(self) -> None:
        _whole("order", self.order, 1, MAX_ORDER + 1)
        if not isinstance(self.points, tuple) or len(self.points) not in (0, self.order - 1):
            raise ValueError(f"points={self.points!r}: expected none, or {self.order - 1}, one per derivative")
        for k, m in enumerate(self.points, 1):
            _whole(f"points={self.points!r}, derivative {k}", m, k, MEMORY)
        _one_of("relaxation", self.relaxation, RELAXATIONS)
        for name in ("slope", "second"):
            _finite(name, getattr(self, name))

    @property
    def reach(self) -> int:
        """Points that it needs beside the starting point."""
        return max(self.points, default=self.order - 1)


@dataclass(frozen=True)
class Decision:
    """What is decided for one step (arXiv 2312.07243, section 3.2), beside where it goes.

    prediction: what is expanded, "eps" or "x0". start: the starting point, 0 the current one (multistep), k the k-th
    before it (singlestep). corrector: what happens on arrival, when the model's value there is known: nothing; the
    state is corrected by it ("pseudo", free); or corrected and evaluated once more ("implicit"). correction: the
    expansion that corrects, around the step's starting point, with the new point among its points.
    Raises ValueError that names the field and what was received.
    """

    prediction: str = "x0"
    expansion: Expansion = Expansion()
    start: int = 0
    corrector: str = "none"
    correction: Expansion = Expansion(2)

    def __post_init__(self) -> None:
        if self.prediction == "v3":
            raise ValueError("prediction='v3': DPM-Solver-v3's learned mix needs statistics of the model, and is left "
                             f"out; expected one of {', '.join(PREDICTIONS)}")
        _one_of("prediction", self.prediction, PREDICTIONS)
        _whole("start", self.start, 0, MEMORY)
        _one_of("corrector", self.corrector, CORRECTORS)
        _whole("expansion order", self.expansion.order, 1, MAX_ORDER)
        _whole("correction order", self.correction.order, 2, MAX_ORDER + 1)


@dataclass(frozen=True)
class Plan:
    """A solver schedule: n decisions, the n times that their steps start from, and where the last one ends.

    times: in the schedule's own unit, falling, not whole numbers where the schedule is a table. end: a time, or None
    for the data itself (sigma 0), which is reached at first order. Raises ValueError where there are no steps, times
    do not fall, a step looks back further than there is history, or the last step has a corrector.
    """

    times: tuple[float, ...]
    decisions: tuple[Decision, ...]
    end: float | None = None

    def __post_init__(self) -> None:
        if not self.decisions:
            raise ValueError("decisions=(): expected at least one step, got zero steps")
        if len(self.times) != len(self.decisions):
            raise ValueError(f"times={self.times}: expected {len(self.decisions)}, one per decision")
        along = [*self.times, *(() if self.end is None else (self.end,))]
        for t in along:
            _finite("times", t)
        for a, b in pairwise(along):
            if b >= a:
                raise ValueError(f"times={along}: expected falling times, got {b} after {a}")
        for i, decision in enumerate(self.decisions):
            before = min(i, MEMORY)  # evaluations in the history beside the current one
            for what, value, most in (("start", decision.start, before),
                                      ("order", decision.expansion.order, before + 1),
                                      ("points", decision.expansion.reach, before)):
                if value > most:
                    raise ValueError(f"step {i}: {what} {value} is above its history, at most {most}")
            if decision.corrector != "none" and decision.correction.reach > min(i + 1, MEMORY):
                raise ValueError(f"step {i}: correction of order {decision.correction.order} is above its history, "
                                 f"{min(i + 1, MEMORY)} points")
        last = self.decisions[-1]
        if last.corrector != "none":
            raise ValueError(f"corrector={last.corrector!r} at the last step: expected 'none', nothing follows it")
        if self.end is None and (last.expansion.order, last.start) != (1, 0):
            raise ValueError(f"last step: order {last.expansion.order}, start {last.start}: expected 1 and 0, for the "
                             "plan ends at the data")

    @property
    def evaluations(self) -> int:
        """Evaluations per sample, without guidance's doubling: one per step and per implicit corrector."""
        return len(self.decisions) + sum(d.corrector == "implicit" for d in self.decisions)

    def grid(self, schedule: Schedule) -> list[Point]:
        """The n + 1 noise levels. Raises ValueError where a time is outside the schedule."""
        noisiest, cleanest = schedule.times(1, "trailing")[0], schedule.cleanest
        along = [*self.times, *(() if self.end is None else (self.end,))]
        if along[0] > noisiest + 1e-9 or along[-1] < cleanest - 1e-9:
            raise ValueError(f"times={along}: this schedule has {noisiest:g} to {cleanest:g}")
        return [*map(schedule.at, along), *([CLEAN] if self.end is None else [])]

    def to_json(self) -> str:
        """One line of JSON, keys sorted: equal plans have equal text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`. Raises ValueError that says what is wrong with the text."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"plan {text[:40]!r}: not JSON ({error})") from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            found = record.get("format") if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"plan of format {found!r}: expected {FORMAT!r}")
        fields = {k: v for k, v in record.items() if k != "format"}
        steps = _list("decisions", fields.get("decisions"))
        try:
            decisions = tuple(_decision(step, i) for i, step in enumerate(steps))
            return cls(**{**fields, "times": _list("times", fields.get("times")), "decisions": decisions})
        except TypeError as error:  # a field too many or of another type
            raise ValueError(f"plan: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a file that `save` wrote. Raises ValueError as `from_json`, OSError where there is none."""
        return cls.from_json(Path(path).read_text())


class Recipe(NamedTuple):
    """A known solver: the same decision at every step, as far as its history allows."""

    order: int
    prediction: str = "x0"
    relaxation: str = "none"  # where one point estimates the first derivative, so at order 2 only
    second: float = 1.0
    corrector: str = "none"


# dpmpp_3m is the rule as its authors released it: it takes half of the second derivative, so it is of second order
PRESETS: dict[str, Recipe] = {
    "ddim": Recipe(1),
    "dpmpp_2m": Recipe(2, relaxation="bh2"),
    "dpmpp_2m_taylor": Recipe(2),
    "dpmpp_3m": Recipe(3, relaxation="bh2", second=0.5),
    "dpmpp_3m_taylor": Recipe(3),
    "dpm_solver_2m": Recipe(2, "eps", "bh2"),
    "deis_2": Recipe(2, "eps"),
    "deis_3": Recipe(3, "eps"),
    "unipc_bh1": Recipe(2, relaxation="bh1", corrector="pseudo"),
    "unipc_bh2": Recipe(2, relaxation="bh2", corrector="pseudo"),
    "unipc_bh2_3": Recipe(3, relaxation="bh2", corrector="pseudo"),
}


def preset_plan(name: str, points: Sequence[Point], *, lower_order_final: bool = True, corrector: str = "preset"
                ) -> Plan:
    """A known solver as a plan over noise levels (n + 1 `points`, falling; the last may be the data).

    As `preset_decisions`. Raises ValueError for an unknown name.
    """
    to_data = points[-1].sigma == 0
    decisions = preset_decisions(name, len(points) - 1, to_data=to_data, lower_order_final=lower_order_final,
                                 corrector=corrector)
    return Plan(tuple(p.t for p in points[:-1]), decisions, None if to_data else points[-1].t)


def preset_decisions(name: str, n_steps: int, *, to_data: bool, lower_order_final: bool = True,
                     corrector: str = "preset") -> tuple[Decision, ...]:
    """The decisions of a known solver for n_steps steps.

    Step i has at most order i + 1; with lower_order_final at most as many as there are steps left; into the data 1.
    corrector: the preset's own, or one of CORRECTORS for all steps but the last.
    Raises ValueError for an unknown name.
    """
    _one_of("preset", name, tuple(PRESETS))
    recipe = PRESETS[name]
    return _decisions(recipe if corrector == "preset" else recipe._replace(corrector=corrector), n_steps, to_data,
                      lower_order_final)


@lru_cache(maxsize=256)
def _decisions(recipe: Recipe, n_steps: int, to_data: bool, lower_order_final: bool) -> tuple[Decision, ...]:
    decisions = []
    for i in range(n_steps):
        order = min(recipe.order, i + 1, n_steps - i if lower_order_final else recipe.order)
        is_last = i == n_steps - 1
        decision = Decision(recipe.prediction, _terms(recipe, 1 if is_last and to_data else order))
        if recipe.corrector != "none" and not is_last:
            decision = replace(decision, corrector=recipe.corrector, correction=_terms(recipe, order + 1))
        decisions.append(decision)
    return tuple(decisions)


def _terms(recipe: Recipe, order: int) -> Expansion:
    return Expansion(order, relaxation=recipe.relaxation if order == 2 else "none",
                     second=recipe.second if order == 3 else 1.0)


def _decision(step: Any, i: int) -> Decision:
    try:
        if not isinstance(step, Mapping):
            raise ValueError(f"{step!r}: expected an object")
        inner = {k: Expansion(**{**step[k], "points": _list("points", step[k].get("points", []))})
                 for k in ("expansion", "correction") if k in step}
        return Decision(**{**step, **inner})
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"decisions[{i}]: {error}") from None


def _list(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name}={value!r}: expected a list")
    return tuple(value)
