"""The panels of one picture on a bare page: their curves are drawn whole, and what hand and keys ask is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from widgets.acceptance import acceptance_explorer, prefix_curve
from widgets.live import script
from widgets.panel import PanelWidget
from workbench.speculation.acceptance import optimal

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

# Of each curve: by how many pixels its lines leave the grid at the top and at the bottom.
OUTSIDE = """panes => {
  const chart = PANES.curve();
  document.body.append(chart.node);
  return panes.map((pane) => {
    chart.draw(pane);
    const ys = (selector, name) => [...chart.node.querySelectorAll(selector)].map((node) => +node.getAttribute(name));
    const [top, bottom] = [Math.min(...ys(".wb-gridline", "y1")), Math.max(...ys(".wb-gridline", "y2"))];
    const drawn = [...chart.node.querySelectorAll("polyline")]
      .flatMap((line) => line.getAttribute("points").split(" ").map((p) => +p.split(",")[1]));
    return [top - Math.min(...drawn), Math.max(...drawn) - bottom];
  });
}"""


def pictures(n: int) -> list[dict]:
    source, made = np.random.default_rng(0), []
    for i in range(n):
        size, sharp, drafts = (3, 40, 400)[i % 3], (0.05, 0.5, 5.0)[i // 3 % 3], (1, 2, 4, 8)[i // 9 % 4]
        target, draft = source.dirichlet([sharp] * size, 2)
        bounds = {"iid": optimal(target, draft, drafts), "without": None}
        made.append(dict(prefix_curve(target, draft, drafts, bounds).told))
    return made


def outside(browser: Browser, panes: list[dict]) -> int:
    """How many of these curves leave their axes."""
    page = browser.new_page()
    try:
        page.add_script_tag(content=script("core.js", "ticks.js", "plot.js", "panes.js"))
        return sum(max(over) > 0.5 for over in page.evaluate(OUTSIDE, panes))
    finally:
        page.close()


def test_no_curve_of_prefixes_leaves_its_axes(browser: Browser) -> None:
    panes = pictures(144)
    assert outside(browser, panes) == 0
    assert outside(browser, [{**pane, "high": 1.0} for pane in panes]) > 20  # the broken twin: cut at 1


@pytest.fixture
def shown(browser: Browser) -> Iterator[Page]:
    """A panel's front end on what Python publishes; window.sent holds its wishes."""
    panel = acceptance_explorer()
    panel.wait(30)
    page = browser.new_page()
    told = {name: json.loads(json.dumps(value)) for name, value in panel.published.items()}
    page.add_style_tag(content=str(PanelWidget._css))
    page.add_script_tag(type="module", content=str(PanelWidget._esm).replace("export default", "window.face =")
                        + ";window.ready = true")
    page.wait_for_function("window.ready")
    page.evaluate("""told => { window.sent = []; window.listeners = {};
      window.model = { get: (name) => told[name], send: (wish) => sent.push(wish), off() {},
        on: (what, listener) => { listeners[what] = listener; } };
      face.render({ model, el: document.body }); }""", told)
    yield page
    page.close()


def test_sliders_points_and_keys_send_wishes(shown: Page) -> None:
    shown.get_by_test_id("n_drafts").press("ArrowRight")
    point = shown.locator("[data-drag=draft]")
    point.press("ArrowUp")
    box = point.locator("circle").bounding_box()
    shown.mouse.move(box["x"] + 5, box["y"] + 5)
    shown.mouse.down()
    shown.mouse.move(box["x"] + 40, box["y"] + 20, steps=3)
    shown.mouse.up()
    shown.mouse.move(box["x"] + 80, box["y"] + 20)
    sent = shown.evaluate("sent")
    assert sent[0] == {"knob": "n_drafts", "index": 2}
    at = float(point.get_attribute("data-x")), float(point.get_attribute("data-y"))
    assert (sent[1]["point"], sent[1]["x"], sent[1]["y"]) == ("draft", at[0], at[1] - 3)
    assert len(sent) == 5 and sent[-1]["point"] == "draft" and sent[-1]["x"] > at[0]
    rows = shown.get_by_test_id("bars").locator(".wb-item")
    assert rows.count() == 8 and shown.get_by_test_id("bars").locator(".wb-reach").count() >= 1
