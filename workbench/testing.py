"""The contract of methods, for anybody: `check_method(method)` makes every check, on its family's problems or yours.

A check is a function check_*(method, problem, problems); problems[0] takes every value of every knob, and between them
every knob has an effect.
"""

from __future__ import annotations

import inspect
import math
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from workbench.cost import Cost
from workbench.family import FAMILIES
from workbench.problem import Problem
from workbench.registry import Method, Step, get, tensors_of
from workbench.rng import Rng
from workbench.runs import Cancelled, inputs, run
from workbench.store import Store
from workbench.sweeps import together

CAP, CAP_FLOPS = 4_000, 3e10  # evaluations of one run, and FLOPs: settings that cost more are shrunk to it
SHRUNK: list[str] = []  # which settings were, for reports


def check_method(method: str | Method, problems: Sequence[Problem] | None = None) -> None:
    """Every check of the contract, for a method on each of the problems; by default its family's, without judges.

    Raises AssertionError that names the check and the problem, KeyError for an unknown method.
    """
    of = get(method) if isinstance(method, str) else method
    given = [unjudged(make()) for make in FAMILIES[of.family].makers()] if problems is None else list(problems)
    given = those_for(of, given)
    for name, check in CHECKS.items():
        for problem in given[:1] if name in OF_THE_METHOD else given:
            try:
                check(of, problem, given)
            except AssertionError as error:
                raise AssertionError(f"{of.name} on {problem.name!r}: {name.replace('_', ' ')}: {error}") from error


def those_for(of: Method, problems: Sequence[Any]) -> list[Any]:
    """The problems that a method runs on."""
    return [problem for problem in problems if not problem.methods or of.name in problem.methods]


def unjudged(problem: Any) -> Any:
    """A problem without its judge, whose cost and meaning have tests of their own."""
    return replace(problem, judge=lambda answer, cases: {})


def leaves(state: Any) -> list[Tensor]:
    """The tensors of a state, or of anything nested."""
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def same(a: Any, b: Any) -> bool:
    """Whether two answers are equal bit by bit."""
    ours, theirs = tensors_of(a), tensors_of(b)
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def small(of: Method, **changed: Any) -> dict[str, Any]:
    """Small knobs, but for those that are named."""
    return {name: bound.small for name, bound in of.knobs.items()} | changed


def long(of: Method, n: int) -> dict[str, Any]:
    """Small knobs, but for a run of (at most) n steps."""
    return small(of, **{FAMILIES[of.family].length: n})


def settings(of: Method, name: str) -> list[Any]:
    """Values to try a knob at: its ends, its small value and its default."""
    bound = of.knobs[name]
    values = [*bound.ends(), bound.small, bound.default]
    return [v for i, v in enumerate(values) if v not in values[:i]]


def fitting(of: Method, problem: Any, n_samples: int, **knobs: Any) -> dict[str, Any]:
    """The knobs, those of whole numbers halved, the largest first, until a run costs at most CAP by its formula, and
    CAP_FLOPS at the price of the dearest network: large networks need not show what small ones show."""
    found, start = dict(of.check(knobs)), dict(of.check(knobs))
    dearest = max((price for price in problem.flops.values() if isinstance(price, int | float)), default=0)
    cap = min(CAP, CAP_FLOPS / dearest) if dearest else CAP
    while n_samples * of.spends(found, problem.sizes(found)) > cap:
        above = {name: found[name] for name, bound in of.knobs.items()
                 if bound.kind is int and not isinstance(bound.knob.choices, tuple) and found[name] > bound.small}
        if not above:
            break
        name = max(above, key=lambda name: above[name])
        found[name] = max(found[name] // 2, of.knobs[name].small)
    changed = [f"{name} {value} as {found[name]}" for name, value in start.items() if value != found[name]]
    if changed:
        SHRUNK.append(f"{of.name} on {problem.name}: {', '.join(changed)}")
    return found


def steps_of(of: Method, problem: Any, n_samples: int = 2, **knobs: Any) -> list[Step]:
    """The bare method's steps."""
    return list(of.function(problem, Rng(0, n_samples), **of.check(small(of) | knobs)))


def rounding(problem: Any) -> float:
    """What rounding may do to one network output, over the output's own size, whichever kernels a CPU takes.

    A random walk over the sums of its layers: eps sqrt(layers x terms of the longest sum); formulas count as one layer
    of 4096 terms.
    """
    modules = [getattr(m, "module", None) for m in getattr(problem, "models", ())]
    weights = [[w for w in m.parameters() if w.ndim > 1] for m in modules if m is not None]
    terms = max((len(some) * max(w[0].numel() for w in some) for some in weights), default=4096)
    return float(torch.finfo(problem.dtype).eps * terms**0.5)


def tolerance(of: Method, problem: Any, seed: int, n: int) -> dict[str, float]:
    """For each tensor of the answer, four times what such rounding, put into every network output, does to this run.

    Whole numbers must be equal.
    The same at every call, as rounding is a function of what is rounded: noise of its own in each call would be taken
    for curvature by samplers that choose their steps.
    """
    size = rounding(problem)
    plain = tensors_of(run(of, problem, seed, n, **small(of)).answer)
    moved = dict.fromkeys(plain, 0.0)
    for k in range(3):
        def wrap(name: str, network: Callable[..., Any], k: int = k) -> Callable[..., Any]:
            def nudged(out: Any) -> Any:
                if not isinstance(out, Tensor) or not out.is_floating_point():
                    return out
                noise = torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(k), dtype=out.dtype)
                return out + size * out.square().mean().sqrt() * noise

            return lambda *rows: tree_map(nudged, network(*rows))

        if any(part.is_floating_point() for part in plain.values()):
            other = tensors_of(run(of, problem.wrapped(wrap), seed, n, **small(of)).answer)
            for name, part in plain.items():
                if part.is_floating_point():
                    moved[name] = max(moved[name], float((other[name] - part).abs().max()))
    return {name: 4 * moved[name] + 16 * torch.finfo(part.dtype).eps * float(part.abs().max())
            if part.is_floating_point() else 0.0 for name, part in plain.items()}


# ---- the checks ------------------------------------------------------------------------------------------------------

def check_same_seed_same_answer_whatever_the_batch(of: Method, problem: Any, problems: Sequence[Any]) -> None:
    seven = run(of, problem, 3, 7, **small(of)).answer
    assert same(run(of, problem, 3, 7, **small(of)).answer, seven), "the same seed gave another answer"
    allowed = tolerance(of, problem, 3, 7)
    for name, part in tensors_of(seven).items():
        if part.is_floating_point():
            assert allowed[name] < 0.02 * float(part.abs().max()), "so ill-conditioned that nothing is compared"
    for n in (1, 3):
        fewer = tensors_of(run(of, problem, 3, n, **small(of)).answer)
        for name, part in tensors_of(seven).items():
            torch.testing.assert_close(fewer[name], part[:n], rtol=0.0, atol=allowed[name])
    assert not same(run(of, problem, 4, 7, **small(of)).answer, seven), "another seed gave the same answer"


def check_global_randomness_is_neither_used_nor_touched(of: Method, problem: Any, problems: Sequence[Any]) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()

    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = states()
        answers.append(run(of, problem, 0, 2, **small(of)).answer)
        assert states() == before, "a global generator was used"
    assert same(*answers), "the answer depends on a global generator"


def check_inputs_are_not_mutated(of: Method, problem: Any, problems: Sequence[Any]) -> None:
    """Neither cases nor anything that goes into or comes out of a network: a memo may keep both."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(anything: Any) -> None:
        seen.extend((t, t.clone()) for t in leaves(anything))

    def watch(name: str, network: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any) -> Any:
            out = network(*given)
            keep((given, out))
            return out

        return watched

    cases = problem.cases(0, 2)
    keep(cases)
    watched = problem.wrapped(watch)
    object.__setattr__(watched, "cases", lambda seed, n: cases)
    for step in of.function(watched, Rng(0, 2), **small(of)):
        keep(step.state)
    assert seen and all(torch.equal(tensor, copy) for tensor, copy in seen), "a tensor was written into"


def check_dtype_and_device_are_kept(of: Method, problem: Any, problems: Sequence[Any]) -> None:
    for dtype in (problem.dtype, torch.float32):
        for step in steps_of(of, asked := replace(problem, dtype=dtype)):
            for part in leaves(step.state):
                assert str(part.device) == problem.device, f"a state on {part.device}"
                assert not part.is_floating_point() or part.dtype == dtype, f"a state of {part.dtype}, not {dtype}"
            if isinstance(step.state, Tensor):
                assert step.state.dtype == asked.state_dtype, f"a state of {step.state.dtype}"
            for value in step.info.values():
                assert not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype


def check_both_ends_of_every_knob_run(of: Method, problem: Any, problems: Sequence[Any]) -> None:
    """The first problem takes every value; others may refuse one, as latents refuse thresholding, but say so."""
    for name, bound in of.knobs.items():
        for value in settings(of, name):
            tried = bound.knob.enabling() | {name: value}
            try:
                knobs = fitting(of, problem, 1, **small(of, **tried))
                answer = run(of, problem, 0, 1, **knobs).answer
            except ValueError as error:
                assert problem is not problems[0], error
                assert str(error).startswith(tuple(f"{k}={v!r}" for k, v in tried.items())), error
                continue
            shape = FAMILIES[of.family].shape(problem, knobs)
            shapes = {"": shape} if isinstance(shape, tuple) else dict(shape)
            assert {k: tuple(part.shape) for k, part in tensors_of(answer).items()} == {
                k: (1, *s) for k, s in shapes.items()}


def check_wrong_knobs_are_named(of: Method, problem: Any, problems: Sequence[Any]) -> None:
    for name, bound in of.knobs.items():
        beyond: list[Any] = []
        if bound.knob.choices:
            beyond = ["no such value"]
        elif bound.kind is not bool:
            assert bound.knob.low is not None and bound.knob.high is not None, f"{name} has no bounds"
            beyond = [bound.knob.low - 1, bound.knob.high + 1]
        for value in beyond:
            with raised(ValueError) as said:
                run(of, problem, **{name: value})
            allowed = bound.knob.choices or (bound.knob.allowed(),)
            for text in (name, repr(value).strip("()"), *map(str, allowed)):
                assert text in said[0], f"{said[0]!r} does not name {text}"
        with raised(TypeError) as said:
            inputs(of, problem, 0, 1, **{name + "x": 1})
        assert re.search(f"no knob '{name}x'.*{name}", said[0]), said


def check_every_knob_changes_cost_or_answer(of: Method, problem: Any, problems: Sequence[Any]) -> None:
    """On one problem of the family at least: guidance, say, does nothing where there are no labels."""
    for name in of.knobs:
        assert any(has_effect(of, problem, name) for problem in problems), f"{name} changes nothing"


def has_effect(of: Method, problem: Any, name: str) -> bool:
    """Whether cost or answer differ between settings of a knob, all others small or all at their defaults."""
    for base in (small(of), {}):
        first = None
        tried = []
        for value in settings(of, name):
            knobs = fitting(of, problem, 2, **(base | of.knobs[name].knob.enabling() | {name: value}))
            if knobs[name] in tried:  # shrunk to one that was tried
                continue
            tried.append(knobs[name])
            try:
                made = run(of, problem, 0, 2, **knobs)
            except ValueError:
                continue  # a value that this problem refuses, by name, as another check sees
            if first is None:
                first = made
            elif made.cost != first.cost or not same(made.answer, first.answer):
                return True
    return False


def check_cost_is_the_formula(of: Method, problem: Any, problems: Sequence[Any]) -> None:
    spends = FAMILIES[of.family].spends
    values = [[(name, value) for value in settings(of, name)] for name in of.knobs]
    n_ways = math.prod(map(len, values))
    tried = [dict(chosen) for chosen in product(*values)] if n_ways <= 5000 else [
        {name: draw.choice(options)[1] for name, options in zip(of.knobs, values, strict=True)}
        for draw in [random.Random(0)] for _ in range(64)]
    all_spent = 0.0
    for knobs in random.Random(0).sample(tried, min(8, len(tried))):
        try:
            knobs = fitting(of, problem, 3, **knobs)
            given = inputs(of, problem, 0, 3, **knobs)
            made = run(of, problem, 0, 3, **knobs)
        except ValueError as error:  # knobs that exclude each other, and say so
            assert any(name in str(error) for name in of.knobs), error
            continue
        spent, formula = made.cost.amount(spends), 3 * of.spends(given.knobs, problem.sizes(given.knobs))
        all_spent += spent
        assert spent <= formula if of.is_bound else spent == formula, f"{spent} {spends}, by the formula {formula}"
    assert all_spent > 0, f"no {spends} at all"


def check_there_is_a_step_per_step(of: Method, problem: Any, problems: Sequence[Any]) -> None:
    for n_steps in (1, 5):
        steps = steps_of(of, problem, **{FAMILIES[of.family].length: n_steps})
        n_last = sum(step.phase == steps[-1].phase for step in steps) if steps else 0
        assert 0 < n_last <= n_steps if of.is_bound else n_last == n_steps, f"{n_last} steps, not {n_steps}"
        for phase in {step.phase for step in steps}:
            shapes = {tuple((k, tuple(t.shape)) for k, t in tensors_of(s.state).items()) for s in steps
                      if s.phase == phase}
            assert len(shapes) == 1, f"states of several shapes: {shapes}"
        assert all(len(part) == 2 for part in leaves(steps[-1].state)), "the leading axis is not the samples"
        assert [s.info["i"] for s in steps] == list(range(len(steps))), "info['i'] does not count the steps"
        FAMILIES[of.family].told(problem, [s.state for s in steps], [s.info for s in steps])
        places = [part.data_ptr() for s in steps for part in leaves(s.state)]
        assert len(set(places)) == len(places), "a step that is kept is overwritten by the next"


def check_a_cancelled_run_stops_within_a_step_and_leaves_nothing(of: Method, problem: Any, problems: Sequence[Any]
                                                                 ) -> None:
    calls: list[str] = []
    seen: list[Step] = []

    def watch(name: str, network: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*rows: Any) -> Any:
            calls.append(name)
            return network(*rows)

        return watched

    def on_step(step: Step, cost: Cost) -> None:
        seen.append(step)

    watched = problem.wrapped(watch)
    list(islice(of.function(watched, Rng(0, 1), **of.check(long(of, 9))), 2))
    two_steps = len(calls)
    calls.clear()  # more than one call per step, of some methods
    with raised(Cancelled):
        run(of, watched, n_samples=1, on_step=on_step, stop=lambda: len(seen) == 2, **long(of, 9))
    assert len(seen) == 2 and len(calls) == two_steps, f"{len(seen)} steps, {len(calls)} calls, not {two_steps}"
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        with raised(Cancelled):
            together(problem, [inputs(of, problem, n_samples=1, **small(of))], store=store, stop=lambda: True)
        assert list(store) == [] and list(store.folder.iterdir()) == [], "a cancelled run left something"


def check_it_is_documented(of: Method, problem: Any, problems: Sequence[Any]) -> None:
    text = inspect.getdoc(of.function) or ""
    for what in (r"\(n_samples", r"Raises \w+"):
        assert re.search(what, text), f"the docstring lacks {what!r}"
    assert re.search(r"arXiv \d{4}\.\d{4,5}|doi", of.source), of.source
    assert of.version >= 1 and len(of.summary) > 20, "version or summary"
    for name, bound in of.knobs.items():
        assert len(bound.knob.help) > 10, f"{name} has no help"
        for value in (bound.small, bound.default, *bound.ends()):
            assert bound.check(value) == value, name
        assert set(bound.knob.needs) <= set(of.knobs) - {name}, f"{name} needs knobs that are not there"
        if bound.knob.soft:
            assert bound.knob.low is not None and bound.knob.high is not None
            assert bound.knob.low <= bound.knob.soft[0] < bound.knob.soft[1] <= bound.knob.high, name


CHECKS: dict[str, Callable[[Method, Any, Sequence[Any]], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items())
    if name.startswith("check_") and name != "check_method"}
OF_THE_METHOD = {"every_knob_changes_cost_or_answer", "it_is_documented", "wrong_knobs_are_named"}  # made once


@contextmanager
def raised(kind: type[BaseException]) -> Iterator[list[str]]:
    """The text of the error of this kind that must be raised inside. Raises AssertionError where none is."""
    said: list[str] = []
    try:
        yield said
    except kind as error:
        said.append(str(error))
    else:
        raise AssertionError(f"nothing was refused: expected {kind.__name__}")
