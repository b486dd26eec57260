"""What a list of runs says: its Pareto front, and the cheapest setting that is good enough."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workbench.family import FAMILIES
from workbench.quality import METRICS, Quality, combined, difference
from workbench.registry import METHODS
from workbench.runs import Run


@dataclass(frozen=True)
class Point:
    """One setting, averaged over its seeds: FLOPs and evaluations per sample, mean quality with its standard error.

    cost: per sample, on the axis of the methods' family (`Family.axis`): FLOPs or a counted resource. low, high: the
    interval at `quality.LEVEL`. Runs' own errors and the spread between seeds are combined
    (`quality.combined`). n: samples in all.
    """

    runs: tuple[Run, ...]
    flops: float
    evaluations: float
    value: float
    stderr: float
    n: int
    low: float = math.nan
    high: float = math.nan
    cost: float = math.nan


def points(runs: Iterable[Run], metric: str) -> list[Point]:
    """Runs that differ in nothing but the seed become one point; those without the metric are left out.

    The same run given twice counts once. Raises KeyError for an unknown metric.
    """
    if metric not in METRICS:
        raise KeyError(f"no metric {metric!r}; there are {', '.join(sorted(METRICS))}")
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        if metric in run.quality:
            i = run.inputs
            setting = repr((i.method, i.problem, i.digest, i.code, i.n_samples, sorted(i.knobs.items())))
            groups.setdefault(setting, {}).setdefault(i.seed, run)
    return [_point(tuple(group.values()), metric) for group in groups.values()]


def _point(runs: tuple[Run, ...], metric: str) -> Point:
    figure = combined([r.quality[metric] for r in runs])
    samples = sum(r.inputs.n_samples for r in runs)
    return Point(runs, sum(r.cost.total_flops for r in runs) / samples,
                 sum(r.cost.total_evaluations for r in runs) / samples, figure.value, figure.stderr, figure.n,
                 figure.low, figure.high, _spent(runs) / samples)


def _spent(runs: Sequence[Run]) -> float:
    method = METHODS.get(runs[0].inputs.method)  # a store may hold runs of methods that are gone
    axis = "flops" if method is None else FAMILIES[method.family].axis
    return sum(r.cost.amount(axis) for r in runs)


def paired(a: Point, b: Point, metric: str) -> Quality:
    """The difference a - b of two settings of one problem that ran from the same seeds, with its interval.

    Sample by sample where the runs know their samples' values (`Quality.values`), as they share noise and cases; else
    from four common seeds on seed by seed; with fewer by both settings' own errors as if the runs were independent,
    which is too wide where, as usual, the same noise helps or harms both.
    Raises ValueError where they share no seed.
    """
    ours, theirs = ({r.inputs.seed: r.quality[metric] for r in p.runs} for p in (a, b))
    seeds = [s for s in ours if s in theirs]
    if not seeds:
        raise ValueError(f"seeds {sorted(ours)} and {sorted(theirs)}: expected settings that share a seed")
    by_sample = [difference(ours[s], theirs[s]) for s in seeds]
    if all(gap is not None for gap in by_sample):
        return combined([gap for gap in by_sample if gap is not None])
    n = sum(ours[s].n for s in seeds)
    if len(seeds) >= 4:
        return combined([Quality(ours[s].value - theirs[s].value, math.nan, ours[s].n) for s in seeds])
    both = [combined([q[s] for s in seeds]) for q in (ours, theirs)]
    stderr, (x, y) = math.hypot(*(q.stderr for q in both)), both
    df = 1 / sum((q.stderr / stderr) ** 4 / max(q.df, 1.0) for q in both) if stderr else math.inf
    return Quality(x.value - y.value, stderr, n, df=df)


def pareto(candidates: Sequence[Point], metric: str, cost: str = "cost") -> list[Point]:
    """The points that no other beats in both cost and quality, cheapest first; those without a number take no part.

    cost: the attribute of a point that is its cost.
    """
    sign = -1 if METRICS[metric].higher_is_better else 1
    front: list[Point] = []
    for point in sorted(_numbers(candidates), key=lambda p: (getattr(p, cost), sign * p.value)):
        if not front or sign * point.value < sign * front[-1].value:
            front.append(point)
    return front


def cheapest(candidates: Sequence[Point], metric: str, within: float) -> Point:
    """The cheapest point whose mean is within `within` (in the metric's unit) of the best mean; of equal ones the best.

    A choice made on these seeds favours lucky ones: confirm it by running its setting on fresh seeds.
    Raises ValueError where there is no candidate with a number, or within is no number >= 0.
    """
    known = _numbers(candidates)
    if not known or not within >= 0:
        raise ValueError(f"{len(candidates)} candidates, {len(known)} of them with a number, within={within}: "
                         f"expected at least one and a number >= 0")
    sign = -1 if METRICS[metric].higher_is_better else 1
    best = min(sign * p.value for p in known)
    return min((p for p in known if sign * p.value <= best + within), key=lambda p: (p.cost, sign * p.value))


def _numbers(candidates: Iterable[Point]) -> list[Point]:
    return [p for p in candidates if p.value == p.value and p.cost == p.cost]
