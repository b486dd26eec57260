"""How live the explorer is, in real Chromium on JupyterLab with the embedded models: `make bench`."""

from __future__ import annotations

import re
import statistics
import time
from typing import Any, NamedTuple

import pytest
from browser.conftest import browser, lab, page, traffic  # noqa: F401 (fixtures)
from browser.lab import Lab, open_notebook, run_all
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.timeout(600)

# What the page saw, by its own clock: [when the pointer moved, where the mark then was] and [when a picture was on
# the display, its caption's counts, its step, of how many].
WATCH = """() => {
  const panel = document.querySelector('[data-testid=explorer]');
  const [mark, canvas, title] = ['handle-0', 'samples', 'title'].map(id => panel.querySelector(`[data-testid=${id}]`));
  window.seen = {moves: [], frames: [], release: null};
  addEventListener('pointermove', event => requestAnimationFrame(() =>
    window.seen.moves.push([event.timeStamp, Number(mark.getAttribute('aria-valuenow'))])));
  addEventListener('pointerup', event => { window.seen.release = event.timeStamp; }, true);
  const painted = new MessageChannel();
  const waiting = [];
  painted.port1.onmessage = () => window.seen.frames.push([performance.now(), ...waiting.shift()]);
  new MutationObserver(() => { // called within the frame that changes the canvas; its message comes after the paint
    waiting.push([title.textContent, Number(canvas.dataset.step), Number(canvas.dataset.of)]);
    painted.port2.postMessage(0);
  }).observe(canvas, {attributes: true, attributeFilter: ['data-revision']});
}"""


class Live(NamedTuple):
    first: list[float]  # seconds from each change of the slider to the first picture of it or of a later one
    full: float  # seconds from the release to the finished picture of the last setting


def switch(title: str) -> int:
    found = re.search(r"S (\d+) \+", title)
    assert found, title
    return int(found[1])


def latencies(seen: dict[str, Any]) -> Live:
    """From what the page saw. A picture answers a change if it is drawn after it, of its setting or a later one."""
    changes = [(t, at) for (t, at), (_, before) in zip(seen["moves"][1:], seen["moves"], strict=False) if at != before]
    frames = [(t, switch(title), step == of) for t, title, step, of in seen["frames"]]
    first = []
    for k, (t, _) in enumerate(changes):
        answers = (shown for shown, at, _ in frames if shown > t
                   and any(at == wanted and asked < shown for asked, wanted in changes[k:]))
        first.append((next(answers) - t) / 1000)
    moved, last = changes[-1]
    done = next(t for t, at, is_done in frames if t > moved and at == last and is_done)
    return Live(first, max(done - seen["release"], 0) / 1000)


def sweep_mark(page: Page, seconds: float, rate: float = 30.0) -> None:  # noqa: F811
    """Take the mark and pull it to and fro over most of the strip, at so many events a second."""
    mark, strip = page.get_by_test_id("handle-0"), page.get_by_test_id("strip").bounding_box()
    box = mark.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, y)
    page.mouse.down()
    begin = time.perf_counter()
    for i in range(int(seconds * rate)):
        share = abs((i / rate / 2.5 + 0.4) % 2 - 1)  # from end to end in 2.5 seconds
        page.mouse.move(strip["x"] + strip["width"] * (0.05 + 0.9 * share), y)
        time.sleep(max(begin + (i + 1) / rate - time.perf_counter(), 0))
    page.mouse.up()


@pytest.mark.parametrize("seed", ["first", "second"])
def test_drag(benchmark, record_seconds, page: Page, lab: Lab, seed: str) -> None:  # noqa: F811
    """The embedded S and L under a drag of 5 s: at once after opening (much unknown), then again (much remembered)."""
    lab.add("live.ipynb", "from workbench.problems.glyphs import glyphs\nfrom widgets import explorer",
            "explorer(glyphs(('s', 'l')), fractions=(0.4,))")
    open_notebook(page, "live.ipynb")
    run_all(page)
    panel = page.get_by_test_id("explorer")
    expect(panel.get_by_test_id("title")).to_contain_text("steps", timeout=60_000)
    expect(panel.get_by_test_id("stale")).not_to_have_class(re.compile("wb-on"), timeout=60_000)
    if seed == "second":
        sweep_mark(page, 5)
        page.wait_for_timeout(3000)
    page.evaluate(WATCH)
    benchmark.pedantic(lambda: sweep_mark(page, 5), rounds=1)
    page.wait_for_timeout(4000)
    live = latencies(page.evaluate("window.seen"))
    assert len(live.first) > 25
    cuts = statistics.quantiles(live.first, n=20)
    record_seconds(f"{seed} drag, change to first changed pixels, median of {len(live.first)}", cuts[9], 0.1)
    record_seconds(f"{seed} drag, change to first changed pixels, 95th percentile", cuts[18], 0.25)
    record_seconds(f"{seed} drag, release to the finished picture", live.full, 1.0)


def test_first_explorer(benchmark, record_seconds, page: Page, lab: Lab) -> None:  # noqa: F811
    """Seconds from running the start notebook's explorer cell to a finished picture, imports not counted."""
    open_notebook(page, "00_start_here.ipynb")
    page.evaluate("""() => { window.ran = {};
      const cells = window.jupyterapp.shell.currentWidget.content.widgets;
      const at = cells.findIndex(cell => cell.model.sharedModel.source.startsWith('lab = explorer('));
      window.jupyterapp.shell.currentWidget.content.activeCellIndex = at;
      window.jupyterapp.commands.execute('notebook:run-all-above').then(() => { window.ran.above = true; }); }""")
    page.wait_for_function("window.ran.above", timeout=120_000)

    def show() -> None:
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-cell'); }")
        panel = page.get_by_test_id("explorer")
        expect(panel.get_by_test_id("title")).to_contain_text("steps", timeout=60_000)
        expect(panel.get_by_test_id("stale")).not_to_have_class(re.compile("wb-on"), timeout=60_000)

    benchmark.pedantic(show, rounds=1)
    record_seconds("start notebook: cell run to a usable explorer", benchmark.stats.stats.median, 5.0)
