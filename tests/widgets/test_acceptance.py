"""The panels on acceptance and draft trees without a browser: what they draw is what the formulas say."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import re
import threading
import time

import numpy as np
import pytest

from widgets.acceptance import (
    CORNERS,
    acceptance_explorer,
    enumerated_without,
    level_set,
    prefix_curve,
    simplex_values,
)
from widgets.panel import Drawing, LivePanel, Slider
from widgets.trees import best_widths, ranks_of, reached, sequoia_within, tree_explorer, tree_picture
from workbench.problems.decoding import markov, random_pair, rank_acceptance
from workbench.speculation.acceptance import optimal
from workbench.speculation.drafting import draw
from workbench.speculation.engine import Warp
from workbench.speculation.rules import RULES
from workbench.speculation.speed import CostCurve
from workbench.speculation.trees import best_tree, chain, expected_tokens, sequoia, widths

TARGET, DRAFT = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])


def shown(panel: LivePanel) -> dict:
    panel.wait(30)
    view = panel.published["view"]
    return {**view, "body": body(view)}


def body(view: dict) -> str:
    """All that the panes say, as a reader would search it."""
    return json.dumps(view["panes"], ensure_ascii=False)


def laws(n: int, size: int = 3, seed: int = 0):
    return np.random.default_rng(seed).dirichlet(np.ones(size), n)


# ------------------------------------------------------------------------------------------------ the simplex


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_the_simplex_is_coloured_by_the_optimum(n):
    target, drafts = laws(1)[0], laws(60, seed=1)
    values, binding = simplex_values(target, drafts, n)
    wanted = [optimal(target, draft, n) for draft in drafts]
    assert values == pytest.approx([w.acceptance for w in wanted], abs=1e-12)
    for mask, w in zip(binding, wanted, strict=True):
        bits = sum(1 << int(i) for i in w.order[: w.subset_size])
        assert mask == (bits if w.acceptance < 1 - 1e-12 else 0)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("lost", [0.0, 0.07, 0.3, 0.7])
def test_a_level_sets_corners_lie_on_the_level_and_its_inside_above(n, lost):
    target = laws(1, seed=3)[0]
    corners = level_set(target, n, lost)
    found = np.array([law for law, _, _ in corners])
    for law, *sets in corners:
        assert law.sum() == pytest.approx(1) and law.min() > -1e-12
        value = optimal(target, np.maximum(law, 0), n).acceptance
        assert value == pytest.approx(1 - lost, abs=1e-9) if any(sets) else value >= 1 - lost - 1e-9
        for mask in filter(None, sets):
            inside = [i for i in range(3) if mask >> i & 1]
            assert target[inside].sum() - law[inside].sum() ** n == pytest.approx(-lost, abs=1e-9)
    mixed = laws(200, len(found), seed=4) @ found
    assert (simplex_values(target, mixed, n)[0] >= 1 - lost - 1e-9).all()
    # and all of it: laws at least that good are a mixture of the corners, so no corner's cone is missing
    good = [law for law in laws(300, seed=5) if optimal(target, law, n).acceptance >= 1 - lost]
    edges = np.roll(found, -1, axis=0) - found
    for law in good:
        turns = edges[:, 0] * (law - found)[:, 1] - edges[:, 1] * (law - found)[:, 0]
        assert (turns > -1e-9).all()


def test_a_level_set_of_another_number_of_drafts_is_noticed():
    target = laws(1, seed=3)[0]
    wrong = [law for law, *sets in level_set(target, 3, 0.1) if any(sets)]
    assert any(abs(optimal(target, np.maximum(law, 0), 2).acceptance - 0.9) > 0.01 for law in wrong)


# ------------------------------------------------------------------------------------------------ recursive rejection


def test_recursive_rejection_without_replacement_is_enumerated():
    assert enumerated_without(TARGET, DRAFT, 2) == pytest.approx(0.82, abs=1e-12)
    assert enumerated_without(np.array([0.6, 0.4]), np.array([0.9, 0.1]), 2) == pytest.approx(1)
    assert enumerated_without(TARGET, TARGET, 1) == pytest.approx(1)
    assert enumerated_without(TARGET, DRAFT, 1) == pytest.approx(0.7)
    generator = np.random.default_rng(0)
    for n in (2, 3):
        target, draft = laws(2, 5, seed=n)
        wanted, rule, tries = enumerated_without(target, draft, n), RULES["rrs_without"], 4000
        hits = sum(rule.verify(target, draft, draw(draft, n, "without", generator.random), generator.random).draft
                   is not None for _ in range(tries))
        assert abs(hits / tries - wanted) < 4 * (wanted * (1 - wanted) / tries) ** 0.5
        assert RULES["single"].acceptance(target, draft, 1) <= wanted <= optimal(target, draft, n, "without").acceptance
        iid = RULES["rrs"].acceptance(target, draft, n)
        assert abs(iid - wanted) > 4 * (wanted * (1 - wanted) / tries) ** 0.5  # so another rule's would be noticed


# ------------------------------------------------------------------------------------------------ acceptance panel


def test_the_panel_shows_what_the_rules_and_bounds_say():
    panel = acceptance_explorer(vocab_size=5, n_drafts=3, sharpness=1.5, divergence=1.0)
    view = shown(panel)
    target, draft = panel.numbers["target_probs"], panel.numbers["draft_probs"]
    for name in ("rrs", "k_seq", "greedy", "top"):
        assert panel.numbers[name] == RULES[name].acceptance(target, draft, 3)
    assert panel.numbers["single"] == pytest.approx(np.minimum(target, draft).sum())
    assert panel.numbers["rrs_without"] == enumerated_without(target, draft, 3)
    for scheme in ("iid", "without"):
        assert panel.numbers[f"optimum_{scheme}"] == optimal(target, draft, 3, scheme).acceptance
    assert panel.error is None and view["error"] == "" and view["title"].startswith("3 drafts · 5 tokens")
    missing = panel.numbers["optimum_iid"] - panel.numbers["k_seq"]
    assert f"{panel.numbers['k_seq']:.4f} (−{missing:.4f})" in view["body"]
    assert "optimum, no repeats" in view["status"] and re.search(r"drawing \d", view["status"])


def test_three_tokens_are_a_simplex_whose_points_move():
    panel = acceptance_explorer()
    shown(panel)
    for name, law in (("target", TARGET), ("draft", DRAFT)):
        x, y = law @ np.array(CORNERS)
        panel.receive({"point": name, "x": x, "y": y})
    view = shown(panel)
    expected = {"single": 0.70, "rrs": 0.76, "k_seq": 0.791355, "rrs_without": 0.82, "optimum_iid": 0.86,
                "greedy": 0.90, "optimum_without": 0.985714}
    for name, value in expected.items():
        assert panel.numbers[name] == pytest.approx(value, abs=1e-6), name
    assert "{B, C} binds" in view["body"] and "draft law: A 0.200, B 0.300, C 0.500" in view["body"]
    panel.receive({"point": "draft", "x": 1e4, "y": 1e4})  # far outside: moved to the edge
    shown(panel)
    assert panel.numbers["draft_probs"].min() > 0 and panel.numbers["draft_probs"].sum() == pytest.approx(1)
    panel.receive({"point": "draft", "x": float("nan"), "y": 0.0})
    assert np.isfinite(panel.numbers["draft_probs"]).all() and panel.error is None
    panel.set(n_drafts=3)
    shown(panel)
    assert panel.numbers["target_probs"] == pytest.approx(TARGET)  # the number of drafts leaves points where they are
    panel.set(seed=4)
    shown(panel)
    assert panel.numbers["target_probs"] != pytest.approx(TARGET)


def test_larger_vocabularies_show_the_prefix_that_binds():
    panel = acceptance_explorer(vocab_size=64, n_drafts=2, divergence=1.0)
    view = shown(panel)
    target, draft = panel.numbers["target_probs"], panel.numbers["draft_probs"]
    best = optimal(target, draft, 2)
    assert f"least {best.acceptance:.4f} at the first {best.subset_size} of 64 tokens" in view["body"]
    own = best.order[: best.subset_size]
    assert f"lie in it with probability {draft[own].sum() ** 2:.4f}, but only {target[own].sum():.4f}" in view["body"]
    assert f"Without repeats the first {optimal(target, draft, 2, 'without').subset_size} bind" in view["body"]
    assert "simplex" not in view["body"] and "rrs_without" not in panel.numbers


def test_what_takes_long_comes_second(monkeypatch):
    import widgets.acceptance as module

    gate, asked = threading.Event(), threading.Event()

    def slow(target, draft, n, scheme="iid"):
        if scheme == "without":
            asked.set()
            gate.wait(20)
        return optimal(target, draft, n, scheme)

    monkeypatch.setattr(module, "optimal", slow)
    panel = acceptance_explorer(vocab_size=4096, n_drafts=3)
    assert asked.wait(20)
    first = panel.published["view"]
    assert "is on its way" in first["status"] and "k-SEQ" in body(first)
    assert "optimum, no repeats" not in body(first)
    gate.set()
    second = shown(panel)
    assert "is on its way" not in second["status"] and "optimum, no repeats" in second["body"]
    assert first["key"] != second["key"]


def test_a_problems_positions_and_the_code_that_gives_them():
    panel = acceptance_explorer(markov(16), n_drafts=2, temperature=0.8)
    panel.set(position=7)
    view = shown(panel)
    target, draft = (Warp(0.8)(logits[7:8], list)[0] for logits in markov(16).positions("small"))
    assert panel.numbers["optimum_iid"] == optimal(target, draft, 2).acceptance
    for each in (panel, acceptance_explorer(vocab_size=12, seed=3)):
        view, out = shown(each), io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(view["code"], "copied", "exec"), {})
        assert repr(each.numbers["optimum_iid"]) in out.getvalue() and repr(each.numbers["k_seq"]) in out.getvalue()


def test_temperature_zero_and_equal_laws_are_drawn():
    for settings in ({"temperature": 0.0}, {"divergence": 0.0}, {"vocab_size": 24, "temperature": 0.0}):
        panel = acceptance_explorer(**settings)
        view = shown(panel)
        assert view["error"] == "" and "nan" not in view["body"]
    assert "No set binds" in shown(acceptance_explorer(divergence=0.0))["body"]


@pytest.mark.parametrize(("settings", "words"), [
    ({"vocab_size": 2}, "vocab_size=2: expected 3 to 131072"),
    ({"n_drafts": 0}, "n_drafts=0: expected 1 to 8"),
    ({"n_drafts": 2.5}, "n_drafts=2.5: expected a whole number"),
    ({"temperature": -1.0}, "temperature=-1.0: expected 0 to 2"),
    ({"divergence": float("nan")}, "divergence=nan: expected 0 to 8"),
    ({"sharpness": 9}, "sharpness=9: expected 0 to 8"),
    ({"seed": "a"}, "seed='a': expected 0 to 99"),
])
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        acceptance_explorer(**settings)


# ------------------------------------------------------------------------------------------------ trees


def test_ranks_are_conditional_and_disjoint():
    ranks = ranks_of(0.6, 0.5)
    assert ranks[:3] == pytest.approx((0.6, 0.4 * 0.3, 0.28 * 0.15))
    assert sum(ranks_of(0.95, 1.0)) <= 1 and ranks_of(0.5, 0.0)[1:] == (0,) * 7


@pytest.mark.parametrize(("budget", "depth"), [(1, 1), (6, 2), (9, 3), (12, 4)])
def test_the_best_widths_are_the_best_of_all(budget, depth):
    ranks = ranks_of(0.55, 0.8)
    rivals = [widths(w) for d in range(1, depth + 1) for w in itertools.product(range(1, 9), repeat=d)
              if sum(np.cumprod(w)) <= budget]
    best = widths(best_widths(ranks, budget, depth))
    assert best in rivals
    assert expected_tokens(best, ranks) == pytest.approx(max(expected_tokens(r, ranks) for r in rivals), abs=1e-12)
    assert expected_tokens(best, ranks) <= expected_tokens(sequoia_within(ranks, budget, depth), ranks) + 1e-12


def test_the_chances_of_nodes_add_up_to_the_expected_tokens():
    ranks = ranks_of(0.6, 0.6)
    shape = sequoia(ranks, 20, 5)
    assert 1 + sum(reached(shape, ranks)) == pytest.approx(expected_tokens(shape, ranks))
    drawn = tree_picture(shape, ranks, "t", 600, 250).told["svg"]
    assert drawn.count("<circle") == 20 and drawn.count("<path") == 20 and "nan" not in drawn
    places = re.findall(r"cx='([\d.]+)' cy='([\d.]+)'", drawn)
    assert len(set(places)) == 20
    columns = sorted({float(x) for x, _ in places})
    assert [columns.index(float(x)) + 1 for x, _ in places] == list(shape.depths)
    for level in range(1, shape.depth + 1):  # siblings and cousins from top to bottom, so that no edges cross
        ys = [float(y) for (_, y), d in zip(places, shape.depths, strict=True) if d == level]
        assert ys == sorted(ys)
    assert tree_picture(chain(0), ranks, "t", 600, 250).told["svg"].count("<circle") == 0


def test_the_tree_panel_shows_the_programmes_tree_and_the_fastest():
    panel = tree_explorer(first=0.7, decay=0.5, n_nodes=12, max_depth=5, draft_cost=0.05, token_cost=0.03)
    view = shown(panel)
    ranks = ranks_of(0.7, 0.5)
    shape = sequoia(ranks, 12, 5)
    assert panel.numbers["trees"]["Sequoia"] == shape and panel.numbers["trees"]["chain"] == chain(5)
    assert panel.numbers["expected"]["Sequoia"] == expected_tokens(shape, ranks)
    assert panel.numbers["speed"]["Sequoia"] == pytest.approx(expected_tokens(shape, ranks) / (1 + 0.36 + 5 * 0.05))
    best, speed = best_tree(ranks, lambda n: 1 + 0.03 * (n - 1), 0.05, 64, 16)
    assert panel.numbers["best"] == (best, pytest.approx(speed))
    assert f"{best.n_nodes} nodes on {best.depth} levels" in view["body"] and "★" in view["body"]
    assert view["title"].startswith(f"12 nodes · {shape.depth} levels · {expected_tokens(shape, ranks):.2f} tokens")
    panel.set(draft_cost=0.5, token_cost=1.0)
    assert "no tree pays" in shown(panel)["body"]
    panel.set(n_nodes=64, max_depth=1)  # eight ranks fill one level
    assert "8 nodes · 1 level ·" in shown(panel)["title"]


def test_a_measured_curve_and_a_problem_take_the_sliders_places():
    curve = CostCurve((1, 33, 65), (0.010, 0.012, 0.020), (0.0, 0.0, 0.0))
    problem = random_pair(32)
    panel = tree_explorer(problem, temperature=0.8, target_seconds=curve, draft_seconds=0.001, n_nodes=8)
    view = shown(panel)
    assert list(panel.sliders) == ["temperature", "n_nodes", "max_depth"]
    assert panel.numbers["ranks"] == rank_acceptance(problem, "best", Warp(0.8), 8)
    spent = curve(9) + 0.001 * len(panel.numbers["trees"]["Sequoia"].draft_widths)
    assert panel.numbers["speed"]["Sequoia"] == pytest.approx(panel.numbers["expected"]["Sequoia"] / spent)
    assert "tokens/s" in view["body"] and "measured in" in view["status"] and problem.name in view["title"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(view["code"], {})
    assert str(panel.numbers["trees"]["Sequoia"].parents) in out.getvalue()


def test_a_measured_curves_spread_is_shown_and_a_gain_within_it_is_not_claimed():
    def said(spread):
        curve = CostCurve((1, 65), (0.010, 0.012), (spread, spread))
        return shown(tree_explorer(first=0.6, target_seconds=curve, draft_seconds=0.004))["body"]

    assert "does not tell whether it pays" in said(0.002) and " to " in said(0.002)
    for sure in (0.0, 0.0001):
        assert "does not tell" not in said(sure) and "the fastest tree for these costs" in said(sure)
    assert re.search(r'"\d+ \([\d.]+ to [\d.]+\)"', said(0.0001))
    assert not re.search(r'"\d+ \(', said(0.0))


def test_what_drawing_a_tree_raises_wait_raises():
    curve, is_broken = CostCurve((1, 65), (0.010, 0.012), (0.0, 0.0)), threading.Event()

    def seconds(n):
        if is_broken.is_set():
            raise RuntimeError("no clock")
        return curve(n)

    panel = tree_explorer(target_seconds=seconds, draft_seconds=0.004)
    panel.wait(30)
    is_broken.set()
    panel.set(n_nodes=5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no clock"):
            panel.wait(30)
    assert panel.published["view"]["error"] == "RuntimeError: no clock"


@pytest.mark.parametrize(("settings", "words"), [
    ({"n_nodes": 65}, "n_nodes=65: expected 1 to 64"),
    ({"first": 1.5}, "first=1.5: expected 0.05 to 0.95"),
    ({"draft_seconds": 0.0}, "draft_seconds=0.0: expected positive"),
    ({"target_seconds": CostCurve((1, 8), (1.0, 2.0), (0.0, 0.0))}, "n=65 tokens: measured from 1 to 8"),
])
def test_bad_tree_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        tree_explorer(**settings)


# ------------------------------------------------------------------------------------------------ the controller


def slow_panel(gate, seen):
    def paint(values, is_late):
        seen.append(values["x"])
        gate.wait(20)
        for part in (1, 2):
            yield Drawing(f"x {values['x']}, part {part}", [], "", f"{values['x']}-{part}", "")

    return LivePanel("slow", [Slider("x", "x", tuple(range(10)), 0, "")], paint)


def test_the_newest_values_win():
    gate, seen = threading.Event(), []
    panel = slow_panel(gate, seen)
    while not seen:
        time.sleep(0.001)
    for x in (1, 2, 3, 4):
        panel.receive({"knob": "x", "index": x})
    gate.set()
    view = shown(panel)
    assert view["title"] == "x 4, part 2" and view["values"] == {"x": 4}
    assert seen == [0, 4]  # those between were never begun


def test_every_subscriber_hears_of_every_picture_in_order():
    gate, seen, heard = threading.Event(), [], []
    panel = slow_panel(gate, seen)
    panel.subscribe(lambda name, value: heard.append(value.get("title")))
    gate.set()
    shown(panel)
    assert heard == [None, "slow", "x 0, part 1", "x 0, part 2"]


def test_an_error_is_shown_kept_and_survived():
    def paint(values, is_late):
        if values["x"] == 3:
            raise RuntimeError("no such <law>")
        yield Drawing(f"x {values['x']}", [], "", str(values["x"]), "")

    panel = LivePanel("t", [Slider("x", "x", (1, 2, 3), 1, "")], paint)
    assert shown(panel)["title"] == "x 1"
    panel.set(x=3)
    with pytest.raises(RuntimeError, match="no such <law>"):
        panel.wait(30)
    view = panel.published["view"]
    assert view["error"] == "RuntimeError: no such <law>" and view["title"] == "x 1" and panel.error is not None
    panel.set(x=2)
    assert shown(panel)["error"] == "" and panel.error is None
    with pytest.raises(ValueError, match="y: no slider of this panel; it has x"):
        panel.set(y=1)
    with pytest.raises(ValueError, match="x=9: expected 1 to 3"):
        panel.set(x=9)
    assert panel.values == {"x": 2}
    sliders = [Slider("x", "x", (1, 2, 3), 1, ""), Slider("y", "y", (1, 2), 1, "")]
    two = LivePanel("two", sliders, lambda values, is_late: iter(()))
    with pytest.raises(ValueError, match="y=7: expected 1 to 2"):
        two.set(x=3, y=7)  # the good value goes with the bad one
    assert two.values == {"x": 1, "y": 1} and two.sliders["x"].start == 1


def test_headless_draws_at_once_and_raises(monkeypatch):
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    panel = acceptance_explorer(vocab_size=4096, n_drafts=3)
    assert panel.numbers["optimum_without"] > panel.numbers["optimum_iid"]
    text = panel._repr_mimebundle_()
    assert "3 drafts · 4,096 tokens" in text["text/plain"]

    def fails(values, is_late):
        raise RuntimeError("no")
        yield

    with pytest.raises(RuntimeError, match="no"):
        LivePanel("t", [Slider("x", "x", (1, 2), 1, "")], fails)


def test_a_value_between_the_sliders_places_gets_a_place():
    panel = acceptance_explorer(divergence=0.73, vocab_size=100)
    assert shown(panel)["values"]["divergence"] == 0.73 and 0.73 in panel.sliders["divergence"].values
    spec = {s["name"]: s for s in panel.published["spec"]["sliders"]}
    assert spec["vocab_size"]["texts"][-1] == "131,072" and len(spec["vocab_size"]["texts"]) == len(
        spec["vocab_size"]["values"])
    panel.set(divergence=1.27)
    spec = {s["name"]: s for s in panel.published["spec"]["sliders"]}
    assert 1.27 in spec["divergence"]["values"] and shown(panel)["values"]["divergence"] == 1.27


@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_curve_of_prefixes_is_drawn_whole(n):
    """No edge of the axes is set, so the plot holds all of it, whatever the laws; curves bulge above 1."""
    source = np.random.default_rng(n)
    for size in (3, 40, 400):
        target, draft = source.dirichlet([0.5] * size, 2)
        told = prefix_curve(target, draft, n, {"iid": optimal(target, draft, n, "iid"), "without": None}).told
        assert not {"low", "high"} & set(told)
        drawn = next(entry for entry in told["lines"] if entry["bare"])
        assert min(drawn["y"]) == pytest.approx(told["marks"][0]["y"], abs=1e-9) and np.isfinite(drawn["y"]).all()


@pytest.mark.parametrize("make", [acceptance_explorer, lambda: acceptance_explorer(vocab_size=64), tree_explorer])
def test_a_cells_output_holds_a_still_for_hosts_without_the_front_end(make, monkeypatch):
    live, _ = make()._repr_mimebundle_()
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    for shown in (live, make()._repr_mimebundle_()):
        assert base64.b64decode(shown["image/png"]).startswith(b"\x89PNG") and " at 0x" not in shown["text/plain"]
        assert re.search(r"optimum, i.i.d. drafts: [01]\.\d{4}|chain \| 6 \| 6 \| \d\.\d{3}", shown["text/plain"])


@pytest.mark.parametrize(("make", "good"), [(acceptance_explorer, "n_drafts"), (tree_explorer, "n_nodes")])
def test_a_refused_set_leaves_all_as_it_was(make, good):
    panel = make()
    panel.wait(30)
    before, spec = dict(panel.values), panel.published["spec"]
    with pytest.raises(ValueError, match="nothing: no slider"):
        panel.set(**{good: 3, "nothing": 1})
    assert panel.values == before and panel.published["spec"] == spec
    panel.wait(30)
    assert panel.published["view"]["values"] == before
