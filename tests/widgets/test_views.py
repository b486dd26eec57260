"""What families show: panes, numbers beside, and what stands in a saved notebook."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
import torch

from widgets import explorer
from widgets.view import Pane, View, line, packed, still, view_of
from widgets.views.estimation import EstimationView
from widgets.views.learning import LearningView
from workbench import FAMILIES
from workbench.problems.estimation import holdout, rows
from workbench.problems.learning import digits, gaussians


@pytest.fixture(autouse=True)
def headless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")


def panes(frame: bytes) -> dict[str, Any]:
    size = struct.unpack("<I", frame[:4])[0]
    return {pane["name"]: pane for pane in json.loads(frame[4 : 4 + size])["panes"]}


def test_a_frame_holds_the_values_of_its_panes_in_their_places():
    pixels, points = torch.arange(2 * 3 * 3, dtype=torch.uint8).view(2, 3, 3), torch.randn(5, 2)
    frame = packed({"title": "t"}, [Pane("a", "pictures", {"title": "x"}, pixels), Pane("b", "points", {}, points)])
    size = struct.unpack("<I", frame[:4])[0]
    assert size % 4 == 0  # floats are read from places that four divides
    found = panes(frame)
    for name, dtype, values in (("a", np.uint8, pixels), ("b", np.float32, points)):
        where = found[name]["values"]
        start = 4 + size + where["at"]
        read = np.frombuffer(frame[start : start + where["size"]], dtype).reshape(where["shape"])
        assert where["at"] % 4 == 0 and np.array_equal(read, values.numpy())


def test_a_line_is_a_mean_with_its_standard_error_and_leaves_out_what_was_not_told():
    values = torch.tensor([[1.0, 3.0], [torch.nan, torch.nan], [2.0, 2.0]])
    drawn = line("x", values, [10, 20, 30])
    assert drawn["x"] == [10, 30] and drawn["y"] == [2, 2] and drawn["low"] == [1, 2] and drawn["high"] == [3, 2]
    assert "low" not in line("x", torch.tensor([1.0, 2.0])) and line("x", torch.tensor([1.0, 2.0]))["x"] == [1, 2]


@pytest.mark.parametrize("kind", ["pictures", "points", "curve", "bars", "heat"])
def test_every_kind_has_a_still(kind):
    values = {"pictures": torch.zeros(5, 4, 4, dtype=torch.uint8), "points": torch.randn(9, 2),
              "heat": torch.rand(3, 4)}.get(kind)
    told = {"curve": {"lines": [line("a", torch.rand(4))], "x": "x", "y": "y"},
            "bars": {"items": [{"label": "a", "value": 1.0}]}}.get(kind, {})
    assert still("title", [Pane("p", kind, told, values)]).startswith(b"\x89PNG")
    assert still("title", [Pane("p", "text", {}, None)]) is None


def test_learning_is_shown_by_its_curve_beside_all_data_and_by_hard_and_easy_examples():
    e = explorer(digits(200), ["tracin", "rs2"], n_samples=3, n_epochs=4, score_epochs=1)
    assert isinstance(e.family, LearningView)
    first = panes(e.frame)
    assert [entry["label"] for entry in first["accuracy"]["lines"]] == ["this run"]
    drawn = first["accuracy"]["lines"][0]
    assert len(drawn["x"]) == 4 and drawn["x"][-1] == e.run.cost.total_evaluations / 3
    assert np.allclose(drawn["y"], e.run.trace["accuracy"][-4:].mean(1))
    assert first["hardest"]["values"]["shape"] == [12, 8, 8] == first["easiest"]["values"]["shape"]
    e.wait(idle=True)
    both = panes(e.frame)["accuracy"]["lines"]
    assert [entry["label"] for entry in both] == ["this run", "all data"] and both[0] == drawn
    e.set(method="rs2")
    assert "learned_from" in panes(e.frame)
    assert "hardest" not in panes(explorer(gaussians(40, n_test=20), ["rs2"], n_epochs=2).frame)  # no pictures


def test_estimation_is_shown_by_what_is_reported_and_true_or_by_the_error_against_rows():
    e = explorer(holdout(60, 30), n_samples=4, n_rounds=5, n_features=10)
    assert isinstance(e.family, EstimationView) and e.methods == ("thresholdout",)
    shown = panes(e.frame)
    assert [entry["label"] for entry in shown["curve"]["lines"]] == ["reported", "true"]
    assert np.allclose(shown["curve"]["lines"][0]["y"], e.run.trace["reported"].mean(1))
    assert shown["left"]["lines"][0]["y"] == e.run.trace["left"].mean(1).tolist()
    table = explorer(rows(100, 2, 2), n_samples=4)
    assert table.methods == ("sensitivity_sampling",) and len(panes(table.frame)["curve"]["lines"][0]["x"]) == 5
    assert table.view["shown"]["costs"][0]["name"] == "looks per experiment"
    assert table.frontier["metrics"]["distortion"][0]["looks"] > 0


def test_every_family_has_a_view_and_its_pages_make_panels():
    for name in FAMILIES:
        view = view_of(name)
        assert view is not View and view.pages and all(page.title and page.question for page in view.pages)
