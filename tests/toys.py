"""What several tests share: mixtures with known answers, fixed starting noise, solvers on a grid of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp
from scipy.special import softmax
from torch import Tensor

from workbench.methods.denoising._march import march
from workbench.problems.denoising import ContinuousVP, Denoiser, Denoising, Point, Schedule
from workbench.problems.mixtures import Mixture, two_dim
from workbench.rng import Rng

VP_PREDICTIONS = ("eps", "x0", "v")  # of networks on schedules of alpha^2 + sigma^2 = 1
PLANE = Mixture.of([0.3, 0.5, 0.2], [[-1.0, 0.2], [0.8, -0.5], [0.1, 1.1]],
                   [[[0.16, 0.05], [0.05, 0.09]], [[0.04, 0.0], [0.0, 0.25]], [[0.09, -0.06], [-0.06, 0.09]]])


def plane(*models: tuple[str, Schedule, str], schedule: Schedule, law: Mixture = PLANE) -> Denoising:
    """A problem whose models (name, schedule, prediction) all know the same law, sampled on `schedule`."""
    denoisers = tuple(Denoiser(name, law.network(own, prediction), own, prediction) for name, own, prediction in models)
    flops = {name: float(2**i) for i, (name, _, _) in enumerate(models)}
    return replace(two_dim(schedule=schedule), models=denoisers, flops=flops, shape=(law.means.shape[1],))


def gaussian(mean: float, std: float, schedule: Schedule) -> Denoising:
    """One model that knows a single Gaussian on a line exactly."""
    return plane(("exact", schedule, "eps"), schedule=schedule, law=Mixture.of([1.0], [mean], [std**2]))


@dataclass(frozen=True)
class From(Denoising):
    """A problem that starts from given noise."""

    noise: Tensor | None = None

    def start(self, rng: Rng, at: Point | None = None) -> Tensor:
        assert self.noise is not None
        return self.noise.clone()


def solve(problem: Denoising, solver: Callable[..., Any], points: Sequence[Point], noise: Tensor, **knobs: Any
          ) -> Tensor:
    """The end of the trajectory from `noise` along `points`, by the best model."""
    fixed = From(**{f.name: getattr(problem, f.name) for f in fields(problem)}, noise=noise)
    owners = [problem.models[-1]] * (len(points) - 1)
    return list(march(fixed, Rng(0, len(noise)), points, owners, solver, guidance=1.0, **knobs))[-1].state


def log_snr_points(n_steps: int, schedule: ContinuousVP | None = None) -> list[Point]:
    """n_steps + 1 levels, even in log-SNR, from t = 1 to the cleanest level, without the jump to sigma 0."""
    schedule = schedule or ContinuousVP()
    low, high = schedule.at(1.0).log_snr, schedule.at(schedule.cleanest).log_snr
    return [schedule.at(schedule.t_at(low + (high - low) * i / n_steps)) for i in range(n_steps + 1)]


# The one-dimensional oracle of the project's notes: weights, means and standard deviations of two_modes(), and starts.
WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.4, 0.3])
STARTS = np.linspace(-2.5, 2.5, 41)


def true_flow(points: Sequence[Point]) -> np.ndarray:
    """STARTS carried from points[0] to points[-1] by the probability-flow ODE, dv/drho = eps, v = x/alpha.

    In log rho, rho = sigma/alpha, by an 8th-order Runge-Kutta method at 1e-12; without the package's denoiser.
    """

    def slope(log_rho: float, v: np.ndarray) -> np.ndarray:
        rho = math.exp(log_rho)
        variance, off = STDS**2 + rho**2, v[:, None] - MEANS
        share = softmax(np.log(WEIGHTS) - 0.5 * np.log(variance) - 0.5 * off**2 / variance, axis=1)
        return rho * (share * rho * off / variance).sum(1)

    first, last = points[0], points[-1]
    path = solve_ivp(slope, (-first.log_snr, -last.log_snr), STARTS / first.alpha, method="DOP853",
                     rtol=1e-12, atol=1e-12)
    return path.y[:, -1] * last.alpha
