"""Skipping layers of U-Nets: exactly their work is left out, nothing else changes, and nobody else notices."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from workbench import run
from workbench.cost import ATTENTION, flops_per_row
from workbench.problems import skipping as module
from workbench.problems.glyphs import glyphs
from workbench.problems.mixtures import two_modes
from workbench.problems.skipping import skippable, skipping, unet_of, variant_name, with_skips


@pytest.fixture(scope="module")
def unet():
    """A U-Net of a user's own: two resolutions, attention, residual blocks with and without a 1x1 projection."""
    torch.manual_seed(0)
    return UNet2DModel(sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=2,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"), norm_num_groups=4, attention_head_dim=8,
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"), mid_block_scale_factor=2.0).eval()


@pytest.fixture(scope="module")
def text_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16),
                                layers_per_block=1, cross_attention_dim=6, attention_head_dim=4, norm_num_groups=4,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


def call(net, rows=1):
    x = torch.linspace(-1, 1, rows * 128).reshape(rows, 2, 8, 8)
    text = {"encoder_hidden_states": torch.ones(rows, 3, 6)} if isinstance(net, UNet2DConditionModel) else {}
    with torch.no_grad():
        return net(x, torch.full((rows,), 500), return_dict=False, **text)[0]


def flops(called):
    """FLOPs of all that a function computes."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter, torch.no_grad():
        called()
    return counter.get_total_flops()


def given_to(name, net):
    """A block and what it is called with. Torch's counts by module mix in those of other threads; its totals do not."""
    seen, block = [], dict(net.named_modules())[name]
    hook = block.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
    call(net)
    hook.remove()
    return block, *seen[0]


def assert_exactly_these_flops_are_left_out(net, leave_out):
    """leave_out(net, names): a context. A 1x1 projection stays, its FLOPs by hand: 2 x inputs x outputs x pixels."""
    whole = flops(lambda: call(net))
    for name in skippable(net):
        block, given, named = given_to(name, net)
        branch = flops(lambda block=block, given=given, named=named: block(*given, **named))
        projection = getattr(block, "conv_shortcut", None)
        if projection is not None:
            branch -= 2 * projection.in_channels * projection.out_channels * given[0].shape[-1] ** 2
        assert branch > 0
        with leave_out(net, [name]):
            assert flops(lambda: call(net)) == whole - branch, name
    assert flops(lambda: call(net)) == whole


def test_skipping_leaves_out_exactly_the_layers_flops(unet, text_unet):
    for net in (unet, text_unet):
        assert_exactly_these_flops_are_left_out(net, skipping)


def test_the_flops_check_fails_where_the_work_is_done_and_thrown_away(unet):
    class after_the_fact:
        def __init__(self, net, names):
            self.blocks = [block for name, block in net.named_modules() if name in names]

        def __enter__(self):
            self.hooks = [b.register_forward_hook(lambda block, given, out: given[0]) for b in self.blocks]

        def __exit__(self, *_):
            for hook in self.hooks:
                hook.remove()

    with pytest.raises(AssertionError):
        assert_exactly_these_flops_are_left_out(unet, after_the_fact)


def test_flops_of_a_plain_residual_block_by_hand(unet):
    """Two 3x3 convolutions of 8 channels on 8x8 pixels, and the projection of the 32 numbers of the time embedding."""
    whole = flops(lambda: call(unet))
    with skipping(unet, ["down_blocks.0.resnets.1"]):
        assert whole - flops(lambda: call(unet)) == 2 * (2 * 9 * 8 * 8 * 64) + 2 * 32 * 8


def assert_nothing_skipped_is_the_network_bit_by_bit(net, context):
    full = call(net, 3)
    with context(net, []):
        assert torch.equal(call(net, 3), full)
    for name in skippable(net):
        with context(net, [name]):
            assert not torch.equal(call(net, 3), full), name
        assert torch.equal(call(net, 3), full), name


def test_nothing_skipped_is_the_network_bit_by_bit(unet, text_unet):
    for net in (unet, text_unet):
        assert_nothing_skipped_is_the_network_bit_by_bit(net, skipping)


def test_the_bitwise_check_fails_for_a_context_that_rounds(unet):
    @contextmanager
    def rounding(net, names):
        hook = net.mid_block.register_forward_hook(lambda block, given, out: out.half().float())
        try:
            with skipping(net, names):
                yield
        finally:
            hook.remove()

    with pytest.raises(AssertionError):
        assert_nothing_skipped_is_the_network_bit_by_bit(unet, rounding)


def test_a_skipped_block_is_its_shortcut(unet, text_unet):
    """As if its branch gave zero: the last layer of the branch is set to zero in a copy."""
    for net in (unet, text_unet):
        for name in skippable(net):
            twin = deepcopy(net)
            block = dict(twin.named_modules())[name]
            last = next(getattr(block, n) for n in ("conv2", "proj_out", "to_out") if hasattr(block, n))
            for parameter in last.parameters():
                parameter.data.zero_()
            with skipping(net, [name]):
                torch.testing.assert_close(call(net), call(twin), rtol=1e-5, atol=1e-6)


def test_all_is_as_it_was_afterwards(unet):
    before = {name: dict(block.__dict__) for name, block in unet.named_modules()}
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(ZeroDivisionError), skipping(unet, skippable(unet)):
        assert "forward" in unet.mid_block.resnets[0].__dict__
        raise ZeroDivisionError
    assert {name: dict(block.__dict__) for name, block in unet.named_modules()} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unet.state_dict().items())
    assert not module._USERS and not module._BEFORE


def test_a_forward_of_ones_own_is_kept(unet):
    block, calls = unet.mid_block.resnets[0], []
    full = block.forward
    block.forward = own = lambda *given: calls.append(1) or full(*given)
    try:
        with skipping(unet, ["mid_block.resnets.0"]):
            call(unet)
        assert block.forward is own and not calls
        with skipping(unet, ["mid_block.resnets.1"]):
            call(unet)
        assert len(calls) == 1
    finally:
        del block.forward


def test_contexts_nest(unet):
    first, second = skippable(unet)[:2]
    with skipping(unet, [first, second]):
        both = call(unet)
    with skipping(unet, [first]):
        one = call(unet)
        with skipping(unet, [second, first]):
            assert torch.equal(call(unet), both)
        assert torch.equal(call(unet), one)


def assert_threads_do_not_disturb_each_other(unet, context):
    names = skippable(unet)
    wanted = [[], names[:1], names[1:4], names]
    alone = []
    for skips in wanted:
        with skipping(unet, skips):
            alone.append(call(unet))
    gate, wrong = threading.Barrier(len(wanted)), []

    def work(i):
        for _ in range(10):
            gate.wait()
            with context(unet, wanted[i]):
                gate.wait()  # all are inside now, with sets of their own
                if not torch.equal(call(unet), alone[i]):
                    wrong.append(i)
                gate.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_do_not_disturb_each_other(unet):
    assert_threads_do_not_disturb_each_other(unet, skipping)


def test_the_thread_check_fails_for_one_set_for_all(unet, monkeypatch):
    class Shared:
        """A context variable that all threads see."""

        def __init__(self):
            self.value = frozenset()

        def get(self):
            return self.value

        def set(self, value):
            before, self.value = self.value, value
            return before

        def reset(self, before):
            self.value = before

    monkeypatch.setattr(module, "_SKIPPED", Shared())
    with pytest.raises(AssertionError):
        assert_threads_do_not_disturb_each_other(unet, skipping)


def test_wrong_names_are_told(unet):
    for wrong in (["down_blocks.9"], ["conv_in"], ["down_blocks.0.downsamplers.0"], [""]):
        with pytest.raises(ValueError, match="cannot be skipped; allowed: down_blocks"), skipping(unet, wrong):
            pass
    with pytest.raises(ValueError, match="not one text"), skipping(unet, "mid_block.resnets.0"):
        pass
    with pytest.raises(ValueError, match="U-Nets only"):
        unet_of(two_modes().models[-1])


@pytest.fixture(scope="module")
def letters():
    return glyphs(("s", "b"))


def test_metered_flops_are_those_computed(letters):
    """Of a run whose steps skip different blocks: the meter against torch's own count over the whole run."""
    best = letters.models[-1]
    names = skippable(best.module)
    skips = [names[:5], (), names[-3:], ()]
    problem = with_skips(letters, skips)
    models = [model.name for model in problem.models]
    assert models == ["S", *sorted({variant_name(best, s) for s in skips if s}, key=problem.flops.get), "B"]
    shares = tuple(models.index(variant_name(best, s)) / (len(models) - 1) for s in skips)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        made = run("timesteps", problem, n_samples=3, guidance=1.5, models=shares)
    network = sum(rows * problem.flops[name] for name, rows in made.cost.evaluations.items())
    assert made.cost.total_flops == network == 6 * (sum(problem.flops[variant_name(best, s)] for s in skips))
    judged = counter.get_total_flops() - network
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        letters.judge(made.answer, letters.labels(3))
    assert judged == counter.get_total_flops()
    assert network < 24 * letters.flops["B"]


def test_variants_skipping_nothing_are_the_problem_itself(letters):
    assert with_skips(letters, [(), ()]) is letters
    names = skippable(letters.models[-1].module)
    one, other = with_skips(letters, [names[:1]]), with_skips(letters, [names[1:2]])
    assert len({letters.digest, one.digest, other.digest}) == 3
    assert with_skips(letters, [names[:2], names[1::-1], names[:2]]).digest == with_skips(letters, [names[:2]]).digest
    full = run("timesteps", letters, n_samples=2).answer
    assert torch.equal(run("timesteps", one, n_samples=2).answer, full)
    assert not torch.equal(run("timesteps", one, n_samples=2, models=(0.5,)).answer, full)
    row = torch.zeros(1, *letters.shape), torch.zeros(1, dtype=torch.int64), letters.labels(1)
    with skipping(letters.models[-1].module, names[:1]):
        assert flops_per_row(letters.models[-1].network, *row) == one.flops[one.models[1].name]
