"""The unified solver as a diffusers scheduler: any preset, or a plan that a search found, inside stock pipelines.

    pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, preset="unipc_bh2")
    pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, plan=Plan.load("plan.json"))
    pipe("a red fox", num_inference_steps=6)                       # a plan has its own number of steps
    pipe.scheduler = UnifiedSolverScheduler.from_config(           # Stable Diffusion 3, Flux
        pipe.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction")

Source: USF, arXiv 2312.07243, section 3. Known differences from diffusers' own schedulers:
- the solver is named by `preset`; solver_order, solver_type and algorithm_type of a config are not looked at;
- lower_order_final holds at any number of steps, as in UniPC; DPM-Solver and DEIS obey it below 15 only;
- final_sigmas_type "zero" works for every preset (DPM-Solver on noise and UniPC bh1 refuse it or give nan), and holds
  for DEIS as well, whose own scheduler ends at the least noise of the table;
- every step goes to the next timestep, where DDIM's scheduler subtracts a constant stride;
- coefficients are computed in double precision and applied in the sample's (half is computed in single);
- stochastic variants, thresholding, and sigmas by Lu, exponential or beta are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from torch import Tensor

from workbench.methods.denoising._march import MEMORY, Evaluated
from workbench.methods.denoising.usf import corrected, predicted
from workbench.plan import PRESETS, Decision, Plan, preset_decisions
from workbench.problems.denoising import CLEAN, DiscreteSchedule, Point, Schedule, power_grid

__all__ = ["UnifiedSolverScheduler"]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
SPACINGS = ("linspace", "leading", "trailing")
_REFUSED = ("thresholding", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclass(frozen=True)
class _Flow:
    """Rectified flow as a schedule: t is n_train times sigma, alpha = 1 - sigma."""

    n_train: int
    cleanest = 0.0

    def at(self, t: float) -> Point:
        return Point(t, 1 - t / self.n_train, t / self.n_train)

    def t_at(self, log_snr: float) -> float:
        return self.n_train / (1 + math.exp(log_snr))

    def progress(self, t: float) -> float:
        return 1 - t / self.n_train

    def times(self, n_steps: int, spacing: str) -> list[float]:
        return [self.n_train * (1 - i / n_steps) for i in range(n_steps)]


class UnifiedSolverScheduler(SchedulerMixin, ConfigMixin):
    """Takes the place of any diffusers scheduler. Each evaluation of a denoiser is one call of `step`.

    preset: one of workbench.plan.PRESETS. plan: a Plan, or its JSON text, instead; its times are the model's timesteps
    (1000 sigma for a flow), and num_inference_steps must be its number of steps. A step whose corrector is implicit
    has two entries in `timesteps`, for its two evaluations. The other arguments are those of diffusers' schedulers of
    the same names. All are saved and loaded (save_pretrained, from_pretrained, from_config), the plan with the rest.
    Raises ValueError that names the argument.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012  (as every diffusers scheduler has it)
    order = 1

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Any = None, prediction_type: str = "epsilon",
        preset: str = "dpmpp_2m", plan: Any = None, lower_order_final: bool = True, timestep_spacing: str = "linspace",
        steps_offset: int = 0, final_sigmas_type: str = "zero", use_karras_sigmas: bool = False,
        rescale_betas_zero_snr: bool = False, use_flow_sigmas: bool = False, shift: float = 1.0,
        flow_shift: float | None = None, use_dynamic_shifting: bool = False, time_shift_type: str = "exponential",
        thresholding: bool = False, use_lu_lambdas: bool = False, use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
    ) -> None:
        for name, allowed in (("prediction_type", PREDICTION_TYPES), ("timestep_spacing", SPACINGS),
                              ("final_sigmas_type", ("zero", "sigma_min")), ("preset", tuple(PRESETS)),
                              ("time_shift_type", ("exponential", "linear")),
                              ("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"))):
            if self.config[name] not in allowed:
                raise ValueError(f"{name}={self.config[name]!r}: expected one of {', '.join(allowed)}")
        for name in _REFUSED:
            if self.config[name]:
                raise ValueError(f"{name}=True: this scheduler has it not, expected False")
        if (prediction_type == "flow_prediction") != use_flow_sigmas:
            raise ValueError(f"prediction_type={prediction_type!r}, use_flow_sigmas={use_flow_sigmas}: expected both "
                             "of a flow or neither")
        if use_flow_sigmas and (final_sigmas_type != "zero" or use_karras_sigmas):
            raise ValueError(f"final_sigmas_type={final_sigmas_type!r}, use_karras_sigmas={use_karras_sigmas}: a flow "
                             "ends at the data, on sigmas of its own")
        if isinstance(plan, Plan):
            self.register_to_config(plan=plan.to_json())
        self.plan = plan if plan is None or isinstance(plan, Plan) else Plan.from_json(plan)
        self.betas = _betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
                            rescale_betas_zero_snr)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        if rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24  # as diffusers, so that the largest sigma is finite
        self.schedule: Schedule = (_Flow(num_train_timesteps) if use_flow_sigmas
                                   else DiscreteSchedule(tuple(self.alphas_cumprod.tolist())))
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._points: list[Point] = []
        self._decisions: tuple[Decision, ...] = ()
        self._entries: list[int] = []
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._past: list[Evaluated] = []

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def step_index(self) -> int | None:
        """The entry of `timesteps` that the next `step` is for."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The entry of `timesteps` that the pipeline starts at."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the pipeline starts, as image to image says it. The history is empty there: the order starts at 1."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is: all states are alpha x0 + sigma eps."""
        return sample

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, mu: float | None = None,
                      timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None) -> None:
        """Prepare for a trajectory of num_inference_steps steps, or over explicit falling timesteps or flow sigmas.

        mu: the exponent of a flow's dynamic shift; used with use_dynamic_shifting. Raises ValueError where the steps
        are not those of the plan, nothing or two things are given, or timesteps do not fall.
        """
        given = [timesteps is not None, sigmas is not None]
        if self.plan is not None:
            n = len(self.plan.decisions)
            if any(given) or num_inference_steps != n:
                raise ValueError(f"num_inference_steps={num_inference_steps}: this plan has {n} steps and times of its "
                                 f"own, expected num_inference_steps={n}")
            self._points, self._decisions = self.plan.grid(self.schedule), self.plan.decisions
        else:
            if sum(given) > 1 or not (any(given) or num_inference_steps):
                raise ValueError(f"num_inference_steps={num_inference_steps}, timesteps={timesteps}, sigmas={sigmas}: "
                                 "expected a positive number, or one of the lists")
            levels = self._levels(num_inference_steps, mu, timesteps, sigmas)
            self._points = [*levels, CLEAN if self.config.final_sigmas_type == "zero" else self.schedule.at(0)]
            self._decisions = self._preset(len(levels))
        self.num_inference_steps = len(self._decisions)
        arrivals = [d.corrector == "implicit" for d in self._decisions[:-1]]
        self._entries = [i for i in range(len(self._decisions)) for _ in range(1 + (i > 0 and arrivals[i - 1]))]
        times = [self._points[i].t for i in self._entries]
        is_whole = all(t == int(t) for t in times)
        self.timesteps = torch.tensor(times, dtype=torch.int64 if is_whole else torch.float32, device=device)
        self.sigmas = torch.tensor([p.sigma if p.alpha == 0 or self.config.use_flow_sigmas else p.sigma / p.alpha
                                    for p in (*(self._points[i] for i in self._entries), self._points[-1])])
        self._step_index = self._begin_index = None
        self._past = []

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True,
             **unused: Any) -> SchedulerOutput | tuple[Tensor]:
        """One evaluation is in: the state (B, ...) to evaluate next, in the dtype of model_output.

        After the first of a step's two evaluations with an implicit corrector that is the corrected state.
        Raises ValueError before set_timesteps, and after the last step.
        """
        if not self._entries:
            raise ValueError("step before set_timesteps: expected set_timesteps(num_inference_steps) first")
        if self._step_index is None:
            self._start(self._begin_index if self._begin_index is not None else self._index_of(timestep))
        entry = self._step_index or 0
        if entry >= len(self._entries):
            raise ValueError(f"step {entry} of {len(self._entries)}: expected set_timesteps before another trajectory")
        i = self._entries[entry]
        dtype = sample.dtype if sample.dtype == torch.float64 else torch.float32
        now = self._evaluated(model_output.to(dtype), sample.to(dtype), self._points[i])
        is_first = entry == 0 or self._entries[entry - 1] != i
        is_followed = entry + 1 < len(self._entries) and self._entries[entry + 1] == i
        arrived = self._decisions[i - 1] if i else None
        if is_first and arrived is not None and arrived.corrector != "none" and self._past:
            now = now._replace(x=corrected(now, self._past, arrived))
        if is_followed:
            x = now.x
        else:
            x = predicted((now, *self._past), self._points[i + 1], self._decisions[i])
            self._past = [now, *self._past[: MEMORY - 1]]
        self._step_index = entry + 1
        x = x.to(model_output.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise for x0 (B, ...) and timesteps (B,), or one for all rows."""
        points = [self._point_at(float(t)) for t in torch.as_tensor(timesteps).reshape(-1)]
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (torch.tensor(v, dtype=torch.float64).to(original_samples).reshape(shape)
                        for v in ([p.alpha for p in points], [p.sigma for p in points]))
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` by the name that flow pipelines call."""
        return self.add_noise(sample, noise, timestep)

    def _preset(self, n_steps: int) -> tuple[Decision, ...]:
        return preset_decisions(self.config.preset, n_steps, to_data=self._points[-1].sigma == 0,
                                lower_order_final=self.config.lower_order_final)

    def _start(self, entry: int) -> None:
        """Begin at an entry. A preset that begins late warms up from there, as it does at the first step."""
        self._step_index = entry
        if self.plan is None and 0 < entry < len(self._decisions):
            self._decisions = (*self._decisions[:entry], *self._preset(len(self._decisions) - entry))

    def _evaluated(self, output: Tensor, x: Tensor, here: Point) -> Evaluated:
        """The estimates of data and noise that a network's output means."""
        kind, alpha, sigma = self.config.prediction_type, here.alpha, here.sigma
        if kind == "epsilon":
            return Evaluated(here, x, (x - sigma * output) / alpha, output)
        if kind == "sample":
            return Evaluated(here, x, output, (x - alpha * output) / sigma)
        if kind == "v_prediction":
            return Evaluated(here, x, alpha * x - sigma * output, alpha * output + sigma * x)
        return Evaluated(here, x, x - sigma * output, x + alpha * output)

    def _levels(self, n_steps: int | None, mu: float | None, timesteps: Sequence[float] | None,
                sigmas: Sequence[float] | None) -> list[Point]:
        if self.config.use_flow_sigmas:
            return self._flow_levels(n_steps, mu, timesteps, sigmas)
        if sigmas is not None:
            raise ValueError(f"sigmas={sigmas}: only a flow takes them, expected timesteps")
        if timesteps is None and self.config.use_karras_sigmas:
            points = power_grid(self.schedule, n_steps or 0, "rho", 7.0)[:-1]
            is_cosine = self.config.beta_schedule == "squaredcos_cap_v2"
            return [p if is_cosine else p._replace(t=float(round(p.t))) for p in points]
        if timesteps is None:
            return [self.schedule.at(t) for t in _spaced(self.config, n_steps or 0)]
        _check_falling("timesteps", timesteps)
        return [self.schedule.at(float(t)) for t in timesteps]

    def _flow_levels(self, n_steps: int | None, mu: float | None, timesteps: Sequence[float] | None,
                     sigmas: Sequence[float] | None) -> list[Point]:
        config, n_train = self.config, self.config.num_train_timesteps
        if timesteps is not None:
            _check_falling("timesteps", timesteps)
            return [self.schedule.at(float(t)) for t in timesteps]
        shift = config.shift if config.flow_shift is None else config.flow_shift
        if config.use_dynamic_shifting:
            if mu is None:
                raise ValueError("mu=None: use_dynamic_shifting needs it, expected a number")
            shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
        if sigmas is None:  # as FlowMatchEulerDiscreteScheduler, which shifts the least sigma twice
            least = 1 / n_train if config.use_dynamic_shifting else shift / (n_train + shift - 1)
            sigmas = np.linspace(1, least, n_steps or 0).tolist()
        else:
            _check_falling("sigmas", sigmas)
        return [self.schedule.at(n_train * shift * float(s) / (1 + (shift - 1) * float(s))) for s in sigmas]

    def _index_of(self, timestep: Any) -> int:
        """The entry of a timestep; of two equal ones the first."""
        t = torch.as_tensor(timestep, dtype=self.timesteps.dtype, device=self.timesteps.device)
        found = (self.timesteps == t).nonzero()
        if not len(found):
            raise ValueError(f"timestep={float(t)}: expected one of the scheduler's, {self.timesteps.tolist()}")
        return int(found[0])

    def _point_at(self, t: float) -> Point:
        """The level of the trajectory with that timestep (its sigma may be finer), else of the schedule."""
        single = torch.tensor(t, dtype=torch.float32).item()
        for point in self._points[:-1]:
            if torch.tensor(point.t, dtype=torch.float32).item() == single:
                return point
        return self.schedule.at(t)


def _spaced(config: Any, n_steps: int) -> list[float]:
    """The timesteps of diffusers' multistep schedulers: table 2 of arXiv 2305.08891, without the last of n + 1."""
    total = config.num_train_timesteps
    if n_steps > total:
        raise ValueError(f"num_inference_steps={n_steps}: this model has {total} noise levels")
    if config.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, n_steps + 1).round()[::-1][:-1].tolist()
    if config.timestep_spacing == "leading":
        return [float(i * (total // (n_steps + 1)) + config.steps_offset) for i in range(n_steps, 0, -1)]
    return (np.arange(total, 0, -total / n_steps)[:n_steps].round() - 1).tolist()


def _betas(n: int, start: float, end: float, kind: str, trained: Any, to_zero_snr: bool) -> Tensor:
    """The table of betas (n,), in single precision as diffusers has it."""
    if trained is not None:
        betas = torch.tensor(trained, dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, n, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
    else:
        bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(bar)])
    if not to_zero_snr:
        return betas
    root = torch.cumprod(1 - betas, 0).sqrt()  # arXiv 2305.08891, algorithm 1
    bar_tensor = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat((bar_tensor[:1], bar_tensor[1:] / bar_tensor[:-1]))


def _check_falling(name: str, values: Sequence[float]) -> None:
    if not len(values) or any(b >= a for a, b in pairwise(values)):
        raise ValueError(f"{name}={list(values)}: expected one or more falling numbers")
