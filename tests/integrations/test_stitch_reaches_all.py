"""What is done to a stitched pipeline reaches all its denoisers, or is refused: against the pipelines done one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    PNDMScheduler,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionPAGPipeline,
    T2IAdapter,
)
from diffusers.loaders import lora_base, peft
from diffusers.models.attention_processor import AttnProcessor
from integrations import tiny_pipelines as tiny
from integrations.tiny_pipelines import BETAS, LATENTS

from workbench.integrations.diffusers import ModelCount, StitchedDenoiser, stitch

pytestmark = pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::numpy")


class Halved(AttnProcessor):
    """Half of what attention adds."""

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 0.5 * super().__call__(attn, *args, **kwargs)


def _set_on_unet(pipe: Any) -> None:
    pipe.unet.set_attn_processor(Halved())


def _set_by_name(pipe: Any) -> None:
    pipe.unet.set_attn_processor({name: Halved() for name in pipe.unet.attn_processors})


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "pipe.enable_freeu": lambda pipe: pipe.enable_freeu(s1=0.5, s2=0.2, b1=1.8, b2=1.9),
    "unet.enable_freeu": lambda pipe: pipe.unet.enable_freeu(0.5, 0.2, 1.8, 1.9),
    "one processor": _set_on_unet,
    "processors by name": _set_by_name,
    "an attribute": lambda pipe: setattr(pipe.unet, "time_embed_act", torch.sin),
}


def each_alone(pipe: Any, draw: Callable[[Any], torch.Tensor]) -> list[torch.Tensor]:
    """What the small and the large denoiser of a stitched pipeline draw."""
    drawn = []
    for fraction in (1.0, 0.0):
        pipe.stitch.fraction = fraction
        drawn.append(draw(pipe))
    return drawn


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
def test_reaches_every_denoiser(action: Callable[[Any], Any]) -> None:
    def draw(pipe: Any) -> torch.Tensor:
        return tiny.draw_sd(pipe, 3, 3.0)

    before = [draw(tiny.sd(1, 4)), draw(tiny.sd(2, 8))]
    alone = [tiny.sd(1, 4), tiny.sd(2, 8)]
    for pipe in alone:
        action(pipe)
    wanted = [draw(pipe) for pipe in alone]
    assert not any(torch.allclose(a, b) for a, b in zip(before, wanted, strict=True))
    pipe = stitch(tiny.sd(1, 4), tiny.sd(2, 8))
    action(pipe)
    for ours, theirs in zip(each_alone(pipe, draw), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_on_the_host_alone_it_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: methods read from the host's denoiser, as attributes are."""
    monkeypatch.setattr("workbench.integrations.diffusers._REACHES_ALL", ())
    pipe = stitch(tiny.sd(1, 4), tiny.sd(2, 8))
    ACTIONS["unet.enable_freeu"](pipe)
    small, large = each_alone(pipe, lambda p: tiny.draw_sd(p, 3, 3.0))
    assert torch.equal(small, tiny.draw_sd(tiny.sd(1, 4), 3, 3.0))
    assert not torch.equal(large, tiny.draw_sd(tiny.sd(2, 8), 3, 3.0))


def test_processors_that_fit_one_denoiser_alone_are_refused() -> None:
    deeper = tiny.sd(2, 8, unet=tiny.unet(2, 8, layers_per_block=2))
    pipe = stitch(tiny.sd(1, 4), deeper)
    before = [dict(model.attn_processors) for model in pipe.unet.models]
    with pytest.raises(ValueError, match="small denoiser has other layers"):
        pipe.unet.set_attn_processor({name: Halved() for name in pipe.unet.attn_processors})

    class Weighted(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="a processor with weights is made for one denoiser"):
        pipe.unet.set_attn_processor(Weighted())
    with pytest.raises(AttributeError, match="conv_in=Weighted: a module made for one denoiser"):
        pipe.unet.conv_in = Weighted()
    assert before == [dict(model.attn_processors) for model in pipe.unet.models]
    read = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(Halved())
    pipe.unet.set_attn_processor(read)  # as read, it is every model's own
    assert before == [dict(model.attn_processors) for model in pipe.unet.models]


# Adapters: the methods' way to each denoiser without the library of adapters, and with it where it is installed.


@pytest.mark.parametrize("method", ["disable_lora", "enable_lora", "fuse_lora", "delete_adapters", "set_adapters"])
def test_methods_of_adapters_are_called_on_every_denoiser(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    for module in (lora_base, peft):
        monkeypatch.setattr(module, "USE_PEFT_BACKEND", True)
    small, large = tiny.sd(1, 4), tiny.sd(2, 8)
    monkeypatch.setattr(type(small.unet), method, lambda self, *args, **kwargs: asked.append(self))
    for unet in (small.unet, large.unet):
        unet.peft_config = {"style": None}
    monkeypatch.setattr(lora_base, "BaseTunerLayer", torch.nn.Bilinear, raising=False)
    arguments = {"delete_adapters": ("style",), "set_adapters": ("style",)}.get(method, ())
    if method == "fuse_lora":
        monkeypatch.setitem(__import__("sys").modules, "peft", __import__("types").ModuleType("peft"))
        for name in ("peft.tuners", "peft.tuners.tuners_utils"):
            fake = __import__("types").ModuleType(name)
            fake.BaseTunerLayer = torch.nn.Bilinear  # type: ignore[attr-defined]
            monkeypatch.setitem(__import__("sys").modules, name, fake)
    pipe = stitch(small, large)
    getattr(pipe, method)(*arguments)
    assert asked == [small.unet, large.unet] and isinstance(pipe.unet, StitchedDenoiser)
    asked.clear()
    getattr(pipe.unet, method)(*arguments)
    assert asked == [small.unet, large.unet]
    if arguments:
        small.unet.peft_config = {}
        asked.clear()
        for who in (pipe, pipe.unet):
            with pytest.raises(ValueError, match=f"{method}: the small denoiser has no adapter 'style'"):
                getattr(who, method)(*arguments)
        assert not asked


def test_adapters_of_the_library_that_pipelines_use() -> None:
    library = pytest.importorskip("peft")

    def draw(pipe: Any) -> torch.Tensor:
        return tiny.draw_sd(pipe, 3, 3.0)

    def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> list[bool]:
        return [torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(ours, theirs, strict=True)]

    pipes = [tiny.sd(1, 4), tiny.sd(2, 8)]
    plain = [draw(pipe) for pipe in pipes]
    for pipe in pipes:
        for seed, name in enumerate("ab"):
            torch.manual_seed(seed)
            config = library.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
            pipe.unet.add_adapter(config, adapter_name=name)
    wanted = {}
    for name in "ab":
        for pipe in pipes:
            pipe.set_adapters(name)
        wanted[name] = [draw(pipe) for pipe in pipes]
    pipe = stitch(*pipes)
    for name in "ab":
        pipe.set_adapters(name)
        assert same(each_alone(pipe, draw), wanted[name]) == [True, True]
    assert same(wanted["a"], wanted["b"]) == [False, False]
    pipe.disable_lora()
    assert same(each_alone(pipe, draw), plain) == [True, True]
    pipe.enable_lora()
    pipe.fuse_lora(components=["unet"])
    assert same(each_alone(pipe, draw), wanted["b"]) == [True, True]
    pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    assert same(each_alone(pipe, draw), plain) == [True, True]


def test_weights_for_one_denoiser_are_refused() -> None:
    pipe = stitch(tiny.sd(1, 4), tiny.sd(2, 8))
    for ask in (lambda: pipe.load_lora_weights("a"), lambda: pipe.load_ip_adapter("a", "b", "c"),
                lambda: pipe.unet.load_attn_procs("a"), lambda: pipe.unet.add_adapter(None)):
        with pytest.raises(ValueError, match="made for one denoiser.*before stitch"):
            ask()


# Perturbed-attention guidance.


def _pag(seed: int, width: int, layers: str = "mid", **more: Any) -> Any:
    pipe = tiny.sd(seed, width, kind=lambda **parts: StableDiffusionPAGPipeline(**parts, pag_applied_layers=layers),
                   image_encoder=None, **more)
    return pipe


def test_perturbed_attention_guidance() -> None:
    def draw(pipe: Any) -> torch.Tensor:
        return tiny.draw_sd(pipe, 3, 3.0, pag_scale=5.0)

    wanted = [draw(_pag(1, 4)), draw(_pag(2, 8))]
    assert not torch.allclose(wanted[1], tiny.draw_sd(_pag(2, 8), 3, 3.0, pag_scale=0.0))
    small, large = _pag(1, 4), _pag(2, 8)
    before = [pipe.unet.attn_processors for pipe in (small, large)]
    pipe = stitch(small, large)
    for ours, theirs in zip(each_alone(pipe, draw), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert before == [pipe.unet.attn_processors for pipe in (small, large)]

    def fail(*args: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tiny.draw_sd(pipe, 3, 3.0, pag_scale=5.0, callback_on_step_end=fail)
    assert before == [pipe.unet.attn_processors for pipe in (small, large)]


def test_perturbed_layers_that_a_denoiser_has_not_are_refused() -> None:
    pipe = stitch(tiny.unet(1, 4), _pag(2, 8, "down_blocks.1.attentions.1", unet=tiny.unet(2, 8, layers_per_block=2)))
    before = [dict(model.attn_processors) for model in pipe.unet.models]
    with pytest.raises(ValueError, match="Cannot find PAG layer") as caught:
        tiny.draw_sd(pipe, 3, 3.0, pag_scale=5.0)
    assert "small denoiser" in str(caught.value.__notes__)
    assert before == [dict(model.attn_processors) for model in pipe.unet.models]


# IP-Adapters.


def _with_image(unet: Any) -> Any:
    """An IP-Adapter of random weights, loaded as diffusers loads one."""
    numbers = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers)

    layers = [name for name in unet.attn_processors if "attn2" in name]
    widths = {name: unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0] for name in layers}
    state = {"image_proj": {"proj.weight": normal(4 * tiny.WIDTH, 6), "proj.bias": normal(4 * tiny.WIDTH),
                            "norm.weight": torch.ones(tiny.WIDTH), "norm.bias": torch.zeros(tiny.WIDTH)},
             "ip_adapter": {f"{2 * k + 1}.to_{c}_ip.weight": normal(widths[name], tiny.WIDTH)
                            for k, name in enumerate(layers) for c in "kv"}}
    unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    return unet


IMAGE = {"ip_adapter_image_embeds": [torch.ones(2 * tiny.BATCH, 1, 6)]}


def test_ip_adapters_on_all_sides_or_none() -> None:
    def draw(pipe: Any) -> torch.Tensor:
        return tiny.draw_sd(pipe, 3, 3.0, **IMAGE)

    small, large = tiny.sd(1, 4), tiny.sd(2, 8)
    pipe = stitch(small, large)
    _with_image(large.unet)
    with pytest.raises(ValueError, match=r"pipelines\[0\]: IP-Adapters are \[\], the host's are \['ImageProjection'\]"):
        stitch(small, large)
    with pytest.raises(ValueError, match="the small denoiser: IP-Adapters are"):  # loaded since
        draw(pipe)
    _with_image(small.unet)
    pipe.set_ip_adapter_scale(0.3)
    scaled = each_alone(pipe, draw)
    for alone in (small, large):
        alone.set_ip_adapter_scale(0.3)
    wanted = [draw(small), draw(large)]
    for ours, theirs in zip(scaled, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    pipe.set_ip_adapter_scale(0.9)
    assert not any(torch.allclose(a, b) for a, b in zip(each_alone(pipe, draw), wanted, strict=True))
    pipe.unload_ip_adapter()
    for ours, seed, width in zip(each_alone(pipe, lambda p: tiny.draw_sd(p, 3, 3.0)), (1, 2), (4, 8), strict=True):
        torch.testing.assert_close(ours, tiny.draw_sd(tiny.sd(seed, width), 3, 3.0), rtol=0, atol=1e-6)


# Late starts, and loops that cannot be followed.


@pytest.mark.parametrize("skip_prk_steps", [True, False])
@pytest.mark.parametrize("fraction", [0.1, 0.4])
@pytest.mark.parametrize("strength", [0.9, 0.8, 0.3])
def test_pndm_started_late_switches_at_the_boundarys_noise_level(strength: float, fraction: float,
                                                                   skip_prk_steps: bool) -> None:
    """Every evaluation at a level of the small model's solver steps is the small model's, and no other."""
    small = tiny.sd_img2img(1, 4)
    large = tiny.sd_img2img(2, 8, PNDMScheduler(**BETAS, skip_prk_steps=skip_prk_steps))
    seen: list[tuple[str, float]] = []
    for name, unet in (("small", small.unet), ("large", large.unet)):
        unet.register_forward_pre_hook(lambda module, args, name=name: seen.append((name, float(args[1]))))
    pipe = stitch(small.unet, large, fraction=fraction)
    tiny.draw_img2img(pipe, 10, 1.0, strength)
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True)
    scheduler.set_timesteps(10)
    starts = sorted(set(scheduler.timesteps.tolist()), reverse=True)  # of the ten solver steps
    first_of_large = starts[round(10 * fraction)]
    assert seen and [name for name, _ in seen] == ["small" if t > first_of_large else "large" for _, t in seen]


def test_pndm_at_ten_steps_and_strength_point_eight() -> None:
    pipe = stitch(tiny.sd_img2img(1, 4).unet, tiny.sd_img2img(2, 8, PNDMScheduler(**BETAS, skip_prk_steps=True)))
    tiny.draw_img2img(pipe, 10, 1.0, 0.8)
    assert pipe.stitch.report == {"small": ModelCount(3, 3, 3 * tiny.BATCH), "large": ModelCount(6, 6, 6 * tiny.BATCH)}


def test_a_loop_without_steps_is_refused() -> None:
    pipe = stitch(tiny.sd(1, 4), tiny.sd(2, 8, DDIMScheduler(**BETAS, clip_sample=False)))
    with pipe.stitch.follow(pipe.scheduler), torch.no_grad():
        pipe.scheduler.set_timesteps(4)
        first, second, *_ = pipe.scheduler.timesteps
        for _ in range(3):  # several evaluations of one step are
            pipe.unet(LATENTS, first, encoder_hidden_states=tiny.TEXT)
        with pytest.raises(RuntimeError, match=r"timestep=501 came after 751 and scheduler\.step was not called"):
            pipe.unet(LATENTS, second, encoder_hidden_states=tiny.TEXT)


# What is added to features.


def _t2i(seed: int, width: int) -> Any:
    adapter = T2IAdapter(channels=[width, width], num_res_blocks=1, downscale_factor=2)
    return tiny.sd(seed, width, kind=StableDiffusionAdapterPipeline, adapter=adapter)


def _sd3_control(seed: int, width: int) -> Any:
    host = tiny.sd3(seed, width)
    options = {key: host.transformer.config[key] for key in (
        "sample_size", "patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
        "caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size")}
    control = SD3ControlNetModel(num_layers=1, **options).eval()
    return StableDiffusion3ControlNetPipeline(**host.components, controlnet=control)


@pytest.mark.parametrize(("small", "host", "words"), [
    (lambda: tiny.sd(1, 4), _t2i, ["block_out_channels (with a T2I-Adapter)", "4", "8"]),
    (lambda: tiny.sd3(1, 4), _sd3_control, ["attention_head_dim (with a ControlNet)", "8", "16"]),
])
def test_features_of_another_width_are_refused(small: Any, host: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        stitch(small(), host(2, 8))
    assert all(word in str(refusal.value) for word in words), refusal.value
    equal = small().unet if host is _t2i else small().transformer
    stitch(equal, host(2, 4))
