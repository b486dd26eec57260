"""AutoDiffusion: an evolutionary search for the timesteps, and the layers to skip at each, of a trained model.

Source: arXiv 2309.10438, sections 3.2 to 3.4. Nothing is trained. A candidate is a falling list of distinct timesteps
and, for each, a set of blocks of the network that are skipped there; its fitness is a distance of the few samples made
with it from the data. Where the paper leaves it open, what follows is this module's choice and is said to be so.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from workbench import quality
from workbench.methods.denoising.timesteps import shares_of
from workbench.problems.denoising import Denoising, DiscreteSchedule
from workbench.problems.skipping import skippable, unet_of, variant_name, with_skips
from workbench.registry import get
from workbench.runs import Run, run
from workbench.search._history import BudgetSpent, Entry, History, Score, key

FITNESS = ("frechet_distance", "wasserstein_1", "energy_distance")  # the first of these that a problem judges
STAGES = 5  # epochs of the first stage at most; also in how many equal rises the allowed share of skips reaches its top
INITIAL_MUTATION = 0.1  # probability per timestep, for the mutants of the uniform sequence that the search starts from
TRIES = 10  # per wanted child, before a generation does without it: others are duplicates (theirs: no end to it)


@dataclass(frozen=True)
class Candidate:
    """Timesteps of the problem's schedule, noisiest first, and the names of the blocks skipped at each."""

    timesteps: tuple[float, ...]
    skips: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, steps: Iterable[tuple[float, Iterable[str]]]) -> Candidate:
        """From (timestep, skipped blocks) in any order: a step's skips stay with its timestep when both are sorted."""
        ordered = sorted(((t, tuple(sorted(skips))) for t, skips in steps), reverse=True)
        return cls(tuple(t for t, _ in ordered), tuple(skips for _, skips in ordered))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Candidate:
        return cls(tuple(fields["timesteps"]), tuple(tuple(names) for names in fields["skips"]))

    @property
    def json(self) -> dict[str, Any]:
        return {"timesteps": list(self.timesteps), "skips": [list(names) for names in self.skips]}

    @property
    def steps(self) -> list[tuple[float, tuple[str, ...]]]:
        return list(zip(self.timesteps, self.skips, strict=True))

    def layers(self, n_layers: int) -> int:
        """How many blocks are computed along the whole trajectory, of a network that has n_layers to skip."""
        return sum(n_layers - len(names) for names in self.skips)


@dataclass(frozen=True)
class Space:
    """What may be searched: the allowed timesteps (ascending), the blocks that may be skipped, and the budget.

    n_steps: of a candidate that skips nothing; its blocks in all, n_steps * len(layers), are what no candidate exceeds.
    """

    times: tuple[float, ...]
    n_steps: int
    layers: tuple[str, ...] = ()

    @property
    def max_layers(self) -> int:
        return self.n_steps * len(self.layers)

    def uniform(self) -> Candidate:
        """Every (1 / n_steps)-th of the allowed timesteps, from the noisiest down: 999, 749, 499, 249 of 1000.

        That is the spacing "trailing". The authors' code starts from "leading", 750, 500, 250, 0, which never tells
        the network that its input is pure noise.
        """
        n = len(self.times)
        places = [math.floor(n * (self.n_steps - i) / self.n_steps + 0.5) - 1 for i in range(self.n_steps)]
        return Candidate.of((self.times[place], ()) for place in places)

    def has(self, candidate: Candidate) -> bool:
        """Whether its timesteps are distinct and its blocks within the budget."""
        return (len(set(candidate.timesteps)) == len(candidate.timesteps)
                and candidate.layers(len(self.layers)) <= self.max_layers
                and (bool(self.layers) or len(candidate.timesteps) == self.n_steps))

    def draw(self, source: random.Random, max_skips: int) -> Candidate:
        """A candidate by chance, each step with up to max_skips blocks skipped, as many steps as the budget allows.

        One step is drawn from the cleanest 1 / n_steps of the times: without one there, noise is left in the samples.
        That is ours: the authors' code draws any timesteps.
        """
        counts = self._counts(source, max_skips)
        low = self.times[: math.ceil(len(self.times) / self.n_steps)]
        last = source.choice(low)
        others = source.sample([t for t in self.times if t != last], len(counts) - 1)
        return Candidate.of((t, source.sample(self.layers, count))
                            for t, count in zip([last, *others], counts, strict=True))

    def _counts(self, source: random.Random, max_skips: int) -> list[int]:
        """Skipped blocks for each step of a random candidate."""
        if not max_skips:
            return [0] * self.n_steps
        total, counts, left = len(self.layers), list[int](), self.max_layers
        while left >= total - max_skips and len(counts) < len(self.times):
            counts.append(source.randint(max(total - left, 0), max_skips))
            left -= total - counts[-1]
        return counts


def mutate(space: Space, parent: Candidate, source: random.Random, m_prob: float, max_skips: int) -> Candidate:
    """Each timestep, with probability m_prob, becomes one that is not in use; so does each skipped block of a step.

    A step that skips nothing begins, with probability m_prob, to skip up to max_skips blocks.
    """
    free = [t for t in space.times if t not in parent.timesteps]
    steps = []
    for t, skips in parent.steps:
        if free and source.random() < m_prob:
            t = free.pop(source.randrange(len(free)))
        steps.append((t, _mutate_skips(space, skips, source, m_prob, max_skips) if max_skips else skips))
    return Candidate.of(steps)


def _mutate_skips(space: Space, skips: Sequence[str], source: random.Random, m_prob: float, max_skips: int
                  ) -> Sequence[str]:
    if not skips:
        return source.sample(space.layers, source.randint(0, max_skips)) if source.random() < m_prob else skips
    free = [name for name in space.layers if name not in skips]
    mutated = list(skips)
    for i in range(len(mutated)):
        if free and source.random() < m_prob:
            mutated[i] = free.pop(source.randrange(len(free)))
    return mutated


def cross(first: Candidate, second: Candidate, source: random.Random) -> Candidate:
    """Each step, with its skips, from one parent or the other by the flip of a coin; then sorted.

    Where one parent has more steps, the child takes its last ones as well. A child may hold a timestep twice.
    """
    shared = min(len(first.timesteps), len(second.timesteps))
    longer = first if len(first.timesteps) > shared else second
    steps = [a if source.random() < 0.5 else b for a, b in zip(first.steps, second.steps, strict=False)]
    return Candidate.of([*steps, *longer.steps[shared:]])


@dataclass(frozen=True)
class Found:
    """What a search found, how that holds on noise the search never saw, and what the search cost.

    best: of least fitness in history. uniform: the evenly spaced sequence it is compared with. problem: the searched
    problem with one more model per set of blocks that best skips; run("timesteps", found.problem, **found.knobs) is
    best. confirmed, rivals: runs of best and of uniform on the same fresh seeds.
    """

    best: Candidate
    uniform: Candidate
    history: History
    problem: Denoising
    knobs: Mapping[str, Any]
    confirmed: tuple[Run, ...]
    rivals: tuple[Run, ...]

    @property
    def evaluations(self) -> int:
        """Network rows that the search spent, without those of the confirmation."""
        return self.history.spent


def autodiffusion(problem: Denoising, n_steps: int, *, metric: str | None = None, n_samples: int = 1000,
                  solver: str = "ddim", guidance: float = 1.0, times: Sequence[float] | None = None,
                  max_skip: float = 0.0, population: int = 50, mutation: int = 25, crossover: int = 10,
                  select: int = 10, m_prob: float = 0.25, epochs: int = 10, seed: int = 0,
                  budget: float = math.inf, path: str | os.PathLike[str] | None = None,
                  stop: Callable[[], bool] = lambda: False, on_entry: Callable[[Entry], object] | None = None,
                  n_confirm: int | None = None, confirm_seeds: int = 3) -> Found:
    """Search the timesteps, and with max_skip > 0 the layers to skip, of the problem's best model at a given cost.

    n_steps: evaluations per sample and branch; with layers skipped, as many steps as compute no more blocks in all.
    metric: of the problem's judge, the fitness (default: the first of FITNESS that it has). n_samples: per candidate,
    all from the noise of `seed`. times: the allowed timesteps (default: all of a table's, or 1000 even ones).
    max_skip: the largest share of the blocks that a step may skip. population, mutation, crossover: candidates per
    epoch, those by mutation and by crossover of the `select` best so far; the rest is random. m_prob: per timestep.
    epochs: generations, the first one included. In a first stage of 5 epochs, or until the best stays the same, nothing
    is skipped; then the allowed share rises by max_skip / 5 per epoch.

    The history is kept at `path`, where a search that was killed goes on, without evaluating anything twice. stop() is
    asked before each candidate, on_entry(entry) told after each. The search ends early, its best stands, and
    history.note says why, where the next candidate does not fit `budget` or a whole generation finds no new one in
    TRIES times as many tries.
    Costs sum over candidates of n_samples * steps * branches network rows, at most population * epochs candidates, and
    twice confirm_seeds * n_confirm (default: n_samples) samples for the confirmation on seeds after `seed`.
    Raises ValueError for arguments out of range, Cancelled where stop() is true, and what `History` and `run` raise.
    """
    _check(locals())
    times = None if times is None else sorted(float(t) for t in times)
    space = _space(problem, n_steps, times, max_skip)
    rows = n_samples * problem.branches(guidance)
    history = History(
        {"search": "autodiffusion", "problem": problem.name, "digest": problem.digest,
         "method": get("timesteps").version, "metric": metric, "n_samples": n_samples, "solver": solver,
         "guidance": guidance, "n_steps": n_steps, "times": times, "layers": space.layers,
         "max_skip": max_skip, "population": population, "mutation": mutation, "crossover": crossover,
         "select": select, "m_prob": m_prob, "seed": seed},
        path, budget=budget, stop=stop, on_entry=on_entry)

    def settings(candidate: Candidate) -> tuple[Denoising, dict[str, Any]]:
        return _settings(problem, candidate, solver, guidance)

    def ask(candidate: Candidate) -> float:
        def evaluate() -> Score:
            variant, knobs = settings(candidate)
            made = run("timesteps", variant, seed, n_samples, **knobs)
            name, fitness = _fitness(made, metric)
            return Score(fitness, made.cost.total_evaluations, made.cost.total_flops, {"metric": name})

        return history.ask(candidate.json, evaluate, rows * len(candidate.timesteps)).fitness

    try:
        if not evolve(space, ask, max_skip=max_skip, population=population, mutation=mutation, crossover=crossover,
                      select=select, m_prob=m_prob, epochs=epochs, seed=seed):
            history.note = (f"no new candidate: {len(history)} of at most {population * epochs} were found, and "
                            f"none of {TRIES * population} more tried was new")
    except BudgetSpent as spent:
        history.note = str(spent)
        if not len(history):
            raise ValueError(f"budget={budget}: expected at least {rows * n_steps}, one candidate's cost") from None
    best, uniform = Candidate.from_json(history.best.candidate), space.uniform()
    fresh = range(seed + 1, seed + 1 + confirm_seeds)
    (found, knobs), (plain, even) = settings(best), settings(uniform)
    n = n_samples if n_confirm is None else n_confirm
    return Found(best, uniform, history, found, knobs, tuple(run("timesteps", found, s, n, **knobs) for s in fresh),
                 tuple(run("timesteps", plain, s, n, **even) for s in fresh))


def evolve(space: Space, ask: Callable[[Candidate], float], *, max_skip: float, population: int, mutation: int,
           crossover: int, select: int, m_prob: float, epochs: int, seed: int) -> bool:
    """The evolution itself, as `autodiffusion` says; ask(candidate) -> fitness, once per candidate.

    False where it ended early because a whole generation found nothing new.
    """
    source = random.Random(seed)
    seen: dict[str, tuple[float, Candidate]] = {}  # of this call, not of a history that a former call has filled

    def breed(wanted: int, make: Callable[[], Candidate]) -> int:
        born = 0
        for _ in range(TRIES * wanted):
            if born == wanted:
                break
            child = make()
            if space.has(child) and key(child.json) not in seen:
                seen[key(child.json)] = (ask(child), child)
                born += 1
        return born

    even = space.uniform()
    breed(1, lambda: even)
    breed(population // 2, lambda: space.draw(source, 0))
    breed(population - 1 - population // 2, lambda: mutate(space, even, source, INITIAL_MUTATION, 0))

    def generation(parents: Sequence[Candidate], most: int) -> int:
        born = breed(mutation, lambda: mutate(space, source.choice(parents), source, m_prob, most))
        born += breed(crossover, lambda: cross(source.choice(parents), source.choice(parents), source))
        return born + breed(population - born, lambda: space.draw(source, most))

    level, former = 0, None
    for epoch in range(epochs - 1):
        parents = [candidate for _, candidate in sorted(seen.values(), key=lambda pair: pair[0])[:select]]
        if level or parents[0] == former or epoch >= STAGES:
            level = min(level + 1, STAGES)
        former = parents[0]
        if not generation(parents, int(max_skip * level / STAGES * len(space.layers) + 1e-9)):
            return False
    return True


def _space(problem: Denoising, n_steps: int, times: Sequence[float] | None, max_skip: float) -> Space:
    schedule = problem.schedule
    layers = skippable(unet_of(problem.models[-1])) if max_skip else ()
    if times is None:
        n = len(schedule.alphas_cumprod) if isinstance(schedule, DiscreteSchedule) else 1000
        times = schedule.times(n, "trailing")
    allowed = tuple(sorted(times))
    inside = all(0 <= share <= 1 for share in shares_of(schedule, allowed))
    if isinstance(schedule, DiscreteSchedule):
        inside = inside and all(t == int(t) for t in allowed)
    if not inside or any(a == b for a, b in pairwise(allowed)) or len(allowed) < n_steps:
        raise ValueError(f"times={allowed}: expected at least n_steps={n_steps} distinct ones of the schedule, from "
                         f"{schedule.cleanest:g} to {schedule.times(1, 'trailing')[0]:g}, whole in a table")
    return Space(allowed, n_steps, layers)


def _settings(problem: Denoising, candidate: Candidate, solver: str, guidance: float
              ) -> tuple[Denoising, dict[str, Any]]:
    """The problem with a model per set of skipped blocks, and the knobs of `timesteps` that run the candidate on it."""
    variant = with_skips(problem, candidate.skips)
    names = [model.name for model in variant.models]
    places = [names.index(variant_name(problem.models[-1], skips)) for skips in candidate.skips]
    shares = tuple(place / (len(names) - 1) if len(names) > 1 else 1.0 for place in places)
    return variant, {"n_steps": len(candidate.timesteps), "timesteps": shares_of(problem.schedule, candidate.timesteps),
                     "models": shares, "solver": solver, "guidance": guidance}


def _fitness(made: Run, metric: str | None) -> tuple[str, float]:
    """The name and the value of what is minimised."""
    names = FITNESS if metric is None else (metric,)
    name = next((n for n in names if n in made.quality), None)
    if name is None:
        raise ValueError(f"metric={metric!r}: expected one of those that the problem's judge gives for n_samples="
                         f"{made.inputs.n_samples}: {', '.join(made.quality) or 'none'}")
    sign = -1 if quality.METRICS[name].higher_is_better else 1
    return name, sign * made.quality[name].value


def _check(given: Mapping[str, Any]) -> None:
    """Raise ValueError for what cannot be searched with, naming the argument, its value and what is allowed."""
    for name, low in (("n_steps", 1), ("n_samples", 1), ("population", 1), ("mutation", 0), ("crossover", 0),
                      ("select", 1), ("epochs", 1), ("seed", 0), ("confirm_seeds", 0)):
        value = given[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name}={value!r}: expected an integer of at least {low}")
    if given["mutation"] + given["crossover"] > given["population"]:
        raise ValueError(f"mutation={given['mutation']} and crossover={given['crossover']}: expected at most "
                         f"population={given['population']} together")
    for name, top in (("m_prob", 1.0), ("max_skip", 1.0)):
        if not 0 <= given[name] <= top:
            raise ValueError(f"{name}={given[name]!r}: expected a number from 0 to {top:g}")
