"""Methods: pure generator functions whose keyword-only arguments are their knobs.

A method takes a problem and a random source, yields `Step(state, info)`, and its last step is the answer. It never
times, counts, seeds, plots or grades itself: `workbench.run` does.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor

from workbench.family import FAMILIES
from workbench.knob import BoundKnob, Knob


class Step(NamedTuple):
    """One step of a method: its state (n_samples, *shape) and what there is to tell about it."""

    state: Tensor
    info: dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A registered method.

    exact is the claim that its output law equals the reference's. cost is the formula of its docstring: evaluations per
    sample, in terms of its knobs, functions of its module and the problem's `sizes`: `branches` (2 where guidance
    evaluates two branches, else 1) in the denoising family, `n_prompt` in the decoding family. Where the docstring says
    "at most", what is spent depends on the data.
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

    def evaluations(self, knobs: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
        """Evaluations per sample by the docstring's formula; sizes: what `problem.sizes(knobs)` gives."""
        names = {**self.function.__globals__, "__builtins__": {}, "max": max, "min": min}
        return int(eval(self.cost, names, {**knobs, **sizes}))


METHODS: dict[str, Method] = {}
KINDS = (int, float, bool, str, tuple)
# What runs, sweeps and panels are asked for beside knobs: a knob of such a name could not be given.
RESERVED = frozenset({"method", "problem", "seed", "seeds", "n_samples", "stop", "on_step", "on_run", "repeats", "axes",
                      "memo", "store"})
_COST = re.compile(r"Cost:\s+(at most\s+)?``(.+?)``\s+evaluations\s+per\s+sample", re.DOTALL)


def method(*, version: int, source: str, exact: bool = False, family: str | None = None
           ) -> Callable[[Callable[..., Iterator[Step]]], Method]:
    """Register a generator function as a method.

    family: by default the name of the folder under methods/ that it stands in, however deep; elsewhere, as in a
    notebook, it must be given. A function of the same place registered again, as by a cell that runs anew, replaces it.
    Raises TypeError where the function declares no cost formula, an undeclared keyword, one of RESERVED or of another
    kind than KINDS, a default that it would not take, a name that is taken by a function of another place, or no known
    family.
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
        cost = _COST.search(inspect.getdoc(function) or "")
        if cost is None:
            raise TypeError(f"method {name!r}: its docstring lacks 'Cost: ``formula`` evaluations per sample'")
        METHODS[name] = Method(name, own, function, version, source, exact,
                               _knobs(function), cost[2], bool(cost[1]))
        return METHODS[name]

    return register


def get(name: str) -> Method:
    """The method of that name. Raises KeyError that lists near matches."""
    if name not in METHODS:
        raise KeyError(f"no method {name!r}{_near(name, METHODS)}")
    return METHODS[name]


def methods_table() -> str:
    """The registry as a Markdown table, as the README shows it."""
    rows = ["| method | family | what it does | knobs | evaluations per sample | source |", "|---|---|---|---|---|---|"]
    for m in sorted(METHODS.values(), key=lambda m: (m.family, m.name)):
        knobs = ", ".join(f"`{name}`" for name in m.knobs)
        cost = f"{'at most ' * m.is_bound}`{m.cost}`"
        rows.append(f"| `{m.name}` | {m.family} | {m.summary} | {knobs} | {cost} | {m.source} |")
    return "\n".join(rows)


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


def _near(name: str, names: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f"; did you mean {', '.join(near)}?" if near else f"; there are {', '.join(sorted(names))}"
