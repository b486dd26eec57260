"""Causal language models of transformers as `LanguageModel`s: a tree scored in one pass, caches cut to a path.

Nothing here depends on a model's family: attention is told what to see by a float mask (a boolean one is silently
misread by eager attention), positions are told by depth, and sliding windows are kept in the mask, over a full cache.
Whether a model heeds both is tried out when it is first seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from workbench.speculation.engine import Ask, LanguageModel
from workbench.speculation.tracing import Recording, offloads, recording

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROOM = 256  # positions by which a cache's buffers grow
PADDING = 512  # rows by which models of one tokenizer may differ: sizes are rounded up for the hardware's sake
# Share of the logits' deviation by which a tree's may differ from plain ones: rounding stays far below, a mask or a
# position that is not heeded lies far above. In types of half the size rounding may send a token to another expert.
_TOLERANCE = {torch.float64: 0.01, torch.float32: 0.01}
_COARSE_TOLERANCE = 0.2

_CHECKED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # module -> how it was when its passes were tried


def causal(module: Any, name: str) -> LanguageModel:
    """A causal model of transformers, or of PEFT around one, as a LanguageModel. Logits are float32, on its device.

    Raises ValueError by name for what `unwrapped` refuses, for models whose memory is more than keys and values
    (state-space and linear-attention layers), whose attention cannot take a mask (flash attention), is local where the
    configuration's layer_types do not say so, or biased by distance (ALiBi), that take no positions or no cache, that
    are no decoder-only models; and where logits of a tiny tree are not those of plain passes. That is tried when a
    module is first seen: three passes, of 3 x 6, 6 and 2 tokens.
    """
    module = unwrapped(module, name)
    takes = signature(module.forward).parameters
    if getattr(module.config, "is_encoder_decoder", False) or not module.can_generate():
        raise ValueError(f"{name}: {type(module).__name__} is no decoder-only language model")
    config = module.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    unknown = set(types or ()) - {"full_attention", "sliding_attention"}
    if unknown or getattr(module, "_is_stateful", False):
        told = f"layers of kind {', '.join(sorted(unknown))}" if unknown else f"{type(module).__name__}'s layers"
        raise ValueError(f"{name}: {told}, which may remember more than keys and values: expected full or sliding "
                         f"attention only")
    if getattr(config, "alibi", False):
        raise ValueError(f"{name}: {type(module).__name__} has alibi=True, biases by distance in a sequence, which a "
                         f"tree is not: expected positions that are told (rotary or learned ones)")
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise ValueError(f"{name}: {type(module).__name__} has attention_layers of kind 'local', whose window no mask "
                         f"tells: expected full or sliding attention only")
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
    context = getattr(config, "max_position_embeddings", None)
    _try_out(module, name, kinds, window, context, n_embedded)

    def network(tokens: Tensor, ask: Ask) -> list[Tensor]:
        assert isinstance(ask.state, KeyValues)
        return ask.state.forward(module, ask, n_embedded)

    def work(tokens: Tensor, ask: Ask) -> tuple[int, float]:
        assert isinstance(ask.state, KeyValues)
        return ask.state.work(module, ask)

    def begin(n_rows: int) -> KeyValues:
        recorded = recording(module, kinds)
        return KeyValues(n_rows, kinds, window, Layers(module, kinds) if recorded is None else Stack(module, recorded))

    # Dynamic NTK codes anew beyond the context, which is refused by itself.
    bends = [kind["original_max_position_embeddings"] for kind in rotations(module) if kind["rope_type"] == "longrope"]
    return LanguageModel(name, network, begin, module.get_output_embeddings().weight.shape[0], context,
                         min(bends, default=None), module, work)


def unwrapped(module: Any, name: str) -> PreTrainedModel:
    """The model of transformers itself, which adapters of PEFT stay in, without PEFT's wrapper.

    Raises ValueError, naming the model, for what is none, is in training mode, has weights elsewhere than where it
    computes (offloaded by accelerate, or never loaded), or adapters that are no part of its layers (prompt learning).
    """
    from transformers import PreTrainedModel

    adapters = getattr(module, "peft_config", None)
    if adapters and hasattr(module, "get_base_model"):
        for adapter, config in adapters.items():
            if getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None):
                raise ValueError(f"{name}: adapter {adapter!r} ({type(config).__name__}) acts on the prompt: expected "
                                 f"adapters of layers only, such as LoRA")
        module = module.get_base_model()
    if not isinstance(module, PreTrainedModel):
        raise ValueError(f"{name} is a {type(module).__name__}: expected a causal model of transformers")
    if module.training:
        raise ValueError(f"{name} is in training mode, where dropout changes its laws: call {name}.eval() first")
    if any(map(offloads, module.modules())) or any(p.is_meta for p in module.parameters()):
        raise ValueError(f"{name} has weights on the meta device or offloaded by accelerate: expected all of them "
                         f"where it computes, e.g. from_pretrained(...).to(device) without device_map")
    return module


def rotations(module: PreTrainedModel) -> list[dict[str, Any]]:
    """The settings of rotary positions: none, one set, or one per kind of layer. Each has a "rope_type"."""
    told = getattr(module.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return [kind for kind in (told, *told.values()) if isinstance(kind, dict) and "rope_type" in kind]


def check_vocabularies(target: LanguageModel, draft: LanguageModel, tokenizer: Any = None, draft_tokenizer: Any = None
                       ) -> None:
    """Raises ValueError where a draft's tokens are not the target's: tokenizers differ or, unless both are given, the
    models' numbers of logits, from each other or from the tokenizer's tokens, by more than PADDING."""
    if tokenizer is not None and draft_tokenizer is not None:
        ours, theirs = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
        if differing := sorted((t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t)), key=str)[:3]:
            told = ", ".join(f"{t!r} is {ours.get(t)} and {theirs.get(t)}" for t in differing)
            raise ValueError(f"draft_tokenizer: expected the vocabulary of tokenizer, but {told}")
        return
    for model in (target, draft):
        if tokenizer is not None and model.vocab_size < len(tokenizer) - PADDING:
            raise ValueError(f"tokenizer has {len(tokenizer)} tokens, {model.name} logits of {model.vocab_size}: "
                             f"expected models of one tokenizer")
    if abs(target.vocab_size - draft.vocab_size) > PADDING:
        raise ValueError(f"{draft.name} has a vocabulary of {draft.vocab_size} tokens, {target.name} of "
                         f"{target.vocab_size}: expected one tokenizer; if it is the same, pass tokenizer and "
                         f"draft_tokenizer to show it")


def _try_out(module: PreTrainedModel, name: str, kinds: tuple[str, ...], window: int | None, context: int | None,
             n_embedded: int) -> None:
    """Raises ValueError where logits of a tree, and those after one of its branches was kept, are not plain ones."""
    now = kinds, window, module.config._attn_implementation, module.dtype, module.device
    n_begin = min(4, 4 if context is None else context - 2)
    if _CHECKED.get(module) == now or n_begin < 1:
        return
    *begin, a, b, c, d = [i % n_embedded for i in range(n_begin + 4)]
    # Past the module's own hooks, which may count or print what users' passes are.
    state = KeyValues(1, kinds, window, Layers(module, kinds, module.forward))
    parents, last = [*range(-1, n_begin - 1)], n_begin - 1
    try:
        with torch.inference_mode(False), torch.no_grad():
            (first,) = state.forward(module, Ask(state, [[*begin, a, b]], [[*parents, last, last]],
                                                 [[last, last + 1, last + 2]]), n_embedded)
            state.keep([[*range(n_begin), n_begin + 1]])
            (second,) = state.forward(module, Ask(state, [[c, d]], [[-1, -1]], [[0, 1]]), n_embedded)
            rows = torch.tensor([[*begin, a, a], [*begin, b, c], [*begin, b, d]], device=module.device)
            logits = module.forward(input_ids=rows, use_cache=False).logits
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{name}: {type(module).__name__} cannot pass over a tree of tokens: {error}") from error
    right = logits[[0, 0, 1, 1, 2], [last, last + 1, last + 1, last + 2, last + 2]].float()
    if right.isnan().any():
        return  # no matter of the tree: whoever decodes refuses them
    allowed = max(_TOLERANCE.get(dtype, _COARSE_TOLERANCE) for dtype in (module.dtype, logits.dtype))
    deviation = (torch.cat([first, second]) - right).norm(dim=1)
    spread = (right - right.mean(dim=1, keepdim=True)).norm(dim=1)
    if not bool((deviation <= allowed * spread).all()):
        raise ValueError(f"{name}: {type(module).__name__}'s logits of a tree of tokens differ from plain passes by "
                         f"{float((deviation / spread).max()):.0%} of their deviation: its attention heeds no mask or "
                         f"no positions that it is given")
    _CHECKED[module] = now


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
        for row, given in enumerate(ask.tokens):
            positions[row, len(given):] = 0  # of what only pads: after a row that fills the context there is none
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
    """Keys and values in a cache of transformers, for passes by the module itself. call: instead of module(...)."""

    def __init__(self, module: Any, kinds: tuple[str, ...], call: Callable[..., Any] | None = None) -> None:
        from transformers import DynamicCache

        self._call, self._kinds = call or module, kinds
        self._keeps_logits = "logits_to_keep" in signature(module.forward).parameters
        self._cache = DynamicCache()
        self._cache.layer_class_to_replicate = _buffer_class()

    def forward(self, ids: Tensor, positions: Tensor, wanted: Tensor, masks: list[Tensor]) -> Tensor:
        """Logits (B, n_wanted, V); the tokens' keys and values are added."""
        keep = {"logits_to_keep": wanted} if self._keeps_logits else {}
        out = self._call(
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
