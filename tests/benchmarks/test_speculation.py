"""Seconds of the host's part of speculative decoding at one position: `make bench`. Nothing else should run then."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from workbench.speculation.acceptance import optimal, optimal_counts, optimal_many
from workbench.speculation.rules import RULES, contest

COUNTS = range(1, 9)


def laws(*shape: int, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Target and draft laws: normal log probabilities of deviation 3, the draft's with noise of deviation .7."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=shape)
    noisy = logits + 0.7 * rng.normal(size=shape)
    target, draft = (np.exp((x - x.max(axis=-1, keepdims=True)) / temperature) for x in (logits, noisy))
    return target / target.sum(axis=-1, keepdims=True), draft / draft.sum(axis=-1, keepdims=True)


def measure(benchmark, record_seconds: Callable[[str, float, float], None], what: str, aim: float,
            once: Callable[[], object]) -> None:
    benchmark.pedantic(once, rounds=7, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(milliseconds=1000 * seconds, ratio_to_aim=seconds / aim)
    record_seconds(what, seconds, aim)


@pytest.mark.parametrize(("drafting", "aim"), [("iid", 0.04), ("without", 0.4)])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_optimum_at_128k_tokens(benchmark, record_seconds, drafting: str, aim: float, temperature: float) -> None:
    target, draft = laws(128_000, temperature=temperature)
    what = f"optimum of 1 to 8 drafts, V = 128k, {drafting}, temperature {temperature}"
    measure(benchmark, record_seconds, what, aim, lambda: optimal_counts(target, draft, COUNTS, drafting))


def test_optimum_of_256_positions(benchmark, record_seconds) -> None:
    target, draft = laws(256, 4096)
    measure(benchmark, record_seconds, "optimum of 4 drafts at 256 positions, V = 4096, iid", 0.1,
            lambda: optimal_many(target, draft, 4))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_optimal_rule(benchmark, record_seconds, n: int) -> None:
    target, draft = laws(2048)
    rng = np.random.default_rng(0)
    tokens = rng.choice(len(draft), size=n, p=draft).tolist()
    measure(benchmark, record_seconds, f"optimal rule, one verdict of {n} drafts, V = 2048", 0.05,
            lambda: RULES["optimal"].verify(target, draft, tokens, rng.random))
    kept = float(np.minimum(target, contest(target, draft, n).law).sum())
    benchmark.extra_info["share_of_optimum"] = kept / optimal(target, draft, n).acceptance
