"""How often speculative decoding can accept: the optimum over all verifiers, k-SEQ's factor, and what that is worth.

Throughout, target_probs and draft_probs are next-token laws (V,) of the large and the small model at one position, as
the sampler uses them, that is after temperature, top-k and top-p; n drafts stand side by side at that position.
All in float64 on the host.

The optimum is the value of an optimal transport problem (arXiv 2310.15141). Its dual is a choice of a token set H:
    acceptance = 1 + min over H of [target(H) - Q(H)],   Q(H) = P(all n drafts lie in H),
and for the draft laws here a minimiser is a prefix of the tokens sorted by draft / target, largest first
(arXiv 2502.18779; for two drafts arXiv 2410.18234). It is the optimum of one position. What several positions at once
can yield, as in blocks of drafts or pooled chains, is not the product of it: see `trees.chains_bound`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from workbench.speculation.drafting import DRAFTINGS, most_likely

# The quadrature of the race below: nodes 2^(i/3) from T_FIRST on, where three clocks have rung with probability 1e-9
# times 1/6 at most, to where the rest of the integral is below e^-DECAY or the integrand below NEGLIGIBLE.
T_FIRST, DECAY, NEGLIGIBLE = 1e-3, 27.0, 1e-13
SPACING = math.log(2) / 3  # of log t; the error of the trapezoid rule for n = 8 is about 1e-11, less for fewer
SEGMENTS = 512
CERTAIN = 40.0  # a clock of rate times t above has rung for certain, to 1e-17; keeps the products of odds finite
IMPOSSIBLE = 1e-200  # without replacement, a token below this draft probability counts as having none
TOLERANCE = 1e-11  # prefixes that cannot improve the minimum by more are not evaluated


class Optimum(NamedTuple):
    """acceptance: P(output is one of the drafts) under the best verifier. The token set that binds is
    order[:subset_size], with order (V,) all token ids: by draft/target, largest first; for "greedy" and "top" the
    deterministic drafts before all others."""

    acceptance: float
    subset_size: int
    order: np.ndarray


def optimal(target_probs: np.ndarray, draft_probs: np.ndarray, n_drafts: int, drafting: str = "iid") -> Optimum:
    """The largest acceptance that any verifier of n_drafts drafts can have. Laws (V,); absolute error below 1e-9.

    See `optimal_counts`, which shares the work between several n_drafts.
    """
    return optimal_counts(target_probs, draft_probs, (n_drafts,), drafting)[0]


def optimal_counts(target_probs: np.ndarray, draft_probs: np.ndarray, counts: Sequence[int], drafting: str = "iid"
                   ) -> list[Optimum]:
    """`optimal` for each number of drafts in counts, with one sort for all.

    "iid": O(V log V), exact. "without": one or two drafts in closed form; more by quadrature over an exponential
    race, about 100 nodes times V times the largest count. "greedy" and "top": closed forms, O(V).
    No more tokens are drafted without replacement than have draft probability: larger counts give the same.
    Sources: arXiv 2502.18779; the race is our derivation. Raises ValueError naming a bad argument.
    """
    target, draft = check_probs(target_probs, draft_probs)
    _check_drafting(drafting)
    for n in counts:
        check_count("n_drafts", n)
    if drafting in ("greedy", "top"):
        return [_deterministic(target, draft, n, drafting) for n in counts]
    if drafting == "without":
        draft[draft < IMPOSSIBLE] = 0.0
    order = _by_ratio(target, draft)
    p, q = target[order], draft[order]
    if drafting == "iid":
        found = _iid(p, q, counts)
    else:
        support = int(np.count_nonzero(q))
        found = _without(p[:support], q[:support], [min(n, support) for n in counts])
    return [Optimum(min(1.0, 1.0 + value), size, order) for value, size in found]


def optimal_many(target_probs: np.ndarray, draft_probs: np.ndarray, n_drafts: int, drafting: str = "iid") -> np.ndarray:
    """`optimal`'s acceptance (B,) for B positions: laws (B, V). "iid" is one sort of each row; others go row by row."""
    target, draft = check_probs(target_probs, draft_probs, ndim=2)
    _check_drafting(drafting)
    check_count("n_drafts", n_drafts)
    if drafting != "iid":
        return np.array([optimal(p, q, n_drafts, drafting).acceptance for p, q in zip(target, draft, strict=True)])
    found = []
    for p, q, order in zip(target, draft, _by_ratio(target, draft), strict=True):  # a row at a time fits the cache
        found.append(min(1.0, 1.0 + _iid(p[order], q[order], (n_drafts,))[0][0]))
    return np.array(found)


def optimal_lp(target_probs: np.ndarray, law: Mapping[frozenset[int] | tuple[int, ...], float]) -> float:
    """The largest acceptance for any joint law of the drafts, by linear programming (HiGHS). Target (V,).

    law: probability of each tuple (or set) of drafted tokens; only the set of distinct tokens matters. Variables: mass
    that a set sends to one of its own tokens; a set sends at most its probability, a token takes at most the target's.
    Cost grows with (number of sets) x (tokens in each): for small V. Source: arXiv 2310.15141, section 2.1 (problem).
    """
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    target = check_law("target_probs", target_probs)
    masses: dict[frozenset[int], float] = {}
    for tokens, mass in law.items():
        if not tokens or any(not 0 <= x < len(target) for x in tokens):
            raise ValueError(f"law has drafts {tokens!r}; they must be one or more token ids, 0 to {len(target) - 1}")
        masses[frozenset(tokens)] = masses.get(frozenset(tokens), 0.0) + mass
    check_law("law", np.array(list(masses.values())))
    pairs = [(i, x) for i, tokens in enumerate(masses) for x in sorted(tokens)]
    rows = np.array([[i, len(masses) + x] for i, x in pairs])
    columns = np.repeat(np.arange(len(pairs)), 2)
    limits = np.concatenate([list(masses.values()), target])
    matrix = coo_array((np.ones(2 * len(pairs)), (rows.ravel(), columns)), shape=(len(limits), len(pairs)))
    answer = linprog(-np.ones(len(pairs)), A_ub=matrix.tocsr(), b_ub=limits, method="highs")
    if not answer.success:
        raise RuntimeError(f"the linear program of {len(pairs)} variables was not solved: {answer.message}")
    return float(-answer.fun)


def draft_law(draft_probs: np.ndarray, n_drafts: int, drafting: str) -> dict[tuple[int, ...], float]:
    """The joint law of the ordered drafts of one position, for small V: up to V^n tuples.

    "iid": independent draws. "without": each from the draft law without the tokens already drawn. "greedy": the n - 1
    likeliest tokens, then one drawn from the others. "top": the n likeliest. Only tokens with draft probability.
    """
    draft = check_law("draft_probs", draft_probs)
    _check_drafting(drafting)
    check_count("n_drafts", n_drafts)
    support = np.flatnonzero(draft).tolist()
    if drafting == "iid":
        return {drawn: math.prod(float(draft[x]) for x in drawn)
                for drawn in itertools.product(support, repeat=n_drafts)}
    n = min(n_drafts, len(support))
    n_fixed = {"without": 0, "greedy": n - 1, "top": n}[drafting]
    law = {tuple(most_likely(draft, n_fixed)): 1.0}
    for _ in range(n - n_fixed):
        law = {(*drawn, x): mass * float(rest[x]) for drawn, mass in law.items()
               for rest in (remainder(draft, drawn),) for x in np.flatnonzero(rest).tolist()}
    return law


def remainder(draft_probs: np.ndarray, taken: Collection[int]) -> np.ndarray:
    """The draft law (V,) without the tokens taken, rescaled to sum 1; all zero if they held all of it."""
    rest = np.array(draft_probs, dtype=np.float64)
    rest[list(taken)] = 0.0
    total = rest.sum()
    return rest / total if total > 0 else rest


def k_seq_rho(target_probs: np.ndarray, draft_probs: np.ndarray, n: int) -> float:
    """k-SEQ's smallest valid division factor rho* in [1, n] for n i.i.d. drafts, rounded up by less than 1e-12 rho*.

    With beta = sum min(draft, target / rho) it solves 1 - (1 - beta)^n = rho beta; a smaller rho would ask for a
    negative residual. Bisection, about 45 times O(V). Source: arXiv 2310.15141, algorithm 1 and its theorem.
    """
    target, draft = check_probs(target_probs, draft_probs)
    check_count("n", n)
    low, high = 1.0, float(n)
    while high - low > 1e-13 * high:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if k_seq_growth(target, draft, n, middle) > middle else (low, middle)
    return high


def k_seq_growth(target: np.ndarray, draft: np.ndarray, n: int, rho: float) -> float:
    """(1 - (1 - beta)^n) / beta at rho, as a sum that also holds for beta = 0; at most rho if rho is valid."""
    beta = float(np.minimum(draft, target / rho).sum())
    return sum((1.0 - beta) ** i for i in range(n))


def block_efficiency(alpha: float, draft_length: int) -> float:
    """Tokens per target pass with draft_length drafts in a chain, each accepted with probability alpha.

    (1 - alpha^(draft_length + 1)) / (1 - alpha), the token that the target adds included. Source: arXiv 2211.17192.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha!r}; it must be a probability, from 0 to 1")
    if draft_length < 0 or draft_length != int(draft_length):
        raise ValueError(f"draft_length is {draft_length!r}; it must be a whole number, at least 0")
    return float(sum(alpha**i for i in range(int(draft_length) + 1)))


def speedup(alpha: float, draft_length: int, draft_cost: float, target_cost: Callable[[int], float] | None = None
            ) -> float:
    """Tokens per second over those of the target alone.

    draft_cost: seconds of a draft pass / seconds of a target pass of one token. target_cost(k): cost of a target pass
    of k tokens, in any unit, as measured; None: the same for every k, as while memory bounds it. Source: arXiv
    2211.17192, theorem 3.8, where the cost is flat.
    """
    _check_cost("draft_cost", draft_cost)
    passes = 1.0
    if target_cost is not None:
        verify, one = (_check_cost("target_cost", target_cost(k)) for k in (int(draft_length) + 1, 1))
        if one == 0:
            raise ValueError("target_cost(1) is 0; the cost of a target pass must be positive")
        passes = verify / one
    return block_efficiency(alpha, draft_length) / (draft_length * draft_cost + passes)


def arithmetic_factor(alpha: float, draft_length: int, draft_flops: float) -> float:
    """Operations per token over those of the target alone; draft_flops: a draft token's / a target token's.

    (draft_length draft_flops + draft_length + 1) / block efficiency. Source: arXiv 2211.17192, theorem 3.11.
    """
    _check_cost("draft_flops", draft_flops)
    return (draft_length * draft_flops + draft_length + 1) / block_efficiency(alpha, draft_length)


def check_law(name: str, probs: np.ndarray, ndim: int = 1) -> np.ndarray:
    """The probabilities in float64, rescaled to sum exactly to 1 over the last axis. Raises ValueError if they have
    another number of axes than ndim, are not finite, negative, or sum to something more than 1e-6 away from 1."""
    out = np.asarray(probs, dtype=np.float64)
    if out.ndim != ndim or out.size == 0:
        raise ValueError(f"{name} has shape {out.shape}; it must have {ndim} axes, none of them empty")
    totals = out.sum(axis=-1, keepdims=True)
    if not np.isfinite(totals).all():
        raise ValueError(f"{name} has {np.count_nonzero(~np.isfinite(out))} values that are not finite; all must be")
    if (least := out.min()) < 0:
        raise ValueError(f"{name} has the value {least}; probabilities must not be negative")
    off = np.abs(totals - 1.0)
    if off.max() > 1e-6:
        raise ValueError(f"{name} sums to {totals.ravel()[off.argmax()]}; it must sum to 1 within 1e-6")
    return out / totals


def check_probs(target_probs: np.ndarray, draft_probs: np.ndarray, ndim: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Both laws by `check_law`; raises ValueError also if they differ in shape."""
    target, draft = check_law("target_probs", target_probs, ndim), check_law("draft_probs", draft_probs, ndim)
    if target.shape != draft.shape:
        raise ValueError(f"target_probs has shape {target.shape}, draft_probs {draft.shape}; they must be equal")
    return target, draft


def check_count(name: str, value: int) -> None:
    if value < 1 or value != int(value):
        raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 1")


def _check_drafting(drafting: str) -> None:
    if drafting not in DRAFTINGS:
        raise ValueError(f"drafting is {drafting!r}; it must be one of {', '.join(map(repr, DRAFTINGS))}")


def _check_cost(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value!r}; it must be a finite number, at least 0")
    return value


def _by_ratio(target: np.ndarray, draft: np.ndarray) -> np.ndarray:
    """Token ids (..., V) by draft/target, largest first; those without draft probability last."""
    with np.errstate(all="ignore"):
        return np.argsort(target / draft, axis=-1)  # 0/0 is nan, which sorts last


def _power(x: np.ndarray, n: int) -> np.ndarray:
    """x^n by multiplications: numpy's own takes a logarithm and an exponential."""
    out, square = np.ones_like(x), x
    while n:
        out = out * square if n & 1 else out
        square, n = square * square, n >> 1
    return out


def _after(values: np.ndarray) -> np.ndarray:
    """Sums before each position and over all: (V,) -> (V + 1,), from 0 on."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _smallest(gaps: np.ndarray) -> tuple[float, int]:
    i = int(gaps.argmin())
    return float(gaps[i]), i


def _deterministic(target: np.ndarray, draft: np.ndarray, n: int, drafting: str) -> Optimum:
    """Greedy: target(Top) + sum outside of min(target, remainder), which the set Top + {target < remainder} binds.
    Top: target(Top)."""
    n = min(n, int(np.count_nonzero(draft)))
    top = most_likely(draft, n if drafting == "top" else n - 1)
    rest = np.zeros_like(draft) if drafting == "top" else remainder(draft, top)
    order = _by_ratio(target, draft)
    is_top = np.zeros(len(draft), dtype=bool)
    is_top[top] = True
    order = np.concatenate([np.array(top, dtype=order.dtype), order[~is_top[order]]])
    over = int(np.count_nonzero(rest[order[len(top):]] > target[order[len(top):]]))
    acceptance = target[top].sum() + np.minimum(target, rest).sum(where=~is_top)
    return Optimum(min(1.0, float(acceptance)), len(top) + over, order)


def _iid(p: np.ndarray, q: np.ndarray, counts: Sequence[int]) -> list[tuple[float, int]]:
    """min of target(H) - draft(H)^n over prefixes H, and its size, for laws (V,) in order."""
    in_target, in_draft = _after(p), _after(q)
    return [_smallest(in_target - _power(in_draft, n)) for n in counts]


def _without(p: np.ndarray, q: np.ndarray, counts: Sequence[int]) -> list[tuple[float, int]]:
    """min of target(H) - Q(H) over prefixes H, and its size; q positive everywhere and summing to 1."""
    in_target, found = _after(p), {}
    for n in {n for n in counts if n <= 2}:
        found[n] = _smallest(in_target - (_after(q) if n == 1 else _pairs(q)))
    if raced := sorted({n for n in counts if n > 2}):
        found |= dict(zip(raced, _race(in_target, p / q, q, raced), strict=True))
    return [found[n] for n in counts]


def _pairs(q: np.ndarray) -> np.ndarray:
    """Q of every prefix (V + 1,) for two drafts: token x joins H by being first or second to one of H. No difference is
    taken that could cancel: what the likeliest token leaves is summed."""
    left = 1.0 - q
    top = int(q.argmax())
    left[top] = q[:top].sum() + q[top + 1:].sum()
    odds = q / left if left[top] > 0 else np.full_like(q, np.inf)
    return _after(q * _after(odds)[:-1] + odds * _after(q)[:-1])


def _race(in_target: np.ndarray, ratio: np.ndarray, q: np.ndarray, counts: Sequence[int]) -> list[tuple[float, int]]:
    """The minimum over prefixes for n drafts without replacement, n in counts, by an exponential race.

    Give each token a clock that rings at rate q: the order of ringing is the order of drawing. So Q(H) is the
    probability that n clocks of H ring before any outside, whose first ring comes at rate c = 1 - q(H):
        1 - Q(H) = integral of c e^(-c t) P(fewer than n of H have rung at t) dt,
    a trapezoid rule in log t, whose integrand decays exponentially at both ends. The law of the number rung, cut at
    max(counts), is built token by token from positive terms only.

    Prefixes are evaluated at the ends of segments first. Q is convex in q(H) along prefixes and so below its chord
    within a segment, and the target's mass, whose slope is the sorted ratio, is above its tangents. Only the segments
    that may hold the minimum by these bounds are evaluated token by token.
    """
    size, depth = len(q), max(counts)
    n_segments = min(SEGMENTS, -(-size // 32))
    length = -(-size // n_segments)
    n_segments = -(-size // length)
    padding = np.zeros(n_segments * length - size)
    in_target = np.concatenate([in_target, padding + in_target[-1]])
    outside = np.concatenate([np.cumsum(q[::-1])[::-1], [0.0], padding])  # (size + 1,) summed, not 1 - sum
    q = np.concatenate([q, padding])
    in_draft = _after(q)
    ends = np.arange(0, len(q) + 1, length)
    blocks = np.ascontiguousarray(q.reshape(n_segments, length).T)

    nearest = outside[np.minimum(ends[1:], size - 1)]  # the smallest c in each segment, but for all tokens' 0
    base = in_target - 1.0 + _below(outside * T_FIRST)

    # Checkpoints: the law of the number rung at each end, (depth, nodes, ends), an octave of t at a time.
    t = T_FIRST * np.exp(SPACING * np.arange(3))
    odds = np.expm1(np.minimum(t[:, None] * blocks[:, None, :], CERTAIN))  # (length, 3, segments)
    octaves, times = [], []
    while True:
        silent = np.exp(-np.minimum(t[:, None] * blocks[:, None, :], CERTAIN).sum(axis=0))
        octaves.append(_scan(_ring(_nothing(depth, 3, n_segments), odds) * silent))
        times.append(t)
        is_open = (nearest * t[-1] < DECAY) & (in_target[ends[:-1]] < 1.0 - TOLERANCE)
        is_open &= octaves[-1][:, -1, :-1].sum(axis=0) > NEGLIGIBLE
        if not is_open.any():
            break
        t, odds = 2.0 * t, np.minimum(odds * (odds + 2.0), math.expm1(CERTAIN))  # expm1(2y) from expm1(y)
    state, t = np.concatenate(octaves, axis=1), np.concatenate(times)

    def gaps(law: np.ndarray, at: np.ndarray, scale: np.ndarray | float = 1.0) -> np.ndarray:
        """target(H) - Q(H), (counts, prefixes), from the law of the number rung (depth, nodes, prefixes) / scale."""
        x = t[:, None] * outside[at]
        fewer = np.cumsum(law, axis=0)[np.array(counts) - 1]
        return base[at] + np.einsum("tp,ntp->np", SPACING * x * np.exp(-x) * scale, fewer)

    values = gaps(state, ends)
    best = [_smallest(row) for row in values]
    best = [(value, int(min(ends[i], size))) for value, i in best]

    # Bounds within segments: at the knot where the tangents of the target's mass from both ends meet.
    first, last = ends[:-1], np.minimum(ends[1:], size)
    low, high = ratio[first], ratio[last - 1]
    width = in_draft[last] - in_draft[first]
    rise = in_target[last] - in_target[first]
    with np.errstate(all="ignore"):
        knot = np.where(high > low, np.clip((high * width - rise) / (high - low), 0.0, width), 0.0)
        share = np.where(width > 0, knot / width, 0.0)
    tangent = in_target[first] + low * knot
    chord = (in_target[ends] - values)[:, :-1] * (1.0 - share) + (in_target[ends] - values)[:, 1:] * share
    bound = tangent - chord
    is_out = bound >= np.array([value for value, _ in best])[:, None] - TOLERANCE  # not so where the bound is nan
    alive = np.flatnonzero(~is_out.all(axis=0))
    for chosen in np.array_split(alive, -(-len(alive) // 64) or 1):
        law, spent = state[:, :, chosen], np.zeros((len(t), len(chosen)))
        for step in range(length):
            y = np.minimum(t[:, None] * blocks[step, chosen], CERTAIN)
            law, spent = _ring(law, np.expm1(y)[None]), spent + y
            at = ends[chosen] + step + 1
            inner = gaps(law, at, np.exp(-spent))
            for j, row in enumerate(inner):
                if row.size and row.min() < best[j][0]:
                    best[j] = float(row.min()), int(min(at[row.argmin()], size))
    return best


def _nothing(depth: int, n_nodes: int, n_sets: int) -> np.ndarray:
    """The law of the number rung among no clocks."""
    law = np.zeros((depth, n_nodes, n_sets))
    law[0] = 1.0
    return law


def _ring(law: np.ndarray, odds: np.ndarray) -> np.ndarray:
    """In place, the law of the number rung, (depth, nodes, sets), with more clocks in each set: odds (clocks, nodes,
    sets) of each to have rung. The result is to be multiplied by the probabilities that they have not."""
    more = np.empty_like(law[1:])
    for x in odds:
        np.multiply(law[:-1], x, out=more)
        law[1:] += more
    return law


def _scan(laws: np.ndarray) -> np.ndarray:
    """From laws of the number rung in S sets, (depth, nodes, S), those in the first 0, 1, ..., S sets together."""
    depth, n_nodes, n_sets = laws.shape
    shift = 1
    while shift < n_sets:
        together = laws.copy()
        together[..., shift:] = 0.0
        for i in range(depth):
            together[i:, :, shift:] += laws[i, :, :-shift] * laws[: depth - i, :, shift:]
        laws, shift = together, 2 * shift
    return np.concatenate([_nothing(depth, n_nodes, 1), laws], axis=2)


def _below(x: np.ndarray) -> np.ndarray:
    """The trapezoid rule's part below its first node, where none of the clocks counts as rung: the sum of
    SPACING y e^-y over y = x 2^(-i/3), i = 1, 2, ..., as a series in x."""
    return SPACING * sum((-1) ** j * x ** (j + 1) / math.factorial(j) / math.expm1(SPACING * (j + 1)) for j in range(5))
