"""The generated documentation, README's table of families and a page for each: `python -m workbench.pages`."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from workbench.family import FAMILIES
from workbench.knob import BoundKnob
from workbench.registry import METHODS, Method

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"


def families_table() -> str:
    """One row a family, for the README."""
    rows = ["| family | question | methods | a cost is |", "|---|---|---|---|"]
    for name, family in sorted(FAMILIES.items()):
        methods = ", ".join(f"`{m.name}`" for m in _of(name))
        rows.append(f"| [{name}](docs/methods/{name}.md) | {family.question} | {methods} | {family.spends} |")
    return "\n".join(rows)


def family_page(name: str) -> str:
    """A family's methods, each with its docstring, source and knobs. Raises KeyError for an unknown family."""
    family = FAMILIES[name]
    lines = [f"# {name.capitalize()}", "", family.question, "",
             f"A sample is one {family.sample}; costs are counted in {family.spends}, and drawn in "
             f"{'FLOPs' if family.axis == 'flops' else family.axis}.", ""]
    for method in _of(name):
        lines += [f"## `{method.name}`", "", *_prose(method), "", f"Source: {method.source}.",
                  "Exact: its output law is the reference's." if method.exact else "", "",
                  "| knob | default | allowed | what it does |", "|---|---|---|---|"]
        lines += [f"| `{knob.name}` | {_text(knob.default)} | {_allowed(knob)} | {_cell(knob.knob.help)} |"
                  for knob in method.knobs.values()]
        lines.append("")
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _of(family: str) -> list[Method]:
    return sorted((m for m in METHODS.values() if m.family == family), key=lambda m: m.name)


def _prose(method: Method) -> list[str]:
    return [line.strip() for line in (inspect.getdoc(method.function) or "").splitlines()]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _text(value: object) -> str:
    return f"`{value!r}`"


def _allowed(bound: BoundKnob) -> str:
    if bound.knob.choices:
        return ", ".join(_text(choice) for choice in bound.knob.choices)
    return "yes or no" if bound.kind is bool else f"{'each ' * (bound.kind is tuple)}{bound.knob.allowed()}"


def main() -> None:
    """Write the README's table and the pages."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    if BEGIN not in text or END not in text:
        sys.exit(f"README.md needs {BEGIN} and {END} around its table of families")
    readme.write_text(f"{before}{BEGIN}\n{families_table()}\n{END}{after}")
    folder = ROOT / "docs" / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    for name in FAMILIES:
        (folder / f"{name}.md").write_text(family_page(name))


if __name__ == "__main__":
    import workbench  # noqa: F401 (registers all methods)

    main()
