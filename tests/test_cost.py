"""The meter: rows not calls, seconds per model, peak bytes."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch

from workbench import Cancelled, run, timed
from workbench.cost import Meter, flops_per_row, measure
from workbench.problems.mixtures import two_dim, two_modes

MB = 2**20


def test_rows_are_counted_and_not_calls():
    meter = Meter({"a": 10.0, "b": 3.0})
    network = meter.wrap("a", lambda x, *rest: x)
    for rows in (1, 5, 7):
        network(torch.zeros(rows, 2), None)
    assert meter.cost.evaluations == {"a": 13, "b": 0} and meter.cost.calls == {"a": 3, "b": 0}
    assert meter.cost.flops == {"a": 130.0, "b": 0.0}
    assert meter.cost.total_evaluations == 13 and meter.cost.total_flops == 130.0


def test_guidance_is_one_call_of_twice_the_rows():
    cost = run("ddim", two_dim(has_labels=True), n_samples=6, n_steps=5, guidance=3.0).cost
    assert cost.evaluations["exact"] == 2 * 6 * 5 and cost.calls["exact"] == 5


def test_flops_of_a_linear_layer():
    layer = torch.nn.Linear(30, 50, bias=False)
    assert flops_per_row(layer, torch.zeros(1, 30)) == 2 * 30 * 50


def peak(once):
    return measure(lambda meter: once(), {}, repeats=1).peak_bytes


def grows_and_shrinks():
    a = torch.zeros(MB, dtype=torch.float64)  # 8 MB
    b = a + 1  # 16 held
    view = b.view(2, -1)
    view += 1
    del a
    c = torch.cat((b, view.flatten()))  # b and the double of it: 24
    del b, view
    return float((c * 1.0).sum())  # 32 at the end


def test_peak_bytes_follow_what_is_held_at_once():
    assert peak(grows_and_shrinks) == pytest.approx(32 * MB, rel=1e-3)


def test_peak_bytes_do_not_add_up_what_was_freed():
    def one_after_the_other():
        for _ in range(10):
            torch.zeros(MB, dtype=torch.float32).add(1).sum()  # 4 + 4 MB, then freed

    assert peak(one_after_the_other) == pytest.approx(8 * MB, rel=1e-3)
    kept = []
    assert peak(lambda: kept.extend(torch.zeros(MB) for _ in range(10))) == pytest.approx(40 * MB, rel=1e-3)


def test_peak_bytes_leave_out_what_was_there_before():
    weight = torch.randn(1000, 1000)
    assert peak(lambda: (weight.view(-1)[:10] + 1, weight.T)) < 1000


def sleepy(seconds):
    base = two_modes()

    def network(inner):
        def slow(x, t, labels=None):
            time.sleep(seconds)
            return inner(x, t, labels)

        return slow

    return replace(base, models=tuple(replace(m, network=network(m.network)) for m in base.models))


def test_timed_gives_seconds_per_model():
    timing = timed("t_stitch", sleepy(0.01), n_samples=2, repeats=3, n_steps=6, fractions=(0.5,))
    assert timing.repeats == 3 and timing.spread >= 0 and ("CPU" in timing.machine or torch.cuda.is_available())
    assert set(timing.by_model) == {"wiener", "exact"}
    for seconds in timing.by_model.values():
        assert 0.03 <= seconds <= timing.seconds  # three sleeps of 0.01 s each
    assert timing.seconds >= sum(timing.by_model.values()) * 0.99
    assert 0 < timing.peak_bytes < MB


def test_timed_can_be_stopped_and_needs_a_repeat():
    with pytest.raises(Cancelled):
        timed("ddim", sleepy(0.001), stop=lambda: True)
    with pytest.raises(ValueError, match="repeats=0"):
        timed("ddim", two_modes(), repeats=0)


def test_meters_of_runs_at_the_same_time_do_not_mix():
    problem, costs = two_modes(), {}

    def job(n):
        costs[n] = run("ddim", problem, n_samples=n, n_steps=20).cost.evaluations["exact"]

    threads = [threading.Thread(target=job, args=(n,)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert costs == {1: 20, 2: 40, 3: 60}
