"""The arrows of the design hold in the code: who may import what, what a method may not do, what the tree may hold."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
UI = ("ipywidgets", "panel", "holoviews", "anywidget", "IPython", "bokeh", "ipykernel", "pyviz_comms", "widgets")
LAZY = ("diffusers", "transformers", "sklearn", "scipy", "matplotlib", "accelerate")
FORBIDDEN_TO_METHODS = ("time", "random", "numpy.random", "workbench.cost", "workbench.runs", "workbench.store", *UI)
SEEDERS = ("manual_seed", "seed", "manual_seed_all")
IMPORT_NAMES = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml", "jupyter-repo2docker": "repo2docker"}
# What the declared packages are built on, and bring along within the range that fits them.
COME_ALONG = {"bokeh", "pandas", "param"}  # panel and holoviews
COME_ALONG |= {"IPython", "traitlets"}  # ipywidgets and ipykernel
COME_ALONG |= {"scipy", "huggingface_hub", "tokenizers", "tqdm"}  # scikit-learn, transformers
PICKLED = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy", ".npz"}
MAX_WEIGHT_BYTES = 40e6
MAX_METHOD_LINES = 280


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(code: str, package: str = "") -> Iterator[str]:
    """The dotted names that the code imports, anywhere in it; `from a import b` gives a.b. package resolves dots."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*parts, node.module or ""]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> list[str]:
    return list(imports(path.read_text(), ".".join(path.relative_to(ROOT).parts[:-1])))


def matching(names: list[str], prefixes: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)]


def calls(code: str, functions: tuple[str, ...]) -> list[str]:
    """Calls of a function or method of one of these names, with their lines."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in functions:
                found.append(f"line {node.lineno}: {ast.unparse(node.func)}")
    return found


def unfinished(text: str) -> list[str]:
    """Marks of unfinished work, and paths of somebody's machine."""
    words = r"\bTODO\b|\bFIXME\b|\bXXX\b|NotImplementedError"
    paths = r"/(?:home|Users|root|work|mnt)/[\w.-]+|[A-Z]:\\\\Users"
    return re.findall(words, text) + re.findall(paths, text)


@pytest.mark.parametrize("path", sources("workbench"), ids=name_of)
def test_workbench_knows_no_user_interface(path):
    assert matching(imports_of(path), UI) == []
    drawing = matching(imports_of(path), ("matplotlib",))
    if path.is_relative_to(ROOT / "workbench" / "zoo"):  # renders glyphs with the fonts that matplotlib carries
        drawing = matching(drawing, ("matplotlib.pyplot",))
    assert drawing == []


@pytest.mark.parametrize("path", sources("workbench/methods"), ids=name_of)
def test_methods_do_not_time_count_or_seed(path):
    assert matching(imports_of(path), FORBIDDEN_TO_METHODS) == []
    assert calls(path.read_text(), SEEDERS) == []
    assert len(path.read_text().splitlines()) <= MAX_METHOD_LINES


@pytest.mark.parametrize("path", sources("workbench", "widgets"), ids=name_of)
def test_only_declared_packages_are_imported(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    allowed = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names} | COME_ALONG
    allowed |= sys.stdlib_module_names | {"workbench", "widgets"}
    assert sorted({name.split(".")[0] for name in imports_of(path)} - allowed) == []


@pytest.mark.parametrize("path", sources("workbench", "widgets"), ids=name_of)
def test_code_is_finished_and_names_no_machine(path):
    assert unfinished(path.read_text()) == []


def test_notebooks_and_configuration_name_no_machine():
    names = ["pyproject.toml", "Makefile", "requirements.lock", "environment.yml", "README.md", ".ci/run"]
    texts = [ROOT / name for name in names] + sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert {path.name: found for path in texts if path.exists() and (found := unfinished(path.read_text()))} == {}


def modules_after(statement: str) -> set[str]:
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_workbench_is_light():
    """Heavy libraries are imported where they are used: a notebook's first import takes seconds otherwise."""
    assert modules_after("import workbench, workbench.registry, workbench.runs").isdisjoint({*LAZY, *UI})


def test_weights_are_safetensors_and_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name] if listed.returncode == 0 else []
    weights = ROOT / "workbench" / "zoo" / "weights"
    files = [path for path in {*tracked, *weights.rglob("*")} if path.is_file() and ".venv" not in path.parts]
    assert [name_of(path) for path in files if path.suffix in PICKLED] == []
    strange = {path.suffix for path in files if path.is_relative_to(weights)} - {".safetensors", ".json", ".md", ".txt"}
    assert strange == set()
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") < MAX_WEIGHT_BYTES


def test_the_generated_pages_are_up_to_date():
    from workbench.family import FAMILIES
    from workbench.pages import BEGIN, END, families_table, family_page

    readme = (ROOT / "README.md").read_text()
    written = {"README.md": readme.partition(BEGIN)[2].partition(END)[0].strip()}
    written |= {path.stem: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
    wanted = {"README.md": families_table().strip(), **{name: family_page(name) for name in FAMILIES}}
    stale = sorted(name for name in wanted.keys() | written.keys() if wanted.get(name) != written.get(name))
    assert stale == [], f"stale: {stale}; run `python -m workbench.pages`"


# The broken twins: each check above finds what it is there to find.


def test_imports_are_found_wherever_they_stand():
    code = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..g import h\n    import i.j as k\n"
    assert list(imports(code, "p.q")) == ["a.b", "c.d", "p.q.e", "p.g.h", "i.j"]
    assert matching(["numpy.random", "numpy", "timeit", "time"], ("time", "numpy.random")) == ["numpy.random", "time"]
    assert matching(list(imports("from numpy import random")), ("numpy.random",)) == ["numpy.random"]
    assert matching(list(imports("from widgets.panel import x")), UI) == ["widgets.panel.x"]


def test_seeding_is_found():
    assert calls("import torch\ntorch.manual_seed(3)\nx.cuda.manual_seed_all(1)\nrng.normal()", SEEDERS) == [
        "line 2: torch.manual_seed", "line 3: x.cuda.manual_seed_all",
    ]


@pytest.mark.parametrize("text", ["# TODO later", "raise NotImplementedError", "open('/home/me/x')"])
def test_unfinished_work_and_machines_are_found(text):
    assert unfinished(text)


def test_heavy_imports_are_found():
    assert "matplotlib" in modules_after("import matplotlib")
