"""Verification rules: output laws by enumeration written here anew, and what `verify` draws against these."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from bisect import bisect

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import chisquare

from workbench.speculation import rules as module
from workbench.speculation.acceptance import draft_law, k_seq_growth, k_seq_rho, optimal
from workbench.speculation.drafting import draw
from workbench.speculation.rules import RULES, Verdict, contest, duel

TARGET, DRAFT = np.array([0.3, 0.25, 0.2, 0.15, 0.1]), np.array([0.1, 0.2, 0.1, 0.25, 0.35])
N_DRAFTS = {"single": 1, "importance": 2}  # of the others 3
CHANCE = 1e-4  # a correct rule fails a check this rarely; broken twins miss it by many orders of magnitude


def pairs(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        size = int(rng.integers(2, 6))
        yield tuple(rng.dirichlet(np.full(size, rng.choice([0.3, 1.0, 4.0]))) for _ in range(2))


def tried(target, steps):
    """(kept (V,), residual (V,)): masses of output when drafts x are tried in turn against laws g, steps [(x, g)]."""
    kept, wanted, alive = np.zeros_like(target), target, 1.0
    for x, g in steps:
        accept = min(1.0, wanted[x] / g[x])
        kept[x] += alive * accept
        alive *= 1 - accept
        rest = np.clip(wanted - g, 0, None)
        if alive <= 0 or rest.sum() < 1e-15:
            return kept, 0.0 * target
        wanted = rest / rest.sum()
    return kept, alive * wanted


def without_earlier(draft, tokens):
    laws, rest = [], draft.copy()
    for x in tokens:
        laws.append(rest / rest.sum())
        rest = np.where(np.arange(len(rest)) == x, 0.0, rest)
    return laws


def outcome(name, target, draft, tokens):
    """Masses (kept, residual) of the output given the drafts, by the rules' definitions."""
    n, one_hot = len(tokens), np.eye(len(target))
    if name in ("single", "rrs"):
        return tried(target, [(x, draft) for x in tokens])
    if name == "rrs_without":
        return tried(target, list(zip(tokens, without_earlier(draft, tokens), strict=True)))
    if name == "top":
        return tried(target, [(x, one_hot[x]) for x in tokens])
    if name == "greedy":
        return tried(target, [(tokens[-1], without_earlier(draft, tokens)[-1])])
    if name == "k_seq":
        rho, kept, alive = k_seq_rho(target, draft, n), np.zeros_like(target), 1.0
        for x in tokens:
            accept = min(1.0, target[x] / (rho * draft[x]))
            kept[x] += alive * accept
            alive *= 1 - accept
        beta = np.minimum(draft, target / rho).sum()
        total = 1 - (1 - beta) ** n
        residual = np.clip(target - np.minimum(draft, target / rho) * total / beta, 0, None)
        return kept, alive * residual / max(residual.sum(), 1e-300)
    if name == "optimal":
        weights, law = contest(target, draft, n)
        shares = weights[list(tokens)] / weights[list(tokens)].sum()
    else:
        found = duel(target, draft)
        law, first = found.law, found.first_wins(*tokens)
        shares = (first, 1 - first)
    parts = [tried(target, [(x, law)]) for x in tokens]
    return tuple(sum(share * part[i] for share, part in zip(shares, parts, strict=True)) for i in (0, 1))


def enumerated(name, target, draft, n):
    """The joint law of the output, (2, V): row 1 where it is one of the drafts, row 0 where not; and the mass that is
    one only by the residual."""
    joint, by_residual = np.zeros((2, len(target))), 0.0
    for tokens, mass in draft_law(draft, n, RULES[name].drafting).items():
        kept, residual = outcome(name, target, draft, tokens)
        is_draft = np.isin(np.arange(len(target)), tokens)
        joint[1] += mass * (kept + residual * is_draft)
        joint[0] += mass * residual * ~is_draft
        by_residual += mass * (residual * is_draft).sum()
    return joint, by_residual


@pytest.mark.parametrize("name", RULES)
def test_enumerated_output_is_the_targets(name):
    tolerance = 1e-9 if name == "optimal" else 1e-12
    for target, draft in pairs(8 if name in ("optimal", "importance") else 40):
        for n in (1, 2, 3)[: RULES[name].max_drafts]:
            if name == "importance" and n == 1:
                continue
            joint, by_residual = enumerated(name, target, draft, n)
            assert np.abs(joint.sum(axis=0) - target).max() < tolerance
            bound = optimal(target, draft, n, RULES[name].drafting).acceptance
            assert joint[1].sum() <= bound + tolerance
            if name not in ("greedy", "importance", "optimal"):
                assert by_residual < 1e-11  # a rejected draft has no residual mass, so only these three gain by it
            claimed = RULES[name].acceptance(target, draft, n)
            if name == "optimal":
                assert claimed - 1e-9 <= joint[1].sum() and claimed > bound - 1e-3
            elif name != "rrs_without":
                assert claimed == pytest.approx(joint[1].sum(), abs=1e-11)
            if name in ("greedy", "top"):
                assert claimed == pytest.approx(bound, abs=1e-12)
            if name == "importance":  # so few tokens are all in the linear program
                assert claimed == pytest.approx(bound, abs=1e-9)


@pytest.mark.parametrize(("laws", "expected"), [
    (((0.6, 0.4), (0.9, 0.1)), {"rrs": 0.73, "k_seq": 0.75, "greedy": 1.0}),
    (((0.5, 0.3, 0.2), (0.2, 0.3, 0.5)),
     {"rrs": 0.76, "k_seq": 0.791355287256, "rrs_without": 0.82, "greedy": 0.9, "top": 0.5, "importance": 0.86}),
])
def test_worked_values(laws, expected):
    target, draft = (np.array(law) for law in laws)
    assert RULES["single"].acceptance(target, draft, 1) == pytest.approx(0.7)
    for name, value in expected.items():
        assert enumerated(name, target, draft, 2)[0][1].sum() == pytest.approx(value, abs=1e-9)
    assert RULES["rrs_without"].acceptance(target, draft, 2) is None
    assert RULES["optimal"].acceptance(target, draft, 2) == pytest.approx(expected.get("importance", 0.79), abs=1e-3)


@pytest.fixture
def remembered(monkeypatch):
    """The same laws are verified very often below: what depends on them alone is computed once."""
    for name in ("check_probs", "contest", "duel", "k_seq_rho", "k_seq_growth"):
        function, answers = getattr(module, name), {}

        def once(*args, function=function, answers=answers):
            key = tuple(arg.tobytes() if isinstance(arg, np.ndarray) else arg for arg in args)
            if key not in answers:
                answers[key] = function(*args)
            return answers[key]

        monkeypatch.setattr(module, name, once)


def chance(rule, count, uniforms=None):
    """p-value of the outputs of so many calls of verify, whether drafts or not, against the enumerated law.

    uniforms(generator) -> the `uniform` of one call.
    """
    n, rng = N_DRAFTS.get(rule.name, 3), np.random.default_rng(5)
    expected, _ = enumerated(rule.name, TARGET, DRAFT, n)
    law, seen = draft_law(DRAFT, n, rule.drafting), np.zeros_like(expected)
    drafts = list(law)
    for i in rng.choice(len(drafts), size=count, p=list(law.values())).tolist():
        tokens = drafts[i]
        verdict = rule.verify(TARGET, DRAFT, tokens, rng.random if uniforms is None else uniforms(rng))
        seen[int(verdict.draft is not None), verdict.token] += 1
    possible = expected > 1e-9
    if seen[~possible].any():
        return 0.0
    return chisquare(seen[possible], count * expected[possible] / expected[possible].sum()).pvalue


@pytest.mark.parametrize("name", RULES)
def test_what_verify_draws(remembered, name):
    assert chance(RULES[name], 50_000) > CHANCE


def stale_residual(target, draft, tokens, uniform):
    """Broken twin of rrs: every draft is tried against the target itself, not against what is left of it."""
    for x in tokens:
        if uniform() * draft[x] < target[x]:
            return x
    return module._draw(module._left(target, draft, target), uniform)


def stale_draft(target, draft, tokens, uniform):
    """Broken twin of rrs_without: the draft law is never rid of the tokens drawn."""
    return module._rrs(target, draft, tokens, uniform)


def no_residual(target, draft, tokens, uniform):
    """Broken twin of single-draft verification: after a rejection the target itself is drawn from."""
    return tokens[0] if uniform() * draft[tokens[0]] < target[tokens[0]] else module._draw(target, uniform)


def uncorrected_choice(target, draft, tokens, uniform):
    """Broken twin of the optimal rule: the chosen draft is verified as if it came from the draft law."""
    weights = module.contest(target, draft, len(tokens)).weights
    return module._couple(target, draft, tokens[module._draw(weights[list(tokens)], uniform)], uniform)


def first_chosen(target, draft, tokens, uniform):
    """Broken twin of the importance rule: the first draft is verified as if it had been chosen by the weights."""
    return module._couple(target, module.duel(target, draft).law, tokens[0], uniform)


def undivided(target, draft, tokens, uniform):
    """Broken twin of k-SEQ: the target is not divided by rho."""
    for x in tokens:
        if uniform() * draft[x] < target[x]:
            return x
    kept = np.minimum(draft, target) * k_seq_growth(target, draft, len(tokens), 1.0)
    return module._draw(module._left(target, kept, target), uniform)


def swapped(name):
    decide = RULES[name].decide
    return lambda target, draft, tokens, uniform: decide(draft, target, tokens, uniform)


@dataclasses.dataclass(frozen=True)
class TopUncounted:
    """Broken twin of greedy: an output among the given drafts is not taken for accepted."""

    name, drafting = "greedy", "greedy"

    def verify(self, target_probs, draft_probs, tokens, uniform):
        verdict = RULES["greedy"].verify(target_probs, draft_probs, tokens, uniform)
        return Verdict(verdict.token, verdict.draft if verdict.token == tokens[-1] else None)


@pytest.mark.parametrize(("name", "decide"), [
    ("single", no_residual), ("rrs", stale_residual), ("rrs_without", stale_draft), ("k_seq", undivided),
    ("optimal", uncorrected_choice), ("importance", first_chosen),
    *((name, swapped(name)) for name in RULES if name != "top"),
])
def test_draw_check_fails_for_a_broken_twin(remembered, name, decide):
    assert chance(dataclasses.replace(RULES[name], decide=decide), 6000) < 1e-12 * CHANCE


def test_draw_check_fails_where_an_output_among_the_given_drafts_is_not_counted(remembered):
    assert chance(TopUncounted(), 6000) == 0


@pytest.mark.parametrize("name", ["rrs", "rrs_without", "k_seq", "top"])
def test_draw_check_fails_for_one_uniform_shared_by_all_drafts(remembered, name):
    assert chance(RULES[name], 6000, lambda rng: functools.partial(float, rng.random())) < 1e-12 * CHANCE


# Next-token laws after each token, far enough apart for drafts to be rejected and to repeat each other often.
CHAIN = np.array([[0.5, 0.1, 0.4], [0.1, 0.4, 0.5], [0.4, 0.5, 0.1]])
CHAIN_DRAFT = np.array([[0.05, 0.7, 0.25], [0.7, 0.25, 0.05], [0.25, 0.05, 0.7]])


def following(laws, last, rng):
    return min(bisect(list(itertools.accumulate(laws[last].tolist())), rng.random()), 2)


def block(last, rule, rng, n_drafts=3, length=2, kept=lambda tokens: tokens, uniforms=lambda rng, n: rng.random):
    """The tokens of one block: i.i.d. chains, verified position by position among those that share what is accepted."""
    chains = []
    for _ in range(n_drafts):
        chain = [last]
        for _ in range(length):
            chain.append(following(CHAIN_DRAFT, chain[-1], rng))
        chains.append(chain[1:])
    out = []
    for position in range(length):
        tokens = kept([chain[position] for chain in chains])
        verdict = rule.verify(CHAIN[last], CHAIN_DRAFT[last], tokens, uniforms(rng, len(tokens)))
        last = verdict.token
        out.append(last)
        if verdict.draft is None:
            return out
        chains = [chain for chain in chains if chain[position] == last]
    return [*out, following(CHAIN, last, rng)]


def block_chance(count, rule=RULES["k_seq"], **how):
    """p-value of the first two tokens after token 0, decoded in blocks of 3 chains of 2 tokens."""
    rng, seen = np.random.default_rng(7), np.zeros((3, 3))
    for _ in range(count):
        tokens = block(0, rule, rng, **how)
        if len(tokens) < 2:
            tokens = [*tokens, *block(tokens[-1], rule, rng, **how)]
        seen[tokens[0], tokens[1]] += 1
    return chisquare(seen.ravel(), count * (CHAIN[0][:, None] * CHAIN).ravel()).pvalue


@pytest.mark.parametrize("name", ["k_seq", "rrs", "importance", "optimal"])
def test_blocks_follow_the_target(remembered, name):
    """Also where an output of the residual law that equals a draft goes on with what was drafted below it."""
    assert block_chance(12_000, RULES[name], n_drafts=min(3, RULES[name].max_drafts or 3)) > CHANCE


def shared(rng, n):
    """One uniform for all n drafts, a fresh one after them."""
    values = iter([rng.random()] * n)
    return lambda: next(values, None) or rng.random()


@pytest.mark.parametrize("how", [{"kept": lambda tokens: list(dict.fromkeys(tokens))}, {"uniforms": shared}])
def test_block_check_fails_for_merged_duplicates_and_for_a_shared_uniform(remembered, how):
    assert block_chance(6000, **how) < 1e-12 * CHANCE


def test_block_check_fails_for_the_factor_of_drafts_no_longer_live(monkeypatch):
    rho, growth = (functools.cache(lambda i: k_seq_rho(CHAIN[i], CHAIN_DRAFT[i], 3)), k_seq_growth)
    which = {law.tobytes(): i for i, law in enumerate(CHAIN)}
    monkeypatch.setattr(module, "k_seq_rho", lambda target, draft, n: rho(which[target.tobytes()]))
    monkeypatch.setattr(module, "k_seq_growth", lambda target, draft, n, factor: growth(target, draft, 3, factor))
    monkeypatch.setattr(module, "check_probs", lambda target, draft: (target, draft))
    assert block_chance(10_000) < 1e-9 * CHANCE


def large(size, temperature, distance, seed=0):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=size)
    laws = np.exp(np.array([logits, logits + distance * rng.normal(size=size)]) / temperature)
    return laws / laws.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("setting", [(50, 1.0, 0.7), (500, 0.4, 1.0), (2000, 1.0, 2.0), (2000, 3.0, 0.7)])
def test_the_optimal_rule_is_near_the_optimum(setting):
    target, draft = large(*setting)
    for n in (2, 3, 8):
        law = contest(target, draft, n).law
        assert law.sum() == pytest.approx(1, abs=1e-9)
        bound = optimal(target, draft, n).acceptance
        assert bound - 1e-3 < RULES["optimal"].acceptance(target, draft, n) <= bound + 1e-9


def test_the_law_of_the_choice_by_another_quadrature():
    target, draft = large(300, 1.0, 1.0)
    weights, law = contest(target, draft, 4)
    for x in np.argsort(-draft)[[0, 3, 20, 290]]:
        def integrand(s, x=x):
            t = np.exp(s)
            return 4 * draft[x] * weights[x] * t * np.exp(-weights[x] * t) * (draft @ np.exp(-weights * t)) ** 3
        assert law[x] == pytest.approx(quad(integrand, -35, 5, epsabs=1e-13, limit=500)[0], abs=1e-10)


def test_importance_weights_lie_between_single_drafts_and_the_optimum():
    target, draft = large(300, 1.0, 0.7)
    found = duel(target, draft)
    law = np.zeros(300)
    for x, y in itertools.product(range(300), repeat=2):
        first = found.first_wins(x, y)
        law[x] += draft[x] * draft[y] * first
        law[y] += draft[x] * draft[y] * (1 - first)
    assert np.abs(law - found.law).max() < 1e-12
    accepted = RULES["importance"].acceptance(target, draft, 2)
    assert RULES["k_seq"].acceptance(target, draft, 2) < accepted < optimal(target, draft, 2).acceptance
    assert RULES["importance"].acceptance(target, draft, 1) == RULES["single"].acceptance(target, draft, 1)


def test_importance_acceptance_counts_the_draft_not_chosen(monkeypatch):
    monkeypatch.setattr(module, "LIKELY", 3)
    for target, draft in pairs(30):
        joint, _ = enumerated("importance", target, draft, 2)
        assert RULES["importance"].acceptance(target, draft, 2) == pytest.approx(joint[1].sum(), abs=1e-11)
    assert np.abs(joint.sum(axis=0) - target).max() < 1e-12


@pytest.mark.parametrize("name", ["rrs_without", "greedy"])
def test_drafts_beyond_the_drafts_support_are_taken_as_given(remembered, name):
    draft, target = np.array([0.0, 1.0, 0.0]), np.array([0.5, 0.2, 0.3])
    rng, seen = np.random.default_rng(0), np.zeros(3)
    for _ in range(10_000):
        verdict = RULES[name].verify(target, draft, [1, 0], rng.random)
        assert verdict.draft == {1: 0, 0: 1, 2: None}[verdict.token]
        seen[verdict.token] += 1
    assert chisquare(seen, 10_000 * target).pvalue > CHANCE


@pytest.mark.parametrize("name", RULES)
def test_equal_laws_and_certain_laws(name):
    rng, certain = np.random.default_rng(0), np.array([0.0, 1.0, 0.0])
    halves, other = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.0, 1.0])
    for laws in ((DRAFT, DRAFT), (certain, certain), (certain, halves), (other, certain)):
        n = N_DRAFTS.get(name, 3)
        for _ in range(20):
            tokens = draw(laws[1], n, RULES[name].drafting, rng.random)
            verdict = RULES[name].verify(*laws, tokens, rng.random)
            assert laws[0][verdict.token] > 0
            assert verdict.draft == (tokens.index(verdict.token) if verdict.token in tokens else None)
            if laws[0] is laws[1] and name != "top":
                assert verdict.draft is not None


@pytest.mark.parametrize("name", RULES)
def test_laws_down_to_the_smallest_numbers(name):
    """As at a low temperature: probabilities over the whole range of float64, most of them tiny."""
    target, draft = large(100, 0.017, 0.7)
    assert 0 < draft[draft > 0].min() < 1e-290
    rng, n = np.random.default_rng(0), N_DRAFTS.get(name, 3)
    tokens = draw(draft, n, RULES[name].drafting, rng.random)
    assert target[RULES[name].verify(target, draft, tokens, rng.random).token] > 0
    bound = optimal(target, draft, n, RULES[name].drafting).acceptance
    assert 0 <= (RULES[name].acceptance(target, draft, n) or 0) <= bound + 1e-9 <= 1 + 1e-9


GOOD = np.array([0.5, 0.5, 0.0])


@pytest.mark.parametrize(("name", "target", "draft", "tokens", "message"), [
    ("single", GOOD, GOOD, [0, 1], "tokens: 2 drafts for the rule 'single', which takes 1 to 1"),
    ("importance", GOOD, GOOD, [0, 1, 0], "tokens: 3 drafts for the rule 'importance', which takes 1 to 2"),
    ("rrs", GOOD, GOOD, [], "tokens: 0 drafts for the rule 'rrs', which takes at least 1"),
    ("rrs", GOOD, GOOD, [3], "tokens has 3; token ids must be from 0 to 2"),
    ("k_seq", GOOD, GOOD, [-1], "tokens has -1"),
    *((name, GOOD, GOOD, [2], "tokens has 2, which draft_probs") for name in RULES if name != "top"),
    ("rrs_without", np.array([0.0, 0.1, 0.9]), GOOD, [0, 0], "tokens has 0, which draft_probs"),
    ("rrs", np.array([0.5, np.inf, 0.0]), GOOD, [0], "target_probs has 1 values that are not finite"),
    ("rrs", GOOD, np.array([0.5, 0.6, -0.1]), [0], "draft_probs has the value -0.1"),
    ("rrs", GOOD, np.array([0.5, 0.5]), [0], r"target_probs has shape \(3,\), draft_probs \(2,\)"),
])
def test_bad_input_is_named(name, target, draft, tokens, message):
    with pytest.raises(ValueError, match=message):
        RULES[name].verify(target, draft, tokens, lambda: 0.5)


def test_a_number_of_drafts_that_a_rule_does_not_take_has_no_acceptance():
    with pytest.raises(ValueError, match="n: 2 drafts for the rule 'single'"):
        RULES["single"].acceptance(GOOD, GOOD, 2)
    with pytest.raises(ValueError, match="n is 0"):
        RULES["rrs"].acceptance(GOOD, GOOD, 0)
