"""Edits of a solver schedule, step by step: each gives another plan, or says why there is none such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from workbench.methods.denoising._march import MEMORY
from workbench.plan import CORRECTORS, MAX_ORDER, PREDICTIONS, RELAXATIONS, Decision, Expansion, Plan

FIELDS = ("order", "prediction", "relaxation", "start", "corrector", "correction_order")


def whole(name: str, value: Any, low: int, high: int) -> None:
    """Raises ValueError where the value is no whole number within these bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected a whole number from {low} to {high}")


def moved(plan: Plan, step: int, time: float) -> Plan:
    """A mark at another time: step n is where the last one ends."""
    times = [*plan.times, plan.end]
    times[step] = time
    return replace(plan, times=tuple(times[:-1]), end=times[-1])


def decided(plan: Plan, step: int, **fields: Any) -> Plan:
    """Another decision at a step. Raises ValueError where its place does not allow it, TypeError for no field."""
    decision = plan.decisions[step]
    for name, value in fields.items():
        if name not in FIELDS:
            raise TypeError(f"{name}={value!r}: expected one of {', '.join(FIELDS)}")
        decision = _with(decision, name, value, step)
    return replace(plan, decisions=(*plan.decisions[:step], decision, *plan.decisions[step + 1 :]))


def divided(plan: Plan, step: int, time: float) -> Plan:
    """A step more, of the same decision: `step` goes as far as a time, another one on from there."""
    is_last = step == len(plan.times) - 1 and plan.end is None
    like = plan.decisions[max(step - 1, 0) if is_last else step]
    times = (*plan.times[: step + 1], time, *plan.times[step + 1 :])
    return Plan(times, _fitted([*plan.decisions[:step], like, *plan.decisions[step:]], plan.end is None), plan.end)


def without(plan: Plan, step: int) -> Plan:
    """A step less: the one before goes as far as this one went. Raises ValueError where it is the only one."""
    keep = [i for i in range(len(plan.times)) if i != step]
    if not keep:
        raise ValueError(f"step {step + 1} is the only one: expected at least one step to stay")
    times = tuple(plan.times[i] for i in keep)
    if step == 0:  # trajectories go on starting where they did
        times = (plan.times[0], *times[1:])
    return Plan(times, _fitted([plan.decisions[i] for i in keep], plan.end is None), plan.end)


def _with(decision: Decision, name: str, value: Any, step: int) -> Decision:
    """The decision with one field of the editor changed, and what depends on it. Raises ValueError."""
    terms, correction = decision.expansion, decision.correction
    if name == "order":
        whole("order", value, 1, MAX_ORDER)
        if value == terms.order:
            return decision
        # relaxation is the factor of a first derivative that one point estimates: of order 2
        return replace(decision, expansion=Expansion(value, relaxation=terms.relaxation if value == 2 else "none"))
    if name == "relaxation":
        if terms.order == 1 and value != "none":
            raise ValueError(f"relaxation={value!r}: order 1 has no derivative to relax, expected 'none'")
        return replace(decision, expansion=replace(terms, relaxation=value))
    if name == "correction_order":
        if decision.corrector == "none":
            raise ValueError(f"correction_order={value!r}: there is no corrector, expected one first")
        whole("correction_order", value, 2, MAX_ORDER + 1)
        kind = correction.relaxation if value == 2 else "none"
        return replace(decision, correction=Expansion(value, relaxation=kind))
    if name == "corrector" and value != "none" and decision.corrector == "none":
        order = min(terms.order + 1, step + 2, MEMORY + 1)
        return replace(decision, corrector=value, correction=Expansion(order))
    return replace(decision, **{name: value})


def _fitted(decisions: Sequence[Decision], to_data: bool) -> tuple[Decision, ...]:
    """Decisions lowered to what the history at each step allows."""
    out = []
    for i, d in enumerate(decisions):
        is_last = i == len(decisions) - 1
        most = 1 if is_last and to_data else min(i, MEMORY) + 1
        terms, correction = d.expansion, d.correction
        if terms.order > most:
            terms = Expansion(most, relaxation=terms.relaxation if most == 2 else "none")
        elif terms.reach > most - 1:
            terms = replace(terms, points=())
        if correction.reach > min(i + 1, MEMORY):
            correction = Expansion(min(i + 1, MEMORY) + 1)
        start = 0 if is_last and to_data else min(d.start, i, MEMORY)
        out.append(replace(d, expansion=terms, correction=correction, start=start,
                           corrector="none" if is_last else d.corrector))
    return tuple(out)


@lru_cache(maxsize=64)
def options(decisions: tuple[Decision, ...], to_data: bool) -> list[dict[str, list[list[Any]]]]:
    """For each step and field the values, each with the reason why it cannot be (or "")."""
    values: dict[str, Sequence[Any]] = {
        "order": range(1, MAX_ORDER + 1), "prediction": PREDICTIONS, "relaxation": RELAXATIONS,
        "start": range(MEMORY + 1), "corrector": CORRECTORS, "correction_order": range(2, MAX_ORDER + 2)}
    n = len(decisions)
    plan = Plan(tuple(float(n - i) for i in range(n)), decisions, None if to_data else 0.0)

    def reason(i: int, name: str, value: Any) -> str:
        try:
            decided(plan, i, **{name: value})
        except ValueError as error:
            return _why(str(error), i)
        return ""

    return [{name: [[v, reason(i, name, v)] for v in some] for name, some in values.items()} for i in range(n)]


def _why(error: str, i: int) -> str:
    """A refusal of `Plan` in the editor's words."""
    if error.startswith("last step"):
        return "the step into the data is of order 1, from the current point"
    if "above its history" in error:
        return f"step {i + 1} has {i} earlier {'evaluation' if i == 1 else 'evaluations'} to look back on"
    if "at the last step" in error:
        return "nothing follows the last step"
    return error.partition(": ")[2] or error
