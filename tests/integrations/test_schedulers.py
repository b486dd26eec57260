"""The unified scheduler in tiny pipelines against diffusers' own schedulers, and with plans of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from integrations import tiny_pipelines as tiny
from integrations.tiny_pipelines import BETAS, FAMILIES, LATENTS

import workbench.integrations.schedulers as in_module
from workbench.integrations.schedulers import UnifiedSolverScheduler
from workbench.methods.denoising.usf import run_plan
from workbench.plan import PRESETS, Decision, Expansion, Plan, preset_plan
from workbench.problems.denoising import DiscreteSchedule, grid
from workbench.problems.mixtures import two_dim
from workbench.rng import Rng

pytestmark = pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::numpy", "ignore::FutureWarning",
                                        "ignore::DeprecationWarning:diffusers")

PLAN = Plan((999.0, 700.5, 400.0, 120.25), (
    Decision("x0", Expansion(1), corrector="implicit", correction=Expansion(2)),
    Decision("eps", Expansion(2, relaxation="linear", slope=0.1), corrector="pseudo", correction=Expansion(3)),
    Decision("x0", Expansion(3, (1, 2)), start=1),
    Decision("x0")))

# preset, diffusers' class and what it is called there, and settings of both
THEIRS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}, {}),
    "dpmpp_2m_taylor": (DPMSolverMultistepScheduler, {"solver_type": "heun"}, {}),
    "dpmpp_3m": (DPMSolverMultistepScheduler, {"solver_order": 3, "timestep_spacing": "leading"}, {}),
    "dpm_solver_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
                      {}),
    "deis_2": (DEISMultistepScheduler, {}, {"final_sigmas_type": "sigma_min"}),
    "deis_3": (DEISMultistepScheduler, {"solver_order": 3}, {"final_sigmas_type": "sigma_min"}),
    "unipc_bh1": (UniPCMultistepScheduler, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {}),
    "unipc_bh2": (UniPCMultistepScheduler, {"timestep_spacing": "trailing"}, {}),
    "unipc_bh2_3": (UniPCMultistepScheduler, {"solver_order": 3}, {}),
}


def ours_and_theirs(preset: str, steps: int, prediction: str = "epsilon", draw: Any = tiny.draw_sd,
                    build: Any = tiny.sd, guidance: float = 3.0, **more: Any) -> tuple[Any, Any]:
    cls, settings, own = THEIRS[preset]
    theirs = cls(**BETAS, prediction_type=prediction, **settings)
    ours = UnifiedSolverScheduler.from_config(theirs.config, preset=preset, **own)
    return tuple(draw(build(1, 4, s), steps, guidance, **more) for s in (ours, theirs))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("preset", THEIRS)
def test_parity_on_a_pipeline(preset: str, prediction: str) -> None:
    for steps in (1, 5, 10):
        assert_close(*ours_and_theirs(preset, steps, prediction))


@pytest.mark.parametrize("fault", ["half of the second derivative", "relaxation", "no corrector", "spacing"])
def test_parity_catches_a_broken_twin(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = {"relaxation": "unipc_bh2", "no corrector": "unipc_bh2_3"}.get(fault, "dpmpp_3m")
    broken = {"half of the second derivative": {"second": 1.0}, "relaxation": {"relaxation": "bh1"},
              "no corrector": {"corrector": "none"}, "spacing": {}}[fault]
    monkeypatch.setitem(PRESETS, preset, PRESETS[preset]._replace(**broken))
    if fault == "spacing":
        right = in_module._spaced
        monkeypatch.setattr(in_module, "_spaced", lambda c, n: [t + (i > 2) for i, t in enumerate(right(c, n))])
    with pytest.raises(AssertionError, match="not close"):
        assert_close(*ours_and_theirs(preset, 10))


@pytest.mark.parametrize("strength", [0.6, 0.25])
@pytest.mark.parametrize("preset", ["ddim", "dpmpp_2m", "unipc_bh2"])
def test_image_to_image(preset: str, strength: float) -> None:
    assert_close(*ours_and_theirs(preset, 10, draw=tiny.draw_img2img, build=tiny.sd_img2img, strength=strength))


def test_karras_and_cosine_and_zero_snr() -> None:
    for more in ({"use_karras_sigmas": True}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}):
        theirs = DPMSolverMultistepScheduler(**BETAS, **more)
        ours = UnifiedSolverScheduler.from_config(theirs.config, preset="dpmpp_2m")
        assert_close(*(tiny.draw_sd(tiny.sd(1, 4, s), 7, 3.0) for s in (ours, theirs)))
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    theirs = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    ours = UnifiedSolverScheduler.from_config(theirs.config)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert_close(*(tiny.draw_sd(tiny.sd(1, 4, s), 7, 3.0) for s in (ours, theirs)))


@pytest.mark.parametrize("preset", ["dpmpp_2m", "unipc_bh2"])
def test_explicit_timesteps(preset: str) -> None:
    theirs = DPMSolverMultistepScheduler(**BETAS)
    ours = UnifiedSolverScheduler.from_config(theirs.config, preset=preset)
    own = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    found = tiny.draw_sd(tiny.sd(1, 4, ours), None, 3.0, timesteps=own)
    assert ours.timesteps.tolist() == own and ours.num_inference_steps == 10
    if preset == "dpmpp_2m":
        assert_close(found, tiny.draw_sd(tiny.sd(1, 4, theirs), None, 3.0, timesteps=own))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_pipelines_runs_it(name: str) -> None:
    """With one step and DDIM it is a data estimate for all; with more, presets differ."""
    family = FAMILIES[name]
    pipe = family.build(1, 8)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if name in ("sd3", "flux") else {}
    found = []
    for preset in ("ddim", "unipc_bh2_3"):
        pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, preset=preset, **flow)
        found.append(family.draw(pipe, 6, 3.0))
        assert bool(torch.isfinite(found[-1]).all()) and pipe.scheduler.step_index == 6
    assert (found[0] - found[1]).abs().max() > 1e-6


@pytest.mark.parametrize(("name", "config"), [
    ("sd3", {"shift": 3.0}), ("sd3", {}), ("flux", {}), ("flux", {"use_dynamic_shifting": True}),
    ("flux", {"use_dynamic_shifting": True, "time_shift_type": "linear"})])
def test_ddim_on_a_flow_is_euler(name: str, config: dict[str, Any]) -> None:
    family = FAMILIES[name]
    pipe = family.build(1, 8)
    pipe.scheduler = euler = FlowMatchEulerDiscreteScheduler(**config)
    theirs = family.draw(pipe, 7, 3.0)
    pipe.scheduler = UnifiedSolverScheduler.from_config(euler.config, preset="ddim", use_flow_sigmas=True,
                                                        prediction_type="flow_prediction")
    if name == "flux":  # Flux gives sigmas of its own only to schedulers without flow sigmas in their configs
        pipe.scheduler.register_to_config(use_flow_sigmas=True)
        sigmas = np.linspace(1, 1 / 7, 7)
        right = pipe.scheduler.set_timesteps
        pipe.scheduler.set_timesteps = lambda n=None, device=None, mu=None, **_: right(device=device, mu=mu,
                                                                                       sigmas=sigmas)
    assert_close(family.draw(pipe, 7, 3.0), theirs)
    torch.testing.assert_close(pipe.scheduler.timesteps, euler.timesteps, rtol=1e-5, atol=1e-2)


def test_flow_parity_with_unipc() -> None:
    family, sigmas = FAMILIES["sd3"], np.linspace(0.999, 0.1, 7)
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}
    found = []
    for scheduler in (UniPCMultistepScheduler(**config), UnifiedSolverScheduler(**config, preset="unipc_bh2")):
        pipe = family.build(1, 8)
        pipe.scheduler = scheduler
        right = scheduler.set_timesteps
        scheduler.set_timesteps = lambda n=None, device=None, right=right, **_: right(sigmas=sigmas.copy(), **(
            {"num_inference_steps": 7} if isinstance(right.__self__, UniPCMultistepScheduler) else {}))
        found.append(family.draw(pipe, 7, 3.0))
    theirs, ours = found
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


# ---- plans -----------------------------------------------------------------------------------------------------------

def test_a_plan_is_run_as_run_plan_does() -> None:
    """In double precision on a mixture, by the scheduler's step alone; implicit correctors take a call of their own."""
    schedule = DiscreteSchedule.linear()
    problem = two_dim(schedule=schedule)
    for plan in (PLAN, *(preset_plan(name, grid(schedule, 6, "log_snr"), corrector=kind)
                         for name in PRESETS for kind in ("preset", "implicit"))):
        scheduler = UnifiedSolverScheduler(plan=plan)
        scheduler.set_timesteps(len(plan.decisions))
        assert len(scheduler.timesteps) == plan.evaluations
        x = problem.start(Rng(0, 5))
        for entry, t in enumerate(scheduler.timesteps):
            exact = scheduler._points[scheduler._entries[entry]].t
            out = problem.models[-1].network(x, torch.full((5,), exact, dtype=torch.float64), None)
            x = scheduler.step(out, t, x).prev_sample
        answer = list(run_plan(problem, Rng(0, 5), plan))[-1].state
        torch.testing.assert_close(x, answer, rtol=1e-10, atol=1e-10)


def test_plans_and_presets_are_saved_with_the_pipeline(tmp_path: Path) -> None:
    pipe = tiny.sd(1, 4)
    pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, plan=PLAN, preset="deis_3")
    drawn = tiny.draw_sd(pipe, 4, 3.0)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = UnifiedSolverScheduler.from_pretrained(tmp_path / "scheduler")
    before, after = ({k: v for k, v in s.config.items() if k[0] != "_"} for s in (pipe.scheduler, loaded))
    assert loaded.plan == PLAN and before == after
    again = UnifiedSolverScheduler.from_config(pipe.scheduler.config)
    assert again.plan == PLAN and again.config.preset == "deis_3"
    for scheduler in (loaded, again):
        pipe.scheduler = scheduler
        assert torch.equal(tiny.draw_sd(pipe, 4, 3.0), drawn)
    pipe.save_pretrained(tmp_path / "pipe")
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["scheduler"] == [
        "workbench.integrations.schedulers", "UnifiedSolverScheduler"]
    nothing = dict.fromkeys(("safety_checker", "text_encoder", "tokenizer", "feature_extractor", "image_encoder"))
    whole = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", **nothing)
    assert isinstance(whole.scheduler, UnifiedSolverScheduler)
    whole.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.draw_sd(whole, 4, 3.0), drawn)
    back = DPMSolverMultistepScheduler.from_config(whole.scheduler.config)
    assert back.config.beta_schedule == "scaled_linear"


def test_a_plan_in_image_to_image_starts_without_history() -> None:
    for strength, entries in ((1.0, 5), (0.5, 3), (0.3, 2)):
        scheduler = UnifiedSolverScheduler(**BETAS, plan=PLAN)
        pipe = tiny.sd_img2img(1, 4, scheduler)
        found = tiny.draw_img2img(pipe, 4, 3.0, strength)
        assert bool(torch.isfinite(found).all())
        assert scheduler.step_index == 5 and 5 - scheduler.begin_index == entries


def test_noise_is_added_at_the_level_of_the_trajectory() -> None:
    scheduler = UnifiedSolverScheduler(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(5)
    noise = torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(0))
    t = scheduler.timesteps[2]
    point = scheduler._points[2]
    expected = point.alpha * LATENTS + point.sigma * noise
    torch.testing.assert_close(scheduler.add_noise(LATENTS, noise, t.repeat(2)), expected)
    torch.testing.assert_close(scheduler.scale_noise(LATENTS, t.reshape(1), noise), expected)
    bar = scheduler.alphas_cumprod[17]
    torch.testing.assert_close(scheduler.add_noise(LATENTS, noise, torch.tensor([17, 17])),
                               bar.sqrt() * LATENTS + (1 - bar).sqrt() * noise)
    assert scheduler.init_noise_sigma == 1 and len(scheduler) == 1000
    assert scheduler.scale_model_input(noise, t) is noise


def test_half_precision_is_computed_in_single() -> None:
    scheduler = UnifiedSolverScheduler(**BETAS)
    scheduler.set_timesteps(4)
    x = LATENTS.half()
    for t in scheduler.timesteps:
        (x,) = scheduler.step(LATENTS.half(), t, x, return_dict=False)
        assert x.dtype == torch.float16 and bool(torch.isfinite(x).all())


def test_bad_input_is_named() -> None:
    scheduler = UnifiedSolverScheduler()
    made = [
        (lambda: UnifiedSolverScheduler(preset="dpm"), "preset='dpm'"),
        (lambda: UnifiedSolverScheduler(prediction_type="x0"), "prediction_type='x0'"),
        (lambda: UnifiedSolverScheduler(timestep_spacing="even"), "timestep_spacing='even'"),
        (lambda: UnifiedSolverScheduler(beta_schedule="sigmoid"), "beta_schedule='sigmoid'"),
        (lambda: UnifiedSolverScheduler(thresholding=True), "thresholding=True"),
        (lambda: UnifiedSolverScheduler.from_config({"use_lu_lambdas": True}), "use_lu_lambdas=True"),
        (lambda: UnifiedSolverScheduler(use_flow_sigmas=True), "both of a flow"),
        (lambda: UnifiedSolverScheduler(prediction_type="flow_prediction"), "both of a flow"),
        (lambda: UnifiedSolverScheduler(plan="{"), "not JSON"),
        (lambda: UnifiedSolverScheduler(plan=PLAN).set_timesteps(20), "num_inference_steps=20: this plan has 4 steps"),
        (lambda: scheduler.step(LATENTS, 1, LATENTS), "set_timesteps"),
        (lambda: scheduler.set_timesteps(), "num_inference_steps=None"),
        (lambda: scheduler.set_timesteps(0), "num_inference_steps=0"),
        (lambda: scheduler.set_timesteps(1001), "1001"),
        (lambda: scheduler.set_timesteps(timesteps=[5, 9]), r"timesteps=\[5, 9\]"),
        (lambda: scheduler.set_timesteps(sigmas=[1.0, 0.5]), "only a flow"),
        (lambda: scheduler.set_timesteps(2) or scheduler.step(LATENTS, 3, LATENTS), "timestep=3.0"),
        (lambda: [scheduler.set_timesteps(1), *(scheduler.step(LATENTS, 999, LATENTS) for _ in "ab")], "step 1 of 1"),
        (lambda: replace(PLAN, times=(1200.0, 3.0, 2.0, 1.0)).grid(scheduler.schedule), "this schedule has 999"),
    ]
    for make, message in made:
        with pytest.raises(ValueError, match=message):
            make()
