"""Tiny pipelines that read texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from integrations import tiny_pipelines as tiny
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


@pytest.fixture
def text_pipeline(tmp_path: Path) -> Callable[..., StableDiffusionPipeline]:
    """Makes a tiny Stable Diffusion pipeline with a real (untrained) text encoder and a character tokenizer."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")

    def make(seed: int = 0, width: int = 4, **more: Any) -> StableDiffusionPipeline:
        tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=8)
        torch.manual_seed(3)
        encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(words) + 1, hidden_size=tiny.WIDTH, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, bos_token_id=52, eos_token_id=53)).eval()
        pipe = tiny.sd(seed, width, **more)
        pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def text_pair(text_pipeline: Callable[..., Any]) -> list[Any]:
    """A small one and a large one."""
    return [text_pipeline(0, 4), text_pipeline(1, 8)]
