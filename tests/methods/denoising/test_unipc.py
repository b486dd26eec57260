"""UniPC against diffusers, its orders, and identities with the DPM-Solver family."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from doubles import NAMES, theirs
from toys import STARTS, log_snr_points, plane, solve, true_flow

from workbench import get, run
from workbench.methods.denoising import unipc as module
from workbench.methods.denoising._dpm import multistep_step, phi
from workbench.methods.denoising._march import Advance, Evaluated
from workbench.methods.denoising.ddim import ddim_step
from workbench.methods.denoising.unipc import coefficients, unipc_step, weights
from workbench.problems.denoising import DiscreteSchedule, grid
from workbench.problems.mixtures import two_modes
from workbench.rng import Rng

NOISE = torch.from_numpy(STARTS)[:, None]
VARIANTS = ("bh1", "bh2")


def assert_parity(monkeypatch, n_steps, spacing="trailing", network="eps", final="zero", **knobs):
    scheduler = UniPCMultistepScheduler(
        solver_order=knobs["order"], solver_type=knobs["variant"], predict_x0=knobs["prediction"] == "x0",
        lower_order_final=knobs["lower_order_final"], prediction_type=NAMES[network],
        disable_corrector=[] if knobs.get("corrector", True) else list(range(n_steps)))
    schedule = DiscreteSchedule(tuple(scheduler.alphas_cumprod.tolist()))
    problem = plane(("exact", schedule, network), schedule=schedule)
    spec = get("unipc")
    given = spec.check({"n_steps": n_steps, "spacing": spacing, "final": final, **knobs})
    ours = list(spec.function(problem, Rng(0, 6), **given))[-1].state
    other = theirs(monkeypatch, scheduler, problem, grid(schedule, n_steps, spacing, final))
    torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("prediction", "variant", "order", "lower"),
                         product(("x0", "eps"), VARIANTS, (1, 2, 3, 4), (True, False)))
def test_parity_with_diffusers(monkeypatch, prediction, variant, order, lower):
    for n_steps, corrector in product((2, 5, 12), (True, False)):
        assert_parity(monkeypatch, n_steps, final="cleanest", prediction=prediction, variant=variant, order=order,
                      lower_order_final=lower, corrector=corrector)
    if prediction == "x0" and variant == "bh2" and lower:  # diffusers has no limit for the others
        assert_parity(monkeypatch, 9, prediction=prediction, variant=variant, order=order, lower_order_final=lower)


@pytest.mark.parametrize("network", ["x0", "v"])
def test_parity_on_other_networks_and_grids(monkeypatch, network):
    for spacing in ("leading", "linspace"):
        assert_parity(monkeypatch, 10, spacing, network, prediction="x0", variant="bh2", order=3,
                      lower_order_final=True)


@pytest.fixture
def no_memo():
    """For tests that break the coefficients: weights found before and during them are forgotten."""
    weights.cache_clear()
    yield
    weights.cache_clear()


def test_parity_fails_for_broken_twins(monkeypatch, no_memo):
    check = partial(assert_parity, monkeypatch, 12, final="cleanest", prediction="x0", order=3, lower_order_final=True)
    with monkeypatch.context() as broken, pytest.raises(AssertionError, match="not close"):
        broken.setattr(module, "phi", lambda k, z: phi(k, z) * (1 if k < 3 else 1.01))
        weights.cache_clear()
        check(variant="bh2")
    weights.cache_clear()
    with monkeypatch.context() as broken, pytest.raises(AssertionError, match="not close"):
        broken.setattr(module, "coefficients", lambda r, g, variant: coefficients(r, g, "bh1"))
        check(variant="bh2")
    weights.cache_clear()

    def again(x, step, **knobs):  # evaluates the corrected state anew
        _, now = unipc_step(x, step, **knobs)
        return unipc_step(now.x, step, **knobs | {"corrector": False})

    with monkeypatch.context() as broken, pytest.raises(AssertionError, match="not close"):
        broken.setattr(module, "unipc_step", again)
        check(variant="bh2")


def errors(step, counts=(160, 320)):
    truth = torch.from_numpy(true_flow(log_snr_points(1)))[:, None]
    return [float((solve(two_modes(), step, log_snr_points(n), NOISE) - truth).abs().max()) for n in counts]


def seeded_errors(step, order, counts):
    """The first steps exact, with the model's values there as history."""
    problem, truth = two_modes(), torch.from_numpy(true_flow(log_snr_points(1)))[:, None]

    def ask(x, at):
        return Evaluated(at, x, *problem.models[-1].predict(x, at, problem.schedule, None, 1.0))

    found = []
    for n in counts:
        points = log_snr_points(n)
        exact = [NOISE] + [torch.from_numpy(true_flow([points[0], p]))[:, None] for p in points[1 : order + 1]]
        past = tuple(ask(x, p) for x, p in zip(exact[-2::-1], points[order - 1 :: -1], strict=True))
        x = exact[-1]
        for i in range(order, n):
            x, now = step(x, Advance(ask, points[i], points[i + 1], past, n - i, lambda: NOISE, problem.schedule))
            past = (now, *past[:3])
        found.append(float((x - truth).abs().max()))
    return found


def assert_order(found, order):
    assert math.log2(found[-2] / found[-1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("prediction", "variant"), product(("x0", "eps"), VARIANTS))
def test_the_corrector_adds_an_order(prediction, variant):
    for order, corrector in product((1, 2), (False, True)):
        step = partial(unipc_step, order=order, prediction=prediction, variant=variant, corrector=corrector,
                       lower_order_final=False)
        assert_order(errors(step), order + corrector)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_third_order_and_its_corrector(prediction):
    """From an exact history: the usual start, of lower order, leaves an error of its own."""
    for corrector in (False, True):
        step = partial(unipc_step, order=3, prediction=prediction, corrector=corrector, lower_order_final=False)
        assert_order(seeded_errors(step, 3, (640, 1280) if corrector else (320, 640)), 3 + corrector)


def test_order_check_fails_for_a_broken_twin(monkeypatch, no_memo):
    monkeypatch.setattr(module, "coefficients", lambda *a: tuple(1.05 * c for c in coefficients(*a)))
    with pytest.raises(AssertionError):
        assert_order(errors(partial(unipc_step, lower_order_final=False)), 3)


def test_predictors_are_the_multistep_solvers():
    """UniP-1 is DDIM, UniP-2 with B2 is DPM-Solver++(2M), UniP-3 is its third-order form with Taylor's weights."""
    points = log_snr_points(12)
    for prediction in ("x0", "eps"):
        def found(step, prediction=prediction, **knobs):
            return solve(two_modes(), step, points, NOISE, prediction=prediction, **knobs)

        predictor = partial(found, unipc_step, corrector=False)
        for order, correction in ((2, "midpoint"), (1, "taylor")):
            wanted = found(multistep_step, order=order, correction=correction)
            torch.testing.assert_close(predictor(order=order), wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(predictor(order=1), solve(two_modes(), ddim_step, points, NOISE), rtol=1e-10,
                                   atol=1e-10)
        # the same from a start of their own: there UniP-3 warms up with 1/2, Taylor's form with its own weight
        late = [errors(partial(s, prediction=prediction, order=3, lower_order_final=False, **k), (320,))[0]
                for s, k in ((unipc_step, {"corrector": False}), (multistep_step, {"correction": "taylor"}))]
        assert late[0] == pytest.approx(late[1], rel=0.01)


@pytest.mark.parametrize("g", [-3.0, -0.7, 0.2, 2.0])
def test_coefficients_integrate_polynomials_exactly(g):
    """B sum a_m D_m / r_m is the integral of g e^(g (1 - u)) D(u) over the step, D a polynomial without a constant."""
    u = torch.linspace(0, 1, 20001, dtype=torch.float64)
    offsets = (-0.8, -2.1, 1.0)
    for variant in VARIANTS:
        found = coefficients(offsets, g, variant)
        for power in (1, 2, 3):
            wanted = float(torch.trapezoid(g * torch.exp(g * (1 - u)) * u**power, u))
            assert sum(a * r**power / r for a, r in zip(found, offsets, strict=True)) == pytest.approx(wanted, abs=1e-7)
    assert sum(a * r**4 / r for a, r in zip(found, offsets, strict=True)) != pytest.approx(
        float(torch.trapezoid(g * torch.exp(g * (1 - u)) * u**4, u)), abs=1e-3)


def test_correction_costs_nothing():
    for corrector in (True, False):
        cost = run("unipc", two_modes(), n_samples=2, n_steps=9, corrector=corrector).cost
        assert cost.evaluations["exact"] == 18
