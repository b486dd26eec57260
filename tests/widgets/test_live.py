"""The base of live panels: nothing is published under a lock, wishes never raise, panels sleep and are let go."""

from __future__ import annotations

import faulthandler
import gc
import random
import string
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from explorer_toy import Toy

import workbench as wb
from widgets import acceptance_explorer, explorer, tree_explorer
from widgets.editor import schedule_editor
from widgets.live import MAX_AWAKE, MAX_SAMPLES, Guard, Outbox
from workbench.problems.decoding import markov
from workbench.problems.mixtures import two_modes
from workbench.runs import JudgeError

PANELS: dict[str, Callable[[], Any]] = {
    "explorer": lambda: explorer(two_modes(), n_samples=4, n_steps=3),
    "drafts": lambda: explorer(markov(), n_samples=1, n_tokens=8),
    "editor": lambda: schedule_editor(two_modes(), n_steps=3, n_samples=4),
    "acceptance": lambda: acceptance_explorer(),
    "trees": lambda: tree_explorer(),
}


@pytest.mark.parametrize("name", PANELS)
def test_nothing_is_published_while_a_lock_is_held(name):
    """Each listener takes the panel's lock in a thread of its own: it would wait for ever for one that is held."""
    panel, late = PANELS[name](), []

    def listener(what: str, value: Any) -> None:
        def take() -> None:
            with panel._change:
                pass

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        thread.join(20)
        if thread.is_alive():
            late.append(what)

    panel.subscribe(listener)
    for intent in some_wishes(name):
        panel.receive(intent)
    panel.wait()
    assert late == []


def some_wishes(name: str) -> list[dict[str, Any]]:
    if name in ("acceptance", "trees"):
        return [{"knob": "n_drafts" if name == "acceptance" else "n_nodes", "index": k} for k in (1, 2)]
    kinds = [{"kind": "set", "knobs": {"n_steps" if name == "explorer" else "n_tokens": 4}}, {"kind": "undo"},
             {"kind": "pin"}] if name != "editor" else [
        {"kind": "move", "step": 1, "log_snr": 0.0}, {"kind": "compare", "fields": {"seed": 3}}, {"kind": "undo"}]
    return [{"id": str(i), **kind} for i, kind in enumerate(kinds)]


def holding(outbox: Outbox, lock: threading.RLock) -> None:
    """Broken twin: delivers with the lock held."""
    with lock:
        outbox.put("x", 1)
        outbox.send()


def test_the_rule_is_kept_by_the_guard_and_not_by_a_bare_lock():
    outbox, seen = Outbox({}), []
    guard, bare = Guard(outbox), threading.RLock()

    def is_free(lock: Any) -> bool:
        found = []

        def take() -> None:
            if lock.acquire(timeout=0.2):
                found.append(True)
                lock.release()

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        return bool(found)

    outbox.subscribe(lambda name, value: seen.append((is_free(guard._condition), is_free(bare))))
    with guard, guard:
        outbox.put("x", 1)
    holding(outbox, bare)
    assert seen == [(True, True), (True, False)]


@pytest.mark.timeout(120)
def test_thousands_of_moves_from_two_threads_do_not_hang():
    """Moves publish in the caller's thread while the worker publishes in its own."""
    faulthandler.dump_traceback_later(100, exit=False)
    editor, failed = schedule_editor(Toy().problem, n_steps=3, n_samples=1), []
    editor.subscribe(lambda name, value: None)

    def drag(first: int) -> None:
        try:
            for i in range(first, first + 600):
                editor.compare(seed=i)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=drag, args=(k * 1000,), daemon=True) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    faulthandler.cancel_dump_traceback_later()
    assert not any(thread.is_alive() for thread in threads) and not failed
    editor.wait()


def junk(source: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can hold, often of the wrong kind or far too large."""
    simple: list[Callable[[], Any]] = [
        lambda: None, lambda: source.choice([True, False]), lambda: source.choice([0, -1, 1, 10**9, 10**400]),
        lambda: source.choice([0.5, -1e308, float("nan"), float("inf")]),
        lambda: "".join(source.choices(string.printable, k=9)),
        lambda: source.choice(["{position.__class__}", "n_steps", "ddim", "0", "", "x" * 2000])]
    nested: list[Callable[[], Any]] = [
        lambda: [junk(source, depth + 1) for _ in range(source.randrange(4))],
        lambda: {str(junk(source, 9)): junk(source, depth + 1) for _ in range(source.randrange(4))}]
    return source.choice(simple + (nested if depth < 3 else []))()


KINDS = ("undo", "redo", "reset", "pin", "unpin", "stop_score", "set", "load", "score", "frontier_n", "recall", "code",
         "link", "csv", "peek", "select", "move", "decide", "add", "remove", "compare", "use", "use_best", "json", "?")
FIELDS = ("state", "knobs", "gesture", "link", "n", "key", "block", "step", "log_snr", "fields", "n_steps", "text",
          "knob", "index", "point", "x", "y")


@pytest.mark.parametrize("name", PANELS)
def test_wishes_never_raise_and_the_panel_lives_on(name):
    panel, source = PANELS[name](), random.Random(1)
    for i in range(200):
        given: Any = {"id": junk(source, 9), "kind": source.choice(KINDS)} if source.random() < 0.9 else junk(source)
        if isinstance(given, dict):
            given |= {field: junk(source) for field in source.sample(FIELDS, 4)}
        if isinstance(given, dict) and given.get("kind") == "score":
            given["kind"] = "code"  # long work is asked for below, by bounds
        panel.receive(given)
        assert i >= 0
    for intent in some_wishes(name):
        panel.receive(intent)
    panel.wait()


@pytest.mark.parametrize(("name", "own"), [("explorer", 4), ("drafts", 1)])
def test_a_link_cannot_take_the_memory(name, own):
    panel = PANELS[name]()
    for n in (10**9, MAX_SAMPLES + 1):
        link = replace(panel.inputs, n_samples=n).permalink
        panel.receive({"id": "1", "kind": "load", "link": link})
        assert f"n_samples={n}" in panel.view["notice"] and panel.inputs.n_samples == own
    panel.receive({"id": "2", "kind": "set", "state": {"n_samples": MAX_SAMPLES + 1}, "knobs": {}})
    assert "expected at most" in panel.view["notice"]


def test_who_waits_comes_after_those_who_listen():
    """Even where another thread is in the middle of telling them; a listener itself does not wait."""
    box, told, begun, go_on = Outbox({}), [], threading.Event(), threading.Event()

    def listener(name: str, value: Any) -> None:
        begun.set()
        go_on.wait(10)
        box.settle(60)
        told.append(value)

    box.subscribe(listener)
    for value in (1, 2):
        box.put("x", value)
    sender = threading.Thread(target=box.send)
    sender.start()
    assert begun.wait(10)
    box.send()  # the other delivers
    box.settle(0.01)
    assert not told
    threading.Timer(0.1, go_on.set).start()
    box.settle(60)
    assert told == [1, 2]
    sender.join()


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_that_was_waited_for_has_told_its_listeners(name):
    panel, settled = PANELS[name](), []
    panel._outbox.settle = lambda timeout: settled.append(timeout)
    panel.wait()
    assert len(settled) == 1
    panel.sleep()


def test_what_is_done_wakes_those_who_wait_and_not_the_worker():
    """A worker that its own news woke would take turn after turn, and a panel at rest a whole core."""
    guard, woken = Guard(Outbox({})), threading.Event()

    def resting(rung: int) -> None:
        guard.rest(rung, 60)
        woken.set()

    worker = threading.Thread(target=resting, args=(guard.rung,), daemon=True)
    worker.start()
    for _ in range(20):
        with guard:
            guard.notify_all()
        assert not woken.wait(0.01)
    with guard:
        guard.ring()
    assert woken.wait(60)
    guard.rest(guard.rung - 1, 60)  # rung before it rests: at once


@pytest.mark.parametrize("name", ["explorer", "editor"])
def test_a_panel_at_rest_takes_no_turns(name, monkeypatch):
    panel, turns = PANELS[name](), []
    panel.wait()
    turn = type(panel)._turn

    def counted(self: Any) -> float:
        turns.append(rest := turn(self))
        return rest

    monkeypatch.setattr(type(panel), "_turn", counted)
    while not turns or turns[-1] < 5:  # until there is nothing left to do
        assert not threading.Event().wait(0.05)
    turns.clear()
    assert not threading.Event().wait(1.0) and len(turns) <= 1


def test_old_panels_sleep_and_those_that_nobody_holds_are_let_go():
    panels = [PANELS["explorer"]() for _ in range(MAX_AWAKE + 3)]
    for panel in panels:
        panel.wait()
    assert [p._is_closed for p in panels] == [True] * 3 + [False] * MAX_AWAKE
    panels[0].set(n_steps=5)  # a touch wakes it
    panels[0].wait()
    assert panels[0].run.knobs["n_steps"] == 5 and panels[3]._is_closed
    threads = [p._worker for p in panels if not p._is_closed]
    refs = [weakref.ref(p) for p in panels]
    for panel in panels:
        panel.sleep()
    for thread in threads:
        thread.join(10)
    del panels, panel
    gc.collect()
    assert not any(ref() for ref in refs[1:])


def test_a_store_that_cannot_be_written_shows_the_run_and_says_so(tmp_path):
    store = wb.Store(tmp_path / "runs")
    panel = explorer(two_modes(), n_samples=4, n_steps=3, store=store)
    panel.wait()
    for path in store.folder.glob("*"):
        path.unlink()
    store.folder.rmdir()
    panel.set(n_steps=5)
    panel.wait()
    assert panel.run.knobs["n_steps"] == 5
    assert "not kept in the store" in panel.view["notice"] and str(store.folder) in panel.view["notice"]


@pytest.mark.parametrize("judge", [lambda answer, labels: 1 / 0, lambda answer, labels: {"drift": 0.5}])
def test_a_judge_that_fails_is_said_and_the_panel_lives(judge):
    panel = explorer(replace(two_modes(), judge=judge), n_samples=4, n_steps=3)
    with pytest.raises(JudgeError, match="judge of 'two_modes'"):
        panel.wait()
    assert "judge of 'two_modes'" in panel.view["error"] and panel.frame  # the picture is shown
    panel.receive({"id": "1", "kind": "set", "knobs": {"n_steps": 4}})
    with pytest.raises(ValueError, match="judge"):
        panel.wait()
    assert panel.view["ack"] == "1"


def test_entry_points_name_what_they_got():
    for call, words in ((lambda: explorer(None), "problem=None"), (lambda: explorer(two_modes(), store=3), "folder=3")):
        with pytest.raises(TypeError, match=words):
            call()
