"""The drafts explorer in JupyterLab: sliders by mouse and key, text and trees that follow, errors, no network."""

from __future__ import annotations

import re

import pytest
from browser.lab import Lab, Traffic, assert_local, drag, is_blank, open_notebook, run_all
from playwright.sync_api import Locator, Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

START = """
import sys
sys.path.insert(0, {root!r})
import time
from widgets import explorer
from workbench.problems.decoding import markov

def slowly(name, network):
    def slow(tokens, ask):
        time.sleep(0.03)
        return network(tokens, ask)
    return slow
"""
SOON = 60_000  # a busy machine is slow


@pytest.fixture
def show(page: Page, lab: Lab, request: pytest.FixtureRequest) -> object:
    """show(expression) opens a notebook that ends in that explorer, and returns the panel once a text is written."""

    def show(expression: str) -> Locator:
        lab.add("drafts.ipynb", START.format(root=str(request.config.rootpath)), f"e = {expression}\ne")
        open_notebook(page, "drafts.ipynb")
        run_all(page)
        panel = page.get_by_test_id("explorer")
        expect(panel.get_by_test_id("samples")).to_have_attribute("data-done", "true", timeout=SOON)
        return panel

    return show


def test_sliders_change_the_text_and_its_tree(show: object, page: Page, traffic: Traffic) -> None:
    panel = show("explorer(markov(16))")
    stream, tree, bars = (panel.get_by_test_id(name) for name in ("samples", "tree", "bars"))
    expect(panel.get_by_test_id("title")).to_contain_text("spectr · 64 tokens · drafts 4 · draft length 4")
    assert not is_blank(stream) and not is_blank(tree)
    key, text = stream.get_attribute("data-key"), stream.inner_text()
    drafts = panel.get_by_test_id("knob-n_drafts")
    drag(page, drafts, 60)
    expect(stream).not_to_have_attribute("data-key", key, timeout=SOON)
    expect(panel.get_by_test_id("title")).to_contain_text(re.compile("drafts [5-8]"), timeout=SOON)
    dragged = int(drafts.input_value())
    assert dragged > 4 and stream.inner_text() != text
    drafts.press("ArrowLeft")
    expect(panel.get_by_test_id("title")).to_contain_text(f"drafts {dragged - 1} ", timeout=SOON)
    expect(stream).to_have_attribute("data-done", "true", timeout=SOON)

    # every draft of the first block stands in its tree; what was rejected is struck through
    lost = tree.locator("[data-kind=lost]")
    assert lost.count() and lost.first.locator("line").count() == 1
    assert tree.locator("[data-kind=kept] line").count() == 0 and tree.locator("[data-kind=own]").count() == 1
    struck = stream.locator(".wbd-lost").first
    assert "line-through" in struck.evaluate("node => getComputedStyle(node).textDecorationLine")
    panel.get_by_test_id("show-rejected").uncheck()
    expect(struck).to_be_hidden()

    # bars: the rule in use is marked, its mean comes when the hand rests
    row = bars.locator("[data-rule=k_seq]")
    said = re.compile(r"k_seq: acceptance [\d.]+, mean [\d.]+, in use")
    expect(row).to_have_attribute("aria-label", said, timeout=SOON)
    expect(bars.locator("[data-rule='optimum without']")).to_contain_text(re.compile(r"\d\d"), timeout=SOON)
    expect(panel.get_by_test_id("speed")).to_contain_text("of plain decoding's", timeout=SOON)
    expect(panel.locator("[data-metric=block_efficiency]")).to_contain_text("n = 16", timeout=SOON)
    assert not is_blank(panel.get_by_test_id("frontier"))
    assert_local(traffic)


def test_blocks_are_chosen_by_pointer_and_by_key(show: object, page: Page) -> None:
    panel = show("explorer(markov(16), methods=('speculative',), n_tokens=40)")
    stream, block = panel.get_by_test_id("samples"), panel.get_by_test_id("block")
    expect(block).to_contain_text("Block 1 of")
    stream.locator("[data-block='2']").hover()
    expect(block).to_contain_text("Block 3 of")
    panel.get_by_test_id("title").hover()
    expect(block).to_contain_text("Block 1 of")  # a look is not a choice
    stream.locator("[data-block='3']").click()
    panel.get_by_test_id("title").hover()
    expect(block).to_contain_text("Block 4 of")
    stream.press("ArrowRight")
    expect(block).to_contain_text("Block 5 of")
    expect(stream).to_have_attribute("aria-activedescendant", stream.locator("[data-block='4']").get_attribute("id"))
    expect(stream.locator("[data-block='4']")).to_have_attribute("aria-selected", "true")
    stream.press("Home")
    expect(block).to_contain_text("Block 1 of")
    panel.get_by_test_id("seed").fill("7")
    panel.get_by_test_id("seed").press("Enter")
    expect(panel.get_by_test_id("title")).to_contain_text("seed 7", timeout=SOON)
    panel.get_by_test_id("undo").click()
    expect(panel.get_by_test_id("title")).to_contain_text("seed 0", timeout=SOON)


def test_the_text_is_seen_growing(show: object, page: Page) -> None:
    panel = show("explorer(markov(16).wrapped(slowly), methods=('speculative',), n_tokens=30)")
    stream = panel.get_by_test_id("samples")
    stream.evaluate("""node => { window.seen = []; new MutationObserver(() => window.seen.push([node.dataset.key,
        Number(node.dataset.blocks)])).observe(node, { attributes: true, attributeFilter: ['data-revision'] }); }""")
    old = stream.get_attribute("data-key")
    panel.get_by_test_id("dice").click()
    page.wait_for_function("old => { const n = document.querySelector('[data-testid=samples]');"
                           " return n.dataset.key !== old && n.dataset.done === 'true'; }", arg=old, timeout=SOON)
    key = stream.get_attribute("data-key")
    lengths = [n for k, n in page.evaluate("window.seen") if k == key]
    assert lengths == sorted(lengths) and len(set(lengths)) >= 4, lengths


def test_what_cannot_be_is_shown_and_the_sliders_live_on(show: object, page: Page) -> None:
    panel = show("explorer(markov(8), methods=('spec_infer', 'autoregressive'), n_tokens=20)")
    error, title = panel.get_by_test_id("error"), panel.get_by_test_id("title")
    widths = panel.get_by_test_id("knob-widths")
    widths.fill("3, many")
    widths.press("Enter")
    expect(error).to_contain_text("widths='3, many': expected a tuple of numbers", timeout=SOON)
    panel.get_by_test_id("knob-rule").select_option("importance")
    expect(error).to_contain_text("takes at most 2 drafts per position", timeout=SOON)
    widths.fill("2, 2")
    widths.press("Enter")
    expect(error).to_be_hidden(timeout=SOON)
    expect(title).to_contain_text("widths 2-2 · temperature 1 · rule importance", timeout=SOON)
    panel.get_by_test_id("pin").click()
    panel.get_by_test_id("method").select_option("autoregressive")
    expect(panel.get_by_test_id("bars")).to_contain_text("every token is the target's own", timeout=SOON)
    expect(panel.get_by_test_id("comparison")).to_contain_text("spec_infer → autoregressive", timeout=SOON)
    panel.get_by_test_id("copy-code").click()
    code = panel.get_by_test_id("box")
    expect(code).to_have_value(re.compile("problem = markov"), timeout=SOON)
    compile(code.input_value(), "code", "exec")
    runs = panel.get_by_test_id("frontier").locator("[data-keys]")
    expect(runs.nth(1)).to_be_attached(timeout=SOON)  # and a third, where the first run was not overtaken


def test_every_control_has_a_name_and_nothing_overflows(show: object, page: Page) -> None:
    panel = show("explorer(markov(16))")
    nameless = panel.evaluate(
        """root => [...root.querySelectorAll('input, select, textarea, button, [tabindex], [role=img], [role=option]')]
           .filter(node => !node.getAttribute('aria-label')).map(node => node.outerHTML.slice(0, 90))""")
    assert nameless == []
    panel.get_by_test_id("method").focus()
    reached = []
    for _ in range(32):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.dataset.testid ?? ''"))
    wanted = ["knob-n_tokens", "knob-n_drafts", "field-n_drafts", "knob-rule", "show-rejected", "samples", "frontier"]
    assert [name for name in reached if name in wanted] == wanted, reached
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
        page.wait_for_function("dark => (document.body.dataset.jpThemeLight === 'false') === dark", arg="Dark" in theme)
        for width in (1280, 900):
            page.set_viewport_size({"width": width, "height": 1000})
            page.wait_for_timeout(500)
            over = panel.evaluate(
                """root => [...root.querySelectorAll('*')].filter(node => !node.closest('svg, .wbd-stream')
                && node.getBoundingClientRect().right > root.getBoundingClientRect().right + 2)
                .map(node => node.outerHTML.slice(0, 80))""")
            assert over == [], (theme, width)
