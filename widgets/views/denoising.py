"""Denoising in the explorer: samples as pictures or points, and the strip of which model takes which step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import widgets
import workbench
from widgets.view import Page, Pane, Stop, View, shows
from workbench import METHODS, Cancelled, Cost, Inputs, Memo, Run, Step, Timing
from workbench.cost import Network
from workbench.methods.denoising.t_stitch import full_fractions, progress, step_counts
from workbench.problems.denoising import Denoiser, Point, grid
from workbench.problems.glyphs import glyphs
from workbench.rng import Rng
from workbench.sweeps import address

if TYPE_CHECKING:
    from widgets.explorer import Explorer

TOLERANCES = (0.1, 0.03, 0.01, 0.003, 0.001)  # neighbours where steps are as long as the error allows
PALETTE = ("S", "B", "L")  # letters with a colour of their own, whichever models stand beside them


@shows("denoising")
class DenoisingView(View):
    """Samples, the data estimate while a run goes on, and the trajectory's owners."""

    methods = ("t_stitch", "ddim", "dpmpp_2m")
    scores = (500, 2000)
    carried = ("guidance",)
    named = ("guidance",)
    main_metric = "drift"
    has_drift = True
    pages = (Page("stitching", "Stitching", "How many of a large model's steps can a small one take?",
                  lambda: widgets.explorer(glyphs())),
             Page("solvers", "Solvers", "How few steps does a good solver need?",
                  lambda: widgets.explorer(glyphs(), ("dpm_solver", "unipc", "deis", "edm_heun", "ddim"))))

    def __init__(self, panel: Explorer) -> None:
        super().__init__(panel)
        self._pictures = Memo(32_000_000)
        self._images = self._pictures.wrap("images", self.problem.images) if self.problem.images else None
        self._levels: dict[Any, tuple[list[tuple[float, int]], bool]] = {}  # by method and knobs, see `_walk`
        self._reached: dict[str, list[float]] = {}  # log-SNR after each step of runs whose steps depend on the data
        self._glimpsed: set[str] = set()  # trunks whose pictures are kept

    # ---- settings

    def check(self, given: Inputs) -> None:
        self.trajectory(given)

    def n_steps(self, given: Inputs) -> int | None:
        if "fractions" in given.knobs:
            return int(given.knobs["n_steps"])
        levels, is_open = self._walk(given)
        return None if is_open else len(levels)

    def words(self, given: Inputs) -> Iterator[str]:
        if "fractions" in given.knobs:
            counts = zip(self._letters, self.trajectory(given)["counts"], strict=True)
            others = {name: value for name, value in given.knobs.items() if name != "fractions"}
            steps, *rest = super().words(replace(given, knobs=others))
            yield from (steps, " + ".join(f"{letter} {count}" for letter, count in counts), *rest)
        else:
            yield from super().words(given)

    def neighbours(self, now: Inputs) -> Iterator[dict[str, Any]]:
        """Other switch points, other tolerances where these choose the steps, or other numbers of steps."""
        knobs = METHODS[now.method].knobs
        accuracy = next((name for name in ("tolerance", "rtol")
                         if name in knobs and knobs[name].knob.is_met(now.knobs)), None)
        if "fractions" in now.knobs and len(self.problem.models) > 1:
            reached = [0.0, *self.trajectory(now)["reached"]]
            shares = full_fractions(now.knobs["fractions"], len(self.problem.models))
            ends = [sum(shares[: k + 1]) for k in range(len(shares) - 1)]
            moved = [[*ends[:k], r, *ends[k + 1 :]] for k in range(len(ends)) for r in reached]
            moved = [e for e in moved if e == sorted(e)]
            moved.sort(key=lambda e: sum(abs(a - b) for a, b in zip(e, ends, strict=True)))
            yield from ({"fractions": _differences(e)} for e in moved)
        elif accuracy:
            here = now.knobs[accuracy]
            yield from ({accuracy: t} for t in sorted(TOLERANCES, key=lambda t: abs(math.log(t / here))))
        else:
            yield from super().neighbours(now)

    def ahead(self, shown: Run) -> Iterator[tuple[str, str, Callable[[Stop], None]]]:
        """Pictures along the trajectory that every other switch point starts on: the first model's alone."""
        now = shown.inputs
        if "fractions" not in now.knobs or len(self.problem.models) < 2:
            return
        first = now.knobs.get("order") != "costly_first"
        trunk = workbench.inputs(now.method, self.problem, now.seed, now.n_samples,
                                 **{**now.knobs, "fractions": (float(first),)})
        if trunk.key not in self._glimpsed:
            yield trunk.key, "preparing previews", lambda stop: self._prepare(trunk, stop)

    def _prepare(self, trunk: Inputs, stop: Stop) -> None:
        self.panel.obtain(trunk, stop)
        steps = METHODS[trunk.method].function(self.panel.shared, Rng(trunk.seed, trunk.n_samples), **trunk.knobs)
        for step in steps:
            self._picture(step.info["x0"])
            if stop():
                raise Cancelled
        self._glimpsed.add(trunk.key)

    # ---- along a run

    def begins(self, given: Inputs) -> None:
        self._along: list[float] = []

    def saw(self, given: Inputs, step: Step, cost: Cost) -> None:
        self._along.append(step.info["there"].log_snr)

    def ended(self, given: Inputs) -> None:
        if self._walk(given)[1]:
            self._reached[given.key] = self._along

    def is_quick(self, step: Step) -> bool:
        return self._images is None or self._pictures.get(address("images", (step.info["x0"],))) is not None

    def forgets(self, key: str) -> None:
        self._reached.pop(key, None)

    def releases(self) -> None:
        self._pictures.clear()
        self._glimpsed.clear()

    # ---- what is drawn

    @property
    def drawn_problem(self) -> Any:
        return self.problem if self._images is None else replace(self.problem, images=self._images)

    def spec(self) -> dict[str, Any]:
        law = ""  # samples of the true law, to draw under samples that are no pictures
        if self.problem.images is None and self.problem.data is not None:
            law = self.panel.text_frame([self._samples(self.problem.data(1000, 0))])
        is_known = set(self._letters) <= set(PALETTE)
        return {"law": law, "strip": True, "models": [
            {"name": m.name, "letter": letter, "colour": PALETTE.index(letter) if is_known else k}
            for k, (m, letter) in enumerate(zip(self.problem.models, self._letters, strict=True))]}

    def _picture(self, state: Tensor) -> Tensor:
        """Samples as they are drawn: (n, H, W[, 3]) uint8, or (n, D) float32 where they are no pictures."""
        if self._images is None:
            return state.detach().flatten(1).float().cpu()
        with torch.no_grad():
            return self._images(state)

    def _samples(self, state: Tensor) -> Pane:
        return Pane("samples", "points" if self._images is None else "pictures", values=self._picture(state))

    def panes(self, run: Run) -> list[Pane]:
        return [self._samples(run.answer)]

    def early(self, given: Inputs, step: Step) -> list[Pane]:
        return [self._samples(step.info["x0"])]

    def costs(self, run: Run, timing: Timing | None) -> list[dict[str, Any]]:
        names, n = [m.name for m in self.problem.models], run.inputs.n_samples
        return [{"id": "evaluations", "name": "evaluations per sample",
                 "parts": [run.cost.evaluations[name] / n for name in names]},
                {"id": "flops", "name": "FLOPs per sample", "parts": [run.cost.flops[name] / n for name in names]}]

    @cached_property
    def _letters(self) -> list[str]:
        names = [m.name for m in self.problem.models]
        letters = [name if len(name) <= 2 else name[0].upper() for name in names]
        return letters if len(set(letters)) == len(letters) else [str(i + 1) for i in range(len(names))]

    def trajectory(self, given: Inputs) -> dict[str, Any]:
        """Log-SNR before each step, steps per model, and whose they are, [model, steps] in order.

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
        """Each step's (log-SNR that it starts from, its model's index), and whether more is to come.

        Where a method tells no steps, as they depend on the data, a run must tell; before it only the first is known,
        by what is asked first. Raises ValueError where the method refuses these settings.
        """
        key = (given.method, *given.knobs.items())
        if key not in self._levels:
            self._levels[key] = self._told(given)
        levels, depends = self._levels[key]
        if depends and given.key in self._reached:
            first, owner = levels[0]
            return [(at, owner) for at in (first, *self._reached[given.key][:-1])], False
        return levels, depends

    def _told(self, given: Inputs) -> tuple[list[tuple[float, int]], bool]:
        """`_walk` before a run, on one sample of one entry: the method is followed until it asks a network."""
        names, told = [m.name for m in self.problem.models], []

        def tell(points: Sequence[Point], owners: Sequence[Denoiser]) -> None:
            told.extend((point.log_snr, names.index(owner.name)) for point, owner in zip(points, owners, strict=False))

        def ask(name: str, network: Network) -> Network:
            def asked(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
                raise _Asked(self.problem.models[names.index(name)].schedule.at(float(t[0])).log_snr, names.index(name))

            return asked

        one = replace(self.problem.wrapped(ask), shape=(1,), labels=lambda n: None, device="cpu", tell=tell)
        try:
            next(METHODS[given.method].function(one, Rng(0, 1), **given.knobs))
        except _Asked as first:
            return told or [first.args], not told
        return told, False


class _Asked(Exception):
    """A network was asked: (at which log-SNR, the model's index)."""


def _differences(ends: Sequence[float]) -> tuple[float, ...]:
    """Shares from cumulated shares, rounded so that equal settings get equal keys."""
    return tuple(round(b - a, 12) for a, b in zip([0.0, *ends[:-1]], ends, strict=True))
