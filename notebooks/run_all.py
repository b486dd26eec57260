"""Run the notebooks with papermill: `python notebooks/run_all.py --out build/figures` (that is `make figures`).

Each notebook gets a folder of its own below --out. There it writes its figures, each as .png, .svg and .csv (its
`figures` parameter names the folder), and there its executed copy is kept. The tests use the functions of this file
too, so what they check and what this command does are the same.

papermill alone lets some errors pass: one raised in a widget's callback is hidden in the saved state of an Output
widget, one raised in a thread is only written to stderr. `faults` finds both.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import papermill
from traitlets.config import Config

NOTEBOOKS = Path(__file__).resolve().parent
FORMATS = {".png", ".svg", ".csv"}
MAX_SECONDS_PER_CELL = 60 * 60
_TRACEBACK = re.compile(r"Traceback \(most recent call last\)|^Exception in thread ", re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def notebooks() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def tagged(notebook: Any, tag: str) -> list[Any]:
    """The cells that carry the tag."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def parameter_names(notebook: Any) -> set[str]:
    """The names that the cells tagged `parameters` assign."""
    names: set[str] = set()
    for cell in tagged(notebook, "parameters"):
        for node in ast.parse(cell.source).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def smoke_parameters(notebook: Any) -> dict[str, Any]:
    """The small parameters that the notebook declares for a quick run, in metadata["workbench"]["smoke"]."""
    return dict(notebook.metadata.get("workbench", {}).get("smoke", {}))


def full_parameters(notebook: Any) -> dict[str, Any]:
    """The large parameters for figures, in metadata["workbench"]["full"]; what it leaves out keeps its default."""
    return dict(notebook.metadata.get("workbench", {}).get("full", {}))


def variants(notebook: Any) -> list[dict[str, Any]]:
    """Other small parameters that must run too, in metadata["workbench"]["variants"]: one-element lists, one seed."""
    return [dict(some) for some in notebook.metadata.get("workbench", {}).get("variants", ())]


def unknown_parameters(notebook: Any, parameters: Mapping[str, Any]) -> list[str]:
    """Parameters that the parameters cell does not assign: papermill would inject them, and nothing read them."""
    return sorted(set(parameters) - parameter_names(notebook))


def run(
    source: Path,
    target: Path,
    parameters: Mapping[str, Any],
    figures: Path | None = None,
    seconds_per_cell: int = MAX_SECONDS_PER_CELL,
) -> Any:
    """Execute source into target and give back the executed notebook.

    figures is the folder for the notebook's figures, passed on where it has such a parameter. The kernel sees
    WORKBENCH_HEADLESS=1, so that widgets leave megabytes of front-end scripts out. Raises papermill's error where a
    cell raises, and ValueError where the parameters cell does not assign one of the parameters.
    """
    notebook = nbformat.read(source, as_version=4)
    given = dict(parameters)
    if figures is not None and "figures" in parameter_names(notebook):
        figures.mkdir(parents=True, exist_ok=True)
        given["figures"] = str(figures.resolve())
    unknown = unknown_parameters(notebook, given)
    if unknown:
        raise ValueError(f"{source.name}: its parameters cell does not assign {', '.join(unknown)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("WORKBENCH_HEADLESS")
    os.environ["WORKBENCH_HEADLESS"] = "1"
    try:
        with _transport() as transport:
            return papermill.execute_notebook(
                str(source), str(target), parameters=given, kernel_name="python3", language="python",
                cwd=str(NOTEBOOKS), execution_timeout=seconds_per_cell, progress_bar=False, log_output=False,
                **transport,
            )
    finally:
        if before is None:
            del os.environ["WORKBENCH_HEADLESS"]
        else:
            os.environ["WORKBENCH_HEADLESS"] = before


@contextmanager
def _transport() -> Iterator[dict[str, Any]]:
    """How kernel and client talk: over sockets of this user alone, where the system has them.

    In a folder of their own: by default kernels that start in one folder at one time take each other's names.
    """
    if sys.platform == "win32":
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        yield {"config": Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/k"}})}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def faults(notebook: Any) -> list[str]:
    """What went wrong in an executed notebook: errors and tracebacks in outputs, on stderr and in saved widgets."""
    found = []

    def look(where: str, value: Any) -> None:
        if isinstance(value, Mapping) and value.get("output_type") == "error":
            found.append(f"{where}: {value.get('ename')}: {value.get('evalue')}")
            return
        for text in _texts(value):
            plain = _COLOUR.sub("", text)
            if _TRACEBACK.search(plain):
                found.append(f"{where}: {plain.strip().splitlines()[-1]}")
                return

    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            kind = output.get("name", output.output_type)
            look(f"cell {index}, {kind}", output)
    state = notebook.metadata.get("widgets", {}).get(_WIDGET_STATE, {}).get("state", {})
    for identity, model in state.items():
        for name, value in model.get("state", {}).items():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                look(f"widget {model.get('model_name')} {identity[:8]}, {name}", item)
    return found


def incomplete_figures(folder: Path) -> list[str]:
    """Figures in a folder that lack one of .png, .svg and .csv; a complaint where there is none at all."""
    kinds: dict[str, set[str]] = {}
    for path in folder.glob("*"):
        if path.suffix in FORMATS:
            kinds.setdefault(path.stem, set()).add(path.suffix)
    if not kinds:
        return ["no figure was written"]
    return [f"{stem} lacks {', '.join(sorted(FORMATS - has))}" for stem, has in sorted(kinds.items()) if FORMATS - has]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="notebooks to run, by name or its beginning (default: all)")
    parser.add_argument("--out", type=Path, default=Path("build/figures"))
    parser.add_argument("--smoke", action="store_true", help="with the small parameters that the tests use")
    chosen = parser.parse_args(arguments)
    todo = [path for path in notebooks() if not chosen.names or path.name.startswith(tuple(chosen.names))]
    if not todo:
        print("no such notebook; there are:", *(path.name for path in notebooks()))
        return 2
    failed = []
    for number, source in enumerate(todo, 1):
        folder = chosen.out / source.stem
        print(f"[{number}/{len(todo)}] {source.name} ...", flush=True)
        began = time.perf_counter()
        notebook = nbformat.read(source, as_version=4)
        for old in (path for path in folder.glob("*") if path.suffix in FORMATS):
            old.unlink()
        try:
            parameters = smoke_parameters(notebook) if chosen.smoke else full_parameters(notebook)
            executed = run(source, folder / source.name, parameters, folder)
            wrong = faults(executed)
            if "figures" in parameter_names(notebook):
                wrong += incomplete_figures(folder)
        except Exception as error:  # any failure of one notebook must not keep the others from running
            wrong = [str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)]
        figures = sorted({path.stem for path in folder.glob("*") if path.suffix in FORMATS})
        print(f"    {time.perf_counter() - began:.0f} s, figures: {', '.join(figures) or 'none'}", flush=True)
        for line in wrong:
            print(f"    WRONG: {line}", flush=True)
        if wrong:
            failed.append(source.name)
    print(f"{len(todo) - len(failed)} of {len(todo)} notebooks ran well; see {chosen.out}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
