"""Causal language models of transformers as `LanguageModel`s: a tree scored in one pass, caches cut to a path.

Nothing here depends on a model's family: attention is told what to see by a float mask (a boolean one is silently
misread by eager attention), positions are told by depth, and sliding windows are kept in the mask, over a full cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workbench.speculation.engine import Ask, LanguageModel
from workbench.speculation.tracing import Recording, recording

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROOM = 256  # positions by which a cache's buffers grow


def causal(module: PreTrainedModel, name: str) -> LanguageModel:
    """A causal model, in evaluation mode, as a LanguageModel. Logits are float32, on the model's device.

    Raises ValueError by name for models whose memory is more than keys and values (state-space and linear-attention
    layers), whose attention cannot take a mask (flash attention), that take no positions or no cache, or that are no
    decoder-only models.
    """
    takes = signature(module.forward).parameters
    if getattr(module.config, "is_encoder_decoder", False) or not module.can_generate():
        raise ValueError(f"{name}: {type(module).__name__} is no decoder-only language model")
    config = module.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    unknown = set(types or ()) - {"full_attention", "sliding_attention"}
    if unknown or getattr(module, "_is_stateful", False):
        told = f"layers of kind {', '.join(sorted(unknown))}" if unknown else f"{type(module).__name__}'s layers"
        raise ValueError(f"{name}: {told} remember more than keys and values: expected full or sliding attention only")
    if missing := {"attention_mask", "position_ids", "past_key_values"} - takes.keys():
        raise ValueError(f"{name}: {type(module).__name__} takes no {', '.join(sorted(missing))}, which a tree needs")
    if getattr(config, "_attn_implementation", None) not in (None, "sdpa", "eager"):
        raise ValueError(f"{name}: attn_implementation={config._attn_implementation!r} takes no tree of tokens: "
                         f"expected 'sdpa' or 'eager', e.g. model.set_attn_implementation('sdpa')")
    window = getattr(config, "sliding_window", None)
    if not types:  # one kind of layer: windows where there is one (such as Mistral's)
        types = ["full_attention" if window is None else "sliding_attention"]
    kinds = tuple(sorted(set(types)))
    n_embedded = module.get_input_embeddings().weight.shape[0]

    def network(tokens: Tensor, ask: Ask) -> list[Tensor]:
        assert isinstance(ask.state, KeyValues)
        return ask.state.forward(module, ask, n_embedded)

    def work(tokens: Tensor, ask: Ask) -> tuple[int, float]:
        assert isinstance(ask.state, KeyValues)
        return ask.state.work(module, ask)

    network.work = work  # type: ignore[attr-defined]

    def begin(n_rows: int) -> KeyValues:
        recorded = recording(module, kinds)
        return KeyValues(n_rows, kinds, window, Layers(module, kinds) if recorded is None else Stack(module, recorded))

    return LanguageModel(name, network, begin,
                         module.get_output_embeddings().weight.shape[0],
                         getattr(config, "max_position_embeddings", None), module)


class KeyValues:
    """Keys and values of the tokens kept and of the tree below them, for n_rows rows in one batch.

    Rows keep paths of different lengths, so some columns of the cache are holes of a row, which its mask leaves out.
    """

    def __init__(self, n_rows: int, kinds: tuple[str, ...], window: int | None, memory: Layers | Stack) -> None:
        self._rows, self._kinds, self._window, self._memory = n_rows, kinds, window, memory
        self._kept = np.zeros((n_rows, 0), dtype=bool)  # (row, column): whether it holds a token that was kept
        self._places = np.zeros((n_rows, 0), dtype=np.int64)  # of each column's token in its sequence
        self._flops: Flops | None = None
        self._forget()

    def _forget(self) -> None:
        n_rows = self._rows
        self._sees = np.zeros((n_rows, 0, 0), dtype=bool)  # (row, node, node): itself and its ancestors
        self._depths = np.zeros((n_rows, 0), dtype=np.int64)
        self._columns: list[list[int]] = [[] for _ in range(n_rows)]  # of each node, counted from the tree's first

    def forward(self, module: Any, ask: Ask, n_embedded: int) -> list[Tensor]:
        """One pass over all rows' tokens, padded to one width; logits (n_asked, V) per row.

        A token without an embedding, which another model of the tokenizer may write, is read as the last that has one.
        """
        width = max(map(len, ask.tokens))
        old = self._sees.shape[1]
        self._grow(old, width, ask.parents)
        ids = np.zeros((self._rows, width), dtype=np.int64)
        for row, given in enumerate(ask.tokens):
            ids[row, : len(given)] = given
        np.minimum(ids, n_embedded - 1, out=ids)
        lengths = self._kept.sum(1, keepdims=True)
        positions = lengths + self._depths[:, old:]
        device = module.device
        wanted = sorted(set(chain.from_iterable(ask.asked)))
        with torch.no_grad():
            logits = self._memory.forward(
                torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device),
                torch.tensor(wanted, device=device), self._masks(old, positions, lengths, module.dtype, device)).float()
        place = {column: i for i, column in enumerate(wanted)}
        if self._rows == 1:
            return [logits[0]]
        return [logits[row, [place[i] for i in asked]] for row, asked in enumerate(ask.asked)]

    def work(self, module: Any, ask: Ask) -> tuple[int, float]:
        """Positions and FLOPs of this pass: all that it computes, for rows that have ended and for what pads, too."""
        if self._flops is None:
            self._flops = Flops.of(module)
        cost = self._flops
        n = self._rows * max(map(len, ask.tokens))
        columns = self._kept.shape[1] + self._sees.shape[1] + max(map(len, ask.tokens))
        n_wanted = self._rows * len(set(chain.from_iterable(ask.asked)))
        return n, n * (cost.body + columns * cost.pair) + n_wanted * cost.head

    def _grow(self, old: int, width: int, parents: Sequence[Sequence[int]]) -> None:
        sees = np.zeros((self._rows, old + width, old + width), dtype=bool)
        sees[:, :old, :old] = self._sees
        depths = np.zeros((self._rows, old + width), dtype=np.int64)
        depths[:, :old] = self._depths
        new = np.arange(old, old + width)
        sees[:, new, new] = True  # also what only pads: a softmax over nothing would be NaN
        for row, above in enumerate(parents):
            columns = self._columns[row]
            for column, parent in enumerate(above, start=old):
                if parent >= 0:
                    sees[row, column] |= sees[row, columns[parent]]
                    depths[row, column] = depths[row, columns[parent]] + 1
                columns.append(column)
        self._sees, self._depths = sees, depths

    def _masks(self, old: int, positions: np.ndarray, lengths: np.ndarray, dtype: torch.dtype, device: torch.device
               ) -> list[Tensor]:
        n_new = positions.shape[1]
        kept = np.broadcast_to(self._kept[:, None], (self._rows, n_new, self._kept.shape[1]))
        sees = np.concatenate([kept, self._sees[:, old:]], axis=2)
        masks = []
        for kind in self._kinds:
            seen = sees
            if kind == "sliding_attention" and self._window is not None:
                places = np.concatenate([self._places, lengths + self._depths], axis=1)
                seen = sees & (positions[:, :, None] - places[:, None] < self._window)
            masks.append(_float_mask(seen, dtype, device))
        return masks

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep each row's path of nodes, in order; forget all other nodes."""
        base, longest = self._kept.shape[1], max(map(len, paths))
        columns = np.zeros((self._rows, longest), dtype=np.int64)
        kept = np.zeros((self._rows, longest), dtype=bool)
        for row, path in enumerate(paths):
            columns[row, : len(path)] = [self._columns[row][node] for node in path]
            kept[row, : len(path)] = True
        places = np.cumsum(kept, axis=1) - 1 + self._kept.sum(1, keepdims=True)
        is_in_place = bool((columns == np.arange(longest))[kept].all())
        self._memory.compact(base, longest, None if is_in_place else torch.from_numpy(columns + base))
        self._kept = np.concatenate([self._kept, kept], axis=1)
        self._places = np.concatenate([self._places, places], axis=1)
        self._forget()


class Layers:
    """Keys and values in a cache of transformers, for passes by the module itself."""

    def __init__(self, module: Any, kinds: tuple[str, ...]) -> None:
        from transformers import DynamicCache

        self._module, self._kinds = module, kinds
        self._keeps_logits = "logits_to_keep" in signature(module.forward).parameters
        self._cache = DynamicCache()
        self._cache.layer_class_to_replicate = _buffer_class()

    def forward(self, ids: Tensor, positions: Tensor, wanted: Tensor, masks: list[Tensor]) -> Tensor:
        """Logits (B, n_wanted, V); the tokens' keys and values are added."""
        keep = {"logits_to_keep": wanted} if self._keeps_logits else {}
        out = self._module(
            input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True, **keep,
            attention_mask=dict(zip(self._kinds, masks, strict=True)) if len(masks) > 1 else masks[0])
        return out.logits if self._keeps_logits else out.logits[:, wanted]

    def compact(self, base: int, n: int, columns: Tensor | None) -> None:
        """Move the columns (B, n) to base and on; keep base + n. None: they are there already."""
        for layer in self._cache.layers:
            layer.compact(base, n, columns)


class Stack:
    """Keys and values of all layers in one tensor, for passes by replaying a recording; otherwise as Layers."""

    def __init__(self, module: Any, recorded: Recording) -> None:
        self._recorded, self._n = recorded, 0
        self._dtype, self._device = module.dtype, module.device
        self._store: Tensor | None = None

    def forward(self, ids: Tensor, positions: Tensor, wanted: Tensor, masks: list[Tensor]) -> Tensor:
        n_layers, heads, size = self._recorded.shape
        end = self._n + ids.shape[1]
        if self._store is None or end > self._store.shape[4]:
            bigger = torch.zeros((n_layers, 2, len(ids), heads, end + _ROOM, size), dtype=self._dtype,
                                 device=self._device)
            if self._store is not None:
                bigger[:, :, :, :, : self._n] = self._store[:, :, :, :, : self._n]
            self._store = bigger
        logits = self._recorded(ids, positions, wanted, self._store[:, :, :, :, :end], *masks)
        self._n = end
        return logits

    def compact(self, base: int, n: int, columns: Tensor | None) -> None:
        if columns is not None and self._store is not None:
            rows = torch.arange(len(columns), device=self._device)[:, None]
            moved = self._store[:, :, rows, :, columns.to(self._device)]  # (B, n, layers, 2, heads, D)
            self._store[:, :, :, :, base:base + n] = moved.permute(2, 3, 0, 4, 1, 5)
        self._n = base + n


def _float_mask(sees: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(B, 1, n, columns): 0 where a token is seen, the type's least number where not."""
    mask = torch.zeros(sees.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(~sees), torch.finfo(dtype).min)[:, None].to(device)


@functools.cache
def _buffer_class() -> type:
    """A cache layer that writes into a buffer with room to spare; the library's own copies all it has each time."""
    from transformers.cache_utils import DynamicLayer

    class Buffer(DynamicLayer):  # type: ignore[misc]
        _n = 0
        _stores: list[Tensor]

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
                   ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self._stores = [s.new_empty((*s.shape[:2], 0, s.shape[3])) for s in (key_states, value_states)]
            end = self._n + key_states.shape[2]
            for i, new in enumerate((key_states, value_states)):
                store = self._stores[i]
                if end > store.shape[2]:
                    bigger = store.new_empty((*store.shape[:2], end + _ROOM, store.shape[3]))
                    bigger[:, :, : self._n] = store[:, :, : self._n]
                    self._stores[i] = store = bigger
                store[:, :, self._n:end] = new
            self._show(end)
            return self.keys, self.values

        def _show(self, n: int) -> None:
            self._n = n
            self.keys, self.values = (store[:, :, :n] for store in self._stores)

        def get_seq_length(self) -> int:
            return self._n

        def compact(self, base: int, n: int, columns: Tensor | None) -> None:
            if columns is not None:
                rows = torch.arange(len(columns))[:, None]
                for store in self._stores:
                    moved = store[rows.to(store.device), :, columns.to(store.device)]  # (B, n, heads, D)
                    store[:, :, base:base + n] = moved.transpose(1, 2)
            self._show(base + n)

    return Buffer


@dataclass(frozen=True)
class Flops:
    """Of a causal model: body: matrices of one position; head: its output layer; pair: attention of one position to
    one column, in all layers."""

    body: float
    head: float
    pair: float

    @classmethod
    def of(cls, module: Any) -> Flops:
        """2 per weight of a matrix and position, embeddings not counted but as the output layer; attention twice 2 per
        head and size of a head."""
        embedded = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
        head = module.get_output_embeddings().weight
        body = sum(p.numel() for p in module.parameters() if p.ndim >= 2 and id(p) not in {*embedded, id(head)})
        config = module.config.get_text_config(decoder=True)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(2.0 * body, 2.0 * head.numel(), 4.0 * config.num_hidden_layers * config.num_attention_heads * size)


def flops_per_token(module: Any, n_seen: int = 1) -> float:
    """FLOPs of one position that attends to n_seen, itself among them, and whose logits are wanted."""
    cost = Flops.of(module)
    return cost.body + cost.head + n_seen * cost.pair
