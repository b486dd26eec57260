"""Digests: whatever changes answers changes them, and nothing else does."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor
from integrations import tiny_pipelines as tiny
from torch import nn

import workbench as wb
from workbench.problems.fingerprint import digest_of_modules, digest_of_values
from workbench.problems.pipelines import digest_of, from_pipelines
from workbench.problems.skipping import skippable, skipping
from workbench.quality import Quality


def of(module: Any) -> str:
    return digest_of_modules([(module, {})])


class Kept(nn.Module):
    """A weight, a buffer that is saved and one that is not, and a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3000, dtype=torch.bfloat16))
        self.register_buffer("saved", torch.zeros(5, dtype=torch.int64))
        self.register_buffer("computed", torch.zeros(5), persistent=False)
        self.scale = {"a": 1.0}


@pytest.mark.parametrize("name", ["weight", "saved", "computed"])
@pytest.mark.parametrize("place", [0, -1])
def test_one_number_deep_inside_a_tensor(name: str, place: int) -> None:
    one, other = Kept(), Kept()
    assert of(one) == of(other)
    getattr(other, name).data[place] = 1
    assert of(one) != of(other)


def test_the_head_of_a_tensor_is_not_enough() -> None:
    """The broken twin: a digest of the first 1024 numbers, to which these two are one."""
    one, other = Kept(), Kept()
    other.weight.data[2000] = 1
    heads = [digest_of_values([p[:1024] for p in m.parameters()]) for m in (one, other)]
    assert heads[0] == heads[1] and of(one) != of(other)


def test_shapes_types_names_and_classes() -> None:
    zeros = torch.zeros(4)
    values = [zeros, zeros.reshape(2, 2), zeros.double(), zeros.int(), torch.zeros(5), torch.zeros(0), -zeros]
    assert len({digest_of_values(v) for v in values}) == len(values)
    assert digest_of_values(torch.arange(6.0).reshape(2, 3).T) == digest_of_values(
        torch.arange(6.0).reshape(2, 3).T.contiguous())
    assert digest_of_values(1) != digest_of_values(1.0) != digest_of_values("1.0")
    assert digest_of_values(["a", "b"]) != digest_of_values(["ab"]) != digest_of_values([["ab"]])
    one = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    other = nn.Sequential(one[0], nn.GELU())
    assert of(one) != of(other)


def _lora(unet: Any) -> Any:
    """What a library of adapters leaves on a layer."""
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.scaling, layer._active_adapter, layer._disable_adapters, layer.merged_adapters = {"a": 1.0}, ["a"], False, []
    return layer


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "LoRA scale": lambda unet: _lora(unet).scaling.update(a=0.5),
    "active adapter": lambda unet: setattr(_lora(unet), "_active_adapter", ["b"]),
    "adapters off": lambda unet: setattr(_lora(unet), "_disable_adapters", True),
    "FreeU": lambda unet: unet.enable_freeu(0.9, 0.2, 1.1, 1.2),
    "FreeU's strength": lambda unet: unet.enable_freeu(0.8, 0.2, 1.1, 1.2),
    "processor": lambda unet: unet.set_attn_processor(SimpleNamespace(scale=1.0)),
    "processor's scale": lambda unet: unet.set_attn_processor(SimpleNamespace(scale=0.5)),
    "hook": lambda unet: unet.conv_in.register_forward_hook(lambda module, args, out: out * 2),
    "method replaced": lambda unet: setattr(unet.conv_in, "forward", torch.zeros_like),
    "precision": lambda unet: unet.to(torch.bfloat16),
    "activation": lambda unet: setattr(unet, "conv_act", nn.ReLU()),
}


def test_what_is_set_on_a_module() -> None:
    digests = {"nothing": of(tiny.unet(0, 4)), "adapters": None}
    _lora(unet := tiny.unet(0, 4))
    digests["adapters"] = of(unet)
    for name, setting in SETTINGS.items():
        setting(unet := tiny.unet(0, 4))
        digests[name] = of(unet)
    assert len(set(digests.values())) == len(digests)


def test_what_changes_no_answer() -> None:
    unet = tiny.unet(0, 4)
    before = of(unet)
    unet.requires_grad_(False)
    unet.to(memory_format=torch.channels_last)
    assert of(unet) == before
    pipe = tiny.sd(0, 4)
    tiny.draw_sd(pipe, 2, 3.0)
    assert of(pipe.unet) == before
    cpu_offload(unet, "cpu")
    assert next(unet.parameters()).is_meta and of(unet) == before
    with torch.device("meta"), pytest.raises(ValueError, match=r"\.weight is on the meta device and has no values"):
        of(nn.Linear(2, 2))


FACTOR = 2.0


def test_functions_by_all_that_they_hold() -> None:
    def judge(threshold: float, weights: torch.Tensor) -> Callable[..., Any]:
        def graded(answer: torch.Tensor, labels: Any, slack: float = 0.5) -> Any:
            return {"passed": Quality(float((answer * weights).mean() * FACTOR > threshold + slack), 0.0, 1)}

        return graded

    ones = torch.ones(3)
    graded = judge(0.5, ones)
    digests = [digest_of_values(f) for f in (
        graded, judge(0.6, ones), judge(0.5, ones * 2), functools.partial(graded, slack=0.4), lambda a, b: {},
        lambda a, b: {"x": 1}, None, SimpleNamespace(grade=graded).grade.__call__)]
    assert digests[0] == digest_of_values(judge(0.5, torch.ones(3))) == digests[0]
    assert len(set(digests[:-1])) == len(digests) - 1
    globals()["FACTOR"] = 3.0
    try:
        assert digest_of_values(graded) != digests[0]
    finally:
        globals()["FACTOR"] = 2.0
    assert digest_of_values(Path("a")) != digest_of_values(Path("b")) != digest_of_values(date(2020, 1, 1))
    assert digest_of_values(threading.Lock()) == digest_of_values(threading.Lock())
    loop: list[Any] = []
    loop.append(loop)
    assert digest_of_values(loop) == digest_of_values(loop)


def test_digest_of_pipelines() -> None:
    one, same, other = tiny.dit(0, 8), tiny.dit(0, 8), tiny.dit(0, 8)
    with torch.no_grad():
        next(other.transformer.parameters()).flatten()[-1] += 1
    assert digest_of(one) == digest_of(same)
    assert len({digest_of(one), digest_of(other), digest_of(one, same), digest_of(tiny.dit(0, 16))}) == 4


def _judge(answer: torch.Tensor, labels: Any) -> dict[str, Quality]:
    return {"drift": Quality(float(answer.mean()), 0.0, 1)}


def _changed(pipe: Any, change: Callable[[Any], Any]) -> Any:
    change(pipe)
    return pipe


def _last(part: str) -> Callable[[Any], Any]:
    def change(pipe: Any) -> None:
        tensor = list(getattr(pipe, part).parameters())[-1]
        tensor.data.view(-1)[-1] += 1

    return change


# Every argument of from_pipelines, and everything that a pipeline brings; each must make another digest.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "conditions": {"conditions": ["lighthouse"]},
    "order of conditions": {"conditions": ["cow", "fox"]},
    "names": {"names": ["other"]},
    "judge": {"judge": _judge},
    "negative prompt": {"negative_prompt": "dog"},
    "guidance rescale": {"guidance_rescale": 0.5},
    "height": {"height": 32},
    "width": {"width": 32},
    "digest": {"digest": "of my own"},
}
PARTS: dict[str, Callable[[Any], Any]] = {
    **{part: _last(part) for part in ("unet", "vae", "text_encoder")},
    "prediction type": lambda pipe: setattr(pipe, "scheduler", DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction")),
    "betas": lambda pipe: setattr(pipe, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.013)),
    "levels written into": lambda pipe: pipe.scheduler.alphas_cumprod[-1:].mul_(0.5),
    "tokenizer": lambda pipe: pipe.tokenizer.add_tokens(["fox"]),
    "tokens read": lambda pipe: setattr(pipe.tokenizer, "model_max_length", 4),
    "VAE scale": lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5),
    "precision": lambda pipe: pipe.unet.to(torch.bfloat16),
    "FreeU": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.1, 1.2),
}


@pytest.mark.parametrize("digest", [None, "given"])
def test_every_input_of_a_problem_of_pipelines_is_in_its_digest(digest: str | None, text_pipeline: Any) -> None:
    def made(change: Callable[[Any], Any] = lambda pipe: None, **arguments: Any) -> str:
        given = {"conditions": ["fox", "cow"], "digest": digest, "names": ["m"], **arguments}
        return from_pipelines(_changed(text_pipeline(), change), **given).digest

    digests = {"nothing": made()}
    # a digest that is given vouches for weights, and for nothing else
    arguments, parts = (ARGUMENTS, PARTS) if digest is None else (
        {key: ARGUMENTS[key] for key in ("conditions", "negative prompt", "height")},
        {key: PARTS[key] for key in ("prediction type", "VAE scale", "precision", "FreeU")})
    digests |= {name: made(**given) for name, given in arguments.items()}
    digests |= {name: made(change) for name, change in parts.items()}
    assert len(set(digests.values())) == len(digests)
    if digest:
        return
    for nothing in ({}, {"guidance": 2.0, "max_rows": 1, "loaders": ["load()"], "source": "problem = 1"}):
        assert made(**nothing) == digests["nothing"]  # answers follow from none of these
    same = made(lambda pipe: setattr(pipe, "scheduler", EulerDiscreteScheduler.from_config(pipe.scheduler.config)))
    assert same == digests["nothing"]


def test_embedded_guidance_is_in_the_digest(text_pipeline: Any) -> None:
    def made(weight: float | None) -> str:
        pipe = text_pipeline()
        pipe.register_modules(unet=tiny.unet(0, 4, time_cond_proj_dim=4))
        return from_pipelines(pipe, conditions=["fox"], embedded_guidance=weight).digest

    assert made(None) == made(7.5) != made(8.0)


def _weights(part: str) -> Callable[[Any], Any]:
    def change(pipe: Any) -> None:
        with torch.no_grad():
            next(getattr(pipe, part).parameters()).mul_(1.01)

    return change


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "weights": _weights("unet"), "weights of the VAE": _weights("vae"), "mode": lambda pipe: pipe.unet.train(),
    "precision": PARTS["precision"], "FreeU": PARTS["FreeU"], "processors": lambda pipe: pipe.unet.set_attn_processor(
        AttnProcessor()), "a hook": lambda pipe: pipe.unet.mid_block.register_forward_hook(lambda *_: None),
    "a method": lambda pipe: setattr(pipe.unet.mid_block, "forward", pipe.unet.mid_block.forward),
}


@pytest.mark.parametrize("what", IN_PLACE)
def test_models_that_changed_in_place_are_refused(what: str, text_pipeline: Any) -> None:
    pipe, memo = text_pipeline(), wb.Memo()
    problem = from_pipelines(pipe, conditions=["fox"], height=32, width=32)
    knobs = {"seed": 1, "n_samples": 1, "n_steps": 2, "guidance": 1.0}
    shared = problem.wrapped(memo.wrap)
    before = wb.run("ddim", shared, **knobs)
    problem.images(before.answer)
    pipe("fox", num_inference_steps=2, output_type="pil", height=32, width=32)
    with skipping(pipe.unet, skippable(pipe.unet)[:1]):
        wb.run("ddim", problem, **knobs)  # all this changes nothing
    IN_PLACE[what](pipe)
    uses: dict[str, Callable[[], object]] = {
        "run": lambda: wb.run("ddim", shared, **knobs), "timed": lambda: wb.timed("ddim", problem, **knobs, repeats=1),
        "together": lambda: wb.together(problem, [before.inputs])}
    for use in uses.values():
        with pytest.raises(ValueError, match=r"(m1|the VAE) has changed since this problem was made"):
            use()
    unguarded = replace(shared, check=lambda: None)  # the broken twin tells the old model's answer
    assert torch.equal(wb.run("ddim", unguarded, **knobs).answer, before.answer)
