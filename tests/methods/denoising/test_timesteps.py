"""An explicit list of timesteps: the samplers on their own grids, diffusers' on the same list, any order of models."""

from __future__ import annotations

from itertools import pairwise

import diffusers.schedulers.scheduling_dpmsolver_multistep as in_module
import pytest
import torch
from toys import plane

from workbench import run
from workbench.methods.denoising.timesteps import resampled, shares_of, times_of
from workbench.problems.denoising import ContinuousVP, DiscreteSchedule, grid
from workbench.problems.mixtures import eight_modes, two_dim, two_modes
from workbench.rng import Rng

TABLE = DiscreteSchedule.linear()
ODD = (981.0, 700.0, 512.0, 333.0, 47.0, 3.0)


def explicit(problem, times, **knobs):
    return run("timesteps", problem, 3, 5, n_steps=len(times), timesteps=shares_of(problem.schedule, times), **knobs)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "log_snr"])
@pytest.mark.parametrize("schedule", [TABLE, ContinuousVP()], ids=["table", "continuous"])
def test_a_samplers_own_grid_gives_its_own_samples(solver, spacing, schedule):
    problem = two_dim(schedule=schedule, has_labels=True)
    for n_steps in (1, 2, 5, 20):
        times = [p.t for p in grid(schedule, n_steps, spacing)[:-1]]
        ours = explicit(problem, times, solver=solver, guidance=2.0)
        theirs = run(solver, problem, 3, 5, n_steps=n_steps, spacing=spacing, guidance=2.0)
        torch.testing.assert_close(ours.answer, theirs.answer, rtol=1e-9, atol=1e-9)
        assert ours.cost == theirs.cost


class _InDouble:
    """torch, as seen by diffusers' scheduler, with double for float: it casts to float32 by name, whatever it gets."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def assert_parity(monkeypatch, solver, given, times=ODD):
    """Ours on the list `given` against diffusers' scheduler on `times`, from the same noise, in float64."""
    monkeypatch.setattr(in_module, "torch", _InDouble())
    scheduler = in_module.DPMSolverMultistepScheduler(  # of order 1 it is DDIM
        algorithm_type="dpmsolver++", solver_order={"ddim": 1, "dpmpp_2m": 2}[solver], final_sigmas_type="zero")
    schedule = DiscreteSchedule(tuple(scheduler.alphas_cumprod.tolist()))
    problem = plane(("exact", schedule, "eps"), schedule=schedule)
    scheduler.set_timesteps(timesteps=[int(t) for t in times])
    levels = [schedule.at(t) for t in times]
    scheduler.sigmas = torch.tensor([*(p.sigma / p.alpha for p in levels), 0.0], dtype=torch.float64)
    x = problem.start(Rng(3, 5))
    for t in scheduler.timesteps:
        x = scheduler.step(problem.models[0].network(x, t.expand(5), None), t, x).prev_sample
    torch.testing.assert_close(explicit(problem, given, solver=solver).answer, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_parity_with_diffusers_on_a_list_of_ones_own(monkeypatch, solver):
    assert_parity(monkeypatch, solver, ODD)


@pytest.mark.parametrize("wrong", [(981.0, 700.0, 512.0, 333.0, 47.0, 4.0), (980.0, 700.0, 512.0, 333.0, 47.0, 3.0)])
def test_parity_fails_for_another_list(monkeypatch, wrong):
    with pytest.raises(AssertionError, match="not close"):
        assert_parity(monkeypatch, "ddim", wrong)


def test_times_and_shares_are_inverse():
    assert times_of(TABLE, shares_of(TABLE, range(1000))) == list(range(1000))
    assert shares_of(TABLE, [0, 999]) == (0.0, 1.0) == shares_of(ContinuousVP(), [1e-3, 1.0])
    schedule, times = ContinuousVP(), [1.0, 0.75, 0.1234567, 0.001]
    assert times_of(schedule, shares_of(schedule, times)) == pytest.approx(times, abs=1e-15)


def test_a_resampled_list_keeps_its_ends_and_its_spread():
    for schedule, times in ((TABLE, list(ODD)), (ContinuousVP(), [1.0, 0.6, 0.5, 0.01])):
        assert resampled(schedule, times, len(times)) == times
        assert resampled(schedule, times, 1) == times[:1]
        for n in (2, 5, 40):
            found = resampled(schedule, times, n)
            assert (found[0], found[-1], len(found)) == (times[0], times[-1], n)
            assert all(a > b for a, b in pairwise(found))
        # twice as fine: every listed level stays, and those between are the middles in log-SNR
        fine = resampled(schedule, times, 2 * len(times) - 1)
        assert fine[::2] == times
        snr = [schedule.at(t).log_snr for t in fine]
        assert snr[1::2] == pytest.approx([(a + b) / 2 for a, b in zip(snr[:-2:2], snr[2::2], strict=True)], abs=1e-9)


def test_each_step_asks_the_model_that_it_is_given():
    problem, asked = two_dim(), []

    def watch(name, network):
        return lambda *rows: asked.append(name) or network(*rows)

    run("timesteps", problem.wrapped(watch), models=(0.0, 1.0, 0.5))
    assert asked == ["wiener", "exact", "coarse", "coarse"]
    cost = run("timesteps", problem, n_samples=3, models=(0.0, 1.0, 0.5)).cost
    assert cost.evaluations == {"wiener": 3, "coarse": 6, "exact": 3}


def test_given_to_two_models_it_is_t_stitch():
    problem = eight_modes()
    times = [p.t for p in grid(problem.schedule, 10, "trailing")[:-1]]
    ours = explicit(problem, times, models=(0.0,) * 4 + (1.0,))
    theirs = run("t_stitch", problem, 3, 5, n_steps=10, fractions=(0.4,))
    torch.testing.assert_close(ours.answer, theirs.answer, rtol=1e-9, atol=1e-9)
    assert ours.cost == theirs.cost
    with pytest.raises(AssertionError):
        torch.testing.assert_close(explicit(problem, times, models=(0.0,) * 3 + (1.0,)).answer, theirs.answer)


@pytest.mark.parametrize(("knobs", "message"), [
    ({"timesteps": ()}, r"timesteps=\(\)"),
    ({"timesteps": (0.5, 0.5)}, r"timesteps=\(0.5, 0.5\).*strictly"),
    ({"timesteps": (0.2, 0.5)}, "timesteps=.*strictly"),
    ({"timesteps": (1.2, 0.5)}, "timesteps=.*outside its bounds, 0 to 1"),
    ({"timesteps": (0.5,)}, "n_steps=4.*1 step"),
    ({"models": ()}, "models=.*1 to n_steps=4"),
    ({"models": (1.0,) * 5}, "models=.*1 to n_steps=4"),
])
def test_what_cannot_be_run_is_named(knobs, message):
    with pytest.raises(ValueError, match=message):
        run("timesteps", two_modes(), n_samples=1, **knobs)
