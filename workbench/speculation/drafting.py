"""Drawing draft tokens at one node, and the warped law they are drawn from.

A verification rule is exact only for the law that its drafts were drawn by: `draft_probs` here must be what the rule is
given, and `warp` must be applied to both models alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

DRAFTINGS = ("iid", "without", "greedy", "top")
Uniform = Callable[[int], np.ndarray]  # that many numbers, uniform in [0, 1)


def draw(draft_probs: ArrayLike, n: int, drafting: str, uniform: Uniform) -> list[int]:
    """n draft tokens from draft_probs (V,), in the order in which a rule tries them.

    drafting "iid": n independent draws, repeats and all (n uniforms). "without": n draws without replacement, each
    from the law renormalised over what is left, made at once by perturbed keys (Gumbel top-k, arXiv 1903.06059; one
    uniform per possible token). "greedy": the n - 1 most likely tokens, then one draw from the law renormalised
    over the others (arXiv 2502.18779; 1 uniform). "top": the n most likely (none). Ties go to the lower id.
    A token of probability zero is never drawn: where fewer than n are possible, "without", "greedy" and "top" return
    all that are. draft_probs need not sum to exactly 1. O(V), and O(V log V) for "without" with large n.
    Raises ValueError where draft_probs is not a law, n is below 1 or drafting is unknown.
    """
    probs = np.asarray(draft_probs, dtype=np.float64)
    if drafting not in DRAFTINGS:
        raise ValueError(f"drafting={drafting!r}: expected one of {', '.join(DRAFTINGS)}")
    if n != int(n) or n < 1:
        raise ValueError(f"n={n!r}: expected a whole number of at least 1")
    if probs.ndim != 1:
        raise ValueError(f"draft_probs has shape {probs.shape}: expected (V,)")
    total = probs.sum()
    if not (np.isfinite(total) and total > 0 and (probs >= 0).all()):
        raise ValueError(f"draft_probs sums to {total} with least {probs.min(initial=0)}: expected a law")
    if drafting == "iid":
        return inverse(probs, uniform(n))
    if drafting == "top":
        return most_likely(probs, n)
    if drafting == "without":
        possible = np.flatnonzero(probs > 0)
        # The first of independent clocks of rates q_x to ring is x with probability q_x, and so on with those left.
        # log q + Gumbel noise is minus the logarithm of these times.
        rings = -np.log1p(-uniform(len(possible))) / probs[possible]
        n = min(n, len(possible))
        first = np.argpartition(rings, n - 1)[:n]
        return possible[first[np.argsort(rings[first], kind="stable")]].tolist()
    top = most_likely(probs, n - 1)
    rest = probs.copy()
    rest[top] = 0.0
    return [*top, *inverse(rest, uniform(1))] if rest.any() else top


def most_likely(probs: np.ndarray, n: int) -> list[int]:
    """The n most likely tokens of a law (V,), most likely first, ties by lower id; fewer where fewer are positive.

    O(V): no full sort.
    """
    n = min(n, int(np.count_nonzero(probs > 0)))
    if n == 0:
        return []
    least = np.partition(probs, len(probs) - n)[len(probs) - n]
    candidates = np.flatnonzero(probs >= least)
    return candidates[np.argsort(-probs[candidates], kind="stable")[:n]].tolist()


def inverse(weights: np.ndarray, uniforms: np.ndarray) -> list[int]:
    """One token per uniform, by inverting the cumulated weights (V,), which are not all zero."""
    cumulated = np.cumsum(weights)
    tokens = np.searchsorted(cumulated, np.asarray(uniforms) * cumulated[-1], side="right")
    return np.minimum(tokens, np.flatnonzero(weights)[-1]).tolist()  # rounding may reach the very end


def warp(logits: Any, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
         typical_p: float = 1.0) -> np.ndarray:
    """logits (..., V), array or tensor of any float type -> probabilities (..., V), float64.

    In transformers' order and with its rules at ties: temperature; top_k (0: off; all that tie with the k-th stay);
    top_p (1: off; the smallest set of the most likely tokens whose mass reaches it); typical_p (1: off; tokens whose
    surprise is nearest to the entropy, all that tie stay). At temperature 0: one-hot at the largest logit, lowest id
    first. A logit of -inf is a token ruled out. In top_p equal logits at the edge go by id, higher ids staying.
    O(V) a row, O(V log V) with top_p or typical_p.
    Raises ValueError where a logit is NaN or +inf, a row has no finite one, or a setting is out of range.
    Sources: transformers 5 (logits processors); top_p: arXiv 1904.09751; typical_p: arXiv 2202.00666.
    """
    for name, value, fits, allowed in (
        ("temperature", temperature, 0 <= temperature < np.inf, "0 or more"),
        ("top_k", top_k, top_k >= 0 and top_k == int(top_k), "a whole number, 0 for off"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
        ("typical_p", typical_p, 0 < typical_p <= 1, "above 0, at most 1"),
    ):
        if not fits:
            raise ValueError(f"{name}={value!r}: expected {allowed}")
    if hasattr(logits, "detach"):
        logits = logits.detach().double().cpu().numpy()
    scores = np.array(logits, dtype=np.float64)
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(f"logits has shape {scores.shape}: expected (..., V)")
    if np.isnan(scores).any() or (scores == np.inf).any():
        raise ValueError("logits holds NaN or +inf: expected finite numbers, or -inf for a token ruled out")
    if not np.isfinite(scores.max(axis=-1)).all():
        raise ValueError("logits has a row of nothing but -inf: no token is possible")
    if temperature == 0:
        probs = np.zeros_like(scores)
        np.put_along_axis(probs, scores.argmax(axis=-1)[..., None], 1.0, axis=-1)
        return probs
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -inf
        scores = (scores - scores.max(axis=-1, keepdims=True)) / temperature
    vocabulary = scores.shape[-1]
    if 0 < top_k < vocabulary:
        scores[scores < np.partition(scores, vocabulary - top_k, axis=-1)[..., vocabulary - top_k, None]] = -np.inf
    if top_p < 1:
        order = np.argsort(scores, axis=-1, kind="stable")
        is_tail = np.cumsum(np.exp(_log_softmax(np.take_along_axis(scores, order, axis=-1))), axis=-1) <= 1 - top_p
        is_tail[..., -1] = False
        is_out = np.empty_like(is_tail)
        np.put_along_axis(is_out, order, is_tail, axis=-1)
        scores[is_out] = -np.inf
    if typical_p < 1:
        surprise = -_log_softmax(scores)
        probs = np.exp(-surprise)
        entropy = np.sum(probs * np.where(probs > 0, surprise, 0.0), axis=-1, keepdims=True)
        away = np.abs(surprise - entropy)
        order = np.argsort(away, axis=-1, kind="stable")
        mass = np.cumsum(np.take_along_axis(probs, order, axis=-1), axis=-1)
        last = np.minimum((mass < typical_p).sum(axis=-1, keepdims=True), vocabulary - 1)
        scores[away > np.take_along_axis(np.take_along_axis(away, order, axis=-1), last, axis=-1)] = -np.inf
    return np.exp(_log_softmax(scores))


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
