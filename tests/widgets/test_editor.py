"""The schedule editor's controller, without a browser: plans, their answers and errors, and what a front end gets."""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from explorer_toy import Toy

import workbench
from widgets.editor import ARMS, errors_on_seeds, schedule_editor
from widgets.steps import options
from workbench.methods.denoising.usf import run_plan
from workbench.plan import PRESETS, Decision, Expansion, Plan, preset_plan
from workbench.problems.denoising import SPACINGS, ContinuousVP, grid, noisiest
from workbench.problems.mixtures import two_dim, two_modes
from workbench.quality import drift
from workbench.rng import Rng
from workbench.search.solver import exact_flow
from workbench.search.truth import Flow


@pytest.fixture
def headless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow in fewer steps than the editor takes: most tests ask what is done with it."""
    monkeypatch.setattr(Flow, "SUBSTEPS", 2)


def header(frame: bytes) -> dict:
    return json.loads(frame[4 : 4 + struct.unpack("<I", frame[:4])[0]])


def answer_of(problem: object, plan: Plan, seed: int = 0, n: int = 8) -> torch.Tensor:
    *_, last = run_plan(problem, Rng(seed, n), plan)
    return last.state


def wished(e: object, kind: str, **given: object) -> str:
    """Send one wish as the front end does; the notice that it leaves."""
    e.receive({"id": kind, "kind": kind, **given})
    return e.view["notice"]


def test_it_opens_on_the_preset_and_shows_what_a_bare_run_of_the_plan_answers(headless: None) -> None:
    problem = two_modes()
    e = schedule_editor(problem, n_steps=6, preset="unipc_bh2", n_samples=8, seed=3)
    assert e.plan == preset_plan("unipc_bh2", grid(problem.schedule, 6, "log_snr"))
    found = e.answers["yours"]
    assert (found.state == answer_of(problem, e.plan, seed=3)).all() and found.evaluations == 6
    assert header(e.published["yours"])["panes"][0]["values"]["shape"] == [8, 1]
    assert e.answers["preset"].error == found.error and "best" not in e.view["arms"]


def test_the_metered_evaluations_are_those_of_the_plan_although_work_is_shared(headless: None) -> None:
    e = schedule_editor(two_modes(), n_steps=6, n_samples=8)
    e.decide(2, corrector="implicit")
    assert e.answers["yours"].evaluations == e.plan.evaluations == 7
    assert e.answers["preset"].evaluations == 7 and len(e.answers["preset"].plan.times) == 7  # equal evaluations
    guided = schedule_editor(Toy().problem, n_steps=4)
    assert guided.guidance == 1 and guided.answers["yours"].evaluations == 4


def test_the_flow_is_exact_to_one_part_in_a_hundred_million(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flow, "SUBSTEPS", 10)
    problem = two_modes()
    flow = Flow(problem, problem.start(Rng(0, 3)))
    flow.solve(lambda: False)
    first = noisiest(problem.schedule)
    for level in (-2.03, 1.118):
        there = problem.schedule.at(problem.schedule.t_at(level))
        finer = exact_flow(problem, first, there, problem.start(Rng(0, 3)), 1500)
        assert float((flow.at(there) - finer).abs().max()) < 1e-7
        assert float((flow.at(there) - finer).square().mean().sqrt()) < 1e-8
        broken = exact_flow(problem, first, there, problem.start(Rng(0, 3)), 30)
        assert float((broken - finer).abs().max()) > 1e-7  # so the bound says something


def test_the_error_is_the_distance_from_the_flow_and_falls_with_more_steps(headless: None) -> None:
    problem = two_modes()
    e = schedule_editor(problem, n_steps=8, n_samples=8)
    start, end = problem.start(Rng(0, 8)), problem.schedule.at(problem.schedule.t_at(10.0))
    truth = exact_flow(problem, noisiest(problem.schedule), end, start, 400)
    by_hand = drift(e.answers["yours"].state, truth)
    assert e.answers["yours"].error.value == pytest.approx(by_hand.value, rel=2e-3)
    levels = [x for x, _ in e.answers["yours"].curve]
    assert levels == [p.log_snr for p in e.plan.grid(problem.schedule)[1:]]
    errors = {}
    for n in (5, 10, 20):
        e.use(n_steps=n)
        errors[n] = e.answers["yours"].error.value
    assert errors[5] > 2 * errors[10] > 4 * errors[20]


def test_pictures_are_compared_with_the_reference_run_of_the_same_noise(headless: None) -> None:
    problem = Toy().problem
    e = schedule_editor(problem, n_steps=4, seed=2)
    reference = workbench.run("ddim", problem, 2, 16, n_steps=30)
    own = problem.images(e.answers["yours"].state) / 255
    far = drift(own, problem.images(reference.answer) / 255)
    assert e.answers["yours"].error.value == pytest.approx(far.value, rel=1e-6) and far.value > 0.01
    assert len(e.answers["yours"].curve) == 4 and "reference (ddim, 30 steps)" in e.published["spec"]["truth"]


def test_a_moved_mark_moves_its_level_alone_and_says_what_is_allowed(headless: None) -> None:
    problem = two_modes()
    e = schedule_editor(problem, n_steps=5, n_samples=8)
    before = e.view["marks"]["levels"]
    e.move(2, 0.25)
    after = e.view["marks"]["levels"]
    assert after[2] == pytest.approx(0.25) and after[:2] + after[3:] == before[:2] + before[3:]
    assert (e.answers["yours"].state == answer_of(problem, e.plan)).all()
    assert e.answers["yours"].error != e.answers["preset"].error
    for wrong in (before[3], before[1], 99.0, float("nan"), "here"):
        with pytest.raises(ValueError, match=r"log_snr=.*expected"):
            e.move(2, wrong)
    assert "of mark 3: expected" in wished(e, "move", step=2, log_snr=99.0)
    with pytest.raises(ValueError, match="step=5: expected a whole number from 0 to 4"):
        e.move(5, 1.0)  # the end lies at the data
    assert e.view["marks"]["levels"] == after


def test_the_end_is_a_mark_where_the_plan_ends_at_a_level(headless: None) -> None:
    problem = two_modes()
    e = schedule_editor(problem, n_steps=5, n_samples=8, final="cleanest")
    e.move(5, 3.0)
    assert problem.schedule.at(e.plan.end).log_snr == pytest.approx(3.0)
    assert e.answers["yours"].curve[-1][0] == pytest.approx(3.0)
    assert e.answers["yours"].error.value < 0.2  # against the flow at that level, not at the data


def test_every_option_offered_is_taken_and_every_one_refused_is_refused_with_its_reason(headless: None) -> None:
    e = schedule_editor(two_modes(), n_steps=5, preset="unipc_bh2", n_samples=4)
    start, seen = e.plan, {True: 0, False: 0}
    for i, fields in enumerate(options(start.decisions, True)):
        for name, values in fields.items():
            for value, why in values:
                e.load(start)
                notice = wished(e, "decide", step=i, fields={name: value})
                assert bool(why) == bool(notice), (i, name, value, why, notice)
                seen[bool(why)] += 1
    assert seen[True] > 10 and seen[False] > 50
    reasons = dict(options(start.decisions, True)[1]["order"])
    assert reasons[1] == reasons[2] == "" and reasons[3] == "step 2 has 1 earlier evaluation to look back on"
    assert "into the data" in options(start.decisions, True)[4]["order"][1][1]


def test_steps_are_added_and_removed_and_orders_fit_the_history_that_is_left(headless: None) -> None:
    e = schedule_editor(two_modes(), n_steps=6, preset="deis_3", n_samples=4)
    assert [d.expansion.order for d in e.plan.decisions] == [1, 2, 3, 3, 2, 1]
    e.remove(0)
    assert [d.expansion.order for d in e.plan.decisions] == [1, 2, 3, 2, 1]
    assert e.plan.times[0] == pytest.approx(1.0)  # trajectories start where they did
    e.add(1)
    levels = e.view["marks"]["levels"]
    assert len(e.plan.times) == 6 and levels[2] == pytest.approx((levels[1] + levels[3]) / 2)
    e.add(5)  # the step into the data is divided
    assert [d.expansion.order for d in e.plan.decisions][-2:] == [2, 1]
    with pytest.raises(ValueError, match="no room for another mark"):
        e.add(2, 50.0)
    e.use(n_steps=1)
    with pytest.raises(ValueError, match="at least one step"):
        e.remove(0)
    assert "steps=41: expected a whole number from 1 to 40" in (e.use(n_steps=40), wished(e, "add", step=3))[1]


def test_a_corrector_is_chosen_with_an_order_that_the_history_allows(headless: None) -> None:
    e = schedule_editor(two_modes(), n_steps=5, n_samples=4)
    e.decide(0, corrector="pseudo")
    assert e.plan.decisions[0].correction.order == 2
    with pytest.raises(ValueError, match="step 0: correction of order 3"):
        e.decide(0, correction_order=3)
    e.decide(3, corrector="implicit", correction_order=4)
    assert e.plan.decisions[3].correction.order == 4 and e.plan.evaluations == 6
    with pytest.raises(ValueError, match="nothing follows"):
        e.decide(4, corrector="pseudo")
    with pytest.raises(TypeError, match="colour='red': expected one of order"):
        e.decide(1, colour="red")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_preset_on_every_spacing_is_a_start(headless: None, spacing: str) -> None:
    e = schedule_editor(two_modes(), n_steps=5, n_samples=4)
    for preset in PRESETS:
        e.use(preset=preset, spacing=spacing)
        assert e.answers["yours"].error == e.answers["preset"].error
    with pytest.raises(ValueError, match="preset='euler': expected one of ddim"):
        e.use(preset="euler")
    assert "spacing='odd'" in wished(e, "compare", fields={"spacing": "odd"})


def test_history_walks_back_and_forth_and_a_drag_is_one_step_of_it(headless: None) -> None:
    e = schedule_editor(two_modes(), n_steps=5, n_samples=4)
    start = e.plan
    for k in range(6):
        wished(e, "move", step=2, log_snr=0.1 * k, gesture="one drag")
    moved = e.plan
    e.decide(2, order=3)
    e.undo()
    assert e.plan == moved and e.view["can_redo"]
    e.undo()
    assert e.plan == start and not e.view["can_undo"]
    e.redo()
    e.redo()
    assert e.plan.decisions[2].expansion.order == 3
    e.reset()
    assert e.plan == start
    e.undo()
    assert e.plan.decisions[2].expansion.order == 3


def test_plans_go_out_and_come_in_as_json_and_as_code(headless: None) -> None:
    problem = two_modes()
    e = schedule_editor(problem, n_steps=5, n_samples=4)
    e.move(2, 0.4)
    wished(e, "json")
    text = e.published["reply"]["text"]
    assert Plan.from_json(text) == e.plan
    space: dict = {}
    exec(e.code(), space)
    assert (space["last"].state == e.answers["yours"].state).all()
    e.reset()
    assert wished(e, "load", text=text) == "" and Plan.from_json(text) == e.plan
    for wrong, why in (("{", "not JSON"), ("[]", "expected 'workbench-usf-plan-1'"),
                       (Plan((7.0,), (Decision(),)).to_json(), "this schedule has 1 to 0.001")):
        assert why in wished(e, "load", text=wrong)
    assert Plan.from_json(text) == e.plan


def test_a_found_plan_stands_beside_yours(headless: None) -> None:
    problem = two_modes()
    best = preset_plan("dpmpp_3m_taylor", grid(problem.schedule, 7, "log_snr"))
    e = schedule_editor(problem, n_steps=5, n_samples=8, best=best)
    assert set(e.view["arms"]) == set(ARMS) and e.view["arms"]["best"]["evaluations"] == 7
    assert (e.answers["best"].state == answer_of(problem, best)).all()
    wished(e, "use_best")
    assert e.plan == best and e.view["arms"]["preset"]["steps"] == 7
    with pytest.raises(ValueError, match="this schedule has"):
        schedule_editor(problem, best=Plan((7.0,), (Decision(),)))
    with pytest.raises(ValueError, match=r"best='plan\.json': expected a Plan"):
        schedule_editor(problem, best="plan.json")


@pytest.mark.parametrize("wrong", [{"n_steps": 0}, {"n_steps": 41}, {"preset": "x"}, {"spacing": "x"}, {"final": "x"},
                                   {"seed": -1}, {"n_samples": 0}, {"seed": 1.5}])
def test_settings_that_cannot_be_are_refused_by_name(headless: None, wrong: dict) -> None:
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected"):
        schedule_editor(two_modes(), **wrong)


def test_a_plan_that_blows_up_says_so(headless: None) -> None:
    e = schedule_editor(two_modes(), n_steps=3, n_samples=4)
    steps = (Decision(), Decision("x0", Expansion(2, relaxation="linear", slope=1e308)), Decision())
    with pytest.raises(ValueError, match="not finite"):
        e.load(Plan(e.plan.times, steps))
    e.undo()
    assert e.view["error"] == "" and e.answers["yours"].error is not None


def fails(e: Any) -> Plan:
    """A plan of its samples that are not finite."""
    steps = (Decision(), Decision("x0", Expansion(2, relaxation="linear", slope=1e308)), Decision())
    return Plan(e.plan.times[:3], steps)


@pytest.mark.parametrize("is_headless", [True, False])
def test_what_nobody_asked_for_fails_as_a_notice_and_is_not_tried_again(monkeypatch: Any, is_headless: bool) -> None:
    """A rival that blows up, and a reference that cannot be: your own plan is shown, and no error is yours."""
    if is_headless:
        monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    toy = Toy()
    e = schedule_editor(toy.problem, n_steps=4, best=fails(schedule_editor(toy.problem, n_steps=4)))
    e.wait()
    assert "computing ahead: best found" in e.view["notice"] and "not finite" in e.view["notice"]
    assert e.view["error"] == "" and e.view["arms"]["best"]["has_failed"] and not e.view["arms"]["yours"]["has_failed"]
    assert e.answers["yours"].error is not None and "best" not in e.answers
    asked = len(toy.calls)
    e.decide(1, prediction="eps")
    e.wait()
    assert 0 < len(toy.calls) - asked <= 4 + 4  # yours, and a preset that it parted from: best is not run again
    wished(e, "load", text=e.best.to_json())  # asked for, it is an error
    if is_headless:
        assert "not finite" in e.view["notice"]
        return
    with pytest.raises(ValueError, match="not finite"):
        e.wait()
    blind = schedule_editor(replace(Toy().problem, reference=("ddim", {"n_steps": -1})), n_steps=4)
    blind.wait()
    blind.decide(1, prediction="eps")
    blind.wait()
    assert "computing ahead: " in blind.view["notice"] and "n_steps=-1" in blind.view["notice"]
    assert blind.view["error"] == "" and all(arm["has_failed"] for arm in blind.view["arms"].values())
    assert set(blind.answers) == {"yours", "preset"} and blind.answers["yours"].error is None


@pytest.mark.parametrize("make", [two_modes, two_dim, lambda: Toy().problem], ids=["line", "plane", "pictures"])
def test_a_saved_notebook_keeps_a_picture_and_the_numbers(headless: None, make: Any) -> None:
    e = schedule_editor(make(), n_steps=5, n_samples=8)
    e.move(2, 0.4)
    kept = e._repr_mimebundle_()
    assert set(kept) == {"text/plain", "image/png"}
    assert base64.b64decode(kept["image/png"]).startswith(b"\x89PNG")
    lines = kept["text/plain"].splitlines()
    assert lines[0].startswith("Schedule editor on ") and "0x" not in kept["text/plain"]
    assert lines[1] == f"yours, own schedule · 5 steps: 5 evaluations, error {e.answers['yours'].error}"
    assert lines[2].startswith("preset, dpmpp_2m on log_snr · 5 steps: 5 evaluations, error ")


# With its worker.


def test_a_moved_mark_asks_only_for_the_steps_that_differ() -> None:
    toy = Toy()
    e = schedule_editor(toy.problem, n_steps=10)
    e.wait()
    asked = len(toy.calls)
    level = e.view["marks"]["levels"][7]
    e.move(7, level + 0.1)
    e.wait()
    assert len(toy.calls) - asked == 3  # of 10: levels 7, 8 and 9


def test_the_latest_wish_wins_and_a_steady_drag_still_shows_pictures() -> None:
    e = schedule_editor(Toy(seconds=0.02).problem, n_steps=10)
    e.wait()
    shown = []
    e.subscribe(lambda name, value: shown.append(header(value)["step"]) if name == "yours" and value else None)
    low = e.view["marks"]["levels"][1]
    for k in range(30):
        wished(e, "move", step=1, log_snr=low + 0.01 * (k + 1), gesture="drag")
        time.sleep(1 / 30)
    assert len(shown) >= 5
    e.wait()
    assert e.view["marks"]["levels"][1] == pytest.approx(low + 0.3, abs=1e-6) and shown[-1] == 10
    assert (e.answers["yours"].state == answer_of(e.problem, e.plan, n=16)).all()


def test_an_error_is_shown_and_the_marks_live_on() -> None:
    toy = Toy()
    e = schedule_editor(toy.problem, n_steps=4)
    e.wait()
    steps = (*e.plan.decisions[:2], Decision("x0", Expansion(2, relaxation="linear", slope=1e308)), Decision())
    with pytest.raises(ValueError, match="not finite"):
        e.load(Plan(e.plan.times, steps))
        e.wait()
    end = time.monotonic() + 10
    while "not finite" not in e.view["error"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    e.undo()
    e.wait()
    assert e.view["error"] == "" and not e.view["is_stale"]


def test_the_worker_ends_when_it_is_closed() -> None:
    e = schedule_editor(Toy().problem, n_steps=3)
    e.wait()
    worker = e._worker
    e.sleep()
    worker.join(10)
    assert not worker.is_alive() and threading.current_thread().is_alive()
    e.compare(seed=5)  # a touch wakes it
    e.wait()
    assert e._worker.is_alive() and e.setting.seed == 5


def test_one_widget_serves_every_display_and_takes_wishes() -> None:
    e = schedule_editor(Toy(dim=2).problem, n_steps=3)
    e.wait()
    shown = e._repr_mimebundle_()[0]
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= set(shown)
    assert "0x" not in shown["text/plain"]
    assert e.widget.view == e.view and e.widget.yours == e.published["yours"]
    e.widget._handle_custom_msg({"id": "a", "kind": "use", "n_steps": 5}, [])
    assert e.view["ack"] == "a" and len(e.plan.times) == 5
    assert e.problem.schedule != ContinuousVP() and not e.has_flow  # no law: compared with the reference run


def test_guided_labels_on_the_plane_are_compared_with_the_guided_reference(headless: None) -> None:
    e = schedule_editor(two_dim(has_labels=True), n_steps=4, n_samples=8)
    assert e.has_flow and e.answers["yours"].error.value > 0


@pytest.mark.parametrize("problem", [two_modes(), Toy().problem], ids=["flow", "reference"])
def test_errors_on_seeds_are_those_that_the_editor_shows(headless: None, problem: object) -> None:
    plans = {name: preset_plan(name, grid(problem.schedule, 4, "log_snr")) for name in ("ddim", "unipc_bh2")}
    found = errors_on_seeds(problem, plans, (0, 5), 6)
    for k, seed in enumerate((0, 5)):
        e = schedule_editor(problem, n_samples=6, seed=seed)
        for name, plan in plans.items():
            e.load(plan)
            assert found[name][k].value == pytest.approx(e.answers["yours"].error.value, rel=1e-4)
    assert found["ddim"][0].value != pytest.approx(found["ddim"][1].value, rel=1e-3)
