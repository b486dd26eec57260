"""Randomness by sample: one generator per sample, so that a sample does not depend on the batch it is drawn in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

# torch's CPU generator reads only the low 32 bits of what it is seeded with. Both factors are odd, so samples of one
# seed never share a stream, nor do equal samples of different seeds; the high bits of a seed are folded in.
_PER_SEED, _PER_SAMPLE = 1_000_003, 0x9E3779B97F4A7C15


_OF_SAMPLES: ContextVar[Sequence[int] | None] = ContextVar("the samples that a call is for", default=None)


@contextmanager
def of_samples(samples: Sequence[int]) -> Iterator[None]:
    """Inside, the rows of every call belong to these samples, in order (or so many times over), not to all of the run.

    For methods whose samples need not all go on: what each spends is metered apart.
    """
    token = _OF_SAMPLES.set(samples)
    try:
        yield
    finally:
        _OF_SAMPLES.reset(token)


def samples_of_call() -> Sequence[int] | None:
    """The samples that `of_samples` names where this is called; None outside."""
    return _OF_SAMPLES.get()


class Rng:
    """The random source of a run: sample i draws from its own stream, fixed by (seed, first + i).

    seed: any integer; n_samples: at least 1; first: index of the first sample, to continue an earlier batch.
    The global generator of torch is never touched.
    """

    def __init__(self, seed: int, n_samples: int, first: int = 0) -> None:
        if n_samples < 1:
            raise ValueError(f"n_samples={n_samples!r}: expected at least 1")
        self.seed, self.n_samples, self.first = seed, n_samples, first
        folded = seed ^ (seed >> 32) * 0x85EBCA6B
        self._shared: dict[str, torch.Generator] = {}
        self._streams = [
            torch.Generator().manual_seed((folded * _PER_SEED + (first + i) * _PER_SAMPLE) % 2**63)
            for i in range(n_samples)
        ]

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal (n_samples, *shape), each row from its sample's own stream; drawn on the CPU."""
        out = torch.empty((self.n_samples, *shape), dtype=dtype)
        for row, stream in zip(out.unbind(), self._streams, strict=True):
            row.normal_(generator=stream)
        return out.to(device)

    def stream(self, sample: int) -> torch.Generator:
        """One sample's own stream, for what torch draws from a generator (permutations, choices)."""
        return self._streams[sample]

    def shared(self, name: str) -> torch.Generator:
        """The stream of what all samples share by design (an index, an order of batches), fixed by (seed, name).

        The same for any number of samples; each name is a stream of its own, which goes on from call to call.
        """
        if name not in self._shared:
            digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
            self._shared[name] = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
        return self._shared[name]

    def uniforms(self, sample: int) -> Callable[[int], np.ndarray]:
        """uniform(n) -> (n,) float64 numbers in [0, 1) from one sample's own stream."""
        stream = self._streams[sample]
        return lambda n: torch.rand(n, generator=stream, dtype=torch.float64).numpy()
