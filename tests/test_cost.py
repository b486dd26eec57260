"""The meter: rows not calls, seconds per model, peak bytes."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.flop_counter import FlopCounterMode

from workbench import Cancelled, run, timed
from workbench.cost import Counted, Meter, flops_per_row, machine, measure
from workbench.problems.mixtures import two_dim, two_modes
from workbench.rng import of_samples

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


class Attending(torch.nn.Module):
    """A transformer of one layer, written with torch's attention or with its plain formula."""

    def __init__(self, attend, d=24, n_heads=3):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(d, 3 * d), torch.nn.Linear(d, d)
        self.attend, self.n_heads = attend, n_heads

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def plain_attention(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v


ATTENTIONS = {"as torch chooses": sdpa, "causal": partial(sdpa, is_causal=True), "plain": plain_attention,
              "masked": lambda q, k, v: sdpa(q, k, v, attn_mask=torch.ones(q.shape[-2], k.shape[-2]).bool().tril())}
BACKENDS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
N_TOKENS, WIDTH = 40, 24
BY_HAND = 2 * N_TOKENS * WIDTH * 4 * WIDTH + 2 * 2 * N_TOKENS**2 * WIDTH  # matrices of 3 + 1 widths, scores and values


def assert_attention_counts(count):
    x = torch.randn(1, N_TOKENS, WIDTH)
    for attend in ATTENTIONS.values():
        assert count(Attending(attend), x) == BY_HAND
        for backend in BACKENDS:
            with sdpa_kernel(backend):
                assert count(Attending(attend), x) == BY_HAND


def test_attention_counts_whatever_computes_it():
    assert_attention_counts(flops_per_row)


def test_the_attention_check_fails_for_torchs_own_counter():
    def bare(network, x):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(x)
        return counter.get_total_flops()

    with pytest.raises(AssertionError):
        assert_attention_counts(bare)


def test_flops_of_a_unet_do_not_depend_on_the_kernel_of_attention():
    unet = UNet2DModel(sample_size=8, in_channels=2, out_channels=2, block_out_channels=(16, 32), norm_num_groups=8,
                       layers_per_block=1, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    row = torch.randn(1, 2, 8, 8), torch.tensor([1])
    counts = [flops_per_row(unet, *row)]
    for backend in BACKENDS:
        with sdpa_kernel(backend):
            counts.append(flops_per_row(unet, *row))
    for part in unet.modules():
        if isinstance(part, Attention):
            part.set_processor(AttnProcessor())  # the plain formula
    counts.append(flops_per_row(unet, *row))
    with torch.no_grad(), FlopCounterMode(display=False) as bare:
        unet(*row)
    assert set(counts) == {float(bare.get_total_flops())}


def test_a_network_that_knows_its_work_is_believed():
    def network(x):
        return x

    meter = Meter({"a": lambda x: (2 * len(x), 5.0)})
    meter.wrap("a", network)(torch.zeros(3, 1))
    assert meter.cost.evaluations == {"a": 6} and meter.cost.flops == {"a": 5.0} and meter.cost.calls == {"a": 1}


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
    assert timing.repeats == 3 and timing.spread >= 0 and "CPU" in timing.machine
    assert set(timing.by_model) == {"wiener", "exact"}
    for seconds in timing.by_model.values():
        assert 0.03 <= seconds <= timing.seconds  # three sleeps of 0.01 s each
    once = timed("t_stitch", sleepy(0.01), n_samples=2, repeats=1, n_steps=6, fractions=(0.5,))
    assert once.seconds >= sum(once.by_model.values())  # of medians of several this need not hold
    assert 0 < timing.peak_bytes < MB


def test_timed_names_the_device_that_the_models_are_on(monkeypatch):
    """Where a GPU is there and in use by others, but these models run on the CPU."""
    nothing = SimpleNamespace(max_memory_allocated=lambda *i: 0, memory_allocated=lambda *i: 0, device_count=lambda: 1,
                              reset_peak_memory_stats=lambda *i: None, synchronize=lambda *i: None,
                              get_device_name=lambda *i: "a GPU", is_available=lambda: True,
                              is_initialized=lambda: True)
    for name, stub in vars(nothing).items():
        monkeypatch.setattr(torch.cuda, name, stub)
    timing = timed("ddim", two_modes(), n_samples=2, repeats=1, n_steps=2)
    assert timing.machine == machine() == machine("cpu") != machine("cuda") == "a GPU"
    assert "CPU" in timing.machine and timing.peak_bytes > 0

    def on_the_gpu(meter):
        meter.device = torch.device("cuda")

    monkeypatch.setattr(torch, "get_device_module", lambda device: nothing)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda i: 7)
    timing = measure(on_the_gpu, {}, repeats=1)
    assert (timing.machine, timing.peak_bytes) == ("a GPU", 7)


def test_a_meter_knows_where_answers_lie():
    meter = Meter({"a": 1.0})
    for device in ("cpu", "meta"):
        meter.wrap("a", lambda x, device=device: [torch.zeros(2, device=device)])(torch.zeros(3, 1))
        assert meter.device.type == device


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


def test_a_price_may_be_a_function_of_the_call_and_tell_rows_apart():
    kept = torch.tensor([2, 9, 4])
    meter = Meter({"block": lambda x, n_kept: (len(x), 100.0 * n_kept.double())}, n_samples=3)
    meter.wrap("block", lambda x, n_kept: x)(torch.zeros(3, 65), kept)
    assert meter.cost.evaluations == {"block": 3} and meter.cost.flops == {"block": 1500.0}
    assert meter.spent.tolist() == [200.0, 900.0, 400.0]


def test_other_work_is_counted_in_units_of_its_own():
    meter = Meter({"a": 1.0}, {"pairs": Counted("pairs", lambda x, y: len(x) * len(y)), "looks": Counted("looks")})
    distances, look = meter.wrap("pairs", torch.cdist), meter.wrap("looks", lambda x: x)
    assert distances(torch.zeros(3, 2), torch.ones(5, 2)).shape == (3, 5) and len(look([1, 2])) == 2
    assert meter.cost.counted == {"pairs": 15.0, "looks": 2.0} and meter.cost.evaluations == {"a": 0}
    assert meter.cost.amount("pairs") == 15 and meter.cost.amount("flops") == 0 == meter.cost.amount("evaluations")
    with pytest.raises(KeyError, match="no cost 'rays'; there are evaluations, flops, pairs, looks"):
        meter.cost.amount("rays")


def test_what_each_sample_spends():
    meter = Meter({"a": 10.0}, n_samples=4)
    network = meter.wrap("a", lambda x: x)
    network(torch.zeros(4, 1))
    network(torch.zeros(8, 1))  # two branches of guidance
    with of_samples([3, 1]):
        network(torch.zeros(2, 1))
        network(torch.zeros(4, 1))
    assert meter.spent.tolist() == [30.0, 60.0, 30.0, 60.0]
    network(torch.zeros(3, 1))  # of whom?
    assert meter.spent is None and meter.cost.total_flops == 210


@pytest.mark.parametrize(("method", "knobs"), [
    ("dpm_solver_adaptive", {"n_steps": 200}), ("flow_ode", {"solver": "rk45", "n_steps": 2})])
def test_samplers_that_choose_their_steps_say_for_whom(method, knobs):
    """A sample spends what it spends, whatever samples are beside it."""
    five, two = (run(method, two_dim(), 0, n, **knobs).spent for n in (5, 2))
    assert torch.equal(five[:2], two) and len(five.unique()) > 1
