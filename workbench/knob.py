"""Knob: what a method's keyword argument may be, declared once in the method's signature.

That one declaration makes the slider, the validation, the sweep axis and the test cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_ENTRIES = 1000  # of a tuple


def plain(value: Any) -> Any:
    """A numpy scalar as Python's own number or text; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


@dataclass(frozen=True, kw_only=True)
class Knob:
    """Bounds and presentation of one keyword argument.

    help      one sentence for a person.
    low, high hard bounds, both included; values outside raise ValueError. For a tuple they hold for each entry.
    soft      the range that a slider shows, inside the hard bounds (default: the hard bounds).
    step      smallest sensible change, for sliders and arrow keys.
    scale     "linear" or "log", how a slider spreads its range.
    unit      unit of the value, for labels.
    choices   the allowed values, instead of bounds.
    small     a cheap value for smoke runs (default: the knob's default).
    needs     values of other knobs without which this one has no effect, e.g. {"solver": "ddim"}; a tuple where each
              of several values will do, the first being the one to try it with.
    """

    help: str
    low: float | None = None
    high: float | None = None
    soft: tuple[float, float] | None = None
    step: float | None = None
    scale: str = "linear"
    unit: str = ""
    choices: tuple[Any, ...] | None = None
    small: Any = None
    needs: Mapping[str, Any] = field(default_factory=dict)

    def check(self, name: str, value: Any, kind: type) -> Any:
        """The value as `kind` (int, float, bool, str or tuple of float); numpy's scalars count as numbers.

        Raises TypeError or ValueError naming the knob, the value received and what is allowed.
        """
        value = plain(value)
        if kind is tuple:
            if isinstance(value, int | float) and not isinstance(value, bool):
                value = (value,)
            if not isinstance(value, tuple | list):
                raise TypeError(f"knob {name}={value!r}: expected a tuple of numbers, {self.allowed()}")
            if len(value) > MAX_ENTRIES:
                raise ValueError(f"knob {name}: {len(value)} entries, expected at most {MAX_ENTRIES}")
            return tuple(self._number(name, plain(entry), float, whole=value) for entry in value)
        if kind is bool:
            if not isinstance(value, bool):
                raise TypeError(f"knob {name}={value!r}: expected True or False")
            return value
        if self.choices is not None:
            if not isinstance(value, str | int | float) or value not in self.choices:
                raise ValueError(f"knob {name}={value!r}: expected one of {', '.join(map(repr, self.choices))}")
            return value
        return self._number(name, value, kind, whole=value)

    def _number(self, name: str, value: Any, kind: type, *, whole: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_finite = is_number and (isinstance(value, int) or math.isfinite(value))  # isfinite fails for huge ints
        if not is_finite or (kind is int and int(value) != value):
            raise TypeError(f"knob {name}={whole!r}: expected {kind.__name__}, {self.allowed()}")
        below = self.low is not None and value < self.low
        above = self.high is not None and value > self.high
        if below or above:
            raise ValueError(f"knob {name}={whole!r}: outside its bounds, {self.allowed()}")
        return kind(value)

    def is_met(self, knobs: Mapping[str, Any]) -> bool:
        """Whether the values of other knobs are such that this one has an effect."""
        return all(knobs[name] in wanted if isinstance(wanted, tuple) else knobs[name] == wanted
                   for name, wanted in self.needs.items())

    def enabling(self) -> dict[str, Any]:
        """Values of other knobs with which this one has an effect."""
        return {name: wanted[0] if isinstance(wanted, tuple) else wanted for name, wanted in self.needs.items()}

    def allowed(self) -> str:
        """The hard bounds in words, e.g. "1 to 1000 steps"."""
        low = "-inf" if self.low is None else f"{self.low:g}"
        high = "inf" if self.high is None else f"{self.high:g}"
        return f"{low} to {high} {self.unit}".rstrip()


@dataclass(frozen=True)
class BoundKnob:
    """A Knob together with the argument that it was declared on."""

    name: str
    kind: type  # int, float, bool, str or tuple (of floats)
    default: Any
    knob: Knob

    def check(self, value: Any) -> Any:
        return self.knob.check(self.name, value, self.kind)

    def ends(self) -> tuple[Any, ...]:
        """The extreme values (every choice, both truth values, or the hard bounds) for tests and sweeps."""
        if self.knob.choices is not None:
            return self.knob.choices
        if self.kind is bool:
            return (False, True)
        ends = tuple(end for end in (self.knob.low, self.knob.high) if end is not None)
        return tuple((float(e),) for e in ends) if self.kind is tuple else tuple(self.kind(e) for e in ends)

    @property
    def small(self) -> Any:
        return self.default if self.knob.small is None else self.knob.small
