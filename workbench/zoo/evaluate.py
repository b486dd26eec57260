"""Score the embedded models: ``python -m workbench.zoo.evaluate`` writes ``weights/scores.json``.

For each size, at several guidance scales: label accuracy and Frechet distance (classifier features, against
the stored statistics of held-out images) with standard errors; beside them the same for fresh real images and
for real images passed through the autoencoder, at the same n. All of them have every class equally often, and the
figures know it (see `workbench.quality.Drawn`). Costs: parameters; FLOPs, milliseconds per row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.cost import flops_per_row
from workbench.quality import Drawn, frechet, proportion
from workbench.zoo import SIZES, WEIGHTS, weights_digest
from workbench.zoo.classifier import GlyphClassifier, load_classifier
from workbench.zoo.glyphs import CLASSES, glyphs
from workbench.zoo.pipeline import GlyphPipeline

BATCH = 180  # images sampled together


def score(classifier: GlyphClassifier, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Label accuracy and Frechet distance of images (n, 1, 24, 24) in [-1, 1] with their labels (n,).

    Classes are strata, drawn equally often. The distance's error is a jackknife over groups of whole label cycles.
    """
    features, guesses = classifier.judge(images)
    drawn = Drawn(len(labels), labels)
    accuracy = proportion(guesses == labels, drawn)
    distance = frechet(features, classifier.reference_mean, classifier.reference_cov, drawn)
    return {
        "n": len(labels),
        "label_accuracy": accuracy.value,
        "label_accuracy_se": accuracy.stderr,
        "frechet_distance": distance.value,
        "frechet_distance_se": distance.stderr,
    }


def real(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n held-out images with their labels, of all labels equally often as the models' samples are."""
    labels, n_drawn = torch.arange(n) % len(CLASSES), 2 * n
    while True:
        images, theirs = glyphs(n_drawn, "held_out", seed)
        found = [(theirs == c).nonzero()[:, 0] for c in range(len(CLASSES))]
        if all(len(f) >= (labels == c).sum() for c, f in enumerate(found)):
            picked = [int(found[int(c)][i // len(CLASSES)]) for i, c in enumerate(labels)]
            return images[picked], labels
        n_drawn *= 2


def sample(pipe: GlyphPipeline, n: int, steps: int, guidance: float, seed: int) -> tuple[Tensor, Tensor]:
    """n images in [-1, 1], clipped, of all labels equally often, by the pipeline's own scheduler."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % len(CLASSES))[torch.randperm(n, generator=generator)]
    parts = [
        pipe(chunk, steps, guidance, generator=generator, output_type="pt", return_dict=False)[0]
        for chunk in labels.split(BATCH)
    ]
    return torch.cat(parts).cpu() * 2 - 1, labels


def costs(pipes: dict[str, GlyphPipeline], repeats: int = 25) -> dict[str, dict[str, Any]]:
    """Per size: parameters, FLOPs per row, and quartiles of milliseconds per row in calls of 16 and 32 rows.

    The sizes take turns within each repeat, so that a disturbance of the machine falls on all of them.
    """
    found: dict[str, dict[str, Any]] = {}
    for size, pipe in pipes.items():
        row = torch.zeros(1, 8, 6, 6), torch.tensor([500]), torch.tensor([0])
        found[size] = {
            "parameters": sum(p.numel() for p in pipe.unet.parameters()),
            "flops_per_row": int(flops_per_row(pipe.unet, *row)),
            "threads": torch.get_num_threads(),
        }
    for rows in (16, 32):
        inputs = (torch.randn(rows, 8, 6, 6), torch.tensor(500), torch.arange(rows))
        seconds: dict[str, list[float]] = {size: [] for size in pipes}
        for repeat in range(repeats + 3):
            for size, pipe in pipes.items():
                with torch.no_grad():
                    start = time.perf_counter()
                    pipe.unet(*inputs)
                    if repeat >= 3:  # the first ones warm up
                        seconds[size].append(time.perf_counter() - start)
        for size, values in seconds.items():
            quartiles = statistics.quantiles([1e3 * value / rows for value in values], n=4)
            found[size][f"ms_per_row_{rows}"] = [round(q, 4) for q in quartiles]
    return found


def _update(path: Path, changes: dict[str, Any]) -> None:
    """Merge `changes` (two levels deep) into the JSON file, in one rename."""
    scores = json.loads(path.read_text()) if path.exists() else {}
    for key, value in changes.items():
        scores[key] = {**scores.get(key, {}), **value} if isinstance(value, dict) else value
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(scores, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m workbench.zoo.evaluate", description=__doc__)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES), help="models to score")
    parser.add_argument("--n", type=int, default=5040, help="images per figure")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 1.5, 2.0], help="guidance scales")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--device", default="cpu", help="where the models sample; costs are always of the CPU")
    parser.add_argument("--skip-costs", action="store_true", help="keep the costs already in the file")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the weights")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "scores.json", help="file to update")
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)

    classifier = load_classifier(given.weights / "classifier")
    pipes = {}
    for size in SIZES:
        pipes[size] = GlyphPipeline.from_pretrained(given.weights / f"glyphs-{size}")
        pipes[size].set_progress_bar_config(disable=True)

    images, labels = real(given.n, seed=30)
    vae = pipes["l"].vae
    with torch.no_grad():
        decoded = torch.cat(
            [
                vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
                for part in images.split(BATCH)
            ]
        )
    _update(
        given.out,
        {
            "real": score(classifier, images, labels),
            "reconstructed": {
                **score(classifier, decoded, labels),
                "mse": (decoded - images).square().mean().item(),
            },
            "environment": {
                "torch": torch.__version__,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, samples drawn on {given.device}",
            },
        },
    )
    if not given.skip_costs:
        _update(given.out, {f"costs_{size}": cost for size, cost in costs(pipes).items()})
    for size in given.sizes:
        pipes[size].to(given.device)
        for guidance in given.guidance:
            start = time.perf_counter()
            images, labels = sample(pipes[size], given.n, given.steps, guidance, given.seed)
            entry = score(classifier, images, labels)
            entry |= {"steps": given.steps, "guidance": guidance, "seed": given.seed, "scheduler": "DDIM"}
            if given.weights == WEIGHTS:
                entry["weights"] = weights_digest(size)
            _update(given.out, {size: {f"ddim{given.steps}_w{guidance:g}": entry}})
            print(size, json.dumps(entry), f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
