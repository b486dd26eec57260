"""Train the embedded vision transformer from nothing: ``python -m workbench.zoo.train_vision all``, or one target.

Order: train, score. In the first part of the training the network sees 24 of the 64 patches of each image, the letter's
among them: that costs two fifths of the time, and shows it that absent patches need not be missed. Beside
the class token every patch is asked which letter it shows, if any; the head that answers for it is not kept.

Measured with ``train --minutes 38 --threads 1`` on one of 2 CPU cores (AVX-512) which much other work shared: 2280
seconds by the clock, 1331 of them on the core, 5242 steps. By the clock the first part, whose steps are short, has 60 %
of the time and so 83 % of the steps; where steps are counted, as by default, it has 60 % of the steps.

Work in progress lies in a temporary folder, and a run that was stopped goes on from there. CUDA is used where present.
Every file is written under a temporary name and renamed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.quality import proportion
from workbench.zoo import WEIGHTS, folder_digest
from workbench.zoo.clutter import PATCH, SIDE, patches_of, scenes
from workbench.zoo.glyphs import CLASSES
from workbench.zoo.train import DEVICE, Report, Shadow, replace_folder
from workbench.zoo.train_text import Muon
from workbench.zoo.vision import Layers

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

TARGETS = ("train", "score")
NAME = "clutter-vit"
SHAPE = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 384}
PATCHES = (SIDE // PATCH) ** 2
STEPS = 5_200
BATCH = 128
LEARNING_RATES = {"muon": 0.02, "adam": 0.004}  # embeddings, norms, biases and heads go by Adam
SMOOTHING = 0.1
SOME = 24  # patches shown of 64 in the first part of the training: those of the letter and random others
SOME_SHARE = 0.6  # of the training
TOKEN_WEIGHT = 0.5  # of the loss of the tokens of patches, which are asked the letter too, or that none is there
SHARD = 64  # batches drawn at once
SCORED, SCORE_SEED, SCORE_BATCH = 20_000, 20, 250
CHECKPOINT_SECONDS = 180.0


def make_model() -> ViTForImageClassification:
    """An untrained model; positions begin as sines and cosines of the row and the column, and are learnt."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(CLASSES)),
        label2id={letter: index for index, letter in enumerate(CLASSES)},
        attn_implementation="eager",
        **SHAPE,
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                scale = weight.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "fc2.weight")):
                    scale /= math.sqrt(2 * config.num_hidden_layers)
                nn.init.normal_(weight, std=scale)
        nn.init.normal_(model.vit.embeddings.patch_embeddings.projection.weight, std=1 / PATCH)
        model.vit.embeddings.position_embeddings[0, 1:] = 0.5 * waves(SIDE // PATCH, config.hidden_size)
    return model


def waves(side: int, width: int) -> Tensor:
    """Sines and cosines of the row and of the column of each place (side * side, width), a quarter each."""
    rates = math.pi / side * torch.logspace(0, math.log2(side / 2), width // 4, base=2)
    angle = torch.arange(side)[:, None] * rates
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    return torch.cat([wave.repeat_interleave(side, dim=0), wave.repeat(side, 1)], dim=1)


def train(out: Path, work: Path, steps: int | None, minutes: float | None, stop: float = 1.0) -> None:
    """Train the model, save it (weights averaged, half precision) in `out`/clutter-vit; go on from a checkpoint.

    The rate warms up and falls by a cosine to 0 at the last step, or at the end of the minutes where given. A run
    pauses, its checkpoint and present weights kept, when it has done the share `stop` of its length. Every image is
    seen once.
    """
    torch.manual_seed(0)
    model = make_model().to(DEVICE)
    layers, shadow = Layers(model), Shadow(model)
    token_head = nn.Linear(layers.width, len(CLASSES) + 1).to(DEVICE)  # not kept
    learner = nn.ModuleDict({"model": model, "token_head": token_head})
    inner = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "classifier" not in name]
    outer = [weight for weight in learner.parameters() if all(weight is not other for other in inner)]
    optimizers = {"muon": Muon(inner), "adam": torch.optim.AdamW(outer, betas=(0.9, 0.95), weight_decay=0.01)}
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    kept = work / f"{NAME}.pt"
    if kept.exists():
        state = torch.load(kept, map_location=DEVICE, weights_only=True)
        learner.load_state_dict(state.pop("learner"))
        shadow.model.load_state_dict(state.pop("shadow"))
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state.pop(name))
        shadow.updates = state["step"]
        print(f"goes on from step {state['step']}", flush=True)

    def loss_of(images: Tensor, labels: Tensor, is_letter: Tensor, shown: Tensor | None) -> Tensor:
        tokens = layers.embed(images)
        if shown is not None:  # a block takes as many tokens as there are, and fewer cost less
            is_letter = is_letter.gather(1, shown)
            rows = F.pad(1 + shown, (1, 0))  # with the class token
            tokens = tokens.gather(1, rows[:, :, None].expand(-1, -1, layers.width))
        for i in range(layers.n_blocks):
            tokens = layers.block(i, tokens)
        tokens = model.vit.layernorm(tokens)
        whole = F.cross_entropy(model.classifier(tokens[:, 0]), labels, label_smoothing=SMOOTHING)
        asked = torch.where(is_letter, labels[:, None], len(CLASSES))
        return whole + TOKEN_WEIGHT * F.cross_entropy(token_head(tokens[:, 1:]).flatten(0, 1), asked.flatten())

    total = steps if steps is not None else STEPS
    began, cpu_began, saved = time.perf_counter(), time.process_time(), time.perf_counter()
    done, clock, cpu = int(state["step"]), float(state["seconds"]), float(state["cpu_seconds"])
    report, shard = Report("loss"), -1

    def keep() -> None:
        spent = {
            "step": done,
            "seconds": clock + time.perf_counter() - began,
            "cpu_seconds": cpu + time.process_time() - cpu_began,
        }
        parts = {"learner": learner.state_dict(), "shadow": shadow.model.state_dict()}
        parts |= {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        part = kept.with_suffix(f".{os.getpid()}")
        torch.save(parts | spent, part)
        os.replace(part, kept)
        record = {"steps": done, "batch": BATCH, "images": done * BATCH, "seconds": round(spent["seconds"])}
        record |= {"cpu_seconds": round(spent["cpu_seconds"]), "threads": torch.get_num_threads()}
        save(shadow.model, out, record)

    while True:
        progress = (clock + time.perf_counter() - began) / (60 * minutes) if minutes is not None else done / total
        if progress >= stop:
            break
        rate = min(1.0, (done + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * LEARNING_RATES[name]
        if shard != done // SHARD:
            shard = done // SHARD
            images, ink, labels = (part.to(DEVICE) for part in scenes(SHARD * BATCH, "train", seed=shard))
            is_letter = patches_of(ink)
        some = slice(done % SHARD * BATCH, (done % SHARD + 1) * BATCH)
        shown = None
        if progress < SOME_SHARE:
            order = torch.rand(BATCH, PATCHES, generator=torch.Generator().manual_seed(done)).to(DEVICE)
            shown = (order + is_letter[some]).topk(SOME, dim=1).indices
        loss = loss_of(images[some], labels[some], is_letter[some], shown)
        learner.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(outer, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        shadow.update()
        report.take(loss)
        done += 1
        if done % 50 == 0:
            spent = clock + time.perf_counter() - began
            print(f"step {done} {spent:.0f} s ({progress:.3f}) rate {rate:.3f} {report}", flush=True)
        if time.perf_counter() - saved > CHECKPOINT_SECONDS:
            keep()
            saved = time.perf_counter()
    keep()
    print(f"{done} steps", flush=True)


def save(model: ViTForImageClassification, out: Path, record: dict[str, Any]) -> None:
    """Save a model in half precision, with what its training cost and read, in `out`/clutter-vit."""
    half = make_model()
    half.load_state_dict(model.state_dict())
    half = half.half()

    def write(folder: Path) -> None:
        half.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")

    replace_folder(out / NAME, write)


@torch.inference_mode()
def score(out: Path) -> dict[str, Any]:
    """Score the saved model on `SCORED` held-out images and write `out`/clutter-scores.json.

    Accuracy on whole images, on the patches that the letter touches alone, and on the others alone, each with its
    standard error (_se); the commonest mistakes; FLOPs, parameters, bytes of the weights, milliseconds per image.
    """
    from transformers import ViTForImageClassification

    folder = out / NAME
    model = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    layers = Layers(model)
    images, ink, labels = scenes(SCORED, "held_out", seed=SCORE_SEED)
    is_letter = patches_of(ink)
    scores: dict[str, Any] = {
        "n": SCORED,
        "split": "held_out",
        "seed": SCORE_SEED,
        "weights": folder_digest(folder),
        "weight_bytes": (folder / "model.safetensors").stat().st_size,
        "parameters": model.num_parameters(),
        "flops_per_row": layers.flops(),
        "letter_patches": is_letter.sum(dim=1).double().mean().item(),
    }
    shown = {"accuracy": torch.ones_like(is_letter), "accuracy_letter": is_letter, "accuracy_others": ~is_letter}
    for name, patches in shown.items():
        guesses = guess(layers, images, patches)
        right = proportion(guesses == labels)
        scores |= {name: right.value, f"{name}_se": right.stderr}
        if name == "accuracy":
            pairs = Counter(
                CLASSES[a] + CLASSES[b] for a, b in zip(labels.tolist(), guesses.tolist(), strict=True) if a != b
            )
            scores["confused"] = dict(pairs.most_common(12))  # letter and guess: how often
    scores["ms_per_row_32"] = row_times(layers, images[:32])
    scores["threads"] = torch.get_num_threads()
    part = out / f".clutter-scores.{os.getpid()}"
    part.write_text(json.dumps(scores, indent=2) + "\n")
    os.replace(part, out / "clutter-scores.json")
    print(json.dumps(scores, indent=2), flush=True)
    return scores


def guess(layers: Layers, images: Tensor, shown: Tensor) -> Tensor:
    """Labels (n,) guessed from images (n, 1, 48, 48) of which the patches `shown` (n, 64) alone are attended to."""
    guesses = []
    for some, patches in zip(images.split(SCORE_BATCH), shown.split(SCORE_BATCH), strict=True):
        tokens, is_token = layers.embed(some.to(DEVICE)), F.pad(patches, (1, 0), value=True).to(DEVICE)
        for i in range(layers.n_blocks):
            tokens = layers.block(i, tokens, is_token)
        guesses.append(layers.head(tokens).argmax(dim=1).cpu())
    return torch.cat(guesses)


def row_times(layers: Layers, images: Tensor, repeats: int = 41) -> list[float]:
    """Quartiles of milliseconds per image, all of `images` in one batch."""
    spent = []
    images = images.to(DEVICE)
    for _ in range(repeats):
        began = time.perf_counter()
        layers(images)[0, 0].item()
        spent.append(1000 * (time.perf_counter() - began) / len(images))
    return [round(value, 4) for value in statistics.quantiles(spent, n=4)]


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m workbench.zoo.train_vision", description=__doc__)
    parser.add_argument("target", choices=(*TARGETS, "all"))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimisation steps (default: the recipe's)")
    length.add_argument("--minutes", type=float, help="train for a time instead of a number of steps")
    parser.add_argument("--stop", type=float, default=1.0, help="pause after this share of the training (default: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the weights")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "workbench-vision", help="folder of checkpoints"
    )
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()  # of a small file
    given.out.mkdir(parents=True, exist_ok=True)
    given.work.mkdir(parents=True, exist_ok=True)
    for target in TARGETS if given.target == "all" else (given.target,):
        if target == "score":
            score(given.out)
        else:
            train(given.out, given.work, given.steps, given.minutes, given.stop)


if __name__ == "__main__":
    main()
