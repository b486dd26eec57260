"""Tiny causal language models with random weights, one per kind of attention, positions and cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
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
    "gpt2": lambda **k: GPT2Config(**{
        "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.5,
        "bos_token_id": None, "eos_token_id": None, **k}),
    "opt": lambda **k: OPTConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 16, "init_std": 0.5, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": 1, **k}),
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


def letters(n: int = VOCABULARY, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of n single letters."""
    made = Tokenizer(models.WordLevel({chr(ord("A") + i): i for i in range(n)}, unk_token="A"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, **options)


class Adapted(nn.Module):
    """A linear layer with low-rank adapters, of which one is active: as adapter libraries put them into a model."""

    def __init__(self, base: nn.Linear, names: tuple[str, ...]) -> None:
        super().__init__()
        self.base, self.active = base, [names[0]]
        self.deltas = nn.ModuleDict()
        for i, name in enumerate(names):
            self.deltas[name] = nn.Linear(base.in_features, base.out_features, bias=False)
            stream = torch.Generator().manual_seed(i)
            with torch.no_grad():
                self.deltas[name].weight.normal_(0, 2, generator=stream)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + sum(self.deltas[name](x) for name in self.active)


def layers(model: Any) -> list[Adapted]:
    return [part for part in model.modules() if isinstance(part, Adapted)]


def adapted(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj, ("a", "b"))


class Peft(nn.Module):
    """What PEFT's wrapper looks like from outside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.peft_config = model.peft_config = {name: SimpleNamespace(is_prompt_learning=False) for name in "ab"}
        self.eval()

    def get_base_model(self) -> Any:
        return self.model

    def set_adapter(self, name: str) -> None:
        for layer in layers(self.model):
            layer.active = [name]
