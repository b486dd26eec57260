"""DEIS: its coefficients against integrals, orders with known histories, and diffusers' DEIS and iPNDM."""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers.schedulers.scheduling_deis_multistep as deis_module
import diffusers.schedulers.scheduling_ipndm as ipndm_module
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from toys import STARTS, log_snr_points, plane, solve, true_flow

from workbench import run
from workbench.methods.denoising import deis as module
from workbench.methods.denoising._march import Advance, Evaluated, march
from workbench.methods.denoising.ddim import ddim_step
from workbench.methods.denoising.deis import RUNGE_KUTTA, VARIANTS, coefficients, deis_step, nfe
from workbench.problems.denoising import CLEAN, PHASES, ContinuousVP, DiscreteSchedule, Point, power_grid
from workbench.problems.mixtures import Mixture, two_modes
from workbench.rng import Rng

VP, LINEAR = ContinuousVP(), DiscreteSchedule.linear()
INTERPOLATING = ("tab", "rho_ab", "log_rho_ab")
TWO_MODES = Mixture.of([0.3, 0.7], [-1.0, 0.8], [0.4**2, 0.3**2])
NOISE = torch.from_numpy(STARTS)[:, None]
# variant, degree, two_stage -> the order of accuracy that theory gives
ORDERS = {(v, r, "heun"): r + 1 for v in (*INTERPOLATING, "rho_rk") for r in range(4)} | {("rho_rk", 1, "midpoint"): 2}


def rho(point: Point) -> float:
    return point.sigma / point.alpha


def quadratic(n_steps, schedule=VP, final="cleanest"):
    return power_grid(schedule, n_steps, "t", 2.0, final)


def weights(variant, points, degree, schedule=VP):
    """The coefficients of the step from points[degree] to points[degree + 1] with the former points as history."""
    *past, here, there = points[: degree + 2]
    return coefficients(schedule, variant, here, there, tuple(reversed(past)))


@pytest.fixture
def no_memo():
    """For tests that break the quadrature: coefficients found before and during them are forgotten."""
    coefficients.cache_clear()
    yield
    coefficients.cache_clear()


# ---- coefficients ----------------------------------------------------------------------------------------------------

def assert_sums_are_ddims(schedule):
    points = quadratic(6, schedule)
    for variant in VARIANTS[:4]:
        for degree in range(4):
            here, there = points[degree], points[degree + 1]
            ddim = there.sigma - here.sigma * there.alpha / here.alpha
            assert sum(weights(variant, points, degree, schedule)) == pytest.approx(ddim, rel=1e-12)


@pytest.mark.parametrize("schedule", [VP, LINEAR], ids=["vp", "linear"])
def test_coefficients_sum_to_ddims(schedule):
    assert_sums_are_ddims(schedule)


@pytest.mark.usefixtures("no_memo")
def test_the_sum_check_fails_for_a_coarse_quadrature(monkeypatch):
    nodes, own = np.polynomial.legendre.leggauss(2)
    monkeypatch.setattr(module, "_NODES", nodes)
    monkeypatch.setattr(module, "_WEIGHTS", own)
    with pytest.raises(AssertionError):
        assert_sums_are_ddims(VP)


def test_tab_coefficients_are_the_papers_integrals():
    """C_ij as an integral over time with the kernel psi g^2 / (2 sigma), by adaptive quadrature: another variable."""
    for n_steps in (5, 20):
        points = quadratic(n_steps)
        for first in range(n_steps - 4):
            for degree in range(4):
                part = points[first : first + degree + 2]
                there, times = part[-1], [p.t for p in reversed(part[:-1])]

                def kernel(t, j, there=there, times=times):
                    beta = VP.beta_min + t * (VP.beta_max - VP.beta_min)
                    shape = math.prod((t - u) / (times[j] - u) for k, u in enumerate(times) if k != j)
                    return there.alpha / VP.at(t).alpha * beta / (2 * VP.at(t).sigma) * shape

                paper = [quad(kernel, times[0], there.t, args=(j,), epsabs=1e-13, epsrel=1e-12)[0]
                         for j in range(degree + 1)]
                assert weights("tab", part, degree) == pytest.approx(paper, rel=1e-9, abs=1e-12)


def powers_of(variant, point, k):
    return {"tab": point.t, "rho_ab": rho(point), "log_rho_ab": math.log(rho(point))}[variant] ** k


def integral(variant, here, there, k):
    """There's alpha times the integral over rho of t^k, rho^k or (log rho)^k; the last two in closed form."""
    a, b = rho(here), rho(there)
    if variant == "tab":
        return there.alpha * quad(lambda r: VP.t_at(-math.log(r)) ** k, a, b, epsabs=1e-13, epsrel=1e-12)[0]
    if variant == "rho_ab":
        return there.alpha * (b ** (k + 1) - a ** (k + 1)) / (k + 1)

    def antiderivative(r):
        logs = math.log(r)
        return r * (1, logs - 1, logs**2 - 2 * logs + 2, logs**3 - 3 * logs**2 + 6 * logs - 6)[k]

    return there.alpha * (antiderivative(b) - antiderivative(a))


@pytest.mark.parametrize("variant", INTERPOLATING)
def test_polynomials_are_integrated_exactly(variant):
    """Up to the degree of the interpolation, and not beyond it."""
    points = quadratic(8)[2:]
    for degree in range(4):
        here, there, known = points[degree], points[degree + 1], points[degree::-1]
        found = weights(variant, points, degree)
        for k in range(4):
            got = sum(c * powers_of(variant, p, k) for c, p in zip(found, known, strict=True))
            exact = got == pytest.approx(integral(variant, here, there, k), rel=1e-9, abs=1e-12)
            assert exact == (k <= degree)


def test_ipndm_is_adams_bashforth_on_steps_even_in_rho():
    even = power_grid(VP, 9, "rho", 1.0, "cleanest")
    for degree in range(4):
        one, other = (weights(variant, even[2:], degree) for variant in ("ipndm", "rho_ab"))
        assert one == pytest.approx(other, rel=1e-9)
    uneven = quadratic(9)[2:]
    for degree in (1, 2, 3):
        assert weights("ipndm", uneven, degree) != pytest.approx(weights("rho_ab", uneven, degree), rel=1e-2)


def test_a_table_of_levels_is_integrated_to_a_millionth():
    """Its t is linear in log rho between entries, with kinks that a quadrature of the whole interval does not see."""
    *past, here, there = quadratic(8, LINEAR)[2:7]

    def shape(log_rho, times, j):
        t = LINEAR.t_at(-log_rho)
        return math.exp(log_rho) * math.prod((t - u) / (times[j] - u) for k, u in enumerate(times) if k != j)

    times = [here.t, *(p.t for p in reversed(past))]
    kinks = [math.log(rho(LINEAR.at(float(t)))) for t in range(math.ceil(there.t), math.floor(here.t) + 1)]
    edges = [math.log(rho(here)), *sorted(kinks, reverse=True), math.log(rho(there))]
    pieces = [(np.array(np.polynomial.legendre.leggauss(6)), a, b) for a, b in pairwise(edges)]
    true = [there.alpha * sum(sum(w * shape((a + b) / 2 + (b - a) / 2 * x, times, j) for x, w in rule.T) * (b - a) / 2
                              for rule, a, b in pieces) for j in range(len(times))]
    found = coefficients(LINEAR, "tab", here, there, tuple(reversed(past)))
    assert found == pytest.approx(true, abs=5e-6 * max(map(abs, true))) and found != pytest.approx(true, rel=1e-12)


def test_a_grid_is_integrated_once(no_memo):
    problem = two_modes()
    run("deis", problem, n_samples=1, n_steps=7)
    once = coefficients.cache_info()
    run("deis", problem, n_samples=3, n_steps=7)
    assert once.misses == 7 and coefficients.cache_info().misses == 7


# ---- steps -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", VARIANTS)
def test_degree_zero_is_ddim(variant):
    problem = two_modes()
    for phase in PHASES:
        for final in ("zero", "cleanest"):
            points = power_grid(VP, 12, phase, 3.0, final)
            theirs = solve(problem, ddim_step, points, NOISE)
            torch.testing.assert_close(solve(problem, deis_step, points, NOISE, variant=variant, degree=0), theirs,
                                       rtol=1e-12, atol=1e-12)
            other = solve(problem, deis_step, points, NOISE, variant=variant, degree=1)
            assert (other - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS[:4])
def test_without_history_it_is_ddim(variant):
    points = quadratic(9)
    restarted = solve(two_modes(), deis_step, points, NOISE, variant=variant, restarts=range(9))
    torch.testing.assert_close(restarted, solve(two_modes(), ddim_step, points, NOISE), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_into_sigma_0_is_the_data_estimate(variant):
    problem, points = two_modes(), quadratic(5, final="zero")
    assert points[-1] is CLEAN
    last = solve(problem, deis_step, points[:-1], NOISE, variant=variant)
    x0, _ = problem.models[-1].predict(last, points[-2], problem.schedule, None, 1.0)
    assert torch.equal(solve(problem, deis_step, points, NOISE, variant=variant), x0)


def test_evaluations():
    for variant in VARIANTS:
        for degree in range(4):
            stages = degree + 1 if variant == "rho_rk" else 1
            for final, expected in (("cleanest", 4 * stages), ("zero", 3 * stages + 1)):
                made = run("deis", two_modes(), n_samples=1, n_steps=4, variant=variant, degree=degree, final=final)
                assert made.cost.total_evaluations == expected == nfe(4, variant, degree, final)


def test_runge_kutta_methods_integrate_polynomials_in_rho():
    """Where the noise is a polynomial in rho alone: Euler constants, midpoint and Heun lines, Kutta and RK4 cubics."""
    here, there = VP.at(0.8), VP.at(0.3)
    for (name, (rows, weights_)), highest in zip(RUNGE_KUTTA.items(), (0, 1, 1, 3, 3), strict=True):
        assert sum(weights_) == pytest.approx(1) and [len(row) for row in rows] == list(range(len(rows)))
        for k in range(4):

            def denoise(x, at, k=k):
                return Evaluated(at, x, x, torch.full_like(x, rho(at) ** k))

            step = Advance(denoise, here, there, (), 1, lambda: NOISE, VP)
            knobs = {"degree": len(rows) - 1, "two_stage": name if name in ("midpoint", "heun") else "heun"}
            x, _ = deis_step(NOISE, step, variant="rho_rk", **knobs)
            truth = there.alpha / here.alpha * NOISE + integral("rho_ab", here, there, k)
            assert torch.allclose(x, truth, rtol=1e-10, atol=1e-10) == (k <= highest), (name, k)


# ---- orders ----------------------------------------------------------------------------------------------------------

def seeded_error(points, solver, n_known, **knobs):
    """The largest error at the end of `points` of a trajectory whose first n_known steps are the true flow's."""
    problem = two_modes()
    start = torch.from_numpy(true_flow([points[0], points[n_known]]))[:, None] if n_known else NOISE

    def ask(x, at):
        return Evaluated(at, x, *problem.models[-1].predict(x, at, problem.schedule, None, 1.0))

    known = [torch.from_numpy(true_flow([points[0], p]))[:, None] for p in points[1:n_known]]
    past = [ask(x, at) for x, at in zip([NOISE, *known], points[:n_known], strict=False)][::-1]
    x = start
    for i, (here, there) in enumerate(pairwise(points[n_known:])):
        step = Advance(ask, here, there, tuple(past[:3]), len(points) - n_known - 1 - i, lambda: NOISE, VP)
        x, now = solver(x, step, **knobs)
        past.insert(0, now)
    return float((x - torch.from_numpy(true_flow([points[0], points[-1]]))[:, None]).abs().max())


def assert_order(expected, solver, n_known, **knobs):
    counts = (640, 1280) if knobs["variant"] != "rho_rk" and expected == 4 else (160, 320)
    counts = (320, 640) if knobs["variant"] == "ipndm" else counts
    errors = [seeded_error(log_snr_points(n), solver, n_known, **knobs) for n in counts]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(("variant", "degree", "two_stage"), ORDERS)
def test_orders(variant, degree, two_stage):
    """With a history from the true flow: started at low degree, a method of degree 2 or more ends as a method of order
    2 or 3 once the start's error dominates."""
    known = 0 if variant == "rho_rk" else degree
    assert_order(ORDERS[variant, degree, two_stage], deis_step, known, variant=variant, degree=degree,
                 two_stage=two_stage)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_weights_of_even_steps_are_of_order_two_on_uneven_ones(degree):
    """Whatever the degree: on steps even in rho, where they are rho_ab's weights, it is degree + 1 as tested above."""
    assert_order(2, deis_step, degree, variant="ipndm", degree=degree)
    if degree > 1:
        with pytest.raises(AssertionError):
            assert_order(degree + 1, deis_step, degree, variant="ipndm", degree=degree)


def assert_known_errors(step):
    """Largest errors that another implementation had on this very oracle, at 20, 80 and 320 steps from no history."""
    known = {("tab", 1): (7.8e-2, 6.8e-3, 4.6e-4), ("tab", 2): (3.9e-2, 1.2e-3, 2.1e-5),
             ("tab", 3): (2.1e-2, 2.2e-4, 7.9e-7), ("rho_rk", 1): (4.6e-2, 2.4e-3, 1.5e-4),
             ("rho_rk", 2): (2.2e-3, 3.6e-5, 5.6e-7)}
    truth = torch.from_numpy(true_flow(log_snr_points(1)))[:, None]
    for (variant, degree), errors in known.items():
        found = [float((solve(two_modes(), step, log_snr_points(n), NOISE, variant=variant, degree=degree) - truth)
                       .abs().max()) for n in (20, 80, 320)]
        assert found == pytest.approx(errors, rel=0.025), (variant, degree)


def test_known_errors_on_the_probability_flow():
    assert_known_errors(deis_step)


def test_known_errors_fail_for_another_variable():
    swapped = {"tab": "log_rho_ab", "rho_rk": "rho_ab"}
    with pytest.raises(AssertionError):
        assert_known_errors(lambda x, step, *, variant, degree: deis_step(x, step, variant=swapped[variant],
                                                                          degree=degree))


@pytest.mark.parametrize("variant", ["tab", "rho_ab", "log_rho_ab", "rho_rk"])
def test_a_table_of_levels_is_solved_as_well(variant):
    """The flow between two noise levels does not depend on the schedule's time, and a higher degree comes closer."""
    problem = plane(("exact", LINEAR, "eps"), schedule=LINEAR, law=TWO_MODES)
    points = quadratic(40, LINEAR)
    truth = torch.from_numpy(true_flow([points[0], points[-1]]))[:, None]
    errors = [float((solve(problem, deis_step, points, NOISE, variant=variant, degree=degree) - truth).abs().max())
              for degree in range(4)]
    assert all(b < 0.6 * a for a, b in pairwise(errors)) and errors[3] < 3e-3


# ---- diffusers -------------------------------------------------------------------------------------------------------

def in_diffusers_deis(prediction, n_steps, order):
    """(problem, grid, samples of DEISMultistepScheduler from the noise of Rng(0)), all in float64."""
    names = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    scheduler = deis_module.DEISMultistepScheduler(solver_order=order, prediction_type=names[prediction],
                                                   lower_order_final=False)
    schedule = DiscreteSchedule(tuple(scheduler.alphas_cumprod.tolist()))
    problem, points = plane(("exact", schedule, prediction), schedule=schedule), quadratic(n_steps, schedule)
    scheduler.set_timesteps(n_steps)
    scheduler.sigmas = torch.tensor([rho(p) for p in points], dtype=torch.float64)
    scheduler._step_index = 0
    x = problem.start(Rng(0, 6))
    for t, point in zip(scheduler.timesteps, points[:-1], strict=True):
        out = problem.models[0].network(x, torch.full((6,), point.t, dtype=torch.float64), None)
        x = scheduler.step(out, t, x).prev_sample
    return problem, points, x


def assert_parity(theirs, variant, degree, **tolerance):
    problem, points, x = theirs
    ours = list(march(problem, Rng(0, 6), points, problem.models * (len(points) - 1), deis_step, guidance=1.0,
                      variant=variant, degree=degree))[-1].state
    torch.testing.assert_close(ours, x, **tolerance)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_parity_with_diffusers_deis(prediction, order):
    """Its noise estimate is a polynomial in log rho, integrated in closed form; its order is the degree and one."""
    for n_steps in (1, 3, 10, 25):
        assert_parity(in_diffusers_deis(prediction, n_steps, order), "log_rho_ab", order - 1, rtol=1e-6, atol=1e-6)
    if order > 1:  # and neither the paper's polynomial in t nor another degree agrees
        for variant, degree in (("tab", order - 1), ("log_rho_ab", order - 2)):
            with pytest.raises(AssertionError, match="not close"):
                assert_parity(in_diffusers_deis(prediction, 10, order), variant, degree, rtol=1e-3, atol=1e-3)


def in_diffusers_ipndm(n_steps):
    """(problem, grid, samples of IPNDMScheduler), in float64, with the grid's scales for its own.

    It reads networks as velocities, alpha eps - sigma x0, and calls the noise scale beta.
    """
    problem = plane(("exact", VP, "v"), schedule=VP)
    points = quadratic(n_steps)
    scheduler = ipndm_module.IPNDMScheduler()
    scheduler.set_timesteps(n_steps)
    scheduler.betas, scheduler.alphas = (torch.tensor(scales, dtype=torch.float64) for scales in
                                         ([p.sigma for p in points], [p.alpha for p in points]))
    x = problem.start(Rng(0, 6))
    for t, point in zip(scheduler.timesteps, points[:-1], strict=True):
        out = problem.models[0].network(x, torch.full((6,), point.t, dtype=torch.float64), None)
        x = scheduler.step(out, t, x).prev_sample
    return problem, points, x


def test_parity_with_diffusers_ipndm():
    for n_steps in (1, 2, 3, 4, 12):
        assert_parity(in_diffusers_ipndm(n_steps), "ipndm", 3, rtol=1e-9, atol=1e-9)
    for variant, degree in (("ipndm", 2), ("rho_ab", 3)):
        with pytest.raises(AssertionError, match="not close"):
            assert_parity(in_diffusers_ipndm(12), variant, degree, rtol=1e-3, atol=1e-3)
