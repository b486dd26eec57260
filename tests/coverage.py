"""How often the intervals that the workbench shows hold the truth: `python tests/coverage.py` prints the table of docs.

Each case draws samples as the workbench draws them (classes in turn, prompts in turn, paired from one noise) from a
finite population whose truth is known, judges them by the estimator that the judge of the family uses, and counts how
often the interval holds the truth. A biased figure (its mean at this n is not its limit) is asked for its mean at
this n.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from workbench import run
from workbench.frontier import Point, paired
from workbench.problems.decoding import Decoding, markov, total_variation
from workbench.problems.mixtures import two_dim, two_modes
from workbench.quality import (
    METRICS,
    Drawn,
    Quality,
    combined,
    drift,
    energy_distance,
    frechet,
    kernel_distance,
    nearest_training,
    proportion,
    ratio,
)
from workbench.runs import Inputs, Run
from workbench.speculation.engine import Ask
from workbench.zoo import CLASSES, glyphs, load_classifier

N_CLASSES = len(CLASSES)
PER_CLASS = 120  # letters of each class in the population


@dataclass(frozen=True)
class Case:
    """draw(generator) -> the figure of one draw; truth, or None for the mean of the figures drawn."""

    name: str
    n: int
    draw: Callable[[torch.Generator], Quality]
    truth: float | None = None

    def covered(self, repeats: int, seed: int = 0) -> tuple[float, float, float]:
        """(share of intervals that hold the truth, mean of the figures, mean standard error over their spread)."""
        stream = torch.Generator().manual_seed(seed)
        made = [self.draw(stream) for _ in range(repeats)]
        values = torch.tensor([q.value for q in made], dtype=torch.float64)
        truth = float(values.mean()) if self.truth is None else self.truth
        spread = float(values.std())
        errors = torch.tensor([q.stderr for q in made], dtype=torch.float64)
        return (sum(q.low <= truth <= q.high for q in made) / repeats, float(values.mean()),
                float(errors.mean()) / spread if spread else math.nan)


def pick(n: int, stream: torch.Generator, per_class: int = PER_CLASS) -> tuple[Tensor, Tensor]:
    """Indices into a population sorted by class, classes in turn, and their labels: as `labels(n)` asks."""
    labels = torch.arange(n) % N_CLASSES
    return labels * per_class + torch.randint(per_class, (n,), generator=stream), labels


@cache
def letters() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(features, read rightly, squared distance from the undisturbed) of disturbed letters, and the reference's."""
    pictures, labels = glyphs(3 * N_CLASSES * PER_CLASS, "held_out", seed=3)
    chosen = torch.cat([(labels == c).nonzero()[:PER_CLASS, 0] for c in range(N_CLASSES)])
    clean = pictures[chosen]
    stream = torch.Generator().manual_seed(0)
    # some letters lose a lot, most a little: as a cheap sampler's letters differ from the reference's
    strength = 0.9 * torch.rand((len(clean), 1, 1, 1), generator=stream) ** 2
    noisy = (clean + strength * torch.randn(clean.shape, generator=stream)).clamp(-1, 1)
    classifier = load_classifier()
    features, read = classifier.judge(noisy)
    reference, theirs = glyphs(1000, "held_out", seed=1)
    squares = ((noisy - clean) / 2).square().flatten(1).mean(1)
    return features.double(), read == labels[chosen], squares, classifier.judge(reference)[0].double(), theirs


def letter_cases() -> list[Case]:
    features, hits, squares, reference, theirs = letters()
    classifier = load_classifier()
    known = Drawn(len(theirs), theirs)
    d = features.shape[1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / d + 1) ** 3

    everything = Drawn(len(features), torch.arange(N_CLASSES).repeat_interleave(PER_CLASS))
    w = everything.weights()
    yy = kernel_distance(reference, reference, known, known)  # xx + yy - 2 xy, of which xx = yy here
    of_all = float(w @ kernel(features, features) @ w)
    to_all = float(w @ kernel(features, reference) @ known.weights())
    own = float((kernel(reference, reference) @ known.weights()) @ known.weights())
    within = yy.value / 2000 + own  # the reference's unbiased E k(Y, Y')

    def accuracy(n: int) -> Callable[[torch.Generator], Quality]:
        def draw(stream: torch.Generator) -> Quality:
            at, labels = pick(n, stream)
            return proportion(hits[at], Drawn(n, labels))
        return draw

    def seeds(k: int, n: int) -> Callable[[torch.Generator], Quality]:
        return lambda stream: combined([accuracy(n)(stream) for _ in range(k)])

    def distance(n: int) -> Callable[[torch.Generator], Quality]:
        def draw(stream: torch.Generator) -> Quality:
            at, labels = pick(n, stream)
            return kernel_distance(features[at], reference, Drawn(n, labels), known)
        return draw

    def gaussian(n: int) -> Callable[[torch.Generator], Quality]:
        def draw(stream: torch.Generator) -> Quality:
            at, labels = pick(n, stream)
            return frechet(features[at], classifier.reference_mean, classifier.reference_cov, Drawn(n, labels))
        return draw

    def drifted(n: int) -> Callable[[torch.Generator], Quality]:
        def draw(stream: torch.Generator) -> Quality:
            at, labels = pick(n, stream)
            x = squares[at].sqrt()[:, None]
            return drift(x, torch.zeros_like(x), Drawn(n, labels))
        return draw

    def apart(k: int, n: int) -> Callable[[torch.Generator], Quality]:
        """Settings that share seeds: b's squares are a's, scaled, with some of their own."""
        def draw(stream: torch.Generator) -> Quality:
            a, b = [], []
            for seed in range(k):
                at, labels = pick(n, stream)
                other, _ = pick(n, stream)
                x = squares[at].sqrt()[:, None]
                y = (0.5 * squares[at] + 0.2 * squares[other]).sqrt()[:, None]
                for made, z in ((a, x), (b, y)):
                    made.append(_run(seed, n, drift(z, torch.zeros_like(z), Drawn(n, labels))))
            return paired(_point(a), _point(b), "drift")
        return draw

    share = hits.double().mean()
    rms = squares.mean().sqrt()
    n_drift, n_kernel, n_frechet = (METRICS[m].min_n for m in ("drift", "kernel_distance", "frechet_distance"))
    n_read = METRICS["label_accuracy"].min_n
    return [
        Case("label_accuracy", n_read, accuracy(n_read), float(share)),
        Case("label_accuracy", 108, accuracy(108), float(share)),
        Case("label_accuracy, 3 seeds", 3 * 36, seeds(3, 36), float(share)),
        Case("kernel_distance", n_kernel, distance(n_kernel), 1000 * (of_all + within - 2 * to_all)),
        Case("frechet_distance", n_frechet, gaussian(n_frechet)),
        Case("drift", n_drift, drifted(n_drift), float(rms)),
        Case("drift", 4 * n_drift, drifted(4 * n_drift), float(rms)),
        Case("drift, 3 seeds", 3 * n_drift, lambda s: combined([drifted(n_drift)(s) for _ in range(3)]), float(rms)),
        Case("drift, difference, 3 seeds", 3 * n_drift, apart(3, n_drift), float(rms) * (1 - math.sqrt(0.7))),
        Case("drift, difference, 5 seeds", 5 * n_drift, apart(5, n_drift), float(rms) * (1 - math.sqrt(0.7))),
    ]


def _run(seed: int, n: int, figure: Quality) -> Run:
    from workbench import Cost

    return Run(Inputs("m", "p", "d", "1", seed, n, {}), Cost({}, {}, {}), {"drift": figure}, {}, torch.zeros(0))


def _point(runs: list[Run]) -> Point:
    figure = combined([r.quality["drift"] for r in runs])
    return Point(tuple(runs), 0.0, 0.0, figure.value, figure.stderr, figure.n, figure.low, figure.high)


def plane_cases() -> list[Case]:
    """Laws in the plane and on a line: energy distance with labels and without, Wasserstein, nearest training."""
    law = two_dim(has_labels=True)
    held_out = law.data(2000, 99)
    n_classes = law.models[0].null_label
    n_energy, n_line = METRICS["energy_distance"].min_n, METRICS["wasserstein_1"].min_n
    several, each = law.data(40_000, 5), []
    # the component nearest to each draw tells its class; half a class apart in angle
    angle = (torch.atan2(several[:, 1], several[:, 0]) / (2 * math.pi / 8)).round() % 8
    for c in range(n_classes):
        each.append(several[(angle == 2 * c) | (angle == 2 * c + 1)][:4000])
    population = torch.stack(each) * torch.tensor([1.1, 0.95]).double()
    big = population.flatten(0, 1)[:: 4]
    # draws with replacement may repeat a point: pairs of one point with itself count, unlike in the estimate
    square = (2 * torch.cdist(big, held_out).mean() - torch.cdist(big, big).mean()
              - torch.cdist(held_out, held_out).sum() / (len(held_out) * (len(held_out) - 1)))
    truth = math.sqrt(float(square))

    def labelled(n: int) -> Callable[[torch.Generator], Quality]:
        def draw(stream: torch.Generator) -> Quality:
            labels = torch.arange(n) % n_classes
            x = population[labels, 4 * torch.randint(1000, (n,), generator=stream)]
            return energy_distance(x, held_out, Drawn(n, labels))
        return draw

    line = two_modes()
    points = line.data(4000, 3)[:, :1]

    def on_line(stretch: float) -> Callable[[torch.Generator], Quality]:
        def draw(stream: torch.Generator) -> Quality:
            x = points[torch.randint(len(points), (n_line,), generator=stream)] * stretch
            return line.judge(x, None)["wasserstein_1"]
        return draw

    n_near = METRICS["nearest_training"].min_n

    def near(stream: torch.Generator) -> Quality:
        return nearest_training(big[torch.randint(len(big), (n_near,), generator=stream)], held_out)

    return [
        Case("energy_distance, labels in turn", n_energy, labelled(n_energy), truth),
        Case("wasserstein_1, far from the law", n_line, on_line(1.2)),
        Case("wasserstein_1, of the law", n_line, on_line(1.0)),
        Case("nearest_training", n_near, near, nearest_training(big, held_out).value),
    ]


def text_cases(runs: int = 6) -> list[Case]:
    """Speculative decoding on a Markov chain, texts drawn from a population of texts; and texts of shared prompts."""
    problem = markov(8)
    answers = torch.cat([run("speculative", problem, seed, 100, n_tokens=24, draft_length=4).answer
                         for seed in range(runs)])
    tokens, passes = (answers[..., 0] >= 0).sum(1).double(), answers[..., 1].max(1).values.double() + 1
    bits = torch.cat([_bits(problem, part) for part in answers.split(100)])
    n_yield, n_bits = METRICS["block_efficiency"].min_n, METRICS["surprise"].min_n

    def efficient(stream: torch.Generator) -> Quality:
        at = torch.randint(len(tokens), (n_yield,), generator=stream)
        return ratio(tokens[at], passes[at], Drawn(n_yield))

    def surprised(stream: torch.Generator) -> Quality:
        return Drawn(n_bits).mean(bits[torch.randint(len(bits), (n_bits,), generator=stream)])

    def windows(stream: torch.Generator) -> Quality:
        """45 documents of 20 windows; a document's windows share most of what makes them hard."""
        level = torch.randn(45, generator=stream).repeat_interleave(20)
        x = level + torch.randn(900, generator=stream)
        return Drawn(900, clusters=torch.arange(45).repeat_interleave(20)).mean(x)

    n_law = METRICS["total_variation"].min_n
    chain, rows = _chain(problem)

    def apart(miss: float) -> Callable[[torch.Generator], Quality]:
        """Texts of a chain that takes, this often, any token with equal odds."""
        law = (1 - miss) * rows + miss / len(rows)

        def draw(stream: torch.Generator) -> Quality:
            return total_variation(chain(law, n_law, 24, stream), rows)
        return draw

    def seeds_of_prompts(stream: torch.Generator) -> Quality:
        """12 prompts, each with a level of its own that all of its texts share, in 3 seeds of 24 texts."""
        level, prompts = torch.randn(12, generator=stream), torch.arange(24) % 12
        return combined([Drawn(24, clusters=prompts).mean(level[prompts] + torch.randn(24, generator=stream))
                         for _ in range(3)])

    return [
        Case("mean over 12 prompts, 3 seeds", 72, seeds_of_prompts, 0.0),
        Case("total_variation, of the law", n_law, apart(0.0), 0.0),
        Case("total_variation, far from the law", n_law, apart(0.5)),
        Case("block_efficiency", n_yield, efficient, float(tokens.sum() / passes.sum())),
        Case("surprise", n_bits, surprised, float(bits.mean())),
        Case("mean over windows of 45 documents", 900, windows, 0.0),
    ]


def _chain(problem: Decoding) -> tuple[Callable[[Tensor, int, int, torch.Generator], Tensor], Tensor]:
    """(law, n, n_tokens, stream) -> answers (n, n_tokens, 2), a pass for each token; the problem's own law (V, V)."""
    size = problem.target.vocab_size
    states = list(range(size))
    logits = problem.target.network(torch.tensor(states), Ask(None, [states], [[-1] * size], [states]))[0]

    def written(law: Tensor, n: int, n_tokens: int, stream: torch.Generator) -> Tensor:
        rows = [torch.zeros(n, dtype=torch.int64)]
        for _ in range(n_tokens):
            rows.append(law[rows[-1]].multinomial(1, generator=stream)[:, 0])
        return torch.stack((torch.stack(rows[1:], 1), torch.arange(n_tokens).expand(n, -1)), -1)

    return written, logits.softmax(1)


def _bits(problem: object, answers: Tensor) -> Tensor:
    rows = [problem.judge(answers[i : i + 1], None)["surprise"].value for i in range(len(answers))]  # type: ignore[attr-defined]
    return torch.tensor(rows, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=2000)
    given = parser.parse_args()
    print("| figure | samples | intervals that hold the truth | mean standard error / true spread |\n|---|---|---|---|")
    for cases in (letter_cases, plane_cases, text_cases):
        for case in cases():
            share, _, error = case.covered(given.repeats)
            print(f"| {case.name} | {case.n} | {100 * share:.1f} % | {error:.2f} |", flush=True)


if __name__ == "__main__":
    main()
