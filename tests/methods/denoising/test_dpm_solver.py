"""The DPM-Solver family against diffusers, its orders and known errors, packing, the reverse SDE and thresholding."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler
from doubles import NAMES, theirs
from toys import STARTS, log_snr_points, plane, solve, true_flow

from workbench import get, run
from workbench.methods.denoising import _dpm
from workbench.methods.denoising import dpm_solver as module
from workbench.methods.denoising._dpm import (
    combination,
    estimated,
    linear,
    multistep_step,
    multistep_weights,
    phi,
    singlestep_step,
    singlestep_weights,
)
from workbench.methods.denoising._march import Advance, Evaluated
from workbench.methods.denoising.ddim import ddim_step
from workbench.methods.denoising.dpm_solver import packing
from workbench.problems.denoising import CLEAN, ContinuousVP, DiscreteSchedule, grid
from workbench.problems.mixtures import two_dim, two_modes
from workbench.rng import Rng

TYPES = {"midpoint": "midpoint", "taylor": "heun"}
NOISE = torch.from_numpy(STARTS)[:, None]


def ours(problem, **knobs):
    spec = get("dpm_solver")
    return list(spec.function(problem, Rng(0, 6), **spec.check(knobs)))[-1].state


def assert_parity(monkeypatch, scheduler_class, n_steps, network="eps", final="zero", **knobs):
    prediction, correction = knobs["prediction"], knobs.get("correction", "midpoint")
    stochastic = knobs.get("stochastic", False)
    name = ("sde-" if stochastic else "") + ("dpmsolver++" if prediction == "x0" else "dpmsolver")
    scheduler = scheduler_class(
        algorithm_type=name, solver_order=knobs["order"], solver_type=TYPES[correction],
        lower_order_final=knobs.pop("theirs_lower", knobs.get("lower_order_final", True)),
        final_sigmas_type="zero" if final == "zero" else "sigma_min", prediction_type=NAMES[network])
    schedule = DiscreteSchedule(tuple(scheduler.alphas_cumprod.tolist()))
    problem = plane(("exact", schedule, network), schedule=schedule)
    points = grid(schedule, n_steps, "trailing", final)
    made = ours(problem, n_steps=n_steps, final=final, **knobs)
    other = theirs(monkeypatch, scheduler, problem, points, is_stochastic=stochastic)
    torch.testing.assert_close(made, other, rtol=1e-8, atol=1e-8)


# ---- parity ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("prediction", "order", "correction"), [
    *product(("x0", "eps"), (1, 2), TYPES), ("x0", 3, "midpoint"), ("eps", 3, "midpoint")])
@pytest.mark.parametrize("lower", [True, False])
def test_multistep_parity(monkeypatch, prediction, order, correction, lower):
    for n_steps, final in ((2, "cleanest"), (12, "cleanest"), (9, "zero"), (14, "zero")):
        if final == "zero" and prediction == "eps":
            continue  # diffusers has no limit there
        assert_parity(monkeypatch, DPMSolverMultistepScheduler, n_steps, order=order, prediction=prediction,
                      correction=correction, lower_order_final=lower, final=final)


@pytest.mark.parametrize("network", ["x0", "v"])
def test_parity_with_networks_of_other_predictions(monkeypatch, network):
    for prediction in ("x0", "eps"):
        assert_parity(monkeypatch, DPMSolverMultistepScheduler, 10, network, "cleanest", order=3, prediction=prediction)


@pytest.mark.parametrize(("prediction", "order", "correction"), [*product(("x0", "eps"), (1, 2), TYPES)])
def test_parity_of_the_reverse_sde_on_shared_noise(monkeypatch, prediction, order, correction):
    for final in ("cleanest", "zero") if prediction == "x0" else ("cleanest",):
        assert_parity(monkeypatch, DPMSolverMultistepScheduler, 11, order=order, prediction=prediction,
                      correction=correction, stochastic=True, final=final)


@pytest.mark.parametrize(("prediction", "order", "correction"), [
    *product(("x0", "eps"), (2,), TYPES), ("x0", 3, "taylor"), ("eps", 3, "taylor")])
@pytest.mark.parametrize("final", ["zero", "cleanest"])
def test_singlestep_parity(monkeypatch, prediction, order, correction, final):
    """Order 3 in its Taylor form: for "midpoint" diffusers' second stage is not the paper's."""
    if final == "zero" and prediction == "eps":
        return  # diffusers has no limit there
    for n_steps in (6, 7, 8, 12):
        # diffusers ends even packings of order 2 in 1, 1 unless it is told not to
        lower = not (final == "cleanest" and order == 2 and n_steps % 2 == 0)
        assert_parity(monkeypatch, DPMSolverSinglestepScheduler, n_steps, order=order, prediction=prediction,
                      correction=correction, scheme="singlestep", final=final, theirs_lower=lower)


@pytest.fixture
def no_memo():
    """For tests that break the coefficients: weights found before and during them are forgotten."""
    for memo in (multistep_weights, singlestep_weights):
        memo.cache_clear()
    yield
    for memo in (multistep_weights, singlestep_weights):
        memo.cache_clear()


def test_parity_fails_for_broken_twins(monkeypatch, no_memo):
    check = partial(assert_parity, monkeypatch, DPMSolverMultistepScheduler, 12, final="cleanest")
    with monkeypatch.context() as broken, pytest.raises(AssertionError, match="not close"):
        broken.setattr(_dpm, "phi", lambda k, z: phi(k, z) * (1 if k < 3 else 2))
        check(order=3, prediction="x0")
    with monkeypatch.context() as broken, pytest.raises(AssertionError, match="not close"):
        broken.setattr(_dpm, "linear", lambda *a: (form := linear(*a))._replace(fresh=form.fresh * 1.001))
        check(order=1, prediction="eps", stochastic=True)
    with monkeypatch.context() as broken, pytest.raises(AssertionError, match="not close"):
        broken.setattr(module, "packing", lambda n, order, final: [1] * n)
        assert_parity(monkeypatch, DPMSolverSinglestepScheduler, 8, order=2, prediction="x0", scheme="singlestep",
                      final="zero")


# ---- order -----------------------------------------------------------------------------------------------------------

def errors(step, counts=(20, 80, 160, 320)):
    truth = torch.from_numpy(true_flow(log_snr_points(1)))[:, None]
    return [float((solve(two_modes(), step, log_snr_points(n), NOISE) - truth).abs().max()) for n in counts]


def seeded_errors(step, counts=(20, 80, 160, 320)):
    """The first two steps exact, with the model's values there as history."""
    problem, truth = two_modes(), torch.from_numpy(true_flow(log_snr_points(1)))[:, None]
    model, found = problem.models[-1], []

    def ask(x, at):
        return Evaluated(at, x, *model.predict(x, at, problem.schedule, None, 1.0))

    for n in counts:
        points = log_snr_points(n)
        exact = [NOISE] + [torch.from_numpy(true_flow([points[0], p]))[:, None] for p in points[1:3]]
        past, x = (ask(exact[1], points[1]), ask(exact[0], points[0])), exact[2]
        for i in range(2, n):
            x, now = step(x, Advance(ask, points[i], points[i + 1], past, n - i, lambda: NOISE, problem.schedule))
            past = (now, *past[:3])
        found.append(float((x - truth).abs().max()))
    return found


# largest errors that another implementation had on this very oracle, at 20, 80 and 320 steps
KNOWN = [(multistep_step, 1, "midpoint", 1, (1.97e-1, 5.00e-2, 1.25e-2)),
         (multistep_step, 2, "midpoint", 2, (2.72e-2, 2.13e-3, 1.35e-4)),
         (multistep_step, 2, "taylor", 2, (4.34e-2, 2.32e-3, 1.42e-4)),
         (singlestep_step, 2, "midpoint", 2, (3.25e-2, 2.51e-3, 1.67e-4)),
         (multistep_step, 3, "midpoint", 2, (1.92e-2, 5.28e-4, 2.87e-5))]


def assert_known_errors_and_order(step, order, known):
    found = errors(step)
    assert math.log2(found[-2] / found[-1]) == pytest.approx(order, abs=0.15)
    assert [found[0], found[1], found[3]] == pytest.approx(known, rel=0.01)


@pytest.mark.parametrize(("step", "order", "correction", "observed", "known"), KNOWN)
def test_known_errors(step, order, correction, observed, known):
    more = {"lower_order_final": False} if step is multistep_step else {}
    assert_known_errors_and_order(partial(step, order=order, correction=correction, **more), observed, known)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("correction", TYPES)
@pytest.mark.parametrize("step", [singlestep_step, multistep_step])
def test_orders_two_and_three(step, correction, prediction):
    for order in (2, 3):
        more = {"lower_order_final": False} if step is multistep_step else {}
        if order == 3 and step is multistep_step and correction == "midpoint":
            continue  # of order 2: see below
        found = errors(partial(step, order=order, prediction=prediction, correction=correction, **more), (160, 320))
        assert math.log2(found[-2] / found[-1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_third_order_multistep_needs_the_whole_second_derivative(prediction):
    """Even from an exact history the released weights are of second order; Taylor's are of third."""
    for correction, order in (("midpoint", 2), ("taylor", 3)):
        found = seeded_errors(partial(multistep_step, order=3, prediction=prediction, correction=correction,
                                      lower_order_final=False), (160, 320, 640))
        assert math.log2(found[-2] / found[-1]) == pytest.approx(order, abs=0.15)


def test_order_checks_fail_for_broken_twins(monkeypatch, no_memo):
    with pytest.raises(AssertionError):
        assert_known_errors_and_order(partial(multistep_step, order=2, correction="taylor", lower_order_final=False),
                                      2, KNOWN[1][-1])
    monkeypatch.setattr(_dpm, "combination", lambda here, shares, there, form, _: combination(
        here, [1.1 * s for s in shares], there, form, "midpoint"))
    with pytest.raises(AssertionError):
        assert_known_errors_and_order(partial(singlestep_step, order=2), 2, KNOWN[3][-1])


@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_polynomial_estimates_are_integrated_exactly(prediction):
    """Where D is a polynomial of log-SNR, of degree order - 1, a step is the integral, here by fine quadrature."""
    schedule = ContinuousVP()
    here, there = schedule.at(0.6), schedule.at(0.4)
    a, b = here.log_snr, there.log_snr
    at = torch.linspace(a, b, 20001, dtype=torch.float64)
    for order in (1, 2, 3):
        value = lambda u, order=order: 0.3 + sum((0.7 * (u - a)) ** k for k in range(1, order))  # noqa: E731
        sign = 1 if prediction == "x0" else -1
        form = linear(here, there, prediction)
        grown = torch.trapezoid(torch.exp(sign * (at - b)) * value(at), at) * sign
        wanted = form.decay * 1.0 + form.scale * float(grown)

        def ask(x, point, value=value):
            d = torch.full_like(x, value(point.log_snr))
            return Evaluated(point, x, d, d)

        past = tuple(ask(torch.ones(1), schedule.at(t)) for t in (0.7, 0.85))
        past = tuple(p.changed(**{prediction: torch.full((1,), value(p.point.log_snr), dtype=torch.float64)})
                     for p in past)
        step = Advance(ask, here, there, past, 9, lambda: torch.zeros(1), schedule)
        x = torch.ones(1, dtype=torch.float64)
        for solver in (multistep_step, singlestep_step):
            got, _ = solver(x, step, order=order, prediction=prediction, correction="taylor")
            assert float(got) == pytest.approx(wanted, abs=1e-8)


def test_order_one_is_ddim():
    points = [*log_snr_points(9), CLEAN]
    for prediction, step in product(("x0", "eps"), (multistep_step, partial(singlestep_step))):
        torch.testing.assert_close(solve(two_modes(), step, points, NOISE, order=1, prediction=prediction),
                                   solve(two_modes(), ddim_step, points, NOISE), rtol=1e-11, atol=1e-11)


def test_second_order_multistep_is_the_method_of_that_name():
    for spacing in ("trailing", "karras"):
        ready, built = (run(m, two_dim(), n_samples=3, n_steps=9, spacing=spacing).answer
                        for m in ("dpmpp_2m", "dpm_solver"))
        torch.testing.assert_close(built, ready, rtol=1e-12, atol=1e-12)


# ---- packing ---------------------------------------------------------------------------------------------------------

def check_packing(rule):
    for order, n, final in product((1, 2, 3), range(1, 40), ("zero", "cleanest")):
        orders = rule(n, order, final)
        assert sum(orders) == n and all(1 <= k <= order for k in orders)
        assert orders[-1] == 1 or final == "cleanest"
        assert orders == sorted(orders, reverse=True)
    assert rule(9, 3, "cleanest") == [3, 3, 2, 1] and rule(10, 3, "cleanest") == [3, 3, 3, 1]
    assert rule(11, 3, "cleanest") == [3, 3, 3, 2] and rule(11, 3, "zero") == [3, 3, 3, 1, 1]
    assert rule(7, 2, "cleanest") == [2, 2, 2, 1] and rule(6, 2, "zero") == [2, 2, 1, 1]


def test_packing_is_the_papers():
    check_packing(packing)


def test_packing_check_fails_for_a_broken_twin():
    with pytest.raises(AssertionError):
        check_packing(lambda n, order, final: [order] * (n // order) + [n % order] * (n % order > 0))


def test_packed_evaluations_are_the_budget():
    for n, order, spacing in product((1, 2, 3, 7, 8, 9), (2, 3), ("log_snr", "trailing")):
        cost = run("dpm_solver", two_modes(), n_samples=2, n_steps=n, order=order, scheme="singlestep",
                   spacing=spacing).cost
        assert cost.evaluations["exact"] == 2 * n and cost.calls["exact"] == n


# ---- the reverse SDE -------------------------------------------------------------------------------------------------

def moments(points, prediction, order=1):
    """Mean and variance at the end, over those of the noisy point mass at 0.7 there, from the step's affine map."""
    mass, schedule = 0.7, ContinuousVP()
    mean, variance, past = points[0].alpha * mass, points[0].sigma**2, ()

    def ask(x, at):
        return Evaluated(at, x, torch.full_like(x, mass), (x - at.alpha * mass) / at.sigma)

    def stepped(x, z, here, there, past):
        step = Advance(ask, here, there, past, 9, lambda: torch.tensor([z], dtype=torch.float64), schedule)
        return multistep_step(torch.tensor([x], dtype=torch.float64), step, order=order, prediction=prediction,
                              stochastic=True)

    for here, there in pairwise(points):
        (nothing, now), (one, _), (fresh, _) = (stepped(*a, here, there, past)
                                                for a in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
        mean = float(nothing) + mean * float(one - nothing)
        variance = variance * float(one - nothing) ** 2 + float(fresh - nothing) ** 2
        past = (now,) if prediction == "x0" else ()
    return mean / (points[-1].alpha * mass), variance / points[-1].sigma**2


def test_a_point_mass_keeps_its_mean_and_variance():
    for order in (1, 2):
        assert moments(log_snr_points(4), "x0", order) == pytest.approx((1, 1), abs=1e-9)
    ratios = [moments(log_snr_points(n), "eps") for n in (200, 400)]
    assert [mean for mean, _ in ratios] == pytest.approx([1, 1], abs=1e-9)
    off = [abs(variance - 1) for _, variance in ratios]
    assert off[0] < 0.1 and off[0] / off[1] == pytest.approx(2, abs=0.3)  # exact in the limit


def test_point_mass_check_fails_for_a_broken_twin(monkeypatch, no_memo):
    monkeypatch.setattr(_dpm, "linear", lambda *a: (form := linear(*a))._replace(fresh=form.fresh * 0.99))
    assert moments(log_snr_points(4), "x0") != pytest.approx((1, 1), abs=1e-3)


def test_the_reverse_sde_samples_the_law():
    for prediction in ("x0", "eps"):
        made = run("dpm_solver", two_modes(), n_samples=3000, n_steps=80, stochastic=True, prediction=prediction,
                   spacing="log_snr")
        mean, variance = 0.3 * -1.0 + 0.7 * 0.8, 0.3 * (1 + 0.16) + 0.7 * (0.64 + 0.09) - 0.26**2
        assert float(made.answer.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 3000) + 0.005)
        assert float(made.answer.var()) == pytest.approx(variance, rel=0.08)


@pytest.mark.parametrize("knobs", [{"order": 3}, {"scheme": "singlestep"}])
def test_the_reverse_sde_has_no_other_forms(knobs):
    with pytest.raises(ValueError, match="stochastic=True: only with order=1, or 2"):
        run("dpm_solver", two_modes(), n_samples=1, stochastic=True, **knobs)


# ---- thresholding ----------------------------------------------------------------------------------------------------

def assert_thresholded(threshold):
    x0 = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 *= torch.tensor([0.1, 0.5, 2.0, 10.0, 300.0]).reshape(-1, 1, 1, 1)
    scheduler = DPMSolverMultistepScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9)
    point, x = ContinuousVP().at(0.5), torch.zeros_like(x0)
    step = Advance(lambda x, at: Evaluated(at, x, x0, x), point, point, (), 1, lambda: x, ContinuousVP())
    now = threshold(step, x, point, 0.9)
    torch.testing.assert_close(now.x0, scheduler._threshold_sample(x0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(point.alpha * now.x0 + point.sigma * now.eps, x, rtol=1e-12, atol=1e-12)
    assert torch.equal(now.x0[0], x0[0]) and float(now.x0.abs().max()) <= 1 + 1e-12


def test_thresholding_is_by_each_samples_own_quantile():
    assert_thresholded(estimated)


def test_thresholding_check_fails_for_broken_twins():
    def by_batch(step, x, point, quantile):
        now = step.denoise(x, point)
        limit = now.x0.abs().quantile(quantile).clamp(min=1)
        x0 = now.x0.clamp(-limit, limit) / limit
        return now.changed(x0=x0, eps=(x - point.alpha * x0) / point.sigma)

    def clipped(step, x, point, quantile):
        now = step.denoise(x, point)
        return now.changed(x0=now.x0.clamp(-1, 1), eps=(x - point.alpha * now.x0.clamp(-1, 1)) / point.sigma)

    for broken in (by_batch, clipped):
        with pytest.raises(AssertionError):
            assert_thresholded(broken)


def test_thresholding_keeps_answers_within_the_data_and_is_refused_for_latents():
    for scheme in ("multistep", "singlestep"):
        made = run("dpm_solver", two_dim(), n_samples=8, n_steps=9, thresholding=True, scheme=scheme)
        assert float(made.answer.abs().max()) <= 1 + 1e-12
    assert float(run("dpm_solver", two_dim(), n_samples=8, n_steps=9).answer.abs().max()) > 1.1
    with pytest.raises(ValueError, match=r"thresholding=True.*latents"):
        run("dpm_solver", replace(two_dim(), is_latent=True), n_samples=1, thresholding=True)
