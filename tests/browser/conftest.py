"""Fixtures of the browser tests: see lab.py for how a test uses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.lab import CHROMIUM_FLAGS, Lab, Traffic, system_chromium
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium that can reach nothing but this machine."""
    with sync_playwright() as playwright:
        path = system_chromium()
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: install your system's chromium, or run `python -m playwright install chromium`")
        launched = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS, timeout=120_000)
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def lab(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab over a copy of notebooks/; asks for the browser first, so as not to start in vain."""
    server = Lab(tmp_path_factory.mktemp("lab"), ROOT / "notebooks")
    yield server
    server.stop()


@pytest.fixture
def traffic() -> Traffic:
    """What the test's page asked for and what went wrong in it."""
    return Traffic()


@pytest.fixture
def page(browser: Browser, lab: Lab, traffic: Traffic, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A new page in a context of its own; kernels are ended after the test; a picture is kept of a test that failed."""
    context = browser.new_context(base_url=lab.url, viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(60_000)  # a busy machine is slow; what is to be quick is given its own timeout
    opened = context.new_page()
    traffic.watch(opened)
    failed_before = request.session.testsfailed
    yield opened
    if request.session.testsfailed > failed_before:
        folder = ROOT / "build" / "browser"
        folder.mkdir(parents=True, exist_ok=True)
        opened.screenshot(path=folder / f"{request.node.name}.png", full_page=True)
    context.close()
    lab.shut_kernels()
