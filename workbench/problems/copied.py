"""Problems of pipelines as code: the lines that build them, and scripts that draw a run's pictures without them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from workbench.methods.denoising.t_stitch import full_fractions, step_counts
from workbench.problems.denoising import DiscreteSchedule, Schedule, grid
from workbench.problems.driving import Asked, ShiftedFlow, denoiser, pixels_per_latent
from workbench.runs import Inputs


class Copied(NamedTuple):
    """What code about a problem names. rescale: guidance_rescale; weight: the embedded guidance, where there is one."""

    pipelines: Sequence[Any]
    loaders: Sequence[str]
    names: Sequence[str]
    asked: Asked
    rescale: float
    max_rows: int | None
    weight: float | None
    judge: Any
    shape: tuple[int, ...]
    schedule: Schedule
    device: str


def loader_of(pipe: Any, device: str) -> str:
    """The expression that loads a pipeline as it is: from where it came, in its type, on its device."""
    path, dtype = getattr(pipe.config, "_name_or_path", None) or "...", denoiser(pipe).dtype
    options = "" if dtype == torch.float32 else f", torch_dtype={dtype}"
    return f"{type(pipe).__name__}.from_pretrained({path!r}{options})" + ("" if device == "cpu" else f".to({device!r})")


def source_of(given: Copied, guidance: float | None, name: str) -> str:
    """The lines that build the problem, under the name `problem`."""
    judge = _import_of(given.judge)
    options = {"names": list(given.names), "name": name if name != "your pipelines" else None, "guidance": guidance,
               "negative_prompt": given.asked.negative_prompt, "guidance_rescale": given.rescale or None,
               "embedded_guidance": given.asked.embedded_guidance, "height": given.asked.height,
               "width": given.asked.width, "max_rows": given.max_rows}
    told = "".join(f", {key}={value!r}" for key, value in options.items() if value is not None)
    judged = "" if given.judge is None else ", judge=judge"
    lines = ["import torch"] if any("torch." in loader for loader in given.loaders) else []
    lines += sorted({_import(type(p)) for p in given.pipelines})
    lines += ["from workbench.problems.pipelines import from_pipelines"]
    if judge:
        lines += [judge]
    elif judged:
        lines += ["", f"# {getattr(given.judge, '__qualname__', type(given.judge).__name__)!r} has no name that can be "
                      "imported: set `judge` to it", "judge = None"]
    return "\n".join([*lines, "", f"problem = from_pipelines({', '.join(given.loaders)}, "
                                  f"conditions={list(given.asked.conditions)}{told}{judged})"])


def script_of(given: Copied) -> Callable[[Inputs], str | None]:
    """A function from a run's inputs to the script that draws its pictures with the pipelines alone, or None."""
    host = given.pipelines[-1]

    def script(inputs: Inputs) -> str | None:
        knobs = inputs.knobs
        if inputs.method not in ("ddim", "dpmpp_2m", "t_stitch"):
            return None
        solver = knobs.get("solver", inputs.method)
        call = _call(given, knobs, inputs.n_samples)
        if call is None or knobs.get("eta") or knobs.get("reset_history") or not _alike(given, solver, knobs):
            return None
        parts = _parts(given, inputs.method, knobs)
        fractions = tuple(c / knobs["n_steps"] for c, _ in parts)
        is_zoo, packs = any("load_pipeline" in loader for loader in given.loaders), "Flux" in type(host).__name__
        judge = _import_of(given.judge) if "DiT" not in type(host).__name__ else None
        imports = ["import torch"]
        if not is_zoo:
            imports += sorted({_import(type(p)) for p in given.pipelines})
        imports += [_IMPORTS[solver]] * isinstance(given.schedule, DiscreteSchedule) + [""]
        imports += ["from workbench.integrations.diffusers import stitch"] * (len(parts) > 1)
        imports += ["from workbench.pictures import save_grid"]
        imports += [f"from workbench.problems.driving import pack{', unpack' * bool(judge)}"] * packs
        imports += ["from workbench.problems.pipelines import decode, to_uint8"] * bool(judge)
        imports += ["from workbench.rng import Rng"] + ["from workbench.zoo import load_pipeline"] * is_zoo
        imports += ["", judge] if judge else []
        lines = [f"pipe = stitch({', '.join(loader for _, loader in parts)}, fractions={fractions})"
                 if len(parts) > 1 else f"pipe = {parts[0][1]}"]
        if isinstance(given.schedule, DiscreteSchedule):
            lines += [_SCHEDULERS[solver].format(spacing=knobs["spacing"])]
        place = "" if given.device == "cpu" else f", {given.device!r}"
        lines += [f"noise = Rng(seed={inputs.seed}, n_samples={inputs.n_samples}).normal({given.shape}, torch.float32"
                  f"{place})"]
        dtype = denoiser(host).dtype
        noise = ("pack(noise)" if packs else "noise") + ("" if dtype == torch.float32 else f".to({dtype})")
        conditions = [given.asked.conditions[i % len(given.asked.conditions)] for i in range(inputs.n_samples)]
        what = "prompt" if isinstance(conditions[0], str) else "class_labels"
        told = {"num_inference_steps": knobs["n_steps"], **call, **({"output_type": "latent"} if judge else {})}
        drawn = (f"pipe({what}={conditions}, latents={noise},\n"
                 f"              {', '.join(f'{key}={value!r}' for key, value in told.items())}).images")
        if judge:
            latents = f"unpack({drawn}, {given.shape[1]}, {given.shape[2]})" if packs else drawn
            labels = [i % len(given.asked.conditions) if what == "prompt" else c for i, c in enumerate(conditions)]
            lines += [f"latents = {latents}",
                      f"print(judge(latents.float(), torch.tensor({labels}, device=latents.device)))",
                      f"images = to_uint8(decode(pipe, latents{_rows(given)}))"]
        else:
            lines += [f"images = {drawn}"]
        return "\n".join([*imports, "", *lines, "save_grid(images, \"pictures.png\")"]) + "\n"

    return script


def _rows(given: Copied) -> str:
    return "" if given.max_rows is None else f", {given.max_rows}"


def _parts(given: Copied, method: str, knobs: Mapping[str, Any]) -> list[tuple[int, str]]:
    """(solver steps, loader) of each model that has steps, in the order of the trajectory."""
    if method != "t_stitch":
        return [(knobs["n_steps"], given.loaders[-1] if knobs["model"] == "best" else given.loaders[0])]
    shares, used = full_fractions(knobs["fractions"], len(given.loaders)), list(given.loaders)
    if knobs["order"] == "costly_first":
        shares, used = shares[::-1], used[::-1]
    points = grid(given.schedule, knobs["n_steps"], knobs["spacing"])
    counts = step_counts(shares, points, given.schedule, knobs["boundary"])
    return [(c, loader) for c, loader in zip(counts, used, strict=True) if c]


def _call(given: Copied, knobs: Mapping[str, Any], n_samples: int) -> dict[str, Any] | None:
    """The arguments of the pipeline's call beside conditions, noise and steps; None where it cannot do the same."""
    host, guidance = type(given.pipelines[-1]).__name__, knobs["guidance"]
    by_text = isinstance(given.asked.conditions[0], str)
    rescales = by_text and "UNet" in type(denoiser(given.pipelines[-1])).__name__
    if (guidance < 1 and "Glyph" not in host) or (given.rescale and not rescales):
        return None  # below 1 these pipelines leave guidance out, and only those of texts and U-Nets rescale it
    call: dict[str, Any] = {"guidance_scale": guidance}
    if given.weight is not None:
        call = {"guidance_scale": given.weight}
        if guidance != 1:
            call["true_cfg_scale"] = guidance
    if given.rescale:
        call["guidance_rescale"] = given.rescale
    if given.asked.negative_prompt is not None and guidance != 1:
        call["negative_prompt"] = [given.asked.negative_prompt] * n_samples
    scale = pixels_per_latent(given.pipelines[-1])
    if by_text:
        call |= {"height": given.shape[1] * scale, "width": given.shape[2] * scale}
    return call


def _alike(given: Copied, solver: str, knobs: Mapping[str, Any]) -> bool:
    """Whether diffusers' scheduler visits the same noise levels: its DDIM assumes a constant stride between them."""
    if isinstance(given.schedule, ShiftedFlow):
        return solver == "ddim" and knobs["spacing"] == own_spacing(given.pipelines[-1])
    assert isinstance(given.schedule, DiscreteSchedule)
    if solver == "ddim":
        is_even = len(given.schedule.alphas_cumprod) % knobs["n_steps"] == 0
        return is_even and knobs["spacing"] in ("trailing", "leading")
    return solver == "dpmpp_2m" and knobs["spacing"] == "trailing"


def own_spacing(pipe: Any) -> str:
    """The spacing of a flow pipeline's own steps: Flux passes its own levels, the others let the scheduler choose."""
    return "trailing" if "Flux" in type(denoiser(pipe)).__name__ else "linspace"


def _import(kind: type) -> str:
    module = "diffusers" if kind.__module__.startswith("diffusers.") else kind.__module__
    return f"from {module} import {kind.__name__}"


def _import_of(judge: Any) -> str | None:
    """The line that imports a function under the name `judge`; None where no import finds it again."""
    module, name = getattr(judge, "__module__", None), getattr(judge, "__qualname__", "")
    if judge is None or module in (None, "__main__", "builtins") or not name.isidentifier():
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return f"from {module} import {name}{'' if name == 'judge' else ' as judge'}" if found is judge else None


_IMPORTS: Mapping[str, str] = {
    "ddim": "from diffusers import DDIMScheduler",
    "dpmpp_2m": "from diffusers import DPMSolverMultistepScheduler",
}
_SCHEDULERS = {
    "ddim": "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing={spacing!r},\n"
            "                                           set_alpha_to_one=True, clip_sample=False, steps_offset=0)",
    "dpmpp_2m": "pipe.scheduler = DPMSolverMultistepScheduler.from_config(\n"
                "    pipe.scheduler.config, timestep_spacing={spacing!r}, final_sigmas_type=\"zero\")",
}
