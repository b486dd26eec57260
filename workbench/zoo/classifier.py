"""A small convolutional classifier of glyphs: judge of labels, and feature space of the Frechet distance."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor, nn

FEATURES = 64
_LABELS = 36


class GlyphClassifier(nn.Module):
    """Three stages of convolutions, then 64 features, then 36 logits.

    The features are taken before the last non-linearity: they are closer to Gaussian there, which is what
    a Frechet distance assumes.

    Attributes:
        reference_mean: (64,) float64, mean feature of held-out images.
        reference_cov: (64, 64) float64, their covariance.
        reference_n: how many images these are of.
    """

    reference_mean: Tensor
    reference_cov: Tensor
    reference_n: Tensor

    def __init__(self, channels: tuple[int, int, int] = (24, 48, 96)) -> None:
        super().__init__()
        one, two, three = channels
        self.channels = tuple(channels)
        self.body = nn.Sequential(
            nn.Conv2d(1, one, 3, padding=1, bias=False), nn.BatchNorm2d(one), nn.ReLU(),
            nn.Conv2d(one, one, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(one), nn.ReLU(),
            nn.Conv2d(one, two, 3, padding=1, bias=False), nn.BatchNorm2d(two), nn.ReLU(),
            nn.Conv2d(two, two, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(two), nn.ReLU(),
            nn.Conv2d(two, three, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(three), nn.ReLU(),
            nn.Flatten(), nn.Linear(three * 9, FEATURES),
        )  # fmt: skip
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, _LABELS))
        self.register_buffer("reference_mean", torch.zeros(FEATURES, dtype=torch.float64))
        self.register_buffer("reference_cov", torch.zeros(FEATURES, FEATURES, dtype=torch.float64))
        self.register_buffer("reference_n", torch.zeros((), dtype=torch.int64))

    def features(self, images: Tensor) -> Tensor:
        """Map images (n, 1, 24, 24) in [-1, 1] to features (n, 64)."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, 1, 24, 24) in [-1, 1] to logits (n, 36)."""
        return self.head(self.body(images))

    @torch.no_grad()
    def judge(self, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
        """Features (n, 64) and predicted labels (n,) of any number of images (n, 1, 24, 24), in batches."""
        pairs = [((f := self.features(chunk)), self.head(f).argmax(dim=1)) for chunk in images.split(batch)]
        return torch.cat([f for f, _ in pairs]), torch.cat([label for _, label in pairs])


@functools.cache
def _load(folder: Path) -> GlyphClassifier:
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    model = GlyphClassifier(tuple(config["channels"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False)


def load_classifier(folder: str | Path | None = None) -> GlyphClassifier:
    """The trained classifier in evaluation mode, without gradients, from `folder` (default: the one shipped).

    It is loaded once per process and folder, and shared: do not train or move it; copy it first.

    Raises:
        FileNotFoundError: where the folder lacks its config or weights.
    """
    from workbench.zoo import WEIGHTS

    return _load(Path(folder) if folder is not None else WEIGHTS / "classifier")
