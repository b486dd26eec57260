"""Problems made of diffusers pipelines: parity with the pipelines' own loops, and the scripts of "copy as code"."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from integrations import tiny_pipelines as tiny

import workbench as wb
from workbench.problems.driving import pack, unpack
from workbench.problems.pipelines import from_pipelines, memory
from workbench.quality import Quality
from workbench.rng import Rng


@pytest.mark.parametrize(("method", "scheduler", "options"), [
    ("ddim", DDIMScheduler, {"set_alpha_to_one": True, "clip_sample": False}),
    ("dpmpp_2m", DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
])
def test_text_pipeline_parity(text_pair: list[Any], method: str, scheduler: Any, options: dict[str, Any]) -> None:
    prompts = ["cat", "dog"]
    problem = from_pipelines(*text_pair, conditions=prompts)
    ours = wb.run(method, problem, seed=5, n_samples=2, n_steps=5, guidance=3.0)
    pipe = text_pair[-1]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", **options)
    noise = Rng(5, 2).normal(problem.shape, torch.float32)

    def theirs(texts: list[str]) -> torch.Tensor:
        return pipe(prompt=texts, latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="latent").images

    torch.testing.assert_close(ours.answer, theirs(prompts), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):  # the broken twin: prompts swapped
        torch.testing.assert_close(ours.answer, theirs(prompts[::-1]), rtol=1e-4, atol=1e-4)


def test_class_pipeline_parity() -> None:
    pipe = tiny.dit(0, 8)
    problem = from_pipelines(pipe, conditions=[1, 3])
    ours = wb.run("ddim", problem, seed=2, n_samples=2, n_steps=5, guidance=1.0)
    network = pipe.transformer
    schedule = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True,
                                         clip_sample=False)
    schedule.set_timesteps(5)
    x = Rng(2, 2).normal(problem.shape, torch.float32)
    with torch.no_grad():
        for t in schedule.timesteps:
            out = network(x, timestep=t.expand(2), class_labels=torch.tensor([1, 3])).sample[:, : x.shape[1]]
            x = schedule.step(out, t, x).prev_sample
    torch.testing.assert_close(ours.answer, x, rtol=1e-4, atol=1e-4)


def test_stitch_counts_and_pictures(text_pair: list[Any]) -> None:
    problem = from_pipelines(*text_pair, conditions=["cat", "dog", "cow"], names=["small", "large"])
    run = wb.run("t_stitch", problem, n_samples=4, n_steps=5, fractions=(0.5,), guidance=2.0)
    assert run.cost.evaluations == {"small": 2 * 4 * 2, "large": 3 * 4 * 2}
    pictures = problem.images(run.answer)
    assert pictures.dtype == torch.uint8 and pictures.shape == (4, 2 * tiny.SIDE, 2 * tiny.SIDE, 3)
    assert torch.equal(problem.labels(4), torch.tensor([0, 1, 2, 0]))


def test_bad_input_is_named() -> None:
    dit = tiny.dit(0, 8)
    with pytest.raises(ValueError, match="0 pipelines"):
        from_pipelines(conditions=[0])
    with pytest.raises(ValueError, match=r"conditions \[-1\].*0 to"):
        from_pipelines(dit, conditions=[-1, 2])
    smaller = tiny.dit(1, 8)
    smaller.transformer.register_to_config(sample_size=4)
    with pytest.raises(ValueError, match=r"different shapes.*\(4, 4, 4\).*\(4, 8, 8\)"):
        from_pipelines(smaller, dit, conditions=[0])
    dit.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler has no alphas_cumprod: expected"):
        from_pipelines(dit, conditions=[0])


@pytest.mark.parametrize("knobs", [
    {"fractions": (0.5,)}, {"fractions": (0.25, 0.5), "solver": "dpmpp_2m"}, {"fractions": (1.0,)},
    {"fractions": (0.5,), "boundary": "log_snr"}, {"fractions": (0.25,), "order": "costly_first"},
    {"spacing": "leading"},
])
def test_copied_code_draws_the_same_pictures(knobs: dict[str, Any], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.problems.glyphs import glyphs

    problem = glyphs(("s", "b", "l"), text="AB3")
    run = wb.run("t_stitch", problem, seed=4, n_samples=3, n_steps=4, **{**problem.preset, **knobs})
    scope: dict[str, Any] = {}
    script = problem.code(run.inputs)
    assert script is not None
    monkeypatch.chdir(tmp_path)
    exec(script, scope)
    assert (tmp_path / "pictures.png").is_file()
    theirs = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(24, 24)
                          for image in scope["images"]])
    ours = problem.images(run.answer)
    assert (theirs.int() - ours.int()).abs().max() <= 2
    exec(problem.code(replace(run.inputs, seed=5)), scope)  # the broken twin: another seed, other pictures
    assert scope["images"][0].tobytes() != ours[0].numpy().tobytes()


def test_no_code_where_no_scheduler_does_the_same() -> None:
    from workbench.problems.glyphs import glyphs

    problem = glyphs(("s", "l"))
    for knobs in ({"spacing": "log_snr"}, {"eta": 0.5}, {"solver": "dpmpp_2m", "reset_history": True}, {"n_steps": 30}):
        given = wb.inputs("t_stitch", problem, **knobs)
        assert problem.code(given) is None
        scope: dict[str, Any] = {}
        exec(problem.source, scope)
        assert wb.inputs("t_stitch", scope["problem"], **knobs).key == given.key


# The other families: SDXL, SD3 and Flux, and denoisers that take guidance as an input.

S = 2 * tiny.SIDE


def _number(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))


def reading(pipe: Any) -> Any:
    """The pipeline, its texts read by a stand-in of its encoders: numbers that follow from the letters."""

    def encode_prompt(prompt: Any = None, *args: Any, negative_prompt: Any = None, **kwargs: Any) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        against = list(negative_prompt) if isinstance(negative_prompt, list) else [negative_prompt or ""] * len(prompts)
        words, no_words = (torch.stack([torch.randn(tiny.TOKENS, tiny.WIDTH, generator=_number(t)) for t in texts])
                           for texts in (prompts, against))
        pooled, no_pooled = words.mean(1), no_words.mean(1)
        if isinstance(pipe, FluxPipeline):
            return words, pooled, torch.zeros(tiny.TOKENS, 3)
        return words, no_words, pooled, no_pooled

    pipe.encode_prompt = encode_prompt
    return pipe


def latents_of(pipe: Any, problem: Any, guidance: float, prompts: list[str], **more: Any) -> torch.Tensor:
    """The pipeline's own call on the noise of seed 5."""
    noise = Rng(5, len(prompts)).normal(problem.shape, torch.float32)
    options: dict[str, Any] = {"guidance_scale": guidance, "height": S, "width": S, **more}
    if isinstance(pipe, FluxPipeline):
        noise, options = pack(noise), {**options, "guidance_scale": 2.5, "true_cfg_scale": guidance}
    out = pipe(prompt=prompts, latents=noise, num_inference_steps=4, output_type="latent", **options).images
    return unpack(out, *problem.shape[1:]) if isinstance(pipe, FluxPipeline) else out


def _even(pipe: Any) -> Any:
    """With the workbench's DDIM in its scheduler's place; flows step by Euler's method as they are."""
    if not type(pipe.scheduler).__name__.startswith("Flow"):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing",
                                                   set_alpha_to_one=True, clip_sample=False)
    return pipe


def _shifting(seed: int, width: int) -> Any:
    pipe = tiny.flux(seed, width)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4)
    return pipe


FAMILIES = {"sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux, "flux, shifted by its size": _shifting}


@pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES.keys())
def test_parity_of_the_families(build: Any) -> None:
    pipe = reading(build(2, 8))
    is_flux = isinstance(pipe, FluxPipeline)
    prompts, against = ["cat", "dog"], {"negative_prompt": ["bad", "bad"]}
    problem = from_pipelines(pipe, conditions=prompts, height=S, width=S, negative_prompt="bad",
                             embedded_guidance=2.5 if is_flux else None)
    knobs = {"seed": 5, "n_samples": 2, "n_steps": 4, "spacing": problem.preset.get("spacing", "trailing")}
    for guidance in (1.0, 3.0):
        ours = wb.run("ddim", problem, guidance=guidance, **knobs).answer
        theirs = latents_of(_even(pipe), problem, guidance, prompts, **against)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        with pytest.raises(AssertionError):  # the broken twins: prompts swapped, another spacing
            torch.testing.assert_close(ours, latents_of(pipe, problem, guidance, prompts[::-1], **against))
    other = wb.run("ddim", problem, guidance=3.0, **{**knobs, "spacing": "leading"}).answer
    assert not torch.allclose(other, theirs, atol=1e-3)
    assert problem.images(ours).shape == (2, S, S, 3)
    one, two = reading(build(1, 4)), from_pipelines(reading(build(1, 4)), pipe, conditions=prompts, height=S, width=S)
    run = wb.run("t_stitch", two, n_samples=2, n_steps=4, fractions=(0.5,), **{**two.preset, "guidance": 1.0})
    assert run.cost.evaluations == {"m1": 4, "m2": 4} and one is not pipe


def test_decoded_pictures_are_the_pipelines_own() -> None:
    for build in (tiny.sd3, tiny.flux):  # a shifted VAE
        pipe = reading(build(2, 8))
        problem = from_pipelines(pipe, conditions=["cat"], height=S, width=S)
        knobs = {"guidance": 1.0, "spacing": problem.preset["spacing"]}
        ours = problem.images(wb.run("ddim", problem, seed=5, n_samples=1, n_steps=4, **knobs).answer)
        noise = Rng(5, 1).normal(problem.shape, torch.float32)
        options = {"guidance_scale": 1.0 if build is tiny.sd3 else 3.5}
        drawn = pipe(prompt=["cat"], latents=noise if build is tiny.sd3 else pack(noise), num_inference_steps=4,
                     height=S, width=S, output_type="pt", **options).images
        theirs = (drawn[0].permute(1, 2, 0) * 255).round()
        assert (ours[0].float() - theirs).abs().max() <= 1


def test_guidance_as_an_input_is_no_guidance_of_the_run(text_pipeline: Any) -> None:
    """A latent consistency U-Net: one row per evaluation, and its `timestep_cond` is what the pipeline gives it."""
    pipe = text_pipeline()
    pipe.register_modules(unet=tiny.unet(0, 8, time_cond_proj_dim=4))  # of width 4 it normalises time embeddings away
    problem = from_pipelines(pipe, conditions=["cat", "dog"], embedded_guidance=6.0)
    assert problem.preset["guidance"] == 1.0 and problem.reference[1]["guidance"] == 1.0
    ours = wb.run("ddim", problem, seed=5, n_samples=2, n_steps=4, guidance=1.0).answer
    noise = Rng(5, 2).normal(problem.shape, torch.float32)
    for weight, alike in ((6.0, True), (2.0, False)):
        theirs = _even(pipe)(prompt=["cat", "dog"], latents=noise, num_inference_steps=4, guidance_scale=weight,
                             output_type="latent").images
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) == alike
    with pytest.raises(ValueError, match=r"guidance=3\.0: m1 has no null label"):
        wb.run("ddim", problem, guidance=3.0)
    with pytest.raises(ValueError, match=r"guidance=3\.0: m1 has its guidance embedded"):
        from_pipelines(pipe, conditions=["cat"], guidance=3)


def test_negative_prompt_and_rescaled_guidance(text_pair: list[Any]) -> None:
    prompts, pipe = ["cat", "dog"], text_pair[-1]
    noise = Rng(5, 2).normal((4, 8, 8), torch.float32)
    drawn = {}
    for rescale, against in ((0.0, None), (0.7, None), (0.0, "cow"), (0.7, "cow")):
        problem = from_pipelines(pipe, conditions=prompts, negative_prompt=against, guidance_rescale=rescale)
        ours = wb.run("ddim", problem, seed=5, n_samples=2, n_steps=4, guidance=5.0).answer
        options = {} if against is None else {"negative_prompt": [against] * 2}
        theirs = _even(pipe)(prompt=prompts, latents=noise, num_inference_steps=4, guidance_scale=5.0,
                             guidance_rescale=rescale, output_type="latent", **options).images
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        drawn[rescale, against] = ours
    values = list(drawn.values())
    assert not any(torch.allclose(a, b, atol=1e-3) for i, a in enumerate(values) for b in values[:i])


def test_rows_at_once(text_pair: list[Any]) -> None:
    """The most rows that a network and the decoder see, and the same answers."""
    rows: dict[str, list[int]] = {"unet": [], "vae": []}
    pipe = text_pair[-1]
    pipe.unet.register_forward_pre_hook(lambda module, args: rows["unet"].append(len(args[0])))
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: rows["vae"].append(len(args[0])))
    drawn = {}
    for most in (None, 3):
        problem = from_pipelines(pipe, conditions=["cat", "dog"], max_rows=most)
        rows["unet"].clear()
        run = wb.run("ddim", problem, n_samples=5, n_steps=2, guidance=3.0)
        drawn[most] = (run.answer, problem.images(run.answer))
        assert run.cost.evaluations == {"m1": 20}
        if most is None:
            assert max(rows["unet"]) == 10 and max(rows["vae"]) == 5
            rows["vae"].clear()
    assert max(rows["unet"]) == 3 and sum(rows["unet"]) == 20 and rows["vae"] == [3, 2]
    torch.testing.assert_close(drawn[3][0], drawn[None][0], rtol=1e-4, atol=1e-4)
    assert (drawn[3][1].int() - drawn[None][1].int()).abs().max() <= 1


def test_resolution(text_pipeline: Any) -> None:
    pipe = text_pipeline()
    problem = from_pipelines(pipe, conditions=["cat"], height=32, width=24)
    run = wb.run("ddim", problem, seed=5, n_samples=1, n_steps=2, guidance=1.0)
    assert run.answer.shape == (1, 4, 16, 12) and problem.images(run.answer).shape == (1, 32, 24, 3)
    theirs = _even(pipe)(prompt=["cat"], latents=Rng(5, 1).normal((4, 16, 12), torch.float32), num_inference_steps=2,
                         guidance_scale=1.0, height=32, width=24, output_type="latent").images
    torch.testing.assert_close(run.answer, theirs, rtol=1e-4, atol=1e-4)


def test_memory_of_all_models_together(text_pair: list[Any]) -> None:
    small, large = text_pair
    problem = from_pipelines(*text_pair, conditions=["cat"])
    sizes = [sum(p.numel() * p.element_size() for p in pipe.unet.parameters()) for pipe in text_pair]
    found = {n: memory(problem, n) for n in (1, 4)}
    assert list(found[1].weights.values()) == sizes and found[1].total == sum(sizes) + found[1].peak
    assert 3 * found[1].peak < found[4].peak < 5 * found[1].peak
    assert memory(from_pipelines(large, conditions=["cat"], max_rows=1), 4).peak < found[4].peak / 2
    assert memory(from_pipelines(small, small, conditions=["cat"])).weights == {"m1": sizes[0], "m2": 0}
    with pytest.raises(ValueError, match=r"n_samples=0: expected an integer of at least 1"):
        memory(problem, 0)


def judged(answer: torch.Tensor, labels: torch.Tensor | None) -> dict[str, Quality]:
    """For `test_copied_code_keeps_what_was_asked`: found by an import."""
    print(f"labels {labels}")
    return {"drift": Quality(float(answer.mean()), 0.0, len(answer))}


def test_copied_code_keeps_what_was_asked(text_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = text_pipeline().to(torch.bfloat16)
    pipe.register_to_config(_name_or_path="there")
    problem = from_pipelines(pipe, conditions=["cat", "dog"], judge=judged, negative_prompt="cow", height=32, width=32,
                             guidance_rescale=0.3, max_rows=2)
    run = wb.run("ddim", problem, seed=5, n_samples=3, n_steps=2, guidance=4.0)
    script, source = problem.code(run.inputs), problem.source
    for text in (script, source):
        assert "from_pretrained('there', torch_dtype=torch.bfloat16)" in text
        assert f"from {__name__} import judged as judge" in text
    for told in ("negative_prompt='cow'", "guidance_rescale=0.3", "height=32, width=32, max_rows=2", "judge=judge"):
        assert told in source
    monkeypatch.setattr(type(pipe), "from_pretrained", classmethod(lambda cls, path, torch_dtype: pipe))
    scope: dict[str, Any] = {}
    exec(source, scope)
    assert scope["problem"].digest == problem.digest
    capsys.readouterr()
    exec(script, scope)
    assert "labels tensor([0, 1, 0])" in capsys.readouterr().out and (tmp_path / "pictures.png").is_file()
    assert scope["images"].shape == (3, 32, 32, 3)
    # steps round to bfloat16 in the pipeline (2^-8 of numbers up to about 4, each guided by 4), not in the workbench
    assert (scope["latents"].float() - run.answer).abs().mean() < 0.1 < (run.answer - run.answer.flip(0)).abs().mean()
    unnamed = from_pipelines(pipe, conditions=["cat"], judge=lambda answer, labels: {})
    assert "has no name that can be imported: set `judge` to it" in unnamed.source
    assert "judge" not in (unnamed.code(wb.inputs("ddim", unnamed, n_steps=2, guidance=4.0)) or "judge")
    assert problem.code(wb.inputs("ddim", problem, n_steps=2, guidance=0.5)) is None  # the pipeline leaves it out


def test_half_precision_stays(text_pipeline: Any) -> None:
    pipe = text_pipeline().to(torch.bfloat16)
    seen: set[torch.dtype] = set()
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    problem = from_pipelines(pipe, conditions=["cat"])
    assert wb.run("ddim", problem, n_samples=1, n_steps=2).answer.dtype == torch.float32
    assert seen == {torch.bfloat16} and pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16


def test_an_offloaded_pipeline_is_a_problem_too(text_pipeline: Any) -> None:
    plain = from_pipelines(text_pipeline(), conditions=["cat"])
    pipe = text_pipeline()
    for module in (pipe.unet, pipe.vae):
        cpu_offload(module, "cpu")
    problem = from_pipelines(pipe, conditions=["cat"])
    assert next(pipe.unet.parameters()).is_meta and problem.digest == plain.digest and problem.device == "cpu"
    ours, theirs = (wb.run("ddim", p, n_samples=2, n_steps=2).answer for p in (problem, plain))
    assert torch.equal(ours, theirs) and torch.equal(problem.images(ours), plain.images(ours))


@pytest.mark.parametrize(("arguments", "words"), [
    ({"conditions": "fox"}, "conditions='fox'.*a list of conditions"),
    ({"conditions": ["fox", 3]}, r"conditions \[3\]: m1 takes prompts"),
    ({"names": ["a", "b"]}, r"names=\['a', 'b'\]: expected 1"),
    ({"loaders": []}, r"loaders=\[\]: expected 1"),
    ({"guidance": "much"}, "guidance='much': expected a finite number"),
    ({"guidance_rescale": 1.5}, r"guidance_rescale=1\.5: expected a number in \[0, 1\]"),
    ({"embedded_guidance": 3.5}, r"embedded_guidance=3\.5: UNet2DConditionModel takes no guidance as an input"),
    ({"max_rows": 0}, "max_rows=0: expected an integer of at least 1"),
    ({"height": 17}, "height=17: m1 draws multiples of 2 pixels"),
    ({"width": 2.5}, r"width=2\.5: m1 draws multiples of 2 pixels"),
])
def test_bad_arguments_are_named(arguments: dict[str, Any], words: str, text_pipeline: Any) -> None:
    with pytest.raises(ValueError, match=words):
        from_pipelines(text_pipeline(), **{"conditions": ["cat"], **arguments})


def test_numpy_scalars_are_numbers() -> None:
    pipe = tiny.dit(0, 8)
    ours = from_pipelines(pipe, conditions=np.arange(2), guidance_rescale=np.float32(0.5), guidance=np.float32(2),
                          max_rows=np.int64(2), height=np.int64(16))
    theirs = from_pipelines(pipe, conditions=[0, 1], guidance_rescale=0.5, guidance=2, max_rows=2, height=16)
    assert ours.digest == theirs.digest


def test_pipelines_that_do_not_fit_are_named(text_pipeline: Any) -> None:
    host = text_pipeline()
    for changes, words in (({"scaling_factor": 0.13}, r"small: vae scaling_factor is 0\.13, the host's is 0\.18215"),
                           ({"shift_factor": 0.1}, r"small: vae shift_factor is 0\.1, the host's is None")):
        with pytest.raises(ValueError, match=words):
            from_pipelines(text_pipeline(vae=tiny.vae(**changes)), host, conditions=["cat"], names=["small", "large"])
    strange = text_pipeline()
    strange.scheduler = DDIMScheduler.from_config(host.scheduler.config, prediction_type="sideways")
    with pytest.raises(ValueError, match="m1: DDIMScheduler: prediction_type='sideways': expected one of epsilon"):
        from_pipelines(strange, conditions=["cat"])
    drops = text_pipeline()
    drops.unet = tiny.unet(0, 4, dropout=0.5).train()
    with pytest.raises(ValueError, match=r"m1: the UNet2DConditionModel is in training mode.*\.eval\(\)"):
        from_pipelines(drops, conditions=["cat"])
    flow = reading(tiny.sd3(0, 8))
    flow.scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    with pytest.raises(ValueError, match="m1: FlowMatchEulerDiscreteScheduler has shift_terminal set"):
        from_pipelines(flow, conditions=["cat"])
    with pytest.raises(ValueError, match=r"height=64: m1 draws at most 32 pixels"):
        from_pipelines(reading(tiny.sd3(0, 8)), conditions=["cat"], height=64)
    with pytest.raises(ValueError, match=r"height=32: m1, a DiTTransformer2DModel, draws 16 pixels only"):
        from_pipelines(tiny.dit(0, 8), conditions=[0], height=32)
    with pytest.raises(ValueError, match="negative_prompt='x': m1 takes class numbers"):
        from_pipelines(tiny.dit(0, 8), conditions=[0], negative_prompt="x")


def test_flows_in_the_explorer() -> None:
    """Two Flux pipelines under its sliders: pictures, and a first step without signal that JSON can tell."""
    from widgets.explorer import explorer

    pipes = [reading(_shifting(seed, width)) for seed, width in ((1, 4), (2, 8))]
    shown = explorer(from_pipelines(*pipes, conditions=["cat", "dog"], height=S, width=S, max_rows=2), n_samples=3)
    shown.wait()
    assert shown.run.cost.evaluations == {"m1": 8 * 3, "m2": 12 * 3} and shown.run.answer.isfinite().all()
    strip = json.loads(json.dumps(shown.view["strip"], allow_nan=False))["log_snr"]
    assert strip[0] is None and strip[1:] == sorted(strip[1:])
    assert "fractions=(0.4, 0.6)" in shown.code() and "pack(noise)" in shown.code()
