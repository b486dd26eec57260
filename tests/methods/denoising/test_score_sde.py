"""Reverse-time SDEs against the moments of the forward ones, diffusers' schedulers and Gaussian closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch
from diffusers import DDPMScheduler, ScoreSdeVeScheduler
from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler
from scipy.integrate import solve_ivp
from toys import VP_PREDICTIONS, plane

from workbench import run
from workbench.methods.denoising._march import Advance, Evaluated, march
from workbench.methods.denoising.score_sde import (
    PREDICTORS,
    SDES,
    Condition,
    levels,
    nfe,
    pc_sample,
    pc_step,
    sde_path,
)
from workbench.problems.denoising import (
    CLEAN,
    ContinuousVE,
    ContinuousVP,
    Denoiser,
    DiscreteSchedule,
    Point,
    SubVP,
    grid,
    prior_std,
)
from workbench.problems.mixtures import Mixture, two_dim, two_modes
from workbench.rng import Rng

BY_NAME = {"vp": ContinuousVP(), "sub_vp": SubVP(), "ve": ContinuousVE()}
PAIRS = [(s, p) for s, p in product(SDES, PREDICTORS[1:]) if (s, p) != ("sub_vp", "ancestral")]


# ---- the SDEs --------------------------------------------------------------------------------------------------------

def assert_moments(sde):
    """Mean coefficient and variance from integrating dm = f m dt and dv = (2 f v + g^2) dt from t = 0."""
    def slope(t, moments):
        f, squared = sde.rates(t)
        return f * moments[0], 2 * f * moments[1] + squared

    start = sde.at(0.0)
    path = solve_ivp(slope, (0, 1), (start.alpha, start.sigma**2), method="DOP853", rtol=1e-11, atol=1e-14,
                     t_eval=[0.01, 0.1, 0.3, 0.6, 1.0])
    for t, alpha, variance in zip(path.t, *path.y, strict=True):
        assert (sde.at(t).alpha, sde.at(t).sigma ** 2) == pytest.approx((alpha, variance), rel=1e-7)


@pytest.mark.parametrize("sde", BY_NAME.values(), ids=BY_NAME)
def test_the_marginals_are_those_of_the_sde(sde):
    assert_moments(sde)
    assert [sde.at(0.0).alpha, sde.at(0.0).sigma] == [1.0, sde.sigma_min if isinstance(sde, ContinuousVE) else 0.0]


@dataclass(frozen=True)
class Rooted(SubVP):
    """Broken twin: the standard deviation is a square root, as VP's."""

    def at(self, t):
        return ContinuousVP.at(self, t)


@dataclass(frozen=True)
class Halved(ContinuousVE):
    """Broken twin: g^2 lacks its factor 2."""

    def rates(self, t):
        return 0.0, ContinuousVE.rates(self, t)[1] / 2


@pytest.mark.parametrize("sde", [Rooted(), Halved()])
def test_the_moments_fail_for_a_broken_twin(sde):
    with pytest.raises(AssertionError):
        assert_moments(sde)


@pytest.mark.parametrize("sde", BY_NAME.values(), ids=BY_NAME)
def test_time_and_log_snr_are_inverse(sde):
    for t in (1e-5, 1e-3, 0.1, 0.5, 1.0):
        assert sde.t_at(sde.at(t).log_snr) == pytest.approx(t, rel=1e-7)
        assert sde.progress(t) == 1 - t
    assert sde.times(4, "log_snr") == sorted(sde.times(4, "log_snr"), reverse=True)


def test_sub_vp_is_never_noisier_than_vp():
    for t in (i / 200 for i in range(1, 201)):
        vp, sub = BY_NAME["vp"].at(t), BY_NAME["sub_vp"].at(t)
        assert sub.alpha == vp.alpha and 0 < sub.sigma < vp.sigma and sub.sigma == pytest.approx(vp.sigma**2)


def test_published_constants():
    assert (BY_NAME["vp"].beta_min, BY_NAME["vp"].beta_max) == (0.1, 20.0)
    assert [BY_NAME["ve"].at(t).sigma for t in (0, 1)] == pytest.approx([0.01, 50])
    assert BY_NAME["vp"].at(1.0).alpha == pytest.approx(math.exp(-5.025))


def test_v_predictions_are_refused_off_the_circle():
    for schedule in (SubVP(), ContinuousVE()):
        with pytest.raises(ValueError, match=r"prediction='v'.*alpha\^2 \+ sigma\^2 = 1"):
            Denoiser("m", lambda *rows: rows[0], schedule, "v")


# ---- steps against diffusers -----------------------------------------------------------------------------------------

def one_step(x, here, there, schedule, network, noise, *, n_left=2, step=pc_step, **knobs):
    """One solver step from given noise (a list of draws), network(x) being the noise estimate."""
    draws = iter(noise)

    def denoise(y, at):
        eps = network(y)
        return Evaluated(at, y, (y - at.sigma * eps) / at.alpha, eps)

    return step(x, Advance(denoise, here, there, (), n_left, lambda: next(draws), schedule), **knobs)[0]


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ddpm_final(x, step, **knobs):
    """Broken twin: the smaller variance of DDPM, the posterior's, in the place of the larger."""
    quiet = step._replace(noise=lambda: torch.zeros_like(x))
    mean, now = pc_step(x, quiet, predictor="ancestral")
    here, there = step.here, step.there
    variance = (1 - (here.alpha / there.alpha) ** 2) * (there.sigma / here.sigma) ** 2
    return mean + math.sqrt(variance) * step.noise(), now


def assert_ddpm(monkeypatch, solver, spacing, n_steps, prediction="eps", **knobs):
    """Every state is DDPMScheduler's, of its larger variance, on shared noise and the table's own levels."""
    import diffusers.schedulers.scheduling_ddpm as in_module

    schedule = DiscreteSchedule.linear()
    problem = plane(("exact", schedule, prediction), schedule=schedule)
    points = grid(schedule, n_steps, spacing)
    kinds = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    scheduler = DDPMScheduler(clip_sample=False, variance_type="fixed_large", prediction_type=kinds[prediction])
    scheduler.alphas_cumprod, scheduler.one = scheduler.alphas_cumprod.double(), torch.ones(()).double()
    scheduler.set_timesteps(timesteps=[int(p.t) for p in points[:-1]])
    rng = Rng(0, 5)
    monkeypatch.setattr(in_module, "randn_tensor", lambda *_, **__: rng.normal((2,), torch.float64))
    ours = march(problem, Rng(0, 5), points, problem.models * n_steps, solver, guidance=1.0, **knobs)
    x = problem.start(rng)
    for t, step in zip(scheduler.timesteps, list(ours), strict=True):
        out = problem.models[0].network(x, t.expand(5), None)
        x = scheduler.step(out, int(t), x).prev_sample
        torch.testing.assert_close(step.state, x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
def test_ancestral_vp_is_ddpm(monkeypatch, spacing, prediction):
    for n_steps in (1, 7, 50):
        # diffusers adds no noise after the table's first level, and does after any other
        assert_ddpm(monkeypatch, pc_step, spacing, n_steps, prediction, predictor="ancestral",
                    denoise=spacing == "leading")


@pytest.mark.parametrize(("solver", "knobs"), [(pc_step, {"predictor": "reverse_diffusion"}), (ddpm_final, {})])
def test_ddpm_parity_fails_for_a_broken_twin(monkeypatch, solver, knobs):
    with pytest.raises(AssertionError):
        assert_ddpm(monkeypatch, solver, "trailing", 7, **knobs)


def broken_shift(x, step, **knobs):
    """Broken twin: a predictor with the drift's sign turned."""
    moved, now = pc_step(x, step, **knobs)
    return 2 * x - moved, now


def assert_euler_maruyama(monkeypatch, step):
    """Elementwise diffusers' ScoreSdeVpScheduler, whose steps are 1 / n long."""
    import diffusers.schedulers.deprecated.scheduling_sde_vp as in_module

    scheduler, x, z, sde = ScoreSdeVpScheduler(), normal(4, 3), normal(4, 3, seed=1), ContinuousVP()
    scheduler.set_timesteps(50)
    monkeypatch.setattr(in_module, "randn_tensor", lambda *_, **__: z)
    for t in (1.0, 0.6, 0.03):
        for denoise in (False, True):
            theirs = scheduler.step_pred(torch.tanh(x), x, torch.tensor([t], dtype=torch.float64))[denoise]
            ours = one_step(x, sde.at(t), sde.at(t - 1 / 50), sde, torch.tanh, [z], n_left=1, step=step,
                            predictor="euler_maruyama", denoise=denoise)
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_euler_maruyama_is_diffusers(monkeypatch):
    assert_euler_maruyama(monkeypatch, pc_step)
    with pytest.raises(AssertionError):
        assert_euler_maruyama(monkeypatch, broken_shift)


def assert_ve_is_diffusers(monkeypatch, step):
    """step_pred and, in a batch of one, step_correct of ScoreSdeVeScheduler, between the levels of its own table."""
    import diffusers.schedulers.scheduling_sde_ve as in_module

    scheduler = ScoreSdeVeScheduler(20, snr=0.16, sigma_min=0.01, sigma_max=50.0)
    x, z = normal(1, 6), normal(1, 6, seed=1)
    scheduler.discrete_sigmas = scheduler.discrete_sigmas.double()
    monkeypatch.setattr(in_module, "randn_tensor", lambda *_, **__: z)
    sde = ContinuousVE(0.01, 50.0)
    for k in range(20):
        sigma, below = sde.at(k / 19), sde.at((k - 1) / 19) if k else CLEAN
        assert sigma.sigma == pytest.approx(float(scheduler.discrete_sigmas[k]), rel=1e-5)
        scheduler.discrete_sigmas[k] = sigma.sigma
        score = torch.tanh(x) / -sigma.sigma
        level = torch.tensor((k + 1e-3) / 19) if k else torch.tensor(0.0)
        predicted = scheduler.step_pred(score, level, x)
        for denoise, theirs in ((False, predicted.prev_sample), (True, predicted.prev_sample_mean)):
            ours = one_step(x, sigma, below, sde, torch.tanh, [z], n_left=1, step=step, denoise=denoise)
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        ours = one_step(x, sigma, below, sde, torch.tanh, [z], step=step, predictor="none", n_corrections=1)
        torch.testing.assert_close(ours, scheduler.step_correct(score, x).prev_sample, rtol=1e-7, atol=1e-7)


def test_reverse_diffusion_and_langevin_of_ve_are_diffusers(monkeypatch):
    assert_ve_is_diffusers(monkeypatch, pc_step)
    with pytest.raises(AssertionError):
        assert_ve_is_diffusers(monkeypatch, broken_shift)


def test_the_last_corrections_noise_is_left_out():
    x, z, sde = normal(2, 3), normal(2, 3, seed=1), ContinuousVE()
    states = [one_step(x, sde.at(0.2), CLEAN, sde, torch.tanh, [z], n_left=1, predictor="none", n_corrections=1,
                       length="sigma", denoise=denoise) for denoise in (True, False)]
    e = 2 * (0.16 * sde.at(0.2).sigma) ** 2
    torch.testing.assert_close(states[0], x - e * torch.tanh(x) / sde.at(0.2).sigma)
    torch.testing.assert_close(states[1] - states[0], math.sqrt(2 * e) * z)


# ---- laws ------------------------------------------------------------------------------------------------------------

def answer(problem, n_samples, seed=0, **knobs):
    return list(pc_sample(problem, Rng(seed, n_samples), **knobs))[-1].state


def assert_gaussian(sde, **knobs):
    """Mean and variance of 16 000 values (2000 samples of 8) within 4 standard errors and 1 % for the steps."""
    mean, std, size, n_samples = 0.7, 0.5, 8, 2000
    law = Mixture(torch.ones(1).double(), torch.full((1, size), mean).double(), std**2 * torch.eye(size).double()[None])
    problem = plane(("exact", ContinuousVP(), "eps"), schedule=ContinuousVP(), law=law)
    found = answer(problem, n_samples, n_steps=250, sde=sde, sigma_max=20.0, **knobs)
    assert float(found.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(found.numel()) + 0.005)
    assert float(found.var()) / std**2 == pytest.approx(1, abs=4 * math.sqrt(2 / found.numel()) + 0.01)


@pytest.mark.parametrize(("sde", "predictor"), PAIRS)
def test_marginals_of_a_gaussian(sde, predictor):
    assert_gaussian(sde, predictor=predictor)


def test_marginals_fail_for_a_score_that_is_too_long():
    with pytest.raises(AssertionError):
        assert_gaussian("vp", condition=Condition(gradient=lambda x, here: (0.7 - x) / 4))


def langevin_ratio(length, std, sigma, snr=0.16, size=3072, n_steps=300):
    """The stationary variance of Langevin steps on N(0, std^2 I) noised by sigma, over that law's own variance."""
    variance, here = std**2 + sigma**2, Point(0.5, 1.0, sigma)
    rng, x, found = Rng(0, 4), normal(4, size), []
    x = x / x.std() * math.sqrt(variance)
    for _ in range(n_steps):
        x = one_step(x, here, here, ContinuousVE(), lambda y: sigma * y / variance, [rng.normal((size,), x.dtype)],
                     predictor="none", n_corrections=1, length=length, snr=snr)
        found.append(float(x.var()) / variance)
    return sum(found[100:]) / 200


@pytest.mark.parametrize("std", [1.0, 10.0])
def test_langevin_steps_widen_a_gaussian_as_their_length_says(std):
    """x + e s + sqrt(2 e) z has the stationary variance 1 / (1 - e / (2 v)) v; here e / v = 2 snr^2 to first order."""
    step = 2 * 0.16**2
    assert langevin_ratio("norms", std, 0.01) == pytest.approx(1 / (1 - step / 2), abs=0.006)
    step = 2 * 0.16**2 * 4 / (1 + 4)
    assert langevin_ratio("sigma", 1.0, 2.0) == pytest.approx(1 / (1 - step / 2), abs=0.006)


def test_any_predictor_goes_with_any_corrector():
    """In one dimension the corrector that is made for it improves the law, and alone it finds it from little noise."""
    problem = two_modes()
    for (sde, predictor), n_corrections in product(PAIRS, (0, 1, 3)):
        judged = problem.judge(answer(problem, 300, n_steps=60, sde=sde, predictor=predictor, sigma_max=10.0,
                                      n_corrections=n_corrections, length="sigma"), None)
        assert judged["wasserstein_1"].value < 0.16, (sde, predictor, n_corrections)
    alone = problem.judge(answer(problem, 300, n_steps=60, sde="ve", predictor="none", sigma_max=1.0, n_corrections=10,
                                 length="sigma", snr=0.4), None)
    assert alone["wasserstein_1"].value < 0.16


def test_models_of_every_schedule_and_prediction_serve_every_sde():
    """One law known by networks of five schedules: equal states, so noise levels are matched as they should be."""
    schedules = [ContinuousVP(), DiscreteSchedule.linear(), ContinuousVP(0.2, 15.0, 1e-4), SubVP(cleanest=0.02),
                 ContinuousVE(0.005, 200.0)]
    kinds = [(s, p) for s in schedules for p in VP_PREDICTIONS if p != "v" or not isinstance(s, SubVP | ContinuousVE)]
    problem = plane(*((f"{type(s).__name__}-{p}-{i}", s, p) for i, (s, p) in enumerate(kinds)), schedule=ContinuousVP())
    for sde in SDES:
        # levels that all of them cover, so that no path is cut
        found = [answer(problem, 4, n_steps=12, sde=sde, t_end=0.1, sigma_max=20.0, model=model)
                 for model in problem.models if sde == "ve" or sde_path(model, sde, 0.1).first == 1.0]
        assert len(found) >= 3
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-6)


# ---- the method ------------------------------------------------------------------------------------------------------

def test_no_level_lies_beyond_the_models_schedule():
    short = DiscreteSchedule(DiscreteSchedule.cosine().alphas_cumprod[50:700])
    problem, asked = plane(("exact", short, "eps"), schedule=short), []

    def watch(name, network):
        return lambda x, t, labels: asked.append(float(t[0])) or network(x, t, labels)

    for sde in SDES:
        path = sde_path(problem.models[0], sde, 1e-5, 378.0)
        ends = [path.sde.at(t).log_snr for t in (path.first, path.last)]
        assert ends == pytest.approx([short.at(649).log_snr, short.at(0).log_snr])
        assert prior_std(path.sde.at(path.first)) == pytest.approx(math.exp(-ends[0]) if sde == "ve" else 1.0)
        run("score_sde", problem.wrapped(watch), n_samples=1, sde=sde, t_end=1e-5, n_steps=9, sigma_max=378.0)
    assert min(asked) == pytest.approx(0, abs=1e-6) and max(asked) == pytest.approx(649, abs=1e-6)


def test_the_levels_are_the_papers():
    path = sde_path(two_modes().models[-1], "vp", 1e-3)
    assert [p.t for p in levels(path, 4)] == pytest.approx([1, 0.667, 0.334, 0.001, 0])
    assert [p.t for p in levels(path, 1)] == [1, 0] and levels(path, 3)[-1] == CLEAN


def test_refusals_name_the_knob():
    problem = two_modes()
    for knobs, words in (({"sde": "sub_vp", "predictor": "ancestral"}, "ancestral.*sub_vp"),
                         ({"predictor": "none"}, "predictor='none' with corrector='none'")):
        with pytest.raises(ValueError, match=words):
            run("score_sde", problem, n_samples=1, **knobs)
    for knobs, words in (({"sde": "edm"}, "sde='edm'.*sub_vp"), ({"predictor": "heun"}, "predictor='heun'.*ancestral"),
                         ({"length": "mean"}, "length='mean'.*norms")):
        with pytest.raises(ValueError, match=words):
            list(pc_sample(problem, Rng(0, 1), **knobs))
    with pytest.raises(ValueError, match=r"euler_maruyama.*DiscreteSchedule"):
        one_step(normal(1, 1), CLEAN, CLEAN, DiscreteSchedule.linear(), torch.tanh, [], predictor="euler_maruyama")


def test_cost_counts_every_update():
    problem = two_dim(has_labels=True)
    for predictor, corrector, n_corrector, guidance in product(PREDICTORS, ("none", "langevin"), (1, 3), (1.0, 2.0)):
        if (predictor, corrector) == ("none", "none"):
            continue
        made = run("score_sde", problem, n_samples=2, n_steps=3, predictor=predictor, corrector=corrector,
                   n_corrector=n_corrector, guidance=guidance)
        each = (predictor != "none") + n_corrector * (corrector != "none")
        assert nfe(3, predictor, corrector, n_corrector) == 3 * each
        assert made.cost.total_evaluations == 2 * 3 * each * (2 if guidance != 1 else 1)


def batch_means(x):
    """Broken twin of the norms: the mean over the batch, as the paper's authors have it."""
    return x.flatten(1).norm(dim=1).mean()


def assert_batch_independent():
    for sde in SDES:
        knobs = {"n_steps": 6, "sde": sde, "n_corrections": 2}
        seven = answer(two_dim(), 7, **knobs)
        for n in (1, 3):
            torch.testing.assert_close(answer(two_dim(), n, **knobs), seven[:n], rtol=1e-9, atol=1e-9)


def test_corrections_do_not_depend_on_the_batch(monkeypatch):
    assert_batch_independent()
    monkeypatch.setattr("workbench.methods.denoising.score_sde._norms", batch_means)
    with pytest.raises(AssertionError):
        assert_batch_independent()


def test_fewer_errors_with_more_steps():
    """Means of the answer from given noise: the noiseless part of reverse diffusion converges at first order."""
    sde, x = ContinuousVP(), torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    m, s = 0.7, 0.5

    def ended(n):
        y = x
        for a, b in pairwise([1 - 0.9 * i / n for i in range(n + 1)]):
            here = sde.at(a)
            y = one_step(y, here, sde.at(b), sde, lambda y, p=here: p.sigma * (y - p.alpha * m) / (
                (p.alpha * s) ** 2 + p.sigma**2), [torch.zeros_like(y)])
        return y

    # the mean of the reverse SDE of one Gaussian is linear: d mean = (f - g^2 / v) (mean - alpha m) - alpha' m
    def slope(t, mean):
        p, (f, squared) = sde.at(t), sde.rates(t)
        return f * mean + squared * (mean - p.alpha * m) / ((p.alpha * s) ** 2 + p.sigma**2)

    truth = solve_ivp(slope, (1, 0.1), x[:, 0].numpy(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    errors = [float((ended(n)[:, 0] - torch.from_numpy(truth)).abs().max()) for n in (100, 200, 400)]
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([1, 1], abs=0.15)
