"""Passes of a model recorded once and replayed without the Python of its modules, for small models much of a pass.

A recording is a list of torch's own functions, called again on the same weights. What a model decides in Python from
the values of a tensor would be frozen in it: where the recorder sees that, or where a replay on other sizes gives other
logits, there is no recording. Nor is there one for parts whose answer may hang on what nobody can see from outside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import partial
from inspect import signature
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORTH_IT = 200_000_000
TOLERANCE = 1e-4  # of the logits' largest, times the type's precision over float32's

# Rows, tokens, columns before them, tokens whose logits are wanted: no two alike, and no one the double of another.
RECORDED_AT = ((2, 3, 5, 2), (3, 7, 11, 5), (5, 4, 17, 3), (7, 11, 3, 8))
CHECKED_AT = ((1, 1, 9, 1), (3, 4, 0, 2), (1, 6, 30, 6))

# Parts written by these do what their class, attributes, weights and configuration say; of others nothing is assumed.
KNOWN = ("torch.nn.", "transformers.")
# Questions about a tensor that its values have no part in. All others that give no tensor are a decision by values.
OF_THE_FORM = frozenset((
    "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous", "is_floating_point",
    "is_complex", "is_inference", "get_device", "storage_offset", "__len__", "__get__", "_set_grad_enabled"))
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HELD = ("_parameters", "_buffers", "_modules")
PLAIN = frozenset({type(None), bool, int, float, str, bytes, torch.dtype, torch.device})
PASSED_OVER = frozenset(vars(nn.Module())) - {"training"} | {"generation_config"}

_RECORDINGS: WeakKeyDictionary[Any, tuple[Any, Recording | None]] = WeakKeyDictionary()


class Recording:
    """A replay: (tokens (B, n), positions (B, n), columns whose logits are wanted, keys and values, one mask per kind)
    -> logits (B, n_wanted, V). Keys and values (layer, 2, B, head, columns, D), of which the last n are written."""

    def __init__(self, replay: Callable[..., Tensor], shape: tuple[int, int, int]) -> None:
        self.replay, self.shape = replay, shape  # layers, heads, D

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.replay(*inputs)


def recording(module: PreTrainedModel, kinds: Sequence[str]) -> Recording | None:
    """The module's recording, made anew where `fingerprint` has changed; None where it cannot have one, or has over
    WORTH_IT weights.

    kinds: of attention masks, in the order in which they will be given. Some tenths of a second once per module, then
    the price of a fingerprint, which is taken once per batch of sequences. Values of weights may change in place: a
    replay reads them where they are.
    """
    state = fingerprint(module)
    if state is None:
        return None
    now = [tuple(kinds), *state]
    known = _RECORDINGS.get(module)
    if known is None or known[0] != now:
        _RECORDINGS[module] = known = now, _record(module, tuple(kinds))
    return known[1]


def fingerprint(module: PreTrainedModel) -> list[Any] | None:
    """What a replay takes for granted, to compare with ==; None where nothing recorded could be relied upon.

    Taken in: every part, its class and what that class and its source file define, its attributes (mode, scales) and
    those of its configuration, where each weight lies and its type, and the attention functions that are registered.
    Nothing is relied upon under autocast, with hooks, with a forward that was put on a part, with parts by others than
    torch and transformers (adapters of PEFT, quantised layers), with attributes or weights of an unknown class.
    About 15 microseconds a part, 2.6 ms for 160 parts.
    """
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return None
    state: list[Any] = [torch.get_default_dtype()]
    weights: dict[int, Tensor] = {}
    seen: dict[int, Any] = {}
    kinds = set()
    try:
        for part in module.modules():
            kind, attributes = type(part), vars(part)
            if not kind.__module__.startswith(KNOWN) or "forward" in attributes or any(attributes[h] for h in HOOKS):
                return None
            kinds.add(kind)
            state += id(part), kind
            for held in HELD:
                for name, value in attributes[held].items():
                    state += name, id(value)
                    if held != "_modules" and value is not None:
                        weights[id(value)] = value
            for name, value in attributes.items():
                if name not in PASSED_OVER:
                    state += name, _plain(value, seen)
    except _Unknown:
        return None
    if (sum(w.numel() for w in weights.values()) > WORTH_IT
            or any(type(w) not in (Tensor, nn.Parameter) for w in weights.values())
            or torch.is_autocast_enabled(module.device.type)):
        return None
    state += [(w.data_ptr(), w.dtype, w.shape, w.stride()) for w in weights.values()]
    classes = {base: None for kind in kinds for base in kind.__mro__ if base.__module__.startswith(KNOWN)}
    files = {name: None for base in classes if (name := base.__module__) in sys.modules}
    for source in [*classes, *(sys.modules[name] for name in files)]:
        state.append(set(map(id, vars(source).values())))
    if (attention := sys.modules.get("transformers.modeling_utils")) is not None:
        registered = attention.ALL_ATTENTION_FUNCTIONS
        state.append([(name, id(registered[name])) for name in registered.valid_keys()])
    return state


def changes(module: nn.Module) -> list[Any]:
    """Another list after a change in place, to compare with ==: parts, hooks and attributes (mode, adapters that are
    active, scales) and those of configurations; weights moved, replaced, or written by functions of torch.

    Not told are values written past torch's count of versions (`.data`), buffers that are not saved, which some forward
    passes write, what is marked as there for a moment only (`is_passing`), and what an object of another class than
    torch's and transformers' holds. About as quick as
    `fingerprint`, and there for every module.
    """
    state: list[Any] = []
    told: dict[int, Any] = {}  # configurations, which parts share; other values are told anew for each part
    for part in module.modules():
        attributes = vars(part)
        state += id(part), type(part), *(id(hook) for held in HOOKS for hook in attributes[held].values())
        # diffusers' registry is made by its pipelines in passing; what it holds is what counts
        state += map(id, getattr(attributes.get("_diffusers_hook"), "hooks", {}).values())
        for held in ("_parameters", "_buffers"):
            state += [(name, id(w), w.data_ptr(), None if w.is_inference() else w._version)
                      for name, w in attributes[held].items()
                      if w is not None and name not in part._non_persistent_buffers_set]
        for name, value in attributes.items():
            if name not in PASSED_OVER and name not in ("warnings_issued", "_diffusers_hook") and not isinstance(
                    value, Tensor) and not getattr(value, "is_passing", False):
                try:
                    state += name, _plain(value, told if name == "config" else {})
                except _Unknown:
                    state += name, id(value)
    return state


def offloads(part: nn.Module) -> bool:
    """Whether a hook of accelerate or of diffusers moves this part's weights to and fro."""
    hook, registry = getattr(part, "_hf_hook", None), getattr(part, "_diffusers_hook", None)
    held = (*getattr(hook, "hooks", (hook,)), *getattr(registry, "hooks", {}).values())
    return any(getattr(h, "offload", False) or "Offload" in type(h).__name__ for h in held)


class _Unknown(Exception):
    """An attribute of which it cannot be told when it changes."""


def _plain(value: Any, seen: dict[int, Any]) -> Any:
    """A copy of plain values, containers and configurations that later changes do not reach; the id of what does not
    change. Raises _Unknown for all else."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = id(value)
    if issubclass(kind, dict):
        return [(k, _plain(v, seen)) for k, v in value.items()]
    if issubclass(kind, (list, tuple, set, frozenset)):
        return [kind, *(_plain(v, seen) for v in value)]
    if kind is FunctionType:
        return id(value), value.__code__
    if issubclass(kind, (Tensor, nn.Module, Enum, type, BuiltinFunctionType, MethodType)):
        return id(value)
    if kind is partial:
        return [id(value.func), _plain(value.args, seen), _plain(value.keywords, seen)]
    if kind.__module__.startswith("transformers."):
        return [id(value), _plain(getattr(value, "__dict__", ()), seen)]
    raise _Unknown


class _Recorder(TorchFunctionMode):
    """Notes every function of torch that is called, with its arguments. is_true: nothing was decided by values."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.is_true = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if _tensors(out) or name == "__setitem__":
            self.calls.append((func, args, kwargs or {}, out))
        elif name not in OF_THE_FORM and not isinstance(out, (torch.dtype, torch.device, torch.Size, torch.layout)):
            self.is_true = False
        return out


class _Different(Exception):
    """The recordings at several sizes do not follow one another."""


class _Writer:
    """Source of one function that makes the calls of all recordings: `sizes` and `inputs` of each, and its calls."""

    def __init__(self, sizes: Sequence[tuple[int, int, int, int]], inputs: Sequence[Sequence[Tensor]]) -> None:
        given = {"B": [s[0] for s in sizes], "n": [s[1] for s in sizes], "past": [s[2] for s in sizes],
                 "end": [s[1] + s[2] for s in sizes], "wanted": [s[3] for s in sizes]}
        self._sizes = {**given, **{f"{a} * {b}": [x * y for x, y in zip(given[a], given[b], strict=True)]
                                   for a in given for b in given}}
        self._names: list[dict[int, str]] = [{id(x): f"i{k}" for k, x in enumerate(xs)} for xs in inputs]
        self._globals: dict[str, Any] = {}
        self._lines = [f"def replay({', '.join(f'i{k}' for k in range(len(inputs[0])))}):", "  B, n = i0.shape",
                       "  end, wanted = i3.shape[4], i2.shape[0]", "  past = end - n"]
        self._last: dict[str, int] = {}  # the line in which a name is used last

    def add(self, k: int, calls: Sequence[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
        """The k-th call, in each recording."""
        func = calls[0][0]
        if any(call[0] != func for call in calls):
            raise _Different
        arguments = [self._text([call[1][i] for call in calls]) for i in range(self._one([len(c[1]) for c in calls]))]
        for key in calls[0][2]:
            arguments.append(f"{key}={self._text([call[2].get(key) for call in calls])}")
        self._lines.append(f"  v{k} = {self._known(func)}({', '.join(arguments)})")
        self._last[f"v{k}"] = len(self._lines) - 1
        for names, call in zip(self._names, calls, strict=True):
            for path, tensor in _paths(call[3]):
                names[id(tensor)] = f"v{k}{path}"

    def finish(self, outs: Sequence[Tensor]) -> Callable[..., Tensor]:
        """The function, which returns what these are. A result is let go after its last use."""
        lines = [*self._lines, f"  return {self._text(outs)}"]
        for name, at in self._last.items():
            if at < len(lines) - 1:
                lines[at] += f"; {name} = None"
        exec("\n".join(lines), self._globals)  # of numbers and of names that are made here
        return self._globals["replay"]

    def _text(self, values: Sequence[Any]) -> str:
        """An argument, given as it was in each recording."""
        first = values[0]
        if any(type(value) is not type(first) for value in values):
            raise _Different
        if isinstance(first, Tensor):
            name = self._one([names.get(id(value)) for names, value in zip(self._names, values, strict=True)])
            if name is None:
                return self._known(self._one(values))  # a weight, or another tensor that outlives passes
            self._last[name.split("[")[0]] = len(self._lines)
            return name
        if isinstance(first, (tuple, list)):
            parts = [self._text([value[i] for value in values]) for i in range(self._one([len(v) for v in values]))]
            return f"[{', '.join(parts)}]" if isinstance(first, list) else f"({''.join(part + ', ' for part in parts)})"
        if isinstance(first, slice):
            return f"slice({', '.join(self._text([getattr(v, a) for v in values]) for a in ('start', 'stop', 'step'))})"
        if type(first) is int and any(value != first for value in values):
            return self._size(values)
        if first is None or type(first) in (bool, int, str):
            return repr(self._one(values))
        return self._known(self._one(values))

    def _size(self, values: Sequence[int]) -> str:
        """A whole number that follows the sizes: a multiple of one, or of a product of two, and a constant."""
        for name, at in self._sizes.items():
            factor, rest = divmod(values[1] - values[0], at[1] - at[0]) if at[1] != at[0] else (0, 1)
            constant = values[0] - factor * at[0]
            if not rest and all(v == factor * size + constant for v, size in zip(values, at, strict=True)):
                return f"({factor} * {name} + {constant})"
        raise _Different

    def _known(self, value: Any) -> str:
        name = f"g{id(value)}"
        self._globals[name] = value
        return name

    @staticmethod
    def _one(values: Sequence[Any]) -> Any:
        """What is the same in all recordings."""
        first = values[0]
        if not all(value is first or (type(first) in PLAIN and value == first) for value in values[1:]):
            raise _Different
        return first


def _paths(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a result, with how to reach each."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _paths(part, f"{path}[{i}]")


def _tensors(value: Any) -> bool:
    return next(iter(_paths(value)), None) is not None


def _record(module: PreTrainedModel, kinds: tuple[str, ...]) -> Recording | None:
    def inputs(n_rows: int, n: int, n_past: int, n_wanted: int) -> tuple[Tensor, ...]:
        mask = torch.zeros(n_rows, 1, n, n_past + n, dtype=module.dtype)
        mask[..., n_past:] = torch.full((n, n), torch.finfo(module.dtype).min).triu(1)
        store = torch.linspace(-1, 1, n_layers * 2 * n_rows * heads * (n_past + n) * size, dtype=module.dtype)
        store = store.view(n_layers, 2, n_rows, heads, n_past + n, size)
        given = (torch.arange(n_rows * n).view(n_rows, n) % 2, torch.arange(n_past, n_past + n).repeat(n_rows, 1),
                 torch.arange(n - n_wanted, n), store, *(mask.clone() for _ in kinds))
        return tuple(x.to(module.device) for x in given)

    try:
        with torch.inference_mode(False), torch.no_grad():
            n_layers, heads, size = _shape(module)
            pass_ = _function(module, kinds, n_layers)
            given = [inputs(*sizes) for sizes in RECORDED_AT]
            tapes, outs = [], []
            for one in given:
                with _Recorder() as recorder:
                    outs.append(pass_(*one))
                tapes.append(recorder)
            if not all(tape.is_true and len(tape.calls) == len(tapes[0].calls) for tape in tapes):
                return None
            writer = _Writer(RECORDED_AT, given)
            for k, calls in enumerate(zip(*(tape.calls for tape in tapes), strict=True)):
                writer.add(k, calls)
            made = Recording(writer.finish(outs), (n_layers, heads, size))
            for sizes in CHECKED_AT:
                ours, theirs = inputs(*sizes), inputs(*sizes)
                for found, right in ((made(*ours), pass_(*theirs)), (ours[3], theirs[3])):
                    precision = torch.finfo(right.dtype).eps / torch.finfo(torch.float32).eps
                    if not (found - right).abs().max() <= TOLERANCE * precision * right.abs().max():
                        return None
    except (_Different, RuntimeError, TypeError, ValueError, IndexError):
        return None
    return made


def _function(module: PreTrainedModel, kinds: tuple[str, ...], n_layers: int) -> Callable[..., Tensor]:
    """The module's pass as a function of tensors only."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    keeps_logits = "logits_to_keep" in signature(module.forward).parameters

    class Written(DynamicLayer):  # type: ignore[misc]
        def __init__(self, keys: Tensor, values: Tensor, n: int) -> None:
            super().__init__()
            self.keys, self.values, self.is_initialized, self._n = keys, values, True, n

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            first = self.get_seq_length()
            self.keys[:, :, first:], self.values[:, :, first:] = key_states, value_states
            return self.keys, self.values

        def get_seq_length(self) -> int:
            return self.keys.shape[2] - self._n

    def pass_(tokens: Tensor, positions: Tensor, wanted: Tensor, store: Tensor, *masks: Tensor) -> Tensor:
        cache = DynamicCache()
        cache.layers = [Written(store[i, 0], store[i, 1], tokens.shape[1]) for i in range(n_layers)]
        keep = {"logits_to_keep": wanted} if keeps_logits else {}
        out = module(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, **keep,
                     attention_mask=dict(zip(kinds, masks, strict=True)) if len(masks) > 1 else masks[0])
        return out.logits if keeps_logits else out.logits[:, wanted]

    return pass_


def _shape(module: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, heads and size of the keys, as one pass makes them. Raises RuntimeError where layers differ."""
    from transformers import DynamicCache

    cache = DynamicCache()
    module(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=module.device), past_key_values=cache, use_cache=True)
    keys = torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])
    return keys.shape[0], keys.shape[3], keys.shape[5]
