"""Whether denoisers can share one trajectory: what must agree between their pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from workbench.problems.driving import check_vae

# What must agree for one latent, one text embedding and one noise level to mean the same to both models.
MODEL_FIELDS = (
    "in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim",
    "caption_channels", "encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim", "class_embed_type",
    "num_class_embeds", "num_embeds_ada_norm", "time_cond_proj_dim", "guidance_embeds",
    "use_additional_conditions",
)  # fmt: skip
SCHEDULE_FIELDS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "rescale_betas_zero_snr", "prediction_type", "use_flow_sigmas", "flow_shift", "shift",
    "use_dynamic_shifting",
)  # fmt: skip
# What a ControlNet or a T2I-Adapter makes is added to the U-Net's own features: with one the layouts must agree.
CONTROL_FIELDS = {"controlnet": ("block_out_channels", "layers_per_block"), "adapter": ("block_out_channels",)}


def check_pair(given: Any, small: Any, host: Any, large: Any, argument: str) -> None:
    """Raises ValueError, with both values, if `given` cannot draw a part of the host's trajectory."""

    def same(what: str, ours: Any, theirs: Any) -> None:
        if ours != theirs:
            raise ValueError(f"{argument}: {what} is {ours}, the host's is {theirs}; they have to be equal")

    same("the class of the denoiser", type(bare(small)).__name__, type(bare(large)).__name__)
    read = _reader(small.config, large.config)
    for key in MODEL_FIELDS:
        if key == "cross_attention_dim" and large.config.get("caption_channels"):
            continue  # behind a caption projection it is an inner width
        same(key, *read(key))
    if not _takes_any_size(large.config):
        same("sample_size", *read("sample_size"))
    check_control(small, host, large, argument)
    check_adapted(small, large, argument)
    same("dtype", small.dtype, large.dtype)

    if isinstance(given, DiffusionPipeline):
        same("the set of text encoders", text_encoders(given), text_encoders(host))
        check_vae(given, host, argument)
        read = _reader(given.scheduler.config, host.scheduler.config)
        for key in SCHEDULE_FIELDS:
            if key == "flow_shift" and not host.scheduler.config.get("use_flow_sigmas"):
                continue  # some schedulers of other models carry it without a use
            same(f"scheduler {key}", *read(key))


def check_adapted(model: Any, host: Any, who: str) -> None:
    """Raises ValueError where the host's IP-Adapters are not the model's: its steps would ignore the image."""
    ours, theirs = (
        [type(layer).__name__ for layer in getattr(getattr(m, "encoder_hid_proj", None), "image_projection_layers", [])]
        for m in (model, host)
    )
    if ours != theirs:
        raise ValueError(f"{who}: IP-Adapters are {ours}, the host's are {theirs}; they have to be equal")


def check_control(model: Any, pipeline: Any, host: Any, who: str) -> None:
    """Raises ValueError where what a ControlNet or T2I-Adapter adds to the host's features does not fit the model's."""
    for part, fields in CONTROL_FIELDS.items():
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


def bare(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # what torch.compile wrapped


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


def text_encoders(pipeline: Any) -> list[str]:
    names = inspect.signature(type(pipeline).__init__).parameters
    return sorted(name for name in names if name.startswith("text_encoder"))
