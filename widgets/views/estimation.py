"""Estimation in the explorer: what is reported and what is true, question by question, or error against rows kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import widgets
from widgets.view import Page, Pane, View, curve, line, shows
from workbench import Cost, Inputs, Run, Step
from workbench.problems.estimation import Holdout, holdout, rows


@shows("estimation")
class EstimationView(View):
    """One curve, from what the steps told."""

    n_samples = 16
    scores = (100, 400)
    carried = ("n_features", "n_rounds", "p")
    named = ("threshold", "n_kept", "score", "variant")
    pages = (Page("holdout", "Looks have a price", "How often may a holdout set be asked?",
                  lambda: widgets.explorer(holdout())),
             Page("rows", "Rows that matter", "How few rows of a tall matrix will do?",
                  lambda: widgets.explorer(rows())))

    def __init__(self, panel: Any) -> None:
        super().__init__(panel)
        self._along: list[Mapping[str, Any]] = []

    def begins(self, given: Inputs) -> None:
        self._along = []

    def saw(self, given: Inputs, step: Step, cost: Cost) -> None:
        super().saw(given, step, cost)
        self._along.append(step.trace)

    def panes(self, run: Run) -> list[Pane]:
        return self._drawn(run.inputs, run.trace)

    def early(self, given: Inputs, step: Step) -> list[Pane]:
        return self._drawn(given, {name: torch.stack([torch.as_tensor(told[name]) for told in self._along])
                                   for name in self._along[-1]})

    def _drawn(self, given: Inputs, trace: Mapping[str, Any]) -> list[Pane]:
        if isinstance(self.problem, Holdout):
            at = [given.knobs["n_features"] * (r + 1) / given.knobs["n_rounds"] for r in range(len(trace["true"]))]
            told = [line(name, trace[name], at, colour=k) for k, name in ((1, "reported"), (0, "true"))]
            return [curve("curve", told, x="features that vote", y="accuracy of the classifier"),
                    curve("left", [line("budget left", trace["left"], at, colour=3)], x="features that vote",
                          y="answers left", title="what the holdout may still tell")]
        kept = trace["kept"].double().reshape(len(trace["kept"]), -1).mean(1).tolist()
        return [curve("curve", [line("distortion", trace["distortion"], kept, colour=0)], x="rows kept",
                      y="|estimate / truth - 1|", better="down", low=0.0)]
