"""run(): validate, drain the method's generator, meter, judge; Run: the frozen record that everything else reads."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import platform
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import workbench
from workbench import sources
from workbench.cost import Cost, Meter, Network, Timing, measure
from workbench.knob import plain
from workbench.problem import Problem
from workbench.quality import METRICS, Drawn, Quality, drift
from workbench.registry import Answer, Method, Step, get, tensors_of
from workbench.rng import Rng

_FIGURES = ("value", "stderr", "low", "high", "df")  # of a Quality; records of older versions lack the last three


MAX_SAMPLES = 100_000  # of one run: each sample has a random stream of its own, some kilobytes
MAX_SEED = 2**63 - 1
Plain = str | int | float | bool | None  # what a knob's value, or a tuple's entry, may be in a record


class Cancelled(Exception):
    """The stop token was set; nothing was recorded."""


class JudgeError(ValueError):
    """The problem's judge failed on an answer. run: the finished run, without quality, so that nothing is lost."""

    def __init__(self, message: str, run: Run) -> None:
        super().__init__(message)
        self.run = run


@dataclass(frozen=True)
class Inputs:
    """All that determines a run. `key` and `permalink` are made from one canonical form of it.

    code is the package's version with the method's; digest is the problem's (weights and data).
    """

    method: str
    problem: str
    digest: str
    code: str
    seed: int
    n_samples: int
    knobs: Mapping[str, Any]

    @property
    def canonical(self) -> str:
        """JSON with sorted keys and no spaces; tuples are lists."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def key(self) -> str:
        """32 hexadecimal digits of the SHA-256 of the canonical form: the name of the run in a store."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:32]

    @property
    def permalink(self) -> str:
        """The canonical form packed into letters, digits, - and _."""
        return base64.urlsafe_b64encode(zlib.compress(self.canonical.encode(), 9)).decode().rstrip("=")

    @classmethod
    def from_permalink(cls, text: str) -> Inputs:
        """The inverse of `permalink`. Raises ValueError where text is none."""
        try:
            packed = base64.urlsafe_b64decode(text.strip() + "=" * (-len(text.strip()) % 4))
            unpacker = zlib.decompressobj()
            canonical = unpacker.decompress(packed, 100_000)  # a link of a few bytes must not unpack without bound
            if unpacker.unconsumed_tail:
                raise ValueError("too long")
            return cls.from_dict(json.loads(canonical))
        except (ValueError, zlib.error, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"permalink {text[:40]!r}: not one that the workbench made ({error})") from None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Inputs:
        """From the parsed canonical form. Raises ValueError that names a field that is missing, unknown or of no use.

        Bounds are checked where a run is asked for, by `inputs`.
        """
        kinds = {**dict.fromkeys(("method", "problem", "digest", "code"), str), "seed": int, "n_samples": int,
                 "knobs": dict}
        if not isinstance(fields, Mapping) or set(fields) != set(kinds):
            raise ValueError(f"fields {sorted(fields) if isinstance(fields, Mapping) else fields!r}: "
                             f"expected {', '.join(kinds)}")
        for name, kind in kinds.items():
            if not isinstance(fields[name], kind) or isinstance(fields[name], bool):
                raise ValueError(f"{name}={fields[name]!r}: expected {kind.__name__}")
        knobs = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["knobs"].items()}
        for name, value in knobs.items():
            entries = value if isinstance(value, tuple) else (value,)
            if not isinstance(name, str) or not all(isinstance(entry, Plain) for entry in entries):
                raise ValueError(f"knob {name}={value!r}: expected a number, a text or a list of these")
        return cls(**{**fields, "knobs": knobs})


@dataclass(frozen=True)
class Run:
    """One run: its inputs, cost, quality and environment; beside the record it has tensors, which are not compared.

    answer: the last step's state, (n_samples, *shape) or named tensors. trace: {series: (steps,) or (steps,
    n_samples)}, one entry per step: "evaluations" and "flops" so far, each counted resource so far, and what the steps
    told (nan at steps that did not). phases: (name, steps) in order. spent: FLOPs of each sample (n_samples,), where
    calls could be told apart by sample.
    """

    inputs: Inputs
    cost: Cost
    quality: Mapping[str, Quality]
    environment: Mapping[str, str]
    answer: Answer = field(compare=False, repr=False)
    trace: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    phases: tuple[tuple[str, int], ...] = ()
    spent: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def knobs(self) -> Mapping[str, Any]:
        return self.inputs.knobs

    @property
    def title(self) -> str:
        """The method and its knobs, for a figure of this run."""
        knobs = ", ".join(f"{name} {value}" for name, value in self.knobs.items())
        return f"{self.inputs.method} on {self.inputs.problem}: {knobs}, seed {self.inputs.seed}"

    @property
    def nbytes(self) -> int:
        """Of its tensors, in memory."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All its tensors by name: answer or answer/<name>, trace/<series>, spent, and of each metric's figure
        values/, strata/, shares/ and clusters/<metric>."""
        found = {f"answer/{name}" if name else "answer": part for name, part in tensors_of(self.answer).items()}
        found |= {f"trace/{name}": series for name, series in self.trace.items()}
        if self.spent is not None:
            found["spent"] = self.spent
        for metric, figure in self.quality.items():
            drawn = figure.drawn
            if figure.values is None or drawn is None:
                continue
            shares = None if drawn.shares is None else torch.tensor(drawn.shares, dtype=torch.float64)
            parts = {"values": figure.values, "strata": drawn.strata, "shares": shares, "clusters": drawn.clusters}
            found |= {f"{part}/{metric}": tensor for part, tensor in parts.items() if tensor is not None}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON takes it (nan and infinity as strings)."""
        record = {"inputs": asdict(self.inputs), "cost": asdict(self.cost), "environment": dict(self.environment)}
        record["quality"] = {name: {"n": q.n} | {figure: repr(getattr(q, figure)) for figure in _FIGURES}
                             for name, q in self.quality.items()}
        return record | {"phases": [list(phase) for phase in self.phases]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Run:
        """The inverse of `to_dict` and `tensors`; records of older formats have no phases and no other tensor than the
        answer. Raises ValueError, TypeError or KeyError where a field is of another kind."""
        for part in record["cost"].values():
            if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in part.values()):
                raise ValueError(f"cost {part!r}: expected numbers")
        if not all(isinstance(text, str) for text in record["environment"].values()):
            raise ValueError(f"environment {record['environment']!r}: expected texts")
        if not all(isinstance(q["n"], int) for q in record["quality"].values()):
            raise ValueError(f"quality {record['quality']!r}: expected whole numbers n")
        under: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            under.setdefault(kind, {})[rest] = tensor
        quality = {}
        for metric, q in record["quality"].items():
            values, drawn = under.get("values", {}).get(metric), None
            if values is not None:
                shares = under.get("shares", {}).get(metric)
                drawn = Drawn(len(values), under.get("strata", {}).get(metric),
                              None if shares is None else tuple(shares.tolist()), under.get("clusters", {}).get(metric))
            quality[metric] = Quality(n=q["n"], values=values, drawn=drawn,
                                      **{figure: float(q[figure]) for figure in _FIGURES if figure in q})
        answer = under["answer"]
        phases = tuple((str(name), int(steps)) for name, steps in record.get("phases", ()))
        return cls(Inputs.from_dict(record["inputs"]), Cost(**record["cost"]), quality, record["environment"],
                   answer[""] if set(answer) == {""} else answer, under.get("trace", {}), phases,
                   under.get("spent", {}).get(""))


def inputs(method: str | Method, problem: Problem, seed: int = 0, n_samples: int = 16, **knobs: Any) -> Inputs:
    """The validated inputs of a run, knobs completed with their defaults.

    Raises KeyError (unknown method), TypeError (no problem) or ValueError (knobs, seed, n_samples, a method of another
    family) that name what was received and what is allowed. seed: 0 to MAX_SEED; n_samples: 1 to MAX_SAMPLES.
    """
    if isinstance(method, str):
        method = get(method)
    if not isinstance(problem, Problem):
        raise TypeError(f"problem={problem!r:.100}: expected a problem, such as workbench.problems.glyphs.glyphs()")
    if problem.family != method.family:
        raise ValueError(f"method {method.name!r} is of the family {method.family}, {problem.name!r} of "
                         f"{problem.family}")
    if problem.methods and method.name not in problem.methods:
        raise ValueError(f"method {method.name!r} does not run on {problem.name!r}: expected "
                         f"{', '.join(problem.methods)}")
    seed, n_samples = plain(seed), plain(n_samples)
    for name, value, low, high in (("seed", seed, 0, MAX_SEED), ("n_samples", n_samples, 1, MAX_SAMPLES)):
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name}={value!r}: expected an integer of at least {low} and at most {high}")
    return Inputs(method.name, problem.name, problem.digest, code_of(method), seed, n_samples, method.check(knobs))


def code_of(method: Method) -> str:
    """What stands in `Inputs.code`: the release, the method with its version, and a digest of the sources it uses."""
    return f"{workbench.__version__}+{method.name}.{method.version}.{sources.digest_of(method.function)}"


def run(method: str | Method, problem: Problem, seed: int = 0, n_samples: int = 16, *,
        stop: Callable[[], bool] = lambda: False, on_step: Callable[[Step, Cost], object] | None = None, **knobs: Any
        ) -> Run:
    """Run a method on a problem: validate, drain its generator, meter its evaluations, judge its answer.

    stop() is asked before every call of a network and after every step; once true, Cancelled is raised and nothing is
    recorded. on_step(step, cost) sees each step and what was spent so far. Costs what the method says. Raises what
    `inputs` and the method raise, ValueError where the answer is not finite, and JudgeError, which holds the run, where
    the judge fails.
    """
    given = inputs(method, problem, seed, n_samples, **knobs)
    problem.check()
    meter, along = Meter(problem.prices, problem.counted, n_samples=given.n_samples), _Along(given)
    for step in _steps(given, problem, meter, stop):
        if on_step is not None:
            on_step(step, meter.cost)
        along.note(step, meter)
        if stop():
            raise Cancelled
    answer = along.answer()
    for name, part in tensors_of(answer).items():
        if not bool(torch.isfinite(part).all()):
            which = f" {name!r}" if name else ""
            raise ValueError(f"{given.method}: the answer{which} has entries that are not finite, with "
                             f"{dict(given.knobs)}")
    made = Run(given, meter.cost, {}, environment(answer), answer, along.trace(), along.phases(), meter.spent)
    return replace(made, quality=_judged(made, problem))


def _judged(made: Run, problem: Problem) -> dict[str, Quality]:
    """What the problem's judge says. Raises JudgeError where it fails, or says what is no figure of a known metric."""
    name, n = made.inputs.problem, made.inputs.n_samples
    try:
        said = problem.judge(made.answer, problem.cases(made.inputs.seed, n))
    except Cancelled:
        raise
    except Exception as error:
        raise JudgeError(f"the judge of {name!r} failed: {type(error).__name__}: {error}", made) from error
    if not isinstance(said, Mapping):
        raise JudgeError(f"the judge of {name!r} gave {said!r:.100}: expected {{metric: Quality}}", made)
    for metric, figure in said.items():
        if metric not in METRICS:
            raise JudgeError(f"the judge of {name!r} gave {metric!r}: expected one of {', '.join(METRICS)}", made)
        if not isinstance(figure, Quality):
            raise JudgeError(f"the judge of {name!r} gave {metric}={figure!r:.100}: expected a Quality", made)
    return dict(said)


def timed(method: str | Method, problem: Problem, seed: int = 0, n_samples: int = 16, *, repeats: int = 3,
          stop: Callable[[], bool] = lambda: False, **knobs: Any) -> Timing:
    """Seconds of the bare run (no trace, no judge), the median of `repeats`, after one warm-up that takes peak memory.

    stop() is asked before every call of a network and after every step; once true, Cancelled is raised. Raises what
    `run` raises.
    """
    given = inputs(method, problem, seed, n_samples, **knobs)
    problem.check()

    def once(meter: Meter) -> None:
        for _ in _steps(given, problem, meter, stop):
            if stop():
                raise Cancelled

    return measure(once, problem.prices, repeats=repeats, counted=problem.counted)


def compared(run: Run, reference: Run, problem: Problem) -> Run:
    """`run` with its "drift" from a reference run that started from the same noise (same seed and n_samples).

    In pictures (0 to 1) where the problem has them, else in the units of its state. Raises ValueError where the two
    runs differ in problem, seed or n_samples, or their answers are no tensors.
    """
    for name in ("problem", "digest", "seed", "n_samples"):
        ours, theirs = getattr(run.inputs, name), getattr(reference.inputs, name)
        if ours != theirs:
            raise ValueError(f"reference of another {name}: {theirs!r}, the run has {ours!r}")
    a, b = run.answer, reference.answer
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        raise ValueError(f"{run.inputs.method} answers by named tensors: expected one tensor to take the distance of")
    if problem.images is not None:
        a, b = problem.images(a) / 255, problem.images(b) / 255
    drawn = problem.drawn(problem.cases(run.inputs.seed, len(a)), len(a))
    return replace(run, quality={**run.quality, "drift": drift(a, b, drawn)})


def environment(answer: Answer) -> dict[str, str]:
    """What figures may depend on beside the inputs."""
    device = next(iter(tensors_of(answer).values())).device
    return {"python": platform.python_version(), "torch": str(torch.__version__), "device": str(device),
            "threads": str(torch.get_num_threads()), "machine": platform.machine()}


def _steps(given: Inputs, problem: Problem, meter: Meter, stop: Callable[[], bool]) -> Iterator[Step]:
    """The method's steps, its networks and counted callables metered."""
    def wrap(name: str, network: Network) -> Network:
        counted = meter.wrap(name, network)

        def asked(*args: Any) -> Any:  # a step may be long: before each call of a network, too
            if stop():
                raise Cancelled
            return counted(*args)

        return asked

    return get(given.method).function(problem.wrapped(wrap), Rng(given.seed, given.n_samples), **given.knobs)


class _Along:
    """What a run's steps tell as they go by."""

    def __init__(self, given: Inputs) -> None:
        self._given, self._n_steps = given, 0
        self._last: Step | None = None
        self._series: dict[str, list[Any]] = {}
        self._phases: list[tuple[str, int]] = []

    def note(self, step: Step, meter: Meter) -> None:
        spent = meter.cost
        told = {"evaluations": spent.total_evaluations, "flops": spent.total_flops, **spent.counted, **step.trace}
        for name, value in told.items():
            self._series.setdefault(name, [math.nan] * self._n_steps).append(value)
        for series in self._series.values():
            if len(series) == self._n_steps:
                series.append(math.nan)
        if self._phases and self._phases[-1][0] == step.phase:
            self._phases[-1] = (step.phase, self._phases[-1][1] + 1)
        else:
            self._phases.append((step.phase, 1))
        self._n_steps, self._last = self._n_steps + 1, step

    def answer(self) -> Answer:
        if self._last is None:
            raise ValueError(f"{self._given.method} yielded no step with {dict(self._given.knobs)}")
        return self._last.state

    def trace(self) -> dict[str, Tensor]:
        return {name: self._stacked(name, series) for name, series in self._series.items()}

    def phases(self) -> tuple[tuple[str, int], ...]:
        return tuple(self._phases)

    def _stacked(self, name: str, series: list[Any]) -> Tensor:
        if not any(isinstance(value, Tensor) for value in series):
            return torch.tensor([float(value) for value in series], dtype=torch.float64)
        n = self._given.n_samples
        wrong = next((v for v in series if isinstance(v, Tensor) and v.shape != (n,)), None)
        if wrong is not None:
            raise ValueError(f"{self._given.method} told {name!r} of shape {tuple(wrong.shape)}: expected a number or "
                             f"({n},), one for each sample")
        return torch.stack([value.double().cpu() if isinstance(value, Tensor)
                            else torch.full((n,), float(value), dtype=torch.float64) for value in series])
