"""Score-based sampling: reverse-time SDEs by predictors, Langevin correctors and conditions on what is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from workbench.knob import Knob
from workbench.methods.denoising._march import Advance, Evaluated, march
from workbench.methods.denoising.ddim import Guidance, Steps, Which
from workbench.problems.denoising import (
    CLEAN,
    ContinuousVE,
    ContinuousVP,
    Denoiser,
    Denoising,
    Point,
    SubVP,
    mixed,
    noisiest,
)
from workbench.registry import Step, method
from workbench.rng import Rng

SDES = ("vp", "sub_vp", "ve")
PREDICTORS = ("none", "euler_maruyama", "reverse_diffusion", "ancestral")
CORRECTORS = ("none", "langevin")
LENGTHS = ("norms", "sigma")
Sde = ContinuousVP | ContinuousVE  # SubVP is a ContinuousVP
Noise = Callable[[], Tensor]

SdeName = Annotated[str, Knob(choices=SDES, help="the diffusion that is reversed")]
SigmaMax = Annotated[float, Knob(low=1.0, high=378.0, soft=(5, 100), scale="log", needs={"sde": "ve"},
                                 help="the VE SDE's largest noise; about the largest distance between data")]
End = Annotated[float, Knob(low=1e-5, high=0.1, scale="log", unit="of the time range",
                            help="time of the last noise level; the scores below are not asked for")]
Predictor = Annotated[str, Knob(choices=PREDICTORS, small="reverse_diffusion",
                                help="how a step goes from one noise level to the next")]
Corrector = Annotated[str, Knob(choices=CORRECTORS, small="langevin",
                                help="how a state is improved at its noise level, before the predictor")]
Corrections = Annotated[int, Knob(low=1, high=10, soft=(1, 4), needs={"corrector": "langevin"}, unit="steps",
                                  help="Langevin steps per noise level")]
Snr = Annotated[float, Knob(low=0.01, high=1.0, soft=(0.01, 0.4), step=0.005, needs={"corrector": "langevin"},
                            help="length of a Langevin step's score part over that of its noise")]
Length = Annotated[str, Knob(choices=LENGTHS, needs={"corrector": "langevin"},
                             help="noise over score length: each sample's own norms, or the noise level itself")]
Denoise = Annotated[bool, Knob(help="leave the last update's fresh noise out")]


@dataclass(frozen=True)
class Condition:
    """What is known of the data, as two hooks on the sampler; either may be absent.

    gradient(x (B, *shape), here) -> (B, *shape): that of log p_t(y | x) at the level `here`, added to the score.
    impose(x, at, noise) -> (B, *shape): x with its known part replaced by a fresh draw of it at the level `at`, which
    takes its noise from noise(); called on the start and after every update of predictor and corrector.
    """

    gradient: Callable[[Tensor, Point], Tensor] | None = None
    impose: Callable[[Tensor, Point, Noise], Tensor] | None = None


class Path(NamedTuple):
    """An SDE and the part (first, last) of its time range in which a model can be asked for the score."""

    sde: Sde
    first: float
    last: float


def flow_rates(sde: Sde, at: Point) -> tuple[float, float]:
    """f and g^2 / (2 sigma) of the probability flow dx/dt = f x + g^2 / (2 sigma) eps at a level."""
    f, squared = sde.rates(at.t)
    return f, squared / (2 * at.sigma)


def sde_path(model: Denoiser, sde: str, t_end: float, sigma_max: float = 50.0) -> Path:
    """The SDE of that name (one of SDES, the paper's constants) and its times from full noise to t_end for `model`.

    The model is asked at equal log-SNR, so its own schedule must cover what it is asked: the VE SDE's sigma_max is at
    most the model's noisiest sigma / alpha, VP and sub-VP start no noisier than the model, and all end no cleaner than
    it. Raises ValueError for another name.
    """
    if sde not in SDES:
        raise ValueError(f"sde={sde!r}: expected one of {', '.join(SDES)}")
    most, least = noisiest(model.schedule).log_snr, model.schedule.at(model.schedule.cleanest).log_snr
    made: Sde = {"vp": ContinuousVP, "sub_vp": SubVP}[sde]() if sde != "ve" else ContinuousVE(
        sigma_max=min(sigma_max, math.exp(-most)))
    first = 1.0 if made.at(1.0).log_snr >= most else made.t_at(most)
    last = t_end if made.at(t_end).log_snr <= least else made.t_at(least)
    return Path(made, first, last)


def levels(path: Path, n_steps: int) -> list[Point]:
    """n_steps levels even in time from path.first to path.last, and the clean data."""
    share = (path.last - path.first) / max(n_steps - 1, 1)
    return [*(path.sde.at(path.first + share * i) for i in range(n_steps)), CLEAN]


def pc_step(x: Tensor, step: Advance, *, predictor: str = "reverse_diffusion", n_corrections: int = 0,
            snr: float = 0.16, length: str = "norms", denoise: bool = True, condition: Condition | None = None
            ) -> tuple[Tensor, Evaluated]:
    """n_corrections Langevin steps at step.here, then the predictor to step.there: x (B, *shape) -> x there.

    The paper's discrete predictors need the two levels only. With the transition x_here = a x_there + G z of the
    forward SDE, a = alpha_here / alpha_there and G^2 = sigma_here^2 - a^2 sigma_there^2, they are
    reverse diffusion: (2 - a) x + G^2 score + G z, and ancestral: (x + G^2 score) / a plus noise, G z for VP and
    G sigma_there / sigma_here z for VE. Euler-Maruyama takes the rates of step.schedule:
    x - (f x - g^2 score) dt + g sqrt(dt) z. Corrector: x + e score + sqrt(2 e) z with e = 2 (a snr r)^2; with "norms"
    r is |z| / |score|, each sample's own and not means over the batch; with "sigma" it is step.here.sigma (annealed
    Langevin dynamics, arXiv 1907.05600).
    In the last step, denoise leaves out the noise of the last update. Costs n_corrections evaluations per row, and 1
    more unless predictor is "none". Raises ValueError for "ancestral" with sub-VP, "euler_maruyama" on a schedule
    without rates, and where there is nothing to do.
    Source: arXiv 2011.13456, appendices E (reverse diffusion), F (ancestral) and G (correctors, algorithms 4 and 5).
    """
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor={predictor!r}: expected one of {', '.join(PREDICTORS)}")
    if length not in LENGTHS:
        raise ValueError(f"length={length!r}: expected one of {', '.join(LENGTHS)}")
    sde = step.schedule
    if predictor == "ancestral" and isinstance(sde, SubVP):
        raise ValueError("predictor='ancestral': not defined for sde='sub_vp', only for 'vp' and 've'")
    if predictor == "none" and n_corrections == 0:
        raise ValueError("predictor='none' with corrector='none': there is nothing to do, expected at least one")
    here, there, is_last = step.here, step.there, step.n_left == 1
    impose = condition.impose if condition is not None else None
    ratio = here.alpha / there.alpha
    last_correction = n_corrections - 1 if predictor == "none" and is_last and denoise else -1
    for i in range(n_corrections):
        now, z = _asked(x, step, condition), step.noise()
        root = ratio * snr * here.sigma * (_norms(z) / _norms(now.eps) if length == "norms" else 1.0)
        x = mixed(1.0, x, -2 / here.sigma * root * root, now.eps)
        if i != last_correction:
            x = mixed(1.0, x, 2 * root, z)
        if impose is not None and not (predictor == "none" and i == n_corrections - 1):
            x = impose(x, here, step.noise)
    if predictor != "none":
        now = _asked(x, step, condition)
        if predictor == "euler_maruyama":
            if not isinstance(sde, Sde):
                raise ValueError(f"predictor='euler_maruyama': {type(sde).__name__} is not the schedule of an SDE")
            dt, (drift, squared) = here.t - there.t, sde.rates(here.t)
            x = mixed(1 - dt * drift, x, -dt * squared / here.sigma, now.eps)
            fresh = math.sqrt(squared * dt)
        else:
            squared = max(here.sigma**2 - (ratio * there.sigma) ** 2, 0.0)
            fresh = math.sqrt(squared)
            if predictor == "reverse_diffusion":
                x = mixed(2 - ratio, x, -squared / here.sigma, now.eps)
            else:
                x = mixed(1 / ratio, x, -squared / here.sigma / ratio, now.eps)
                fresh *= there.sigma / here.sigma if isinstance(sde, ContinuousVE) else 1.0
        if not (is_last and denoise):
            x = torch.add(x, step.noise(), alpha=fresh)
    return x if impose is None else impose(x, there, step.noise), now


def pc_sample(problem: Denoising, rng: Rng, *, n_steps: int = 20, sde: str = "vp", predictor: str = "reverse_diffusion",
              n_corrections: int = 0, snr: float = 0.16, length: str = "norms", denoise: bool = True,
              t_end: float = 1e-3, sigma_max: float = 50.0, guidance: float = 1.0, model: Denoiser | None = None,
              condition: Condition | None = None) -> Iterator[Step]:
    """The steps of `score_sde` with its knobs' meaning, under a condition if there is one.

    model: that of the problem's models which is asked (default: the best). Raises what `pc_step` and `sde_path` raise.
    """
    model = problem.models[-1] if model is None else model
    path = sde_path(model, sde, t_end, sigma_max)
    points = levels(path, n_steps)

    scaled = replace(problem, schedule=path.sde)

    def begin(rng: Rng) -> Tensor:
        x = scaled.start(rng, points[0])
        if condition is None or condition.impose is None:
            return x
        return condition.impose(x, points[0], lambda: rng.normal(problem.shape, problem.dtype, problem.device))

    yield from march(begun(scaled, path.sde, begin), rng, points, [model] * n_steps, pc_step, guidance=guidance,
                     predictor=predictor, n_corrections=n_corrections, snr=snr, length=length, denoise=denoise,
                     condition=condition)


def begun(problem: Denoising, sde: Sde, begin: Callable[[Rng], Tensor]) -> Denoising:
    """The problem on the schedule of `sde`, its trajectories starting from begin(rng), (n_samples, *shape)."""
    given: dict[str, Any] = {f.name: getattr(problem, f.name) for f in fields(Denoising)} | {"schedule": sde}
    return _Begun(**given, begin=begin)


def corrections(corrector: str, n_corrector: int) -> int:
    """Langevin steps per noise level."""
    return n_corrector if corrector == "langevin" else 0


def nfe(n_steps: int, predictor: str, corrector: str, n_corrector: int) -> int:
    """Evaluations per sample, guidance apart: n_steps times one per Langevin step and one for a predictor."""
    return n_steps * (corrections(corrector, n_corrector) + (predictor != "none"))


@method(version=1, source="Score SDE, arXiv 2011.13456, alg. 1 to 5",
        cost="nfe(n_steps, predictor, corrector, n_corrector) * branches")
def score_sde(problem: Denoising, rng: Rng, *, n_steps: Steps = 20, sde: SdeName = "vp",
              predictor: Predictor = "reverse_diffusion", corrector: Corrector = "none", n_corrector: Corrections = 1,
              snr: Snr = 0.16, length: Length = "norms", denoise: Denoise = True, t_end: End = 1e-3,
              sigma_max: SigmaMax = 50.0, guidance: Guidance = 1.0, model: Which = "best") -> Iterator[Step]:
    """Predictor-corrector sampling of a reverse-time SDE: any predictor with any corrector, on any problem.

    State (n_samples, *problem.shape) on the SDE's own scale: up to sigma_max for VE. The levels are n_steps times, even
    from 1 to t_end, and then the data; there denoise leaves the last update's noise out. As in the authors' code a
    level's corrections come before its predictor. In that code each Euler-Maruyama step is 1 / n_steps long, here as
    long as the interval that it crosses. The discrete predictors take the forward SDE's exact transition; for VP that
    is the paper's where the levels are those of its table, and it holds for few levels too.
    A model serves any SDE: it is asked at its own time of equal log-SNR, with the state rescaled. Levels beyond those
    that its schedule covers are cut off: sigma_max and the first time at its noisiest level, t_end at its cleanest.
    The corrector's step follows each sample's own norms (the authors' code takes batch means), so no sample depends on
    the batch. In a few dimensions the score's norm may be near zero and such a step far too long: "norms" is for
    images. length "sigma" takes the noise level in place of the ratio of norms, and serves any dimension.
    Cost: ``nfe(n_steps, predictor, corrector, n_corrector) * branches`` evaluations per sample, where branches is 2
    with guidance and 1 without.
    Raises ValueError for the ancestral predictor with sub-VP, where neither predictor nor corrector is chosen, and
    where guidance needs a null label that is not there.
    """
    yield from pc_sample(
        problem, rng, n_steps=n_steps, sde=sde, predictor=predictor, n_corrections=corrections(corrector, n_corrector),
        snr=snr, length=length, denoise=denoise, t_end=t_end, sigma_max=sigma_max, guidance=guidance,
        model=problem.models[-1 if model == "best" else 0])


@dataclass(frozen=True)
class _Begun(Denoising):
    """A problem with another start than noise alone."""

    begin: Callable[[Rng], Tensor] | None = None

    def start(self, rng: Rng, at: Point | None = None) -> Tensor:
        assert self.begin is not None
        return self.begin(rng)


def _asked(x: Tensor, step: Advance, condition: Condition | None) -> Evaluated:
    """The evaluation of x at step.here under the condition; its score is -eps / sigma."""
    now = step.denoise(x, step.here)
    if condition is None or condition.gradient is None:
        return now
    return Evaluated(step.here, x, eps=now.eps - step.here.sigma * condition.gradient(x, step.here))


def _norms(x: Tensor) -> Tensor:
    """The length of each row of x (B, *shape), as (B, 1, ..)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
