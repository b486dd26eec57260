"""The unified solver as a diffusers scheduler: any preset, or a plan that a search found, inside stock pipelines.

    pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, preset="unipc_bh2")
    pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, plan=Plan.load("plan.json"))
    pipe("a red fox", num_inference_steps=6)                       # a plan has its own number of steps

That holds for flows (Stable Diffusion 3, Flux, Sana) too: a config of FlowMatchEulerDiscreteScheduler is known as one.
A flow's sigmas, timesteps and steps of order 1 are those of the scheduler whose config it was made from, see
`flow_sigmas`; multistep presets go on from the same sigmas.

Source: USF, arXiv 2312.07243, section 3. Known differences from diffusers' own schedulers:
- the solver is named by `preset`; solver_order, solver_type and algorithm_type of a config are not looked at;
- lower_order_final holds at any number of steps, as in UniPC; DPM-Solver and DEIS obey it below 15 only;
- final_sigmas_type "zero" works for every preset (DPM-Solver on noise and UniPC bh1 refuse it or give nan), and holds
  for DEIS as well, whose own scheduler ends at the least noise of the table;
- every step goes to the next timestep, where DDIM's scheduler subtracts a constant stride;
- coefficients are computed in double precision and applied in the sample's (half is computed in single);
- clip_sample is not looked at, as in diffusers' multistep schedulers, nor are LCM's and TCD's own times and noise;
- of a flow are refused: one step with shift_terminal (nan in diffusers), timesteps for the sigmas "dpm" and "unipc",
  use_dynamic_shifting without mu, and a last sigma other than 0;
- thresholding, learned variances, inverted sigmas, and sigmas by Lu are refused by name, and so are sigmas by
  exponential or beta outside of flows, and any config that does not say what the model predicts and on which levels:
  EDM, VE, consistency models, CogVideoX. A missing prediction_type is never taken for "epsilon".
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import diffusers.schedulers
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
FLOW_SIGMAS = ("even", "euler", "unipc", "dpm")
_RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

# Fields of other schedulers' configs. What decides which levels a model knows and what it predicts there: taken from
# the config even where it is the other class's default, since defaults differ between classes.
_MEANING = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
            "prediction_type", "use_flow_sigmas", "flow_shift", "shift", "use_dynamic_shifting", "time_shift_type")
# Of these values only, under which the field changes nothing here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "timestep_type": ("discrete",), "interpolation_type": ("linear",), "sigma_min": (None,), "sigma_max": (None,),
    "lambda_min_clipped": (-math.inf,), "snr_shift_scale": (1.0,), "invert_sigmas": (False,),
    "stochastic_sampling": (False,)}
# Of any value: how their solvers step and clip, and what pipelines alone read.
_SOLVERS_OWN = frozenset((
    "solver_order", "solver_type", "algorithm_type", "euler_at_final", "predict_x0", "disable_corrector", "solver_p",
    "predictor_order", "corrector_order", "tau_func", "skip_prk_steps", "set_alpha_to_one", "clip_sample",
    "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "original_inference_steps",
    "timestep_scaling"))
_PIPELINES = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")  # mu comes of them
_OF_FLOW_MATCH_EULER = ("base_shift", "invert_sigmas", "stochastic_sampling")


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

    prediction_type "flow_prediction" makes a flow, on sigmas (before the shift) that `flow_sigmas` names where
    `set_timesteps` is given none. "even": linspace(1, 1/n, n), what Flux's pipelines give. "euler": of
    FlowMatchEulerDiscreteScheduler, linspace(1, least, n), whose least is shifted twice. "unipc" and "dpm": of
    UniPCMultistepScheduler and DPMSolverMultistepScheduler, the first n of n + 1; these tell the model whole timesteps,
    cut off. from_config chooses the name by the config; directly made, it is "even".
    use_flow_sigmas=True may be said of a flow. In `config` it stands as True for "unipc" and "dpm" alone: to schedulers
    with it Flux's pipelines do not give their own sigmas.
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
        use_beta_sigmas: bool = False, flow_sigmas: str = "even", shift_terminal: float | None = None,
    ) -> None:
        for name, allowed in (("prediction_type", PREDICTION_TYPES), ("timestep_spacing", SPACINGS),
                              ("final_sigmas_type", ("zero", "sigma_min")), ("preset", tuple(PRESETS)),
                              ("time_shift_type", ("exponential", "linear")), ("flow_sigmas", FLOW_SIGMAS),
                              ("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"))):
            if self.config[name] not in allowed:
                raise ValueError(f"{name}={self.config[name]!r}: expected one of {', '.join(allowed)}")
        self._is_flow = prediction_type == "flow_prediction"
        is_free = self._is_flow and flow_sigmas in ("even", "euler")
        for name in ("thresholding", "use_lu_lambdas", *(() if is_free else _RESPACED[1:])):
            if self.config[name]:
                raise ValueError(f"{name}=True: this scheduler has it not, expected False")
        if sum(bool(self.config[name]) for name in _RESPACED) > 1:
            raise ValueError(", ".join(f"{name}={self.config[name]}" for name in _RESPACED) + ": expected one at most")
        if use_flow_sigmas and not self._is_flow:
            raise ValueError(f"use_flow_sigmas=True, prediction_type={prediction_type!r}: expected flow_prediction")
        if self._is_flow and (final_sigmas_type != "zero" or (use_karras_sigmas and not is_free)):
            raise ValueError(f"final_sigmas_type={final_sigmas_type!r}, use_karras_sigmas={use_karras_sigmas}: a flow "
                             "ends at the data, and has Karras sigmas where flow_sigmas is even or euler")
        if shift_terminal is not None and not (self._is_flow and 0 <= shift_terminal < 1):
            raise ValueError(f"shift_terminal={shift_terminal!r}, prediction_type={prediction_type!r}: expected None, "
                             "or a number from 0 to below 1 for a flow")
        if is_free:
            self.register_to_config(use_flow_sigmas=False)
        if isinstance(plan, Plan):
            self.register_to_config(plan=plan.to_json())
        self.plan = plan if plan is None or isinstance(plan, Plan) else Plan.from_json(plan)
        self.betas = _betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
                            rescale_betas_zero_snr)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        if rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24  # as diffusers, so that the largest sigma is finite
        self.schedule: Schedule = (_Flow(num_train_timesteps) if self._is_flow
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

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler for the model that another scheduler's config is of; kwargs replace fields of the config.

        Raises ValueError that names the field, its value and what is allowed, where the config does not say what the
        model predicts or on which levels, or has a field that changes them in a way that is not known here.
        """
        if isinstance(config, Mapping):
            config, found, foreign = _read(config, kwargs)
            made = super().from_config(config, return_unused_kwargs, **(found | kwargs))
            (made[0] if return_unused_kwargs else made).register_to_config(**foreign)
            return made
        return super().from_config(config, return_unused_kwargs, **kwargs)

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

        mu: the exponent of a flow's dynamic shift; used with use_dynamic_shifting. A flow's sigmas are shifted, as
        diffusers does it; its timesteps are told to the model as they are, while their share of num_train_timesteps is
        shifted into sigmas, unless sigmas are given as well. Raises ValueError where the steps are not those of the
        plan, nothing or more than one thing is given, numbers of steps differ, or a list does not fall.
        """
        given = [timesteps is not None, sigmas is not None]
        if self.plan is not None:
            n = len(self.plan.decisions)
            if any(given) or num_inference_steps != n:
                raise ValueError(f"num_inference_steps={num_inference_steps}: this plan has {n} steps and times of its "
                                 f"own, expected num_inference_steps={n}")
            self._points, self._decisions = self.plan.grid(self.schedule), self.plan.decisions
        else:
            counts = {len(v) for v in (timesteps, sigmas) if v is not None} | (
                set() if num_inference_steps is None else {num_inference_steps})
            if (sum(given) > 1 and not self._is_flow) or len(counts) != 1 or 0 in counts:
                raise ValueError(f"num_inference_steps={num_inference_steps}, timesteps={timesteps}, sigmas={sigmas}: "
                                 "expected a positive number of steps, or one list, or for a flow two as long")
            levels = self._levels(num_inference_steps, mu, timesteps, sigmas)
            self._points = [*levels, CLEAN if self.config.final_sigmas_type == "zero" else self.schedule.at(0)]
            self._decisions = self._preset(len(levels))
        self.num_inference_steps = len(self._decisions)
        arrivals = [d.corrector == "implicit" for d in self._decisions[:-1]]
        self._entries = [i for i in range(len(self._decisions)) for _ in range(1 + (i > 0 and arrivals[i - 1]))]
        times = [self._points[i].t for i in self._entries]
        is_whole = all(t == int(t) for t in times) and self.config.use_flow_sigmas == self._is_flow
        self.timesteps = torch.tensor(times, dtype=torch.int64 if is_whole else torch.float32, device=device)
        self.sigmas = torch.tensor([p.sigma if p.alpha == 0 or self._is_flow else p.sigma / p.alpha
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
            now = now.changed(x=corrected(now, self._past, arrived))
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
        if self._is_flow:
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
        config, n_train, kind = self.config, self.config.num_train_timesteps, self.config.flow_sigmas
        is_cut = kind in ("unipc", "dpm")
        for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
            if values is not None:
                _check_falling(name, values)
        if timesteps is not None and is_cut:
            raise ValueError(f"timesteps={list(timesteps)}: flow_sigmas={kind!r} takes sigmas, expected these")
        shift = config.shift if config.flow_shift is None else config.flow_shift
        if config.use_dynamic_shifting:
            if mu is None:
                raise ValueError("mu=None: use_dynamic_shifting needs it, expected a number")
            shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
        n = n_steps or len(timesteps if sigmas is None else sigmas)  # type: ignore[arg-type]
        if sigmas is not None or timesteps is not None:
            s = np.array(sigmas, np.float64) if sigmas is not None else np.array(timesteps, np.float64) / n_train
        elif kind == "euler":
            s = np.linspace(1, 1 / n_train if config.use_dynamic_shifting else shift / (n_train + shift - 1), n)
        elif kind == "unipc":
            s = np.linspace(1, 1 / n_train, n + 1)[:-1]
        else:
            s = np.linspace(1, 1 / n, n) if kind == "even" else (1 - np.linspace(1, 1 / n_train, n + 1))[:0:-1]
        # the operations in the order of theirs: cutting off tells 20 from 19.999...
        s = shift / (shift + (1 / s - 1)) if config.use_dynamic_shifting and kind != "dpm" else (
            shift * s / (1 + (shift - 1) * s))
        if config.shift_terminal:
            if s[-1] >= 1:
                raise ValueError(f"shift_terminal={config.shift_terminal}: {n} steps end at sigma 1, which cannot be "
                                 "stretched; expected more steps")
            s = 1 - (1 - s) / ((1 - s[-1]) / (1 - config.shift_terminal))
        s = self._respaced(s)
        if kind == "unipc" and abs(s[0] - 1) < 1e-6:
            s[0] -= 1e-6  # as theirs, where alpha must not be 0
        told = n_train * s if timesteps is None else np.array(timesteps, np.float64)
        times = np.trunc(told) if is_cut else told
        return [Point(float(t), float(1 - sigma), float(sigma)) for t, sigma in zip(times, s, strict=True)]

    def _respaced(self, s: np.ndarray) -> np.ndarray:
        """A flow's sigmas, or as many between its first and last, spaced as the config says."""
        first, last, n = s[0], s[-1], len(s)
        if self.config.use_karras_sigmas:
            return np.linspace(first ** (1 / 7), last ** (1 / 7), n) ** 7
        if self.config.use_exponential_sigmas:
            return np.exp(np.linspace(math.log(first), math.log(last), n))
        if self.config.use_beta_sigmas:
            from scipy.stats import beta  # arXiv 2407.12173

            return last + beta.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6) * (first - last)
        return s

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


def _read(config: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Another scheduler's config in three parts: fields of this one as they stand, those that had to be found out, and
    foreign ones to keep. Fields that a saved config lacks are the defaults of the class that it names; `given` ones
    replace it. ValueError where it is unclear."""
    named = getattr(diffusers.schedulers, str(config.get("_class_name")), None)
    defaults = {k: p.default for k, p in inspect.signature(named).parameters.items() if p.default is not p.empty} if (
        isinstance(named, type) and issubclass(named, SchedulerMixin)) else {}
    whole = {k: v for k, v in (defaults | dict(config)).items() if k[0] != "_"} | dict(given)
    own = inspect.signature(UnifiedSolverScheduler).parameters
    for name, value in whole.items():
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise ValueError(f"{name}={value!r}: of a model or levels that this scheduler does not know, expected "
                             + " or ".join(map(repr, _NEUTRAL[name])))
        if not (name in own or name in _NEUTRAL or name in _SOLVERS_OWN or name in _PIPELINES
                or name in given or value in (None, False)):
            raise ValueError(f"{name}={value!r}: this scheduler cannot tell what the field means for the model, "
                             "expected a config without it")
    is_euler = any(name in whole for name in _OF_FLOW_MATCH_EULER) or config.get("_class_name") == (
        "FlowMatchHeunDiscreteScheduler")
    found = {k: whole[k] for k in _MEANING if k in whole and k in own}
    if "prediction_type" not in whole and is_euler:
        found["prediction_type"] = "flow_prediction"
    kind = found.get("prediction_type")
    if kind is None:
        raise ValueError(f"prediction_type={kind}: the config does not say what the model predicts, expected one of "
                         f"{', '.join(PREDICTION_TYPES)}")
    if kind != "flow_prediction":
        table = ["beta_schedule"] + ["beta_start", "beta_end"] * (whole.get("beta_schedule") != "squaredcos_cap_v2")
        missing = [k for k in table if k not in whole]
        if missing and whole.get("trained_betas") is None:
            raise ValueError(f"{missing[0]}=None: the config does not say on which levels the model predicts "
                             f"{kind}, expected {' and '.join(table)}, or trained_betas")
    elif "flow_sigmas" not in whole:
        if is_euler and not config.get("use_flow_sigmas"):
            found["flow_sigmas"] = "euler"
        elif "predict_x0" in whole or "algorithm_type" in whole:
            found["flow_sigmas"] = "unipc" if "predict_x0" in whole else "dpm"
            if not whole.get("use_flow_sigmas"):
                raise ValueError(f"use_flow_sigmas={whole.get('use_flow_sigmas')}, prediction_type={kind!r}: a flow's "
                                 "prediction on levels of another model, expected use_flow_sigmas=True")
    used = config.get("_use_default_values", ())
    return ({k: v for k, v in config.items() if k in own or k[0] == "_"},
            {k: v for k, v in found.items() if k not in given},
            {k: whole[k] for k in whole if k not in own and ((k in config and k not in used) or k in _PIPELINES)})


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
