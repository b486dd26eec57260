"""What a notebook's last cell says of its prose: each claim with both its numbers, and what this size cannot show."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

_RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}


def within(**bounds: tuple[Any, float, float]) -> None:
    """Check a notebook's parameters, `name=(value, low, high)`; a list is checked entry by entry and may not be empty.

    Raises ValueError that names the parameter, the value received and what is allowed.
    """
    for name, (value, low, high) in bounds.items():
        entries = list(value) if isinstance(value, (list, tuple)) else [value]
        for entry in entries:
            if not isinstance(entry, int | float) or isinstance(entry, bool) or not low <= entry <= high:
                raise ValueError(f"{name}={value!r}: expected {'numbers' if entries is not value else 'a number'} "
                                 f"from {low:g} to {high:g}")
        if not entries:
            raise ValueError(f"{name}={value!r}: expected at least one number from {low:g} to {high:g}")


class Checks:
    """Collects a notebook's claims: call it once for each, and `report()` last.

    check("S alone is worse than L", 5.1, ">", 1.2) compares two numbers, or two arrays entry by entry.
    needs: what this size must have for the claim to be checked at all, {"3 seeds": n_seeds >= 3}; where it has not,
    the claim is skipped by name.
    """

    def __init__(self) -> None:
        self.held: list[str] = []
        self.skipped: list[str] = []
        self.failed: list[str] = []

    def __call__(self, claim: str, left: Any, relation: str = "==", right: Any = True, *,
                 needs: dict[str, bool] | None = None) -> None:
        """Check one claim. Raises ValueError for an unknown relation."""
        if relation not in _RELATIONS:
            raise ValueError(f"relation={relation!r}: expected one of {', '.join(_RELATIONS)}")
        if missing := [what for what, is_given in (needs or {}).items() if not is_given]:
            self.skipped.append(f"{claim}: needs {' and '.join(missing)}")
        elif np.size(left) == 0 or np.size(right) == 0:
            self.skipped.append(f"{claim}: nothing to compare at this size")
        else:
            holds = bool(np.all(_RELATIONS[relation](_plain(left), _plain(right))))
            (self.held if holds else self.failed).append(f"{claim}: {_text(left)} {relation} {_text(right)}")

    def report(self) -> None:
        """Print what held and what was skipped. Raises AssertionError that lists every claim that failed."""
        print(f"{len(self.held)} claims hold", *(f"skipped: {line}" for line in self.skipped), sep="\n")
        if self.failed:
            raise AssertionError("\n".join(f"does not hold: {line}" for line in self.failed))


def _plain(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, (list, tuple)) else value


def _text(value: Any) -> str:
    """A number to four digits; of many the first few."""
    if np.ndim(value):
        entries = np.ravel(np.asarray(value)).tolist()
        return f"[{', '.join(map(_text, entries[:6]))}{', ...' if len(entries) > 6 else ''}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
