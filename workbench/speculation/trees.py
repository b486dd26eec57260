"""Draft trees: their shapes, the tokens they are expected to yield, and which tree of a budget yields most.

A tree hangs below the context, which is node -1 and not counted: n_nodes tokens are drafted, and the target scores
n_nodes + 1 positions in one pass. Acceptance by rank: a_k is the probability that the k-th child of a node is the one
accepted, given that the node was; the a_k of one node are disjoint events, so their sum is at most 1. With one such law
at every node a tree T yields, per target pass,
    F(T) = 1 + sum over drafted nodes v of the product of a_rank along the path to v,
the 1 being the token that the target gives in any case (arXiv 2402.12374).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from workbench.speculation.acceptance import optimal
from workbench.speculation.drafting import most_likely

MAX_BLOCKS = 2_000_000  # of chains_bound: seconds, and some hundred MB
POLICIES = ("constant", "heuristic", "confidence")


@dataclass(frozen=True)
class Shape:
    """A tree of drafted tokens in breadth-first order, the children of one parent side by side in rank order.

    parents: for each node its parent's index, -1 for a child of the context; () is the tree that drafts nothing.
    Raises ValueError where parents is not breadth-first: it must be below its node's index, and never decrease.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"parents[{node}]={parent!r}: expected an earlier node or -1, the context")
        for node, (before, here) in enumerate(pairwise(self.parents), start=1):
            if here < before:
                raise ValueError(f"parents[{node}]={here!r} after {before!r}: breadth-first parents never decrease")

    @property
    def n_nodes(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of each node; 1 for a child of the context. A node's position is that of the context's last token plus it."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Of the deepest node, which is the number of draft passes; 0 without nodes."""
        return self.depths[-1] if self.parents else 0

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Of each node among its siblings, from 0."""
        ranks: list[int] = []
        for node, parent in enumerate(self.parents):
            ranks.append(ranks[-1] + 1 if node and self.parents[node - 1] == parent else 0)
        return tuple(ranks)

    @cached_property
    def _children(self) -> tuple[tuple[int, ...], ...]:
        children: list[list[int]] = [[] for _ in range(self.n_nodes + 1)]
        for node, parent in enumerate(self.parents):
            children[parent].append(node)  # the context's, at -1, are the last
        return tuple(map(tuple, children))

    def children(self, node: int) -> tuple[int, ...]:
        """The children of a node, by rank; of the context for -1."""
        if not -1 <= node < self.n_nodes:
            raise IndexError(f"node={node!r}: expected -1, the context, to {self.n_nodes - 1}")
        return self._children[node]

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from a child of the context down to this one, both included; () for -1."""
        if not -1 <= node < self.n_nodes:
            raise IndexError(f"node={node!r}: expected -1, the context, to {self.n_nodes - 1}")
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return tuple(reversed(path))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Nodes on each level, from the context's children down."""
        return tuple(np.bincount(self.depths, minlength=1)[1:].tolist()) if self.parents else ()

    @cached_property
    def draft_widths(self) -> tuple[int, ...]:
        """Tokens in each of the draft's passes: 1 for the context's last, then the nodes of a level with children."""
        inner = {parent for parent in self.parents if parent >= 0}
        counts = [0] * self.depth
        for node in inner:
            counts[self.depths[node]] += 1
        return (1, *counts[1:]) if self.parents else ()

    @cached_property
    def mask(self) -> np.ndarray:
        """(n_nodes, n_nodes) bool, read-only: row i is True at node i and at its ancestors, whom it attends to."""
        mask = np.eye(self.n_nodes, dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        mask.flags.writeable = False
        return mask


def chain(length: int) -> Shape:
    """`length` tokens, each the only child of the one before: ordinary speculative decoding (arXiv 2211.17192)."""
    return k_chains(1, length)


def k_chains(n_chains: int, length: int) -> Shape:
    """`n_chains` separate chains of `length` tokens below the context: SpecTr's drafts (arXiv 2310.15141)."""
    _at_least(n_chains, 1, "n_chains")
    _at_least(length, 0, "length")
    return Shape(tuple(node - n_chains if node >= n_chains else -1 for node in range(n_chains * length)))


def widths(expansion: Sequence[int]) -> Shape:
    """Each node of level i has expansion[i] children: SpecInfer's fixed expansion (arXiv 2305.09781).

    n_nodes = k_1 + k_1 k_2 + ... Raises ValueError where a width is below 1.
    """
    parents: list[int] = []
    level = [-1]
    for i, width in enumerate(expansion):
        _at_least(width, 1, f"expansion[{i}]")
        first = len(parents)
        parents += [parent for parent in level for _ in range(width)]
        level = list(range(first, len(parents)))
    return Shape(tuple(parents))


def expected_tokens(shape: Shape, rank_acceptance: ArrayLike) -> float:
    """F(shape), tokens per target pass, 1 or more. rank_acceptance (n_ranks,): see above; ranks beyond it count 0.

    Raises ValueError where rank_acceptance holds a value outside [0, 1] or sums to more than 1.
    """
    a = _acceptance(rank_acceptance)
    reached: list[float] = []
    for parent, rank in zip(shape.parents, shape.ranks, strict=True):
        own = float(a[rank]) if rank < len(a) else 0.0
        reached.append(own * (reached[parent] if parent >= 0 else 1.0))
    return 1.0 + math.fsum(reached)


def optimal_tokens(shape: Shape, acceptance: Callable[[int], float]) -> float:
    """The most tokens per target pass that verifying each node's children on their own can yield on this tree, from 1.

    It bounds rules that decide at a node by the law there and its own children, where each node draws its children for
    itself: SpecInfer's, Sequoia's, and a single chain's. It bounds neither SpecTr's pooled chains, where a token that
    several chains agree on is followed by the next tokens of all of them (`chains_bound` does), nor rules that decide
    over whole blocks (arXiv 2403.10444).
    acceptance(n): the largest probability that one of n drafts of a position is accepted (`acceptance.optimal`, for the
    way they are drawn), taken for the same at every node. From the leaves up: a node yields 1 + acceptance(children)
    times the best of its children, so where children's subtrees differ this is a bound, where they are alike the value.
    Our derivation. Raises ValueError where acceptance gives no probability.
    """
    yields = [1.0] * (shape.n_nodes + 1)  # the context's, at -1, are the last
    for node in range(shape.n_nodes - 1, -2, -1):
        if children := shape.children(node):
            accepted = acceptance(len(children))
            if not 0 <= accepted <= 1:
                raise ValueError(f"acceptance({len(children)})={accepted!r}: expected a probability")
            yields[node] += accepted * max(yields[child] for child in children)
    return yields[-1]


def chains_bound(laws: Callable[[tuple[int, ...]], tuple[np.ndarray, np.ndarray]], n_chains: int, length: int
                 ) -> float:
    """What no exact verification of n_chains i.i.d. chains of `length` drafts exceeds in tokens per target pass.

    That is pooled chains under any rule, position by position or over whole blocks. laws(path): target_probs and
    draft_probs (V,) after the context and these tokens. An exact rule's output follows the target whatever was drafted,
    so i of its tokens are accepted with at most the probability that one of n_chains blocks of i drafts can equal the
    first i tokens of the output: `acceptance.optimal` for the laws of blocks, tokens of a vocabulary V^i. The bound is
    1 + their sum over i. No rule need attain all of them at once; for one chain a coupling does.
    Cost: V^length laws of blocks, sorted. Our derivation. Raises ValueError where they are more than MAX_BLOCKS.
    """
    _at_least(n_chains, 1, "n_chains")
    _at_least(length, 0, "length")
    bound, target, draft = 1.0, np.ones(1), np.ones(1)
    paths: list[tuple[int, ...]] = [()]
    size = len(laws(())[0]) if length else 0
    if size**length > MAX_BLOCKS:
        raise ValueError(f"length={length}: {size}^{length} blocks, expected at most {MAX_BLOCKS} together")
    for _ in range(length):
        found = [laws(path) for path in paths]
        target, draft = ((before[:, None] * np.array([pair[k] for pair in found])).ravel()
                         for k, before in enumerate((target, draft)))
        bound += optimal(target, draft, n_chains).acceptance
        paths = [(*path, token) for path in paths for token in range(size)]
    return bound


def sequoia(rank_acceptance: ArrayLike, n_nodes: int, max_depth: int | None = None) -> Shape:
    """The tree of exactly n_nodes drafted tokens with the largest expected_tokens, at most max_depth deep.

    rank_acceptance (n_ranks,), in the order in which children are tried; no node gets more than n_ranks children.
    Cost: n_nodes numpy operations over (depth, rank, split), a few ms at 64 nodes.
    Raises ValueError where so few ranks and levels cannot hold n_nodes.
    Source: Sequoia, arXiv 2402.12374 (dynamic programme over subtree sizes, and its depth-limited form).
    """
    a = _acceptance(rank_acceptance)
    _at_least(n_nodes, 0, "n_nodes")
    if max_depth is not None:
        _at_least(max_depth, 0, "max_depth")
        max_depth = min(max_depth, n_nodes)
    best, choice = _programme(a, n_nodes, max_depth)
    if best[-1, n_nodes] == -math.inf:
        limit = int(np.flatnonzero(np.isfinite(best[-1]))[-1])
        levels = "any number of" if max_depth is None else max_depth
        raise ValueError(f"n_nodes={n_nodes}: {len(a)} ranks and {levels} levels hold at most {limit}")
    return _rebuild(choice, n_nodes, len(choice) - 1)


def best_tree(rank_acceptance: ArrayLike, target_seconds: Callable[[int], float],
              draft_seconds: float | Callable[[int], float], max_nodes: int, max_depth: int) -> tuple[Shape, float]:
    """The tree with the largest predicted tokens per second, and that prediction.

    Over all sizes up to max_nodes and depths up to max_depth, the largest of F / seconds, where seconds is
    target_seconds(n_nodes + 1) plus the draft's passes, one per level. target_seconds(n): one target pass of n tokens.
    draft_seconds: one draft pass, or a function of the tokens in it, that counts each level by shape.draft_widths.
    Drafting nothing takes part: where no tree pays, the answer is the empty one, and the target's own speed.
    Cost: sequoia's once; with a function for draft_seconds also one reconstruction per size and depth (.05 ms each).
    Raises ValueError where a limit is below 1 or a time is not positive.
    Source: Sequoia, arXiv 2402.12374 (hardware-aware choice of size and depth).
    """
    a = _acceptance(rank_acceptance)
    _at_least(max_nodes, 1, "max_nodes")
    _at_least(max_depth, 1, "max_depth")
    max_depth = min(max_depth, max_nodes)
    best, choice = _programme(a, max_nodes, max_depth)
    chosen, speed = (0, 0), 1 / _seconds(target_seconds(1), "target_seconds(1)")
    for n_nodes in range(1, max_nodes + 1):
        target = _seconds(target_seconds(n_nodes + 1), f"target_seconds({n_nodes + 1})")
        for depth in range(1, min(max_depth, n_nodes) + 1):
            if best[depth, n_nodes] == -math.inf:
                continue
            if callable(draft_seconds):
                passes = _rebuild(choice, n_nodes, depth).draft_widths
                draft = sum(_seconds(draft_seconds(n), f"draft_seconds({n})") for n in passes)
            else:
                draft = depth * _seconds(draft_seconds, "draft_seconds")
            if (predicted := float(1 + best[depth, n_nodes]) / (target + draft)) > speed:
                chosen, speed = (n_nodes, depth), predicted
    return _rebuild(choice, *chosen), speed


def _programme(a: np.ndarray, n_nodes: int, max_depth: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The dynamic programme: best (depths, nodes), the most that m nodes below a node can add to F, and choice.

    Depth d = 0..max_depth is that of the levels below the node; without max_depth there is one row, its own successor.
    tail[d, k, m] is the most that m nodes can add as subtrees of the children of rank k and on, -inf where they do not
    fit; choice[d, k, m] is the size of child k's subtree that attains it. A child with j nodes in its subtree, itself
    one of them, gives a_k (1 + best[d - 1, j - 1]). Sizes ascend, so all depths and ranks of a size are found at once.
    """
    a = a[:n_nodes]  # no node can have more children
    n_rows = 1 if max_depth is None else max_depth + 1
    here, below = (slice(None), slice(None)) if max_depth is None else (slice(1, None), slice(None, -1))
    tail = np.full((n_rows, len(a) + 1, n_nodes + 1), -math.inf)
    tail[:, :, 0] = 0.0
    gain = np.full((n_rows, len(a), n_nodes + 1), -math.inf)  # of a child's whole subtree, by its size
    choice = np.zeros((n_rows, len(a), n_nodes + 1), dtype=np.int64)
    for m in range(1, n_nodes + 1 if len(a) else 0):
        subtree = 1 + tail[below, 0, m - 1]
        fits = np.isfinite(subtree)
        gain[here][fits, :, m] = subtree[fits, None] * a
        split = gain[:, :, 1 : m + 1] + tail[:, 1:, m - 1 :: -1]
        choice[:, :, m] = split.argmax(axis=2) + 1
        tail[:, :-1, m] = split.max(axis=2)
    return tail[:, 0], choice


def _rebuild(choice: np.ndarray, n_nodes: int, row: int) -> Shape:
    """The tree of the programme's choices for n_nodes, from this row of the table on."""
    parents: list[int] = []
    queue = [(-1, n_nodes, row)]  # a node, how many nodes go below it, and its row
    for node, left, own in queue:
        rank = 0
        while left:
            size = int(choice[own, rank, left])
            queue.append((len(parents), size - 1, max(own - 1, 0)))
            parents.append(node)
            left, rank = left - size, rank + 1
    return Shape(tuple(parents))


class ConfidenceTree:
    """EAGLE-2's dynamic tree, grown level by level from the draft's own confidence; it runs no model itself.

    A node's value is the product of the draft's probabilities along its path. Each level, every frontier node offers
    its top_k tokens, and the top_k offers of largest value become the next frontier. At the end all offers are ranked
    together and the n_nodes best are kept; values never grow along a path, so that set holds every ancestor.

        tree = ConfidenceTree(top_k, depth, n_nodes)
        while tree.frontier:
            chosen = tree.next_level([draft_probs(path) for path in tree.frontier])
        parents, tokens = tree.finish()

    top_k: offers per node, and nodes expanded per level; depth: levels, which is draft passes; n_nodes: drafted tokens
    kept. The authors' code has top_k 10, depth 7 and total_token 60, where depth counts the passes after the first and
    total_token counts the context's last token: here ConfidenceTree(10, 8, 59).
    Ties go to the shallower node, then to the parent ranked higher, then to the lower token id.
    Source: EAGLE-2, arXiv 2406.16858 (expansion, then reranking).
    """

    def __init__(self, top_k: int, depth: int, n_nodes: int) -> None:
        _at_least(top_k, 1, "top_k")
        _at_least(depth, 1, "depth")
        _at_least(n_nodes, 1, "n_nodes")
        self.top_k, self.depth, self.n_nodes = top_k, depth, n_nodes
        self.frontier: list[tuple[int, ...]] = [()]  # paths of tokens below the context whose next-token law is wanted
        self._level = 0
        self._expanded = [-1]  # of each frontier node, its index among all offers
        self._handed_out = [-1]  # and its index among the nodes that next_level has returned
        self._n_handed_out = 0
        self._values = [1.0]
        self._offers: list[tuple[int, int, float]] = []  # parent among the offers, token, value

    def next_level(self, draft_probs: Sequence[ArrayLike]) -> list[tuple[int, int]]:
        """Take the draft's law (V,) at each frontier path; return the nodes to expand next as (parent, token).

        parent counts the nodes returned so far, over all levels and from 0; -1 is the context. After the last level, or
        where no path goes on, the list and the frontier are empty. A law of zeros ends its path (after an eos, say);
        tokens of probability zero are never offered.
        Raises ValueError where the number of laws is not that of paths, or one is negative, NaN or sums to over 1.
        """
        if not self.frontier:
            raise ValueError("next_level after the last level: the frontier is empty, call finish")
        if len(draft_probs) != len(self.frontier):
            raise ValueError(f"draft_probs holds {len(draft_probs)} laws: expected one per frontier path, "
                             f"{len(self.frontier)}")
        self._level += 1
        first = len(self._offers)
        sources: list[int] = []  # the frontier node behind each offer of this level
        for i, law in enumerate(draft_probs):
            probs = np.asarray(law, dtype=np.float64)
            if probs.ndim != 1 or not (probs >= 0).all() or not probs.sum() <= 1 + 1e-4:
                raise ValueError(f"draft_probs[{i}] of shape {probs.shape}, sum {probs.sum():.6g}: expected a law (V,)")
            for token in most_likely(probs, self.top_k):
                self._offers.append((self._expanded[i], token, self._values[i] * min(float(probs[token]), 1.0)))
                sources.append(i)
        if self._level == self.depth:
            self.frontier = []
            return []
        values = np.array([value for _, _, value in self._offers[first:]])
        taken = np.argsort(-values, kind="stable")[: self.top_k].tolist()
        chosen = [(self._handed_out[sources[j]], self._offers[first + j][1]) for j in taken]
        self.frontier = [(*self.frontier[sources[j]], self._offers[first + j][1]) for j in taken]
        self._expanded = [first + j for j in taken]
        self._handed_out = list(range(self._n_handed_out, self._n_handed_out + len(taken)))
        self._n_handed_out += len(taken)
        self._values = [self._offers[first + j][2] for j in taken]
        return chosen

    def finish(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(parents, tokens) of the n_nodes best offers (all, where there are fewer), ready for Shape(parents).

        Breadth-first, and children of one parent by falling draft probability.
        """
        ranked = np.argsort([-value for _, _, value in self._offers], kind="stable")  # offers lie level by level
        kept = np.sort(ranked[: self.n_nodes]).tolist()
        order: dict[int, int] = {-1: -1}  # offer -> node
        parents: list[int] = []
        tokens: list[int] = []
        waiting: dict[int, list[int]] = {}
        for offer in kept:
            waiting.setdefault(self._offers[offer][0], []).append(offer)
        queue = [-1]
        for parent in queue:
            for offer in waiting.get(parent, ()):
                order[offer] = len(parents)
                parents.append(order[parent])
                tokens.append(self._offers[offer][1])
                queue.append(offer)
        return tuple(parents), tuple(tokens)


def confidence_tree(expand: Callable[[list[tuple[int, ...]]], Sequence[ArrayLike]], top_k: int, depth: int,
                    n_nodes: int) -> tuple[Shape, tuple[int, ...]]:
    """A whole ConfidenceTree: its shape and the tokens of its nodes.

    expand(paths): the draft's next-token law (V,) after each path of tokens below the context; called once per level.
    """
    tree = ConfidenceTree(top_k, depth, n_nodes)
    while tree.frontier:
        tree.next_level(expand(list(tree.frontier)))
    parents, tokens = tree.finish()
    return Shape(parents), tokens


class DraftLength:
    """How many tokens to draft in a chain, adapted as decoding goes on. One object per sequence.

    policy "constant": always `length`. "heuristic": starts at `length`; 2 more after a block whose drafts were all
    accepted, else 1 fewer, at least 1. "confidence": up to `length`, and no further once the token just drawn had a
    draft probability below `threshold` (that token is kept). All read drawn tokens and past blocks only, so that the
    output law does not change. Names and defaults as in transformers 5, where however the threshold joins any policy.
    """

    def __init__(self, policy: str, length: int, threshold: float = 0.4) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r}: expected one of {', '.join(POLICIES)}")
        _at_least(length, 1, "length")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold!r}: expected 0 to 1")
        self.policy, self.length, self.threshold = policy, length, threshold

    def goes_on(self, n_drawn: int, draft_prob: float) -> bool:
        """Whether to draft another token after n_drawn, the last of which had probability draft_prob."""
        if self.policy == "confidence" and draft_prob < self.threshold:
            return False
        return n_drawn < self.length

    def observe(self, n_accepted: int, n_drafted: int) -> None:
        """Tell what the target made of a block; the next block's length follows."""
        if self.policy == "heuristic":
            self.length = self.length + 2 if n_accepted == n_drafted else max(1, self.length - 1)


def optimal_length(acceptance: float, target_seconds: Callable[[int], float], draft_seconds: float,
                   max_length: int) -> int:
    """The chain length 0..max_length of largest predicted tokens per second; 0 where drafting does not pay.

    Tokens per block are (1 - acceptance^(length + 1)) / (1 - acceptance), with one acceptance at every position
    (arXiv 2211.17192, eq. 1); seconds are target_seconds(length + 1) + length * draft_seconds, target_seconds(n) being
    the measured cost of a target pass of n tokens. Ties go to the shorter chain.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance={acceptance!r}: expected 0 to 1")
    _at_least(max_length, 0, "max_length")
    draft = _seconds(draft_seconds, "draft_seconds")
    speeds, tokens = [], 0.0
    for length in range(max_length + 1):
        tokens += acceptance**length
        speeds.append(tokens / (_seconds(target_seconds(length + 1), f"target_seconds({length + 1})") + length * draft))
    return int(np.argmax(speeds))


def _at_least(value: int, least: int, name: str) -> None:
    if value != int(value) or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")


def _seconds(value: float, name: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r}: expected positive, finite seconds")
    return float(value)


def _acceptance(rank_acceptance: ArrayLike) -> np.ndarray:
    a = np.asarray(rank_acceptance, dtype=np.float64)
    if a.ndim != 1:
        raise ValueError(f"rank_acceptance has shape {a.shape}: expected (n_ranks,)")
    if not ((a >= 0) & (a <= 1)).all():
        raise ValueError(f"rank_acceptance={a.tolist()}: expected probabilities, 0 to 1")
    if a.sum() > 1 + 1e-9:
        raise ValueError(f"rank_acceptance sums to {a.sum():.6g}: its events are disjoint, expected at most 1")
    return a
