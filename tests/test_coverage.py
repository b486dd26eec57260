"""The intervals hold the truth as often as they say: the fast form of `tests/coverage.py`; docs hold the full one."""

from __future__ import annotations

import math

import pytest
import torch
from coverage import N_CLASSES, Case, letter_cases, letters, pick, plane_cases, text_cases

from workbench.quality import LEVEL, Drawn, Quality, proportion

REPEATS = 200
LOWEST, HIGHEST = 0.93, 0.97  # what the full form is held to; here widened by three errors of a share of REPEATS
SLACK = 3 * math.sqrt(LEVEL * (1 - LEVEL) / REPEATS)
MAKERS = {"letters": letter_cases, "plane": plane_cases, "text": text_cases}


def check(case: Case) -> None:
    share, _, _ = case.covered(REPEATS)
    assert share >= LOWEST - SLACK, f"{case.name}: {share:.3f} of the intervals hold the truth"


@pytest.mark.slow
@pytest.mark.parametrize("family", MAKERS)
def test_intervals_hold_the_truth(family):
    for case in MAKERS[family]():
        check(case)


def test_errors_are_those_of_the_design():
    """Broken twins: classes in turn taken for independent draws (too wide), windows for documents (too narrow)."""
    hits = letters()[1].double()
    hard = torch.arange(N_CLASSES).repeat_interleave(len(hits) // N_CLASSES) % 2 == 0  # every second class is unread
    hits = torch.where(hard, torch.zeros_like(hits), hits)

    def share(is_stratified: bool) -> Case:
        def draw(stream: torch.Generator) -> Quality:
            at, labels = pick(144, stream)
            return proportion(hits[at] > 0, Drawn(144, labels if is_stratified else None))
        return Case("accuracy", 144, draw, float(hits.mean()))

    def windows(is_clustered: bool) -> Case:
        def draw(stream: torch.Generator) -> Quality:
            level = torch.randn(45, generator=stream).repeat_interleave(20)
            clusters = torch.arange(45).repeat_interleave(20)
            return Drawn(900, clusters=clusters if is_clustered else None).mean(
                level + torch.randn(900, generator=stream))
        return Case("windows", 900, draw, 0.0)

    check(share(True))
    check(windows(True))
    assert share(True).covered(REPEATS)[2] < 0.8 * share(False).covered(REPEATS)[2]
    with pytest.raises(AssertionError, match="windows"):
        check(windows(False))
