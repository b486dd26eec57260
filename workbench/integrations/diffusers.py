"""T-Stitch as a drop-in for diffusers pipelines: a cheap denoiser draws the first steps, a good one the rest.

Source: T-Stitch, arXiv 2402.14167, section 3 and figure 4. Cost of a picture: sum_k n_k c_k, where n_k rows
go through model k: `split_steps(fractions, N)[k]` solver steps, times the evaluations per step of the solver,
times 2 with guidance; c_k is the cost of one row.

    pipe = stitch(small_pipeline, large_pipeline, fraction=0.4)
    image = pipe("a red fox", num_inference_steps=20).images[0]
    pipe.stitch.report             # {"small": ModelCount(steps=8, calls=8, rows=16), "large": ...}
    pipe.stitch.fraction = 0.6     # from the next call on; nothing is reloaded
    large_pipeline = unstitch(pipe)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial, wraps
from itertools import chain, repeat
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import ModelHook, UserCpuOffloadHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline, PNDMScheduler
from torch import Tensor, nn

from workbench.problems.denoising import split_steps
from workbench.problems.driving import check_vae

__all__ = ["ModelCount", "Stitch", "StitchedDenoiser", "StitchedPipeline", "stitch", "unstitch"]

DENOISER_NAMES = ("unet", "transformer")

# What must agree for one latent, one text embedding and one noise level to mean the same to both models.
_MODEL_FIELDS = (
    "in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim",
    "caption_channels", "encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim", "class_embed_type",
    "num_class_embeds", "num_embeds_ada_norm", "time_cond_proj_dim", "guidance_embeds",
    "use_additional_conditions",
)  # fmt: skip
_SCHEDULE_FIELDS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "rescale_betas_zero_snr", "prediction_type", "use_flow_sigmas", "flow_shift", "shift",
    "use_dynamic_shifting",
)  # fmt: skip
# What a ControlNet or a T2I-Adapter makes is added to the U-Net's own features: with one the layouts must agree.
_CONTROL_FIELDS = {"controlnet": ("block_out_channels", "layers_per_block"), "adapter": ("block_out_channels",)}
# A denoiser's methods of these names change it and take nothing that fits one model alone: they reach every model.
_REACHES_ALL = ("set_", "enable_", "disable_", "fuse_", "unfuse_", "unload_", "delete_")
# These bring weights or names that were made for one model.
_FOR_ONE = ("load_", "add_adapter")


@dataclass(frozen=True)
class ModelCount:
    """What one model did in one pipeline call: solver steps, network calls, latent rows through it."""

    steps: int = 0
    calls: int = 0
    rows: int = 0


@dataclass
class _Trajectory:
    """One schedule, read once: entry e of `scheduler.timesteps` belongs to solver step `steps[e]`."""

    scheduler: Any
    times: list[float]
    steps: list[int]
    owners: list[int]  # the model of each solver step
    entry: int | None = None  # None until the first evaluation tells where the pipeline starts
    first: Any = None  # the timestep of the first evaluation
    has_stepped: bool = False
    is_unsure: bool = False  # whether the first timestep is listed twice, so that the second one must tell the place

    @classmethod
    def learn(cls, scheduler: Any, fractions: Sequence[float]) -> _Trajectory:
        times = scheduler.timesteps.tolist()
        steps = _solver_steps(scheduler, len(times))
        counts = split_steps(fractions, steps[-1] + 1)
        owners = list(chain.from_iterable(repeat(k, n) for k, n in enumerate(counts)))
        return cls(scheduler, times, steps, owners)

    def start(self, timestep: Any) -> int:
        """The entry that the pipeline starts at: what it declared, else the place of its first timestep."""
        self.first = _one(timestep)
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is not None:
            return begin
        if self.first in self.times:
            entry = self.times.index(self.first)  # Heun lists a time twice: a step's end, the next one's start
            if isinstance(self.scheduler, PNDMScheduler) and entry:
                starts = [self.times[self.steps.index(step)] for step in range(self.steps[-1] + 1)]
                # Started late, it does no step again: each entry belongs to the step at its noise level.
                self.steps = [max(sum(start >= t for start in starts) - 1, 0) for t in self.times]
                self.is_unsure = self.times.count(self.first) > 1
            return entry + entry % getattr(self.scheduler, "order", 1)
        if hasattr(self.scheduler, "begin_index"):
            return 0  # rescaled times; a pipeline that starts late declares it to such a scheduler
        raise ValueError(f"timestep={self.first}: expected one of the scheduler's, {self.times}")

    def follow(self, timestep: Any) -> None:
        """What later evaluations tell: nothing, but in the first step and where the start was unsure."""
        if not self.has_stepped and (now := _one(timestep)) != self.first:
            raise RuntimeError(
                f"timestep={now} came after {self.first} and scheduler.step was not called between: steps are "
                "followed by it, so a loop must call it once per entry of scheduler.timesteps"
            )
        if self.has_stepped and self.is_unsure and self.entry is not None:
            self.is_unsure = False
            later = self.times[self.entry :]
            self.entry += later.index(now) if (now := _one(timestep)) in later else 0


class Stitch:
    """The choice of denoiser, and what it came to: `pipe.stitch` of a stitched pipeline.

    `fractions` (or `fraction`, of two models: the share of the cheap one) can be set at any time and holds
    from the next pipeline call on. `report` gives the counts of the last call per model.

    How the step is known: while the pipeline runs, `set_timesteps` and `step` of its scheduler are wrapped.
    The first copies the schedule to the host once; the second moves on by one entry. Counting denoiser calls
    would fail where a step makes several (true guidance of Flux, skipped layers of SD3), and the timestep
    that a denoiser is given lives on the device, often as a rescaled copy: reading it would make the host
    wait in every step. Both wrappers go when the call ends, however it ends, so a shared or later replaced
    scheduler never stays changed.
    """

    def __init__(self, names: Sequence[str], fractions: Sequence[float]) -> None:
        self.names = tuple(names)
        self.fractions = fractions
        self._trajectory: _Trajectory | None = None
        self._clear()

    @property
    def fractions(self) -> Sequence[float]:
        """The share of solver steps of each model, cheapest first: K numbers in [0, 1] that sum to 1."""
        return self._fractions

    @fractions.setter
    def fractions(self, fractions: Sequence[float]) -> None:
        n_models = len(self.names)
        if not isinstance(fractions, Sequence) or not all(isinstance(f, (int, float)) for f in fractions):
            raise TypeError(f"fractions={fractions!r}: expected {n_models} numbers in [0, 1] that sum to 1")
        if len(fractions) != n_models:
            raise ValueError(f"fractions={tuple(fractions)}: expected {n_models} numbers, one per model")
        split_steps(fractions, 1)  # raises for a number outside [0, 1] or another sum
        self._fractions = tuple(float(f) for f in fractions)

    @property
    def fraction(self) -> float:
        """The share of solver steps of the small model; only for two models."""
        self._only_two()
        return self._fractions[0]

    @fraction.setter
    def fraction(self, fraction: float) -> None:
        self._only_two()
        self.fractions = _two(fraction)

    def _only_two(self) -> None:
        if len(self.names) != 2:
            raise ValueError(f"fraction is for two models, here are {len(self.names)}: use fractions")

    @property
    def report(self) -> dict[str, ModelCount]:
        """Per model name, what it did since the last `set_timesteps`."""
        return dict(zip(self.names, self._counts, strict=True))

    @contextmanager
    def follow(self, scheduler: Any) -> Iterator[None]:
        """Follow `scheduler` inside the block: what a pipeline call does, and what a hand-written loop needs.

        The loop must call `scheduler.set_timesteps` inside the block. Raises TypeError for a scheduler
        without `set_timesteps` or `step`.
        """
        methods = ("set_timesteps", "step")
        if not all(hasattr(scheduler, name) for name in methods):
            raise TypeError(f"scheduler={type(scheduler).__name__}: expected set_timesteps() and step()")
        # The class's methods, past the wrappers of another stitched pipeline that shares the scheduler.
        set_timesteps, step = (getattr(type(scheduler), name).__get__(scheduler) for name in methods)

        @wraps(set_timesteps)  # pipelines look at the signatures
        def learn(*args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            self._trajectory = _Trajectory.learn(scheduler, self._fractions)
            self._clear()
            return result

        @wraps(step)
        def advance(*args: Any, **kwargs: Any) -> Any:
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
            if isinstance(timestep, Tensor) and timestep.numel() > 1:
                raise ValueError(_per_sample(timestep.tolist()))
            result = step(*args, **kwargs)
            if self._trajectory is not None and self._trajectory.entry is not None:
                self._trajectory.entry += 1
                self._trajectory.has_stepped = True
            return result

        before = {name: vars(scheduler)[name] for name in methods if name in vars(scheduler)}
        scheduler.set_timesteps, scheduler.step = learn, advance
        try:
            yield
        finally:
            self._trajectory = None
            for name in methods:
                del vars(scheduler)[name]
            vars(scheduler).update(before)

    def _clear(self) -> None:
        self._counts = [ModelCount()] * len(self.names)
        self._last_step = -1

    def _choose(self, timestep: Any, rows: int) -> int:
        """The model that owns the step in progress; counts the call."""
        trajectory = self._trajectory
        if trajectory is None:
            raise RuntimeError(
                "the stitched denoiser was called outside its pipeline's call: call the pipeline, stitch "
                "the pipeline that it was put into, or loop inside `with pipe.stitch.follow(pipe.scheduler):`"
            )
        if trajectory.entry is None:
            trajectory.entry = trajectory.start(timestep)
        else:
            trajectory.follow(timestep)
        if trajectory.entry >= len(trajectory.steps):
            raise RuntimeError(
                f"scheduler.step was called past the schedule's {len(trajectory.steps)} entries: this "
                "pipeline does not call it once per evaluation, so its steps cannot be told apart"
            )
        step = trajectory.steps[trajectory.entry]
        owner = trajectory.owners[step]
        count, is_new = self._counts[owner], step != self._last_step
        self._counts[owner] = ModelCount(count.steps + is_new, count.calls + 1, count.rows + rows)
        self._last_step = step
        return owner


class StitchedDenoiser(nn.Module):
    """Stands where the host's denoiser stood. Each call goes to the model that owns the step.

    What changes a denoiser concerns all models: `.to()`, `.train()`, `.parameters()`, `.compile()`, offloading,
    caches, attributes that are set, and methods named set_, enable_, disable_, fuse_, unfuse_, unload_ or delete_
    (attention processors and backends, FreeU, adapters). What loads weights made for one model is refused with a
    ValueError. What is read (config, dtype, attention processors) is the host's.
    """

    models: Any

    def __init__(self, models: Sequence[nn.Module], choice: Stitch) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.stitch = choice
        self._signature = inspect.signature(type(_bare(models[-1])).forward)

    # Left out of a compiled graph, where its counters would be constants; the models below it are still
    # compiled.
    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The owner's output. Arguments are the host denoiser's; the first has shape (rows, ...)."""
        given = self._signature.bind_partial(self, *args, **kwargs).arguments
        sample = list(given.values())[1]
        owner = self.stitch._choose(given["timestep"], len(sample))
        model = self.models[owner]
        # Offloading hooks, or weights on meta that they will load, take care of the device themselves.
        is_hooked = hasattr(model, "_hf_hook") or hasattr(model, "_diffusers_hook")
        if not is_hooked and model.device not in (sample.device, torch.device("meta")):
            raise ValueError(
                f"the {self.stitch.names[owner]} denoiser is on {model.device}, its input on "
                f"{sample.device}: move the stitched pipeline with .to(), or enable offloading on it"
            )
        return model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):  # marks that libraries leave on a module belong to that module alone
                raise
        found = getattr(self.models[-1], name)
        if callable(found) and not isinstance(found, nn.Module):
            if name.startswith(_FOR_ONE):
                return lambda *args, **kwargs: _refuse(name)
            if name.startswith(_REACHES_ALL):
                return wraps(found)(partial(self._on_all, name))
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        models = vars(self).get("_modules", {}).get("models")
        if models is None or name.startswith("_") or name in _OWN or not hasattr(models[-1], name):
            super().__setattr__(name, value)
            return
        if isinstance(value, nn.Module):
            raise AttributeError(f"{name}={type(value).__name__}: a module made for one denoiser; set it on each model")
        for model in dict.fromkeys(models):
            setattr(model, name, value)

    def _on_all(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The method, called on every model once, the host's last; its result."""
        if "adapter" in method and args:
            _check_adapters(self, method, args[0])
        result = None
        for name, model in zip(self.stitch.names, self.models, strict=True):
            if model in self.models[: self.stitch.names.index(name)]:
                continue  # a model that stands for several
            try:
                result = getattr(model, method)(*deepcopy(args), **deepcopy(kwargs))
            except Exception as error:
                error.add_note(f"{method} failed on the {name} denoiser; those before it are changed")
                raise
        return result

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The host's; what `set_attn_processor` is given back unchanged restores those of every model."""
        return _Processors([model.attn_processors for model in self.models])

    def set_attn_processor(self, processor: Any) -> None:
        """Sets one processor, or those of a dict with the names of all models' layers, in every model.

        Raises ValueError, before anything is changed, for a dict that does not fit all models, and for processors
        with weights, which are made for one.
        """
        if isinstance(processor, _Processors) and processor.is_as_read:
            for model, own in zip(self.models, processor.own, strict=True):
                model.set_attn_processor(dict(own))
            return
        if any(isinstance(p, nn.Module) for p in (processor.values() if isinstance(processor, dict) else [processor])):
            raise ValueError("set_attn_processor: a processor with weights is made for one denoiser; set it on each "
                             "pipeline before stitch()")
        for name, model in zip(self.stitch.names, self.models, strict=True):
            if isinstance(processor, dict) and processor.keys() != model.attn_processors.keys():
                odd = sorted(processor.keys() ^ model.attn_processors.keys())[:3]
                raise ValueError(f"set_attn_processor: the {name} denoiser has other layers ({odd}...): pass one "
                                 "processor for all, or set them on each pipeline before stitch()")
        for model in self.models:
            model.set_attn_processor(dict(processor) if isinstance(processor, dict) else processor)

    def to(self, *args: Any, **kwargs: Any) -> StitchedDenoiser:
        for model in self.models:
            model.to(*args, **kwargs)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        for model in self.models:
            model.compile(*args, **kwargs)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        for model in self.models:
            model.enable_group_offload(*args, **kwargs)

    @contextmanager
    def cache_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """diffusers' `CacheMixin.cache_context`, entered on every model."""
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(model.cache_context(*args, **kwargs))
            yield

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        for model in self.models:
            if hasattr(model, "_reset_stateful_cache"):
                model._reset_stateful_cache(*args, **kwargs)


class _Processors(dict[str, Any]):
    """The host's attention processors, and those of every model."""

    def __init__(self, own: list[dict[str, Any]]) -> None:
        super().__init__(own[-1])
        self.own = [dict(processors) for processors in own]

    @property
    def is_as_read(self) -> bool:
        return self.keys() == self.own[-1].keys() and all(self[k] is p for k, p in self.own[-1].items())


class StitchedPipeline(DiffusionPipeline):
    """What `stitch` adds to the host's class. `stitch`: the choice of denoiser, see `Stitch`.

    Methods of the host's class that change its denoiser (`_EACH`) are done with each denoiser in turn.
    """

    stitch: Stitch

    def _on_each(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A method of the host's class with every denoiser in its place, the host's last; text encoders once."""
        whole, texts = getattr(self, self._denoiser_name), _text_encoders(self)
        if not isinstance(whole, StitchedDenoiser):  # asked by a method that is being done with one denoiser
            return method(self, *args, **kwargs)
        if method.__name__ in ("set_adapters", "delete_adapters", "set_lora_device", "fuse_lora"):
            first = args[0] if args and method.__name__ != "fuse_lora" else None
            _check_adapters(whole, method.__name__, kwargs.get("adapter_names", first))
        fields: dict[str, Any] = self.__dict__
        before, result = {name: fields[name] for name in texts if name in fields}, None
        distinct = list(dict.fromkeys(reversed(whole.models)))[::-1]
        for model in distinct:
            kept = before if model is whole.models[-1] else dict.fromkeys(before)
            fields.update({**kept, self._denoiser_name: model})
            try:
                result = method(self, *deepcopy(args), **deepcopy(kwargs))
            except Exception as error:
                name = self.stitch.names[list(whole.models).index(model)]
                error.add_note(f"{method.__name__} failed on the {name} denoiser; those before it are changed")
                raise
            finally:
                fields.update({**before, self._denoiser_name: whole})
        return result

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Saves a plain pipeline of the host's class, with the last (large) denoiser."""
        plain = object.__new__(type(self._host))
        vars(plain).update(vars(self))
        setattr(plain, self._denoiser_name, getattr(self._host, self._denoiser_name))
        return plain.save_pretrained(*args, **kwargs)

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """As the host's; of the denoisers only the one in use is on the accelerator."""
        super().enable_model_cpu_offload(gpu_id=gpu_id, device=device)
        # The host hooked the stitched denoiser as one model. Hook each of its models instead, and let "the
        # model before this one" stand for all that may be loaded: a model that owns no step is skipped.
        whole = getattr(self, self._denoiser_name)
        place, old = next((i, hook) for i, hook in enumerate(self._all_hooks) if hook.model is whole)
        remove_hook_from_module(whole)
        distinct = dict.fromkeys(whole.models)
        hooks = [cpu_offload_with_hook(model, self._offload_device)[1] for model in distinct]
        for hook in hooks:
            others = [h for h in (old.hook.prev_module_hook, *hooks) if h is not None and h is not hook]
            hook.hook.prev_module_hook = _AnyOf(others) if others else None
        for later in self._all_hooks:
            if later.hook.prev_module_hook is old:
                later.hook.prev_module_hook = _AnyOf(hooks)
        self._all_hooks[place : place + 1] = hooks
        marker = ModelHook()  # by it the pipeline finds the execution device and, later, the hooks to remove
        marker.execution_device = self._offload_device
        add_hook_to_module(whole, marker)


class _AnyOf(UserCpuOffloadHook):
    """Several models in the place where accelerate expects one previous model to offload."""

    def __init__(self, hooks: Sequence[UserCpuOffloadHook]) -> None:
        self.hooks = hooks

    @property
    def model(self) -> nn.Module:
        """A loaded one, if there is one: accelerate asks where its parameters are."""
        models = [hook.model for hook in self.hooks]
        return next((m for m in models if next(m.parameters()).device.type != "cpu"), models[0])

    def offload(self) -> None:
        for hook in self.hooks:
            hook.offload()


def stitch(
    *pipelines: DiffusionPipeline | nn.Module,
    fraction: float | None = None,
    fractions: Sequence[float] | None = None,
) -> StitchedPipeline:
    """A pipeline that draws the first steps with cheap denoisers and the last ones with the last pipeline's.

    pipelines: two or more, cheapest first. The last one is the host: its class, VAE, text encoders and
    scheduler are used (the same objects; no weights are copied). The others may be pipelines, or denoiser
    modules alone. The VAE and the schedule of a pipeline are checked against the host's; whoever passes a
    bare denoiser vouches for them.
    fraction: of two models, the share of solver steps of the first, in [0, 1], default 0.4.
    fractions: one share per model, in [0, 1], together 1.

    Of the N solver steps of the FULL schedule, boundaries lie at floor(cumsum(fractions) N + 1e-9). Both
    evaluations of a two-evaluation solver and both branches of guidance go to the model of their step. Where
    a run starts late (image to image), a boundary stays at its noise level; the small model may get no step.

    The originals keep working. `pipe.stitch` re-aims and reports, `unstitch(pipe)` gives the host back.
    What is set on the stitched pipeline reaches all its denoisers: adapters that they have (`set_adapters`,
    `disable_lora`, `fuse_lora`...), attention processors, FreeU, slicing, perturbed-attention guidance. Weights
    are loaded (`load_lora_weights`, `load_ip_adapter`) into each pipeline before; here that is refused.

    Raises TypeError for what is no pipeline or denoiser, ValueError for bad fractions and for models that
    cannot share a trajectory (latents, conditioning, VAE, noise schedule, prediction type, guidance embedding,
    IP-Adapters, the widths that a ControlNet or T2I-Adapter adds to, dtype), with both values; what can change
    later is checked again in each call. Source: T-Stitch, arXiv 2402.14167, section 3.
    """
    if len(pipelines) < 2:
        raise ValueError(f"pipelines: expected at least two, cheapest first, got {len(pipelines)}")
    host = pipelines[-1]
    if not isinstance(host, DiffusionPipeline):
        raise TypeError(f"pipelines[-1]={type(host).__name__}: expected a DiffusionPipeline, the host")
    models = [_denoiser(p, f"pipelines[{k}]") for k, p in enumerate(pipelines)]
    names = ("small", "large") if len(models) == 2 else [f"model_{k + 1}" for k in range(len(models))]
    choice = Stitch(names, _fractions(fraction, fractions, len(models)))
    for k, pipeline in enumerate(pipelines[:-1]):
        _check_pair(pipeline, models[k], host, models[-1], f"pipelines[{k}]")

    pipe: Any = object.__new__(_stitched_class(host.__class__))
    name = _denoiser_name(host)
    own = {name: StitchedDenoiser(models, choice), "stitch": choice, "_host": host, "_denoiser_name": name}
    own["_all_hooks"] = []  # offloading of the host stays the host's
    # Past DiffusionPipeline.__setattr__, which would write the stand-in's class into the pipeline's config.
    vars(pipe).update({**vars(host), **own})
    return pipe


def unstitch(pipe: StitchedPipeline) -> DiffusionPipeline:
    """The host pipeline as it was before `stitch`, without offloading that was enabled since."""
    if not isinstance(pipe, StitchedPipeline):
        raise TypeError(f"pipe={type(pipe).__name__}: expected a pipeline made by stitch()")
    if hasattr(getattr(pipe, pipe._denoiser_name), "_hf_hook"):
        pipe.remove_all_hooks()
    return pipe._host


@cache
def _stitched_class(host_class: Any) -> Any:
    """The host's class with `StitchedPipeline` in front, and its name, which configs record."""

    @wraps(host_class.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = getattr(self, self._denoiser_name)
        for name, model in zip(self.stitch.names, whole.models, strict=True):
            _check_adapted(model, whole.models[-1], f"the {name} denoiser")
            _check_control(model, self, whole.models[-1], f"the {name} denoiser")
        before = whole.attn_processors if hasattr(self, "_set_pag_attn_processor") else None
        try:
            with self.stitch.follow(self.scheduler):
                return host_class.__call__(self, *args, **kwargs)
        finally:
            if before is not None:  # a call that fails leaves those of perturbed attention in place
                whole.set_attn_processor(before)

    space: dict[str, Any] = {"__call__": call, "__module__": host_class.__module__, "__doc__": host_class.__doc__}
    for name in _EACH:
        if hasattr(host_class, name):
            space[name] = _each(getattr(host_class, name))
    for name in ("load_lora_weights", "load_ip_adapter"):
        if hasattr(host_class, name):
            space[name] = wraps(getattr(host_class, name))(partial(_refuse, name))
    return type(host_class.__name__, (StitchedPipeline, host_class), space)


# Methods of pipelines that change the denoiser by ways that a `StitchedDenoiser` does not see.
_EACH = (
    "disable_lora", "enable_lora", "set_adapters", "delete_adapters", "fuse_lora", "unfuse_lora",
    "unload_lora_weights", "set_lora_device", "enable_lora_hotswap", "set_ip_adapter_scale", "unload_ip_adapter",
    "_set_pag_attn_processor", "get_active_adapters", "get_list_adapters",
)  # fmt: skip
_OWN = ("models", "stitch", "training", "forward", "to", "compile")


def _each(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def on_each(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._on_each(method, *args, **kwargs)

    return on_each


def _refuse(method: str, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        f"{method}: brings weights made for one denoiser, and a stitched pipeline has several; call it on each "
        "pipeline before stitch(), then set_adapters(), disable_lora() and their like reach all of them"
    )


def _check_adapters(whole: StitchedDenoiser, method: str, wanted: Any) -> None:
    """Raises ValueError where a model lacks one of the adapters that are to be set, before any is changed."""
    wanted = [wanted] if isinstance(wanted, str) else list(wanted or [])
    for name, model in zip(whole.stitch.names, whole.models, strict=True):
        own = list(getattr(model, "peft_config", {}))
        if missing := [adapter for adapter in wanted if adapter not in own]:
            raise ValueError(
                f"{method}: the {name} denoiser has no adapter {missing[0]!r} (it has {own}), and some steps would be "
                "drawn without: load it into each pipeline before stitch(), or set it there on those that have it"
            )


def _check_adapted(model: Any, host: Any, who: str) -> None:
    """Raises ValueError where the host's IP-Adapters are not the model's: its steps would ignore the image."""
    ours, theirs = (
        [type(layer).__name__ for layer in getattr(getattr(m, "encoder_hid_proj", None), "image_projection_layers", [])]
        for m in (model, host)
    )
    if ours != theirs:
        raise ValueError(f"{who}: IP-Adapters are {ours}, the host's are {theirs}; they have to be equal")


def _check_control(model: Any, pipeline: Any, host: Any, who: str) -> None:
    """Raises ValueError where what a ControlNet or T2I-Adapter adds to the host's features does not fit the model's."""
    for part, fields in _CONTROL_FIELDS.items():
        if getattr(pipeline, part, None) is None:
            continue
        read = _reader(model.config, host.config)
        pairs = {key: read(key) for key in fields}
        widths = [c.get("num_attention_heads") and c.get("attention_head_dim") for c in (model.config, host.config)]
        if all(isinstance(w, int) for w in widths):  # a transformer
            ours, theirs = (c["num_attention_heads"] * c["attention_head_dim"] for c in (model.config, host.config))
            pairs["num_attention_heads x attention_head_dim"] = (ours, theirs)
        for key, (ours, theirs) in pairs.items():
            if ours != theirs:
                what = "ControlNet" if part == "controlnet" else "T2I-Adapter"
                raise ValueError(
                    f"{who}: {key} (with a {what}) is {ours}, the host's is {theirs}; they have to be equal"
                )


def _solver_steps(scheduler: Any, n_entries: int) -> list[int]:
    """The solver step of each entry of `scheduler.timesteps`."""
    if isinstance(scheduler, PNDMScheduler):
        n_rk = len(scheduler.prk_timesteps)
        if n_rk:  # Runge-Kutta, four evaluations each, before the multistep formula
            return [e // 4 for e in range(n_rk)] + [n_rk // 4 + e for e in range(n_entries - n_rk)]
        return [max(e - 1, 0) for e in range(n_entries)]  # the first step is done again with its end point
    return [e // getattr(scheduler, "order", 1) for e in range(n_entries)]


def _one(timestep: Any) -> Any:
    values = torch.as_tensor(timestep).unique().tolist()
    if len(values) > 1:
        raise ValueError(_per_sample(values))
    return values[0]


def _per_sample(values: list[float]) -> str:
    return f"timestep={values}: expected one for the whole batch; per-sample timesteps cannot be stitched"


def _two(fraction: float) -> tuple[float, float]:
    if not isinstance(fraction, (int, float)):
        raise TypeError(f"fraction={fraction!r}: expected a number in [0, 1]")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction}: expected a number in [0, 1]")
    return float(fraction), 1 - float(fraction)


def _fractions(fraction: float | None, fractions: Sequence[float] | None, n_models: int) -> Sequence[float]:
    if fractions is not None and fraction is not None:
        raise ValueError(f"fraction={fraction}, fractions={fractions}: expected one of the two")
    if fractions is not None:
        return fractions
    if n_models > 2:
        raise ValueError(f"fractions: expected {n_models} numbers, one per model, got none")
    return _two(0.4 if fraction is None else fraction)


def _bare(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # what torch.compile wrapped


def _denoiser_name(pipeline: Any) -> str | None:
    return next((name for name in DENOISER_NAMES if getattr(pipeline, name, None) is not None), None)


def _denoiser(given: Any, argument: str) -> Any:
    found = f"{argument}={type(given).__name__}"
    if isinstance(given, StitchedPipeline):
        raise TypeError(f"{found}: is stitched already; unstitch it, and pass all models to one stitch()")
    if isinstance(given, DiffusionPipeline):
        name = _denoiser_name(given)
        if name is None:
            raise TypeError(f"{found}: expected a pipeline with a unet or a transformer")
        return getattr(given, name)
    if isinstance(given, nn.Module) and hasattr(given, "config"):
        return given
    raise TypeError(f"{found}: expected a DiffusionPipeline or a diffusers denoiser")


def _check_pair(given: Any, small: Any, host: Any, large: Any, argument: str) -> None:
    """Raises ValueError, with both values, if `given` cannot draw a part of the host's trajectory."""

    def same(what: str, ours: Any, theirs: Any) -> None:
        if ours != theirs:
            raise ValueError(f"{argument}: {what} is {ours}, the host's is {theirs}; they have to be equal")

    same("the class of the denoiser", type(_bare(small)).__name__, type(_bare(large)).__name__)
    read = _reader(small.config, large.config)
    for key in _MODEL_FIELDS:
        if key == "cross_attention_dim" and large.config.get("caption_channels"):
            continue  # behind a caption projection it is an inner width
        same(key, *read(key))
    if not _takes_any_size(large.config):
        same("sample_size", *read("sample_size"))
    _check_control(small, host, large, argument)
    _check_adapted(small, large, argument)
    same("dtype", small.dtype, large.dtype)

    if isinstance(given, DiffusionPipeline):
        same("the set of text encoders", _text_encoders(given), _text_encoders(host))
        check_vae(given, host, argument)
        read = _reader(given.scheduler.config, host.scheduler.config)
        for key in _SCHEDULE_FIELDS:
            if key == "flow_shift" and not host.scheduler.config.get("use_flow_sigmas"):
                continue  # some schedulers of other models carry it without a use
            same(f"scheduler {key}", *read(key))


def _reader(ours: Any, theirs: Any) -> Callable[[str], tuple[Any, Any]]:
    """key -> both values in one form: [a, a] is a, absent or False is None, out_channels as in_channels."""

    def value(config: Any, key: str) -> Any:
        found = config.get(key)
        if key == "out_channels" and found is None:
            found = config.get("in_channels")
        if isinstance(found, (list, tuple)):
            found = found[0] if len(set(found)) == 1 else tuple(found)
        return None if found is False else found

    return lambda key: (value(ours, key), value(theirs, key))


def _takes_any_size(config: Any) -> bool:
    """Whether the latents can have any size: U-Nets, and transformers that crop their position table."""
    return "block_out_channels" in config or "pos_embed_max_size" in config


def _text_encoders(pipeline: Any) -> list[str]:
    names = inspect.signature(type(pipeline).__init__).parameters
    return sorted(name for name in names if name.startswith("text_encoder"))
