"""The explorer in a browser: in JupyterLab and as a page of its own, by mouse and by keyboard."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.lab import Lab, Traffic, assert_local, drag, is_blank, open_notebook, run_all
from playwright.sync_api import Browser, Locator, Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parent.parent.parent
START = "from explorer_toy import Toy\nfrom widgets import explorer"
SOON = 30_000  # a busy machine is slow; how quick an answer is, the benchmarks say


@pytest.fixture
def show(page: Page, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> object:
    """show(expression) opens a notebook that ends in that explorer, and returns the panel once a run is shown."""

    def show(expression: str) -> Locator:
        path = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        lab.add("explorer.ipynb", path + START, f"e = {expression}\ne")
        open_notebook(page, "explorer.ipynb")
        run_all(page)
        panel = page.get_by_test_id("explorer")
        expect(panel.get_by_test_id("stale")).not_to_have_class(re.compile("wb-on"), timeout=SOON)
        expect(panel.get_by_test_id("title")).to_contain_text("steps", timeout=SOON)
        return panel

    return show


def picture(panel: Locator) -> str:
    return panel.get_by_test_id("samples").evaluate("canvas => canvas.toDataURL()")


def expect_picture_changes(panel: Locator, old: str) -> None:
    panel.page.wait_for_function(
        "old => document.querySelector('[data-testid=samples]').toDataURL() !== old", arg=old, timeout=SOON)


def test_a_dragged_switch_changes_the_picture_by_mouse_and_by_key(show: object, page: Page, traffic: Traffic) -> None:
    panel = show("explorer(Toy(n_models=3).problem, fractions=(0.3, 0.2))")
    first, second = panel.get_by_test_id("handle-0"), panel.get_by_test_id("handle-1")
    expect(first).to_have_attribute("aria-valuetext", "S takes steps 1-6 of 20")
    expect(second).to_have_attribute("aria-valuetext", "B takes steps 7-10 of 20")
    assert not is_blank(panel.get_by_test_id("samples"))
    expect(page.get_by_text("Jupyter news")).to_have_count(0)  # nothing is asked over the panel

    before = picture(panel)
    drag(page, second, 160)
    expect_picture_changes(panel, before)
    moved = int(second.get_attribute("aria-valuenow"))
    assert moved > 10
    expect(panel.get_by_test_id("title")).to_contain_text(f"S 6 + B {moved - 6} + L {20 - moved}", timeout=SOON)

    before = picture(panel)
    first.press("ArrowLeft")
    expect(first).to_have_attribute("aria-valuetext", "S takes steps 1-5 of 20")
    expect_picture_changes(panel, before)
    expect(panel.get_by_test_id("title")).to_contain_text(f"S 5 + B {moved - 5} + L {20 - moved}", timeout=SOON)

    panel.get_by_test_id("undo").click()
    panel.get_by_test_id("undo").click()
    expect(first).to_have_attribute("aria-valuetext", "S takes steps 1-6 of 20", timeout=SOON)
    expect(second).to_have_attribute("aria-valuenow", "10", timeout=SOON)  # the whole drag was one step
    assert_local(traffic)


def test_fields_sliders_and_choices_and_what_they_refuse(show: object, page: Page) -> None:
    panel = show("explorer(Toy().problem)")
    title = panel.get_by_test_id("title")
    field = panel.get_by_test_id("field-n_steps")
    field.fill("70")
    field.press("Enter")
    expect(title).to_contain_text("70 steps", timeout=SOON)  # beyond the slider's range, inside the hard bounds
    field.fill("0")
    field.press("Enter")
    expect(panel.get_by_test_id("error")).to_contain_text("n_steps=0", timeout=SOON)
    panel.get_by_test_id("knob-n_steps").press("ArrowLeft")
    expect(title).to_contain_text("49 steps", timeout=SOON)
    expect(panel.get_by_test_id("error")).to_be_hidden(timeout=SOON)
    expect(panel.get_by_test_id("knob-reset_history")).to_be_disabled()
    panel.get_by_test_id("knob-solver").select_option("dpmpp 2m")
    expect(panel.get_by_test_id("knob-reset_history")).to_be_enabled(timeout=SOON)
    expect(panel.get_by_test_id("knob-eta")).to_be_disabled(timeout=SOON)
    panel.get_by_test_id("method").select_option("ddim")
    expect(title).to_contain_text("ddim · 49 steps", timeout=SOON)
    expect(panel.get_by_test_id("handle-0")).to_be_hidden()


def test_every_control_has_a_name_and_is_reached_by_tab(show: object, page: Page) -> None:
    panel = show("explorer(Toy().problem)")
    nameless = panel.evaluate(
        """root => [...root.querySelectorAll('input, select, textarea, button, canvas, progress, [tabindex]')]
           .filter(node => !node.getAttribute('aria-label') && !node.getAttribute('aria-hidden'))
           .map(node => node.outerHTML)""")
    assert nameless == []
    panel.get_by_test_id("seed").focus()
    reached = []
    for _ in range(32):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.dataset.testid ?? ''"))
    wanted = ["handle-0", "method", "knob-n_steps", "field-n_steps", "frontier", "copy-link"]
    assert [name for name in reached if name in wanted] == wanted, reached


def test_a_kernel_that_does_not_answer_is_said_until_it_does(show: object, page: Page) -> None:
    """Whatever the panel's worker tells meanwhile: a cell that runs keeps wishes waiting, and not the worker."""
    panel = show("explorer(Toy().problem)\nimport threading, time\nreceive = e.receive\n"
                 "def slowly(wish):\n    threading.Timer(2, e._publish_view).start()\n    time.sleep(4)\n"
                 "    receive(wish)\n"
                 "e.receive = slowly")
    before, status = picture(panel), panel.get_by_test_id("status")
    panel.locator("input[type=range]:visible:enabled").first.press("ArrowRight")
    expect(status).to_have_text("waiting for Python…", timeout=SOON)
    page.wait_for_timeout(1700)
    expect(status).to_have_text("waiting for Python…")
    expect_picture_changes(panel, before)
    expect(status).not_to_have_text("waiting for Python…", timeout=SOON)


def test_an_error_is_shown_and_the_sliders_live_on(show: object, page: Page) -> None:
    panel = show("explorer(Toy(fails=True).problem)")
    field = panel.get_by_test_id("field-guidance")
    field.fill("3")
    field.press("Enter")
    expect(panel.get_by_test_id("error")).to_contain_text("the toy network broke on purpose", timeout=SOON)
    expect(panel.get_by_test_id("title")).to_contain_text("guidance 1 ")
    field.fill("1")
    field.press("Enter")
    expect(panel.get_by_test_id("error")).to_be_hidden(timeout=SOON)


def test_pin_links_code_frontier_and_files(show: object, page: Page, traffic: Traffic, tmp_path: Path) -> None:
    panel = show("explorer(Toy().problem, fractions=(0.5,))")
    panel.get_by_test_id("pin").click()
    panel.get_by_test_id("dice").click()
    expect(panel.get_by_test_id("pinned")).to_be_visible(timeout=SOON)
    expect(panel.get_by_test_id("title")).not_to_contain_text("seed 0 ", timeout=SOON)
    panel.get_by_test_id("copy-link").click()
    box = panel.get_by_test_id("box")
    expect(box).to_have_value(re.compile(r"^[\w-]{100,}$"), timeout=SOON)
    link, shown = box.input_value(), panel.get_by_test_id("title").inner_text()
    panel.get_by_test_id("box-close").click()
    panel.get_by_test_id("reset").click()
    expect(panel.get_by_test_id("title")).to_contain_text("seed 0 ", timeout=SOON)
    panel.get_by_test_id("paste").fill(link)
    panel.get_by_test_id("open-link").click()
    expect(panel.get_by_test_id("title")).to_have_text(shown, timeout=SOON)
    panel.get_by_test_id("copy-code").click()
    expect(box).to_have_value(re.compile(r"workbench\.run\("), timeout=SOON)
    compile(box.input_value(), "code", "exec")

    points = panel.locator(".wb-point")
    expect(points.nth(12)).to_be_attached(timeout=60_000)
    panel.get_by_test_id("frontier").press("ArrowRight")
    expect(panel.get_by_test_id("hover")).to_contain_text("FLOPs per sample")
    panel.get_by_test_id("frontier").press("Enter")  # the cheapest: the baseline
    expect(panel.get_by_test_id("title")).to_contain_text("ddim · 8 steps", timeout=SOON)
    for kind, head in (("svg", b"<svg"), ("png", b"\x89PNG"), ("images", b"\x89PNG"), ("csv", b"key,problem")):
        with page.expect_download() as download:
            panel.get_by_test_id(f"export-{kind}").click()
        download.value.save_as(tmp_path / kind)
        assert (tmp_path / kind).read_bytes().startswith(head)
    assert_local(traffic)


def test_the_dark_theme_is_followed_with_enough_contrast_and_nothing_overflows(show: object, page: Page) -> None:
    panel = show("explorer(Toy().problem)")
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
        page.wait_for_function("dark => (document.body.dataset.jpThemeLight === 'false') === dark", arg="Dark" in theme)
        page.wait_for_timeout(500)
        for name in ("title", "costs", "quality", "undo"):
            assert contrast(panel.get_by_test_id(name)) >= 4.5, (theme, name)
    for width in (1280, 1000):
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(500)
        over = panel.evaluate("root => [...root.querySelectorAll('*')].filter(node => !node.closest('svg') &&"
                              " node.getBoundingClientRect().right > root.getBoundingClientRect().right + 2).length")
        assert over == 0, width


def contrast(element: Locator) -> float:
    """Contrast of the element's text to the panel's background, as WCAG defines it (opacity not counted)."""
    colours = element.evaluate(
        "node => [getComputedStyle(node).color, getComputedStyle(node.closest('.wb')).backgroundColor]")
    back = [float(v) for v in re.findall(r"[\d.]+", colours[1])][:3]
    *front, = (float(v) for v in re.findall(r"[\d.]+", colours[0]))
    alpha = front[3] if len(front) > 3 else 1.0
    mixed = [alpha * f + (1 - alpha) * b for f, b in zip(front[:3], back, strict=True)]

    def luminance(rgb: list[float]) -> float:
        linear = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(mixed), luminance(back)))
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """The address of the explorer's own page."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "widgets.app", "--port", str(port)], env=os.environ, cwd=ROOT)
    address = f"http://127.0.0.1:{port}/app"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/liveness", timeout=5).read()
                break
            except OSError:
                assert time.monotonic() < end and server.poll() is None
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def test_the_page_of_its_own_works_and_asks_nothing_of_the_network(browser: Browser, served: str) -> None:
    from widgets.app import pages

    page, traffic = browser.new_page(viewport={"width": 1280, "height": 1200}), Traffic()
    traffic.watch(page)
    page.goto(served, timeout=120_000)
    expect(page.get_by_role("link")).to_have_count(len(pages()), timeout=120_000)
    page.get_by_role("link", name="Stitching").click()
    panel = page.get_by_test_id("explorer")
    expect(panel.get_by_test_id("title")).to_contain_text("steps", timeout=120_000)
    canvas = panel.get_by_test_id("samples")
    before = canvas.get_attribute("data-revision")
    panel.get_by_test_id("handle-0").press("ArrowLeft")
    expect(canvas).not_to_have_attribute("data-revision", before, timeout=SOON)
    expect(panel.get_by_test_id("title")).to_contain_text("S 7", timeout=SOON)
    assert not is_blank(canvas)
    assert_local(traffic)
    assert not [url for url in traffic.requests if "127.0.0.1" not in url and not url.startswith(("data:", "blob:"))]
    page.close()


def test_every_panel_has_a_page_of_its_own(browser: Browser, served: str) -> None:
    from widgets.app import pages

    for name in pages():
        page, traffic = browser.new_page(viewport={"width": 1280, "height": 900}), Traffic()
        traffic.watch(page)
        page.goto(f"{served}?panel={name}", timeout=120_000)
        title, is_full = page.get_by_test_id("title").first, page.get_by_text("pages are open already")
        expect(title.or_(is_full)).to_be_visible(timeout=120_000)
        while is_full.count():  # pages just closed are let go within seconds
            page.wait_for_timeout(2000)
            page.reload()
            expect(title.or_(is_full)).to_be_visible(timeout=120_000)
        expect(title).not_to_have_text("", timeout=120_000)
        expect(page.get_by_role("slider").first).to_be_visible(timeout=SOON)
        assert_local(traffic)
        page.close()
