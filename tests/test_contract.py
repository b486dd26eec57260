"""What every method keeps to, on every problem of its family: discovered from the registry, nothing skipped.

A check is a function check_*(method, problem); each is shown to fail on a deliberately broken method at the end.
"""

from __future__ import annotations

import functools
import inspect
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, product
from typing import Annotated, Any

import numpy as np
import pytest
import torch

from workbench import METHODS, Cancelled, Knob, Step, Store, inputs, method, run, together
from workbench.family import FAMILIES
from workbench.method import Method
from workbench.methods.denoising._march import march
from workbench.methods.denoising.ddim import ddim_step
from workbench.problems.denoising import grid
from workbench.rng import Rng


@functools.cache
def problems(family: str) -> list[Any]:
    """The family's problems without their judges, whose cost and meaning have tests of their own."""
    return [replace(make(), judge=lambda answer, labels: {}) for make in FAMILIES[family].makers()]


def rounding(problem: Any) -> float:
    """What rounding may do to one network output, over the output's own size, whichever kernels a CPU takes.

    A random walk over the sums of its layers: eps sqrt(layers x terms of the longest sum); formulas count as one layer
    of 4096 terms.
    """
    weights = [[w for w in m.module.parameters() if w.ndim > 1] for m in problem.models if m.module is not None]
    terms = max((len(some) * max(w[0].numel() for w in some) for some in weights), default=4096)
    return torch.finfo(problem.dtype).eps * terms**0.5


def tolerance(of: Method, problem: Any, seed: int, n: int) -> dict[str, float]:
    """Four times what such rounding, put into every network output, does to this very run; texts are equal.

    The same at every call, as rounding is a function of what is rounded: noise of its own in each call would be taken
    for curvature by samplers that choose their steps.
    """
    if not problem.state_dtype.is_floating_point:
        return {"rtol": 0.0, "atol": 0.0}
    size, plain, moved = rounding(problem), run(of, problem, seed, n, **small(of)).answer, []
    for k in range(3):
        def wrap(name, network, k=k):
            def rounded(*rows):
                out = network(*rows)
                noise = torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(k), dtype=out.dtype)
                return out + size * out.square().mean().sqrt() * noise
            return rounded

        moved.append(float((run(of, problem.wrapped(wrap), seed, n, **small(of)).answer - plain).abs().max()))
    floor = 16 * torch.finfo(problem.dtype).eps * float(plain.abs().max())  # the sampler's own arithmetic
    return {"rtol": 0.0, "atol": 4 * max(moved) + floor}


def small(of: Method, **changed: Any) -> dict[str, Any]:
    return {name: bound.small for name, bound in of.knobs.items()} | changed


def settings(of: Method, name: str) -> list[Any]:
    """Values to try a knob at: its ends, its small value and its default."""
    bound = of.knobs[name]
    values = [*bound.ends(), bound.small, bound.default]
    return [v for i, v in enumerate(values) if v not in values[:i]]


def long(of: Method, n: int) -> dict[str, Any]:
    """Small knobs, but for a run of (at most) n steps."""
    return small(of, **{FAMILIES[of.family].length: n})


def steps_of(of: Method, problem: Any, n_samples: int = 2, **knobs: Any) -> list[Step]:
    return list(of.function(problem, Rng(0, n_samples), **of.check(small(of) | knobs)))


# ---- the checks ------------------------------------------------------------------------------------------------------

def check_same_seed_same_answer_whatever_the_batch(of, problem):
    seven = run(of, problem, 3, 7, **small(of))
    assert torch.equal(run(of, problem, 3, 7, **small(of)).answer, seven.answer)
    allowed = tolerance(of, problem, 3, 7)
    assert allowed["atol"] < 0.02 * float(seven.answer.abs().max())  # else the comparison would say nothing
    for n in (1, 3):
        torch.testing.assert_close(run(of, problem, 3, n, **small(of)).answer, seven.answer[:n], **allowed)
    assert not torch.equal(run(of, problem, 4, 7, **small(of)).answer, seven.answer)


def check_global_randomness_is_neither_used_nor_touched(of, problem):
    def states():
        return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()

    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = states()
        answers.append(run(of, problem, 0, 2, **small(of)).answer)
        assert states() == before
    assert torch.equal(*answers)


def check_inputs_are_not_mutated(of, problem):
    """Neither labels nor anything that goes into or comes out of a network: a memo may keep both."""
    seen = []

    def keep(*tensors):
        seen.extend((t, t.clone()) for t in tensors if t is not None)

    def watch(name, network):
        def watched(*given):
            out = network(*given)
            made = out if isinstance(out, list) else [out]  # a tensor per sequence, of language models
            keep(*(x for x in (*given, *made) if x is None or isinstance(x, torch.Tensor)))
            return out

        return watched

    labels = problem.labels(2)
    keep(labels)
    watched = problem.wrapped(watch)
    if labels is not None:
        watched = replace(watched, labels=lambda n: labels)
    for step in of.function(watched, Rng(0, 2), **small(of)):
        keep(step.state)
    assert seen and all(torch.equal(tensor, copy) for tensor, copy in seen)


def check_dtype_and_device_are_kept(of, problem):
    for dtype in (problem.dtype, torch.float32):
        for step in steps_of(of, asked := replace(problem, dtype=dtype)):
            assert step.state.dtype == asked.state_dtype and str(step.state.device) == problem.device
            for value in step.info.values():
                assert not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype


def check_both_ends_of_every_knob_run(of, problem):
    """The many steps of the upper end on the family's first problem only, for time's sake.

    That one takes every value; others may refuse one, as latents refuse thresholding, but say so.
    """
    for name, bound in of.knobs.items():
        for value in settings(of, name):
            if bound.kind is int and value >= 1000 and problem is not problems(of.family)[0]:
                continue
            tried = bound.knob.enabling() | {name: value}
            try:
                answer = run(of, problem, 0, 1, **small(of, **tried)).answer
            except ValueError as error:
                assert problem is not problems(of.family)[0], error
                assert str(error).startswith(tuple(f"{k}={v!r}" for k, v in tried.items())), error
                continue
            assert answer.shape == (1, *FAMILIES[of.family].shape(problem, small(of, **tried)))


def check_wrong_knobs_are_named(of, problem):
    for name, bound in of.knobs.items():
        if bound.kind is bool:
            beyond = []
        elif bound.knob.choices:
            beyond = ["no such value"]
        else:
            assert bound.knob.low is not None and bound.knob.high is not None, name
            beyond = [bound.knob.low - 1, bound.knob.high + 1]
        for value in beyond:
            with pytest.raises(ValueError) as error:
                run(of, problem, **{name: value})
            allowed = bound.knob.choices or (bound.knob.allowed(),)
            assert name in str(error.value) and repr(value).strip("()") in str(error.value)
            assert all(str(a) in str(error.value) for a in allowed)
        with pytest.raises(TypeError, match=f"no knob '{name}x'.*{name}"):
            run(of, problem, **{name + "x": 1})


def has_effect(of, problem, name):
    """Whether cost or answer differ between settings of a knob, all others small or all at their defaults."""
    for base in (small(of), {}):
        found = []
        for value in settings(of, name):
            if of.knobs[name].kind is int and value >= 1000:
                continue  # run elsewhere; here one other value is enough
            made = run(of, problem, 0, 2, **(base | of.knobs[name].knob.enabling() | {name: value}))
            found.append((made.cost, made.answer))
        if any(cost != found[0][0] or not torch.equal(answer, found[0][1]) for cost, answer in found):
            return True
    return False


def check_every_knob_changes_cost_or_answer(of, _):
    """On one problem of the family at least: guidance, say, does nothing where there are no labels."""
    for name in of.knobs:
        assert any(has_effect(of, problem, name) for problem in problems(of.family)), name


def check_cost_is_the_docstrings_formula(of, problem):
    values = [[(name, value) for value in settings(of, name) if value != 1000] for name in of.knobs]
    tried = [dict(chosen) for chosen in product(*values)]
    for knobs in random.Random(0).sample(tried, min(8, len(tried))):
        try:
            given = inputs(of, problem, 0, 3, **knobs)
            made = run(of, problem, 0, 3, **knobs)
        except ValueError as error:  # knobs that exclude each other, and say so
            assert any(name in str(error) for name in of.knobs)
            continue
        spent, formula = made.cost.total_evaluations, 3 * of.evaluations(given.knobs, problem.sizes(given.knobs))
        assert 0 < spent <= formula if of.is_bound else spent == formula


def check_there_is_a_step_per_step(of, problem):
    for n_steps in (1, 5):
        steps = steps_of(of, problem, **{FAMILIES[of.family].length: n_steps})
        assert 0 < len(steps) <= n_steps if of.is_bound else len(steps) == n_steps
        n_steps = len(steps)
        assert len({s.state.shape for s in steps}) == 1 and len(steps[0].state) == 2
        assert [s.info["i"] for s in steps] == list(range(n_steps))
        FAMILIES[of.family].told(problem, [s.state for s in steps], [s.info for s in steps])
        assert len({s.state.data_ptr() for s in steps}) == n_steps  # a step that is kept is not overwritten by the next


def check_a_cancelled_run_stops_within_a_step_and_leaves_nothing(of, problem, folder):
    calls, seen = [], []

    def watch(name, network):
        return lambda *rows: calls.append(name) or network(*rows)

    watched = problem.wrapped(watch)
    list(islice(of.function(watched, Rng(0, 1), **of.check(long(of, 9))), 2))
    two_steps, calls = len(calls), []  # more than one call per step, of some methods
    with pytest.raises(Cancelled):
        run(of, watched, n_samples=1, on_step=seen.append, stop=lambda: len(seen) == 2, **long(of, 9))
    assert len(seen) == 2 and len(calls) == two_steps
    store = Store(folder)
    wanted = [inputs(of, problem, n_samples=1, **small(of))]
    with pytest.raises(Cancelled):
        together(problem, wanted, store=store, stop=lambda: True)
    assert list(store) == [] and list(store.folder.iterdir()) == []


def check_it_is_documented(of, _):
    text = inspect.getdoc(of.function) or ""
    for what in (r"\(n_samples", r"Cost:\s+(at\s+most\s+)?``.+``", r"Raises \w+"):
        assert re.search(what, text), what
    assert re.search(r"arXiv \d{4}\.\d{4,5}|doi", of.source), of.source
    assert of.version >= 1 and len(of.summary) > 20
    for name, bound in of.knobs.items():
        assert len(bound.knob.help) > 10, name
        for value in (bound.small, bound.default, *bound.ends()):
            assert bound.check(value) == value, name
        assert set(bound.knob.needs) <= set(of.knobs) - {name}
        if bound.knob.soft:
            assert bound.knob.low <= bound.knob.soft[0] < bound.knob.soft[1] <= bound.knob.high


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}
CASES = [(of, i) for of in sorted(METHODS.values(), key=lambda m: m.name)
         for i in range(len(FAMILIES[of.family].problems))]


def apply(check, of, problem, folder):
    check(of, problem, **({"folder": folder} if "folder" in inspect.signature(check).parameters else {}))


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize(("of", "index"), CASES, ids=[f"{of.name}-{index}" for of, index in CASES])
def test_contract(check, of, index, tmp_path):
    if index and "_" in inspect.signature(check).parameters:
        return  # this check looks at the method, or at all problems, and has been made with the first
    apply(check, of, problems(of.family)[index], tmp_path)


def test_every_family_has_problems_and_methods():
    assert {of.family for of in METHODS.values()} == set(FAMILIES)
    for name, family in FAMILIES.items():
        assert problems(name) and all(problem.family == name for problem in problems(name))
        assert all(family.length in of.knobs for of in METHODS.values() if of.family == name)


# ---- broken twins ----------------------------------------------------------------------------------------------------

Steps = Annotated[int, Knob(low=1, high=1000, small=4, help="solver steps from noise to data")]


def sound(problem, rng, *, n_steps: Steps = 20):
    """A method with nothing wrong, to show that what fails below fails for its own reason.

    State (n_samples, *problem.shape). Cost: ``n_steps * branches`` evaluations per sample. Raises ValueError never.
    """
    points = grid(problem.schedule, n_steps, "trailing")
    yield from march(problem, rng, points, [problem.models[-1]] * n_steps, ddim_step, guidance=1.0)


def draws_globally(problem, rng, *, n_steps: Steps = 20):
    for step in sound(problem, rng, n_steps=n_steps):
        yield step._replace(state=step.state + 1e-3 * torch.randn_like(step.state))


def looks_at_the_batch(problem, rng, *, n_steps: Steps = 20):
    for step in sound(problem, rng, n_steps=n_steps):
        yield step._replace(state=step.state / step.state.std(correction=0).clamp(min=0.1))


def seedless(problem, rng, *, n_steps: Steps = 20):
    yield from sound(problem, Rng(0, rng.n_samples), n_steps=n_steps)


def writes_into_outputs(problem, rng, *, n_steps: Steps = 20):
    def wrap(name, network):
        return lambda *rows: network(*rows)

    def clipped(x, step):
        now = step.denoise(x, step.here)
        now.eps.mul_(0.999)
        return step.there.alpha * now.x0 + step.there.sigma * now.eps, now

    points = grid(problem.schedule, n_steps, "trailing")
    yield from march(problem, rng, points, [problem.models[-1]] * n_steps, clipped, guidance=1.0)


def writes_into_its_state(problem, rng, *, n_steps: Steps = 20):
    state = torch.zeros((rng.n_samples, *problem.shape), dtype=problem.dtype)
    for step in sound(problem, rng, n_steps=n_steps):
        yield step._replace(state=state.copy_(step.state))


def widens(problem, rng, *, n_steps: Steps = 20):
    for step in sound(problem, rng, n_steps=n_steps):
        yield step._replace(state=step.state.double())


def fails_at_one_step(problem, rng, *, n_steps: Steps = 20):
    points = grid(problem.schedule, n_steps, "linspace")[: n_steps + 1]
    spread = (points[0].t - points[-2].t) / (n_steps - 1)
    assert spread > 0
    yield from sound(problem, rng, n_steps=n_steps)


def has_a_dead_knob(problem, rng, *, n_steps: Steps = 20,
                    strength: Annotated[float, Knob(low=0.0, high=1.0, help="has no effect at all")] = 0.5):
    yield from sound(problem, rng, n_steps=n_steps)


def asks_once_more(problem, rng, *, n_steps: Steps = 20):
    for step in sound(problem, rng, n_steps=n_steps):
        yield step
    problem.models[-1].predict(step.state, grid(problem.schedule, 1, "trailing")[0], problem.schedule, problem.labels(
        rng.n_samples), 1.0)


def yields_only_its_answer(problem, rng, *, n_steps: Steps = 20):
    yield list(sound(problem, rng, n_steps=n_steps))[-1]


def refuses_a_value(problem, rng, *, n_steps: Steps = 20):
    if n_steps == 1:
        raise ValueError("n_steps=1: not today")
    yield from sound(problem, rng, n_steps=n_steps)


def checks_nothing(problem, rng, *, n_steps: Annotated[int, Knob(small=4, high=1000, help="any number of steps")] = 20):
    yield from sound(problem, rng, n_steps=max(n_steps, 1))


TWINS = {
    "same_seed_same_answer_whatever_the_batch": [draws_globally, looks_at_the_batch, seedless],
    "global_randomness_is_neither_used_nor_touched": [draws_globally],
    "inputs_are_not_mutated": [writes_into_outputs, writes_into_its_state],
    "dtype_and_device_are_kept": [widens],
    "both_ends_of_every_knob_run": [fails_at_one_step, refuses_a_value],
    "wrong_knobs_are_named": [checks_nothing],
    "every_knob_changes_cost_or_answer": [has_a_dead_knob],
    "cost_is_the_docstrings_formula": [asks_once_more],
    "there_is_a_step_per_step": [yields_only_its_answer, writes_into_its_state],
    "a_cancelled_run_stops_within_a_step_and_leaves_nothing": [yields_only_its_answer],
    "it_is_documented": [draws_globally],
}


@pytest.fixture
def register():
    """Registers a function of this file as a denoising method for the length of one test."""
    before = dict(METHODS)

    def registered(function: Callable[..., Any]) -> Method:
        function.__doc__ = function.__doc__ or "Twin.\n\nCost: ``n_steps * branches`` evaluations per sample."
        function.__module__ = "workbench.methods.denoising.twin"
        return method(version=1, source="DDIM, arXiv 2010.02502")(function)

    sys.modules["workbench.methods.denoising.twin"] = sys.modules[__name__]
    yield registered
    del sys.modules["workbench.methods.denoising.twin"]
    METHODS.clear()
    METHODS.update(before)


def test_every_check_has_a_twin():
    assert set(TWINS) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_method_passes(name, register, tmp_path):
    apply(CHECKS[name], register(sound), problems("denoising")[0], tmp_path)


@pytest.mark.parametrize(("name", "twin"), [(name, twin) for name, twins in TWINS.items() for twin in twins])
def test_a_broken_twin_fails(name, twin, register, tmp_path):
    broken = register(twin)
    with pytest.raises((AssertionError, ZeroDivisionError, pytest.fail.Exception)):
        apply(CHECKS[name], broken, problems("denoising")[0], tmp_path)
