"""The schedule editor in JupyterLab: marks by mouse and by key, what is refused, themes, narrow windows, no network."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pytest
from browser.lab import Lab, Traffic, assert_local, drag, is_blank, open_notebook, run_all
from playwright.sync_api import Locator, Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parent.parent.parent
START = """from explorer_toy import Toy
from widgets.editor import schedule_editor
from workbench.plan import Plan, preset_plan
from workbench.problems.denoising import grid
from workbench.problems.mixtures import two_dim, two_modes"""
SOON = 60_000  # a busy machine is slow


@pytest.fixture
def show(page: Page, lab: Lab) -> object:
    """show(expression) opens a notebook that ends in that editor, and returns the panel once its errors are known."""

    def show(expression: str) -> Locator:
        path = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        lab.add("editor.ipynb", path + START, f"e = {expression}\ne")
        open_notebook(page, "editor.ipynb")
        run_all(page)
        panel = page.get_by_test_id("schedule-editor")
        expect(panel.get_by_test_id("table")).to_contain_text("× 1", timeout=SOON)
        return panel

    return show


def picture(panel: Locator) -> str:
    return panel.get_by_test_id("samples").evaluate("canvas => canvas.toDataURL()")


def expect_picture_changes(panel: Locator, old: str) -> None:
    panel.page.wait_for_function(
        "old => document.querySelector('[data-testid=samples]').toDataURL() !== old", arg=old, timeout=SOON)


def level(mark: Locator) -> float:
    return float(mark.get_attribute("aria-valuenow"))


def value(log_snr: float) -> re.Pattern[str]:
    """aria-valuenow of that level, to the rounding of its last shown digit."""
    near = {str(round(log_snr + k * 1e-4, 4)).rstrip("0").rstrip(".") for k in (-1, 0, 1)}
    return re.compile(f"^({'|'.join(map(re.escape, sorted(near)))})0*$")


def test_a_mark_moves_by_mouse_and_by_key_and_samples_and_errors_follow(show: object, page: Page, traffic: Traffic
                                                                        ) -> None:
    panel = show("schedule_editor(two_dim(), n_steps=6, n_samples=100)")
    mark, error = panel.get_by_test_id("handle-3"), panel.locator("[data-arm=yours]")
    expect(mark).to_have_attribute("aria-label", "step 4 of 6")
    expect(mark).to_have_attribute("aria-valuetext", re.compile(r"log-SNR −0\.23, noise 1\.26 times .*; order 2"))
    assert not is_blank(panel.get_by_test_id("samples")) and not is_blank(panel.get_by_test_id("curve"))
    before, was, old = picture(panel), level(mark), error.inner_text()
    drag(page, mark, 70)
    expect_picture_changes(panel, before)
    assert level(mark) > was + 0.3
    expect(error).not_to_have_text(old, timeout=SOON)
    expect(panel.get_by_test_id("title")).to_contain_text("own schedule · 6 steps · 6 evaluations", timeout=SOON)
    dragged = level(mark)
    mark.press("ArrowLeft")
    mark.press("Shift+ArrowLeft")
    expect(mark).to_have_attribute("aria-valuenow", value(dragged - 0.06))
    mark.press("End")  # as far as its neighbour allows
    expect(mark).to_have_attribute("aria-valuenow", value(level(panel.get_by_test_id("handle-4")) - 0.02))
    for _ in range(3):  # keys pressed one soon after the other are one step back; a slow machine presses them apart
        if level(mark) == dragged:
            break
        now = mark.get_attribute("aria-valuenow")
        panel.get_by_test_id("undo").click()
        expect(mark).not_to_have_attribute("aria-valuenow", now, timeout=SOON)
    assert level(mark) == pytest.approx(dragged, abs=1e-3)
    panel.get_by_test_id("undo").click()
    expect(mark).to_have_attribute("aria-valuenow", value(was), timeout=SOON)  # the whole drag was one step
    assert_local(traffic)


def test_a_long_drag_does_not_hang_the_kernel(show: object, page: Page) -> None:
    """A minute and a half of moves, each of which the worker answers while the next is on its way."""
    panel = show("schedule_editor(two_dim(), n_steps=6, n_samples=100)")
    mark = panel.get_by_test_id("handle-3")
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    x, y, end, k = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, time.monotonic() + 90, 0
    page.mouse.move(x, y)
    page.mouse.down()
    while time.monotonic() < end:
        k += 1
        page.mouse.move(x + 40 * math.sin(k / 9), y)
        page.wait_for_timeout(25)
    page.mouse.up()
    was, before = level(mark), picture(panel)
    mark.press("ArrowLeft")
    expect(mark).to_have_attribute("aria-valuenow", value(was - 0.05), timeout=SOON)
    expect_picture_changes(panel, before)


def test_orders_and_predictions_are_chosen_by_key_and_menu_and_refused_with_a_reason(show: object, page: Page) -> None:
    panel = show("schedule_editor(two_modes(), n_steps=6, n_samples=50)")
    mark, reason = panel.get_by_test_id("handle-2"), panel.get_by_test_id("reason")
    mark.press("3")
    expect(mark).to_have_attribute("aria-valuetext", re.compile("order 3, x0"), timeout=SOON)
    mark.press("p")
    expect(mark).to_have_attribute("aria-valuetext", re.compile("order 3, eps"), timeout=SOON)
    mark.press("4")
    expect(reason).to_contain_text("order 4: step 3 has 2 earlier evaluations to look back on")
    expect(mark).to_have_attribute("aria-valuetext", re.compile("order 3, eps"))
    mark.press("1")
    expect(mark).to_have_attribute("aria-valuetext", re.compile("order 1, eps"), timeout=SOON)
    panel.get_by_test_id("step-prediction").select_option("x0")
    expect(mark).to_have_attribute("aria-valuetext", re.compile("order 1, x0"), timeout=SOON)
    panel.get_by_test_id("step-order").select_option("2")
    expect(mark).to_have_attribute("aria-valuetext", re.compile("order 2, x0"), timeout=SOON)
    assert panel.get_by_test_id("step-order").locator("option:disabled").count() == 1
    panel.get_by_test_id("step-corrector").select_option("implicit")
    expect(panel.get_by_test_id("title")).to_contain_text("7 evaluations", timeout=SOON)
    expect(panel.get_by_test_id("step-correction_order")).to_be_visible()
    last = panel.get_by_test_id("handle-5")
    last.press("2")
    expect(reason).to_contain_text("the step into the data is of order 1")


def test_steps_presets_plans_and_code(show: object, page: Page) -> None:
    found = "preset_plan('deis_3', grid(two_modes().schedule, 5, 'karras'))"
    panel = show(f"schedule_editor(two_modes(), n_steps=5, n_samples=50, best={found})")
    title, strip = panel.get_by_test_id("title"), panel.get_by_test_id("strip")
    panel.get_by_test_id("handle-2").press("+")
    expect(title).to_contain_text("6 steps", timeout=SOON)
    panel.get_by_test_id("remove").click()
    expect(title).to_contain_text("5 steps", timeout=SOON)
    box = strip.bounding_box()
    page.mouse.dblclick(box["x"] + box["width"] * 0.5, box["y"] + 10)
    expect(title).to_contain_text("6 steps", timeout=SOON)
    panel.get_by_test_id("preset").select_option("unipc_bh2")
    panel.get_by_test_id("spacing").select_option("karras")
    panel.get_by_test_id("use").click()
    expect(title).to_contain_text("unipc_bh2 on karras · 6 steps", timeout=SOON)
    panel.get_by_test_id("use-best").click()
    expect(title).to_contain_text("best found · 5 steps", timeout=SOON)
    panel.get_by_test_id("copy-plan").click()
    text = panel.get_by_test_id("box")
    expect(text).to_have_value(re.compile("workbench-usf-plan-1"), timeout=SOON)
    plan = json.loads(text.input_value())
    panel.get_by_test_id("box-close").click()
    panel.get_by_test_id("reset").click()
    expect(title).to_contain_text("dpmpp_2m on log_snr · 5 steps", timeout=SOON)
    paste = panel.get_by_test_id("paste")
    paste.fill(json.dumps(plan | {"times": [1.0]}))
    panel.get_by_test_id("open-plan").click()
    expect(panel.get_by_test_id("error")).to_contain_text("times=(1.0,): expected 5, one per decision", timeout=SOON)
    paste.fill(json.dumps(plan))
    panel.get_by_test_id("open-plan").click()
    expect(title).to_contain_text("best found", timeout=SOON)
    expect(panel.get_by_test_id("error")).to_be_hidden(timeout=SOON)
    panel.get_by_test_id("copy-code").click()
    expect(text).to_have_value(re.compile(r"run_plan\("), timeout=SOON)
    compile(text.input_value(), "code", "exec")


def test_a_bad_level_is_shown_with_what_is_allowed_and_pictures_are_drawn(show: object, page: Page) -> None:
    panel = show("schedule_editor(Toy().problem, n_steps=5)")
    assert not is_blank(panel.get_by_test_id("samples"))
    panel.get_by_test_id("handle-2").focus()
    field = panel.get_by_test_id("level")
    field.fill("40")
    field.press("Enter")
    why = re.compile("log_snr=40 of mark 3: expected .* to .*neighbours")
    expect(panel.get_by_test_id("error")).to_contain_text(why, timeout=SOON)
    before = picture(panel)
    field.fill("-3")
    field.press("Enter")
    expect_picture_changes(panel, before)
    expect(panel.get_by_test_id("error")).to_be_hidden(timeout=SOON)


def test_the_curve_is_read_by_key_chooses_a_step_by_click_and_is_saved(show: object, page: Page) -> None:
    panel = show("schedule_editor(two_modes(), n_steps=5, n_samples=50)")
    curve, reading = panel.get_by_test_id("curve"), panel.get_by_test_id("reading")
    ticks = [text for text in curve.locator("text").all_text_contents() if text.startswith("−")]
    assert ticks == ["−4", "−2"]  # a minus, no hyphen
    curve.focus()
    curve.press("ArrowRight")
    expect(reading).to_have_text(re.compile(r"^(yours|preset), step 1: \S+ at log-SNR −\d\.\d\d$"))
    for _ in range(12):
        curve.press("ArrowRight")
    expect(reading).to_have_text(re.compile(r"step 5: \S+ at the data$"))  # beyond all levels
    points = curve.locator(".wb-point")
    assert points.count() == 10
    points.nth(6).click(force=True)  # preset's five, then yours on top
    expect(panel.get_by_test_id("step-title")).to_have_text("Step 2 of 5")
    with page.expect_download() as saved:
        panel.get_by_test_id("export-svg").click()
    text = saved.value.path().read_text()
    assert text.startswith("<svg") and "preset" in text and "rgb(0, 114, 178)" in text  # yours, in light colours


def test_numbers_stay_faint_until_the_next_are_known(show: object, page: Page) -> None:
    panel = show("schedule_editor(Toy(seconds=0.3).problem, n_steps=5)")
    row, table = panel.locator("[data-arm=yours]"), panel.get_by_test_id("table")
    old, wide = row.inner_text(), table.bounding_box()
    panel.get_by_test_id("handle-1").press("ArrowRight")
    expect(row).to_have_class(re.compile("wbe-old"))
    assert row.inner_text() == old and table.bounding_box() == wide  # nothing jumps under the hand
    expect(row).not_to_have_class(re.compile("wbe-old"), timeout=SOON)
    assert row.inner_text() != old


def test_every_control_has_a_name_and_is_reached_by_tab(show: object, page: Page) -> None:
    panel = show("schedule_editor(two_modes(), n_steps=4, n_samples=20)")
    nameless = panel.evaluate(
        """root => [...root.querySelectorAll('input, select, textarea, button, canvas, [tabindex]')]
           .filter(node => !node.getAttribute('aria-label') && !node.getAttribute('aria-hidden'))
           .map(node => node.outerHTML)""")
    assert nameless == []
    panel.get_by_test_id("seed").focus()
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.dataset.testid ?? ''"))
    wanted = ["handle-0", "handle-1", "handle-2", "handle-3", "preset", "spacing", "final", "use", "level", "copy-plan"]
    assert [name for name in reached if name in wanted] == wanted, reached


def test_nothing_overflows_in_either_theme_at_narrow_widths(show: object, page: Page) -> None:
    found = "preset_plan('deis_3', grid(two_modes().schedule, 8, 'karras'))"
    panel = show(f"schedule_editor(two_modes(), n_steps=8, n_samples=50, best={found})")
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
        page.wait_for_function("dark => (document.body.dataset.jpThemeLight === 'false') === dark", arg="Dark" in theme)
        for width in (1280, 900):
            page.set_viewport_size({"width": width, "height": 1000})
            page.wait_for_timeout(500)
            over = panel.evaluate("root => [...root.querySelectorAll('*')].filter(node => !node.closest('svg') &&"
                                  " node.getBoundingClientRect().right > root.getBoundingClientRect().right + 2)"
                                  ".map(node => node.outerHTML.slice(0, 80))")
            assert over == [], (theme, width)
            beyond = panel.get_by_test_id("strip").evaluate(
                "svg => [...svg.querySelectorAll('.wbe-mark, text')].filter(node => node.getBoundingClientRect().width"
                " && node.getBoundingClientRect().right > svg.getBoundingClientRect().right + 2).length")
            assert beyond == 0, (theme, width)
