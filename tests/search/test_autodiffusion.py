"""AutoDiffusion on toys whose best schedule is known, its operators, its budget of layers, and its resumption."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from workbench import run
from workbench.methods.denoising.timesteps import shares_of
from workbench.problems.glyphs import glyphs
from workbench.problems.mixtures import eight_modes, two_modes
from workbench.quality import Quality
from workbench.runs import Cancelled
from workbench.search import autodiffusion as module
from workbench.search._history import History
from workbench.search.autodiffusion import Candidate, Space, autodiffusion, cross, evolve, mutate

TWELVE = tuple((i + 1) / 12 for i in range(12))
N = 500
EVOLUTION = {"max_skip": 0.0, "population": 50, "mutation": 25, "crossover": 10, "select": 10, "m_prob": 0.25,
             "epochs": 10, "seed": 0}


@cache
def modes():
    """The toy of eight modes, judged by the same distance without its standard error, which takes most of the time."""
    problem = eight_modes()
    level = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    wanted = torch.quantile(problem.data(100_000, 7), level, dim=0)

    def judge(answer, labels):
        apart = (torch.quantile(answer, level, dim=0) - wanted).abs().mean()
        return {"wasserstein_1": Quality(float(apart), float("nan"), len(answer))}

    return replace(problem, judge=judge)


def distance(times, seed=0):
    problem = modes()
    made = run("timesteps", problem, seed, N, n_steps=len(times), timesteps=shares_of(problem.schedule, times))
    return made.quality["wasserstein_1"].value


@cache
def brute_force():
    """The least distance of all 495 schedules of four of the twelve times."""
    return min(distance(times[::-1]) for times in itertools.combinations(TWELVE, 4))


@cache
def found():
    """300 candidates of the toy, of which one evaluation is four network rows per sample."""
    return autodiffusion(modes(), 4, times=TWELVE, n_samples=N, budget=300 * 4 * N, epochs=20)


# ---- the oracle: a space small enough to be searched in full ---------------------------------------------------------

def assert_it_finds_the_best(result):
    uniform = result.history.entries[0].fitness
    assert result.history.entries[0].candidate == result.uniform.json
    assert len(result.history) <= 300 and result.evaluations == 4 * N * len(result.history)
    assert result.history.best.fitness < 0.8 * uniform
    assert result.history.best.fitness <= 1.05 * brute_force()


def test_it_finds_the_best_of_all_schedules():
    assert_it_finds_the_best(found())


def test_the_oracle_fails_for_an_evolution_that_keeps_the_worst(monkeypatch):
    def worst(space, ask, **knobs):
        evolve(space, lambda candidate: -ask(candidate), **knobs)

    monkeypatch.setattr(module, "evolve", worst)
    result = autodiffusion(modes(), 4, times=TWELVE, n_samples=N, budget=100 * 4 * N, epochs=20, population=10,
                           mutation=9, crossover=1)
    with pytest.raises(AssertionError):
        assert_it_finds_the_best(result)


def test_it_holds_on_noise_that_the_search_never_saw():
    result = found()
    assert [r.inputs.seed for r in result.confirmed] == [1, 2, 3] == [r.inputs.seed for r in result.rivals]
    for best, uniform in zip(result.confirmed, result.rivals, strict=True):
        assert best.cost == uniform.cost
        assert best.quality["wasserstein_1"].value < 0.8 * uniform.quality["wasserstein_1"].value
    again = run("timesteps", result.problem, 0, N, **result.knobs)
    assert again.quality["wasserstein_1"].value == result.history.best.fitness
    even = run("ddim", modes(), 1, N, n_steps=4)
    full = autodiffusion(modes(), 4, n_samples=N, epochs=1, population=1, mutation=0, crossover=0)
    torch.testing.assert_close(full.rivals[0].answer, even.answer, rtol=1e-9, atol=1e-9)


# ---- the evolution ---------------------------------------------------------------------------------------------------

SPACE = Space(tuple(range(1000)), 4)
LAYERED = Space(tuple(range(100)), 4, tuple("abcdefghij"))


def searched(space=SPACE, target=(700, 300, 200, 5), **knobs):
    """The candidates of an evolution towards `target`, in order, with their fitness."""
    asked = []

    def ask(candidate):
        close = sum(abs(a - b) for a, b in zip(candidate.timesteps, target, strict=False))
        asked.append((candidate, close + 10.0 * sum(map(len, candidate.skips))))
        return asked[-1][1]

    evolve(space, ask, **{**EVOLUTION, **knobs})
    return asked


def assert_no_candidate_is_asked_for_twice(asked):
    names = [str(candidate.json) for candidate, _ in asked]
    assert len(names) == len(set(names))


def test_every_candidate_is_new_and_fits():
    for asked in (searched(), searched(LAYERED, max_skip=0.5), searched(Space(tuple(range(6)), 4))):
        assert_no_candidate_is_asked_for_twice(asked)
        for candidate, _ in asked:
            assert list(candidate.timesteps) == sorted(set(candidate.timesteps), reverse=True)
    assert len(searched(Space(tuple(range(6)), 4))) == 15  # all that there are, and it ends
    assert len(searched()) == 50 * 10
    assert_no_candidate_is_asked_for_twice([*searched(epochs=2)])
    with pytest.raises(AssertionError):
        assert_no_candidate_is_asked_for_twice([*searched(epochs=2), *searched(epochs=1)])


def test_a_search_says_why_it_ended_early():
    few = autodiffusion(modes(), 4, times=TWELVE[:6], n_samples=20, confirm_seeds=0)
    assert len(few.history) == 15 and few.history.note.startswith("no new candidate: 15 of at most 500")
    short = autodiffusion(modes(), 4, n_samples=20, confirm_seeds=0, budget=4 * 4 * 20)
    assert len(short.history) == 4 and "exceed the budget of 320" in short.history.note
    assert quick_search().history.note == ""


def test_the_search_gets_closer():
    asked = searched()
    assert min(f for _, f in asked) < 0.2 * min(f for _, f in asked[:50])


def test_the_same_seed_gives_the_same_history_and_another_one_another():
    torch.manual_seed(1)
    random.seed(1)
    first = searched()
    before = random.getstate()
    assert searched() == first and random.getstate() == before
    assert searched(seed=1) != first


def test_the_first_generation():
    """The uniform sequence, half of it random with a step at the clean end, half mutants of the uniform one."""
    asked = [candidate for candidate, _ in searched(epochs=1)]
    uniform = Candidate((999, 749, 499, 249), ((),) * 4)
    assert len(asked) == 50 and asked[0] == uniform
    assert all(candidate.timesteps[-1] < 250 for candidate in asked[1:26])
    kept = [len(set(candidate.timesteps) & set(uniform.timesteps)) for candidate in asked[26:]]
    assert min(kept) >= 1 and sum(kept) / len(kept) > 2.5


def assert_crossover_stays_within_the_parents(make):
    pool = [Space(tuple(range(1000)), 6).draw(random.Random(i), 0) for i in range(10)]
    union, source = {step for parent in pool for step in parent.steps}, random.Random(0)
    for _ in range(300):
        child = make(source.choice(pool), source.choice(pool), source)
        assert set(child.steps) <= union
        if len(set(child.timesteps)) == 6:
            pool.append(child)
    assert len(pool) > 50


def test_crossover_alone_never_leaves_the_parents_steps():
    assert_crossover_stays_within_the_parents(cross)
    asked = searched(m_prob=0.0, mutation=0, crossover=20, population=20, epochs=4, select=20)
    first = {t for candidate, _ in asked[:20] for t in candidate.timesteps}
    assert len(asked) == 80 and {t for candidate, _ in asked for t in candidate.timesteps} == first


def test_the_crossover_check_fails_for_a_twin_that_averages():
    def middle(a, b, source):
        return Candidate.of(((s + t) // 2, ()) for s, t in zip(a.timesteps, b.timesteps, strict=True))

    with pytest.raises(AssertionError):
        assert_crossover_stays_within_the_parents(middle)


def test_mutation_changes_the_share_of_steps_it_is_told_to():
    parent, source = SPACE.uniform(), random.Random(0)
    assert mutate(SPACE, parent, source, 0.0, 0) == parent
    changed = [4 - len(set(mutate(SPACE, parent, source, 0.25, 0).timesteps) & set(parent.timesteps))
               for _ in range(2000)]
    assert sum(changed) / 8000 == pytest.approx(0.25, abs=0.015)
    whole = mutate(SPACE, parent, source, 1.0, 0)
    assert not set(whole.timesteps) & set(parent.timesteps) and len(set(whole.timesteps)) == 4


def test_skips_mutate_too_and_stay_with_their_timestep():
    """An implementation can compare where it means to assign; steps that skip something would then never change."""
    parent = Candidate.of([(10, "ab"), (50, ""), (30, "c"), (90, "")])
    assert parent.timesteps == (90, 50, 30, 10) and parent.skips == ((), (), ("c",), ("a", "b"))
    source = random.Random(0)
    children = [dict(mutate(LAYERED, parent, source, 0.25, 4).steps) for _ in range(400)]
    at_ten = [set(child[10]) for child in children if 10 in child]
    assert all(len(skips) == 2 for skips in at_ten)
    assert sum(len(skips - {"a", "b"}) for skips in at_ten) / (2 * len(at_ten)) == pytest.approx(0.25, abs=0.04)
    at_fifty = [len(child[50]) for child in children if 50 in child]
    assert max(at_fifty) == 4 and 0.1 < sum(map(bool, at_fifty)) / len(at_fifty) < 0.3
    first, second = Candidate.of([(9, "a"), (5, "b")]), Candidate.of([(8, "c"), (3, "d"), (1, "e")])
    own = {9: ("a",), 5: ("b",), 8: ("c",), 3: ("d",), 1: ("e",)}
    for _ in range(50):
        child = cross(first, second, source)
        assert all(own[t] == skips for t, skips in child.steps) and child.timesteps[-1] == 1


# ---- layers ----------------------------------------------------------------------------------------------------------

def test_nothing_is_skipped_in_the_first_stage_then_more_and_more():
    asked = searched(LAYERED, target=(70, 30, 20, 5), max_skip=0.5, epochs=12)
    most = [max(len(names) for candidate, _ in asked[i : i + 50] for names in candidate.skips)
            for i in range(0, len(asked), 50)]
    first = next(i for i, count in enumerate(most) if count)
    assert 1 < first <= 6 and most[:first] == [0] * first  # the uniform one is not best twice, so not at once
    assert all(count <= max(i - first + 1, 0) for i, count in enumerate(most) if i < first + 5)
    assert max(most) == 5


def test_the_layers_skipped_buy_steps_within_the_budget():
    asked = searched(LAYERED, max_skip=0.5, epochs=12)
    steps = {len(candidate.timesteps) for candidate, _ in asked}
    assert max(steps) > 4
    for candidate, _ in asked:
        assert candidate.layers(10) <= LAYERED.max_layers == 40
    for i in range(200):
        candidate = LAYERED.draw(random.Random(i), 5)
        assert 40 - candidate.layers(10) < 5 or len(candidate.timesteps) == 8  # no further step would fit
        assert max(map(len, candidate.skips)) <= 5
    over = Candidate.of((t, "") for t in range(5))
    assert LAYERED.has(LAYERED.uniform()) and not LAYERED.has(over)
    assert not SPACE.has(over) and not SPACE.has(Candidate((1, 1, 2, 3), ((),) * 4))


def test_layers_of_a_network_are_searched_at_a_true_price():
    """The embedded model, few samples: metered FLOPs fall with the layers, and never exceed the full network's."""
    base = glyphs(("s", "b"))
    quick = replace(base, judge=lambda answer, labels: {"energy_distance": Quality(float(answer.std()), 0.0, 4)})
    result = autodiffusion(quick, 3, n_samples=4, max_skip=0.5, population=8, mutation=3, crossover=2, epochs=9,
                           guidance=1.5, n_confirm=4, confirm_seeds=1)
    full = base.flops["B"] * 4 * 2
    counts = [(sum(map(len, e.candidate["skips"])), len(e.candidate["timesteps"]), e) for e in result.history.entries]
    assert max(skipped for skipped, _, _ in counts) > 3 and max(steps for _, steps, _ in counts) > 3
    for skipped, steps, entry in counts:
        assert entry.evaluations == 8 * steps
        assert entry.flops == full * steps if not skipped else entry.flops < full * steps
    again = run("timesteps", result.problem, 0, 4, **result.knobs)
    assert again.cost.total_flops == result.history.best.flops
    assert float(again.answer.std()) == result.history.best.fitness


# ---- the history -----------------------------------------------------------------------------------------------------

def quick_search(path=None, **changed):
    knobs = {"n_samples": 50, "population": 20, "mutation": 10, "crossover": 4, "epochs": 4, "confirm_seeds": 0}
    return autodiffusion(modes(), 4, path=path, **{**knobs, **changed})


def assert_best_so_far_is_monotone(history):
    best = history.best_so_far()
    assert best == sorted(best, reverse=True) and best[-1] == history.best.fitness


def test_best_so_far_is_monotone_and_evaluations_add_up(monkeypatch):
    history = found().history
    assert_best_so_far_is_monotone(history)
    assert history.spent == sum(4 * N for _ in history.entries)
    mixture = modes().flops["exact"]
    assert history.flops == history.spent * mixture
    monkeypatch.setattr(History, "best_so_far", lambda self: [e.fitness for e in self.entries])
    with pytest.raises(AssertionError):
        assert_best_so_far_is_monotone(history)


def test_same_seed_same_history(monkeypatch):
    whole = quick_search().history.entries
    assert quick_search().history.entries == whole
    assert quick_search(seed=1).history.entries != whole
    monkeypatch.setattr(module, "random", SimpleNamespace(Random=lambda seed: random.SystemRandom()))
    assert quick_search().history.entries != whole


def assert_memo_hits_are_never_evaluated_again(tmp_path, monkeypatch):
    whole, path = quick_search(), tmp_path / "history.jsonl"
    told = []
    with pytest.raises(Cancelled):
        quick_search(path, on_entry=told.append, stop=lambda: len(told) == 33)
    runs = []
    monkeypatch.setattr(module, "run", lambda *given, **knobs: runs.append(knobs["timesteps"]) or run(*given, **knobs))
    resumed = quick_search(path)
    assert resumed.history.entries == whole.history.entries and resumed.best == whole.best
    assert len(runs) == len(set(runs)) == len(whole.history) - 33
    quick_search(path)
    assert len(runs) == len(whole.history) - 33


def test_memo_hits_are_never_evaluated_again(tmp_path, monkeypatch):
    assert_memo_hits_are_never_evaluated_again(tmp_path, monkeypatch)


def test_the_memo_check_fails_for_a_history_that_always_evaluates(tmp_path, monkeypatch):
    def always(self, candidate, evaluate, cost, ask=History.ask):
        if candidate in self:
            evaluate()
        return ask(self, candidate, evaluate, cost)

    monkeypatch.setattr(History, "ask", always)
    with pytest.raises(AssertionError):
        assert_memo_hits_are_never_evaluated_again(tmp_path, monkeypatch)


def test_a_search_goes_on_with_more_epochs_or_a_larger_budget(tmp_path):
    path = tmp_path / "history.jsonl"
    short = quick_search(path, epochs=2, budget=25 * 4 * 50)
    assert len(short.history) == 25
    assert quick_search(path).history.entries == quick_search().history.entries
    with pytest.raises(ValueError, match="another search"):
        quick_search(path, m_prob=0.5)


KILLED = textwrap.dedent("""
    import os, signal, sys
    from workbench.problems.mixtures import two_modes
    from workbench.search.autodiffusion import autodiffusion
    seen = []

    def kill(entry):
        seen.append(entry)
        if len(seen) == 17:
            with open(sys.argv[1], "ab", buffering=0) as file:
                file.write(b'{"candidate":{"timesteps":[0.9')
            os.kill(os.getpid(), signal.SIGKILL)

    autodiffusion(two_modes(), 3, n_samples=20, population=12, mutation=6, crossover=2, epochs=3, on_entry=kill,
                  path=sys.argv[1])
""")


def test_a_killed_search_gives_the_history_of_one_that_was_not(tmp_path, root):
    path = tmp_path / "history.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=root, env={**os.environ}, timeout=200)
    assert done.returncode == -signal.SIGKILL
    new = []

    def search(**more):
        return autodiffusion(two_modes(), 3, n_samples=20, population=12, mutation=6, crossover=2, epochs=3,
                             confirm_seeds=0, **more).history

    resumed, whole = search(path=path, on_entry=new.append), search()
    assert resumed.entries == whole.entries and len(new) == len(whole) - 17
    assert History(resumed.search, path).entries == whole.entries


@pytest.mark.parametrize(("changed", "message"), [
    ({"n_steps": 0}, "n_steps=0"), ({"population": 0}, "population=0"), ({"select": 0}, "select=0"),
    ({"mutation": 30, "crossover": 30}, "mutation=30 and crossover=30.*population=50"),
    ({"m_prob": 1.5}, "m_prob=1.5.*0 to 1"), ({"max_skip": -0.1}, "max_skip=-0.1"), ({"seed": -1}, "seed=-1"),
    ({"max_skip": 0.5}, "U-Nets only"), ({"times": (0.5, 1.0)}, "at least n_steps=4"),
    ({"times": (0.0, 0.2, 0.5, 1.0)}, "from 0.001 to 1"), ({"times": (0.2, 0.2, 0.5, 1.0)}, "distinct"),
    ({"metric": "frechet_distance"}, "metric='frechet_distance'.*wasserstein_1"), ({"budget": 10}, "budget=10.*2000"),
])
def test_what_cannot_be_searched_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        autodiffusion(modes(), **{"n_steps": 4, "n_samples": N, **changed})
