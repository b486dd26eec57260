"""What a pass of a language model is charged with: all that it computes, counted by torch operation by operation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from integrations.tiny_language_models import VOCABULARY, language_model, like, prompt
from torch.utils.flop_counter import FlopCounterMode

from workbench.cost import ATTENTION, Meter
from workbench.rng import Rng
from workbench.speculation import causal as causal_module
from workbench.speculation.causal import causal, flops_per_token
from workbench.speculation.engine import LanguageModel, speculate
from workbench.speculation.growing import StaticGrower
from workbench.speculation.rules import RULES
from workbench.speculation.trees import widths


def decode(target: LanguageModel, draft: LanguageModel, n_tokens: int) -> None:
    """Three rows, of which the second ends after two tokens and the third after three."""
    rng = Rng(0, 3)
    rule = RULES["rrs_without"]
    for _ in speculate(target, draft, prompt(5, n_rows=3).tolist(), n_tokens,
                       lambda row, uniform: StaticGrower(widths((2, 1)), rule.drafting, uniform), rule,
                       [rng.uniforms(i) for i in range(3)],
                       ends=lambda row, tokens, n_new: 1 + row if row and len(tokens) > row else None):
        pass


def metered(model: LanguageModel, meter: Meter) -> LanguageModel:
    return replace(model, network=meter.wrap(model.name, model.network))


def assert_is_charged_for_what_it_computes(family: str, attention: str) -> None:
    target = language_model(family, attention=attention)
    models = [causal(target, "target"), causal(like(target, 0.5), "draft")]
    meter = Meter({m.name: m.work for m in models})
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        decode(*(metered(m, meter) for m in models), n_tokens=9)
    found, spent = counter.get_total_flops(), meter.cost.total_flops
    assert 0 < spent <= found <= 1.02 * spent  # what turns positions into rotary angles is not charged


@pytest.mark.parametrize(("family", "attention"), [
    ("llama", "eager"), ("llama", "sdpa"), ("gpt2", "sdpa"), ("opt", "eager"), ("gemma3", "eager")])
def test_a_pass_is_charged_for_what_it_computes(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_module, "recording", lambda module, kinds: None)
    assert_is_charged_for_what_it_computes(family, attention)


def test_the_charge_is_too_low_where_only_wanted_positions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_module, "recording", lambda module, kinds: None)

    def work(self: Any, module: Any, ask: Any) -> tuple[int, float]:
        n = sum(map(len, ask.tokens))
        return n, n * flops_per_token(module, 0)

    monkeypatch.setattr(causal_module.KeyValues, "work", work)
    with pytest.raises(AssertionError):
        assert_is_charged_for_what_it_computes("llama", "sdpa")


def test_rows_that_have_ended_and_padding_are_evaluations() -> None:
    model = causal(language_model(), "target")
    meter = Meter({"target": model.work})
    network, state = meter.wrap("target", model.network), model.begin(3)
    session = causal_module.Ask(state, [[2, 3, 4], [5], []], [[-1, 0, 1], [-1], []], [[2], [0], []])
    network(torch.tensor([2, 3, 4, 5]), session)
    assert meter.cost.evaluations == {"target": 9} and meter.cost.calls == {"target": 1}


def test_flops_of_a_token_are_its_matrices_and_what_it_sees() -> None:
    model = language_model("llama")
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24  # queries and output, keys and values of half the heads, the MLP
    assert flops_per_token(model, 0) == 2 * (2 * layer + 16 * VOCABULARY)
    assert flops_per_token(model, 7) - flops_per_token(model, 0) == 7 * 2 * 2 * 2 * 16  # scores and values, two layers
