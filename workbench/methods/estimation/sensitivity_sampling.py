"""Sampling rows by how much they can matter: l_p norms and regression from a part of a tall matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from workbench.knob import Knob
from workbench.problems.estimation import Rows, fitted, norms, streams
from workbench.registry import Step, method
from workbench.rng import Rng

SCORES = ("lewis", "root_leverage", "leverage", "uniform")
LEWIS_ROUNDS = 20
PASSES = {"lewis": LEWIS_ROUNDS, "root_leverage": 1, "leverage": 1, "uniform": 0}  # over all rows


def leverage(matrix: Tensor) -> Tensor:
    """tau_i = |Q_i|^2 of A = QR (N, D): the l_2 sensitivities, together the rank."""
    q, r = torch.linalg.qr(matrix)
    used = r.diagonal().abs() > 1e-10 * r.diagonal().abs().max()
    return q[:, used].square().sum(1)


def lewis(matrix: Tensor, p: float, n_rounds: int = LEWIS_ROUNDS) -> Tensor:
    """The l_p Lewis weights (N,) of a matrix of full rank, for p below 4: w_i = (a_i (A' W^(1 - 2/p) A)^-1 a_i)^(p/2).

    By fixed-point iteration, which contracts by |1 - p / 2|. Together they are the rank; at p = 2 they are leverages.
    Source: arXiv 1412.0588, section 3.
    """
    w = torch.ones(len(matrix), dtype=matrix.dtype)
    for _ in range(n_rounds):
        # leverages of W^(1/2 - 1/p) A, put back into the fixed point's terms
        scale = w.clamp(min=1e-300) ** (0.5 - 1 / p)
        w = (leverage(scale[:, None] * matrix) / scale.square()) ** (p / 2)
    return w


def shares(scores: Tensor, n_kept: int) -> Tensor:
    """Probabilities q_i = min(1, c scores_i) (N,) with c such that they add up to n_kept, or all 1."""
    if n_kept >= int((scores > 0).sum()):
        return (scores > 0).to(scores.dtype)
    order = scores.sort(descending=True).values
    rest = order.sum() - order.cumsum(0) + order  # of those from place k on
    # with the k largest at 1: c = (n_kept - k) / rest_k, right at the first k where c order_k is at most 1
    k = torch.arange(len(order), dtype=scores.dtype)
    c = (n_kept - k) / rest.clamp(min=1e-300)
    first = int(((c * order <= 1 + 1e-12) & (k < n_kept)).to(torch.int64).argmax())
    return (c[first] * scores).clamp(max=1)


@method(version=1, source="l_p sensitivity sampling, arXiv 2306.00732, def. 1.3 and sec. 1.2",
        cost="(PASSES[score] + 1) * n_pool", at_most=True)
def sensitivity_sampling(
    problem: Rows, rng: Rng, *,
    n_kept: Annotated[int, Knob(low=1, high=100_000, soft=(20, 2000), step=1, scale="log", unit="rows", small=20,
                                help="how many rows are kept, on average")] = 150,
    score: Annotated[str, Knob(choices=SCORES, help="what a row's chance of being kept grows with")] = "lewis",
    p: Annotated[float, Knob(low=1.0, high=3.0, step=0.1, help="of the norm: the sum of |a x| to this power")] = 1.0,
    n_rounds: Annotated[int, Knob(low=1, high=50, soft=(1, 20), step=1, unit="parts", small=2,
                                  help="parts in which the rows are read, with an estimate after each")] = 5,
) -> Iterator[Step]:
    """Sensitivity sampling: keep a row with a chance that grows with how much it can matter, weighed by the inverse.

    Kept are rows with u_i <= q_i, u_i uniform; in round r of n_rounds those with u_i <= q_i r / n_rounds, so the parts
    add up. With weights 1 / q_i the sum over kept rows of |a_i x|^p is right on average for every x. Scores: leverage
    tau, root_leverage tau^(p/2), Lewis weights, or none. State: "ratios" (n_samples, M), estimated over true |A x|_p^p
    of the problem's test vectors, "fit" (n_samples, d) the l_p regression on the kept rows, "p" (n_samples,); trace:
    distortion, kept.
    Cost: at most ``(PASSES[score] + 1) * n_pool`` looks per sample: passes over all rows for the scores, then the rows
    kept.
    Raises ValueError never, beyond knobs out of their bounds.
    """
    n, everything = rng.n_samples, torch.arange(len(problem.matrix))
    whole = problem.matrix
    for _ in range(PASSES[score]):
        whole = problem.read(everything, n)
    scores = SCORING[score](whole, p)
    q = shares(scores, n_kept)
    drawn = [torch.from_numpy(np.asarray(draw(len(q)))) for draw in streams(rng)]
    true = norms(problem.matrix, problem.tests, p)
    kept_before = [torch.zeros(len(q), dtype=torch.bool)] * n
    for r in range(1, n_rounds + 1):
        ratios, fits, kept = [], [], []
        for i, u in enumerate(drawn):
            part = q * r / n_rounds
            is_kept = u < part
            problem.read(everything[is_kept & ~kept_before[i]], 1)
            kept_before[i] = is_kept
            own, weights = problem.matrix[is_kept], 1 / part[is_kept]
            ratios.append(norms(own, problem.tests, p, weights) / true)
            fits.append(fitted(own, weights, p) if r == n_rounds and int(is_kept.sum()) else
                        torch.zeros(problem.matrix.shape[1] - 1, dtype=problem.dtype))
            kept.append(float(is_kept.sum()))
        made = torch.stack(ratios).to(problem.dtype)
        state = {"ratios": made, "fit": torch.stack(fits).to(problem.dtype),
                 "p": torch.full((n,), p, dtype=problem.dtype)}
        yield Step(state, {"i": r - 1, "curve": r}, "", {"distortion": (made - 1).abs().mean(1),
                                                         "kept": torch.tensor(kept, dtype=torch.float64)})


SCORING: dict[str, Callable[[Tensor, float], Tensor]] = {
    "lewis": lewis, "root_leverage": lambda matrix, p: leverage(matrix) ** (p / 2), "leverage": lambda matrix, p:
    leverage(matrix), "uniform": lambda matrix, p: torch.ones(len(matrix), dtype=matrix.dtype)}


def l1_sensitivities(matrix: Tensor) -> Tensor:
    """sup_x |a_i x| / |A x|_1 of each row (N,), exactly: one linear programme per row, so for small matrices.

    1 / min |A x|_1 subject to a_i x = 1. Source: arXiv 2306.00732, definition 1.1.
    """
    from scipy.optimize import linprog

    a = matrix.double().numpy()
    n, d = a.shape
    cost = np.concatenate([np.zeros(d), np.ones(n)])
    above = np.block([[a, -np.eye(n)], [-a, -np.eye(n)]])
    found = []
    for row in a:
        if not row.any():
            found.append(0.0)
            continue
        made = linprog(cost, A_ub=above, b_ub=np.zeros(2 * n), A_eq=np.concatenate([row, np.zeros(n)])[None],
                       b_eq=[1.0], bounds=[(None, None)] * d + [(0, None)] * n)
        found.append(1 / made.fun if made.fun > 0 else math.inf)
    return torch.tensor(found, dtype=torch.float64)
