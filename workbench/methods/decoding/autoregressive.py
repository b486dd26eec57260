"""Plain decoding: one token per pass of one model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from workbench.knob import Knob
from workbench.methods.decoding._written import Temperature, Tokens, TopK, TopP, TypicalP, written
from workbench.problems.decoding import Decoding
from workbench.registry import Step, method
from workbench.rng import Rng
from workbench.speculation.engine import Warp

Which = Annotated[str, Knob(choices=("best", "cheapest"), help="the target writes, or the cheapest draft")]


@method(version=2, source="ancestral sampling; top-p: arXiv 1904.09751; typical-p: arXiv 2202.00666",
        cost="n_prompt + n_tokens - 1", at_most=True)
def autoregressive(problem: Decoding, rng: Rng, *, n_tokens: Tokens = 64, temperature: Temperature = 1.0,
                   top_k: TopK = 0, top_p: TopP = 1.0, typical_p: TypicalP = 1.0, model: Which = "best"
                   ) -> Iterator[Step]:
    """Plain decoding: every token is one pass of one model. The yardstick of the family.

    State (n_samples, n_tokens, 2): token and number of the pass, -1 after a sequence's end.
    Cost: at most ``n_prompt + n_tokens - 1`` evaluations per sample, in n_tokens passes; less where a sequence ends.
    Raises ValueError where prompt and tokens exceed the model's context.
    """
    yield from written(problem, rng, n_tokens, Warp(temperature, top_k, top_p, typical_p),
                       model=problem.models[-1 if model == "best" else 0])
