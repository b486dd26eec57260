"""The closed-form denoisers against integration, automatic differentiation, samples and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from toys import PLANE, VP_PREDICTIONS

from workbench import METHODS, METRICS, run
from workbench.problems.denoising import CLEAN, ContinuousVP, DiscreteSchedule, RectifiedFlow
from workbench.problems.mixtures import (
    KINDS,
    Mixture,
    eight_modes,
    gaussian_mixture_denoiser,
    levels,
    mixture_flops,
    two_dim,
    two_modes,
)

VP = ContinuousVP()
TOYS = {"two_modes": two_modes, "eight_modes": eight_modes, "ring": two_dim, "pinwheel": lambda: two_dim("pinwheel"),
        "labelled": lambda: two_dim(has_labels=True)}


def times(*t):
    return torch.tensor(t, dtype=torch.float64)


def posterior_mean(x, t):
    """E[x0 | x_t = x] of the eight modes by numerical integration over x0."""
    alpha, sigma = VP.at(t).alpha, VP.at(t).sigma
    grid = np.linspace(-3, 3, 20_001)
    prior = sum(stats.norm.pdf(grid, s * m, 0.08) for s in (-1, 1) for m in (0.6, 1.1, 1.6, 2.1))
    weight = prior * np.exp(-0.5 * ((x - alpha * grid) / sigma) ** 2)
    return integrate.trapezoid(weight * grid, grid) / integrate.trapezoid(weight, grid)


def check_posterior_mean(network):
    for t in (0.02, 0.2, 0.6, 1.0):
        for x in (-1.3, 0.05, 0.9):
            found = float(network(times(x)[:, None], times(t), None))
            assert found == pytest.approx(posterior_mean(x, t), rel=1e-6, abs=1e-6)


def law_of(name):
    problem = TOYS[name]()
    return problem, problem.models[-1].network


def eight():
    return Mixture.of([1 / 8] * 8, [s * m for s in (-1, 1) for m in (0.6, 1.1, 1.6, 2.1)], [0.08**2] * 8)


def test_the_denoiser_is_the_posterior_mean():
    check_posterior_mean(eight().network(VP, "x0"))


@pytest.mark.parametrize("broken", [
    eight().network(ContinuousVP(beta_max=19.0), "x0"), eight().network(VP, "eps"),
    Mixture.of([1 / 8] * 8, eight().means, [0.09**2] * 8).network(VP, "x0"),
], ids=["schedule", "prediction", "variance"])
def test_posterior_check_fails_for_a_broken_twin(broken):
    with pytest.raises(AssertionError):
        check_posterior_mean(broken)


def test_eps_is_minus_sigma_times_the_score():
    """The gradient of the log-density of the noisy law, by automatic differentiation of torch's own mixture."""
    start = torch.randn((6, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (0.05, 0.4, 0.9):
        point, x = VP.at(t), start.clone().requires_grad_()
        noisy = point.alpha**2 * PLANE.covariances + point.sigma**2 * torch.eye(2, dtype=torch.float64)
        law = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(PLANE.weights),
            torch.distributions.MultivariateNormal(point.alpha * PLANE.means, noisy))
        [score] = torch.autograd.grad(law.log_prob(x).sum(), x)
        eps = PLANE.network(VP)(x.detach(), times(*[t] * 6), None)
        torch.testing.assert_close(eps, -point.sigma * score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [VP, DiscreteSchedule.linear(), DiscreteSchedule.cosine()],
                         ids=["vp", "linear", "cosine"])
def test_the_three_predictions_say_the_same(schedule):
    ends = schedule.times(1, "trailing")[0], schedule.cleanest
    t = times(*[ends[0] + (ends[1] - ends[0]) * k / 9 for k in range(10)])
    x = torch.randn((10, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps, x0, v = (PLANE.network(schedule, p)(x, t, None) for p in VP_PREDICTIONS)
    alpha, sigma = (level[:, None] for level in levels(schedule, t))
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(alpha * eps - sigma * x0, v, rtol=1e-10, atol=1e-10)


def test_the_flows_velocity_is_noise_less_data():
    """At t = 1 too, where the state is noise alone."""
    flow, t = RectifiedFlow(), times(*[1 - k / 10 for k in range(10)])
    x = torch.randn((10, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps, x0, velocity = (PLANE.network(flow, p)(x, t, None) for p in ("eps", "x0", "flow"))
    torch.testing.assert_close(eps - x0, velocity, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x0[0], PLANE.weights @ PLANE.means, rtol=1e-12, atol=1e-12)  # nothing is known there


@pytest.mark.parametrize("name", TOYS)
def test_finite_and_sensible_far_out_and_at_every_level(name):
    problem, network = law_of(name)
    labels = problem.labels(4)
    for t in (1.0, 0.5, 1e-3, 1e-6):
        for reach in (0.0, 3.0, 1e3):
            x = torch.full((4, *problem.shape), reach, dtype=torch.float64)
            eps = network(x, times(*[t] * 4), labels)
            assert bool(torch.isfinite(eps).all())
    # at full noise the state is nearly all noise; at none the data estimate is the data
    data = problem.data(4, 0)
    if labels is None:
        point = VP.at(1e-6)
        x0 = (point.alpha * data - point.sigma * network(point.alpha * data, times(*[1e-6] * 4), None)) / point.alpha
        torch.testing.assert_close(x0, data, rtol=0, atol=1e-3)
        x = torch.linspace(-2, 2, 4, dtype=torch.float64)[:, None].expand(4, *problem.shape)
        torch.testing.assert_close(network(x, times(*[1.0] * 4), None), x, rtol=0, atol=0.05)


def test_rows_are_independent_and_may_have_times_of_their_own():
    x = torch.randn((6, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = times(0.9, 0.1, 0.5, 0.1, 0.9, 0.01)
    together = PLANE.network(VP)(x, t, None)
    for i in range(6):
        torch.testing.assert_close(PLANE.network(VP)(x[i : i + 1], t[i : i + 1], None), together[i : i + 1],
                                   rtol=1e-12, atol=1e-12)


def test_singular_covariances_and_any_shape():
    flat = Mixture.of([1.0], [[0.5, -0.5, 0.0, 0.0]], [[[1.0, 0, 0, 0], [0] * 4, [0] * 4, [0] * 4]])
    x = torch.ones((3, 2, 2), dtype=torch.float32)
    out = flat.network(VP, "x0")(x, torch.full((3,), 0.3), None)
    assert out.shape == (3, 2, 2) and out.dtype == torch.float32
    torch.testing.assert_close(out.flatten(1)[:, 1:], torch.tensor([-0.5, 0.0, 0.0]).expand(3, 3))


def test_labels_pick_components():
    weights = torch.tensor([[1.0, 0, 0], [0, 0.4, 0.6], [0.3, 0.5, 0.2]])
    network = gaussian_mixture_denoiser(weights, PLANE.means, PLANE.covariances, VP)
    x, t = torch.zeros((3, 2), dtype=torch.float64), times(0.3, 0.3, 0.3)
    by_label = network(x, t, torch.tensor([0, 1, 2]))
    for label in range(3):
        w = weights[label].double()
        alone = gaussian_mixture_denoiser(w[w > 0], PLANE.means[w > 0], PLANE.covariances[w > 0], VP)
        torch.testing.assert_close(by_label[label : label + 1], alone(x[:1], t[:1], None), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="need one per row"):
        network(x, t, None)
    with pytest.raises(ValueError, match="need none"):
        PLANE.network(VP)(x, t, torch.tensor([0, 1, 2]))


def test_merging_keeps_mean_and_covariance():
    problem = two_dim("pinwheel")
    exact = problem.data(200_000, 1)
    whole = PLANE.merged([range(3)])
    draws = PLANE.sample(200_000, 0)
    torch.testing.assert_close(whole.means[0], draws.mean(0), rtol=0, atol=0.01)  # 4 standard errors: 4 / sqrt(2e5)
    torch.testing.assert_close(whole.covariances[0], torch.cov(draws.T), rtol=0, atol=0.015)
    parts = PLANE.merged([[0, 2], [1]])
    torch.testing.assert_close(parts.merged([range(2)]).covariances, whole.covariances, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.weights, times(0.5, 0.5))
    assert exact.shape == (200_000, 2)


def test_moments_of_the_cheap_eight_mode_model_by_hand():
    """Halves of mean 1.35; variance .75^2/2 + .25^2/2 between the modes and .08^2 within."""
    halves = eight().merged((range(4), range(4, 8)))
    assert halves.means.flatten().tolist() == pytest.approx([-1.35, 1.35])
    assert halves.covariances.flatten().tolist() == pytest.approx([(0.75**2 + 0.25**2) / 2 + 0.08**2] * 2)


def test_quantiles_are_exact():
    q = eight().quantiles(1000)[:, 0].numpy()
    below = np.mean([stats.norm.cdf(q, s * m, 0.08) for s in (-1, 1) for m in (0.6, 1.1, 1.6, 2.1)], axis=0)
    assert below == pytest.approx((np.arange(1000) + 0.5) / 1000, abs=1e-9)
    assert np.abs(q + q[::-1]).max() < 1e-9  # the law is symmetric


@pytest.mark.parametrize("name", TOYS)
def test_data_follows_the_law_that_the_judge_compares_with(name):
    """The judge's figure for true data is within noise of 0, and the cheapest model alone is worse than the best."""
    problem = TOYS[name]()
    metric = next(iter(problem.judge(problem.data(400, 3), None)))
    n = 2 * METRICS[metric].min_n
    figure = problem.judge(problem.data(n, 3), None)[metric]
    assert figure.n == n
    if metric == "energy_distance":  # whose square is what scatters about 0
        assert figure.value**2 < 4 * ((figure.value + figure.stderr) ** 2 - figure.value**2)
    else:
        assert figure.value < 4 * figure.stderr
    assert torch.equal(problem.data(5, 3), problem.data(5, 3))
    assert not torch.equal(problem.data(5, 3), problem.data(5, 4))
    best, cheap = (run("ddim", problem, 0, n, n_steps=30, model=m).quality[metric] for m in ("best", "cheapest"))
    assert best.value + best.stderr < cheap.value


@pytest.mark.parametrize("name", TOYS)
def test_a_problem_is_complete(name):
    problem = TOYS[name]()
    assert problem.digest == TOYS[name]().digest and len(problem.digest) == 16
    assert list(problem.flops) == [m.name for m in problem.models]
    assert list(problem.flops.values()) == sorted(problem.flops.values()) and min(problem.flops.values()) > 0
    for wanted, knobs in (problem.reference, problem.baseline):
        METHODS[wanted].check(knobs)
    assert problem.data(3, 0).shape == (3, *problem.shape) and problem.data(3, 0).dtype == problem.dtype
    METHODS["t_stitch"].check(problem.preset)
    space = {}
    exec(problem.source, space)
    assert space["problem"].digest == problem.digest
    labels = problem.labels(7)
    assert labels is None or torch.equal(problem.labels(3), labels[:3])


def test_digests_tell_problems_apart():
    made = [make() for make in TOYS.values()]
    made += [two_modes(DiscreteSchedule.linear()), two_modes(ContinuousVP(beta_max=19))]
    assert len({p.digest for p in made}) == len(made)
    # stored runs hang on them
    assert [two_modes().digest, eight_modes().digest] == ["3bfd2a09fc77cb45", "5745102339dde1d3"]


def test_flops_are_those_of_the_matrix_products_and_more():
    """torch counts the products alone, 4 K D^2; the formula's own terms beside them are 14 K D + 6 K."""
    for k, d in ((1, 64), (3, 2), (8, 1)):
        assert mixture_flops(k, d) == 4 * k * d * d + 14 * k * d + 6 * k


@pytest.mark.parametrize("wrong", [
    ([0.5, 0.6], [0, 1], [1, 1]), ([1.5, -0.5], [0, 1], [1, 1]), ([1.0], [[0, 0]], [[[1]]])])
def test_mixtures_that_are_none_are_errors(wrong):
    with pytest.raises(ValueError, match="expected"):
        Mixture.of(*wrong)


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match=f"'spiral'.*{KINDS[0]}"):
        two_dim("spiral")
    with pytest.raises(ValueError, match="'score'"):
        PLANE.network(VP, "score")
    assert CLEAN.sigma == 0 and math.isinf(CLEAN.log_snr)
