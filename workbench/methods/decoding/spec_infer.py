"""SpecInfer: a tree of fixed widths per level, under any rule that verifies several drafts of one position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from workbench.knob import Knob
from workbench.methods.decoding._written import Draft, Temperature, Tokens, TopK, TopP, TypicalP, written
from workbench.problems.decoding import Decoding
from workbench.registry import Step, method
from workbench.rng import Rng
from workbench.speculation.engine import Warp
from workbench.speculation.growing import StaticGrower
from workbench.speculation.rules import RULES
from workbench.speculation.trees import Shape, widths

MAX_NODES = 128
Widths = Annotated[tuple[float, ...], Knob(low=1, high=16, small=(2, 2), help="drafts below each node of a level, from "
                                                                            "the first level down; whole numbers")]
Which = Annotated[str, Knob(choices=tuple(name for name, rule in RULES.items() if rule.max_drafts != 1),
                            help="how the drafts of one position are drawn and verified; all leave the target's law")]


def n_nodes(expansion: tuple[float, ...]) -> int:
    """Nodes of a tree of these widths."""
    total, level = 0, 1
    for width in expansion:
        level *= int(width)
        total += level
    return total


def tree(expansion: tuple[float, ...]) -> Shape:
    """The shape. Raises ValueError where a width is no whole number, there is none, or nodes exceed MAX_NODES."""
    if not expansion or any(width != int(width) for width in expansion) or n_nodes(expansion) > MAX_NODES:
        raise ValueError(f"widths={expansion!r}: expected whole numbers that make at most {MAX_NODES} nodes, "
                         f"these make {n_nodes(expansion)}")
    return widths([int(width) for width in expansion])


@method(version=2, exact=True, source="SpecInfer, arXiv 2305.09781, sec. 3 (expansion) and 4.3 (multi-step sampling)",
        cost="2 * n_prompt + n_tokens * (2 * n_nodes(widths) + 2)", at_most=True)
def spec_infer(problem: Decoding, rng: Rng, *, n_tokens: Tokens = 64, widths: Widths = (3.0, 2.0, 1.0, 1.0),
               temperature: Temperature = 1.0, top_k: TopK = 0, top_p: TopP = 1.0, typical_p: TypicalP = 1.0,
               rule: Which = "rrs", draft: Draft = "best") -> Iterator[Step]:
    """SpecInfer's tree: so many drafts below each node of a level, the whole tree scored in one target pass.

    The rule decides how drafts are drawn: "rrs" is SpecInfer's own (independent draws, recursive rejection).
    State (n_samples, n_tokens, 2): token and number of the pass, -1 after a sequence's end.
    Cost: at most ``2 * n_prompt + n_tokens * (2 * n_nodes(widths) + 2)`` evaluations per sample.
    Raises ValueError where a width is no whole number, the tree exceeds 128 nodes, the rule takes fewer drafts, or
    prompt and tokens exceed a model's context.
    """
    shape, chosen = tree(widths), RULES[rule]
    if chosen.max_drafts is not None and max(widths) > chosen.max_drafts:
        raise ValueError(f"widths={widths!r}: rule={rule!r} takes at most {chosen.max_drafts} drafts per position")
    yield from written(problem, rng, n_tokens, Warp(temperature, top_k, top_p, typical_p), draft=problem.draft(draft),
                       grow=lambda row, uniform: StaticGrower(shape, chosen.drafting, uniform), rule=chosen,
                       is_varied=chosen.drafting != "iid")
