"""The embedded vision transformer, and any other one taken apart: embedding, blocks and head to be called one by one.

The embedded one reads the letters of `workbench.zoo.clutter`. Its folder loads like any of transformers', so a user's
own model goes the same way: `Layers(ViTForImageClassification.from_pretrained(...))`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.zoo import WEIGHTS

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

FOLDER = WEIGHTS / "clutter-vit"


def load_vision(**options: Any) -> ViTForImageClassification:
    """A fresh vision transformer for images of `clutter`, for evaluation, float32 on the CPU.

    options: of `from_pretrained`, where the defaults do not suit. Attention is explicit ("eager") by default, so that
    `output_attentions` works.
    """
    from transformers import ViTForImageClassification
    from transformers.utils import logging

    is_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a small file needs none
    try:
        return ViTForImageClassification.from_pretrained(
            FOLDER, **{"dtype": torch.float32, "attn_implementation": "eager", **options}
        ).eval()
    finally:
        if is_shown:
            logging.enable_progress_bar()


def block_flops(n_queries: float, n_keys: float, width: int, mlp_width: int) -> float:
    """Floating point operations of a block for one image, by the rule of `workbench.cost.flops_per_row`.

    Two per multiply and add, of matrix products alone. n_queries: rows that ask and go on, whose queries, output
    projection and MLP are computed; n_keys: rows that are asked, whose keys and values are. A plain block has as many
    of both. Means over images are right only where n_queries and n_keys do not vary together, as their product counts.
    """
    return 4.0 * width * ((n_queries + n_keys) * width + n_queries * n_keys + n_queries * mlp_width)


Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """The parts of one block, each a map of its last axis: what `Layers` needs to know of a library's own."""

    norm: Map
    query: Map
    key: Map
    value: Map
    out: Map  # of the heads, side by side
    norm_2: Map
    mlp: Map


class Layers:
    """A vision transformer with a class token, taken apart. It shares the model's weights and follows their changes.

    `head(block(n_blocks - 1, ... block(0, embed(pixels))))` is the model's own answer to rounding; dropout is left out.
    A method that prunes tokens puts its own step inside a block: `keys_values` of all rows, `queries` of the rows that
    stay, `attention` between them, then `finish`, which is the rest of the block for the rows that stay.

    model: transformers' ViTForImageClassification, so the facebook/deit and google/vit folders. Raises TypeError for
    anything else.

    Attributes: model; blocks, the parts of each; n_blocks; n_heads; width; mlp_width; n_tokens, 1 + patches;
    patch_values, pixels of a patch times channels; n_classes.
    """

    def __init__(self, model: Any) -> None:
        if not (hasattr(model, "vit") and hasattr(model, "classifier")):
            raise TypeError(f"model is a {type(model).__name__}; it must be transformers' ViTForImageClassification")
        vit, config = model.vit, model.config
        self.model = model
        # Earlier releases of transformers 5 keep the blocks in an encoder, under the names of the published files.
        found = vit.layers if hasattr(vit, "layers") else vit.encoder.layer
        self.blocks = [_parts(layer) for layer in found]
        self.n_blocks, self.n_heads = len(self.blocks), config.num_attention_heads
        self.width, self.mlp_width, self.n_classes = config.hidden_size, config.intermediate_size, config.num_labels
        self.n_tokens = vit.embeddings.position_embeddings.shape[1]
        self.patch_values = vit.embeddings.patch_embeddings.projection.weight[0].numel()

    def embed(self, pixels: Tensor) -> Tensor:
        """Images (B, channels, height, width) to tokens (B, 1 + patches, width): the class token, then row by row."""
        return self.model.vit.embeddings(pixels)

    def norm(self, i: int, tokens: Tensor) -> Tensor:
        """The first normalisation of block i, of tokens (B, N, width): what its three projections read."""
        return self.blocks[i].norm(tokens)

    def queries(self, i: int, normed: Tensor) -> Tensor:
        """Queries (B, heads, M, width / heads) of block i from normalised tokens (B, M, width)."""
        return self._heads(self.blocks[i].query(normed))

    def keys_values(self, i: int, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, N, width / heads) of block i from normalised tokens (B, N, width)."""
        return self._heads(self.blocks[i].key(normed)), self._heads(self.blocks[i].value(normed))

    def attention(self, queries: Tensor, keys: Tensor, is_token: Tensor | None = None) -> Tensor:
        """The attention map (B, heads, M, N), each row of which sums to 1.

        is_token: (B, N) bool, False for keys that only fill up a batch and get no attention; at least one per image
        must be True, or the map is NaN.
        """
        scores = queries @ keys.mT * queries.shape[-1] ** -0.5
        if is_token is not None:
            scores = scores.masked_fill(~is_token[:, None, None], -torch.inf)
        return scores.softmax(dim=-1)

    def finish(self, i: int, tokens: Tensor, attention: Tensor, values: Tensor) -> Tensor:
        """The rest of block i for the rows that asked: tokens (B, M, width) as they entered the block, their attention
        (B, heads, M, N) and the values (B, heads, N, width / heads) to tokens (B, M, width)."""
        block = self.blocks[i]
        tokens = tokens + block.out((attention @ values).transpose(1, 2).flatten(2))
        return tokens + block.mlp(block.norm_2(tokens))

    def block(self, i: int, tokens: Tensor, is_token: Tensor | None = None) -> Tensor:
        """Block i of tokens (B, N, width), as many as there are; is_token as in `attention`."""
        normed = self.norm(i, tokens)
        keys, values = self.keys_values(i, normed)
        return self.finish(i, tokens, self.attention(self.queries(i, normed), keys, is_token), values)

    def head(self, tokens: Tensor) -> Tensor:
        """Logits (B, classes) from tokens (B, N, width), of which the class token (the first) is read."""
        return self.model.classifier(self.model.vit.layernorm(tokens[:, 0]))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes) of images: the whole model."""
        tokens = self.embed(pixels)
        for i in range(self.n_blocks):
            tokens = self.block(i, tokens)
        return self.head(tokens)

    @property
    def embed_flops(self) -> float:
        """Of `embed`, per image, as `block_flops` counts."""
        return 2.0 * (self.n_tokens - 1) * self.patch_values * self.width

    @property
    def head_flops(self) -> float:
        """Of `head`, per image, as `block_flops` counts."""
        return 2.0 * self.width * self.n_classes

    def flops(self, rows: Sequence[tuple[float, float]] | None = None) -> float:
        """Of the whole model, per image: `block_flops` with (n_queries, n_keys) of each block, by default all tokens.

        Raises ValueError where `rows` has not one entry per block.
        """
        rows = [(self.n_tokens, self.n_tokens)] * self.n_blocks if rows is None else rows
        if len(rows) != self.n_blocks:
            raise ValueError(f"rows has {len(rows)} entries; it must have one for each of the {self.n_blocks} blocks")
        blocks = sum(block_flops(queries, keys, self.width, self.mlp_width) for queries, keys in rows)
        return self.embed_flops + blocks + self.head_flops

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.n_heads, -1)).transpose(1, 2)


def _parts(layer: Any) -> Block:
    around = {"norm": layer.layernorm_before, "norm_2": layer.layernorm_after}
    attention = layer.attention
    if hasattr(attention, "q_proj"):
        return Block(query=attention.q_proj, key=attention.k_proj, value=attention.v_proj, out=attention.o_proj,
                     mlp=layer.mlp, **around)
    heads, second = attention.attention, layer.output.dense
    return Block(query=heads.query, key=heads.key, value=heads.value, out=attention.output.dense,
                 mlp=lambda tokens: second(layer.intermediate(tokens)), **around)
