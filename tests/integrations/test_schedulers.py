"""The unified scheduler in tiny pipelines against diffusers' own schedulers, and with plans of one's own."""

from __future__ import annotations

import inspect
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.schedulers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
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

FLOW: dict[str, Any] = {"prediction_type": "flow_prediction"}
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
    found = []
    for preset in ("ddim", "unipc_bh2_3"):
        pipe.scheduler = UnifiedSolverScheduler.from_config(pipe.scheduler.config, preset=preset)
        found.append(family.draw(pipe, 6, 3.0))
        assert bool(torch.isfinite(found[-1]).all()) and pipe.scheduler.step_index == 6
    assert (found[0] - found[1]).abs().max() > 1e-6


# The configs that Stable Diffusion 3, Flux (dev, schnell), LTX-Video, Sana and Wan are published with, and others
EULER_FLOWS: dict[str, dict[str, Any]] = {
    "sd3": {"shift": 3.0}, "flux dev": {"shift": 3.0, "use_dynamic_shifting": True}, "flux schnell": {"shift": 1.0},
    "ltx": {"use_dynamic_shifting": True, "shift_terminal": 0.1, "base_shift": 0.95, "max_shift": 2.05},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"}, "plain": {},
    "karras": {"shift": 3.0, "use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True},
    "beta": {"shift": 2.0, "use_beta_sigmas": True, "shift_terminal": 0.05}}
MULTISTEP_FLOWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sana": (DPMSolverMultistepScheduler, {"flow_shift": 3.0}), "dpm": (DPMSolverMultistepScheduler, {}),
    "dpm dynamic": (DPMSolverMultistepScheduler, {"use_dynamic_shifting": True}),
    "wan": (UniPCMultistepScheduler, {"flow_shift": 3.0}), "unipc": (UniPCMultistepScheduler, {}),
    "unipc dynamic": (UniPCMultistepScheduler, {"use_dynamic_shifting": True, "shift_terminal": 0.02})}
SINGLE = torch.finfo(torch.float32).eps


def same_levels(ours: Any, theirs: Any) -> None:
    """In single precision they compute 1 - sigma and the like by up to some ten operations on numbers of at most 1."""
    assert ours.timesteps.dtype == theirs.timesteps.dtype and len(ours.timesteps) == len(theirs.timesteps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas.float(), rtol=16 * SINGLE, atol=16 * SINGLE)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=16 * SINGLE, atol=16e3 * SINGLE)


def own_sigmas(n: int) -> np.ndarray:
    return np.linspace(1.0, 1 / n, n)


@pytest.mark.parametrize("how", ["none", "sigmas", "timesteps", "both"])
@pytest.mark.parametrize("name", EULER_FLOWS)
def test_levels_of_flow_match_euler(name: str, how: str) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(**EULER_FLOWS[name])
    ours = UnifiedSolverScheduler.from_config(theirs.config, preset="ddim")
    assert ours.config.flow_sigmas == "euler" and ours.config.prediction_type == "flow_prediction"
    for n in range(1, 31):
        if n == 1 and "shift_terminal" in EULER_FLOWS[name]:
            continue  # theirs is nan
        given = {"none": {}, "sigmas": {"sigmas": own_sigmas(n)}, "timesteps": {"timesteps": 999 * own_sigmas(n)},
                 "both": {"sigmas": own_sigmas(n), "timesteps": 900 * own_sigmas(n)}}[how] | {"mu": 0.9}
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(*([n] if how == "none" else []), **given)
        same_levels(ours, theirs)


@pytest.mark.parametrize("name", MULTISTEP_FLOWS)
def test_levels_of_multistep_flows(name: str) -> None:
    cls, more = MULTISTEP_FLOWS[name]
    theirs = cls(use_flow_sigmas=True, prediction_type="flow_prediction", **more)
    ours = UnifiedSolverScheduler.from_config(theirs.config)
    assert ours.config.use_flow_sigmas and ours.config.flow_sigmas == ("dpm" if "dpm" in str(cls).lower() else "unipc")
    given = {"mu": 0.9} if "dynamic" in name else {}
    for n in range(1 + ("shift_terminal" in more), 31):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(n, **given)
        same_levels(ours, theirs)
        if cls is UniPCMultistepScheduler:
            for scheduler in (ours, theirs):
                scheduler.set_timesteps(sigmas=own_sigmas(n), **given)
            same_levels(ours, theirs)


def test_levels_catch_a_broken_twin() -> None:
    """The multistep spacing for Euler's, Euler's for its own, and a terminal that is not looked at."""
    theirs = FlowMatchEulerDiscreteScheduler(**EULER_FLOWS["ltx"])
    for change in ({"flow_sigmas": "unipc"}, {"flow_sigmas": "even"}, {"shift_terminal": None}, {"shift": 3.0}):
        ours = UnifiedSolverScheduler.from_config(theirs.config, **change)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(4, mu=0.9)
        if "shift" in change:
            same_levels(ours, theirs)  # has no effect beside a dynamic shift
        else:
            with pytest.raises(AssertionError):
                same_levels(ours, theirs)


def flow_steps(scheduler: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The states of a trajectory of a curved model that looks at the timestep, from one noise."""
    x, found = LATENTS.to(dtype), []
    for t in scheduler.timesteps:
        out = torch.tanh(x + 0.3) + x.roll(1, -1) * (t.to(dtype) / 1000)
        (x,) = scheduler.step(out, t, x, return_dict=False)
        found.append(x)
    return found


@pytest.mark.parametrize("name", ["sd3", "flux dev", "flux schnell", "karras"])
def test_order_one_on_a_flow_is_euler(name: str) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(**EULER_FLOWS[name])
    ours = UnifiedSolverScheduler.from_config(theirs.config, preset="ddim")
    for n in (1, 2, 4, 7, 30):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(sigmas=own_sigmas(n), mu=0.9) if "flux" in name else scheduler.set_timesteps(n)
        for a, b in zip(flow_steps(ours), flow_steps(theirs), strict=True):
            # a rounding of each of n steps, grown by the model's slope of at most 2 over sigma from 1 to 0
            torch.testing.assert_close(a, b, rtol=0, atol=16 * n * math.exp(2) * SINGLE * float(b.abs().max()))


@pytest.mark.parametrize("order", [1, 2])
def test_sana_steps_as_dpm_solver_does(order: int) -> None:
    theirs = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0,
                                         solver_order=order)
    ours = UnifiedSolverScheduler.from_config(theirs.config, preset="ddim" if order == 1 else "dpmpp_2m")
    for n in (1, 2, 4, 7, 20, 30):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(n)
        for a, b in zip(flow_steps(ours), flow_steps(theirs), strict=True):
            # theirs takes logarithms of 1 - sigma and of sigma in single precision, where 1 - sigma may be 3e-4
            torch.testing.assert_close(a, b, rtol=0, atol=2e4 * SINGLE * float(b.abs().max()))


def test_noise_of_a_flow_begins_where_theirs_does() -> None:
    """As image to image calls it, at the level of the timestep that it starts from."""
    noise = torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(0))
    for name in ("sd3", "flux dev", "ltx"):
        theirs = FlowMatchEulerDiscreteScheduler(**EULER_FLOWS[name])
        ours = UnifiedSolverScheduler.from_config(theirs.config, preset="ddim")
        found = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(sigmas=own_sigmas(8), mu=0.9)
            t = scheduler.timesteps[3:4]
            scheduler.set_begin_index(3)
            x = scheduler.scale_noise(LATENTS, t, noise)
            found.append((x, scheduler.step(x.roll(1), t[0], x).prev_sample))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=32 * SINGLE * float(b.abs().max()))


def test_flux_gives_its_own_sigmas() -> None:
    """In the pipeline, whether or not the flow was said, and made from a config or not."""
    family = FAMILIES["flux"]
    pipe = family.build(1, 8)
    said = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    for config in (pipe.scheduler.config, FlowMatchEulerDiscreteScheduler(**EULER_FLOWS["flux dev"]).config):
        pipe.scheduler = euler = FlowMatchEulerDiscreteScheduler.from_config(config)
        theirs = family.draw(pipe, 4, 3.0)
        for scheduler in (UnifiedSolverScheduler.from_config(config, preset="ddim"),
                          UnifiedSolverScheduler.from_config(config, preset="ddim", **said),
                          UnifiedSolverScheduler(preset="ddim", **said, **{k: config[k] for k in (
                              "shift", "use_dynamic_shifting")})):
            pipe.scheduler = scheduler
            assert_close(family.draw(pipe, 4, 3.0), theirs)
            same_levels(scheduler, euler)
        if not config["use_dynamic_shifting"]:
            assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
            scheduler.set_timesteps(4)  # with no sigmas from outside, those that the pipeline gives
            assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    pipe.scheduler = twin = UnifiedSolverScheduler.from_config(FlowMatchEulerDiscreteScheduler().config, preset="ddim")
    twin.register_to_config(use_flow_sigmas=True)  # the broken twin: to such a one the pipeline gives no sigmas
    family.draw(pipe, 4, 3.0)
    torch.testing.assert_close(twin.sigmas, torch.tensor([1, 0.667, 0.334, 0.001, 0]))


def test_sd3_draws_as_with_euler(tmp_path: Path) -> None:
    family = FAMILIES["sd3"]
    pipe = family.build(1, 8)
    for config in ({"shift": 3.0}, {"use_dynamic_shifting": True}):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**config)
        theirs = family.draw(pipe, 7, 3.0)
        ours = UnifiedSolverScheduler.from_config(pipe.scheduler.config, preset="ddim")
        ours.save_pretrained(tmp_path)
        for scheduler in (ours, UnifiedSolverScheduler.from_pretrained(tmp_path)):
            pipe.scheduler = scheduler
            assert_close(family.draw(pipe, 7, 3.0), theirs)
        back = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        assert all(back.config[k] == v for k, v in config.items())


# ---- configs of other schedulers -------------------------------------------------------------------------------------

VP = ("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistepInverse",
      "DPMSolverMultistep", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete",
      "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UnCLIP",
      "UniPCMultistep")
OTHERS: dict[str, str] = {  # of those that are refused, the field that says why
    "EDMEuler": "sigma_m.*", "EDMDPMSolverMultistep": "sigma_m.*", "CMStochasticIterative": "sigma_m.*",
    "SCM": "sigma_data", "ScoreSdeVe": "snr", "ScoreSdeVp": "beta_m.*", "CogVideoXDDIM": "snr_shift_scale",
    "CogVideoXDPM": "snr_shift_scale", "IPNDM": "prediction_type", "FlowMatchLCM": "upscale_mode", "Helios": "stages"}


def every_scheduler() -> dict[str, Any]:
    """All of diffusers that can be made without arguments, by class name."""
    found = {}
    for name in dir(diffusers.schedulers):
        cls = getattr(diffusers.schedulers, name)
        if inspect.isclass(cls) and issubclass(cls, SchedulerMixin) and cls is not SchedulerMixin:
            needed = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty
                      and p.kind is not p.VAR_KEYWORD]
            if not needed:
                found[name.removesuffix("Scheduler")] = cls()
    return found


def test_every_config_is_understood_or_refused() -> None:
    """With the right table of levels and prediction, whatever a class's defaults are; as an object and as saved."""
    taken = set()
    for name, theirs in every_scheduler().items():
        # as a pipeline holds it, and as a hub's file that names the class and leaves its defaults out
        for config in (theirs.config, {"_class_name": type(theirs).__name__}):
            try:
                ours = UnifiedSolverScheduler.from_config(config)
            except ValueError as error:
                assert re.match(rf"{OTHERS.get(name, '')}", str(error)), (name, error)
                continue
            taken.add(name)
            if name.startswith("FlowMatch"):
                assert ours.config.prediction_type == "flow_prediction"
            else:
                torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)
                assert ours.config.prediction_type == theirs.config.prediction_type == "epsilon"
    assert taken == {*VP, "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"} and not taken & set(OTHERS)


def test_configs_that_do_not_say_enough_are_refused() -> None:
    vp = DPMSolverMultistepScheduler().config
    for config, more, message in (
            ({}, {}, "prediction_type=None"), ({"prediction_type": "epsilon"}, {}, "beta_schedule=None"),
            ({"prediction_type": "epsilon", "beta_schedule": "linear"}, {}, "beta_start=None"),
            ({"num_train_timesteps": 1000, "shift": 1.0}, {}, "prediction_type=None"),
            (vp, {"prediction_type": "flow_prediction"}, "use_flow_sigmas=False"), (vp, {"sigma_data": 0.5}, None),
            ({**vp, "sigma_data": 0.5}, {}, "sigma_data=0.5"),
            (vp, {"variance_type": "learned_range"}, "variance_type='learned_range'"),
            ({**vp, "lambda_min_clipped": -5.1}, {}, "lambda_min_clipped=-5.1"), ({**vp, "new": None}, {}, None),
            (EulerDiscreteScheduler(timestep_type="continuous").config, {}, "timestep_type='continuous'"),
            (FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config, {}, "invert_sigmas=True.*expected False"),
            (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True).config, {}, "stochastic_sampling=True")):
        if message is None:
            UnifiedSolverScheduler.from_config(config, **more)
        else:
            with pytest.raises(ValueError, match=message):
                UnifiedSolverScheduler.from_config(config, **more)
    plain = UnifiedSolverScheduler.from_config({"num_train_timesteps": 1000, "shift": 2.0},
                                               prediction_type="flow_prediction")
    assert plain.config.flow_sigmas == "even" and plain.config.shift == 2.0


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
        (lambda: UnifiedSolverScheduler(use_lu_lambdas=True), "use_lu_lambdas=True"),
        (lambda: UnifiedSolverScheduler(use_exponential_sigmas=True), "use_exponential_sigmas=True"),
        (lambda: UnifiedSolverScheduler(use_flow_sigmas=True), "use_flow_sigmas=True, prediction_type='epsilon'"),
        (lambda: UnifiedSolverScheduler(flow_sigmas="odd"), "flow_sigmas='odd'"),
        (lambda: UnifiedSolverScheduler(shift_terminal=0.1), "shift_terminal=0.1, prediction_type='epsilon'"),
        (lambda: UnifiedSolverScheduler(**FLOW, shift_terminal=1.0), "shift_terminal=1.0"),
        (lambda: UnifiedSolverScheduler(**FLOW, shift_terminal=0.1).set_timesteps(1), "shift_terminal=0.1: 1 steps"),
        (lambda: UnifiedSolverScheduler(**FLOW, flow_sigmas="dpm", use_karras_sigmas=True), "use_karras_sigmas=True"),
        (lambda: UnifiedSolverScheduler(**FLOW, flow_sigmas="dpm").set_timesteps(timesteps=[9, 5]), "takes sigmas"),
        (lambda: UnifiedSolverScheduler(**FLOW, use_karras_sigmas=True, use_beta_sigmas=True), "expected one at most"),
        (lambda: UnifiedSolverScheduler(**FLOW, use_dynamic_shifting=True).set_timesteps(3), "mu=None"),
        (lambda: UnifiedSolverScheduler(**FLOW).set_timesteps(3, sigmas=[1.0, 0.5]), "num_inference_steps=3"),
        (lambda: UnifiedSolverScheduler(**FLOW).set_timesteps(timesteps=[9], sigmas=[1.0, 0.5]), r"timesteps=\[9\]"),
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
