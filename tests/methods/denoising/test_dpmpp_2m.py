"""DPM-Solver++(2M) against diffusers, its order and published errors, and identities with DDIM."""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers.schedulers.scheduling_dpmsolver_multistep as in_module
import pytest
import torch
from toys import STARTS, VP_PREDICTIONS, gaussian, log_snr_points, plane, solve, true_flow

from workbench import run
from workbench.methods.denoising._march import Advance, march
from workbench.methods.denoising.ddim import ddim_step
from workbench.methods.denoising.dpmpp_2m import dpmpp_2m_step
from workbench.problems.denoising import CLEAN, ContinuousVP, DiscreteSchedule, grid
from workbench.problems.mixtures import two_modes
from workbench.rng import Rng

DIFFUSERS_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SPACINGS = ("trailing", "leading", "linspace", "log_snr")


def twin(weight):
    """The 2M step with another weight of the difference of data estimates; the true one is 1 / (2 r)."""

    def broken(x, step: Advance):
        now = step.denoise(x, step.here)
        if step.there.sigma == 0:
            return now.x0, now
        h, towards = step.there.log_snr - step.here.log_snr, now.x0
        for past in step.past[:1]:
            towards = now.x0 + weight((step.here.log_snr - past.point.log_snr) / h) * (now.x0 - past.x0)
        return (step.there.sigma / step.here.sigma) * x - (step.there.alpha * math.expm1(-h)) * towards, now

    return broken


class _InDouble:
    """torch, as seen by diffusers' scheduler, with double for float: it casts to float32 by name, whatever it gets."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def in_diffusers(monkeypatch, prediction, n_steps, spacing):
    """(problem, grid, samples of DPMSolverMultistepScheduler from the noise of Rng(0)), all in float64.

    Spacings that diffusers' scheduler itself rounds in another way are given to it as custom timesteps and sigmas.
    """
    monkeypatch.setattr(in_module, "torch", _InDouble())
    scheduler = in_module.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero",
        timestep_spacing="trailing", prediction_type=DIFFUSERS_NAMES[prediction])
    schedule = DiscreteSchedule(tuple(scheduler.alphas_cumprod.tolist()))
    problem, points = plane(("exact", schedule, prediction), schedule=schedule), grid(schedule, n_steps, spacing)
    scheduler.set_timesteps(n_steps)
    if spacing == "trailing":
        assert scheduler.timesteps.tolist() == [p.t for p in points[:-1]]
    # a table of its own sigmas in double, for it keeps them in single precision
    scheduler.sigmas = torch.tensor([p.sigma / p.alpha for p in points], dtype=torch.float64)
    x = problem.start(Rng(0, 6))
    for t, point in zip(scheduler.timesteps, points[:-1], strict=True):
        out = problem.models[0].network(x, torch.full((6,), point.t, dtype=torch.float64), None)
        scheduler._step_index = scheduler._step_index or 0
        x = scheduler.step(out, t, x).prev_sample
    return problem, points, x


def assert_parity(monkeypatch, solver, prediction, n_steps, spacing):
    problem, points, theirs = in_diffusers(monkeypatch, prediction, n_steps, spacing)
    ours = list(march(problem, Rng(0, 6), points, problem.models * n_steps, solver, guidance=1.0))[-1].state
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_parity_with_diffusers(monkeypatch, prediction, spacing):
    for n_steps in (1, 2, 3, 8, 20, 25):
        assert_parity(monkeypatch, dpmpp_2m_step, prediction, n_steps, spacing)


@pytest.mark.parametrize("weight", [lambda r: 0.5 * r, lambda r: -0.5 / r, lambda r: 0.0], ids=["r", "sign", "none"])
def test_parity_fails_for_a_broken_twin(monkeypatch, weight):
    with pytest.raises(AssertionError, match="not close"):
        assert_parity(monkeypatch, twin(weight), "eps", 20, "trailing")


def assert_second_order_with_known_errors(solver):
    noise = torch.from_numpy(STARTS)[:, None]
    truth = torch.from_numpy(true_flow(log_snr_points(1)))[:, None]
    errors = [float((solve(two_modes(), solver, log_snr_points(n), noise) - truth).abs().max())
              for n in (20, 80, 160, 320)]
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(2.0, abs=0.15)
    # largest errors that another implementation had on this very oracle, at 20, 80 and 320 steps
    assert [errors[0], errors[1], errors[3]] == pytest.approx([2.72e-2, 2.13e-3, 1.35e-4], rel=0.01)


def test_order_two_on_the_probability_flow():
    assert_second_order_with_known_errors(dpmpp_2m_step)


@pytest.mark.parametrize("weight", [lambda r: 0.0, lambda r: 1 / r], ids=["first order", "twice the difference"])
def test_order_check_fails_for_a_broken_twin(weight):
    with pytest.raises(AssertionError):
        assert_second_order_with_known_errors(twin(weight))


def test_without_history_it_is_ddim():
    """Every step restarted, and one or two steps in any case (the last goes to sigma 0, the first has no past)."""
    problem, points, noise = two_modes(), log_snr_points(9), torch.from_numpy(STARTS)[:, None]
    torch.testing.assert_close(solve(problem, dpmpp_2m_step, points, noise, restarts=range(9)),
                               solve(problem, ddim_step, points, noise), rtol=1e-12, atol=1e-12)
    for n_steps in (1, 2):
        first, second = (run(m, problem, n_samples=4, n_steps=n_steps).answer for m in ("ddim", "dpmpp_2m"))
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    first, second = (run(m, problem, n_samples=4, n_steps=3).answer for m in ("ddim", "dpmpp_2m"))
    assert (first - second).abs().max() > 1e-3


def test_one_gaussian_is_solved_at_second_order():
    """The exact flow of one Gaussian is linear: deviations scale with the standard deviation of the noisy law."""
    mean, std, schedule = 0.7, 0.3, ContinuousVP()
    noise, points = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], log_snr_points(1)
    first, last = (math.sqrt(p.alpha**2 * std**2 + p.sigma**2) for p in points)
    truth = points[-1].alpha * mean + (noise - points[0].alpha * mean) * last / first
    errors = [float((solve(gaussian(mean, std, schedule), dpmpp_2m_step, log_snr_points(n), noise) - truth).abs().max())
              for n in (50, 100, 200)]
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([2, 2], abs=0.15)


def test_the_end_is_the_data_estimate():
    points = [*log_snr_points(5), CLEAN]
    problem = two_modes()
    last = solve(problem, dpmpp_2m_step, points[:-1], torch.from_numpy(STARTS)[:, None])
    x0, _ = problem.models[-1].predict(last, points[-2], problem.schedule, None, 1.0)
    assert torch.equal(solve(problem, dpmpp_2m_step, points, torch.from_numpy(STARTS)[:, None]), x0)
