"""Tiny pipelines with random weights, and for each family a sampling loop written by hand from bare parts.

A loop takes `owners`, the denoiser of each entry of `scheduler.timesteps`: nothing of the stitched pipeline is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from workbench.zoo.pipeline import GlyphPipeline

BATCH, SIDE, WIDTH, TOKENS = 2, 8, 8, 5  # latents are (BATCH, 4, SIDE, SIDE), texts (BATCH, TOKENS, WIDTH)
BETAS: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
}  # fmt: skip

# Shared by the pipelines of a test where only the denoisers matter.
_numbers = torch.Generator().manual_seed(7)
TEXT, NO_TEXT = torch.randn(2, BATCH, TOKENS, WIDTH, generator=_numbers)
POOLED, NO_POOLED = torch.randn(2, BATCH, WIDTH, generator=_numbers)
LATENTS = torch.randn(BATCH, 4, SIDE, SIDE, generator=_numbers)
PICTURE = torch.rand(BATCH, 3, 2 * SIDE, 2 * SIDE, generator=_numbers)
BOTH_TEXTS, BOTH_POOLED = torch.cat([NO_TEXT, TEXT]), torch.cat([NO_POOLED, POOLED])


def vae(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4, "sample_size": 2 * SIDE,
    }  # fmt: skip
    return AutoencoderKL(**(options | changes)).eval()


def unet(seed: int, width: int, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "sample_size": SIDE, "block_out_channels": (width, width), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 2,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": WIDTH,
    }  # fmt: skip
    return UNet2DConditionModel(**(options | changes)).eval()


XL: dict[str, Any] = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 6 * 2 + WIDTH,
}  # fmt: skip


def sd(
    seed: int, width: int, scheduler: Any = None, kind: Any = StableDiffusionPipeline, **changes: Any
) -> Any:
    parts: dict[str, Any] = {
        "vae": vae(), "unet": unet(seed, width), "scheduler": scheduler or DDIMScheduler(**BETAS, clip_sample=False),
        "text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip
    return _quiet(kind(**(parts | changes), requires_safety_checker=False))


def sd_img2img(seed: int, width: int, scheduler: Any = None) -> Any:
    return sd(seed, width, scheduler, StableDiffusionImg2ImgPipeline)


def sd_lcm(seed: int, width: int) -> Any:
    return sd(seed, width, LCMScheduler(**BETAS), unet=unet(seed, width, time_cond_proj_dim=4))


def sdxl(seed: int, width: int, kind: Any = StableDiffusionXLPipeline, **more: Any) -> Any:
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = DDIMScheduler(**BETAS, clip_sample=False)
    denoiser = unet(seed, width, **XL)
    return _quiet(
        kind(vae=vae(), unet=denoiser, scheduler=scheduler, add_watermarker=False, **nothing, **more)
    )


def sdxl_controlnet(seed: int, width: int) -> Any:
    """Denoisers of one layout, as a ControlNet needs them; `width` is not used."""
    torch.manual_seed(1)
    controlnet = ControlNetModel(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=WIDTH,
        conditioning_embedding_out_channels=(4, 4), **XL,
    ).eval()  # fmt: skip
    for module in controlnet.modules():  # its outputs start at zero, where no test would see them
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.1)
    return sdxl(seed, 8, StableDiffusionXLControlNetPipeline, controlnet=controlnet)


def dit(seed: int, width: int) -> Any:
    torch.manual_seed(seed)
    denoiser = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=width, in_channels=4, out_channels=8, num_layers=1,
        sample_size=SIDE, norm_num_groups=1,
    ).eval()  # fmt: skip
    return _quiet(DiTPipeline(denoiser, vae(), DDIMScheduler(clip_sample=False)))


def glyphs(seed: int, width: int) -> Any:
    """Four classes and "no label"."""
    torch.manual_seed(seed)
    denoiser = UNet2DModel(
        sample_size=SIDE, in_channels=4, out_channels=4, block_out_channels=(width, width), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, norm_num_groups=4, num_class_embeds=5,
    ).eval()  # fmt: skip
    return _quiet(GlyphPipeline(denoiser, vae(), DDIMScheduler(clip_sample=False)))


def pixart(seed: int, width: int) -> Any:
    torch.manual_seed(seed)
    denoiser = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=width, cross_attention_dim=2 * width, num_layers=1,
        sample_size=SIDE, caption_channels=WIDTH, use_additional_conditions=False, norm_num_groups=1,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False)
    return _quiet(PixArtSigmaPipeline(None, None, vae(), denoiser, scheduler))


def sd3(seed: int, width: int) -> Any:
    torch.manual_seed(seed)
    denoiser = SD3Transformer2DModel(
        sample_size=SIDE, in_channels=4, num_layers=2, attention_head_dim=width, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=2 * width, pooled_projection_dim=WIDTH, out_channels=4,
        pos_embed_max_size=SIDE,
    ).eval()  # fmt: skip
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"vae": vae(shift_factor=0.1), "transformer": denoiser, "scheduler": scheduler}
    return _quiet(StableDiffusion3Pipeline(**parts, **dict.fromkeys(names)))


def flux(seed: int, width: int) -> Any:
    torch.manual_seed(seed)
    denoiser = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=width // 4,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    parts = {
        "vae": vae(shift_factor=0.1),
        "transformer": denoiser,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }
    return _quiet(FluxPipeline(**parts, **dict.fromkeys(names)))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Drawing: the pipeline's own call, latents out.


def draw_sd(pipe: Any, steps: int, guidance: float, **more: Any) -> Tensor:
    pipe_out = pipe(
        prompt_embeds=TEXT, negative_prompt_embeds=NO_TEXT, latents=LATENTS, num_inference_steps=steps,
        guidance_scale=guidance, generator=torch.manual_seed(3), output_type="latent", **more,
    )  # fmt: skip
    return pipe_out.images


def draw_img2img(pipe: Any, steps: int, guidance: float, strength: float = 0.6) -> Tensor:
    pipe_out = pipe(
        prompt_embeds=TEXT, negative_prompt_embeds=NO_TEXT, image=LATENTS, num_inference_steps=steps,
        strength=strength, guidance_scale=guidance, generator=torch.manual_seed(3), output_type="latent",
    )  # fmt: skip
    return pipe_out.images


def draw_sdxl(pipe: Any, steps: int, guidance: float, **more: Any) -> Tensor:
    pooled = {"pooled_prompt_embeds": POOLED, "negative_pooled_prompt_embeds": NO_POOLED}
    return draw_sd(pipe, steps, guidance, height=2 * SIDE, width=2 * SIDE, **pooled, **more)


def draw_controlnet(pipe: Any, steps: int, guidance: float) -> Tensor:
    return draw_sdxl(pipe, steps, guidance, image=PICTURE, controlnet_conditioning_scale=0.7)


def draw_dit(pipe: Any, steps: int, guidance: float) -> Tensor:
    """DiT decodes always: (BATCH, H, W, 3) in [0, 1]."""
    images = pipe(
        class_labels=[3, 5], num_inference_steps=steps, guidance_scale=guidance, output_type="np",
        generator=torch.manual_seed(3),
    ).images  # fmt: skip
    return torch.as_tensor(images)


def draw_glyphs(pipe: Any, steps: int, guidance: float) -> Tensor:
    pipe_out = pipe(
        [0, 2], num_inference_steps=steps, guidance_scale=guidance, latents=LATENTS, output_type="latent"
    )
    return pipe_out.images


def draw_pixart(pipe: Any, steps: int, guidance: float) -> Tensor:
    mask = torch.ones(BATCH, TOKENS)
    pipe_out = pipe(
        prompt=None, negative_prompt=None, prompt_embeds=TEXT, negative_prompt_embeds=NO_TEXT,
        prompt_attention_mask=mask, negative_prompt_attention_mask=mask, latents=LATENTS,
        num_inference_steps=steps, guidance_scale=guidance, output_type="latent", use_resolution_binning=False,
    )  # fmt: skip
    return pipe_out.images


def draw_sd3(pipe: Any, steps: int, guidance: float, **more: Any) -> Tensor:
    return draw_sdxl(pipe, steps, guidance, **more)


def draw_flux(pipe: Any, steps: int, guidance: float) -> Tensor:
    """`guidance` is the true guidance, two calls per step."""
    pipe_out = pipe(
        prompt_embeds=TEXT, pooled_prompt_embeds=POOLED, negative_prompt_embeds=NO_TEXT,
        negative_pooled_prompt_embeds=NO_POOLED, true_cfg_scale=guidance, guidance_scale=3.5,
        latents=pack(LATENTS), num_inference_steps=steps, height=2 * SIDE, width=2 * SIDE, output_type="latent",
    )  # fmt: skip
    return pipe_out.images


def pack(latents: Tensor) -> Tensor:
    """2 x 2 patches as tokens: (BATCH, 4, S, S) -> (BATCH, (S/2)^2, 16)."""
    b, c, s, _ = latents.shape
    return (
        latents.reshape(b, c, s // 2, 2, s // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, s * s // 4, 4 * c)
    )


# Loops by hand. `owners[e]` is the denoiser at entry e of scheduler.timesteps.

Owners = Callable[[int], nn.Module]


def _guided(output: Tensor, guidance: float) -> Tensor:
    if guidance <= 1:
        return output
    without, given = output.chunk(2)
    return without + guidance * (given - without)


@torch.no_grad()
def loop_sd(
    pipe: Any, owners: Owners, steps: int, guidance: float, begin: int = 0, residuals: Any = None, **more: Any
) -> Tensor:
    """Stable Diffusion from entry `begin` on; `residuals` of a ControlNet and `more` go to the denoiser."""
    scheduler, is_guided = pipe.scheduler, guidance > 1
    if pipe.unet.config.time_cond_proj_dim:
        is_guided = False
        weights = torch.full((BATCH,), guidance - 1)
        more["timestep_cond"] = pipe.get_guidance_scale_embedding(weights, pipe.unet.config.time_cond_proj_dim)
    generator = torch.manual_seed(3)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    if begin:
        noise = torch.randn(LATENTS.shape, generator=generator)
        x = scheduler.add_noise(LATENTS, noise, times[begin : begin + 1].repeat(BATCH))
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
    else:
        x = LATENTS * scheduler.init_noise_sigma
    for e in range(begin, len(times)):
        t = times[e]
        given = scheduler.scale_model_input(torch.cat([x, x]) if is_guided else x, t)
        text = BOTH_TEXTS if is_guided else TEXT
        added = residuals(given, t, text) if residuals else {}
        output = owners(e)(given, t, encoder_hidden_states=text, **more, **added).sample
        output = _guided(output, guidance) if is_guided else output
        takes_generator = "LCM" in type(scheduler).__name__
        x = scheduler.step(output, t, x, **({"generator": generator} if takes_generator else {})).prev_sample
    return x


def _xl_conditions(guidance: float) -> dict[str, Any]:
    sizes = torch.tensor([[2 * SIDE, 2 * SIDE, 0, 0, 2 * SIDE, 2 * SIDE]], dtype=TEXT.dtype)
    pooled = BOTH_POOLED if guidance > 1 else POOLED
    return {"text_embeds": pooled, "time_ids": sizes.repeat(len(pooled), 1)}


def loop_sdxl(pipe: Any, owners: Owners, steps: int, guidance: float) -> Tensor:
    return loop_sd(pipe, owners, steps, guidance, added_cond_kwargs=_xl_conditions(guidance))


def loop_controlnet(pipe: Any, owners: Owners, steps: int, guidance: float) -> Tensor:
    conditions = _xl_conditions(guidance)
    picture = torch.cat([PICTURE, PICTURE]) if guidance > 1 else PICTURE

    def residuals(given: Tensor, t: Tensor, text: Tensor) -> dict[str, Any]:
        down, middle = pipe.controlnet(
            given, t, encoder_hidden_states=text, controlnet_cond=picture, conditioning_scale=0.7,
            added_cond_kwargs=conditions, return_dict=False,
        )  # fmt: skip
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    return loop_sd(pipe, owners, steps, guidance, added_cond_kwargs=conditions, residuals=residuals)


@torch.no_grad()
def loop_dit(pipe: Any, owners: Owners, steps: int, guidance: float) -> Tensor:
    scheduler = pipe.scheduler
    x = torch.randn(LATENTS.shape, generator=torch.manual_seed(3))
    labels = torch.tensor([3, 5, 1000, 1000] if guidance > 1 else [3, 5])
    scheduler.set_timesteps(steps)
    for e, t in enumerate(scheduler.timesteps):
        given = torch.cat([x, x]) if guidance > 1 else x
        eps = owners(e)(given, timestep=t.repeat(len(given)), class_labels=labels).sample[:, :4]
        if guidance > 1:
            with_label, without = eps.chunk(2)
            eps = without + guidance * (with_label - without)
        x = scheduler.step(eps, t, x).prev_sample
    images = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@torch.no_grad()
def loop_glyphs(pipe: Any, owners: Owners, steps: int, guidance: float) -> Tensor:
    scheduler, x = pipe.scheduler, LATENTS
    labels = torch.tensor([4, 4, 0, 2] if guidance > 1 else [0, 2])
    scheduler.set_timesteps(steps)
    for e, t in enumerate(scheduler.timesteps):
        given = torch.cat([x, x]) if guidance > 1 else x
        x = scheduler.step(_guided(owners(e)(given, t, labels).sample, guidance), t, x).prev_sample
    return x


@torch.no_grad()
def loop_pixart(pipe: Any, owners: Owners, steps: int, guidance: float) -> Tensor:
    scheduler, x = pipe.scheduler, LATENTS
    scheduler.set_timesteps(steps)
    for e, t in enumerate(scheduler.timesteps):
        given = torch.cat([x, x]) if guidance > 1 else x
        output = owners(e)(
            given, encoder_hidden_states=BOTH_TEXTS if guidance > 1 else TEXT, timestep=t.repeat(len(given)),
            encoder_attention_mask=torch.ones(len(given), TOKENS),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample  # fmt: skip
        x = scheduler.step(_guided(output, guidance).chunk(2, dim=1)[0], t, x).prev_sample
    return x


@torch.no_grad()
def loop_sd3(pipe: Any, owners: Owners, steps: int, guidance: float) -> Tensor:
    scheduler, x = pipe.scheduler, LATENTS
    scheduler.set_timesteps(steps)
    for e, t in enumerate(scheduler.timesteps):
        given = torch.cat([x, x]) if guidance > 1 else x
        output = owners(e)(
            given, timestep=t.repeat(len(given)), encoder_hidden_states=BOTH_TEXTS if guidance > 1 else TEXT,
            pooled_projections=BOTH_POOLED if guidance > 1 else POOLED,
        ).sample  # fmt: skip
        x = scheduler.step(_guided(output, guidance), t, x).prev_sample
    return x


@torch.no_grad()
def loop_flux(pipe: Any, owners: Owners, steps: int, guidance: float) -> Tensor:
    scheduler, x, half = pipe.scheduler, pack(LATENTS), SIDE // 2
    rows, columns = torch.meshgrid(torch.arange(half), torch.arange(half), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(x.dtype)

    def velocity(model: nn.Module, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        return model(
            x, text, pooled, t.repeat(BATCH) / 1000, img_ids=places, txt_ids=torch.zeros(TOKENS, 3),
            guidance=torch.full((BATCH,), 3.5),
        ).sample  # fmt: skip

    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    for e, t in enumerate(scheduler.timesteps):
        output = velocity(owners(e), t, TEXT, POOLED)
        if guidance > 1:
            without = velocity(owners(e), t, NO_TEXT, NO_POOLED)
            output = without + guidance * (output - without)
        x = scheduler.step(output, t, x).prev_sample
    return x


class Family(NamedTuple):
    """`calls` and `rows`: network calls and rows per evaluation with guidance (without: 1 and BATCH)."""

    build: Callable[..., Any]
    draw: Callable[..., Tensor]
    loop: Callable[..., Tensor]
    denoiser: str
    calls: int = 1
    rows: int = 2 * BATCH


FAMILIES = {
    "dit": Family(dit, draw_dit, loop_dit, "transformer"),
    "glyphs": Family(glyphs, draw_glyphs, loop_glyphs, "unet"),
    "sd": Family(sd, draw_sd, loop_sd, "unet"),
    "sd-lcm": Family(sd_lcm, draw_sd, loop_sd, "unet", rows=BATCH),
    "sdxl": Family(sdxl, draw_sdxl, loop_sdxl, "unet"),
    "sdxl-controlnet": Family(sdxl_controlnet, draw_controlnet, loop_controlnet, "unet"),
    "pixart": Family(pixart, draw_pixart, loop_pixart, "transformer"),
    "sd3": Family(sd3, draw_sd3, loop_sd3, "transformer"),
    "flux": Family(flux, draw_flux, loop_flux, "transformer", calls=2),
}
