"""The estimation family: what a number costs. A quantity with a known truth, and a budget of looks at data.

A sample is a repeated experiment with randomness of its own. Everything that is looked at goes through a counted
callable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from workbench.cost import Counted, Network
from workbench.family import Family, register
from workbench.problem import Problem
from workbench.problems.fingerprint import digest_of_values
from workbench.quality import Drawn, Metric, Quality, register_metric
from workbench.rng import Rng

register_metric(Metric(
    "reuse_gap", "reported less true accuracy", "", False, 12,
    "of the last classifier, averaged over experiments: 0 where the holdout still tells the truth"))
register_metric(Metric(
    "true_accuracy", "true accuracy of the last classifier", "", True, 12, "known in closed form"))
register_metric(Metric(
    "distortion", "distortion", "", False, 12,
    "mean over test vectors of |estimated norm / true norm - 1|, averaged over experiments"))
register_metric(Metric(
    "loss_ratio", "loss of the fit, over the best", "", False, 12,
    "l_p loss on all rows of what was fitted to the kept ones, over the least there is: 1 at best"))


@dataclass(frozen=True, kw_only=True)
class Holdout(Problem):
    """Adaptive questions to one holdout set. Labels are fair coins; given y = +-1, feature j is N(shift_j y, 1).

    shifts (d,): 0 where a feature says nothing. n_rows: of the training and of the holdout set of each experiment.
    reveal(values (m,)) -> the same values: what is told of held-out data goes through it and is counted ("looks").
    """

    shifts: Tensor
    n_rows: int
    reveal: Callable[[Tensor], Tensor] = lambda values: values
    family: ClassVar[str] = "estimation"

    def wrapped(self, wrap: Callable[[str, Network], Network]) -> Holdout:
        return replace(self, reveal=wrap("looks", self.reveal))

    def sizes(self, knobs: Mapping[str, Any]) -> dict[str, int]:
        """n_dims: features of the holdout problem; n_pool: rows of the matrix, 0 here."""
        return {"n_dims": len(self.shifts), "n_pool": 0}

    def data(self, source: torch.Generator) -> Tensor:
        """y x of one set of an experiment (n_rows, d): all that correlations and votes by sign need, as y is a coin."""
        noise = torch.randn((self.n_rows, len(self.shifts)), generator=source, dtype=self.dtype)
        return noise + self.shifts.to(self.dtype)

    def fresh(self, uniform: np.ndarray, votes: Tensor | None = None) -> np.ndarray:
        """Means over as many rows that no question saw before, of each feature or of a vote's being right.

        uniform: numbers (m,) in [0, 1) to draw them by. A mean of normal rows is normal, hits are binomial: the exact
        laws, without the rows.
        """
        from scipy.stats import binom, norm

        if votes is None:
            return self.shifts.numpy() + norm.ppf(uniform) / math.sqrt(self.n_rows)
        return binom.ppf(uniform, self.n_rows, self.accuracy(votes)) / self.n_rows

    def accuracy(self, signs: Tensor) -> float:
        """The true accuracy of the vote sign(sum_j signs_j x_j), k signs not 0: Phi(signs . shifts / sqrt k)."""
        k = float(signs.abs().sum())
        return 0.5 if not k else float(torch.special.ndtr((signs.double() @ self.shifts) / math.sqrt(k)))


@dataclass(frozen=True, kw_only=True)
class Rows(Problem):
    """Norms |A x|_p and l_p regression from few rows of a tall matrix A (N, d), b (N,).

    read(indices (m,), n) -> A's and b's rows (m, d + 1): reading rows, for n experiments, is counted ("rows").
    tests (d + 1, M): vectors that the distortion is measured on.
    """

    matrix: Tensor  # (N, d + 1), the last column b
    tests: Tensor
    read: Callable[[Tensor, int], Tensor]
    family: ClassVar[str] = "estimation"

    def wrapped(self, wrap: Callable[[str, Network], Network]) -> Rows:
        return replace(self, read=wrap("looks", self.read))

    def sizes(self, knobs: Mapping[str, Any]) -> dict[str, int]:
        """n_dims: 0 here; n_pool: rows of the matrix."""
        return {"n_dims": 0, "n_pool": len(self.matrix)}


def holdout(n_rows: int = 500, n_dims: int = 500, n_signal: int = 0, shift: float = 0.15) -> Holdout:
    """Features of which n_signal have a mean of +-shift with the label, the others none; data anew each experiment.

    n_signal 0: the labels are noise, and no classifier is right more often than .5. Raises ValueError for fewer than 10
    rows, fewer features than signals, or a shift below 0.
    """
    for key, value, low in (("n_rows", n_rows, 10), ("n_dims", n_dims, 1), ("n_signal", n_signal, 0)):
        if value != int(value) or value < low or (key == "n_signal" and value > n_dims):
            raise ValueError(f"{key}={value!r}: expected a whole number of at least {low}"
                             f"{f' and at most n_dims={n_dims}' if key == 'n_signal' else ''}")
    if not 0 <= shift < math.inf:
        raise ValueError(f"shift={shift!r}: expected 0 or more")
    shifts = torch.zeros(n_dims, dtype=torch.float64)
    shifts[:n_signal] = shift * (1 - 2 * (torch.arange(n_signal) % 2))

    def judge(answer: Mapping[str, Tensor], cases: None) -> dict[str, Quality]:
        reported, true = answer["reported"][:, -1], answer["true"][:, -1]
        drawn = Drawn(len(true))
        return {"reuse_gap": drawn.mean(reported - true), "true_accuracy": drawn.mean(true)}

    call = f"holdout({n_rows}, {n_dims}, {n_signal}, {shift!r})"
    return Holdout(
        name=f"{call}", digest=digest_of_values("holdout", n_rows, shifts), judge=judge, flops={}, shifts=shifts,
        n_rows=n_rows, methods=("thresholdout",), counted={"looks": Counted("answers from held-out data")},
        dtype=torch.float64, reference=("thresholdout", {"variant": "fresh"}), baseline=("thresholdout", {"variant":
        "naive"}), source=f"from workbench.problems.estimation import holdout\n\nproblem = {call}")


def rows(n_pool: int = 4000, n_dims: int = 6, n_heavy: int = 8, scale: float = 200.0, seed: int = 0) -> Rows:
    """A Gaussian matrix of which n_heavy rows are `scale` times as large: uniform sampling misses them.

    The right-hand side is a plane with noise of deviation 1, heavy rows alike. Raises ValueError for sizes that do not
    fit together.
    """
    if not 1 <= n_dims < n_pool or not 0 <= n_heavy <= n_pool or scale <= 0:
        raise ValueError(f"n_pool={n_pool}, n_dims={n_dims}, n_heavy={n_heavy}, scale={scale}: expected n_dims below "
                         "n_pool, at most n_pool heavy rows, a scale above 0")
    source = torch.Generator().manual_seed(seed)
    plane = torch.randn((n_pool, n_dims), generator=source, dtype=torch.float64)
    plane[:n_heavy] *= scale
    truth = torch.randn(n_dims, generator=source, dtype=torch.float64)
    noise = torch.randn(n_pool, generator=source, dtype=torch.float64)
    matrix = torch.cat((plane, (plane @ truth + noise)[:, None]), 1)
    tests = torch.randn((n_dims + 1, 64), generator=source, dtype=torch.float64)

    @cache
    def best(p: float) -> float:
        return loss(matrix, fitted(matrix, torch.ones(n_pool, dtype=torch.float64), p), p)

    def judge(answer: Mapping[str, Tensor], cases: None) -> dict[str, Quality]:
        p = float(answer["p"][0])
        drawn = Drawn(len(answer["p"]))
        ratios = torch.tensor([loss(matrix, x, p) for x in answer["fit"]], dtype=torch.float64) / best(p)
        return {"distortion": drawn.mean((answer["ratios"] - 1).abs().mean(1)), "loss_ratio": drawn.mean(ratios)}

    call = f"rows({n_pool}, {n_dims}, {n_heavy}, {scale!r}, {seed})"
    return Rows(
        name=call, digest=digest_of_values("rows", matrix, tests), judge=judge, flops={},
        methods=("sensitivity_sampling",), matrix=matrix, tests=tests,
        read=lambda indices, n: matrix[indices], dtype=torch.float64,
        counted={"looks": Counted("rows read", lambda indices, n: len(indices) * n)},
        reference=("sensitivity_sampling", {"score": "lewis", "n_kept": 2000}),
        baseline=("sensitivity_sampling", {"score": "uniform"}),
        source=f"from workbench.problems.estimation import rows\n\nproblem = {call}")


def norms(matrix: Tensor, vectors: Tensor, p: float, weights: Tensor | None = None) -> Tensor:
    """sum_i w_i |a_i x|^p of matrix (m, D) for vectors (D, M): (M,)."""
    parts = (matrix @ vectors).abs() ** p
    return parts.sum(0) if weights is None else weights @ parts


def loss(matrix: Tensor, x: Tensor, p: float) -> float:
    """|A x - b|_p^p of matrix (N, d + 1), its last column b."""
    return float(norms(matrix, torch.cat((x, -torch.ones(1, dtype=x.dtype)))[:, None], p))


def fitted(matrix: Tensor, weights: Tensor, p: float, n_rounds: int = 30) -> Tensor:
    """The minimiser (d,) of sum_i w_i |a_i x - b_i|^p, by iteratively reweighted least squares.

    Residuals below 1e-6 of the largest count as that, and steps beyond p = 2 are damped by 1 / (p - 1), which lets the
    iteration converge for p up to 3.
    """
    a, b = matrix[:, :-1], matrix[:, -1]
    x, own = torch.zeros(a.shape[1], dtype=a.dtype), weights
    for _ in range(n_rounds):
        root = own.sqrt()[:, None]
        new = torch.linalg.lstsq(root * a, root * b[:, None], driver="gelsd").solution[:, 0]
        x = new if p <= 2 else x + (new - x) / (p - 1) if bool(x.any()) else new
        residual = (a @ x - b).abs()
        own = weights * residual.clamp(min=1e-6 * float(residual.max()) + 1e-300) ** (p - 2)
    return x


def _told(problem: Any, states: Sequence[Any], infos: Sequence[Mapping[str, Any]]) -> None:
    """Each step of the last phase tells what a curve is drawn of."""
    assert all("curve" in info for info in infos)


register(Family(
    "estimation", "n_rounds",
    lambda problem, knobs: {"reported": (knobs["n_rounds"],), "true": (knobs["n_rounds"],), "left": ()}
    if isinstance(problem, Holdout) else {"ratios": (problem.tests.shape[1],), "fit": (problem.matrix.shape[1] - 1,),
                                          "p": ()},
    [("workbench.problems.estimation:holdout", {"n_rows": 60, "n_dims": 30}),
     ("workbench.problems.estimation:rows", {"n_pool": 60, "n_dims": 2, "n_heavy": 2, "scale": 20.0}),
     ("workbench.problems.estimation:holdout", {"n_rows": 60, "n_dims": 30, "n_signal": 10, "shift": 0.4})], _told,
    question="How many looks at data does an honest number cost?",
    sample="experiment", spends="looks", axis="looks", sizes=("n_dims", "n_pool")))


def streams(rng: Rng) -> list[Callable[[int], np.ndarray]]:
    """Each experiment's own uniform numbers."""
    return [rng.uniforms(i) for i in range(rng.n_samples)]
