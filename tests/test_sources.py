"""The digest of a method's sources changes with all that it uses, and with nothing else."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FunctionType

import pytest

from workbench import METHODS, Store, inputs, run, sources
from workbench.problems.mixtures import two_modes
from workbench.runs import code_of

FILES = {
    "__init__.py": "from workbench import everything",
    "everything.py": "x = 1",
    "knob.py": "y = 1",
    "problems/__init__.py": "",
    "problems/levels.py": "import workbench.knob",
    "problems/other.py": "z = 1",
    "quality/__init__.py": "q = 1",
    "methods/ddim.py": """from typing import TYPE_CHECKING

from workbench.problems import (
    levels,
)
if TYPE_CHECKING:
    from workbench.problems.other import z


def sample():
    from workbench.quality import q
""",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """digest(change={file: text}): of the method in a small package of these files."""
    root = tmp_path / "workbench"
    monkeypatch.setattr(sources, "ROOT", root)

    def digest(**change: str) -> str:
        for name, text in {**FILES, **{k.replace("__", "/") + ".py": v for k, v in change.items()}}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        for cached in (sources._digest, sources._text, sources._imports_of):
            cached.cache_clear()
        code = compile("def sample(): pass", str(root / "methods/ddim.py"), "exec").co_consts[0]
        return sources.digest_of(FunctionType(code, {}))

    yield digest
    for cached in (sources._digest, sources._text, sources._imports_of):
        cached.cache_clear()


def test_what_is_used_counts_and_nothing_else(package: Callable[..., str]) -> None:
    asked = package()
    assert asked == package() and len(asked) == 8
    for change in ({"methods__ddim": FILES["methods/ddim.py"] + "\n"}, {"knob": "y = 2"},
                   {"problems__levels": "import workbench.knob  # 2"}):
        assert package(**change) != asked
    for change in ({"everything": "x = 2"}, {"problems__other": "z = 2"}):  # the face's, and for type checkers
        assert package(**change) == asked


def test_imports_within_functions_count(package: Callable[..., str]) -> None:
    asked = package()
    FILES["quality/__init__.py"], kept = "q = 2", FILES["quality/__init__.py"]
    try:
        assert package() != asked
    finally:
        FILES["quality/__init__.py"] = kept


def test_a_function_without_a_file_counts_by_its_text() -> None:
    def typed(text: str, name: str) -> str:
        linecache.cache[name] = len(text), None, text.splitlines(True), name
        scope: dict[str, object] = {}
        exec(compile(text, name, "exec"), scope)
        return sources.digest_of(scope["sample"])

    text = "def sample():\n    from workbench.rng import Rng\n    return 1\n"
    assert typed(text, "<cell 1>") == typed(text, "<cell 2>") != typed(text.replace("1", "2"), "<cell 3>")
    assert typed(text, "<cell 4>") != typed(text.replace("rng import Rng", "knob import Knob"), "<cell 5>")


def test_the_code_of_a_run_names_release_version_and_sources() -> None:
    code = inputs("ddim", two_modes()).code
    release, _, rest = code.partition("+")
    assert release == __import__("workbench").__version__
    assert rest == f"ddim.{METHODS['ddim'].version}.{sources.digest_of(METHODS['ddim'].function)}"
    assert len({code_of(m) for m in METHODS.values()}) == len(METHODS)


def test_a_store_tells_which_runs_other_code_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    here = run("ddim", two_modes(), n_samples=2, n_steps=2)
    before = replace(here, inputs=replace(here.inputs, code=here.inputs.code[:-1] + "?"))
    gone = replace(here, inputs=replace(here.inputs, method="gone"))
    for made in (here, before, gone):
        store.put(made)
    assert {r.inputs.key for r in store.of_other_code()} == {before.inputs.key, gone.inputs.key}
    assert store.get(here.inputs) == here and store.get(before.inputs) == before  # kept, under keys of their own
    assert len(list(store)) == 3
