"""The explorer's controller, without a browser: what a front end would be told, and what a notebook gets."""

from __future__ import annotations

import base64
import json
import struct
import time
from dataclasses import replace

import numpy as np
import pytest
from explorer_toy import Toy

import workbench
from widgets import explorer
from widgets.explorer import Explorer
from widgets.views.denoising import DenoisingView
from workbench import METHODS, Store
from workbench.problems.decoding import markov
from workbench.problems.mixtures import two_modes
from workbench.rng import Rng


def header(frame: bytes) -> dict:
    return json.loads(frame[4 : 4 + struct.unpack("<I", frame[:4])[0]])


def pixels(frame: bytes) -> np.ndarray:
    return np.frombuffer(frame[4 + struct.unpack("<I", frame[:4])[0] :], np.uint8)


def shape(frame: bytes) -> list[int]:
    return header(frame)["panes"][0]["values"]["shape"]


def until(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_a_value_set_gives_its_run_its_title_and_its_picture() -> None:
    e = explorer(Toy().problem, fractions=(0.25,))
    e.wait()
    first = e.frame
    assert e.run.knobs["fractions"] == (0.25,) and e.view["strip"]["counts"] == (5, 15)
    e.set(n_steps=10)
    e.wait()
    assert e.run.inputs == e.inputs and e.run.knobs["n_steps"] == 10
    assert e.view["shown"]["title"] == header(e.frame)["title"]
    assert "10 steps" in header(e.frame)["title"] and "S 2 + B 8" in header(e.frame)["title"]
    assert shape(e.frame) == [16, 8, 8] and (pixels(e.frame) != pixels(first)).any()
    assert e.run == replace(workbench.run("t_stitch", e.problem, 0, 16, **e.run.knobs), quality=e.run.quality)


def test_the_answer_shown_is_the_answer_of_a_bare_run_although_work_is_shared() -> None:
    e = explorer(Toy(n_models=3).problem)
    for fractions in ((0.4, 0.1), (0.45, 0.1), (0.4, 0.2)):
        e.set(fractions=fractions)
        e.wait()
        bare = workbench.run("t_stitch", e.problem, 0, 16, **e.run.knobs)
        assert (bare.answer == e.run.answer).all() and bare.cost == e.run.cost


def test_a_moved_switch_point_asks_only_for_the_steps_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Explorer, "quiet", 60)  # no idle work
    toy = Toy(seconds=0.002)
    e = explorer(toy.problem, fractions=(0.5,))
    e.wait()
    e.set(fractions=(0.55,))
    asked = len(toy.calls)
    e.wait()
    assert len(toy.calls) - asked <= 10


def test_undo_and_redo_walk_through_the_settings() -> None:
    e = explorer(Toy().problem)
    e.set(n_steps=5)
    e.set(seed=3)
    e.undo()
    e.undo()
    assert (e.inputs.knobs["n_steps"], e.inputs.seed) == (20, 0) and not e.view["can_undo"]
    e.redo()
    e.wait()
    assert (e.run.knobs["n_steps"], e.run.inputs.seed) == (5, 0)
    e.set(n_steps=6)
    assert not e.view["can_redo"]
    e.reset()
    assert e.inputs.knobs["n_steps"] == 20
    e.undo()
    assert e.inputs.knobs["n_steps"] == 6


def test_a_drag_is_one_step_of_the_history() -> None:
    e = explorer(Toy().problem)
    for n in range(8):
        e.receive({"id": str(n), "kind": "set", "state": {}, "knobs": {"n_steps": 5 + n}, "gesture": "one drag"})
    assert e.view["ack"] == "7" and e.inputs.knobs["n_steps"] == 12
    e.receive({"id": "8", "kind": "undo"})
    assert e.inputs.knobs["n_steps"] == 20


def test_the_latest_wish_wins_and_an_overtaken_run_ends_within_a_step() -> None:
    toy = Toy(seconds=0.1)
    e = explorer(toy.problem, fractions=(0.0,))
    until(lambda: len(toy.calls) >= 2)
    e.set(guidance=2.0)
    e.set(seed=1, guidance=1.0)
    asked = len(toy.calls)
    e.wait()
    assert len(toy.calls) - asked <= 20 + 1, "the overtaken run took more than the step that it was in"
    assert e.run.inputs.seed == 1 and all(r.inputs.seed == 1 for r in e.runs)


def test_a_steady_drag_still_shows_pictures() -> None:
    """Every run started draws before it yields, so events that come faster than runs end do not starve the display."""
    e = explorer(Toy(seconds=0.02).problem)
    e.wait()
    shown = set()
    e.subscribe(lambda name, value: shown.add(header(value)["key"]) if name == "frame" and value else None)
    for seed in range(1, 31):
        e.set(seed=seed)
        time.sleep(1 / 30)
    assert len(shown) >= 5
    e.wait()
    assert e.run.inputs.seed == 30


def test_pictures_come_before_the_run_has_ended() -> None:
    frames = []
    e = explorer(Toy(seconds=0.03).problem)
    e.subscribe(lambda name, value: frames.append(header(value)) if name == "frame" and value else None)
    e.wait()
    steps = [f["step"] for f in frames if f["key"] == e.run.inputs.key]
    assert steps == sorted(steps) and len(set(steps)) > 3 and steps[-1] == 20


def test_an_error_is_raised_by_wait_and_shown_and_the_next_wish_recovers() -> None:
    e = explorer(Toy(fails=True).problem)
    e.wait()
    e.set(guidance=3.0)
    with pytest.raises(RuntimeError, match="broke on purpose"):
        e.wait()
    until(lambda: "broke on purpose" in e.view["error"])
    assert e.view["is_stale"] and "guidance 1 " in e.view["shown"]["title"]
    e.set(guidance=1.0)
    e.wait()
    until(lambda: e.view["error"] == "")


def test_what_a_knob_does_not_allow_is_refused_and_changes_nothing() -> None:
    e = explorer(Toy().problem)
    before = e.inputs
    for wrong in ({"n_steps": 0}, {"fractions": (0.9, 0.9)}, {"spacing": "odd"}):
        with pytest.raises(ValueError):
            e.set(**wrong)
        e.receive({"id": "x", "kind": "set", "knobs": wrong})
        assert e.view["notice"] and e.view["ack"] == "x"
    with pytest.raises(TypeError, match="n_steps"):
        e.set(nsteps=3)
    with pytest.raises(TypeError, match="guidance"):
        explorer(Toy().problem, guidanc=2.0)
    assert e.inputs == before


def test_methods_share_their_knobs_and_a_knob_without_effect_goes_back_to_its_default() -> None:
    e = explorer(Toy().problem, fractions=(0.25,))
    e.set(n_steps=12, eta=0.5)
    e.set(method="ddim")
    assert e.inputs.knobs["n_steps"] == 12 and e.inputs.knobs["eta"] == 0.5
    e.set(method="t_stitch", n_steps=9)
    assert e.inputs.knobs["fractions"] == (0.25,)
    e.set(solver="dpmpp_2m")
    assert e.inputs.knobs["eta"] == 0.0
    e.wait()


def test_a_link_brings_the_settings_back() -> None:
    problem = Toy().problem
    e = explorer(problem)
    e.set(n_steps=7, seed=5, method="ddim")
    e.wait()
    other = explorer(problem)
    other.load(e.link)
    other.wait()
    assert other.run == replace(e.run, quality=other.run.quality)
    other.undo()
    assert other.inputs.method == "t_stitch"


@pytest.mark.parametrize(("change", "message"), [
    ({"digest": "other weights", "problem": "letters"}, "of the problem 'letters'"),
    ({"method": "heun"}, "this explorer has t_stitch"),
])
def test_a_foreign_link_is_refused_with_the_reason(change: dict, message: str) -> None:
    e = explorer(Toy().problem)
    link = replace(e.inputs, **change).permalink
    with pytest.raises(ValueError, match=message):
        e.load(link)
    e.receive({"id": "1", "kind": "load", "link": link})
    assert message in e.view["notice"]
    with pytest.raises(ValueError, match="not one that the workbench made"):
        e.load("rubbish")


def test_a_link_of_another_version_loads_with_a_warning() -> None:
    e = explorer(Toy().problem)
    e.load(replace(e.inputs, code="0.0.1+t_stitch.0", seed=4).permalink)
    assert e.inputs.seed == 4 and "0.0.1+t_stitch.0" in e.view["notice"]


def test_the_code_offered_makes_the_run_shown() -> None:
    e = explorer(Toy().problem, n_samples=4)
    e.set(n_steps=6, fractions=(0.5,))
    e.wait()
    scope = {"problem": e.problem}
    exec(e.code(), scope)
    assert scope["run"].inputs == e.run.inputs and (scope["run"].answer == e.run.answer).all()


def test_a_pinned_run_stays_beside_those_that_follow() -> None:
    e = explorer(Toy().problem)
    e.wait()
    kept = pixels(e.frame)
    e.pin()
    e.set(seed=9)
    e.wait()
    assert (pixels(e.published["pinned"]) == kept).all() and (pixels(e.frame) != kept).any()
    assert "seed 0" in e.view["pinned"]["title"] and "seed 9" in e.view["shown"]["title"]
    e.unpin()
    assert e.view["pinned"] is None and e.published["pinned"] == b""


def test_idle_work_finds_rivals_time_and_neighbours_and_leaves_the_shown_run_alone() -> None:
    e = explorer(Toy().problem, fractions=(0.25,))
    e.wait()
    shown, frame = e.run.inputs, e.frame
    e.wait(idle=True)
    assert e.run.inputs == shown and e.frame == frame
    assert e.run.quality["drift"].value > 0 and e.view["shown"]["timing"]["ms"] > 0
    roles = {p["role"]: p for p in e.frontier["metrics"]["drift"]}
    assert roles["reference"]["value"] == 0 and roles["baseline"]["value"] > e.run.quality["drift"].value
    counts = {round(20 * r.knobs["fractions"][0]) for r in e.runs if r.inputs.method == "t_stitch"}
    assert counts == set(range(21))
    made = len(e.runs)
    e.set(fractions=(0.5,))
    e.wait()
    assert len(e.runs) == made


def test_idle_work_gives_way_at_once() -> None:
    toy = Toy(seconds=0.05)
    e = explorer(toy.problem)
    e.wait()
    until(lambda: e.view["status"])
    begin = time.monotonic()
    e.set(n_steps=1)
    e.wait()
    assert time.monotonic() - begin < 1.0  # two evaluations of 50 ms; idle work had a second's worth before it


def test_a_long_score_stops_on_demand_and_keeps_what_it_has() -> None:
    e = explorer(Toy(seconds=0.01).problem, n_samples=4, n_steps=5)
    e.wait(idle=True)
    e.score(500)
    until(lambda: (e.view["score"] or {}).get("done", 0) >= 50)
    e.stop_score()
    until(lambda: e.view["score"] is None)
    (run,) = [r for r in e.runs if r.inputs.n_samples > 4]
    assert 50 <= run.inputs.n_samples < 500 and run.inputs.n_samples % 25 == 0
    assert e.frontier["n"] == run.inputs.n_samples and e.run.inputs.n_samples == 4
    assert e.view["shown"]["quality"]["label_accuracy"][2] == run.inputs.n_samples


def test_a_long_score_equals_the_bare_run_of_that_many_samples() -> None:
    e = explorer(Toy().problem, n_samples=4, n_steps=5, eta=1.0)
    e.wait()
    e.score(60)
    e.wait(idle=True)
    (run,) = [r for r in e.runs if r.inputs.n_samples == 60]
    bare = workbench.run("t_stitch", e.problem, 0, 60, **run.knobs)
    assert bare.inputs == run.inputs and bare.cost.evaluations == run.cost.evaluations
    assert abs(bare.answer - run.answer).max() < 1e-5


def test_moving_a_slider_interrupts_a_score_and_it_goes_on_afterwards() -> None:
    e = explorer(Toy(seconds=0.005).problem, n_samples=4, n_steps=5)
    e.wait()
    e.score(100)
    until(lambda: e.view["score"] and e.view["score"]["done"] >= 25)
    e.set(seed=1)
    e.wait()
    assert e.run.inputs.seed == 1
    e.wait(idle=True)
    assert any(r.inputs.n_samples == 100 and r.inputs.seed == 0 for r in e.runs)


def test_runs_are_looked_up_and_kept_in_a_store(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")  # no idle work, which would ask the networks for other runs
    e = explorer(Toy().problem, store=Store(tmp_path))
    again = Toy()
    other = explorer(again.problem, store=Store(tmp_path))
    assert not again.calls and (other.run.answer == e.run.answer).all()


@pytest.mark.parametrize("dim", [1, 2])
def test_samples_that_are_no_pictures_are_sent_as_numbers(dim: int) -> None:
    e = explorer(Toy(dim=dim).problem, n_samples=5)
    e.wait(idle=True)
    body = e.frame[4 + struct.unpack("<I", e.frame[:4])[0] :]
    assert shape(e.frame) == [5, dim] and header(e.frame)["panes"][0]["kind"] == "points"
    assert np.allclose(np.frombuffer(body, np.float32).reshape(5, dim), e.run.answer.numpy())


def test_everything_published_is_json() -> None:
    e = explorer(Toy(dim=2).problem, n_samples=3)
    e.wait(idle=True)
    for name in ("spec", "view", "frontier", "reply"):
        json.dumps(e.published[name], allow_nan=False)
    assert "drift" in e.csv().splitlines()[0] and len(e.csv().splitlines()) == 1 + len(e.runs)


def test_headless_runs_at_once_raises_in_the_cell_and_shows_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HEADLESS", "1")
    e = explorer(Toy(fails=True).problem)
    assert e.run is not None and set(e._repr_mimebundle_()) == {"text/plain", "image/png"}
    with pytest.raises(RuntimeError, match="broke on purpose"):
        e.set(guidance=2.0)
    e.set(guidance=1.0, n_steps=4)
    e.wait(idle=True)
    assert e.run.knobs["n_steps"] == 4 and "drift" in e.run.quality


def test_one_widget_serves_every_display_and_takes_wishes() -> None:
    e = explorer(Toy().problem)
    assert "application/vnd.jupyter.widget-view+json" in e._repr_mimebundle_()[0]
    assert e.widget is e.widget
    e.wait()
    e.widget._handle_custom_msg({"id": "a-1", "kind": "set", "state": {"seed": 2}, "knobs": {}}, [])
    e.wait()
    until(lambda: e.widget.view["shown"]["title"] == header(e.widget.frame)["title"])
    assert "seed 2" in e.widget.view["shown"]["title"] and e.widget.view["ack"] == "a-1"


KINDS = [  # methods that do not step along a plain grid of n_steps levels, and what their strip must say
    ("dpm_solver", {"order": 3, "scheme": "singlestep", "n_steps": 8}, 4),  # 3 + 3 + 1 + 1 evaluations
    ("edm_heun", {"n_steps": 6}, 6),
    ("deis", {"n_steps": 5, "phase": "rho"}, 5),
    ("score_sde", {"n_steps": 6, "sde": "ve", "corrector": "langevin"}, 6),
    ("flow_ode", {"n_steps": 4}, 4),
    ("flow_ode", {"n_steps": 4, "solver": "rk45"}, 4),
    ("timesteps", {"n_steps": 4, "models": (0.0, 1.0)}, 4),
]


@pytest.mark.parametrize(("method", "knobs", "n_steps"), KINDS)
def test_the_strip_shows_the_levels_that_the_method_asks_at(method: str, knobs: dict, n_steps: int) -> None:
    problem, asked, seen = two_modes(), [], []

    def watch(name: str, network: object) -> object:
        def watched(x, t, labels=None):
            asked.append(problem.schedule.at(float(t[0])).log_snr)
            return network(x, t, labels)

        return watched

    e = explorer(problem, methods=(method,), n_samples=4, **knobs)
    e.subscribe(lambda name, value: seen.append(header(value)) if name == "frame" and value else None)
    e.wait()
    firsts = []
    for _ in workbench.get(method).function(problem.wrapped(watch), Rng(0, 4), **e.run.knobs):
        firsts.append(asked[0])
        asked.clear()
    strip = e.view["strip"]
    assert strip["log_snr"] == [round(at, 3) for at in firsts] and len(firsts) == n_steps and not strip["is_open"]
    assert sum(strip["counts"]) == n_steps == sum(n for _, n in strip["owned"])
    assert (header(e.frame)["of"], header(e.frame)["is_done"]) == (n_steps, True)
    assert all(h["of"] == n_steps for h in seen if h["key"] == e.run.inputs.key)
    if method == "timesteps":
        assert [tuple(o) for o in strip["owned"]] == [(0, 1), (1, 3)]


def test_steps_that_depend_on_the_data_are_shown_once_the_run_is_known() -> None:
    toy = Toy(seconds=0.02)
    e = explorer(toy.problem, methods=("dpm_solver_adaptive",), n_samples=3)
    assert e.view["strip"]["is_open"] and len(e.view["strip"]["log_snr"]) == 1
    e.wait()
    until(lambda: not e.view["strip"]["is_open"])
    strip, n = e.view["strip"], header(e.frame)["of"]
    assert len(strip["log_snr"]) == n == sum(strip["counts"]) < 100 and "attempted steps" in e.view["shown"]["title"]
    bare = list(workbench.get("dpm_solver_adaptive").function(e.problem, Rng(0, 3), **e.run.knobs))
    assert len(bare) == n
    assert strip["log_snr"][1:] == [round(s.info["there"].log_snr, 3) for s in bare[:-1]]


def test_what_only_the_method_refuses_is_refused_and_changes_nothing() -> None:
    e = explorer(two_modes(), methods=("score_sde",), n_samples=4, predictor="ancestral")
    e.wait()
    before = e.inputs
    with pytest.raises(ValueError, match="not defined for sde='sub_vp'"):
        e.set(sde="sub_vp")
    e.receive({"id": "x", "kind": "set", "knobs": {"sde": "sub_vp"}})
    assert "ancestral" in e.view["notice"] and e.inputs == before and e.view["error"] == ""
    e.set(sde="sub_vp", predictor="reverse_diffusion")
    e.wait()
    assert e.run.knobs["sde"] == "sub_vp"


def test_neighbours_of_adaptive_steps_are_tolerances_and_none_is_refused() -> None:
    e = explorer(two_modes(), methods=("dpm_solver_adaptive",), n_samples=4)
    e.wait(idle=True)
    assert len({r.knobs["rtol"] for r in e.runs if r.inputs.method == "dpm_solver_adaptive"}) >= 5
    assert {r.knobs["n_steps"] for r in e.runs if r.inputs.method == "dpm_solver_adaptive"} == {50}
    e = explorer(two_modes(), methods=("timesteps",), n_samples=4, models=(0.0, 0.5, 1.0))
    e.wait(idle=True)
    assert e.view["error"] == "" and min(r.knobs["n_steps"] for r in e.runs if r.inputs.method == "timesteps") == 3


@pytest.mark.parametrize(("problem", "family"), [(two_modes(), "denoising"), (markov(), "decoding")])
def test_every_method_can_be_switched_to_from_every_other(problem, family, monkeypatch):
    """`order`, `solver`, `variant` mean other things elsewhere: a value that does not fit is not carried over."""
    monkeypatch.setattr(Explorer, "_show", lambda self, overtaken: None)  # settings only
    names = [m.name for m in METHODS.values() if m.family == family]
    for first in names:
        panel = explorer(problem, names, n_samples=1)
        for second in names:
            for method in (first, second):
                panel.receive({"id": "1", "kind": "set", "state": {"method": method}, "knobs": {}})
                assert panel.inputs.method == method and not panel.view["notice"], (first, second)
        panel.sleep()


# ---- what nobody asked for may fail: it is said once, and all else goes on

def fails(*_: object, **__: object) -> None:
    raise RuntimeError("broke on purpose")


def test_a_time_that_cannot_be_measured_is_said_and_the_rest_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbench, "timed", fails)
    e = explorer(Toy().problem)
    e.wait()
    e.wait(idle=True)
    assert e.view["error"] == "" and e.view["shown"]["timing"] is None and not e.timings
    assert len(e.runs) > 20 and e.view["reference"] is not None


def test_previews_that_cannot_be_prepared_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(DenoisingView, "_prepare", lambda self, trunk, stop: asked.append(1) or fails())
    e = explorer(Toy().problem)
    said: list[str] = []
    e.subscribe(lambda name, value: said.append(value["notice"]) if name == "view" and value else None)
    e.wait(idle=True)
    assert len(asked) == 1 and "computing ahead: RuntimeError: broke on purpose" in said and e.view["error"] == ""
    assert len(e.runs) > 20


@pytest.mark.parametrize("name", ["reference", "baseline"])
def test_a_rival_that_cannot_be_is_said_and_the_panel_lives(name: str) -> None:
    e = explorer(replace(Toy().problem, **{name: ("ddim", {"n_steps": 0})}))
    e.wait(idle=True)
    assert e.view["error"] == "" and f"the problem's {name}: knob n_steps=0" in e.view["notice"]
    e.set(n_steps=7)
    e.wait()
    assert e.run.knobs["n_steps"] == 7


def test_a_score_that_fails_is_given_up_and_its_error_shown() -> None:
    def judge(answer, labels):
        return fails() if len(answer) > 20 else {}

    e = explorer(replace(Toy().problem, judge=judge))
    e.wait(idle=True)
    e.score(30)
    with pytest.raises(RuntimeError, match="broke on purpose"):
        e.wait(idle=True)
    until(lambda: e.view["score"] is None and "broke on purpose" in e.view["error"])
    e.set(n_steps=6)
    e.wait(idle=True)
    assert e.view["error"] == ""


def test_a_number_of_samples_without_runs_is_refused() -> None:
    e = explorer(Toy().problem)
    e.wait(idle=True)
    for wrong in (7, "many"):
        e.receive({"id": "f", "kind": "frontier_n", "n": wrong})
        assert str(wrong) in e.view["notice"] and e.frontier["n"] == 16


def test_a_host_without_the_front_end_gets_a_picture_and_the_numbers() -> None:
    e = explorer(Toy().problem)
    data, _ = e._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= set(data)
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "label accuracy: " in data["text/plain"] and "object at" not in data["text/plain"]
