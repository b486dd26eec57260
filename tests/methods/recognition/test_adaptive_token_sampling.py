"""Adaptive token sampling against its sampling by hand, the full model, and operations counted as they run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from workbench import run
from workbench.cost import ATTENTION
from workbench.methods.recognition.adaptive_token_sampling import sampled, significance
from workbench.problems.recognition import from_vision, tiny
from workbench.zoo.vision import Layers


def quiet(problem):
    return replace(problem, judge=lambda answer, cases: {})


def ran(n=6, seed=0, **knobs):
    return run("adaptive_token_sampling", quiet(tiny()), seed, n, **{"first_block": 1, **knobs})


def test_even_scores_keep_as_many_as_the_cap_and_peaked_ones_few():
    """Of 196 tokens; even scores differ by little, so that sums do not tie."""
    even = 1 + 1e-9 * torch.arange(196, dtype=torch.float64)
    assert int(sampled(even, 98).sum()) == 98
    peaked = torch.full((196,), 1e-6, dtype=torch.float64)
    peaked[7] = 1.0
    kept = sampled(peaked, 98)
    assert int(kept.sum()) <= 3 and bool(kept[7])  # the least, the last of the small ones, and the peak
    alone = torch.zeros(196, dtype=torch.float64)
    alone[7] = 1.0
    assert sampled(alone, 98).nonzero()[:, 0].tolist() == [7]


def test_more_heights_keep_no_fewer_and_follow_the_mass():
    source = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.rand(196, generator=source, dtype=torch.float64) ** 6
        counts = [int(sampled(scores, cap).sum()) for cap in (8, 32, 98, 196)]
        assert counts == sorted(counts) and all(c <= cap for c, cap in zip(counts, (8, 32, 98, 196), strict=True))
        mass = float(scores[sampled(scores, 8)].sum() / scores.sum())
        best = float(scores.sort(descending=True).values[:8].sum() / scores.sum())
        assert mass < best  # sampled tokens are not the best ones


def test_the_tokens_are_those_nearest_to_the_heights_by_hand():
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)  # sorted sums .1 .3 .6 1; heights .1 .55 1
    assert sampled(scores, 3).tolist() == [True, True, False, True]
    assert sampled(scores, 1).tolist() == [True, False, False, False]  # the one height is the least sum
    assert sampled(scores, 50).all()


def test_significance_is_the_class_tokens_attention_times_the_values_norm():
    source = torch.Generator().manual_seed(0)
    attention, values = torch.rand((2, 3, 5), generator=source), torch.randn((2, 3, 5, 4), generator=source)
    by_hand = torch.stack([torch.stack([attention[b, :, j].sum() * torch.cat(list(values[b, :, j])).norm()
                                        for j in range(1, 5)]) for b in range(2)])
    torch.testing.assert_close(significance(attention, values), by_hand / by_hand.sum(1, keepdim=True))


def test_without_a_block_that_samples_it_is_the_model():
    problem = tiny()
    whole = run("adaptive_token_sampling", problem, 0, 6, first_block=48)
    torch.testing.assert_close(whole.answer, problem.layers.model(problem.cases(0, 6).pixels).logits,
                               rtol=1e-4, atol=1e-5)
    assert whole.quality["lost_information"].value < 1e-6 and bool((whole.trace["tokens"] == 16).all())
    assert ran(cap=3).answer.sub(whole.answer).abs().max() > 1e-2


def test_the_best_by_score_with_room_for_all_is_the_model_too():
    torch.testing.assert_close(ran(pick="top", cap=16).answer, ran(first_block=48).answer, rtol=1e-4, atol=1e-5)


def test_dropped_tokens_contribute_once_more_as_keys():
    """Block 1 of an image with its class token and two patches going on, by the plain formula."""
    layers: Layers = tiny().layers
    with torch.no_grad():
        tokens = layers.block(0, layers.embed(tiny().cases(0, 1).pixels))
        problem = tiny()
        _, keys, values = problem.look(tokens, 1)
        kept = tokens[:, [0, 3, 9]]
        normed = layers.norm(1, tokens)
        q = layers.queries(1, normed)[:, :, [0, 3, 9]]
        mixed = (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1) @ values
        after = kept + layers.blocks[1].out(mixed.transpose(1, 2).flatten(2))
        wanted = after + layers.blocks[1].mlp(layers.blocks[1].norm_2(after))
        torch.testing.assert_close(problem.attend(kept, keys, values, 1), wanted, rtol=1e-5, atol=1e-6)
        alone = problem.attend(kept, keys[:, :, [0, 3, 9]], values[:, :, [0, 3, 9]], 1)
    assert (alone - wanted).abs().max() > 1e-3  # the broken twin: keys of the kept ones only


@pytest.mark.parametrize("knobs", [{}, {"cap": 4}, {"cap": 4, "pick": "top"}, {"cap": 9, "n_blocks": 4},
                                   {"cap": 2, "pick": "random"}])
def test_operations_are_those_that_ran_of_each_image(knobs):
    """Against torch's own counter, which sees every matrix product; and an image spends what it spends alone."""
    problem = quiet(tiny())
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        made = run("adaptive_token_sampling", problem, 0, 5, first_block=1, **knobs)
    assert made.cost.total_flops == counter.get_total_flops()
    assert made.spent is not None and float(made.spent.sum()) == pytest.approx(made.cost.total_flops, rel=1e-12)
    alone = run("adaptive_token_sampling", problem, 0, 1, first_block=1, **knobs)
    assert alone.cost.total_flops == pytest.approx(float(made.spent[0]), rel=1e-12)
    rows = 5 * problem.layers.flops()
    assert made.cost.total_flops < rows  # the broken twin: as if all tokens stayed


def test_as_many_stay_at_random_as_by_sampling_in_the_first_block():
    by = {pick: ran(pick=pick, cap=5).trace["tokens"][1] for pick in ("sampled", "random", "top")}
    assert torch.equal(by["sampled"], by["random"]) and bool((by["top"] == 5).all())
    assert not torch.equal(ran(pick="random", cap=5).answer, ran(pick="sampled", cap=5).answer)


def test_a_model_of_ones_own_is_checked():
    model = tiny().layers.model
    with pytest.raises(ValueError, match="2 classes: expected 3"):
        from_vision(model, tiny().draw, ["a", "b"])
    with pytest.raises(ValueError, match="training mode"):
        from_vision(tiny().layers.model.train(), tiny().draw, ["a", "b", "c"])
    with pytest.raises(TypeError, match="Linear"):
        from_vision(torch.nn.Linear(2, 2), tiny().draw, ["a"])
