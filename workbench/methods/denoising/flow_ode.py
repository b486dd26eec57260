"""The probability-flow ODE: deterministic sampling, exact likelihoods, and latents that can be edited."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from workbench.knob import Knob
from workbench.methods.denoising._march import Advance, Evaluated, combined, march
from workbench.methods.denoising.ddim import Guidance, Steps, Which
from workbench.methods.denoising.score_sde import End, Path, Sde, SdeName, SigmaMax, flow_rates, sde_path
from workbench.problems.denoising import Denoiser, Denoising, Point, mixed, prior_std
from workbench.registry import Step, method
from workbench.rng import Rng, of_samples

SOLVERS = {"euler": 1, "rk4": 4, "rk45": 0}  # evaluations per step; adaptive ones have none of their own
TRACES = ("hutchinson", "exact")
PROBES = ("rademacher", "gaussian")
MAX_EVALUATIONS = 20_000  # per sample: where rk45 gives up
MAX_EXACT = 256  # entries of a state up to which its exact trace is taken, one backward pass each

Solver = Annotated[str, Knob(choices=tuple(SOLVERS), small="euler",
                             help="fixed steps of first or fourth order, or steps adapted to a tolerance")]
Tolerance = Annotated[float, Knob(low=1e-6, high=1e-1, scale="log", needs={"solver": "rk45"}, small=1e-2,
                                  help="local error that a step may make, absolute and relative")]


class Likelihood(NamedTuple):
    """Of each sample (B,): log-density in nats, bits per dimension, evaluations spent; and its latent (B, *shape)."""

    log_density: Tensor
    bits_per_dim: Tensor
    evaluations: Tensor
    latent: Tensor


def flow_step(x: Tensor, step: Advance, *, order: int) -> tuple[Tensor, Evaluated]:
    """One explicit step, of Euler (order 1) or of the classical Runge-Kutta method (4), in the time of step.schedule.

    dx/dt = f x + g^2 / (2 sigma) eps, x (B, *shape). Costs `order` evaluations per row.
    Raises ValueError where the schedule is that of no SDE. Source: arXiv 2011.13456, equation 13.
    """
    sde = step.schedule
    if not isinstance(sde, Sde):
        raise ValueError(f"flow_step: {type(sde).__name__} is not the schedule of an SDE")
    h, middle = step.there.t - step.here.t, sde.at((step.here.t + step.there.t) / 2)

    def slope(y: Tensor, at: Point) -> tuple[Tensor, Evaluated]:
        now = step.denoise(y, at)
        f, g = flow_rates(sde, at)
        return mixed(f, y, g, now.eps), now

    k1, now = slope(x, step.here)
    if order == 1:
        return mixed(1.0, x, h, k1), now
    k2, _ = slope(mixed(1.0, x, h / 2, k1), middle)
    k3, _ = slope(mixed(1.0, x, h / 2, k2), middle)
    k4, _ = slope(mixed(1.0, x, h, k3), step.there)
    return combined(x, (k1, k2, k3, k4), (1.0, h / 6, h / 3, h / 3, h / 6)), now


def nfe(n_steps: int, solver: str) -> int:
    """Evaluations per sample, guidance apart; for "rk45" the most that it may spend."""
    return n_steps * SOLVERS[solver] or MAX_EVALUATIONS


@method(version=1, source="Score SDE, arXiv 2011.13456, sec. 4.3 and app. D",
        cost="nfe(n_steps, solver) * branches", at_most=True)
def flow_ode(problem: Denoising, rng: Rng, *, n_steps: Steps = 20, sde: SdeName = "vp", solver: Solver = "rk4",
             tolerance: Tolerance = 1e-3, t_end: End = 1e-3, sigma_max: SigmaMax = 50.0, guidance: Guidance = 1.0,
             model: Which = "best") -> Iterator[Step]:
    """The probability-flow ODE of an SDE in its own time, by fixed or by adaptive steps; deterministic.

    State (n_samples, *problem.shape) on the SDE's own scale, as `score_sde` has it, with the same cuts where a model's
    schedule ends. The answer is the state at t_end, which still has that level's little noise. n_steps even parts of
    the time range are one step each of "euler" or "rk4"; "rk45", the method of Dormand and Prince, takes at least one
    step in each and as many as the tolerance asks, every sample by itself, so that no sample depends on the batch.
    Cost: at most ``nfe(n_steps, solver) * branches`` evaluations per sample, where branches is 2 with guidance and 1
    without; exactly that many with fixed steps.
    Raises ValueError where rk45 does not reach its tolerance within that, or guidance needs a null label that is not
    there.
    """
    asked = problem.models[-1 if model == "best" else 0]
    path = sde_path(asked, sde, t_end, sigma_max)
    share = (path.last - path.first) / n_steps
    points = [path.sde.at(path.first + share * i) for i in range(n_steps)] + [path.sde.at(path.last)]
    scaled = replace(problem, schedule=path.sde)
    if SOLVERS[solver]:
        yield from march(scaled, rng, points, [asked] * n_steps, flow_step, guidance=guidance, order=SOLVERS[solver])
        return
    solve = _Adaptive(asked, path.sde, problem.cases_of(rng), guidance, tolerance)
    problem.tell(points, [asked] * n_steps)
    x = scaled.start(rng, points[0])
    for i, (here, there) in enumerate(pairwise(points)):
        x, x0 = solve(x, here.t, there.t)
        yield Step(x, {"i": i, "model": asked.name, "x0": x0, "there": there})


def encode(problem: Denoising, x: Tensor, **settings: Any) -> Tensor:
    """The latents (B, *shape) of data x (B, *shape): the probability flow followed from t_end to full noise.

    settings: sde "vp", tolerance 1e-5 (absolute and relative, of rk45), t_end 1e-5 (no cleaner than the model knows),
    sigma_max 50, guidance 1, model (a Denoiser, default the problem's best), labels (B,) (default the problem's own).
    Every sample is solved by itself; costs as many evaluations as the tolerance asks, times branches.
    Raises TypeError for another setting, ValueError for one out of bounds, states of another shape and where
    MAX_EVALUATIONS are not enough. Source: arXiv 2011.13456, section 4.3.
    """
    return _carry(problem, x, _Settings(**settings), forward=True)


def decode(problem: Denoising, latent: Tensor, **settings: Any) -> Tensor:
    """The inverse of `encode`: latents (B, *shape) at full noise -> states (B, *shape) at t_end. Settings alike."""
    return _carry(problem, latent, _Settings(**settings), forward=False)


def interpolate(a: Tensor, b: Tensor, n: int) -> Tensor:
    """n latents (n, B, *shape) from a to b (B, *shape), ends included, evenly along the great circle (slerp).

    Lengths change evenly in the same sense; where a and b are parallel the straight line is taken.
    Raises ValueError for n below 2 or different shapes. Source: arXiv 2011.13456, section 4.3 and appendix D.2.
    """
    if n < 2 or a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"n={n}, a {tuple(a.shape)}, b {tuple(b.shape)}: expected n of 2 or more, equal (B, *shape)")
    rows_a, rows_b = a.flatten(1), b.flatten(1)
    angle = torch.acos(torch.cosine_similarity(rows_a, rows_b, dim=1).clamp(-1, 1))[:, None]
    is_straight = angle.sin() < 1e-6
    found = []
    for share in (i / (n - 1) for i in range(n)):
        along = [torch.where(is_straight, torch.full_like(angle, s), (s * angle).sin() / angle.sin())
                 for s in (1 - share, share)]
        found.append((along[0] * rows_a + along[1] * rows_b).reshape(a.shape))
    return torch.stack([a, *found[1:-1], b])


def log_likelihood(problem: Denoising, x: Tensor, *, trace: str = "hutchinson", probe: str = "rademacher",
                   seed: int = 0, data_range: tuple[float, float] | None = None, levels: int = 256, **settings: Any
                   ) -> Likelihood:
    """The log-density of x (B, *shape) under the model's probability flow, per sample, in nats; settings as `encode`.

    log p(x) = log prior(latent) + the integral of the flow's divergence from t_end to full noise. x is taken as a state
    at t_end. trace "exact" takes the divergence by one backward pass per entry (states of at most MAX_EXACT entries);
    "hutchinson" estimates it without bias by e . J e, with one e per sample for the whole solve, drawn from (seed,
    sample): signs ("rademacher") or standard normal ("gaussian").
    bits_per_dim = -log p / (D ln 2) + offset. Without data_range the offset is 0: the density of x as it is. With
    data_range (low, high), data of `levels` integer levels scaled to that range, it is log2(levels / (high - low)): 7
    for 256 levels in [-1, 1], 8 in [0, 1]; the data should then be dequantised by uniform noise of one level.
    Raises what `encode` raises, and ValueError for another trace or probe, a range that is none, or too many entries.
    Source: arXiv 2011.13456, section 4.3 and appendix D.2 (Skilling-Hutchinson estimator).
    """
    for name, value, allowed in (("trace", trace, TRACES), ("probe", probe, PROBES)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    if levels < 2 or (data_range is not None and not data_range[0] < data_range[1]):
        raise ValueError(f"data_range={data_range}, levels={levels}: expected low < high and at least 2 levels")
    size = math.prod(problem.shape)
    if trace == "exact" and size > MAX_EXACT:
        raise ValueError(f"trace='exact': states have {size} entries, expected at most {MAX_EXACT}; use 'hutchinson'")
    given = _Settings(**settings)
    model, path, labels = given.of(problem, x)
    probes = None
    if trace == "hutchinson":
        probes = Rng(seed, len(x)).normal(problem.shape, problem.dtype, problem.device)
        if probe == "rademacher":
            probes = torch.where(probes < 0, -1.0, 1.0).to(problem.dtype)
    solve = _Adaptive(model, path.sde, labels, given.guidance, given.tolerance, has_trace=True, probes=probes)
    latent, _ = solve(x, path.last, path.first)
    variance = prior_std(path.sde.at(path.first)) ** 2
    rows = latent.double().flatten(1)
    prior = -0.5 * (rows.square().sum(1) / variance + size * math.log(2 * math.pi * variance))
    density = prior + torch.tensor(solve.divergence, dtype=torch.float64, device=prior.device)
    offset = 0.0 if data_range is None else math.log2(levels / (data_range[1] - data_range[0]))
    return Likelihood(density, -density / (size * math.log(2)) + offset, torch.tensor(solve.spent), latent)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What `encode`, `decode` and `log_likelihood` have in common."""

    sde: str = "vp"
    tolerance: float = 1e-5
    t_end: float = 1e-5
    sigma_max: float = 50.0
    guidance: float = 1.0
    model: Denoiser | None = None
    labels: Tensor | None = None

    def of(self, problem: Denoising, x: Tensor) -> tuple[Denoiser, Path, Tensor | None]:
        """The model, its path and the labels for states x. Raises ValueError for settings that do not fit."""
        if x.ndim < 2 or x.shape[1:] != problem.shape or len(x) == 0:
            raise ValueError(f"states {tuple(x.shape)}: expected (B, {', '.join(map(str, problem.shape))})")
        for name, value, high in (("tolerance", self.tolerance, 1), ("t_end", self.t_end, 1)):
            if not 0 < value < high:
                raise ValueError(f"{name}={value!r}: expected a number between 0 and {high}")
        if self.sigma_max < 1:
            raise ValueError(f"sigma_max={self.sigma_max!r}: expected at least 1")
        if self.labels is not None and len(self.labels) != len(x):
            raise ValueError(f"labels {tuple(self.labels.shape)}: expected one for each of {len(x)} states")
        model = problem.models[-1] if self.model is None else self.model
        labels = problem.labels(len(x)) if self.labels is None else self.labels
        return model, sde_path(model, self.sde, self.t_end, self.sigma_max), labels


def _carry(problem: Denoising, x: Tensor, given: _Settings, *, forward: bool) -> Tensor:
    model, path, labels = given.of(problem, x)
    ends = (path.last, path.first) if forward else (path.first, path.last)
    return _Adaptive(model, path.sde, labels, given.guidance, given.tolerance)(x, *ends)[0]


class _Adaptive:
    """The flow solved by RK45, each row with steps of its own; keeps what each row has spent and its divergence."""

    def __init__(self, model: Denoiser, sde: Sde, labels: Tensor | None, guidance: float, tolerance: float, *,
                 has_trace: bool = False, probes: Tensor | None = None) -> None:
        self.model, self.sde, self.labels, self.guidance, self.tolerance = model, sde, labels, guidance, tolerance
        self.has_trace, self.probes = has_trace, probes
        self.spent: list[int] = []
        self.divergence: list[float] = []  # its integral from the first solve's start to the last one's end

    def __call__(self, x: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
        """x (B, *shape) at time start -> the states at time end, and the data estimates at start."""
        if not self.spent:
            self.spent, self.divergence = [0] * len(x), [0.0] * len(x)
        rows = [self._row(i, x[i : i + 1], start, end) for i in range(len(x))]
        return torch.cat([end for end, _ in rows]), torch.cat([x0 for _, x0 in rows])

    def _row(self, i: int, x: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
        estimates: list[Tensor] = []
        label = None if self.labels is None else self.labels[i : i + 1]

        def slope(t: float, state: np.ndarray) -> np.ndarray:
            if self.spent[i] == MAX_EVALUATIONS:
                raise ValueError(f"tolerance={self.tolerance:g}: sample {i} would need more than {MAX_EVALUATIONS} "
                                 f"evaluations, expected a larger tolerance")
            self.spent[i] += 1
            own = state[:-1] if self.has_trace else state
            y = torch.from_numpy(own).to(x.device, x.dtype).reshape(x.shape)
            with torch.set_grad_enabled(self.has_trace), of_samples([i]):
                y.requires_grad_(self.has_trace)
                x0, eps = self.model.predict(y, self.sde.at(t), self.sde, label, self.guidance)
                divergence = [self._divergence(t, y, eps, i)] if self.has_trace else []
            if not estimates:  # the solver's first evaluation is at the start
                estimates.append(x0.detach())
            f, g = flow_rates(self.sde, self.sde.at(t))
            drift = f * torch.from_numpy(own) + g * eps.detach().double().cpu().flatten()
            return np.append(drift.numpy(), divergence)

        from scipy.integrate import solve_ivp  # a third of the package's import time, and wanted here only

        began = x.detach().double().cpu().flatten().numpy()
        solved = solve_ivp(slope, (start, end), np.append(began, [0.0] * self.has_trace), method="RK45",
                           rtol=self.tolerance, atol=self.tolerance)
        if not solved.success:
            raise ValueError(f"tolerance={self.tolerance:g}: sample {i} was not solved ({solved.message})")
        last = solved.y[:, -1]
        if self.has_trace:
            self.divergence[i] += float(last[-1])
            last = last[:-1]
        return torch.from_numpy(last).to(x.device, x.dtype).reshape(x.shape), estimates[0]

    def _divergence(self, t: float, y: Tensor, eps: Tensor, i: int) -> float:
        if self.probes is not None:
            probe = self.probes[i : i + 1]
            of_eps = float((torch.autograd.grad((eps * probe).sum(), y)[0] * probe).sum())
            of_x = float(probe.square().sum())
        else:
            entries = eps.flatten()
            of_eps = sum(float(torch.autograd.grad(entry, y, retain_graph=True)[0].flatten()[j])
                         for j, entry in enumerate(entries))
            of_x = float(y.numel())
        f, g = flow_rates(self.sde, self.sde.at(t))  # the flow is linear in x and eps, and so are their divergences
        return f * of_x + g * of_eps
