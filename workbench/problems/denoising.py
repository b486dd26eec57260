"""The denoising family: noise schedules, denoisers of any prediction type, time grids, and the problem that holds them.

Notation (arXiv 2011.13456, 2206.00927): x_t = alpha_t x_0 + sigma_t eps, log-SNR lambda_t = log(alpha_t / sigma_t).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from workbench.cost import Network
from workbench.family import Family, register
from workbench.problem import Problem
from workbench.quality import Drawn, Metric, register_metric
from workbench.rng import Rng

register_metric(Metric(
    "label_accuracy", "label accuracy", "", True, 16,
    "share of samples that a classifier reads as asked for"))
register_metric(Metric(
    "frechet_distance", "Frechet distance", "", False, 500,
    "between Gaussians fitted to classifier features of samples and of held-out data; biased up at small n"))
register_metric(Metric(
    "kernel_distance", "kernel distance", "x 1000", False, 144,
    "unbiased squared MMD of classifier features, cubic kernel; may fall below 0 by chance"))
register_metric(Metric(
    "wasserstein_1", "Wasserstein-1 distance", "data units", False, 500,
    "mean distance by which samples must move to follow the true law, along one axis or averaged over axes"))
register_metric(Metric(
    "energy_distance", "energy distance", "data units", False, 800,
    "zero only where samples and held-out data follow one law; works in any dimension"))
register_metric(Metric(
    "nearest_training", "distance to the nearest training sample", "RMS pixel", True, 72,
    "0 where samples are copies of training data; what held-out data has is the mark, more is no better"))

SPACINGS = ("trailing", "leading", "linspace", "log_snr", "karras", "t_quadratic")
FINALS = ("zero", "cleanest")
PHASES = ("t", "rho", "log_rho")
PREDICTIONS = ("eps", "x0", "v", "flow")


class Point(NamedTuple):
    """A noise level: the schedule's own time, and the signal and noise scales there."""

    t: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        if self.sigma == 0 or self.alpha == 0:  # the clean data, or no signal at all
            return math.inf if self.sigma == 0 else -math.inf
        return math.log(self.alpha / self.sigma)


CLEAN = Point(t=0.0, alpha=1.0, sigma=0.0)


class Schedule(Protocol):
    """A noise schedule. `t` is whatever the networks of that schedule are given; `progress` maps it to [0, 1]."""

    @property
    def cleanest(self) -> float: ...  # the t of least noise that the networks know
    def at(self, t: float) -> Point: ...
    def t_at(self, log_snr: float) -> float: ...
    def progress(self, t: float) -> float: ...  # 0 at full noise, 1 at the data
    def times(self, n_steps: int, spacing: str) -> list[float]: ...
    def __hash__(self) -> int: ...  # solvers keep what they computed for a schedule


@dataclass(frozen=True)
class DiscreteSchedule:
    """A table of alpha_bar_t for t = 0..T-1, as diffusers keeps it; between entries log-SNR is linear in t.

    Between the last two it is alpha that is linear, where the last one is 0 (`zero_terminal`).
    """

    alphas_cumprod: tuple[float, ...]

    @classmethod
    def linear(cls, n_train: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
        """The linear schedule of DDPM (arXiv 2006.11239, section 4)."""
        # float32 like diffusers, so that a table made here equals one read from a pipeline's scheduler bit by bit
        betas = torch.linspace(beta_start, beta_end, n_train, dtype=torch.float32)
        return cls(tuple(torch.cumprod(1 - betas, 0).tolist()))

    @classmethod
    def cosine(cls, n_train: int = 1000) -> DiscreteSchedule:
        """The cosine schedule of arXiv 2102.09672, equation 17, its betas at most 0.999."""
        bar = [math.cos((i / n_train + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n_train + 1)]
        return cls(tuple(np.cumprod([1 - min(1 - b / a, 0.999) for a, b in pairwise(bar)]).tolist()))

    def zero_terminal(self) -> DiscreteSchedule:
        """This table with no signal left at its last entry: alpha shifted to 0 there, and scaled to keep its first.

        Networks of such a schedule predict "v" or "x0": the noise alone says nothing about the data there.
        Source: arXiv 2305.08891, algorithm 1.
        """
        first, *_, last = alphas = [math.sqrt(bar) for bar in self.alphas_cumprod]
        return DiscreteSchedule(tuple(((a - last) * (first / (first - last))) ** 2 for a in alphas))

    cleanest = 0.0

    @cached_property
    def _noise(self) -> list[float]:
        """Minus the log-SNR of each entry, which rises."""
        bar = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
        return (0.5 * ((-bar).log1p() - bar.log())).tolist()

    @cached_property
    def _hash(self) -> int:  # of a thousand numbers, wanted at every look into what is kept for a schedule
        return hash(self.alphas_cumprod)

    def __hash__(self) -> int:
        return self._hash

    def at(self, t: float) -> Point:
        if t == int(t):
            bar = self.alphas_cumprod[int(t)]
            return Point(t, math.sqrt(bar), math.sqrt(1 - bar))
        low = int(t)
        if self.alphas_cumprod[low + 1] == 0:
            alpha = (low + 1 - t) * math.sqrt(self.alphas_cumprod[low])
            return Point(t, alpha, math.sqrt(1 - alpha**2))
        a, b = self._noise[low : low + 2]
        return Point(t, *_scales(-(a + (b - a) * (t - low))))

    def t_at(self, log_snr: float) -> float:
        table = self._noise
        if not table[0] - 1e-9 <= -log_snr <= table[-1] + 1e-9:
            raise ValueError(f"log_snr={log_snr:.4g} is outside this schedule, {-table[-1]:.4g} to {-table[0]:.4g}")
        high = min(max(bisect_left(table, -log_snr), 1), len(table) - 1)
        if self.alphas_cumprod[high] == 0:
            return high - _scales(log_snr)[0] / math.sqrt(self.alphas_cumprod[high - 1])
        a, b = table[high - 1 : high + 1]
        return min(max(high - 1 + (-log_snr - a) / (b - a), 0.0), len(table) - 1.0)

    def progress(self, t: float) -> float:
        return 1 - (t + 1) / len(self.alphas_cumprod)

    def times(self, n_steps: int, spacing: str) -> list[float]:
        """Descending times: "trailing", "leading", "linspace" as diffusers' DDIM rounds them, or even in log-SNR."""
        total = len(self.alphas_cumprod)
        if n_steps > total:
            raise ValueError(f"n_steps={n_steps}: this schedule has {total} noise levels")
        if spacing == "trailing":
            # numpy's own way of counting, so that halves round as in diffusers; where it counts one too far, cut
            return (np.arange(total, 0, -total / n_steps)[:n_steps].round() - 1).tolist()
        if spacing == "leading":
            return [float(i * (total // n_steps)) for i in reversed(range(n_steps))]
        if spacing == "linspace":
            return np.linspace(0, total - 1, n_steps).round()[::-1].tolist() if n_steps > 1 else [total - 1.0]
        with_signal(self, self.at(total - 1.0), f"spacing={spacing!r}")
        low, high = -self._noise[-1], -self._noise[0]
        return [self.t_at(low + (high - low) * i / n_steps) for i in range(n_steps)]


@dataclass(frozen=True)
class ContinuousVP:
    """The variance-preserving SDE's schedule (arXiv 2011.13456, appendix C): t in (0, 1], beta linear in t.

    rates(t): the SDE's f and g^2 in dx = f x dt + g dw, so f = d log alpha / dt, g^2 = d sigma^2 / dt - 2 f sigma^2.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    cleanest: float = 1e-3

    def at(self, t: float) -> Point:
        log_alpha = -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        return Point(t, math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha)))

    def t_at(self, log_snr: float) -> float:
        return self._where(math.log1p(math.exp(-2 * log_snr)))

    def _where(self, twice: float) -> float:
        # twice = -2 log alpha is a quadratic in t; the stable form of its positive root
        slope = self.beta_max - self.beta_min
        return 2 * twice / (self.beta_min + math.sqrt(self.beta_min**2 + 2 * slope * twice))

    def rates(self, t: float) -> tuple[float, float]:
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        return -beta / 2, beta

    def progress(self, t: float) -> float:
        return 1 - t

    def times(self, n_steps: int, spacing: str) -> list[float]:
        return _unit_times(self, n_steps, spacing)


@dataclass(frozen=True)
class SubVP(ContinuousVP):
    """The sub-VP SDE's schedule (arXiv 2011.13456, appendix C): the VP SDE's alpha, sigma = 1 - alpha^2."""

    def at(self, t: float) -> Point:
        _, alpha, sigma = super().at(t)
        return Point(t, alpha, sigma**2)

    def t_at(self, log_snr: float) -> float:
        return self._where(2 * math.asinh(math.exp(-log_snr) / 2))  # 1 / alpha - alpha = 2 sinh(-log alpha)

    def rates(self, t: float) -> tuple[float, float]:
        drift, beta = super().rates(t)
        return drift, -beta * math.expm1(4 * math.log(self.at(t).alpha))


@dataclass(frozen=True)
class ContinuousVE:
    """The variance-exploding SDE's schedule (arXiv 2011.13456, appendix C): alpha 1, sigma geometric in t in (0, 1].

    sigma_max should be as large as the largest distance between data (arXiv 2006.09011, technique 1). States at t are
    as large as sigma, up to sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    cleanest: float = 1e-5

    def at(self, t: float) -> Point:
        return Point(t, 1.0, self.sigma_min * (self.sigma_max / self.sigma_min) ** t)

    def t_at(self, log_snr: float) -> float:
        return (-log_snr - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)

    def rates(self, t: float) -> tuple[float, float]:
        return 0.0, 2 * math.log(self.sigma_max / self.sigma_min) * self.at(t).sigma ** 2

    def progress(self, t: float) -> float:
        return 1 - t

    def times(self, n_steps: int, spacing: str) -> list[float]:
        return _unit_times(self, n_steps, spacing)


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path from data to noise (arXiv 2209.03003, 2210.02747): alpha 1 - t, sigma t, t in (0, start].

    Its networks predict "flow", the velocity dx/dt = eps - x0, and DDIM is Euler's method on it. At t = 1 there is no
    signal; with a start just below it serves the samplers too that need some.
    """

    start: float = 1.0
    cleanest: float = 1e-3

    def at(self, t: float) -> Point:
        return Point(t, 1 - t, t)

    def t_at(self, log_snr: float) -> float:
        return 1 / (1 + math.exp(log_snr))

    def progress(self, t: float) -> float:
        return 1 - t

    def times(self, n_steps: int, spacing: str) -> list[float]:
        return _unit_times(self, n_steps, spacing, self.start)


@dataclass(frozen=True)
class EDMSchedule:
    """Noise alone, as EDM has it (arXiv 2206.00364, table 1): alpha 1, sigma t, t in (0, sigma_max]."""

    sigma_max: float = 80.0
    cleanest: float = 0.002

    def at(self, t: float) -> Point:
        return Point(t, 1.0, t)

    def t_at(self, log_snr: float) -> float:
        return math.exp(-log_snr)

    def progress(self, t: float) -> float:
        return 1 - t / self.sigma_max

    def times(self, n_steps: int, spacing: str) -> list[float]:
        return _unit_times(self, n_steps, spacing, self.sigma_max)


def grid(schedule: Schedule, n_steps: int, spacing: str, final: str = "zero") -> list[Point]:
    """n_steps + 1 noise levels, full noise first.

    spacing is one of SPACINGS: diffusers' three, even in log-SNR, "karras" (arXiv 2206.00364, equation 5, rho 7) and
    "t_quadratic" (arXiv 2204.13902). final: the last level is the clean data (sigma "zero") or the schedule's
    "cleanest", which "linspace" and "leading" reach on even steps.
    Raises ValueError where the schedule has fewer levels than steps, and for "log_snr" and "karras" where it starts
    without signal.
    """
    return list(_grid(schedule, n_steps, spacing, final))


@lru_cache(maxsize=256)
def _grid(schedule: Schedule, n_steps: int, spacing: str, final: str) -> tuple[Point, ...]:
    if spacing in ("karras", "t_quadratic"):
        return _power_grid(schedule, n_steps, *(("rho", 7.0) if spacing == "karras" else ("t", 2.0)), final)
    if final == "zero":
        return (*map(schedule.at, schedule.times(n_steps, spacing)), CLEAN)
    if spacing in ("linspace", "leading"):  # these end at the cleanest level by themselves
        times = schedule.times(n_steps + 1, spacing)[:-1]
    else:
        times = schedule.times(n_steps, spacing)
    if times[-1] <= schedule.cleanest + 1e-9:
        raise ValueError(f"n_steps={n_steps}: with spacing={spacing!r} the cleanest level comes before the last step, "
                         f"expected fewer steps or final='zero'")
    return tuple(map(schedule.at, (*times, schedule.cleanest)))


def noisiest(schedule: Schedule) -> Point:
    """The schedule's level of most noise, where trajectories start."""
    return schedule.at(schedule.times(1, "trailing")[0])


def prior_std(start: Point) -> float:
    """The standard deviation of the noise that a trajectory starts from at the level `start`.

    1 where the schedule keeps the variance of data of unit variance at 1 or less (VP, sub-VP, flows), whatever the
    level; sigma where noise is added to the data as it is (VE, EDM). Source: arXiv 2011.13456, appendix C.
    """
    return 1.0 if start.alpha**2 + start.sigma**2 <= 1 + 1e-6 else start.sigma


def with_signal(schedule: Schedule, start: Point, who: str) -> None:
    """Raises ValueError where there is no signal at the level that a trajectory starts from: `who` cannot start there.

    At alpha = 0 the log-SNR is minus infinity and sigma / alpha infinite, so nothing can be even in either, and a step
    in them has no length. Only the data estimate is known there: DDIM, and what falls back on it, goes on from it.
    """
    if start.alpha == 0:
        raise ValueError(f"{who}: {type(schedule).__name__} has no signal at t = {start.t:g} (alpha 0, log-SNR minus "
                         "infinity), and this cannot start there: expected a start at alpha above 0, as "
                         "RectifiedFlow(start=0.999) has, or what starts from the data estimate alone: ddim, dpmpp_2m, "
                         "usf, dpm_solver (multistep) and unipc on 'x0', with steps even in time")


def power_grid(schedule: Schedule, n_steps: int, phase: str, power: float, final: str = "zero") -> list[Point]:
    """n_steps + 1 levels, even in phase ** (1 / power) from the noisiest to the cleanest level.

    phase: time "t", "rho" = sigma / alpha, or "log_rho" (power has no meaning there). With final "zero" the first
    n_steps levels span that range and the clean data (sigma 0) follows. Source: arXiv 2204.13902, appendix H.3.
    Raises ValueError for another phase, and for "rho" and "log_rho" where the schedule starts without signal.
    """
    return list(_power_grid(schedule, n_steps, phase, power, final))


@lru_cache(maxsize=256)
def _power_grid(schedule: Schedule, n_steps: int, phase: str, power: float, final: str) -> tuple[Point, ...]:
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r}: expected one of {', '.join(PHASES)}")
    ends = noisiest(schedule), schedule.at(schedule.cleanest)
    if phase != "t":
        with_signal(schedule, ends[0], f"phase={phase!r}")
    n_levels = n_steps if final == "zero" else n_steps + 1
    shares = [i / (n_levels - 1) for i in range(1, n_levels - 1)]
    if phase == "log_rho":
        a, b = (-p.log_snr for p in ends)
        inner = [schedule.t_at(-(a + (b - a) * s)) for s in shares]
    else:
        a, b = ((p.t if phase == "t" else math.exp(-p.log_snr)) ** (1 / power) for p in ends)
        values = [(a + (b - a) * s) ** power for s in shares]
        inner = values if phase == "t" else [schedule.t_at(-math.log(v)) for v in values]
    levels = (ends[0], *map(schedule.at, inner), ends[1])[:n_levels]
    return (*levels, CLEAN) if final == "zero" else levels


def split_steps(fractions: Sequence[float], n_steps: int) -> tuple[int, ...]:
    """Steps per model: boundaries are floor(cumsum(fractions) * n_steps), the last model takes what is left.

    fractions: one per model, each in [0, 1], together 1. Raises ValueError otherwise.
    """
    if any(not 0 <= f <= 1 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions={tuple(fractions)}: expected numbers in [0, 1] that sum to 1")
    ends, total = [0], 0.0
    for fraction in fractions[:-1]:
        total += fraction
        ends.append(min(math.floor(total * n_steps + 1e-9), n_steps))
    ends.append(n_steps)
    return tuple(b - a for a, b in pairwise(ends))


@dataclass(frozen=True)
class Denoiser:
    """A network with what is needed to read its output.

    network(x (B, *shape), t (B,), labels (B,) or None) -> (B, *shape), what `prediction` says: "eps", "x0",
    "v" = alpha eps - sigma x0 (arXiv 2202.00512), which needs alpha^2 + sigma^2 = 1, or "flow", the velocity eps - x0
    of a rectified flow (arXiv 2209.03003), which needs alpha + sigma = 1.
    schedule is the one that the network was trained on; null_label is the label that means "no label", if it has one.
    guidance_rescale: the share of a guided output that is brought back to the standard deviation of the conditional one
    (arXiv 2305.08891, equations 15 and 16).
    Raises ValueError for another prediction, or one that the schedule has not.
    """

    name: str
    network: Network
    schedule: Schedule
    prediction: str = "eps"
    null_label: int | None = None
    module: Any = field(default=None, compare=False, repr=False)  # the torch module behind network, where there is one
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"{self.name}: prediction={self.prediction!r}: expected one of {', '.join(PREDICTIONS)}")
        power = {"v": 2, "flow": 1}.get(self.prediction)
        if power is not None:
            ends = noisiest(self.schedule).t, self.schedule.cleanest
            for point in map(self.schedule.at, (*ends, sum(ends) / 2)):
                if abs(point.alpha**power + point.sigma**power - 1) > 1e-6:
                    rule, other = ("alpha^2 + sigma^2", "flow") if power == 2 else ("alpha + sigma", "v")
                    raise ValueError(f"{self.name}: prediction={self.prediction!r} needs {rule} = 1, which "
                                     f"{type(self.schedule).__name__} has not (alpha {point.alpha:.4g}, sigma "
                                     f"{point.sigma:.4g}): expected eps, x0, or {other!r} if that is its kind")

    def predict(self, x: Tensor, here: Point | Sequence[Point], on: Schedule, labels: Tensor | None, guidance: float
                ) -> tuple[Tensor, Tensor]:
        """The estimates (x0, eps) of the data and the noise in x (B, *shape) at the point `here` of schedule `on`.

        here: of all rows, or a list with the point of each row. Evaluates and raises what `estimate` does.
        """
        found = self.estimate(x, here, on, labels, guidance)
        given = [here] if isinstance(here, Point) else here
        alpha, sigma = _scale([p.alpha for p in given], x), _scale([p.sigma for p in given], x)
        if self.prediction == "eps":
            return data_in(x, found, alpha, sigma), found
        return found, noise_in(x, found, alpha, sigma)

    def estimate(self, x: Tensor, here: Point | Sequence[Point], on: Schedule, labels: Tensor | None, guidance: float,
                 times: Mapping[float, Tensor] | None = None) -> Tensor:
        """The estimate that the network gives by itself: of the noise where it predicts "eps", else of the data.

        Arguments and result as in `predict`; x = alpha x0 + sigma eps gives the other one (`data_in`, `noise_in`).
        times: those of `time_rows`, for the levels that have been made ready.

        A network of another schedule is asked at its own time of equal log-SNR, with x rescaled to its own signal
        scale, so models of different schedules and prediction types are joined and never silently mixed.
        Evaluates B rows, or 2 B where guidance is not 1 and there are labels (classifier-free guidance,
        arXiv 2207.12598: unconditional + guidance * (conditional - unconditional)).
        Raises ValueError where there is no null label for guidance, or the point has alpha 0 and the network predicts
        "eps", or is of a schedule that has signal everywhere.
        """
        given = [here] if isinstance(here, Point) else here
        if self.prediction == "eps" and 0 in [p.alpha for p in given]:
            raise ValueError(f"{self.name}: prediction='eps' says nothing about the data where alpha is 0, as "
                             f"{type(on).__name__} has it at full noise: expected a network that predicts x0, v or "
                             "flow, or a start at alpha above 0 (spacing='leading', RectifiedFlow(start=0.999))")
        points, own = given, x
        if self.schedule is not on and self.schedule != on:
            points = [self.level(p, on) for p in given]
            own = x * _scale([p.alpha / g.alpha if g.alpha else p.sigma / g.sigma
                              for p, g in zip(points, given, strict=True)], x)
        told = times.get(points[0].t) if times and len(points) == 1 else None
        if told is None:
            told = _times([p.t for p in points], x)
        if labels is not None and guidance != 1:
            raw = self._guided(own, told, labels, guidance)
        else:
            raw = self.network(own, told, labels)
        if self.prediction == "v":
            return mixed(_scale([p.alpha for p in points], x), own, -_scale([p.sigma for p in points], x), raw)
        if self.prediction == "flow":  # x0 = alpha x0 + sigma eps - sigma (eps - x0)
            return mixed(1.0, own, -_scale([p.sigma for p in points], x), raw)
        return raw

    def _guided(self, x: Tensor, times: Tensor, labels: Tensor, guidance: float) -> Tensor:
        if self.null_label is None:
            raise ValueError(f"guidance={guidance}: {self.name} has no null label, only 1 is allowed")
        both = torch.cat((torch.full_like(labels, self.null_label), labels))
        without, given = self.network(torch.cat((x, x)), times.repeat(2), both).chunk(2)
        raw = torch.lerp(without, given, guidance)
        if self.guidance_rescale:
            inner = tuple(range(1, raw.ndim))
            spread = given.std(inner, keepdim=True) / raw.std(inner, keepdim=True)
            raw = torch.lerp(raw, raw * spread, self.guidance_rescale)
        return raw

    def level(self, point: Point, on: Schedule) -> Point:
        """The level at which the network is asked for `point` of schedule `on`: its own of the same log-SNR.

        Raises ValueError where it has none.
        """
        if self.schedule is on or self.schedule == on:
            return point
        if point.alpha > 0:
            return _level(self.schedule, point.log_snr)
        own = noisiest(self.schedule)
        if own.alpha > 0:
            raise ValueError(f"{self.name}: asked at alpha 0 of {type(on).__name__}, but its own schedule, "
                             f"{type(self.schedule).__name__}, has no noisier level than log-SNR {own.log_snr:.4g}: "
                             "expected a start at alpha above 0")
        return own


@dataclass(frozen=True, kw_only=True)
class Denoising(Problem):
    """A denoising problem: models of one data set, cheapest first, and the judge of what is made with them.

    What every problem has is said there. shape: of one sample's state. labels(n): the label of each of n samples, or
    None; sample i's never depends on n, and they are the cases that the judge sees. flops: {model: per row}.
    data(n, seed) -> (n, *shape), n samples of the true law, where it can be drawn from.
    is_latent: states are an autoencoder's codes, of no known range.
    tell(points, owners): called by a method whose steps do not depend on the data, before it asks a network: the points
    that its steps lead from and to, one more than steps, and the model that takes each step.
    """

    schedule: Schedule
    models: tuple[Denoiser, ...]
    shape: tuple[int, ...]
    labels: Callable[[int], Tensor | None]
    data: Callable[[int, int], Tensor] | None = None
    is_latent: bool = False
    tell: Callable[[Sequence[Point], Sequence[Denoiser]], object] = lambda points, owners: None
    family: ClassVar[str] = "denoising"
    sharing: ClassVar[str] = "batch"  # a row's output follows from that row alone

    def cases(self, seed: int, n: int) -> Tensor | None:
        """The samples' labels."""
        return self.labels(n)

    def drawn(self, cases: Tensor | None, n: int) -> Drawn:
        """Labels come in turn, so samples are stratified by them."""
        return Drawn(n, cases)

    def start(self, rng: Rng, at: Point | None = None) -> Tensor:
        """The noise that a run starts from at the level `at`, by default the noisiest: (n_samples, *shape).

        Normal with the standard deviation `prior_std` of that level.
        """
        std = prior_std(noisiest(self.schedule) if at is None else at)
        noise = rng.normal(self.shape, self.dtype, self.device)
        return noise if std == 1 else std * noise

    def branches(self, guidance: float = 1.0) -> int:
        """Network rows per sample and evaluation: 2 under classifier-free guidance, else 1."""
        return 2 if guidance != 1 and self.labels(1) is not None else 1

    def sizes(self, knobs: Mapping[str, Any]) -> dict[str, int]:
        """branches: network rows per sample and evaluation."""
        return {"branches": self.branches(knobs.get("guidance", 1.0))}

    def wrapped(self, wrap: Callable[[str, Network], Network]) -> Denoising:
        """This problem with each network replaced by wrap(model name, network)."""
        return replace(self, models=tuple(replace(m, network=wrap(m.name, m.network)) for m in self.models))


def mixed(a: float | Tensor, x: Tensor, b: float | Tensor, y: Tensor) -> Tensor:
    """a x + b y, for tensors alike (B, *shape) and numbers a and b, or a column (B, 1, ...) of them."""
    scaled = x if isinstance(a, float) and a == 1 else a * x
    return torch.addcmul(scaled, b, y) if isinstance(b, Tensor) else torch.add(scaled, y, alpha=b)


def data_in(x: Tensor, eps: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """The data estimate (B, *shape) that goes with the noise estimate eps of x = alpha x0 + sigma eps (B, *shape)."""
    return mixed(1 / alpha, x, -sigma / alpha, eps)


def noise_in(x: Tensor, x0: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """The noise estimate (B, *shape) that goes with the data estimate x0 of x = alpha x0 + sigma eps (B, *shape)."""
    return mixed(1 / sigma, x, -alpha / sigma, x0)


def time_rows(points: Iterable[Point], like: Tensor) -> dict[float, Tensor]:
    """{t: the times (B,) that a network is told at that point with states like (B, *shape)}, all made at once."""
    times, found = [p.t for p in points], dict[float, Tensor]()
    for group in ([t for t in times if t == int(t)], [t for t in times if t != int(t)]):
        if group:
            rows = [[t] * like.shape[0] for t in group]
            made = torch.tensor(rows, dtype=_time_type(group, like), device=like.device)
            found.update(zip(group, made.unbind(), strict=True))
    return found


def agreement(problem: Denoising, points: Sequence[Point], rng: Rng, guidance: float = 1.0) -> dict[str, list[float]]:
    """Cosine similarity of each model's noise estimate with the best model's, at points[:-1] of its own trajectory.

    The trajectory is the best model's (DDIM over `points`); values are means over rng.n_samples samples, one per point,
    keyed by the model's name. Costs (n_models * n_steps) * branches evaluations per sample.
    Source: the similarity that T-Stitch rests on, arXiv 2402.14167, section 3.
    """
    x, labels = problem.start(rng, points[0]), problem.cases_of(rng)
    found: dict[str, list[float]] = {m.name: [] for m in problem.models}
    with torch.no_grad():
        for here, there in pairwise(points):
            estimates = {m.name: m.predict(x, here, problem.schedule, labels, guidance) for m in problem.models}
            x0, eps = estimates[problem.models[-1].name]
            for name, (_, other) in estimates.items():
                cosines = torch.cosine_similarity(other.flatten(1), eps.flatten(1), dim=1)
                found[name].append(float(cosines.mean()))
            x = there.alpha * x0 + there.sigma * eps
    return found


def _unit_times(schedule: Schedule, n_steps: int, spacing: str, top: float = 1.0) -> list[float]:
    """`Schedule.times` where t runs from `top` (full noise) down to schedule.cleanest, and 0 is the data."""
    cleanest = schedule.cleanest
    if spacing == "trailing":
        return [top * (1 - i / n_steps) for i in range(n_steps)]
    if spacing == "leading":
        return [cleanest + (top - cleanest) * (n_steps - 1 - i) / n_steps for i in range(n_steps)]
    if spacing == "linspace":
        return [top + (cleanest - top) * i / max(n_steps - 1, 1) for i in range(n_steps)]
    with_signal(schedule, schedule.at(top), f"spacing={spacing!r}")
    low, high = schedule.at(top).log_snr, schedule.at(cleanest).log_snr
    return [schedule.t_at(low + (high - low) * i / n_steps) for i in range(n_steps)]


def _scales(log_snr: float) -> tuple[float, float]:
    return 1 / math.sqrt(1 + math.exp(-2 * log_snr)), 1 / math.sqrt(1 + math.exp(2 * log_snr))


def _scale(values: Sequence[float], like: Tensor) -> float | Tensor:
    """The one value for all rows, or a column of one for each row of `like` (B, *shape)."""
    if len(values) == 1:
        return values[0]
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


@lru_cache(maxsize=8192)
def _level(schedule: Schedule, log_snr: float) -> Point:
    return schedule.at(schedule.t_at(log_snr))


def _times(values: Sequence[float], like: Tensor) -> Tensor:
    """The time of each row of `like`, (B,), of one value or one for each."""
    dtype = _time_type(values, like)
    if len(values) == 1:
        return torch.full(like.shape[:1], values[0], dtype=dtype, device=like.device)
    return torch.tensor(values, dtype=dtype, device=like.device)


def _time_type(values: Sequence[float], like: Tensor) -> torch.dtype:
    """Integers where all are a table's entries, as networks expect them."""
    return torch.int64 if all(t == int(t) for t in values) else like.dtype


def _told(problem: Any, states: Sequence[Tensor], infos: Sequence[Mapping[str, Any]]) -> None:
    """Each step tells the data estimate that it was made with."""
    for state, info in zip(states, infos, strict=True):
        assert info["x0"].shape == state.shape == (2, *problem.shape)


_MIXTURES = "workbench.problems.mixtures"
register(Family(
    Denoising.family, "n_steps", lambda problem, knobs: tuple(problem.shape),
    [(f"{_MIXTURES}:two_modes", {}), (f"{_MIXTURES}:eight_modes", {}), (f"{_MIXTURES}:two_dim", {}),
     (f"{_MIXTURES}:two_dim", {"kind": "pinwheel"}), (f"{_MIXTURES}:two_dim", {"has_labels": True}),
     ("workbench.problems.digits:digits", {}), ("workbench.problems.glyphs:glyphs", {})], _told,
    question="How few steps, and how small a model, until pictures suffer?", sizes=("branches",)))
