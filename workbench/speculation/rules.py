"""Verification rules: which of several draft tokens to output, or which token instead, so that the output follows the
target's law exactly.

A rule is exact for the draft law that it names. It looks at the tokens of one position only and draws fresh uniforms,
so whatever was drafted below a token keeps its law when the token is accepted. That is why a token drawn from a
residual law that happens to equal a draft counts as that draft: the drafts below it can go on being verified.
target_probs and draft_probs (V,) are the laws after temperature, top-k and top-p, the draft's the one drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from workbench.speculation.acceptance import check_count, check_probs, k_seq_growth, k_seq_rho, optimal, remainder
from workbench.speculation.drafting import inverse

Uniform = Callable[[], float]  # a fresh number, uniform in [0, 1)


class Verdict(NamedTuple):
    """token: the output. draft: index of the first of the drafts that equals it, None where none does."""

    token: int
    draft: int | None


@dataclass(frozen=True)
class Rule:
    """A rule for the drafting it names (see `drafting.draw`) and at most max_drafts drafts, None for any number.

    decide(target, draft, tokens, uniform) -> output token; accepted(target, draft, n) -> P(output is a draft), None
    where it has no closed form. Both are given checked laws in float64; call `verify` and `acceptance` instead.
    """

    name: str
    drafting: str
    decide: Callable[[np.ndarray, np.ndarray, Sequence[int], Uniform], int]
    accepted: Callable[[np.ndarray, np.ndarray, int], float] | None
    max_drafts: int | None = None

    def verify(self, target_probs: np.ndarray, draft_probs: np.ndarray, tokens: Sequence[int], uniform: Uniform
               ) -> Verdict:
        """The output at a position with drafts `tokens` in the order drawn. Laws (V,); a few passes over them.

        Raises ValueError naming the argument: laws that are none or differ in length, tokens out of range, of no draft
        probability, none at all or more than the rule takes.
        """
        target, draft = check_probs(target_probs, draft_probs)
        self._check_count("tokens", len(tokens))
        for x in tokens:
            if not 0 <= x < len(draft):
                raise ValueError(f"tokens has {x!r}; token ids must be from 0 to {len(draft) - 1}")
        token = int(self.decide(target, draft, tokens, uniform))
        return Verdict(token, next((i for i, x in enumerate(tokens) if x == token), None))

    def acceptance(self, target_probs: np.ndarray, draft_probs: np.ndarray, n: int) -> float | None:
        """P(output is one of n drafts), None where there is no closed form. Raises ValueError as `verify` does."""
        target, draft = check_probs(target_probs, draft_probs)
        check_count("n", n)
        self._check_count("n", n)
        return None if self.accepted is None else min(1.0, float(self.accepted(target, draft, n)))

    def _check_count(self, name: str, n: int) -> None:
        if n < 1 or (self.max_drafts is not None and n > self.max_drafts):
            allowed = "at least 1" if self.max_drafts is None else f"1 to {self.max_drafts}"
            raise ValueError(f"{name}: {n} drafts for the rule {self.name!r}, which takes {allowed}")


def _draw(weights: np.ndarray, uniform: Uniform) -> int:
    return inverse(weights, np.array([uniform()]))[0]


def _left(wanted: np.ndarray, given: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(wanted - given)^+ rescaled to a law. It is empty only where the laws agree and a draft is rejected by rounding:
    then the target."""
    rest = np.maximum(wanted - given, 0.0)
    total = rest.sum()
    return rest / total if total > 0 else target


def _check_drawn(draft: np.ndarray, x: int) -> None:
    if draft[x] <= 0:
        raise ValueError(f"tokens has {x}, which draft_probs (without the tokens before it) gives probability 0")


def _couple(target: np.ndarray, law: np.ndarray, x: int, uniform: Uniform) -> int:
    """x, drawn from law, kept with probability min(1, target / law); else a draw from what it leaves of the target."""
    if uniform() * law[x] < target[x]:
        return x
    return _draw(_left(target, law, target), uniform)


def _single(target: np.ndarray, draft: np.ndarray, tokens: Sequence[int], uniform: Uniform) -> int:
    """arXiv 2211.17192, algorithm 1; arXiv 2302.01318."""
    _check_drawn(draft, tokens[0])
    return _couple(target, draft, tokens[0], uniform)


def _single_accepted(target: np.ndarray, draft: np.ndarray, n: int) -> float:
    return float(np.minimum(target, draft).sum())


def _rrs(target: np.ndarray, draft: np.ndarray, tokens: Sequence[int], uniform: Uniform) -> int:
    """Recursive rejection, i.i.d. drafts: each is tried against what its forerunners left. arXiv 2305.09781."""
    wanted = target
    for x in tokens:
        _check_drawn(draft, x)
        if uniform() * draft[x] < wanted[x]:
            return x
        wanted = _left(wanted, draft, target)
    return _draw(wanted, uniform)


def _rrs_accepted(target: np.ndarray, draft: np.ndarray, n: int) -> float:
    wanted, rejected = target, 1.0
    for _ in range(n):
        rejected *= max(0.0, 1.0 - np.minimum(wanted, draft).sum())
        wanted = _left(wanted, draft, target)
    return 1.0 - rejected


def _rrs_without(target: np.ndarray, draft: np.ndarray, tokens: Sequence[int], uniform: Uniform) -> int:
    """Recursive rejection of drafts without replacement: each against the law that it was drawn from, which lacks the
    tokens before it. Tokens beyond those with draft probability are taken as given. arXiv 2402.14160, 2402.12374."""
    wanted, given = target, draft
    for x in tokens:
        if not given.any():
            given = np.zeros_like(draft)
            given[x] = 1.0
        _check_drawn(given, x)
        if uniform() * given[x] < wanted[x]:
            return x
        wanted, given = _left(wanted, given, target), remainder(given, (x,))
    return _draw(wanted, uniform)


def _k_seq(target: np.ndarray, draft: np.ndarray, tokens: Sequence[int], uniform: Uniform) -> int:
    """Each of n i.i.d. drafts is tried against target / rho*. arXiv 2310.15141, algorithm 1."""
    n = len(tokens)
    rho = k_seq_rho(target, draft, n)
    for x in tokens:
        _check_drawn(draft, x)
        if uniform() * rho * draft[x] < target[x]:
            return x
    kept = np.minimum(draft, target / rho) * k_seq_growth(target, draft, n, rho)
    return _draw(_left(target, kept, target), uniform)


def _k_seq_accepted(target: np.ndarray, draft: np.ndarray, n: int) -> float:
    rho = k_seq_rho(target, draft, n)
    return 1.0 - (1.0 - min(1.0, float(np.minimum(draft, target / rho).sum()))) ** n


def _top(target: np.ndarray, draft: np.ndarray, tokens: Sequence[int], uniform: Uniform) -> int:
    """Each draft is kept with what it has of the target left, whatever its draft probability: exact for any tokens that
    were not drawn at random. As in EAGLE-2's code (arXiv 2406.16858)."""
    wanted = target
    for x in tokens:
        if uniform() < wanted[x]:
            return x
        wanted = wanted.copy()
        wanted[x] = 0.0
        wanted = _left(wanted, np.zeros_like(wanted), target)
    return _draw(wanted, uniform)


def _greedy(target: np.ndarray, draft: np.ndarray, tokens: Sequence[int], uniform: Uniform) -> int:
    """All but the last draft are given, the last is drawn from the others: single-draft verification of the last, whose
    residual law holds all that the target has on the given ones. arXiv 2502.18779; attains the optimum of its law."""
    *given, x = tokens
    rest = remainder(draft, given)
    if not rest.any():  # there was nothing left to draw from, so the last is given too
        return _top(target, draft, tokens, uniform)
    _check_drawn(rest, x)
    return _couple(target, rest, x, uniform)


def _optimum(drafting: str) -> Callable[[np.ndarray, np.ndarray, int], float]:
    return lambda target, draft, n: optimal(target, draft, n, drafting).acceptance


RULES: dict[str, Rule] = {rule.name: rule for rule in (
    Rule("single", "iid", _single, _single_accepted, max_drafts=1),
    Rule("rrs", "iid", _rrs, _rrs_accepted),
    Rule("rrs_without", "without", _rrs_without, None),
    Rule("k_seq", "iid", _k_seq, _k_seq_accepted),
    Rule("greedy", "greedy", _greedy, _optimum("greedy")),
    Rule("top", "top", _top, _optimum("top")),
)}
