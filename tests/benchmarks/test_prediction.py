"""Predicted against measured speed of drafts on the embedded models, in one run: `make bench`, nothing else running.

The yardstick is plain decoding in the same engine, by the same passes; a last row sets that beside `target.generate`.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch

from workbench.problems.decoding import Decoding, rank_acceptance
from workbench.problems.language import docs
from workbench.speculation.engine import Warp, speculate
from workbench.speculation.growing import StaticGrower
from workbench.speculation.rules import RULES
from workbench.speculation.speed import measure_engine, predict_speed
from workbench.speculation.trees import Shape, chain, expected_tokens, widths

SHAPES = {"chain of 1": chain(1), "chain of 2": chain(2), "chain of 3": chain(3), "chain of 4": chain(4),
          "widths 2, 2": widths((2, 2)), "widths 3, 1": widths((3, 1))}
N_TOKENS, ROUNDS, RULE = 96, 12, RULES["rrs_without"]


def decode(problem: Decoding, shape: Shape, seed: int) -> tuple[float, float]:
    """Seconds per token and tokens per block."""
    prompts = problem.prompts(seed + 1)[seed:]
    begin, n_blocks = time.perf_counter(), 0
    for _ in speculate(problem.target, problem.draft("best") if shape.n_nodes else None, prompts, N_TOKENS,
                       lambda row, uniform: StaticGrower(shape, RULE.drafting, uniform), RULE,
                       [np.random.default_rng(seed).random]):
        n_blocks += 1
    return (time.perf_counter() - begin) / N_TOKENS, N_TOKENS / n_blocks


def test_predicted_and_measured_speed(benchmark, record_ratio) -> None:
    problem = docs(("small",))
    ranks = rank_acceptance(problem, "best", Warp(), 4, n_positions=256)
    for shape in SHAPES.values():
        decode(problem, shape, 0)
    costs = measure_engine(problem.target, problem.draft("best"), problem.prompts(1), list(SHAPES.values()), RULE,
                           n_tokens=N_TOKENS)
    ratios: dict[str, list[float]] = {name: [] for name in SHAPES}
    yields: dict[str, list[float]] = {name: [] for name in SHAPES}
    generated: list[float] = []
    module = problem.target.module
    for turn in range(ROUNDS):
        plain, _ = decode(problem, Shape(()), turn)
        for name, shape in SHAPES.items():
            seconds, tokens = decode(problem, shape, turn)
            ratios[name].append(plain / seconds)
            yields[name].append(tokens)
        prompt = torch.tensor(problem.prompts(turn + 1)[turn:])
        begin = time.perf_counter()
        module.generate(prompt, max_new_tokens=N_TOKENS, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
        generated.append((time.perf_counter() - begin) / N_TOKENS / plain)
    benchmark.pedantic(lambda: decode(problem, chain(2), 0), rounds=1)
    for name, shape in SHAPES.items():
        for how, tokens in (("yield by ranks", expected_tokens(shape, ranks)),
                            ("measured yield", statistics.fmean(yields[name]))):
            predicted = predict_speed(tokens, shape, costs.target, costs.draft)
            low, high = predicted.interval
            record_ratio(f"{name}: predicted times plain decoding, {how} {tokens:.2f}",
                         (predicted.speedup, (high - low) / 2), None)
        record_ratio(f"{name}: measured times plain decoding", middle(ratios[name]), None)
    record_ratio("target.generate / plain decoding in the engine, seconds", middle(generated), None)


def middle(values: list[float]) -> tuple[float, float]:
    low, high = statistics.quantiles(values, n=4)[::2]
    return statistics.median(values), (high - low) / 2


def test_gain_of_recorded_passes(benchmark, record_ratio, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.speculation import causal

    problem, made = docs(("small",)), causal.recording
    found = []
    for turn in range(ROUNDS):
        seconds = []
        for recording in (made, lambda module, kinds: None):
            monkeypatch.setattr(causal, "recording", recording)
            seconds.append(decode(problem, Shape(()), 0)[0])
        found += [seconds[1] / seconds[0]] if turn else []
    monkeypatch.setattr(causal, "recording", made)
    benchmark.pedantic(lambda: decode(problem, Shape(()), 0), rounds=1)
    record_ratio("plain decoding by the module's own passes / by recorded ones, seconds", middle(found), None)
