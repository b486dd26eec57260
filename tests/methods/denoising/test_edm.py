"""EDM's sampler against diffusers' Heun, Euler and Karras samplers, its order, and the law that churn keeps."""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers.schedulers.deprecated.scheduling_karras_ve as karras_module
import diffusers.schedulers.scheduling_euler_discrete as euler_module
import diffusers.schedulers.scheduling_heun_discrete as heun_module
import pytest
import torch
from toys import STARTS, gaussian, log_snr_points, plane, solve, true_flow

from workbench import run
from workbench.methods.denoising._march import march
from workbench.methods.denoising.ddim import ddim_step
from workbench.methods.denoising.deis import deis_step
from workbench.methods.denoising.edm import edm_step
from workbench.problems.denoising import ContinuousVP, DiscreteSchedule, grid, noisiest, power_grid
from workbench.problems.mixtures import Mixture, two_dim, two_modes
from workbench.rng import Rng

VP = ContinuousVP()
NOISE = torch.from_numpy(STARTS)[:, None]


def rho(point):
    return point.sigma / point.alpha


class _InDouble:
    """torch, as seen by diffusers' Euler scheduler, with double for float: it casts to float32 by name."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


# ---- deterministic ---------------------------------------------------------------------------------------------------

def in_diffusers(module, name, n_steps, prediction="eps"):
    """(problem, grid, samples of a scheduler with Karras' levels from the noise of Rng(0)), all in float64.

    Its states are x / alpha; its own levels are kept in single precision and replaced by ours after a comparison.
    """
    names = {"eps": "epsilon", "v": "v_prediction"}
    scheduler = getattr(module, name)(use_karras_sigmas=True, prediction_type=names[prediction], beta_start=1e-4,
                                      beta_end=0.02)
    schedule = DiscreteSchedule(tuple(scheduler.alphas_cumprod.tolist()))
    problem, points = plane(("exact", schedule, prediction), schedule=schedule), grid(schedule, n_steps, "karras")
    scheduler.set_timesteps(n_steps)
    levels = torch.tensor([rho(p) for p in points], dtype=torch.float64)
    doubled = torch.arange(n_steps).repeat_interleave(2)[1:] if "Heun" in name else torch.arange(n_steps)
    ours = torch.cat((levels[doubled], levels[-1:]))
    torch.testing.assert_close(scheduler.sigmas.double(), ours, rtol=2e-5, atol=0)
    scheduler.sigmas = ours
    scheduler._step_index, scheduler.is_scale_input_called = 0, True
    x = problem.start(Rng(0, 6)) / points[0].alpha
    for t, k in zip(scheduler.timesteps, doubled.tolist(), strict=True):
        own = torch.full((6,), points[k].t, dtype=torch.float64)
        out = problem.models[0].network(x * points[k].alpha, own, None)
        x = scheduler.step(out, t, x).prev_sample
    return problem, points, x


def assert_parity(theirs, step, **knobs):
    problem, points, x = theirs
    ours = list(march(problem, Rng(0, 6), points, problem.models * (len(points) - 1), step, guidance=1.0, **knobs))
    torch.testing.assert_close(ours[-1].state, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_parity_with_diffusers_heun(prediction):
    for n_steps in (2, 3, 10, 18):
        assert_parity(in_diffusers(heun_module, "HeunDiscreteScheduler", n_steps, prediction), edm_step)
    for other in ({"heun": False}, {"gamma": 0.05}):
        with pytest.raises(AssertionError, match="not close"):
            assert_parity(in_diffusers(heun_module, "HeunDiscreteScheduler", 18, prediction), edm_step, **other)


def test_parity_with_diffusers_euler(monkeypatch):
    monkeypatch.setattr(euler_module, "torch", _InDouble())
    for n_steps in (2, 3, 10, 18):
        assert_parity(in_diffusers(euler_module, "EulerDiscreteScheduler", n_steps), edm_step, heun=False)
    with pytest.raises(AssertionError, match="not close"):
        assert_parity(in_diffusers(euler_module, "EulerDiscreteScheduler", 18), edm_step)


def test_euler_is_ddim_and_heun_is_the_rungekutta_method_in_rho():
    problem, points = two_modes(), power_grid(VP, 12, "rho", 7.0)
    for knobs, other, theirs in (({"heun": False}, ddim_step, {}),
                                 ({}, deis_step, {"variant": "rho_rk", "degree": 1, "two_stage": "heun"})):
        found = solve(problem, edm_step, points, NOISE, **knobs)
        torch.testing.assert_close(found, solve(problem, other, points, NOISE, **theirs), rtol=1e-12, atol=1e-12)
    midpoint = solve(problem, deis_step, points, NOISE, variant="rho_rk", degree=1, two_stage="midpoint")
    assert (found - midpoint).abs().max() > 1e-3


def assert_order(order, **knobs):
    truth = torch.from_numpy(true_flow(log_snr_points(1)))[:, None]
    errors = [float((solve(two_modes(), edm_step, log_snr_points(n), NOISE, **knobs) - truth).abs().max())
              for n in (20, 80, 160, 320)]
    assert math.log2(errors[2] / errors[3]) == pytest.approx(order, abs=0.15)
    # largest errors that another implementation had on this very oracle, at 20, 80 and 320 steps
    known = {1: (1.97e-1, 5.00e-2, 1.25e-2), 2: (4.6e-2, 2.4e-3, 1.5e-4)}[order]
    assert [errors[0], errors[1], errors[3]] == pytest.approx(known, rel=0.025)


def test_orders_and_known_errors():
    assert_order(2)
    assert_order(1, heun=False)
    with pytest.raises(AssertionError):
        assert_order(2, heun=False)


def test_evaluations():
    for n_steps in (1, 2, 18):
        for heun, expected in ((True, 2 * n_steps - 1), (False, n_steps)):
            made = run("edm_heun", two_modes(), n_samples=2, n_steps=n_steps, heun=heun, stochastic=True)
            assert made.cost.total_evaluations == 2 * expected


# ---- churn -----------------------------------------------------------------------------------------------------------

def test_no_churn_is_deterministic_bit_by_bit():
    problem = two_modes()
    still = run("edm_heun", problem, n_samples=5).answer
    for off in ({"s_churn": 0}, {"s_tmin": 10.0, "s_tmax": 9.0}, {"s_tmin": 200.0, "s_tmax": 300.0}):
        assert torch.equal(run("edm_heun", problem, n_samples=5, stochastic=True, **off).answer, still)
    assert (run("edm_heun", problem, n_samples=5, stochastic=True).answer - still).abs().max() > 1e-3


def churned(n_steps):
    return {"s_churn": 12.0, "s_tmin": 0.05, "s_tmax": 5.0, "s_noise": 1.007, "n_steps": n_steps}


def in_karras_ve(monkeypatch, n_steps):
    """(points, end of the whole algorithm by diffusers' KarrasVeScheduler from the noise of Rng(0)), in float64.

    Its sample is x / alpha, its network gives minus the noise, and its fresh noise is drawn from our source.
    """
    knobs, problem = churned(n_steps), two_dim()
    rng, points = Rng(0, 6), power_grid(VP, n_steps, "rho", 7.0)
    scheduler = karras_module.KarrasVeScheduler(s_noise=knobs["s_noise"], s_churn=knobs["s_churn"],
                                                s_min=knobs["s_tmin"], s_max=knobs["s_tmax"])
    scheduler.num_inference_steps = n_steps
    x = problem.start(rng) / points[0].alpha
    zeros = torch.zeros_like(x)

    def network(v, level):
        t = VP.t_at(-math.log(level))
        return -problem.models[-1].network(v * VP.at(t).alpha, torch.full((6,), t, dtype=torch.float64), None)

    for here, there in pairwise(points):
        level, following = rho(here), rho(there)
        has_churn = knobs["s_tmin"] <= level <= knobs["s_tmax"]
        monkeypatch.setattr(karras_module, "randn_tensor", lambda *args, drawn=has_churn, **kwargs: rng.normal(
            problem.shape, torch.float64) if drawn else zeros)
        x_hat, raised = scheduler.add_noise_to_input(x, level)
        out = network(x_hat, raised)
        made = scheduler.step(out, raised, following, x_hat)
        x = made.prev_sample
        if following:
            x = scheduler.step_correct(network(x, following), raised, following, x_hat, x, made.derivative).prev_sample
    return x


def assert_karras_ve(monkeypatch, n_steps, **changed):
    knobs = churned(n_steps) | changed
    ours = run("edm_heun", two_dim(), n_samples=6, stochastic=True, **knobs).answer
    torch.testing.assert_close(ours, in_karras_ve(monkeypatch, n_steps), rtol=1e-8, atol=1e-8)


def test_parity_of_the_whole_algorithm_with_diffusers_karras_ve(monkeypatch):
    """With churn on shared noise; at 18 steps each raise is 12 / 18, cut to sqrt 2 - 1, at 40 it is 12 / 40."""
    for n_steps in (18, 40):
        assert_karras_ve(monkeypatch, n_steps)
    for changed in ({"s_noise": 1.0}, {"s_churn": 11.0}, {"s_tmin": 0.5}, {"s_tmax": 2.0}, {"heun": False}):
        with pytest.raises(AssertionError, match="not close"):
            assert_karras_ve(monkeypatch, 40, **changed)


def test_the_model_is_asked_at_the_raised_level_never_beyond_the_schedule():
    asked = []

    def watch(name, network):
        def watched(x, t, labels):
            asked.append(float(t[0]))
            return network(x, t, labels)

        return watched

    for problem in (two_modes(), two_modes(DiscreteSchedule.linear())):  # 5 / 10 is cut to sqrt 2 - 1
        top, points = noisiest(problem.schedule), power_grid(problem.schedule, 10, "rho", 7.0)
        asked.clear()
        run("edm_heun", problem.wrapped(watch), n_samples=1, n_steps=10, stochastic=True, s_churn=5.0, s_tmin=0.0,
            s_tmax=1000.0)
        assert max(asked) == top.t == asked[0]
        for point, t in zip(points[1:], asked[2::2], strict=False):
            expected = min(math.sqrt(2) * rho(point), rho(top))
            assert rho(problem.schedule.at(t)) == pytest.approx(expected, rel=1e-6)


def ends_of_a_gaussian(n_steps, gamma, step=edm_step, **knobs):
    """(variance of many samples of N(0.7, 0.3^2), and that of the linear recursion that Heun's method is there)."""
    mean, variance, entries = 0.7, 0.09, 50
    law = Mixture.of([1.0], [[mean] * entries], [(torch.eye(entries) * variance).tolist()])
    points = power_grid(VP, n_steps, "rho", 7.0)
    problem = plane(("exact", VP, "eps"), schedule=VP, law=law)
    noise = torch.randn((400, entries), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = solve(problem, step, points, noise, gamma=gamma, **knobs)

    def slope(level):
        return level / (variance + level**2)  # of v - mean

    spread = float((noise / points[0].alpha - mean).square().mean())
    for here, there in pairwise(points):
        level, following = rho(here), rho(there)
        raised = min((1 + gamma) * level, rho(points[0]))
        spread += raised**2 - level**2
        length = following - raised
        euler = 1 + length * slope(raised)
        spread *= (1 + length / 2 * (slope(raised) + slope(following) * euler) if following else euler) ** 2
    return float((made - mean).square().mean()), spread


def assert_the_law_is_kept(step=edm_step):
    found, recursion = ends_of_a_gaussian(40, 0.3, step)  # 20000 numbers: the variance is known to 1 %
    assert found == pytest.approx(recursion, rel=0.035)
    assert recursion == pytest.approx(0.09, rel=0.08)  # the rest is Heun's error
    assert ends_of_a_gaussian(400, 0.1, step)[0] == pytest.approx(0.09, rel=0.035)


def test_churn_keeps_a_gaussians_law():
    assert_the_law_is_kept()


def test_the_law_check_fails_for_broken_churn():
    """Fresh noise of another size, and noise that the model is not told of."""

    def stronger(x, step, **knobs):
        return edm_step(x, step, s_noise=1.1, **knobs)

    def untold(x, step, *, gamma):
        raised = (1 + gamma) * rho(step.here)
        noisy = x + step.here.alpha * math.sqrt(raised**2 - rho(step.here) ** 2) * step.noise()
        return edm_step(noisy, step)

    for broken in (stronger, untold):
        with pytest.raises(AssertionError):
            assert_the_law_is_kept(broken)


def test_without_churn_one_gaussian_follows_the_recursion():
    """The same closed form without its random part, to rounding."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    points = power_grid(VP, 12, "rho", 7.0)
    factor = 1.0
    for here, there in pairwise(points):
        a, b = rho(here), rho(there)
        first, length = a / (0.09 + a * a), b - a
        euler = 1 + length * first
        factor *= 1 + length / 2 * (first + b / (0.09 + b * b) * euler) if b else euler
    truth = 0.7 + (noise / points[0].alpha - 0.7) * factor
    found = solve(gaussian(0.7, 0.3, VP), edm_step, points, noise)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
