"""The DPM-Solver family: orders 1 to 3, on data or noise estimates, in many steps or within each, flow or SDE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Annotated, Any

from workbench.knob import Knob
from workbench.methods.denoising._dpm import multistep_step, singlestep_step, stages
from workbench.methods.denoising._march import march
from workbench.methods.denoising.ddim import Guidance, Spacing, Steps, Which
from workbench.problems.denoising import FINALS, Denoising, Point, Schedule, grid
from workbench.registry import Step, method
from workbench.rng import Rng

Estimate = Annotated[str, Knob(choices=("x0", "eps"), help="which estimate is integrated: of the data (x0, as the ++ "
                                                           "solvers do) or of the noise (eps)")]
Final = Annotated[str, Knob(choices=FINALS, help="where the last step ends: at the data itself (noise 0), or at the "
                                                 "least noise that the models know")]
LowerOrderFinal = Annotated[bool, Knob(needs={"order": (3, 2), "scheme": "multistep"},
                                       help="lower the order to the number of steps that are left")]


def packing(n_evaluations: int, order: int, final: str) -> list[int]:
    """The orders of singlestep updates that spend n_evaluations in all; one into sigma 0 is of order 1.

    Source: arXiv 2206.00927, DPM-Solver-fast.
    """
    full, rest = divmod(n_evaluations, order)
    orders = [order] * full + [rest] * (rest > 0)
    if order == 3 and rest == 0:
        orders[-1:] = [2, 1]
    if final == "zero" and orders[-1] > 1:
        orders[-1:] = [orders[-1] - 1, 1]
    return orders


def packed(schedule: Schedule, n_evaluations: int, order: int, spacing: str, final: str
           ) -> tuple[list[Point], dict[Point, tuple[Point, ...]]]:
    """The levels between packed singlestep updates, and the stages within each.

    All are the grid of n_evaluations steps; only in log-SNR, as in the paper, the updates are of equal length instead.
    """
    orders = packing(n_evaluations, order, final)
    if spacing == "log_snr":
        outer = grid(schedule, len(orders), spacing, final)
        steps = zip(outer[:-1], outer[1:], orders, strict=True)
        return outer, {a: stages(schedule, a, b, k) if k > 1 else () for a, b, k in steps}
    points, ends = grid(schedule, n_evaluations, spacing, final), [0, *accumulate(orders)]
    return [points[i] for i in ends], {points[a]: tuple(points[a + 1:b]) for a, b in pairwise(ends)}


@method(version=2, source="DPM-Solver, arXiv 2206.00927; DPM-Solver++, arXiv 2211.01095",
        cost="n_steps * branches")
def dpm_solver(
    problem: Denoising, rng: Rng, *, n_steps: Steps = 20, guidance: Guidance = 1.0, spacing: Spacing = "trailing",
    order: Annotated[int, Knob(low=1, high=3, step=1, help="order of accuracy; 1 is DDIM")] = 2,
    scheme: Annotated[str, Knob(choices=("multistep", "singlestep"), needs={"order": (2, 3)},
                                help="higher orders from former steps, or from further evaluations in each")]
    = "multistep",
    prediction: Estimate = "x0",
    correction: Annotated[str, Knob(choices=("midpoint", "taylor"), needs={"order": (2, 3)},
                                    help="weights of the higher orders: midpoint rule, or Taylor expansion")]
    = "midpoint",
    stochastic: Annotated[bool, Knob(needs={"order": (2, 1), "scheme": "multistep"},
                                     help="solve the reverse SDE, with fresh noise, instead of the flow")] = False,
    lower_order_final: LowerOrderFinal = True, final: Final = "zero",
    thresholding: Annotated[bool, Knob(help="pull data estimates into -1 to 1; for pixels only, not for latents")]
    = False,
    quantile: Annotated[float, Knob(low=0.5, high=1.0, step=0.005, needs={"thresholding": True},
                                    help="of each sample's magnitudes: what becomes 1 where it is larger")] = 0.995,
    model: Which = "best",
) -> Iterator[Step]:
    """DPM-Solver and DPM-Solver++: exponential integrators in log-SNR of order 1, 2 (2S, 2M) and 3 (3S, 3M).

    State (n_samples, *problem.shape). With scheme "singlestep" n_steps is the number of evaluations, packed into
    updates of that order and a few lower ones at the end; each update is a Step. Updates into sigma 0 give the data
    estimate. The reverse SDE (stochastic) has orders 1 and 2, multistep. Thresholding is for data in -1 to 1.
    Cost: ``n_steps * branches`` evaluations per sample, where branches is 2 with guidance and 1 without.
    Raises ValueError where stochastic meets order 3 or singlestep, thresholding meets a problem of latents, n_steps
    exceeds the schedule's levels, or guidance needs a null label that is not there.
    """
    if stochastic and (order == 3 or (order == 2 and scheme == "singlestep")):
        raise ValueError(f"stochastic=True: only with order=1, or 2 and scheme='multistep', got {order} and {scheme!r}")
    if thresholding and problem.is_latent:
        raise ValueError(f"thresholding=True: only False is allowed, the states of {problem.name} are latents")
    knobs: dict[str, Any] = {"order": order, "prediction": prediction, "correction": correction,
                             "quantile": quantile if thresholding else None}
    owner = problem.models[-1 if model == "best" else 0]
    if scheme == "singlestep" and order > 1:
        points, between = packed(problem.schedule, n_steps, order, spacing, final)
        yield from march(problem, rng, points, [owner] * (len(points) - 1), singlestep_step, guidance=guidance,
                         between=between, **knobs)
    else:
        points = grid(problem.schedule, n_steps, spacing, final)
        yield from march(problem, rng, points, [owner] * n_steps, multistep_step, guidance=guidance,
                         stochastic=stochastic, lower_order_final=lower_order_final, **knobs)
