"""What the methods of this family share: knobs, and the steps that the engine's blocks make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import torch

from workbench.knob import Knob
from workbench.problems.decoding import Decoding
from workbench.registry import Step
from workbench.rng import Rng
from workbench.speculation.engine import LanguageModel, Warp, speculate
from workbench.speculation.growing import Grow
from workbench.speculation.rules import Rule

Tokens = Annotated[int, Knob(low=1, high=1000, soft=(16, 256), step=1, unit="tokens", small=6,
                             help="new tokens to write")]
Temperature = Annotated[float, Knob(low=0.0, high=4.0, soft=(0, 2), step=0.05,
                                    help="divides the logits of target and draft; 0 takes the most likely token")]
TopK = Annotated[int, Knob(low=0, high=1000, soft=(0, 100), step=1, unit="tokens", small=5,
                           help="only the k most likely tokens of either model; 0 is off")]
TopP = Annotated[float, Knob(low=0.01, high=1.0, step=0.01,
                             help="only the most likely tokens that hold this mass; 1 is off")]
TypicalP = Annotated[float, Knob(low=0.01, high=1.0, step=0.01,
                                 help="only tokens of surprise nearest to the entropy that hold this mass; 1 is off")]
Draft = Annotated[str, Knob(choices=("best", "cheapest"), help="which of the problem's drafts proposes tokens")]
Length = Annotated[int, Knob(low=1, high=16, step=1, unit="tokens", small=2,
                             help="tokens drafted ahead, one after the other, in each block")]


def written(problem: Decoding, rng: Rng, n_tokens: int, law: Warp, *, model: LanguageModel | None = None,
            draft: LanguageModel | None = None, grow: Grow | None = None, rule: Rule | None = None,
            is_varied: bool = False) -> Iterator[Step]:
    """Steps of `speculate`: state (n_samples, n_tokens, 2) as in `Decoding`, a step per target pass.

    info: i, and blocks {sample: Block} of the samples still going. model: in the target's place. is_varied: the drafts
    of a position are different tokens; at temperature 0, whose law has only one, they come of the law at temperature 1.
    Raises what `speculate` raises, such as ValueError where prompt and tokens do not fit a model's context.
    """
    model = problem.target if model is None else model
    state = torch.full((rng.n_samples, n_tokens, 2), -1, dtype=torch.int64, device=problem.device)
    n_done = [0] * rng.n_samples

    def ends(row: int, tokens: list[int], n_new: int) -> int | None:
        return next((n + 1 for n in range(len(tokens) - n_new, len(tokens)) if tokens[n] in problem.ends), None)

    going = speculate(model, draft, problem.cases_of(rng), n_tokens, grow, rule,
                      [rng.uniforms(i) for i in range(rng.n_samples)], law=law, ends=ends,
                      draft_law=replace(law, temperature=1.0) if is_varied and law.temperature == 0 else None)
    for i, blocks in enumerate(going):
        state = state.clone()
        for row, block in blocks.items():
            place = slice(n_done[row], n_done[row] + len(block.tokens))
            state[row, place, 0], state[row, place, 1] = torch.tensor(block.tokens, device=problem.device), i
            n_done[row] = place.stop
        yield Step(state, {"i": i, "blocks": blocks})
