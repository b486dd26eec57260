"""Passes of a model recorded once and replayed without Python, which for small models takes most of a pass.

A recording is one of operations: what a model decides in Python from the values that it is given would be frozen in it.
The recorder notices every such decision, and then, or where a replay on other sizes gives other logits, there is none.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORTH_IT = 200_000_000
TOLERANCE = 1e-4  # of the logits' largest, times the type's precision over float32's

# These look at sizes only: ways to one and the same attention, and whether a padding token is in the vocabulary.
DECIDES_BY_SIZE = ("integrations/sdpa_attention.py", "nn/functional.py")

_RECORDINGS: WeakKeyDictionary[Any, tuple[Any, Recording | None]] = WeakKeyDictionary()


class Recording:
    """A replay: (tokens (B, n), positions (B, n), columns whose logits are wanted, keys and values, one mask per kind)
    -> logits (B, n_wanted, V). Keys and values (layer, 2, B, head, columns, D), of which the last n are written."""

    def __init__(self, replay: Any, shape: tuple[int, int, int]) -> None:
        self.replay, self.shape = replay, shape  # layers, heads, D

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.jit.optimized_execution(False):  # optimising anew for each size would take longer than it saves
            return self.replay(*inputs)


def recording(module: PreTrainedModel, kinds: Sequence[str]) -> Recording | None:
    """The module's recording, made anew where its weights or parts have changed; None where it cannot have one, or has
    over WORTH_IT weights.

    kinds: of attention masks, in the order in which they will be given. Some tenths of a second, once per module.
    """
    weights = [*module.parameters(), *module.buffers()]
    if sum(w.numel() for w in weights) > WORTH_IT or any(
            part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules()):
        return None  # a replay would pass over what hooks do
    now = module.training, [(id(w), w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in weights]
    known = _RECORDINGS.get(module)
    if known is None or known[0] != now:
        _RECORDINGS[module] = known = now, _record(module, tuple(kinds))
    return known[1]


class _Pure(nn.Module):
    """The module as a function of tensors only."""

    def __init__(self, module: PreTrainedModel, kinds: tuple[str, ...], n_layers: int) -> None:
        super().__init__()
        self.module, self.kinds, self.n_layers = module, kinds, n_layers
        self.keeps_logits = "logits_to_keep" in signature(module.forward).parameters

    def forward(self, tokens: Tensor, positions: Tensor, wanted: Tensor, store: Tensor, *masks: Tensor) -> Tensor:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        n = tokens.shape[1]

        class Written(DynamicLayer):  # type: ignore[misc]
            def __init__(self, keys: Tensor, values: Tensor) -> None:
                super().__init__()
                self.keys, self.values, self.is_initialized = keys, values, True

            def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
                       ) -> tuple[Tensor, Tensor]:
                first = self.get_seq_length()
                self.keys[:, :, first:], self.values[:, :, first:] = key_states, value_states
                return self.keys, self.values

            def get_seq_length(self) -> int:
                return self.keys.shape[2] - n

        cache = DynamicCache()
        cache.layers = [Written(store[i, 0], store[i, 1]) for i in range(self.n_layers)]
        keep = {"logits_to_keep": wanted} if self.keeps_logits else {}
        out = self.module(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, **keep,
                          attention_mask=dict(zip(self.kinds, masks, strict=True)) if len(masks) > 1 else masks[0])
        return out.logits if self.keeps_logits else out.logits[:, wanted]


def _record(module: PreTrainedModel, kinds: tuple[str, ...]) -> Recording | None:
    def inputs(n_rows: int, n: int, n_past: int) -> tuple[Tensor, ...]:
        mask = torch.zeros(n_rows, 1, n, n_past + n, dtype=module.dtype)
        mask[..., n_past:] = torch.full((n, n), torch.finfo(module.dtype).min).triu(1)
        store = torch.linspace(-1, 1, n_layers * 2 * n_rows * heads * (n_past + n) * size, dtype=module.dtype)
        store = store.view(n_layers, 2, n_rows, heads, n_past + n, size)
        given = (torch.arange(n_rows * n).view(n_rows, n) % 2, torch.arange(n_past, n_past + n).repeat(n_rows, 1),
                 torch.tensor([0, n - 1]), store, *[mask] * len(kinds))
        return tuple(x.to(module.device) for x in given)

    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            n_layers, heads, size = _shape(module)
            pure = _Pure(module, kinds, n_layers)
            replay = torch.jit.trace(pure, inputs(2, 3, 5), check_trace=False)
            made = Recording(replay, (n_layers, heads, size))
            if any(issubclass(w.category, torch.jit.TracerWarning) and not w.filename.endswith(DECIDES_BY_SIZE)
                   for w in told):
                return None
            for sizes in ((1, 1, 9), (3, 4, 0)):
                ours, theirs = inputs(*sizes), inputs(*sizes)
                for found, right in ((made(*ours), pure(*theirs)), (ours[3], theirs[3])):
                    precision = torch.finfo(right.dtype).eps / torch.finfo(torch.float32).eps
                    if not (found - right).abs().max() <= TOLERANCE * precision * right.abs().max():
                        return None
        except (RuntimeError, TypeError, ValueError):
            return None
    return made


def _shape(module: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, heads and size of the keys, as one pass makes them. Raises RuntimeError where layers differ."""
    from transformers import DynamicCache

    cache = DynamicCache()
    module(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=module.device), past_key_values=cache, use_cache=True)
    keys = torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])
    return keys.shape[0], keys.shape[3], keys.shape[5]
