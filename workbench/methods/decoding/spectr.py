"""SpecTr: several chains drafted side by side, verified as one tree of what they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from workbench.knob import Knob
from workbench.methods.decoding._written import Draft, Length, Temperature, Tokens, TopK, TopP, TypicalP, written
from workbench.problems.decoding import Decoding
from workbench.registry import Step, method
from workbench.rng import Rng
from workbench.speculation.engine import Warp
from workbench.speculation.growing import StaticGrower
from workbench.speculation.rules import RULES
from workbench.speculation.trees import k_chains

Drafts = Annotated[int, Knob(low=1, high=16, soft=(1, 8), step=1, unit="chains", small=3,
                             help="chains drafted independently of each other in each block")]
Which = Annotated[str, Knob(choices=tuple(name for name, rule in RULES.items()
                                          if rule.drafting == "iid" and rule.max_drafts is None),
                            help="how the drafts still alive at a position are verified; all leave the target's law")]


@method(version=2, exact=True, source="SpecTr, arXiv 2310.15141, alg. 2 (k-SEQ) and 3 (blocks)",
        cost="2 * n_prompt + n_tokens * (2 * n_drafts * draft_length + 2)", at_most=True)
def spectr(problem: Decoding, rng: Rng, *, n_tokens: Tokens = 64, n_drafts: Drafts = 4, draft_length: Length = 4,
           temperature: Temperature = 1.0, top_k: TopK = 0, top_p: TopP = 1.0, typical_p: TypicalP = 1.0,
           rule: Which = "k_seq", draft: Draft = "best") -> Iterator[Step]:
    """SpecTr: independent chains of drafts, verified together; drafts that agree so far stay alive together.

    At each position a rule chooses among the next tokens of the chains alive, equal ones counted as often as they
    come. State (n_samples, n_tokens, 2): token and number of the pass, -1 after a sequence's end. Equal beginnings of
    chains are evaluated once. Cost: at most
    ``2 * n_prompt + n_tokens * (2 * n_drafts * draft_length + 2)`` evaluations per sample.
    Raises ValueError where prompt and tokens exceed a model's context.
    """
    shape, chosen = k_chains(n_drafts, draft_length), RULES[rule]
    yield from written(problem, rng, n_tokens, Warp(temperature, top_k, top_p, typical_p), draft=problem.draft(draft),
                       grow=lambda row, uniform: StaticGrower(shape, chosen.drafting, uniform, is_pooled=True),
                       rule=chosen)
