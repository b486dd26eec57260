"""What the loop hands to solvers: evaluations whose estimates follow from each other, times made at once, grids."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from workbench import METHODS
from workbench.methods.denoising._march import Evaluated, combined
from workbench.problems.denoising import ContinuousVP, DiscreteSchedule, Point, grid, mixed, power_grid, time_rows
from workbench.problems.mixtures import two_dim
from workbench.rng import Rng

HERE = Point(0.5, 0.8, 0.5)
X, X0, EPS = (torch.randn(3, 2, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(3))


def assert_estimates_of(now, x):
    """x = alpha x0 + sigma eps."""
    torch.testing.assert_close(HERE.alpha * now.x0 + HERE.sigma * now.eps, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", [{"x0": X0}, {"eps": EPS}])
def test_the_estimate_left_out_follows_from_the_other(given):
    now = Evaluated(HERE, X, **given)
    assert_estimates_of(now, X)
    assert now.x0 is now.x0 and now.eps is now.eps  # made once
    for name, value in given.items():
        assert getattr(now, name) is value


def test_a_corrected_state_keeps_the_estimates_of_the_state_that_was_asked():
    better = Evaluated(HERE, X, eps=EPS).changed(x=X + 1)
    assert torch.equal(better.x, X + 1)
    assert_estimates_of(better, X)
    twin = Evaluated(HERE, X + 1, eps=EPS)  # broken twin: the estimate is taken from the corrected state
    with pytest.raises(AssertionError):
        assert_estimates_of(twin, X)


def test_evaluations_have_no_other_fields():
    with pytest.raises(AttributeError, match="velocity"):
        Evaluated(HERE, X, X0).velocity  # noqa: B018


def test_times_made_at_once_are_those_of_each_level():
    """Whole numbers as integers, others in the state's type; a row can be written to without touching the others."""
    rows = time_rows([Point(t, 0.8, 0.6) for t in (999.0, 3.25, 0.0)], X)
    assert {t: row.tolist() for t, row in rows.items()} == {999.0: [999] * 3, 3.25: [3.25] * 3, 0.0: [0] * 3}
    assert [rows[t].dtype for t in (999.0, 3.25, 0.0)] == [torch.int64, torch.float64, torch.int64]
    rows[999.0].zero_()
    assert rows[0.0].tolist() == [0] * 3 and rows[3.25].tolist() == [3.25] * 3


@pytest.mark.parametrize("make", [lambda: grid(DiscreteSchedule.linear(), 4, "trailing"),
                                  lambda: power_grid(ContinuousVP(), 4, "rho", 7.0)])
def test_a_grid_can_be_changed_without_changing_the_next(make):
    first = make()
    kept = list(first)
    first.clear()
    assert make() == kept


def test_linear_combinations():
    inputs = [t.clone() for t in (X, X0, EPS)]
    column = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    for found, wanted in ((mixed(0.3, X, -2.0, EPS), 0.3 * X - 2 * EPS), (mixed(1.0, X, 2.0, EPS), X + 2 * EPS),
                          (mixed(1.0, X, column, EPS), X + column * EPS),
                          (mixed(column, X, column + 1, EPS), column * X + (column + 1) * EPS),
                          (combined(X, (X0, EPS), (0.5, 0.0, 3.0)), 0.5 * X + 3 * EPS)):
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(inputs, (X, X0, EPS), strict=True))


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.family == "denoising"])
def test_methods_tell_their_trajectory_before_they_ask(name):
    told, asked = [], []

    def watch(model, network):
        return lambda *rows: asked.append(len(told)) or network(*rows)

    problem = replace(two_dim().wrapped(watch), tell=lambda points, owners: told.append((points, owners)))
    knobs = METHODS[name].check({"n_steps": 4} if "n_steps" in METHODS[name].knobs else {})
    steps = list(METHODS[name].function(problem, Rng(0, 2), **knobs))
    if name == "dpm_solver_adaptive":  # each sample's steps are as long as its data allow
        assert not told
        return
    (points, owners), = told
    assert set(asked) == {1} and len(points) == len(owners) + 1
    assert [(p, owner.name) for p, owner in zip(points[1:], owners, strict=True)] == [
        (step.info["there"], step.info["model"]) for step in steps]
