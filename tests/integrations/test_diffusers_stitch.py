"""The stitched pipeline against sampling loops written by hand, on tiny pipelines with random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from integrations import tiny_pipelines as tiny
from integrations.tiny_pipelines import BATCH, BETAS, FAMILIES, LATENTS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from workbench.integrations import diffusers as drop_in
from workbench.integrations.diffusers import ModelCount, Stitch, stitch, unstitch

pytestmark = pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::numpy")  # of their own makers
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def pair(family: tiny.Family) -> tuple[Any, Any]:
    return family.build(1, 4), family.build(2, 8)


def two(small: Any, large: Any, n_small_entries: int, name: str = "unet") -> tiny.Owners:
    """The hand-written split: the first entries to the small denoiser, the others to the large one."""
    first, last = getattr(small, name), getattr(large, name)
    return lambda e: first if e < n_small_entries else last


def assert_same(drawn: torch.Tensor, by_hand: torch.Tensor) -> None:
    torch.testing.assert_close(drawn, by_hand, rtol=0, atol=1e-6)


# Against the loop by hand.


@every_family
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_equals_the_loop_by_hand(family: tiny.Family, guidance: float) -> None:
    small, large = pair(family)
    pipe = stitch(small, large, fraction=0.4)
    drawn = family.draw(pipe, 5, guidance)
    assert_same(drawn, family.loop(large, two(small, large, 2, family.denoiser), 5, guidance))
    calls, rows = (family.calls, family.rows) if guidance > 1 else (1, BATCH)
    assert pipe.stitch.report == {
        "small": ModelCount(2, 2 * calls, 2 * rows),
        "large": ModelCount(3, 3 * calls, 3 * rows),
    }


@every_family
def test_the_ends_and_self_stitching_are_bitwise_the_pure_pipelines(family: tiny.Family) -> None:
    small, large = pair(family)
    pure = family.draw(small, 4, 3.0), family.draw(large, 4, 3.0)
    assert not torch.equal(*pure)
    pipe = stitch(small, large, fraction=1.0)
    assert torch.equal(family.draw(pipe, 4, 3.0), pure[0])
    assert pipe.stitch.report["large"] == ModelCount()
    pipe.stitch.fraction = 0.0
    assert torch.equal(family.draw(pipe, 4, 3.0), pure[1])
    assert pipe.stitch.report["small"] == ModelCount()
    same = stitch(large, large)
    for fraction in (0, 0.25, 0.6, 1):
        same.stitch.fraction = fraction
        assert torch.equal(family.draw(same, 4, 3.0), pure[1])
    for original, before in zip((small, large), pure, strict=True):
        assert torch.equal(family.draw(original, 4, 3.0), before)
        assert not {"step", "set_timesteps"} & set(vars(original.scheduler))


# With 5 steps and fraction 0.5 the small model has floor(2.5) = 2 steps; the entries that these are, by hand.
SOLVERS: dict[str, tuple[Any, int, int]] = {
    "ddpm": (lambda: DDPMScheduler(**BETAS, clip_sample=False), 2, 5),
    "euler": (lambda: EulerDiscreteScheduler(**BETAS), 2, 5),
    "dpm++": (lambda: DPMSolverMultistepScheduler(**BETAS), 2, 5),
    "dpm++-karras": (lambda: DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True), 2, 5),
    "unipc": (lambda: UniPCMultistepScheduler(**BETAS), 2, 5),
    "heun": (lambda: HeunDiscreteScheduler(**BETAS), 4, 9),  # two evaluations per step, one in the last
    "kdpm2": (lambda: KDPM2DiscreteScheduler(**BETAS), 4, 9),
    "pndm": (lambda: PNDMScheduler(**BETAS, skip_prk_steps=True), 3, 6),  # two evaluations in the first step
    "pndm-rk": (lambda: PNDMScheduler(**BETAS), 8, 14),  # four in each of the first three
}


@pytest.mark.parametrize(("scheduler", "n_small", "n_all"), SOLVERS.values(), ids=SOLVERS.keys())
def test_the_switch_is_counted_in_solver_steps(scheduler: Any, n_small: int, n_all: int) -> None:
    small, large = tiny.sd(1, 4), tiny.sd(2, 8, scheduler())
    pipe = stitch(small.unet, large, fraction=0.5)
    drawn = tiny.draw_sd(pipe, 5, 4.0)
    assert_same(drawn, tiny.loop_sd(large, two(small, large, n_small), 5, 4.0))
    assert pipe.stitch.report == {
        "small": ModelCount(2, n_small, n_small * 2 * BATCH),
        "large": ModelCount(3, n_all - n_small, (n_all - n_small) * 2 * BATCH),
    }


@pytest.mark.parametrize("strength", [0.6, 0.3])
@pytest.mark.parametrize(
    ("scheduler", "order"),
    [
        (DDIMScheduler, 1),  # keeps no index
        (EulerDiscreteScheduler, 1),
        (DPMSolverMultistepScheduler, 1),
        (HeunDiscreteScheduler, 2),
    ],
)
def test_image_to_image_switches_at_the_same_noise_level(scheduler: Any, order: int, strength: float) -> None:
    small, large = tiny.sd_img2img(1, 4), tiny.sd_img2img(2, 8, scheduler(**BETAS))
    pipe = stitch(small.unet, large, fraction=0.5)
    drawn = tiny.draw_img2img(pipe, 10, 4.0, strength)
    first = {0.6: 4, 0.3: 7}[strength]  # of ten steps
    by_hand = tiny.loop_sd(large, two(small, large, 5 * order), 10, 4.0, begin=first * order)
    assert_same(drawn, by_hand)
    assert [count.steps for count in pipe.stitch.report.values()] == [max(5 - first, 0), 10 - max(first, 5)]


def test_image_to_image_with_pndm() -> None:
    """From the third entry of its schedule on, entry e stands at the noise level of step e - 1."""
    small, large = tiny.sd_img2img(1, 4), tiny.sd_img2img(2, 8, PNDMScheduler(**BETAS, skip_prk_steps=True))
    pipe = stitch(small.unet, large, fraction=0.5)
    drawn = tiny.draw_img2img(pipe, 10, 4.0)
    assert_same(drawn, tiny.loop_sd(large, two(small, large, 6), 10, 4.0, begin=4))
    assert [count.steps for count in pipe.stitch.report.values()] == [2, 5]


def test_sdxl_stopped_early_keeps_its_place_in_the_full_schedule() -> None:
    small, large = pair(FAMILIES["sdxl"])
    pipe = stitch(small, large, fraction=0.5)
    tiny.draw_sdxl(pipe, 10, 4.0, denoising_end=0.7)
    assert [count.steps for count in pipe.stitch.report.values()] == [5, 2]


def test_three_models() -> None:
    pipes = [tiny.sd(seed, 4) for seed in (1, 2, 3)]
    pipe = stitch(*pipes, fractions=(0.3, 0.3, 0.4))
    drawn = tiny.draw_sd(pipe, 10, 4.0)
    owners = [pipes[k].unet for k in (0, 0, 0, 1, 1, 1, 2, 2, 2, 2)]
    assert_same(drawn, tiny.loop_sd(pipes[-1], owners.__getitem__, 10, 4.0))
    assert [(n, c.steps) for n, c in pipe.stitch.report.items()] == [("model_1", 3), ("model_2", 3), ("model_3", 4)]
    pipe.stitch.fractions = (0, 0.55, 0.45)
    tiny.draw_sd(pipe, 10, 4.0)
    assert [c.steps for c in pipe.stitch.report.values()] == [0, 5, 5]
    with pytest.raises(ValueError, match="here are 3"):
        _ = pipe.stitch.fraction


def test_skipped_layers_of_sd3_stay_in_their_step() -> None:
    small, large = pair(FAMILIES["sd3"])
    pipe = stitch(small, large, fraction=0.5)
    skip = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    tiny.draw_sd3(pipe, 4, 3.0, **skip)
    # from the second step on, a call of BATCH rows beside the guided one
    assert pipe.stitch.report == {"small": ModelCount(2, 3, 5 * BATCH), "large": ModelCount(2, 4, 6 * BATCH)}


def test_a_loop_of_ones_own() -> None:
    small, large = pair(FAMILIES["sd"])
    pipe = stitch(small, large, fraction=0.4)
    with pipe.stitch.follow(pipe.scheduler):
        drawn = tiny.loop_sd(pipe, lambda e: pipe.unet, 5, 4.0)
    assert_same(drawn, tiny.loop_sd(large, two(small, large, 2), 5, 4.0))


# The oracle fails on broken twins.


def _one_late(counts: tuple[int, ...]) -> tuple[int, ...]:
    return counts[0] + 1, counts[1] - 1


@pytest.mark.parametrize("name", ["dit", "sd", "flux"])
@pytest.mark.parametrize("fault", ["one step late", "large first", "inside guidance", "evaluations for steps"])
def test_the_loop_by_hand_catches(fault: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, right = FAMILIES[name], drop_in.split_steps
    if fault == "one step late":
        monkeypatch.setattr(drop_in, "split_steps", lambda f, n: _one_late(right(f, n)))
    elif fault == "large first":
        choose = Stitch._choose
        monkeypatch.setattr(Stitch, "_choose", lambda self, t, rows: 1 - choose(self, t, rows))
    elif fault == "inside guidance":  # the unconditional rows or calls from the other model
        _switch_inside_guidance(name, monkeypatch)
    elif name == "flux":  # counts calls, of which true guidance makes two per step
        calls = iter(range(99))
        monkeypatch.setattr(Stitch, "_choose", lambda self, t, rows: int(next(calls) >= 3))
    else:  # splits the entries of the schedule: wrong with a solver of two evaluations
        monkeypatch.setattr(drop_in, "_solver_steps", lambda scheduler, n: list(range(n)))
    small, large = pair(family)
    owners = two(small, large, 3, family.denoiser)
    if fault == "evaluations for steps" and name != "flux":
        large.scheduler = HeunDiscreteScheduler(**BETAS)
        owners = two(small, large, 6, family.denoiser)
    drawn = family.draw(stitch(getattr(small, family.denoiser), large, fraction=0.6), 5, 4.0)
    with pytest.raises(AssertionError):
        assert_same(drawn, family.loop(large, owners, 5, 4.0))


def _switch_inside_guidance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(self: Any, *args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs["hidden_states"]
        owner = self.stitch._choose(kwargs.get("timestep", args[1] if len(args) > 1 else None), len(sample))
        if name == "flux":
            self.n_calls = getattr(self, "n_calls", 0) + 1
            return self.models[owner if self.n_calls % 2 else 1 - owner](*args, **kwargs)
        ours, other = (self.models[k](*args, **kwargs) for k in (owner, 1 - owner))
        key = "sample" if hasattr(ours, "sample") else 0
        ours[key][:BATCH] = other[key][:BATCH]
        return ours

    monkeypatch.setattr(drop_in.StitchedDenoiser, "forward", mixed)


# A pipeline like any other.


def test_is_a_pipeline_of_the_hosts_class_with_its_parts() -> None:
    small, large = pair(FAMILIES["sd"])
    pipe = stitch(small, large)
    assert isinstance(pipe, StableDiffusionPipeline) and type(pipe).__name__ == "StableDiffusionPipeline"
    assert pipe.vae is large.vae and pipe.scheduler is large.scheduler
    assert dict(pipe.config) == dict(large.config)
    assert pipe.unet.config is large.unet.config
    assert (pipe.unet.dtype, pipe.unet.device, pipe.dtype) == (torch.float32, large.unet.device, torch.float32)
    assert pipe.unet.attn_processors.keys() == large.unet.attn_processors.keys()
    assert sum(p.numel() for p in pipe.unet.parameters()) == sum(
        p.numel() for u in (small.unet, large.unet) for p in u.parameters()
    )
    assert pipe.components.keys() == large.components.keys()
    assert unstitch(pipe) is large


def test_reaiming_and_report() -> None:
    pipe = stitch(*pair(FAMILIES["sd"]))
    assert pipe.stitch.report == {"small": ModelCount(), "large": ModelCount()}
    assert pipe.stitch.fraction == 0.4 and pipe.stitch.fractions == (0.4, 0.6)
    for fraction, n_small in ((0.6, 3), (0.59, 2), (3 * 0.2, 3)):
        pipe.stitch.fraction = fraction
        tiny.draw_sd(pipe, 5, 1.0)
        assert [count.steps for count in pipe.stitch.report.values()] == [n_small, 5 - n_small]
    pipe.stitch.fractions = (0.2, 0.8)
    assert pipe.stitch.fraction == 0.2


def test_a_scheduler_replaced_after_stitching() -> None:
    small, large = pair(FAMILIES["sd"])
    pipe, before = stitch(small, large, fraction=0.5), large.scheduler
    pipe.scheduler = HeunDiscreteScheduler(**BETAS)
    drawn = tiny.draw_sd(pipe, 5, 4.0)
    assert large.scheduler is before
    by_hand = tiny.sd(2, 8, HeunDiscreteScheduler(**BETAS))
    assert_same(drawn, tiny.loop_sd(by_hand, two(small, large, 4), 5, 4.0))


def test_pipelines_that_share_a_scheduler() -> None:
    small, large = pair(FAMILIES["sd"])
    one, other = stitch(small, large, fraction=0.4), stitch(small, large, fraction=0.8)
    plain, wanted = tiny.draw_sd(large, 5, 4.0), [tiny.draw_sd(p, 5, 4.0) for p in (one, other)]
    inner: dict[str, Any] = {}

    def nested(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 4:  # after the last step the outer pipeline needs the scheduler no more
            inner["drawn"], inner["report"] = tiny.draw_sd(other, 5, 4.0), other.stitch.report
        return {}

    drawn = tiny.draw_sd(one, 5, 4.0, callback_on_step_end=nested)
    assert torch.equal(drawn, wanted[0]) and torch.equal(inner["drawn"], wanted[1])
    assert [c.steps for c in one.stitch.report.values()] == [2, 3]
    assert [c.steps for c in inner["report"].values()] == [4, 1]
    assert torch.equal(tiny.draw_sd(large, 5, 4.0), plain)
    assert not {"step", "set_timesteps"} & set(vars(large.scheduler))


def test_callbacks_and_failures_leave_nothing_behind() -> None:
    small, large = pair(FAMILIES["sd"])
    pipe = stitch(small, large, fraction=0.4)
    seen = []

    def stop(running: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((running is pipe, index, tensors["latents"].shape))
        running._interrupt = index == 2
        return {}

    tiny.draw_sd(pipe, 5, 4.0, callback_on_step_end=stop)
    assert seen == [(True, i, LATENTS.shape) for i in range(3)]
    assert [count.steps for count in pipe.stitch.report.values()] == [2, 1]

    def fail(*args: Any) -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tiny.draw_sd(pipe, 5, 4.0, callback_on_step_end=fail)
    assert not {"step", "set_timesteps"} & set(vars(large.scheduler))
    assert_same(tiny.draw_sd(pipe, 5, 4.0), tiny.loop_sd(large, two(small, large, 2), 5, 4.0))


def test_saving_saves_the_hosts_pipeline(tmp_path: Path) -> None:
    small, large = pair(FAMILIES["glyphs"])
    pipe = stitch(small, large)
    pipe.scheduler = EulerDiscreteScheduler()
    pipe.save_pretrained(tmp_path)
    loaded = type(large).from_pretrained(tmp_path)
    assert type(loaded) is type(large) and type(loaded.scheduler) is EulerDiscreteScheduler
    assert all(torch.equal(a, b) for a, b in zip(loaded.unet.parameters(), large.unet.parameters(), strict=True))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"] and index["_class_name"] == "GlyphPipeline"


@pytest.mark.parametrize("how", ["before", "module.compile", "torch.compile"])
def test_compiled_denoisers(how: str) -> None:
    family = FAMILIES["dit"]
    small, large = pair(family)
    wanted = family.loop(large, two(small, large, 2, "transformer"), 5, 4.0)
    if how == "before":
        for pipe in (small, large):
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe = stitch(small, large, fraction=0.4)
    if how == "module.compile":
        pipe.transformer.compile(backend="eager")
    elif how == "torch.compile":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert_same(family.draw(pipe, 5, 4.0), wanted)
    assert [count.calls for count in pipe.stitch.report.values()] == [2, 3]
    torch._dynamo.reset()


def test_half_precision() -> None:
    small, large = pair(FAMILIES["sd"])
    pipe = stitch(small, large, fraction=0.4).to(dtype=torch.bfloat16)
    assert {small.unet.dtype, large.unet.dtype, pipe.unet.dtype, pipe.vae.dtype} == {torch.bfloat16}
    texts = {"prompt_embeds": tiny.TEXT.bfloat16(), "negative_prompt_embeds": tiny.NO_TEXT.bfloat16()}
    options = {"latents": LATENTS.bfloat16(), "num_inference_steps": 5, "output_type": "latent"}
    drawn = pipe(**texts, **options).images
    assert drawn.dtype == torch.bfloat16 and drawn.isfinite().all()
    assert [count.steps for count in pipe.stitch.report.values()] == [2, 3]
    pipe.stitch.fraction = 1.0
    assert torch.equal(pipe(**texts, **options).images, small(**texts, **options).images)


def test_caches_of_the_denoisers_are_told_the_branch() -> None:
    """With a threshold of zero the first-block cache computes everything anew; without a context it would raise."""
    small, large = pair(FAMILIES["flux"])
    wanted = tiny.draw_flux(stitch(small, large), 5, 4.0)
    for pipe in (small, large):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert_same(tiny.draw_flux(stitch(small, large), 5, 4.0), wanted)


class _Readings(TorchDispatchMode):
    """Counts the numbers read from tensors, each of which a device would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["dit", "sd", "flux"])
def test_reads_no_tensor_in_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    _, large = pair(family)
    lists: list[None] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: lists.append(None) or tolist(t))

    def readings(pipe: Any, steps: int) -> int:
        lists.clear()
        with _Readings() as count:
            family.draw(pipe, steps, 4.0)
        return count.n + len(lists)

    pipe = stitch(large, large)
    extra = [readings(pipe, steps) - readings(large, steps) for steps in (2, 5)]
    assert extra[0] == extra[1] <= 3  # the schedule and the timesteps of the first step, once per call


# Offloading.


def text_parts(folder: Path) -> dict[str, Any]:
    """A text encoder and a tokenizer that knows three letters."""
    tokens = ("<|startoftext|>", "<|endoftext|>", "f", "o", "x</w>")
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=5, hidden_size=tiny.WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    return {"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer}


def draw_fox(pipe: Any) -> torch.Tensor:
    return pipe("fox", num_inference_steps=5, generator=torch.manual_seed(3), output_type="pt").images


@pytest.mark.parametrize(("fraction", "order"), [(0.4, ["small", "large"]), (0.0, ["large"]), (1.0, ["small"])])
def test_model_offload_loads_one_denoiser_at_a_time(fraction: float, order: list[str], tmp_path: Path) -> None:
    """accelerate's own hooks, on modules that only pretend to move: an accelerator is not needed."""
    small, large = tiny.sd(1, 4), tiny.sd(2, 8, **text_parts(tmp_path))
    pipe = stitch(small.unet, large, fraction=fraction)
    wanted = draw_fox(pipe)
    loaded: set[str] = set()
    together: list[set[str]] = []

    def pretend(name: str, module: Any) -> None:
        parameters = list(module.parameters())

        def to(self: Any, device: Any = None, *args: Any, **kwargs: Any) -> Any:
            if torch.device(device).index is None:
                loaded.discard(name)
            else:
                loaded.add(name)
                if not together or together[-1] != loaded:
                    together.append(set(loaded))
            return self

        def where(self: Any, recurse: bool = True) -> Any:
            device = torch.device("cuda:0" if name in loaded else "cpu")
            place = SimpleNamespace(device=device, dtype=torch.float32, is_floating_point=lambda: True)
            return iter([place, *parameters[1:]])

        # On the class: accelerate cleans these names from the instance.
        module.__class__ = type(type(module).__name__, (type(module),), {"to": to, "parameters": where})

    modules = {"text": large.text_encoder, "small": small.unet, "large": large.unet, "vae": large.vae}
    for name, module in modules.items():
        pretend(name, module)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        together.clear()
        assert torch.equal(draw_fox(pipe), wanted)
        assert together == [{name} for name in ("text", *order, "vae")]
        assert not loaded
    assert unstitch(pipe) is large
    assert not any(hasattr(module, "_hf_hook") for module in modules.values())


def test_sequential_offload_reaches_every_denoiser() -> None:
    small, large = pair(FAMILIES["sd"])
    pipe = stitch(small, large)
    wanted = tiny.draw_sd(pipe, 5, 4.0)
    pipe.enable_sequential_cpu_offload(device="cpu")
    for unet in (small.unet, large.unet):
        assert {p.device.type for p in unet.parameters()} == {"meta"}
        assert all(hasattr(m, "_hf_hook") for m in unet.modules() if m._parameters)
    unstitch(pipe)
    assert {p.device.type for u in (small.unet, large.unet) for p in u.parameters()} == {"cpu"}
    assert torch.equal(tiny.draw_sd(pipe, 5, 4.0), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to offload from")
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "to"])
def test_on_an_accelerator(how: str, tmp_path: Path) -> None:
    small, large = tiny.sd(1, 4), tiny.sd(2, 8, **text_parts(tmp_path))
    pipe = stitch(small.unet, large)
    wanted = draw_fox(pipe)
    getattr(pipe, how)(**({"device": "cuda"} if how != "to" else {"torch_device": "cuda"}))
    torch.testing.assert_close(draw_fox(pipe).cpu(), wanted, rtol=0, atol=1e-3)


# Refusals.


def _sd_with(**changes: Any) -> Any:
    return lambda: tiny.sd(1, 4, unet=tiny.unet(1, 4, **changes))


def _scheduled(**changes: Any) -> Any:
    return lambda: tiny.sd(1, 4, DDIMScheduler(**(BETAS | {"clip_sample": False} | changes)))


def _flux_without_guidance() -> Any:
    pipe = tiny.flux(1, 4)
    pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config, guidance_embeds=False)
    return pipe


def _with(build: Any, name: str, **changes: Any) -> Any:
    """A pipeline of which one module's config is changed."""

    def changed() -> Any:
        pipe = build(1, 4)
        module = getattr(pipe, name)
        setattr(pipe, name, type(module).from_config(module.config, **changes))
        return pipe

    return changed


REFUSED: dict[str, tuple[Any, Any, list[str]]] = {
    "latent channels": (_sd_with(in_channels=5), tiny.sd, ["in_channels", "5", "4"]),
    "learned sigma": (_sd_with(out_channels=8), tiny.sd, ["out_channels", "8", "4"]),
    "text width": (_sd_with(cross_attention_dim=6), tiny.sd, ["cross_attention_dim", "6", "8"]),
    "classes": (_with(tiny.glyphs, "unet", num_class_embeds=7), tiny.glyphs, ["num_class_embeds", "7", "5"]),
    "guidance embedding of a U-Net": (_sd_with(time_cond_proj_dim=4), tiny.sd, ["time_cond_proj_dim", "4", "None"]),
    "guidance embedding of Flux": (_flux_without_guidance, tiny.flux, ["guidance_embeds", "None", "True"]),
    "text width of Flux": (
        _with(tiny.flux, "transformer", joint_attention_dim=6), tiny.flux, ["joint_attention_dim", "6", "8"],
    ),
    "pooled width of SD3": (
        _with(tiny.sd3, "transformer", pooled_projection_dim=6), tiny.sd3, ["pooled_projection_dim", "6", "8"],
    ),
    "caption width": (_with(tiny.pixart, "transformer", caption_channels=6), tiny.pixart, ["caption", "6", "8"]),
    "latent size": (_with(tiny.dit, "transformer", sample_size=16), tiny.dit, ["sample_size", "16", "8"]),
    "added embedding": (
        _with(tiny.sdxl, "unet", projection_class_embeddings_input_dim=26), tiny.sdxl,
        ["projection_class_embeddings_input_dim", "26", "20"],
    ),
    "ControlNet's layout": (
        lambda: tiny.sdxl(1, 4), tiny.sdxl_controlnet, ["block_out_channels", "4", "8", "ControlNet"],
    ),
    "VAE scale": (
        lambda: tiny.sd(1, 4, vae=tiny.vae(scaling_factor=0.13)), tiny.sd, ["scaling_factor", "0.13", "0.18215"],
    ),
    "VAE shift": (
        lambda: tiny.sd(1, 4, vae=tiny.vae(shift_factor=0.1)), tiny.sd, ["shift_factor", "0.1", "None"],
    ),
    "VAE stride": (
        lambda: tiny.sd(1, 4, vae=tiny.vae(
            block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        )), tiny.sd, ["vae_scale_factor", "1", "2"],
    ),
    "training steps": (_scheduled(num_train_timesteps=500), tiny.sd, ["num_train_timesteps", "500", "1000"]),
    "first beta": (_scheduled(beta_start=0.001), tiny.sd, ["beta_start", "0.001", "0.00085"]),
    "last beta": (_scheduled(beta_end=0.02), tiny.sd, ["beta_end", "0.02", "0.012"]),
    "shape of the betas": (_scheduled(beta_schedule="linear"), tiny.sd, ["linear", "scaled_linear"]),
    "prediction type": (_scheduled(prediction_type="v_prediction"), tiny.sd, ["v_prediction", "epsilon"]),
    "flow shift": (
        lambda: type(pipe := tiny.sd3(1, 4))(**(pipe.components | {"scheduler": FlowMatchEulerDiscreteScheduler()})),
        tiny.sd3, ["shift", "1.0", "3.0"],
    ),
    "denoiser class": (lambda: tiny.dit(1, 4), tiny.pixart, ["DiTTransformer2DModel", "PixArtTransformer2DModel"]),
    "pipeline family": (lambda: tiny.sd(1, 4), tiny.sdxl, ["addition_embed_type", "None", "text_time"]),
    "precision": (lambda: tiny.sd(1, 4).to(torch.bfloat16), tiny.sd, ["bfloat16", "float32"]),
}  # fmt: skip


@pytest.mark.parametrize(("small", "host", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_with_both_values(small: Any, host: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        stitch(small(), host(2, 8))
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_does_not_refuse_what_only_looks_different() -> None:
    """Other schedulers on the same noise schedule, other sizes of a U-Net, inner widths, one text width per block."""
    small, large = tiny.sd(1, 4), tiny.sd(2, 8)
    for scheduler in large.scheduler.compatibles:
        if scheduler.__name__ != "DPMSolverSDEScheduler":  # needs torchsde
            small.scheduler = scheduler.from_config(large.scheduler.config)
            stitch(small, large)
    stitch(_sd_with(sample_size=16)(), tiny.sd(2, 8))
    stitch(_sd_with(cross_attention_dim=[8, 8])(), tiny.sd(2, 8))
    stitch(tiny.sd_img2img(1, 4), tiny.sd(2, 8))
    stitch(tiny.sdxl(1, 8), tiny.sdxl_controlnet(2, 8))
    stitch(_scheduled(beta_end=0.02)().unet, tiny.sd(2, 8))  # a bare denoiser vouches for its schedule


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"fraction": 1.2}, ValueError, r"fraction=1\.2: expected a number in"),
        ({"fraction": math.nan}, ValueError, "fraction=nan"),
        ({"fraction": "half"}, TypeError, "fraction='half'"),
        ({"fractions": (0.5, 0.4)}, ValueError, r"fractions=\(0\.5, 0\.4\).*sum to 1"),
        ({"fractions": (0.5, 0.3, 0.2)}, ValueError, "expected 2 numbers"),
        ({"fractions": 0.5}, TypeError, "fractions=0.5"),
        ({"fraction": 0.5, "fractions": (0.5, 0.5)}, ValueError, "one of the two"),
    ],
)
def test_bad_fractions(options: dict[str, Any], error: type, words: str) -> None:
    small, large = pair(FAMILIES["glyphs"])
    with pytest.raises(error, match=words):
        stitch(small, large, **options)
    pipe = stitch(small, large)
    if len(options) == 1:
        with pytest.raises(error, match=words):
            setattr(pipe.stitch, *next(iter(options.items())))


def test_bad_arguments() -> None:
    small, large = pair(FAMILIES["glyphs"])
    with pytest.raises(ValueError, match=r"at least two.*got 1"):
        stitch(large)
    with pytest.raises(ValueError, match="expected 3 numbers"):
        stitch(small, large, large)
    with pytest.raises(TypeError, match=r"pipelines\[-1\]=UNet2DModel"):
        stitch(small, large.unet)
    with pytest.raises(TypeError, match=r"pipelines\[0\]=int"):
        stitch(3, large)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="stitched already"):
        stitch(small, stitch(small, large))
    with pytest.raises(TypeError, match="expected a pipeline made by"):
        unstitch(large)


def test_what_cannot_be_followed() -> None:
    small, large = pair(FAMILIES["sd"])
    pipe = stitch(small, large)
    text = tiny.TEXT
    with pytest.raises(RuntimeError, match="outside its pipeline's call"):
        pipe.unet(LATENTS, 3, encoder_hidden_states=text)
    with pytest.raises(RuntimeError, match="stitch the pipeline that it was put into"):
        tiny.draw_img2img(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False), 5, 4.0)
    with pytest.raises(TypeError, match="SimpleNamespace"), pipe.stitch.follow(SimpleNamespace()):
        pass
    with pipe.stitch.follow(pipe.scheduler):
        pipe.scheduler.set_timesteps(3)
        with pytest.raises(ValueError, match=r"timestep=\[1, 9\].*per-sample"):
            pipe.unet(LATENTS, torch.tensor([1, 9]), encoder_hidden_states=text)
        with pytest.raises(ValueError, match="per-sample"):
            pipe.scheduler.step(LATENTS, torch.tensor([1, 9]), LATENTS)
        with pytest.raises(ValueError, match="timestep=7: expected one of"):
            pipe.unet(LATENTS, 7, encoder_hidden_states=text)
        with pytest.raises(ValueError, match="small denoiser is on cpu, its input on meta"):
            pipe.unet(LATENTS.to("meta"), pipe.scheduler.timesteps[0], encoder_hidden_states=text)
        for _ in range(3):
            pipe.scheduler.step(LATENTS, pipe.scheduler.timesteps[0], LATENTS)
        with pytest.raises(RuntimeError, match="past the schedule's 3 entries"):
            pipe.unet(LATENTS, pipe.scheduler.timesteps[0], encoder_hidden_states=text)
