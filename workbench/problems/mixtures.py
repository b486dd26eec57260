"""Denoising toys whose truth is known: Gaussian mixtures.

If the data is sum_k w_k N(m_k, C_k), then x_t = alpha x_0 + sigma eps is sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2
I), so the best possible denoiser is a formula. A cheaper one merges components, keeping their mean and covariance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.problems.denoising import PREDICTIONS, ContinuousVP, Denoiser, Denoising, Network, Schedule, noisiest
from workbench.quality import Drawn, Quality, energy_distance, wasserstein_1

KINDS = ("ring", "pinwheel")
_HELD_OUT = 2000  # samples that two_dim's judge compares with, drawn once with the seed below
_HELD_OUT_SEED = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Mixture:
    """A Gaussian mixture: weights (K,), means (K, D), covariances (K, D, D), all float64; weights sum to 1."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @classmethod
    def of(cls, weights: Sequence[float], means: Any, covariances: Any) -> Mixture:
        """From numbers; (K,) means and variances do for one dimension. Raises ValueError where they do not fit."""
        w, m, c = (torch.as_tensor(np.asarray(a, dtype=np.float64)) for a in (weights, means, covariances))
        k = len(w)
        m, c = m.reshape(k, -1), c.reshape(k, *((1, 1) if c.ndim == 1 else c.shape[1:]))
        if c.shape != (k, m.shape[1], m.shape[1]) or bool((w < 0).any()) or abs(float(w.sum()) - 1) > 1e-9:
            raise ValueError(f"weights {tuple(w.shape)} of sum {float(w.sum()):.6g}, means {tuple(m.shape)}, "
                             f"covariances {tuple(c.shape)}: expected (K,) >= 0 of sum 1, (K, D), (K, D, D)")
        return cls(w, m, c)

    def sample(self, n: int, seed: int) -> Tensor:
        """n draws (n, D), fixed by the seed; torch's global generator is not touched."""
        source = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, n, replacement=True, generator=source)
        values, vectors = torch.linalg.eigh(self.covariances)
        roots = vectors * values.clamp(min=0).sqrt()[:, None]
        noise = torch.randn((n, self.means.shape[1]), dtype=torch.float64, generator=source)
        return self.means[which] + (roots[which] @ noise[..., None])[..., 0]

    def merged(self, groups: Sequence[Sequence[int]]) -> Mixture:
        """The coarser mixture with one Gaussian per group of components, of the group's own mean and covariance."""
        weights, means, covariances = [], [], []
        for group in groups:
            index = torch.tensor(list(group))
            w = self.weights[index]
            share = w / w.sum()
            mean = share @ self.means[index]
            off = self.means[index] - mean
            own = self.covariances[index] + off[:, :, None] * off[:, None]
            covariances.append(torch.einsum("k,kij->ij", share, own))
            weights.append(w.sum())
            means.append(mean)
        return Mixture(torch.stack(weights), torch.stack(means), torch.stack(covariances))

    def quantiles(self, n: int) -> Tensor:
        """The exact quantiles (n, 1) at (i + 1/2) / n of a one-dimensional mixture, by bisection to 1e-12."""
        std = self.covariances[:, 0, 0].sqrt()
        q = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        reach = 40.0 * std.max()  # no float64 quantile lies further out
        low, high = (torch.full_like(q, float(e)) for e in (self.means.min() - reach, self.means.max() + reach))
        for _ in range(math.ceil(math.log2(float(high[0] - low[0]) / 1e-12))):
            middle = (low + high) / 2
            below = torch.special.ndtr((middle[:, None] - self.means[:, 0]) / std) @ self.weights < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2)[:, None]

    def network(self, schedule: Schedule, prediction: str = "eps") -> Network:
        """`gaussian_mixture_denoiser` of this mixture."""
        return gaussian_mixture_denoiser(self.weights, self.means, self.covariances, schedule, prediction)


def gaussian_mixture_denoiser(weights: Tensor, means: Tensor, covariances: Tensor, schedule: Schedule,
                              prediction: str = "eps") -> Network:
    """The exact posterior mean of a Gaussian mixture as a network(x (B, *shape), t (B,), labels (B,) or None).

    weights (K,), or (n_labels, K) with one row per label; means (K, D); covariances (K, D, D), singular ones too;
    D is the number of entries of one sample. Returns (B, *shape) of x's dtype, what `prediction` says ("eps", "x0",
    "v" or "flow"), computed in float64, each row's t its own. Responsibilities are a softmax of log-densities and the
    matrices alpha^2 C + sigma^2 I are inverted by eigenvalues, so it holds at every noise level with sigma > 0.
    Cost per row: `mixture_flops`. Raises ValueError for an unknown prediction or for labels that do not fit weights.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction={prediction!r}: expected one of {', '.join(PREDICTIONS)}")
    log_weights = weights.double().log()
    values, vectors = torch.linalg.eigh(covariances.double())
    values = values.clamp(min=0)

    def network(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if (labels is None) != (log_weights.ndim == 1):
            raise ValueError(f"labels={labels}: weights of shape {tuple(weights.shape)} need "
                             f"{'none' if log_weights.ndim == 1 else 'one per row'}")
        logs, centres, spread, axes = (p.to(x.device) for p in (log_weights, means.double(), values, vectors))
        alpha, sigma = (level[:, None, None] for level in levels(schedule, t))
        noisy = alpha**2 * spread + sigma**2  # (B, K, D): variances of x along each component's axes
        off = torch.einsum("bkd,kde->bke", x.double().flatten(1)[:, None] - alpha * centres, axes)
        prior = logs if labels is None else logs[labels]
        share = (prior - 0.5 * (noisy.log() + off.square() / noisy).sum(-1)).softmax(-1)
        constant: Tensor = torch.zeros_like(centres)
        if prediction == "eps":
            own = sigma / noisy * off
        elif prediction == "x0":
            own, constant = alpha * spread / noisy * off, centres
        elif prediction == "v":  # alpha eps - sigma x0
            own, constant = alpha * sigma * (1 - spread) / noisy * off, -sigma * centres
        else:  # the flow's velocity, eps - x0
            own, constant = (sigma - alpha * spread) / noisy * off, -centres
        out = torch.einsum("bk,bkd->bd", share, torch.einsum("bke,kde->bkd", own, axes) + constant)
        return out.reshape(x.shape).to(x.dtype)

    return network


def levels(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha (B,) and sigma (B,) in float64 of the schedule at the times t (B,)."""
    unique, index = t.unique(return_inverse=True)
    points = [schedule.at(float(u)) for u in unique]
    scales = torch.tensor([(p.alpha, p.sigma) for p in points], dtype=torch.float64, device=t.device)[index]
    return scales[:, 0], scales[:, 1]


def mixture_flops(n_components: int, n_dims: int) -> float:
    """Operations of `gaussian_mixture_denoiser` per row, K (4 D^2 + 14 D + 6); each + - * / exp log counts one.

    Per component: centre 2 D, rotate 2 D^2, variances 3 D, log-density 5 D + 2, softmax 4, gain 2 D, rotate back 2 D^2,
    add up 2 D.
    """
    return float(n_components * (4 * n_dims**2 + 14 * n_dims + 6))


def eight_modes(schedule: Schedule | None = None) -> Denoising:
    """Eight narrow modes on a line, at +-0.6, 1.1, 1.6, 2.1 with standard deviation 0.08 and equal weights.

    Models: "moments", two Gaussians with the mean and variance of the negative and of the positive half of the data,
    knows where the data is but not its modes; "exact" is the true noise prediction. Cost: `mixture_flops`.
    Judge: `wasserstein_1` against the exact quantiles. States (n, 1) float64.

    A toy for T-Stitch (arXiv 2402.14167) with known figures for DDIM at 50 steps: Wasserstein-1 distance .035 with the
    exact model alone, .122 with the cheap one; cheap first .035 up to 70 % of the steps, .036 at 80 %, .050 at 90 %;
    costly first already .098 with the last 10 % cheap. They come out with spacing "trailing" (t = 1, .98, ..., .02,
    then the data estimate; 51 even times from 1 to .001 do as well) and 4000 to 8000 samples. Of the .035, .026 is
    the solver's and the rest sampling noise. Steps even in log-SNR lose from 80 % on: their last steps are shorter.
    """
    modes = Mixture.of([1 / 8] * 8, [s * m for s in (-1, 1) for m in (0.6, 1.1, 1.6, 2.1)], [0.08**2] * 8)
    coarse = modes.merged((range(4), range(4, 8)))
    quantiles = modes.quantiles(20_000)

    def judge(answer: Tensor, labels: Tensor | None) -> dict[str, Quality]:
        return {"wasserstein_1": wasserstein_1(answer, quantiles)}

    return _toy("eight_modes", "eight_modes()", modes, {"moments": coarse, "exact": modes}, judge, schedule,
                {"fractions": (0.4,)})


def two_modes(schedule: Schedule | None = None) -> Denoising:
    """Two broad modes on a line: weights .3 and .7, means -1 and .8, standard deviations .4 and .3.

    Smooth enough for solvers to show their order of convergence. Models: "wiener", one Gaussian of the data's mean
    and variance (a linear denoiser), and "exact". Judge: `wasserstein_1` against the exact quantiles. States (n, 1)
    float64.
    """
    modes = Mixture.of([0.3, 0.7], [-1.0, 0.8], [0.4**2, 0.3**2])
    quantiles = modes.quantiles(20_000)

    def judge(answer: Tensor, labels: Tensor | None) -> dict[str, Quality]:
        return {"wasserstein_1": wasserstein_1(answer, quantiles)}

    return _toy("two_modes", "two_modes()", modes, {"wiener": modes.merged(((0, 1),)), "exact": modes}, judge, schedule,
                {"fractions": (0.4,)})


def two_dim(kind: str = "ring", schedule: Schedule | None = None, *, has_labels: bool = False) -> Denoising:
    """A mixture in the plane with three models, cheapest first, that differ only in how finely they see the data.

    kind: "ring", eight modes on a circle, every second of them a quarter as frequent as its neighbours, or "pinwheel",
    five bent arms of three anisotropic Gaussians each. Models: "wiener", one Gaussian of the data's mean and
    covariance (a linear denoiser); "coarse", one Gaussian per class (two neighbouring modes, or an arm); "exact".
    has_labels: sample i is asked for class i modulo their number, with a null label, so that guidance has something
    to do; the wiener model is blind to labels.
    Judge: `energy_distance` to held-out draws of the true law. States (n, 2) float64. Raises ValueError for another
    kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    law, groups = _ring() if kind == "ring" else _pinwheel()
    held_out = law.sample(_HELD_OUT, _HELD_OUT_SEED)

    def judge(answer: Tensor, labels: Tensor | None) -> dict[str, Quality]:
        return {"energy_distance": energy_distance(answer, held_out, Drawn(len(answer), labels, shares))}

    shares = tuple(float(law.weights[list(group)].sum()) for group in groups)
    everything = [range(len(law.weights))]
    models = {"wiener": law.merged(everything), "coarse": law.merged(groups), "exact": law}
    name = f"two_dim_{kind}" + ("_labelled" if has_labels else "")
    call = f"two_dim({kind!r}, has_labels={has_labels})"
    return _toy(name, call, law, models, judge, schedule, {"fractions": (0.4, 0.3)}, groups if has_labels else None)


def _ring() -> tuple[Mixture, list[range]]:
    angles = [2 * math.pi * k / 8 for k in range(8)]
    means = [(1.4 * math.cos(a), 1.4 * math.sin(a)) for a in angles]  # variance about 1 per axis
    covariances = [_tilted(a, 0.08, 0.16) for a in angles]
    return Mixture.of([0.2, 0.05] * 4, means, covariances), [range(k, k + 2) for k in range(0, 8, 2)]


def _pinwheel() -> tuple[Mixture, list[range]]:
    places = [(2 * math.pi * arm / 5 + 0.35 * j, 0.6 + 0.55 * j) for arm in range(5) for j in range(3)]
    means = [(r * math.cos(a), r * math.sin(a)) for a, r in places]
    covariances = [_tilted(a + 0.45, 0.22, 0.07) for a, _ in places]
    return Mixture.of([1 / 15] * 15, means, covariances), [range(k, k + 3) for k in range(0, 15, 3)]


def _tilted(angle: float, along: float, across: float) -> list[list[float]]:
    """The covariance of standard deviation `along` in the direction of `angle` and `across` at right angles to it."""
    c, s, a, b = math.cos(angle), math.sin(angle), along**2, across**2
    return [[a * c * c + b * s * s, (a - b) * c * s], [(a - b) * c * s, a * s * s + b * c * c]]


def _toy(name: str, call: str, law: Mixture, mixtures: Mapping[str, Mixture], judge: Any, schedule: Schedule | None,
         preset: Mapping[str, Any], classes: Sequence[Sequence[int]] | None = None) -> Denoising:
    function = call.partition("(")[0]
    source = f"from workbench.problems.mixtures import {function}\n\nproblem = {call}" if schedule is None else ""
    schedule = ContinuousVP() if schedule is None else schedule
    prediction = "eps" if noisiest(schedule).alpha > 0 else "x0"  # without signal the noise says nothing about the data
    labels = None if classes is None else len(classes)
    models, flops = [], {}
    for model, mixture in mixtures.items():
        weights = mixture.weights if classes is None else _label_weights(mixture, classes)
        network = gaussian_mixture_denoiser(weights, mixture.means, mixture.covariances, schedule, prediction)
        models.append(Denoiser(model, network, schedule, prediction, null_label=labels))
        flops[model] = mixture_flops(*mixture.means.shape)
    return Denoising(
        name=name, digest=digest(name, law.weights, law.means, law.covariances, repr(schedule)), schedule=schedule,
        models=tuple(models), shape=(law.means.shape[1],), judge=judge, flops=flops,
        labels=(lambda n: None) if labels is None else (lambda n: torch.arange(n) % labels),
        reference=("ddim", {"n_steps": 50}), baseline=("ddim", {"n_steps": 50, "model": "cheapest"}),
        dtype=torch.float64, preset={"n_steps": 50, **preset}, data=law.sample, source=source)


def _label_weights(mixture: Mixture, classes: Sequence[Sequence[int]]) -> Tensor:
    """Weights (n_classes + 1, K) of a mixture of all components, of one per class, or of one alone, blind to labels.

    One row per class, the last for the null label.
    """
    rows = mixture.weights.repeat(len(classes) + 1, 1)
    if len(mixture.weights) == 1:
        return rows
    per_class = [[k] for k in range(len(classes))] if len(mixture.weights) == len(classes) else classes
    for label, group in enumerate(per_class):
        mask = torch.zeros_like(mixture.weights)
        mask[list(group)] = 1
        rows[label] *= mask / mask.dot(mixture.weights)
    return rows


def digest(*parts: str | Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of texts and of tensors' shapes and float64 values."""
    sha = hashlib.sha256()
    for part in parts:
        text = part if isinstance(part, str) else repr((tuple(part.shape), part.double().flatten().tolist()))
        sha.update(text.encode() + b"\0")
    return sha.hexdigest()[:16]
