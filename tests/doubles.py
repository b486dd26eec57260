"""diffusers' multistep schedulers in double precision, on a grid and noise of one's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.problems.denoising import Denoising, Point
from workbench.rng import Rng

NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


class _InDouble:
    """torch, as a scheduler sees it, with double for float: schedulers cast to float32 by name, whatever they get."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def ones(self, *shape: Any, **options: Any) -> Tensor:
        return torch.ones(*shape, **{"dtype": torch.float64} | options)


def theirs(monkeypatch: pytest.MonkeyPatch, scheduler: Any, problem: Denoising, points: Sequence[Point], seed: int = 0,
           n_samples: int = 6, is_stochastic: bool = False) -> Tensor:
    """What the scheduler makes of the noise of Rng(seed) with the problem's last model on `points`."""
    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "torch", _InDouble())
    scheduler.set_timesteps(len(points) - 1)
    # a table of its own sigmas in double, for it keeps them in single precision
    scheduler.sigmas = torch.tensor([p.sigma / p.alpha for p in points], dtype=torch.float64)
    rng = Rng(seed, n_samples)
    x = problem.start(rng)
    for i, (t, point) in enumerate(zip(scheduler.timesteps, points[:-1], strict=True)):
        labels = torch.full((n_samples,), point.t, dtype=torch.float64)
        out = problem.models[-1].network(x, labels, None)
        scheduler._step_index = i
        more = {"variance_noise": rng.normal(problem.shape, problem.dtype)} if is_stochastic else {}
        x = scheduler.step(out, t, x, **more).prev_sample
    return x
