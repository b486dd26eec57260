"""The schedule editor: the steps of a solver as marks on a log-SNR axis, and live what moving them does.

`ScheduleEditor` is the controller and knows no toolkit: it keeps the plan, its history and what plans answered, and a
worker thread that shows the newest plan first. `editor.js` draws what it publishes.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import anywidget
import torch
import traitlets
from torch import Tensor

import workbench
from widgets.live import Live, script, told, wish
from workbench import Cancelled, Memo, Quality
from workbench.cost import Meter
from workbench.methods.denoising._march import MEMORY
from workbench.methods.denoising.usf import run_plan
from workbench.plan import (
    CORRECTORS,
    MAX_ORDER,
    PREDICTIONS,
    PRESETS,
    RELAXATIONS,
    Decision,
    Expansion,
    Plan,
    preset_plan,
)
from workbench.problems.denoising import FINALS, SPACINGS, Denoising, Point, grid, noisiest
from workbench.quality import drift
from workbench.rng import Rng
from workbench.search.solver import exact_flow, run_plans

HERE = Path(__file__).parent
MAX_STEPS = 40
PAST = 200  # settings that can be undone
GAP = 0.02  # least distance between two marks, in log-SNR
KEPT = 64  # answers of plans that are remembered
FIELDS = ("order", "prediction", "relaxation", "start", "corrector", "correction_order")
ARMS = ("yours", "preset", "best")

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Setting:
    """All that an editor's history keeps: the plan edited, the preset that it is compared with, and the seed.

    Raises ValueError where preset, spacing, final or seed are none.
    """

    plan: Plan
    preset: str
    spacing: str
    final: str
    seed: int

    def __post_init__(self) -> None:
        for name, allowed in (("preset", tuple(PRESETS)), ("spacing", SPACINGS), ("final", FINALS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        _whole("seed", self.seed, 0, 2**63 - 1)


@dataclass
class Answer:
    """What a plan made of one seed's noise. curve: (log-SNR, RMS error, steps done); error: at the end."""

    plan: Plan
    evaluations: float  # per sample, as metered
    state: Tensor
    places: list[Point]  # where `trail` is
    trail: list[Tensor]
    curve: list[tuple[float, float]] | None = None
    error: Quality | None = None
    pixels: Tensor | None = field(default=None, repr=False)


class Flow:
    """The exact probability flow of a problem's best model from a seed's noise, at any noise level.

    Solved once on levels NODE apart by `exact_flow`, at steps of NODE / SUBSTEPS in log-SNR: RMS error 1e-8 or less on
    the mixtures of the workbench. It ends at FAR, or at the cleanest level where the schedule is a table; the data is
    the estimate there.
    """

    NODE, SUBSTEPS, FAR = 0.2, 10, 10.0

    def __init__(self, problem: Denoising, start: Tensor) -> None:
        self.problem, self.start, schedule = problem, start, problem.schedule
        first = noisiest(schedule)
        try:
            last = schedule.at(schedule.t_at(self.FAR))
        except ValueError:
            last = schedule.at(schedule.cleanest)
        count = max(math.ceil((last.log_snr - first.log_snr) / self.NODE), 1)
        inner = [first.log_snr + (last.log_snr - first.log_snr) * i / count for i in range(1, count)]
        self._nodes = [first, *(schedule.at(schedule.t_at(v)) for v in inner), last]
        self._states = [start]
        self._known: dict[float, Tensor] = {}

    @property
    def is_solved(self) -> bool:
        return len(self._states) == len(self._nodes)

    def solve(self, stop: Stop) -> None:
        """Go on to the end. Raises Cancelled once stop() is true, and keeps what there is."""
        while not self.is_solved:
            k = len(self._states)
            self._states.append(exact_flow(self.problem, *self._nodes[k - 1 : k + 1], self._states[-1], self.SUBSTEPS))
            if stop():
                raise Cancelled

    def at(self, point: Point) -> Tensor:
        """The state (n, *shape) at a level; at sigma 0 the data."""
        if point.sigma == 0:
            if math.inf not in self._known:
                labels = self.problem.labels(len(self._states[-1]))
                with torch.no_grad():
                    self._known[math.inf] = self.problem.models[-1].predict(
                        self._states[-1], self._nodes[-1], self.problem.schedule, labels, 1.0)[0]
            return self._known[math.inf]
        if point.t not in self._known:
            if len(self._known) > 500:
                self._known.clear()
            k = min(range(len(self._nodes)), key=lambda j: abs(self._nodes[j].log_snr - point.log_snr))
            far = abs(self._nodes[k].log_snr - point.log_snr)
            n_steps = math.ceil(far * self.SUBSTEPS / self.NODE - 1e-9)
            self._known[point.t] = (exact_flow(self.problem, self._nodes[k], point, self._states[k], n_steps)
                                    if n_steps else self._states[k])
        return self._known[point.t]


class ScheduleEditor(Live):
    """Live editor of a solver schedule. Use `schedule_editor(...)`; as a cell's last line it shows itself.

    plan: the schedule now; answers: {"yours", "preset", "best"}: Answer, as far as they are known; view, frames: what
    the front end draws. With WORKBENCH_HEADLESS set in the environment there is no worker: changes run at once and
    raise.
    """

    def __init__(self, problem: Denoising, n_steps: int = 8, preset: str = "dpmpp_2m", best: Plan | None = None,
                 seed: int = 0, n_samples: int = 16, spacing: str = "log_snr", final: str = "zero") -> None:
        _whole("n_steps", n_steps, 1, MAX_STEPS)
        _whole("n_samples", n_samples, 1, 100_000)
        if best is not None and not isinstance(best, Plan):
            raise ValueError(f"best={best!r}: expected a Plan, e.g. Plan.load('plan.json')")
        self.problem, self.best, self.n_samples = problem, best, n_samples
        self.guidance = float(problem.preset.get("guidance", 1.0))
        schedule = problem.schedule
        self._ends = noisiest(schedule), schedule.at(schedule.cleanest)
        if best is not None:
            self._fits(best)
        self.has_flow = _has_flow(problem)
        self._memo = Memo(256_000_000)
        self._shared = problem.wrapped(self._watched).wrapped(self._memo.wrap)
        self._fresh = False  # whether a network was evaluated since the last look
        self._answers: OrderedDict[tuple[str, int], Answer] = OrderedDict()
        self._flow: Flow | None = None
        self._reference: dict[int, tuple[Tensor, Tensor]] = {}  # by seed: state and what is drawn of it
        self._truth_seed: int | None = None
        self._past: list[Setting] = []
        self._future: list[Setting] = []
        self._gesture: Any = None
        self._status, self._notice, self._ack = "", "", ""
        self._error: BaseException | None = None
        self._open("editor", {"view": {}, "reply": {}, **dict.fromkeys(ARMS, b"")})
        self._revision = 0
        self._drawn: dict[str, tuple[str, int] | None] = dict.fromkeys(ARMS)
        check = Setting(_LINE, preset, spacing, final, seed)
        self.setting = self._start = replace(check, plan=self._preset_plan(preset, spacing, final, n_steps))
        self._publish("spec", self._spec())
        self._publish_view()
        self._wake()

    # ---------------------------------------------------------------- what a notebook uses

    @property
    def plan(self) -> Plan:
        return self.setting.plan

    @property
    def view(self) -> dict[str, Any]:
        return self.published["view"]

    @property
    def answers(self) -> dict[str, Answer]:
        """The answers of the present plans that are known; without `best`, "best" is left out."""
        with self._change:
            found = {arm: self._answers.get(key) for arm, key in self._wanted().items()}
        return {arm: answer for arm, answer in found.items() if answer is not None}

    def move(self, step: int, log_snr: float, gesture: Any = None) -> None:
        """Put a mark at a noise level: step 0 is the first, step n where the last one ends.

        Moves of one gesture (one drag) are one step of the history. Raises ValueError where it is no finite number, or
        not between its neighbours.
        """
        plan = self.plan
        _whole("step", step, 0, len(plan.times) - (plan.end is None))
        if not isinstance(log_snr, int | float) or not math.isfinite(log_snr):
            raise ValueError(f"log_snr={log_snr!r}: expected a finite number")
        low, high = self._room(plan, step)
        if not low - 1e-9 <= log_snr <= high + 1e-9:
            raise ValueError(f"log_snr={log_snr:.4g} of mark {step + 1}: expected {low:.4g} to {high:.4g}, between its "
                             "neighbours" + (", which are too close" if low > high else ""))
        t = self._time(min(max(log_snr, low), high))
        times = [*plan.times, plan.end]
        times[step] = t
        self._move(replace(self.setting, plan=replace(plan, times=tuple(times[:-1]), end=times[-1])), gesture)

    def decide(self, step: int, **fields: Any) -> None:
        """Change a step's decision: order, prediction, relaxation, start, corrector, correction_order.

        Raises ValueError where its history or its place does not allow it, TypeError for another field.
        """
        plan = self.plan
        _whole("step", step, 0, len(plan.times) - 1)
        decisions = list(plan.decisions)
        for name, value in fields.items():
            if name not in FIELDS:
                raise TypeError(f"{name}={value!r}: expected one of {', '.join(FIELDS)}")
            decisions[step] = _with(decisions[step], name, value, step)
        self._move(replace(self.setting, plan=replace(plan, decisions=tuple(decisions))))

    def add(self, step: int, log_snr: float | None = None) -> None:
        """A step more: divides `step` at a noise level, or in its middle. Raises ValueError where there is no room."""
        plan, n = self.plan, len(self.plan.times)
        _whole("step", step, 0, n - 1)
        _whole("steps", n + 1, 1, MAX_STEPS)
        levels = self._levels(plan)
        low, high = levels[step], min(levels[step + 1], self._ends[1].log_snr)
        place = (low + high) / 2 if log_snr is None else log_snr
        if not low + GAP <= place <= high - GAP * (levels[step + 1] <= high):
            raise ValueError(f"log_snr={place:.4g}: no room for another mark, expected one between {low + GAP:.4g} and "
                             f"{high - GAP:.4g}")
        is_last = step == n - 1 and plan.end is None
        like = plan.decisions[max(step - 1, 0) if is_last else step]
        decisions = [*plan.decisions[:step], like, *plan.decisions[step:]]
        times = (*plan.times[: step + 1], self._time(place), *plan.times[step + 1 :])
        self._move(replace(self.setting, plan=Plan(times, _fitted(decisions, plan.end is None), plan.end)))

    def remove(self, step: int) -> None:
        """A step less; the one before goes as far as this one went, and orders sink to what the history still allows.

        Raises ValueError where it is the only one.
        """
        plan, n = self.plan, len(self.plan.times)
        _whole("step", step, 0, n - 1)
        if n == 1:
            raise ValueError(f"step {step + 1} is the only one: expected at least one step to stay")
        keep = [i for i in range(n) if i != step]
        times = tuple(plan.times[i] for i in keep)
        if step == 0:  # trajectories go on starting where they did
            times = (plan.times[0], *times[1:])
        decisions = _fitted([plan.decisions[i] for i in keep], plan.end is None)
        self._move(replace(self.setting, plan=Plan(times, decisions, plan.end)))

    def compare(self, **fields: Any) -> None:
        """Another preset, spacing, final or seed to compare with. Raises ValueError where there is none such."""
        setting = replace(self.setting, **fields)
        self._preset_plan(setting.preset, setting.spacing, setting.final, setting.plan.evaluations)
        self._move(setting)

    def use(self, preset: str | None = None, spacing: str | None = None, final: str | None = None,
            n_steps: int | None = None) -> None:
        """Start from a preset, by default the one compared with at as many evaluations. Raises as `compare`."""
        now = self.setting
        setting = replace(now, preset=preset or now.preset, spacing=spacing or now.spacing, final=final or now.final)
        n = now.plan.evaluations if n_steps is None else n_steps
        _whole("n_steps", n, 1, MAX_STEPS)
        self._move(replace(setting, plan=self._preset_plan(setting.preset, setting.spacing, setting.final, n)))

    def load(self, plan: Plan | str) -> None:
        """A plan, or its JSON text. Raises ValueError where it is none, too long, or outside the problem's schedule."""
        given = Plan.from_json(plan) if isinstance(plan, str) else plan
        self._fits(given)
        self._move(replace(self.setting, plan=given))

    def undo(self) -> None:
        """Back to the plan before; nothing happens where there is none."""
        self._travel(self._past, self._future)

    def redo(self) -> None:
        """Forward again after `undo`."""
        self._travel(self._future, self._past)

    def reset(self) -> None:
        """What the editor was opened with; `undo` brings the rest back."""
        self._move(self._start)

    def wait(self, timeout: float = 120) -> None:
        """Until all plans have answered and are graded. Raises what the worker caught."""
        if self.is_headless:
            return
        with self._change:
            ready = self._change.wait_for(lambda: self._error or self._task() is None, timeout)
            if self._error is not None:
                raise self._error
            if not ready:
                raise TimeoutError(f"not shown after {timeout} s: {self._name(self.plan)}")

    def code(self) -> str:
        """Python that runs the plan: as a scheduler in a diffusers pipeline where the problem is of pipelines."""
        head = f"from workbench.plan import Plan\n{_or(self.problem.source)}\n"
        text = f"plan = Plan.from_json({self.plan.to_json()!r})\n"
        bare = (f"*_, last = run_plan(problem, Rng({self.setting.seed}, {self.n_samples}), plan, "
                f"guidance={self.guidance})\nprint(last.state.shape)\n")
        script = f"from workbench.methods.denoising.usf import run_plan\n{head}from workbench.rng import Rng\n\n"
        if self.problem.code is None:
            return script + text + bare
        return (script + text + bare + "\n# in a diffusers pipeline\n"
                "from workbench.integrations.schedulers import UnifiedSolverScheduler\n\n"
                "def scheduled(pipe):\n"
                "    pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, plan=plan)\n"
                f"    return pipe  # call it with num_inference_steps={len(self.plan.times)}\n")

    # ---------------------------------------------------------------- the front end's side

    def receive(self, intent: Mapping[str, Any]) -> None:
        """One wish of the front end, a dict with "id" and "kind". What cannot be is shown as a notice, never raised."""
        intent = wish(intent)
        self._ack, self._notice = intent["id"], ""
        actions: dict[str, Callable[[], object]] = {
            "undo": self.undo, "redo": self.redo, "reset": self.reset,
            "move": lambda: self.move(intent["step"], intent["log_snr"], intent.get("gesture")),
            "decide": lambda: self.decide(intent["step"], **intent["fields"]),
            "add": lambda: self.add(intent["step"], intent.get("log_snr")),
            "remove": lambda: self.remove(intent["step"]),
            "compare": lambda: self.compare(**intent["fields"]),
            "use": lambda: self.use(n_steps=intent.get("n_steps")),
            "use_best": lambda: self.load(self.best) if self.best else None,
            "load": lambda: self.load(intent["text"]),
            "code": lambda: self._reply(intent, self.code()),
            "json": lambda: self._reply(intent, self.plan.to_json()),
        }
        try:
            actions[intent["kind"]]()
        except Exception as error:  # whatever it was asked for: the marks live on
            self._notice = told(error)
        self._publish_view()

    def _reply(self, intent: Mapping[str, Any], text: str) -> None:
        self._publish("reply", {"id": intent["id"], "kind": intent["kind"], "text": text})

    def _publish_view(self) -> None:
        with self._change:  # put inside, so that an older view never follows a newer one; sent once this is let go
            self._outbox.put("view", self._view())

    # ---------------------------------------------------------------- plans

    def _preset_plan(self, preset: str, spacing: str, final: str, n_steps: int) -> Plan:
        return preset_plan(preset, grid(self.problem.schedule, n_steps, spacing, final))

    def _fits(self, plan: Plan) -> None:
        plan.grid(self.problem.schedule)
        _whole("steps of the plan", len(plan.times), 1, MAX_STEPS)

    def _levels(self, plan: Plan) -> list[float]:
        """The n + 1 log-SNRs of a plan; infinite for the data."""
        return [p.log_snr for p in plan.grid(self.problem.schedule)]

    def _room(self, plan: Plan, step: int) -> tuple[float, float]:
        """The least and the largest log-SNR that a mark may go to."""
        levels, (first, last) = self._levels(plan), self._ends
        low = first.log_snr if step == 0 else levels[step - 1] + GAP
        high = last.log_snr if step + 1 >= len(levels) or levels[step + 1] == math.inf else levels[step + 1] - GAP
        return low, high

    def _time(self, log_snr: float) -> float:
        first, last = self._ends
        if log_snr <= first.log_snr + 1e-9:
            return first.t
        return last.t if log_snr >= last.log_snr - 1e-9 else self.problem.schedule.t_at(log_snr)

    def _move(self, wanted: Setting, gesture: Any = None) -> None:
        with self._change:
            if wanted != self.setting:
                if gesture is None or gesture != self._gesture:
                    self._past.append(self.setting)
                    del self._past[:-PAST]
                self._future.clear()
            self._gesture = gesture
            self._go(wanted)

    def _travel(self, source: list[Setting], target: list[Setting]) -> None:
        with self._change:
            if source:
                target.append(self.setting)
                self._gesture = None
                self._go(source.pop())

    def _go(self, wanted: Setting) -> None:
        if wanted == self.setting and self._error is None:
            return
        self.setting = wanted
        self._wake()

    # ---------------------------------------------------------------- the worker

    def _wake(self) -> None:
        """Overtake whatever is under way."""
        with self._change:
            self._generation += 1
            self._error, self._status = None, ""
            self._change.ring()
        if self.is_headless:
            while task := self._task():
                task(lambda: False)
        self._publish_view()
        self._rouse()

    def _release(self) -> None:
        self._memo.clear()

    def _turn(self) -> float:
        with self._change:
            generation = self._generation
            try:
                task = self._task() if self._error is None else None
            except Exception as error:
                self._error, task = error, None
                self._publish_view()
            if task is None:
                self._change.notify_all()
                return 5.0
        try:
            task(lambda: self._generation != generation)
        except Cancelled:
            pass
        except Exception as error:  # kept for wait() and shown; the marks live on
            with self._change:
                if generation == self._generation:
                    self._error = error
                self._publish_view()
                self._change.notify_all()
        return 0.0

    def _wanted(self) -> dict[str, tuple[str, int]]:
        """The keys of the plans on show."""
        s = self.setting
        plans = {"yours": s.plan, "preset": self._rival, "best": self.best}
        return {arm: (plan.to_json(), s.seed) for arm, plan in plans.items() if plan is not None}

    @property
    def _rival(self) -> Plan | None:
        """The preset compared with, at as many evaluations; None where the schedule has no such grid."""
        s = self.setting
        try:
            return self._preset_plan(s.preset, s.spacing, s.final, s.plan.evaluations)
        except ValueError:
            return None

    def _task(self) -> Callable[[Stop], None] | None:
        """The next thing to do: your plan first, then what it is compared with, then the truth."""
        for arm, key in self._wanted().items():
            if key not in self._answers or self._drawn[arm] != key:
                return lambda stop, arm=arm, key=key: self._show(arm, key, stop)
        if self._truth_seed != self.setting.seed:
            return self._find_truth
        if any(answer.curve is None for answer in self.answers.values()):
            return self._grade
        return None

    def _show(self, arm: str, key: tuple[str, int], stop: Stop) -> None:
        answer = self._answers.get(key)
        if answer is None:
            if arm != "yours":
                self._tell(f"running the {'preset' if arm == 'preset' else 'best schedule'}")
            answer = self._run(arm, Plan.from_json(key[0]), key[1], stop)
            with self._change:
                self._answers[key] = answer
                while len(self._answers) > KEPT:
                    self._answers.popitem(last=False)
        with self._change:
            self._answers.move_to_end(key)
            if self._truth_seed == key[1] and answer.curve is None:
                self._judge(answer)
            self._drawn[arm] = key
        self._status = ""
        self._publish(arm, self._frame(answer, self._picture(answer), len(answer.plan.times)))
        self._publish_view()

    def _run(self, arm: str, plan: Plan, seed: int, stop: Stop) -> Answer:
        """Run a plan; while it takes long, show the data estimates on the way."""
        meter = Meter(self.problem.prices)
        points = plan.grid(self.problem.schedule)
        states, estimates = [], []
        answer = Answer(plan, 0.0, torch.empty(0), points[1:], states)
        self._fresh, drawn, interval = False, time.monotonic(), 0.03
        for i, step in enumerate(run_plan(self._shared.wrapped(meter.wrap), Rng(seed, self.n_samples), plan,
                                          guidance=self.guidance)):
            states.append(step.state)
            estimates.append(step.info["x0"])
            is_due = arm == "yours" and self._fresh and time.monotonic() - drawn >= interval
            if is_due and i + 1 < len(plan.times):
                before = time.monotonic()
                self._publish(arm, self._frame(answer, self._pictured(step.info["x0"]), i + 1))
                drawn = time.monotonic()
                interval = max(0.03, 4 * (drawn - before))  # previews take a fifth of the time at most
            if stop():  # asked after the preview, so that a steady drag shows something
                raise Cancelled
        if not bool(torch.isfinite(states[-1]).all()):
            raise ValueError(f"{self._name(plan)}: the samples are not finite; lower an order or move marks apart")
        answer.state, answer.evaluations = states[-1], sum(meter.evaluations.values()) / self.n_samples
        if not self.has_flow:  # of pictures the end is known, but not the way there: the estimates of it are compared
            answer.places, answer.trail = points[:-1], estimates
        return answer

    def _find_truth(self, stop: Stop) -> None:
        """The exact flow, or the problem's reference run, from the seed's noise."""
        seed = self.setting.seed
        if self.has_flow:
            self._tell("solving the exact flow")
            start = self.problem.start(Rng(seed, self.n_samples))
            if self._flow is None or not torch.equal(self._flow.start, start):
                self._flow = Flow(self.problem, start)
            self._flow.solve(stop)
        elif seed not in self._reference:
            self._tell("computing the reference")
            method, knobs = self.problem.reference
            run = workbench.run(method, self._shared, seed, self.n_samples, stop=stop, **knobs)
            self._reference = {seed: (run.answer, self._pictured(run.answer))}
        with self._change:
            self._truth_seed = seed
            for answer in self._answers.values():
                answer.curve = answer.error = None
        self._grade(stop)

    def _grade(self, stop: Stop) -> None:
        with self._change:
            for answer in self.answers.values():
                if answer.curve is None:
                    self._judge(answer)
        self._tell("")

    def _judge(self, answer: Answer) -> None:
        """The answer's distance from the truth, at the end and along the way."""
        if self.has_flow:
            assert self._flow is not None
            truths = [self._flow.at(p) for p in answer.places]
            answer.error = drift(answer.state, truths[-1])
        else:
            state, drawn = self._reference[self.setting.seed]
            truths = [state] * len(answer.trail)
            scale = 255 if self.problem.images else 1
            answer.error = drift(self._picture(answer).double() / scale, drawn.double() / scale)
        answer.curve = [(p.log_snr, float((x - y).double().square().mean().sqrt()))
                        for p, x, y in zip(answer.places, answer.trail, truths, strict=True)]

    def _tell(self, status: str) -> None:
        self._status = status
        self._publish_view()

    def _watched(self, name: str, network: Any) -> Any:
        def watched(*rows: Tensor | None) -> Tensor:
            self._fresh = True
            return network(*rows)

        return watched

    # ---------------------------------------------------------------- what is drawn

    def _pictured(self, state: Tensor) -> Tensor:
        """Samples as they are drawn: (n, H, W[, 3]) uint8, or (n, D) float32 where they are no pictures."""
        if self.problem.images is None:
            return state.detach().flatten(1).float().cpu()
        with torch.no_grad():
            return self.problem.images(state)

    def _picture(self, answer: Answer) -> Tensor:
        if answer.pixels is None:
            answer.pixels = self._pictured(answer.state)
        return answer.pixels

    def _frame(self, answer: Answer, pixels: Tensor, step: int) -> bytes:
        """Length of the header (4 bytes, little-endian), header (JSON), values: title and picture in one message."""
        self._revision += 1
        header = {"revision": self._revision, "title": self._name(answer.plan), "shape": list(pixels.shape),
                  "step": step, "of": len(answer.plan.times)}
        head = json.dumps(header).encode()
        return struct.pack("<I", len(head)) + head + pixels.contiguous().numpy().tobytes()

    def _name(self, plan: Plan) -> str:
        """What a plan is, in a few words."""
        n, s = len(plan.times), self.setting
        steps = f"{n} steps" if n != 1 else "1 step"
        if plan == self.best:
            return f"best found · {steps}"
        if plan == self._rival:
            return f"{s.preset} on {s.spacing} · {steps}"
        return f"own schedule · {steps}"

    def _spec(self) -> dict[str, Any]:
        """What stays as it is."""
        law = ""  # samples of the true law, to draw under samples that are no pictures
        if self.problem.images is None and self.problem.data is not None:
            pixels = self._pictured(self.problem.data(1000, 0))
            law = base64.b64encode(self._frame(Answer(self.plan, 0, pixels, [], []), pixels, 0)).decode()
        method, knobs = self.problem.reference
        reference = f"{method}, {knobs.get('n_steps', 20)} steps"
        return {
            "problem": self.problem.name, "is_image": self.problem.images is not None, "law": law,
            "presets": list(PRESETS), "spacings": list(SPACINGS), "finals": list(FINALS), "has_best": bool(self.best),
            "range": [p.log_snr for p in self._ends], "gap": GAP, "max_steps": MAX_STEPS, "fields": list(FIELDS),
            "truth": "the exact flow" if self.has_flow else f"the reference ({reference})",
            "curve": "state's distance from the exact flow" if self.has_flow
                     else "data estimate's distance from the reference",
            "unit": "RMS" if self.has_flow or not self.problem.images else "RMS of pixels, 0 to 1",
        }

    def _marks(self, plan: Plan) -> dict[str, Any]:
        """A plan as the front end has it."""
        levels, points = self._levels(plan), plan.grid(self.problem.schedule)
        return {"times": [p.t for p in points], "levels": [_finite(v) for v in levels],
                "steps": [{"order": d.expansion.order, "prediction": d.prediction, "relaxation": d.expansion.relaxation,
                           "start": d.start, "corrector": d.corrector, "correction_order": d.correction.order}
                          for d in plan.decisions]}

    def _view(self) -> dict[str, Any]:
        """All that changes, but for pictures."""
        s, wanted, answers = self.setting, self._wanted(), self.answers
        plans = {"yours": s.plan, "preset": self._rival, "best": self.best}
        arms = {}
        for arm in wanted:
            answer = answers.get(arm)
            error = answer.error if answer else None
            arms[arm] = {
                "title": self._name(plans[arm]), "levels": [_finite(v) for v in self._levels(plans[arm])],
                "steps": len(plans[arm].times), "evaluations": answer.evaluations if answer else None,
                "error": error and [error.value, _finite(error.stderr), error.n],
                "curve": [[_finite(x), y] for x, y in answer.curve] if answer and answer.curve else [],
            }
        return {
            "ack": self._ack, "status": self._status, "notice": self._notice,
            "error": "" if self._error is None else f"{type(self._error).__name__}: {self._error}",
            "is_stale": "yours" not in answers,
            "marks": self._marks(s.plan), "options": _options(s.plan.decisions, s.plan.end is None), "arms": arms,
            "compare": {"preset": s.preset, "spacing": s.spacing, "final": s.final}, "seed": s.seed,
            "n_samples": self.n_samples, "evaluations": s.plan.evaluations,
            "missing": "" if "preset" in wanted else f"{s.spacing} has no grid of {s.plan.evaluations} steps here",
            "can_undo": bool(self._past), "can_redo": bool(self._future),
        }

    @cached_property
    def widget(self) -> ScheduleEditorWidget:
        """The one widget of this editor; it may be displayed any number of times."""
        return ScheduleEditorWidget(self)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        if self.is_headless:
            return {"text/plain": f"Schedule editor on {self.problem.name}: {self._name(self.plan)}"}
        return self.widget._repr_mimebundle_(**kwargs)


class ScheduleEditorWidget(anywidget.AnyWidget):
    """A ScheduleEditor in JupyterLab. Wishes come as messages, results go as traits: each is set by one side only."""

    _esm = script("ticks.js", "editor.js")
    _css = (HERE / "explorer.css").read_text() + (HERE / "editor.css").read_text()
    spec = traitlets.Dict().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)
    reply = traitlets.Dict().tag(sync=True)
    yours = traitlets.Bytes().tag(sync=True)
    preset = traitlets.Bytes().tag(sync=True)
    best = traitlets.Bytes().tag(sync=True)

    def __init__(self, editor: ScheduleEditor) -> None:
        super().__init__()
        self.on_msg(lambda widget, intent, buffers: editor.receive(intent))
        editor.subscribe(lambda name, value: setattr(self, name, value))


def schedule_editor(problem: Denoising, n_steps: int = 8, preset: str = "dpmpp_2m", best: Plan | None = None,
                    seed: int = 0, n_samples: int = 16, spacing: str = "log_snr", final: str = "zero"
                    ) -> ScheduleEditor:
    """Edit a solver schedule by hand: drag the steps along log-SNR, change their order, see samples, error and cost.

    The problem's best model takes every step, under the guidance of the problem's presets. preset, spacing, final
    ("zero": the plan ends at the data; "cleanest": at the schedule's least noise): where to start, and what is compared
    at equal evaluations. best: a plan to compare with, e.g. one that a search found. Errors are distances from the
    exact probability flow where the problem's law is known in closed form, else from the problem's reference run, both
    from the same noise. Raises ValueError for settings that cannot be.
    """
    return ScheduleEditor(problem, n_steps, preset, best, seed, n_samples, spacing, final)


def errors_on_seeds(problem: Denoising, plans: Mapping[str, Plan], seeds: Iterable[int], n_samples: int
                    ) -> dict[str, list[Quality]]:
    """The errors that the editor shows at the end of each plan, on each seed: {name: [Quality per seed]}.

    Distances from the exact flow where the problem's law is known in closed form, else of pictures from the problem's
    reference run, from the same noise. Costs the sum of the plans' evaluations and one reference per seed.
    """
    guidance = float(problem.preset.get("guidance", 1.0))
    found: dict[str, list[Quality]] = {name: [] for name in plans}
    for seed in seeds:
        noise, labels = problem.start(Rng(seed, n_samples)), problem.labels(n_samples)
        answers = run_plans(problem, list(plans.values()), noise, labels=labels, guidance=guidance, max_rows=512)
        if _has_flow(problem):
            flow = Flow(problem, noise)
            flow.solve(lambda: False)
            truths = [flow.at(plan.grid(problem.schedule)[-1]) for plan in plans.values()]
        else:
            method, knobs = problem.reference
            truths = [workbench.run(method, problem, seed, n_samples, **knobs).answer] * len(plans)
            if problem.images:
                answers, truths = ([problem.images(a).double() / 255 for a in some] for some in (answers, truths))
        for name, answer, truth in zip(plans, answers, truths, strict=True):
            found[name].append(drift(answer, truth))
    return found


def _has_flow(problem: Denoising) -> bool:
    """Whether the law can be drawn from and is no pictures: a closed form, whose flow can be solved."""
    return problem.data is not None and problem.images is None and problem.preset.get("guidance", 1.0) == 1


_LINE = Plan((1.0,), (Decision(),))  # stands in while the other settings are checked


def _with(decision: Decision, name: str, value: Any, step: int) -> Decision:
    """The decision with one field of the editor changed, and what depends on it. Raises ValueError."""
    terms, correction = decision.expansion, decision.correction
    if name == "order":
        _whole("order", value, 1, MAX_ORDER)
        if value == terms.order:
            return decision
        # relaxation is the factor of a first derivative that one point estimates: of order 2
        return replace(decision, expansion=Expansion(value, relaxation=terms.relaxation if value == 2 else "none"))
    if name == "relaxation":
        if terms.order == 1 and value != "none":
            raise ValueError(f"relaxation={value!r}: order 1 has no derivative to relax, expected 'none'")
        return replace(decision, expansion=replace(terms, relaxation=value))
    if name == "correction_order":
        if decision.corrector == "none":
            raise ValueError(f"correction_order={value!r}: there is no corrector, expected one first")
        _whole("correction_order", value, 2, MAX_ORDER + 1)
        kind = correction.relaxation if value == 2 else "none"
        return replace(decision, correction=Expansion(value, relaxation=kind))
    if name == "corrector" and value != "none" and decision.corrector == "none":
        order = min(terms.order + 1, step + 2, MEMORY + 1)
        return replace(decision, corrector=value, correction=Expansion(order))
    return replace(decision, **{name: value})


def _fitted(decisions: Sequence[Decision], to_data: bool) -> tuple[Decision, ...]:
    """Decisions lowered to what the history at each step allows."""
    out = []
    for i, d in enumerate(decisions):
        is_last = i == len(decisions) - 1
        most = 1 if is_last and to_data else min(i, MEMORY) + 1
        terms, correction = d.expansion, d.correction
        if terms.order > most:
            terms = Expansion(most, relaxation=terms.relaxation if most == 2 else "none")
        elif terms.reach > most - 1:
            terms = replace(terms, points=())
        if correction.reach > min(i + 1, MEMORY):
            correction = Expansion(min(i + 1, MEMORY) + 1)
        start = 0 if is_last and to_data else min(d.start, i, MEMORY)
        out.append(replace(d, expansion=terms, correction=correction, start=start,
                           corrector="none" if is_last else d.corrector))
    return tuple(out)


@lru_cache(maxsize=64)
def _options(decisions: tuple[Decision, ...], to_data: bool) -> list[dict[str, list[list[Any]]]]:
    """For each step and field the values, each with the reason why it cannot be (or "")."""
    values: dict[str, Sequence[Any]] = {
        "order": range(1, MAX_ORDER + 1), "prediction": PREDICTIONS, "relaxation": RELAXATIONS,
        "start": range(MEMORY + 1), "corrector": CORRECTORS, "correction_order": range(2, MAX_ORDER + 2)}
    n = len(decisions)
    times, end = tuple(float(n - i) for i in range(n)), None if to_data else 0.0

    def reason(i: int, name: str, value: Any) -> str:
        try:
            Plan(times, (*decisions[:i], _with(decisions[i], name, value, i), *decisions[i + 1 :]), end)
        except ValueError as error:
            return _why(str(error), i, n, to_data)
        return ""

    return [{name: [[v, reason(i, name, v)] for v in some] for name, some in values.items()} for i in range(n)]


def _why(error: str, i: int, n: int, to_data: bool) -> str:
    """A refusal of `Plan` in the editor's words."""
    if error.startswith("last step"):
        return "the step into the data is of order 1, from the current point"
    if "above its history" in error:
        return f"step {i + 1} has {i} earlier {'evaluation' if i == 1 else 'evaluations'} to look back on"
    if "at the last step" in error:
        return "nothing follows the last step"
    return error.partition(": ")[2] or error


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected a whole number from {low} to {high}")


def _or(source: str) -> str:
    return source or "\n# problem = ...  (the one that the editor was opened on)"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
