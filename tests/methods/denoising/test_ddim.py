"""DDIM against diffusers, against its order and published errors, and against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from toys import PLANE, STARTS, VP_PREDICTIONS, gaussian, log_snr_points, plane, solve, true_flow

from workbench.methods.denoising._march import Advance, Evaluated, march
from workbench.methods.denoising.ddim import ddim_step
from workbench.problems.denoising import (
    CLEAN,
    ContinuousVE,
    ContinuousVP,
    Denoiser,
    DiscreteSchedule,
    EDMSchedule,
    RectifiedFlow,
    SubVP,
    grid,
)
from workbench.problems.mixtures import two_modes
from workbench.rng import Rng

LINEAR = DiscreteSchedule.linear()
DIFFUSERS_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def old_alpha(x, step: Advance, *, eta: float = 0.0):
    """Broken twin: the new state is built with the old signal scale."""
    now = step.denoise(x, step.here)
    return (now.x0 if step.there.sigma == 0 else step.here.alpha * now.x0 + step.there.sigma * now.eps), now


def unreduced(x, step: Advance, *, eta: float = 0.0):
    """Broken twin: fresh noise is added without taking away as much of the predicted noise."""
    now = step.denoise(x, step.here)
    if step.there.sigma == 0:
        return now.x0, now
    ratio = step.here.alpha / step.there.alpha
    fresh = eta * step.there.sigma / step.here.sigma * math.sqrt(1 - ratio**2)
    return step.there.alpha * now.x0 + step.there.sigma * now.eps + fresh * step.noise(), now


def in_diffusers(problem, n_samples, n_steps, spacing, eta):
    """DDIMScheduler's samples (n_samples, D) from the noise of Rng(0), in float64."""
    model = problem.models[0]
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing=spacing,
                              prediction_type=DIFFUSERS_NAMES[model.prediction])
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = scheduler.alphas_cumprod.double(), torch.ones(()).double()
    scheduler.set_timesteps(n_steps)
    rng = Rng(0, n_samples)
    x = problem.start(rng)
    for t in scheduler.timesteps:
        is_last = t == scheduler.timesteps[-1]
        noise = rng.normal(problem.shape, problem.dtype) if eta and not is_last else torch.zeros_like(x)
        x = scheduler.step(model.network(x, t.expand(n_samples), None), t, x, eta=eta, variance_noise=noise).prev_sample
    return x


def assert_parity(solver, prediction, n_steps, spacing, eta):
    problem = plane(("exact", LINEAR, prediction), schedule=LINEAR)
    points = grid(LINEAR, n_steps, spacing)
    ours = list(march(problem, Rng(0, 6), points, problem.models * n_steps, solver, guidance=1.0, eta=eta))[-1].state
    torch.testing.assert_close(ours, in_diffusers(problem, 6, n_steps, spacing, eta), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])  # diffusers' linspace does not step to its own next time
def test_parity_with_diffusers(prediction, eta, spacing):
    for n_steps in (1, 2, 10, 50):
        assert_parity(ddim_step, prediction, n_steps, spacing, eta)


@pytest.mark.parametrize(("broken", "eta"), [(old_alpha, 0.0), (unreduced, 0.4)])
def test_parity_fails_for_a_broken_twin(broken, eta):
    with pytest.raises(AssertionError):
        assert_parity(broken, "eps", 10, "trailing", eta)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_every_number_of_steps_has_diffusers_timesteps(spacing):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    for n_steps in range(1, 1001):
        scheduler.set_timesteps(n_steps)
        theirs = scheduler.timesteps.tolist()[:n_steps]  # for 61 steps and some others diffusers adds one, at t = -1
        if (n_steps, spacing) != (1, "linspace"):  # there diffusers asks for t = 0 alone, which is no denoising
            assert LINEAR.times(n_steps, spacing) == theirs, n_steps
    assert LINEAR.times(1, spacing) == [0.0 if spacing == "leading" else 999.0]


@pytest.mark.parametrize("schedule", [LINEAR, ContinuousVP(), DiscreteSchedule.cosine()])
def test_log_snr_spacing_is_even_in_log_snr(schedule):
    points = grid(schedule, 12, "log_snr")
    reached = torch.tensor([p.log_snr for p in points[:-1]] + [schedule.at(schedule.cleanest).log_snr])
    torch.testing.assert_close(reached.diff(), reached.diff().mean().expand(12), rtol=1e-3, atol=0)
    assert points[-1] == CLEAN and points[0].t == pytest.approx(schedule.times(1, "linspace")[0])


def largest_errors(solver, steps=(20, 40, 80, 160, 320)):
    noise = torch.from_numpy(STARTS)[:, None]
    truth = torch.from_numpy(true_flow(log_snr_points(1)))[:, None]
    return [float((solve(two_modes(), solver, log_snr_points(n), noise) - truth).abs().max()) for n in steps]


def assert_first_order_with_known_errors(solver):
    errors = largest_errors(solver)
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(1.0, abs=0.15)
    # largest errors that another implementation had on this very oracle, at 20, 80 and 320 steps
    assert errors[::2] == pytest.approx([1.97e-1, 5.00e-2, 1.25e-2], rel=0.01)


def test_order_one_on_the_probability_flow():
    assert_first_order_with_known_errors(ddim_step)


def test_order_check_fails_for_a_broken_twin():
    with pytest.raises(AssertionError):
        assert_first_order_with_known_errors(old_alpha)


def test_equals_euler_in_sigma_over_alpha():
    problem, points, noise = two_modes(), log_snr_points(25), torch.from_numpy(STARTS)[:, None]
    v = noise / points[0].alpha
    for here, there in pairwise(points):
        eps = problem.models[-1].network(here.alpha * v, torch.full((len(v),), here.t, dtype=v.dtype), None)
        v = v + (there.sigma / there.alpha - here.sigma / here.alpha) * eps
    torch.testing.assert_close(solve(problem, ddim_step, points, noise), v * points[-1].alpha, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_steps", [1, 3, 50])
def test_one_point_as_data_is_reached_exactly_in_any_number_of_steps(n_steps):
    schedule, noise = ContinuousVP(), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    answer = solve(gaussian(0.7, 0.0, schedule), ddim_step, grid(schedule, n_steps, "trailing"), noise)
    torch.testing.assert_close(answer, torch.full_like(answer, 0.7), rtol=1e-10, atol=1e-10)


def test_one_gaussian_follows_its_closed_form():
    """With Var x0 = s^2 each step multiplies the deviation from the mean by (alpha' alpha s^2 + sigma' sigma) / v."""
    mean, std, schedule = 0.7, 0.3, ContinuousVP()
    problem, noise = gaussian(mean, std, schedule), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for n_steps in (1, 4, 30):
        points = grid(schedule, n_steps, "trailing")
        factor = 1.0
        for here, there in pairwise(points):
            v = here.alpha**2 * std**2 + here.sigma**2
            factor *= (there.alpha * here.alpha * std**2 + there.sigma * here.sigma) / v
        truth = mean + factor * (noise - points[0].alpha * mean)
        torch.testing.assert_close(solve(problem, ddim_step, points, noise), truth, rtol=1e-10, atol=1e-10)


def sampled_std(solver, eta):
    """Standard deviation of 4000 samples at the level before the last, and what the closed recursion makes of it."""
    std, schedule, n = 0.3, ContinuousVP(), 4000
    points = grid(schedule, 12, "trailing")[:-1]
    problem, variance = gaussian(0.0, std, schedule), 1.0
    for here, there in pairwise(points):
        fresh = eta**2 * there.sigma**2 / here.sigma**2 * (1 - here.alpha**2 / there.alpha**2)
        v = here.alpha**2 * std**2 + here.sigma**2
        factor = (there.alpha * here.alpha * std**2 + math.sqrt(there.sigma**2 - fresh) * here.sigma) / v
        variance = factor**2 * variance + fresh
    noise = torch.randn((n, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return float(solve(problem, solver, points, noise, eta=eta).std()), math.sqrt(variance), n


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_spread_of_noisy_steps(eta):
    measured, expected, n = sampled_std(ddim_step, eta)
    assert measured == pytest.approx(expected, rel=4 / math.sqrt(2 * n))  # 4 standard errors of a standard deviation


def test_spread_fails_for_a_broken_twin():
    measured, expected, n = sampled_std(unreduced, 1.0)
    assert measured != pytest.approx(expected, rel=4 / math.sqrt(2 * n))


# Levels of every kind of schedule, one step apart.
PAIRS = {"vp": (ContinuousVP(), 0.8, 0.5), "table": (LINEAR, 900.0, 700.0), "sub_vp": (SubVP(), 0.6, 0.3),
         "ve": (ContinuousVE(), 0.7, 0.6), "edm": (EDMSchedule(), 3.0, 1.0), "flow": (RectifiedFlow(), 0.7, 0.4),
         "flow from noise": (RectifiedFlow(), 1.0, 0.8)}


def of_vp(x, step: Advance, *, eta: float = 0.0):
    """Broken twin: the fresh noise as it is written for alpha^2 + sigma^2 = 1."""
    now = step.denoise(x, step.here)
    fresh = eta * step.there.sigma / step.here.sigma * math.sqrt(1 - (step.here.alpha / step.there.alpha) ** 2)
    return (step.there.alpha * now.x0 + math.sqrt(max(step.there.sigma**2 - fresh**2, 0.0)) * now.eps
            + fresh * step.noise()), now


def fresh_noise(solver, schedule, here, there, eta):
    """The factor of fresh noise in one step: what the state gains where that noise is one instead of nought."""
    x = torch.ones((1, 1), dtype=torch.float64)
    ends = []
    for value in (0.0, 1.0):
        step = Advance(lambda x, at: Evaluated(at, x, torch.zeros_like(x), x / at.sigma), schedule.at(here),
                       schedule.at(there), (), 2, lambda value=value: torch.full_like(x, value), schedule)
        ends.append(float(solver(x, step, eta=eta)[0]))
    return ends[1] - ends[0]


def assert_posteriors_spread(solver, schedule, here, there):
    """Of x_there given x_here and x_0, from their joint law alone: var - cov^2 / var, whatever alpha and sigma are."""
    a, b = schedule.at(here), schedule.at(there)
    covariance = a.alpha / b.alpha * b.sigma**2  # x_here is a.alpha / b.alpha x_there and independent noise
    expected = math.sqrt(b.sigma**2 - covariance**2 / a.sigma**2)
    for eta in (1.0, 0.3):
        assert fresh_noise(solver, schedule, here, there, eta) == pytest.approx(eta * expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", PAIRS)
def test_eta_one_draws_from_the_posterior_on_every_schedule(kind):
    assert_posteriors_spread(ddim_step, *PAIRS[kind])


@pytest.mark.parametrize("kind", [kind for kind in PAIRS if kind not in ("vp", "table", "flow from noise")])
def test_the_posterior_check_fails_for_noise_as_vp_has_it(kind):
    assert_posteriors_spread(of_vp, *PAIRS["vp"])
    with pytest.raises(AssertionError):
        assert_posteriors_spread(of_vp, *PAIRS[kind])


def test_on_vp_the_fresh_noise_is_the_papers():
    for schedule in (ContinuousVP(), LINEAR, DiscreteSchedule.cosine()):
        for n_steps in (3, 20, 200):
            for here, there in pairwise(grid(schedule, n_steps, "trailing")[:-1]):
                ours, paper = (fresh_noise(solver, schedule, here.t, there.t, 0.7) for solver in (ddim_step, of_vp))
                assert ours == pytest.approx(paper, abs=1e-12)


def test_more_steps_than_levels_is_an_error():
    with pytest.raises(ValueError, match="1000 noise levels"):
        LINEAR.times(1001, "trailing")


def test_a_denoiser_names_a_prediction_it_does_not_know():
    with pytest.raises(ValueError, match="'score'"):
        Denoiser("m", PLANE.network(LINEAR), LINEAR, "score")
