"""Every sampler on every schedule against the exact law; what cannot be says so. The full table: docs/samplers.md."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from sampler_table import (
    FAST,
    LAW,
    REFUSED,
    ROWS,
    SCHEDULES,
    WITHOUT_SIGNAL,
    Even,
    exact,
    knobs_on,
    measured,
    rows_for,
    toy,
)
from toys import From

from workbench import METHODS, inputs, run
from workbench.problems.denoising import (
    ContinuousVP,
    Denoiser,
    Denoising,
    DiscreteSchedule,
    RectifiedFlow,
    noisiest,
    prior_std,
)
from workbench.problems.mixtures import two_dim, two_modes

N_STEPS, N_SAMPLES = 32, 1000


def check(name, schedule, problem=None):
    found = measured(ROWS[name], schedule, N_STEPS, rows_for(ROWS[name], N_SAMPLES), problem)
    assert found.distance <= found.bound, (name, schedule, found)


@pytest.mark.parametrize("name", FAST)
def test_samples_follow_the_exact_law(name):
    for schedule in SCHEDULES:
        if not (ROWS[name].needs_signal and schedule in WITHOUT_SIGNAL):
            check(name, schedule)


def test_the_table_has_every_sampler():
    assert {ROWS[name].method for name in FAST} == {m.name for m in METHODS.values() if m.family == "denoising"}


def test_what_needs_signal_says_so_before_it_asks_a_network():
    def wrap(name, network):
        return lambda *rows: pytest.fail("asked")

    for row in (row for row in ROWS.values() if row.needs_signal):
        for schedule in WITHOUT_SIGNAL:
            problem = toy(schedule).wrapped(wrap)
            with pytest.raises(ValueError, match=REFUSED) as error:
                measured(row, schedule, N_STEPS, 2, problem)
            # the sampler (of a stitch, the solver under it), the schedule, and what to do instead
            name = {"dpmpp_2s": "dpm_solver", "ipndm": "deis"}.get(row.knobs.get("solver"), row.knobs.get("solver"))
            assert str(error.value).startswith(name or row.method)
            assert type(problem.schedule).__name__ in str(error.value) and "expected" in str(error.value)


# ---- broken twins ----------------------------------------------------------------------------------------------------

class UnitStart(Denoising):
    """Starts from standard normal noise whatever the schedule."""

    def start(self, rng, at=None):
        return rng.normal(self.shape, self.dtype, self.device)


@pytest.mark.parametrize("schedule", ["VE", "EDM"])
@pytest.mark.parametrize("name", ["ddim", "dpm_solver, 2M, eps", "edm_heun", "t_stitch, dpmpp_2s", "deis, ipndm, 3"])
def test_a_start_from_unit_noise_is_found(name, schedule):
    given = toy(schedule)
    with pytest.raises(AssertionError):
        check(name, schedule, UnitStart(**{f.name: getattr(given, f.name) for f in fields(Denoising)}))


class Unchecked(Denoiser):
    """Takes every prediction on every schedule."""

    def __post_init__(self):
        pass


def test_a_velocity_read_as_v_is_refused_and_would_be_wrong():
    flow = RectifiedFlow()
    with pytest.raises(ValueError, match=r"prediction='v' needs alpha\^2 \+ sigma\^2 = 1.*RectifiedFlow.*'flow'"):
        Denoiser("m", exact(flow, "flow"), flow, "v")
    wrong = Unchecked("m", exact(flow, "flow"), flow, "v")
    with pytest.raises(AssertionError):
        check("ddim", "flow", replace(toy("flow"), models=(wrong, wrong)))
    with pytest.raises(ValueError, match=r"prediction='flow' needs alpha \+ sigma = 1.*ContinuousVP.*'v'"):
        Denoiser("m", exact(ContinuousVP(), "v"), ContinuousVP(), "flow")


# ---- starts ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_start_has_the_schedules_own_spread(schedule):
    """That of alpha x0 + sigma eps, as far as the data's own spread counts little beside it."""
    problem, first = toy(schedule), noisiest(SCHEDULES[schedule][0])
    x = problem.start(Even(0, 2000))
    assert float(x.std()) == pytest.approx(prior_std(first), rel=5e-3)  # what 2000 quantiles lack of a normal's tails
    assert prior_std(first) == pytest.approx(math.hypot(first.alpha, first.sigma), rel=2e-3)
    assert prior_std(first) == {"VE": 50.0, "EDM": 80.0}.get(schedule, 1.0)


def test_a_start_below_the_noisiest_level_is_that_levels():
    """On schedules that add noise; where variance is kept it is 1 everywhere."""
    ve, table = SCHEDULES["VE"][0], SCHEDULES["VP table"][0]
    assert prior_std(ve.at(0.5)) == ve.at(0.5).sigma < 1 and prior_std(table.at(500)) == 1.0
    seen = []

    def keep(name, network):
        return lambda x, t, labels: seen.append(float(x.std())) or network(x, t, labels)

    problem = toy("VE").wrapped(keep)
    method = METHODS["timesteps"]
    list(method.function(problem, Even(0, 500), **method.check({"n_steps": 2, "timesteps": (0.8, 0.5)})))
    assert seen[0] == pytest.approx(ve.at(1e-5 + 0.8 * (1 - 1e-5)).sigma, rel=0.02)


# ---- levels without signal -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("knobs", "words"), [
    ({"spacing": "log_snr"}, "spacing='log_snr'"), ({"spacing": "karras"}, "phase='rho'"),
    ({"boundary": "log_snr"}, "boundary='log_snr'")])
def test_what_is_even_in_log_snr_cannot_start_without_signal(knobs, words):
    for schedule in WITHOUT_SIGNAL:
        with pytest.raises(ValueError, match=REFUSED) as error:
            run("t_stitch", toy(schedule), n_samples=2, **knobs)
        assert str(error.value).startswith(words)


@pytest.mark.parametrize("schedule", WITHOUT_SIGNAL)
def test_a_start_without_signal_costs_what_the_formula_says(schedule):
    for row in (row for row in ROWS.values() if not row.needs_signal):
        given = inputs(row.method, toy(schedule), 0, 2, **knobs_on(row, schedule, 4))
        method, spent = METHODS[row.method], run(row.method, toy(schedule), 0, 2, **given.knobs).cost.total_evaluations
        formula = 2 * method.spends(given.knobs, toy(schedule).sizes(given.knobs))
        assert 0 < spent <= formula if method.is_bound else spent == formula, row


def test_a_list_that_starts_without_signal_is_not_resampled():
    with pytest.raises(ValueError, match="n_steps=3, other than the 4 timesteps given,.*" + REFUSED):
        run("timesteps", toy("flow"), n_samples=2, n_steps=3)


def test_noise_alone_says_nothing_about_the_data():
    for schedule in WITHOUT_SIGNAL:
        own = SCHEDULES[schedule][0]
        blind = Denoiser("blind", LAW.network(own, "eps"), own, "eps")
        problem = replace(toy(schedule), models=(blind,), flops={"blind": 1.0})
        with pytest.raises(ValueError, match="blind: prediction='eps' says nothing about the data where alpha is 0"):
            run("ddim", problem, n_samples=2)
        answer = run("ddim", problem, n_samples=2, spacing="leading").answer  # as diffusers runs such networks
        assert bool(torch.isfinite(answer).all())


def test_a_model_of_another_schedule_is_asked_where_it_too_has_no_signal():
    flow, zero = RectifiedFlow(), DiscreteSchedule.linear().zero_terminal()
    models = tuple(Denoiser(type(s).__name__, LAW.network(s, kind), s, kind)
                   for s, kind in ((zero, "v"), (flow, "flow")))
    mixed = replace(toy("flow"), models=models, flops={m.name: 1.0 for m in models})
    check("t_stitch, dpmpp_2m", "flow", mixed)
    vp = Denoiser("vp", LAW.network(ContinuousVP(), "eps"), ContinuousVP(), "eps")
    for kind in ("eps", "v"):
        own = replace(vp, network=LAW.network(ContinuousVP(), kind), prediction=kind)
        with pytest.raises(ValueError, match=r"vp: .*alpha.* 0"):
            run("ddim", replace(mixed, models=(own,), flops={"vp": 1.0}), n_samples=2)


def test_toys_are_there_on_every_schedule():
    for schedule, _ in SCHEDULES.values():
        for make in (two_modes, two_dim):
            answer = run("ddim", make(schedule=schedule), n_samples=3, n_steps=8).answer
            assert bool(torch.isfinite(answer).all())


def test_on_a_flow_ddim_is_eulers_method():
    flow, x = RectifiedFlow(), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    problem = toy("flow")
    fixed = From(**{f.name: getattr(problem, f.name) for f in fields(Denoising)}, noise=x)
    method, v = METHODS["ddim"], exact(flow, "flow")
    *_, last = method.function(fixed, Even(0, 9), **method.check({"n_steps": 10}))
    for i in range(10):
        x = x - 0.1 * v(x, torch.full((9,), 1 - i / 10, dtype=torch.float64))
    torch.testing.assert_close(last.state, x, rtol=1e-12, atol=1e-12)
