"""Problems made of diffusers pipelines: parity with the pipelines' own loops, and the scripts of "copy as code"."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    StableDiffusionPipeline,
)
from integrations import tiny_pipelines as tiny
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import workbench as wb
from workbench.problems.pipelines import digest_of, from_pipelines
from workbench.rng import Rng


@pytest.fixture
def text_pair(tmp_path: Path) -> list[StableDiffusionPipeline]:
    """Two tiny Stable Diffusion pipelines with a real (untrained) text encoder and a character tokenizer."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=8)
    torch.manual_seed(3)
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=tiny.WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=52, eos_token_id=53)).eval()
    pipes = []
    for seed, width in ((0, 4), (1, 8)):
        pipe = tiny.sd(seed, width)
        pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)
        pipe.set_progress_bar_config(disable=True)
        pipes.append(pipe)
    return pipes


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


def test_digest_sees_weights_and_settings() -> None:
    one, same, other = tiny.dit(0, 8), tiny.dit(0, 8), tiny.dit(0, 8)
    with torch.no_grad():
        next(other.transformer.parameters()).flatten()[0] += 1
    assert digest_of(one) == digest_of(same)
    assert len({digest_of(one), digest_of(other), digest_of(one, same), digest_of(tiny.dit(0, 16))}) == 4


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
def test_copied_code_draws_the_same_pictures(knobs: dict[str, Any]) -> None:
    from workbench.problems.glyphs import glyphs

    problem = glyphs(("s", "b", "l"), text="AB3")
    run = wb.run("t_stitch", problem, seed=4, n_samples=3, n_steps=4, **{**problem.preset, **knobs})
    scope: dict[str, Any] = {}
    script = problem.code(run.inputs)
    assert script is not None
    exec(script, scope)
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
