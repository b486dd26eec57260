"""A denoising problem that needs no weights: exact denoisers of a Gaussian toy with 8x8 pictures, as slow as wanted."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.problems.denoising import Denoiser, Denoising, DiscreteSchedule
from workbench.quality import Quality, proportion

SCHEDULE = DiscreteSchedule.linear()


@dataclass
class Toy:
    """problem, with what its networks were asked: rows in `calls`. seconds: that each evaluation sleeps."""

    n_models: int = 2
    seconds: float = 0.0
    dim: int | None = None  # 1 or 2: no pictures
    fails: bool = False  # whether networks raise under guidance
    calls: list[str] = field(default_factory=list)

    @property
    def problem(self) -> Denoising:
        shape = (1, 8, 8) if self.dim is None else (self.dim,)
        models = tuple(Denoiser(letter, self._network(k, shape), SCHEDULE, "x0", null_label=4)
                       for k, letter in zip(range(self.n_models), "SBL", strict=False))

        def judge(answer: Tensor, labels: Tensor | None) -> dict[str, Quality]:
            return {"label_accuracy": proportion(answer.flatten(1).mean(1) > -0.2)}

        def images(state: Tensor) -> Tensor:
            return ((state[:, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

        return Denoising(
            name="toy", digest="a toy", schedule=SCHEDULE, models=models, shape=shape, judge=judge,
            labels=lambda n: torch.arange(n) % 4, flops={m.name: 1e6 * 3**k for k, m in enumerate(models)},
            reference=("ddim", {"n_steps": 30}), baseline=("ddim", {"n_steps": 8, "model": "cheapest"}),
            images=images if self.dim is None else None,
        )

    def _network(self, k: int, shape: tuple[int, ...]) -> object:
        """The posterior mean of data at one of four bright corners; model k blurs less the larger it is."""
        corners = torch.full((5, *shape), -0.6)
        for c in range(4):
            if len(shape) == 3:
                corners[c, 0, 4 * (c // 2):4 * (c // 2) + 4, 4 * (c % 2):4 * (c % 2) + 4] = 0.8
            else:
                corners[c] = torch.tensor([(c - 1.5), (c % 2) * 1.0])[: shape[0]]
        bias = 0.15 * (self.n_models - 1 - k)

        def network(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            self.calls.append("SBL"[k])
            if self.seconds:
                time.sleep(self.seconds)
            if self.fails and labels is not None and bool((labels == 4).any()):
                raise RuntimeError("the toy network broke on purpose")
            bar = torch.tensor(SCHEDULE.alphas_cumprod)[t.long()].reshape(-1, *[1] * len(shape))
            mean = corners[labels] if labels is not None else corners[4].expand_as(x)
            gain = 0.04 * bar.sqrt() / (0.04 * bar + 1 - bar)
            return mean + bias + gain * (x - bar.sqrt() * mean)

        return network
