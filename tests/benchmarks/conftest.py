"""Collects what the benchmarks measured and prints it as one table, aims beside figures."""

from __future__ import annotations

from collections.abc import Callable

import pytest

_ROWS: list[tuple[str, str, str]] = []


@pytest.fixture
def record_ratio() -> Callable[[str, tuple[float, float], float | None], None]:
    def record(what: str, figure: tuple[float, float], aim: float | None) -> None:
        _ROWS.append((what, f"{figure[0]:.3f} +- {figure[1]:.3f}", "" if aim is None else f"<= {aim:g}"))

    return record


@pytest.fixture
def record_seconds() -> Callable[[str, float, float], None]:
    def record(what: str, seconds: float, aim: float) -> None:
        _ROWS.append((what, f"{seconds * 1000:.0f} ms", f"<= {aim * 1000:g} ms"))

    return record


@pytest.fixture
def record_microseconds() -> Callable[[str, float], None]:
    def record(what: str, seconds: float) -> None:
        _ROWS.append((what, f"{seconds * 1e6:.1f} us", ""))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _ROWS:
        terminalreporter.section("speed")
        for what, figure, aim in _ROWS:
            terminalreporter.write_line(f"{what:<90} {figure:>18} {aim:>12}")
