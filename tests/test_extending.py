"""The recipe of docs/extending.md, run as it stands: a method, a family and a view from the document alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from widgets import explorer, view
from workbench import FAMILIES, METHODS, METRICS, run

RECIPE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"


@pytest.fixture
def recipe(monkeypatch):
    """The document's code, run from top to bottom as a module of its own; what it registers goes away afterwards."""
    registries = METHODS, FAMILIES, METRICS, view._VIEWS
    before = [dict(registry) for registry in registries]
    module = ModuleType("recipe")
    monkeypatch.setitem(sys.modules, "recipe", module)
    blocks = re.findall(r"```python\n(.*?)```", RECIPE.read_text(), re.DOTALL)
    source = "from __future__ import annotations\n" + "\n".join(blocks)
    file = Path(RECIPE.parent / "recipe.py")  # a name for tracebacks: sources are looked up by it
    module.__file__ = str(file)
    import linecache

    linecache.cache[str(file)] = (len(source), None, source.splitlines(keepends=True), str(file))
    exec(compile(source, str(file), "exec"), module.__dict__)
    yield module
    for registry, kept in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kept)


def test_the_recipe_makes_a_method_a_family_and_a_panel(recipe, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    made = run("flips", recipe.coin(), 0, 40, n_rounds=50)
    assert made.cost.counted["tosses"] == 40 * 50 * 5 and made.quality["coin_error"].value < 0.05
    panel = explorer(recipe.coin())
    panel.wait(idle=True)
    assert isinstance(panel.family, recipe.CoinView) and panel.run.inputs.n_samples == 8
    assert panel.view["notice"] == "" and panel.view["shown"]["costs"][0]["unit"] == "tosses"
    points = panel.frontier["metrics"]["coin_error"]
    assert {p["role"] for p in points} >= {"reference", "baseline"} and all(p["tosses"] > 0 for p in points)
    assert "error of the mean" in panel._repr_mimebundle_()["text/plain"]


def test_a_family_without_a_view_is_shown_by_the_series_that_it_told(recipe, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    view._VIEWS.pop("coins")
    panel = explorer(recipe.coin())
    assert [pane.name for pane in panel.family.panes(panel.run)] == ["mean"]
