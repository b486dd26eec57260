"""Conditions on what is known: exact parts, Gaussian posteriors, class-conditional laws."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from toys import PLANE, VP_PREDICTIONS, plane

import workbench.methods.denoising.inverse as in_module
from workbench import run
from workbench.methods.denoising.inverse import (
    COLOURS,
    guided_by,
    known_grey,
    known_part,
    left_part,
    mixture_classifier,
    pictures,
)
from workbench.methods.denoising.score_sde import SDES, Condition, levels, pc_sample, sde_path
from workbench.problems.denoising import ContinuousVE, ContinuousVP, Denoiser, DiscreteSchedule
from workbench.problems.digits import digits
from workbench.problems.mixtures import Mixture
from workbench.rng import Rng

VP = ContinuousVP()
MEANS, COVARIANCE = [0.5, -0.3], [[0.5, 0.4], [0.4, 0.5]]


def steps(problem, n_samples, condition=None, seed=0, **knobs):
    return list(pc_sample(problem, Rng(seed, n_samples), condition=condition, **knobs))


def answer(*args, **knobs):
    return steps(*args, **knobs)[-1].state


# ---- inpainting ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sde", SDES)
def test_known_pixels_are_kept_exactly(sde):
    problem = digits()
    data, mask = problem.data(3, 0), torch.zeros(8, 8)
    mask[:, :4] = 1
    for knobs in ({}, {"n_corrections": 1}, {"predictor": "none", "n_corrections": 2}, {"denoise": False}):
        made = answer(problem, 3, known_part(data, mask), sde=sde, n_steps=5, sigma_max=20.0, **knobs)
        assert torch.equal(made[:, :, :4], data[:, :, :4]) and bool((made[:, :, 4:] != data[:, :, 4:]).any())
    free = answer(problem, 3, sde=sde, n_steps=5, sigma_max=20.0)
    assert not torch.equal(free[:, :, :4], data[:, :, :4])


def test_the_known_part_is_drawn_at_each_level_afresh():
    """After every update the known part is alpha y + sigma z: unlike from step to step, of that level's variance."""
    problem = plane(("exact", VP, "eps"), schedule=VP)
    data, mask = torch.full((2000, 2), 1.5, dtype=torch.float64), torch.tensor([1.0, 0.0])
    made = steps(problem, 2000, known_part(data, mask), n_steps=4)
    for step in made[:-1]:
        there, known = step.info["there"], step.state[:, 0]
        assert float(known.mean()) == pytest.approx(1.5 * there.alpha, abs=4 * there.sigma / math.sqrt(2000))
        assert float(known.std()) == pytest.approx(there.sigma, rel=4 / math.sqrt(4000))
    noise = [(s.state[:, 0] - 1.5 * s.info["there"].alpha) / s.info["there"].sigma for s in made[:-1]]
    assert abs(float((noise[0] * noise[1]).mean())) < 4 / math.sqrt(2000)


def chain_moments(known, n_steps):
    """Mean and variance of the unknown coordinate's answer: the sampler's recursion on moments, by 2 x 2 matrices.

    Reverse diffusion with the exact score of the Gaussian, the first coordinate drawn afresh at every level.
    """
    path = sde_path(Denoiser("m", lambda *rows: rows[0], VP), "vp", 1e-3)
    points = levels(path, n_steps)
    mean, cov = torch.tensor(MEANS, dtype=torch.float64), torch.tensor(COVARIANCE, dtype=torch.float64)
    m, v = 0.0, 1.0
    for here, there in pairwise(points):
        precision = torch.linalg.inv(here.alpha**2 * cov + here.sigma**2 * torch.eye(2, dtype=torch.float64))
        a = here.alpha / there.alpha
        g = here.sigma**2 - a**2 * there.sigma**2
        pull = g * float(precision[1, 1])
        cross = g * float(precision[1, 0])
        m = (2 - a - pull) * m + pull * here.alpha * float(mean[1]) - cross * here.alpha * (known - float(mean[0]))
        v = (2 - a - pull) ** 2 * v + cross**2 * here.sigma**2 + (g if there.sigma else 0.0)
    return m, v


def pairs(n_pairs):
    """A Gaussian of n_pairs independent pairs of coordinates (2, n_pairs), the first of each being known."""
    eye = torch.eye(n_pairs, dtype=torch.float64)
    covariance = torch.kron(torch.tensor(COVARIANCE, dtype=torch.float64), eye)
    means = torch.tensor(MEANS, dtype=torch.float64).repeat_interleave(n_pairs)
    law = Mixture(torch.ones(1, dtype=torch.float64), means[None], covariance[None])
    return plane(("exact", VP, "eps"), schedule=VP, law=law), law


def never_again(data, mask):
    """Broken twin: the known part is put in at the end only."""
    whole = known_part(data, mask).impose
    return Condition(impose=lambda x, at, noise: whole(x, at, noise) if at.sigma == 0 else x)


def assert_moments(make):
    """20 000 draws follow the recursion's own mean and variance within 4 standard errors."""
    problem, _ = pairs(20)
    mask = torch.cat((torch.ones(20), torch.zeros(20)))
    data = torch.full((1000, 40), 1.2, dtype=torch.float64)
    made = answer(problem, 1000, make(data, mask), n_steps=60)[:, 20:]
    mean, variance = chain_moments(1.2, 60)
    assert float(made.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 20_000))
    assert float(made.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / 20_000))


def test_inpainting_follows_its_own_moments():
    assert_moments(known_part)
    with pytest.raises(AssertionError):
        assert_moments(never_again)


def assert_posterior(**knobs):
    """N(m2 + c / v (y - m1), v - c^2 / v) of the unknown half: 4 standard errors of 4000 values, 4 % for Langevin."""
    problem, _ = pairs(20)
    (v, c), y = COVARIANCE[0], 1.2
    mean, variance = MEANS[1] + c / v * (y - MEANS[0]), v - c**2 / v
    mask, data = torch.cat((torch.ones(20), torch.zeros(20))), torch.full((200, 40), y, dtype=torch.float64)
    made = answer(problem, 200, known_part(data, mask), sde="ve", sigma_max=10.0, n_steps=60, **knobs)[:, 20:]
    assert float(made.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 4000) + 0.01)
    assert float(made.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / 4000) + 0.04)


def test_inpainting_a_gaussian_draws_its_posterior():
    """With many small corrections at each level; the predictor alone ends elsewhere, as its moments say."""
    assert_posterior(n_corrections=30, snr=0.06)
    with pytest.raises(AssertionError):
        assert_posterior()
    assert chain_moments(1.2, 5000)[0] == pytest.approx(0.0498, abs=1e-3)  # of .26


# ---- inpainting as a method ------------------------------------------------------------------------------------------

CORRECTED = {"sde": "ve", "sigma_max": 10.0, "n_steps": 60, "n_corrector": 10, "snr": 0.1}


def assert_joint_law(**knobs):
    """The known half follows the data's law, so right answers have its covariances: here of 2000 pairs."""
    problem, law = pairs(20)
    problem = replace(problem, data=law.sample, judge=lambda answer, labels: {})
    made = run("inpaint", problem, 0, 100, **(CORRECTED | knobs)).answer
    found = torch.cov(torch.stack((made[:, :20].flatten(), made[:, 20:].flatten())))
    torch.testing.assert_close(found, torch.tensor(COVARIANCE, dtype=torch.float64), rtol=0, atol=4 * 0.5 / 2000**0.5)
    assert made.reshape(-1, 2, 20).mean((0, 2)).tolist() == pytest.approx(MEANS, abs=4 * (0.5 / 2000) ** 0.5)


def test_inpainting_with_corrections_keeps_the_joint_law(monkeypatch):
    assert_joint_law()
    with pytest.raises(AssertionError):
        assert_joint_law(corrector="none")
    monkeypatch.setattr(in_module, "known_part", never_again)
    with pytest.raises(AssertionError):
        assert_joint_law()


def assert_is_the_sampler_with_its_condition(problem, given):
    """The method against `pc_sample` under `known_part`, both from the same streams."""
    knobs = {"sde": "ve", "n_steps": 4, "sigma_max": 20.0}
    made = run("inpaint", problem, 5, 3, known=0.4, **knobs).answer
    mask = torch.zeros(problem.shape)
    mask[..., : int(0.4 * problem.shape[-1])] = 1
    rng = Rng(5, 3)
    if problem.data is None:  # the free run comes first and takes its noise from the same streams
        *_, free = pc_sample(problem, rng, n_corrections=1, **knobs)
        assert torch.equal(free.state, given)
    *_, last = pc_sample(problem, rng, n_corrections=1, condition=known_part(given, mask), **knobs)
    assert torch.equal(made, last.state)


@pytest.mark.parametrize("has_data", [True, False])
def test_the_method_is_the_sampler_with_its_condition(has_data, monkeypatch):
    problem = digits() if has_data else replace(digits(), data=None)
    given = pictures(problem, Rng(5, 3))
    if given is None:
        given = answer(problem, 3, seed=5, n_corrections=1, sde="ve", n_steps=4, sigma_max=20.0)
    assert_is_the_sampler_with_its_condition(problem, given)
    monkeypatch.setattr(in_module, "left_part", lambda shape, known: 1 - left_part(shape, known))
    with pytest.raises(AssertionError):
        assert_is_the_sampler_with_its_condition(problem, given)


def test_the_given_pictures_are_each_samples_own():
    problem = digits()
    five = pictures(problem, Rng(3, 5))
    assert torch.equal(pictures(problem, Rng(3, 2, first=3)), five[3:])
    assert not torch.equal(pictures(problem, Rng(4, 5)), five)
    assert len({tuple(row.flatten().tolist()) for row in five}) == 5
    held_out = problem.data(2000, 0).flatten(1)
    assert all(bool((held_out == row).all(1).any()) for row in five.flatten(1))
    assert pictures(replace(problem, dtype=torch.float32), Rng(3, 5)).dtype == torch.float32
    assert pictures(replace(problem, data=None), Rng(3, 5)) is None


@pytest.mark.parametrize(("shape", "known", "columns"), [((8, 8), 0.5, 4), ((3, 6), 0.49, 2), ((10,), 0.3, 3),
                                                          ((1,), 0.5, 0), ((1,), 1.0, 1), ((2, 4, 6), 0.0, 0)])
def test_the_left_part(shape, known, columns):
    mask = left_part(shape, known)
    assert mask.shape == shape and bool(mask[..., :columns].all()) and not bool(mask[..., columns:].any())


def test_inpainting_costs_a_free_run_more_where_there_is_no_data():
    spent = [run("inpaint", problem, 0, 2, n_steps=5, n_corrector=2).cost.total_evaluations
             for problem in (digits(), replace(digits(), data=None))]
    assert spent == [2 * 5 * 3, 2 * 2 * 5 * 3]


# ---- colours ---------------------------------------------------------------------------------------------------------

def test_the_colour_basis_is_orthonormal():
    torch.testing.assert_close(COLOURS.T @ COLOURS, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(COLOURS[:, 0], torch.full((3,), 1 / math.sqrt(3), dtype=torch.float64))


def colour_problem():
    """Pictures (3, 2, 2) of two colours, each with noise."""
    means = torch.tensor([[0.8, 0.6, 0.1], [-0.5, 0.1, -0.2]], dtype=torch.float64)
    law = Mixture(torch.tensor([0.4, 0.6], dtype=torch.float64), means.repeat_interleave(4, 1),
                  0.09 * torch.eye(12, dtype=torch.float64).expand(2, 12, 12))
    network = law.network(VP)
    problem = plane(("exact", VP, "eps"), schedule=VP, law=law)
    return type(problem)(**{**vars(problem), "shape": (3, 2, 2), "models": (Denoiser("exact", network, VP),)}), means


@pytest.mark.parametrize("sde", SDES)
def test_grey_values_are_kept_and_colours_found(sde):
    problem, means = colour_problem()
    grey = means.mean(1).repeat(20)[:, None, None].expand(40, 2, 2)
    made, again = (answer(problem, 40, known_grey(g), sde=sde, n_steps=60, sigma_max=20.0)
                   for g in (grey, grey[:, None]))
    torch.testing.assert_close(made.mean(1), grey, rtol=1e-12, atol=1e-12)
    assert torch.equal(made, again)
    # the grey value tells which of the two colours it is, mostly: all but few are nearer to it
    off = (made.mean((2, 3))[:, None] - means).norm(dim=2)
    assert int((off.argmin(1) == torch.arange(40) % 2).sum()) >= 34


def test_colourisation_is_inpainting_in_rotated_colours():
    x, noise = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    grey, at = torch.randn(2, 2, 2, dtype=torch.float64), ContinuousVE().at(0.4)
    rotated = torch.einsum("bcij,cd->bdij", x, COLOURS)
    data = torch.zeros_like(x)
    data[:, 0] = math.sqrt(3) * grey
    mask = torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1)
    expected = torch.einsum("bdij,cd->bcij", known_part(data, mask).impose(rotated, at, lambda: noise), COLOURS)
    torch.testing.assert_close(known_grey(grey).impose(x, at, lambda: noise), expected)


# ---- classes ---------------------------------------------------------------------------------------------------------

GROUPS = ((0,), (1, 2))


def of_class(k, schedule=VP, prediction="eps"):
    """PLANE's problem where only class k of GROUPS is left, known exactly."""
    group = torch.tensor(GROUPS[k])
    weights = PLANE.weights[group] / PLANE.weights[group].sum()
    return plane(("exact", schedule, prediction), schedule=schedule,
                 law=Mixture(weights, PLANE.means[group], PLANE.covariances[group]))


def assert_class_conditional(condition_of, prediction="eps", schedule=VP, **knobs):
    """Bayes' rule: the classifier's gradient turns the score of all data into that of the class, so equal states."""
    everything = plane(("exact", schedule, prediction), schedule=schedule)
    for k in range(2):
        condition = condition_of(mixture_classifier(PLANE, GROUPS, torch.full((6,), k)))
        for sde in SDES:
            settings = {"sde": sde, "n_steps": 12, "sigma_max": 20.0, **knobs}
            torch.testing.assert_close(answer(everything, 6, condition, **settings),
                                       answer(of_class(k, schedule, prediction), 6, **settings), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
def test_the_exact_classifier_gives_the_class_conditional_law(prediction):
    assert_class_conditional(guided_by, prediction)
    assert_class_conditional(guided_by, prediction, n_corrections=1, length="sigma")


def test_guidance_serves_models_of_another_schedule():
    assert_class_conditional(guided_by, schedule=DiscreteSchedule.linear())


@pytest.mark.parametrize("weight", [-1.0, 0.5])
def test_class_conditioning_fails_for_a_broken_twin(weight):
    with pytest.raises(AssertionError):
        assert_class_conditional(lambda log_prob: guided_by(log_prob, weight))


def test_weight_zero_changes_nothing_and_estimates_follow_the_guidance():
    problem = plane(("exact", VP, "eps"), schedule=VP)
    classifier = mixture_classifier(PLANE, GROUPS, torch.zeros(4).long())
    torch.testing.assert_close(answer(problem, 4, guided_by(classifier, 0.0), n_steps=8), answer(problem, 4, n_steps=8))
    guided, plain = (steps(p, 4, c, n_steps=8)[3].info["x0"] for p, c in ((problem, guided_by(classifier)),
                                                                          (of_class(0), None)))
    torch.testing.assert_close(guided, plain, rtol=1e-6, atol=1e-6)


def test_both_kinds_of_condition_go_together():
    problem, data = plane(("exact", VP, "eps"), schedule=VP), torch.full((3, 2), 0.4, dtype=torch.float64)
    both = Condition(guided_by(mixture_classifier(PLANE, GROUPS, torch.ones(3).long())).gradient,
                     known_part(data, torch.tensor([1.0, 0.0])).impose)
    torch.testing.assert_close(answer(problem, 3, both, n_steps=8),
                               answer(of_class(1), 3, Condition(impose=both.impose), n_steps=8), rtol=1e-6, atol=1e-6)


def test_conditions_do_not_depend_on_the_batch():
    problem, data = digits(), digits().data(5, 0)
    mask = (torch.arange(64).reshape(8, 8) % 3 == 0).double()
    five = answer(problem, 5, known_part(data, mask), n_steps=5, n_corrections=1)
    torch.testing.assert_close(answer(problem, 2, known_part(data[:2], mask), n_steps=5, n_corrections=1), five[:2],
                               rtol=1e-9, atol=1e-9)


def test_bad_input_is_named():
    data = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"mask \(5,\): expected one that broadcasts to \(2, 3, 4, 4\)"):
        known_part(data, torch.ones(5))
    with pytest.raises(ValueError, match="mask: expected 1 where the data is known"):
        known_part(data, torch.full((4,), 0.5))
    with pytest.raises(ValueError, match=r"labels=\[2\]: expected numbers from 0 to 1"):
        mixture_classifier(PLANE, GROUPS, torch.tensor([2]))
    for shape in ((2, 1, 4, 4), (2, 3), (1, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"states .* and grey values \(2, 4, 4\)"):
            known_grey(torch.zeros(2, 4, 4)).impose(torch.zeros(shape), VP.at(0.5), lambda: torch.zeros(1))


def test_the_classifier_is_a_law():
    """Its probabilities sum to 1 at every level, and far out in a mode it is sure."""
    x = PLANE.sample(10, 0)
    for t in (1e-3, 0.3, 1.0):
        total = sum(mixture_classifier(PLANE, GROUPS, torch.full((10,), k))(x, VP.at(t)).exp() for k in range(2))
        torch.testing.assert_close(total, torch.ones_like(total))
    near = PLANE.means[:1]
    assert float(mixture_classifier(PLANE, GROUPS, torch.tensor([0]))(near, VP.at(1e-3)).exp()) > 0.95
