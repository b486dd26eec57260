"""The record that all searches keep: every candidate evaluated once, in order, with its fitness and what it cost.

A search is deterministic given its seed and asks for candidates through `History.ask`. So resuming needs no saved
state of the search: it starts over, finds its former answers in the file without evaluating anything, and goes on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from workbench.runs import Cancelled


class BudgetSpent(Exception):
    """The next evaluation would exceed the budget; the history so far stands."""


class Score(NamedTuple):
    """What an evaluation found. fitness: lower is better, nan is infinity; evaluations: network rows; info: JSON."""

    fitness: float
    evaluations: int
    flops: float = 0.0
    info: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Entry:
    """One evaluated candidate (JSON values), its fitness (lower is better), its cost in network rows and FLOPs."""

    candidate: Any
    fitness: float
    evaluations: int
    flops: float = 0.0
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return key(self.candidate)


def key(candidate: Any) -> str:
    """The canonical JSON of a candidate: equal for equal values, tuples as lists. Raises TypeError where it is none."""
    return json.dumps(candidate, sort_keys=True, separators=(",", ":"), allow_nan=False)


class History:
    """An append-only list of `Entry`, kept in a file of JSON lines where a path is given.

    search: what the fitness and the order of questions depend on (method, problem digest, seed, ...), as JSON values;
    it is the file's first line. budget: network rows that may be spent in all, entries of the file included.
    stop() is asked before each evaluation, on_entry(entry) is told after it. An evaluation is in the file before its
    answer is used; a last line cut short by a kill is dropped when the file is opened again, and only that.
    note: a sentence by the search where it ended before it had asked for all that was wanted, else "".

    Raises ValueError where the file belongs to another search or is damaged elsewhere than at its end.
    """

    def __init__(self, search: Mapping[str, Any], path: str | os.PathLike[str] | None = None, *,
                 budget: float = math.inf, stop: Callable[[], bool] = lambda: False,
                 on_entry: Callable[[Entry], object] | None = None) -> None:
        self.search: dict[str, Any] = json.loads(key(dict(search)))
        self.budget, self._stop, self._on_entry = budget, stop, on_entry
        self._path = None if path is None else Path(path)
        self._entries: dict[str, Entry] = {}
        self._size = 0
        self.note = ""
        if self._path is not None:
            self._open(self._path)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All candidates evaluated so far, first to last; no candidate twice."""
        return tuple(self._entries.values())

    @property
    def spent(self) -> int:
        """Network rows spent on all entries."""
        return sum(e.evaluations for e in self._entries.values())

    @property
    def flops(self) -> float:
        return sum(e.flops for e in self._entries.values())

    @property
    def best(self) -> Entry:
        """The entry of least fitness, the earliest of equals. Raises ValueError where there is none."""
        if not self._entries:
            raise ValueError("the history is empty")
        return min(self._entries.values(), key=lambda e: e.fitness)

    def best_so_far(self) -> list[float]:
        """The least fitness after each entry: it never rises."""
        return list(accumulate((e.fitness for e in self._entries.values()), min))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, candidate: Any) -> bool:
        return key(candidate) in self._entries

    def ask(self, candidate: Any, evaluate: Callable[[], Score], cost: int) -> Entry:
        """The candidate's entry: remembered, or evaluated now and kept. cost: the rows that evaluate() will spend.

        Raises Cancelled where stop() is true and BudgetSpent where cost does not fit the budget any more, both only for
        a candidate that would have to be evaluated; nothing is recorded then.
        """
        name = key(candidate)
        if name in self._entries:
            return self._entries[name]
        if self._stop():
            raise Cancelled
        if self.spent + cost > self.budget:
            raise BudgetSpent(f"{cost} more evaluations than the {self.spent} spent exceed the budget of {self.budget}")
        score = evaluate()
        fitness = math.inf if math.isnan(score.fitness) else float(score.fitness)
        # through JSON and back, so that a resumed search sees what the first one saw, bit by bit
        entry = _parsed(_line(Entry(candidate, fitness, score.evaluations, float(score.flops), score.info)))
        self._append(_line(entry))
        self._entries[name] = entry
        if self._on_entry is not None:
            self._on_entry(entry)
        return entry

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if lines:
            for i, line in enumerate(lines):
                try:
                    if i:
                        entry = _parsed(line)
                        self._entries[entry.key] = entry
                    elif json.loads(line) != self.search:
                        raise ValueError(f"{path} is the history of another search: {line.decode()[:500]}, "
                                         f"wanted {key(self.search)[:500]}")
                except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}, line {i + 1}: damaged ({error})") from None
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        self._size = len(whole)
        if not lines:
            self._append(key(self.search).encode())

    def _append(self, line: bytes) -> None:
        if self._path is None:
            return
        with open(self._path, "ab", buffering=0) as file:
            if file.seek(0, os.SEEK_END) != self._size:
                raise RuntimeError(f"{self._path} was changed by another process while this search was writing it")
            file.write(line + b"\n")
            os.fsync(file.fileno())
            self._size += len(line) + 1


def read_history(path: str | os.PathLike[str]) -> list[Entry]:
    """The entries of a history's file, first to last, to look at; a last line cut short is left out.

    Raises OSError where there is no file and ValueError where a line is damaged.
    """
    content = Path(path).read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    found = []
    for i, line in enumerate(lines[1:], 2):
        try:
            found.append(_parsed(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {i}: damaged ({error})") from None
    return found


def _line(entry: Entry) -> bytes:
    fields = asdict(entry)
    if math.isinf(entry.fitness):
        fields["fitness"] = repr(entry.fitness)  # JSON knows no infinity
    return key(fields).encode()


def _parsed(line: bytes) -> Entry:
    fields = json.loads(line)
    return Entry(**{**fields, "fitness": float(fields["fitness"])})
