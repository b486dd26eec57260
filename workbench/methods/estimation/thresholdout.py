"""Thresholdout: a holdout set that stays honest under adaptive questions, as most answers come of the training set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from workbench.knob import Knob
from workbench.problems.estimation import Holdout, streams
from workbench.registry import Step, method
from workbench.rng import Rng

VARIANTS = ("thresholdout", "naive", "fresh")


def laplace(uniform: np.ndarray, scale: float) -> np.ndarray:
    """Laplace noise of this scale from uniform numbers in [0, 1), by inversion."""
    u = uniform - 0.5
    return -scale * np.sign(u) * np.log1p(-2 * np.abs(u))


class Keeper:
    """Who answers questions about one holdout set: by the training set as long as that is near enough.

    A question is a mean of the training and of the held-out data. Where they differ by more than a noisy threshold
    T + gamma + eta, gamma ~ Lap(2 sigma) kept until it happens, eta ~ Lap(4 sigma), the answer is the held-out mean
    with Lap(sigma), one unit of the budget is spent, and gamma is drawn anew; else it is the training mean, for
    nothing. Once the budget is spent every answer is the training mean. Source: Science 349 (2015) 636, figure 1.
    """

    def __init__(self, threshold: float, sigma: float, budget: int, noise: np.ndarray) -> None:
        self.threshold, self.sigma, self.left, self._noise = threshold, sigma, budget, noise
        self._gamma = float(laplace(noise[:1], 2 * sigma)[0])

    def answers(self, training: np.ndarray, held_out: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Answers (m,) to questions with these means (m,), in order, and which of them are of held-out data; noise
        (m, 3) uniform."""
        eta, own = laplace(noise[:, 0], 4 * self.sigma), laplace(noise[:, 1], self.sigma)
        given, is_told = training.copy(), np.zeros(len(training), dtype=bool)
        gap = np.abs(held_out - training)
        for k in range(len(training)):
            if self.left > 0 and gap[k] > self.threshold + self._gamma + eta[k]:
                given[k], is_told[k] = held_out[k] + own[k], True
                self.left -= 1
                self._gamma = float(laplace(noise[k, 2:], 2 * self.sigma)[0])
        return given, is_told


@method(version=1, source="Thresholdout, doi 10.1126/science.aaa9375, fig. 1 and its supplement",
        cost="n_dims + n_rounds", at_most=True)
def thresholdout(
    problem: Holdout, rng: Rng, *,
    variant: Annotated[str, Knob(choices=VARIANTS, help="answers by Thresholdout, by the holdout as it is, or by fresh "
                                                        "data for every question")] = "thresholdout",
    threshold: Annotated[float, Knob(low=0.0, high=100.0, soft=(0, 12), step=0.5, unit="1 / sqrt(rows)", small=0.5,
                                     needs={"variant": "thresholdout"},
                                     help="how far training and held-out answers may differ before the latter tells"
                                     )] = 4.0,
    sigma: Annotated[float, Knob(low=0.0, high=10.0, soft=(0, 2), step=0.05, unit="1 / sqrt(rows)",
                                 needs={"variant": "thresholdout"}, help="scale of the noise in what is told")] = 0.25,
    budget: Annotated[int, Knob(low=0, high=100_000, soft=(0, 1000), step=1, unit="answers", small=5,
                                needs={"variant": "thresholdout"},
                                help="answers of held-out data that may be given in all")] = 1000,
    n_features: Annotated[int, Knob(low=1, high=5000, soft=(1, 200), step=1, unit="features", small=6,
                                    help="the most features that the analyst's last classifier votes with")] = 100,
    n_rounds: Annotated[int, Knob(low=1, high=500, soft=(1, 40), step=1, unit="questions", small=3,
                                  help="classifiers whose accuracy is asked for, each with more features")] = 20,
) -> Iterator[Step]:
    """Thresholdout: answer from the training set unless the holdout disagrees, and then with noise.

    The analyst asks for every feature's correlation with the label, keeps those whose sign the answer confirms, ranks
    them by their correlation in training, and asks for the accuracy of votes by the best k, k growing evenly to
    n_features: the analyst of the paper's experiment. "naive" answers by the holdout itself, "fresh" by rows that no
    question saw before. One step per accuracy asked. State: "reported" and "true" (n_samples, n_rounds) accuracies,
    "left" (n_samples,) of the budget; trace: reported, true, left.
    Cost: at most ``n_dims + n_rounds`` looks per sample, all of them for "naive" and "fresh".
    Raises ValueError never, beyond knobs out of their bounds.
    """
    n, d, root = rng.n_samples, len(problem.shifts), math.sqrt(problem.n_rows)
    sets = [(problem.data(rng.stream(i)), problem.data(rng.stream(i))) for i in range(n)]
    draws = streams(rng)
    keepers = [Keeper(threshold / root, sigma / root, budget, draw(1)) for draw in draws]

    def ask(i: int, questions: Tensor, kind: str) -> tuple[np.ndarray, Tensor]:
        """Answers to questions: the columns (rows, m) whose means are asked, of training and of held-out rows."""
        training, held_out = (_means(part, questions, kind) for part in sets[i])
        noise = draws[i](3 * len(training)).reshape(-1, 3)
        if variant == "naive":
            given, is_told = held_out, np.ones(len(held_out), dtype=bool)
        elif variant == "fresh":
            given = problem.fresh(noise[:, 0], questions[:, 0] if kind == "vote" else None)
            is_told = np.ones(len(given), dtype=bool)
        else:
            given, is_told = keepers[i].answers(training, held_out, noise)
        problem.reveal(torch.from_numpy(given[is_told]))
        return given, torch.from_numpy(training)

    ranked = []  # signs (d,) in the order in which features are added, and that order
    for i in range(n):
        given, training = ask(i, torch.arange(d), "feature")
        agrees = training.sign() == torch.from_numpy(given).sign()
        strength = torch.where(agrees, training.abs(), -1.0)
        order = strength.argsort(descending=True, stable=True)[: int(agrees.sum())]
        ranked.append((training.sign(), order))
    reported = torch.full((n, n_rounds), 0.5, dtype=problem.dtype)
    true = torch.full((n, n_rounds), 0.5, dtype=problem.dtype)
    for r in range(n_rounds):
        reported, true = reported.clone(), true.clone()
        k = math.ceil(n_features * (r + 1) / n_rounds)
        for i, (signs, order) in enumerate(ranked):
            vote = torch.zeros(d, dtype=problem.dtype)
            vote[order[:k]] = signs[order[:k]].to(problem.dtype)
            given, _ = ask(i, vote[:, None], "vote")
            reported[i, r], true[i, r] = float(given[0]), problem.accuracy(vote)
        reported[:, r + 1:], true[:, r + 1:] = reported[:, r:r + 1], true[:, r:r + 1]
        left = torch.tensor([keeper.left for keeper in keepers], dtype=torch.int64)
        told = {"reported": reported[:, r], "true": true[:, r], "left": left.double()}
        yield Step({"reported": reported, "true": true, "left": left}, {"i": r, "curve": k}, "", told)


def _means(part: Tensor, questions: Tensor, kind: str) -> np.ndarray:
    """Means over the rows of y x (rows, d): of features (m,), or of being right of votes (d, m)."""
    if kind == "feature":
        return part[:, questions].mean(0).numpy()
    return ((part @ questions).sign().double().mean(0).numpy() + 1) / 2
