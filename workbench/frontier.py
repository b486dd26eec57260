"""What a list of runs says: its Pareto front, and the cheapest setting that is good enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workbench.quality import METRICS
from workbench.run import Run


@dataclass(frozen=True)
class Point:
    """One setting, averaged over its seeds: FLOPs and evaluations per sample, mean quality and its standard error.

    With several seeds the standard error is that between seeds; with one it is the run's own. n: samples in all.
    """

    runs: tuple[Run, ...]
    flops: float
    evaluations: float
    value: float
    stderr: float
    n: int


def points(runs: Iterable[Run], metric: str) -> list[Point]:
    """Runs that differ in nothing but the seed become one point; those without the metric are left out.

    Raises KeyError for an unknown metric.
    """
    if metric not in METRICS:
        raise KeyError(f"no metric {metric!r}; there are {', '.join(sorted(METRICS))}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if metric in run.quality:
            i = run.inputs
            setting = repr((i.method, i.problem, i.digest, i.code, i.n_samples, sorted(i.knobs.items())))
            groups.setdefault(setting, []).append(run)
    return [_point(tuple(group), metric) for group in groups.values()]


def _point(runs: tuple[Run, ...], metric: str) -> Point:
    values = [r.quality[metric].value for r in runs]
    samples = sum(r.inputs.n_samples for r in runs)
    if len(runs) > 1:
        stderr = statistics.stdev(values) / math.sqrt(len(runs))
    else:
        stderr = runs[0].quality[metric].stderr
    return Point(runs, sum(r.cost.total_flops for r in runs) / samples,
                 sum(r.cost.total_evaluations for r in runs) / samples, statistics.fmean(values), stderr,
                 sum(r.quality[metric].n for r in runs))


def pareto(candidates: Sequence[Point], metric: str) -> list[Point]:
    """The points that no other beats in both FLOPs and quality, cheapest first."""
    sign = -1 if METRICS[metric].higher_is_better else 1
    front: list[Point] = []
    for point in sorted(candidates, key=lambda p: (p.flops, sign * p.value)):
        if not front or sign * point.value < sign * front[-1].value:
            front.append(point)
    return front


def cheapest(candidates: Sequence[Point], metric: str, within: float) -> Point:
    """The cheapest point whose mean is within `within` (in the metric's unit) of the best mean.

    A choice made on these seeds favours lucky ones: confirm it by running its setting on fresh seeds.
    Raises ValueError where there are no candidates or within is negative.
    """
    if not candidates or within < 0:
        raise ValueError(f"{len(candidates)} candidates, within={within}: expected at least one and a number >= 0")
    sign = -1 if METRICS[metric].higher_is_better else 1
    best = min(sign * p.value for p in candidates)
    return min((p for p in candidates if sign * p.value <= best + within), key=lambda p: p.flops)
