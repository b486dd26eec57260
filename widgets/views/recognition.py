"""Recognition in the explorer: the patches that are left, drawn over the pictures, and how many there are by block."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

import widgets
from widgets.view import Page, Pane, View, curve, line, shows
from workbench import Cost, Inputs, Run, Step
from workbench.problems.recognition import glyphs_in_clutter

KEPT = 200  # runs of which the patches are kept


@shows("recognition")
class RecognitionView(View):
    """Pictures in which what was dropped is a shadow, after the last block or while blocks go by."""

    scores = (256, 1024)
    named = ("cap", "first_block", "pick")
    main_metric = "accuracy"
    pages = (Page("tokens", "Tokens that count", "How few tokens of an image are enough to read it?",
                  lambda: widgets.explorer(glyphs_in_clutter())),)

    def __init__(self, panel: Any) -> None:
        super().__init__(panel)
        self._told: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()  # patches left and classes read, by run
        self._along: list[Tensor] = []

    def n_steps(self, given: Inputs) -> int | None:
        return min(int(given.knobs["n_blocks"]), self.problem.layers.n_blocks)

    def begins(self, given: Inputs) -> None:
        self._along = []

    def saw(self, given: Inputs, step: Step, cost: Cost) -> None:
        self._along.append(torch.as_tensor(step.trace["tokens"]))
        self._told[given.key] = step.info["kept"], step.info["read"]
        while len(self._told) > KEPT:
            self._told.popitem(last=False)

    def is_drawable(self, run: Run) -> bool:
        return run.inputs.key in self._told

    def forgets(self, key: str) -> None:
        self._told.pop(key, None)

    def panes(self, run: Run) -> list[Pane]:
        return self._drawn(run.inputs, run.trace["tokens"])

    def early(self, given: Inputs, step: Step) -> list[Pane]:
        return self._drawn(given, torch.stack(self._along))

    def neighbours(self, now: Inputs) -> Any:
        """Other caps."""
        near = sorted((1, 2, 4, 8, 12, 16, 24, 32, 48, 64), key=lambda cap: abs(cap - now.knobs["cap"]))
        return ({"cap": cap} for cap in near)

    def _drawn(self, given: Inputs, tokens: Tensor) -> list[Pane]:
        images = self.problem.cases(given.seed, given.n_samples)
        left, read = self._told.get(given.key, (None, None))
        shown = ((images.pixels[:, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        more, said = None, {}
        if left is not None and read is not None:
            grid = left.view(len(left), 1, *self.problem.grid).float()
            more = (255 * interpolate(grid, size=shown.shape[1:])[:, 0]).to(torch.uint8)
            n_right = int((read.cpu() == images.labels).sum())
            said = {"caption": f"{n_right} of {len(images)} read right"}
        return [Pane("samples", "pictures", said, shown, more),
                curve("tokens", [line("patches left", tokens, colour=0)], x="block", y="patches", low=0.0)]
