"""Runs on disk, named by their content key: <folder>/<key>.safetensors (the answer) and <key>.json (the record)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load, save

from workbench.run import Inputs, Run


class Store:
    """A folder of runs. Any number of processes may read and write it at the same time.

    A record is written after its answer, each under a temporary name that is then renamed, so a reader sees a whole
    run or none, also after a writer was killed. What cannot be read is treated as absent and is written anew.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, inputs: Inputs) -> Run | None:
        """The run of these inputs, or None."""
        return self._read(inputs.key)

    def put(self, run: Run) -> None:
        """Keep a run; the same key overwrites."""
        key = run.inputs.key
        self._write(f"{key}.safetensors", save({"answer": run.answer.contiguous().cpu()}))
        self._write(f"{key}.json", json.dumps(run.to_dict(), indent=1, allow_nan=False).encode())

    def __iter__(self) -> Iterator[Run]:
        """All readable runs, in the order of their keys."""
        for path in sorted(self.folder.glob("*.json")):
            run = self._read(path.stem)
            if run is not None:
                yield run

    def _read(self, key: str) -> Run | None:
        try:
            record = json.loads((self.folder / f"{key}.json").read_bytes())
            answer = load((self.folder / f"{key}.safetensors").read_bytes())["answer"]
            run = Run.from_dict(record, answer)
        except Exception:  # a damaged file of any kind is a missing run
            return None
        return run if run.inputs.key == key else None

    def _write(self, name: str, content: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
