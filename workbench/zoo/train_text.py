"""Train the embedded language models from nothing: ``python -m workbench.zoo.train_text all``, or one target.

Order: tokenizer, target, then the drafts small and tiny, which learn first from the text and then from the target's
distributions over text and over what it wrote itself; score comes last.

Measured with ``--compile --threads 1`` on 2 CPU cores (AVX-512) which much other work shared, in seconds by the clock
and hours of CPU time: target 2040 and .43, small 1680 and .20, tiny 1190 and .14. The target's run was ended by the
clock (``--minutes 34``), the drafts' were interrupted, resumed and only then compiled; see their cards.

Work in progress (checkpoints, the target's distributions) lies in a temporary folder, and a run that was stopped goes
on from there. CUDA is used where present. Every file is written under a temporary name and renamed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.quality import Drawn, Quality
from workbench.zoo import LANGUAGE_SIZES, WEIGHTS, folder_digest
from workbench.zoo.text import CONTEXT, END, corpus, encoder
from workbench.zoo.train import DEVICE, Report, Shadow, replace_folder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TARGETS = ("tokenizer", *LANGUAGE_SIZES, "score")
VOCABULARY = 2048
SHAPES: dict[str, dict[str, int]] = {
    # Deep and narrow: a pass over one token costs layers, not sums, and over nine hardly more than over one.
    "target": {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4},
    "small": {"num_hidden_layers": 2, "hidden_size": 80, "intermediate_size": 208, "num_attention_heads": 2},
    "tiny": {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 2},
}
STEPS = {"target": 2600, "small": 3400, "tiny": 2700}
LEARNING_RATES = {"muon": 0.02, "adam": 0.005}  # the embedding and the norms go by Adam
BATCH_TOKENS = 2048
LONG_FROM = 0.75  # of the steps on text: windows of the whole context from here on, a quarter of it before
TEXT_SHARE = 0.3  # of a draft's steps: from text; the others from the target
SHARDS = 12  # of the target's distributions
WINDOWS = {"text": 96, "sampled": 32}  # per shard
WINDOW = 512  # tokens
GIVEN = 32  # of a sampled window's tokens come from the text
CHECKPOINT_SECONDS = 180.0


def make_model(size: str) -> LlamaForCausalLM:
    """An untrained model of one size with tied embeddings; std .02, outputs of the blocks less by the depth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **SHAPES[size],
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                scale = 0.02 if "embed" in name else weight.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    scale /= math.sqrt(2 * config.num_hidden_layers)
                nn.init.normal_(weight, std=scale)
    return model


def train_tokenizer(out: Path) -> None:
    """Learn byte-level BPE on the training text; save it in the folder of each size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus("train"), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    for size in LANGUAGE_SIZES:
        replace_folder(out / f"docs-{size}", wrapped.save_pretrained)


def stream(split: str, out: Path) -> Tensor:
    """The tokens of a split's documents one after the other, each document begun by `END`."""
    encode = encoder(out / "docs-target")
    return torch.tensor([token for text in corpus(split) for token in encode(text)])


def corpus_digest() -> str:
    """The sha256 of the text, training documents first, each ended by a zero byte."""
    sha = hashlib.sha256()
    for text in (*corpus("train"), *corpus("held_out")):
        sha.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return sha.hexdigest()


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is replaced by the nearest semi-orthogonal one, nearly.

    A short training learns more per step from it than from AdamW. Source: K. Jordan et al., Muon (2024), with its
    quintic Newton-Schulz iteration; matrices of one shape are treated together.
    """

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(matrices, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Apply the gradients; every matrix must have one."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                shapes.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in shapes.items():
                updates = []
                for matrix in matrices:
                    gradient: Any = matrix.grad
                    mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                    mean.lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(mean, group["momentum"]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(orthogonal(torch.stack(updates))), alpha=-scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with their singular values brought to about 1 (.7 to 1.2), by five iterations."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def windows_of(tokens: Tensor, n: int, length: int, seed: int) -> Tensor:
    """n windows (n, length) of a stream, anywhere in it."""
    starts = torch.randint(len(tokens) - length, (n, 1), generator=torch.Generator().manual_seed(seed))
    return tokens[starts + torch.arange(length)]


def train_model(
    size: str, out: Path, work: Path, steps: int | None, minutes: float | None, compiled: bool, stop: float = 1.0
) -> None:
    """Train one model, save it (weights averaged, half precision) in `out`/docs-`size`; go on from a checkpoint.

    The rate warms up and falls by a cosine to 0 at the last step, or at the end of the minutes where given. A run
    pauses, its checkpoint and present weights kept, when it has done the share `stop` of its length.
    """
    torch.manual_seed(LANGUAGE_SIZES.index(size))
    tokens = stream("train", out)
    model = make_model(size).to(DEVICE)
    shadow = Shadow(model)
    inner = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    outer = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimizers = {"muon": Muon(inner), "adam": torch.optim.AdamW(outer, betas=(0.9, 0.95), weight_decay=0.0)}
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    kept = work / f"{size}.pt"
    if kept.exists():
        state = torch.load(kept, map_location=DEVICE, weights_only=True)
        model.load_state_dict(state.pop("model"))
        shadow.model.load_state_dict(state.pop("shadow"))
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state.pop(name))
        shadow.updates = state["step"]
        print(f"{size}: goes on from step {state['step']}", flush=True)

    def text_loss(window: Tensor) -> Tensor:
        logits = model(input_ids=window, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), window[:, 1:].flatten())

    def target_loss(window: Tensor, target_logits: Tensor) -> Tensor:
        # The divergence fits everything that the target may say; the variation is what acceptance loses.
        target = target_logits.float().softmax(dim=-1)
        draft = model(input_ids=window, use_cache=False).logits.log_softmax(dim=-1)
        divergence = F.kl_div(draft, target, reduction="none").sum(dim=-1)
        variation = (draft.exp() - target).abs().sum(dim=-1) / 2
        return (divergence + variation).mean()

    from_text = torch.compile(text_loss, dynamic=False) if compiled else text_loss
    from_target = torch.compile(target_loss, dynamic=False) if compiled else target_loss
    total = steps if steps is not None else STEPS[size]
    text_share = 1.0 if size == "target" else TEXT_SHARE
    began, cpu_began, saved = time.perf_counter(), time.process_time(), time.perf_counter()
    done, clock, cpu = int(state["step"]), float(state["seconds"]), float(state["cpu_seconds"])
    shards: Callable[[int], tuple[Tensor, Tensor]] | None = None
    report = Report("loss")

    def keep() -> None:
        spent = {
            "step": done,
            "seconds": clock + time.perf_counter() - began,
            "cpu_seconds": cpu + time.process_time() - cpu_began,
        }
        parts = {"model": model.state_dict(), "shadow": shadow.model.state_dict()}
        parts |= {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        part = kept.with_suffix(f".{os.getpid()}")
        torch.save(parts | spent, part)
        os.replace(part, kept)
        save(
            size,
            shadow.model,
            out,
            {"steps": done, "batch_tokens": BATCH_TOKENS}
            | {
                "seconds": round(spent["seconds"]),
                "cpu_hours": round(spent["cpu_seconds"] / 3600, 3),
                "threads": torch.get_num_threads(),
                "train_tokens": len(tokens),
            },
        )

    while True:
        progress = (clock + time.perf_counter() - began) / (60 * minutes) if minutes is not None else done / total
        if progress >= stop:
            break
        rate = min(1.0, (done + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * LEARNING_RATES[name]
        if progress < text_share:
            length = CONTEXT if progress >= LONG_FROM * text_share else CONTEXT // 4
            loss = from_text(windows_of(tokens, BATCH_TOKENS // length, length, done).to(DEVICE))
        else:
            shards = shards or target_shards(tokens, out, work, first=LANGUAGE_SIZES.index(size))
            window, target_logits = shards(done)
            loss = from_target(window.to(DEVICE), target_logits.to(DEVICE))
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(outer, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        shadow.update()
        report.take(loss)
        done += 1
        if done % 50 == 0:
            spent = clock + time.perf_counter() - began
            print(f"{size} step {done} {spent:.0f} s ({progress:.3f}) rate {rate:.3f} {report}", flush=True)
        if time.perf_counter() - saved > CHECKPOINT_SECONDS:
            keep()
            saved = time.perf_counter()
    keep()
    print(f"{size}: {done} steps", flush=True)


def save(size: str, model: nn.Module, out: Path, record: dict[str, Any]) -> None:
    """Save a model in half precision, with what its training cost and read, in `out`/docs-`size`."""
    half = make_model(size)
    half.load_state_dict(model.state_dict())
    half = half.half()

    def write(folder: Path) -> None:
        half.save_pretrained(folder)
        about = {"python": platform.python_version(), "corpus_sha256": corpus_digest(), **record}
        (folder / "training.json").write_text(json.dumps(about, indent=2) + "\n")

    replace_folder(out / f"docs-{size}", write)


def load(size: str, out: Path) -> LlamaForCausalLM:
    """The saved model of one size, float32, for evaluation, where training runs."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(out / f"docs-{size}", dtype=torch.float32).to(DEVICE).eval()


@torch.no_grad()
def target_shards(tokens: Tensor, out: Path, work: Path, first: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The target's logits over windows of text and over windows that it wrote: a function of the step to a batch.

    They are kept in `work` under the digest of the target's weights (3.2 GB), so that both drafts share them; while
    both train at once, each begins where the other does not (`first`).
    """
    from safetensors.torch import load_file, save_file

    folder = work / f"target-{folder_digest(out / 'docs-target')[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    target = load("target", out)
    target.generation_config.eos_token_id = None  # it may end a document, and then begins another
    for index in ((SHARDS // 2 * first + index) % SHARDS for index in range(SHARDS)):
        shard = folder / f"{index}.safetensors"
        if shard.exists():
            continue
        torch.manual_seed(index)
        text = windows_of(tokens, WINDOWS["text"], WINDOW, 10_000_000 + index)
        given = windows_of(tokens, WINDOWS["sampled"], GIVEN, 20_000_000 + index).to(DEVICE)
        written = target.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=True,
            top_k=0,
            max_new_tokens=WINDOW - GIVEN,
        )
        windows = torch.cat([text, written.cpu()])
        windows = windows[torch.randperm(len(windows))]
        logits = torch.cat([target(input_ids=part.to(DEVICE)).logits.half().cpu() for part in windows.split(4)])
        part = shard.with_suffix(f".{os.getpid()}")
        save_file({"windows": windows, "logits": logits}, part)
        os.replace(part, shard)
        print(f"target's distributions: {index + 1} of {SHARDS}", flush=True)
    data = [load_file(folder / f"{index}.safetensors") for index in range(SHARDS)]  # mapped, not read
    windows_per_step = BATCH_TOKENS // WINDOW

    def batch(step: int) -> tuple[Tensor, Tensor]:
        shard = data[step % SHARDS]
        generator = torch.Generator().manual_seed(step)
        rows = torch.randperm(len(shard["windows"]), generator=generator)[:windows_per_step]
        return shard["windows"][rows], shard["logits"][rows]

    return batch


@torch.no_grad()
def score(out: Path) -> dict[str, Any]:
    """Score all three on the held-out text, in windows of `WINDOW` tokens, and write `out`/docs-scores.json.

    Per model: bits over the text, perplexity, parameters, bytes of weights, milliseconds per pass. Per draft and
    temperature: the acceptance, sum of min(target_probs, draft_probs), averaged over the same positions. Every figure
    has its standard error (_se) and its interval (_low, _high; see `figures`).
    """
    encode = encoder(out / "docs-target")
    texts = [torch.tensor(encode(text)) for text in corpus("held_out")]
    whole = sum(map(len, texts)) // WINDOW * WINDOW
    windows = torch.cat(texts)[:whole].view(-1, WINDOW)
    document = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(text) for text in texts]))
    document = document[:whole].view(-1, WINDOW)[:, 1:].flatten()
    models = {size: load(size, out) for size in LANGUAGE_SIZES}
    nats: dict[str, list[Tensor]] = {size: [] for size in LANGUAGE_SIZES}
    accepted: dict[tuple[str, float], list[Tensor]] = {
        (size, temperature): [] for size in LANGUAGE_SIZES[1:] for temperature in (1.0, 0.6)
    }
    for window in windows.to(DEVICE):
        logits = {size: model(input_ids=window[None]).logits[0, :-1].double() for size, model in models.items()}
        for size, values in logits.items():
            nats[size].append(F.cross_entropy(values, window[1:], reduction="none").cpu())
        for (size, temperature), kept in accepted.items():
            target_probs, draft_probs = ((logits[which] / temperature).softmax(dim=-1) for which in ("target", size))
            kept.append(torch.minimum(target_probs, draft_probs).sum(dim=-1).cpu())
    bytes_per_token = sum(len(text.encode()) for text in corpus("held_out")) / sum(map(len, texts))
    scores: dict[str, Any] = {
        "python": platform.python_version(),
        "corpus_sha256": corpus_digest(),
        "held_out": {
            "documents": int(document.max()) + 1,
            "tokens": len(document),
            "windows": len(windows),
        },
        "bytes_per_token": bytes_per_token,
    }
    times = pass_times(models)
    for size, model in models.items():
        mean = token_mean(torch.cat(nats[size]), document)
        weights = out / f"docs-{size}" / "model.safetensors"
        scores[size] = {
            **figures("perplexity", mean, math.exp),
            **figures("bits_per_byte", mean, lambda nat: nat / math.log(2) / bytes_per_token),
            "parameters": model.num_parameters(),
            "weight_bytes": weights.stat().st_size,
            "weights": folder_digest(weights.parent),
            "pass_milliseconds": times[size],
        }
    for (size, temperature), kept in accepted.items():
        mean = token_mean(torch.cat(kept), document)
        scores[size] |= figures(f"acceptance_t{temperature:g}", mean, lambda share: share)
    part = out / f".docs-scores.{os.getpid()}"
    part.write_text(json.dumps(scores, indent=2) + "\n")
    os.replace(part, out / "docs-scores.json")
    print(json.dumps(scores, indent=2), flush=True)
    return scores


def token_mean(values: Tensor, document: Tensor) -> Quality:
    """The mean of values over tokens (n,), with the error that the documents (n,) which they stand in give it.

    The tokens of one document, and so its windows, are hard or easy together: documents are the independent units.
    """
    return Drawn(len(values), clusters=document).mean(values)


def figures(name: str, mean: Quality, scale: Callable[[float], float]) -> dict[str, float]:
    """A mean on another scale: {name, name_se, name_low, name_high}, the error by the delta method, 95 % interval."""
    step = 1e-6
    slope = (scale(mean.value + step) - scale(mean.value - step)) / (2 * step)
    return {
        name: scale(mean.value),
        f"{name}_se": slope * mean.stderr,
        f"{name}_low": scale(mean.low),
        f"{name}_high": scale(mean.high),
    }


@torch.inference_mode()
def pass_times(models: dict[str, Any], repeats: int = 41) -> dict[str, dict[str, list[float]]]:
    """Quartiles of milliseconds per pass of 1 and of 9 tokens after 128 cached ones, the models in turns."""
    result: dict[str, dict[str, list[float]]] = {size: {} for size in models}
    for n in (1, 9):
        given = torch.randint(VOCABULARY, (1, 128 + n), device=DEVICE)
        caches = {
            size: model(input_ids=given[:, :128], use_cache=True).past_key_values for size, model in models.items()
        }
        spent: dict[str, list[float]] = {size: [] for size in models}
        for _ in range(repeats):
            for size, model in models.items():
                began = time.perf_counter()
                model(input_ids=given[:, 128:], past_key_values=caches[size], use_cache=True).logits[0, -1, 0].item()
                spent[size].append(1000 * (time.perf_counter() - began))
                caches[size].crop(-n)
        for size, values in spent.items():
            result[size][str(n)] = [round(value, 3) for value in statistics.quantiles(values, n=4)]
    return result


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m workbench.zoo.train_text", description=__doc__)
    parser.add_argument("target", choices=(*TARGETS, "all"))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimisation steps (default: the recipe's)")
    length.add_argument("--minutes", type=float, help="train for a time instead of a number of steps")
    parser.add_argument("--stop", type=float, default=1.0, help="pause after this share of the training (default: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler; faster)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the weights")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "workbench-text", help="folder of checkpoints"
    )
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()  # of small files
    given.out.mkdir(parents=True, exist_ok=True)
    given.work.mkdir(parents=True, exist_ok=True)
    for target in TARGETS if given.target == "all" else (given.target,):
        if target == "tokenizer":
            train_tokenizer(given.out)
        elif target == "score":
            score(given.out)
        else:
            train_model(target, given.out, given.work, given.steps, given.minutes, given.compile, given.stop)


if __name__ == "__main__":
    main()
