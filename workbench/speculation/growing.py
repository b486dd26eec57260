"""Growers: how one block's draft tree comes about, level by level, from the draft's laws. They run no model themselves.

A grower is made anew for each row and block. It is given the draft's next-token law at each node of its frontier (first
at the context) and answers with the nodes whose laws it wants next; at the end `finish` gives the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from workbench.speculation.drafting import Uniform, draw
from workbench.speculation.trees import ConfidenceTree, DraftLength, Shape


@dataclass
class Tree:
    """Drafted tokens below the context, which is node -1; parents come before their children.

    children: {node: its children in the order in which a rule tries them, a node twice where it was drawn twice}.
    laws: {node with children: the law (V,) that they were drawn from}. fed: {node: its place among the nodes that the
    draft model was given}.
    """

    parents: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    children: dict[int, list[int]] = field(default_factory=dict)
    laws: dict[int, np.ndarray] = field(default_factory=dict)
    fed: dict[int, int] = field(default_factory=dict)

    @property
    def n_nodes(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int) -> int:
        """A new node; returns it."""
        self.parents.append(parent)
        self.tokens.append(token)
        return self.n_nodes - 1


class Grower(Protocol):
    """next_level(laws of the frontier) -> [(place of the parent among the nodes fed, -1 the context; token), ...]."""

    def next_level(self, laws: Sequence[np.ndarray]) -> list[tuple[int, int]]: ...
    def finish(self) -> Tree: ...


class StaticGrower:
    """A tree of a given shape, its tokens drawn as `drafting` says.

    Equal tokens among the children of a node (drafting "iid") become one node, which a rule sees once for each. Below
    it stands the subtree of the first of them; with is_pooled, those of all of them: so SpecTr's separate chains share
    what they have in common, and the drafts still alive at a node are as many as chains came to it.
    """

    def __init__(self, shape: Shape, drafting: str, uniform: Uniform, *, is_pooled: bool = False) -> None:
        self._shape, self._drafting, self._uniform, self._is_pooled = shape, drafting, uniform, is_pooled
        self._tree = Tree()
        self._frontier: list[tuple[int, list[int]]] = [(-1, [-1])]  # a node, and the nodes of the shape it stands for

    def next_level(self, laws: Sequence[np.ndarray]) -> list[tuple[int, int]]:
        tree, chosen, frontier = self._tree, [], []
        for (node, places), law in zip(self._frontier, laws, strict=True):
            below = [child for place in places for child in self._shape.children(place)]
            if not below:
                continue
            tokens = draw(law, len(below), self._drafting, self._uniform)
            made: dict[int, tuple[int, list[int]]] = {}
            for token, place in zip(tokens, below, strict=False):  # fewer tokens than asked for may be possible
                if token not in made:
                    made[token] = tree.add(node, token), []
                if self._is_pooled or not made[token][1]:
                    made[token][1].append(place)
            tree.laws[node], tree.children[node] = law, [made[token][0] for token in tokens]
            for token, (child, stands_for) in made.items():
                if any(self._shape.children(place) for place in stands_for):
                    tree.fed[child] = len(tree.fed)
                    frontier.append((child, stands_for))
                    chosen.append((tree.fed.get(node, -1), token))
        self._frontier = frontier
        return chosen

    def finish(self) -> Tree:
        return self._tree


class ChainGrower:
    """One chain, as long as the policy of `length` says; each token drawn from the draft's law."""

    def __init__(self, length: DraftLength, uniform: Uniform) -> None:
        self._length, self._uniform = length, uniform
        self._tree = Tree()

    def next_level(self, laws: Sequence[np.ndarray]) -> list[tuple[int, int]]:
        tree, (law,) = self._tree, laws
        last = tree.n_nodes - 1
        (token,) = draw(law, 1, "iid", self._uniform)
        node = tree.add(last, token)
        tree.laws[last], tree.children[last] = law, [node]
        if not self._length.goes_on(tree.n_nodes, float(law[token])):
            return []
        tree.fed[node] = len(tree.fed)
        return [(tree.fed.get(last, -1), token)]

    def finish(self) -> Tree:
        return self._tree


class ConfidenceGrower:
    """EAGLE-2's tree of the draft's own confidence (`ConfidenceTree`); children are the draft's most likely tokens."""

    def __init__(self, top_k: int, depth: int, n_nodes: int) -> None:
        self._grown = ConfidenceTree(top_k, depth, n_nodes)
        self._laws: dict[tuple[int, ...], np.ndarray] = {}  # by path of tokens
        self._fed: dict[tuple[int, ...], int] = {}

    def next_level(self, laws: Sequence[np.ndarray]) -> list[tuple[int, int]]:
        self._laws.update(zip(self._grown.frontier, laws, strict=True))
        chosen = self._grown.next_level(laws)
        for path in self._grown.frontier:
            self._fed[path] = len(self._fed)
        return chosen

    def finish(self) -> Tree:
        tree = Tree()
        paths: dict[int, tuple[int, ...]] = {-1: ()}
        for parent, token in zip(*self._grown.finish(), strict=True):
            node = tree.add(parent, token)
            paths[node] = path = (*paths[parent], token)
            tree.children.setdefault(parent, []).append(node)
            tree.laws[parent] = self._laws[paths[parent]]
            if path in self._fed:
                tree.fed[node] = self._fed[path]
        return tree


Grow = Callable[[int, Uniform], Grower]  # (row, its random numbers) -> the grower of its next block
