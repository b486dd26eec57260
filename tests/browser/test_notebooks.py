"""Every notebook in JupyterLab, down to its first panel: a mark is dragged and pressed, nothing is blank.

What comes below that panel runs in tests/test_notebooks.py, with papermill.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from browser.lab import Lab, Traffic, assert_local, drag, is_blank, open_notebook, run_all
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Locator, Page, expect
from run_all import NOTEBOOKS, notebooks, smoke_parameters

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

ROOT = NOTEBOOKS.parent
PANEL = re.compile(r"\b(explorer|schedule_editor|acceptance_explorer|tree_explorer|search_panel)\(")
SOON = 60_000  # a busy machine is slow; how quick an answer is, the benchmarks say


@pytest.mark.parametrize("source", notebooks(), ids=lambda path: path.stem)
def test_a_notebook_lives_in_jupyterlab(source: Path, page: Page, lab: Lab, traffic: Traffic) -> None:
    given = load_notebook_node(str(source))
    shown = down_to_its_panel(parameterize_notebook(given, smoke_parameters(given)))
    nbformat.write(shown, lab.notebooks / source.name)
    link = lab.notebooks.parent / "workbench"  # notebooks name the embedded models' folders relative to their own
    if not link.exists():
        link.symlink_to(ROOT / "workbench")
    open_notebook(page, source.name)
    run_all(page, seconds=300)

    panel = page.locator("[data-testid=explorer], [data-testid=schedule-editor], .wb-search").first
    panel.scroll_into_view_if_needed()
    if panel.get_by_test_id("search-status").count():
        expect_a_search(panel)
        assert_local(traffic)
        return
    canvas = panel.get_by_test_id("panes" if panel.get_by_test_id("panes").count() else "samples")
    expect(panel.get_by_test_id("title")).to_contain_text(re.compile(r"\w"), timeout=SOON)
    expect(canvas).to_have_attribute("data-key", re.compile("."), timeout=SOON)
    assert not is_blank(canvas)

    # the first switch point or mark, else the slider of the first knob
    mark = panel.locator("[role=slider]:visible, input[type=range]:visible:enabled").first
    box = mark.bounding_box()
    span = box["width"] / 2 if is_range(mark) else 300
    seen, at = canvas.get_attribute("data-key"), position(mark)
    drag(page, mark, -0.6 * span if at > last(mark) / 2 else 0.6 * span)
    expect(canvas).not_to_have_attribute("data-key", seen, timeout=SOON)
    assert position(mark) != at

    seen, at = canvas.get_attribute("data-key"), position(mark)
    mark.press("ArrowLeft" if at == last(mark) else "ArrowRight")
    expect(canvas).not_to_have_attribute("data-key", seen, timeout=SOON)
    assert position(mark) != at
    expect(panel.get_by_test_id("error")).to_be_hidden()
    assert_local(traffic)


def down_to_its_panel(notebook: Any) -> Any:
    """The notebook's cells up to the first that shows a panel."""
    shown = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and PANEL.search(cell.source))
    notebook.cells = notebook.cells[: shown + 1]
    return notebook


def expect_a_search(panel: Locator) -> None:
    """It starts, its curve grows, and it stops."""
    curve = panel.get_by_test_id("search-curve")
    panel.get_by_role("button", name="Start", exact=True).click()
    expect(curve).to_have_attribute("data-n", re.compile("^[1-9]"), timeout=SOON)
    assert not is_blank(curve)
    stop = panel.get_by_role("button", name="Stop", exact=True)
    if stop.is_enabled():
        stop.click()
    expect(panel.get_by_test_id("search-status")).to_have_attribute(
        "data-state", re.compile("stopped|finished"), timeout=SOON)
    expect(panel.get_by_test_id("search-error")).to_be_hidden()


def is_range(mark: Locator) -> bool:
    return mark.evaluate("node => node.tagName === 'INPUT'")


def position(mark: Locator) -> float:
    return float(mark.input_value() if is_range(mark) else mark.get_attribute("aria-valuenow"))


def last(mark: Locator) -> float:
    return float(mark.get_attribute("max" if is_range(mark) else "aria-valuemax"))
