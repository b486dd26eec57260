"""The embedded models: a data set that can be sampled at will, its judge, and diffusion models S, B and L.

Beside them a family of language models: a target and two drafts of one tokenizer, which continue Python's own
documentation. Their sizes are "target", "small" and "tiny". And a vision transformer, which finds letters in clutter.

Importing this package costs nothing; diffusers, transformers, matplotlib and PIL are imported where they are first
needed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Not lazily: once bound here, the function keeps its name against the submodule of the same name.
from workbench.zoo.glyphs import CLASSES, glyphs

if TYPE_CHECKING:
    from workbench.zoo.classifier import GlyphClassifier, load_classifier
    from workbench.zoo.pipeline import GlyphPipeline
    from workbench.zoo.text import load_language_model
    from workbench.zoo.vision import load_vision

WEIGHTS: Path = Path(__file__).resolve().parent / "weights"
PLANS: Path = Path(__file__).resolve().parent / "plans"  # solver schedules that a search found, with their card
SIZES = ("s", "b", "l")
LANGUAGE_SIZES = ("target", "small", "tiny")

__all__ = [
    "CLASSES",
    "LANGUAGE_SIZES",
    "PLANS",
    "SIZES",
    "WEIGHTS",
    "GlyphClassifier",
    "GlyphPipeline",
    "glyphs",
    "load_classifier",
    "load_language_model",
    "load_pipeline",
    "load_vision",
    "weights_digest",
]

_LAZY = {
    "GlyphClassifier": "classifier",
    "load_classifier": "classifier",
    "GlyphPipeline": "pipeline",
    "load_language_model": "text",
    "load_vision": "vision",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def folder_of(size: str, sizes: tuple[str, ...] = SIZES + LANGUAGE_SIZES) -> Path:
    """The folder of the weights of a size, which must be one of `sizes`; ValueError otherwise."""
    if size not in sizes:
        raise ValueError(f"size is {size!r}; it must be one of {', '.join(map(repr, sizes))}")
    return WEIGHTS / f"{'docs' if size in LANGUAGE_SIZES else 'glyphs'}-{size}"


def load_pipeline(size: str, **options: Any) -> GlyphPipeline:
    """A fresh pipeline of one size, float32 on the CPU unless `options` (of from_pretrained) say otherwise.

    Its weights lie in memory channels last: convolutions on a CPU take 10 to 25 % less time then.

    Raises:
        ValueError: for an unknown size.
    """
    import torch
    from diffusers.utils import logging

    from workbench.zoo.pipeline import GlyphPipeline

    folder, is_shown = folder_of(size, SIZES), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # three small files need none
    try:
        pipe = GlyphPipeline.from_pretrained(folder, **options)
    finally:
        if is_shown:
            logging.enable_progress_bar()
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    return pipe


def weights_digest(size: str) -> str:
    """The sha256 (64 hex digits) over all safetensors of one size of either family, with their relative paths.

    It is computed again only where a file's time or length changed. Use it as a part of cache keys.

    Raises:
        ValueError: for an unknown size.
    """
    return folder_digest(folder_of(size))


def folder_digest(folder: Path) -> str:
    """`weights_digest` of any folder."""
    files = sorted(folder.rglob("*.safetensors"))
    stamp = tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _digest(folder, stamp)


@functools.lru_cache(maxsize=8)
def _digest(folder: Path, stamp: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for file, _, _ in stamp:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(file.read_bytes())
    return digest.hexdigest()
