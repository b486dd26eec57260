"""The search panel in JupyterLab: start, stop, resume, and an error said in the panel."""

from __future__ import annotations

import pytest
from browser.lab import Lab, Traffic, assert_local, open_notebook, run_all
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

SOON = 60_000  # a busy machine is slow
SETUP = """
import time
from functools import partial
from widgets.search import search_panel
from workbench.problems.mixtures import two_modes
from workbench.search.s3 import Space, search
schedule = two_modes().schedule
space = Space(schedule, 4, end=schedule.cleanest)
fitness = type("Slow", (), {"rows": 1, "key": {}, "__call__": lambda self, plans: (
    time.sleep(0.5), [sum(d.expansion.order for d in p.decisions) + p.times[1] for p in plans])[1]})()
"""


def test_a_search_is_started_stopped_and_resumed(page: Page, lab: Lab, traffic: Traffic) -> None:
    lab.add("search.ipynb", SETUP, "search_panel(partial(search, fitness, space, n_candidates=90, batch=5, "
            "strategy='evolution'), 90, rivals={'known': 9.0}, label='error', title='a search')")
    open_notebook(page, "search.ipynb")
    run_all(page)
    status, curve = page.get_by_test_id("search-status"), page.get_by_test_id("search-curve")
    expect(page.get_by_test_id("search-title")).to_have_text("a search")
    expect(status).to_have_attribute("data-state", "not started")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(status).to_have_attribute("data-state", "running", timeout=SOON)
    page.wait_for_function("Number(document.querySelector('[data-testid=search-curve]')?.dataset.n) > 0", timeout=SOON)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(status).to_have_attribute("data-state", "stopped", timeout=SOON)
    n = int(curve.get_attribute("data-n"))
    assert 0 < n < 90 and f"after {n} candidates; known 9" in curve.get_attribute("aria-label")
    expect(page.get_by_test_id("search-best").get_by_role("row")).not_to_have_count(0)
    page.get_by_role("button", name="Resume", exact=True).click()
    expect(status).to_have_attribute("data-state", "finished", timeout=SOON)
    expect(curve).to_have_attribute("data-n", "90")
    expect(page.get_by_role("button", name="Finished")).to_be_disabled()
    assert_local(traffic)


def test_an_error_is_said_in_the_panel(page: Page, lab: Lab, traffic: Traffic) -> None:
    lab.add("search.ipynb", SETUP, "search_panel(partial(search, fitness, space, n_candidates=0), 90)")
    open_notebook(page, "search.ipynb")
    run_all(page)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_test_id("search-error")).to_contain_text("n_candidates=0: expected at least 1", timeout=SOON)
    expect(page.get_by_test_id("search-status")).to_have_attribute("data-state", "failed")
    assert_local(traffic)
