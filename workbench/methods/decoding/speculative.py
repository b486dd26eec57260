"""Speculative decoding: one chain of drafts per target pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from workbench.knob import Knob
from workbench.methods.decoding._written import Draft, Length, Temperature, Tokens, TopK, TopP, TypicalP, written
from workbench.problems.decoding import Decoding
from workbench.registry import Step, method
from workbench.rng import Rng
from workbench.speculation.drafting import Uniform
from workbench.speculation.engine import Warp
from workbench.speculation.growing import ChainGrower
from workbench.speculation.rules import RULES
from workbench.speculation.trees import POLICIES, DraftLength

Policy = Annotated[str, Knob(choices=POLICIES, help="how the draft length follows what was accepted or how sure the "
                                                    "draft is")]
Threshold = Annotated[float, Knob(low=0.0, high=1.0, step=0.05, needs={"policy": "confidence"},
                                  help="draft no further after a token of lower draft probability")]


def longest(draft_length: int, policy: str, n_tokens: int) -> int:
    """The most tokens that one block may draft."""
    return n_tokens if policy == "heuristic" else draft_length


@method(version=2, exact=True, source="speculative decoding, arXiv 2211.17192, alg. 1; arXiv 2302.01318, alg. 2",
        cost="2 * n_prompt + n_tokens * (2 * longest(draft_length, policy, n_tokens) + 2)", at_most=True)
def speculative(problem: Decoding, rng: Rng, *, n_tokens: Tokens = 64, draft_length: Length = 4,
                temperature: Temperature = 1.0, top_k: TopK = 0, top_p: TopP = 1.0, typical_p: TypicalP = 1.0,
                policy: Policy = "constant", threshold: Threshold = 0.4, draft: Draft = "best") -> Iterator[Step]:
    """Speculative decoding: a draft proposes a chain of tokens, one target pass verifies it; the target's own law.

    State (n_samples, n_tokens, 2): token and number of the pass, -1 after a sequence's end.
    Cost: at most ``2 * n_prompt + n_tokens * (2 * longest(draft_length, policy, n_tokens) + 2)`` evaluations per
    sample, which is what it takes where nothing is accepted.
    Raises ValueError where prompt and tokens exceed a model's context.
    """
    lengths: dict[int, DraftLength] = {}  # one per sample: policies learn from block to block

    def grow(row: int, uniform: Uniform) -> ChainGrower:
        return ChainGrower(lengths.setdefault(row, DraftLength(policy, draft_length, threshold)), uniform)

    for step in written(problem, rng, n_tokens, Warp(temperature, top_k, top_p, typical_p),
                        draft=problem.draft(draft), grow=grow, rule=RULES["single"]):
        for row, block in step.info["blocks"].items():
            if block.tree.n_nodes:
                lengths[row].observe(len(block.accepted), block.tree.n_nodes)
        yield step
