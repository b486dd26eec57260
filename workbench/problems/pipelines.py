"""A denoising problem made of diffusers pipelines: the embedded models and the user's own take this same road."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from workbench.cost import _LiveBytes, flops_per_row
from workbench.problems.copied import Copied, loader_of, own_spacing, script_of, source_of
from workbench.problems.denoising import Denoiser, Denoising
from workbench.problems.driving import (
    Asked,
    ShiftedFlow,
    check_vae,
    denoiser,
    device_of,
    guidance_input,
    in_parts,
    part_of,
)
from workbench.problems.fingerprint import Unchanged, digest_of_modules, digest_of_values
from workbench.quality import Quality

__all__ = ["Memory", "decode", "digest_of", "digest_of_modules", "from_pipelines", "memory", "to_uint8"]

# What a scheduler's table of noise levels is made from.
_TABLE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def from_pipelines(*pipelines: Any, conditions: Sequence[int] | Sequence[str], names: Sequence[str] | None = None,
                   judge: Callable[[Tensor, Tensor | None], dict[str, Quality]] | None = None,
                   loaders: Sequence[str] | None = None, name: str = "your pipelines", guidance: float | None = None,
                   digest: str | None = None, source: str | None = None, negative_prompt: str | None = None,
                   guidance_rescale: float = 0.0, embedded_guidance: float | None = None, height: int | None = None,
                   width: int | None = None, max_rows: int | None = None) -> Denoising:
    """A problem whose models are the denoisers of diffusers pipelines of one kind, cheapest first.

    Class-conditional pipelines (`DiTPipeline`, the embedded `GlyphPipeline`) take class numbers as `conditions`; Stable
    Diffusion 1, 2, XL and 3 and Flux take prompts; sample i is conditioned on conditions[i % len(conditions)]. The last
    pipeline decodes. Where a pipeline computes and in which type stays as it is; offloading works.
    names: of the models (default: m1, m2, ...). guidance: of the presets, the reference and the baseline, default 4
    (1 where guidance is embedded). negative_prompt: what guidance leads away from, default the pipelines' own.
    guidance_rescale: in [0, 1], the share of guided estimates that is brought back to the spread of the conditional
    ones (arXiv 2305.08891, equations 15 and 16). embedded_guidance: of a denoiser that takes guidance as an input
    (Flux, latent consistency models), default the pipelines' own; such a one has no other guidance, but Flux where a
    negative_prompt is given. height, width: of the pictures, in pixels, default the models' own.
    max_rows: the most rows that a network or the decoder is given at once, default all; answers stay the same (to
    rounding), and less memory is needed.
    judge(answer, labels) grades answers; without one there is only the distance from the reference. loaders, source:
    Python expressions that load each pipeline and lines that build this problem, for "copy as code".
    digest: of weights and texts, instead of `digest_of`; all else that answers follow from is added to it.
    Costs one network row per evaluation. Once: the digest (.9 s per GB of weights), FLOPs counted on one row of each.
    Raises ValueError, naming the argument, for what is none of the above, latents that do not fit together, or a
    denoiser or scheduler that this road does not know.
    """
    if not pipelines or isinstance(conditions, str) or not len(conditions):
        raise ValueError(f"{len(pipelines)} pipelines, conditions={conditions!r}: expected at least one of each, and a "
                         "list of conditions")
    names = list(names) if names is not None else [f"m{k + 1}" for k in range(len(pipelines))]
    loaders = None if loaders is None else list(loaders)
    for argument, given in (("names", names), ("loaders", loaders)):
        if given is not None and len(given) != len(pipelines):
            raise ValueError(f"{argument}={given}: expected {len(pipelines)}, one per pipeline")
    if len(set(names)) < len(names):
        raise ValueError(f"names={names}: expected names that differ")
    _check_numbers(guidance, guidance_rescale, max_rows)
    wanted: list[Any] = [int(c) if isinstance(c, Integral) and not isinstance(c, bool) else c for c in conditions]
    height, width, max_rows = (int(v) if isinstance(v, Integral) and not isinstance(v, bool) else v
                               for v in (height, width, max_rows))
    guidance, guidance_rescale = None if guidance is None else float(guidance), float(guidance_rescale)
    host, asked = pipelines[-1], Asked(wanted, negative_prompt, height, width, embedded_guidance)
    parts = [part_of(label, pipe, asked) for label, pipe in zip(names, pipelines, strict=True)]
    for label, pipe, part in zip(names, pipelines, parts, strict=True):
        if part.shape != parts[-1].shape:
            shapes = {p.name: p.shape for p in parts}
            raise ValueError(f"latents of different shapes cannot be stitched: {shapes}")
        if device_of(pipe) != device_of(host):
            raise ValueError(f"{label} computes on {device_of(pipe)}, {names[-1]} on {device_of(host)}: expected one "
                             "device")
        check_vae(pipe, host, label)
    shape, numbers, device = parts[0].shape, parts[0].numbers, str(device_of(host))
    one = {part.schedule: part.schedule for part in parts}  # equal schedules become one object, which compares at once
    schedule = one[parts[-1].schedule]
    models = tuple(Denoiser(p.name, in_parts(p.network, max_rows), one[p.schedule], p.prediction, p.null_label,
                            denoiser(pipe), guidance_rescale)
                   for p, pipe in zip(parts, pipelines, strict=True))
    unguided = [p.name for p in parts if p.null_label is None]
    if unguided and guidance not in (None, 1):
        raise ValueError(f"guidance={guidance}: {unguided[0]} has its guidance embedded and no null condition: "
                         "expected 1 or None; embedded_guidance sets it, and Flux takes a negative_prompt beside")

    def labels(n: int) -> Tensor:
        return torch.tensor([numbers[i % len(numbers)] for i in range(n)], device=device)

    row = torch.zeros((1, *shape), device=device), torch.zeros(1, dtype=torch.int64, device=device), labels(1)
    embedded = guidance_input(host, embedded_guidance)
    weight = guidance if guidance is not None else 4.0 if embedded is None else 1.0
    preset: dict[str, Any] = {"guidance": weight}
    if isinstance(schedule, ShiftedFlow):
        preset["spacing"] = own_spacing(host)
    copied = Copied(pipelines, loaders or [loader_of(p, device) for p in pipelines], names, asked, guidance_rescale,
                    max_rows, embedded, judge, shape, schedule, device)
    texts = digest or digest_of(*pipelines)
    whole = digest_of_values(
        texts, wanted, names, negative_prompt, guidance_rescale, shape, judge,
        [guidance_input(p, embedded_guidance) for p in pipelines], [_levels(p) for p in pipelines],
        [_words(p, asked) for p in pipelines], [_configs(p, host) for p in pipelines])
    settings = [denoiser(p) for p in pipelines] + [getattr(host, "vae", None)]
    vae = settings[-1]  # a half one may be widened for a moment to decode
    decoder = {} if vae is None or vae.dtype == torch.float16 else {"the VAE": vae}
    return Denoising(
        name=name, digest=digest_of_values(whole, settings, weights=False), schedule=schedule, models=models,
        shape=shape, labels=labels, judge=judge or (lambda answer, labels: {}),
        flops={m.name: flops_per_row(m.network, *row) for m in models},
        reference=("dpmpp_2m", {"n_steps": 50, **preset}),
        baseline=("ddim", {"model": "cheapest", **preset}),
        images=lambda latents: to_uint8(decode(host, latents, max_rows)), device=device, preset=preset,
        is_latent=getattr(host, "vae", None) is not None,
        check=Unchanged({m.name: m.module for m in models if m.module is not None} | decoder),
        source=source or source_of(copied, guidance, name), code=script_of(copied),
    )


def decode(pipe: Any, latents: Tensor, max_rows: int | None = None) -> Tensor:
    """Latents (n, *shape) -> pictures (n, channels, H, W) in about [-1, 1], by the pipeline's VAE (or as they are).

    max_rows: the most that are decoded at once. A half-precision VAE that overflows (`force_upcast`) computes in
    float32 meanwhile, as in diffusers' own pipelines.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return latents
    config, dtype = vae.config, vae.dtype
    mean, std = (config.get(f"latents_{key}") for key in ("mean", "std"))
    latents = latents.float()
    if mean is not None and std is not None:
        mean, std = (torch.tensor(v, device=latents.device).reshape(1, -1, 1, 1) for v in (mean, std))
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor + (config.get("shift_factor") or 0)
    upcasts = dtype == torch.float16 and config.get("force_upcast")

    def picture(part: Tensor) -> Tensor:
        with torch.no_grad():
            return vae.decode(part.to(vae.dtype), return_dict=False)[0].float()

    try:
        if upcasts:
            vae.to(dtype=torch.float32)
        return in_parts(picture, max_rows)(latents)
    finally:
        if upcasts:
            vae.to(dtype=dtype)


def to_uint8(pictures: Tensor) -> Tensor:
    """(n, 1 or 3, H, W) in [-1, 1] -> (n, H, W) or (n, H, W, 3), uint8 on the CPU."""
    scaled = ((pictures + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8).cpu()
    return scaled[:, 0] if scaled.shape[1] == 1 else scaled.permute(0, 2, 3, 1)


def digest_of(*pipelines: Any) -> str:
    """`digest_of_modules` of the pipelines' denoisers and text encoders, and of the last one's VAE, which decodes."""
    parts = [module for pipe in pipelines for module in (denoiser(pipe), *_encoders(pipe))]
    vae = getattr(pipelines[-1], "vae", None)
    return digest_of_modules((m, _config(m)) for m in (*parts, *([] if vae is None else [vae])))


@dataclass(frozen=True)
class Memory:
    """Bytes that a problem's models need together. weights: of each model; peak: of what the largest of one network
    evaluation of each and of the decoding of its rows makes beside them; total: all weights and that."""

    weights: Mapping[str, int]
    peak: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.peak


def memory(problem: Denoising, n_samples: int = 1, guidance: float | None = None) -> Memory:
    """Memory of `n_samples` samples at once, measured by evaluating each model once and decoding once.

    guidance: default the problem's preset; other than 1 it doubles the rows. Weights that two models share count once.
    Text encoders, which are done when the problem is made, are not counted. Raises ValueError for n_samples below 1.
    """
    if isinstance(n_samples, bool) or not isinstance(n_samples, Integral) or n_samples < 1:
        raise ValueError(f"n_samples={n_samples!r}: expected an integer of at least 1")
    seen: set[int] = set()

    def size(module: Any) -> int:
        tensors = [] if module is None else [t for t in (*module.parameters(), *module.buffers()) if id(t) not in seen]
        seen.update(map(id, tensors))
        return sum(t.numel() * t.element_size() for t in tensors)

    rows = n_samples * problem.branches(problem.preset.get("guidance", 1.0) if guidance is None else guidance)
    x = torch.zeros((rows, *problem.shape), dtype=problem.dtype, device=problem.device)
    t = torch.zeros(rows, dtype=torch.int64, device=problem.device)
    peak = 0
    with torch.no_grad():
        for model in problem.models:
            peak = max(peak, _peak(x.device, model.network, x, t, problem.labels(rows)))
        if problem.images is not None:
            peak = max(peak, _peak(x.device, problem.images, x[:n_samples]))
    return Memory({m.name: size(m.module) for m in problem.models}, peak)



def _peak(device: torch.device, call: Callable[..., Tensor], *given: Any) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(*given)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _LiveBytes() as live:
        call(*given)
    return live.peak


def _check_numbers(guidance: float | None, rescale: float, max_rows: int | None) -> None:
    def number(value: Any) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)

    if guidance is not None and not number(guidance):
        raise ValueError(f"guidance={guidance!r}: expected a finite number or None")
    if not number(rescale) or not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale={rescale!r}: expected a number in [0, 1]")
    if max_rows is not None and (isinstance(max_rows, bool) or not isinstance(max_rows, Integral) or max_rows < 1):
        raise ValueError(f"max_rows={max_rows!r}: expected an integer of at least 1, or None for all at once")


def _config(module: Any) -> dict[str, Any]:
    config = module.config
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def _configs(pipe: Any, host: Any) -> list[Any]:
    """Configurations of what answers are made with, weights aside: a VAE's scale, a denoiser's guidance input."""
    vae = getattr(host, "vae", None)
    return [{k: v for k, v in _config(m).items() if not str(k).startswith("_")}
            for m in (denoiser(pipe), *([] if vae is None else [vae]))]


def _encoders(pipe: Any) -> list[Any]:
    parts = getattr(pipe, "components", {})
    return [parts[k] for k in sorted(parts) if k.startswith("text_encoder") and parts[k] is not None]


def _words(pipe: Any, asked: Asked) -> list[Any]:
    """What texts become before an encoder reads them, and the pipeline's own settings of how."""
    texts = [t for t in (*asked.conditions, asked.negative_prompt or "") if isinstance(t, str)]
    parts = getattr(pipe, "components", {})
    tokenizers = [parts[k] for k in sorted(parts) if k.startswith("tokenizer") and parts[k] is not None]
    if not isinstance(asked.conditions[0], str):
        return []
    return [pipe.config.get("force_zeros_for_empty_prompt"), getattr(pipe, "tokenizer_max_length", None),
            [(type(t).__name__, t.model_max_length, t.padding_side, t.pad_token_id, t(texts)["input_ids"])
             for t in tokenizers]]


def _levels(pipe: Any) -> list[Any]:
    """What the pipeline's noise levels and its kind of prediction follow from.

    A table of levels is told by what it was computed from, as its last digit may differ from processor to processor; by
    its numbers only where somebody wrote into it.
    """
    scheduler, config = pipe.scheduler, pipe.scheduler.config
    if not hasattr(scheduler, "alphas_cumprod"):
        return [type(scheduler).__name__, {k: v for k, v in config.items() if not k.startswith("_")}]
    fresh = type(scheduler).from_config(config).alphas_cumprod
    table = scheduler.alphas_cumprod
    is_fresh = table.shape == fresh.shape and torch.equal(table.to(fresh), fresh)
    return [{key: config.get(key) for key in _TABLE}, config.get("prediction_type", "epsilon"),
            None if is_fresh else table]
