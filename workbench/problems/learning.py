"""The learning family: which examples of a pool to learn from. A pool, a learner, a test set, and the judge.

A sample is a replicate: a learner of its own, with initial weights, subsets and batch order of its own. Replicates are
trained side by side, their weights stacked: {name: (n, *shape)}.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from workbench.cost import Price, flops_per_row
from workbench.family import Family, register
from workbench.problem import Problem
from workbench.problems.fingerprint import digest_of_values
from workbench.quality import Drawn, Metric, Quality, register_metric

if TYPE_CHECKING:
    from workbench.runs import Run

register_metric(Metric(
    "test_accuracy", "test accuracy", "", True, 6,
    "share of the test set that a replicate reads right, averaged over replicates; the test set is taken as it is"))
register_metric(Metric(
    "test_loss", "test loss", "nats", False, 6, "mean cross-entropy on the test set, averaged over replicates"))
register_metric(Metric(
    "noise_auc", "flipped labels found", "AUC", True, 6,
    "probability that an example whose label was flipped on purpose has a higher score than one whose was not"))

Parameters = dict[str, Tensor]  # the weights of n replicates: {name: (n, *shape)}
OF = ("weights", "inputs", "norms", "last_norms")  # what `Learner.gradient` can give
_ROWS = 1024  # of a test set at a time
_BLOCK = 2**24  # numbers held at a time while gradients are taken example by example
_UNFIT = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class Learner:
    """A classifier as a function of its weights, for n replicates at once.

    factory() makes the module, with initial weights from torch's global generator, which is left as it was.
    The module maps (b, *shape) to logits (b, n_classes), each row by itself. Raises ValueError where it holds batch
    normalisation or dropout (the first ties the rows of a batch together, the second draws from the global generator),
    or no weights.
    """

    def __init__(self, factory: Callable[[], nn.Module]) -> None:
        self._factory, self._lock = factory, threading.Lock()
        self.module = self._made(0)
        unfit = sorted({type(m).__name__ for m in self.module.modules()
                        if isinstance(m, _UNFIT) and getattr(m, "p", 1) != 0})
        if unfit:
            raise ValueError(f"the learner holds {', '.join(unfit)}: expected a module whose rows do not depend on "
                             "each other or on chance, such as one with group normalisation and without dropout")
        weighty = [name for name, m in self.module.named_modules() if list(m.parameters(recurse=False))]
        if not weighty:
            raise ValueError("the learner has no weights: expected a module that can be trained")
        last = weighty[-1]
        self.last = [f"{last}.{name}" if last else name
                     for name, _ in self.module.get_submodule(last).named_parameters(recurse=False)]

    def _made(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._factory()

    def initial(self, source: torch.Generator) -> Parameters:
        """Fresh weights {name: shape} of one learner."""
        with self._lock:
            made = self._made(int(torch.randint(2**62, (), generator=source)))
        return {name: weight.detach() for name, weight in made.named_parameters()}

    def _one(self, parameters: Parameters, x: Tensor) -> Tensor:
        return functional_call(self.module, parameters, (x,))

    def _logits(self, x: Tensor, parameters: Parameters) -> Tensor:
        with self._lock:  # for the call the module holds these weights
            return vmap(self._one)(parameters, x)

    def forward(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Logits (n, m, n_classes) of x (n, m, *shape) by replicates' weights."""
        with torch.no_grad():
            return self._logits(x, parameters)

    def gradient(self, x: Tensor, y: Tensor, parameters: Parameters, of: str) -> tuple[Any, Tensor]:
        """(a gradient, the logits (n, m, n_classes)) of x (n, m, *shape) with labels y (n, m).

        of "weights": of each replicate's mean cross-entropy, {name: (n, *shape)}. "inputs": of each example's own
        logit, that of its label before the softmax, by its input (n, m, *shape). "norms": the squared norm of each
        example's own gradient of the loss over all weights (n, m); "last_norms": over those of the last layer, the
        last module to be registered that has weights of its own.
        """
        if of in ("norms", "last_norms"):
            return self._norms(x, y, parameters, self.last if of == "last_norms" else list(parameters))
        with torch.enable_grad():
            weights = {name: w.detach().requires_grad_(of == "weights") for name, w in parameters.items()}
            x = x.detach().requires_grad_(of == "inputs")
            logits = self._logits(x, weights)
            if of == "inputs":
                return torch.autograd.grad(logits.gather(-1, y[..., None]).sum(), x)[0], logits.detach()
            loss = cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
            found = torch.autograd.grad(loss, list(weights.values()))
        return dict(zip(weights, found, strict=True)), logits.detach()

    def _norms(self, x: Tensor, y: Tensor, parameters: Parameters, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        def loss(some: Parameters, others: Parameters, row: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
            logits = self._one(some | others, row[None])[0]
            return cross_entropy(logits, label), logits

        each = vmap(vmap(grad(loss, has_aux=True), in_dims=(None, None, 0, 0)))
        some = {name: parameters[name].detach() for name in names}
        others = {name: w.detach() for name, w in parameters.items() if name not in some}
        rows = max(1, _BLOCK // sum(w.numel() for w in some.values()))
        norms, logits = [], []
        for at in range(0, y.shape[1], rows):
            with self._lock:
                found, out = each(some, others, x[:, at:at + rows], y[:, at:at + rows])
            norms.append(sum(g.flatten(2).square().sum(2) for g in found.values()))
            logits.append(out)
        return torch.cat(norms, 1), torch.cat(logits, 1)


@dataclass(frozen=True, kw_only=True)
class Learning(Problem):
    """A problem of learning from a part of a pool.

    pool (N, *shape) with labels (N,) as they are given, flipped (N,) where they were made wrong on purpose; test
    (T, *shape) with test_labels (T,). All are used in `dtype`. classes: what people call the labels.
    Networks: forward(x (n, m, *shape), weights) and gradient(x, y (n, m), weights, of), as `Learner` has them; a row is
    one example through one replicate, and costs the learner's FLOPs f forward, 3 f where the gradient goes to the
    weights, 2 f where it goes to the inputs, f and the last layer's own where it ends there. flops: f and 3 f.
    bayes_error: the least error possible on clean labels, where it is known.
    Answers: "logits" (n, T, n_classes) on the test set, "taken" (n, N) how often each example was learned from (in
    the last phase), and of methods that score "scores" (n, N), the higher the harder. Judged by test accuracy and
    loss, and where labels were flipped by how well the scores find them (`noise_auc`).
    """

    learner: Learner
    forward: Callable[..., Tensor]
    gradient: Callable[..., tuple[Any, Tensor]]
    pool: Tensor
    labels: Tensor
    flipped: Tensor
    test: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    bayes_error: float = math.nan
    family: ClassVar[str] = "learning"
    sharing: ClassVar[str] = "none"  # all weights would be read and kept at every step, which costs more than it spares

    def wrapped(self, wrap: Callable[[str, Any], Any]) -> Learning:
        """This problem with both networks replaced by wrap(name, network)."""
        return replace(self, forward=wrap("forward", self.forward), gradient=wrap("gradient", self.gradient))

    def sizes(self, knobs: Mapping[str, Any]) -> dict[str, int]:
        """n_pool: examples in the pool."""
        return {"n_pool": len(self.pool)}

    @property
    def prices(self) -> Mapping[str, Price]:
        """By what a call asks for; rows are those of all replicates."""
        f = self.flops["forward"]
        last = 2.0 * sum(self.learner.module.get_parameter(name).numel() for name in self.learner.last)
        each = {"weights": self.flops["gradient"], "norms": self.flops["gradient"], "inputs": 2 * f,
                "last_norms": f + last}

        def forward(x: Tensor, parameters: Parameters) -> tuple[int, float]:
            rows = x.shape[0] * x.shape[1]
            return rows, rows * f

        def gradient(x: Tensor, y: Tensor, parameters: Parameters, of: str) -> tuple[int, float]:
            return y.numel(), y.numel() * each[of]

        return {"forward": forward, "gradient": gradient}

    def start(self, streams: Sequence[torch.Generator]) -> tuple[Parameters, list[torch.Generator]]:
        """Initial weights of as many replicates as streams, and a generator of each for its subsets and batch order.

        One number of each stream decides both, so that arms which draw first the start of their training begin alike.
        """
        sources = [torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=s))) for s in streams]
        made = [self.learner.initial(source) for source in sources]
        return {name: torch.stack([one[name] for one in made]).to(self.device, self.dtype) for name in made[0]}, sources

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (n, m, *shape) and labels (n, m) of the pool's examples at indices (n, m)."""
        return self.pool[indices].to(self.dtype), self.labels[indices]

    def assess(self, parameters: Parameters) -> Tensor:
        """Logits (n, T, n_classes) on the test set. Judging, not learning: it is not metered."""
        n = len(next(iter(parameters.values())))
        return torch.cat([self.learner.forward(part.to(self.dtype).expand(n, *part.shape), parameters)
                          for part in self.test.split(_ROWS)], 1)

    def graded(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy (n,) and mean cross-entropy (n,) of logits (n, T, n_classes) on the test set."""
        return graded(logits, self.test_labels)

    def pictures(self, indices: Tensor) -> Tensor | None:
        """The pool's examples at indices (m,) as (m, H, W) uint8, where they are grey images; else None."""
        shown = self.pool[indices.to(self.pool.device)]
        shown = shown[:, 0] if shown.ndim == 4 and shown.shape[1] == 1 else shown
        if shown.ndim != 3:
            return None
        low, high = self.pool.min(), self.pool.max()
        return ((shown - low) / (high - low) * 255).round().to(torch.uint8).cpu()


def graded(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy (n,) and mean cross-entropy (n,) of logits (n, T, n_classes) against labels (T,)."""
    each = cross_entropy(logits.transpose(1, 2), labels.expand(len(logits), -1), reduction="none")
    return (logits.argmax(-1) == labels).to(logits.dtype).mean(1), each.mean(1)


def auc(scores: Tensor, positive: Tensor) -> Tensor:
    """The share of pairs in which one of positive (N,) has the higher score (n, N), ties counting half: (n,)."""
    ours, theirs = scores[:, positive].contiguous(), scores[:, ~positive].sort(1).values
    below = torch.searchsorted(theirs, ours) + torch.searchsorted(theirs, ours, right=True)
    return below.double().mean(1) / (2 * theirs.shape[1])


def learning_curve(runs: Sequence[Run], series: str = "accuracy", against: str = "evaluations"
                   ) -> list[tuple[float, float, float]]:
    """(what each replicate has spent, mean of a series over all of them, its standard error) after each step that tells
    the series, of runs that differ in nothing but the seed. against: a series of costs, or "i", the steps themselves.

    Raises KeyError where the runs have no such series.
    """
    table = torch.cat([run.trace[series] for run in runs], 1)
    tells = ~table.isnan().any(1)
    steps = torch.arange(int(tells.sum())) + 1
    spent = steps if against == "i" else runs[0].trace[against][tells] / runs[0].inputs.n_samples
    stderr = table[tells].std(1) / math.sqrt(table.shape[1])
    return list(zip(spent.tolist(), table[tells].mean(1).tolist(), stderr.tolist(), strict=True))


def _learning(name: str, factory: Callable[[], nn.Module], pool: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor],
              classes: Sequence[str], *, flipped: Tensor | None = None, source: str = "", **more: Any) -> Learning:
    learner = Learner(factory)
    wrong = torch.zeros_like(pool[1], dtype=torch.bool) if flipped is None else flipped.to(pool[1].device)
    device, test_labels = pool[0].device, test[1]

    def judge(answer: Mapping[str, Tensor], cases: None) -> dict[str, Quality]:
        accuracy, loss = graded(answer["logits"].double(), test_labels)
        drawn = Drawn(len(accuracy))
        figures = {"test_accuracy": drawn.mean(accuracy), "test_loss": drawn.mean(loss)}
        if "scores" in answer and 0 < int(wrong.sum()) < len(wrong):
            figures["noise_auc"] = drawn.mean(auc(answer["scores"], wrong))
        return figures

    learner.module.to(device)
    row = pool[0][:1].to(next(learner.module.parameters()).dtype)
    with torch.no_grad():
        shape = learner.module(row).shape
    if tuple(shape) != (1, len(classes)):
        raise ValueError(f"the learner maps one example to {tuple(shape)}: expected (1, {len(classes)}), a logit for "
                         "each class")
    f = flops_per_row(learner.module, row)
    return Learning(
        name=name, digest=digest_of_values(name, learner.module, *pool, *test, wrong), judge=judge, source=source,
        learner=learner, forward=learner.forward, gradient=learner.gradient, pool=pool[0], labels=pool[1],
        flipped=wrong, test=test[0], test_labels=test_labels, classes=tuple(classes),
        flops={"forward": f, "gradient": 3 * f}, device=str(device),
        **{"dtype": pool[0].dtype, "reference": ("rs2", {"keep": 1.0}), "baseline": ("rs2", {"variant": "static"}),
           **more})


def perceptron(n_inputs: int, n_hidden: int, n_classes: int) -> nn.Module:
    """A layer of n_hidden tanh units, or none (0: logistic regression), on flattened inputs."""
    if not n_hidden:
        return nn.Sequential(nn.Flatten(), nn.Linear(n_inputs, n_classes))
    return nn.Sequential(nn.Flatten(), nn.Linear(n_inputs, n_hidden), nn.Tanh(), nn.Linear(n_hidden, n_classes))


def gaussians(n_pool: int = 400, n_dims: int = 2, distance: float = 2.0, label_noise: float = 0.0, n_hidden: int = 0,
              n_test: int = 4000, seed: int = 0) -> Learning:
    """Two classes, each a round Gaussian of deviation 1, their means so far apart; the best error is known.

    No rule errs on fewer than Phi(-distance / 2) of clean examples (`bayes_error`), and the one that reaches it is
    linear; flipping labels alike in both classes does not move it. n_hidden: tanh units of the learner, 0 for logistic
    regression. In float64. Raises ValueError for a pool or a test set below 2, no dimension, a negative distance, or
    label_noise outside 0 to .5.
    """
    for key, value, low, high in (("n_pool", n_pool, 2, 10**6), ("n_test", n_test, 2, 10**6),
                                  ("n_dims", n_dims, 1, 1000), ("distance", distance, 0, 100),
                                  ("label_noise", label_noise, 0, 0.5), ("n_hidden", n_hidden, 0, 10**4)):
        _check(key, value, low, high)
    source = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(2, (n,), generator=source)
        mean = (y.double() - 0.5) * distance / math.sqrt(n_dims)
        return torch.randn((n, n_dims), generator=source, dtype=torch.float64) + mean[:, None], y

    test, (x, y) = draw(n_test), draw(n_pool)
    y, flipped = flip(y, 2, label_noise, source)
    call = (f"gaussians({n_pool}, {n_dims}, {distance!r}, label_noise={label_noise!r}, n_hidden={n_hidden}, "
            f"n_test={n_test}, seed={seed})")
    return _learning(
        f"two Gaussians in {n_dims} dimensions, distance {distance:g}, {_titled(n_pool, label_noise)}",
        partial(perceptron, n_dims, n_hidden, 2), (x, y), test, ("left", "right"), flipped=flipped,
        source=_source(call), bayes_error=float(torch.special.ndtr(torch.tensor(-distance / 2, dtype=torch.float64))))


def digits(n_pool: int = 1000, label_noise: float = 0.1, imbalance: float = 1.0, duplicates: float = 0.0,
           n_hidden: int = 64, seed: int = 0) -> Learning:
    """Handwritten digits, 8x8 grey, ten classes, as scikit-learn carries them: up to 1297 to learn from, 500 to test.

    The pool's three faults, as for `spoiled`: label_noise, imbalance, duplicates. Learner: n_hidden tanh units.
    seed: of split and faults. Raises ValueError for a number out of its bounds.
    """
    from sklearn.datasets import load_digits

    _check("n_pool", n_pool, 20, 1297)
    _check("n_hidden", n_hidden, 0, 10**4)
    data = load_digits()
    x, y = torch.from_numpy(data.images).float() / 8 - 1, torch.from_numpy(data.target)  # 0..16 as it comes
    source = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=source)
    test, pool = order[:500], order[500:500 + n_pool]
    given = _faults(label_noise, imbalance, duplicates)
    x_pool, y_pool, flipped = spoiled(x[pool], y[pool], 10, source, **given)
    call = f"digits({n_pool}, {_said(given)}n_hidden={n_hidden}, seed={seed})"
    return _learning(f"digits, {_titled(len(x_pool), **given)}", partial(perceptron, 64, n_hidden, 10),
                     (x_pool, y_pool), (x[test], y[test]), list("0123456789"), flipped=flipped, source=_source(call))


def glyphs(n_pool: int = 3000, label_noise: float = 0.0, imbalance: float = 1.0, duplicates: float = 0.0,
           n_hidden: int = 96, n_test: int = 1000, seed: int = 0) -> Learning:
    """Digits and capital letters of many typefaces, 36 classes, drawn on demand and averaged to 12x12 pixels.

    Faults of the pool as for `spoiled`. Learner: n_hidden tanh units. The test set is of the held-out stream. .13 ms
    an image to draw. Raises ValueError for a number out of its bounds.
    """
    from workbench.zoo.glyphs import CLASSES
    from workbench.zoo.glyphs import glyphs as draw

    for key, value, low, high in (("n_pool", n_pool, 36, 10**6), ("n_test", n_test, 2, 10**6),
                                  ("n_hidden", n_hidden, 0, 10**4)):
        _check(key, value, low, high)
    (x, y), (x_test, y_test) = draw(n_pool, "train", seed), draw(n_test, "held_out", seed)
    x, x_test = (nn.functional.avg_pool2d(images, 2) for images in (x, x_test))
    given = _faults(label_noise, imbalance, duplicates)
    x, y, flipped = spoiled(x, y, len(CLASSES), torch.Generator().manual_seed(seed), **given)
    call = f"glyphs({n_pool}, {_said(given)}n_hidden={n_hidden}, n_test={n_test}, seed={seed})"
    return _learning(f"glyphs, {_titled(len(x), **given)}", partial(perceptron, 144, n_hidden, len(CLASSES)), (x, y),
                     (x_test, y_test), list(CLASSES), flipped=flipped, source=_source(call))


def from_torch(pool: Dataset | tuple[Tensor, Tensor], test: Dataset | tuple[Tensor, Tensor],
               factory: Callable[[], nn.Module], *, classes: Sequence[str] | None = None,
               flipped: Tensor | None = None, name: str = "own data", device: str | torch.device = "cpu",
               dtype: torch.dtype | None = None, preset: Mapping[str, Any] | None = None) -> Learning:
    """A problem of one's own data and model.

    pool, test: torch Datasets of (input, label), read once and held in memory, or tensors (x (N, *shape), y (N,)) with
    whole labels from 0. factory() makes the module that is to learn, (b, *shape) to logits (b, n_classes), afresh at
    every call. classes: names of the labels (default: their numbers). flipped (N,): which labels are known to be wrong.
    dtype: of weights and inputs, by default that of the inputs. preset: knob values that suit. Raises ValueError where
    these do not fit together, or the module is one that `Learner` refuses.
    """
    made = []
    for what, given in (("pool", pool), ("test", test)):
        x, y = given if isinstance(given, tuple) else _read(given)
        if len(x) != len(y) or len(x) < 2 or y.ndim != 1 or y.is_floating_point() or int(y.min()) < 0:
            raise ValueError(f"{what}: inputs {tuple(x.shape)}, labels {tuple(y.shape)} of {y.dtype}: expected at "
                             "least two examples (N, *shape) and (N,) whole numbers from 0")
        if not x.is_floating_point():
            raise ValueError(f"{what}: inputs of {x.dtype}: expected floating point numbers")
        made.append((x.detach().to(device, copy=True), y.to(device, torch.int64, copy=True)))
    highest = max(int(y.max()) for _, y in made)
    names = [str(k) for k in range(highest + 1)] if classes is None else list(classes)
    if len(names) <= highest:
        raise ValueError(f"{len(names)} classes: expected at least {highest + 1}, as the labels go up to {highest}")
    if flipped is not None and (flipped.shape != made[0][1].shape or flipped.dtype != torch.bool):
        raise ValueError(f"flipped of shape {tuple(flipped.shape)} and {flipped.dtype}: expected "
                         f"({len(made[0][1])},) of torch.bool")
    return _learning(name, factory, made[0], made[1], names, flipped=flipped, preset=dict(preset or {}),
                     dtype=made[0][0].dtype if dtype is None else dtype)


def spoiled(x: Tensor, y: Tensor, n_classes: int, source: torch.Generator, *, label_noise: float = 0.0,
            imbalance: float = 1.0, duplicates: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """A pool with faults: (inputs, labels, which labels were flipped), in random order where it was touched.

    imbalance: how many times fewer examples the last class keeps than the first, geometric in between; the pool
    shrinks. duplicates: the share of the pool that is then replaced by copies of the rest. label_noise: the share of
    labels that are last replaced by another class, each as likely.
    """
    if imbalance > 1:
        order = torch.randperm(len(y), generator=source)
        kept = []
        for c in range(n_classes):
            own = order[y[order] == c]
            kept.append(own[:max(1, round(len(own) * imbalance ** (-c / (n_classes - 1))))])
        chosen = torch.cat(kept)
        chosen = chosen[torch.randperm(len(chosen), generator=source)]
        x, y = x[chosen], y[chosen]
    if n_copies := round(duplicates * len(y)):
        order = torch.randperm(len(y), generator=source)
        originals = order[n_copies:]
        at = torch.cat((originals, originals[torch.randint(len(originals), (n_copies,), generator=source)]))
        at = at[torch.randperm(len(at), generator=source)]
        x, y = x[at], y[at]
    y, flipped = flip(y, n_classes, label_noise, source)
    return x, y, flipped


def flip(y: Tensor, n_classes: int, share: float, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels of which this share, rounded to whole examples, is another class, each as likely; and which (N,)."""
    flipped = torch.zeros(len(y), dtype=torch.bool)
    flipped[torch.randperm(len(y), generator=source)[:round(share * len(y))]] = True
    other = (y + torch.randint(1, n_classes, (len(y),), generator=source)) % n_classes
    return torch.where(flipped, other, y), flipped


def _read(data: Dataset) -> tuple[Tensor, Tensor]:
    examples = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
    return torch.stack([torch.as_tensor(x) for x, _ in examples]), torch.tensor([int(y) for _, y in examples])


def _faults(label_noise: float, imbalance: float, duplicates: float) -> dict[str, float]:
    _check("label_noise", label_noise, 0, 0.9)
    _check("imbalance", imbalance, 1, 1000)
    _check("duplicates", duplicates, 0, 0.95)
    return {"label_noise": label_noise, "imbalance": imbalance, "duplicates": duplicates}


def _check(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected {low:g} to {high:g}")


def _said(given: Mapping[str, float]) -> str:
    return "".join(f"{key}={value!r}, " for key, value in given.items())


def _titled(n_pool: int, label_noise: float, imbalance: float = 1.0, duplicates: float = 0.0) -> str:
    """A pool's size and faults, for a person."""
    faults = [f"{label_noise:.3g} of labels wrong"] * (label_noise > 0)
    faults += [f"imbalance {imbalance:g}"] * (imbalance > 1) + [f"{duplicates:.3g} copies"] * (duplicates > 0)
    return ", ".join([f"{n_pool} examples", *faults])


def _source(call: str) -> str:
    return f"from workbench.problems.learning import {call.partition('(')[0]}\n\nproblem = {call}"


def _shape(problem: Learning, knobs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes = {"logits": (len(problem.test), len(problem.classes)), "taken": (len(problem.pool),)}
    return shapes | ({"scores": (len(problem.pool),)} if "end" in knobs else {})


def _told(problem: Learning, states: Sequence[Mapping[str, Tensor]], infos: Sequence[Mapping[str, Any]]) -> None:
    """What each epoch learned from is told and adds up; scores come with their extremes."""
    total = torch.zeros_like(states[-1]["taken"][0])
    for state, info in zip(states, infos, strict=True):
        if "subset" in info:
            total[info["subset"]] += 1
            assert torch.equal(state["taken"][0], total)
        if "scores" in state:
            assert torch.equal(info["scores"], state["scores"][0])
            assert info["scores"][info["hardest"][0]] == info["scores"].max()
            assert info["scores"][info["easiest"][0]] == info["scores"].min()
    assert int(total.sum()) > 0


register(Family(
    Learning.family, "n_epochs", _shape,
    [("workbench.problems.learning:gaussians", {"n_pool": 24, "n_test": 12, "label_noise": 0.2, "n_hidden": 4}),
     ("workbench.problems.learning:gaussians", {"n_pool": 15, "n_test": 10, "n_dims": 3, "n_hidden": 3, "seed": 1})],
    _told, question="Which examples are worth learning from, and what does choosing them cost?",
    sample="replicate", sizes=("n_pool",)))
