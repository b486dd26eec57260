"""An explicit list of timesteps and of the models that take them: what a schedule search finds can be run by anyone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated

from workbench.knob import Knob
from workbench.methods.denoising._march import Solver, march
from workbench.methods.denoising.ddim import Guidance, ddim_step
from workbench.methods.denoising.dpmpp_2m import dpmpp_2m_step
from workbench.problems.denoising import CLEAN, Denoising, Schedule, with_signal
from workbench.registry import Step, method
from workbench.rng import Rng

SOLVERS: dict[str, Solver] = {"ddim": ddim_step, "dpmpp_2m": dpmpp_2m_step}


def ends(schedule: Schedule) -> tuple[float, float]:
    """The least and the greatest time of the schedule: the cleanest level, and full noise."""
    return schedule.cleanest, schedule.times(1, "trailing")[0]


def shares_of(schedule: Schedule, times: Sequence[float]) -> tuple[float, ...]:
    """The schedule's own times as shares of its range, 0 the cleanest level and 1 full noise: the knob's unit."""
    low, high = ends(schedule)
    shares = [(t - low) / (high - low) for t in times]
    return tuple(min(max(s, 0.0), 1.0) if -1e-12 < s < 1 + 1e-12 else s for s in shares)  # rounding puts none outside


def times_of(schedule: Schedule, shares: Sequence[float]) -> list[float]:
    """The inverse of `shares_of`; times within 1e-9 of a whole number are whole, as entries of a table are."""
    low, high = ends(schedule)
    times = [low + share * (high - low) for share in shares]
    return [float(round(t)) if abs(t - round(t)) < 1e-9 else t for t in times]


def resampled(schedule: Schedule, times: Sequence[float], n_steps: int) -> list[float]:
    """n_steps times along the list, its log-SNR between entries linear in their number; the list's first and last stay.

    So a list searched for one number of steps serves another one, as with Align Your Steps (arXiv 2404.14507).
    Raises ValueError where it would have to be resampled and its first level is without signal.
    """
    if n_steps == len(times):
        return list(times)
    with_signal(schedule, schedule.at(times[0]), f"n_steps={n_steps}, other than the {len(times)} timesteps given,")
    found = []
    for i in range(n_steps):
        place = i * (len(times) - 1) / max(n_steps - 1, 1)
        low = min(int(place), len(times) - 1)
        if place == low:
            found.append(times[low])
            continue
        a, b = (schedule.at(t).log_snr for t in times[low : low + 2])
        found.append(schedule.t_at(a + (b - a) * (place - low)))
    return found


@method(version=2, source="schedules as AutoDiffusion searches them, arXiv 2309.10438, sec. 3",
        cost="n_steps * branches")
def timesteps(
    problem: Denoising, rng: Rng, *,
    n_steps: Annotated[int, Knob(
        low=1, high=1000, soft=(1, 50), step=1, unit="steps", small=1,
        help="solver steps; where the list has another length, it is resampled evenly in log-SNR per entry")] = 4,
    timesteps: Annotated[tuple[float, ...], Knob(
        low=0.0, high=1.0, unit="of the schedule's times", small=(0.5, 0.25),
        help="where the network is asked, strictly falling: 1 is full noise, 0 the cleanest level"
    )] = (1.0, 0.75, 0.5, 0.25),
    models: Annotated[tuple[float, ...], Knob(
        low=0.0, high=1.0, unit="of the way to the best model",
        help="which model takes each step, 0 the cheapest, 1 the best; the last entry holds for the rest")] = (1.0,),
    guidance: Guidance = 1.0,
    solver: Annotated[str, Knob(choices=tuple(SOLVERS), help="the sampler that steps along the list")] = "ddim",
) -> Iterator[Step]:
    """An explicit list of timesteps, by DDIM or DPM-Solver++(2M), each step by a model of its own.

    State (n_samples, *problem.shape). After the listed levels the last step goes to the data estimate (sigma 0), the
    first starts from pure noise whatever its level. `shares_of` turns a schedule's own times (integers of a table,
    say) into the knob's shares. Entry i of `models` picks from the problem's models, evenly spread from 0 to 1.
    Cost: ``n_steps * branches`` evaluations per sample, where branches is 2 with guidance and 1 without.
    Raises ValueError where timesteps is empty, does not fall strictly or is too short to be resampled, where models is
    empty or longer than n_steps, or guidance needs a null label that is not there.
    """
    times = times_of(problem.schedule, timesteps)
    if not times or any(a <= b for a, b in pairwise(times)):
        raise ValueError(f"knob timesteps={timesteps}: expected at least one number, strictly falling from 1 to 0")
    if len(times) == 1 < n_steps:
        raise ValueError(f"knob n_steps={n_steps}: timesteps={timesteps} has one level only, which allows 1 step")
    if not 1 <= len(models) <= n_steps:
        raise ValueError(f"knob models={models}: expected 1 to n_steps={n_steps} numbers, one per step")
    best = len(problem.models) - 1
    owners = [problem.models[round(models[min(i, len(models) - 1)] * best)] for i in range(n_steps)]
    points = [problem.schedule.at(t) for t in resampled(problem.schedule, times, n_steps)] + [CLEAN]
    yield from march(problem, rng, points, owners, SOLVERS[solver], guidance=guidance)
