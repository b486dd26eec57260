"""The decoding methods: the law of what they write, what they are when knobs are neutral, and what they yield."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from workbench import METHODS, run
from workbench.problems.decoding import FIRST, Decoding, markov, random_pair, rank_acceptance, total_variation
from workbench.quality import METRICS, Quality
from workbench.rng import Rng
from workbench.speculation import engine
from workbench.speculation.acceptance import block_efficiency, optimal
from workbench.speculation.engine import Warp
from workbench.speculation.rules import RULES, Rule
from workbench.speculation.trees import expected_tokens, optimal_tokens, sequoia, widths

SPECULATIVE = sorted(name for name, m in METHODS.items() if m.family == "decoding" and name != "autoregressive")
N = 4_000
LEAST = 1e-4  # p-value below which a law is another one; the twins below stay under it by many orders
# Every way of drawing and verifying, as small as shows branches, refusals, bonus tokens and pools.
SETTINGS = [
    ("autoregressive", {}), ("speculative", {"draft_length": 2}), ("speculative", {"policy": "confidence"}),
    ("speculative", {"policy": "heuristic", "draft_length": 1}), ("sequoia", {"n_nodes": 5, "max_depth": 2}),
    ("eagle2", {"expand": 2, "depth": 2, "n_nodes": 4}),
    *(("spectr", {"n_drafts": 3, "draft_length": 2, "rule": rule}) for rule in ("k_seq", "rrs")),
    *(("spec_infer", {"widths": (2, 2), "rule": rule}) for rule in RULES if rule not in ("single", "optimal")),
]


@pytest.fixture(scope="module")
def three() -> Decoding:
    """Three tokens, and drafts far from the target: whatever biases a rule shows."""
    return markov(3, divergence=1.5, sharpness=1.0, seed=2)


def table(problem: Decoding) -> np.ndarray:
    """The target's next-token laws (V, V), read off its logits."""
    states = list(range(problem.target.vocab_size))
    ask = engine.Ask(None, [states], [[-1] * len(states)], [states])
    return torch.softmax(problem.target.network(torch.tensor(states), ask)[0], 1).numpy()


def p_value(problem: Decoding, method: str, knobs: dict, n_tokens: int = 3, n: int = N) -> float:
    """Of the joint law of n_tokens tokens, against the chain's own, enumerated."""
    written = run(method, problem, 5, n, n_tokens=n_tokens, **knobs).answer[..., 0].numpy()
    law = table(problem)
    size = len(law)
    cells = list(product(range(size), repeat=n_tokens))
    expected = [math.prod(law[a, b] for a, b in zip((FIRST, *cell), cell, strict=False)) for cell in cells]
    counts = np.bincount(written @ size ** np.arange(n_tokens)[::-1], minlength=len(cells))
    return float(chisquare(counts, np.array(expected) / sum(expected) * n).pvalue)


@pytest.mark.parametrize(("method", "knobs"), SETTINGS, ids=lambda v: v if isinstance(v, str) else "-".join(
    str(x) for x in v.values()))
def test_the_law_is_the_targets(three, method, knobs):
    quiet = replace(three, judge=lambda answer, labels: {})
    n = N // 8 if knobs.get("rule") == "importance" else N  # a linear programme at each position
    assert p_value(quiet, method, knobs, 2, n) > LEAST


def test_the_law_of_longer_texts_is_the_targets(three):
    """Over several blocks: what is kept of drafts, and what they are given, matters from the second on."""
    quiet = replace(three, judge=lambda answer, labels: {})
    assert p_value(quiet, "spectr", {"n_drafts": 2, "draft_length": 2}, n_tokens=4) > LEAST


def _rule(name: str, decide) -> Rule:
    return replace(RULES[name], decide=decide)


def _takes_the_draft(target, draft, tokens, uniform):
    return tokens[0]


def _redraws_from_the_target(target, draft, tokens, uniform):
    x = tokens[0]
    return x if uniform() * draft[x] < target[x] else int(np.searchsorted(target.cumsum(), uniform()))


@pytest.mark.parametrize("decide", [_takes_the_draft, _redraws_from_the_target])
def test_a_biased_rule_is_found(three, monkeypatch, decide):
    monkeypatch.setitem(RULES, "single", _rule("single", decide))
    assert p_value(replace(three, judge=lambda a, b: {}), "speculative", {"draft_length": 2}) < 1e-12


def test_a_tree_that_forgets_how_often_a_token_was_drawn_is_found(three, monkeypatch):
    """Equal drafts counted once: the drafts left are no longer independent draws."""
    verify = Rule.verify
    monkeypatch.setattr(Rule, "verify", lambda self, p, q, tokens, uniform: verify(
        self, p, q, list(dict.fromkeys(tokens)), uniform))
    quiet = replace(three, judge=lambda a, b: {})
    assert p_value(quiet, "spectr", {"n_drafts": 4, "draft_length": 1}, 2, 2 * N) < 1e-12


def test_a_cache_that_keeps_a_refused_draft_is_found(three, monkeypatch):
    """The draft asked on a wrong context draws from another law than the rule is told: seen only in what it yields.

    The target asked so writes another law: here its context is the draft's, one token stale.
    """
    walk = engine._walk

    def stale(tree, laws, rule, uniform):
        return walk(tree, np.concatenate([laws[:1], laws[:-1]]), rule, uniform)

    monkeypatch.setattr(engine, "_walk", stale)
    assert p_value(replace(three, judge=lambda a, b: {}), "speculative", {"draft_length": 2}) < 1e-12


@pytest.mark.parametrize("method", SPECULATIVE)
def test_greedy_writes_what_plain_greedy_writes(method):
    problem = markov(12, divergence=0.7)
    plain = run("autoregressive", problem, 0, 3, n_tokens=40, temperature=0.0).answer
    ours = run(method, problem, 1, 3, n_tokens=40, temperature=0.0).answer
    assert torch.equal(ours[..., 0], plain[..., 0])


@pytest.mark.parametrize(("method", "knobs"), [
    ("spectr", {"n_drafts": 1, "draft_length": 3}), ("spec_infer", {"widths": (1, 1, 1)}),
    ("spec_infer", {"widths": (1, 1, 1), "rule": "k_seq"}),
])
def test_with_one_draft_they_are_speculative_decoding(method, knobs):
    problem = markov(12)
    plain = run("speculative", problem, 3, 4, n_tokens=40, draft_length=3)
    same = run(method, problem, 3, 4, n_tokens=40, **knobs)
    assert torch.equal(same.answer, plain.answer) and same.cost == plain.cost
    other = run(method, problem, 3, 4, n_tokens=40, **{**knobs, **(
        {"n_drafts": 2} if method == "spectr" else {"widths": (2, 1, 1)})})
    assert not torch.equal(other.answer, plain.answer)


@pytest.mark.parametrize(("method", "knobs", "depth"), [
    ("speculative", {"draft_length": 4}, 4), ("spectr", {"draft_length": 3}, 3), ("spec_infer", {"widths": (2, 2)}, 2),
    ("spec_infer", {"widths": (2, 2), "rule": "rrs_without"}, 2), ("spectr", {"draft_length": 3, "rule": "rrs"}, 3),
    ("spec_infer", {"widths": (2, 2), "rule": "greedy"}, 2),
])
def test_a_draft_that_is_the_target_is_always_accepted(method, knobs, depth):
    problem = random_pair(20, divergence=0.0)
    n_blocks = 6
    made = run(method, problem, 0, 3, n_tokens=(depth + 1) * n_blocks, **knobs)
    assert made.quality["block_efficiency"].value == depth + 1
    worse = run(method, random_pair(20, divergence=2.5), 0, 3, n_tokens=(depth + 1) * n_blocks, **knobs)
    assert worse.quality["block_efficiency"].value < depth + 1


def alpha(problem: Decoding) -> float:
    target, draft = (torch.softmax(x[0], 0) for x in problem.positions("small"))
    return float(torch.minimum(target, draft).sum())


@pytest.mark.parametrize("draft_length", [1, 3, 6])
def test_block_efficiency_is_leviathans(draft_length):
    problem = random_pair(30, divergence=0.8, seed=1)
    made = run("speculative", problem, 0, 40, n_tokens=300, draft_length=draft_length).quality["block_efficiency"]
    expected = block_efficiency(alpha(problem), draft_length)
    assert abs(made.value - expected) < 4 * made.stderr + 0.01 * expected  # the last block is cut short
    assert abs(made.value - block_efficiency(alpha(problem) * 0.9, draft_length)) > 4 * made.stderr + 0.01 * expected


@pytest.mark.parametrize("is_sequoia", [True, False])
def test_trees_yield_what_their_ranks_say(is_sequoia):
    """F(T) of the measured acceptance by rank is what a run yields, where every position has the same law."""
    problem = random_pair(30, divergence=1.0, seed=3)
    if is_sequoia:
        a = rank_acceptance(problem, "best", Warp(), 8, n_positions=1, repeats=4000)
        shape = sequoia(rank_acceptance(problem, "best", Warp(), 8), 12, 4)
        made = run("sequoia", problem, 0, 60, n_tokens=200, n_nodes=12, max_depth=4)
    else:
        shape = widths([3, 2])
        a = rank_acceptance(problem, "best", Warp(), 3, "k_seq", n_positions=1, repeats=4000)
        b = rank_acceptance(problem, "best", Warp(), 2, "k_seq", n_positions=1, repeats=4000)
        made = run("spec_infer", problem, 0, 60, n_tokens=200, widths=(3, 2), rule="k_seq")
    got = made.quality["block_efficiency"]
    if is_sequoia:  # ranks of a node with fewer children than measured: recursive rejection goes rank by rank
        expected = expected_tokens(shape, a)
    else:
        expected = 1 + sum(a) * (1 + sum(b))
    assert abs(got.value - expected) < 4 * got.stderr + 0.03 * expected
    assert abs(got.value - expected * 1.12) > 4 * got.stderr + 0.03 * expected


def test_the_optimal_rule_yields_what_the_tree_allows_and_no_other_rule_more():
    problem = random_pair(30, divergence=1.0, seed=3)
    target, draft = (torch.softmax(x[0], 0).numpy() for x in problem.positions("small"))
    bound = optimal_tokens(widths([2, 2]), lambda n: optimal(target, draft, n).acceptance)
    a = optimal(target, draft, 2).acceptance
    assert bound == pytest.approx(1 + a + a**2, abs=1e-12)
    found = {rule: run("spec_infer", problem, 0, 20, n_tokens=120, widths=(2, 2), rule=rule).quality["block_efficiency"]
             for rule in ("optimal", "k_seq", "rrs")}
    assert abs(found["optimal"].value - bound) < 4 * found["optimal"].stderr + 0.015 * bound
    assert all(found[rule].value < bound - 2 * found[rule].stderr for rule in ("k_seq", "rrs"))
    chain = optimal_tokens(widths([1, 1]), lambda n: optimal(target, draft, n).acceptance)
    assert chain == pytest.approx(block_efficiency(alpha(problem), 2))
    with pytest.raises(ValueError, match=r"acceptance\(2\)=1.5"):
        optimal_tokens(widths([2]), lambda n: 1.5)


def test_tokens_tell_their_pass():
    made = run("spectr", markov(), 0, 5, n_tokens=30)
    passes = made.answer[..., 1]
    steps = passes[:, 1:] - passes[:, :-1]
    assert (passes[:, 0] == 0).all() and ((steps == 0) | (steps == 1)).all()
    per_pass = torch.stack([row.bincount(minlength=int(passes.max()) + 1) for row in passes])
    assert per_pass.max() <= 5 and made.cost.calls["target"] == int(passes.max()) + 1


def test_total_variation_of_a_law_known_in_closed_form():
    """Written by another chain: half sum of |P(a) (law - other)[a, b]|, by both chains' tables, at any length."""
    problem, n = markov(3), 4000
    law = torch.tensor(table(problem))
    other = law.roll(1, 0)  # the laws after another token than the last
    stream = torch.Generator().manual_seed(0)
    rows, start, expected = [torch.full((n,), FIRST)], torch.eye(3, dtype=torch.float64)[FIRST], 0.0
    for _ in range(5):
        rows.append(other[rows[-1]].multinomial(1, generator=stream)[:, 0])
        expected = expected + start[:, None] * (other - law) / 5
        start = start @ other
    answer = torch.stack((torch.stack(rows[1:], 1), torch.arange(5).expand(n, -1)), -1)
    made = total_variation(answer, law)
    assert abs(made.value - float(expected.abs().sum() / 2)) < 4 * made.stderr < 0.1
    right = total_variation(answer, other)
    assert abs(right.value) < 4 * right.stderr
    # sequences that end early are of the same law: what their end leaves out is no part of it
    ended = answer.clone()
    ended[torch.cat((torch.zeros(n, 1), (answer[..., 0] == 2).cumsum(1)[:, :-1]), 1) > 0] = -1
    assert (ended < 0).any() and abs(total_variation(ended, other).value) < 4 * total_variation(ended, other).stderr
    for few, shape in ((answer[:3], law), (answer, law[:2])):
        with pytest.raises(ValueError, match=r"expected at least 4, \(V, V\)"):
            total_variation(few, shape)


def test_chains_are_judged_by_their_law(three, monkeypatch):
    """Exact methods are not told from the chain; another temperature and a broken engine are."""
    def figure(n: int = 400, **knobs: object) -> Quality:
        return run("speculative", three, 3, n, n_tokens=12, **knobs).quality["total_variation"]

    exact = figure()
    assert exact.low < 0 < exact.high and exact.stderr < 0.02 and exact.n == 400
    assert figure(temperature=0.5).low > 0.05  # truth is the law at temperature 1
    assert "total_variation" not in run("speculative", three, 3, 3, n_tokens=12).quality
    assert METRICS["total_variation"].min_n >= 4
    walk = engine._walk
    monkeypatch.setattr(engine, "_walk", lambda tree, laws, rule, uniform: walk(
        tree, np.concatenate([laws[:1], laws[:-1]]), rule, uniform))
    assert figure().low > 0  # the broken twin: laws of a token before


def test_a_sequence_ends_at_its_end_token():
    problem = replace(markov(6), ends=(2, 4))
    for method in ("autoregressive", *SPECULATIVE):
        tokens = run(method, problem, 0, 40, n_tokens=30).answer[..., 0]
        for row in tokens.tolist():
            if {2, 4} & set(row):
                end = min(row.index(token) for token in (2, 4) if token in row)
                assert -1 not in row[: end + 1] and set(row[end + 1:]) <= {-1}
            else:
                assert -1 not in row
        assert all((tokens == end).any() for end in problem.ends)


def test_what_is_wrong_is_named():
    problem = markov()
    short = replace(problem, target=replace(problem.target, context=20))
    with pytest.raises(ValueError, match=r"n_tokens=64: after a prompt of 1, target has room for 20, as .* 20"):
        run("speculative", short)
    with pytest.raises(ValueError, match=r"widths=\(2.5,\): expected whole numbers"):
        run("spec_infer", problem, widths=(2.5,))
    with pytest.raises(ValueError, match=r"widths=\(9.0, 9.0, 9.0\): .* at most 128 nodes, these make 819"):
        run("spec_infer", problem, widths=(9, 9, 9))
    with pytest.raises(ValueError, match=r"widths=\(3.0,\): rule='importance' takes at most 2"):
        run("spec_infer", problem, widths=(3,), rule="importance")
    with pytest.raises(ValueError, match=r"prompt 0 is empty"):
        run("speculative", replace(problem, prompts=lambda n: [[] for _ in range(n)]))
    broken = replace(problem.target, network=lambda tokens, ask: [
        torch.full((len(asked), 8), math.nan) for asked in ask.asked])
    with pytest.raises(ValueError, match="NaN"):
        run("speculative", replace(problem, target=broken))
    for name, value in (("vocab_size", 1), ("divergence", -1.0), ("sharpness", math.inf)):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            markov(**{name: value})


def test_nothing_is_drafted_beyond_the_end():
    steps = list(METHODS["speculative"].function(markov(divergence=0.0), Rng(0, 1), **METHODS["speculative"].check(
        {"n_tokens": 7, "draft_length": 4})))
    assert [step.info["blocks"][0].tree.n_nodes for step in steps] == [4, 1]
