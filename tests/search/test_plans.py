"""The searched plans that are shipped: what their card claims holds on noise that the search never saw."""

from __future__ import annotations

import json

import torch

from workbench.methods.denoising.usf import run_plan
from workbench.plan import Plan, preset_plan
from workbench.problems.denoising import grid
from workbench.problems.glyphs import glyphs
from workbench.quality import drift
from workbench.rng import Rng
from workbench.zoo import PLANS


def test_a_searched_plan_is_nearer_to_the_reference_than_the_best_untuned_one():
    card, problem = json.loads((PLANS / "card.json").read_text()), glyphs(("l",))
    assert problem.digest == card["digest"]
    seed, n = 77, 24

    def end(steps) -> torch.Tensor:
        return list(steps)[-1].state

    points = grid(problem.schedule, 50, "trailing")
    reference = end(run_plan(problem, Rng(seed, n), preset_plan("dpmpp_2m", points)))
    for budget, found in card["plans"].items():
        plan = Plan.load(PLANS / found["file"])
        preset, spacing, final = found["best_untuned"]
        untuned = preset_plan(preset, grid(problem.schedule, int(budget), spacing, final))
        assert plan.evaluations == untuned.evaluations == int(budget)
        far = [drift(end(run_plan(problem, Rng(seed, n), p)), reference).value for p in (plan, untuned)]
        assert far[0] < 0.9 * far[1], far
