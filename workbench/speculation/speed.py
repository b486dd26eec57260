"""What a block of speculative decoding costs, and the speed to expect of it, from measured seconds.

A target pass of n tokens costs T(n) seconds, measured at several n and never assumed flat: on a CPU, and on an
accelerator once it is busy, T grows almost linearly, and with it the price of every drafted token. It is measured where
it is spent, inside the engine (`measure_engine`): passes on fresh state have a constant of their own, which hides the
slope, and leave out what a block spends between its passes on laws, rules and caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from workbench.speculation.drafting import Uniform
from workbench.speculation.engine import Ask, LanguageModel, Law, Warp, speculate
from workbench.speculation.growing import StaticGrower
from workbench.speculation.rules import Rule
from workbench.speculation.trees import Shape

UNWARPED = Warp()


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

    def within(self, n: int) -> tuple[float, float]:
        """The seconds less and plus twice their spread, between measured sizes linear as well. Raises as the call does.

        Of normal repeats this is 1.35 standard deviations: two measured times, one at its lower and one at its upper
        end, are then 1.9 of the deviation of their ratio apart, which about 95 % of ratios stay within.
        """
        middle, spread = self(n), float(np.interp(n, self.sizes, self.spread))
        return max(middle - 2 * spread, 0.0), middle + 2 * spread


Seconds = float | Callable[[int], float]  # of a pass by its tokens; a number where it is the same for all


def measure_curve(pass_: Callable[[int], object], sizes: Sequence[int], repeats: int) -> CostCurve:
    """Time pass_(n) for each n of sizes, untraced: one warm-up each, then `repeats` rounds over all sizes.

    What pass_ does is what is timed: for the speed of decoding, passes by themselves mislead (see `measure_engine`).
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
class EngineCosts:
    """Seconds of passes in the engine by the tokens that are asked about, with what the engine does around them.

    What `predict_speed` takes for target_seconds and draft_seconds. target(1) is a whole token of plain decoding. In
    target(n) are also what a block spends on its end and on each node, in draft(n) what it spends on each level: laws,
    draws, verdicts, caches.
    """

    target: CostCurve
    draft: CostCurve


def measure_engine(target: LanguageModel, draft: LanguageModel, prompts: Sequence[Sequence[int]],
                   shapes: Sequence[Shape], rule: Rule, *, n_tokens: int = 64, repeats: int = 5, law: Law = UNWARPED,
                   seed: int = 0) -> EngineCosts:
    """Decode n_tokens after these prompts, plainly and with trees of each of the shapes, `repeats` rounds over all of
    them, and time every pass where it is: on a cache that grows, with the masks of its tree, in a batch of these rows.

    A pass counts with the tokens that the shape has there, though drafts that agree may be fewer. Left out are blocks
    that take in a prompt, those that the end cuts short, and a round that goes first to warm up. The curves are fitted
    to the mean of each shape's passes in each round, as it is their sum that one waits for. The seconds between a
    target's pass and the end of its block are fitted, in each round, by a constant, a price per node and one per level.
    Costs (repeats + 1) x (shapes + 1) x n_tokens tokens of decoding. Raises ValueError where repeats is below 1, no
    shape has a node, or n_tokens is too few for a whole block of each.
    """
    from scipy.optimize import nnls

    shapes = [shape for shape in shapes if shape.n_nodes]
    least = 2 * max((shape.depth for shape in shapes), default=0) + 2
    if repeats < 1 or not shapes or n_tokens < least:
        raise ValueError(f"repeats={repeats!r}, n_tokens={n_tokens!r}, {len(shapes)} shapes with nodes: expected at "
                         f"least 1, {least} and 1")
    points: dict[str, list[tuple[int, float]]] = {"target": [], "draft": []}
    clock = _Clock()
    models = clock.on("target", target), clock.on("draft", draft)
    for turn in range(repeats + 1):
        means: dict[Shape, dict[tuple[str, int], tuple[float, float]]] = {}
        for shape in (Shape(()), *shapes):
            uniforms = [np.random.default_rng((seed, turn, row)).random for row in range(len(prompts))]
            found: dict[tuple[str, int], list[tuple[float, float]]] = {}
            left = dict.fromkeys(range(len(prompts)), n_tokens)
            clock.start(shape)
            is_first = True
            for blocks in speculate(models[0], models[1] if shape.n_nodes else None, prompts, n_tokens,
                                    partial(_grown, shape, rule), rule, uniforms, law=law):
                laps = clock.stop()
                if not is_first and min(left.values()) > shape.depth:
                    for who, size, *seconds in laps:
                        found.setdefault((who, size), []).append((seconds[0], seconds[1]))
                for row, block in blocks.items():
                    left[row] -= len(block.tokens)
                is_first = False
                clock.start(shape)
            means[shape] = {key: (statistics.fmean(a for a, _ in both), statistics.fmean(b for _, b in both))
                            for key, both in found.items()}
        if not turn:
            continue
        rest = {shape: means[shape]["target", shape.n_nodes + 1][1] for shape in shapes}
        (end, per_node, per_level), _ = nnls(np.array([(1, shape.n_nodes, shape.depth) for shape in rest]),
                                             np.array(list(rest.values())))
        for shape, of_shape in means.items():
            for (who, n), (inside, after) in of_shape.items():
                if who == "draft":
                    after += per_level
                elif shape.n_nodes:
                    after = end + per_node * shape.n_nodes
                points[who].append((n, inside + after))
    return EngineCosts(CostCurve.fit(points["target"]), CostCurve.fit(points["draft"]))


def _grown(shape: Shape, rule: Rule, row: int, uniform: Uniform) -> StaticGrower:
    return StaticGrower(shape, rule.drafting, uniform)


class _Clock:
    """The laps of a block: (model, tokens that the shape has there, seconds of the pass, seconds from then on until the
    next pass or the block's end)."""

    def __init__(self) -> None:
        self._laps: list[tuple[str, int, float, float]] = []
        self._ahead: list[tuple[str, int]] = []
        self._last: tuple[str, int, float, float] | None = None  # the pass that was made: its begin and its end

    def on(self, name: str, model: LanguageModel) -> LanguageModel:
        def network(tokens: Tensor, ask: Ask) -> list[Tensor]:
            self._lap()
            while self._ahead[0][0] != name:  # levels that this block does without
                self._ahead.pop(0)
            begin = time.perf_counter()
            out = model.network(tokens, ask)
            _wait()
            self._last = (*self._ahead.pop(0), begin, time.perf_counter())
            return out

        return replace(model, network=network)

    def start(self, shape: Shape) -> None:
        self._laps = []
        self._ahead = [*(("draft", n) for n in shape.draft_widths), ("target", shape.n_nodes + 1)]

    def stop(self) -> list[tuple[str, int, float, float]]:
        self._lap()
        return self._laps

    def _lap(self) -> None:
        if self._last is not None:
            name, size, begin, end = self._last
            self._laps.append((name, size, end - begin, time.perf_counter() - end))
        self._last = None


@dataclass(frozen=True)
class Speedup:
    """The speed to expect of a block against plain decoding; seconds are of one block, plain_seconds of one token.

    arithmetic_factor: operations per emitted token against plain decoding's, above 1 as soon as drafts get rejected;
    None where the models' ratio of operations is not given. block, plain: least and most seconds of a block and of a
    plain token by `CostCurve.within`, all passes at once; one number twice where no spread is known.
    """

    expected_tokens: float
    target_seconds: float
    draft_seconds: float
    plain_seconds: float
    arithmetic_factor: float | None
    block_seconds: float
    block: tuple[float, float]
    plain: tuple[float, float]

    @property
    def tokens_per_second(self) -> float:
        return self.expected_tokens / (self.target_seconds + self.draft_seconds + self.block_seconds)

    @property
    def plain_tokens_per_second(self) -> float:
        return 1 / self.plain_seconds

    @property
    def speedup(self) -> float:
        """Above 1 where speculation pays."""
        return self.tokens_per_second * self.plain_seconds

    @property
    def interval(self) -> tuple[float, float]:
        """The speedup where the block is as slow and plain decoding as fast as was measured, and the other way round.

        1 inside it: what was measured does not tell whether speculation pays.
        """
        return tuple(self.expected_tokens * plain / block if block else np.inf  # type: ignore[return-value]
                     for plain, block in zip(self.plain, reversed(self.block), strict=True))


def predict_speed(expected_tokens: float, shape: Shape, target_seconds: Callable[[int], float],
                  draft_seconds: Seconds, flop_ratio: float | None = None, *, block_seconds: float = 0.0,
                  plain_seconds: Seconds | None = None) -> Speedup:
    """What blocks of this shape are worth at expected_tokens per target pass, measured or from trees.expected_tokens.

    target_seconds(n), draft_seconds(n): one pass of n tokens, best of `measure_engine`; a number for the draft is the
    same for every pass. The target scores n_nodes + 1 tokens, the draft makes one pass per level of shape.draft_widths.
    block_seconds: what a block costs beside its passes, where the curves are of bare passes. plain_seconds: of a token
    decoded without drafts, as a number or as a function that is asked for 1 token: target_seconds, which is plain
    decoding in the same engine, or of what else speculation would replace. Spreads (`CostCurve.within`) become an
    interval.
    flop_ratio: a token's operations in the draft over those in the target. For a chain and a flat target this is
    Leviathan's walltime factor and arithmetic factor (arXiv 2211.17192, section 3).
    Raises ValueError where expected_tokens is outside 1 to depth + 1, or flop_ratio or block_seconds is negative.
    """
    if not 1 <= expected_tokens <= shape.depth + 1 + 1e-9:
        raise ValueError(f"expected_tokens={expected_tokens!r}: a tree of depth {shape.depth} yields 1 to "
                         f"{shape.depth + 1}")
    for name, value in (("flop_ratio", flop_ratio), ("block_seconds", block_seconds)):
        if value is not None and not 0 <= value < np.inf:
            raise ValueError(f"{name}={value!r}: expected 0 or more")
    plain = target_seconds if plain_seconds is None else plain_seconds
    passes = [(draft_seconds, n) for n in shape.draft_widths]
    factor = None
    if flop_ratio is not None:
        factor = (shape.n_nodes + 1 + flop_ratio * sum(shape.draft_widths)) / expected_tokens
    over = block_seconds if shape.n_nodes else 0.0
    low, high = (over + sum(ends) for ends in zip(*(_within(curve, n) for curve, n in (
        (target_seconds, shape.n_nodes + 1), *passes)), strict=True))
    return Speedup(expected_tokens, target_seconds(shape.n_nodes + 1),
                   float(sum(_seconds(curve, n) for curve, n in passes)), _seconds(plain, 1), factor, over, (low, high),
                   _within(plain, 1))


def _seconds(cost: Seconds, n: int) -> float:
    return cost(n) if callable(cost) else cost


def _within(cost: Seconds, n: int) -> tuple[float, float]:
    if isinstance(cost, CostCurve):
        return cost.within(n)
    return _seconds(cost, n), _seconds(cost, n)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
