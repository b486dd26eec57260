"""EAGLE-2's dynamic draft tree, grown where the draft is sure of itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from workbench.knob import Knob
from workbench.methods.decoding._written import Draft, Temperature, Tokens, TopK, TopP, TypicalP, written
from workbench.problems.decoding import Decoding
from workbench.registry import Step, method
from workbench.rng import Rng
from workbench.speculation.engine import Warp
from workbench.speculation.growing import ConfidenceGrower
from workbench.speculation.rules import RULES

Width = Annotated[int, Knob(low=1, high=16, step=1, unit="tokens", small=2,
                            help="offers per node, and nodes expanded per level")]
Depth = Annotated[int, Knob(low=1, high=12, step=1, unit="levels", small=2,
                            help="levels of the tree, which is the number of draft passes per block")]
Nodes = Annotated[int, Knob(low=1, high=64, soft=(1, 32), step=1, unit="tokens", small=4,
                            help="drafts of highest confidence that the target scores")]


@method(version=2, exact=True, source="EAGLE-2, arXiv 2406.16858, sec. 4 (tree); its authors' verification",
        cost="2 * n_prompt + n_tokens * (n_nodes + expand * (depth - 1) + 2)", at_most=True)
def eagle2(problem: Decoding, rng: Rng, *, n_tokens: Tokens = 64, expand: Width = 4, depth: Depth = 5,
           n_nodes: Nodes = 16, temperature: Temperature = 1.0, top_k: TopK = 0, top_p: TopP = 1.0,
           typical_p: TypicalP = 1.0, draft: Draft = "best") -> Iterator[Step]:
    """EAGLE-2's dynamic tree: expanded by the product of draft probabilities, then cut to the best nodes.

    Drafts are the draft's most likely tokens, not draws, and are verified as such: each is accepted with its target
    probability given that those before it were not. The draft is an ordinary model, not EAGLE's feature head.
    State (n_samples, n_tokens, 2): token and number of the pass, -1 after a sequence's end.
    Cost: at most ``2 * n_prompt + n_tokens * (n_nodes + expand * (depth - 1) + 2)`` evaluations per sample.
    Raises ValueError where prompt and tokens exceed a model's context.
    """
    yield from written(problem, rng, n_tokens, Warp(temperature, top_k, top_p, typical_p), draft=problem.draft(draft),
                       grow=lambda row, uniform: ConfidenceGrower(expand, depth, n_nodes), rule=RULES["top"],
                       is_varied=True)
