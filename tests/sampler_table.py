"""Every sampler on every schedule against the exact law of a mixture: what the test and the documents' table rest on.

`python tests/sampler_table.py` prints the full table of docs/samplers.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workbench import METHODS
from workbench.methods.denoising.solvers import SOLVERS
from workbench.plan import PRESETS
from workbench.problems.denoising import (
    ContinuousVE,
    ContinuousVP,
    Denoiser,
    Denoising,
    DiscreteSchedule,
    EDMSchedule,
    RectifiedFlow,
    Schedule,
    SubVP,
    noisiest,
)
from workbench.problems.mixtures import Mixture, two_modes
from workbench.rng import Rng

LAW = Mixture.of([0.3, 0.7], [-1.0, 0.8], [0.4**2, 0.3**2])

# Each with what its networks predict, so that every kind of prediction has its place.
SCHEDULES: dict[str, tuple[Schedule, str]] = {
    "VP table": (DiscreteSchedule.linear(), "eps"),
    "cosine": (DiscreteSchedule.cosine(), "v"),
    "VP": (ContinuousVP(), "x0"),
    "sub-VP": (SubVP(), "eps"),
    "VE": (ContinuousVE(), "eps"),
    "EDM": (EDMSchedule(), "x0"),
    "flow from .999": (RectifiedFlow(start=0.999), "flow"),
    "flow": (RectifiedFlow(), "flow"),
    "zero SNR": (DiscreteSchedule.linear().zero_terminal(), "v"),
}
WITHOUT_SIGNAL = ("flow", "zero SNR")  # at their noisiest level
REFUSED = r"has no signal at t = .*alpha 0, log-SNR minus infinity"


class Row(NamedTuple):
    """A sampler's variant. order: of its error in the steps' length, scale: of its bound. fresh: it draws noise."""

    method: str
    knobs: Mapping[str, Any] = {}
    order: int = 1
    fresh: bool = False
    needs_signal: bool = False
    scale: float = 1.0


def _rows() -> dict[str, Row]:
    rows = {
        "ddim": Row("ddim"),
        "ddim, eta .5": Row("ddim", {"eta": 0.5}, fresh=True),
        "ddim, eta 1": Row("ddim", {"eta": 1.0}, fresh=True),
        "dpmpp_2m": Row("dpmpp_2m", order=2),
        "timesteps, ddim": Row("timesteps"),
        "timesteps, dpmpp_2m": Row("timesteps", {"solver": "dpmpp_2m"}, 2),
        "edm_heun": Row("edm_heun", {}, 2, needs_signal=True),
        "edm_heun, Euler": Row("edm_heun", {"heun": False}, needs_signal=True),
        "edm_heun, churn": Row("edm_heun", {"stochastic": True, "s_noise": 1.0}, 2, True, True),
    }
    for order in (1, 2, 3):
        for prediction in ("x0", "eps"):
            rows[f"dpm_solver, {order}M, {prediction}"] = Row(
                "dpm_solver", {"order": order, "prediction": prediction}, order, needs_signal=prediction == "eps")
            if order > 1:
                rows[f"dpm_solver, {order}S, {prediction}"] = Row(
                    "dpm_solver", {"order": order, "prediction": prediction, "scheme": "singlestep"}, order,
                    needs_signal=True)
                rows[f"dpm_solver_adaptive, {order}, {prediction}"] = Row(
                    "dpm_solver_adaptive", {"order": order, "prediction": prediction}, order, needs_signal=True)
            else:
                rows[f"dpm_solver, SDE 1, {prediction}"] = Row(
                    "dpm_solver", {"order": 1, "prediction": prediction, "stochastic": True}, 1, True,
                    prediction == "eps")
    for prediction in ("x0", "eps"):
        rows[f"dpm_solver, SDE 2M, {prediction}"] = Row(
            "dpm_solver", {"prediction": prediction, "stochastic": True}, 2, True, prediction == "eps")
        for variant in ("bh1", "bh2"):
            for order in (1, 2, 3, 4):
                rows[f"unipc, {order}, {variant}, {prediction}"] = Row(
                    "unipc", {"order": order, "variant": variant, "prediction": prediction}, order,
                    needs_signal=prediction == "eps")
    for variant in ("tab", "rho_ab", "log_rho_ab", "ipndm", "rho_rk"):
        for degree in (1, 3):
            rows[f"deis, {variant}, {degree}"] = Row("deis", {"variant": variant, "degree": degree}, degree + 1,
                                                     needs_signal=True)
    for preset in PRESETS:
        rows[f"usf, {preset}"] = Row("usf", {"preset": preset}, 1 if preset == "ddim" else 2)
    rows["usf, unipc_bh2_3, implicit"] = Row("usf", {"preset": "unipc_bh2_3", "corrector": "implicit"}, 2)
    for solver in SOLVERS:
        rows[f"t_stitch, {solver}"] = Row("t_stitch", {"solver": solver}, 1 if solver == "ddim" else 2,
                                          needs_signal=solver in ("dpmpp_2s", "deis", "ipndm", "edm_heun"))
    rows["t_stitch, ddim, eta 1"] = Row("t_stitch", {"eta": 1.0}, 1, True)
    for sde in ("vp", "sub_vp", "ve"):
        for solver in ("euler", "rk4", "rk45"):
            rows[f"flow_ode, {sde}, {solver}"] = Row("flow_ode", {"sde": sde, "solver": solver},
                                                     1 if solver == "euler" else 4, scale=6.0)
        for predictor in ("euler_maruyama", "reverse_diffusion", "ancestral"):
            if (sde, predictor) != ("sub_vp", "ancestral"):
                rows[f"score_sde, {sde}, {predictor}"] = Row("score_sde", {"sde": sde, "predictor": predictor}, 1, True)
        rows[f"score_sde, {sde}, corrected"] = Row(
            "score_sde", {"sde": sde, "corrector": "langevin", "length": "sigma"}, 1, True)
    # nothing of a line's one entry is known by `left_part`: its law is the data's again
    rows["inpaint"] = Row("inpaint", {"length": "sigma"}, 1, True)
    return rows


ROWS = _rows()

# One of each kind, for the test; the others differ from these by a coefficient, and are in the full table.
FAST = ("ddim", "ddim, eta 1", "dpmpp_2m", "timesteps, ddim", "edm_heun", "edm_heun, churn", "dpm_solver, 3M, x0",
        "dpm_solver, 2M, eps", "dpm_solver, 3S, x0", "dpm_solver, SDE 2M, x0", "dpm_solver_adaptive, 3, x0",
        "unipc, 3, bh2, x0", "deis, tab, 3", "deis, ipndm, 3", "deis, rho_rk, 1", "usf, unipc_bh2_3, implicit",
        "t_stitch, ddim, eta 1", "t_stitch, dpmpp_2s", "flow_ode, vp, rk4", "flow_ode, ve, rk45",
        "score_sde, vp, ancestral", "score_sde, sub_vp, euler_maruyama", "score_sde, ve, reverse_diffusion", "inpaint")


class Even(Rng):
    """A source of normal numbers that are spread evenly: of each draw, the rows' are the quantiles, in random order.

    The first draw, which a sampler starts from, then has no sampling error at all, and a deterministic sampler none.
    """

    def __init__(self, seed: int, n_samples: int) -> None:
        self.seed, self.n_samples, self.first = seed, n_samples, 0
        self._source = torch.Generator().manual_seed(seed)
        self._quantiles = torch.special.ndtri((torch.arange(n_samples, dtype=torch.float64) + 0.5) / n_samples)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal (n_samples, *shape) on the CPU."""
        order = torch.rand((self.n_samples, math.prod(shape)), generator=self._source).argsort(0)
        return self._quantiles[order].reshape(self.n_samples, *shape).to(dtype)


def exact(schedule: Schedule, prediction: str) -> Callable[..., Tensor]:
    """The law's own network (x (n, 1), t (n,), labels) -> (n, 1), written apart from the package's mixtures."""
    weights, means, variances = LAW.weights, LAW.means[:, 0], LAW.covariances[:, 0, 0]
    known: dict[float, tuple[float, float]] = {}

    def network(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        times = t.tolist() if bool((t != t[0]).any()) else [float(t[0])]
        for u in times:
            known[u] = known.get(u) or schedule.at(u)[1:]
        alpha, sigma = torch.tensor([known[u] for u in times], dtype=torch.float64).T[:, :, None]
        noisy = alpha**2 * variances + sigma**2
        off = x - alpha * means
        share = weights / noisy.sqrt() * torch.exp(-0.5 * (off**2 / noisy - (off**2 / noisy).amin(1, keepdim=True)))
        x0 = (share * (means + alpha * variances / noisy * off)).sum(1, keepdim=True) / share.sum(1, keepdim=True)
        eps = (share * (sigma / noisy * off)).sum(1, keepdim=True) / share.sum(1, keepdim=True)
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]

    return network


@cache
def toy(schedule: str) -> Denoising:
    """The law on that schedule: two models that both know it exactly."""
    own, prediction = SCHEDULES[schedule]
    models = tuple(Denoiser(name, exact(own, prediction), own, prediction) for name in ("one", "two"))
    return replace(two_modes(own), models=models, flops={"one": 1.0, "two": 1.0}, data=LAW.sample)


def knobs_on(row: Row, schedule: str, n_steps: int) -> dict[str, Any]:
    """The knobs of a row of the table on a schedule, with steps that suit it: even in log-SNR where it is finite."""
    known, knobs = METHODS[row.method].knobs, dict(row.knobs)
    is_even_in_time = schedule in WITHOUT_SIGNAL
    if "spacing" in known:
        knobs["spacing"] = "trailing" if is_even_in_time else "log_snr"
    if row.method == "deis" and (schedule in ("VE", "EDM") or knobs["variant"] != "tab"):
        knobs["phase"] = "log_rho"  # polynomials in t are for steps even in a power of t, where t is no noise level
    if row.method == "timesteps":
        own = SCHEDULES[schedule][0]
        times = own.times(n_steps, "trailing" if is_even_in_time else "log_snr")
        low, high = own.cleanest, noisiest(own).t
        knobs["timesteps"] = tuple(min(max((t - low) / (high - low), 0.0), 1.0) for t in times)
    if row.method == "dpm_solver_adaptive":
        return knobs | {"n_steps": 1000, "atol": 1e-3, "rtol": 1e-6}  # relative to noise of 80 no error would be small
    if row.method in ("score_sde", "inpaint", "flow_ode"):
        if knobs.get("solver") == "rk45":
            return knobs | {"n_steps": 4}
        n_steps *= 1 if knobs.get("solver") == "rk4" else 2  # even in time, and of first order
    return knobs | {"n_steps": n_steps}


def distance(samples: Tensor, law: Mixture = LAW) -> float:
    """The Wasserstein-1 distance of n samples (n, 1) from the law's n quantiles."""
    return float((samples.flatten().sort()[0] - law.quantiles(len(samples)).flatten()).abs().mean())


class Found(NamedTuple):
    """A distance from the law, and the most that it may be."""

    distance: float
    bound: float


def measured(row: Row, schedule: str, n_steps: int, n_samples: int, problem: Denoising | None = None) -> Found:
    """The distance of a row's samples on a schedule, and its bound. Raises what the sampler raises.

    The bound is the sum of
    - the discretisation's, for steps of length h in log-SNR: h / 4 for samplers of first order, h^2 / 5 for others, or
      about twice the errors that are known of such samplers on this law (.15 h of DDIM, .1 h^2); six times as much for
      Euler's method in time, without an exponential integrator. h: the longest step, within -3 to 3, where data of this
      scale is decided: outside either the signal or the noise is below a twentieth of the other. A hundredth for fourth
      order in time, and five times the tolerance of a step where steps adapt to one;
    - the step into the data: the estimate at the last level, of noise rho = sigma / alpha, spreads less than the data
      of standard deviation s in a mode: s - s^2 / sqrt(s^2 + rho^2) is at most rho^2 / (2 s), s at least 0.3; an answer
      that ends at that level still carries its noise, which adds as much;
    - the start: the law there is not quite normal, but its signal is below 1 / 50 of the noise on all schedules here;
      the data's mean of .26 and standard deviation of .9 put it less than .007 off;
    - where noise is drawn on the way, the sampling error of n independent draws, 2.5 times the most that is expected,
      the integral of sqrt(F (1 - F) / n).
    """
    method, given = METHODS[row.method], knobs_on(row, schedule, n_steps)
    problem = toy(schedule) if problem is None else problem
    steps = list(method.function(problem, Even(0, n_samples), **method.check(given)))
    reached = [-math.inf, *(s.info["there"].log_snr for s in steps)]
    h = max(b - a for a, b in pairwise(min(max(level, -3.0), 3.0) for level in reached))
    if row.order == 4 and row.method == "flow_ode":
        bound = 0.01
    elif row.method == "dpm_solver_adaptive":
        bound = 5 * given["atol"]
    else:
        bound = row.scale * (h / 4 if row.order == 1 else h**2 / 5)
    bound += math.exp(-2 * max(level for level in reached if level < math.inf)) / 0.6 + 0.007
    if row.fresh:
        bound += 2.5 * SPREAD / math.sqrt(n_samples)
    return Found(distance(steps[-1].state), bound)


def _spread() -> float:
    """J, the integral of sqrt(F (1 - F)) over the line, F the law's distribution function."""
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    below = torch.special.ndtr((x[:, None] - LAW.means[:, 0]) / LAW.covariances[:, 0, 0].sqrt()) @ LAW.weights
    return float((below * (1 - below)).clamp(min=0).sqrt().sum()) * 12 / 4000


SPREAD = _spread()


def rows_for(row: Row, n_samples: int) -> int:
    """Samples to take: few where the answer has no sampling error, fewer yet where each is solved by itself."""
    if row.fresh:
        return min(n_samples, 400) if row.method == "inpaint" else n_samples  # which draws its data one by one
    return 4 if row.knobs.get("solver") == "rk45" else 8 if row.method == "dpm_solver_adaptive" else 16


def table(n_steps: int, n_samples: int) -> str:
    """All of it, in Markdown."""
    lines = ["| sampler | " + " | ".join(SCHEDULES) + " |", "|---" * (len(SCHEDULES) + 1) + "|"]
    for name, row in ROWS.items():
        cells = []
        for schedule in SCHEDULES:
            if row.needs_signal and schedule in WITHOUT_SIGNAL:
                cells.append("refused")
                continue
            found = measured(row, schedule, n_steps, rows_for(row, n_samples))
            cells.append(f"{found.distance:.4f}".lstrip("0") + ("" if found.distance <= found.bound else " **above**"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(n_steps=128, n_samples=20_000))
