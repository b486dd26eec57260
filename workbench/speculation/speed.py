"""What a block of speculative decoding costs, and the speed to expect of it, from measured seconds.

A target pass of n tokens costs T(n) seconds, measured at several n and never assumed flat: on a CPU, and on an
accelerator once it is busy, T grows almost linearly, and with it the price of every drafted token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workbench.speculation.trees import Shape


@dataclass(frozen=True)
class CostCurve:
    """Seconds of one pass by the tokens in it: curve(n), linear between measured sizes, never falling with n.

    sizes: ascending, tokens per pass; seconds: of each; spread: half the range of the middle half of its repeats.
    Raises ValueError where sizes do not ascend from 1 or more, or seconds are not positive or fall.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    spread: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or not len(self.sizes) == len(self.seconds) == len(self.spread):
            raise ValueError(f"{len(self.sizes)} sizes, {len(self.seconds)} seconds, {len(self.spread)} spreads: "
                             "expected as many of each, and at least one")
        if self.sizes[0] < 1 or any(b <= a for a, b in zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            raise ValueError(f"sizes={self.sizes}: expected to ascend, from at least 1")
        if not self.seconds[0] > 0 or any(not b >= a for a, b in zip(self.seconds[:-1], self.seconds[1:], strict=True)):
            raise ValueError(f"seconds={self.seconds}: expected positive, and not falling")

    @classmethod
    def fit(cls, measured: Iterable[tuple[int, float]]) -> CostCurve:
        """From pairs (tokens, seconds), repeats and all: each size's median, then the nearest curve that never falls.

        The last is least squares, weighted by repeats: neighbours that fall are pooled to their mean. Raises ValueError
        where nothing was measured, or something not positive.
        """
        by_size: dict[int, list[float]] = {}
        for size, seconds in measured:
            if not 0 < seconds < np.inf:
                raise ValueError(f"measured {seconds!r} seconds at {size} tokens: expected positive and finite")
            by_size.setdefault(int(size), []).append(float(seconds))
        sizes = sorted(by_size)
        pools: list[tuple[float, int, int]] = []  # mean of medians, repeats behind it, sizes in it
        for size in sizes:
            pools.append((statistics.median(by_size[size]), len(by_size[size]), 1))
            while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
                (a, n, i), (b, m, j) = pools[-2:]
                pools[-2:] = [((a * n + b * m) / (n + m), n + m, i + j)]
        spread = []
        for size in sizes:
            low, high = np.quantile(by_size[size], (0.25, 0.75))
            spread.append(float(high - low) / 2)
        return cls(tuple(sizes), tuple(mean for mean, _, count in pools for _ in range(count)), tuple(spread))

    def __call__(self, n: int) -> float:
        """Seconds of a pass of n tokens. Raises ValueError outside the sizes measured: nothing is assumed there."""
        if not self.sizes[0] <= n <= self.sizes[-1]:
            raise ValueError(f"n={n!r} tokens: measured from {self.sizes[0]} to {self.sizes[-1]}")
        return float(np.interp(n, self.sizes, self.seconds))


def measure_curve(pass_: Callable[[int], object], sizes: Sequence[int], repeats: int) -> CostCurve:
    """Time pass_(n) for each n of sizes, untraced: one warm-up each, then `repeats` rounds over all sizes.

    Rounds interleave the sizes, so that a machine that slows down meanwhile slows them all. CUDA work is waited for.
    Raises ValueError where repeats is below 1 or sizes is empty.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats!r}: expected at least 1")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes={list(sizes)}: expected at least one, each at least 1")
    for size in sizes:
        pass_(size)
    measured = []
    for _ in range(repeats):
        for size in sizes:
            _wait()
            begin = time.perf_counter()
            pass_(size)
            _wait()
            measured.append((size, time.perf_counter() - begin))
    return CostCurve.fit(measured)


@dataclass(frozen=True)
class Speedup:
    """The speed to expect of a block against plain decoding; seconds are of one block, plain_seconds of one token.

    arithmetic_factor: operations per emitted token against plain decoding's, above 1 as soon as drafts get rejected;
    None where the models' ratio of operations is not given.
    """

    expected_tokens: float
    target_seconds: float
    draft_seconds: float
    plain_seconds: float
    arithmetic_factor: float | None

    @property
    def tokens_per_second(self) -> float:
        return self.expected_tokens / (self.target_seconds + self.draft_seconds)

    @property
    def plain_tokens_per_second(self) -> float:
        return 1 / self.plain_seconds

    @property
    def speedup(self) -> float:
        """Above 1 where speculation pays."""
        return self.tokens_per_second * self.plain_seconds


def predict_speed(expected_tokens: float, shape: Shape, target_seconds: Callable[[int], float],
                  draft_seconds: float | Callable[[int], float], flop_ratio: float | None = None) -> Speedup:
    """What blocks of this shape are worth at expected_tokens per target pass, measured or from trees.expected_tokens.

    target_seconds(n), draft_seconds(n): one pass of n tokens, as a CostCurve gives it; a number for the draft is the
    same for every pass. The target scores n_nodes + 1 tokens, the draft makes one pass per level of shape.draft_widths.
    flop_ratio: a token's operations in the draft over those in the target. For a chain and a flat target this is
    Leviathan's walltime factor and arithmetic factor (arXiv 2211.17192, section 3).
    Raises ValueError where expected_tokens is outside 1 to depth + 1, or flop_ratio is negative.
    """
    if not 1 <= expected_tokens <= shape.depth + 1 + 1e-9:
        raise ValueError(f"expected_tokens={expected_tokens!r}: a tree of depth {shape.depth} yields 1 to "
                         f"{shape.depth + 1}")
    if flop_ratio is not None and not 0 <= flop_ratio < np.inf:
        raise ValueError(f"flop_ratio={flop_ratio!r}: expected 0 or more")
    draft = sum(draft_seconds(n) if callable(draft_seconds) else draft_seconds for n in shape.draft_widths)
    factor = None
    if flop_ratio is not None:
        factor = (shape.n_nodes + 1 + flop_ratio * sum(shape.draft_widths)) / expected_tokens
    return Speedup(expected_tokens, target_seconds(shape.n_nodes + 1), float(draft), target_seconds(1), factor)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
