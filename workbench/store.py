"""Runs on disk, named by their content key: <folder>/<key>.json (the record) and <key>.safetensors (the tensors)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from workbench.registry import METHODS
from workbench.runs import Inputs, Run, code_of

_log = logging.getLogger(__name__)
_PARTS = {"inputs", "cost", "quality", "environment"}
FORMAT = 3  # of a record; 1 had neither this number nor a checksum of its own, 2 no phases and only the answer beside
_ABANDONED = 3600  # seconds after which a temporary file is that of a writer that was killed


class Store:
    """A folder of runs. Any number of processes may read and write it at the same time.

    A record is written after its answer, each under a temporary name that is then renamed, so a reader sees a whole
    run or none, also after a writer was killed. A record holds the SHA-256 of itself and of its answer: what does not
    match, or cannot be read, is treated as absent, named once in the log and in `damaged`, and is written anew.
    Records without a checksum, of the first version, are believed where every field is of its kind.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"folder={folder!r}: expected a path")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.damaged: dict[Path, str] = {}
        for path in self.folder.glob(".*.part"):
            try:
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()
            except OSError:  # another process was quicker, or the folder may only be read
                continue

    def get(self, inputs: Inputs) -> Run | None:
        """The run of these inputs, or None."""
        return self._read(inputs.key)

    def put(self, run: Run) -> None:
        """Keep a run; the same key overwrites. Raises OSError that names the path where it cannot be written."""
        key = run.inputs.key
        answer = save({name: tensor.contiguous().cpu() for name, tensor in run.tensors().items()})
        record = {"format": FORMAT, **run.to_dict()}
        record["checksum"] = _checksum(record, answer)
        self._write(f"{key}.safetensors", answer)
        self._write(f"{key}.json", json.dumps(record, indent=1, allow_nan=False).encode())

    def __iter__(self) -> Iterator[Run]:
        """All readable runs, in the order of their keys."""
        for path in sorted(self.folder.glob("*.json")):
            run = self._read(path.stem)
            if run is not None:
                yield run

    def of_other_code(self) -> list[Run]:
        """The runs that other code made than the one at hand: other sources, versions, or a method that is gone.

        `get` gives none of them back for the same inputs, as their numbers may differ; they stay until deleted.
        """
        codes = {name: code_of(method) for name, method in METHODS.items()}
        return [run for run in self if codes.get(run.inputs.method) != run.inputs.code]

    def _read(self, key: str) -> Run | None:
        path = self.folder / f"{key}.json"
        try:
            run = _sound(path.read_bytes(), self.folder / f"{key}.safetensors", key)
        except FileNotFoundError as error:
            if Path(error.filename) == path:
                return None
            why = "its answer is missing"
        except Exception as error:  # a damaged file of any kind is a missing run
            why = f"{type(error).__name__}: {error}"
        else:
            self.damaged.pop(path, None)
            return run
        if path not in self.damaged:
            _log.warning("%s: not read as a run (%.200s)", path, why)
        self.damaged[path] = why
        return None

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        try:
            descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".part")
        except OSError as error:
            raise type(error)(error.errno, f"cannot write a run: {error.strerror}", str(path)) from error
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            Path(temporary).unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise type(error)(error.errno, f"cannot write a run: {error.strerror}", str(path)) from error
            raise


def _sound(text: bytes, answer_path: Path, key: str) -> Run:
    """The run of a record. Raises an error of some kind where record or answer are not what was written."""
    record, answer = json.loads(text), answer_path.read_bytes()
    checksum = record.pop("checksum", None)
    if record.get("format", 1) not in range(1, FORMAT + 1):
        raise ValueError(f"format {record['format']!r}: expected at most {FORMAT}, a newer workbench wrote it")
    if set(record) - {"format", "phases"} != _PARTS:
        raise ValueError(f"fields {sorted(record)}: expected {', '.join(sorted(_PARTS))}")
    if checksum is not None and checksum != _checksum(record, answer):
        raise ValueError("its checksum does not match")
    run = Run.from_dict(record, load(answer))
    if run.inputs.key != key:
        raise ValueError("its name is not that of its inputs")
    return run


def _checksum(record: dict[str, Any], answer: bytes) -> str:
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode() + b"\0" + answer).hexdigest()
