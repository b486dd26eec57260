"""The schedule editor: the steps of a solver as marks on a log-SNR axis, and live what moving them does.

`ScheduleEditor` is the controller and knows no toolkit: it keeps the plan and what plans answered. `editor.js` draws
what it publishes.
"""

from __future__ import annotations

import base64
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import anywidget
import torch
import traitlets
from torch import Tensor

from widgets.desk import FRAME, Desk, Pace, Stop
from widgets.live import bundle, script
from widgets.steps import FIELDS, decided, divided, moved, options, whole, without
from widgets.view import Pane, curve, finite, packed, still
from workbench import Cancelled, Memo, Quality
from workbench.cost import Meter
from workbench.methods.denoising.usf import run_plan
from workbench.plan import PRESETS, Decision, Plan, preset_plan
from workbench.problems.denoising import FINALS, SPACINGS, Denoising, Point, grid, noisiest
from workbench.rng import Rng
from workbench.search.truth import Truth, errors_on_seeds, has_flow

__all__ = ["ScheduleEditor", "errors_on_seeds", "schedule_editor"]

HERE = Path(__file__).parent
MAX_STEPS = 40
GAP = 0.02  # least distance between two marks, in log-SNR
KEPT = 64  # answers of plans that are remembered
ARMS = {"yours": "yours", "preset": "preset", "best": "best found"}  # in words


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
        whole("seed", self.seed, 0, 2**63 - 1)


@dataclass
class Answer:
    """What a plan made of one seed's noise. curve: (log-SNR, RMS error) along `places`; error: at the end."""

    plan: Plan
    evaluations: float  # per sample, as metered
    state: Tensor
    places: list[Point]  # where `trail` is
    trail: list[Tensor]
    curve: list[tuple[float, float]] | None = None
    error: Quality | None = None
    pixels: Tensor | None = field(default=None, repr=False)


class ScheduleEditor(Desk):
    """Live editor of a solver schedule. Use `schedule_editor(...)`; as a cell's last line it shows itself.

    plan: the schedule now; answers: {"yours", "preset", "best"}: Answer, as far as they are known; view, frames: what
    the front end draws. With WORKBENCH_HEADLESS set in the environment there is no worker: changes run at once and
    raise.
    """

    def __init__(self, problem: Denoising, n_steps: int = 8, preset: str = "dpmpp_2m", best: Plan | None = None,
                 seed: int = 0, n_samples: int = 16, spacing: str = "log_snr", final: str = "zero") -> None:
        whole("n_steps", n_steps, 1, MAX_STEPS)
        whole("n_samples", n_samples, 1, 100_000)
        if best is not None and not isinstance(best, Plan):
            raise ValueError(f"best={best!r}: expected a Plan, e.g. Plan.load('plan.json')")
        self.problem, self.best, self.n_samples = problem, best, n_samples
        self.guidance = float(problem.preset.get("guidance", 1.0))
        schedule = problem.schedule
        self._ends = noisiest(schedule), schedule.at(schedule.cleanest)
        if best is not None:
            self._fits(best)
        self.has_flow = has_flow(problem)
        self._memo = Memo(256_000_000)
        self._shared = problem.wrapped(self._watched).wrapped(self._memo.wrap)
        self._answers: OrderedDict[tuple[str, int], Answer] = OrderedDict()
        self._truth: Truth | None = None  # of the last seed that was asked for
        self._found: Truth | None = None  # the last one found
        self._open("editor", dict.fromkeys(ARMS, b""))
        self._revision = 0
        self._drawn: dict[str, tuple[str, int] | None] = dict.fromkeys(ARMS)
        check = Setting(_LINE, preset, spacing, final, seed)
        self.setting = self._start = replace(check, plan=self._preset_plan(check, n_steps))
        self._publish("spec", self._spec())
        self._publish_view()
        self._wake()

    # ---------------------------------------------------------------- what a notebook uses

    @property
    def plan(self) -> Plan:
        return self.setting.plan

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
        whole("step", step, 0, len(plan.times) - (plan.end is None))
        if not isinstance(log_snr, int | float) or not math.isfinite(log_snr):
            raise ValueError(f"log_snr={log_snr!r}: expected a finite number")
        low, high = self._room(plan, step)
        if not low - 1e-9 <= log_snr <= high + 1e-9:
            raise ValueError(f"log_snr={log_snr:.4g} of mark {step + 1}: expected {low:.4g} to {high:.4g}, between its "
                             "neighbours" + (", which are too close" if low > high else ""))
        there = self._time(min(max(log_snr, low), high))
        self._move(replace(self.setting, plan=moved(plan, step, there)), gesture)

    def decide(self, step: int, **fields: Any) -> None:
        """Change a step's decision: order, prediction, relaxation, start, corrector, correction_order.

        Raises ValueError where its history or its place does not allow it, TypeError for another field.
        """
        whole("step", step, 0, len(self.plan.times) - 1)
        self._move(replace(self.setting, plan=decided(self.plan, step, **fields)))

    def add(self, step: int, log_snr: float | None = None) -> None:
        """A step more: divides `step` at a noise level, or in its middle. Raises ValueError where there is no room."""
        n, levels = len(self.plan.times), self._levels(self.plan)
        whole("step", step, 0, n - 1)
        whole("steps", n + 1, 1, MAX_STEPS)
        low, high = levels[step], min(levels[step + 1], self._ends[1].log_snr)
        place = (low + high) / 2 if log_snr is None else log_snr
        if not low + GAP <= place <= high - GAP * (levels[step + 1] <= high):
            raise ValueError(f"log_snr={place:.4g}: no room for another mark, expected one between {low + GAP:.4g} and "
                             f"{high - GAP:.4g}")
        self._move(replace(self.setting, plan=divided(self.plan, step, self._time(place))))

    def remove(self, step: int) -> None:
        """A step less; the one before goes as far as this one went, and orders sink to what the history still allows.

        Raises ValueError where it is the only one.
        """
        whole("step", step, 0, len(self.plan.times) - 1)
        self._move(replace(self.setting, plan=without(self.plan, step)))

    def compare(self, **fields: Any) -> None:
        """Another preset, spacing, final or seed to compare with. Raises ValueError where there is none such."""
        setting = replace(self.setting, **fields)
        self._preset_plan(setting, setting.plan.evaluations)
        self._move(setting)

    def use(self, preset: str | None = None, spacing: str | None = None, final: str | None = None,
            n_steps: int | None = None) -> None:
        """Start from a preset, by default the one compared with at as many evaluations. Raises as `compare`."""
        now = self.setting
        setting = replace(now, preset=preset or now.preset, spacing=spacing or now.spacing, final=final or now.final)
        n = now.plan.evaluations if n_steps is None else n_steps
        whole("n_steps", n, 1, MAX_STEPS)
        self._move(replace(setting, plan=self._preset_plan(setting, n)))

    def load(self, plan: Plan | str) -> None:
        """A plan, or its JSON text. Raises ValueError where it is none, too long, or outside the problem's schedule."""
        given = Plan.from_json(plan) if isinstance(plan, str) else plan
        self._fits(given)
        self._move(replace(self.setting, plan=given))

    def wait(self, timeout: float = 120) -> None:
        """Until all plans have answered and are graded, or cannot be. Raises what running your own plan raised."""
        if not self.is_headless:
            self._await(lambda: self._is_idle, timeout, self._name(self.plan))

    def code(self) -> str:
        """Python that runs the plan: as a scheduler in a diffusers pipeline where the problem is of pipelines."""
        source = self.problem.source or "\n# problem = ...  (the one that the editor was opened on)"
        bare = (f"from workbench.methods.denoising.usf import run_plan\nfrom workbench.plan import Plan\n{source}\n"
                f"from workbench.rng import Rng\n\nplan = Plan.from_json({self.plan.to_json()!r})\n"
                f"*_, last = run_plan(problem, Rng({self.setting.seed}, {self.n_samples}), plan, "
                f"guidance={self.guidance})\nprint(last.state.shape)\n")
        if self.problem.code is None:
            return bare
        return (bare + "\n# in a diffusers pipeline\n"
                "from workbench.integrations.schedulers import UnifiedSolverScheduler\n\n"
                "def scheduled(pipe):\n"
                "    pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, plan=plan)\n"
                f"    return pipe  # call it with num_inference_steps={len(self.plan.times)}\n")

    # ---------------------------------------------------------------- the front end's side

    def _actions(self, intent: Mapping[str, Any]) -> Mapping[str, Callable[[], object]]:
        return {
            "move": lambda: self.move(intent["step"], intent["log_snr"], intent.get("gesture")),
            "decide": lambda: self.decide(intent["step"], **intent["fields"]),
            "add": lambda: self.add(intent["step"], intent.get("log_snr")),
            "remove": lambda: self.remove(intent["step"]),
            "compare": lambda: self.compare(**intent["fields"]),
            "use": lambda: self.use(n_steps=intent.get("n_steps")),
            "use_best": lambda: self.load(self.best) if self.best else None,
            "load": lambda: self.load(intent["text"]),
            "code": lambda: self._reply(intent, text=self.code()),
            "json": lambda: self._reply(intent, text=self.plan.to_json()),
        }

    # ---------------------------------------------------------------- plans

    def _preset_plan(self, s: Setting, n_steps: int) -> Plan:
        return preset_plan(s.preset, grid(self.problem.schedule, n_steps, s.spacing, s.final))

    def _fits(self, plan: Plan) -> None:
        plan.grid(self.problem.schedule)
        whole("steps of the plan", len(plan.times), 1, MAX_STEPS)

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

    @property
    def _settings(self) -> Setting:
        return self.setting

    def _go(self, wanted: Setting) -> None:
        if wanted == self.setting and self._error is None:
            return
        self.setting = wanted
        self._wake()

    # ---------------------------------------------------------------- the worker

    def _at_once(self) -> None:
        while task := self._asked() or self._task():
            task(lambda: False)

    def _release(self) -> None:
        self._memo.clear()

    @property
    def _plans(self) -> dict[str, Plan]:
        """The plans on show. The preset is one of as many evaluations, and left out where there is no such grid."""
        s, found = self.setting, {"yours": self.plan}
        with suppress(ValueError):
            found["preset"] = self._preset_plan(s, s.plan.evaluations)
        return found | ({"best": self.best} if self.best else {})

    def _wanted(self) -> dict[str, tuple[str, int]]:
        """What their answers are known by."""
        return {arm: (plan.to_json(), self.setting.seed) for arm, plan in self._plans.items()}

    def _asked(self) -> Callable[[Stop], object] | None:
        """Your plan, run and drawn."""
        key = self._wanted()["yours"]
        return None if self._is_shown("yours", key) else partial(self._show, "yours", key)

    def _task(self) -> Callable[[Stop], object] | None:
        """What your plan is compared with, then the truth, then the distances from it."""
        seed, wanted = self.setting.seed, self._wanted()
        for arm, key in wanted.items():
            if not self._is_shown(arm, key) and str(key) not in self._failed:
                status = f"running the {'preset' if arm == 'preset' else 'best schedule'}"
                return lambda stop: self._apart(str(key), status, partial(self._show, arm, key, stop))
        for key in wanted.values():
            answer = self._answers.get(key)
            if answer is None or answer.curve is not None or f"grade {key}" in self._failed:
                continue
            if self._is_found(seed):
                return lambda stop: self._grade(key)
            if f"truth {seed}" not in self._failed:
                status = "solving the exact flow" if self.has_flow else "computing the reference"
                return lambda stop: self._apart(f"truth {seed}", status, partial(self._find, seed, stop))
        return None

    def _is_found(self, seed: int) -> bool:
        return self._found is not None and self._found.seed == seed

    def _is_shown(self, arm: str, key: tuple[str, int]) -> bool:
        return key in self._answers and self._drawn[arm] == key

    def _show(self, arm: str, key: tuple[str, int], stop: Stop) -> None:
        answer = self._answers.get(key)
        if answer is None:
            answer = self._run(arm, Plan.from_json(key[0]), key[1], stop)
        with self._change:
            self._answers[key] = answer
            self._answers.move_to_end(key)
            while len(self._answers) > KEPT:
                self._answers.popitem(last=False)
            self._drawn[arm] = key
        self._status = ""
        self._publish(arm, self._frame(answer, self._picture(answer), len(answer.plan.times)))
        if self._is_found(key[1]) and answer.curve is None:
            self._grade(key)  # at once, so that the error follows the hand
        else:
            self._publish_view()

    def _run(self, arm: str, plan: Plan, seed: int, stop: Stop) -> Answer:
        """Run a plan; while it takes long, show the data estimates on the way."""
        meter = Meter(self.problem.prices)
        points = plan.grid(self.problem.schedule)
        states, estimates = [], []
        answer = Answer(plan, 0.0, torch.empty(0), points[1:], states)
        pace, self._fresh = Pace(FRAME), False
        for i, step in enumerate(run_plan(self._shared.wrapped(meter.wrap), Rng(seed, self.n_samples), plan,
                                          guidance=self.guidance), 1):
            states.append(step.state)
            estimates.append(step.info["x0"])
            if arm == "yours" and self._fresh and i < len(plan.times):
                pace.draw(partial(self._preview, answer, step.info["x0"], i))
            if stop():  # asked after the preview, so that a steady drag shows something
                raise Cancelled
        if not bool(torch.isfinite(states[-1]).all()):
            raise ValueError(f"{self._name(plan)}: the samples are not finite; lower an order or move marks apart")
        answer.state, answer.evaluations = states[-1], sum(meter.evaluations.values()) / self.n_samples
        if not self.has_flow:  # of pictures the end is known, but not the way there: the estimates of it are compared
            answer.places, answer.trail = points[:-1], estimates
        return answer

    def _preview(self, answer: Answer, estimate: Tensor, step: int) -> None:
        self._publish("yours", self._frame(answer, self._pictured(estimate), step))

    def _find(self, seed: int, stop: Stop) -> None:
        """The truth of a seed; what was found of it before it was overtaken is kept."""
        if self._truth is None or self._truth.seed != seed:
            self._truth = Truth(self.problem if self.has_flow else self._shared, seed, self.n_samples)
        self._truth.find(stop)
        self._found = self._truth

    def _grade(self, key: tuple[str, int]) -> None:
        self._unasked(f"grade {key}", lambda: self._judge(self._answers[key]))
        self._tell("")

    def _judge(self, answer: Answer) -> None:
        """The answer's distance from the truth, at the end and along the way."""
        truth, pixels = self._found, self._picture(answer)
        assert truth is not None
        along = [(p.log_snr, float((x - truth.at(p)).double().square().mean().sqrt()))
                 for p, x in zip(answer.places, answer.trail, strict=True)]
        error = truth.error(answer.state, answer.places[-1], pixels if self.problem.images else None)
        with self._change:
            answer.curve, answer.error = along, error

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

    def _pane(self, pixels: Tensor) -> Pane:
        return Pane("samples", "points" if self.problem.images is None else "pictures", values=pixels)

    def _frame(self, answer: Answer, pixels: Tensor, step: int) -> bytes:
        """Title and picture in one message."""
        self._revision += 1
        return packed({"revision": self._revision, "title": self._name(answer.plan), "step": step,
                       "of": len(answer.plan.times)}, [self._pane(pixels)])

    def _name(self, plan: Plan) -> str:
        """What a plan is, in a few words."""
        n, s = len(plan.times), self.setting
        steps = f"{n} steps" if n != 1 else "1 step"
        if plan == self.best:
            return f"best found · {steps}"
        if plan == self._plans.get("preset"):
            return f"{s.preset} on {s.spacing} · {steps}"
        return f"own schedule · {steps}"

    def _spec(self) -> dict[str, Any]:
        """What stays as it is."""
        law = ""  # samples of the true law, to draw under samples that are no pictures
        if self.problem.images is None and self.problem.data is not None:
            pane = self._pane(self._pictured(self.problem.data(1000, 0)))
            law = base64.b64encode(packed({}, [pane])).decode()
        method, knobs = self.problem.reference
        reference = f"{method}, {knobs.get('n_steps', 20)} steps"
        return {
            "problem": self.problem.name, "law": law, "arms": ARMS,
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
        return {"times": [p.t for p in points], "levels": [finite(v) for v in levels],
                "steps": [{"order": d.expansion.order, "prediction": d.prediction, "relaxation": d.expansion.relaxation,
                           "start": d.start, "corrector": d.corrector, "correction_order": d.correction.order}
                          for d in plan.decisions]}

    def _view(self) -> dict[str, Any]:
        """All that changes, but for pictures."""
        s, plans, answers = self.setting, self._plans, self.answers
        arms = {}
        for arm, key in self._wanted().items():
            plan, answer = plans[arm], answers.get(arm)
            error = answer.error if answer else None
            arms[arm] = {
                "title": self._name(plan), "levels": [finite(v) for v in self._levels(plan)],
                "steps": len(plan.times), "evaluations": answer.evaluations if answer else None,
                "error": error and [error.value, finite(error.stderr), error.n],
                "curve": [[finite(x), y] for x, y in answer.curve] if answer and answer.curve else [],
                "has_failed": bool({str(key), f"grade {key}", f"truth {s.seed}"} & self._failed),
            }
        return {
            **self._said, "is_stale": "yours" not in answers,
            "marks": self._marks(s.plan), "options": options(s.plan.decisions, s.plan.end is None), "arms": arms,
            "compare": {"preset": s.preset, "spacing": s.spacing, "final": s.final}, "seed": s.seed,
            "n_samples": self.n_samples, "evaluations": s.plan.evaluations * self.problem.branches(self.guidance),
            "missing": "" if "preset" in plans else f"{s.spacing} has no grid of {s.plan.evaluations} steps here",
        }

    @cached_property
    def widget(self) -> ScheduleEditorWidget:
        """The one widget of this editor; it may be displayed any number of times."""
        return ScheduleEditorWidget(self)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return bundle(self, **kwargs)

    def _still(self) -> dict[str, Any]:
        """What is shown, as plain text and, once your plan has answered, as PNG."""
        answers = self.answers
        text = "\n".join([f"Schedule editor on {self.problem.name}: {self._name(self.plan)}",
                          *(f"{ARMS[arm]}, {self._name(a.plan)}: {a.evaluations:g} evaluations"
                            + (f", error {a.error}" if a.error else "") for arm, a in answers.items())])
        if "yours" not in answers:
            return {"text/plain": text}
        along = {arm: [(x, y) for x, y in a.curve or () if math.isfinite(x)] for arm, a in answers.items()}
        lines = [{"label": ARMS[arm], "x": [x for x, _ in points], "y": [y for _, y in points]}
                 for arm, points in along.items() if points]  # but for the data, which lies at infinity
        panes = [self._pane(self._picture(answers["yours"]))]
        if lines:
            panes.append(curve("error", lines, x="log-SNR", y=f"{self.published['spec']['curve']}, RMS", log_y=True,
                               better="down"))
        return {"text/plain": text, "image/png": still(self._name(self.plan), panes)}


class ScheduleEditorWidget(anywidget.AnyWidget):
    """A ScheduleEditor in JupyterLab. Wishes come as messages, results go as traits: each is set by one side only."""

    _esm = script("core.js", "ticks.js", "plot.js", "link.js", "knobs.js", "head.js", "panes.js", "editor.js")
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


_LINE = Plan((1.0,), (Decision(),))  # stands in while the other settings are checked
