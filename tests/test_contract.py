"""What every method keeps to, on every problem of its family: discovered from the registry, nothing skipped.

Each check of `workbench.testing` is shown to fail on a deliberately broken method at the end.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import pytest
import torch

from workbench import METHODS, Knob, method, testing
from workbench.family import FAMILIES
from workbench.methods.denoising._march import march
from workbench.methods.denoising.ddim import ddim_step
from workbench.problems.denoising import grid
from workbench.registry import Method
from workbench.rng import Rng
from workbench.testing import CHECKS, OF_THE_METHOD, check_method, those_for, unjudged


@functools.cache
def problems(family: str) -> list[Any]:
    return [unjudged(make()) for make in FAMILIES[family].makers()]


CASES = [(of, i) for of in sorted(METHODS.values(), key=lambda m: m.name)
         for i in range(len(FAMILIES[of.family].problems))]
EACH = [(name, of, i) for name in CHECKS for of, i in CASES if not i or name not in OF_THE_METHOD]


@pytest.mark.parametrize(("name", "of", "index"), EACH, ids=[f"{of.name}-{i}-{name}" for name, of, i in EACH])
def test_contract(name, of, index):
    own = those_for(of, problems(of.family))
    problem = own[0] if name in OF_THE_METHOD else problems(of.family)[index]
    if any(problem is one for one in own):  # else it is not for this method
        CHECKS[name](of, problem, own)


def test_every_family_has_problems_and_methods():
    assert {of.family for of in METHODS.values()} == set(FAMILIES)
    for name, family in FAMILIES.items():
        assert problems(name) and all(problem.family == name for problem in problems(name))
        assert all(family.length in of.knobs for of in METHODS.values() if of.family == name)


# ---- broken twins ----------------------------------------------------------------------------------------------------

Steps = Annotated[int, Knob(low=1, high=1000, small=4, help="solver steps from noise to data")]


def sound(problem, rng, *, n_steps: Steps = 20):
    """A method with nothing wrong, to show that what fails below fails for its own reason.

    State (n_samples, *problem.shape). Raises ValueError never.
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
    "cost_is_the_formula": [asks_once_more],
    "there_is_a_step_per_step": [yields_only_its_answer, writes_into_its_state],
    "a_cancelled_run_stops_within_a_step_and_leaves_nothing": [yields_only_its_answer],
    "it_is_documented": [draws_globally],
}


@pytest.fixture
def register():
    """Registers a function of this file as a denoising method for the length of one test."""
    before = dict(METHODS)

    def registered(function: Callable[..., Any]) -> Method:
        function.__module__ = "workbench.methods.denoising.twin"
        return method(version=1, source="DDIM, arXiv 2010.02502", cost="n_steps * branches")(function)

    sys.modules["workbench.methods.denoising.twin"] = sys.modules[__name__]
    yield registered
    del sys.modules["workbench.methods.denoising.twin"]
    METHODS.clear()
    METHODS.update(before)


def test_every_check_has_a_twin():
    assert set(TWINS) == set(CHECKS)


def failed(name, of):
    given = problems("denoising")[:1]
    CHECKS[name](of, given[0], given)


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_method_passes(name, register):
    failed(name, register(sound))


@pytest.mark.parametrize(("name", "twin"), [(name, twin) for name, twins in TWINS.items() for twin in twins])
def test_a_broken_twin_fails(name, twin, register):
    broken = register(twin)
    with pytest.raises((AssertionError, ZeroDivisionError)):
        failed(name, broken)


def test_anybody_can_check_a_method(register):
    register(sound)
    check_method("sound", problems("denoising")[:1])
    register(widens)
    with pytest.raises(AssertionError, match=r"widens on '.*': dtype and device are kept: a state of torch.float64"):
        check_method("widens", problems("denoising")[:1])


def test_settings_beyond_the_cap_are_shrunk_and_listed(register, monkeypatch):
    monkeypatch.setattr(testing, "CAP", 100)
    monkeypatch.setattr(testing, "SHRUNK", [])
    of, problem = register(sound), problems("denoising")[0]
    assert testing.fitting(of, problem, 3, n_steps=1000)["n_steps"] == 31
    assert testing.fitting(of, problem, 3, n_steps=33)["n_steps"] == 33
    assert [f"sound on {problem.name}: n_steps 1000 as 31"] == testing.SHRUNK
    monkeypatch.setattr(testing, "CAP_FLOPS", 60 * max(problem.flops.values()))
    assert testing.fitting(of, problem, 3, n_steps=33)["n_steps"] == 16
