"""Sweeps: shared evaluations are made once, results are those of runs on their own, nothing hangs."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from greenlet import greenlet

from workbench import METHODS, Cancelled, Knob, Memo, Step, Store, inputs, method, run, sweep, together
from workbench.cost import Meter
from workbench.problems.mixtures import two_dim, two_modes
from workbench.rng import of_samples, samples_of_call
from workbench.sweeps import _multipliers, address, folded

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


def test_a_sweep_made_again_asks_for_the_same_batches_in_the_same_order():
    """Which rows share a batch moves a network's last bits, so it must not depend on chance."""
    def asked():
        batches = []

        def watch(name, network):
            return lambda *rows: batches.append(address(name, rows)) or network(*rows)

        switches(ungraded(two_modes()).wrapped(watch))
        return batches

    assert asked() == asked()


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


@pytest.fixture(params=["near", "far"])
def where(request, monkeypatch):
    """Bits hashed as they are on the CPU, and as they would be on another device."""
    monkeypatch.setattr("workbench.sweeps._is_near", lambda tensor: request.param == "near")


@pytest.mark.usefixtures("where")
def test_address_tells_names_values_shapes_and_types_apart():
    x = torch.arange(6, dtype=torch.float32)
    asked = [("a", (x,)), ("b", (x,)), ("a", (x + 1e-7,)), ("a", (x.reshape(2, 3),)), ("a", (x.double(),)),
             ("a", (x, x)), ("a", (x.to(torch.bfloat16),)), ("a", (x.int(),)), ("a", (-0.0 * x,)), ("a", (0.0 * x,))]
    asked += [("a", (x[:3], x[3:])), ("a", (x[:2], x[2:])), ("a", (x, 1.0)), ("a", (x[:0],)), ("a", ())]
    asked += [("a", (torch.zeros(shape, dtype=dtype),)) for shape in ((), (1,), (1, 1), (2,), (4,), (1024,), (1, 1024))
              for dtype in (torch.float32, torch.float64, torch.int32, torch.bool, torch.float16)]
    assert len({address(name, rows) for name, rows in asked}) == len(asked)
    assert address("a", (x.reshape(2, 3).T,)) == address("a", (x.reshape(2, 3).T.contiguous(),))
    assert address("a", (x, None)) == address("a", (x,))


def check_simple_changes_are_told_apart(fold):
    """Each bit flipped, each two signs, each two numbers and all orders of the rows: what sums like to overlook."""
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    bits, flat = x.flatten().view(torch.uint8), x.flatten()
    changed = [bits]
    for bit in range(8 * len(bits)):
        changed.append(bits.clone())
        changed[-1][bit // 8] ^= 1 << bit % 8
    for i, j in itertools.combinations(range(len(flat)), 2):
        signs, order = torch.ones(len(flat)), torch.arange(len(flat))
        signs[[i, j]], order[[i, j]] = -1, order[[j, i]]
        changed += [(flat * signs).view(torch.uint8), flat[order].view(torch.uint8)]
    changed += [x[list(rows)].flatten().view(torch.uint8) for rows in itertools.permutations(range(4))][1:]
    assert len({tuple(fold(c).tolist()) for c in changed}) == len(changed)


def test_folding_tells_simple_changes_apart():
    check_simple_changes_are_told_apart(folded)


@pytest.mark.parametrize("broken", [
    lambda bits: bits.view(torch.int32).sum(0, keepdim=True),
    lambda bits: (bits.view(torch.int32) * torch.arange(1, 37)).sum(0, keepdim=True),
    lambda bits: (bits.view(torch.int64) * (_multipliers(32, bits.device)[:, :18] | 1)).sum(1),  # signs cancel
], ids=["a sum", "small weights", "64-bit words"])
def test_folding_check_fails_for_a_broken_twin(broken):
    with pytest.raises(AssertionError):
        check_simple_changes_are_told_apart(broken)


@pytest.mark.parametrize("threads", [1, 3])
def test_folding_is_exact_whatever_the_threads(threads):
    n = 3_000_001
    bits = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = folded(bits)
    finally:
        torch.set_num_threads(before)
    words = np.frombuffer(bits.numpy().tobytes() + b"\0" * (-n % 4), "<i4").astype(np.int64)
    multipliers = _multipliers(1 << len(words).bit_length(), bits.device).numpy()[:, : len(words)]
    assert found.tolist() == (words * multipliers).sum(1).tolist()
    assert torch.equal(found, folded(bits))


def running():
    """The greenlets that were started and have not ended, threads' own apart."""
    return [g for g in gc.get_objects() if type(g) is greenlet and g and g.parent is not None]


def interrupted(problem, at):
    """The problem, with Ctrl-C pressed while a network is asked for the `at`-th time."""
    asked = []

    def wrap(name, network):
        def evaluate(*rows):
            asked.append(name)
            if len(asked) == at:
                raise KeyboardInterrupt
            return network(*rows)
        return evaluate

    return problem.wrapped(wrap)


@pytest.mark.parametrize("at", [1, 3, 7])
def test_an_interrupted_sweep_ends_its_runs_and_keeps_those_that_had_ended(at, tmp_path):
    threads, store, problem = threading.active_count(), Store(tmp_path), ungraded(two_modes())
    with pytest.raises(KeyboardInterrupt) as caught:
        sweep("ddim", interrupted(problem, at), {"n_steps": range(2, 12)}, seeds=(0, 1), n_samples=2, store=store)
    assert caught.traceback and not running() and threading.active_count() == threads
    # one call a step for all: those of n steps have ended once n calls are answered
    assert sorted(r.knobs["n_steps"] for r in store) == sorted([n for n in range(2, at) for _ in (0, 1)])
    assert len(sweep("ddim", problem, {"n_steps": range(2, 12)}, seeds=(0, 1), n_samples=2, store=store)) == 20


@pytest.fixture
def register():
    """register(function): a method of the family denoising, with a knob n_steps, for as long as the test runs."""
    before = dict(METHODS)
    yield method(version=1, source="here", cost="n_steps", family="denoising")
    METHODS.clear()
    METHODS.update(before)


Count = Annotated[int, Knob(low=1, high=99, help="how many")]


def asking(problem, x):
    (model,) = problem.models[-1:]
    return model.network(x, torch.full((len(x),), 0.5, dtype=x.dtype), None)


def test_a_run_that_catches_everything_ends_with_the_others(register):
    @register
    def stubborn(problem, rng, *, n_steps: Count = 1) -> Iterator[Step]:
        x = problem.start(rng)
        for i in range(n_steps):
            try:
                asking(problem, x + i)
            except BaseException:
                ended.append(i)
            yield Step(x, {})

    ended: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        sweep("stubborn", interrupted(ungraded(two_modes()), 2), {"n_steps": [5, 6]}, seeds=[0], n_samples=1)
    assert ended == [1, 2, 3, 4, 5, 1, 2, 3, 4] and not running()


MODES = {
    "grad": torch.no_grad,
    "inference": torch.inference_mode,
    "cast": partial(torch.autocast, "cpu", torch.bfloat16),
    "none": nullcontext,
}


def modes():
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"))


@pytest.mark.parametrize("mine", MODES)
def test_no_run_sees_another_ones_torch_modes(register, mine):
    """Each asks, and rests between steps, in a mode of its own; one raises, which hurts no other."""
    @register
    def moody(problem, rng, *, n_steps: Count = 1) -> Iterator[Step]:
        x, mode = problem.start(rng), list(MODES)[n_steps % len(MODES)]
        outside = modes()
        for i in range(n_steps):
            with MODES[mode]():
                inside = modes()
                asking(problem, x + i)
                right.append(modes() == inside)
                yield Step(x, {})
                right.append(modes() == inside)
                asking(problem, x - i)
                right.append(modes() == inside)
                if n_steps == 7:
                    raise RuntimeError("in the middle")
            right.append(modes() == outside)
            asking(problem, x * i)
            right.append(modes() == outside)

    def watched(name, network):
        return lambda *rows: told.add(modes()) or network(*rows)

    right, told, done = [], set(), []
    problem = ungraded(two_modes()).wrapped(watched)
    with MODES[mine]():
        before = modes()
        with pytest.raises(RuntimeError, match="in the middle"):
            sweep("moody", problem, {"n_steps": range(1, 9)}, seeds=[0], n_samples=2, on_run=done.append)
        with pytest.raises(Cancelled):
            sweep("moody", problem, {"n_steps": range(1, 7)}, seeds=[0], n_samples=2, stop=lambda: len(right) > 150)
        assert modes() == before
    assert all(right) and len(right) > 150 and {r.knobs["n_steps"] for r in done} == {1, 2, 3, 4, 5, 6, 8}
    assert told == {(False, *before[1:])}  # networks are asked in the caller's modes, without gradients


def test_a_run_has_the_callers_context_and_leaves_none_behind(register):
    @register
    def naming(problem, rng, *, n_steps: Count = 1) -> Iterator[Step]:
        seen.append(samples_of_call())
        with of_samples([n_steps]):
            asking(problem, problem.start(rng))
            seen.append(samples_of_call())
        yield Step(problem.start(rng), {})

    seen: list[Any] = []
    with of_samples([0]):
        sweep("naming", ungraded(two_modes()), {"n_steps": [1, 2]}, seeds=[0], n_samples=3)
        assert seen == [[0], [0], [1], [2]] and samples_of_call() == [0]


def test_a_store_that_cannot_be_written_loses_no_run(tmp_path, caplog):
    store = Store(tmp_path / "runs")
    (tmp_path / "runs").rmdir()
    made = sweep("ddim", two_modes(), {"n_steps": [1, 2, 3]}, seeds=(0,), n_samples=2, store=store)
    assert len(made) == 3
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and str(tmp_path / "runs") in said[0] and "are not kept" in said[0]
