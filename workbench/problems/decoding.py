"""The decoding family: next-token models, a target and cheaper drafts, and the judge of what is written with them.

An evaluation is one token position through one model; a call is one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from workbench.cost import Price
from workbench.family import Family, register
from workbench.problem import Problem
from workbench.quality import Drawn, Metric, Quality, ratio, register_metric
from workbench.speculation.drafting import draw
from workbench.speculation.engine import Ask, LanguageModel, Network, Warp
from workbench.speculation.rules import RULES

register_metric(Metric(
    "block_efficiency", "tokens per target pass", "", True, 6,
    "new tokens over passes of the target; 1 is plain decoding"))
register_metric(Metric(
    "surprise", "surprise under the target", "bits per token", False, 6,
    "what the target thinks of what was written; a lossless method has that of plain decoding, less is no better"))
register_metric(Metric(
    "total_variation", "distance from the exact law", "total variation", False, 12,
    "between pairs of neighbouring tokens and the chain's own: 0 on average where they are drawn exactly, by chance "
    "below"))

FIRST = 0  # the token that closed-form problems start from


@dataclass(frozen=True, kw_only=True)
class Decoding(Problem):
    """A decoding problem: a target, drafts cheapest first, prompts, and the judge of what is written.

    What every problem has is said there. Answers are (n_samples, n_tokens, 2) integers: the token, and the number of
    the target pass that it came of, from 0; both are -1 after a sequence's end. Of the tokens of one pass the last is
    the target's own, the others are accepted drafts. prompts(n) -> n lists of at most n_prompt token ids; sample i's
    never depends on n, and they are the cases that the judge sees. positions(draft name) -> the logits (m, V) of target
    and draft at the same m contexts, as the target writes them: what acceptance is measured on. text(tokens) -> what a
    person reads. flops: {model: per position}; where attention makes it grow, of the longest prompt's last; runs are
    charged for what each pass computes, padding in a batch of unequal prompts too. ends: the tokens that end a
    sequence. dtype: of the logits.
    """

    target: LanguageModel
    drafts: tuple[LanguageModel, ...]
    prompts: Callable[[int], list[list[int]]]
    n_prompt: int
    positions: Callable[[str], tuple[Tensor, Tensor]]
    text: Callable[[Sequence[int]], str]
    reference: tuple[str, Mapping[str, Any]] = ("autoregressive", {})
    baseline: tuple[str, Mapping[str, Any]] = ("speculative", {})
    ends: tuple[int, ...] = ()
    family: ClassVar[str] = "decoding"
    sharing: ClassVar[str] = "none"  # a model's answer depends on what its session was given before

    def cases(self, seed: int, n: int) -> list[list[int]]:
        """The samples' prompts."""
        return self.prompts(n)

    def drawn(self, cases: list[list[int]], n: int) -> Drawn:
        """Samples that continue one prompt are of one cluster; where all do, they are independent given it."""
        given = [tuple(prompt) for prompt in cases]
        numbers = [given.index(prompt) for prompt in given]
        return Drawn(n, clusters=torch.tensor(numbers)) if any(numbers) else Drawn(n)

    @property
    def prices(self) -> Mapping[str, Price]:
        return {m.name: self.flops[m.name] if m.work is None else m.work for m in self.models}

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.int64

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        """Cheapest first; the target is the last."""
        return (*self.drafts, self.target)

    def draft(self, which: str) -> LanguageModel:
        """The draft that a method's knob names: "best" is the largest, "cheapest" the smallest, else one by its name.

        Raises ValueError for any other text.
        """
        names = {"cheapest": self.drafts[0], "best": self.drafts[-1], **{m.name: m for m in self.drafts}}
        if which not in names:
            raise ValueError(f"draft={which!r}: expected one of {', '.join(names)}")
        return names[which]

    def sizes(self, knobs: Mapping[str, Any]) -> dict[str, int]:
        """n_prompt: tokens of the longest prompt (others are padded)."""
        return {"n_prompt": self.n_prompt}

    def wrapped(self, wrap: Callable[[str, Network], Network]) -> Decoding:
        """This problem with each network replaced by wrap(model name, network)."""
        made = [replace(m, network=wrap(m.name, m.network)) for m in self.models]
        return replace(self, target=made[-1], drafts=tuple(made[:-1]))


def rank_acceptance(problem: Decoding, which: str, law: Warp, n_ranks: int, rule: str = "rrs_without",
                    n_positions: int = 64, repeats: int = 8) -> tuple[float, ...]:
    """How often the draft of rank 1..n_ranks at one node is the accepted one, where n_ranks are tried: (n_ranks,).

    Measured at the problem's `positions`, with `repeats` draws of the drafts at each of n_positions, from a fixed seed.
    At temperature 0 drafts come of the law at temperature 1.
    This is what Sequoia (arXiv 2402.12374, section 3.1) takes its tree from. Costs no evaluation of a run.
    """
    logits, other = (part[:n_positions] for part in problem.positions(problem.draft(which).name))
    target, draft = law(logits, list), (law if law.temperature > 0 else replace(law, temperature=1.0))(other, list)
    generator = np.random.default_rng(0)
    counts, chosen = np.zeros(n_ranks), RULES[rule]
    for target_probs, draft_probs in zip(target, draft, strict=True):
        for _ in range(repeats):
            tokens = draw(draft_probs, n_ranks, chosen.drafting, generator.random)
            found = chosen.verify(target_probs, draft_probs, tokens, lambda: float(generator.random())).draft
            if found is not None:
                counts[found] += 1
    return tuple((counts / (len(target) * repeats)).tolist())


class _Stateless:
    """The memory of a model that has none."""

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        pass


def table_model(name: str, logits: Tensor) -> LanguageModel:
    """A Markov chain: logits (V, V), row i the next token's logits after token i."""

    def network(tokens: Tensor, ask: Ask) -> list[Tensor]:
        return [logits[[row[i] for i in asked]] for row, asked in zip(ask.tokens, ask.asked, strict=True)]

    return LanguageModel(name, network, lambda n_rows: _Stateless(), logits.shape[1])


def markov(vocab_size: int = 8, divergence: float = 1.0, sharpness: float = 1.5, seed: int = 0) -> Decoding:
    """A Markov chain and two imitations of it: next-token laws known in closed form, of one token's memory.

    Target logits are sharpness x standard normal; a draft's are the target's with noise of deviation `divergence`
    (the larger draft) or twice that (the smaller). The smaller costs 1 / 40, the larger 1 / 8 of the target's FLOPs,
    by decree. Judged by the surprise of what is written and by its law: the total variation distance between pairs of
    neighbouring tokens and the chain's own (`total_variation`), from 4 samples on. Both take the target's law at
    temperature 1 for the truth. Raises ValueError for fewer than 2 tokens, or negative divergence.
    """
    if vocab_size != int(vocab_size) or vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size!r}: expected a whole number of at least 2")
    for key, value in (("divergence", divergence), ("sharpness", sharpness)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{key}={value!r}: expected 0 or more")
    stream = torch.Generator().manual_seed(seed)
    target, noise, more = (torch.randn(vocab_size, vocab_size, generator=stream, dtype=torch.float64)
                           for _ in range(3))
    target = sharpness * target
    tables = {"tiny": target + 2 * divergence * more, "small": target + divergence * noise, "target": target}
    return _tabled(f"Markov chain of {vocab_size} tokens, divergence {divergence:g}, sharpness {sharpness:g}", tables,
                   f"markov-{vocab_size}-{divergence!r}-{sharpness!r}-{seed}",
                   f"from workbench.problems.decoding import markov\n\nproblem = markov({vocab_size}, {divergence}, "
                   f"{sharpness}, {seed})")


def random_pair(vocab_size: int = 64, divergence: float = 1.0, sharpness: float = 2.0, seed: int = 0) -> Decoding:
    """One law for every position, and two drafts that miss it: acceptance without any context.

    Arguments and judge as for `markov`; a position does not depend on the one before.
    """
    chain, ask = markov(vocab_size, divergence, sharpness, seed), Ask(None, [[FIRST]], [[-1]], [[0]])
    rows = {m.name: m.network(torch.tensor([FIRST]), ask)[0] for m in chain.models}
    tables = {name: row.expand(vocab_size, -1) for name, row in rows.items()}
    return _tabled(f"one law of {vocab_size} tokens, divergence {divergence:g}, sharpness {sharpness:g}", tables,
                   f"pair-{vocab_size}-{divergence!r}-{sharpness!r}-{seed}",
                   f"from workbench.problems.decoding import random_pair\n\nproblem = random_pair({vocab_size}, "
                   f"{divergence}, {sharpness}, {seed})")


def _tabled(name: str, tables: Mapping[str, Tensor], digest: str, source: str) -> Decoding:
    *drafts, target = [table_model(key, table) for key, table in tables.items()]
    vocab_size = target.vocab_size
    probs = torch.softmax(tables["target"], dim=1)

    def judge(answer: Tensor, prompts: list[list[int]]) -> dict[str, Quality]:
        figures = {**efficiency(answer), "surprise": surprise(answer, lambda rows: [
            probs[[FIRST, *row[:-1]], row].log() for row in rows])}
        return figures | ({"total_variation": total_variation(answer, probs)} if len(answer) >= 4 else {})

    @cache
    def positions(draft: str) -> tuple[Tensor, Tensor]:
        law = torch.zeros(vocab_size, dtype=torch.float64)
        law[FIRST] = 1.0
        visits = torch.zeros(vocab_size, dtype=torch.float64)
        for _ in range(256):  # the law of the first 256 tokens' contexts, then contexts in that proportion
            visits, law = visits + law, law @ probs
        at = torch.searchsorted(visits.cumsum(0), (torch.arange(256, dtype=torch.float64) + 0.5) * (1 - 1e-12))
        return tables["target"][at], tables[draft][at]

    cost = {"tiny": 1 / 40, "small": 1 / 8, "target": 1.0}
    flops = {key: 1e6 * share for key, share in cost.items()}
    return Decoding(name=name, digest=digest, target=target, drafts=tuple(drafts), judge=judge, positions=positions,
                    prompts=lambda n: [[FIRST] for _ in range(n)], n_prompt=1, flops=flops, dtype=torch.float64,
                    text=lambda tokens: " ".join(map(str, tokens)), source=source)


def efficiency(answer: Tensor, drawn: Drawn | None = None) -> dict[str, Quality]:
    """{"block_efficiency": tokens per target pass}, of answers (n, n_tokens, 2), with its error over the n samples.

    A ratio of sums: all tokens over all passes. drawn: which samples continue one prompt.
    """
    tokens, passes = (answer[..., 0] >= 0).sum(1).double(), answer[..., 1].max(1).values.double() + 1
    return {"block_efficiency": ratio(tokens, passes, drawn or Drawn(len(answer)))}


def surprise(answer: Tensor, log_probs: Callable[[list[list[int]]], Sequence[Tensor]], drawn: Drawn | None = None
             ) -> Quality:
    """Bits per token by which the target is surprised at what was written, of answers (n, n_tokens, 2).

    log_probs(rows of tokens) -> nats of each token, per row. Mean over samples, with its standard error.
    """
    rows = [[int(token) for token in row if token >= 0] for row in answer[..., 0]]
    bits = torch.tensor([-float(nats.double().mean()) / math.log(2) for nats in log_probs(rows)], dtype=torch.float64)
    return (drawn or Drawn(len(bits))).mean(bits)


def total_variation(answer: Tensor, law: Tensor, first: int = FIRST) -> Quality:
    """The distance of neighbouring tokens' law from a Markov chain's, of answers (n, n_tokens, 2) that follow `first`.

    The half sum over pairs (a, b) of |P(a, b) - P(a) law[a, b]|, with P the law of what is written and law (V, V) the
    exact next-token laws: 0 only where every next token is drawn as the chain draws it. The empirical law is far from
    even its own at small n, so one half of the samples picks the sign of every pair, the other is summed with these
    signs, and the other way round: 0 on average, by chance below, where the law is exact, else at most the distance,
    which it nears as n grows. The interval is of the figure's mean at this n. Samples are the independent units,
    whatever their length; the two sums share their noise, so the error is that of one, not less.
    Raises ValueError for fewer than 4 samples, or a law that is not square.
    """
    if len(answer) < 4 or law.ndim != 2 or law.shape[0] != law.shape[1]:
        raise ValueError(f"answers of {len(answer)} samples, law of shape {tuple(law.shape)}: "
                         "expected at least 4, (V, V)")
    tokens = answer[..., 0].long()
    before = torch.cat((torch.full_like(tokens[:, :1], first), tokens[:, :-1]), 1)
    law, size = law.double(), len(law)

    def told(picking: slice, telling: slice) -> Quality:
        pairs = (before * size + tokens)[picking][tokens[picking] >= 0]
        counts = pairs.bincount(minlength=size * size).double().view(size, size)
        signs = (counts - counts.sum(1, keepdim=True) * law).sign()
        gains = signs - (signs * law).sum(1, keepdim=True)  # of a pair, less what the chain's own next token brings
        is_written = tokens[telling] >= 0
        gain = gains[before[telling].clamp(min=0), tokens[telling].clamp(min=0)] * is_written
        return ratio(gain.sum(1) / 2, is_written.sum(1), Drawn(len(gain)))

    even, odd = slice(0, None, 2), slice(1, None, 2)
    one, other = told(even, odd), told(odd, even)
    return Quality((one.value + other.value) / 2, math.hypot(one.stderr, other.stderr) / math.sqrt(2), len(answer),
                   df=one.df + other.df)


def follow(model: LanguageModel, rows: Sequence[Sequence[int]], firsts: Sequence[int]) -> Tensor:
    """The logits (m, V) that foretell each token of these sequences, from each one's first on; one pass per row."""
    parts = []
    for row, first in zip(rows, firsts, strict=True):
        given = list(row[:-1])
        ask = Ask(model.begin(1), [given], [list(range(-1, len(given) - 1))], [list(range(first - 1, len(given)))])
        parts.append(model.network(torch.tensor(given), ask)[0])
    return torch.cat(parts)


def _told(problem: Any, states: Sequence[Tensor], infos: Sequence[Mapping[str, Any]]) -> None:
    """Every sequence that goes on gets at least one token of each pass, and each token is told once."""
    told = torch.tensor([sum(len(info["blocks"][row].tokens) for info in infos if row in info["blocks"])
                         for row in range(2)])
    assert torch.equal((states[-1][..., 0] >= 0).sum(1), told)
    assert all(block.tokens for info in infos for block in info["blocks"].values())


register(Family(Decoding.family, "n_tokens", lambda problem, knobs: (knobs["n_tokens"], 2),
                [("workbench.problems.decoding:markov", {}), ("workbench.problems.decoding:random_pair", {})], _told,
                question="How many drafts, of what shape, are worth their price?", sample="text", sizes=("n_prompt",)))
