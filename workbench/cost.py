"""The one meter: evaluations and FLOPs per model, other counted work, seconds and peak memory.

Always taken from outside the method.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from workbench.rng import samples_of_call

Network = Callable[..., Any]
# FLOPs of each row, or a function of a call's arguments -> (rows, FLOPs): of the call, or (rows,) of each of its rows.
Price = float | Callable[..., tuple[int, float | Tensor]]


@dataclass(frozen=True)
class Counted:
    """Work outside networks that scales (distances, bytes read, environment steps, looks at data).

    unit: in words, for axes and tables. amount(*arguments) -> how much a call is, by default the rows of its first.
    """

    unit: str
    amount: Callable[..., float] = lambda first, *rest: len(first)


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# Kernels of attention that torch's counter does not know, and would pass over. By its rule for those that it knows, and
# by what the plain formula spends, a mask spares nothing, a causal one neither: all pairs count.
ATTENTION = dict.fromkeys((torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
                           torch.ops.aten._scaled_dot_product_fused_attention_overrideable), _attention)


@dataclass(frozen=True)
class Cost:
    """What a run spent. evaluations: rows through each model, what only filled up a batch among them; calls: batches;
    flops: per model; counted: {resource: amount} of other work, in the problem's units."""

    evaluations: Mapping[str, int]
    calls: Mapping[str, int]
    flops: Mapping[str, float]
    counted: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_evaluations(self) -> int:
        return sum(self.evaluations.values())

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    def amount(self, what: str) -> float:
        """All "evaluations", all "flops", or the amount of a counted resource. Raises KeyError that lists these."""
        if what == "evaluations":
            return self.total_evaluations
        if what == "flops":
            return self.total_flops
        if what not in self.counted:
            raise KeyError(f"no cost {what!r}; there are {', '.join(('evaluations', 'flops', *self.counted))}")
        return self.counted[what]


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
    """Counts rows and calls per model, and other counted work; with timing=True also seconds per call, device included.

    A row costs its model's price in FLOPs, unless that is a function: price(*arguments) -> (rows, FLOPs) is then what
    this call computes. device: where the networks' answers lie, a CUDA device if one of them lies there.
    spent: FLOPs of each of n_samples samples, (n_samples,): a call's rows are dealt out among all, in order and as many
    times over as there are, or among those that `of_samples` names; None once a call's rows do not come out even.
    """

    def __init__(self, prices: Mapping[str, Price], counted: Mapping[str, Counted] | None = None, *,
                 n_samples: int | None = None, timing: bool = False) -> None:
        self._prices, self._resources, self._timing = prices, counted or {}, timing
        self.evaluations: dict[str, int] = dict.fromkeys(prices, 0)
        self.calls: dict[str, int] = dict.fromkeys(prices, 0)
        self._flops: dict[str, float] = dict.fromkeys(prices, 0.0)
        self._counted: dict[str, float] = dict.fromkeys(self._resources, 0.0)
        self._events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in prices}
        self._n, self._uneven = n_samples, n_samples is None
        self._even = 0.0  # of every sample alike
        self._own: dict[int, float] = {}  # of single samples, beside
        self.device = torch.device("cpu")

    def wrap(self, name: str, network: Network) -> Network:
        """`network` counted under `name`; where its price is a number, its first argument's leading axis is rows."""
        if name in self._resources:
            return self._counting(name, network)
        price = self._prices[name]

        def counted(x: Any, *args: Any) -> Any:
            rows, flops = price(x, *args) if callable(price) else (len(x), len(x) * price)
            self.evaluations[name] += rows
            self._flops[name] += float(flops.sum()) if isinstance(flops, Tensor) else flops
            self.calls[name] += 1
            if not self._uneven:
                self._deal(rows, flops)
            before = _mark(x) if self._timing else None
            out = network(x, *args)
            for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
                    self.device = leaf.device
                    break
            if self._timing:
                if self.device.type != "cpu" and not (isinstance(x, Tensor) and x.is_cuda):
                    _wait(self.device)  # asked from the CPU, answered elsewhere
                self._events[name].append((before, _mark(x)))
            return out

        return counted

    def _counting(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        amount = self._resources[name].amount

        def counted(*args: Any) -> Any:
            self._counted[name] += amount(*args)
            return work(*args)

        return counted

    def _deal(self, rows: int, flops: float | Tensor) -> None:
        samples = samples_of_call()
        if samples is None and not isinstance(flops, Tensor) and rows % self._n == 0:  # type: ignore[operator]
            self._even += flops / self._n  # type: ignore[operator]
            return
        samples = range(self._n) if samples is None else samples  # type: ignore[arg-type]
        if not len(samples) or rows % len(samples):
            self._uneven = True
            return
        if isinstance(flops, Tensor):
            parts = flops.double().view(-1, len(samples)).sum(0).tolist()
        else:
            parts = [flops / len(samples)] * len(samples)
        for sample, part in zip(samples, parts, strict=True):
            self._own[int(sample)] = self._own.get(int(sample), 0.0) + part

    @property
    def spent(self) -> Tensor | None:
        if self._uneven:
            return None
        out = torch.full((self._n,), self._even, dtype=torch.float64)  # type: ignore[arg-type]
        for sample, part in self._own.items():
            out[sample] += part
        return out

    @property
    def cost(self) -> Cost:
        return Cost(dict(self.evaluations), dict(self.calls), dict(self._flops), dict(self._counted))

    def seconds(self) -> dict[str, float]:
        """Seconds inside each model. Waits for the device once, after the run, never inside its loop."""
        _wait(self.device)
        return {name: sum(_between(a, b) for a, b in pairs) for name, pairs in self._events.items()}


def measure(once: Callable[[Meter], object], prices: Mapping[str, Price], *, repeats: int = 3,
            counted: Mapping[str, Counted] | None = None,
            stop: Callable[[], bool] = lambda: False) -> Timing:
    """Time `once(meter)`: one warm-up that also takes the peak memory, then `repeats` untraced passes.

    stop() is asked between passes; the passes done so far count, but at least one is made.
    Raises ValueError where repeats is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: expected at least 1")
    meter = Meter(prices, counted)
    peak = _peak_bytes(lambda: once(meter), meter)
    device = meter.device
    totals, models = [], []
    for _ in range(repeats):
        meter = Meter(prices, counted, timing=True)
        begin = time.perf_counter()
        once(meter)
        _wait(device)
        totals.append(time.perf_counter() - begin)
        models.append(meter.seconds())
        if stop():
            break
    low, high = statistics.quantiles(totals, n=4)[::2] if len(totals) > 1 else (totals[0], totals[0])
    by_model = {name: statistics.median(m[name] for m in models) for name in prices}
    return Timing(statistics.median(totals), (high - low) / 2, len(totals), by_model, peak, machine(device))


def flops_per_row(network: Network, *one_row: Any) -> float:
    """Floating point operations of network(*one_row), arguments with a leading axis of 1 (matmuls, convolutions and
    attention). The same on every device and by every kernel of attention; masked pairs count, as they are computed."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        network(*one_row)
    return float(counter.get_total_flops())


def machine(device: torch.device | str = "cpu") -> str:
    """The device that seconds were measured on, e.g. "CPU x86_64, 2 threads" or the GPU's name."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def _peak_bytes(once: Callable[[], object], meter: Meter) -> int:
    before = {}
    if torch.cuda.is_initialized():  # otherwise no model can be on it
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)
            before[i] = torch.cuda.memory_allocated(i)
    with _LiveBytes() as live:
        once()
    if meter.device.type == "cuda":
        return sum(int(torch.cuda.max_memory_allocated(i) - held) for i, held in before.items())
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


def _mark(like: Any) -> Any:
    if isinstance(like, Tensor) and like.is_cuda:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def _between(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1000
