"""How the denoiser of a diffusers pipeline is asked for an estimate: conditions, resolution, guidance, by family."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.problems.denoising import DiscreteSchedule, Network, RectifiedFlow, Schedule

PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
KINDS = ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "DiTTransformer2DModel",
         "UNet2DModel")
VAE_FIELDS = ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True)
class ShiftedFlow(RectifiedFlow):
    """A rectified flow whose steps are shifted to more noise: t' = shift t / (1 + (shift - 1) t).

    Source: arXiv 2403.03206, section 5.3.2. `cleanest` is in shifted time. Its networks see t' itself.
    """

    shift: float = 1.0

    def times(self, n_steps: int, spacing: str) -> list[float]:
        even = RectifiedFlow(_shifted(self.start, 1 / self.shift), _shifted(self.cleanest, 1 / self.shift))
        if spacing not in ("trailing", "leading", "linspace"):
            return super().times(n_steps, spacing)
        # rounding must not take the first one past the start
        return [min(_shifted(t, self.shift), self.start) for t in even.times(n_steps, spacing)]


def _shifted(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


class Part(NamedTuple):
    """What one pipeline brings: its denoiser's fields, the shape of its latents, the label number of each condition."""

    name: str
    network: Network
    schedule: Schedule
    prediction: str
    null_label: int | None
    shape: tuple[int, ...]
    numbers: list[int]


class Asked(NamedTuple):
    """What is asked of all pipelines: see `from_pipelines`."""

    conditions: Sequence[Any]
    negative_prompt: str | None
    height: int | None
    width: int | None
    embedded_guidance: float | None


def denoiser(pipe: Any, who: str = "the pipeline") -> Any:
    """The pipeline's U-Net or transformer. Raises ValueError where it has none, or one in training mode."""
    module = getattr(pipe, "unet", None)
    module = getattr(pipe, "transformer", None) if module is None else module
    if module is None:
        raise ValueError(f"{who}: {type(pipe).__name__} has neither a unet nor a transformer")
    if any(part.training and getattr(part, "p", 0) for part in module.modules() if "Dropout" in type(part).__name__):
        raise ValueError(f"{who}: the {type(module).__name__} is in training mode, where dropout makes its answers "
                         "random: call .eval() on it before")
    return module


def device_of(pipe: Any) -> torch.device:
    """Where the pipeline computes, which with offloading is not where its weights lie."""
    return torch.device(getattr(pipe, "_execution_device", None) or denoiser(pipe).device)


def pixels_per_latent(pipe: Any) -> int:
    """Along each side of a picture."""
    blocks = getattr(getattr(pipe, "vae", None), "config", {}).get("block_out_channels", (1,))
    return int(getattr(pipe, "vae_scale_factor", None) or 2 ** (len(blocks) - 1))


def guidance_input(pipe: Any, given: float | None) -> float | None:
    """The guidance that a distilled denoiser takes as an input (Flux, LCM): given, or the pipeline call's default.

    None where the denoiser has no such input. Raises ValueError where one is given and it has none, or is no number.
    """
    config = denoiser(pipe).config
    if not (config.get("guidance_embeds") or config.get("time_cond_proj_dim")):
        if given is not None:
            raise ValueError(f"embedded_guidance={given!r}: {type(denoiser(pipe)).__name__} takes no guidance as an "
                             "input (guidance_embeds, time_cond_proj_dim): expected None; guidance is a knob of runs")
        return None
    value = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default if given is None else given
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"embedded_guidance={value!r}: expected a finite number")
    return float(value)


def part_of(name: str, pipe: Any, asked: Asked) -> Part:
    """Raises ValueError, naming the pipeline, for what cannot be driven: see `from_pipelines`."""
    module = denoiser(pipe, name)
    kind = type(getattr(module, "_orig_mod", module)).__name__
    shape = _shape(name, pipe, kind, asked)
    schedule, prediction = _levels(name, pipe, math.prod(shape[1:]) // 4)
    told = pipe.scheduler.config.num_train_timesteps if prediction == "flow" else None
    if kind in KINDS[:3]:
        _all_texts(name, asked.conditions)
        make = {"UNet2DConditionModel": _unet, "SD3Transformer2DModel": _sd3, "FluxTransformer2DModel": _flux}[kind]
        network, has_null = make(name, pipe, module, asked, shape)
        count = len(asked.conditions)
        null = count if has_null else None
        return Part(name, _told(network, told), schedule, prediction, null, shape, list(range(count)))
    if kind == "DiTTransformer2DModel" or (kind == "UNet2DModel" and module.config.num_class_embeds):
        null = module.config.num_embeds_ada_norm if kind.startswith("DiT") else module.config.num_class_embeds - 1
        wrong = [c for c in asked.conditions if not isinstance(c, int) or isinstance(c, bool) or not 0 <= c < null]
        if wrong:
            raise ValueError(f"conditions {wrong}: {name} takes class numbers from 0 to {null - 1}")
        if asked.negative_prompt is not None:
            raise ValueError(f"negative_prompt={asked.negative_prompt!r}: {name} takes class numbers, no texts: "
                             "expected None")
        return Part(name, _told(_by_class(module), told), schedule, prediction, null, shape, list(asked.conditions))
    raise ValueError(f"{name}: cannot drive a {kind}: expected one of {', '.join(KINDS)} (the last with classes)")


def check_vae(ours: Any, hosts: Any, who: str) -> None:
    """Raises ValueError, with both values, where latents of one pipeline do not mean the same to the host's VAE.

    Other weights of a VAE are no reason: decoders are refined on latents that stay.
    """
    if getattr(ours, "vae", None) is None or getattr(hosts, "vae", None) is None:
        return
    pairs = {f"vae {key}": tuple(_plain(p.vae.config.get(key)) for p in (ours, hosts)) for key in VAE_FIELDS}
    pairs["vae_scale_factor"] = tuple(map(pixels_per_latent, (ours, hosts)))
    for what, (own, other) in pairs.items():
        if own != other:
            raise ValueError(f"{who}: {what} is {own}, the host's is {other}; they have to be equal")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _all_texts(name: str, conditions: Sequence[Any]) -> None:
    wrong = [c for c in conditions if not isinstance(c, str)]
    if wrong:
        raise ValueError(f"conditions {wrong}: {name} takes prompts, expected texts")


def _levels(name: str, pipe: Any, n_tokens: int) -> tuple[Schedule, str]:
    """The noise schedule that the pipeline's scheduler stands for, and the kind of prediction."""
    scheduler, config = pipe.scheduler, pipe.scheduler.config
    who = f"{name}: {type(scheduler).__name__}"
    if type(scheduler).__name__ in FLOWS:
        odd = [key for key in ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
                               "invert_sigmas", "stochastic_sampling") if config.get(key)]
        if odd or config.get("time_shift_type", "exponential") != "exponential":
            raise ValueError(f"{who} has {', '.join(odd) or 'time_shift_type ' + repr(config.time_shift_type)} set: "
                             "expected a plain or exponentially shifted flow")
        shift, least = config.get("shift") or 1.0, 1 / config.num_train_timesteps
        if config.get("use_dynamic_shifting"):  # by the number of tokens, on a line through two points
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
            shift = math.exp(config.get("base_shift", 0.5) + slope * (n_tokens - low))
        else:
            least = _shifted(least, shift)  # diffusers shifts its last level twice
        return ShiftedFlow(cleanest=_shifted(least, shift), shift=shift), "flow"
    if not hasattr(scheduler, "alphas_cumprod") or config.get("use_flow_sigmas"):
        why = "has use_flow_sigmas set" if config.get("use_flow_sigmas") else "has no alphas_cumprod"
        raise ValueError(f"{who} {why}: expected a scheduler with alphas_cumprod (DDIM, DPM-Solver) or one of "
                         f"{', '.join(FLOWS)}; `workbench.integrations.diffusers.stitch` takes any")
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"{who}: prediction_type={kind!r}: expected one of {', '.join(PREDICTION_TYPES)}")
    return DiscreteSchedule(tuple(scheduler.alphas_cumprod.tolist())), PREDICTION_TYPES[kind]


def _shape(name: str, pipe: Any, kind: str, asked: Asked) -> tuple[int, ...]:
    """Of one sample's latents, for pictures of the asked height and width."""
    config, scale = denoiser(pipe).config, pixels_per_latent(pipe)
    channels, own = config.in_channels, config.get("sample_size")
    if kind.startswith("Flux"):  # packs 2 x 2 latents into one token
        channels, own = channels // 4, pipe.default_sample_size
    rows, columns = own if isinstance(own, tuple | list) else (own, own)
    multiple = scale * (2 if kind.startswith(("Flux", "SD3")) else 1)
    sides = []
    for argument, given, default in (("height", asked.height, rows), ("width", asked.width, columns)):
        if given is None and default is None:
            raise ValueError(f"{argument}=None: {name} has no size of its own, expected pixels")
        pixels = default * scale if given is None else given
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < multiple or pixels % multiple:
            raise ValueError(f"{argument}={pixels!r}: {name} draws multiples of {multiple} pixels")
        if kind.startswith("DiT") and pixels != default * scale:
            raise ValueError(f"{argument}={pixels}: {name}, a {kind}, draws {default * scale} pixels only")
        largest = (config.get("pos_embed_max_size") or 0) * multiple
        if largest and pixels > largest:
            raise ValueError(f"{argument}={pixels}: {name} draws at most {largest} pixels")
        sides.append(pixels // scale)
    return (channels, *sides)


def _told(network: Network, times: int | None) -> Network:
    """A flow's network as its pipeline asks it: with times from 0 to `times`, not to 1."""
    if times is None:
        return network
    return lambda x, t, labels: network(x, t.to(torch.float32) * times, labels)


def _by_class(module: Any) -> Network:
    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        # diffusers looks through all modules for `dtype`, which takes a tenth as long as a small model's evaluation
        own = x if next(module.parameters()).dtype == x.dtype else x.to(module.dtype)
        out = module(own, t, class_labels=labels, return_dict=False)[0]
        return out[:, : x.shape[1]].to(x.dtype)  # some models append a variance estimate

    return network


def _unet(name: str, pipe: Any, module: Any, asked: Asked, shape: tuple[int, ...]) -> tuple[Network, bool]:
    config = module.config
    is_xl = config.get("addition_embed_type") == "text_time"
    for key, allowed in (("addition_embed_type", (None, "text_time")), ("class_embed_type", (None,)),
                         ("encoder_hid_dim_type", (None, "text_proj"))):
        if (found := getattr(config, key, None)) not in allowed:
            raise ValueError(f"{name}: the U-Net has {key}={found!r}, whose inputs are not known here (an IP-Adapter "
                             f"needs an image): expected {' or '.join(map(str, allowed))}; `stitch` takes it")
    if getattr(config, "encoder_hid_dim_type", None) is None and getattr(module, "encoder_hid_proj", None) is not None:
        raise ValueError(f"{name}: an IP-Adapter is loaded, which needs an image: unload it; `stitch` takes it")
    weight, prompts, where = guidance_input(pipe, asked.embedded_guidance), list(asked.conditions), device_of(pipe)
    pooled = None
    with torch.no_grad():
        if is_xl:
            texts, none, pooled, none_pooled = pipe.encode_prompt(
                prompt=prompts, device=where, num_images_per_prompt=1, do_classifier_free_guidance=True,
                negative_prompt=asked.negative_prompt)
            pooled = torch.cat((pooled, none_pooled[:1]))
        else:
            texts = pipe.encode_prompt(prompts, where, 1, False)[0]
            none = pipe.encode_prompt([asked.negative_prompt or ""], where, 1, False)[0]
    table = torch.cat((texts, none[:1]))
    pixels = [side * pixels_per_latent(pipe) for side in shape[1:]]
    more = None if weight is None else pipe.get_guidance_scale_embedding(torch.tensor([weight - 1.0]),
                                                                         config.time_cond_proj_dim)

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        given: dict[str, Any] = {}
        if pooled is not None:
            sizes = torch.tensor([[*pixels, 0, 0, *pixels]], dtype=table.dtype, device=x.device)
            given["added_cond_kwargs"] = {"text_embeds": pooled[labels].to(module.dtype),
                                          "time_ids": sizes.repeat(len(x), 1)}
        if more is not None:
            given["timestep_cond"] = more.to(x.device, module.dtype).repeat(len(x), 1)
        return module(x.to(module.dtype), t, encoder_hidden_states=table[labels].to(module.dtype), return_dict=False,
                      **given)[0].to(x.dtype)

    return network, weight is None


def _sd3(name: str, pipe: Any, module: Any, asked: Asked, shape: tuple[int, ...]) -> tuple[Network, bool]:
    guidance_input(pipe, asked.embedded_guidance)  # refuses what it has not
    with torch.no_grad():
        texts, none, pooled, none_pooled = pipe.encode_prompt(
            prompt=list(asked.conditions), prompt_2=None, prompt_3=None, device=device_of(pipe),
            num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=asked.negative_prompt)
    table, pooled = torch.cat((texts, none[:1])), torch.cat((pooled, none_pooled[:1]))

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return module(hidden_states=x.to(module.dtype), timestep=t, return_dict=False,
                      encoder_hidden_states=table[labels].to(module.dtype),
                      pooled_projections=pooled[labels].to(module.dtype))[0].to(x.dtype)

    return network, True


def _flux(name: str, pipe: Any, module: Any, asked: Asked, shape: tuple[int, ...]) -> tuple[Network, bool]:
    weight, where = guidance_input(pipe, asked.embedded_guidance), device_of(pipe)
    texts = [*asked.conditions, *([] if asked.negative_prompt is None else [asked.negative_prompt])]
    with torch.no_grad():
        table, pooled, text_places = pipe.encode_prompt(prompt=texts, device=where, num_images_per_prompt=1)
    rows, columns = torch.meshgrid(*(torch.arange(side // 2) for side in shape[1:]), indexing="ij")
    places = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        strength = None if weight is None else torch.full((len(x),), weight, device=x.device)
        out = module(hidden_states=pack(x).to(module.dtype), timestep=(t / 1000).to(module.dtype), guidance=strength,
                     pooled_projections=pooled[labels].to(module.dtype),
                     encoder_hidden_states=table[labels].to(module.dtype), txt_ids=text_places,
                     img_ids=places.to(x.device, module.dtype), return_dict=False)[0]
        return unpack(out, *shape[1:]).to(x.dtype)

    return network, asked.negative_prompt is not None


def pack(latents: Tensor) -> Tensor:
    """Latents (n, C, H, W) as Flux's tokens (n, H W / 4, 4 C), one per 2 x 2 latents."""
    n, c, h, w = latents.shape
    return latents.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of this height and width."""
    n, _, c = tokens.shape
    split = tokens.reshape(n, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return split.reshape(n, c // 4, height, width)


def in_parts(network: Callable[..., Tensor], max_rows: int | None) -> Callable[..., Tensor]:
    """`network`, asked for at most max_rows rows at once; its tensors have a leading axis of rows."""
    if max_rows is None:
        return network

    def parts(x: Tensor, *rest: Any) -> Tensor:
        if len(x) <= max_rows:
            return network(x, *rest)
        split = [[None] * -(-len(x) // max_rows) if r is None else r.split(max_rows) for r in (x, *rest)]
        return torch.cat([network(*part) for part in zip(*split, strict=True)])

    return parts
