"""The probability-flow ODE against the exact flow, Gaussian closed forms and the mixtures' own densities."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from toys import PLANE, STARTS, From, gaussian, plane, solve, true_flow

import workbench.methods.denoising.flow_ode as in_module
from workbench import run
from workbench.methods.denoising.flow_ode import (
    decode,
    encode,
    flow_ode,
    flow_step,
    interpolate,
    log_likelihood,
    nfe,
)
from workbench.methods.denoising.score_sde import SDES, sde_path
from workbench.problems.denoising import ContinuousVP, DiscreteSchedule, prior_std
from workbench.problems.mixtures import two_dim, two_modes
from workbench.rng import Rng

MEAN, STD = 0.3, 0.5
FINE = ContinuousVP(cleanest=1e-5)


def even(n, last=1e-3):
    return [ContinuousVP().at(1 + (last - 1) * i / n) for i in range(n + 1)]


def no_middle(x, step, *, order):
    """Broken twin: the classical method with the weights of its two middle slopes taken at the start."""
    moved, now = flow_step(x, step, order=1)
    end, _ = flow_step(moved, step._replace(here=step.there, there=step.schedule.at(2 * step.there.t - step.here.t)),
                       order=1)
    return x + (5 * (moved - x) + (end - moved)) / 6, now


def assert_order(solver, order, expected, counts):
    """Order of convergence to the true flow down to t = 0.05, in the VP SDE's time."""
    noise, truth = torch.from_numpy(STARTS)[:, None], torch.from_numpy(true_flow(even(1, 0.05)))[:, None]
    errors = [float((solve(two_modes(), solver, even(n, 0.05), noise, order=order) - truth).abs().max())
              for n in counts]
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(expected, abs=0.2)


def test_orders_one_and_four():
    assert_order(flow_step, 1, 1, (200, 400))
    assert_order(flow_step, 4, 4, (100, 200))


def test_the_order_fails_for_a_broken_twin():
    with pytest.raises(AssertionError):
        assert_order(no_middle, 4, 4, (100, 200))


def flow_from(problem, noise, n_steps=20, **knobs):
    fixed = From(**vars(problem), noise=noise)
    return list(flow_ode.function(fixed, Rng(0, len(noise)), **flow_ode.check({"n_steps": n_steps, **knobs})))[-1].state


@pytest.mark.parametrize(("knobs", "error"), [({"solver": "rk45", "tolerance": 1e-6, "n_steps": 1}, 5e-5),
                                              ({"solver": "rk4", "n_steps": 400}, 5e-5)])
def test_the_end_is_the_true_flows(knobs, error):
    """The DDIM limit: DDIM and this ODE in time are two discretisations of one flow."""
    noise, truth = torch.from_numpy(STARTS)[::4, None], torch.from_numpy(true_flow(even(1)))[::4, None]
    assert float((flow_from(two_modes(), noise, **knobs) - truth).abs().max()) < error
    with pytest.raises(AssertionError):
        torch.testing.assert_close(flow_from(two_modes(), noise, solver="euler", n_steps=20), truth, rtol=0, atol=error)


@pytest.mark.parametrize("sde", SDES)
def test_marginals_of_a_gaussian(sde):
    """The flow of one Gaussian in closed form: deviations from the mean scale with the law's standard deviation."""
    problem = gaussian(MEAN, STD, ContinuousVP())
    path, noise = sde_path(problem.models[0], sde, 1e-3, 50.0), torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    first, last = (path.sde.at(t) for t in (path.first, path.last))
    scale = math.sqrt(((last.alpha * STD) ** 2 + last.sigma**2) / ((first.alpha * STD) ** 2 + first.sigma**2))
    noise = prior_std(first) * noise
    truth = last.alpha * MEAN + scale * (noise - first.alpha * MEAN)
    for knobs in ({"solver": "rk45", "tolerance": 1e-6, "n_steps": 1}, {"solver": "rk4", "n_steps": 300}):
        torch.testing.assert_close(flow_from(problem, noise, sde=sde, **knobs), truth, rtol=2e-5, atol=2e-5)
    assert float((flow_from(problem, noise, sde=sde, solver="euler", n_steps=10) - truth).abs().max()) > 1e-3


def test_every_schedules_model_gives_the_same_flow():
    problem = plane(("v", DiscreteSchedule.linear(), "v"), ("x0", ContinuousVP(), "x0"), ("eps", FINE, "eps"),
                    schedule=ContinuousVP())
    for sde in SDES:
        found = [flow_from(plane((m.name, m.schedule, m.prediction), schedule=m.schedule), problem.start(Rng(0, 3)),
                           sde=sde, n_steps=20, t_end=0.1, sigma_max=20.0) for m in problem.models[1:]]
        torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


def test_evaluations():
    problem = two_dim(has_labels=True)
    for solver, each in (("euler", 1), ("rk4", 4)):
        assert nfe(7, solver) == 7 * each
        assert run("flow_ode", problem, n_samples=2, n_steps=7, solver=solver).cost.total_evaluations == 14 * each
        assert run("flow_ode", problem, n_samples=2, n_steps=7, solver=solver,
                   guidance=2.0).cost.total_evaluations == 28 * each
    spent = [run("flow_ode", problem, n_samples=2, n_steps=n, solver="rk45", tolerance=tolerance).cost.total_evaluations
             for tolerance, n in ((1e-1, 1), (1e-3, 1), (1e-5, 1), (1e-1, 30))]
    assert spent[0] < spent[1] < spent[2] < 2 * 400 and spent[3] >= 2 * 30 * 7


def test_rk45_is_each_samples_own():
    problem = two_dim("pinwheel", has_labels=True)
    five = run("flow_ode", problem, 1, 5, solver="rk45", n_steps=3)
    for n in (1, 2):
        assert torch.equal(run("flow_ode", problem, 1, n, solver="rk45", n_steps=3).answer, five.answer[:n])
    steps = list(flow_ode.function(problem, Rng(1, 2), **flow_ode.check({"solver": "rk45", "n_steps": 3})))
    assert [s.info["there"].t for s in steps] == pytest.approx([0.667, 0.334, 0.001])
    expected, _ = problem.models[-1].predict(steps[0].state, steps[0].info["there"], problem.schedule,
                                             problem.labels(2), 1.0)
    torch.testing.assert_close(steps[1].info["x0"], expected)


def test_rk45_gives_up_by_name(monkeypatch):
    monkeypatch.setattr(in_module, "MAX_EVALUATIONS", 50)
    with pytest.raises(ValueError, match=r"tolerance=1e-06: sample 0 would need more than 50 evaluations"):
        run("flow_ode", two_modes(), n_samples=1, solver="rk45", tolerance=1e-6)


# ---- likelihoods -----------------------------------------------------------------------------------------------------

def log_normal(x, mean, std):
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)


def assert_likelihood(sde, **settings):
    """Of a Gaussian to 1e-4 nats: the density of its latent plus the log of the flow's stretching, both closed forms.

    For VP also its own log-density, from which this differs by the prior's mismatch and by the level t_end.
    """
    x, problem = torch.linspace(-1.2, 1.2, 5, dtype=torch.float64)[:, None], gaussian(0.0, STD, FINE)
    found = log_likelihood(problem, x, sde=sde, trace="exact", tolerance=1e-7, **settings)
    path = sde_path(problem.models[0], sde, 1e-5, settings.get("sigma_max", 50.0))
    first, last = (math.sqrt((p.alpha * STD) ** 2 + p.sigma**2) for p in map(path.sde.at, (path.first, path.last)))
    truth = log_normal(x[:, 0] * first / last, 0.0, prior_std(path.sde.at(path.first))) + math.log(first / last)
    torch.testing.assert_close(found.log_density, truth, rtol=0, atol=1e-5)
    if sde == "vp":
        torch.testing.assert_close(found.log_density, log_normal(x[:, 0], 0.0, STD), rtol=0, atol=1e-4)
    assert torch.equal(found.bits_per_dim, -found.log_density / math.log(2))


@pytest.mark.parametrize(("sde", "settings"), [("vp", {}), ("sub_vp", {}), ("ve", {"sigma_max": 150.0})])
def test_likelihood_of_a_gaussian(sde, settings):
    assert_likelihood(sde, **settings)


def test_the_likelihood_fails_for_a_broken_twin(monkeypatch):
    right = in_module._Adaptive._divergence
    monkeypatch.setattr(in_module._Adaptive, "_divergence", lambda *asked: 0.99 * right(*asked))
    with pytest.raises(AssertionError):
        assert_likelihood("vp")


def test_likelihood_of_a_mixture_in_the_plane():
    """The exact trace against the mixture's own density, to the prior's mismatch of .0066 times a mean."""
    problem, x = plane(("exact", FINE, "eps"), schedule=FINE), PLANE.sample(6, 0)
    law = torch.distributions.MultivariateNormal(PLANE.means, PLANE.covariances)
    truth = (law.log_prob(x[:, None]) + PLANE.weights.log()).logsumexp(1)
    found = log_likelihood(problem, x, trace="exact", tolerance=1e-6)
    torch.testing.assert_close(found.log_density, truth, rtol=0, atol=0.02)
    assert bool((found.evaluations > 50).all()) and found.latent.shape == x.shape


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(probe):
    """60 probes at one point: their mean is the exact value within 4 standard errors."""
    problem, x = plane(("exact", FINE, "eps"), schedule=FINE), PLANE.sample(1, 3)
    exact = log_likelihood(problem, x, trace="exact", tolerance=1e-4).log_density
    found = log_likelihood(problem, x.expand(60, -1), probe=probe, tolerance=1e-4, seed=5).log_density
    error = float(found.std()) / math.sqrt(60)
    assert 0 < error < 0.5 and float(found.mean()) == pytest.approx(float(exact), abs=4 * error + 1e-3)


def test_signs_give_the_trace_itself_where_the_jacobian_is_diagonal():
    problem, x = gaussian(0.0, STD, FINE), torch.tensor([[0.4], [-0.2]], dtype=torch.float64)
    settings = {"tolerance": 1e-6}
    exact, signs, normal = (log_likelihood(problem, x, **kind, **settings).log_density for kind in (
        {"trace": "exact"}, {"probe": "rademacher"}, {"probe": "gaussian"}))
    torch.testing.assert_close(signs, exact, rtol=0, atol=1e-9)
    assert (normal - exact).abs().max() > 0.05


def test_probes_are_each_samples_own_and_fixed_by_the_seed():
    problem, x = plane(("exact", FINE, "eps"), schedule=FINE), PLANE.sample(3, 1)
    three, again, one, other = (log_likelihood(problem, x[:n], seed=seed, tolerance=1e-2, probe="gaussian").log_density
                                for n, seed in ((3, 0), (3, 0), (1, 0), (3, 1)))
    assert torch.equal(three, again) and torch.equal(three[:1], one) and not torch.equal(three, other)


def test_bits_per_dimension_count_from_the_datas_own_levels():
    x = torch.zeros((1, 1), dtype=torch.float64)
    plain, signed, unit, coarse = (log_likelihood(gaussian(0.0, STD, FINE), x, tolerance=1e-2, **given).bits_per_dim
                                   for given in ({}, {"data_range": (-1, 1)}, {"data_range": (0, 1)},
                                                 {"data_range": (0, 16), "levels": 16}))
    assert [float(b - plain) for b in (signed, unit, coarse)] == pytest.approx([7, 8, 0])


# ---- latents ---------------------------------------------------------------------------------------------------------

def test_there_and_back_again():
    for sde in SDES:
        problem, x = two_dim("pinwheel"), two_dim("pinwheel").data(3, 0)
        latent = encode(problem, x, sde=sde, tolerance=1e-9)
        torch.testing.assert_close(decode(problem, latent, sde=sde, tolerance=1e-9), x, rtol=0, atol=1e-6)
        assert (decode(problem, latent, sde=sde, tolerance=1e-2) - x).abs().max() > 1e-6
        spread = float(latent.std())
        path = sde_path(problem.models[-1], sde, 1e-5)
        assert spread == pytest.approx(prior_std(path.sde.at(path.first)), rel=0.8)


def test_a_latent_is_the_closed_forms():
    problem, x = gaussian(MEAN, STD, FINE), torch.tensor([[0.1], [0.9]], dtype=torch.float64)
    first, last = FINE.at(1.0), FINE.at(1e-5)
    scale = math.sqrt(((first.alpha * STD) ** 2 + first.sigma**2) / ((last.alpha * STD) ** 2 + last.sigma**2))
    truth = first.alpha * MEAN + scale * (x - last.alpha * MEAN)
    torch.testing.assert_close(encode(problem, x, tolerance=1e-8), truth, rtol=1e-6, atol=1e-6)


def test_labels_and_guidance_reach_the_flow():
    problem = two_dim(has_labels=True)
    x = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    latents = [encode(problem, x, labels=torch.tensor([k]), guidance=w, tolerance=1e-4)
               for k, w in ((0, 1.0), (1, 1.0), (0, 3.0))]
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise([*latents, latents[0]]))
    torch.testing.assert_close(encode(problem, x, tolerance=1e-4), latents[0])


def test_interpolation_is_along_the_great_circle():
    a, b = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 3.0], [2.0, 2.0]])
    path = interpolate(a, b, 5)
    assert path.shape == (5, 2, 2) and torch.equal(path[0], a) and torch.equal(path[-1], b)
    torch.testing.assert_close(path[:, 0].norm(dim=1), torch.full((5,), 3.0))
    angles = torch.atan2(path[:, 0, 1], path[:, 0, 0])
    torch.testing.assert_close(angles, torch.linspace(0, math.pi / 2, 5))
    torch.testing.assert_close(path[2, 1], torch.tensor([1.5, 1.5]))  # parallel: the straight line
    straight = torch.lerp(a[0], b[0], 0.5)
    assert float((straight - path[2, 0]).norm()) > 0.5


def test_bad_input_is_named():
    problem, x = two_modes(), torch.zeros((2, 1), dtype=torch.float64)
    for given, words in (({"trace": "full"}, "trace='full'.*exact"), ({"probe": "cauchy"}, "probe='cauchy'.*gaussian"),
                         ({"data_range": (1, -1)}, "data_range=.*low < high"), ({"levels": 1}, "levels=1"),
                         ({"tolerance": 0.0}, "tolerance=0.0"), ({"t_end": 2.0}, "t_end=2.0"),
                         ({"sigma_max": 0.5}, "sigma_max=0.5"), ({"sde": "edm"}, "sde='edm'"),
                         ({"labels": torch.zeros(3)}, "labels.*2 states")):
        with pytest.raises(ValueError, match=words):
            log_likelihood(problem, x, **given)
    with pytest.raises(TypeError, match="tolerence"):
        encode(problem, x, tolerence=1e-3)
    for wrong in (torch.zeros(2, 2), torch.zeros(1), torch.zeros(0, 1)):
        with pytest.raises(ValueError, match=r"states .*: expected \(B, 1\)"):
            encode(problem, wrong)
    with pytest.raises(ValueError, match=r"trace='exact': states have 300 entries, expected at most 256"):
        log_likelihood(plane(("m", FINE, "eps"), schedule=FINE, law=wide(300)), torch.zeros(1, 300), trace="exact")
    for a, b, n in ((x, x, 1), (x, x[:1], 3), (x[:, 0], x[:, 0], 3)):
        with pytest.raises(ValueError, match="expected n of 2 or more"):
            interpolate(a, b, n)


def wide(size):
    from workbench.problems.mixtures import Mixture

    return Mixture(torch.ones(1, dtype=torch.float64), torch.zeros((1, size), dtype=torch.float64),
                   torch.eye(size, dtype=torch.float64)[None])
