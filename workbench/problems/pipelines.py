"""A denoising problem made of diffusers pipelines: the embedded models and the user's own take this same road."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.cost import flops_per_row
from workbench.methods.denoising.t_stitch import full_fractions, step_counts
from workbench.problems.denoising import Denoiser, Denoising, DiscreteSchedule, Network, grid
from workbench.quality import Quality
from workbench.run import Inputs

PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def from_pipelines(*pipelines: Any, conditions: Sequence[int] | Sequence[str], names: Sequence[str] | None = None,
                   judge: Callable[[Tensor, Tensor | None], dict[str, Quality]] | None = None,
                   loaders: Sequence[str] | None = None, name: str = "your pipelines", guidance: float | None = None,
                   digest: str | None = None, source: str | None = None) -> Denoising:
    """A problem whose models are the denoisers of diffusers pipelines of one kind, cheapest first.

    Class-conditional pipelines (`DiTPipeline`, the embedded `GlyphPipeline`) take class numbers as `conditions`, Stable
    Diffusion 1.x and 2.x take prompts; sample i is conditioned on conditions[i % len(conditions)]. The last pipeline
    decodes. names: of the models (default: m1, m2, ...). loaders, source: Python expressions that load each pipeline
    and lines that build this problem, for "copy as code". judge(answer, labels) grades answers; without one there is
    only the distance from the reference. digest: of the weights (default: `digest_of`).
    Costs one network row per evaluation; FLOPs per row are counted once on each network.
    Raises ValueError for fewer than one pipeline, no conditions, latents of different shape, a flow-matching
    scheduler (use `workbench.integrations.diffusers.stitch`) or a denoiser that this road does not know.
    """
    if not pipelines or not conditions:
        raise ValueError(f"{len(pipelines)} pipelines, {len(conditions)} conditions: expected at least one of each")
    names = names or [f"m{k + 1}" for k in range(len(pipelines))]
    parts = [_part(label, pipe, conditions) for label, pipe in zip(names, pipelines, strict=True)]
    shapes = [part.shape for part in parts]
    if len(set(shapes)) > 1:
        raise ValueError(f"latents of different shapes cannot be stitched: {dict(zip(names, shapes, strict=True))}")
    host, shape, numbers = pipelines[-1], shapes[0], parts[0].numbers
    one = {part.schedule: part.schedule for part in parts}  # equal schedules become one object, which compares at once
    schedule = one[parts[-1].schedule]
    models = tuple(Denoiser(p.name, p.network, one[p.schedule], p.prediction, p.null_label, _denoiser(pipe))
                   for p, pipe in zip(parts, pipelines, strict=True))
    device = str(_denoiser(host).device)

    def labels(n: int) -> Tensor:
        return torch.tensor([numbers[i % len(numbers)] for i in range(n)], device=device)

    row = torch.zeros((1, *shape), device=device), torch.zeros(1, dtype=torch.int64, device=device), labels(1)
    weight = 4.0 if guidance is None else guidance
    return Denoising(
        name=name, digest=digest or digest_of(*pipelines), schedule=schedule, models=models, shape=shape,
        labels=labels, judge=judge or (lambda answer, labels: {}),
        flops={m.name: flops_per_row(m.network, *row) for m in models},
        reference=("dpmpp_2m", {"n_steps": 50, "guidance": weight}),
        baseline=("ddim", {"model": "cheapest", "guidance": weight}),
        images=lambda latents: to_uint8(decode(host, latents)), device=device, preset={"guidance": weight},
        is_latent=getattr(host, "vae", None) is not None,
        source=source or _source(pipelines, conditions, names), code=_code(
            loaders or [_loader(p) for p in pipelines], shape, schedule, conditions, host),
    )


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Latents (n, *shape) -> pictures (n, channels, H, W) in about [-1, 1], by the pipeline's VAE (or as they are)."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return latents
    with torch.no_grad():
        return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0].float()


def to_uint8(pictures: Tensor) -> Tensor:
    """(n, 1 or 3, H, W) in [-1, 1] -> (n, H, W) or (n, H, W, 3), uint8 on the CPU."""
    scaled = ((pictures + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8).cpu()
    return scaled[:, 0] if scaled.shape[1] == 1 else scaled.permute(0, 2, 3, 1)


def digest_of(*pipelines: Any) -> str:
    """`digest_of_modules` of the pipelines' denoisers and VAEs."""
    parts = [module for pipe in pipelines for module in (_denoiser(pipe), getattr(pipe, "vae", None)) if module]
    return digest_of_modules((module, dict(module.config)) for module in parts)


def digest_of_modules(parts: Iterable[tuple[Any, Mapping[str, Any]]]) -> str:
    """SHA-256 (16 hex digits) of (torch module, configuration) pairs, by the head (4 kB) of every tensor."""
    digest = hashlib.sha256()
    for module, config in parts:
        digest.update(repr(sorted((k, v) for k, v in config.items() if not k.startswith("_"))).encode())
        for key, tensor in module.state_dict().items():
            head = tensor.detach().flatten()[:1024].float().cpu().numpy()
            digest.update(key.encode() + repr(tuple(tensor.shape)).encode() + head.tobytes())
    return digest.hexdigest()[:16]


def _denoiser(pipe: Any) -> Any:
    module = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if module is None:
        raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer")
    return module.eval()


class _Part(NamedTuple):
    """What one pipeline brings: its denoiser's fields, the shape of its latents, the label number of each condition."""

    name: str
    network: Network
    schedule: DiscreteSchedule
    prediction: str
    null_label: int
    shape: tuple[int, ...]
    numbers: list[int]


def _part(name: str, pipe: Any, conditions: Sequence[Any]) -> _Part:
    module, config = _denoiser(pipe), pipe.scheduler.config
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise ValueError(f"{name}: {type(pipe.scheduler).__name__} has no alphas_cumprod; "
                         "use workbench.integrations.diffusers.stitch for such pipelines")
    kind, size = type(module).__name__, module.config.sample_size
    if kind == "UNet2DConditionModel":
        null, numbers = len(conditions), list(range(len(conditions)))
        network = _by_text(pipe, module, [*conditions, ""])
    elif kind == "DiTTransformer2DModel" or (kind == "UNet2DModel" and module.config.num_class_embeds):
        null = module.config.num_embeds_ada_norm if kind.startswith("DiT") else module.config.num_class_embeds - 1
        network, numbers = _by_class(module), list(conditions)
        wrong = [c for c in conditions if not isinstance(c, int) or not 0 <= c < null]
        if wrong:
            raise ValueError(f"conditions {wrong}: {name} takes class numbers from 0 to {null - 1}")
    else:
        raise ValueError(f"{name}: cannot drive a {kind}; class-conditional UNet2DModel, DiTTransformer2DModel and "
                         "UNet2DConditionModel are known")
    shape = (module.config.in_channels, *(size if isinstance(size, tuple | list) else (size, size)))
    schedule = DiscreteSchedule(tuple(pipe.scheduler.alphas_cumprod.tolist()))
    prediction = PREDICTION_TYPES[config.get("prediction_type", "epsilon")]
    return _Part(name, network, schedule, prediction, null, shape, numbers)


def _by_class(module: Any) -> Network:
    dtype = module.dtype

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        out = module(x.to(dtype), t, class_labels=labels, return_dict=False)[0]
        return out[:, : x.shape[1]].to(x.dtype)  # some models append a variance estimate

    return network


def _by_text(pipe: Any, module: Any, prompts: Sequence[str]) -> Network:
    with torch.no_grad():
        table, _ = pipe.encode_prompt(list(prompts), module.device, 1, do_classifier_free_guidance=False)
    dtype = module.dtype

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        out = module(x.to(dtype), t, encoder_hidden_states=table[labels].to(dtype), return_dict=False)[0]
        return out.to(x.dtype)

    return network


def _loader(pipe: Any) -> str:
    return f"{type(pipe).__name__}.from_pretrained({getattr(pipe.config, '_name_or_path', None) or '...'!r})"


def _code(loaders: Sequence[str], shape: tuple[int, ...], schedule: DiscreteSchedule, conditions: Sequence[Any],
          host: Any) -> Callable[[Inputs], str | None]:
    """A function from a run's inputs to the script that reproduces its pictures with `stitch` alone, or None."""
    by_class = not isinstance(conditions[0], str)

    def code(inputs: Inputs) -> str | None:
        knobs = inputs.knobs
        if inputs.method not in ("ddim", "dpmpp_2m", "t_stitch"):
            return None
        solver = knobs.get("solver", inputs.method)
        if knobs.get("eta") or knobs.get("reset_history") or not _alike(solver, knobs, len(schedule.alphas_cumprod)):
            return None
        if inputs.method == "t_stitch":
            shares = full_fractions(knobs["fractions"], len(loaders))
            used = list(loaders)
            if knobs["order"] == "costly_first":
                shares, used = shares[::-1], used[::-1]
            points = grid(schedule, knobs["n_steps"], knobs["spacing"])
            counts = step_counts(shares, points, schedule, knobs["boundary"])
            parts = [(c, loader) for c, loader in zip(counts, used, strict=True) if c]
        else:
            parts = [(knobs["n_steps"], loaders[-1] if knobs["model"] == "best" else loaders[0])]
        given = [conditions[i % len(conditions)] for i in range(inputs.n_samples)]
        fractions = tuple(c / knobs["n_steps"] for c, _ in parts)
        lines = ["import torch", *_IMPORTS[solver], "from workbench.rng import Rng", ""]
        if any(loader.startswith("load_pipeline") for loader in loaders):
            lines.insert(-1, "from workbench.zoo import load_pipeline")
        else:
            lines.insert(1, f"from {type(host).__module__} import {type(host).__name__}")
        if len(parts) > 1:
            lines.insert(-2, "from workbench.integrations.diffusers import stitch")
            lines += [f"pipe = stitch({', '.join(loader for _, loader in parts)}, fractions={fractions})"]
        else:
            lines += [f"pipe = {parts[0][1]}"]
        lines += [
            _SCHEDULERS[solver].format(spacing=knobs["spacing"]),
            f"noise = Rng(seed={inputs.seed}, n_samples={inputs.n_samples}).normal({shape}, torch.float32)",
            f"images = pipe({'class_labels' if by_class else 'prompt'}={given}, latents=noise,",
            f"              num_inference_steps={knobs['n_steps']}, guidance_scale={knobs['guidance']}).images",
        ]
        return "\n".join(lines) + "\n"

    return code


def _alike(solver: str, knobs: Mapping[str, Any], n_levels: int) -> bool:
    """Whether diffusers' scheduler visits the same noise levels: its DDIM assumes a constant stride between them."""
    if solver == "ddim":
        return knobs["spacing"] in ("trailing", "leading") and n_levels % knobs["n_steps"] == 0
    return solver == "dpmpp_2m" and knobs["spacing"] == "trailing"


def _source(pipelines: Sequence[Any], conditions: Sequence[Any], names: Sequence[str]) -> str:
    kinds = sorted({(type(p).__module__, type(p).__name__) for p in pipelines})
    lines = [f"from {module} import {name}" for module, name in kinds]
    loads = ", ".join(_loader(p) for p in pipelines)
    return "\n".join([*lines, "from workbench.problems.pipelines import from_pipelines", "",
                      f"problem = from_pipelines({loads}, conditions={list(conditions)}, names={list(names)})"])


_IMPORTS: Mapping[str, list[str]] = {
    "ddim": ["from diffusers import DDIMScheduler"],
    "dpmpp_2m": ["from diffusers import DPMSolverMultistepScheduler"],
}
_SCHEDULERS = {
    "ddim": "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing={spacing!r},\n"
            "                                           set_alpha_to_one=True, clip_sample=False, steps_offset=0)",
    "dpmpp_2m": "pipe.scheduler = DPMSolverMultistepScheduler.from_config(\n"
                "    pipe.scheduler.config, timestep_spacing={spacing!r}, final_sigmas_type=\"zero\")",
}
