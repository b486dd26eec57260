"""T-Stitch: a cheap model takes the early, noisy steps of a trajectory, better ones the later steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any

from workbench.knob import Knob
from workbench.methods.denoising._march import march
from workbench.methods.denoising.ddim import Guidance, Spacing, Steps
from workbench.methods.denoising.solvers import MULTISTEP, SOLVERS, nfe  # noqa: F401 (nfe: in the cost formula)
from workbench.problems.denoising import Denoising, Point, Schedule, grid, split_steps, with_signal
from workbench.registry import Step, method
from workbench.rng import Rng

BOUNDARIES = ("step", "timestep", "log_snr")

Fractions = Annotated[tuple[float, ...], Knob(
    low=0.0, high=1.0, step=0.05, unit="of the trajectory", small=(0.5,),
    help="leading share of the trajectory for each model, cheapest first; the last model takes what is left")]


def full_fractions(fractions: Sequence[float], n_models: int) -> tuple[float, ...]:
    """One fraction per model: those not given are 0, and the last model takes what is left.

    (0.4,) for three models is (0.4, 0, 0.6). Raises ValueError where there are more fractions than models, or they
    exceed 1, or all are given and do not sum to 1.
    """
    given, total = tuple(fractions), sum(fractions)
    if len(given) > n_models or total > 1 + 1e-6 or (len(given) == n_models and total < 1 - 1e-6):
        raise ValueError(f"fractions={given}: expected at most {n_models} numbers, one per model, that sum to 1 "
                         f"(or at most {n_models - 1} that sum to 1 or less)")
    head = (given + (0.0,) * n_models)[: n_models - 1]
    return (*head, max(1 - sum(head), 0.0))


def progress(points: Sequence[Point], schedule: Schedule, boundary: str) -> list[float]:
    """The share of the trajectory reached at the end of each step, (len(points) - 1,) rising to 1.

    boundary: measured by "step" number, by time ("timestep"), or by "log_snr" from the first level to the cleanest.
    Raises ValueError for "log_snr" where the first level is without signal.
    """
    n_steps = len(points) - 1
    if boundary == "step":
        return [(i + 1) / n_steps for i in range(n_steps)]
    if boundary == "timestep":
        first = schedule.progress(points[0].t)
        reached = [(schedule.progress(p.t) - first) / (1 - first) for p in points[1:-1]]
    else:
        with_signal(schedule, points[0], "boundary='log_snr'")
        low, high = points[0].log_snr, schedule.at(schedule.cleanest).log_snr
        reached = [(p.log_snr - low) / (high - low) for p in points[1:-1]]
    return [*reached, 1.0]


def step_counts(fractions: Sequence[float], points: Sequence[Point], schedule: Schedule, boundary: str
                ) -> tuple[int, ...]:
    """Steps per model, (len(fractions),) integers that sum to len(points) - 1.

    One rule: a step belongs to a model's share only where its END lies within the cumulated share, measured as
    `progress` says; by step number this is `split_steps`, floor(cumsum(fractions) * n_steps). The last model takes the
    rest. Raises ValueError as `split_steps` does.
    """
    by_step = split_steps(fractions, len(points) - 1)
    if boundary == "step":
        return by_step
    reached = progress(points, schedule, boundary)
    ends = [sum(r <= share + 1e-9 for r in reached) for share in accumulate(fractions[:-1])]
    return tuple(b - a for a, b in pairwise([0, *ends, len(reached)]))


@method(version=2, source="T-Stitch, arXiv 2402.14167, sec. 3",
        cost="nfe(solver, n_steps) * branches")
def t_stitch(
    problem: Denoising, rng: Rng, *, n_steps: Steps = 20, fractions: Fractions = (0.4,), guidance: Guidance = 1.0,
    solver: Annotated[str, Knob(choices=tuple(SOLVERS), help="the sampler under the stitch")] = "ddim",
    boundary: Annotated[str, Knob(choices=BOUNDARIES, help="what the fractions are fractions of")] = "step",
    spacing: Spacing = "trailing",
    eta: Annotated[float, Knob(low=0.0, high=1.0, step=0.05, needs={"solver": "ddim"},
                               help="fresh noise per DDIM step: 0 none, 1 as DDPM's ancestral sampling")] = 0.0,
    reset_history: Annotated[bool, Knob(needs={"solver": MULTISTEP},
                                        help="forget the former model's estimates at a switch")] = False,
    order: Annotated[str, Knob(choices=("cheap_first", "costly_first"),
                               help="which end of the trajectory the cheap models take")] = "cheap_first",
) -> Iterator[Step]:
    """Trajectory stitching: cheap models take the early steps, the best model the last ones; nothing is trained.

    State (n_samples, *problem.shape). Step i asks only the model that owns it; guidance is inside that model, and
    models of another prediction type or schedule are joined at equal log-SNR. "costly_first" reverses the order of
    the models along the trajectory, with each model keeping its share: the paper's negative control.
    Cost: ``nfe(solver, n_steps) * branches`` evaluations per sample: n_steps, or 2 n_steps - 1 of solvers that take two
    per step, split over the models as `step_counts` says; with cost c_k per step that is sum_k n_k c_k.
    Raises ValueError where fractions do not fit the models, or a knob of another solver is set.
    """
    if eta > 0 and solver != "ddim":
        raise ValueError(f"eta={eta}: only solver='ddim' adds noise, got solver={solver!r}")
    shares = full_fractions(fractions, len(problem.models))
    models = problem.models
    if order == "costly_first":
        shares, models = shares[::-1], models[::-1]
    points = grid(problem.schedule, n_steps, spacing)
    counts = step_counts(shares, points, problem.schedule, boundary)
    owners = [m for m, count in zip(models, counts, strict=True) for _ in range(count)]
    switches = {i + 1 for i, (a, b) in enumerate(pairwise(owners)) if a is not b}
    knobs: dict[str, Any] = {"eta": eta} if solver == "ddim" else {}
    yield from march(problem, rng, points, owners, SOLVERS[solver].step, guidance=guidance,
                     restarts=switches if reset_history else (), **knobs)
