"""Learning in the explorer: test accuracy against examples processed, and examples that a score calls hard or easy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import widgets
from widgets.view import Page, Pane, View, curve, line, shows
from workbench import Cost, Inputs, Run, Step
from workbench.problems.learning import digits

KEPT = 100  # runs of which the hard and easy examples are kept


@shows("learning")
class LearningView(View):
    """Learning curves of this run and of the full data, and what was selected by score."""

    methods = ("rs2", "el2n", "tracin", "forgetting", "vog", "pvi")
    n_samples = 8
    batch = 8
    scores = (32, 128)
    named = ("keep",)
    carried = ("n_epochs", "learning_rate", "batch_size", "schedule")
    main_metric = "test_accuracy"
    shows_reference = True
    pages = (Page("learning", "Learning from less", "Which examples are worth learning from?",
                  lambda: widgets.explorer(digits())),)

    def __init__(self, panel: Any) -> None:
        super().__init__(panel)
        self._along: list[tuple[float, Tensor]] = []  # examples and accuracy (n,) so far
        self._told: OrderedDict[str, Mapping[str, Any]] = OrderedDict()  # the last step's info, by run

    def begins(self, given: Inputs) -> None:
        self._along = []

    def saw(self, given: Inputs, step: Step, cost: Cost) -> None:
        super().saw(given, step, cost)
        if "accuracy" in step.trace:
            self._along.append((cost.total_evaluations / given.n_samples, torch.as_tensor(step.trace["accuracy"])))
        self._told[given.key] = step.info
        while len(self._told) > KEPT:
            self._told.popitem(last=False)

    def panes(self, run: Run) -> list[Pane]:
        lines = [self._line("this run", run, colour=0)]
        reference = self.panel.reference(run.inputs)
        if reference is not None and reference.inputs != run.inputs:
            lines.append(self._line("all data", reference, colour=1))
        return [self._curve(lines), *self._examples(self._told.get(run.inputs.key, {}))]

    def early(self, given: Inputs, step: Step) -> list[Pane]:
        if not self._along:
            return self._examples(step.info)
        at, accuracy = zip(*self._along, strict=True)
        return [self._curve([line("this run", torch.stack(accuracy), at, colour=0)]), *self._examples(step.info)]

    def _line(self, label: str, run: Run, colour: int) -> dict[str, Any]:
        return line(label, run.trace["accuracy"], (run.trace["evaluations"] / run.inputs.n_samples).tolist(),
                    colour=colour)

    def _curve(self, lines: Sequence[Mapping[str, Any]]) -> Pane:
        return curve("accuracy", lines, x="examples processed, selection counted", y="test accuracy", better="up",
                     log_x=True)

    def _examples(self, told: Mapping[str, Any]) -> list[Pane]:
        """The first replicate's hardest and easiest examples, or what its last epoch learned from."""
        chosen = [("hardest", told["hardest"]), ("easiest", told["easiest"])] if "hardest" in told else [
            ("learned from", told["subset"][:16])] if "subset" in told else []
        drawn = ((name, self.problem.pictures(indices)) for name, indices in chosen)
        return [Pane(name.replace(" ", "_"), "pictures", {"title": f"{name}, first replicate", "small": True}, pictures)
                for name, pictures in drawn if pictures is not None]
