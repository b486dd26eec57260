"""The history of a search: asked once, kept at once, resumed as it was."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest

from workbench.runs import Cancelled
from workbench.search._history import BudgetSpent, Entry, History, Score, key

SEARCH = {"search": "test", "seed": 0}


def walk(history, n, seed=0):
    """A search of its own: random pairs, with repeats, fitness by formula. Returns the candidates evaluated."""
    source, evaluated = random.Random(seed), []
    for _ in range(n):
        candidate = (source.randrange(5), source.randrange(5))

        def evaluate(candidate=candidate):
            evaluated.append(candidate)
            return Score(math.sin(candidate[0] * 0.7 + candidate[1]), 10, 1e9 / 3, {"step": [0.1]})

        history.ask(candidate, evaluate, 10)
    return evaluated


def test_memo_hits_are_never_evaluated_again():
    history = History(SEARCH)
    evaluated = walk(history, 60)
    assert len(evaluated) == len(set(evaluated)) == len(history) < 60
    assert [tuple(e.candidate) for e in history.entries] == evaluated
    assert history.spent == 10 * len(evaluated) and history.flops == pytest.approx(len(evaluated) * 1e9 / 3)
    assert (9, 9) not in history and evaluated[0] in history and list(evaluated[0]) in history


def test_best_so_far_never_rises():
    history = History(SEARCH)
    walk(history, 60)
    best = history.best_so_far()
    assert best == sorted(best, reverse=True) and len(best) == len(history)
    assert history.best.fitness == best[-1] == min(e.fitness for e in history.entries)
    with pytest.raises(ValueError, match="empty"):
        _ = History(SEARCH).best


def test_a_resumed_search_evaluates_only_what_is_new(tmp_path):
    whole, path = History(SEARCH), tmp_path / "a" / "history.jsonl"
    walk(whole, 60)
    first = walk(History(SEARCH, path), 20)
    resumed = History(SEARCH, path)
    second = walk(resumed, 60)
    assert not set(first) & set(second)
    assert resumed.entries == whole.entries == History(SEARCH, path).entries


def at_every_cut(folder, read):
    """read(file) after each prefix of a history's bytes: (bytes, number of whole lines after the first, result)."""
    path = folder / "history.jsonl"
    walk(History(SEARCH, path), 4)
    content = path.read_bytes()
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        yield max(content[:end].count(b"\n") - 1, 0), read(path)


def test_a_line_cut_anywhere_is_dropped_and_only_that_line(tmp_path):
    for n_whole, history in at_every_cut(tmp_path, lambda path: History(SEARCH, path)):
        assert len(history) == n_whole
        walk(history, 4)
        assert len(History(SEARCH, tmp_path / "history.jsonl")) == 4


def test_the_cut_check_fails_for_a_reader_that_trusts_every_line(tmp_path):
    def trusting(path):
        return [json.loads(line) for line in path.read_text().splitlines()[1:]]

    with pytest.raises(json.JSONDecodeError):
        list(at_every_cut(tmp_path, trusting))


KILLED = textwrap.dedent("""
    import os, signal, sys
    from workbench.search._history import History, Score, _line
    history = History({"search": "test", "seed": 0}, sys.argv[1])
    for i in range(9):
        if i == 5:
            with open(sys.argv[1], "ab", buffering=0) as file:
                file.write(b'{"candidate":[5],"fit')
                os.kill(os.getpid(), signal.SIGKILL)
        history.ask([i], lambda: Score(i / 7, 3), 3)
""")


def test_a_killed_search_goes_on_where_it_was(tmp_path, root):
    path = tmp_path / "history.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=root, env={**os.environ}, timeout=120)
    assert done.returncode == -signal.SIGKILL and path.read_bytes().endswith(b'"fit')
    history = History(SEARCH, path)
    assert [e.candidate for e in history.entries] == [[i] for i in range(5)]
    asked = []
    for i in range(9):
        history.ask([i], lambda i=i: asked.append(i) or Score(i / 7, 3), 3)
    assert asked == [5, 6, 7, 8]
    assert [e.fitness for e in History(SEARCH, path).entries] == [i / 7 for i in range(9)]


def test_budget_and_stop_leave_the_history_as_it_is():
    told, is_over = [], []
    history = History(SEARCH, budget=45, on_entry=told.append, stop=lambda: bool(is_over))
    with pytest.raises(BudgetSpent, match="40 spent"):
        walk(history, 60)
    assert history.spent == 40 and len(told) == 4 and tuple(told) == history.entries
    is_over.append(True)
    assert history.ask(told[0].candidate, lambda: pytest.fail("evaluated"), 10) == told[0]
    with pytest.raises(Cancelled):
        history.ask([9], lambda: pytest.fail("evaluated"), 1)
    assert len(history) == 4


def test_a_failed_evaluation_is_not_recorded(tmp_path):
    history = History(SEARCH, tmp_path / "h")
    with pytest.raises(ZeroDivisionError):
        history.ask([1], lambda: Score(1 / 0, 1), 1)
    assert len(history) == len(History(SEARCH, tmp_path / "h")) == 0


def test_what_is_not_finite_survives(tmp_path):
    history = History(SEARCH, tmp_path / "h")
    for i, value in enumerate((math.nan, math.inf, -math.inf, 0.1 + 0.2)):
        history.ask([i], lambda value=value: Score(value, 1), 1)
    assert History(SEARCH, tmp_path / "h").entries == history.entries
    assert [e.fitness for e in history.entries] == [math.inf, math.inf, -math.inf, 0.1 + 0.2]


def test_wrong_files_are_named(tmp_path):
    path = tmp_path / "h"
    walk(History(SEARCH, path), 4)
    with pytest.raises(ValueError, match="another search"):
        History({**SEARCH, "seed": 1}, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{nonsense\n", *lines[2:]]))
    with pytest.raises(ValueError, match="line 2: damaged"):
        History(SEARCH, path)


def test_two_writers_do_not_mix(tmp_path):
    one, other = History(SEARCH, tmp_path / "h"), History(SEARCH, tmp_path / "h")
    one.ask([1], lambda: Score(1.0, 1), 1)
    with pytest.raises(RuntimeError, match="another process"):
        other.ask([2], lambda: Score(2.0, 1), 1)
    assert [e.candidate for e in History(SEARCH, tmp_path / "h").entries] == [[1]]


def test_keys_are_equal_for_equal_values():
    assert key({"b": (1, 2), "a": 0.5}) == key({"a": 0.5, "b": [1, 2]}) == Entry({"a": 0.5, "b": [1, 2]}, 0.0, 1).key
    with pytest.raises(ValueError):
        key([math.nan])
