"""Skipping layers of a U-Net: the residual branches of chosen blocks are not computed, the weights stay as they are.

A residual or attention block computes shortcut(x) + branch(x). Skipped, it gives shortcut(x) alone: x itself where its
input and output shapes agree, else the block's own 1x1 projection. Source: arXiv 2309.10438, section 3.2.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from workbench.cost import flops_per_row
from workbench.problems.denoising import Denoiser, Denoising

_SKIPPED: ContextVar[frozenset[Module]] = ContextVar("_SKIPPED", default=frozenset())
_LOCK = threading.Lock()
_USERS: Counter[Module] = Counter()  # contexts, of all threads, that a block's forward is replaced for
_BEFORE: dict[Module, Any] = {}  # the instance attribute `forward` that a block had of its own, None for none


def skippable(unet: Module) -> tuple[str, ...]:
    """The names, as in unet.named_modules(), of the blocks of a diffusers U-Net that can be skipped.

    Residual blocks that do not change the resolution, self-attention blocks with a residual connection, and the
    transformers of a `UNet2DConditionModel`.
    """
    return tuple(name for name, module in unet.named_modules() if _shortcut(module) is not None)


@contextmanager
def skipping(unet: Module, names: Iterable[str]) -> Iterator[None]:
    """Within this context, and only in the thread (or task) that entered it, unet's blocks of these names are skipped.

    Nested contexts add up. Other threads may use the same U-Net at the same time, with other blocks skipped or none.
    On the way out everything is as it was. Raises ValueError for names that are not `skippable`.
    """
    with _without(_named(unet, names)):
        yield


@contextmanager
def _without(modules: frozenset[Module]) -> Iterator[None]:
    with _LOCK:
        for module in modules:
            if not _USERS[module]:
                _replace_forward(module)
            _USERS[module] += 1
    token = _SKIPPED.set(_SKIPPED.get() | modules)
    try:
        yield
    finally:
        _SKIPPED.reset(token)
        with _LOCK:
            for module in modules:
                _USERS[module] -= 1
                if not _USERS[module]:
                    del _USERS[module]
                    _restore_forward(module)


def with_skips(problem: Denoising, skips: Iterable[Sequence[str]]) -> Denoising:
    """The problem with one more model per set of names: its best model with these blocks skipped.

    Each variant has a name of its own and its FLOPs per row are measured, so that a meter counts what is computed.
    Models stay cheapest first among the variants: former models, variants, the best model last. Empty and repeated sets
    add nothing. Raises ValueError where the best model does not know its U-Net or names are not `skippable`.
    """
    best = problem.models[-1]
    sets = sorted({tuple(sorted(set(names))) for names in skips if names})
    if not sets:
        return problem
    labels = problem.labels(1)
    row = (torch.zeros((1, *problem.shape), dtype=problem.dtype, device=problem.device),
           torch.zeros(1, dtype=torch.int64, device=problem.device), labels)
    variants = [_variant(best, names) for names in sets]
    flops = {v.name: flops_per_row(v.network, *row) for v in variants}
    variants.sort(key=lambda v: (flops[v.name], v.name))
    digest = hashlib.sha256(json.dumps([problem.digest, sets]).encode()).hexdigest()[:16]
    return replace(problem, models=(*problem.models[:-1], *variants, best), flops={**problem.flops, **flops},
                   digest=digest, name=f"{problem.name}, {len(sets)} ways to skip layers", source="", code=None)


def variant_name(model: Denoiser, names: Iterable[str]) -> str:
    """The name in `with_skips` of a model with these blocks skipped, which are told by their places in `skippable`.

    The model's own name where no block is skipped.
    """
    skipped = set(names)
    places = [str(i) for i, name in enumerate(skippable(unet_of(model))) if name in skipped] if skipped else []
    return f"{model.name} without {' '.join(places)}" if places else model.name


def unet_of(model: Denoiser) -> Module:
    """The U-Net behind a model. Raises ValueError where there is none with blocks to skip."""
    if model.module is None or not skippable(model.module):
        raise ValueError(f"{model.name}: layers can be skipped in diffusers U-Nets only, this model is none")
    return model.module


def _variant(best: Denoiser, names: Sequence[str]) -> Denoiser:
    modules, full = _named(unet_of(best), names), best.network

    def network(*rows: Any) -> Tensor:
        with _without(modules):
            return full(*rows)

    return replace(best, name=variant_name(best, names), network=network)


def _named(unet: Module, names: Iterable[str]) -> frozenset[Module]:
    if isinstance(names, str):
        raise ValueError(f"names={names!r}: expected several names, not one text")
    allowed = {name: module for name, module in unet.named_modules() if _shortcut(module) is not None}
    wanted = list(names)
    wrong = [name for name in wanted if name not in allowed]
    if wrong:
        raise ValueError(f"blocks {wrong} cannot be skipped; allowed: {', '.join(allowed) or 'none'}")
    return frozenset(allowed[name] for name in wanted)


def _replace_forward(module: Module) -> None:
    """Let the block ask at each call whether this thread skips it; called with the lock held."""
    full, shortcut = module.forward, _shortcut(module)
    assert shortcut is not None

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module in _SKIPPED.get():
            return shortcut(x, *args, **kwargs)
        return full(x, *args, **kwargs)

    forward.is_passing = True  # type: ignore[attr-defined]  # it changes nothing but for whoever asks
    _BEFORE[module] = module.__dict__.get("forward")
    module.__dict__["forward"] = forward


def _restore_forward(module: Module) -> None:
    before = _BEFORE.pop(module)
    if before is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = before


def _shortcut(module: Module) -> Callable[..., Any] | None:
    """What is left of a block without its residual branch, or None where it is no such block."""
    kinds = {kind.__name__ for kind in type(module).__mro__}  # by name: diffusers loads in seconds, and may be unused
    block: Any = module
    if "ResnetBlock2D" in kinds and block.upsample is None and block.downsample is None:
        return lambda x, *_, **__: _scaled(x if block.conv_shortcut is None else block.conv_shortcut(x),
                                           block.output_scale_factor)
    if "Attention" in kinds and block.residual_connection:
        return lambda x, *_, **__: _scaled(x, block.rescale_output_factor)
    if "Transformer2DModel" in kinds and block.is_input_continuous:
        return _as_transformer
    return None


def _as_transformer(x: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
    if not return_dict:
        return (x,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=x)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x / factor
