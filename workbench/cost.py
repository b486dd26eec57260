"""The one meter: evaluations and FLOPs per model, seconds and peak memory, always taken from outside the method."""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Cost:
    """What a run spent. evaluations: rows through each model; calls: batches; flops: per model."""

    evaluations: Mapping[str, int]
    calls: Mapping[str, int]
    flops: Mapping[str, float]

    @property
    def total_evaluations(self) -> int:
        return sum(self.evaluations.values())

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


@dataclass(frozen=True)
class Timing:
    """Seconds of a run, measured untraced: the median of `repeats` and half the range of the middle half.

    by_model: median seconds inside each model's network. peak_bytes: most memory held at once by tensors that the run
    made (CPU) or by the device's allocator (CUDA).
    """

    seconds: float
    spread: float
    repeats: int
    by_model: Mapping[str, float]
    peak_bytes: int
    machine: str


class Meter:
    """Counts rows and calls per model; with timing=True also seconds per call, device work included."""

    def __init__(self, flops_per_row: Mapping[str, float], *, timing: bool = False) -> None:
        self._flops, self._timing = flops_per_row, timing
        self.evaluations: dict[str, int] = dict.fromkeys(flops_per_row, 0)
        self.calls: dict[str, int] = dict.fromkeys(flops_per_row, 0)
        self._events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in flops_per_row}

    def wrap(self, name: str, network: Network) -> Network:
        """`network` counted under `name`; its first argument's leading axis is the rows."""

        def counted(x: Tensor, *args: Any) -> Tensor:
            self.evaluations[name] += len(x)
            self.calls[name] += 1
            if not self._timing:
                return network(x, *args)
            before = _mark(x)
            out = network(x, *args)
            self._events[name].append((before, _mark(x)))
            return out

        return counted

    @property
    def cost(self) -> Cost:
        flops = {name: rows * self._flops[name] for name, rows in self.evaluations.items()}
        return Cost(dict(self.evaluations), dict(self.calls), flops)

    def seconds(self) -> dict[str, float]:
        """Seconds inside each model. Waits for the device once, after the run, never inside its loop."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {name: sum(_between(a, b) for a, b in pairs) for name, pairs in self._events.items()}


def measure(once: Callable[[Meter], object], flops_per_row: Mapping[str, float], *, repeats: int = 3,
            stop: Callable[[], bool] = lambda: False) -> Timing:
    """Time `once(meter)`: one warm-up that also takes the peak memory, then `repeats` untraced passes.

    stop() is asked between passes; the passes done so far count, but at least one is made.
    Raises ValueError where repeats is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: expected at least 1")
    peak = _peak_bytes(lambda: once(Meter(flops_per_row)))
    totals, models = [], []
    for _ in range(repeats):
        meter = Meter(flops_per_row, timing=True)
        begin = time.perf_counter()
        once(meter)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        totals.append(time.perf_counter() - begin)
        models.append(meter.seconds())
        if stop():
            break
    low, high = statistics.quantiles(totals, n=4)[::2] if len(totals) > 1 else (totals[0], totals[0])
    by_model = {name: statistics.median(m[name] for m in models) for name in flops_per_row}
    return Timing(statistics.median(totals), (high - low) / 2, len(totals), by_model, peak, machine())


def flops_per_row(network: Network, *one_row: Any) -> float:
    """Floating point operations of network(*one_row), arguments with a leading axis of 1 (matmuls and convolutions)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*one_row)
    return float(counter.get_total_flops())


def machine() -> str:
    """The device that seconds were measured on, e.g. "CPU x86_64, 2 threads" or the GPU's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def _peak_bytes(once: Callable[[], object]) -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        return int(torch.cuda.max_memory_allocated() - before)
    with _LiveBytes() as live:
        once()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Follows the bytes of the tensors that operations return; scratch space inside one operation stays unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.peak = 0, 0
        self._views: Counter[int] = Counter()  # storage address -> tensors alive on it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes():
                self._watch(leaf, given)
        return out

    def _watch(self, tensor: Tensor, given: set[int]) -> None:
        address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if not self._views[address]:
            if address in given:  # a view of something older than the run, such as a weight
                return
            self.held += size
            self.peak = max(self.peak, self.held)
        self._views[address] += 1
        finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._views[address] -= 1
        if not self._views[address]:
            self.held -= size


def _mark(like: Tensor) -> Any:
    if like.is_cuda:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def _between(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1000
