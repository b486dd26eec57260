"""The drafts explorer's controller, without a browser: what a front end would be told, and what a notebook gets."""

from __future__ import annotations

import importlib
import json
import math
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import workbench
from widgets import explorer
from widgets.explorer import Explorer
from widgets.views.decoding import FAMILY, SCORED, Place, quick_bars, slow_bars
from workbench import Store
from workbench.problems.decoding import Decoding, markov
from workbench.speculation.rules import RULES, Rule


def problem(seconds: float = 0.0, asked: list[str] | None = None, breaks_above: float = math.inf) -> Decoding:
    """A Markov chain of 6 tokens whose passes take `seconds`, are noted in `asked`, and break after so many."""
    log = [] if asked is None else asked

    def wrap(name: str, network: Callable[..., Any]) -> Callable[..., Any]:
        def slow(tokens: torch.Tensor, ask: Any) -> list[torch.Tensor]:
            log.append(name)
            time.sleep(seconds)
            out = network(tokens, ask)
            return [part * math.nan for part in out] if len(log) > breaks_above else out

        return slow

    return markov(6).wrapped(wrap)


def frame(e: Explorer) -> dict[str, Any]:
    return parsed(e.frame)


def parsed(content: bytes) -> dict[str, Any]:
    head = json.loads(content[4 : 4 + struct.unpack("<I", content[:4])[0]])
    return {**head["panes"][0], **head, "of": head["panes"][0]["of"]}


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def headless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")


@pytest.mark.parametrize("method", FAMILY)
def test_the_blocks_shown_are_those_of_a_bare_run(method: str, headless: None) -> None:
    e = explorer(problem(), (method,), n_tokens=30)
    bare = workbench.run(method, e.problem, 0, 1, **e.run.knobs)
    assert (bare.answer == e.run.answer).all() and bare.cost == e.run.cost
    tokens, passes = bare.answer[0, :, 0].tolist(), bare.answer[0, :, 1].tolist()
    assert [text for b in e.family.blocks for text in b["texts"]] == [str(token) for token in tokens]
    assert [k for k, b in enumerate(e.family.blocks) for _ in b["texts"]] == passes
    shown = frame(e)
    assert shown["is_done"] and shown["key"] == e.run.inputs.key and shown["n_tokens"] == 30 and shown["prompt"] == "0"
    assert shown["title"] == e.view["shown"]["title"] and "30 tokens" in shown["title"] and method in shown["title"]
    assert sum(b["n_passes"] for b in e.family.blocks) == bare.cost.calls["small"]
    assert sum(len(b["nodes"]) for b in e.family.blocks) <= bare.cost.evaluations["target"]


@pytest.mark.parametrize("method", ["spectr", "spec_infer", "sequoia", "eagle2", "speculative"])
def test_a_tree_holds_its_path_and_both_models_probabilities(method: str, headless: None) -> None:
    e = explorer(problem(), (method,), n_tokens=40)
    chain = markov(6)
    laws = {}
    for name, model in (("draft", chain.drafts[-1]), ("target", chain.target)):
        ask = type("Ask", (), {"tokens": [list(range(6))], "asked": [list(range(6))]})
        laws[name] = torch.softmax(model.network(torch.arange(6), ask)[0], 1).numpy()
    context, rejected = 0, 0
    for b in e.family.blocks:
        path, parents, nodes = b["path"], b["parents"], [int(text) for text in b["nodes"]]
        assert [parents[node] for node in path] == [-1, *path][: len(path)]
        assert [b["nodes"][node] for node in path][: b["n_accepted"]] == b["texts"][: b["n_accepted"]]
        for node, parent in enumerate(parents):
            above = context if parent < 0 else nodes[parent]
            assert b["draft"][node] == pytest.approx(laws["draft"][above, nodes[node]], abs=1e-4)
            is_offered = parent < 0 or parent in path
            assert (b["target"][node] is not None) == is_offered
            if is_offered:
                assert b["target"][node] == pytest.approx(laws["target"][above, nodes[node]], abs=1e-4)
        rejected += len(nodes) - len(path)
        context = int(b["texts"][-1])
    assert rejected > 0 and any(b["path"] for b in e.family.blocks)


def test_bars_are_the_rules_acceptance_at_the_context_and_none_beats_its_optimum(headless: None) -> None:
    e = explorer(problem(), ("spectr",), n_tokens=20, n_drafts=3)
    assert "optimum iid" in e.family.bars["blocks"][0] and not e.family.bars["mean"]  # means when idle
    e.wait(idle=True)
    chain, context, drafted = markov(6), 0, []
    ask = type("Ask", (), {"tokens": [list(range(6))], "asked": [list(range(6))]})
    target, draft = (torch.softmax(m.network(torch.arange(6), ask)[0], 1).numpy()
                     for m in (chain.target, chain.drafts[-1]))
    for b, bars in zip(e.family.blocks, e.family.bars["blocks"], strict=True):
        if b["nodes"]:
            drafted.append(bars)
            for name in ("rrs", "k_seq", "greedy", "top", "optimal"):
                assert bars[name][0] == pytest.approx(RULES[name].acceptance(target[context], draft[context], 3))
            assert max(bars[name][0] for name in ("rrs", "k_seq", "optimal")) <= bars["optimum iid"][0] + 1e-9
            assert bars["optimum iid"][0] <= bars["optimum without"][0] + 1e-9
            assert "single" not in bars and "importance" not in bars  # they take fewer drafts
        else:
            assert bars == {}
        context = int(b["texts"][-1])
    for name in drafted[0]:
        assert e.family.bars["mean"][name] == pytest.approx(np.mean([bars[name][0] for bars in drafted]))
    assert e.family.bars["n_graded"] == e.family.bars["n"] == len(drafted) and e.family.bars["rule"] == "k_seq"


IN_USE = [("spectr", {}), ("speculative", {}), ("sequoia", {}), ("eagle2", {"temperature": 0.7}),
          ("spec_infer", {"rule": "greedy"})]


@pytest.mark.parametrize(("method", "knobs"), IN_USE)
def test_the_rule_in_use_accepts_as_often_as_its_bar_says(method: str, knobs: dict[str, Any], headless: None) -> None:
    """Drafts accepted at the blocks' contexts, against the mean of the bar: what was seen, and what was computed."""
    e = explorer(markov(6, 1.5), (method,), n_tokens=200, **knobs)
    places, rule = [place for place in e.family._current[2].places if place is not None], e.family.bars["rule"]
    bars = [(quick_bars(p) | (slow_bars(p, rule) if RULES[rule].accepted is None else {}))[rule] for p in places]
    share, spread = np.mean([a for a, _ in bars]), math.sqrt(sum(a * (1 - a) + s**2 for a, s in bars)) / len(bars)
    assert e.family.bars["n"] == len(places) and abs(e.family.bars["hits"] / e.family.bars["n"] - share) < 4 * spread


@pytest.mark.parametrize(("method", "knobs"), IN_USE)
def test_the_rule_said_to_be_in_use_is_the_one_that_verifies(method: str, knobs: dict[str, Any], headless: None,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    used, verify = set(), Rule.verify
    monkeypatch.setattr(Rule, "verify", lambda self, *args: (used.add(self.name), verify(self, *args))[1])
    e = explorer(problem(), (method,), n_tokens=6, **knobs)
    assert used == {e.family.bars["rule"]}


def test_all_bars_are_computed_at_temperature_0_and_for_one_and_two_drafts() -> None:
    one_hot = np.eye(5)
    for place in (Place(one_hot[1], one_hot[1], 3, True), Place(one_hot[1], one_hot[2], 2, False)):
        bars = quick_bars(place) | slow_bars(place, "rrs_without")
        expected = float(place.target_probs @ place.draft_probs)
        assert {name: round(value, 3) for name, (value, _) in bars.items()} == dict.fromkeys(bars, expected)
    law, other = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    assert set(quick_bars(Place(law, other, 1, True))) >= {"single", "optimal", "importance"}
    both = set(quick_bars(Place(law, other, 2, True)) | slow_bars(Place(law, other, 2, True), None))
    assert both >= {"importance", "optimal", "optimum without"} and "single" not in both


def test_another_block_is_selected_and_keeps_its_number_in_the_next_run() -> None:
    e = explorer(problem(), ("speculative",), n_tokens=40)
    e.wait()
    e.receive({"id": "c-1", "kind": "select", "item": 5})
    assert e.view["ack"] == "c-1" and "single" in e.family.bars["blocks"][5]
    e.set(seed=1)
    e.wait()
    assert e.family.bars["key"] == e.run.inputs.key and "single" in e.family.bars["blocks"][5]
    for wrong in (-1, 40):
        with pytest.raises(ValueError, match=f"block={wrong}: expected 0 to {len(e.family.blocks) - 1}"):
            e.family.select(wrong)
    e.set(n_tokens=2)  # fewer blocks than the number selected
    e.wait()
    assert frame(e)["n_tokens"] == 2
    e.family.select(0)


def test_the_text_appears_block_by_block() -> None:
    seen = []
    e = explorer(problem(0.01), ("speculative",), n_tokens=20)
    e.subscribe(lambda name, value: seen.append(parsed(value)) if name == "frame" and value else None)
    e.wait()
    until(lambda: frame(e)["is_done"])
    lengths = [len(f["blocks"]) for f in seen if f["key"] == e.run.inputs.key]
    assert lengths == sorted(lengths) and len(set(lengths)) >= 4
    assert all(f["blocks"] == frame(e)["blocks"][: len(f["blocks"])] for f in seen)


def test_the_latest_wish_wins_and_an_overtaken_run_ends_within_a_pass() -> None:
    asked: list[str] = []
    e = explorer(problem(0.05, asked), ("autoregressive",), n_tokens=10)
    until(lambda: len(asked) >= 2)
    e.set(temperature=0.5)
    e.set(temperature=0.7, seed=3)
    before = len(asked)
    e.wait()
    assert len(asked) - before <= 10 + 1
    assert e.run.inputs.seed == 3 and all(r.inputs.seed == 3 for r in e.runs)


def test_a_steady_drag_still_shows_text() -> None:
    e = explorer(problem(0.01), ("speculative",), n_tokens=40)
    e.wait()
    shown = set()
    e.subscribe(lambda name, value: shown.add(parsed(value)["key"]) if name == "frame" and value else None)
    for seed in range(1, 16):
        e.set(seed=seed)
        time.sleep(0.1)
    assert len(shown) >= 5
    e.wait()
    assert e.run.inputs.seed == 15


def test_remembered_settings_are_shown_before_set_returns_and_ask_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Explorer, "quiet", 60)  # no idle work
    asked: list[str] = []
    e = explorer(problem(0, asked), ("spectr",), n_tokens=20)
    e.wait()
    first, text = e.run.inputs.key, e.family.blocks
    e.set(n_drafts=2)
    e.wait()
    before = len(asked)
    e.set(n_drafts=4)
    assert frame(e)["key"] == first == e.family.bars["key"] and frame(e)["is_done"] and e.family.blocks == text
    e.wait()
    assert len(asked) == before


def test_idle_work_grades_times_and_compares_and_leaves_the_shown_run_alone() -> None:
    e = explorer(problem(), ("spectr",), n_tokens=20)
    e.wait()
    shown, text = e.run.inputs, e.family.blocks
    e.wait(idle=True)
    assert e.run.inputs == shown and e.family.blocks == text and e.inputs == shown
    card, reference = e.view["shown"], e.view["reference"]
    assert card["quality"]["block_efficiency"][2] == SCORED and card["n"] == 1
    (graded,) = [r for r in e.runs if r.inputs == replace(shown, n_samples=SCORED)]
    assert card["quality"]["block_efficiency"][0] == graded.quality["block_efficiency"].value
    assert (graded.answer[0] == e.run.answer[0]).all()  # the text shown is the first of those graded
    assert card["timing"]["ms"] > 0 and card["timing"]["repeats"] == 3 and reference["timing"]["ms"] > 0
    assert reference["method"] == "autoregressive" and reference["quality"]["block_efficiency"][0] == 1
    spent = {card["key"]: sum(card["costs"][1]["parts"]) for card in (card, reference)}
    assert spent[reference["key"]] == pytest.approx(e.problem.flops["target"])
    positions = dict(zip(e.problem.flops, card["costs"][0]["parts"], strict=True))
    assert spent[card["key"]] == pytest.approx(sum(e.problem.flops[name] * n for name, n in positions.items()))
    factor, speed = (next(line for line in card["lines"] if line["id"] == name) for name in ("factor", "speed"))
    assert factor["value"] == f"× {spent[card['key']] / spent[reference['key']]:.3g}" and "±" in speed["value"]
    points = {p["method"]: p for p in e.frontier["metrics"]["block_efficiency"] if p["role"] != "baseline"}
    assert points["autoregressive"]["role"] == "reference" and points["autoregressive"]["value"] == 1
    assert points["spectr"]["n"] == SCORED and points["spectr"]["stderr"] > 0
    assert {"flops", "evaluations"} <= set(points["spectr"])
    assert points["spectr"]["keys"][0] == shown.key
    e.set(n_drafts=1)
    e.receive({"id": "1", "kind": "recall", "key": points["spectr"]["keys"][0]})
    assert e.inputs == shown


def test_more_texts_are_graded_on_demand() -> None:
    e = explorer(problem(), ("speculative",), n_tokens=10)
    e.wait(idle=True)
    e.receive({"id": "1", "kind": "score", "n": 40})
    e.wait(idle=True)
    until(lambda: not e.view["score"])
    assert e.view["shown"]["quality"]["surprise"][2] == 40 and e.run.inputs.n_samples == 1
    e.score(1999)
    e.stop_score()
    e.wait(idle=True)
    assert max(r.inputs.n_samples for r in e.runs) < 1999


def test_an_error_is_raised_by_wait_and_shown_and_the_next_wish_recovers() -> None:
    e = explorer(problem(), n_tokens=10)
    e.wait()
    e.set(method="spec_infer", widths=(3, 1), rule="importance")
    with pytest.raises(ValueError, match="rule='importance' takes at most 2 drafts"):
        e.wait()
    until(lambda: "at most 2 drafts" in e.view["error"])
    assert e.view["is_stale"] and "spectr" in e.view["shown"]["title"]
    e.set(widths=(2, 1))
    e.wait()
    until(lambda: e.view["error"] == "")
    assert e.run.knobs["widths"] == (2.0, 1.0)


def test_a_model_that_breaks_is_named_and_leaves_nothing_behind() -> None:
    e = explorer(problem(breaks_above=8), ("speculative",), n_tokens=30)
    with pytest.raises(ValueError, match=r"logits of (small|target) hold NaN"):
        e.wait()
    until(lambda: "NaN" in e.view["error"])
    assert e.run is None and e.runs == [] and e.view["shown"] is None


def test_what_a_knob_does_not_allow_is_refused_and_changes_nothing() -> None:
    e = explorer(problem(), n_tokens=10)
    before = e.inputs
    for wrong, error in (({"n_drafts": 0}, ValueError), ({"rule": "top"}, ValueError),
                         ({"temperature": "hot"}, TypeError)):
        with pytest.raises(error, match=next(iter(wrong))):
            e.set(**wrong)
        e.receive({"id": "x", "kind": "set", "knobs": wrong})
        assert next(iter(wrong)) in e.view["notice"] and e.view["ack"] == "x"
    with pytest.raises(TypeError, match="n_drafts"):
        e.set(ndrafts=3)
    assert e.inputs == before
    e.set(method="spec_infer")
    e.receive({"id": "y", "kind": "set", "knobs": {"widths": "3, x"}})
    assert "widths='3, x': expected a tuple of numbers" in e.view["notice"]
    with pytest.raises(ValueError, match="'ddim' is of the family denoising"):
        explorer(problem(), ("ddim",))
    with pytest.raises(ValueError, match="n_samples=0"):
        explorer(problem(), n_samples=0)


def test_methods_share_what_both_allow() -> None:
    e = explorer(problem(), n_tokens=10, temperature=0.5)
    e.set(method="spec_infer", rule="rrs_without")
    assert e.inputs.knobs["temperature"] == 0.5
    e.set(method="spectr")  # which has no such rule
    assert e.inputs.knobs["rule"] == "k_seq"
    e.set(method="spec_infer")
    assert e.inputs.knobs["rule"] == "k_seq"  # which both have
    e.set(method="speculative", threshold=0.9, policy="confidence")
    e.set(policy="constant")
    assert e.inputs.knobs["threshold"] == 0.4  # without effect now: back to its default
    e.undo()
    assert e.inputs.knobs["threshold"] == 0.9
    e.wait()


def test_code_and_link_make_the_run_shown() -> None:
    e = explorer(markov(6), n_tokens=12)
    e.set(n_drafts=2, seed=4)
    e.wait()
    scope: dict[str, Any] = {}
    exec(e.code(), scope)
    assert scope["run"].inputs == e.run.inputs and (scope["run"].answer == e.run.answer).all()
    other = explorer(markov(6))
    other.load(e.link)
    other.wait()
    assert other.run == e.run
    with pytest.raises(ValueError, match="of the problem"):
        explorer(markov(7)).load(e.link)


def test_a_pinned_text_stays_beside_those_that_follow() -> None:
    e = explorer(problem(), n_tokens=12)
    e.wait()
    text = e.family.blocks
    e.pin()
    e.set(seed=9)
    e.wait()
    assert parsed(e.published["pinned"])["blocks"] == text and e.family.blocks != text
    assert "seed 0" in e.view["pinned"]["title"] and "seed 9" in e.view["shown"]["title"]
    e.unpin()
    assert e.view["pinned"] is None and e.published["pinned"] == b""


def test_runs_are_kept_in_a_store_and_those_to_compare_with_come_from_it(tmp_path: object, headless: None) -> None:
    e = explorer(problem(), ("spectr",), n_tokens=10, store=Store(tmp_path))
    e.wait(idle=True)
    asked: list[str] = []
    other = explorer(problem(0, asked), ("spectr",), n_tokens=10, store=Store(tmp_path))
    assert other.family.blocks == e.family.blocks  # trees are in no store: the text shown is written anew
    before = len(asked)
    for inputs in {r.inputs.key: r.inputs for r in e.runs}.values():
        assert other._known(inputs) is not None
    assert len(asked) == before


def test_headless_runs_at_once_raises_in_the_cell_and_shows_a_line(headless: None) -> None:
    e = explorer(problem(), n_tokens=10)
    assert isinstance(e, Explorer) and e.run.inputs.n_samples == 1 and e.family.blocks
    assert set(e._repr_mimebundle_()) == {"text/plain"}
    with pytest.raises(ValueError, match="at most 2 drafts"):
        e.set(method="spec_infer", rule="importance")
    e.set(rule="rrs")
    e.wait(idle=True)
    assert e.run.inputs.method == "spec_infer" and e.family.bars["mean"] and e.view["reference"]


def test_everything_published_is_json_and_the_widget_takes_wishes() -> None:
    e = explorer(problem(), n_tokens=10, n_samples=3)
    assert "application/vnd.jupyter.widget-view+json" in e._repr_mimebundle_()[0] and e.widget is e.widget
    e.wait(idle=True)
    for name in ("spec", "view", "frontier", "reply", "detail"):
        json.dumps(e.published[name], allow_nan=False)
    json.dumps(frame(e), allow_nan=False)
    assert len(e.csv().splitlines()) == 1 + len(e.runs)
    e.widget._handle_custom_msg({"id": "a-1", "kind": "set", "state": {"seed": 2}, "knobs": {}}, [])
    e.wait()
    until(lambda: e.widget.view["shown"]["key"] == parsed(e.widget.frame)["key"] == e.widget.detail["key"])
    assert "seed 2 · 3 texts" in e.widget.view["shown"]["title"] and e.widget.view["ack"] == "a-1"


def test_the_widgets_module_is_the_helpers_and_one_panel() -> None:
    module = str(explorer(problem(), n_tokens=2).widget._esm)
    for once in ("export default", "function render(", "function marker(", "const SVG ="):
        assert module.count(once) == 1, once
    assert "import " not in module.replace("imports nothing", "") and "http://www.w3.org" in module


def test_a_store_that_cannot_be_written_keeps_the_text_and_old_runs_go(
        monkeypatch: pytest.MonkeyPatch, tmp_path: object, headless: None) -> None:
    def full(self: Store, run: object) -> None:
        raise OSError(28, "no space left", "runs")

    monkeypatch.setattr(Store, "put", full)
    monkeypatch.setattr(importlib.import_module("widgets.explorer"), "MAX_RUNS", 5)
    e = explorer(problem(), ("speculative",), n_tokens=8, store=Store(tmp_path))
    for seed in range(12):
        e.set(seed=seed)
        assert e.run.inputs.seed == seed and e.family.blocks
    assert "not kept in the store" in e.view["notice"] and len(e.runs) <= 6
