"""S3: the search for a solver schedule, by a learned ranking of candidates, by plain evolution, or by chance.

    space = Space(problem.schedule, n_evaluations=6, end=problem.schedule.cleanest)
    history = search(FlowError(problem, starts), space, n_candidates=200, path="history.jsonl")
    plan = plan_of(history.best)

Source: arXiv 2312.07243, section 4. A search is resumed by calling it again with the same path.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from workbench.methods.denoising._march import MEMORY
from workbench.plan import CORRECTORS, MAX_ORDER, PREDICTIONS, RELAXATIONS, Decision, Expansion, Plan, preset_plan
from workbench.problems.denoising import Point, Schedule, grid, power_grid
from workbench.runs import Cancelled
from workbench.search._history import Entry, History, Score
from workbench.search.solver import Fitness

STRATEGIES = ("s3", "evolution", "random")
ORDER_WEIGHTS = (0.2, 0.4, 0.3, 0.1)  # of orders 1 to 4, as the authors' released search draws them
CORRECTOR_WEIGHTS = (0.5, 0.4, 0.1)  # of none, pseudo, implicit; theirs: (0.5, 0.5, 0)
SEEDS = ("ddim", "dpmpp_2m", "dpmpp_3m_taylor", "deis_2", "deis_3", "unipc_bh2")
PATIENCE = 1000  # plans drawn in a row that are all known: then the space counts as exhausted
GRIDS = (("log_rho", 1.0), ("rho", 7.0), ("t", 2.0), ("t", 1.0))


@dataclass(frozen=True)
class Space:
    """All plans of exactly n_evaluations evaluations from the schedule's noisiest level to `end` (None: the data).

    is_start_free: whether the first step may also start from a cleaner level, as on the grid "leading"; the noise is
    taken for a state there, which it nearly is as long as hardly any signal is left.
    The other fields are the probabilities and widths of a mutation: `change` of each field of each decision and of
    each time, `resize` for a step more and as much for one less, time_sigma in log-SNR, slope_sigma of the linear
    relaxation. `change`, `resize`, slope_sigma and the odds of orders are those of the authors' released evolution.
    Ours: time_sigma .2 (theirs multiplies a time by 1 + .08 z, or .06 z, for EDM as much in log-SNR); the odds of
    correctors, .5, .4 and .1 for none, pseudo and implicit (theirs .5, .5 and 0); other relaxations than the linear
    one, other starting points than the newest, their odds, and the grids of `sample`. Left out: the authors'
    analytical first step, which saves an evaluation, coefficients of a U-Net's skips, DPM-Solver-v3's prediction.
    Raises ValueError where n_evaluations is less than 1.
    """

    schedule: Schedule
    n_evaluations: int
    end: float | None = None
    is_start_free: bool = False
    change: float = 0.3
    resize: float = 0.2
    time_sigma: float = 0.2
    slope_sigma: float = 0.03

    def __post_init__(self) -> None:
        if self.n_evaluations < 1:
            raise ValueError(f"n_evaluations={self.n_evaluations!r}: expected at least 1")

    @cached_property
    def ends(self) -> tuple[Point, Point]:
        """The noisiest level, and the cleanest that a step may start from or the plan ends at."""
        return (self.schedule.at(self.schedule.times(1, "trailing")[0]),
                self.schedule.at(self.schedule.cleanest if self.end is None else self.end))

    def seeds(self) -> list[Plan]:
        """Known solvers on known grids."""
        grids = [self._grid(*how, self.n_evaluations) for how in GRIDS]
        if self.is_start_free and self.end in (None, self.schedule.cleanest):
            grids.append(grid(self.schedule, self.n_evaluations, "leading", "zero" if self.end is None else "cleanest"))
        return [preset_plan(name, points) for name in SEEDS for points in grids]

    def sample(self, source: random.Random) -> Plan:
        """A plan at random: a grid of random power with random shifts, and random decisions."""
        points = self._grid(source.choice(("t", "rho", "log_rho")), source.uniform(1, 7), self.n_evaluations)
        first, *inner = [p.log_snr for p in points if p.sigma > 0 and p.t != self.end]
        gap = (self.ends[1].log_snr - self.ends[0].log_snr) / self.n_evaluations
        inner = [l + source.gauss(0, 0.2 * gap) for l in inner]
        levels = [source.uniform(first, first + gap) if self.is_start_free else first, *inner]
        return self._made(levels, [self._decision(source) for _ in range(self.n_evaluations)], source)

    def mutate(self, plan: Plan, source: random.Random) -> Plan:
        """A neighbour: a step more or less, shifted times, other decisions; each with its probability."""
        levels, decisions = self._levels(plan), list(plan.decisions)
        chance = source.random()
        if chance < self.resize:
            self._insert(levels, decisions, source)
        elif chance > 1 - self.resize:
            self._remove(levels, decisions, source)
        fixed = 0 if self.is_start_free else 1
        levels[fixed:] = [l + source.gauss(0, self.time_sigma) if source.random() < self.change else l
                          for l in levels[fixed:]]
        for i, decision in enumerate(decisions):
            fresh = self._decision(source)
            fields = [f for f in ("prediction", "expansion", "start", "corrector") if source.random() < self.change]
            decision = replace(decision, **{f: getattr(fresh, f) for f in fields})
            terms = decision.expansion
            if terms.relaxation == "linear" and source.random() < self.change:
                terms = replace(terms, slope=terms.slope + source.gauss(0, self.slope_sigma))
            decisions[i] = replace(decision, expansion=terms)
        return self._made(levels, decisions, source)

    def cross(self, a: Plan, b: Plan, source: random.Random) -> Plan:
        """A child of two plans: each field from one parent, or, every second time, each step's decisions from one."""
        if len(a.decisions) != len(b.decisions):
            return source.choice((a, b))
        levels = self._levels(source.choice((a, b)))
        if source.random() < 0.5:
            return self._made(levels, [source.choice(pair) for pair in zip(a.decisions, b.decisions, strict=True)],
                              source)
        of = {f: source.choice((a, b)) for f in ("prediction", "expansion", "start", "corrector")}
        decisions = [Decision(**{f: getattr(parent.decisions[i], f) for f, parent in of.items()})
                     for i in range(len(a.decisions))]
        return self._made(levels, decisions, source)

    def features(self, plan: Plan) -> Tensor:
        """What the ranking sees of a plan: (n_evaluations, n_features), one row per step, unused rows 0."""
        low, high = (p.log_snr for p in self.ends)
        places = [(l - low) / (high - low) for l in (*self._levels(plan), high)]
        rows = torch.zeros((self.n_evaluations, 8 + MAX_ORDER + len(RELAXATIONS) + len(CORRECTORS)))
        for i, d in enumerate(plan.decisions):
            terms = d.expansion
            rows[i] = torch.tensor([
                1.0, places[i], places[i + 1], (places[i + 1] - places[i]) * self.n_evaluations, d.prediction == "eps",
                terms.points[0] / 3 if terms.points else (terms.order - 1) / 3, terms.slope * 5, d.start / 3,
                *(terms.order == k + 1 for k in range(MAX_ORDER)), *(terms.relaxation == r for r in RELAXATIONS),
                *(d.corrector == c for c in CORRECTORS)])
        return rows

    def _grid(self, phase: str, power: float, n_steps: int) -> list[Point]:
        if self.end is None or self.end == self.schedule.cleanest:
            return power_grid(self.schedule, n_steps, phase, power, "zero" if self.end is None else "cleanest")
        whole = [p for p in power_grid(self.schedule, n_steps, phase, power, "cleanest")[:-1] if p.t > self.end]
        if len(whole) < n_steps:  # too many fell beyond this end
            low, high = (p.log_snr for p in self.ends)
            shares = [i / n_steps for i in range(n_steps)]
            whole = [self.ends[0], *(self.schedule.at(self.schedule.t_at(low + (high - low) * s)) for s in shares[1:])]
        return [*whole, self.ends[1]]

    def _levels(self, plan: Plan) -> list[float]:
        """The log-SNR of the starts of all steps."""
        return [self.schedule.at(t).log_snr for t in plan.times]

    def _decision(self, source: random.Random) -> Decision:
        order = source.choices(range(1, MAX_ORDER + 1), ORDER_WEIGHTS)[0]
        kind = source.choice(RELAXATIONS) if order > 1 and source.random() < 0.5 else "none"
        slope = source.gauss(0, 10 * self.slope_sigma) if kind == "linear" else 0.0
        points: tuple[int, ...] = ()
        if order > 2 and source.random() < 0.3:
            points = (source.randrange(1, order - 1), *([order - 1] * (order - 2)))  # the slope at low order
        corrector = source.choices(CORRECTORS, CORRECTOR_WEIGHTS)[0]
        start = source.randrange(1, MEMORY) if source.random() < 0.1 else 0
        return Decision(source.choice(PREDICTIONS), Expansion(order, points, kind, slope), start, corrector)

    def _insert(self, levels: list[float], decisions: list[Decision], source: random.Random) -> None:
        level = source.uniform(*(p.log_snr for p in self.ends))
        place = max(sum(l < level for l in levels), 1)
        levels.insert(place, level)
        decisions.insert(place, self._decision(source))

    def _remove(self, levels: list[float], decisions: list[Decision], source: random.Random) -> None:
        if len(levels) > 1:
            place = source.randrange(1, len(levels))
            del levels[place], decisions[place]

    def _made(self, levels: list[float], decisions: list[Decision], source: random.Random) -> Plan:
        """The valid plan of the right cost that is nearest to what was drawn."""
        levels, decisions = list(levels), list(decisions)
        decisions[-1] = replace(decisions[-1], corrector="none")
        while True:
            surplus = len(decisions) + sum(d.corrector == "implicit" for d in decisions[:-1]) - self.n_evaluations
            if surplus == 0:
                break
            if surplus < 0:
                self._insert(levels, decisions, source)
            elif len(decisions) > 1 and (len(decisions) > self.n_evaluations or source.random() < 0.5):
                self._remove(levels, decisions, source)
            else:
                i = source.choice([i for i, d in enumerate(decisions[:-1]) if d.corrector == "implicit"])
                decisions[i] = replace(decisions[i], corrector="pseudo")
        times = self._spread(levels if self.is_start_free else [self.ends[0].log_snr, *levels[1:]])
        fitted = [_fitted(d, i, is_last=i == len(decisions) - 1, to_data=self.end is None)
                  for i, d in enumerate(decisions)]
        return Plan(tuple(times), tuple(fitted), self.end)

    def _spread(self, levels: list[float]) -> list[float]:
        """Times of the levels in order, at least a thousandth of the range from each other and from the end."""
        low, high = (p.log_snr for p in self.ends)
        gap, n = (high - low) / 1000, len(levels)
        least, out = low - gap, []
        for i, level in enumerate(sorted(levels)):
            least = min(max(level, least + gap), high - (n - i) * gap)
            out.append(self.ends[0].t if least <= low else self.schedule.t_at(least))
        return out


def search(fitness: Fitness, space: Space, *, n_candidates: int = 200, strategy: str = "s3", seed: int = 0,
           path: str | os.PathLike[str] | None = None, batch: int = 20, n_parents: int = 15, crossover: float = 0.3,
           explore: float = 0.2, stop: Callable[[], bool] = lambda: False,
           on_entry: Callable[[Entry], object] | None = None) -> History:
    """The history of evaluating n_candidates distinct plans; history.best is the found one, history.spent the cost.

    strategy: "s3", in stages: evaluate a batch, train the ranking on all that is known, let candidates evolve under
    the ranking, evaluate those it puts first (a share `explore` of the batch: plain mutants), and again. "evolution":
    children of the n_parents best, crossed with probability `crossover`, always mutated. "random": samples. All but
    the last begin with known solvers and samples. Equal n_candidates are equal budgets, for all plans of a space cost
    the same. seed: the same seed gives the same history, also over a stop or a kill where a path is given (the batch
    that was cut is evaluated again).
    stop() is asked before each batch and each entry, and whenever a plan drawn is known already; on_entry(entry) is
    told of each entry. Where PATIENCE plans drawn in a row are known, the space counts as exhausted: the history then
    holds the fewer plans that there are, and says so in `note`. A plan whose chance to be drawn is p escapes with
    probability (1 - p)^PATIENCE. Raises Cancelled on a stop, ValueError for bad arguments, or where the file at `path`
    is of another search.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: expected one of {', '.join(STRATEGIES)}")
    for name, value in (("n_candidates", n_candidates), ("batch", batch), ("n_parents", n_parents)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected at least 1")
    described = {k: v for k, v in asdict(space).items() if k != "schedule"} | {"schedule": repr(space.schedule)}
    history = History({"search": "solver schedule", "strategy": strategy, "seed": seed, "space": described,
                       "batch": batch, "n_parents": n_parents, "crossover": crossover, "explore": explore,
                       **fitness.key}, path, stop=stop, on_entry=on_entry)
    source, known = random.Random(seed), _Known(space)
    ranking = Ranking(space, seed) if strategy == "s3" else None
    barren = 0  # rounds in a row without a plan that is new
    while len(known) < n_candidates:
        if strategy == "random" or not len(known):
            first = [] if strategy == "random" else space.seeds()
            plans = known.fresh([*first, *(space.sample(source) for _ in range(batch))], len(first) + batch, stop)
        elif ranking is None:
            plans = known.fresh(known.children(source, n_parents, crossover), batch, stop)
        else:
            ranking.train(known.plans, known.fitness)
            n_mutants = round(explore * batch)
            mutants = known.fresh(known.children(source, n_parents, crossover), n_mutants, stop)
            plans = [*_evolved(ranking, known, source, batch - n_mutants, n_parents, crossover), *mutants]
            plans = known.fresh(plans, batch, stop)
        barren = 0 if plans else barren + 1
        if barren * (batch if strategy == "random" else PATIENCE) >= PATIENCE:
            history.note = (f"the space is exhausted: {len(known)} distinct plans of n_evaluations="
                            f"{space.n_evaluations} were found where n_candidates={n_candidates} were wanted, and none "
                            f"of {PATIENCE} more drawn was new")
            break
        plans = plans[: n_candidates - len(known)]
        known.add(plans, _asked(history, fitness, plans, stop))
    return history


def plan_of(entry: Entry) -> Plan:
    """The plan of an entry of a search's history."""
    return Plan.from_json(json.dumps(entry.candidate))


def confirmed(history: History, fitness: Fitness, *, top: int = 5) -> list[tuple[Plan, float]]:
    """The `top` plans of a search with their fitness on data that it never saw, best first.

    The least of many noisy figures is too good to be true: report these. fitness: as the search's, of other starting
    states or of another seed.
    """
    best = sorted(history.entries, key=lambda e: e.fitness)[:top]
    plans = [plan_of(entry) for entry in best]
    return sorted(zip(plans, fitness(plans), strict=True), key=lambda pair: pair[1])


class Ranking(nn.Module):
    """The performance predictor: an LSTM over a plan's steps and a score, trained to order plans as fitness does.

    Source: arXiv 2312.07243, section 4: trained with a ranking loss, here the pairwise hinge max(0, margin - (s_i -
    s_j)) over pairs of which i is the worse. Training goes on from the last state when there is more data. The global
    random source is left as it was.
    """

    def __init__(self, space: Space, seed: int, width: int = 48) -> None:
        super().__init__()
        self.space = space
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            n_features = space.features(space.seeds()[0]).shape[1]
            self.steps = nn.LSTM(n_features, width, batch_first=True)
            self.head = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=5e-3, weight_decay=1e-4)

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B,) of features (B, n_steps, n_features), lower is better."""
        used = features[..., :1]
        states = self.steps(features)[0] * used
        last = states[torch.arange(len(states)), used[..., 0].sum(1).long() - 1]
        return self.head(torch.cat((states.sum(1) / used.sum(1), last), 1))[:, 0]

    def train(self, plans: Sequence[Plan], fitness: Sequence[float], n_epochs: int = 40, margin: float = 0.1  # type: ignore[override]
              ) -> None:
        """Go on training for n_epochs, each over all pairs."""
        features = torch.stack([self.space.features(p) for p in plans])
        values = torch.tensor(fitness, dtype=torch.float64)
        worse = values[:, None] > values
        with torch.enable_grad():
            for _ in range(n_epochs):
                scores = self(features)
                loss = (margin - (scores[:, None] - scores)).relu()[worse].mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()

    def scores(self, plans: Sequence[Plan]) -> list[float]:
        """One score per plan, lower is better."""
        with torch.no_grad():
            return self(torch.stack([self.space.features(p) for p in plans])).tolist()


class _Known:
    """The plans of this search so far, in order, with their fitness."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.plans: list[Plan] = []
        self.fitness: list[float] = []

    def __len__(self) -> int:
        return len(self.plans)

    def add(self, plans: Sequence[Plan], fitness: Sequence[float]) -> None:
        self.plans += plans
        self.fitness += fitness

    def best(self, n: int) -> list[Plan]:
        return [self.plans[i] for i in sorted(range(len(self)), key=self.fitness.__getitem__)[:n]]

    def fresh(self, plans: Iterable[Plan], n: int, stop: Callable[[], bool]) -> list[Plan]:
        """The first n distinct plans that are not known yet; fewer where PATIENCE in a row are known."""
        seen, out, repeats = set(self.plans), list[Plan](), 0
        for plan in plans:
            if len(out) == n or repeats == PATIENCE:
                break
            if plan in seen:
                repeats += 1
                if stop():
                    raise Cancelled
            else:
                seen.add(plan)
                out.append(plan)
                repeats = 0
        return out

    def children(self, source: random.Random, n_parents: int, crossover: float) -> Iterable[Plan]:
        """Children of the best without end."""
        parents = self.best(n_parents)
        while True:
            yield _child(self.space, parents, source, crossover)


def _child(space: Space, parents: Sequence[Plan], source: random.Random, crossover: float) -> Plan:
    parent = source.choice(parents)
    if source.random() < crossover:
        parent = space.cross(parent, source.choice(parents), source)
    return space.mutate(parent, source)


def _evolved(ranking: Ranking, known: _Known, source: random.Random, n: int, n_parents: int, crossover: float,
             n_generations: int = 5, n_children: int = 60) -> list[Plan]:
    """The n unknown plans that the ranking puts first after some generations of evolution under it."""
    parents, evaluated = known.best(n_parents), set(known.plans)
    pool = dict(zip(parents, ranking.scores(parents), strict=True))
    for _ in range(n_generations):
        children = list({_child(known.space, parents, source, crossover): None for _ in range(n_children)})
        pool.update(zip(children, ranking.scores(children), strict=True))
        parents = sorted(pool, key=pool.__getitem__)[:n_parents]
    return [plan for plan in sorted(pool, key=pool.__getitem__) if plan not in evaluated][:n]


def _asked(history: History, fitness: Fitness, plans: Sequence[Plan], stop: Callable[[], bool]) -> list[float]:
    """The fitness of a batch: from the history where it has all of it, else evaluated together and kept one by one."""
    candidates: list[Any] = [json.loads(plan.to_json()) for plan in plans]
    values: list[float] = []
    if not all(c in history for c in candidates):
        if stop():
            raise Cancelled
        values = fitness(plans)
    found = []
    for i, (plan, candidate) in enumerate(zip(plans, candidates, strict=True)):
        rows = plan.evaluations * fitness.rows
        found.append(history.ask(candidate, partial(_score, values, i, rows), rows).fitness)
    return found


def _score(values: Sequence[float], i: int, rows: int) -> Score:
    return Score(values[i], rows)


def _fitted(decision: Decision, i: int, *, is_last: bool, to_data: bool) -> Decision:
    """The decision as far as step i has history, with nothing in it that has no effect."""
    before = min(i, MEMORY)
    terms, start, corrector = decision.expansion, min(decision.start, before), decision.corrector
    order = min(terms.order, before + 1)
    if is_last and to_data:
        order, start = 1, 0
    if order != terms.order:
        points = (min(terms.points[0], order - 1), *([order - 1] * (order - 2))) if terms.points and order > 2 else ()
        terms = replace(terms, order=order, points=points)
    if order == 1:
        terms = Expansion()
    if is_last:
        corrector = "none"
    correction = Expansion(2) if corrector == "none" else Expansion(min(order + 1, i + 2))
    return Decision(decision.prediction, terms, start, corrector, correction)
