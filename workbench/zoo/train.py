"""Train every embedded model from nothing: ``python -m workbench.zoo.train all``, or one target.

Measured with ``--compile --threads 1`` (classifier: not compiled; autoencoder: 2 threads), on 2 CPU cores
(AVX2) which other work shared, in seconds by the clock: classifier 132, autoencoder 481, decoder 600, s 960,
b 1320, l 4320 (4035 of them on its core): 2.2 hours in all. Drawing and encoding the training images takes
another 3 minutes, once.

Seeds are fixed and steps are counted, so the recipe is deterministic up to the order of floating-point sums
(which differs with the machine and the number of threads). CUDA is used where present. Every file is written
under a temporary name and renamed. Order: classifier, autoencoder, decoder (its decoder once more, with the
encoder frozen), then s, b, l, which need the encoder.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.zoo import WEIGHTS
from workbench.zoo.classifier import GlyphClassifier
from workbench.zoo.glyphs import CLASSES, SIZE, glyphs

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DModel

TARGETS = ("classifier", "autoencoder", "decoder", "s", "b", "l")
STEPS = {"classifier": 1200, "autoencoder": 1400, "decoder": 1300, "s": 9100, "b": 3000, "l": 11400}
BATCHES = {"classifier": 128, "autoencoder": 64, "decoder": 64, "s": 128, "b": 64, "l": 64}
NULL_LABEL = len(CLASSES)
LABEL_DROPOUT = 0.1
SNR_GAMMA = 5.0
KL_WEIGHT = 2e-5
DECODER_NOISE = 0.02  # of latents with a deviation near 1
EMA = 0.999
LATENT_DRAWS = 200_000
REFERENCE_DRAWS = 40_000
CHECKPOINT_SECONDS = 300.0

UNETS: dict[str, dict[str, Any]] = {
    # One resolution and no middle block: as few kernels as possible, since its time is launches, not sums.
    "s": {
        "block_out_channels": (32,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
        "norm_num_groups": 8,
    },
    "b": {
        "block_out_channels": (48, 80),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 40,
        "norm_num_groups": 16,
    },
    "l": {
        "block_out_channels": (80, 128),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 32,
        "norm_num_groups": 16,
    },
}
LEARNING_RATES = {"classifier": 2e-3, "autoencoder": 3e-3, "decoder": 2e-3, "s": 2e-3, "b": 1.2e-3, "l": 1e-3}

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder, then rename each of its files over that of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        new = Path(name)
        write(new)
        for config in new.rglob("config.json"):
            # diffusers notes the folder it loaded from, which means nothing elsewhere
            content = json.loads(config.read_text())
            content.pop("_name_or_path", None)
            config.write_text(json.dumps(content, indent=2) + "\n")
        for file in sorted(path for path in new.rglob("*") if path.is_file()):
            target = folder / file.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(file, target)


def make_unet(size: str) -> UNet2DModel:
    """An untrained denoiser ("s", "b" or "l") of latents (n, 8, 6, 6) with labels 0 to 36 (36: none)."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=6,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        num_class_embeds=NULL_LABEL + 1,
        **UNETS[size],
    )


def make_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder, (n, 1, 24, 24) to (n, 8, 6, 6) and back; thin where pixels are many."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 24, 48),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _steps(
    name: str, model: nn.Module, steps: int | None, minutes: float | None, report: Report
) -> Iterator[torch.optim.Optimizer]:
    """Yield once per step; between yields the caller has put gradients there, which are then applied.

    The rate warms up and falls by a cosine to 0 at the last step, or at the end of the minutes where given.
    """
    peak = LEARNING_RATES[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.99))
    total = steps if steps is not None else STEPS[name]
    warmup = max(1, min(200, total // 10))
    start = time.perf_counter()
    step = 0
    while True:
        seconds = time.perf_counter() - start
        progress = seconds / (60 * minutes) if minutes is not None else step / total
        if progress >= 1:
            break
        rate = peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        yield optimizer
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"{name} step {step} {seconds:.0f} s rate {rate:.2e} {report}", flush=True)
    print(f"{name}: {step} steps in {time.perf_counter() - start:.0f} s", flush=True)


def train_classifier(out: Path, steps: int | None, minutes: float | None, draws: int = 60_000) -> None:
    """Train the classifier; save it, with the feature statistics of held-out images, in `out`/classifier."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    images, labels = (part.to(DEVICE) for part in glyphs(draws, "train", seed=10))
    model = GlyphClassifier().to(DEVICE)
    report = Report("loss")
    for _ in _steps("classifier", model, steps, minutes, report):
        rows = torch.randint(draws, (BATCHES["classifier"],), device=DEVICE)
        loss = F.cross_entropy(model(images[rows]), labels[rows], label_smoothing=0.02)
        loss.backward()
        report.take(loss)
    model.eval()
    reference_draws = min(REFERENCE_DRAWS, draws)
    held_out, held_labels = (part.to(DEVICE) for part in glyphs(reference_draws, "held_out", seed=20))
    features, guesses = model.judge(held_out)
    features = features.double()
    model.reference_mean.copy_(features.mean(dim=0))
    model.reference_cov.copy_(features.T.cov())
    model.reference_n.fill_(reference_draws)
    print(f"classifier: held-out accuracy {(guesses == held_labels).double().mean():.4f}", flush=True)

    def write(folder: Path) -> None:
        config = {"channels": model.channels, "features": features.shape[1], "classes": CLASSES}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / "model.safetensors")

    replace_folder(out / "classifier", write)


def train_autoencoder(
    out: Path, steps: int | None, minutes: float | None, compiled: bool = False, draws: int = 60_000
) -> None:
    """Train the autoencoder and save it, with a scaling factor for unit latents, in `out`/autoencoder."""
    torch.manual_seed(1)
    images = glyphs(draws, "train", seed=11)[0].to(DEVICE)
    model = make_autoencoder().to(DEVICE)
    shadow = Shadow(model)
    report = Report("mse")

    def both_losses(batch: Tensor) -> tuple[Tensor, Tensor]:
        posterior = model.encode(batch).latent_dist
        sample = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        error = F.mse_loss(model.decode(sample).sample, batch)
        return error, posterior.kl().mean() / sample[0].numel()

    losses = torch.compile(both_losses) if compiled else both_losses
    for _ in _steps("autoencoder", model, steps, minutes, report):
        error, divergence = losses(images[torch.randint(draws, (BATCHES["autoencoder"],), device=DEVICE)])
        (error + KL_WEIGHT * divergence).backward()
        report.take(error)
        shadow.update()
    save_autoencoder(shadow.model, out, min(2000, draws))


def train_decoder(
    out: Path, steps: int | None, minutes: float | None, compiled: bool = False, draws: int = 60_000
) -> None:
    """Train on the decoder of `out`/autoencoder alone, and put it in the pipelines that are already there.

    The encoder stays, and with it the latents, so denoisers trained before or after this stage fit alike.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    images = glyphs(draws, "train", seed=12)[0].to(DEVICE)
    model = AutoencoderKL.from_pretrained(out / "autoencoder").to(DEVICE)
    with torch.no_grad():
        latents = torch.cat([model.encode(part).latent_dist.mean for part in images.split(500)])
    shadow = Shadow(model.decoder)
    decode = torch.compile(model.decoder) if compiled else model.decoder
    report = Report("mse")
    for _ in _steps("decoder", model.decoder, steps, minutes, report):
        rows = torch.randint(draws, (BATCHES["decoder"],), device=DEVICE)
        # A little noise, because the latents of a denoiser are never exactly those of the encoder.
        noisy = latents[rows] + DECODER_NOISE * torch.randn_like(latents[rows])
        error = F.mse_loss(decode(noisy), images[rows])
        error.backward()
        report.take(error)
        shadow.update()
    model.decoder.load_state_dict(shadow.model.state_dict())
    save_autoencoder(model, out, min(2000, draws))


def save_autoencoder(model: AutoencoderKL, out: Path, draws: int = 2000) -> None:
    """Set the scaling factor, report on held-out images, save in `out`/autoencoder and its pipelines."""
    model = model.half().float().eval()  # what will be loaded is what is measured
    held_out = glyphs(draws, "held_out", seed=21)[0].to(DEVICE)
    with torch.no_grad():
        parts = [model.encode(chunk).latent_dist.mean for chunk in held_out.split(500)]
        decoded = torch.cat([model.decode(part).sample for part in parts])
    model.register_to_config(scaling_factor=round(1 / torch.cat(parts).std().item(), 5))
    error = F.mse_loss(decoded, held_out)
    print(f"autoencoder: held-out mse {error:.6f}, scaling {model.config.scaling_factor}", flush=True)
    model = model.cpu().half()
    for folder in (out / "autoencoder", *(pipe / "vae" for pipe in out.glob("glyphs-?") if pipe.is_dir())):
        replace_folder(folder, model.save_pretrained)


class Report:
    """The running mean of a loss, as text."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.mean: Tensor | None = None

    def take(self, value: Tensor) -> None:
        """Take in the loss of one step."""
        value = value.detach()
        self.mean = value if self.mean is None else self.mean.lerp(value, 0.02)

    def __str__(self) -> str:
        return f"{self.name} {self.mean.item():.5f}" if self.mean is not None else ""


class Shadow:
    """The exponential moving average of a model's weights (faster at the start), as a model of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.source = model
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        self.updates += 1
        decay = min(EMA, self.updates / (10 + self.updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(self.source.parameters()), 1 - decay)


def latents_of(vae: AutoencoderKL, draws: int) -> tuple[Tensor, Tensor]:
    """Scaled latents (draws, 8, 6, 6) in half precision and labels (draws,) of training images.

    They are kept in the temporary folder under a name made of the encoder's weights, so that the three sizes
    share them and a new encoder never meets the latents of an old one.
    """
    from safetensors.torch import load_file, save_file

    sha = hashlib.sha256(repr(vae.config.scaling_factor).encode())
    for weight in vae.encoder.parameters():
        sha.update(weight.detach().cpu().numpy().tobytes())
    digest = sha.hexdigest()
    kept = Path(tempfile.gettempdir()) / f"workbench-glyph-latents-{digest[:16]}-{draws}.safetensors"
    if kept.exists():
        data = load_file(kept)
        return data["latents"], data["labels"]
    latents, labels = torch.empty(draws, 8, 6, 6, dtype=torch.float16), torch.empty(draws, dtype=torch.int64)
    chunk = 5000
    with torch.no_grad():
        for index, start in enumerate(range(0, draws, chunk)):
            rows = slice(start, min(start + chunk, draws))
            images, labels[rows] = glyphs(rows.stop - start, "train", seed=1000 + index)
            means = [vae.encode(part.to(DEVICE)).latent_dist.mean for part in images.split(250)]
            latents[rows] = torch.cat(means).mul(vae.config.scaling_factor).cpu()
    part = kept.with_suffix(f".{os.getpid()}")
    save_file({"latents": latents, "labels": labels}, part)
    os.replace(part, kept)
    return latents, labels


def train_unet(
    size: str,
    out: Path,
    steps: int | None,
    minutes: float | None,
    compiled: bool = False,
    draws: int = LATENT_DRAWS,
) -> None:
    """Train a denoiser on the latents of `out`/autoencoder; save the pipeline in `out`/glyphs-`size`."""
    from diffusers import AutoencoderKL, DDIMScheduler

    from workbench.zoo.pipeline import GlyphPipeline

    vae = AutoencoderKL.from_pretrained(out / "autoencoder").to(DEVICE).eval()
    latents, labels = (part.to(DEVICE) for part in latents_of(vae, draws))

    torch.manual_seed(100 + TARGETS.index(size))
    batch = BATCHES[size]
    model = make_unet(size).to(DEVICE, memory_format=torch.channels_last)
    shadow = Shadow(model)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - betas).cumprod(dim=0)
    signal = kept.sqrt().float().to(DEVICE)[:, None, None, None]
    noise_level = (1 - kept).sqrt().float().to(DEVICE)[:, None, None, None]
    snr = (kept / (1 - kept)).float().to(DEVICE)
    weights = snr.clamp(max=SNR_GAMMA) / snr

    def save() -> None:
        scheduler = DDIMScheduler(
            num_train_timesteps=1000,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
            prediction_type="epsilon",
        )
        unet = copy.deepcopy(shadow.model).cpu().to(memory_format=torch.contiguous_format).half()
        pipe = GlyphPipeline(unet=unet, vae=copy.deepcopy(vae).cpu().half(), scheduler=scheduler)
        replace_folder(out / f"glyphs-{size}", pipe.save_pretrained)

    predict = torch.compile(model) if compiled else model
    report = Report("loss")
    saved = time.perf_counter()
    for _ in _steps(size, model, steps, minutes, report):
        rows = torch.randint(draws, (batch,), device=DEVICE)
        clean = latents[rows].float().contiguous(memory_format=torch.channels_last)
        given = labels[rows].masked_fill(torch.rand(batch, device=DEVICE) < LABEL_DROPOUT, NULL_LABEL)
        # Times are uniform but stratified over the batch, which lowers the variance of the loss.
        spread = (torch.arange(batch, device=DEVICE) + torch.rand(batch, device=DEVICE)) / batch
        times = (spread * 1000).long().clamp(max=999)
        noise = torch.randn_like(clean)
        guess = predict(signal[times] * clean + noise_level[times] * noise, times, given).sample
        loss = ((guess - noise).square().mean(dim=(1, 2, 3)) * weights[times]).mean()
        loss.backward()
        report.take(loss)
        shadow.update()
        if time.perf_counter() - saved > CHECKPOINT_SECONDS:
            save()
            saved = time.perf_counter()
    save()


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m workbench.zoo.train", description=__doc__)
    parser.add_argument("target", choices=(*TARGETS, "all"))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimisation steps (default: the recipe's)")
    length.add_argument("--minutes", type=float, help="train for a time instead of a number of steps")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler; faster)")
    parser.add_argument("--draws", type=int, help="training images drawn (default: the recipe's)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the weights")
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    extra = {} if given.draws is None else {"draws": given.draws}
    given.out.mkdir(parents=True, exist_ok=True)
    for target in TARGETS if given.target == "all" else (given.target,):
        if target == "classifier":
            train_classifier(given.out, given.steps, given.minutes, **extra)
        elif target == "autoencoder":
            train_autoencoder(given.out, given.steps, given.minutes, given.compile, **extra)
        elif target == "decoder":
            train_decoder(given.out, given.steps, given.minutes, given.compile, **extra)
        else:
            train_unet(target, given.out, given.steps, given.minutes, given.compile, **extra)


if __name__ == "__main__":
    main()
