"""One stream per sample: independent of the batch, distinct, normal, and apart from torch's global generator."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from workbench.rng import Rng


def check_batch_independence(source):
    """Sample i's draws, over two calls of different shape, are the same in batches of 1, 3 and 7 and when continued."""
    def draws(n, first=0):
        rng = source(5, n, first)
        return torch.cat([rng.normal((4,), torch.float64), rng.normal((2, 9), torch.float64).flatten(1)], 1)

    all_seven = draws(7)
    for n in (1, 3):
        assert torch.equal(draws(n), all_seven[:n])
    assert torch.equal(draws(3, first=4), all_seven[4:])


def check_distinct(source):
    """No two samples of four seeds, a huge one too, start alike: 4000 different first draws."""
    first = [source(seed, 1000, 0).normal((1,), torch.float64) for seed in (0, 1, 2, 2**32)]
    assert len(torch.cat(first).unique()) == 4000


class OneStream:
    """Broken twin: the batch is drawn from one stream."""

    def __init__(self, seed, n, first=0):
        self.n, self.source = n, torch.Generator().manual_seed(seed % 2**32 + first)

    def normal(self, shape, dtype):
        return torch.randn((self.n, *shape), dtype=dtype, generator=self.source)


def test_batch_independence():
    check_batch_independence(Rng)


def test_distinct_streams():
    check_distinct(Rng)


@pytest.mark.parametrize("check", [check_batch_independence, check_distinct])
def test_checks_fail_for_a_broken_twin(check):
    with pytest.raises(AssertionError):
        check(OneStream)


def test_draws_are_standard_normal_within_and_across_streams():
    across = Rng(0, 4000).normal((32,), torch.float64)  # 32 draws of each of 4000 streams
    for draws in (across.flatten(), across[:, 0], across[:, 31], Rng(1, 1).normal((20_000,), torch.float64).flatten()):
        assert stats.kstest(draws.numpy(), "norm").pvalue > 1e-3
    # neighbouring streams and neighbouring seeds are uncorrelated: 4 standard errors of a correlation of 4000 pairs
    other = Rng(1, 4000).normal((32,), torch.float64)
    for a, b in ((across[:-1, 0], across[1:, 0]), (across[:, 0], other[:, 0]), (across[:, 0], across[:, 1])):
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 4 / 4000**0.5


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    Rng(3, 5).normal((2, 2), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_shape_dtype_and_too_few_samples():
    out = Rng(0, 3).normal((2, 4), torch.float32)
    assert out.shape == (3, 2, 4) and out.dtype == torch.float32
    with pytest.raises(ValueError, match="n_samples=0"):
        Rng(0, 0)


def test_shared_streams_have_names_and_know_no_number_of_samples():
    def drawn(seed, n, name, size=5):
        return torch.randperm(1000, generator=Rng(seed, n).shared(name))[:size].tolist()

    assert drawn(1, 1, "order") == drawn(1, 9, "order") != drawn(2, 1, "order") != drawn(1, 1, "index")
    rng = Rng(1, 2)
    assert torch.rand(1, generator=rng.shared("order")) != torch.rand(1, generator=rng.shared("order"))
    before = Rng(1, 2).normal((3,), torch.float64)
    rng = Rng(1, 2)
    torch.rand(9, generator=rng.shared("order"))
    assert torch.equal(rng.normal((3,), torch.float64), before)


def test_a_sample_has_one_stream_however_it_is_drawn_from():
    a, b = Rng(3, 4), Rng(3, 4)
    assert torch.rand(6, generator=a.stream(2), dtype=torch.float64).tolist() == b.uniforms(2)(6).tolist()
