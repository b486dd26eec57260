"""Every notebook keeps the rules, runs at its defaults and with other small parameters, and hides no error."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from run_all import (
    NOTEBOOKS,
    faults,
    full_parameters,
    incomplete_figures,
    notebooks,
    parameter_names,
    run,
    smoke_parameters,
    tagged,
    unknown_parameters,
    variants,
)

MAX_CELLS = 26
# The aim is 60 s on two quiet cores. It is held in processor seconds, which a busy machine hardly changes: on one,
# the same import has taken a hundred times as long by the clock. The clock only ends a cell that hangs.
MAX_PROCESSOR_SECONDS = 180
HANGS_AFTER_SECONDS = 240
MAX_FILE_BYTES = 1e6
MAX_PEAK_BYTES = 1.2e9
ALL = [path.relative_to(NOTEBOOKS).as_posix() for path in notebooks()]

# The kernel's own highest resident set, and its processor seconds. Not ru_maxrss: in it a child starts with the size of
# its parent.
PEAK = """
import re as _re, resource as _resource, sys as _sys
try:
    _peak = int(_re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
except OSError:
    _peak = _resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss * (1 if _sys.platform == "darwin" else 1024)
_used = [_resource.getrusage(who) for who in (_resource.RUSAGE_SELF, _resource.RUSAGE_CHILDREN)]
print(_peak, sum(use.ru_utime + use.ru_stime for use in _used))
"""


def definitions(source: str) -> list[str]:
    """Functions and classes that a cell defines. Lines for the shell or IPython are left out."""
    python = "\n".join("" if re.match(r"\s*[%!]", line) else line for line in source.splitlines())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in ast.walk(ast.parse(python)) if isinstance(node, kinds)]


def broken_rules(notebook: Any) -> list[str]:
    """What in a notebook as stored goes against the design."""
    wrong = []
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        return [f"not a valid notebook: {error.message}"]
    for tag in ("parameters", "checks"):
        count = len(tagged(notebook, tag))
        if count == 0 or (tag == "parameters" and count > 1):
            wrong.append(f"{count} cells tagged {tag}")
    if len(notebook.cells) > MAX_CELLS:
        wrong.append(f"{len(notebook.cells)} cells, {MAX_CELLS} is the most")
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        if cell.outputs or cell.execution_count is not None:
            wrong.append(f"cell {index} has stored outputs")
        if defined := definitions(cell.source):
            wrong.append(f"cell {index} defines {', '.join(defined)}")
    if "widgets" in notebook.metadata:
        wrong.append("it has stored widget state")
    for what, some in (("smoke", smoke_parameters(notebook)), ("full", full_parameters(notebook)),
                       *(("variant", v) for v in variants(notebook))):
        if unknown := unknown_parameters(notebook, some):
            wrong.append(f"{what} parameters that the parameters cell does not assign: {', '.join(unknown)}")
    (cell,) = tagged(notebook, "parameters")[:1] or [None]
    for line in cell.source.splitlines() if cell else ():
        if re.match(r"\w+ = [\d\[]", line) and not re.search(r"#.*\d", line):
            wrong.append(f"no bounds are stated beside {line.split(' ')[0]}")
    return wrong


def run_measured(source: Path, folder: Path, parameters: dict[str, Any] | None = None) -> tuple[Any, float, int]:
    """Run it (at its defaults); give back the executed notebook, its kernel's processor seconds and peak bytes."""
    notebook = nbformat.read(source, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PEAK, metadata={"tags": ["peak"]}))
    copy = folder / "source" / source.name
    copy.parent.mkdir()
    nbformat.write(notebook, copy)
    executed = run(copy, folder / source.name, parameters or {}, folder / "figures", HANGS_AFTER_SECONDS)
    (last,) = tagged(executed, "peak")
    peak_bytes, seconds = "".join(output.text for output in last.outputs).split()  # may come in pieces
    return executed, float(seconds), int(peak_bytes)


def not_executed(notebook: Any, tag: str) -> list[int]:
    return [index for index, cell in enumerate(notebook.cells)
            if tag in cell.metadata.get("tags", ()) and cell.cell_type == "code" and cell.execution_count is None]


def test_there_are_notebooks():
    assert ALL, "notebooks/ holds no notebook"
    assert ALL[0] == "00_start_here.ipynb"


@pytest.mark.parametrize("name", ALL)
def test_notebook_keeps_the_rules(name):
    assert broken_rules(nbformat.read(NOTEBOOKS / name, as_version=4)) == []


VARIANTS = [(name, k) for name in ALL for k in range(len(variants(nbformat.read(NOTEBOOKS / name, as_version=4))))]


@pytest.mark.notebook
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "k"), VARIANTS)
def test_notebook_runs_with_other_parameters(name, k, tmp_path):
    """Lists of one entry, one seed, the smallest sizes: what they cannot show is skipped by name, and nothing fails."""
    source = NOTEBOOKS / name
    executed, _, _ = run_measured(source, tmp_path, variants(nbformat.read(source, as_version=4))[k])
    assert faults(executed) == []
    assert not_executed(executed, "checks") == []


def said(notebook: Any) -> str:
    """All that the cells printed, on stdout and stderr."""
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", ())
                   if output.output_type == "stream")


@pytest.mark.notebook
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ALL)
def test_notebook_runs(name, tmp_path):
    """At its defaults, as "Run All Cells" does."""
    executed, seconds, peak_bytes = run_measured(NOTEBOOKS / name, tmp_path)
    print(f"{name}: {seconds:.0f} processor seconds, {peak_bytes / 1e6:.0f} MB")
    assert faults(executed) == []
    assert not_executed(executed, "checks") == []
    assert not re.search(r"unencrypted|TCP", said(executed))
    assert seconds < MAX_PROCESSOR_SECONDS
    assert (tmp_path / name).stat().st_size < MAX_FILE_BYTES
    assert peak_bytes < MAX_PEAK_BYTES
    if "figures" in parameter_names(executed):
        assert incomplete_figures(tmp_path / "figures") == []


# The broken twins: small notebooks made here, each with one thing wrong, and the checker that finds it.


def made(*cells: str, smoke: dict[str, Any] | None = None, parameters: str = "steps = 20  # 1 to 50") -> Any:
    """A small notebook that keeps the rules, with these code cells between its parameters and its checks."""
    new = nbformat.v4.new_code_cell
    code = [new(parameters, metadata={"tags": ["parameters"]}), *map(new, cells)]
    code.append(new("assert steps > 0", metadata={"tags": ["checks"]}))
    metadata = {"workbench": {"smoke": smoke or {}}, "kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return nbformat.v4.new_notebook(cells=code, metadata=metadata)


def executed_from(notebook: Any, folder: Path) -> tuple[Any, float, int]:
    nbformat.write(notebook, folder / "made.ipynb")
    return run_measured(folder / "made.ipynb", folder / "out", smoke_parameters(notebook))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path


def test_a_good_notebook_passes(folder):
    notebook = made("seen = steps", smoke={"steps": 2})
    assert broken_rules(notebook) == []
    notebook.cells.insert(-1, nbformat.v4.new_code_cell("print(seen)"))
    executed, seconds, peak_bytes = executed_from(notebook, folder)
    assert 0.1 < seconds < 30
    assert faults(executed) == []
    assert not_executed(executed, "checks") == []
    assert any(output.get("text") == "2\n" for cell in executed.cells for output in cell.get("outputs", ()))
    assert 2e7 < peak_bytes < 3e8


def test_static_faults_are_found():
    def complaint(change) -> str:
        notebook = made("x = 1")
        change(notebook)
        (found,) = broken_rules(notebook)
        return found

    cells = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    output = nbformat.v4.new_output("stream", text="1\n")
    assert "0 cells tagged parameters" in complaint(lambda n: n.cells[0].metadata.pop("tags"))
    assert "2 cells tagged parameters" in complaint(lambda n: n.cells[1].metadata.update(tags=["parameters"]))
    assert "0 cells tagged checks" in complaint(lambda n: n.cells[-1].metadata.pop("tags"))
    assert "stored outputs" in complaint(lambda n: n.cells[1].outputs.append(output))
    assert "stored widget state" in complaint(lambda n: n.metadata.update(widgets={}))
    assert "defines helper" in complaint(lambda n: n.cells.append(cells[0]("%time\nif x:\n    def helper(): pass")))
    assert "28 cells" in complaint(lambda n: n.cells.extend(cells[1]("text") for _ in range(25)))
    for kind, wrong in (("smoke", {"stepz": 2}), ("full", {"stepz": 2}), ("variants", [{"steps": 1}, {"stepz": 2}])):
        assert "not assign: stepz" in complaint(lambda n, k=kind, w=wrong: n.metadata.workbench.update({k: w}))
    assert "no bounds are stated beside steps" in complaint(lambda n: n.cells[0].update(source="steps = 20  # number"))
    assert "not a valid notebook" in complaint(lambda n: n.cells[1].update(metadata="none"))


def test_an_unknown_parameter_is_found(folder):
    notebook = made(smoke={"stepz": 2})
    assert unknown_parameters(notebook, {"stepz": 2, "steps": 3}) == ["stepz"]
    with pytest.raises(ValueError, match="does not assign stepz"):
        executed_from(notebook, folder)


@pytest.mark.slow
def test_an_error_hidden_in_an_output_widget_is_found(folder):
    notebook = made("import ipywidgets\nout = ipywidgets.Output()\nwith out:\n    1 / 0")
    executed, _, _ = executed_from(notebook, folder)  # papermill raises nothing
    assert any("ZeroDivisionError" in line and "widget" in line for line in faults(executed)), faults(executed)


@pytest.mark.slow
def test_an_error_hidden_in_interact_is_found(folder):
    notebook = made("import ipywidgets\nipywidgets.interact(lambda n: 1 / 0, n=(0, 3));")
    executed, _, _ = executed_from(notebook, folder)
    assert any("ZeroDivisionError" in line for line in faults(executed)), faults(executed)


@pytest.mark.slow
def test_an_error_in_a_thread_is_found(folder):
    code = "import threading\nworker = threading.Thread(target=lambda: {}['missing'])\nworker.start(); worker.join()"
    executed, _, _ = executed_from(made(code), folder)
    assert any("KeyError" in line and "stderr" in line for line in faults(executed)), faults(executed)


def test_a_cell_that_never_ran_is_found():
    assert not_executed(made("x = 1"), "checks") == [2]


@pytest.mark.slow
def test_the_peak_is_the_kernels_own_and_is_kept(folder):
    code = "big = bytearray(400_000_000)\nfor i in range(0, len(big), 4096): big[i] = 1\ndel big"
    _, _, peak_bytes = executed_from(made(code), folder)
    assert 4e8 < peak_bytes < 6e8


def test_incomplete_figures_are_found(tmp_path):
    assert incomplete_figures(tmp_path) == ["no figure was written"]
    for name in ("a.png", "a.svg", "a.csv", "b.png"):
        (tmp_path / name).touch()
    assert incomplete_figures(tmp_path) == ["b lacks .csv, .svg"]
