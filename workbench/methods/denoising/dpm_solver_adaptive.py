"""DPM-Solver with steps as long as the error allows, each sample with steps of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from workbench.knob import Knob
from workbench.methods.denoising._dpm import combination, stages
from workbench.methods.denoising.ddim import Guidance, Which
from workbench.methods.denoising.dpm_solver import Estimate, Final
from workbench.problems.denoising import CLEAN, Denoising, Point, Schedule, noisiest, with_signal
from workbench.registry import Step, method
from workbench.rng import Rng, of_samples

H_INIT, THETA = 0.05, 0.9  # the first step in log-SNR, and the caution in choosing the next
PER_OCTAVE = 8  # lengths that a step may have: a network's rounding depends on the batch, and must not reach them


def nfe(n_steps: int, order: int) -> int:
    """Most evaluations per sample without guidance: `order` per attempt, and 1 for the last step."""
    return order * (n_steps - 1) + 1


def carried(x: Tensor, values: Sequence[Tensor], here: Sequence[Point], there: Sequence[Point],
            shares: Sequence[float], prediction: str, correction: str) -> Tensor:
    """`combination` row by row: x (B, *shape) and the stages' estimates `values`, from here[k] to there[k]."""
    rows = [combination(a, shares, b, prediction, correction) for a, b in zip(here, there, strict=True)]
    table = torch.tensor(rows, dtype=x.dtype, device=x.device).reshape(len(rows), -1, *[1] * (x.ndim - 1))
    decay, *weights = table.unbind(1)
    out = decay * x
    for value, weight in zip(values, weights, strict=True):
        out = torch.addcmul(out, weight, value)
    return out


def attempt(x: Tensor, start: Tensor, here: Sequence[Point], there: Sequence[Point], schedule: Schedule,
            ask: Callable[[Tensor, Sequence[Point]], Tensor], order: int, prediction: str) -> tuple[Tensor, Tensor]:
    """x (B, *shape) carried from here[k] to there[k], row by row, with order - 1 and with `order`, both (B, *shape).

    start: the estimates at `here`. ask(states, points) gives those of the stages, which both orders share: order - 1
    evaluations per row.
    """
    levels = [stages(schedule, a, b, order) for a, b in zip(here, there, strict=True)]
    values = [start]
    for j in range(1, order):
        points = [level[j - 1] for level in levels]
        values.append(ask(carried(x, values, here, points, [m / j for m in range(1, j)], prediction, "taylor"), points))
    shares = [j / order for j in range(1, order)]
    return (carried(x, values[:-1], here, there, shares[:-1], prediction, "midpoint"),
            carried(x, values, here, there, shares, prediction, "midpoint"))


@method(version=2, source="DPM-Solver-12 and -23, arXiv 2206.00927, app. C; DPM-Solver++, arXiv 2211.01095",
        cost="nfe(n_steps, order) * branches", at_most=True)
def dpm_solver_adaptive(
    problem: Denoising, rng: Rng, *,
    n_steps: Annotated[int, Knob(low=1, high=1000, soft=(1, 200), step=1, unit="attempted steps", small=8, help=(
        "at most; whatever is then left of the way is one step of order 1"))] = 100,
    guidance: Guidance = 1.0,
    order: Annotated[int, Knob(low=2, high=3, step=1, help="order of the step; one less for the estimate of its error")]
    = 3,
    atol: Annotated[float, Knob(low=1e-6, high=1.0, soft=(1e-4, 0.1), scale="log", help=(
        "absolute error allowed per step, in units of the state"))] = 0.0078,
    rtol: Annotated[float, Knob(low=1e-6, high=1.0, soft=(1e-3, 0.5), scale="log", help=(
        "error allowed per step relative to the state"))] = 0.05,
    prediction: Estimate = "x0", final: Final = "zero", model: Which = "best",
) -> Iterator[Step]:
    """DPM-Solver-12 and -23: step sizes from the difference of two orders, for each sample on its own.

    State (n_samples, *problem.shape). A Step is one attempt of every sample on its way: where the difference, weighed
    by max(atol, rtol |x|), is at most 1 in the root mean square over the sample, the higher order's result is taken.
    |x| is the larger of the step's two ends, as in the authors' code: where noise is added at its full size (VE, EDM)
    it is that noise's, so a first step may err by rtol x 80 and leap over all that matters. Take a small rtol there.
    The next length follows from that error, rounded down to an eighth of an octave. From the cleanest level, or where
    n_steps ends the attempts, a sample goes to the final level by one step of order 1; samples that are there wait.
    Cost: at most ``nfe(n_steps, order) * branches`` evaluations per sample, where branches is 2 with guidance, else 1;
    `order` per attempt and 1 into sigma 0, the estimate at a step's start being kept where its attempt fails.
    info: as other samplers', "there" being the noisiest level among the samples.
    Raises ValueError where guidance needs a null label that is not there, or the schedule starts without signal.
    """
    owner, schedule = problem.models[-1 if model == "best" else 0], problem.schedule
    first, cleanest = noisiest(schedule), schedule.at(schedule.cleanest)
    with_signal(schedule, first, "dpm_solver_adaptive")
    labels, x = problem.cases_of(rng), problem.start(rng, first)
    last = CLEAN if final == "zero" else cleanest
    here, h = [first] * len(x), [H_INIT] * len(x)
    before, x0, eps, stale = x, x, x, set(range(len(x)))  # x0 and eps are filled in the first round

    def both(rows: list[int], states: Tensor, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), of_samples(rows):
            return owner.predict(states, points, schedule, None if labels is None else labels[rows], guidance)

    def ask(rows: list[int], states: Tensor, points: Sequence[Point]) -> Tensor:
        return both(rows, states, points)[0 if prediction == "x0" else 1]

    for i in range(n_steps):
        going = [k for k, point in enumerate(here) if point != last]
        new = [k for k in going if k in stale]
        if new:
            found = both(new, x[new], [here[k] for k in new])
            x0, eps = (_put(old, new, part) for old, part in zip((x0, eps), found, strict=True))
        stale = set()
        at_start = x0 if prediction == "x0" else eps
        leaving = [k for k in going if i == n_steps - 1 or here[k] == cleanest]
        if leaving:
            x = _put(x, leaving, x0[leaving] if last.sigma == 0 else carried(
                x[leaving], [at_start[leaving]], [here[k] for k in leaving], [last] * len(leaving), (), prediction, ""))
            for k in leaving:
                here[k] = last
        trying = [k for k in going if here[k] != last]
        if trying:
            starts = [here[k] for k in trying]
            ends = [_ahead(schedule, here[k], h[k], cleanest) for k in trying]
            low, high = attempt(x[trying], at_start[trying], starts, ends, schedule, partial(ask, trying), order,
                                prediction)
            allowed = torch.maximum(low.abs(), before[trying].abs()).mul(rtol).clamp(min=atol)
            errors = ((high - low) / allowed).flatten(1).square().mean(1).sqrt().tolist()
            taken = [j for j, error in enumerate(errors) if error <= 1]
            x, before = (_put(old, [trying[j] for j in taken], part[taken]) for old, part in ((x, high), (before, low)))
            for k, a, b, error in zip(trying, starts, ends, errors, strict=True):
                longest = THETA * (b.log_snr - a.log_snr) * max(error, 1e-12) ** (-1 / order)
                h[k] = 2 ** (math.floor(PER_OCTAVE * math.log2(longest)) / PER_OCTAVE)
            for j in taken:
                here[trying[j]] = ends[j]
                stale.add(trying[j])
        yield Step(x, {"i": i, "model": owner.name, "x0": x0, "there": min(here, key=lambda p: p.log_snr)})
        if all(point == last for point in here):
            return


def _ahead(schedule: Schedule, here: Point, h: float, cleanest: Point) -> Point:
    """The level h further in log-SNR, but not beyond the cleanest."""
    reached = here.log_snr + h
    return cleanest if reached >= cleanest.log_snr - 1e-9 else schedule.at(schedule.t_at(reached))


def _put(old: Tensor, rows: Sequence[int], part: Tensor) -> Tensor:
    """A copy of old (B, *shape) with these rows replaced."""
    return old.index_copy(0, torch.tensor(rows, dtype=torch.int64, device=old.device), part)
