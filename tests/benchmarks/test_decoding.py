"""Seconds per token of the drop-in for transformers on the embedded models: `make bench`, with nothing else running."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.test_speed import ratio
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from workbench.integrations.transformers import Generated, generate
from workbench.zoo import folder_of

N_TOKENS, ROUNDS = 512, 3
DRAFTS: dict[str, tuple[str, dict[str, Any]]] = {  # the draft's size, and how it drafts
    "small, 3": ("small", {"draft_length": 3}), "tiny, 2": ("tiny", {"draft_length": 2}),
    "small, 3 chains of 3": ("small", {"draft_length": 3, "n_drafts": 3}),
}  # fmt: skip


def model(size: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder_of(size), dtype=torch.float32).eval()


@pytest.mark.parametrize("how", DRAFTS)
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "temperature 1"])
def test_seconds_per_token(benchmark, record_ratio, how: str, do_sample: bool) -> None:
    size, options = DRAFTS[how]
    target, draft = model("target"), model(size)
    prompt = AutoTokenizer.from_pretrained(folder_of("target"))("Return the number of", return_tensors="pt")
    settings: dict[str, Any] = {"do_sample": do_sample, "top_k": 0, "max_new_tokens": N_TOKENS, "eos_token_id": None,
                                "pad_token_id": 0}
    made: list[Generated] = []

    def ours() -> None:
        made.append(generate(target, draft, prompt, seed=len(made), **settings, **options))

    def plain() -> None:
        target.generate(**prompt, **settings)

    def assisted() -> None:
        target.generate(**prompt, assistant_model=draft, **settings)

    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
    seconds = benchmark.stats.stats.median / N_TOKENS
    benchmark.extra_info.update(seconds_per_token=seconds)
    for name, theirs, aim in (("plain", plain, 1.5), ("assisted", assisted, 1.3)):
        found = ratio(ours, theirs, ROUNDS)
        benchmark.extra_info[f"times_faster_than_{name}"] = 1 / found[0]
        benchmark.extra_info[f"seconds_per_token_{name}"] = seconds / found[0]
        mode = "temperature 1" if do_sample else "greedy"
        record_ratio(f"drafts of {how}, {mode}: seconds over transformers' {name} generate", found, 1 / aim)
    benchmark.extra_info["block_efficiency"] = sum(g.block_efficiency for g in made) / len(made)
