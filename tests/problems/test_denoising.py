"""Schedules, grids and the reading of networks' outputs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler
from torch import Tensor
from toys import PLANE, log_snr_points, plane

from workbench.problems.denoising import (
    CLEAN,
    FINALS,
    PHASES,
    PREDICTIONS,
    SPACINGS,
    ContinuousVE,
    ContinuousVP,
    Denoiser,
    DiscreteSchedule,
    EDMSchedule,
    Point,
    RectifiedFlow,
    SubVP,
    agreement,
    grid,
    noisiest,
    power_grid,
    split_steps,
)
from workbench.problems.mixtures import two_dim
from workbench.rng import Rng

LINEAR, VP, COSINE = DiscreteSchedule.linear(), ContinuousVP(), DiscreteSchedule.cosine()
SCHEDULES = {"linear": LINEAR, "vp": VP, "cosine": COSINE}  # of alpha^2 + sigma^2 = 1
FLOW, ZERO = RectifiedFlow(), LINEAR.zero_terminal()
OTHERS = {"sub_vp": SubVP(), "ve": ContinuousVE(), "edm": EDMSchedule(), "flow from .999": RectifiedFlow(start=0.999)}
WITHOUT_SIGNAL = {"flow": FLOW, "zero_snr": ZERO}
ALL = SCHEDULES | OTHERS | WITHOUT_SIGNAL


@pytest.mark.parametrize("name", ALL)
def test_time_and_log_snr_are_inverse(name):
    schedule = ALL[name]
    high = schedule.times(1, "linspace")[0]
    for k in range(101):
        t = schedule.cleanest + (high - schedule.cleanest) * k / 100
        point = schedule.at(t)
        kept = {"sub_vp": point.alpha**2 + point.sigma, "ve": point.alpha, "edm": point.alpha}.get(
            name, point.alpha + point.sigma if "flow" in name else point.alpha**2 + point.sigma**2)
        assert kept == pytest.approx(1, abs=1e-12)
        assert schedule.t_at(point.log_snr) == pytest.approx(t, rel=1e-6, abs=1e-6)
    levels = [schedule.at(schedule.cleanest + (high - schedule.cleanest) * k / 100).log_snr for k in range(101)]
    assert all(a > b for a, b in pairwise(levels))


def test_levels_without_signal_and_without_noise():
    for schedule in WITHOUT_SIGNAL.values():
        first = noisiest(schedule)
        assert (first.alpha, first.sigma, first.log_snr) == (0.0, 1.0, -math.inf)
        assert schedule.t_at(-math.inf) == first.t
    assert CLEAN.log_snr == math.inf
    for t in (998.0, 998.25, 998.75, 999.0):  # alpha goes to 0 evenly within the table's last step
        assert ZERO.at(t).alpha == pytest.approx((999 - t) * ZERO.at(998).alpha, abs=1e-15)


def test_no_signal_at_the_end_as_diffusers_has_it():
    theirs = DDIMScheduler(beta_start=1e-4, beta_end=0.02, rescale_betas_zero_snr=True).alphas_cumprod
    assert ZERO.alphas_cumprod[-1] == 0.0 == float(theirs[-1])
    # theirs in float32, through betas, whose product of 1000 factors rounds 1000 times
    torch.testing.assert_close(torch.tensor(ZERO.alphas_cumprod), theirs, rtol=1000 * 2**-24, atol=1e-7)


@pytest.mark.parametrize("schedule", WITHOUT_SIGNAL.values(), ids=WITHOUT_SIGNAL)
def test_grids_from_no_signal(schedule):
    """Even in time they are what they are elsewhere; even in what is infinite there, they are refused."""
    for spacing in ("trailing", "leading", "linspace", "t_quadratic"):
        for n_steps in (1, 2, 7, 50):
            points = grid(schedule, n_steps, spacing)
            assert len(points) == n_steps + 1 and points[-1] == CLEAN
            assert all(a.log_snr < b.log_snr for a, b in pairwise(points))
    refused = r"DiscreteSchedule|RectifiedFlow has no signal at t = .*expected"
    for spacing in ("log_snr", "karras"):
        with pytest.raises(ValueError, match=refused):
            grid(schedule, 5, spacing)
    for phase in ("rho", "log_rho"):
        with pytest.raises(ValueError, match=f"phase='{phase}'.*({refused})"):
            power_grid(schedule, 5, phase, 7.0)


def test_tables_are_diffusers_tables():
    for schedule, beta in ((LINEAR, "linear"), (COSINE, "squaredcos_cap_v2")):
        theirs = DDPMScheduler(beta_schedule=beta).alphas_cumprod
        digits = 0.0 if beta == "linear" else 2e-5  # the one bit by bit, the other against single precision
        torch.testing.assert_close(torch.tensor(schedule.alphas_cumprod), theirs, rtol=digits, atol=0)


def test_continuous_schedule_is_its_integral():
    """alpha_t = exp(-1/2 integral of beta), the integral by Simpson's rule, exact for a linear beta."""
    for t in (0.001, 0.3, 1.0):
        beta = [0.1 + s * t * 19.9 for s in (0, 0.5, 1)]
        integral = t / 6 * (beta[0] + 4 * beta[1] + beta[2])
        assert VP.at(t).alpha == pytest.approx(math.exp(-integral / 2), rel=1e-12)


@pytest.mark.parametrize("schedule", (SCHEDULES | OTHERS).values(), ids=SCHEDULES | OTHERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_grids_fall_to_the_clean_data(schedule, spacing):
    for n_steps in (1, 2, 7, 50, 1000):
        points = grid(schedule, n_steps, spacing)
        assert len(points) == n_steps + 1 and points[-1] == CLEAN and CLEAN.log_snr == math.inf
        assert all(a.t > b.t or b is CLEAN for a, b in pairwise(points))
        assert all(a.log_snr < b.log_snr for a, b in pairwise(points))
        if spacing != "leading":
            assert points[0].t == pytest.approx(schedule.times(1, "trailing")[0])


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_grids_can_end_at_the_cleanest_level(schedule, spacing):
    """In steps that all have a length; those even in time stay even to the end."""
    for n_steps in (1, 2, 7, 50):
        points = grid(schedule, n_steps, spacing, "cleanest")
        assert len(points) == n_steps + 1 and points[-1] == schedule.at(schedule.cleanest)
        assert all(a.t > b.t + 1e-4 and a.log_snr < b.log_snr for a, b in pairwise(points))
        if spacing == "linspace" and schedule is VP:
            assert [a.t - b.t for a, b in pairwise(points)] == pytest.approx([(1 - VP.cleanest) / n_steps] * n_steps)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_no_step_is_left_for_the_cleanest_level(schedule):
    with pytest.raises(ValueError, match=r"n_steps=1000.*trailing.*final='zero'"):
        grid(schedule, 1000, "trailing", "cleanest")


def phase_of(phase: str, point: Point, power: float) -> float:
    if phase == "log_rho":
        return math.log(point.sigma / point.alpha)
    return (point.t if phase == "t" else point.sigma / point.alpha) ** (1 / power)


def assert_even(points: list[Point], phase: str, power: float) -> None:
    values = [phase_of(phase, p, power) for p in points]
    lengths = [a - b for a, b in pairwise(values)]
    assert lengths == pytest.approx([(values[0] - values[-1]) / len(lengths)] * len(lengths), rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("phase", PHASES)
def test_power_grids_are_even_in_their_phase(schedule, phase):
    for power in (1.0, 2.0, 3.5):
        for final in FINALS:
            for n_steps in (1, 2, 10, 50):
                points = power_grid(schedule, n_steps, phase, power, final)
                assert len(points) == n_steps + 1 and points[0] == noisiest(schedule)
                assert all(a.log_snr < b.log_snr for a, b in pairwise(points))
                assert points[-1] == (CLEAN if final == "zero" else schedule.at(schedule.cleanest))
                levels = points[:-1] if final == "zero" else points
                if len(levels) > 1:
                    assert levels[-1] == schedule.at(schedule.cleanest)
                    assert_even(levels, phase, power)
        with pytest.raises(AssertionError):  # the check itself: even in no other phase, and in no other power
            assert_even(levels, "rho" if phase == "t" else "t", power)
        if phase != "log_rho":
            with pytest.raises(AssertionError):
                assert_even(levels, phase, power + 0.5)


def test_named_spacings_are_power_grids():
    for schedule in SCHEDULES.values():
        for final in FINALS:
            assert grid(schedule, 9, "karras", final) == power_grid(schedule, 9, "rho", 7.0, final)
            assert grid(schedule, 9, "t_quadratic", final) == power_grid(schedule, 9, "t", 2.0, final)
    for high, even in zip(power_grid(VP, 9, "rho", 1e5), power_grid(VP, 9, "log_rho", 1.0), strict=True):
        assert high.t == pytest.approx(even.t, rel=1e-3)  # the limit of a high power


def test_karras_levels_are_diffusers():
    for beta, schedule in (("linear", LINEAR), ("squaredcos_cap_v2", COSINE)):
        theirs = HeunDiscreteScheduler(use_karras_sigmas=True, beta_start=1e-4, beta_end=0.02, beta_schedule=beta)
        for n_steps in (2, 10, 50):
            theirs.set_timesteps(n_steps)
            levels = [p.sigma / p.alpha for p in grid(schedule, n_steps, "karras")]
            once = torch.cat((theirs.sigmas[:1], theirs.sigmas[1::2]))  # its inner levels stand there twice
            torch.testing.assert_close(torch.tensor(levels), once, rtol=1e-3, atol=0)


def test_a_grid_of_another_phase_is_an_error():
    with pytest.raises(ValueError, match=r"phase='sigma'.*t, rho, log_rho"):
        power_grid(VP, 5, "sigma", 1.0)


@pytest.mark.parametrize("fractions", [(0.5,), (1.2, -0.2), (0.5, 0.6)])
def test_fractions_that_are_no_partition_are_errors(fractions):
    with pytest.raises(ValueError, match="fractions="):
        split_steps(fractions, 10)


def estimates(prediction: str, own: object, read_as: str | None = None) -> tuple[Tensor, Tensor]:
    model = Denoiser("m", PLANE.network(own, prediction), own, read_as or prediction)
    x = torch.randn((5, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model.predict(x, VP.at(0.4), VP, None, 1.0)


def can_be(name, prediction):
    return name in SCHEDULES | {"zero_snr": ZERO} if prediction == "v" else prediction != "flow" or "flow" in name


KINDS = [(name, prediction) for name in ALL for prediction in PREDICTIONS if can_be(name, prediction)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_predictions_that_a_schedule_has_not_are_refused(name, prediction):
    """By its numbers, so of schedules of one's own too."""
    network = PLANE.network(VP)
    if can_be(name, prediction):
        Denoiser("m", network, ALL[name], prediction)
    else:
        with pytest.raises(ValueError, match=rf"m: prediction='{prediction}' needs alpha.*{type(ALL[name]).__name__}.*"
                                             "expected eps, x0"):
            Denoiser("m", network, ALL[name], prediction)


@pytest.mark.parametrize(("name", "prediction"), KINDS)
def test_every_kind_of_network_gives_the_same_estimates(name, prediction):
    own = ALL[name]
    truth, read = estimates("eps", VP), estimates(prediction, own)
    for estimate, true in zip(read, truth, strict=True):
        torch.testing.assert_close(estimate, true, rtol=1e-6, atol=1e-6)
    x0, eps = read
    x = torch.randn((5, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(VP.at(0.4).alpha * x0 + VP.at(0.4).sigma * eps, x, rtol=1e-10, atol=1e-10)
    other = "x0" if prediction != "x0" else "eps"  # the broken twin: a network read as what it is not
    with pytest.raises(AssertionError):
        torch.testing.assert_close(estimates(prediction, own, read_as=other)[0], truth[0], rtol=1e-2, atol=1e-2)


def test_agreement_is_one_with_itself_and_highest_at_high_noise():
    problem = two_dim()
    same = plane(("a", VP, "eps"), ("b", VP, "v"), schedule=VP)
    points = log_snr_points(12)
    for values in agreement(same, points, Rng(0, 20)).values():
        assert values == pytest.approx([1.0] * 12, abs=1e-9)
    found = agreement(problem, points, Rng(0, 200))
    assert set(found) == {"wiener", "coarse", "exact"} and found["exact"] == pytest.approx([1.0] * 12)
    for name in ("wiener", "coarse"):
        assert found[name][0] > 0.999 and min(found[name]) < 0.95
    assert sum(found["coarse"]) > sum(found["wiener"])
    first, *others = problem.models
    turned = replace(problem, models=(replace(first, network=lambda *rows: -first.network(*rows)), *others))
    assert agreement(turned, points, Rng(0, 20))["wiener"][0] < -0.99
