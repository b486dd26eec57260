"""The store: whole runs or none, whatever is killed, damaged or written at the same time."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import save

from workbench import Cost, Inputs, Quality, Run, Store, points

N_KEYS = 5
ENTRIES = 150_000  # 1.2 MB, so a write takes long enough to be struck in its middle


def made(i: int, entries: int = ENTRIES) -> Run:
    """Run i: every entry of its answer and its quality say i."""
    given = Inputs("ddim", "toy", "d", "1", i, 4, {"n_steps": 20, "fractions": (0.4, 0.6)})
    return Run(given, Cost({"a": i}, {"a": i}, {"a": float(i)}), {"drift": Quality(float(i), 0.0, 4)}, {"python": "3"},
               torch.full((entries,), float(i), dtype=torch.float64))


class InPlace(Store):
    """Broken twin: writes straight into the file that readers open."""

    def _write(self, name, content):
        with open(self.folder / name, "wb") as file:
            for at in range(0, len(content), 2**16):
                file.write(content[at : at + 2**16])
                file.flush()


def writer(store: Store, acknowledge: int) -> None:
    """Write the same few runs over and over, telling each that was put; in a forked child, until killed."""
    torch.set_num_threads(1)
    for count in range(10**9):
        store.put(made(count % N_KEYS))
        os.write(acknowledge, bytes([count % N_KEYS]))


def in_child(job, *args) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            job(*args)
        finally:
            os._exit(1)
    return pid


def whole(run: Run) -> bool:
    i = run.inputs.seed
    return (run == made(i) and run.answer.shape == (ENTRIES,) and bool((run.answer == i).all()))


def check_survives_kills(store: Store, rounds: int) -> None:
    """What was put before a kill -9 is still there, whole; nothing else shows."""
    source, told = random.Random(0), set()
    for _ in range(rounds):
        reader_end, writer_end = os.pipe()
        pid = in_child(writer, store, writer_end)
        os.close(writer_end)
        if source.random() < 0.8:  # else it may be struck before its first run is put
            told |= set(os.read(reader_end, 1))
        time.sleep(source.uniform(0.0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        told |= set(os.read(reader_end, 2**16))
        os.close(reader_end)
        shown = list(store)
        assert all(whole(run) for run in shown)
        assert told <= {run.inputs.seed for run in shown} <= set(range(N_KEYS))
        for i in range(N_KEYS):
            found = store.get(made(i, 1).inputs)
            assert (found is None and i not in told) or whole(found)
    assert told  # the writers did come to write


def test_survives_kill_9(tmp_path):
    check_survives_kills(Store(tmp_path), rounds=30)
    names = {p.suffix for p in tmp_path.iterdir()}
    assert names <= {".json", ".safetensors", ".part"}


def test_kill_check_fails_for_a_broken_twin(tmp_path):
    with pytest.raises(AssertionError):
        check_survives_kills(InPlace(tmp_path), rounds=200)


def check_readers(store: Store, seconds: float) -> None:
    """Two writers of the same keys; once a run was seen, every later read sees it whole."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    children = [in_child(writer, store, nowhere) for _ in range(2)]
    try:
        seen, end = set(), time.monotonic() + seconds
        while time.monotonic() < end or len(seen) < N_KEYS:
            for i in range(N_KEYS):
                found = store.get(made(i, 1).inputs)
                assert found is not None or i not in seen
                if found is not None:
                    assert whole(found)
                    seen.add(i)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(nowhere)


def test_readers_and_writers_at_the_same_time(tmp_path):
    check_readers(Store(tmp_path), seconds=1.5)


def test_reader_check_fails_for_a_broken_twin(tmp_path):
    with pytest.raises(AssertionError):
        check_readers(InPlace(tmp_path), seconds=20)


def test_round_trip_iteration_and_overwriting(tmp_path):
    store = Store(tmp_path / "new" / "folder")
    assert list(store) == [] and store.get(made(1).inputs) is None
    for i in (3, 1, 3):
        store.put(made(i))
    assert [r.inputs.key for r in store] == sorted(made(i).inputs.key for i in (1, 3))
    back = Store(store.folder).get(made(3).inputs)
    assert whole(back) and back.knobs["fractions"] == (0.4, 0.6)
    assert not [p for p in store.folder.iterdir() if p.suffix == ".part"]


DAMAGE = {
    "record cut": ("json", lambda b: b[: len(b) // 2]),
    "record empty": ("json", lambda b: b""),
    "record no text": ("json", lambda b: b"\xff\x00" * 50),
    "record of another kind": ("json", lambda b: b"[1, 2]"),
    "record lacks a part": ("json", lambda b: b.replace(b'"quality"', b'"other"')),
    "record of another run": ("json", lambda b: b.replace(b'"seed": 1', b'"seed": 2')),
    "answer cut": ("safetensors", lambda b: b[:-100]),
    "answer empty": ("safetensors", lambda b: b""),
    "answer of another name": ("safetensors", lambda b: save({"other": torch.zeros(1)})),
    "answer header lies": ("safetensors", lambda b: b"\xff" * 8 + b[8:]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_absent_and_can_be_put_anew(tmp_path, damage):
    store, (suffix, change) = Store(tmp_path), DAMAGE[damage]
    store.put(made(1))
    store.put(made(2))
    path = tmp_path / f"{made(1).inputs.key}.{suffix}"
    changed = change(path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    assert store.get(made(1).inputs) is None and [r.inputs.seed for r in store] == [2]
    store.put(made(1))
    assert whole(store.get(made(1).inputs))


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_half_a_run_is_absent(tmp_path, suffix):
    store = Store(tmp_path)
    store.put(made(1))
    (tmp_path / f"{made(1).inputs.key}.{suffix}").unlink()
    assert store.get(made(1).inputs) is None and list(store) == []


def test_temporary_and_strange_files_are_no_runs(tmp_path):
    store = Store(tmp_path)
    store.put(made(1))
    for name in (".abc.part", ".hidden.json", "notes.json", "x.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    assert [r.inputs.seed for r in store] == [1]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        Store(tmp_path).put(made(1))
    assert list(tmp_path.iterdir()) == []


class Believer(Store):
    """Broken twin: reads what can be parsed, whatever its checksum says."""

    def put(self, run):
        super().put(run)
        path = self.folder / f"{run.inputs.key}.json"
        record = json.loads(path.read_bytes())
        del record["checksum"]
        path.write_text(json.dumps(record))


def flips_believed(store: Store, per_file: int = 150) -> int:
    """How many of so many single flipped bits, in record and answer, are read as a sound run that differs."""
    run, believed = made(1, entries=20), 0
    store.put(run)
    source = random.Random(0)
    for suffix in ("json", "safetensors"):
        path = store.folder / f"{run.inputs.key}.{suffix}"
        sound = path.read_bytes()
        for _ in range(per_file):
            bit = source.randrange(8 * len(sound))
            damaged = bytearray(sound)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            found = store.get(run.inputs)
            believed += found is not None and (found.to_dict() != run.to_dict()
                                               or not torch.equal(found.answer, run.answer))
            assert all(isinstance(r, Run) for r in points_of(store))
        path.write_bytes(sound)
    assert store.get(run.inputs) == run
    return believed


def points_of(store: Store) -> list[Run]:
    points(list(store), "drift")  # whatever is damaged, this never fails
    return list(store)


def test_no_flipped_bit_is_believed(tmp_path):
    assert flips_believed(Store(tmp_path)) == 0


def test_flip_check_fails_for_a_broken_twin(tmp_path):
    assert flips_believed(Believer(tmp_path)) > 0


def test_records_without_a_checksum_are_read_where_every_field_is_of_its_kind(tmp_path):
    store = Believer(tmp_path)
    store.put(made(2, 5))
    assert Store(tmp_path).get(made(2).inputs) == made(2, 5)
    path = next(tmp_path.glob("*.json"))
    good = json.loads(path.read_bytes())
    old = {**good, "quality": {"drift": {"value": "2.0", "stderr": "0.5", "n": 4}}}  # without interval
    path.write_text(json.dumps(old))
    assert Store(tmp_path).get(made(2).inputs).quality["drift"] == Quality(2.0, 0.5, 4)
    for name, wrong in (("cost", {**good["cost"], "flops": {"a": "many"}}), ("environment", {"python": 3}),
                        ("quality", {"drift": {"value": "2", "stderr": "0", "n": "4"}}), ("quality", [1]), ("more", 1)):
        path.write_text(json.dumps({**good, name: wrong}))
        assert Store(tmp_path).get(made(2).inputs) is None, name


def test_a_damaged_run_is_named_once(tmp_path, caplog):
    store = Store(tmp_path)
    store.put(made(1, 5))
    path = next(tmp_path.glob("*.json"))
    path.write_bytes(path.read_bytes()[:-9])
    for _ in range(3):
        assert list(store) == []
    assert [r.getMessage().count(str(path)) for r in caplog.records] == [1] and list(store.damaged) == [path]
    store.put(made(1, 5))
    assert list(store) == [made(1, 5)] and not store.damaged


def test_what_killed_writers_left_goes_after_a_while(tmp_path):
    Store(tmp_path)
    old, young = tmp_path / ".old.part", tmp_path / ".young.part"
    for path, age in ((old, 7200), (young, 5)):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    Store(tmp_path)
    assert not old.exists() and young.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    store = Store(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OSError, match=r"cannot write a run.*gone"):
        store.put(made(1, 5))
    with pytest.raises(TypeError, match="folder=3: expected a path"):
        Store(3)


def test_records_of_a_newer_format_are_left_alone(tmp_path):
    store, run = Store(tmp_path), made(1, 3)
    store.put(run)
    path = tmp_path / f"{run.inputs.key}.json"
    record = json.loads(path.read_text())
    assert record["format"] == 3
    path.write_text(json.dumps({**record, "format": 4}))
    assert store.get(run.inputs) is None and "expected at most 3, a newer workbench wrote it" in store.damaged[path]
