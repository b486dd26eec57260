"""The explorer: sliders on a method's knobs, and live what they do to the samples, their cost and their quality.

`Explorer` is the controller and knows no toolkit: it keeps settings, history and runs, and a worker thread that shows
the newest settings and does useful things while nobody asks. `explorer.js` draws what it publishes.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import torch
import traitlets
from torch import Tensor

import workbench
from widgets.live import MAX_SAMPLES, Live, script, told, wish
from workbench import METHODS, METRICS, Cancelled, Cost, Inputs, Memo, Run, Step, Store, Timing
from workbench.cost import Meter, Network
from workbench.frontier import points
from workbench.knob import BoundKnob
from workbench.methods.denoising.t_stitch import full_fractions, progress, step_counts
from workbench.problems.decoding import Decoding
from workbench.problems.denoising import Denoising, grid
from workbench.quality import drift
from workbench.rng import Rng
from workbench.run import JudgeError, environment
from workbench.sweep import address

HERE = Path(__file__).parent
PAST = 200  # settings that can be undone
MAX_RUNS, MAX_RUN_BYTES = 1000, 64_000_000  # remembered; a store keeps all
QUIET = 0.5  # seconds without a wish before idle work starts: longer than a slow drag stays on one value
SELDOM = 1.0  # seconds between two frontiers while idle work goes on: each holds all points
FRAME = 1 / 30  # seconds between two previews of one run
BATCH = 25  # samples per batch of a long score
SAME = 5  # steps after which steps that depend on the data have parted
SCORES = (500, 2000)  # numbers of samples that the panel offers to score
BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)  # step counts filled in when idle
TOLERANCES = (0.1, 0.03, 0.01, 0.003, 0.001)  # in their place where steps are as long as the error allows

Stop = Callable[[], bool]


@dataclass
class _Score:
    """A long score under way: answers of the first samples, in batches; it outlives interruptions."""

    inputs: Inputs
    parts: list[Tensor] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    seconds: float = 0.0
    is_stopped: bool = False

    @property
    def n_done(self) -> int:
        return sum(len(part) for part in self.parts)


class Explorer(Live):
    """Live controller of one problem and several methods. Use `explorer(...)`; as a cell's last line it shows itself.

    inputs: the settings wanted. run: the Run shown (None before the first). runs: all Runs so far.
    view, frontier, frame: what the front end draws (two plain dicts; bytes, see `_frame`).
    With WORKBENCH_HEADLESS set in the environment there is no worker: `set` runs at once and raises.
    """

    _latest: ClassVar[Explorer | None] = None  # the one last touched: only it computes ahead

    def __init__(self, problem: Denoising, methods: Sequence[str], *, n_samples: int = 16, seed: int = 0,
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
        self._fresh = False  # whether a network was evaluated since the last look
        self._shared = problem.wrapped(self._watched).wrapped(self._memo.wrap)
        self._remembered = problem.wrapped(self._memo.recall)
        self._pictures = Memo(32_000_000)
        self._images = self._pictures.wrap("images", problem.images) if problem.images else None
        self._runs: dict[str, Run] = {}
        self._timings: dict[str, Timing] = {}
        self._pixels: dict[str, Tensor] = {}
        self._levels: dict[Any, tuple[list[tuple[float, int]], bool]] = {}  # by method and knobs, see `_walk`
        self._reached: dict[str, list[float]] = {}  # log-SNR after each step of runs whose steps depend on the data
        self._failed: set[str] = set()
        self._glimpsed: set[str] = set()  # trunks whose pictures are kept
        self._past: list[Inputs] = []
        self._future: list[Inputs] = []
        self._gesture: Any = None
        self._score: _Score | None = None
        self._frontier_n = n_samples
        self._pinned: Run | None = None
        self._status, self._notice, self._ack = "", "", ""
        self._error: BaseException | None = None
        self._open("explorer", {"view": {}, "frontier": {}, "frame": b"", "pinned": b"", "reply": {}})
        self._revision, self._frontier_is_old, self._frontier_at = 0, False, -math.inf
        self._touched, self._is_idle = 0.0, False
        self.run: Run | None = None
        self.inputs = self._start = self._inputs(self.methods[0], seed, n_samples, {})
        self._publish("spec", self._spec())
        self._publish_view()
        self._wake()

    # ---------------------------------------------------------------- what a notebook uses

    @property
    def runs(self) -> list[Run]:
        """All Runs so far, also those made while idle; "drift" is among their quality once the reference is known."""
        with self._change:
            return list(self._runs.values())

    @property
    def view(self) -> dict[str, Any]:
        return self.published["view"]

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
        with self._change:
            ready = self._change.wait_for(
                lambda: self._error or (self._is_shown and (not idle or self._is_idle)), timeout)
            if self._error is not None:
                raise self._error
            if not ready:
                raise TimeoutError(f"not shown after {timeout} s: {self.inputs}")

    def undo(self) -> None:
        """Back to the settings before; nothing happens where there are none."""
        self._travel(self._past, self._future)

    def redo(self) -> None:
        """Forward again after `undo`."""
        self._travel(self._future, self._past)

    def reset(self) -> None:
        """The settings that the explorer was opened with; `undo` brings the others back."""
        self._move(self._start)

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
        i = self.run.inputs if self.run else self.inputs
        script = self.problem.code(i) if self.problem.code else None
        if script:
            return script
        knobs = "".join(f",\n    {name}={value!r}" for name, value in i.knobs.items())
        return (f"import workbench\n{self.problem.source}\n"
                f"run = workbench.run(\n    {i.method!r}, problem, seed={i.seed}, n_samples={i.n_samples}{knobs},\n)\n"
                "print(run.title, run.cost, dict(run.quality), sep=\"\\n\")\n")

    def csv(self) -> str:
        """All runs as comma-separated values: settings, cost per sample, quality with standard error and n."""
        runs = self.runs
        knobs = sorted({name for run in runs for name in run.knobs})
        metrics = sorted({name for run in runs for name in run.quality})
        out = io.StringIO()
        rows = csv.writer(out)
        rows.writerow(["key", "problem", "method", "seed", "n_samples", *knobs,
                       "evaluations_per_sample", "flops_per_sample", "seconds",
                       *(f"{m}{part}" for m in metrics for part in ("", "_stderr", "_n"))])
        for run in runs:
            i, timing = run.inputs, self._timings.get(run.inputs.key)
            quality = [run.quality.get(m) for m in metrics]
            rows.writerow([i.key, i.problem, i.method, i.seed, i.n_samples, *(i.knobs.get(name, "") for name in knobs),
                           run.cost.total_evaluations / i.n_samples, run.cost.total_flops / i.n_samples,
                           timing.seconds if timing else "",
                           *(cell for q in quality for cell in ((q.value, q.stderr, q.n) if q else ("", "", "")))])
        return out.getvalue()

    def score(self, n_samples: int = 500) -> None:
        """Grade the settings with more samples, while idle; `stop_score` ends it early and keeps what there is."""
        with self._change:
            i = self.inputs
            self._score = _Score(workbench.inputs(i.method, self.problem, i.seed, n_samples, **i.knobs))
            self._wake(quiet=False)
        self._publish_view()

    def stop_score(self) -> None:
        """End a long score; the samples made so far become a Run."""
        with self._change:
            if self._score is not None:
                self._score.is_stopped = True
                self._wake(quiet=False)

    # ---------------------------------------------------------------- the front end's side

    def receive(self, intent: Mapping[str, Any]) -> None:
        """One wish of the front end, a dict with "id" and "kind". What cannot be is shown as a notice, never raised."""
        intent = wish(intent)
        self._ack, self._notice = intent["id"], ""
        actions: dict[str, Callable[[], object]] = {
            "undo": self.undo, "redo": self.redo, "reset": self.reset, "pin": self.pin, "unpin": self.unpin,
            "stop_score": self.stop_score,
            "set": lambda: self._set(intent.get("state", {}), dict(intent.get("knobs", {})), intent.get("gesture")),
            "load": lambda: self.load(intent["link"]),
            "score": lambda: self.score(int(intent["n"])),
            "frontier_n": lambda: self._show_n(int(intent["n"])),
            "recall": lambda: self._move(self._runs[intent["key"]].inputs),
            "code": lambda: self._reply(intent, text=self.code()),
            "link": lambda: self._reply(intent, text=self.link),
            "csv": lambda: self._reply(intent, text=self.csv()),
            "peek": lambda: self._reply(intent, frame=_text(self._frame(self._runs[intent["key"]]))),
        }
        try:
            actions[intent["kind"]]()
        except Exception as error:  # whatever it was asked for: the sliders live on
            self._notice = told(error)
        if self._notice or self.view.get("ack") != self._ack:
            self._publish_view()

    def _reply(self, intent: Mapping[str, Any], **content: Any) -> None:
        self._publish("reply", {"id": intent["id"], "kind": intent["kind"], **content})

    def _publish_view(self) -> None:
        with self._change:  # put inside, so that an older view never follows a newer one; sent once this is let go
            self._outbox.put("view", self._view())

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

    def _move(self, wanted: Inputs, gesture: Any = None) -> None:
        """Make `wanted` the settings. Moves of one gesture (one drag) are one step of the history."""
        self._strip(wanted)  # raises for what the method or the problem refuses
        with self._change:
            if wanted != self.inputs:
                if gesture is None or gesture != self._gesture:
                    self._past.append(self.inputs)
                    del self._past[:-PAST]
                self._future.clear()
            self._gesture = gesture
            self._go(wanted)
        if not self.is_headless:
            self._glimpse(wanted)
        self._publish_view()

    def _travel(self, source: list[Inputs], target: list[Inputs]) -> None:
        with self._change:
            if source:
                target.append(self.inputs)
                self._gesture = None
                self._go(source.pop())
        self._publish_view()

    def _go(self, wanted: Inputs) -> None:
        if wanted == self.inputs and self._error is None:
            return
        if wanted.n_samples != self.inputs.n_samples:
            self._frontier_n = wanted.n_samples
        self.inputs = wanted
        self._knobs[wanted.method] = dict(wanted.knobs)
        self._wake()

    def _show_n(self, n: int) -> None:
        self._frontier_n = n
        self._publish_frontier()

    # ---------------------------------------------------------------- the worker

    @property
    def _is_shown(self) -> bool:
        return self.run is not None and self.run.inputs == self.inputs

    def _wake(self, quiet: bool = True) -> None:
        """Overtake whatever is under way. quiet: idle work waits until the hand rests."""
        with self._change:
            self._generation += 1
            self._error, self._is_idle, self._status = None, False, ""
            self._touched = time.monotonic() if quiet else 0.0
            Explorer._latest = self
            self._change.ring()
        if self.is_headless:
            self._show(lambda: False)
            self._publish_frontier()
        self._rouse()

    def _release(self) -> None:
        for memo in (self._memo, self._pictures):
            memo.clear()
        self._pixels.clear()
        self._glimpsed.clear()

    def _turn(self) -> float:
        with self._change:
            generation = self._generation
            task = self._show if not self._is_shown and self._error is None else None
            if task is None:
                rest = self._touched + QUIET - time.monotonic()
                if rest > 0:
                    return rest
                try:
                    task = self._task() if self._error is None else None
                except Exception as error:  # of what nobody asked for: said, and idle work ends here
                    self._idle_fault(error)
                if self._frontier_is_old and (task is None or time.monotonic() - self._frontier_at > SELDOM):
                    task = self._publish_frontier
                if task is None:
                    if not self._is_idle:
                        self._is_idle = True
                        self._status = ""
                        self._publish_view()
                    self._change.notify_all()
                    return 5.0
        try:
            task(lambda: self._generation != generation)
        except Cancelled:
            pass
        except Exception as error:  # kept for wait() and shown; the sliders live on
            with self._change:
                if generation == self._generation:
                    self._error = error
                self._publish_view()
                self._change.notify_all()
        return 0.0

    def _idle_fault(self, error: Exception) -> None:
        """Something computed ahead failed: no error of the user's. It is named in the notice."""
        self._notice = f"computing ahead: {told(error)}"
        self._publish_view()

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
        drawn, interval = -math.inf, FRAME
        total = self._n_steps(wanted)
        self._fresh = False

        def on_step(step: Step, cost: Cost) -> None:
            nonlocal drawn, interval
            is_last = step.info["i"] + 1 == total  # the finished run is drawn by `_show`
            # steps answered from memory take no time: `_glimpse` has shown how far they reach
            if self._fresh and not is_last and not overtaken() and time.monotonic() - drawn >= interval:
                before = time.monotonic()
                self._preview(wanted, step)
                first, drawn = math.isinf(drawn), time.monotonic()
                # previews take a fifth of the time at most; the first one may load libraries, and says nothing
                interval = FRAME if first else max(FRAME, 4 * (drawn - before))
            self._fresh = False

        return self._made(wanted, lambda: self._is_closed or overtaken(), on_step)

    def _made(self, wanted: Inputs, stop: Stop, on_step: Callable[[Step, Cost], object] = lambda step, cost: None
              ) -> Run:
        """The run of these settings; where its steps depend on the data, how far each of them came is kept."""
        reached: list[float] = []

        def walked(step: Step, cost: Cost) -> None:
            reached.append(step.info["there"].log_snr)
            on_step(step, cost)

        run = workbench.run(wanted.method, self._shared, wanted.seed, wanted.n_samples, stop=stop, on_step=walked,
                            **wanted.knobs)
        if METHODS[wanted.method].is_bound:
            self._reached[wanted.key] = reached
        return run

    def _glimpse(self, wanted: Inputs) -> None:
        """Show at once what is remembered of the settings wanted: a finished run, or the last data estimate known.

        In the thread that asks, so that it need not wait for the step that the worker is in.
        """
        run = self._runs.get(wanted.key)
        if run is not None:
            self._publish("frame", self._frame(run))
            return
        steps = []
        with suppress(LookupError):  # as far as memory reaches: extend keeps the steps before
            steps.extend(METHODS[wanted.method].function(self._remembered, Rng(wanted.seed, wanted.n_samples),
                                                         **wanted.knobs))
        # to decode takes long while the worker computes: rather an earlier picture at once
        kept = [s for s in steps if self._pictures.get(address("images", (s.info["x0"],))) is not None]
        if steps:
            self._preview(wanted, (kept or steps)[-1])

    def _preview(self, wanted: Inputs, step: Step) -> None:
        """Show the data estimate of a step, unless the other thread was quicker and has shown where it leads."""
        frame = self._frame(wanted, self._picture(step.info["x0"]), step.info["i"] + 1)
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
        trunk = self._trunk(shown)
        if trunk is not None and trunk.key not in self._glimpsed and trunk.key not in self._failed:
            return lambda stop: self._prepare(trunk, stop)
        for name in ("reference", "baseline"):
            rival = self._rival(name, shown)
            if rival.key not in self._runs and rival.key not in self._failed:
                return lambda stop: self._fill(rival, stop, f"computing the {name}")
        if shown.key not in self._timings:
            return self._time
        if Explorer._latest is self:
            missing = [i for i in self._neighbours(shown) if i.key not in self._runs and i.key not in self._failed]
            if missing:
                return lambda stop: self._fill(missing[0], stop, f"filling in {len(missing)} neighbouring settings")
        return None

    def _trunk(self, now: Inputs) -> Inputs | None:
        """The trajectory that every other switch point starts on: the first model's alone."""
        if "fractions" not in now.knobs or len(self.problem.models) < 2:
            return None
        first = now.knobs.get("order") != "costly_first"
        return workbench.inputs(now.method, self.problem, now.seed, now.n_samples,
                                **{**now.knobs, "fractions": (float(first),)})

    def _prepare(self, trunk: Inputs, stop: Stop) -> None:
        """Walk along the trunk and keep its pictures, so that a glimpse of any switch point is at hand."""
        self._fill(trunk, stop, "preparing previews")
        for step in METHODS[trunk.method].function(self._shared, Rng(trunk.seed, trunk.n_samples), **trunk.knobs):
            self._picture(step.info["x0"])
            if stop():
                raise Cancelled
        self._glimpsed.add(trunk.key)

    def _fill(self, wanted: Inputs, stop: Stop, status: str) -> None:
        self._tell(status)
        try:
            run = self._known(wanted) or self._made(wanted, stop)
        except Cancelled:
            raise
        except Exception as error:  # of a setting that nobody asked for: the others go on
            self._failed.add(wanted.key)
            self._idle_fault(error)
            return
        with self._change:
            self._keep(run)
            self._frontier_is_old = True
        if wanted == self._rival("reference", self.inputs):
            self._publish_view()

    def _time(self, stop: Stop) -> None:
        self._tell("measuring time")
        i = self.run.inputs
        self._timings[i.key] = workbench.timed(i.method, self.problem, i.seed, i.n_samples, stop=stop, **i.knobs)
        self._publish_view()

    def _score_batch(self, stop: Stop) -> None:
        """The next batch of a long score, or its end. A batch cut short is drawn again; batching changes no sample."""
        score = self._score
        given, first = score.inputs, score.n_done
        if score.is_stopped or first == given.n_samples:
            self._finish(score)
            return
        begin, size = time.monotonic(), min(BATCH, given.n_samples - first)
        labels = self.problem.labels(first + size)
        part = replace(self.problem, labels=lambda n: None if labels is None else labels[first : first + n])
        meter = Meter(part.prices)
        method, rng = METHODS[given.method].function, Rng(given.seed, size, first)
        answer = None
        for step in method(part.wrapped(meter.wrap), rng, **given.knobs):
            answer = step.state
            if stop():
                raise Cancelled
        score.parts.append(answer)
        score.costs.append(meter.cost)
        score.seconds += time.monotonic() - begin
        self._tell("scoring")

    def _finish(self, score: _Score) -> None:
        run = None
        if score.parts:
            answer = torch.cat(score.parts)
            given = replace(score.inputs, n_samples=len(answer))
            cost = Cost(*({name: sum(getattr(c, part)[name] for c in score.costs) for name in self.problem.flops}
                          for part in ("evaluations", "calls", "flops")))
            quality = self.problem.judge(answer, self.problem.labels(len(answer)))
            run = Run(given, cost, quality, environment(answer), answer)
        with self._change:
            self._score = None
            if run is not None:
                self._keep(run)
                self._frontier_n = len(run.answer)
        self._publish_frontier()
        self._tell("")

    def _tell(self, status: str) -> None:
        self._status = status
        self._publish_view()

    def _watched(self, name: str, network: Network) -> Network:
        def watched(*rows: Tensor | None) -> Tensor:
            self._fresh = True
            return network(*rows)

        return watched

    def _known(self, wanted: Inputs) -> Run | None:
        run = self._runs.get(wanted.key)
        return self.store.get(wanted) if run is None and self.store is not None else run

    def _keep(self, run: Run) -> Run:
        """Remember a run; give it, or all runs whose reference it is, their distance from the reference."""
        key = run.inputs.key
        if self.store is not None and key not in self._runs:
            try:
                if self.store.get(run.inputs) is None:
                    self.store.put(run)
            except OSError as error:  # a full, read-only or deleted folder: the run is shown all the same
                self._notice = f"not kept in the store: {error}"
        self._runs.setdefault(key, run)
        self._forget(key)
        is_reference = self._rival("reference", run.inputs).key == key
        for other in list(self._runs.values()) if is_reference else [self._runs[key]]:
            reference = self._runs.get(self._rival("reference", other.inputs).key)
            if reference is not None and "drift" not in other.quality:
                scale = 255 if self.problem.images else 1
                far = drift(self._drawn(other).double() / scale, self._drawn(reference).double() / scale)
                graded = replace(other, quality={**other.quality, "drift": far})
                self._runs[other.inputs.key] = graded
                if self.run is not None and self.run.inputs == other.inputs:
                    self.run = graded
        return self._runs[key]

    def _forget(self, newest: str) -> None:
        """Bound what is remembered: the oldest runs go, but for what is shown, pinned, a rival, or just made."""
        safe = {newest, *(r.inputs.key for r in (self.run, self._pinned) if r is not None)}
        held = sum(r.answer.nbytes for r in self._runs.values())
        for key in list(self._runs):
            if len(self._runs) <= MAX_RUNS and held <= MAX_RUN_BYTES:
                return
            is_rival = any(self._rival(name, self._runs[key].inputs).key == key for name in ("reference", "baseline"))
            if key not in safe and not is_rival:
                held -= self._runs.pop(key).answer.nbytes
                for known in (self._pixels, self._timings, self._reached):
                    known.pop(key, None)

    def _rival(self, name: str, like: Inputs) -> Inputs:
        """The reference or the baseline for settings: same noise, labels and guidance."""
        method, knobs = getattr(self.problem, name)
        shared = {k: like.knobs[k] for k in ("guidance",) if k in like.knobs and k in METHODS[method].knobs}
        return workbench.inputs(method, self.problem, like.seed, like.n_samples, **{**knobs, **shared})

    def _neighbours(self, now: Inputs) -> Iterator[Inputs]:
        """Settings that a hand may reach next, nearest first: other switch points, or other numbers of steps."""
        spec = METHODS[now.method]
        accuracy = next((name for name in ("tolerance", "rtol") if name in spec.knobs
                         and spec.knobs[name].knob.is_met(now.knobs)), None)
        changes: list[dict[str, Any]]
        if "fractions" in now.knobs and len(self.problem.models) > 1:
            reached = [0.0, *self._strip(now)["reached"]]
            shares = full_fractions(now.knobs["fractions"], len(self.problem.models))
            ends = [sum(shares[: k + 1]) for k in range(len(shares) - 1)]
            moved = [[*ends[:k], r, *ends[k + 1 :]] for k in range(len(ends)) for r in reached]
            moved = [e for e in moved if e == sorted(e)]
            moved.sort(key=lambda e: sum(abs(a - b) for a, b in zip(e, ends, strict=True)))
            changes = [{"fractions": _differences(e)} for e in moved]
        else:
            name, values = (accuracy, TOLERANCES) if accuracy else ("n_steps", BUDGETS)
            here = now.knobs.get(name, 1)
            changes = [{name: value} for value in sorted(values, key=lambda v: abs(math.log(v / here)))]
        for change in changes:
            near = workbench.inputs(now.method, self.problem, now.seed, now.n_samples, **{**now.knobs, **change})
            with suppress(ValueError):  # what the method refuses is no neighbour
                self._strip(near)
                yield near

    # ---------------------------------------------------------------- what is drawn

    def _picture(self, state: Tensor) -> Tensor:
        """Samples as they are drawn: (n, H, W[, 3]) uint8, or (n, D) float32 where they are no pictures."""
        if self._images is None:
            return state.detach().flatten(1).float().cpu()
        with torch.no_grad():
            return self._images(state)

    def _drawn(self, run: Run) -> Tensor:
        key = run.inputs.key
        if key not in self._pixels:
            self._pixels[key] = self._picture(run.answer)
        return self._pixels[key]

    def _frame(self, of: Run | Inputs, pixels: Tensor | None = None, step: int | None = None) -> bytes:
        """Length of the header (4 bytes, little-endian), header (JSON), values: title and picture in one message."""
        given = of.inputs if isinstance(of, Run) else of
        pixels = self._drawn(of) if isinstance(of, Run) else pixels
        total = self._n_steps(given)
        self._revision += 1
        header = {"revision": self._revision, "key": given.key, "title": self._title(given),
                  "shape": list(pixels.shape), "step": total if step is None else step, "of": total,
                  "is_done": step is None}
        head = json.dumps(header).encode()
        return struct.pack("<I", len(head)) + head + pixels.contiguous().numpy().tobytes()

    @cached_property
    def _letters(self) -> list[str]:
        names = [m.name for m in self.problem.models]
        letters = [name if len(name) <= 2 else name[0].upper() for name in names]
        return letters if len(set(letters)) == len(letters) else [str(i + 1) for i in range(len(names))]

    def _spec(self) -> dict[str, Any]:
        """What stays as it is: models, methods with their knobs, metrics."""
        def knob(b: Any) -> dict[str, Any]:
            k = b.knob
            return {"name": b.name, "kind": b.kind.__name__, "help": k.help, "low": k.low, "high": k.high,
                    "soft": k.soft, "step": k.step, "scale": k.scale, "unit": k.unit, "choices": k.choices,
                    "needs": dict(k.needs),
                    "start": self._start.knobs.get(b.name, self._preset.get(b.name, b.default))}

        methods = [{"name": m.name, "summary": m.summary, "source": m.source,
                    "knobs": [knob(b) for b in m.knobs.values()]} for m in map(workbench.get, self.methods)]
        names = [m.name for m in self.problem.models]
        models = [{"name": n, "letter": letter} for n, letter in zip(names, self._letters, strict=True)]
        metrics = {m.name: {"label": m.label, "unit": m.unit, "higher": m.higher_is_better, "min_n": m.min_n,
                            "help": m.help} for m in METRICS.values()}
        law = ""  # samples of the true law, to draw under samples that are no pictures
        if self.problem.images is None and self.problem.data is not None:
            law = _text(self._frame(self._start, self._picture(self.problem.data(1000, 0))))
        return {"problem": self.problem.name, "is_image": self.problem.images is not None, "law": law,
                "models": models, "methods": methods, "metrics": metrics, "scores": SCORES}

    def _strip(self, given: Inputs) -> dict[str, Any]:
        """The trajectory: log-SNR before each step, steps per model, and whose they are, [model, steps] in order.

        reached: the share of the trajectory after each step, at which switches between models may lie; empty without
        switches. is_open: how many steps there will be is not known yet. Raises ValueError for what is refused.
        """
        knobs, schedule, n_models = given.knobs, self.problem.schedule, len(self.problem.models)
        if "fractions" in knobs:
            level = grid(schedule, knobs["n_steps"], knobs["spacing"])
            shares = full_fractions(knobs["fractions"], n_models)
            turn = -1 if knobs["order"] == "costly_first" else 1
            split = step_counts(shares[::turn], level, schedule, knobs["boundary"])
            owned = list(zip(range(n_models)[::turn], split, strict=True))
            log_snr, is_open = [p.log_snr for p in level[:-1]], False
            reached = progress(level, schedule, knobs["boundary"])
        else:
            levels, is_open = self._walk(given)
            log_snr, reached = [at for at, _ in levels], []
            owned = [(k, len(list(steps))) for k, steps in groupby(owner for _, owner in levels)]
        counts = tuple(sum(n for k, n in owned if k == m) for m in range(n_models))
        return {"log_snr": [round(at, 3) if math.isfinite(at) else None for at in log_snr],  # no signal at all: None
                "counts": counts, "owned": owned, "reached": reached, "is_open": is_open}

    def _walk(self, given: Inputs) -> tuple[list[tuple[float, int]], bool]:
        """Each step's (log-SNR at which it first asks a model, that model's index), and whether more is to come.

        The method itself tells, asked without its networks. Where steps depend on the data a run must tell, and before
        it only the first is known. Raises ValueError where the method refuses these settings.
        """
        key = (given.method, *given.knobs.items())
        if key not in self._levels:
            levels = self._dry(given, 1.0)
            is_bound = METHODS[given.method].is_bound
            depends = is_bound and levels[:SAME] != self._dry(given, 0.5, SAME)
            self._levels[key] = (levels[:1] if depends else levels), depends
        levels, depends = self._levels[key]
        if depends and given.key in self._reached:
            first, owner = levels[0]
            return [(at, owner) for at in (first, *self._reached[given.key][:-1])], False
        return levels, depends

    def _dry(self, given: Inputs, gain: float, most: int | None = None) -> list[tuple[float, int]]:
        """`_walk` on one sample of one entry, with networks that only multiply; at most so many steps."""
        names, asked = [m.name for m in self.problem.models], []

        def hollow(name: str, network: Network) -> Network:
            schedule = self.problem.models[names.index(name)].schedule

            def answer(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
                asked.append(schedule.at(float(t[0])).log_snr)
                return gain * x

            return answer

        one = replace(self.problem.wrapped(hollow), shape=(1,), labels=lambda n: None, device="cpu")
        levels = []
        for step in islice(METHODS[given.method].function(one, Rng(0, 1), **given.knobs), most):
            levels.append((asked[0], names.index(step.info["model"])))
            asked.clear()
        return levels

    def _n_steps(self, given: Inputs) -> int | None:
        """Steps of a run, None where they depend on the data and the run is not known."""
        if "fractions" in given.knobs:
            return given.knobs["n_steps"]
        levels, is_open = self._walk(given)
        return None if is_open else len(levels)

    def _title(self, given: Inputs) -> str:
        """The settings in a line: steps, the steps of each model, guidance, and all that differs from the presets."""
        words = [given.method]
        for name, value in given.knobs.items():
            if name == "fractions":
                counts = zip(self._letters, self._strip(given)["counts"], strict=True)
                words.append(" + ".join(f"{letter} {count}" for letter, count in counts))
            elif name == "n_steps":
                unit = METHODS[given.method].knobs[name].knob.unit
                words.append(f"{value} {unit}" if value != 1 else f"1 {unit.removesuffix('s')}")
            elif name == "guidance" or value != METHODS[given.method].knobs[name].default:
                words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
        words = [word.replace("_", " ") if word != given.method else word for word in words]
        return " · ".join([*words, f"seed {given.seed}", f"{given.n_samples} samples"])

    def _card(self, run: Run) -> dict[str, Any]:
        """A run's title, cost per sample and quality, for the front end."""
        i, n = run.inputs, run.inputs.n_samples
        timing = self._timings.get(i.key)
        alike = (r for r in self._runs.values()
                 if (r.inputs.method, r.inputs.seed, r.inputs.knobs) == (i.method, i.seed, i.knobs))
        larger = max(alike, key=lambda r: r.inputs.n_samples, default=run)
        quality = {**larger.quality, **{k: q for k, q in run.quality.items() if k not in larger.quality}}
        return {
            "key": i.key, "title": self._title(i), "full": run.title, "method": i.method, "knobs": dict(i.knobs),
            "n": n, "evaluations": [run.cost.evaluations[m.name] / n for m in self.problem.models],
            "flops": [run.cost.flops[m.name] / n for m in self.problem.models],
            "quality": {k: [_finite(q.value), _finite(q.stderr), q.n] for k, q in quality.items()},
            "timing": timing and {
                "ms": 1e3 * timing.seconds, "spread": 1e3 * timing.spread, "repeats": timing.repeats,
                "by_model": [1e3 * timing.by_model[m.name] for m in self.problem.models],
                "peak_mb": timing.peak_bytes / 1e6, "machine": timing.machine},
        }

    def _view(self) -> dict[str, Any]:
        """All that changes, but for pictures and the frontier's points."""
        i, score = self.inputs, self._score
        reference = self._runs.get(self._rival("reference", self.run.inputs).key) if self.run else None
        return {
            "ack": self._ack, "is_stale": not self._is_shown, "status": self._status, "notice": self._notice,
            "error": "" if self._error is None else f"{type(self._error).__name__}: {self._error}",
            "state": {"method": i.method, "knobs": dict(i.knobs), "seed": i.seed, "n_samples": i.n_samples},
            "strip": self._strip(i), "can_undo": bool(self._past), "can_redo": bool(self._future),
            "shown": self._card(self.run) if self.run else None,
            "pinned": self._card(self._pinned) if self._pinned else None,
            "reference": self._card(reference) if reference else None,
            "score": score and {
                "done": score.n_done, "n": score.inputs.n_samples, "title": self._title(score.inputs),
                "eta": score.seconds / score.n_done * (score.inputs.n_samples - score.n_done) if score.parts else None},
        }

    def _frontier(self) -> dict[str, Any]:
        """Points by metric, of the runs with the number of samples chosen; seeds of one setting are one point."""
        runs = list(self._runs.values())
        chosen = [r for r in runs if r.inputs.n_samples == self._frontier_n]
        like = replace(self.run.inputs, n_samples=self._frontier_n) if self.run else None
        rivals = {self._rival(name, like).key: name for name in ("reference", "baseline")} if like else {}
        metrics: dict[str, list[dict[str, Any]]] = {}
        for metric in sorted({m for r in chosen for m in r.quality}):
            metrics[metric] = [
                {"keys": [r.inputs.key for r in p.runs], "method": p.runs[0].inputs.method, "flops": p.flops,
                 "evaluations": p.evaluations, "value": p.value, "stderr": _finite(p.stderr), "n": p.n,
                 "role": next((rivals[r.inputs.key] for r in p.runs if r.inputs.key in rivals), "")}
                for p in points(chosen, metric) if math.isfinite(p.value)]
        ns = sorted({r.inputs.n_samples for r in runs} | {self._frontier_n})
        titles = {r.inputs.key: self._title(r.inputs) for r in chosen}
        return {"n": self._frontier_n, "ns": ns, "metrics": metrics, "titles": titles}

    @cached_property
    def widget(self) -> ExplorerWidget:
        """The one widget of this explorer; it may be displayed any number of times."""
        return ExplorerWidget(self)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        if self.is_headless:
            return {"text/plain": f"Explorer on {self.problem.name}: {self._title(self.inputs)}"}
        return self.widget._repr_mimebundle_(**kwargs)


class ExplorerWidget(anywidget.AnyWidget):
    """An Explorer in JupyterLab. Wishes come as messages and results go as traits: each is set by one side only."""

    _esm = script("ticks.js", "explorer.js")
    _css = HERE / "explorer.css"
    spec = traitlets.Dict().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)
    frontier = traitlets.Dict().tag(sync=True)
    reply = traitlets.Dict().tag(sync=True)
    frame = traitlets.Bytes().tag(sync=True)
    pinned = traitlets.Bytes().tag(sync=True)

    def __init__(self, explorer: Explorer) -> None:
        super().__init__()
        self.on_msg(lambda widget, intent, buffers: explorer.receive(intent))
        explorer.subscribe(lambda name, value: setattr(self, name, value))


def explorer(problem: Denoising | Decoding, methods: Sequence[str] | None = None, *, n_samples: int | None = None,
             seed: int = 0, store: Store | str | os.PathLike[str] | None = None, **knobs: Any) -> Explorer:
    """Explore methods on a problem: drag knobs and switch points, see samples, cost and quality live.

    methods: default t_stitch, ddim and dpmpp_2m, or all that decode. n_samples: default 16 pictures or 1 text. knobs:
    starting values, for the methods that have them. store: where runs are looked up and kept, or its folder.
    Raises TypeError for no problem, and what `workbench.inputs` raises for settings that cannot be.
    """
    if not isinstance(problem, Denoising | Decoding):
        raise TypeError(f"problem={problem!r:.100}: expected a problem, such as workbench.problems.glyphs.glyphs()")
    if store is not None and not isinstance(store, Store):
        store = Store(store)
    if isinstance(problem, Decoding):
        from widgets.drafts import FAMILY as DRAFTING  # which is built on this module
        from widgets.drafts import drafts_explorer

        return drafts_explorer(problem, DRAFTING if methods is None else methods,
                               n_samples=1 if n_samples is None else n_samples, seed=seed, store=store, **knobs)
    return Explorer(problem, ("t_stitch", "ddim", "dpmpp_2m") if methods is None else methods,
                    n_samples=16 if n_samples is None else n_samples, seed=seed, store=store, **knobs)


def _fits(knob: BoundKnob, value: Any) -> bool:
    try:
        knob.check(value)
    except (TypeError, ValueError):
        return False
    return True


def _differences(ends: Sequence[float]) -> tuple[float, ...]:
    """Shares from cumulated shares, rounded so that equal settings get equal keys."""
    return tuple(round(b - a, 12) for a, b in zip([0.0, *ends[:-1]], ends, strict=True))


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
