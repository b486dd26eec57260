"""The ticks of all live charts: two at least in any range, each with a text of its own; and how numbers are written."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser

from widgets.live import script

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

RANGES = [(215, 364), (1, 1.05), (0.01, 1000), (1e-12, 1e12), (3, 3), (9.5, 10.5), (1e8, 1.1e8), (0.0312, 0.0313)]
EVEN = [(-5.2, -4.1), (0, 1), (68, 309), (5, 5), (0, 0), (1.00001, 1.00002), (-0.3, 0.4), (-4e9, 7e9)]
CALLS = """([ranges, even]) => [
  ...ranges.map(([a, b]) => [a, b, named(logTicks(a, b), (x, d) => `${+x.toPrecision(d)}`)]),
  ...even.flatMap(([a, b]) => [3, 5, 8].map((n) => [a, b, named(niceTicks(a, b, n), (x, d) => x.toFixed(d), 0)])),
]"""
# The broken twin: 1, 2 and 5 of each power, rounded to whole numbers.
TWIN = """
function logTicks(low, high) {
  const ticks = [-1, 0, 1, 2, 3].flatMap((e) => [1, 2, 5].map((m) => m * 10 ** e));
  return ticks.filter((t) => t >= low && t <= high);
}
function niceTicks(low, high, count) { return Array.from({ length: count }, (_, i) => low + i * (high - low) / count); }
function named(ticks) { return ticks.map((t) => [t, t.toFixed(0)]); }
"""


def faults(browser: Browser, functions: str) -> list[tuple[float, float, object]]:
    context = browser.new_context()
    try:
        page = context.new_page()
        page.add_script_tag(content=functions)
        found = page.evaluate(CALLS, [RANGES, EVEN])
    finally:
        context.close()
    assert len(found) == len(RANGES) + 3 * len(EVEN)
    return [(low, high, ticks) for low, high, ticks in found
            if len(ticks) < 2 or len({text for _, text in ticks}) < len(ticks)
            or (high > low and not all(low * 0.99 - 1e-9 <= t <= high * 1.01 + 1e-9 for t, _ in ticks if low >= 0))]


def test_any_range_has_ticks_with_texts_of_their_own(browser: Browser) -> None:
    assert faults(browser, script("ticks.js")) == []


def test_numbers_have_a_minus_and_as_many_digits_as_mean_something(browser: Browser) -> None:
    cases = {"short(-5.25)": "−5.25", "short(0)": "0", "short(1e-4)": "1e−4", "short(1.2345e-7)": "1.23e−7",
             "short(-23456)": "−23.5 k", "signed(-0.5)": "−0.50", "measured(0.2345, 0.012)": "0.234 ± 0.012",
             "measured(2.13e-5, 4.4e-6)": "2.1e−5 ± 4e−6", "measured(0.0004, 0.02)": "0.000 ± 0.020",
             "measured(-0.31, 0.2)": "−0.31 ± 0.20", "measured(3e-8, 0)": "3e−8", "measured(0.5)": "0.5"}
    context = browser.new_context()
    try:
        page = context.new_page()
        page.add_script_tag(content=script("core.js"))
        assert page.evaluate("calls => calls.map((call) => eval(call))", list(cases)) == list(cases.values())
    finally:
        context.close()


def test_the_check_fails_for_ticks_of_whole_numbers(browser: Browser) -> None:
    assert len(faults(browser, TWIN)) > 10
