"""Runs of methods with phases, named answers and series told along the way; and what a store keeps of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import pytest
import torch
from torch import Tensor

from workbench import FAMILIES, METHODS, Counted, Family, Knob, Problem, Quality, Step, Store, method, run, together
from workbench import family as families
from workbench.problems.mixtures import two_modes
from workbench.quality import METRICS, Drawn, Metric, register_metric
from workbench.runs import Run


@dataclass(frozen=True, kw_only=True)
class Pool(Problem):
    """Numbers to choose from: "score" is a network, "look" a counted callable; the cases depend on the seed."""

    score: object = staticmethod(lambda x: x.square())
    look: object = staticmethod(lambda x: x)
    family: ClassVar[str] = "choosing"
    sharing: ClassVar[str] = "memo"

    def cases(self, seed: int, n: int) -> Tensor:
        return torch.arange(n) + 10.0 * seed

    def wrapped(self, wrap):
        return replace(self, score=wrap("score", self.score), look=wrap("looks", self.look))


def judge(answer, cases) -> dict[str, Quality]:
    return {"offset": Drawn(len(cases)).mean(answer["chosen"] - cases)}


POOL = Pool(name="pool", digest="pool", judge=judge, flops={"score": 3.0}, counted={"looks": Counted("numbers")},
            reference=("choose", {"n_rounds": 3}), baseline=("choose", {"n_rounds": 1}), dtype=torch.float64)


@pytest.fixture(autouse=True)
def choose():
    before = dict(METHODS), dict(FAMILIES), dict(METRICS)
    families.register(Family("choosing", "n_rounds", lambda problem, knobs: {"chosen": (), "round": ()}, [],
                             lambda *_: None, spends="looks", axis="looks"))
    register_metric(Metric("offset", "offset", "", False, 2, "chosen less asked"))

    @method(version=1, source="doi", family="choosing", cost="n_rounds")
    def choose(problem, rng, *, n_rounds: Annotated[int, Knob(low=1, high=9, help="how many rounds of looks")] = 2
               ) -> Iterator[Step]:
        """Scores all cases, then looks at one number in each round."""
        cases = problem.cases(rng.seed, rng.n_samples)
        yield Step(problem.score(cases), {"i": 0}, "scoring")
        for i in range(n_rounds):
            problem.look(cases)
            chosen = cases + rng.normal((), problem.dtype)
            told = {"offset": chosen - cases} if i else {"first": 1.0}
            yield Step({"chosen": chosen, "round": torch.full((len(cases),), i)}, {"i": i + 1}, "looking", told)

    yield choose
    for registry, kept in zip((METHODS, FAMILIES, METRICS), before, strict=True):
        registry.clear()
        registry.update(kept)


def test_phases_named_answers_and_series():
    seen = []
    made = run("choose", POOL, 3, 4, n_rounds=3, on_step=lambda step, cost: seen.append((step.phase, cost.total_flops,
                                                                                        cost.counted["looks"])))
    assert seen == [("scoring", 12, 0), ("looking", 12, 4), ("looking", 12, 8), ("looking", 12, 12)]
    assert made.phases == (("scoring", 1), ("looking", 3)) and set(made.answer) == {"chosen", "round"}
    assert made.trace["looks"].tolist() == [0, 4, 8, 12] and made.trace["flops"].tolist() == [12.0] * 4
    assert made.trace["offset"].shape == (4, 4) and made.trace["offset"][:2].isnan().all()
    assert torch.equal(made.trace["offset"][-1], made.answer["chosen"] - POOL.cases(3, 4))
    assert [x for x in made.trace["first"].tolist() if not math.isnan(x)] == [1.0]
    figure = made.quality["offset"]
    assert torch.equal(figure.values, made.trace["offset"][-1]) and figure.value == pytest.approx(
        float(figure.values.mean()))
    assert made.cost.amount("looks") == 12 == 4 * METHODS["choose"].spends(made.knobs, {})
    assert run("choose", POOL, 3, 2, n_rounds=3).answer["chosen"].tolist() == made.answer["chosen"][:2].tolist()


def test_a_store_keeps_them_all(tmp_path):
    store = Store(tmp_path)
    made = replace(run("choose", POOL, 3, 5), quality={
        "offset": Drawn(5, torch.tensor([0, 0, 1, 1, 1]), (0.3, 0.7)).mean(torch.arange(5.0)),
        "bare": Quality(1.0, 0.5, 5)})
    store.put(made)
    back = store.get(made.inputs)
    assert back == made and set(back.tensors()) == set(made.tensors())
    for name, tensor in made.tensors().items():
        torch.testing.assert_close(back.tensors()[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert back.quality["offset"].drawn.equals(made.quality["offset"].drawn) and back.quality["bare"].values is None


def test_records_of_the_second_format_are_read(tmp_path):
    """Without phases, with a cost of three parts, and with the answer as the only tensor."""
    made = run("ddim", two_modes(), n_samples=3, n_steps=2)
    record = made.to_dict()
    del record["phases"], record["cost"]["counted"]
    back = Run.from_dict(record, {"answer": made.answer})
    assert back.inputs == made.inputs and back.cost == made.cost and back.quality == made.quality
    assert back.trace == {} and back.phases == () and back.spent is None


def test_calls_are_remembered_where_the_problem_says_so():
    calls = []
    problem = replace(POOL, score=lambda x: calls.append(len(x)) or x.square())
    given = [made.inputs for made in (run("choose", POOL, 1, 4, n_rounds=r) for r in (1, 2, 3))]
    found = together(problem, given)
    assert calls == [4] and [r.cost.evaluations["score"] for r in found] == [4, 4, 4]


def test_a_series_of_another_shape_is_refused():
    METHODS.pop("choose")

    @method(version=1, source="doi", family="choosing", cost="n_rounds")
    def choose(problem, rng, *, n_rounds: Annotated[int, Knob(low=1, high=9, help="how many rounds of looks")] = 2):
        """Tells a series of another length."""
        yield Step(torch.zeros(rng.n_samples), {"i": 0}, trace={"odd": torch.zeros(7)})

    with pytest.raises(ValueError, match=r"choose told 'odd' of shape \(7,\): expected a number or \(4,\)"):
        run("choose", POOL, 0, 4)
