"""The digits problem: real images, the Wiener filter, and a denoiser that memorises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from workbench import METHODS, run
from workbench.problems.denoising import ContinuousVP
from workbench.problems.digits import _images, digits, empirical_denoiser, empirical_flops, to_uint8

VP = ContinuousVP()


@pytest.fixture(scope="module")
def problem():
    return digits()


@pytest.fixture(scope="module")
def all_images():
    return torch.from_numpy(load_digits().images) / 8 - 1


def network(problem, name):
    return next(m.network for m in problem.models if m.name == name)


def noisy(problem, t, n=4):
    x0 = problem.data(n, 0)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return VP.at(t).alpha * x0 + VP.at(t).sigma * noise, torch.full((n,), t, dtype=torch.float64)


def test_data_are_held_out_images(problem, all_images):
    draws = problem.data(50, 0)
    assert draws.shape == (50, 8, 8) and draws.min() >= -1 and draws.max() <= 1
    every = all_images.flatten(1)
    assert all(bool((every == d).all(1).any()) for d in draws.flatten(1))
    quality = problem.judge(draws, None)
    # pinned: the mark that memorising is told by, 0.269 with a standard error of 0.003 over the 497 held-out images
    assert quality["nearest_training"].value == pytest.approx(0.269, abs=4 * quality["nearest_training"].stderr)


def test_wiener_is_the_linear_posterior_mean(problem, all_images):
    """m + alpha C (alpha^2 C + sigma^2 I)^-1 (x - alpha m), moments of the training images, by numpy's solve."""
    rows, held_out = (part.flatten(1).numpy() for part in _images())
    together = np.concatenate((rows, held_out))
    assert len(rows) == 1300 and sorted(map(tuple, together)) == sorted(map(tuple, all_images.flatten(1).numpy()))
    mean, cov = rows.mean(0), np.cov(rows.T)
    for t in (0.05, 0.5, 1.0):
        x, at = noisy(problem, t)
        alpha, sigma = VP.at(t).alpha, VP.at(t).sigma
        off = (x.flatten(1).numpy() - alpha * mean).T
        gain = alpha * cov @ np.linalg.solve(alpha**2 * cov + sigma**2 * np.eye(64), off)
        eps = network(problem, "wiener")(x, at, None)
        x0 = ((x - sigma * eps) / alpha).flatten(1).numpy()
        assert x0 == pytest.approx(mean + gain.T, abs=1e-8)


def test_empirical_is_the_softmax_over_images_by_loops():
    rows = torch.rand((7, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    x = torch.tensor([[0.3, -0.2, 0.9, 0.0]], dtype=torch.float64)
    for t in (0.02, 0.3, 0.9):
        alpha, sigma = VP.at(t).alpha, VP.at(t).sigma
        logs = np.array([-sum((float(a) - alpha * float(b)) ** 2 for a, b in zip(x[0], r, strict=True)) / (2 * sigma**2)
                         for r in rows])
        share = np.exp(logs - logs.max())
        truth = (share / share.sum()) @ rows.numpy()
        found = empirical_denoiser(rows, VP)(x.reshape(1, 2, 2), torch.tensor([t], dtype=torch.float64), None)
        assert found.flatten().numpy() == pytest.approx(truth, abs=1e-10)


def test_empirical_beats_wiener_on_training_data_and_memorises(problem):
    copies = run("ddim", problem, 0, 40, n_steps=50).quality["nearest_training"]
    assert copies.value < 1e-6  # every sample is a training image
    smooth = run("ddim", problem, 0, 40, n_steps=50, model="cheapest").quality["nearest_training"]
    assert smooth.value > 0.3  # further from the training images than held-out digits are: blurred, but no copy
    # cheap first does not help against memorising, for the last steps decide; costly first does
    cheap_first, costly_first = (
        run("t_stitch", problem, 0, 40, n_steps=50, fractions=(0.6,), order=order).quality["nearest_training"].value
        for order in ("cheap_first", "costly_first"))
    assert cheap_first < 1e-6 and costly_first > 0.1


def test_both_models_agree_at_full_noise(problem):
    """There both know only the mean of the data."""
    x, at = noisy(problem, 1.0)
    alpha, sigma = VP.at(1.0).alpha, VP.at(1.0).sigma
    wiener = (x - sigma * network(problem, "wiener")(x, at, None)) / alpha
    torch.testing.assert_close(wiener, network(problem, "empirical")(x, at, None), rtol=0, atol=0.1)
    assert (wiener - network(problem, "empirical")(*noisy(problem, 0.3), None)).abs().max() > 0.3


def test_images_are_grey_bytes(problem):
    state = torch.tensor([[[-1.0, 1.0], [0.0, 3.0]]])
    assert to_uint8(state).tolist() == [[[0, 255], [128, 255]]]
    pictures = problem.images(problem.data(3, 0))
    assert pictures.shape == (3, 8, 8) and pictures.dtype == torch.uint8


def test_the_problem_is_complete(problem):
    assert problem.digest == digits().digest and problem.labels(5) is None
    assert problem.flops["empirical"] == empirical_flops(1300, 64) > 10 * problem.flops["wiener"]
    for wanted, knobs in (problem.reference, problem.baseline):
        METHODS[wanted].check(knobs)
    space = {}
    exec(problem.source, space)
    assert space["problem"].digest == problem.digest
    assert {"energy_distance", "nearest_training"} == set(problem.judge(problem.data(20, 0), None))
