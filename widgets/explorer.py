"""The explorer: sliders on every knob of a family's methods, and live what a problem makes of them.

`Explorer` is the controller: it knows no toolkit and no family. What a family shows is its `View`; `ExplorerWidget` is
the face in JupyterLab, `widgets.app` serves another.
"""

from __future__ import annotations

import base64
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import traitlets

import workbench
from widgets import tell
from widgets.desk import Desk, Pace
from widgets.live import MAX_SAMPLES, bundle, script, told
from widgets.score import Score
from widgets.view import Pane, Stop, View, packed, still, view_of
from workbench import (
    METHODS,
    METRICS,
    Cancelled,
    Cost,
    Inputs,
    Memo,
    Problem,
    Run,
    Step,
    Store,
    Timing,
)
from workbench.knob import BoundKnob
from workbench.rng import Rng
from workbench.runs import JudgeError, compared

HERE = Path(__file__).parent
PARTS = ("core.js", "ticks.js", "plot.js", "link.js", "knobs.js", "head.js", "panes.js", "text.js", "strip.js",
         "shell.js")
STYLES = ("explorer.css", "drafts.css")
MAX_RUNS, MAX_RUN_BYTES = 1000, 64_000_000  # remembered; a store keeps all
SELDOM = 1.0  # seconds between two frontiers while idle work goes on: each holds all points


class Explorer(Desk):
    """Live controller of one problem and several methods. Use `explorer(...)`; as a cell's last line it shows itself.

    inputs: the settings wanted. run: the Run shown (None before the first). runs: all Runs so far.
    view, frontier, frame: what the front end draws (two plain dicts; bytes, see `view.packed`). family: the View that
    says how runs are shown.
    With WORKBENCH_HEADLESS set in the environment there is no worker: `set` runs at once and raises.
    """

    quiet = 0.5  # longer than a slow drag stays on one value
    _latest: ClassVar[Explorer | None] = None  # the one last touched: only it computes ahead

    def __init__(self, problem: Problem, methods: Sequence[str], *, n_samples: int = 16, seed: int = 0,
                 store: Store | None = None, **knobs: Any) -> None:
        if not methods:
            raise ValueError("methods=(): expected at least one name")
        self.problem, self.methods, self.store = problem, tuple(methods), store
        specs = [workbench.get(name) for name in methods]
        for name in knobs:
            if not any(name in spec.knobs for spec in specs):
                specs[0].check({name: None})  # raises, naming near matches
        self._preset = {**problem.preset, **knobs}
        self._knobs: dict[str, dict[str, Any]] = {}  # last knobs of each method
        self._memo = Memo(128_000_000)
        watched = problem.wrapped(self._watched)
        self.shared = watched if problem.sharing == "none" else watched.wrapped(self._memo.wrap)
        self._remembered = problem.wrapped(self._memo.recall) if problem.sharing == "batch" else None
        self._runs: dict[str, Run] = {}
        self._sizes: dict[str, int] = {}  # bytes of runs
        self.timings: dict[str, Timing] = {}
        self._drawable: dict[str, list[Pane]] = {}  # the panes of runs
        self._score: Score | None = None
        self._frontier_n = n_samples
        self._pinned: Run | None = None
        self._open("explorer", {"frontier": {}, "frame": b"", "pinned": b"", "detail": {}})
        self._revision, self._frontier_is_old, self._frontier_at = 0, False, -math.inf
        self.run: Run | None = None
        self.family: View = view_of(problem.family)(self)
        self.inputs = self._start = self._inputs(self.methods[0], seed, n_samples, {})
        self._publish("spec", tell.spec(problem, self.methods, self.family, {**self._preset, **self.inputs.knobs}))
        self._publish_view()
        self._wake()

    # ---------------------------------------------------------------- what a notebook uses

    @property
    def runs(self) -> list[Run]:
        """All Runs so far, also those made while idle; "drift" is among their quality once the reference is known."""
        with self._change:
            return list(self._runs.values())

    @property
    def frontier(self) -> dict[str, Any]:
        return self.published["frontier"]

    @property
    def frame(self) -> bytes:
        return self.published["frame"]

    def set(self, *, method: str | None = None, seed: int | None = None, n_samples: int | None = None,
            **knobs: Any) -> None:
        """Ask for other settings; what is not named stays. Raises what `workbench.inputs` raises."""
        self._set({"method": method, "seed": seed, "n_samples": n_samples}, knobs)

    def wait(self, timeout: float = 60, idle: bool = False) -> None:
        """Until the settings are shown; idle=True: and idle work is done. Raises what the worker caught."""
        if self.is_headless:
            while idle and (task := self._task()):
                task(lambda: False)
            if self._frontier_is_old:
                self._publish_frontier()
            return
        self._await(lambda: self._is_shown and (not idle or self._is_idle), timeout, self.inputs)

    def text_frame(self, panes: list[Pane]) -> str:
        """Panes as text, for what is told once."""
        return _text(packed({"key": "", "title": ""}, panes))

    @property
    def change(self) -> Any:
        """The panel's lock, for views that keep something of their own."""
        return self._change

    def publish(self, name: str, value: Any) -> None:
        """Tell the front end something of the view's own."""
        self._publish(name, value)

    def pin(self) -> None:
        """Keep the shown run beside those that follow."""
        with self._change:
            self._pinned = self.run
        self._publish("pinned", b"" if self._pinned is None else self._frame(self._pinned))
        self._publish_view()

    def unpin(self) -> None:
        """Let the pinned run go."""
        with self._change:
            self._pinned = None
        self._publish("pinned", b"")
        self._publish_view()

    @property
    def link(self) -> str:
        """A short text that holds the settings of the shown run; `load` takes it."""
        return (self.run.inputs if self.run else self.inputs).permalink

    def load(self, link: str) -> None:
        """The settings of a link. Raises ValueError where it is none, or belongs to another problem or method."""
        given = Inputs.from_permalink(link)
        if given.digest != self.problem.digest:
            raise ValueError(f"this link is of the problem {given.problem!r} (digest {given.digest[:12]}), here is "
                             f"{self.problem.name!r} (digest {self.problem.digest[:12]})")
        if given.method not in self.methods:
            raise ValueError(f"this link uses the method {given.method!r}; this explorer has {', '.join(self.methods)}")
        wanted = workbench.inputs(given.method, self.problem, given.seed, given.n_samples, **given.knobs)
        self._move(self._bounded(wanted))
        if wanted.code != given.code:
            self._notice = f"the link was made with code {given.code}, here is {wanted.code}: numbers may differ"
            self._publish_view()

    def code(self) -> str:
        """Python that makes the shown run: without the workbench where the problem knows how, else with it."""
        return tell.script_of(self.problem, self.run.inputs if self.run else self.inputs)

    def csv(self) -> str:
        """All runs as comma-separated values: settings, cost per sample, quality with standard error and n."""
        return tell.table(self.runs, self.timings, list(self.problem.counted))

    def score(self, n_samples: int | None = None) -> None:
        """Grade the settings with more samples, while idle; `stop_score` ends it early and keeps what there is."""
        with self._change:
            i = self.inputs
            n = self.family.scores[0] if n_samples is None else n_samples
            self._score = Score(self.problem, workbench.inputs(i.method, self.problem, i.seed, n, **i.knobs))
            self._wake(quiet=False)
        self._publish_view()

    def stop_score(self) -> None:
        """End a long score; the samples made so far become a Run."""
        with self._change:
            if self._score is not None:
                self._score.is_stopped = True
                self._wake(quiet=False)

    # ---------------------------------------------------------------- the front end's side

    def _actions(self, intent: Mapping[str, Any]) -> Mapping[str, Callable[[], object]]:
        return {
            "pin": self.pin, "unpin": self.unpin,
            "stop_score": self.stop_score,
            "set": lambda: self._set(intent.get("state", {}), dict(intent.get("knobs", {})), intent.get("gesture")),
            "load": lambda: self.load(intent["link"]),
            "score": lambda: self.score(int(intent["n"])),
            "frontier_n": lambda: self._show_n(int(intent["n"])),
            "select": lambda: self.family.select(int(intent["item"])),
            "recall": lambda: self._move(self._runs[intent["key"]].inputs),
            "code": lambda: self._reply(intent, text=self.code()),
            "link": lambda: self._reply(intent, text=self.link),
            "csv": lambda: self._reply(intent, text=self.csv()),
            "peek": lambda: self._reply(intent, frame=_text(self._frame(self._runs[intent["key"]]))),
        }

    def _publish_frontier(self, stop: Stop | None = None) -> None:
        with self._change:
            self._frontier_is_old, self._frontier_at = False, time.monotonic()
            self._outbox.put("frontier", self._frontier())

    # ---------------------------------------------------------------- settings

    def _inputs(self, method: str, seed: int, n_samples: int, changes: Mapping[str, Any]) -> Inputs:
        """Complete settings of a method: presets, its last knobs, those it shares with the method shown, changes.

        What is carried over must be a value that this method's knob takes: methods mean different things by one name.
        """
        spec = workbench.get(method)
        if method not in self.methods:
            raise ValueError(f"method={method!r}: this explorer has {', '.join(self.methods)}")
        current = getattr(self, "inputs", None)
        layers = (self._preset, self._knobs.get(method, {}), current.knobs if current else {})
        known = {k: v for layer in layers for k, v in layer.items() if k in spec.knobs and _fits(spec.knobs[k], v)}
        known.update(changes)
        for name, bound in spec.knobs.items():
            others = {k: known.get(k, spec.knobs[k].default) for k in bound.knob.needs}
            if name not in changes and not bound.knob.is_met(others):
                known.pop(name, None)  # without effect now: back to its default
        return self._bounded(workbench.inputs(spec, self.problem, seed, n_samples, **known))

    def _bounded(self, wanted: Inputs) -> Inputs:
        """The settings, where a panel may be asked for so many samples. Raises ValueError otherwise."""
        most = max(MAX_SAMPLES, self._start.n_samples) if hasattr(self, "_start") else wanted.n_samples
        if wanted.n_samples > most:
            raise ValueError(f"n_samples={wanted.n_samples}: expected at most {most} in a panel, `workbench.run` takes "
                             f"more")
        return wanted

    def _set(self, state: Mapping[str, Any], knobs: Mapping[str, Any], gesture: Any = None) -> None:
        with self._change:
            now = self.inputs
            method, seed, n_samples = (now_value if state.get(name) is None else state[name] for name, now_value in
                                       (("method", now.method), ("seed", now.seed), ("n_samples", now.n_samples)))
            wanted = self._inputs(method, seed, n_samples, knobs)
        self._move(wanted, gesture)

    @property
    def _settings(self) -> Inputs:
        return self.inputs

    def _move(self, wanted: Inputs, gesture: Any = None) -> None:
        self.family.check(wanted)  # raises for what the method or the problem refuses
        super()._move(wanted, gesture)

    def _moved(self, wanted: Inputs) -> None:
        if not self.is_headless:
            self._glimpse(wanted)

    def _go(self, wanted: Inputs) -> None:
        if wanted == self.inputs and self._error is None:
            return
        if wanted.n_samples != self.inputs.n_samples:
            self._frontier_n = wanted.n_samples
        self.inputs = wanted
        self._knobs[wanted.method] = dict(wanted.knobs)
        self._wake()

    def _show_n(self, n: int) -> None:
        known = sorted({r.inputs.n_samples for r in self.runs} | {self._frontier_n})
        if n not in known:
            raise ValueError(f"n={n}: expected {', '.join(map(str, known))}, the numbers of samples of the runs so far")
        self._frontier_n = n
        self._publish_frontier()

    # ---------------------------------------------------------------- the worker

    @property
    def _is_shown(self) -> bool:
        return self.run is not None and self.run.inputs == self.inputs

    def _wake(self, quiet: bool = True) -> None:
        Explorer._latest = self
        super()._wake(quiet)

    def _at_once(self) -> None:
        self._show(lambda: False)
        self._publish_frontier()

    def _release(self) -> None:
        self._memo.clear()
        self._drawable.clear()
        self.family.releases()

    def _asked(self) -> Callable[[Stop], object] | None:
        return None if self._is_shown else self._show

    def _next(self) -> Callable[[Stop], object] | None:
        task = super()._next()
        is_due = task is None or time.monotonic() - self._frontier_at > SELDOM
        return self._publish_frontier if self._frontier_is_old and is_due else task

    def _show(self, overtaken: Stop) -> None:
        """Run the settings wanted, with previews on the way, and show the result."""
        wanted = self.inputs
        run = self._known(wanted)
        if run is None:
            try:
                run = self._run_with_previews(wanted, overtaken)
            except JudgeError as error:  # the pictures are there: shown without scores, and the failure is said
                self._publish("frame", self._frame(error.run))
                with self._change:
                    self.run = error.run
                raise
        frame = self._frame(run)
        with self._change:
            if self.inputs == wanted:  # also where something woke the worker without asking for other settings
                self._outbox.put("frame", frame)
            self.run = self._keep(run)
            self._status = ""
            self._frontier_is_old = True  # drawn anew once the hand rests
            self._publish_view()
            self._change.notify_all()  # those who wait see all of it

    def _run_with_previews(self, wanted: Inputs, overtaken: Stop) -> Run:
        pace, self._fresh = Pace(), False

        def on_step(step: Step, cost: Cost) -> None:
            is_last = step.info["i"] + 1 == self.family.n_steps(wanted)  # the finished run is drawn by `_show`
            # steps answered from memory take no time: `_glimpse` has shown how far they reach
            if self._fresh and not is_last and not overtaken():
                pace.draw(lambda: self._preview(wanted, step))
            self._fresh = False

        return self._made(wanted, lambda: self._is_closed or overtaken(), on_step)

    def _made(self, wanted: Inputs, stop: Stop, on_step: Callable[[Step, Cost], object] = lambda step, cost: None
              ) -> Run:
        """The run of these settings; the family's view sees each step."""
        def walked(step: Step, cost: Cost) -> None:
            self.family.saw(wanted, step, cost)
            on_step(step, cost)

        self.family.begins(wanted)
        run = workbench.run(wanted.method, self.shared, wanted.seed, wanted.n_samples, stop=stop, on_step=walked,
                            **wanted.knobs)
        self.family.ended(wanted)
        return run

    def _glimpse(self, wanted: Inputs) -> None:
        """Show at once what is remembered of the settings wanted: a finished run, or the last step known.

        In the thread that asks, so that it need not wait for the step that the worker is in.
        """
        run = self._runs.get(wanted.key)
        if run is not None and self.family.is_drawable(run):
            self._publish("frame", self._frame(run))
            return
        steps = []
        if self._remembered is not None:
            with suppress(LookupError):  # as far as memory reaches: extend keeps the steps before
                steps.extend(METHODS[wanted.method].function(self._remembered, Rng(wanted.seed, wanted.n_samples),
                                                             **wanted.knobs))
        # to draw may take long while the worker computes: rather an earlier step at once
        kept = [step for step in steps if self.family.is_quick(step)]
        if steps:
            self._preview(wanted, (kept or steps)[-1])

    def _preview(self, wanted: Inputs, step: Step) -> None:
        """Show a step, unless the other thread was quicker and has shown where it leads."""
        panes = self.family.early(wanted, step)
        if panes is None:
            return
        frame = self._frame(wanted, panes, step.info["i"] + 1)
        with self._change:
            if self.inputs == wanted and not self._is_shown:
                self._outbox.put("frame", frame)

    def _task(self) -> Callable[[Stop], None] | None:
        """The next useful thing while nobody asks: a long score, the rivals, the time, neighbouring settings."""
        if self.run is None:
            return None
        if self._score is not None:
            return self._score_batch
        shown = self.run.inputs
        for name, status, work in self.family.ahead(self.run):
            if name not in self._failed:
                return lambda stop: self._apart(name, status, partial(work, stop))
        reference = self._rival("reference", shown)
        for name, rival in (("reference", reference), ("baseline", self._rival("baseline", shown))):
            if rival is not None and self._is_missing(rival):
                return lambda stop: self._fill(rival, stop, f"computing the {name}")
        for given in (shown, reference):
            if given is not None and given.key not in self.timings and _timing(given) not in self._failed:
                return lambda stop: self._time(given, stop)
        if shown.n_samples < self.family.scored:
            for given in (shown, reference):
                more = given and replace(given, n_samples=self.family.scored)
                if more is not None and self._is_missing(more):
                    return lambda stop: self._fill(more, stop, f"grading with {more.n_samples} samples")
        if Explorer._latest is self:
            missing = [near for near in self._neighbours(shown) if self._is_missing(near)]
            if missing:
                return lambda stop: self._fill(missing[0], stop, f"filling in {len(missing)} neighbouring settings")
        return None

    def _is_missing(self, wanted: Inputs) -> bool:
        return wanted.key not in self._runs and wanted.key not in self._failed

    def _fill(self, wanted: Inputs, stop: Stop, status: str) -> None:
        """Make a run that nobody asked for, or find it."""
        self._apart(wanted.key, status, lambda: self.obtain(wanted, stop))

    def obtain(self, wanted: Inputs, stop: Stop) -> Run:
        """A run that is known or made now, and remembered. Raises Cancelled once stop()."""
        run = self._known(wanted) or self._made(wanted, stop)
        with self._change:
            run = self._keep(run)
            self._frontier_is_old = True
        if wanted == self._rival("reference", self.inputs):
            if self.family.shows_reference and self.run is not None and self._is_shown:
                self._drawable.pop(self.run.inputs.key, None)
                self._publish("frame", self._frame(self.run))
            self._publish_view()
        return run

    def _time(self, given: Inputs, stop: Stop) -> None:
        def work() -> None:
            self.timings[given.key] = workbench.timed(given.method, self.problem, given.seed, given.n_samples,
                                                       stop=stop, **given.knobs)
            self._frontier_is_old = True
            self._publish_view()

        self._apart(_timing(given), "measuring time", work)

    def _score_batch(self, stop: Stop) -> None:
        """The next batch of the long score, or its end. One that fails is given up: it was asked for, so it raises."""
        score = self._score
        try:
            if score.is_done:
                self._finish(score.run())
            else:
                score.go_on(self.family.batch, stop)
                self._tell("scoring")
        except Cancelled:
            raise
        except Exception:
            self._score = None
            raise

    def _finish(self, run: Run | None) -> None:
        with self._change:
            self._score = None
            if run is not None:
                self._keep(run)
                self._frontier_n = run.inputs.n_samples
        self._publish_frontier()
        self._tell("")

    def _known(self, wanted: Inputs) -> Run | None:
        """A run that need not be made: remembered or stored. What is to be shown must be drawable too."""
        run = self._runs.get(wanted.key)
        if run is None and self.store is not None:
            run = self.store.get(wanted)
        return run if run is None or wanted != self.inputs or self.family.is_drawable(run) else None

    def _remember(self, run: Run) -> None:
        """Put a run into the store and among those known, of which the oldest go where there are too many."""
        key = run.inputs.key
        if self.store is not None and key not in self._runs:
            try:
                if self.store.get(run.inputs) is None:
                    self.store.put(run)
            except OSError as error:  # a full, read-only or deleted folder: the run is shown all the same
                self._notice = f"not kept in the store: {error}"
        self._runs.setdefault(key, run)
        self._sizes.setdefault(key, run.nbytes)
        self._forget(key)

    def _keep(self, run: Run) -> Run:
        """Remember a run; give it, or all runs whose reference it is, their distance from the reference."""
        key = run.inputs.key
        self._remember(run)
        is_reference = self._rival("reference", run.inputs) == run.inputs
        for other in list(self._runs.values()) if is_reference else [self._runs[key]]:
            reference = self.reference(other.inputs)
            if reference is not None and self.family.has_drift and "drift" not in other.quality:
                graded = compared(other, reference, self.family.drawn_problem)
                self._runs[other.inputs.key] = graded
                if self.run is not None and self.run.inputs == other.inputs:
                    self.run = graded
        return self._runs[key]

    def _forget(self, newest: str) -> None:
        """Bound what is remembered: the oldest runs go, but for what is shown, its rivals, pinned, or just made."""
        rivals = (self._rival(name, self.inputs) for name in ("reference", "baseline"))
        safe = {newest, *(r.inputs.key for r in (self.run, self._pinned) if r is not None),
                *(rival.key for rival in rivals if rival is not None)}
        held = sum(self._sizes.values())
        for key in list(self._runs):
            if len(self._runs) <= MAX_RUNS and held <= MAX_RUN_BYTES:
                return
            if key not in safe:
                held -= self._sizes[key]
                del self._runs[key]
                for known in (self._sizes, self._drawable, self.timings):
                    known.pop(key, None)
                self.family.forgets(key)

    def _rival(self, name: str, like: Inputs) -> Inputs | None:
        """The reference or the baseline for settings; None where the problem's cannot be, which is said once."""
        try:
            method, knobs = getattr(self.problem, name)
            known = workbench.get(method).knobs
            shared = {k: like.knobs[k] for k in self.family.carried if k in like.knobs and k in known}
            return workbench.inputs(method, self.problem, like.seed, like.n_samples, **{**knobs, **shared})
        except (KeyError, TypeError, ValueError) as error:
            if name not in self._failed:
                self._failed.add(name)
                self._notice = f"the problem's {name}: {told(error)}"
            return None

    def reference(self, like: Inputs) -> Run | None:
        """The reference for settings, where it is known."""
        rival = self._rival("reference", like)
        return None if rival is None else self._runs.get(rival.key)

    def _neighbours(self, now: Inputs) -> Iterator[Inputs]:
        """Settings that a hand may reach next, nearest first."""
        for change in self.family.neighbours(now):
            with suppress(ValueError):  # what the method refuses is no neighbour
                near = workbench.inputs(now.method, self.problem, now.seed, now.n_samples, **{**now.knobs, **change})
                self.family.check(near)
                yield near

    # ---------------------------------------------------------------- what is drawn

    def _panes(self, run: Run) -> list[Pane]:
        key = run.inputs.key
        if key not in self._drawable:
            self._drawable[key] = self.family.panes(run)
        return self._drawable[key]

    def _frame(self, of: Run | Inputs, panes: list[Pane] | None = None, step: int | None = None) -> bytes:
        """Title and panes in one message, of a run or of one of its steps."""
        given = of.inputs if isinstance(of, Run) else of
        total = self.family.n_steps(given)
        self._revision += 1
        made = packed({"revision": self._revision, "key": given.key, "title": self.family.title(given),
                       "step": total if step is None else step, "of": total, "is_done": step is None},
                      self._panes(of) if isinstance(of, Run) else panes or [])
        self.family.shown(given, is_done=step is None)
        return made

    def _card(self, run: Run | None) -> dict[str, Any] | None:
        return run and tell.card(run, list(self._runs.values()), self.family, self.timings.get(run.inputs.key),
                                 self.reference(run.inputs))

    def _view(self) -> dict[str, Any]:
        """All that changes, but for pictures and the frontier's points."""
        i, score = self.inputs, self._score
        reference = self.reference(self.run.inputs) if self.run else None
        return {
            **self._said, "is_stale": not self._is_shown,
            "state": {"method": i.method, "knobs": dict(i.knobs), "seed": i.seed, "n_samples": i.n_samples},
            "strip": self.family.trajectory(i),
            "shown": self._card(self.run),
            "pinned": self._card(self._pinned),
            "reference": self._card(reference),
            "score": score and score.told(self.family.title(score.inputs)),
        }

    def _frontier(self) -> dict[str, Any]:
        like = replace(self.run.inputs, n_samples=self._frontier_n) if self.run else None
        return tell.frontier(list(self._runs.values()), self._frontier_n, self.family,
                             lambda name: like and self._rival(name, like))

    @cached_property
    def widget(self) -> ExplorerWidget:
        """The one widget of this explorer; it may be displayed any number of times."""
        return ExplorerWidget(self)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return bundle(self, **kwargs)

    def _still(self) -> dict[str, Any]:
        """What is shown, as plain text and, once there is a run, as PNG."""
        lines = [f"Explorer on {self.problem.name}: {self.family.title(self.inputs)}"]
        run = self.run
        if run is None:
            return {"text/plain": lines[0]}
        lines += [f"{METRICS[name].label}: {q}" for name, q in run.quality.items() if name in METRICS]
        lines += [f"{bar['name']}: {sum(bar['parts']):.4g}" for bar in self.family.costs(run, None)]
        picture = still(self.family.title(run.inputs), self._panes(run))
        return {"text/plain": "\n".join(lines)} | ({"image/png": picture} if picture else {})


class ExplorerWidget(anywidget.AnyWidget):
    """An Explorer in JupyterLab. Wishes come as messages and results go as traits: each is set by one side only."""

    _esm = script(*PARTS)
    _css = "\n".join((HERE / name).read_text() for name in STYLES)
    spec = traitlets.Dict().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)
    frontier = traitlets.Dict().tag(sync=True)
    reply = traitlets.Dict().tag(sync=True)
    detail = traitlets.Dict().tag(sync=True)
    frame = traitlets.Bytes().tag(sync=True)
    pinned = traitlets.Bytes().tag(sync=True)

    def __init__(self, explorer: Explorer) -> None:
        super().__init__()
        self.on_msg(lambda widget, intent, buffers: explorer.receive(intent))
        explorer.subscribe(lambda name, value: setattr(self, name, value))


def explorer(problem: Problem, methods: Sequence[str] | None = None, *, n_samples: int | None = None, seed: int = 0,
             store: Store | str | os.PathLike[str] | None = None, **knobs: Any) -> Explorer:
    """Explore methods on a problem: drag knobs, see what is made, its cost and its quality live.

    methods: by default those that the family's view names, or all of the family that the problem is for. n_samples: by
    default what the view says. knobs: starting values, for the methods that have them. store: where runs are looked up
    and kept, or its folder. Raises TypeError for no problem, and what `workbench.inputs` raises for settings that
    cannot be.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem={problem!r:.100}: expected a problem, such as workbench.problems.glyphs.glyphs()")
    if store is not None and not isinstance(store, Store):
        store = Store(store)
    view = view_of(problem.family)
    if methods is None:
        methods = problem.methods or view.methods or [m.name for m in METHODS.values() if m.family == problem.family]
    return Explorer(problem, methods, n_samples=view.n_samples if n_samples is None else n_samples, seed=seed,
                    store=store, **knobs)


def _timing(given: Inputs) -> str:
    """What a measurement of these settings that failed is known by; the settings' run may be sound."""
    return f"timing {given.key}"


def _fits(knob: BoundKnob, value: Any) -> bool:
    try:
        knob.check(value)
    except (TypeError, ValueError):
        return False
    return True


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
