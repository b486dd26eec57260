"""Speed, as ratios within one run: `make bench`. Nothing else should run on the machine meanwhile.

Each benchmark interleaves the two sides it compares, so that a slow moment of the machine hits both.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import workbench as wb
from workbench.problems.denoising import Denoising
from workbench.problems.glyphs import glyphs
from workbench.problems.mixtures import two_modes
from workbench.rng import Rng
from workbench.search.s3 import Space, search
from workbench.search.solver import FlowError
from workbench.zoo import load_pipeline

N_STEPS = 20


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median of ours/theirs over rounds timed back to back in alternating order; half the range of the middle half."""
    ours(), theirs()
    found = []
    for i in range(rounds):
        seconds = {}
        for side in ((ours, theirs), (theirs, ours))[i % 2]:
            begin = time.perf_counter()
            side()
            seconds[side] = time.perf_counter() - begin
        found.append(seconds[ours] / seconds[theirs])
    low, high = statistics.quantiles(found, n=4)[::2]
    return statistics.median(found), (high - low) / 2


def forwards(problem: Denoising, n_samples: int, method: str = "ddim", **knobs: Any) -> Callable[[], object]:
    """The bare network of the problem's first model, on the inputs that sampling gives it."""
    model = problem.models[0]
    asked: list[tuple[torch.Tensor, ...]] = []

    def record(name: str, network: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def recording(*rows: torch.Tensor) -> torch.Tensor:
            asked.append(rows)
            return network(*rows)

        return recording

    given = wb.inputs(method, problem, n_samples=n_samples, n_steps=N_STEPS, **(knobs or {"model": "cheapest"}))
    list(wb.get(method).function(problem.wrapped(record), Rng(0, n_samples), **given.knobs))

    def bare() -> None:
        with torch.no_grad():
            for rows in asked:
                model.network(*rows)

    return bare


SMALLEST = {"t_stitch": {"fractions": (1.0,)}, "timesteps": {"models": (0.0,)}}  # others have a knob `model`
VARIANTS = {
    "ddim eta 1": ("ddim", {"eta": 1.0}), "dpm_solver 3M": ("dpm_solver", {"order": 3}),
    "dpm_solver 3S": ("dpm_solver", {"order": 3, "scheme": "singlestep"}),
    "dpm_solver SDE": ("dpm_solver", {"stochastic": True}), "deis rhoRK4": ("deis", {"variant": "rho_rk"}),
    "unipc 3": ("unipc", {"order": 3}), "edm_heun churn": ("edm_heun", {"stochastic": True}),
    "score_sde corrected": ("score_sde", {"corrector": "langevin"}),
    "usf unipc_bh2_3": ("usf", {"preset": "unipc_bh2_3"}),
}
# Every denoising method at its defaults and some variants, all steps by the smallest model: method and knobs.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    arm: (name, knobs | SMALLEST.get(name, {"model": "cheapest"}))
    for arm, (name, knobs) in ({m.name: (m.name, {}) for m in wb.METHODS.values() if m.family == "denoising"}
                               | VARIANTS).items()}
AIMS = {1: 1.03, 16: 1.02}  # by batch


def sampling(arm: str, problem: Denoising, n_samples: int) -> Callable[[], None]:
    """One whole run of an arm, neither metered nor judged."""
    method, knobs = ARMS[arm]
    given = wb.inputs(method, problem, n_samples=n_samples, n_steps=N_STEPS, **knobs)

    def sample() -> None:
        for _ in wb.get(method).function(problem, Rng(0, n_samples), **given.knobs):
            pass

    return sample


@pytest.mark.parametrize("n_samples", AIMS)
@pytest.mark.parametrize("arm", ARMS)
def test_sampling_over_bare_forwards(benchmark, record_ratio, arm: str, n_samples: int) -> None:
    problem = glyphs(("s", "b", "l"))
    sample, (method, knobs) = sampling(arm, problem, n_samples), ARMS[arm]
    benchmark.pedantic(sample, rounds=3, warmup_rounds=1)
    record_ratio(f"{arm}, S, batch {n_samples}: sampling / bare forwards",
                 ratio(sample, forwards(problem, n_samples, method, **knobs), rounds=30), AIMS[n_samples])


@pytest.mark.parametrize("n_samples", AIMS)
@pytest.mark.parametrize("arm", ARMS)
def test_sampling_without_a_network(benchmark, record_microseconds, arm: str, n_samples: int) -> None:
    """What is left where an evaluation gives its input back at once: steadier than a ratio, but all in warm caches."""
    asked = 0

    def nothing(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        nonlocal asked
        asked += 1
        return x

    sample = sampling(arm, glyphs(("s", "b", "l")).wrapped(lambda name, network: nothing), n_samples)
    sample()
    per_run = asked
    benchmark.pedantic(sample, rounds=20, warmup_rounds=3)
    record_microseconds(f"{arm}, no network, batch {n_samples}: per evaluation", benchmark.stats.stats.median / per_run)


@pytest.mark.parametrize("n_samples", [1, 16])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_diffusers_over_bare_forwards(benchmark, record_ratio, scheduler: type, n_samples: int) -> None:
    problem, pipe = glyphs(("s", "b", "l")), load_pipeline("s")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    latents = Rng(0, n_samples).normal(problem.shape, torch.float32)
    labels = problem.labels(n_samples).tolist()

    def sample() -> None:
        pipe(class_labels=labels, latents=latents, num_inference_steps=N_STEPS, guidance_scale=1.0,
             output_type="latent")

    benchmark.pedantic(sample, rounds=5, warmup_rounds=1)
    record_ratio(f"diffusers {scheduler.__name__}, S, batch {n_samples}: loop / bare forwards",
                 ratio(sample, forwards(problem, n_samples), rounds=40), None)


def test_large_over_small(benchmark, record_ratio) -> None:
    problem = glyphs(("s", "b", "l"))
    rows = (torch.randn(16, *problem.shape), torch.full((16,), 500), problem.labels(16))
    small, large = problem.models[0].network, problem.models[-1].network

    def forward(network: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def once() -> None:
            with torch.no_grad():
                network(*rows)
        return once

    benchmark.pedantic(forward(large), rounds=20, warmup_rounds=2)
    record_ratio("L / S seconds per evaluation, batch 16 (aim: at least 4)",
                 ratio(forward(large), forward(small), 40), None)


def test_sweep_of_all_switch_points(benchmark, record_ratio) -> None:
    problem = glyphs(("s", "l"))
    shares = [(i / N_STEPS,) for i in range(N_STEPS + 1)]
    rows: dict[str, int] = {}

    def count(name: str, network: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            rows[name] = rows.get(name, 0) + len(x)
            return network(x, *rest)
        return counted

    def sweep() -> None:
        rows.clear()
        wb.sweep("t_stitch", problem.wrapped(count), {"fractions": shares}, seeds=(0,), n_samples=16, **problem.preset)

    best = {m.name: min(_seconds_per_row(m.network, problem, n) for n in (16, 32, 64, 128)) for m in problem.models}
    benchmark.pedantic(sweep, rounds=3, warmup_rounds=1)
    floor = sum(rows[name] * best[name] for name in rows)
    record_ratio(f"sweep of 21 switch points ({rows}) / (unique rows x best seconds per row)",
                 (benchmark.stats.stats.median / floor, benchmark.stats.stats.iqr / 2 / floor), 1.2)


def _seconds_per_row(network: Callable[..., torch.Tensor], problem: Denoising, n: int) -> float:
    rows = (torch.randn(n, *problem.shape), torch.full((n,), 500), problem.labels(n))
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        with torch.no_grad():
            network(*rows)
        times.append(time.perf_counter() - begin)
    return min(times) / n


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_full_result(benchmark, record_seconds, fraction: float) -> None:
    problem = glyphs(("s", "b", "l"))
    benchmark.pedantic(
        lambda: wb.run("t_stitch", problem, n_samples=16, n_steps=N_STEPS, fractions=(fraction,), **problem.preset),
        rounds=5, warmup_rounds=1)
    record_seconds(f"16 images, 20 steps, guidance on, judged, fraction {fraction}", benchmark.stats.stats.median, 1.0)


def test_search_of_1000_candidates(benchmark, record_seconds) -> None:
    """Solver schedules of 6 evaluations on the line's exact flow, many plans in one batch."""
    problem = two_modes()
    space = Space(problem.schedule, 6, end=problem.schedule.cleanest)
    fitness = FlowError(problem, torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None], end=space.end)
    benchmark.pedantic(lambda: search(fitness, space, n_candidates=1000), rounds=1)
    record_seconds("S3 search of 1,000 candidates on the line", benchmark.stats.stats.median, 60.0)


def test_import(benchmark, record_ratio) -> None:
    def load(module: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    benchmark.pedantic(load("workbench"), rounds=3, warmup_rounds=1)
    record_ratio("import workbench / import torch", ratio(load("workbench"), load("torch"), rounds=10), 1.2)
