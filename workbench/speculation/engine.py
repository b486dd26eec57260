"""The loop of speculative decoding, one for all methods and for users' own models: draft a tree, score it in one target
pass, walk down it by a verification rule, keep what was accepted, and go on.

Models are asked through sessions, which hold whatever a model remembers of the tokens it was given. Several sequences
(rows) are decoded in one batch; each has random numbers of its own, so none depends on the batch it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from workbench.speculation.drafting import Uniform, inverse, warp
from workbench.speculation.growing import Grow, Grower, Tree
from workbench.speculation.rules import Rule

Network = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Ask:
    """What a model is asked in one pass, row by row: tokens to take in, each one's parent, and whose laws are wanted.

    parents count the nodes given since the session's last `keep`, from 0; -1 is the end of what was kept.
    asked: places among this pass's tokens. state: what the model remembers (its `begin` made it).
    """

    state: Any
    tokens: Sequence[Sequence[int]]
    parents: Sequence[Sequence[int]]
    asked: Sequence[Sequence[int]]


class State(Protocol):
    """What a model remembers in a session. keep(paths): of the nodes given since, those on each row's path stay."""

    def keep(self, paths: Sequence[Sequence[int]]) -> None: ...


@dataclass(frozen=True)
class LanguageModel:
    """A next-token model. network(tokens (n,) of all rows, Ask) -> logits (n_asked, V), one tensor per row.

    begin(n_rows) -> State, empty. context: the most positions it can take in, None where there is no such bound.
    bend: a number of positions beyond which it codes all of them anew (LongRoPE), so that no sequence may cross it.
    module: the torch module behind it, where there is one. work(tokens, Ask) -> (positions, FLOPs) of a pass, where
    that depends on what is asked.
    """

    name: str
    network: Network
    begin: Callable[[int], State]
    vocab_size: int
    context: int | None = None
    bend: int | None = None
    module: Any = field(default=None, compare=False, repr=False)
    work: Callable[[Tensor, Ask], tuple[int, float]] | None = None

    def room(self, lengths: Sequence[int]) -> float:
        """The most new tokens after prompts of these lengths in one batch, infinite where nothing bounds them. The last
        new token is never read, so a prompt that fills the context has room for one."""
        longest = max(lengths)
        room = math.inf if self.context is None else self.context - longest + 1
        if self.bend is not None and min(lengths) <= self.bend:
            room = min(room, self.bend - longest + 1)
        return max(room, 0)


def check_room(target: LanguageModel, draft: LanguageModel | None, lengths: Sequence[int], n_tokens: int) -> None:
    """Raises ValueError where n_tokens new tokens after prompts of these lengths, in one batch, are more than either
    model has room for. A draft takes in one less than the target: what it drafts last it does not read."""
    for model, n_unread in ((target, 0), (draft, 1)):
        if model is None or n_tokens <= (room := model.room(lengths) + n_unread):
            continue
        is_bent = model.bend is not None and room < replace(model, bend=None).room(lengths) + n_unread
        why = (f"it codes positions anew beyond original_max_position_embeddings={model.bend}, which no text of a "
               f"batch may cross" if is_bent else f"its context is {model.context}")
        raise ValueError(f"n_tokens={n_tokens}: after a prompt of {max(lengths)}, {model.name} has room for {room:g}, "
                         f"as {why}")


class Session:
    """n_rows sequences that a model has taken in so far, and a tree of further nodes below each."""

    def __init__(self, model: LanguageModel, n_rows: int) -> None:
        self._network, self._state = model.network, model.begin(n_rows)

    def extend(self, tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]],
               asked: Sequence[Sequence[int]]) -> list[Tensor]:
        """Give each row further nodes (see Ask); returns logits (n_asked, V) per row. One pass, a row per token."""
        flat = torch.tensor(list(chain.from_iterable(tokens)), dtype=torch.int64)
        return self._network(flat, Ask(self._state, tokens, parents, asked))

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Of the nodes given since the last call, keep each row's path, in order, as taken in; forget the others."""
        self._state.keep(paths)


# Of each node: its row, and the tokens before it.
Contexts = Callable[[], list[tuple[int, list[int]]]]
# logits (n, V) and, where it needs them, the contexts -> the laws (n, V) to draw from, float64
Law = Callable[[Tensor, Contexts], np.ndarray]


@dataclass(frozen=True)
class Warp:
    """The law that temperature, top-k, top-p and typical-p make of logits; see `drafting.warp`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0

    def __call__(self, logits: Tensor, contexts: Contexts) -> np.ndarray:
        return warp(logits, self.temperature, self.top_k, self.top_p, self.typical_p)


@dataclass(frozen=True)
class Block:
    """What one row did in one target pass: the tree, the accepted nodes, and the tokens that came of it.

    tokens: those of the accepted nodes, then one that the target gave (cut where the sequence ends). laws: the target's
    law (V,) at the context (-1) and at each accepted node, for whoever wants to look.
    """

    tree: Tree
    accepted: tuple[int, ...]
    tokens: tuple[int, ...]
    n_draft_passes: int
    laws: dict[int, np.ndarray]


def speculate(target: LanguageModel, draft: LanguageModel | None, prompts: Sequence[Sequence[int]], n_tokens: int,
              grow: Grow | None, rule: Rule | None, uniforms: Sequence[Uniform], *, law: Law = Warp(),
              draft_law: Law | None = None,
              ends: Callable[[int, list[int], int], int | None] = lambda row, tokens, n_new: None
              ) -> Iterator[dict[int, Block]]:
    """Decode n_tokens after each of the prompts; yields {row: Block} of the rows still going, once per target pass.

    prompts: token ids, at least one each. grow(row, uniform) makes the grower of a row's next block, rule decides what
    is accepted; without draft, grow and rule this is plain decoding, one token per pass. uniforms: per row, n -> n
    numbers in [0, 1). law: made of the logits of both models alike, unless drafts are drawn from another, draft_law,
    which changes what is accepted, not the law of the output. ends(row, tokens so far, how many are new) -> how many
    tokens the sequence has if it ends here, else None.
    Cost: per block and row, one target pass of n_nodes + 1 tokens (the first also takes in the prompt) and one draft
    pass per level of the tree. Nobody drafts beyond the end: a tree is at most as deep as tokens are wanted, less one.
    Raises ValueError where a prompt is empty, n_tokens is below 1, a model has no room for them (see `check_room`), or
    its logits hold NaN.
    """
    if n_tokens < 1:
        raise ValueError(f"n_tokens={n_tokens!r}: expected at least 1")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty: expected at least one token")
    check_room(target, draft, [len(prompt) for prompt in prompts], n_tokens)
    rows = range(len(prompts))
    done: list[list[int]] = [[] for _ in rows]
    active = set(rows)
    to_target, to_draft = [list(p) for p in prompts], [list(p) for p in prompts]  # tokens that each has yet to take in
    verifier = Session(target, len(prompts))
    drafter = Session(draft, len(prompts)) if draft is not None else None

    def laws(model: LanguageModel, law: Law, logits: list[Tensor], contexts: Contexts) -> list[np.ndarray]:
        joined = torch.cat(logits) if len(logits) > 1 else logits[0]
        if joined.isnan().any():
            raise ValueError(f"the logits of {model.name} hold NaN")
        probs = law(fitted(joined, target.vocab_size), contexts)
        return np.split(probs, np.cumsum([len(part) for part in logits])[:-1])

    while active:
        growers: dict[int, Grower] = {}
        fed, n_passes = [0] * len(prompts), 0
        if draft is not None and drafter is not None and grow is not None:
            room = {row: n_tokens - len(done[row]) - 1 for row in sorted(active)}
            growers = {row: grow(row, uniforms[row]) for row, left in room.items() if left}
            contexts = {row: [*prompts[row], *done[row]] for row in growers} if growers else {}
            fed, n_passes = _draft(drafter, growers, room, to_draft, partial(laws, draft, draft_law or law), contexts)
        trees = [growers[row].finish() if row in growers else Tree() for row in rows]

        first = [len(pending) - 1 for pending in to_target]  # the context's place among the nodes of this pass
        going = [row in active for row in rows]
        logits = verifier.extend(
            [to_target[row] + trees[row].tokens if going[row] else [] for row in rows],
            [[*range(-1, first[row]), *(first[row] + 1 + p for p in trees[row].parents)] if going[row] else []
             for row in rows],
            [list(range(first[row], first[row] + 1 + trees[row].n_nodes)) if going[row] else [] for row in rows])
        below = {row: [*prompts[row], *done[row]] for row in sorted(active)}
        found = laws(target, law, logits, lambda: [(row, before + path) for row, before in below.items()  # noqa: B023
                                              for path in _paths(trees[row])])  # noqa: B023

        blocks: dict[int, Block] = {}
        kept, kept_draft = [list[int]() for _ in rows], [list[int]() for _ in rows]
        for row in sorted(active):
            tree = trees[row]
            accepted, last, seen = _walk(tree, found[row], rule, uniforms[row])
            new = [*(tree.tokens[node] for node in accepted), last]
            kept[row] = [*range(first[row] + 1), *(first[row] + 1 + node for node in accepted)]
            to_target[row] = [last]
            known = [node for node in accepted if tree.fed.get(node, math.inf) < fed[row]]  # the first of the path
            if row in growers:
                n_pending = len(to_draft[row])
                kept_draft[row] = [*range(n_pending), *(n_pending + tree.fed[node] for node in known)]
                to_draft[row] = []
            to_draft[row] += new[len(known):]
            new = new[: n_tokens - len(done[row])]
            done[row] += new
            end = ends(row, done[row], len(new))
            if end is not None:
                del new[len(new) - (len(done[row]) - end):], done[row][end:]
            if end is not None or len(done[row]) == n_tokens:
                active.discard(row)
            blocks[row] = Block(tree, tuple(accepted), tuple(new), n_passes, seen)
        verifier.keep(kept)
        if drafter is not None:
            drafter.keep(kept_draft)
        yield blocks


def fitted(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits (n, V) cut to, or filled up with impossible tokens to, (n, vocab_size): models of one tokenizer may differ
    in rows that no token uses."""
    spare = vocab_size - logits.shape[1]
    if spare > 0:
        return torch.nn.functional.pad(logits, (0, spare), value=-torch.inf)
    return logits[:, :vocab_size] if spare else logits


def _draft(session: Session, growers: dict[int, Grower], room: dict[int, int], pending: Sequence[Sequence[int]],
           laws: Callable[[list[Tensor], Contexts], list[np.ndarray]],
           contexts: dict[int, list[int]]) -> tuple[list[int], int]:
    """Grow each row's tree, at most room[row] levels deep; returns how many nodes each row fed, and the passes."""
    rows = range(len(pending))
    fed, n_passes, level = [0] * len(pending), 0, 0
    paths: dict[int, list[list[int]]] = {row: [] for row in growers}  # the tokens down to each node fed
    tokens = [list(pending[row]) if row in growers else [] for row in rows]
    parents = [list(range(-1, len(row) - 1)) for row in tokens]
    asked = [[len(row) - 1] if row else [] for row in tokens]
    wanted: dict[int, list[list[int]]] = {row: [[]] for row in growers}
    growing = set(growers)
    while growing:
        logits = session.extend(tokens, parents, asked)
        n_passes, level = n_passes + 1, level + 1
        found = laws(logits, lambda: [(row, contexts[row] + path) for row in rows for path in wanted.get(row, ())])  # noqa: B023
        tokens, parents, wanted = [[] for _ in rows], [[] for _ in rows], {}
        for row in sorted(growing):
            chosen = growers[row].next_level(list(found[row]))
            if not chosen or level == room[row]:
                growing.discard(row)
                continue
            above = len(pending[row])
            tokens[row] = [token for _, token in chosen]
            parents[row] = [above + parent for parent, _ in chosen]  # the context, -1, is the last of what was pending
            wanted[row] = [[*(paths[row][parent] if parent >= 0 else ()), token] for parent, token in chosen]
            paths[row] += wanted[row]
            fed[row] += len(chosen)
        asked = [list(range(len(row))) for row in tokens]
    return fed, n_passes


def _walk(tree: Tree, laws: np.ndarray, rule: Rule | None, uniform: Uniform
          ) -> tuple[list[int], int, dict[int, np.ndarray]]:
    """Down from the context by the rule: the accepted nodes, the target's own token after them, its laws on the way.

    laws (1 + n_nodes, V): the target's at the context and at each node.
    """
    node = -1
    accepted: list[int] = []
    seen: dict[int, np.ndarray] = {}
    while True:
        seen[node] = laws[1 + node]
        children = tree.children.get(node)
        if not children or rule is None:
            return accepted, inverse(seen[node], uniform(1))[0], seen
        verdict = rule.verify(seen[node], tree.laws[node], [tree.tokens[child] for child in children],
                              lambda: float(uniform(1)[0]))
        if verdict.draft is None:
            return accepted, int(verdict.token), seen
        node = children[verdict.draft]
        accepted.append(node)


def _paths(tree: Tree) -> list[list[int]]:
    """The tokens down to the context and to each node."""
    paths: list[list[int]] = []
    for parent, token in zip(tree.parents, tree.tokens, strict=True):
        paths.append([*(paths[parent] if parent >= 0 else ()), token])
    return [[], *paths]
