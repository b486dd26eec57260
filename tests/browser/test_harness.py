"""The harness itself: it moves what can be moved, and it sees what a browser test is there to see."""

from __future__ import annotations

import psutil
import pytest
from browser.lab import Lab, Traffic, assert_local, drag, is_blank, open_notebook, run_all
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

SLIDER = """
import ipywidgets, os
from IPython.display import display
slider = ipywidgets.IntSlider(value=10, min=0, max=50, description="steps")
said = ipywidgets.HTML("steps = 10")
slider.observe(lambda change: setattr(said, "value", f"steps = {change['new']}"), "value")
display(slider, said)
"""
PICTURE = """
import io, ipywidgets, PIL.Image
from IPython.display import display
def picture(image):
    file = io.BytesIO(); image.save(file, "png"); return ipywidgets.Image(value=file.getvalue(), width=64, height=64)
display(picture(PIL.Image.linear_gradient("L")), picture(PIL.Image.new("L", (64, 64), 255)))
"""


def test_a_slider_moves_by_mouse_and_by_key(page, lab, traffic):
    lab.add("slider.ipynb", SLIDER, "print(6 * 7)")
    open_notebook(page, "slider.ipynb")
    run_all(page)
    expect(page.get_by_text("42", exact=True)).to_be_visible()
    handle = page.get_by_role("slider").first
    drag(page, handle, 60)
    value = float(handle.get_attribute("aria-valuenow"))
    assert value > 10
    expect(page.get_by_text(f"steps = {value:.0f}", exact=True)).to_be_visible(timeout=2000)
    handle.press("ArrowRight")
    expect(page.get_by_text(f"steps = {value + 1:.0f}", exact=True)).to_be_visible(timeout=2000)
    assert_local(traffic)


def test_pixels_tell_a_picture_from_a_blank(page, lab, traffic):
    lab.add("picture.ipynb", PICTURE)
    open_notebook(page, "picture.ipynb")
    run_all(page)
    pictures = page.locator("img.widget-image")
    expect(pictures).to_have_count(2)
    assert not is_blank(pictures.nth(0))
    assert is_blank(pictures.nth(1))
    assert_local(traffic)


def test_panel_inline_stays_within_its_known_styles(page, lab, traffic):
    code = """
    import panel as pn
    pn.extension()
    slider = pn.widgets.IntSlider(name="steps", start=0, end=50, value=10)
    pn.Column(slider, pn.pane.HTML(pn.bind(lambda n: f"<b>steps = {n}</b>", slider)))
    """
    lab.add("panel.ipynb", "\n".join(line[4:] for line in code.splitlines()))
    open_notebook(page, "panel.ipynb")
    run_all(page)
    handle = page.locator(".noUi-handle").first
    handle.press("ArrowRight")
    expect(page.get_by_text("steps = 11", exact=True)).to_be_visible(timeout=5000)
    assert_local(traffic)


def test_a_request_that_leaves_the_machine_is_found(page, lab, traffic):
    lab.add("away.ipynb", "from IPython.display import HTML\nHTML('<img src=\"https://example.org/a.png\">shown')")
    open_notebook(page, "away.ipynb")
    run_all(page)
    expect(page.get_by_text("shown", exact=True)).to_be_visible()
    page.wait_for_timeout(500)
    with pytest.raises(AssertionError, match=r"left the machine.*example\.org/a\.png"):
        assert_local(traffic)
    assert any("ERR_NAME_NOT_RESOLVED" in line for line in traffic.failed), "the browser could reach the outside"


def test_a_script_from_outside_is_found(page, lab, traffic):
    script = "const s = document.createElement('script'); s.src = 'https://example.org/b.js'; document.head.append(s)"
    lab.add("script.ipynb", f"from IPython.display import Javascript\nJavascript({script!r})")
    open_notebook(page, "script.ipynb")
    run_all(page)
    page.wait_for_timeout(500)
    with pytest.raises(AssertionError, match=r"left the machine.*example\.org/b\.js"):
        assert_local(traffic)


def test_a_cell_that_raises_is_found(page, lab):
    lab.add("raises.ipynb", "1 / 0", "print('never')")
    open_notebook(page, "raises.ipynb")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_all(page)


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (Traffic(failed=["404: http://127.0.0.1:1/x.js"]), "failed"),
        (Traffic(page_errors=["ReferenceError: x"]), "errors in the page"),
        (Traffic(console_errors=["Could not create a view for model"]), "console"),
        (Traffic(requests=[f"https://cdn.holoviz.org/panel/1/{n}.css" for n in range(4)]), "more styles"),
        (Traffic(requests=["https://cdn.holoviz.org/panel/1/panel.js"]), "left the machine"),
        (Traffic(requests=["ws://elsewhere.example/api"]), "left the machine"),
    ],
)
def test_each_fault_is_found(found, complaint):
    with pytest.raises(AssertionError, match=complaint):
        assert_local(found)


def test_nothing_survives_the_server(browser, tmp_path):
    server = Lab(tmp_path, None)
    server.add("sleeps.ipynb", "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\nprint('started')")
    page = browser.new_page(base_url=server.url)
    open_notebook(page, "sleeps.ipynb")
    run_all(page)
    process = psutil.Process(server.process.pid)
    started = [process, *process.children(recursive=True)]
    assert len(started) >= 3, "the server, its kernel, and the kernel's child"
    page.close()
    server.stop()
    server.stop()
    assert not any(one.is_running() for one in started)
