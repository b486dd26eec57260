"""Which code a method's numbers come of: a digest of the sources that it really uses."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
# By pattern, not by a parser, which takes a tenth of a second for the files of one method.
_IMPORT = re.compile(rf"^[ \t]*(?:from[ \t]+({ROOT.name}[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)|"
                     rf"import[ \t]+({ROOT.name}[\w.]*))", re.MULTILINE)
_FOR_CHECKERS = re.compile(r"^if TYPE_CHECKING:\n(?:[ \t]+.*\n|[ \t]*\n)*", re.MULTILINE)


def digest_of(function: Callable[..., Any]) -> str:
    """8 hex digits of the SHA-256 of the function's file and of all files of this package that it imports, and so on.

    A function without a file (typed into a notebook) counts by its own text, and so do its imports. What is imported
    for type checkers alone does not count, nor does the package's face, which imports everything. Some milliseconds for
    the first function, then one. Raises OSError where a function has neither.
    """
    own = inspect.getsourcefile(function)
    if own is not None and Path(own).is_file():
        return _digest(Path(own).resolve())
    text = inspect.getsource(function)
    return _hash(_imports(text), text)


@functools.cache
def _digest(file: Path) -> str:
    return _hash(_imports_of(file) | ({file} if file.is_relative_to(ROOT) else set()), _text(file))


def _hash(first: Set[Path], text: str) -> str:
    """Of a text and of the files of the package that are reached from the first ones."""
    sha = hashlib.sha256(text.encode())
    for file in sorted(_reached(first)):
        sha.update(f"\0{file.relative_to(ROOT).as_posix()}\0{_text(file)}".encode())
    return sha.hexdigest()[:8]


def _reached(first: Set[Path]) -> set[Path]:
    """These files and all of the package that they import, and these in turn."""
    seen: set[Path] = set()
    todo = list(first)
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += _imports_of(file)
    return seen


@functools.cache
def _text(file: Path) -> str:
    return file.read_text()


@functools.cache
def _imports_of(file: Path) -> frozenset[Path]:
    return frozenset(_imports(_text(file)))


def _imports(text: str) -> set[Path]:
    """The files of this package that a text imports anywhere, but for type checkers."""
    names: list[str] = []
    for module, imported, plain in _IMPORT.findall(_FOR_CHECKERS.sub("", text)):
        names += [plain] if plain else [module, *(f"{module}.{name}" for name in re.findall(r"\w+", imported))]
    return {file for name in names if (file := _file(name)) is not None}


def _file(module: str) -> Path | None:
    """The file of a module of this package; None for others, for names that are no modules, and for the face."""
    first, *rest = module.split(".")
    if first != ROOT.name or not rest:
        return None
    path = ROOT.joinpath(*rest)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
