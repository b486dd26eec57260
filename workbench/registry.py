"""Methods: pure generator functions whose keyword-only arguments are their knobs.

A method takes a problem and a random source, yields `Step(state, info)`, and its last step is the answer. It never
times, counts, seeds, plots or grades itself: `workbench.run` does.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor

from workbench.family import FAMILIES
from workbench.knob import BoundKnob, Knob

Answer = Tensor | Mapping[str, Tensor]  # of one kind within a phase; named where one tensor cannot hold it


class Step(NamedTuple):
    """One step of a method: its state and what there is to tell about it; the last step's state is the answer.

    state: (n_samples, *shape), or named tensors. info: for whoever looks on. phase: the part of the method that the
    step belongs to, where it has several (selecting, training). trace: {series: a number, or one for each sample
    (n_samples,)}, kept with the run.
    """

    state: Answer
    info: dict[str, Any]
    phase: str = ""
    trace: Mapping[str, float | Tensor] = MappingProxyType({})


def tensors_of(answer: Answer) -> dict[str, Tensor]:
    """An answer's tensors by name; "" where it is one tensor."""
    return {"": answer} if isinstance(answer, Tensor) else dict(answer)


@dataclass(frozen=True)
class Method:
    """A registered method.

    exact is the claim that its output law equals the reference's. cost is a formula: what its family counts
    (evaluations, looks, ...) per sample, in terms of its knobs, functions of its module and the sizes that the family's
    problems tell.
    is_bound: it is the most; what is spent depends on the data.
    """

    name: str
    family: str
    function: Callable[..., Iterator[Step]]
    version: int
    source: str
    exact: bool
    knobs: Mapping[str, BoundKnob]
    cost: str
    is_bound: bool

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    def check(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """All knobs, validated, defaults filled in, in the order of the signature. Raises TypeError or ValueError."""
        for name in knobs:
            if name not in self.knobs:
                raise TypeError(f"{self.name} has no knob {name!r}{_near(name, self.knobs)}")
        return {name: bound.check(knobs.get(name, bound.default)) for name, bound in self.knobs.items()}

    def spends(self, knobs: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
        """The cost per sample by the method's formula; sizes: what `problem.sizes(knobs)` gives."""
        names = {**self.function.__globals__, "__builtins__": {}, **_FUNCTIONS}
        return int(eval(self.cost, names, {**knobs, **sizes}))


METHODS: dict[str, Method] = {}
KINDS = (int, float, bool, str, tuple)
# What runs, sweeps and panels are asked for beside knobs: a knob of such a name could not be given.
RESERVED = frozenset({"method", "problem", "seed", "seeds", "n_samples", "stop", "on_step", "on_run", "repeats", "axes",
                      "memo", "store"})
_FUNCTIONS = {"max": max, "min": min, "len": len, "sum": sum, "round": round}  # what cost formulas may use
_COST = re.compile(r"Cost:\s+(at most\s+)?``(.+?)``", re.DOTALL)


def method(*, version: int, source: str, cost: str, at_most: bool = False, exact: bool = False,
           family: str | None = None) -> Callable[[Callable[..., Iterator[Step]]], Method]:
    """Register a generator function as a method.

    cost: a formula, what the family counts per sample (`Family.spends`) in terms of the knobs, functions of the module
    and the family's `sizes`; at_most: it is the most, as what is spent depends on the data. The docstring tells it too:
    where it does not, it is added.
    family: by default the name of the folder under methods/ that it stands in, however deep; elsewhere, as in a
    notebook, it must be given. A function of the same place registered again, as by a cell that runs anew, replaces it.
    Raises TypeError where the formula is none, names what it may not or differs from the docstring's, or the function
    declares an undeclared keyword, one of RESERVED or of another kind than KINDS, a default that it would not take, a
    name that is taken by a function of another place, or no known family.
    """

    def register(function: Callable[..., Iterator[Step]]) -> Method:
        name, own = function.__name__, family
        if own is None:
            _, _, below = f".{function.__module__}.".partition(".methods.")
            own = below.partition(".")[0]
        if own not in FAMILIES:
            raise TypeError(f"method {name!r}: family={own!r}, expected one of {', '.join(FAMILIES)}")
        if name in METHODS and METHODS[name].function.__module__ != function.__module__:
            raise TypeError(f"method {name!r} is registered twice: {METHODS[name].function.__module__}")
        knobs = _knobs(function)
        _check_formula(function, cost, {*knobs, *FAMILIES[own].sizes})
        what = f"Cost: {'at most ' * at_most}``{cost}`` {FAMILIES[own].spends} per sample."
        told = _COST.search(inspect.getdoc(function) or "")
        if told is None:
            function.__doc__ = f"{inspect.getdoc(function) or name}\n\n{what}"
        elif (" ".join(told[2].split()), bool(told[1])) != (cost, at_most):
            raise TypeError(f"method {name!r}: its docstring says {' '.join(told[0].split())!r}, expected {what!r}")
        METHODS[name] = Method(name, own, function, version, source, exact, knobs, cost, at_most)
        return METHODS[name]

    return register


def get(name: str) -> Method:
    """The method of that name. Raises KeyError that lists near matches."""
    if name not in METHODS:
        raise KeyError(f"no method {name!r}{_near(name, METHODS)}")
    return METHODS[name]


def _knobs(function: Callable[..., Any]) -> dict[str, BoundKnob]:
    hints = get_type_hints(function, include_extras=True)
    bound = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints.get(name)
        knob = next((extra for extra in get_args(hint)[1:] if isinstance(extra, Knob)), None)
        if get_origin(hint) is not Annotated or knob is None or parameter.default is inspect.Parameter.empty:
            raise TypeError(f"{function.__name__}: keyword {name!r} must be Annotated[type, Knob(...)] with a default")
        kind = get_origin(get_args(hint)[0]) or get_args(hint)[0]
        if name in RESERVED:
            raise TypeError(f"{function.__name__}: keyword {name!r} is an argument of runs and sweeps, no knob's name")
        if kind not in KINDS or (kind is str and not knob.choices):
            raise TypeError(f"{function.__name__}: keyword {name!r} of kind {getattr(kind, '__name__', kind)}: "
                            f"expected {', '.join(k.__name__ for k in KINDS)}, a text with choices")
        bound[name] = BoundKnob(name, kind, parameter.default, knob)
        try:
            if bound[name].check(parameter.default) != parameter.default:
                raise ValueError(f"knob {name}: the default {parameter.default!r} is not of its kind")
        except (TypeError, ValueError) as error:
            raise TypeError(f"{function.__name__}: {error}") from error
    return bound


def _check_formula(function: Callable[..., Any], cost: str, known: Set[str]) -> None:
    """Raises TypeError where a cost formula does not compile, or names what is neither known nor of the module."""
    try:
        names = compile(cost, "cost", "eval").co_names
    except SyntaxError as error:
        raise TypeError(f"{function.__name__}: cost={cost!r}: expected a formula ({error})") from None
    strange = [n for n in names if n not in known and n not in _FUNCTIONS and n not in function.__globals__]
    if strange:
        raise TypeError(f"{function.__name__}: cost={cost!r} names {', '.join(strange)}: expected knobs and sizes "
                        f"({', '.join(sorted(known))}) and functions of its module")


def _near(name: str, names: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f"; did you mean {', '.join(near)}?" if near else f"; there are {', '.join(sorted(names))}"
