"""Sweeps: shared evaluations are made once, results are those of runs on their own, nothing hangs."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from workbench import Cancelled, Memo, Store, inputs, run, sweep, together
from workbench.cost import Meter
from workbench.problems.mixtures import two_dim, two_modes
from workbench.sweeps import address

STEPS, N = 20, 3
SWITCHES = [k / STEPS for k in range(STEPS + 1)]


def ungraded(problem):
    return replace(problem, judge=lambda answer, labels: {})


def counted(problem):
    """The problem with a meter below whatever a sweep shares, and that meter: what is really evaluated."""
    meter = Meter(problem.flops)
    return problem.wrapped(meter.wrap), meter


def within(seconds, job):
    """job()'s result or error; fails where it has not ended in time."""
    out = {}

    def work():
        try:
            out["result"] = job()
        except BaseException as error:
            out["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "hangs"
    if "error" in out:
        raise out["error"]
    return out["result"]


def check_prefixes_are_shared(sweep_of_switches):
    """21 switch points of 20 steps: the cheap model sees one trajectory of 20 steps, the other 20 + 19 + ... + 1."""
    problem, meter = counted(ungraded(two_modes()))
    runs = sweep_of_switches(problem)
    assert meter.evaluations == {"wiener": 20 * N, "exact": 210 * N}
    for k, made in enumerate(runs):
        alone = run("t_stitch", ungraded(two_modes()), 0, N, n_steps=STEPS, fractions=(k / STEPS,))
        torch.testing.assert_close(made.answer, alone.answer, rtol=1e-12, atol=1e-12)
        assert made.cost == alone.cost and made.inputs == alone.inputs  # what the run costs on its own


def switches(problem):
    return sweep("t_stitch", problem, {"fractions": SWITCHES}, seeds=[0], n_samples=N, n_steps=STEPS)


def one_by_one(problem):
    """Broken twin: no work is shared."""
    return [run("t_stitch", problem, 0, N, n_steps=STEPS, fractions=(f,)) for f in SWITCHES]


def by_step_alone(problem):
    """Broken twin: an evaluation is remembered by its model and time, whatever the state."""
    memo = {}

    def wrap(name, network):
        return lambda x, t, labels: memo.setdefault((name, float(t[0])), network(x, t, labels))

    return one_by_one(problem.wrapped(wrap))


def test_prefixes_are_shared_and_results_are_those_of_runs_alone():
    check_prefixes_are_shared(switches)


@pytest.mark.parametrize("broken", [one_by_one, by_step_alone])
def test_sharing_check_fails_for_a_broken_twin(broken):
    with pytest.raises(AssertionError):
        check_prefixes_are_shared(broken)


def test_a_memo_one_run_after_the_other_shares_as_much():
    problem, meter = counted(ungraded(two_modes()))
    memo = Memo()
    one_by_one(problem.wrapped(memo.wrap))
    assert meter.evaluations == {"wiener": 20 * N, "exact": 210 * N}


def test_moving_a_switch_point_costs_only_what_changes():
    problem, meter = counted(ungraded(two_modes()))
    shared = problem.wrapped(Memo().wrap)
    run("t_stitch", shared, 0, N, n_steps=STEPS, fractions=(8 / STEPS,))
    before = dict(meter.evaluations)
    run("t_stitch", shared, 0, N, n_steps=STEPS, fractions=(9 / STEPS,))
    assert {k: v - before[k] for k, v in meter.evaluations.items()} == {"wiener": 1 * N, "exact": 11 * N}


@pytest.mark.parametrize("problem", [two_modes(), two_dim(has_labels=True)], ids=lambda p: p.name)
def test_mixed_settings_batch_without_mixing_up(problem):
    """Other solvers, seeds, sample counts, guidance and noise at once, in batches too small and too large."""
    problem = ungraded(problem)
    wanted = [inputs("t_stitch", problem, seed, n, n_steps=steps, fractions=(0.5,), **more)
              for seed, n, steps in ((0, 2, 4), (1, 5, 4), (0, 3, 7))
              for more in ({}, {"guidance": 2.0}, {"eta": 1.0}, {"solver": "dpmpp_2m"}, {"spacing": "log_snr"})]
    wanted += [inputs("ddim", problem, 0, 2, n_steps=4)] * 2  # asked for twice
    alone = [run(i.method, problem, i.seed, i.n_samples, **i.knobs) for i in wanted]
    for max_rows, at_once in ((128, 64), (1, 64), (4, 3)):
        for made, single in zip(together(problem, wanted, max_rows=max_rows, at_once=at_once), alone, strict=True):
            assert made.inputs == single.inputs and made.cost == single.cost
            torch.testing.assert_close(made.answer, single.answer, rtol=1e-11, atol=1e-11)


def test_batches_hold_at_most_max_rows():
    problem, sizes = ungraded(two_modes()), []

    def watch(name, network):
        return lambda x, t, labels: sizes.append(len(x)) or network(x, t, labels)

    wanted = [inputs("ddim", problem, seed, 4, n_steps=2) for seed in range(10)]
    together(problem.wrapped(watch), wanted, max_rows=10)
    assert max(sizes) == 8 and sum(sizes) == 2 * 40


def failing(problem, model):
    def broken(x, t, labels=None):
        raise RuntimeError("the large model is out of memory")

    return replace(problem, models=tuple(replace(m, network=broken) if m.name == model else m for m in problem.models))


def test_an_error_of_one_run_is_raised_after_the_others_ended(tmp_path):
    problem, store, seen = ungraded(failing(two_modes(), "exact")), Store(tmp_path), []
    wanted = [inputs("t_stitch", problem, 0, N, n_steps=5, fractions=(f,)) for f in (0.0, 0.4, 1.0)]
    with pytest.raises(RuntimeError, match="out of memory"):
        within(60, lambda: together(problem, wanted, store=store, on_run=seen.append))
    assert [r.knobs["fractions"] for r in store] == [(1.0,)] == [r.knobs["fractions"] for r in seen]


def test_an_error_in_a_callback_does_not_hang():
    def wrong(made):
        raise KeyError("callback")

    with pytest.raises(KeyError, match="callback"):
        within(60, lambda: sweep("ddim", ungraded(two_modes()), {"n_steps": [2, 9]}, seeds=[0, 1], on_run=wrong))


def test_all_settings_are_validated_before_the_first_runs():
    problem, meter = counted(two_modes())
    with pytest.raises(ValueError, match="n_steps=0"):
        sweep("ddim", problem, {"n_steps": [5, 0]}, n_samples=2)
    assert meter.evaluations == {"wiener": 0, "exact": 0}


def test_cancelling_keeps_what_has_ended_and_nothing_else(tmp_path):
    problem, store, done = ungraded(two_modes()), Store(tmp_path), []
    wanted = [inputs("ddim", problem, 0, N, n_steps=n) for n in (2, 3, 40)]
    with pytest.raises(Cancelled):
        within(60, lambda: together(problem, wanted, store=store, on_run=done.append, stop=lambda: len(done) >= 2))
    assert {r.knobs["n_steps"] for r in store} == {r.knobs["n_steps"] for r in done} <= {2, 3}
    with pytest.raises(Cancelled):
        within(60, lambda: together(problem, wanted, stop=lambda: True))
    # and what was cut off can be had afterwards
    assert [r.knobs["n_steps"] for r in together(problem, wanted, store=store)] == [2, 3, 40]


def test_stored_runs_are_read_and_not_made(tmp_path):
    problem, meter = counted(ungraded(two_modes()))
    store = Store(tmp_path)
    first = sweep("ddim", problem, {"n_steps": [2, 3]}, seeds=[0, 1], n_samples=N, store=store)
    spent = dict(meter.evaluations)
    second = sweep("ddim", problem, {"n_steps": [2, 3]}, seeds=[0, 1], n_samples=N, store=store)
    assert second == first and meter.evaluations == spent
    assert all(torch.equal(a.answer, b.answer) for a, b in zip(first, second, strict=True))
    assert [(r.knobs["n_steps"], r.inputs.seed) for r in first] == [(2, 0), (2, 1), (3, 0), (3, 1)]


def test_a_network_is_never_asked_by_two_threads_at_once():
    problem, busy, clashes = ungraded(two_modes()), threading.Lock(), []

    def exclusive(name, network):
        def asked(*rows):
            if not busy.acquire(blocking=False):
                clashes.append(name)
                return network(*rows)
            try:
                return network(*rows)
            finally:
                busy.release()

        return asked

    sweep("t_stitch", problem.wrapped(exclusive), {"fractions": SWITCHES[::4]}, seeds=range(3), n_samples=2, n_steps=5)
    assert not clashes


def test_memo_forgets_the_least_recently_used_first():
    kept = torch.zeros(100, dtype=torch.float64)  # 800 bytes each
    memo = Memo(max_bytes=2400)
    for key in (b"a", b"b", b"c"):
        memo.put(key, kept.clone())
    assert memo.get(b"a") is not None  # now the most recent
    memo.put(b"d", kept.clone())
    assert memo.get(b"b") is None and all(memo.get(k) is not None for k in (b"a", b"c", b"d"))
    memo.put(b"big", torch.zeros(1000, dtype=torch.float64))  # larger than all that may be held: kept, but alone
    assert memo.get(b"big") is not None and all(memo.get(k) is None for k in (b"a", b"c", b"d"))


def test_memo_that_forgets_changes_no_result():
    problem = ungraded(two_modes())
    wanted = [inputs("t_stitch", problem, 0, N, n_steps=6, fractions=(k / 6,)) for k in range(7)]
    small = together(problem, wanted, memo=Memo(max_bytes=1))
    for a, b in zip(small, together(problem, wanted), strict=True):
        torch.testing.assert_close(a.answer, b.answer, rtol=1e-12, atol=1e-12)


def test_address_tells_names_values_shapes_and_types_apart():
    x = torch.arange(6, dtype=torch.float32)
    asked = [("a", (x,)), ("b", (x,)), ("a", (x + 1e-7,)), ("a", (x.reshape(2, 3),)), ("a", (x.double(),)),
             ("a", (x, x)), ("a", (x.to(torch.bfloat16),)), ("a", (x.int(),)), ("a", (-0.0 * x,)), ("a", (0.0 * x,))]
    assert len({address(name, rows) for name, rows in asked}) == len(asked)
    assert address("a", (x.reshape(2, 3).T,)) == address("a", (x.reshape(2, 3).T.contiguous(),))
    assert address("a", (x, None)) == address("a", (x,))


def test_an_interrupted_sweep_leaves_no_thread(monkeypatch):
    """Ctrl-C comes into the caller's thread while it evaluates; the runs' threads end with it."""
    before = threading.active_count()
    problem, asked = two_modes(), []

    def interrupted(name, network):
        def evaluate(*rows):
            asked.append(name)
            if len(asked) == 3:
                raise KeyboardInterrupt
            return network(*rows)
        return evaluate

    for _ in range(3):
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            sweep("ddim", problem.wrapped(interrupted), {"n_steps": range(2, 30)}, seeds=(0, 1), n_samples=2)
    assert threading.active_count() == before


def test_a_store_that_cannot_be_written_loses_no_run(tmp_path, caplog):
    store = Store(tmp_path / "runs")
    (tmp_path / "runs").rmdir()
    made = sweep("ddim", two_modes(), {"n_steps": [1, 2, 3]}, seeds=(0,), n_samples=2, store=store)
    assert len(made) == 3
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and str(tmp_path / "runs") in said[0] and "are not kept" in said[0]
