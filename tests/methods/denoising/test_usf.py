"""The unified framework: its parts in closed form, its presets against diffusers and the project's own solvers."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import diffusers.schedulers.scheduling_deis_multistep as deis_module
import diffusers.schedulers.scheduling_dpmsolver_multistep as dpm_module
import diffusers.schedulers.scheduling_unipc_multistep as unipc_module
import numpy as np
import pytest
import torch
from toys import STARTS, log_snr_points, plane, solve, true_flow

import workbench.methods.denoising.usf as in_module
from workbench import inputs, run
from workbench.methods.denoising._dpm import multistep_step
from workbench.methods.denoising._march import Advance, Evaluated, march
from workbench.methods.denoising.ddim import ddim_step
from workbench.methods.denoising.deis import deis_step
from workbench.methods.denoising.dpmpp_2m import dpmpp_2m_step
from workbench.methods.denoising.unipc import unipc_step
from workbench.methods.denoising.usf import derivative_weights, nfe, phi, plan_step, relaxation, run_plan, usf_step
from workbench.plan import CORRECTORS, PRESETS, RELAXATIONS, Decision, Expansion, Plan, preset_plan
from workbench.problems.denoising import CLEAN, DiscreteSchedule, grid
from workbench.problems.mixtures import two_dim, two_modes
from workbench.rng import Rng

NOISE = torch.from_numpy(STARTS)[:, None]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


# ---- derivatives, integrals, relaxation ------------------------------------------------------------------------------

def assert_exact_for_polynomials(estimate):
    rng = np.random.default_rng(0)
    for m in range(1, 5):
        offsets = list(rng.choice([-1, 1], m) * (0.2 + rng.random(m)).cumsum())
        polynomial = np.polynomial.Polynomial(rng.normal(size=m + 1))
        for k in range(1, m + 1):
            found = sum(a * (polynomial(d) - polynomial(0)) for a, d in zip(estimate(offsets, k), offsets, strict=True))
            assert found == pytest.approx(polynomial.deriv(k)(0), rel=1e-9, abs=1e-9)


def test_derivatives_are_exact_for_polynomials_of_degree_m():
    assert_exact_for_polynomials(derivative_weights)
    above = sum(a * d**3 for a, d in zip(derivative_weights([-1.0, -2.0], 1), (-1.0, -2.0), strict=True))
    assert abs(above) > 0.5  # of a cubic, two points miss the slope 0


@pytest.mark.parametrize("broken", [
    lambda d, k: [a * math.factorial(k) for a in derivative_weights(d, k)],
    lambda d, k: np.linalg.solve(np.array([[x**i for i in range(1, len(d) + 1)] for x in d]), np.eye(len(d))[k - 1]),
], ids=["factorial", "transposed"])
def test_polynomials_catch_a_broken_twin(broken):
    with pytest.raises(AssertionError):
        assert_exact_for_polynomials(broken)


def test_derivatives_name_what_they_cannot_solve():
    for offsets, k in (([-1.0], 2), ([-1.0, -1.0], 1), ([0.0], 1)):
        with pytest.raises(ValueError, match=r"k=2|offsets="):
            derivative_weights(offsets, k)


def test_integrals_and_relaxations_are_their_formulas():
    for z in (-3.0, -1.001, -0.999, -0.4, -1e-6, 1e-6, 0.3, 0.999, 1.001, 2.5):
        u = (np.arange(20000) + 0.5) / 20000
        for k in range(1, 6):  # phi_k(z) = int_0^1 e^((1 - u) z) u^(k-1) / (k-1)! du
            wanted = float(np.mean(np.exp((1 - u) * z) * u ** (k - 1)) / math.factorial(k - 1))
            assert phi(k, z) == pytest.approx(wanted, rel=1e-7)
    h, z = 0.7, -0.7
    assert relaxation("none", 9.0, h, z) == 1 and relaxation("linear", 0.3, h, z) == 1.21
    assert relaxation("plus_half_exp", 0.0, h, z) == pytest.approx(1 + 0.5 * math.expm1(z))
    assert relaxation("minus_half_exp", 0.0, h, z) == pytest.approx(1 - 0.5 * math.expm1(z))
    assert relaxation("bh1", 0.0, h, z) == pytest.approx(0.5 * z * z / (math.expm1(z) - z))
    assert relaxation("bh2", 0.0, h, z) == pytest.approx(0.5 * z * math.expm1(z) / (math.expm1(z) - z))


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_exact_where_the_estimate_is_a_polynomial_in_log_snr(prediction, order):
    """x / sigma grows by the integral of e^l x0(l), x / alpha by that of -e^-l eps(l); a corrector adds a degree."""
    points = [p for i, p in enumerate(log_snr_points(40)) if i in (8, 11, 13, 16, 18, 21)]
    estimate = np.polynomial.Polynomial([0.4, -0.8, 0.3, 0.05, 0.02][:order])

    def denoise_by(polynomial):
        def denoise(x, at):
            value = torch.full_like(x, float(polynomial(at.log_snr)))
            x0, eps = ((value, (x - at.alpha * value) / at.sigma) if prediction == "x0"
                       else ((x - at.sigma * value) / at.alpha, value))
            return Evaluated(at, x, x0, eps)
        return denoise

    def truth(polynomial, x, here, there):
        nodes, share = np.polynomial.legendre.leggauss(40)
        half = (there.log_snr - here.log_snr) / 2
        l = here.log_snr + half * (nodes + 1)
        if prediction == "x0":
            return there.sigma * (x / here.sigma + half * float(share @ (np.exp(l) * polynomial(l))))
        return there.alpha * (x / here.alpha - half * float(share @ (np.exp(-l) * polynomial(l))))

    past = [denoise_by(estimate)(truth(estimate, NOISE, points[3], p), p) for p in reversed(points[:3])]
    now = denoise_by(estimate)(NOISE, points[3])
    exact = truth(estimate, NOISE, points[3], points[4])
    for start in range(min(order, 4)):
        decision = Decision(prediction, Expansion(order), start)
        torch.testing.assert_close(in_module.predicted((now, *past), points[4], decision), exact, **CLOSE)
    # the same order for a polynomial of one degree more, with the new point among its points
    bent = np.polynomial.Polynomial([0.4, -0.8, 0.3, 0.05, 0.02][: order + 1])
    past = [denoise_by(bent)(truth(bent, NOISE, points[3], p), p) for p in reversed(points[:4])]
    arrived = Decision(prediction, Expansion(order), 0, "pseudo", Expansion(order + 1))
    there = denoise_by(bent)(in_module.predicted(past, points[4], arrived), points[4])
    exact = truth(bent, NOISE, points[3], points[4])
    torch.testing.assert_close(in_module.corrected(there, past, arrived), exact, **CLOSE)
    assert (there.x - exact).abs().max() > 1e-6


# ---- the presets are the solvers they are named after ----------------------------------------------------------------

def with_preset(name, points, noise=NOISE, *, problem=None, **settings):
    return solve(problem or two_modes(), plan_step, points, noise, plan=preset_plan(name, points, **settings))


OWN = {
    "ddim": (ddim_step, {}),
    "dpmpp_2m": (dpmpp_2m_step, {}),
    "dpmpp_2m_taylor": (multistep_step, {"correction": "taylor"}),
    "dpmpp_3m": (multistep_step, {"order": 3}),
    "dpmpp_3m_taylor": (multistep_step, {"order": 3, "correction": "taylor"}),
    "dpm_solver_2m": (multistep_step, {"prediction": "eps"}),
    "deis_2": (deis_step, {"variant": "log_rho_ab", "degree": 1}),
    "deis_3": (deis_step, {"variant": "log_rho_ab", "degree": 2}),
    "unipc_bh1": (unipc_step, {"variant": "bh1"}),
    "unipc_bh2": (unipc_step, {"variant": "bh2"}),
    "unipc_bh2_3": (unipc_step, {"order": 3, "variant": "bh2"}),
}


def test_every_preset_has_a_solver_to_be_compared_with():
    assert set(OWN) == set(PRESETS)


@pytest.mark.parametrize("name", OWN)
def test_presets_are_the_projects_own_solvers(name):
    solver, knobs = OWN[name]
    has_choice = solver in (multistep_step, unipc_step)  # of lowering the order towards the end
    for is_lower in (False, True)[: 1 + has_choice]:
        more = {"lower_order_final": is_lower} if has_choice else {}
        for n_steps in (1, 2, 3, 4, 9):
            for points in (log_snr_points(n_steps), [*log_snr_points(n_steps), CLEAN]):
                ours = with_preset(name, points, lower_order_final=is_lower)
                torch.testing.assert_close(ours, solve(two_modes(), solver, points, NOISE, **knobs, **more), **CLOSE)


@pytest.mark.parametrize(("name", "field"), [
    ("dpmpp_2m", {"order": 3}), ("dpmpp_2m", {"relaxation": "bh1"}), ("dpmpp_3m", {"second": 1.0}),
    ("deis_3", {"prediction": "x0"}), ("unipc_bh2", {"corrector": "none"}), ("unipc_bh1", {"relaxation": "bh2"})])
def test_identity_fails_for_a_broken_twin(monkeypatch, name, field):
    monkeypatch.setitem(PRESETS, name, PRESETS[name]._replace(**field))
    with pytest.raises(AssertionError, match="not close"):
        test_presets_are_the_projects_own_solvers(name)


def by_stages(x, points, order, prediction, is_taylor, denoise):
    """DPM-Solver(++)-2S, -3S over points[0] to points[-1], as arXiv 2206.00927, algorithms 1, 2, and 2211.01095 do."""
    here = points[0]
    total = points[-1].log_snr - here.log_snr

    def terms(at):
        """The step's exact part, and its integrals against D and against D's slope over the whole step."""
        r, scale = (at.log_snr - here.log_snr) / total, -at.sigma if prediction == "eps" else -at.alpha
        base = at.alpha / here.alpha * x if prediction == "eps" else at.sigma / here.sigma * x
        z = r * total if prediction == "eps" else -r * total
        return base, scale * math.expm1(z), scale * (math.expm1(z) / z - 1) * r, z, scale, r

    values = [getattr(denoise(x, here), prediction)]
    base, whole, slope, *_ = terms(points[1])
    values.append(getattr(denoise(base + whole * values[0], points[1]), prediction))
    r1 = terms(points[1])[-1]
    if order == 3:
        base, whole, slope, *_ = terms(points[2])
        u = base + whole * values[0] + slope / r1 * (values[1] - values[0])
        values.append(getattr(denoise(u, points[2]), prediction))
    base, whole, slope, z, scale, _ = terms(points[-1])
    out = base + whole * values[0]
    if order == 2:
        return out + (slope if is_taylor else 0.5 * whole) / r1 * (values[1] - values[0])
    r2 = terms(points[2])[-1]
    first, second = (values[1] - values[0]) / r1, (values[2] - values[0]) / r2
    if not is_taylor:
        return out + slope * second
    bend = 2 * (second - first) / (r2 - r1)
    return out + slope * (r2 * first - r1 * second) / (r2 - r1) + scale * ((math.expm1(z) / z - 1) / z - 0.5) * bend


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize(("order", "is_taylor", "expansions"), [
    (2, False, [Expansion(1), Expansion(2, relaxation="bh2")]),
    (2, True, [Expansion(1), Expansion(2)]),
    (3, False, [Expansion(1), Expansion(2), Expansion(2)]),
    (3, True, [Expansion(1), Expansion(2), Expansion(3)]),
])
def test_singlestep_solvers_start_from_an_earlier_point(prediction, order, is_taylor, expansions):
    """Stages are steps of their own, and the update starts from where the first stage did."""
    problem, points = two_modes(), log_snr_points(4 * order)
    owner, x = problem.models[-1], NOISE

    def denoise(x, at):
        return Evaluated(at, x, *owner.predict(x, at, problem.schedule, None, 1.0))

    for i in range(0, 4 * order, order):
        x = by_stages(x, points[i : i + order + 1], order, prediction, is_taylor, denoise)
    steps = tuple(Decision(prediction, terms, start) for start, terms in enumerate(expansions)) * 4
    plan = Plan(tuple(p.t for p in points[:-1]), steps, points[-1].t)
    torch.testing.assert_close(solve(problem, plan_step, points, NOISE, plan=plan), x, **CLOSE)
    flat = replace(plan, decisions=tuple(replace(d, start=0) for d in steps))
    assert (solve(problem, plan_step, points, NOISE, plan=flat) - x).abs().max() > 1e-3


class _InDouble:
    """torch, as seen by diffusers' schedulers, with double for float: they cast to float32 by name."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


# numpy's and diffusers' own, in each step of theirs
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
DIFFUSERS_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
THEIRS = {
    "dpmpp_2m": (dpm_module, "DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpmpp_2m_taylor": (dpm_module, "DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun"}),
    "dpmpp_3m": (dpm_module, "DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpm_solver_2m": (dpm_module, "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver",
                                                                  "final_sigmas_type": "sigma_min"}),
    "deis_2": (deis_module, "DEISMultistepScheduler", {"solver_order": 2}),
    "deis_3": (deis_module, "DEISMultistepScheduler", {"solver_order": 3}),
    "unipc_bh1": (unipc_module, "UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1",
                                                            "final_sigmas_type": "sigma_min"}),  # nan into sigma 0
    "unipc_bh2": (unipc_module, "UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
    "unipc_bh2_3": (unipc_module, "UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh2"}),
}


def assert_parity(monkeypatch, name, n_steps, prediction, *, plan=None):
    module, cls, settings = THEIRS[name]
    monkeypatch.setattr(module, "torch", _InDouble())
    scheduler = getattr(module, cls)(timestep_spacing="trailing", prediction_type=DIFFUSERS_NAMES[prediction],
                                     **settings)
    schedule = DiscreteSchedule(tuple(scheduler.alphas_cumprod.tolist()))
    problem = plane(("exact", schedule, prediction), schedule=schedule)
    goes_to_data = module is not deis_module and "final_sigmas_type" not in settings
    points = [*grid(schedule, n_steps, "trailing")[:-1], CLEAN if goes_to_data else schedule.at(0)]
    scheduler.set_timesteps(n_steps)
    assert scheduler.timesteps.tolist() == [p.t for p in points[:-1]]
    scheduler.sigmas = torch.tensor([p.sigma / p.alpha for p in points], dtype=torch.float64)
    x = noise = problem.start(Rng(0, 6))
    for t, point in zip(scheduler.timesteps, points[:-1], strict=True):
        out = problem.models[0].network(x, torch.full((6,), point.t, dtype=torch.float64), None)
        scheduler._step_index = scheduler._step_index or 0
        x = scheduler.step(out, t, x).prev_sample
    # DPM-Solver and DEIS lower the order at the end only below 15 steps, UniPC always
    is_lower = n_steps < 15 or module is unipc_module
    plan = plan or preset_plan(name, points, lower_order_final=is_lower)
    torch.testing.assert_close(solve(problem, plan_step, points, noise, plan=plan), x, **CLOSE)


@pytest.mark.parametrize("name", THEIRS)
def test_parity_with_diffusers(monkeypatch, name):
    for n_steps, prediction in ((1, "eps"), (2, "eps"), (3, "v"), (8, "x0"), (14, "eps"), (20, "v")):
        assert_parity(monkeypatch, name, n_steps, prediction)


@pytest.mark.parametrize(("name", "field"), [
    ("unipc_bh2", {"relaxation": "bh1"}), ("unipc_bh2_3", {"corrector": "none"}), ("deis_3", {"second": 0.5}),
    ("unipc_bh1", {"corrector": "implicit"}), ("dpmpp_3m", {"second": 1.0})])
def test_parity_fails_for_a_broken_twin(monkeypatch, name, field):
    monkeypatch.setitem(PRESETS, name, PRESETS[name]._replace(**field))
    with pytest.raises(AssertionError, match="not close"):
        assert_parity(monkeypatch, name, 8, "eps")


# ---- order of convergence --------------------------------------------------------------------------------------------

TRUTH = torch.from_numpy(true_flow(log_snr_points(1)))[:, None]
ORDERS = {"ddim": 1, "dpmpp_2m": 2, "dpmpp_3m": 2, "dpmpp_3m_taylor": 3, "deis_2": 2, "deis_3": 3, "unipc_bh1": 3,
          "unipc_bh2": 3}


def measured_order(make_plan):
    errors = []
    for n_steps in (100, 200):
        points = log_snr_points(n_steps)
        found = solve(two_modes(), plan_step, points, NOISE, plan=make_plan(points))
        errors.append(float((found - TRUTH).abs().max()))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    order = measured_order(lambda points: preset_plan(name, points, lower_order_final=False))
    assert order == pytest.approx(ORDERS[name], abs=0.2)


def test_an_implicit_corrector_raises_the_order_and_a_wrong_one_does_not():
    def corrected_ddim(points, slope=0.0):
        plan = preset_plan("ddim", points, corrector="implicit")
        correction = Expansion(2, relaxation="linear", slope=slope)
        return replace(plan, decisions=(*(replace(d, correction=correction) for d in plan.decisions[:-1]),
                                        plan.decisions[-1]))

    assert measured_order(lambda points: preset_plan("ddim", points)) == pytest.approx(1, abs=0.1)
    # the last step is uncorrected: second order steps with one first-order step at the end, of error h^2
    assert measured_order(lambda points: corrected_ddim(points, 0.5)) == pytest.approx(2, abs=0.15)
    assert measured_order(corrected_ddim) == pytest.approx(2, abs=0.15)

    def halved(points):  # a factor that does not tend to 1 with h is no relaxation
        return corrected_ddim(points, -0.5 / (points[1].log_snr - points[0].log_snr))

    assert measured_order(halved) < 1.3


# ---- steps and plans -------------------------------------------------------------------------------------------------

def test_after_a_reset_of_the_history_it_is_ddim():
    points = log_snr_points(8)
    for name in PRESETS:
        plan = preset_plan(name, points)
        torch.testing.assert_close(solve(two_modes(), plan_step, points, NOISE, restarts=range(8), plan=plan),
                                   solve(two_modes(), ddim_step, points, NOISE), **CLOSE)


def test_every_decision_matters():
    """Each field of a decision, changed in one step of a plan, changes the answer."""
    points = log_snr_points(7)
    base = preset_plan("unipc_bh2_3", points)
    d = base.decisions[4]
    linear = replace(d.expansion, relaxation="linear", slope=0.1)
    changed = [replace(d, prediction="eps"), replace(d, start=1), replace(d, corrector="none"),
               replace(d, corrector="implicit"), replace(d, correction=Expansion(2)),
               replace(d, expansion=Expansion(2)), replace(d, expansion=Expansion(4)),
               replace(d, expansion=Expansion(3, (1, 2))),
               replace(d, expansion=Expansion(3, (2, 3))), replace(d, expansion=Expansion(3, second=0.9)),
               *(replace(d, expansion=replace(linear, relaxation=r)) for r in RELAXATIONS[1:])]
    answers = [solve(two_modes(), plan_step, points, NOISE, plan=p) for p in
               (base, *(replace(base, decisions=(*base.decisions[:4], c, *base.decisions[5:])) for c in changed))]
    for i, a in enumerate(answers):
        assert all(not torch.allclose(a, b, rtol=1e-9, atol=1e-9) for b in answers[:i]), i


def test_evaluations_are_counted():
    problem, calls = two_dim(has_labels=True), []

    def watch(name, network):
        return lambda *rows: calls.append(len(rows[0])) or network(*rows)

    points = grid(problem.schedule, 6, "log_snr")
    for kind in CORRECTORS:
        for name in ("ddim", "unipc_bh2"):
            plan = preset_plan(name, points, corrector=kind)
            calls.clear()
            list(run_plan(problem.wrapped(watch), Rng(0, 3), plan, guidance=2.0))
            assert plan.evaluations == nfe(6, kind) == sum(calls) / 6
            spent = run("usf", problem, n_samples=3, n_steps=6, preset=name, corrector=kind, spacing="log_snr")
            assert spent.cost.total_evaluations == 3 * plan.evaluations


def test_a_method_and_its_plan_are_the_same_bit_by_bit(tmp_path):
    problem = two_dim()
    points = grid(problem.schedule, 7, "karras")
    plan = preset_plan("unipc_bh2_3", points)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.to_json() == plan.to_json()
    answer = list(run_plan(problem, Rng(3, 5), loaded))[-1].state
    method = run("usf", problem, 3, 5, n_steps=7, spacing="karras", preset="unipc_bh2_3").answer
    assert torch.equal(answer, method)
    assert len((tmp_path / "plan.json").read_text()) < 4000


GOOD = Plan((1.0, 0.6, 0.3), (Decision(), Decision(expansion=Expansion(2)), Decision()), 0.01)


@pytest.mark.parametrize(("change", "message"), [
    ({"decisions": ()}, "zero steps"),
    ({"times": (1.0, 0.6)}, "expected 3"),
    ({"times": (1.0, 0.6, 0.7)}, "falling times, got 0.7 after 0.6"),
    ({"times": (1.0, 0.6, 0.005)}, "got 0.01 after 0.005"),
    ({"times": (1.0, 0.6, math.nan)}, "nan"),
    ({"decisions": (Decision(expansion=Expansion(2)), Decision(), Decision())}, "step 0: order 2 is above"),
    ({"decisions": (Decision(), Decision(start=2), Decision())}, "step 1: start 2"),
    ({"decisions": (Decision(), Decision(expansion=Expansion(2, (2,))), Decision())}, "step 1: points 2"),
    ({"decisions": (Decision(corrector="pseudo", correction=Expansion(3)), Decision(), Decision())}, "correction of"),
    ({"decisions": (Decision(), Decision(), Decision(corrector="pseudo"))}, "last step"),
    ({"end": None, "decisions": (Decision(), Decision(), Decision(expansion=Expansion(2)))}, "ends at the data"),
])
def test_bad_plans_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GOOD, **change)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Decision(prediction="v3"), "v3"), (lambda: Decision(prediction="v"), "prediction='v'"),
    (lambda: Expansion(0), "order=0"), (lambda: Decision(expansion=Expansion(5)), "order=5"),
    (lambda: Expansion(True), "order=True"), (lambda: Expansion(3, (1,)), r"points=\(1,\)"),
    (lambda: Expansion(3, (1, 1)), "derivative 2=1"), (lambda: Expansion(relaxation="bh3"), "bh3"),
    (lambda: Expansion(slope=math.inf), "slope=inf"), (lambda: Decision(start=-1), "start=-1"),
    (lambda: Decision(corrector="both"), "both"), (lambda: preset_plan("dpm", log_snr_points(3)), "preset='dpm'"),
    (lambda: GOOD.grid(DiscreteSchedule.linear(10)) and replace(GOOD, times=(99.0, 5.0, 1.0)).grid(
        DiscreteSchedule.linear(10)), "this schedule has 9 to 0"),
])
def test_bad_decisions_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda r: "{", "not JSON"), (lambda r: "[1]", "format 'list'"), (lambda r: json.dumps(r | {"format": "x"}), "'x'"),
    (lambda r: json.dumps(r | {"times": 3}), "times=3"), (lambda r: json.dumps(r | {"colour": 3}), "colour"),
    (lambda r: json.dumps(r | {"decisions": []}), "zero steps"),
    (lambda r: json.dumps(r | {"decisions": [7]}), r"decisions\[0\]: 7"),
    (lambda r: json.dumps(r | {"decisions": [r["decisions"][0] | {"expansion": {"order": 9}}]}), r"\[0\]: order=9"),
    (lambda r: json.dumps(r | {"decisions": [r["decisions"][0] | {"speed": 9}]}), r"\[0\]: .*speed"),
    (lambda r: json.dumps(r | {"times": ["1", 0.6, 0.3]}), "times='1'"),
])
def test_bad_files_are_refused_by_name(spoil, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(spoil(json.loads(GOOD.to_json())))


def test_no_signal_at_the_start_is_ddim_from_the_data_estimate():
    """From alpha 0 the log-SNR is infinite: the first step knows x0 alone, and the point is no help to later ones."""
    from workbench.problems.denoising import Point

    pure = Point(1.0, 0.0, 1.0)
    x0 = torch.full_like(NOISE, 0.3)
    there = log_snr_points(4)[2]
    now = Evaluated(pure, NOISE, x0, NOISE)
    for prediction in ("eps", "x0"):
        found = in_module.predicted((now,), there, Decision(prediction))
        torch.testing.assert_close(found, there.alpha * x0 + there.sigma * NOISE, **CLOSE)
        later = Evaluated(there, found, x0, NOISE)
        both = [in_module.predicted(h, log_snr_points(4)[3], Decision(prediction, Expansion(2)))
                for h in ((later, now), (later,))]
        assert torch.equal(*both)


def test_a_step_alone_is_one_of_march():
    problem, points = two_modes(), log_snr_points(1)
    owner = problem.models[-1]

    def denoise(x, at):
        return Evaluated(at, x, *owner.predict(x, at, problem.schedule, None, 1.0))

    step = Advance(denoise, *points, (), 1, lambda: NOISE, problem.schedule)
    x, now = usf_step(NOISE, step, decision=Decision())
    assert torch.equal(x, solve(problem, plan_step, points, NOISE, plan=preset_plan("ddim", points)))
    assert now.point == points[0] and inputs("usf", problem).knobs["preset"] == "dpmpp_2m"
    assert len(list(march(problem, Rng(0, 1), points, [owner], usf_step, guidance=1.0, decision=Decision()))) == 1
