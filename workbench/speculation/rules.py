"""Verification rules: which of several draft tokens to output, or which token instead, so that the output follows the
target's law exactly.

A rule is exact for the draft law that it names. It looks at the tokens of one position only and draws fresh uniforms,
so whatever was drafted below a token keeps its law when the token is accepted. That is why a token drawn from a
residual law that happens to equal a draft counts as that draft: the drafts below it can go on being verified.
target_probs and draft_probs (V,) are the laws after temperature, top-k and top-p, the draft's the one drawn from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from workbench.speculation.acceptance import check_count, check_probs, k_seq_growth, k_seq_rho, optimal, remainder
from workbench.speculation.drafting import inverse, most_likely

Uniform = Callable[[], float]  # a fresh number, uniform in [0, 1)

LOG_WEIGHTS, BINS, LEVELS = 10.0, 64, 1000  # see contest
LIKELY = 12  # see duel


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


class Contest(NamedTuple):
    """How one of n i.i.d. drafts is chosen: with probability weights / their sum. law (V,): of the token chosen."""

    weights: np.ndarray
    law: np.ndarray


@np.errstate(over="ignore")  # of target / draft
def contest(target_probs: np.ndarray, draft_probs: np.ndarray, n: int) -> Contest:
    """Weights (V,) that bring the law of the chosen draft as near to the target as n i.i.d. drafts allow.

    Choosing with probability weight / sum is a race of exponential clocks, so the chosen token's law is
        law(y) = n draft(y) g(weight(y)),   g(w) = integral over t > 0 of w e^(-w t) phi(t)^(n-1) dt,
    phi(t) = sum of draft(x) e^(-weight(x) t). With u = log weight the function E[log sum of the drafts' weights] -
    sum target(y) u(y) is convex and has the gradient law - target. Minimised over 0 <= u <= LOG_WEIGHTS, it leaves
    tokens at 0 that drafts bring too often whatever is done and at the upper end those they bring too rarely, and the
    sum of min(law, target) tends to the optimum as the box grows, e^-LOG_WEIGHTS away from it.
    Since u depends on the token only through target/draft, it is first found for BINS groups of tokens of like ratio,
    then for all by inverting g, to 1 / LEVELS; below 1e-3 is missing to the optimum then. Any weights make an exact
    rule, if law is theirs: its quadrature, a trapezoid rule in log t, has an error below 1e-9. About 10 ms, and
    O(V log V).
    Derived here; arXiv 2511.15898 also finds an optimal verifier by convex minimisation, of another function.
    """
    from scipy.optimize import minimize

    target, draft = check_probs(target_probs, draft_probs)
    check_count("n", n)
    if n == 1:
        return Contest(np.ones_like(draft), draft)
    drawn = np.flatnonzero(draft)
    p, q = target[drawn], draft[drawn]
    wanted, given = _binned(p, q)
    t = np.exp(np.arange(-LOG_WEIGHTS - 14.0, 3.7, 0.6))[:, None]  # coarse: the law is computed anew below

    def missed(u: np.ndarray) -> tuple[float, np.ndarray]:
        weights = np.exp(u)
        alive = given * np.exp(-weights * t)
        phi = alive.sum(axis=1, keepdims=True)
        value = 0.6 * (np.exp(-t) - phi**n).sum() - wanted @ u
        return value, 0.6 * n * (t * phi ** (n - 1) * alive).sum(axis=0) * weights - wanted

    start = np.clip(np.log(np.maximum(wanted / given, 1e-300)) + LOG_WEIGHTS / 2, 0.0, LOG_WEIGHTS)
    u = minimize(missed, start, jac=True, method="L-BFGS-B", bounds=[(0.0, LOG_WEIGHTS)] * len(start),
                 options={"maxiter": 300, "ftol": 1e-13, "gtol": 1e-5}).x
    grid = np.linspace(0.0, LOG_WEIGHTS, 500)
    level = np.rint(LEVELS * np.interp(p / q, _race(np.exp(u), given, np.exp(grid), n), grid)).astype(np.intp)
    masses = np.bincount(level, q)
    used = np.flatnonzero(masses)
    rates = np.zeros(len(masses))
    rates[used] = _race(np.exp(used / LEVELS), masses[used], np.exp(used / LEVELS), n)
    weights, law = np.zeros_like(draft), np.zeros_like(draft)
    weights[drawn], law[drawn] = np.exp(level / LEVELS), q * rates[level]
    return Contest(weights, law)


def _binned(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both laws' masses in groups of tokens that follow each other in p/q, of about equal mass."""
    if len(p) <= BINS:
        return p, q
    order = np.argsort(p / q)
    mass = np.cumsum((p + q)[order])
    group = np.unique(np.floor(BINS * (mass - 0.5 * (p + q)[order]) / mass[-1]), return_inverse=True)[1]
    return np.bincount(group, p[order]), np.bincount(group, q[order])


def _race(weights: np.ndarray, masses: np.ndarray, at: np.ndarray, n: int) -> np.ndarray:
    """n g(w) for each w in at (G,), where drafts have the weights with probabilities masses. The trapezoid rule's
    error is about 1e-11: it falls as e^(-pi^2 / spacing) and, at the lower end, as the integrand."""
    spacing = 0.35
    t = np.exp(np.arange(-LOG_WEIGHTS - 23.0 - math.log(n), 3.7, spacing))
    phi = np.exp(-t[:, None] * weights) @ masses
    return spacing * n * at * ((t * phi ** (n - 1)) @ np.exp(-t[:, None] * at))


def _optimal(target: np.ndarray, draft: np.ndarray, tokens: Sequence[int], uniform: Uniform) -> int:
    """One of the n i.i.d. drafts is chosen by `contest`, then verified as a single one drawn from the choice's law."""
    for x in tokens:
        _check_drawn(draft, x)
    weights, law = contest(target, draft, len(tokens))
    return _couple(target, law, tokens[_draw(weights[list(tokens)], uniform)], uniform)


def _optimal_accepted(target: np.ndarray, draft: np.ndarray, n: int) -> float:
    """That the chosen draft is kept. A residual token may equal another draft, which adds less than is missing to the
    optimum."""
    return float(np.minimum(target, contest(target, draft, n).law).sum())


class Duel(NamedTuple):
    """How one of two i.i.d. drafts is chosen: that of higher rank (V,), but between two of `likely` (K,) the i-th, not
    the j-th, with probability wins[i, j]. law (V,): of the token chosen."""

    rank: np.ndarray
    likely: np.ndarray
    wins: np.ndarray
    law: np.ndarray

    def first_wins(self, x: int, y: int) -> float:
        """That x is chosen of the drafts x and y."""
        i, j = np.flatnonzero(self.likely == x), np.flatnonzero(self.likely == y)
        return float(self.wins[i[0], j[0]]) if len(i) and len(j) else float(self.rank[x] >= self.rank[y])


def duel(target_probs: np.ndarray, draft_probs: np.ndarray) -> Duel:
    """Importance weights for two i.i.d. drafts by a truncated linear program.

    The general weights w(x | x, y) make sum of min(law, target) a linear program of V^2 variables. Here only those
    between the LIKELY tokens of the largest draft probability are variables; of all other pairs the token with
    the larger target/draft is chosen. The law is exact for these weights. O(V log V) and a program of
    LIKELY (LIKELY + 1) / 2 variables, some ms. Source: arXiv 2410.18234 (the scheme and the truncation; the default for
    the other pairs is ours).
    """
    from scipy.optimize import linprog

    target, draft = check_probs(target_probs, draft_probs)
    with np.errstate(all="ignore"):
        order = np.argsort(target / draft)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    behind = np.empty_like(draft)
    behind[order] = np.cumsum(draft[order]) - draft[order]
    law = draft * (draft + 2.0 * behind)
    likely = np.array(most_likely(draft, LIKELY), dtype=np.intp)
    pairs = list(itertools.combinations(range(len(likely)), 2))
    wins = (rank[likely][:, None] >= rank[likely]).astype(np.float64)
    if pairs:
        i, j = np.array(pairs).T
        mass = 2.0 * draft[likely[i]] * draft[likely[j]]
        variable, size = np.arange(len(pairs)), len(likely)
        fixed = law[likely] - np.bincount(i, mass * wins[i, j], size) - np.bincount(j, mass * wins[j, i], size)
        # Variables: wins[i, j] for the pairs, then what is kept of each likely token: at most its target and its law.
        rows = np.zeros((size, len(pairs) + size))
        rows[i, variable], rows[j, variable] = -mass, mass
        rows[:, len(pairs):] = np.eye(size)
        limits = fixed + np.bincount(j, mass, size)
        bounds = [(0.0, 1.0)] * len(pairs) + [(0.0, float(x)) for x in target[likely]]
        answer = linprog(np.repeat([0.0, -1.0], [len(pairs), size]), rows, np.maximum(limits, 0.0), bounds=bounds)
        if not answer.success:
            raise RuntimeError(f"the linear program of {len(pairs)} pairs was not solved: {answer.message}")
        wins[i, j] = np.clip(answer.x[: len(pairs)], 0.0, 1.0)
        wins[j, i] = 1.0 - wins[i, j]
        law[likely] = fixed + np.bincount(i, mass * wins[i, j], size) + np.bincount(j, mass * wins[j, i], size)
    return Duel(rank, likely, wins, np.maximum(law, 0.0))


def _importance(target: np.ndarray, draft: np.ndarray, tokens: Sequence[int], uniform: Uniform) -> int:
    """One of two i.i.d. drafts is chosen by `duel`, then verified as a single one drawn from the choice's law."""
    for x in tokens:
        _check_drawn(draft, x)
    if len(tokens) == 1:
        return _couple(target, draft, tokens[0], uniform)
    found = duel(target, draft)
    x = tokens[0] if uniform() < found.first_wins(*tokens) else tokens[1]
    return _couple(target, found.law, x, uniform)


def _importance_accepted(target: np.ndarray, draft: np.ndarray, n: int) -> float:
    """That the chosen draft is kept, or that after its rejection the residual token equals the other one."""
    if n == 1:
        return _single_accepted(target, draft, n)
    rank, likely, wins, law = duel(target, draft)
    kept = np.minimum(target, law)
    missing = (target - kept) / max(float((target - kept).sum()), 1e-300)
    lost = draft * np.divide(law - kept, law, out=np.zeros_like(law), where=law > 0)  # times draft: chosen and rejected
    order = np.argsort(rank)
    above = np.cumsum(lost[order][::-1])[::-1] - lost[order]
    again = 2.0 * float((missing * draft)[order] @ above)
    changed = wins - (rank[likely][:, None] >= rank[likely])
    np.fill_diagonal(changed, 0.0)
    return float(kept.sum()) + again + 2.0 * float(lost[likely] @ changed @ (missing * draft)[likely])


def _optimum(drafting: str) -> Callable[[np.ndarray, np.ndarray, int], float]:
    return lambda target, draft, n: optimal(target, draft, n, drafting).acceptance


RULES: dict[str, Rule] = {rule.name: rule for rule in (
    Rule("single", "iid", _single, _single_accepted, max_drafts=1),
    Rule("rrs", "iid", _rrs, _rrs_accepted),
    Rule("rrs_without", "without", _rrs_without, None),
    Rule("k_seq", "iid", _k_seq, _k_seq_accepted),
    Rule("greedy", "greedy", _greedy, _optimum("greedy")),
    Rule("top", "top", _top, _optimum("top")),
    Rule("importance", "iid", _importance, _importance_accepted, max_drafts=2),
    Rule("optimal", "iid", _optimal, _optimal_accepted),
)}
