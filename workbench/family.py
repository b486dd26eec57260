"""Families: what each tells the core once. The core itself knows none by name.

A family is one problem file, which registers it, a folder of methods named like it, and a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Family:
    """What a family's methods and problems have in common.

    name: that of its folder under methods/. length: the knob that says how far a run goes, in exactly or at most so
    many steps. shape(problem, knobs) -> the shape of one sample's answer, or shapes by name.
    question: what its users ask, in one sentence. sample: the word for one sample. spends: what methods' cost formulas
    count, "evaluations" or a counted resource of the problems; axis: what figures show cost in, "flops" or such a
    resource. sizes: the names that formulas may use beside knobs, which `problem.sizes` gives.
    problems: small ones for the contract of methods, as (module:function, keyword arguments), loaded when asked for:
    between them every knob has an effect, and the first takes every value of every knob. told(problem, states, infos):
    raises AssertionError where the steps of a run, of two samples, do not tell what the family's views read.
    """

    name: str
    length: str
    shape: Callable[[Any, Mapping[str, Any]], tuple[int, ...] | Mapping[str, tuple[int, ...]]]
    problems: Sequence[tuple[str, Mapping[str, Any]]]
    told: Callable[[Any, Sequence[Any], Sequence[Mapping[str, Any]]], None]
    question: str = ""
    sample: str = "sample"
    spends: str = "evaluations"
    axis: str = "flops"
    sizes: tuple[str, ...] = ()

    def makers(self) -> list[Callable[[], Any]]:
        """What makes `problems`. Raises ImportError or AttributeError where one is not there."""
        made: list[Callable[[], Any]] = []
        for where, given in self.problems:
            module, _, function = where.partition(":")
            made.append(partial(getattr(import_module(module), function), **given))
        return made


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known. Registering it again, as a notebook's cell does, replaces it.

    Raises TypeError for a name or a length that is no identifier.
    """
    for field in ("name", "length"):
        if not str(getattr(family, field)).isidentifier():
            raise TypeError(f"family {field}={getattr(family, field)!r}: expected an identifier")
    FAMILIES[family.name] = family
    return family
