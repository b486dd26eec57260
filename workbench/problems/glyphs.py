"""The embedded problem: letters and digits drawn by a family of three latent diffusion models, S, B and L."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from workbench.problems.denoising import Denoising
from workbench.problems.pipelines import decode, from_pipelines
from workbench.quality import Drawn, Quality, frechet, kernel_distance, proportion

SIZES = ("s", "b", "l")
GUIDANCE = 1.5


def glyphs(sizes: Sequence[str] = SIZES, text: str | None = None, guidance: float = GUIDANCE) -> Denoising:
    """Class-conditional glyphs, 36 classes, 24x24 grey, latents (8, 6, 6).

    sizes: which models, cheapest first, of "s", "b", "l". text: the characters to draw, sample i draws
    text[i % len(text)] (default: all 36 in turn). guidance: of the presets, the reference and the baseline.
    Judged by label accuracy; from two samples per class on also by the Frechet and the kernel distance of classifier
    features to held-out data. Raises ValueError for an unknown size or character.
    """
    from workbench import zoo  # the models' libraries load only once models are wanted

    sizes = tuple(s.lower() for s in sizes)
    if not sizes or any(s not in SIZES for s in sizes) or list(sizes) != sorted(set(sizes), key=SIZES.index):
        raise ValueError(f"sizes={sizes}: expected some of {', '.join(SIZES)}, cheapest first")
    characters = zoo.CLASSES if text is None else "".join(text.upper().split())
    unknown = sorted(set(characters) - set(zoo.CLASSES))
    if unknown or not characters:
        raise ValueError(f"text={text!r}: expected characters of {zoo.CLASSES}, got {unknown or 'none'}")
    pipes = [zoo.load_pipeline(size) for size in sizes]

    def judge(answer: Tensor, labels: Tensor | None) -> dict[str, Quality]:
        assert labels is not None
        classifier = zoo.load_classifier()
        with torch.no_grad():
            pictures = torch.cat([decode(pipes[-1], part) for part in answer.split(500)])
            features, read = classifier.judge(pictures)
        drawn = Drawn(len(labels), labels)
        figures = {"label_accuracy": proportion(read == labels, drawn)}
        # a chosen text does not follow the data's law; a class drawn once or never has no spread that could be known
        if text is None and len(answer) >= 2 * len(zoo.CLASSES):
            reference, theirs = _reference()
            figures["frechet_distance"] = frechet(features, classifier.reference_mean, classifier.reference_cov, drawn)
            figures["kernel_distance"] = kernel_distance(features, reference, drawn, theirs)
        return figures

    return from_pipelines(
        *pipes, conditions=[zoo.CLASSES.index(c) for c in characters], names=[s.upper() for s in sizes], judge=judge,
        name="glyphs " + "-".join(sizes).upper() + (f" {characters}" if text else ""), guidance=guidance,
        digest="-".join(d[:12] for d in (*map(zoo.weights_digest, sizes), zoo.folder_digest(zoo.WEIGHTS / "classifier"))),
        loaders=[f"load_pipeline({s!r})" for s in sizes],
        source=f"from workbench.problems.glyphs import glyphs\n\nproblem = glyphs({sizes}, text={text!r}, "
               f"guidance={guidance})")


@cache
def _reference() -> tuple[Tensor, Drawn]:
    """Features of held-out letters and how they count: every class alike, as the samples' classes do."""
    from workbench import zoo

    pictures, labels = zoo.glyphs(2000, "held_out", seed=1)
    return zoo.load_classifier().judge(pictures)[0], Drawn(len(labels), labels)
