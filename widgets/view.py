"""View: how a family's runs are shown in the explorer. A family's own stands in views/<family>.py.

It says which panes show a run or a step, what is worth computing ahead, and what the numbers are called. A family
without a view of its own is shown by this base: its pictures, its points, or the series that its runs tell.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from workbench import FAMILIES, METHODS, Cost, Inputs, Run, Step, Timing
from workbench.registry import tensors_of

if TYPE_CHECKING:
    from widgets.explorer import Explorer

BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)  # lengths that are filled in when idle
Stop = Callable[[], bool]


@dataclass
class Pane:
    """One thing to be drawn: a kind that the front end knows, what it is told as JSON, and numbers beside.

    pictures: values (n, H, W[, 3]) uint8, more (n, h, w) uint8 weights laid over them; points: values (n, D) float32;
    curve: lines [{label, x, y, low, high}; bare: without marks], marks [{x, y, text, note}], x, y and better ("up" or
    "down"), log_x, log_y; bars: items [{label, value, error, text; reach: hatched up to it}]; table: head, rows; heat:
    values (H, W) float32; svg: svg, made here, with texts escaped.
    """

    name: str
    kind: str
    told: Mapping[str, Any] = field(default_factory=dict)
    values: Tensor | None = None
    more: Tensor | None = None


def packed(header: Mapping[str, Any], panes: Sequence[Pane]) -> bytes:
    """Length of the header (4 bytes, little-endian), header (JSON) with its panes, and their values after it."""
    told, parts, at = [], [], 0
    for pane in panes:
        entry = {"name": pane.name, "kind": pane.kind, **pane.told}
        for key in ("values", "more"):
            tensor = getattr(pane, key)
            if tensor is not None:
                content = tensor.contiguous().numpy().tobytes()
                entry[key] = {"at": at, "size": len(content), "shape": list(tensor.shape)}
                parts.append(content + b"\0" * (-len(content) % 4))  # what is read as floats starts on four bytes
                at += len(parts[-1])
        told.append(entry)
    head = json.dumps({**header, "panes": told}).encode()
    head += b" " * (-len(head) % 4)
    return struct.pack("<I", len(head)) + head + b"".join(parts)


def measured(value: float, error: float | None = None) -> str:
    """A value with as many decimals as its error has meaning, or to three digits."""
    if error is None or not math.isfinite(error):
        return f"{value:.3g}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 5) if error > 0 else 3
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def finite(value: float) -> float | None:
    """For JSON, which knows no other numbers."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Page:
    """A panel that `widgets.app` serves: make() -> the panel."""

    name: str
    title: str
    question: str
    make: Callable[[], Any]


class View:
    """The base, for families that are content with it; others override what they show better.

    methods: shown by default; all of the family where empty. n_samples: at first. scores: numbers of samples that the
    panel offers to grade with, in batches of `batch`; scored: with how many the shown settings are graded when idle (0:
    as they are). carried: knobs that reference and baseline take over from the settings. named: knobs that titles name
    whatever their value. pages: what `widgets.app` serves of the family.
    """

    methods: ClassVar[tuple[str, ...]] = ()
    n_samples: ClassVar[int] = 16
    scores: ClassVar[tuple[int, ...]] = (64, 256)
    batch: ClassVar[int] = 25
    scored: ClassVar[int] = 0
    carried: ClassVar[tuple[str, ...]] = ()
    named: ClassVar[tuple[str, ...]] = ()
    shows_reference: ClassVar[bool] = False  # whether panes show it beside: drawn anew once it is known
    main_metric: ClassVar[str] = ""  # that the frontier opens with
    has_drift: ClassVar[bool] = False  # whether a run's distance from the reference, sample by sample, means something
    is_pooled: ClassVar[bool] = False  # whether the frontier takes each setting's largest run, whatever its n
    pages: ClassVar[tuple[Page, ...]] = ()
    per: ClassVar[str] = ""  # what costs are divided by, in words; by default the family's word for a sample

    def __init__(self, panel: Explorer) -> None:
        self.panel, self.problem = panel, panel.problem
        self.family = FAMILIES[panel.problem.family]
        self._steps: dict[str, int] = {}  # of runs whose length depends on the data

    # ---- settings

    def check(self, given: Inputs) -> None:
        """Raises ValueError where the problem or the method refuses settings that every knob takes."""

    def n_steps(self, given: Inputs) -> int | None:
        """Steps of a run; None where they depend on the data and the run is not known."""
        if METHODS[given.method].is_bound:
            return self._steps.get(given.key)
        length = given.knobs.get(self.family.length)
        return None if length is None else int(length)

    def title(self, given: Inputs) -> str:
        """The settings in a line: the length, and all that differs from the defaults."""
        n, word = given.n_samples, self.family.sample
        return " · ".join([given.method, *self.words(given), f"seed {given.seed}",
                           f"{n} {word if n == 1 else f'{word}s'}"])

    def words(self, given: Inputs) -> Iterator[str]:
        """The knobs worth naming, each in words."""
        for name, value in given.knobs.items():
            bound = METHODS[given.method].knobs[name]
            if name == self.family.length and bound.knob.unit:
                yield f"{value} {bound.knob.unit if value != 1 else bound.knob.unit.removesuffix('s')}"
            elif name in self.named or value != bound.default:
                entries = value if isinstance(value, tuple) else (value,)
                texts = [f"{v:g}" if isinstance(v, float) else str(v).replace("_", " ") for v in entries]
                yield f"{name.replace('_', ' ')} {'-'.join(texts)}"

    def neighbours(self, now: Inputs) -> Iterator[dict[str, Any]]:
        """Changes that a hand may make next, nearest first: other lengths."""
        name = self.family.length
        here = now.knobs.get(name)
        bound = METHODS[now.method].knobs.get(name)
        if bound is not None and here:
            low, high = bound.knob.soft or (bound.knob.low or 1, bound.knob.high or math.inf)
            for value in sorted((b for b in BUDGETS if low <= b <= high), key=lambda b: abs(math.log(b / here))):
                yield {name: value}

    def ahead(self, shown: Run) -> Iterator[tuple[str, str, Callable[[Stop], None]]]:
        """What else is worth doing while nobody asks: (a name for it, status in words, the work)."""
        return iter(())

    # ---- what happens along a run

    def begins(self, given: Inputs) -> None:
        """A run of these settings is about to start."""

    def saw(self, given: Inputs, step: Step, cost: Cost) -> None:
        """One step of a run that is being made to be shown, or ahead."""
        self._steps[given.key] = step.info["i"] + 1

    def ended(self, given: Inputs) -> None:
        """The run of these settings has gone to its end."""

    def is_drawable(self, run: Run) -> bool:
        """Whether a run that was remembered can be drawn as it is; otherwise it is made anew."""
        return True

    def is_quick(self, step: Step) -> bool:
        """Whether a step is drawn without delay."""
        return True

    def shown(self, given: Inputs, *, is_done: bool) -> None:
        """A frame of these settings is about to be published."""

    def select(self, item: int) -> None:
        """One of the items that a pane shows was chosen. Raises ValueError where there is none such."""
        raise ValueError(f"item={item!r}: nothing is to be chosen here")

    def forgets(self, key: str) -> None:
        """A run is forgotten: what was kept of it may go."""
        self._steps.pop(key, None)

    def releases(self) -> None:
        """The panel sleeps: what can be computed again may go."""

    # ---- what is drawn

    @property
    def drawn_problem(self) -> Any:
        """The problem, with its pictures remembered where that saves time."""
        return self.problem

    def spec(self) -> dict[str, Any]:
        """What the front end is told once, beside methods and metrics."""
        return {"models": [{"name": name, "letter": name[0].upper(), "colour": k}
                           for k, name in enumerate(self.problem.flops)]}

    def panes(self, run: Run) -> list[Pane]:
        """What shows a run: pictures, else the series that it told, else points, else numbers."""
        if self.problem.images is not None and isinstance(run.answer, Tensor):
            with torch.no_grad():
                return [Pane("samples", "pictures", values=self.problem.images(run.answer))]
        told = [name for name in run.trace if name not in ("evaluations", "flops", *self.problem.counted)]
        if told:
            return [curve(name, [line(name, run.trace[name])], x="step", y=name.replace("_", " ")) for name in told]
        if isinstance(run.answer, Tensor) and run.answer.is_floating_point():
            return [Pane("samples", "points", values=run.answer.detach().flatten(1).float().cpu())]
        rows = [[name or "answer", str(tuple(part.shape))] for name, part in tensors_of(run.answer).items()]
        return [Pane("answer", "table", {"head": ["tensor", "shape"], "rows": rows})]

    def early(self, given: Inputs, step: Step) -> list[Pane] | None:
        """What shows a step while the run goes on, or nothing."""
        return None

    def trajectory(self, given: Inputs) -> dict[str, Any]:
        """The strip above the panes, or nothing."""
        return {}

    def costs(self, run: Run, timing: Timing | None) -> list[dict[str, Any]]:
        """The bars of cost, each {name, id, unit, parts: one for each model}, per sample."""
        n, word = self.per_run(run), self.per or self.family.sample
        bars = []
        if any(run.cost.evaluations.values()):
            bars = [{"id": name, "name": f"{label} per {word}", "parts": [x / n for x in part.values()]}
                    for name, label, part in (("evaluations", "evaluations", run.cost.evaluations),
                                              ("flops", "FLOPs", run.cost.flops))]
        bars += [{"id": name, "name": f"{name.replace('_', ' ')} per {word}", "unit": self.problem.counted[name].unit,
                  "parts": [amount / n]} for name, amount in run.cost.counted.items()]
        return bars

    def lines(self, run: Run, reference: Run | None) -> list[dict[str, str]]:
        """Further numbers as text: {id, name, value, note}."""
        return []

    def axes(self) -> list[list[str]]:
        """The costs that the frontier offers: [key, in words], the first one shown."""
        word = self.per or self.family.sample
        known = {"flops": f"FLOPs per {word}", "evaluations": f"evaluations per {word}"} if self.problem.flops else {}
        known |= {name: f"{name.replace('_', ' ')} per {word} ({c.unit})" for name, c in self.problem.counted.items()}
        first = self.family.axis
        return [*([name, known[name]] for name in sorted(known, key=lambda name: name != first)),
                ["ms", f"measured ms per {word}"]]

    def per_run(self, run: Run) -> float:
        """What a run's costs are divided by: samples."""
        return run.inputs.n_samples

    def spent(self, run: Run) -> dict[str, float]:
        """A run's costs for `axes`; "ms" once its time is measured."""
        n, timing = self.per_run(run), self.panel.timings.get(run.inputs.key)
        known = {name: run.cost.amount(name) / n for name, _ in self.axes() if name != "ms"}
        return known | ({"ms": 1e3 * timing.seconds / n} if timing else {})


_VIEWS: dict[str, type[View]] = {}


def shows(family: str) -> Callable[[type[View]], type[View]]:
    """Register a class as the view of a family; again, as a notebook's cell does, replaces it."""

    def register(view: type[View]) -> type[View]:
        _VIEWS[family] = view
        return view

    return register


def view_of(family: str) -> type[View]:
    """The view of a family: registered, of widgets/views/<family>.py, or the base."""
    if family not in _VIEWS:
        name = f"{__package__}.views.{family}"
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    return _VIEWS.get(family, View)


# ---- panes that several families use


def line(label: str, values: Tensor, x: Sequence[float] | None = None, **more: Any) -> dict[str, Any]:
    """A line of a curve: values (steps,) or (steps, n), drawn as their mean and one standard error either way."""
    rows = values.double() if values.ndim > 1 else values.double()[:, None]
    kept = ~rows.isnan().all(1)
    rows = rows[kept]
    mean, n = rows.nanmean(1), (~rows.isnan()).sum(1)
    spread = ((rows - mean[:, None]).square().nansum(1) / (n - 1).clamp(min=1) / n.clamp(min=1)).sqrt()
    at = torch.tensor(list(x), dtype=torch.float64)[kept] if x is not None else torch.arange(len(kept))[kept] + 1
    drawn = {"label": label, "x": at.tolist(), "y": mean.tolist(), **more}
    if values.ndim > 1 and values.shape[1] > 1:
        drawn |= {"low": (mean - spread).tolist(), "high": (mean + spread).tolist()}
    return drawn


def curve(name: str, lines: Sequence[Mapping[str, Any]], *, x: str, y: str, better: str = "", **more: Any) -> Pane:
    """Lines over one axis. better: "up" or "down", which side is."""
    return Pane(name, "curve", {"lines": list(lines), "x": x, "y": y, "better": better, **more})


# ---- a still picture of panes, for hosts without the front end


def still(title: str, panes: Sequence[Pane]) -> bytes | None:
    """A PNG of the first panes that a still can show; None where there is none."""
    from matplotlib.figure import Figure

    drawn = [pane for pane in panes if pane.kind in ("pictures", "points", "curve", "bars", "heat")][:2]
    if not drawn:
        return None
    figure = Figure(figsize=(3.6 * len(drawn), 3.4), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=7, wrap=True)
    for axes, pane in zip(np.atleast_1d(figure.subplots(1, len(drawn))), drawn, strict=True):
        _draw_still(axes, pane)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _draw_still(axes: Any, pane: Pane) -> None:
    values = None if pane.values is None else pane.values.numpy()
    if pane.kind == "pictures":
        assert values is not None
        n = min(len(values), 64)
        columns = math.ceil(math.sqrt(n))
        blank = np.zeros((columns * math.ceil(n / columns) - n, *values.shape[1:]), values.dtype)
        tiles = np.concatenate([values[:n], blank])
        rows = [np.concatenate(list(tiles[k : k + columns]), 1) for k in range(0, len(tiles), columns)]
        axes.imshow(np.concatenate(rows), cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
    elif pane.kind == "heat":
        axes.imshow(values)
    elif pane.kind == "points":
        assert values is not None
        if values.shape[1] == 1:
            axes.hist(values[:, 0], bins=40, color="#56b4e9")
        else:
            axes.plot(values[:, 0], values[:, 1], ".", color="#e69f00", markersize=3)
    elif pane.kind == "curve":
        for entry in pane.told["lines"]:
            axes.plot(entry["x"], entry["y"], label=entry["label"], linewidth=1.2)
        axes.set(xlabel=pane.told["x"], ylabel=pane.told["y"], xscale="log" if pane.told.get("log_x") else "linear",
                 yscale="log" if pane.told.get("log_y") else "linear")
        axes.legend(fontsize=6)
    else:
        items = pane.told["items"]
        axes.barh([item["label"] for item in items], [item["value"] for item in items], color="#56b4e9")
        axes.invert_yaxis()
    axes.tick_params(labelsize=6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_size(7)
