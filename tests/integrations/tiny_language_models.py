"""Tiny causal language models with random weights, one per kind of attention, positions and cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 41
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.5,
}  # fmt: skip
WINDOW: dict[str, Any] = {"sliding_window": 4}
MIXED: dict[str, Any] = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **k: LlamaConfig(**{**SIZES, **k}),
    "qwen2": lambda **k: Qwen2Config(**{**SIZES, **k}),
    "qwen2-windows": lambda **k: Qwen2Config(**{**SIZES, **MIXED, "use_sliding_window": True, **k}),
    "qwen3": lambda **k: Qwen3Config(**{**SIZES, **k}),
    "mistral": lambda **k: MistralConfig(**{**SIZES, **WINDOW, **k}),
    "gemma2": lambda **k: Gemma2Config(**{**SIZES, **MIXED, "query_pre_attn_scalar": 4, **k}),
    "gemma3": lambda **k: Gemma3TextConfig(**{**SIZES, **MIXED, "query_pre_attn_scalar": 4, **k}),
    "gpt2": lambda **k: GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64,
                                   initializer_range=0.5, bos_token_id=None, eos_token_id=None, **k),
    "opt": lambda **k: OPTConfig(vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=2,
                                 num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16,
                                 init_std=0.5, bos_token_id=None, eos_token_id=None, pad_token_id=1, **k),
}  # fmt: skip
FAMILIES = tuple(CONFIGS)


def language_model(family: str = "llama", seed: int = 0, attention: str | None = None, **changes: Any) -> Any:
    """A tiny model of the family, in evaluation mode. attention: None for the family's own. changes: to its config."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(CONFIGS[family](**changes), attn_implementation=attention)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def like(model: Any, noise: float, seed: int = 1) -> Any:
    """A copy whose weights have noise of this share of their deviation added: a draft that often agrees."""
    made = type(model)(model.config)
    made.load_state_dict(model.state_dict())
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=stream)
    return made.eval()


@functools.cache
def pair(family: str = "llama", noise: float = 0.1) -> tuple[Any, Any]:
    """A target and a draft that agrees with it often. Shared by tests: to be left as they are."""
    target = language_model(family)
    return target, like(target, noise)


def prompt(length: int, seed: int = 0, vocabulary: int = VOCABULARY, n_rows: int = 1) -> Tensor:
    """(n_rows, length) random tokens, none of them 0 or 1."""
    return torch.randint(2, vocabulary, (n_rows, length), generator=torch.Generator().manual_seed(seed))
