"""Every notebook in JupyterLab: its cells run, its first explorer's mark is dragged and pressed, nothing is blank."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from browser.lab import Lab, Traffic, assert_local, drag, is_blank, open_notebook, run_all
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Page, expect
from run_all import NOTEBOOKS, notebooks, smoke_parameters

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

ROOT = NOTEBOOKS.parent
SOON = 60_000  # a busy machine is slow; how quick an answer is, the benchmarks say


@pytest.mark.parametrize("source", notebooks(), ids=lambda path: path.stem)
def test_a_notebook_lives_in_jupyterlab(source: Path, page: Page, lab: Lab, traffic: Traffic) -> None:
    given = load_notebook_node(str(source))
    nbformat.write(parameterize_notebook(given, smoke_parameters(given)), lab.notebooks / source.name)
    link = lab.notebooks.parent / "workbench"  # notebooks name the embedded models' folders relative to their own
    if not link.exists():
        link.symlink_to(ROOT / "workbench")
    open_notebook(page, source.name)
    run_all(page, seconds=300)

    panel = page.get_by_test_id("explorer").first
    panel.scroll_into_view_if_needed()
    canvas, mark = panel.get_by_test_id("samples"), panel.get_by_test_id("handle-0")
    expect(panel.get_by_test_id("title")).to_contain_text("steps", timeout=SOON)
    assert not is_blank(canvas)

    seen, at = canvas.get_attribute("data-key"), int(mark.get_attribute("aria-valuenow"))
    last = int(mark.get_attribute("aria-valuemax"))
    width = panel.get_by_test_id("strip").bounding_box()["width"]
    drag(page, mark, (0.3 if at < last / 2 else -0.3) * width)
    expect(mark).not_to_have_attribute("aria-valuenow", str(at))
    expect(canvas).not_to_have_attribute("data-key", seen, timeout=SOON)

    seen, at = canvas.get_attribute("data-key"), int(mark.get_attribute("aria-valuenow"))
    key, to = ("ArrowLeft", at - 1) if at == last else ("ArrowRight", at + 1)
    mark.press(key)
    expect(mark).to_have_attribute("aria-valuenow", str(to))
    expect(canvas).not_to_have_attribute("data-key", seen, timeout=SOON)
    expect(panel.get_by_test_id("error")).to_be_hidden()
    assert_local(traffic)
