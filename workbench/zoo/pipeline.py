"""A class-conditional latent diffusion pipeline with guidance, by diffusers' conventions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class GlyphPipeline(DiffusionPipeline):
    """Labels to images: a class-conditional `UNet2DModel` on the latents of an `AutoencoderKL`.

    The last class embedding of the U-Net stands for "no label" and is what guidance compares with. The
    structure follows diffusers' `DiTPipeline` and `StableDiffusionPipeline`; any scheduler can be swapped in.

    Load with ``GlyphPipeline.from_pretrained(folder)``. The files hold half precision; diffusers widens
    them to float32 (which a CPU needs) unless it is given another dtype.

    Args:
        unet: predicts from (latents, timestep, class labels) what the scheduler's prediction type says.
        vae: its decoder makes images in [-1, 1] of latents divided by its scaling factor.
        scheduler: any diffusers scheduler.
    """

    model_cpu_offload_seq = "unet->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "class_labels"]

    unet: UNet2DModel
    vae: AutoencoderKL
    scheduler: Any

    def __init__(self, unet: UNet2DModel, vae: AutoencoderKL, scheduler: KarrasDiffusionSchedulers) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_convert_rgb=False)

    @property
    def null_label(self) -> int:
        """The label that stands for none."""
        return int(self.unet.config.num_class_embeds) - 1

    @property
    def guidance_scale(self) -> float:
        """The scale of the call in progress, or of the last one."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether each step evaluates the unlabelled prediction too (at scale 1 it would cancel out)."""
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """How many times the loop runs (more than the steps asked for with schedulers of higher order)."""
        return self._num_timesteps

    def check_inputs(
        self,
        class_labels: Tensor,
        num_inference_steps: int,
        output_type: str,
        generator: Any,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise ValueError for what cannot be sampled, naming the argument, its value and what is allowed."""
        if class_labels.ndim != 1 or class_labels.numel() == 0:
            raise ValueError(f"class_labels has shape {tuple(class_labels.shape)}; it must be (n,), n >= 1")
        if class_labels.min() < 0 or class_labels.max() > self.null_label:
            raise ValueError(
                f"class_labels span {class_labels.min().item()} to {class_labels.max().item()}; they must be "
                f"0 to {self.null_label - 1}, or {self.null_label} for no label"
            )
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps!r}; it must be at least 1")
        if output_type not in ("pil", "pt", "np", "latent"):
            raise ValueError(f"output_type is {output_type!r}; it must be 'pil', 'pt', 'np' or 'latent'")
        if isinstance(generator, list) and len(generator) != class_labels.numel():
            raise ValueError(
                f"generator is a list of {len(generator)}; it must be one generator or one for each of "
                f"{class_labels.numel()} labels"
            )
        unknown = [k for k in callback_on_step_end_tensor_inputs if k not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown}; allowed: {self._callback_tensor_inputs}"
            )

    def prepare_latents(
        self, batch: int, dtype: torch.dtype, device: torch.device, generator: Any, latents: Tensor | None
    ) -> Tensor:
        """Noise (batch, channels, side, side) at the scheduler's first level; given latents are scaled."""
        side = self.unet.config.sample_size
        shape = (batch, self.unet.config.in_channels, side, side)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; it must be {shape}")
        else:
            latents = latents.to(device=device, dtype=dtype)
        return latents * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        """Those of `eta` and `generator` that this scheduler's step takes."""
        accepted = inspect.signature(self.scheduler.step).parameters
        candidates = {"eta": eta, "generator": generator}
        return {name: value for name, value in candidates.items() if name in accepted}

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, 8, 6, 6) as the U-Net knows them to images (n, 1, 24, 24), not clipped to [-1, 1]."""
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, int, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample one image per label.

        Args:
            class_labels: integers 0 to 35, indices into `workbench.zoo.CLASSES`; 36 samples without a label.
            num_inference_steps: what the scheduler's `set_timesteps` is given.
            guidance_scale: w in ``none + w (label - none)``; 1 evaluates only the labelled prediction (n rows
                per step), any other value both, in one batch of 2n rows (without label first).
            generator: one, or a list of one per label, which makes each image independent of the batch.
            latents: unit-variance noise (n, 8, 6, 6) to start from instead of drawing it.
            eta: for DDIM, 0 (deterministic) to 1; ignored by schedulers without it.
            output_type: "pil", "np" ((n, 24, 24, 1), 0 to 1), "pt" ((n, 1, 24, 24), 0 to 1) or "latent".
            callback_on_step_end: called as (pipeline, index, timestep, tensors) after each step; returns the
                tensors, replaced or not, and may set `pipeline._interrupt = True` to stop.
            callback_on_step_end_tensor_inputs: names of the tensors it is given: "latents", "class_labels".
            return_dict: False returns a tuple of one.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for an argument out of its range.
        """
        device = self._execution_device
        class_labels = torch.as_tensor(class_labels, device=device)
        if class_labels.ndim == 0:
            class_labels = class_labels[None]
        self.check_inputs(
            class_labels, num_inference_steps, output_type, generator, callback_on_step_end_tensor_inputs
        )
        self._guidance_scale = guidance_scale
        self._interrupt = False

        latents = self.prepare_latents(class_labels.numel(), self.unet.dtype, device, generator, latents)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        extra = self.prepare_extra_step_kwargs(generator, eta)
        if self.do_classifier_free_guidance:
            class_labels = torch.cat([torch.full_like(class_labels, self.null_label), class_labels])

        self._num_timesteps = len(timesteps)
        warmup = len(timesteps) - num_inference_steps * self.scheduler.order
        with self.progress_bar(total=num_inference_steps) as bar:
            for index, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                rows = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
                rows = self.scheduler.scale_model_input(rows, timestep)
                guess = self.unet(rows, timestep, class_labels, return_dict=False)[0]
                if self.do_classifier_free_guidance:
                    unlabelled, labelled = guess.chunk(2)
                    guess = unlabelled + guidance_scale * (labelled - unlabelled)
                latents = self.scheduler.step(guess, timestep, latents, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "class_labels": class_labels}
                    chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    replaced = callback_on_step_end(self, index, timestep, chosen)
                    latents = replaced.pop("latents", latents)
                    class_labels = replaced.pop("class_labels", class_labels)
                done = index + 1
                if done == len(timesteps) or (done > warmup and done % self.scheduler.order == 0):
                    bar.update()

        images: Any = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
