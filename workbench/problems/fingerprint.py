"""Digests of what a problem is made of: weights whole, the settings of modules, functions with all that they hold."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.speculation.tracing import changes, offloads

_DEPTH = 12  # of objects within objects; deeper ones are told by their class alone
# Fields of torch modules and of what libraries hang on them that say where, when or from which file, not what.
_ASIDE = frozenset((*vars(nn.Module()), "config", "_internal_dict", "generation_config", "peft_config", "hf_device_map",
                    "_hf_hook", "_old_forward", "_diffusers_hook", "_compiled_call_impl", "_loss_function"))
# Their functions count by name: a text would make another digest of each release.
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "diffusers", "transformers", "accelerate", "peft"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def digest_of_modules(parts: Iterable[tuple[Any, Mapping[str, Any]]]) -> str:
    """16 hex digits of the SHA-256 of (torch module, configuration) pairs: all that their answers follow from.

    Of each module every byte of every parameter and buffer (persistent or not), its classes, and what is set on it
    beside weights: adapters that are active and their scales, attention processors, FreeU, hooks, replaced methods.
    Where the weights are (device, offloading, file) and whether gradients are kept makes no difference. Buffers that
    are not saved (position tables) are computed where the model is loaded: there another processor's last digit does.
    Costs .9 s per GB and core with a processor's own SHA instructions (measured), about 2.5 s without; tensors of an
    accelerator are copied to the host one by one. Raises ValueError where a tensor has no values (meta device).
    """
    return digest_of_values(*((module, {k: v for k, v in config.items() if not str(k).startswith("_")})
                              for module, config in parts))


def digest_of_values(*values: Any, weights: bool = True) -> str:
    """16 hex digits of the SHA-256 of numbers, texts, containers, tensors, torch modules, functions and objects.

    Objects count by their class and fields; functions by their text, their defaults, what they close over and the
    global names that they use, functions of the same package included; those of libraries and of other packages by
    name. weights=False leaves the values of modules' tensors out, but not their shapes and types.
    """
    return _Hash(weights).of(values).hex()[:16]


class Unchanged:
    """Whether modules are still what they were when this was made of {name: module}: call it to know.

    A problem's digest and costs are of its models as they were when it was made; what is asked after a change in place
    would be stored and remembered under another model's name. Told by `tracing.changes`: .3 to 1.2 ms for a module of
    160 parts. Modules whose weights are moved about (offloaded) are left out.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._made = {name: (module, changes(module)) for name, module in modules.items()
                      if not any(map(offloads, module.modules()))}

    def __call__(self, *names: str) -> None:
        """Raises ValueError that names the first, of these or of all, that has changed."""
        for name, (module, made) in self._made.items():
            if (not names or name in names) and changes(module) != made:
                raise ValueError(f"{name} has changed since this problem was made (weights, adapters, mode, hooks or "
                                 f"device), and its digest and figures are of what it was: make the problem anew")


class _Hash:
    def __init__(self, weights: bool) -> None:
        self.weights = weights
        self.open: dict[int, int] = {}  # what is being described, by id: an object may hold itself

    def of(self, value: Any) -> bytes:
        sha = hashlib.sha256()
        for part in self.parts(value):
            sha.update(part if isinstance(part, bytes) else str(part).encode())
            sha.update(b"\0")
        return sha.digest()

    def parts(self, value: Any) -> Iterator[str | bytes]:
        """What is hashed for `value`; a part that belongs to something inside it is that thing's hash."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.layout):
            yield f"{type(value).__name__} {value!r}"
        elif isinstance(value, Tensor):
            yield _tensor(value)
        elif isinstance(value, np.ndarray | np.generic):
            yield f"numpy {value.dtype} {value.shape}"
            yield (repr(value.tolist()).encode() if value.dtype.hasobject else np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Enum):
            yield f"{_name(type(value))} {value.name}"
        elif id(value) in self.open or len(self.open) > _DEPTH:
            yield f"above {self.open[id(value)]}" if id(value) in self.open else _name(type(value))
        else:
            self.open[id(value)] = len(self.open)
            try:
                yield from self.inside(value)
            finally:
                del self.open[id(value)]

    def inside(self, value: Any) -> Iterator[str | bytes]:
        if isinstance(value, Mapping):
            yield f"mapping {len(value)}"
            for key, held in sorted(value.items(), key=lambda item: str(item[0])):
                yield str(key)
                yield self.of(held)
        elif isinstance(value, list | tuple):
            yield f"{len(value)} in order"
            yield from map(self.of, value)
        elif isinstance(value, set | frozenset):
            yield f"set {len(value)}"
            yield from sorted(map(self.of, value))
        elif isinstance(value, nn.Module):
            yield from self.module(value)
        elif isinstance(value, functools.partial):
            yield "partial"
            yield from map(self.of, (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            yield "method"
            yield from map(self.of, (value.__func__, value.__self__))
        elif isinstance(value, types.FunctionType) or hasattr(value, "__wrapped__"):
            yield from self.function(inspect.unwrap(value))
        elif isinstance(getattr(value, "components", None), Mapping):  # a pipeline
            yield _name(type(value))
            yield self.of(value.components)
        elif hasattr(value, "register_to_config"):  # a scheduler or processor: what it computes follows from this
            yield _name(type(value))
            yield self.of({k: v for k, v in value.config.items() if not k.startswith("_")})
        else:
            named = value if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType) else type(value)
            yield _name(named)
            if named is value:
                return
            if _package(named) in sys.stdlib_module_names and named is not types.SimpleNamespace:
                # fields of its objects (loggers, locks) may hold anything; dates and paths tell their value
                yield "" if " at 0x" in (told := repr(value)) else told
            else:
                yield self.of({k: v for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("__")})

    def function(self, function: Any) -> Iterator[str | bytes]:
        code = getattr(function, "__code__", None)
        yield _name(function)
        if code is None or _package(function) in _LIBRARIES:
            return
        try:
            yield inspect.getsource(function)
        except (OSError, TypeError):  # made by exec: no text is kept
            yield code.co_code + repr([c for c in code.co_consts if not isinstance(c, types.CodeType)]).encode()
        yield self.of([function.__defaults__, function.__kwdefaults__])
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            yield name
            yield self.of(_held(cell))
        for name in sorted(_names(code) & function.__globals__.keys()):
            value = function.__globals__[name]
            yield name
            is_foreign = callable(value) and not isinstance(value, nn.Module) and \
                _package(value if hasattr(value, "__module__") else type(value)) != _package(function)
            yield _name(value) if is_foreign or isinstance(value, type | types.ModuleType) else self.of(value)

    def module(self, module: nn.Module) -> Iterator[str | bytes]:
        module = getattr(module, "_orig_mod", module)  # what torch.compile wrapped
        tensors: list[tuple[str, Tensor]] = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for path, part in module.named_modules(remove_duplicate=False):
                yield f"{path} {_name(type(part))}"
                yield self.of(self.settings(part))
                with _loaded(part):
                    tensors = [(n, t) for kind in (part._parameters, part._buffers) for n, t in kind.items()
                               if t is not None]
                    yield repr([(n, tuple(t.shape), t.dtype) for n, t in tensors])
                    if self.weights:
                        yield from pool.map(_tensor, [t for _, t in tensors], [f"{path}.{n}" for n, _ in tensors])
                        yield from (self.of(vars(t.quant_state)) for _, t in tensors if hasattr(t, "quant_state"))

    def settings(self, module: nn.Module) -> dict[str, Any]:
        own = {name: value for name, value in vars(module).items() if name not in _ASIDE}
        if hasattr(module, "_hf_hook"):
            own.pop("forward", None)  # accelerate's, which moves weights
        own |= {name: list(vars(module)[name].values()) for name in _HOOKS if vars(module)[name]}
        registry = getattr(module, "_diffusers_hook", None)  # caches, skipped layers; their state comes and goes
        hooks = [] if registry is None else [h for h in registry.hooks.values() if "Offload" not in type(h).__name__]
        if hooks:
            own["_diffusers_hook"] = [(type(h).__name__, getattr(h, "config", None)) for h in hooks]
        return own


def _tensor(tensor: Tensor, where: str = "a tensor") -> bytes:
    """SHA-256 of a tensor's type, shape and every byte of its values."""
    sha = hashlib.sha256(f"tensor {tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.is_meta:
        raise ValueError(f"{where} is on the meta device and has no values: load the weights before")
    if hasattr(tensor, "__tensor_flatten__"):  # a class of its own, such as quantised weights, made of plain tensors
        names, rest = tensor.__tensor_flatten__()
        sha.update(repr(rest).encode())
        for name in names:
            sha.update(_tensor(getattr(tensor, name), f"{where}.{name}"))
    elif tensor.numel():
        plain = tensor.detach().cpu().resolve_conj().resolve_neg()
        plain = plain.to_dense() if plain.layout != torch.strided else plain
        sha.update(plain.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.digest()


def _loaded(module: nn.Module) -> Any:
    """A context in which weights that accelerate offloaded from this module are on the CPU."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not any(p is not None and p.is_meta for p in module._parameters.values()):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module, "cpu")


def _held(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _package(thing: Any) -> str:
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


def _name(thing: Any) -> str:
    module, name = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", None)
    return f"{module}.{name or getattr(thing, '__name__', type(thing).__qualname__)}"
