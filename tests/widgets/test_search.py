"""The search panel without a browser: what it shows while a search runs, is stopped, goes on, fails."""

from __future__ import annotations

import base64
import json
import threading
import time
from functools import partial

import pytest

from widgets.search import HEADLESS_CANDIDATES, curve, search_panel, table
from workbench.plan import Plan
from workbench.problems.mixtures import eight_modes
from workbench.search import History, Score, read_history
from workbench.search.autodiffusion import autodiffusion
from workbench.search.s3 import Space, plan_of, search

SPACE = Space(eight_modes().schedule, 5, end=eight_modes().schedule.cleanest)


class Slow:
    """A fitness by formula that can be held up; counts the plans it is asked for."""

    rows = 2

    def __init__(self, fails_after: int | None = None) -> None:
        self.key = {"fitness": "slow"}
        self.n, self.fails_after = 0, fails_after
        self.open = threading.Event()
        self.open.set()

    def __call__(self, plans):
        self.open.wait(20)
        self.n += len(plans)
        if self.fails_after is not None and self.n > self.fails_after:
            raise RuntimeError("a network <fell> over")
        return [1 + sum(d.expansion.order for d in plan.decisions) / 10 + plan.times[1] for plan in plans]


def s3(fitness, n=80, **settings):
    return partial(search, fitness, SPACE, n_candidates=n, batch=10, **settings)


def view(panel):
    return panel.published["view"]


def state(panel):
    return view(panel)["state"]


def buttons(panel):
    return {b["press"]: (b["text"], not b["disabled"]) for b in view(panel)["buttons"]}


def pane(panel, name):
    return next(p for p in view(panel)["panes"] if p["name"] == name)


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_a_search_runs_to_its_end_and_shows_its_best():
    panel = search_panel(s3(Slow()), 80, rivals={"best <known>": 1.9}, label="error", title="S3 & more")
    assert state(panel) == "not started" and panel.best is None and buttons(panel)["start"] == ("Start", True)
    panel.start()
    panel.wait(30)
    alone = search(Slow(), SPACE, n_candidates=80, batch=10)
    assert tuple(panel.entries) == alone.entries and panel.best == alone.best and panel.is_finished
    assert state(panel) == "finished" and buttons(panel) == {"start": ("Finished", False), "stop": ("Stop", False)}
    assert view(panel)["share"] == 1 and f"best error {alone.best.fitness:.4g}" in view(panel)["status"]
    drawn = pane(panel, "search-curve")
    assert drawn["n"] == 80 and [line["label"] for line in drawn["lines"]] == ["best so far", "best <known>"]
    assert len(pane(panel, "search-best")["rows"]) == len(plan_of(alone.best).decisions)


def test_a_search_that_ran_out_of_plans_says_so():
    class Order(Slow):
        def __call__(self, plans):
            return [float(plan.decisions[0].prediction == "eps") for plan in plans]

    space = Space(SPACE.schedule, 1, end=SPACE.end)
    panel = search_panel(partial(search, Order(), space, n_candidates=9), 9)
    panel.start()
    panel.wait(30)
    assert state(panel) == "finished" and len(panel.entries) == 2 and "space is exhausted: 2" in view(panel)["status"]


def test_stop_keeps_what_is_known_and_resume_asks_nothing_twice():
    fitness = Slow()
    fitness.open.clear()
    panel = search_panel(s3(fitness), 80)
    panel.start()
    until(lambda: state(panel) == "running")
    panel.start()  # nothing happens
    fitness.open.set()
    until(lambda: len(panel.entries) >= 28)
    fitness.open.clear()
    panel.stop()
    fitness.open.set()
    panel.wait(20)
    kept = list(panel.entries)
    assert 28 <= len(kept) < 80 and state(panel) == "stopped" and buttons(panel)["start"] == ("Resume", True)
    assert not panel.is_finished and panel.error is None
    panel.start()
    panel.wait(30)
    assert panel.entries[: len(kept)] == kept and panel.is_finished
    assert tuple(panel.entries) == search(Slow(), SPACE, n_candidates=80, batch=10).entries
    assert fitness.n - 80 <= 24 + 10  # at most the batch that was cut is evaluated again


def test_a_search_of_a_former_session_is_shown_and_goes_on(tmp_path):
    path = tmp_path / "history.jsonl"
    former = search(Slow(), SPACE, n_candidates=44, batch=10, path=path)
    with open(path, "ab") as file:
        file.write(b'{"candidate": {"cut')
    fitness = Slow()
    panel = search_panel(s3(fitness), 80, path=path)
    assert tuple(panel.entries) == former.entries and state(panel) == "stopped" and view(panel)["share"] == 44 / 80
    panel.start()
    panel.wait(30)
    assert panel.is_finished and len(panel.entries) == 80 and fitness.n == 36
    assert read_history(path) == panel.entries


def test_an_error_is_shown_kept_and_survived():
    fitness = Slow(fails_after=50)
    panel = search_panel(s3(fitness), 80)
    panel.start()
    with pytest.raises(RuntimeError, match="a network <fell> over"):
        panel.wait(30)
    assert isinstance(panel.error, RuntimeError) and state(panel) == "failed" and len(panel.entries) == 44
    assert view(panel)["error"] == "RuntimeError: a network <fell> over"
    fitness.fails_after = None
    panel.start()
    panel.wait(30)
    assert panel.error is None and view(panel)["error"] == "" and len(panel.entries) == 80


def test_a_file_of_another_search_is_said_in_the_panel(tmp_path):
    search(Slow(), SPACE, n_candidates=40, batch=10, seed=1, path=tmp_path / "h.jsonl")
    panel = search_panel(s3(Slow()), 80, path=tmp_path / "h.jsonl")
    panel.start()
    with pytest.raises(ValueError, match="history of another search"):
        panel.wait(30)
    assert "history of another search" in view(panel)["error"] and not panel.is_finished


def test_headless_evaluates_a_few_at_once_and_raises(monkeypatch):
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    panel = search_panel(s3(Slow()), 80)
    assert len(panel.entries) == HEADLESS_CANDIDATES and not panel.is_running and state(panel) == "stopped"
    with pytest.raises(RuntimeError, match="fell"):
        search_panel(s3(Slow(fails_after=0)), 80)


def test_a_search_for_timesteps_fits_as_well():
    panel = search_panel(partial(autodiffusion, eight_modes(), 3, n_samples=50, population=4, mutation=2, crossover=1,
                                 select=2, epochs=2, confirm_seeds=0), 8, label="W1")
    panel.start()
    panel.wait(60)
    assert panel.error is None and panel.is_finished and len(panel.entries) == 8
    assert "skipped blocks" in pane(panel, "search-best")["head"] and len(pane(panel, "search-best")["rows"]) == 3


def test_the_curve_draws_what_is_there_and_says_it():
    assert curve([], 10, {}, "error") == [] and curve([float("inf")], 10, {}, "error") == []
    [drawn] = curve([float("inf"), 3.0, -1.0, 2.0], 10, {"known": 2.5}, "error")
    assert drawn.told["said"] == "best error so far -1 after 4 candidates; known 2.5"
    assert "NaN" not in json.dumps(drawn.told) and "Infinity" not in json.dumps(drawn.told)
    best, known = drawn.told["lines"]
    assert (best["x"], best["y"]) == ([2, 3, 4], [3.0, -1.0, -1.0]) and known["y"] == [2.5, 2.5]
    assert [mark["x"] for mark in drawn.told["marks"]] == [1, 2, 3, 4] and drawn.told["marks"][0]["y"] == 5.0
    assert drawn.told["better"] == "down" and not drawn.told["log_y"]
    assert "edge" in drawn.told["caption"]  # the first one is worse than the axis shows
    assert not curve([3.0, 2.0], 10, {"known": 2.5}, "error")[0].told["caption"]
    assert curve([2.0], 1, {}, "error")[0].told["log_y"]


def test_the_table_tells_each_step():
    plan = SPACE.seeds()[-1]
    drawn = table(json.loads(plan.to_json())).told
    assert Plan.from_json(plan.to_json()) == plan and len(drawn["rows"]) == len(plan.decisions)
    assert any("pseudo" in row for row in drawn["rows"]) and drawn["rows"][0][0] == 1
    assert [row[2] for row in table({"timesteps": [3.0, 1.0], "skips": [["a<b"], []]}).told["rows"]] == ["a<b", "none"]


def test_a_cells_output_holds_a_still_for_hosts_without_the_front_end(monkeypatch):
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    shown = search_panel(s3(Slow()), 80)._repr_mimebundle_()
    assert base64.b64decode(shown["image/png"]).startswith(b"\x89PNG") and "5 of 80 candidates" in shown["text/plain"]
    assert " at 0x" not in shown["text/plain"]


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="n_candidates=0"):
        search_panel(s3(Slow()), 0)


def test_a_damaged_history_is_not_shown(tmp_path):
    path = tmp_path / "h.jsonl"
    History({"search": "t"}, path).ask(1, lambda: Score(1.0, 1), 1)
    path.write_bytes(path.read_bytes() + b"no json\n")
    with pytest.raises(ValueError, match="line 3: damaged"):
        read_history(path)
