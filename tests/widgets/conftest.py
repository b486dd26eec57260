"""Panels of one test do not compute through the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from widgets.live import Live


@pytest.fixture(autouse=True)
def _panels_sleep() -> Iterator[None]:
    yield
    for ref in list(Live._awake.values()):
        if (panel := ref()) is not None:
            panel.sleep()
