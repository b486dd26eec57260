"""Sequoia: the tree of a given size that measured acceptance says will yield most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from workbench.knob import Knob
from workbench.methods.decoding._written import Draft, Temperature, Tokens, TopK, TopP, TypicalP, written
from workbench.problems.decoding import Decoding, rank_acceptance
from workbench.registry import Step, method
from workbench.rng import Rng
from workbench.speculation.engine import Warp
from workbench.speculation.growing import StaticGrower
from workbench.speculation.rules import RULES
from workbench.speculation.trees import sequoia as best_shape

RANKS = 8  # children of a node at most
Nodes = Annotated[int, Knob(low=1, high=64, soft=(1, 32), step=1, unit="tokens", small=5,
                            help="tokens drafted in each block")]
Depth = Annotated[int, Knob(low=1, high=16, soft=(1, 8), step=1, unit="levels", small=3,
                            help="deepest chain of drafts, which is the number of draft passes per block")]


@method(version=2, exact=True, source="Sequoia, arXiv 2402.12374, sec. 3.1 (tree) and 3.2 (verification)",
        cost="2 * n_prompt + n_tokens * (2 * n_nodes + 2)", at_most=True)
def sequoia(problem: Decoding, rng: Rng, *, n_tokens: Tokens = 64, n_nodes: Nodes = 16, max_depth: Depth = 6,
            temperature: Temperature = 1.0, top_k: TopK = 0, top_p: TopP = 1.0, typical_p: TypicalP = 1.0,
            draft: Draft = "best") -> Iterator[Step]:
    """Sequoia: the tree of n_nodes drafts of most expected tokens, drawn without replacement and verified so.

    The tree comes of a dynamic programme over how often the first, second, ... draft of a position is accepted, which
    is measured once at the problem's `positions` (at no cost to the run). Nodes that no rank or level can hold are left
    out.
    At temperature 0 the drafts of a position are the draft's most likely tokens.
    State (n_samples, n_tokens, 2): token and number of the pass, -1 after a sequence's end.
    Cost: at most ``2 * n_prompt + n_tokens * (2 * n_nodes + 2)`` evaluations per sample.
    Raises ValueError where prompt and tokens exceed a model's context.
    """
    law = Warp(temperature, top_k, top_p, typical_p)
    rule = RULES["rrs_without" if temperature > 0 else "top"]
    measured = rank_acceptance(problem, draft, law, RANKS, rule.name)
    fits = sum(RANKS**level for level in range(1, max_depth + 1))
    shape = best_shape(measured, min(n_nodes, fits), max_depth)
    yield from written(problem, rng, n_tokens, law, draft=problem.draft(draft), rule=rule, is_varied=True,
                       grow=lambda row, uniform: StaticGrower(shape, rule.drafting, uniform))
