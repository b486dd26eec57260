"""Adaptive DPM-Solver: the error follows the tolerance, an independent one-sample run, each sample on its own."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from toys import STARTS, From, log_snr_points, plane, solve, true_flow

from workbench import get, run
from workbench.methods.denoising import dpm_solver_adaptive as module
from workbench.methods.denoising._dpm import singlestep_step
from workbench.methods.denoising.ddim import ddim_step
from workbench.methods.denoising.dpm_solver_adaptive import nfe
from workbench.problems.denoising import ContinuousVP, DiscreteSchedule, Point, grid
from workbench.problems.mixtures import two_dim, two_modes

NOISE = torch.from_numpy(STARTS)[:, None]


def started(problem, noise):
    return From(**{f.name: getattr(problem, f.name) for f in fields(problem)}, noise=noise)


def to_the_cleanest(noise=NOISE, **knobs):
    return run("dpm_solver_adaptive", started(two_modes(), noise), n_samples=len(noise), final="cleanest",
               **{"n_steps": 1000} | knobs)


TOLERANCES = (1e-2, 1e-3, 1e-4)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("order", [2, 3])
def test_error_falls_and_evaluations_rise_with_the_tolerance(order, prediction):
    truth = torch.from_numpy(true_flow(log_snr_points(1)))[:, None]
    runs = [to_the_cleanest(order=order, prediction=prediction, atol=tol, rtol=tol) for tol in TOLERANCES]
    # the middle sample's: where the two orders agree by chance, a step is too long, and on a line some do
    errors = [float((r.answer - truth).abs().median()) for r in runs]
    spent = [r.cost.total_evaluations for r in runs]
    assert errors == sorted(errors, reverse=True) and spent == sorted(spent)
    assert errors[-1] < 2 * TOLERANCES[-1] and errors[-1] < errors[0] / 25


def by_hand(x, order, prediction, atol, rtol, keep=lambda error: error <= 1):
    """One sample, written out with the singlestep solver and the paper's loop; (answer, attempts)."""
    problem, schedule = two_modes(), ContinuousVP()
    first, end = schedule.at(1.0), schedule.at(schedule.cleanest)
    before, here, h, attempts = x, first, 0.05, 0
    while here != end:
        reached = here.log_snr + h
        there = end if reached >= end.log_snr - 1e-9 else schedule.at(schedule.t_at(reached))
        stages = [schedule.at(schedule.t_at(here.log_snr + (there.log_snr - here.log_snr) * j / order))
                  for j in range(1, order)]
        pair = [solve(problem, singlestep_step, [here, there], x, order=k, prediction=prediction,
                      between={here: stages[: k - 1]}) if k > 1 else solve(problem, ddim_step, [here, there], x)
                for k in (order - 1, order)]
        allowed = torch.clamp(rtol * torch.maximum(pair[0].abs(), before.abs()), min=atol)
        error = float(((pair[1] - pair[0]) / allowed).square().mean().sqrt())
        length = there.log_snr - here.log_snr
        if keep(error):
            x, before, here = pair[1], pair[0], there
        h = 2 ** (math.floor(8 * math.log2(0.9 * length * max(error, 1e-12) ** (-1 / order))) / 8)
        attempts += 1
    return x, attempts


@pytest.mark.parametrize(("order", "prediction"), [(2, "x0"), (3, "x0"), (3, "eps")])
def test_it_is_the_papers_loop_on_each_sample(order, prediction):
    knobs = {"order": order, "prediction": prediction, "atol": 2e-3, "rtol": 1e-2}
    made = to_the_cleanest(**knobs)
    alone = [by_hand(NOISE[i : i + 1], **knobs) for i in (3, 17, 30)]
    torch.testing.assert_close(made.answer[[3, 17, 30]], torch.cat([x for x, _ in alone]), rtol=1e-9, atol=1e-9)
    # broken twin: every attempt is taken
    always = by_hand(NOISE[3:4], **knobs, keep=lambda error: True)[0]
    assert made.answer[3] != pytest.approx(float(always), abs=1e-6)


def test_evaluations_are_attempts_and_rejected_ones_keep_their_start():
    for i in (3, 17):
        attempts = by_hand(NOISE[i : i + 1], 3, "x0", 2e-3, 1e-2)[1]
        cost = to_the_cleanest(NOISE[i : i + 1], order=3, atol=2e-3, rtol=1e-2).cost
        assert 2 * attempts < cost.total_evaluations <= 3 * attempts


def test_samples_have_steps_of_their_own():
    """A sample's answer and cost do not depend on what else is in the batch."""
    together = to_the_cleanest()
    alone = [to_the_cleanest(NOISE[i : i + 1]) for i in range(len(NOISE))]
    torch.testing.assert_close(together.answer, torch.cat([r.answer for r in alone]), rtol=1e-9, atol=1e-9)
    spent = [r.cost.total_evaluations for r in alone]
    assert together.cost.total_evaluations == sum(spent) and len(set(spent)) > 3


def test_samples_share_what_is_asked_of_the_network():
    cost = to_the_cleanest().cost
    assert cost.calls["exact"] < cost.evaluations["exact"] / 5


def test_few_steps_end_by_one_of_first_order():
    problem = started(two_modes(), NOISE)
    one = run("dpm_solver_adaptive", problem, n_samples=len(NOISE), n_steps=1)
    assert one.cost.total_evaluations == len(NOISE)
    schedule = problem.schedule
    torch.testing.assert_close(one.answer, solve(two_modes(), ddim_step, grid(schedule, 1, "trailing"), NOISE))
    cleanest = to_the_cleanest(n_steps=1).answer
    ends = [schedule.at(1.0), schedule.at(schedule.cleanest)]
    torch.testing.assert_close(cleanest, solve(two_modes(), ddim_step, ends, NOISE), rtol=1e-9, atol=1e-9)


def test_the_cap_bounds_the_evaluations():
    for n_steps in (1, 2, 5, 9):
        for order in (2, 3):
            cost = to_the_cleanest(n_steps=n_steps, order=order, atol=1e-6, rtol=1e-6).cost
            assert cost.total_evaluations <= len(NOISE) * nfe(n_steps, order)
            assert cost.total_evaluations > len(NOISE) * nfe(n_steps, order) * 0.6


def test_the_end_is_the_data_estimate():
    problem = started(two_modes(), NOISE)
    before = to_the_cleanest().answer
    point = problem.schedule.at(problem.schedule.cleanest)
    x0, _ = problem.models[-1].predict(before, point, problem.schedule, None, 1.0)
    torch.testing.assert_close(run("dpm_solver_adaptive", problem, n_samples=len(NOISE), n_steps=1000).answer, x0)


def test_models_of_other_schedules_and_labels_are_asked_row_by_row():
    linear, vp = DiscreteSchedule.linear(), ContinuousVP()
    own, other = (plane(("m", schedule, p), schedule=vp) for schedule, p in ((vp, "eps"), (linear, "v")))
    knobs = {"n_samples": 5, "n_steps": 60, "final": "cleanest", "atol": 1e-3, "rtol": 1e-2}
    first, second = (run("dpm_solver_adaptive", p, **knobs).answer for p in (own, other))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    labelled = two_dim(has_labels=True)
    five = run("dpm_solver_adaptive", labelled, n_samples=5, guidance=2.0).answer
    torch.testing.assert_close(run("dpm_solver_adaptive", labelled, n_samples=3, guidance=2.0).answer, five[:3],
                               rtol=1e-9, atol=1e-9)


def test_one_point_for_all_rows_is_the_same_as_one_for_each():
    for prediction in ("eps", "x0", "v"):
        problem = plane(("m", DiscreteSchedule.linear(), prediction), schedule=ContinuousVP())
        model, schedule = problem.models[0], problem.schedule
        x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        points = [schedule.at(t) for t in (0.9, 0.5, 0.5, 0.2)]
        rows = model.predict(x, points, schedule, None, 1.0)
        for i, point in enumerate(points):
            assert isinstance(point, Point)
            for many, one in zip(rows, model.predict(x[i : i + 1], point, schedule, None, 1.0), strict=True):
                torch.testing.assert_close(many[i : i + 1], one, rtol=1e-12, atol=1e-12)


def test_the_error_is_each_samples_own(monkeypatch):
    """Broken twin: one error for the whole batch makes samples depend on each other."""
    honest = module.attempt

    def shared(x, *rest):
        low, high = honest(x, *rest)
        return low, low + (high - low).abs().max() * torch.ones_like(low)

    alone = to_the_cleanest(NOISE[:1], n_steps=60).answer
    monkeypatch.setattr(module, "attempt", shared)
    assert (to_the_cleanest(NOISE[:9], n_steps=60).answer[:1] - alone).abs().max() > 1e-6


def test_the_method_says_that_its_cost_is_a_bound():
    assert get("dpm_solver_adaptive").is_bound and not get("dpm_solver").is_bound
