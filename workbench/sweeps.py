"""Sweeps: many runs at once, with evaluations that runs have in common made once and the others batched together."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from functools import lru_cache, partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor
from torch.utils._pytree import tree_leaves

from workbench.cost import Network
from workbench.problem import Problem
from workbench.runs import Cancelled, Inputs, Run, inputs, run
from workbench.store import Store

_log = logging.getLogger(__name__)


class Memo:
    """Remembers network outputs by the bits of their inputs, so trajectories that share a prefix share its work.

    Methods need not know: equal noise, models and steps so far give equal inputs. The least recently used outputs go
    once `max_bytes` are held. Safe to use from several threads.
    """

    def __init__(self, max_bytes: int = 256_000_000) -> None:
        self._max, self._held = max_bytes, 0
        self._kept: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Any:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            return None

    def put(self, key: bytes, out: Any) -> None:
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = out
            self._held += _nbytes(out)
            while self._held > self._max and len(self._kept) > 1:
                self._held -= _nbytes(self._kept.popitem(last=False)[1])

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self._held = 0

    def wrap(self, name: str, network: Network) -> Network:
        """`network`, asked only for inputs that it was not asked for before."""

        def remembered(*rows: Any) -> Any:
            key = address(name, rows)
            out = self.get(key)
            if out is None:
                out = network(*rows)
                self.put(key, out)
            return out

        return remembered

    def recall(self, name: str, network: Network) -> Network:
        """A network that is never evaluated: it answers from memory, and raises LookupError for inputs unknown."""

        def recalled(*rows: Tensor | None) -> Tensor:
            out = self.get(address(name, rows))
            if out is None:
                raise LookupError(f"{name} was not asked for these inputs before")
            return out

        return recalled


def address(name: str, arguments: Sequence[Any]) -> bytes:
    """16 bytes that stand for a network's name and its arguments: the exact bits, shapes and types of tensors, wherever
    they are nested, and the text of all else.

    Bits that lie on an accelerator are `folded` there, and only what that gives is fetched, all at once.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=16)
    far: dict[torch.device, list[Tensor]] = {}
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor):
            digest.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
            bits = leaf.detach().contiguous().flatten().view(torch.uint8)
            if _is_near(leaf):
                digest.update(bits.numpy().data)
            else:
                digest.update(str(leaf.device).encode())
                far.setdefault(leaf.device, []).append(bits)
        elif leaf is not None:
            digest.update(f"\0{leaf!r}".encode())
    for parts in far.values():
        digest.update(folded(torch.cat(parts)).cpu().numpy().data)
    return digest.digest()


def _is_near(tensor: Tensor) -> bool:
    return tensor.is_cpu  # where blake2b is as fast as `folded`, and faster for what is small


def folded(bits: Tensor) -> Tensor:
    """Bytes (n,) uint8 -> (4,) int64 on their device: in each lane, modulo 2^64, the sum of their 32-bit words, each
    times a multiplier of its own. Integers: exact, whatever the order of the sum.

    Words that differ do so by 2^v times an odd number, v <= 31, and over all multipliers that product takes each
    multiple of 2^v equally often. So for any two inputs of one length 2^-33 of all multipliers, at most, let a lane
    agree, and 2^-132 all four; two lanes of 64 bits would not do. Source: arXiv 1202.4961, multilinear hashing.
    """
    words = torch.nn.functional.pad(bits, (0, -len(bits) % 4)).view(torch.int32)
    return (words * _multipliers(1 << len(words).bit_length(), bits.device)[:, : len(words)]).sum(1)


@lru_cache(32)
def _multipliers(size: int, device: torch.device) -> Tensor:
    """(4, size) random int64, the same on every device."""
    stream = torch.Generator().manual_seed(size)
    return torch.randint(-(2**63), 2**63 - 1, (4, size), generator=stream).to(device)


def _nbytes(out: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


class _Ask:
    """One run's wait for one network output."""

    def __init__(self, name: str, network: Network, rows: tuple[Tensor | None, ...], key: bytes) -> None:
        self.name, self.network, self.rows, self.key = name, network, rows, key
        self.run = getcurrent()
        self.out: Tensor | Exception | None = None


class _Rendezvous:
    """Runs that advance together: once each waits for an output (or has ended), all that is asked is evaluated.

    Each run is a greenlet of the caller's thread, so that the runs need no locks, and what interrupts the caller ends
    them all. Equal questions are evaluated once; different ones to one model go in one batch of at most max_rows rows.
    """

    def __init__(self, memo: Memo, max_rows: int, device: str) -> None:
        self._memo, self._max_rows = memo, max_rows
        self._caller, self._as_caller = getcurrent(), _modes({"cpu", torch.device(device).type})

    def wrap(self, name: str, network: Network) -> Network:
        def asked(*rows: Tensor | None) -> Any:
            key = address(name, rows)
            out = self._memo.get(key)
            if out is None:
                ask = _Ask(name, network, rows, key)
                with self._as_caller():
                    self._caller.switch(ask)
                out = ask.out
            if isinstance(out, Exception):
                raise out
            return out

        return asked

    def gather(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run all jobs until all have ended. What a job does not catch, such as Ctrl-C, ends the others and goes on."""
        runs = [greenlet(job) for job in jobs]
        with ExitStack() as ends:
            for run in runs:
                run.gr_context = copy_context()
                ends.callback(_end, run)
            asks = [ask for run in runs if (ask := run.switch()) is not None]
            while asks:
                self._answer(asks)
                asks = [ask for before in asks if (ask := before.run.switch()) is not None]

    def _answer(self, asks: Sequence[_Ask]) -> None:
        by_model: dict[str, dict[bytes, _Ask]] = {}
        for ask in asks:
            by_model.setdefault(ask.name, {}).setdefault(ask.key, ask)
        for questions in by_model.values():
            for batch in _batches(list(questions.values()), self._max_rows):
                self._evaluate(batch)
        for ask in asks:
            ask.out = by_model[ask.name][ask.key].out

    def _evaluate(self, batch: Sequence[_Ask]) -> None:
        try:
            columns = zip(*(ask.rows for ask in batch), strict=True)
            with torch.no_grad():
                out = batch[0].network(*(None if c[0] is None else torch.cat(c) for c in columns))
        except Exception as error:  # it belongs to the runs that asked, which raise it
            for ask in batch:
                ask.out = error
            return
        for ask, part in zip(batch, out.split([len(a.rows[0]) for a in batch if a.rows[0] is not None]), strict=True):
            ask.out = kept = part.clone()  # a view would keep the whole batch in memory
            self._memo.put(ask.key, kept)


def _end(run: greenlet) -> None:
    while not run.dead:  # a method may catch it, and ask again
        run.throw(GreenletExit)


def _modes(devices: Iterable[str]) -> Callable[[], ExitStack]:
    """A context in which torch has the modes that it has here.

    Modes belong to a thread, and so to all its greenlets: one that is left inside torch.no_grad() would take it along.
    """
    is_inference, has_grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in devices]

    def entered() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(is_inference))
        stack.enter_context(torch.set_grad_enabled(has_grad))
        for kind, dtype, is_on in casts:
            if is_on or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype, is_on))
        return stack

    return entered


def _batches(asks: Sequence[_Ask], max_rows: int) -> Iterable[list[_Ask]]:
    """Groups of questions that can be concatenated: same trailing shapes and types, at most max_rows rows each."""
    groups: dict[Any, list[_Ask]] = {}
    for ask in asks:
        form = tuple(None if r is None else (r.shape[1:], r.dtype, r.device) for r in ask.rows)
        groups.setdefault(form, []).append(ask)
    for group in groups.values():
        batch: list[_Ask] = []
        rows = 0
        for ask in group:
            size = len(ask.rows[0]) if ask.rows[0] is not None else 0
            if batch and rows + size > max_rows:
                yield batch
                batch, rows = [], 0
            batch.append(ask)
            rows += size
        yield batch


def together(problem: Problem, wanted: Sequence[Inputs], *, memo: Memo | None = None,
             store: Store | str | os.PathLike[str] | None = None,
             stop: Callable[[], bool] = lambda: False, on_run: Callable[[Run], object] | None = None,
             max_rows: int = 128, at_once: int = 64) -> list[Run]:
    """The runs of `wanted`, in order, on one problem; those already in `store` are read, new ones are put there.

    Up to at_once runs advance together, in batches of up to max_rows rows. Costs in each Run are those of that run
    on its own. Where a problem's `sharing` is "memo" or "none" its runs follow each other.
    on_run(run) is called as runs end. store: one, or its folder; where it cannot be written, that is said once in the
    log and the runs are given back all the same. Raises ValueError for inputs of another problem; Cancelled once stop()
    is true: runs that ended stay stored; and the first error of a run, after the others have ended.
    """
    if store is not None and not isinstance(store, Store):
        store = Store(store)
    for item in wanted:
        if item.digest != problem.digest:
            raise ValueError(f"inputs of {item.problem!r} ({item.digest}): expected those of {problem.name!r} "
                             f"({problem.digest})")
    problem.check()
    memo = memo if memo is not None else Memo()
    done: dict[str, Run] = {}
    failed: list[Exception] = []
    unwritten: list[str] = []
    todo: dict[str, Inputs] = {}
    for item in wanted:
        kept = store.get(item) if store is not None else None
        if kept is not None:
            done[item.key] = kept
        else:
            todo[item.key] = item

    def job(item: Inputs, shared: Any) -> None:
        try:
            made = run(item.method, shared, item.seed, item.n_samples, stop=stop, **item.knobs)
            done[item.key] = made
            if store is not None:
                _keep(store, made, unwritten)
            if on_run is not None:
                on_run(made)
        except Exception as error:  # raised again below, after the others have ended
            failed.append(error)

    if problem.sharing != "batch":  # one after the other
        alone = problem if problem.sharing == "none" else problem.wrapped(memo.wrap)
        for item in todo.values():
            job(item, alone)
            if failed:
                raise failed[0]
        return [done[item.key] for item in wanted]
    for chunk in _chunks(list(todo.values()), at_once):
        rendezvous = _Rendezvous(memo, max_rows, problem.device)
        shared = problem.wrapped(rendezvous.wrap)
        rendezvous.gather([partial(job, item, shared) for item in chunk])
        if failed:
            raise next((e for e in failed if not isinstance(e, Cancelled)), failed[0])
    return [done[item.key] for item in wanted]


def _keep(store: Store, made: Run, unwritten: list[str]) -> None:
    """Put a run into a store; one that cannot be written loses no run, and says so once."""
    try:
        store.put(made)
    except OSError as error:
        if not unwritten:
            _log.warning("%s; runs go on and are not kept there", error)
        unwritten.append(made.inputs.key)


def sweep(method: str, problem: Problem, axes: Mapping[str, Iterable[Any]], *, seeds: Iterable[int] = (0, 1, 2),
          n_samples: int = 16, memo: Memo | None = None, store: Store | str | os.PathLike[str] | None = None,
          stop: Callable[[], bool] = lambda: False, on_run: Callable[[Run], object] | None = None,
          **fixed: Any) -> list[Run]:
    """Every combination of the values in `axes` ({knob: values}) for every seed, with the other knobs `fixed`.

    All settings are validated before the first is run. Raises TypeError for an axis or seeds that are not several
    values, and what `inputs` and `together` raise.
    """
    grid = {name: _several(f"axes[{name!r}]", values) for name, values in axes.items()}
    each = _several("seeds", seeds)
    wanted = [
        inputs(method, problem, seed, n_samples, **fixed, **dict(zip(grid, values, strict=True)))
        for values in itertools.product(*grid.values())
        for seed in each
    ]
    return together(problem, wanted, memo=memo, store=store, stop=stop, on_run=on_run)


def _several(name: str, values: Any) -> list[Any]:
    """The values as a list, whatever gives them; a generator gives them only once."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}={values!r}: expected several values, such as [{values!r}]")
    return list(values)


def _chunks(items: Sequence[Inputs], size: int) -> list[Sequence[Inputs]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
