"""Knobs and the registry: what is declared in a signature is what is checked, named and listed."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Annotated

import pytest
import torch

from workbench import family
from workbench.family import FAMILIES, Family
from workbench.knob import BoundKnob, Knob
from workbench.pages import family_page
from workbench.registry import METHODS, Step, get, method

STEPS = BoundKnob("n_steps", int, 20, Knob(low=1, high=1000, unit="steps", small=4, help="steps"))
SHARE = BoundKnob("share", tuple, (0.5,), Knob(low=0.0, high=1.0, help="shares"))
SOLVER = BoundKnob("solver", str, "a", Knob(choices=("a", "b"), help="which"))
FLAG = BoundKnob("flag", bool, False, Knob(help="whether"))
OPEN = BoundKnob("scale", float, 1.0, Knob(help="any"))


@pytest.mark.parametrize(("knob", "value", "expected"), [
    (STEPS, 1, 1), (STEPS, 1000, 1000), (STEPS, 20.0, 20), (SHARE, 0.25, (0.25,)), (SHARE, [0, 1], (0.0, 1.0)),
    (SHARE, (), ()), (SOLVER, "b", "b"), (FLAG, True, True), (OPEN, -1e9, -1e9), (OPEN, 3, 3.0)])
def test_values_are_taken_as_their_kind(knob, value, expected):
    checked = knob.check(value)
    assert checked == expected and type(checked) is type(expected)
    if isinstance(checked, tuple):
        assert all(type(entry) is float for entry in checked)


@pytest.mark.parametrize(("knob", "value", "said"), [
    (STEPS, 0, "1 to 1000 steps"), (STEPS, 1001, "1 to 1000 steps"), (STEPS, 10**400, "1 to 1000 steps"),
    (SHARE, (0.5, 1.5), "0 to 1"), (SOLVER, "c", "'a', 'b'")])
def test_out_of_range_names_knob_value_and_bounds(knob, value, said):
    with pytest.raises(ValueError) as error:
        knob.check(value)
    assert knob.name in str(error.value) and repr(value) in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(("knob", "value"), [
    (STEPS, 2.5), (STEPS, "4"), (STEPS, True), (STEPS, None), (STEPS, float("nan")), (OPEN, float("inf")),
    (SHARE, "ab"), (SHARE, (None,)), (FLAG, 1), (FLAG, "yes")])
def test_wrong_types_name_knob_and_value(knob, value):
    with pytest.raises(TypeError) as error:
        knob.check(value)
    assert knob.name in str(error.value) and repr(value) in str(error.value)


def test_ends_and_small():
    assert STEPS.ends() == (1, 1000) and SHARE.ends() == ((0.0,), (1.0,)) and SOLVER.ends() == ("a", "b")
    assert FLAG.ends() == (False, True) and OPEN.ends() == ()
    assert STEPS.small == 4 and FLAG.small is False


def example(problem, rng, *, n_things: Annotated[int, Knob(low=0, high=9, help="things")] = 3,
            shares: Annotated[tuple[float, ...], Knob(help="shares")] = (0.5,)):
    """Summary."""
    yield Step(torch.zeros(1), {})


FORMULA = "n_things * branches + max(n_things, 2)"


def copy_of(function):
    made = FunctionType(function.__code__, function.__globals__, function.__name__, None, function.__closure__)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    made.__doc__ = function.__doc__
    return made


@pytest.fixture
def register(monkeypatch):
    """`method` for functions of this file, which stand in no family's folder; taken out of the registry afterwards."""
    before, families = dict(METHODS), dict(FAMILIES)
    family.register(Family("example", "n_things", lambda problem, knobs: (1,), [], lambda *_: None,
                           sizes=("branches",)))

    def registered(function, where="workbench.methods.example.file", cost="1", **kwargs):
        function = copy_of(function)
        function.__module__ = where
        monkeypatch.setitem(sys.modules, where, sys.modules[__name__])
        return method(**({"version": 1, "source": "none", "cost": cost} | kwargs))(function)

    yield registered
    METHODS.clear()
    METHODS.update(before)
    FAMILIES.clear()
    FAMILIES.update(families)


def test_needs_are_values_of_other_knobs_or_any_of_several():
    knob = Knob(help="forget", needs={"solver": ("dpmpp_2m", "unipc"), "is_on": True})
    assert knob.enabling() == {"solver": "dpmpp_2m", "is_on": True}
    assert all(knob.is_met({"solver": s, "is_on": True}) for s in ("dpmpp_2m", "unipc"))
    assert not knob.is_met({"solver": "ddim", "is_on": True}) and not knob.is_met({"solver": "unipc", "is_on": False})
    assert Knob(help="always").is_met({}) and Knob(help="always").enabling() == {}


def test_registration_reads_the_signature(register):
    made = register(example, cost=FORMULA)
    assert made is get("example") and made.family == "example" and made.summary == "Summary." and not made.exact
    assert {k: b.kind for k, b in made.knobs.items()} == {"n_things": int, "shares": tuple}
    assert made.check({}) == {"n_things": 3, "shares": (0.5,)}
    assert made.check({"shares": 1}) == {"n_things": 3, "shares": (1.0,)}
    assert made.spends({"n_things": 5}, {"branches": 2}) == 15
    page = family_page("example")
    assert f"Cost: ``{FORMULA}`` evaluations per sample." in page and "| `n_things` | `3` | 0 to 9 | things |" in page


def test_a_folder_within_the_familys_changes_nothing_and_a_cell_that_runs_anew_replaces(register):
    assert register(example, "workbench.methods.example.deep.deeper.file").family == "example"
    METHODS.pop("example")
    first = register(example, "__main__", family="example", version=1)
    again = register(example, "__main__", family="example", version=2)
    assert first is not again and get("example") is again and again.version == 2


def test_registration_refuses_what_is_half_declared(register):
    register(example)
    with pytest.raises(TypeError, match=r"registered twice: workbench\.methods\.example\.file"):
        register(example, "workbench.methods.example.other")
    with pytest.raises(TypeError, match="family=''"):
        register(example, "__main__")
    with pytest.raises(TypeError, match="family='sampling'"):
        register(example, family="sampling")

    def bare(problem, rng, *, n: int = 1):
        """Undeclared."""

    def no_default(problem, rng, *, n: Annotated[int, Knob(help="n")]):
        """Must be given."""

    def reserved(problem, rng, *, n_samples: Annotated[int, Knob(help="n")] = 1):
        """Of a reserved name."""

    def strange(problem, rng, *, n: Annotated[dict | None, Knob(help="n")] = None):
        """Of no kind."""

    def free_text(problem, rng, *, n: Annotated[str, Knob(help="n")] = "a"):
        """Any text."""

    def beyond(problem, rng, *, n: Annotated[int, Knob(low=1, high=3, help="n")] = 4):
        """Out of bounds."""

    for function, said in ((bare, "must be Annotated"), (no_default, "with a default"),
                           (reserved, "'n_samples' is an argument of runs"), (strange, "expected int, float, bool"),
                           (free_text, "a text with choices"), (beyond, "beyond: knob n=4: outside its bounds")):
        with pytest.raises(TypeError, match=said):
            register(function)


def test_near_matches():
    with pytest.raises(KeyError, match="did you mean dpmpp_2m"):
        get("dpmpp2m")
    with pytest.raises(TypeError, match="ddim has no knob 'step'; did you mean n_steps"):
        get("ddim").check({"step": 3})
    with pytest.raises(TypeError, match="there are eta, guidance"):
        get("ddim").check({"zzzz": 3})


@pytest.mark.parametrize("cost", ["__import__('os').getpid()", "n_thing", "n_prompt", "1 +", "open('x')"])
def test_a_formula_names_knobs_sizes_and_functions_of_its_module_only(register, cost):
    with pytest.raises(TypeError, match=r"example: cost=.*expected (a formula|knobs and sizes \(branches, n_th)"):
        register(example, cost=cost)
    assert "example" not in METHODS


def test_the_docstring_tells_the_formula_and_no_other(register):
    made = register(example, cost="n_things", at_most=True)
    assert made.is_bound and "Cost: at most ``n_things`` evaluations per sample." in made.function.__doc__
    for told, is_fine in (("``n_things``", True), ("``2 * n_things``", False), ("at most ``n_things``", False)):
        def told_twice(problem, rng, *, n_things: Annotated[int, Knob(help="things")] = 3):
            ...

        told_twice.__doc__ = f"Summary.\n\nCost: {told} evaluations per sample."
        if is_fine:
            register(told_twice, cost="n_things")
        else:
            with pytest.raises(TypeError, match=r"its docstring says 'Cost: .*', expected 'Cost: ``n_things`` eval"):
                register(told_twice, cost="n_things")
