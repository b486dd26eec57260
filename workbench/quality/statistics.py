"""How samples were drawn, and the errors and intervals that follow from it: the one place that decides both.

Samples are independent given the design. Where a problem asks for classes in turn (labels 0, 1, ..., C - 1, 0, ...)
they are *stratified*: no class is over- or underrepresented by chance, so an estimate must weigh classes by their
share p_c of the law and its error comes from the spread within classes alone. Where several samples continue one
prompt or come from one document they are *clustered*: the clusters are the independent units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

LEVEL = 0.95  # of every interval that is shown
GROUPS = 20  # at most so many in a delete-a-group jackknife


@lru_cache(maxsize=4096)
def t_quantile(df: float) -> float:
    """The two-sided quantile of Student's t at LEVEL for df > 0 degrees of freedom; nan where df is none."""
    from scipy.special import stdtrit  # scipy loads where it is wanted, not with the package

    return float(stdtrit(df, 0.5 + LEVEL / 2)) if df > 0 else math.nan


@dataclass(frozen=True, eq=False)
class Quality:
    """One figure: value, standard error (nan where it cannot be had), samples n, and the interval at LEVEL.

    df: degrees of freedom of the standard error (default n - 1). low, high: by default value -+ t_df stderr.
    values: each sample's part (n,), where it is known: their mean, weighted as they were `drawn`, is the figure. Of a
    mean these are the samples' own values, of other figures their linearised contributions (the figure plus each
    sample's influence on it), so that any two figures from the same samples can be paired. Neither is compared.
    Text, in containers too: `str(quality)` is "1.000 +- 0.028 (n = 17)", the standard error to two digits.
    """

    value: float
    stderr: float
    n: int
    low: float = math.nan
    high: float = math.nan
    df: float = math.nan
    values: Tensor | None = None
    drawn: Drawn | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.df):
            object.__setattr__(self, "df", float(self.n - 1))
        if math.isnan(self.low) and math.isnan(self.high) and not math.isnan(self.stderr):
            half = t_quantile(self.df) * self.stderr if self.stderr else 0.0
            object.__setattr__(self, "low", self.value - half)
            object.__setattr__(self, "high", self.value + half)

    def __eq__(self, other: object) -> bool:
        """Equal figures, nan equal to nan: a figure without an error equals its copy."""
        if not isinstance(other, Quality):
            return NotImplemented
        return all(a == b or (a != a and b != b) for a, b in zip(self._fields(), other._fields(), strict=True))

    def __hash__(self) -> int:
        return hash(tuple(None if x != x else x for x in self._fields()))

    def _fields(self) -> tuple[float, ...]:
        return self.value, self.stderr, self.n, self.low, self.high, self.df

    def __str__(self) -> str:
        if not math.isfinite(self.stderr) or not math.isfinite(self.value):
            return f"{self.value:.4g} (n = {self.n}, no error)"
        size = self.stderr or abs(self.value) / 100 or 1.0
        digits = max(0, 1 - math.floor(math.log10(size)))
        if digits > 6 or abs(self.value) >= 1e6:
            return f"{self.value:.4g} +- {self.stderr:.2g} (n = {self.n})"
        return f"{self.value:.{digits}f} +- {self.stderr:.{digits}f} (n = {self.n})"

    __repr__ = __str__  # so that a dict of figures prints as a person reads them


@dataclass(frozen=True)
class Drawn:
    """How n samples were drawn.

    strata: class numbers (n,), each sample drawn within its class; None for independent samples. shares: {class: p_c},
    by default all equal. clusters: numbers (n,) of the independent units that samples belong to; None where each
    sample is one. Raises ValueError for both at once, for other lengths, or for shares that leave a class out.
    """

    n: int
    strata: Tensor | None = None
    shares: tuple[float, ...] | None = None
    clusters: Tensor | None = None

    def __post_init__(self) -> None:
        if self.strata is not None and self.clusters is not None:
            raise ValueError("strata and clusters at once: expected one of them")
        for name in ("strata", "clusters"):
            given = getattr(self, name)
            if given is not None and len(given) != self.n:
                raise ValueError(f"{name} of {len(given)} samples: expected {self.n}")
        if self.strata is not None and self.shares is not None and len(self.shares) <= int(self.strata.max()):
            raise ValueError(f"shares of {len(self.shares)} classes: expected one for each of "
                             f"{int(self.strata.max()) + 1}")

    @property
    def is_stratified(self) -> bool:
        """Whether classes can be told apart: at least two samples in each; else samples count as independent."""
        return self.strata is not None and int(self._counts().min()) > 1

    def _counts(self) -> Tensor:
        assert self.strata is not None
        return self.strata.unique(return_counts=True)[1]

    def classes(self) -> tuple[Tensor, Tensor, Tensor]:
        """(index of each sample's class (n,), samples of each class (C,), share p_c of each (C,), together 1)."""
        if not self.is_stratified:
            return torch.zeros(self.n, dtype=torch.int64), torch.tensor([self.n]), torch.ones(1, dtype=torch.float64)
        assert self.strata is not None
        names, index, counts = self.strata.cpu().unique(return_inverse=True, return_counts=True)
        shares = torch.ones(len(names), dtype=torch.float64)
        if self.shares is not None:
            shares = torch.tensor(self.shares, dtype=torch.float64)[names]
        return index, counts, shares / shares.sum()

    def weights(self) -> Tensor:
        """The weight of each sample in an estimate of the whole law (n,), float64, together 1."""
        index, counts, shares = self.classes()
        return (shares / counts)[index]

    def groups(self) -> Tensor:
        """The group (n,) of each sample in a jackknife: clusters whole, else whole rounds through the classes."""
        if self.clusters is not None:
            unit = self.clusters.unique(return_inverse=True)[1]
        else:
            index, counts, _ = self.classes()
            order = torch.argsort(index, stable=True)
            unit = torch.empty(self.n, dtype=torch.int64)  # a sample's place among those of its class: its round
            unit[order] = torch.cat([torch.arange(int(c)) for c in counts])
        return unit % min(GROUPS, int(unit.max()) + 1)

    def mean(self, x: Tensor) -> Quality:
        """The mean of x (n,) over the law, with the error that the design gives it.

        Stratified: var = sum_c p_c^2 s_c^2 / n_c, Satterthwaite's degrees of freedom. Clustered: a ratio of sums over
        clusters; see `ratio`.
        """
        x = x.double().cpu()
        if self.clusters is not None:
            return ratio(x, torch.ones_like(x), self)
        index, counts, shares = self.classes()
        means = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, index, x) / counts.double()
        squares = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, index, (x - means[index]).square())
        value = float(shares @ means)
        if self.n < 2:
            return Quality(value, math.nan, self.n, values=x, drawn=self)
        parts = shares.square() * squares / (counts - 1) / counts
        total = float(parts.sum())
        part_of_all = parts / total if total > 0 else counts.double() / self.n  # squares of tiny parts would be 0
        df = 1 / float((part_of_all.square() / (counts - 1)).sum())
        return Quality(value, math.sqrt(total), self.n, df=df, values=x, drawn=self)

    def jackknife(self, statistic: Callable[[Tensor], float]) -> tuple[float, float]:
        """(standard error, degrees of freedom) by deleting group after group: statistic(kept (n,) bool) -> number.

        (nan, 0) where there are fewer than eight groups, or fewer than two samples in each.
        """
        label = self.groups()
        n_groups = int(label.max()) + 1
        if n_groups < 8 or self.n < 2 * n_groups:
            return math.nan, 0.0
        values = torch.tensor([statistic(label != g) for g in range(n_groups)], dtype=torch.float64)
        spread = (n_groups - 1) / n_groups * float((values - values.mean()).square().sum())
        return math.sqrt(spread), float(n_groups - 1)

    def equals(self, other: Drawn) -> bool:
        """Whether both tell the same of as many samples."""
        def same(a: Tensor | None, b: Tensor | None) -> bool:
            return a is b or (a is not None and b is not None and torch.equal(a.cpu(), b.cpu()))

        return (self.n == other.n and self.shares == other.shares and same(self.strata, other.strata)
                and same(self.clusters, other.clusters))

    def kept(self, mask: Tensor) -> Drawn:
        """The same design for the samples that mask (n,) keeps."""
        part = [None if x is None else x.cpu()[mask] for x in (self.strata, self.clusters)]
        return Drawn(int(mask.sum()), part[0], self.shares, part[1])


def ratio(numerators: Tensor, denominators: Tensor, drawn: Drawn) -> Quality:
    """Sum of numerators (n,) over sum of denominators (n,); error by the delta method over independent units.

    Degrees of freedom: units - 1 where all weigh alike, fewer where a few large ones make most of the error
    (Satterthwaite's, of units whose residuals grow with their denominators).
    """
    top, bottom = numerators.double().cpu(), denominators.double().cpu()
    value = float(top.sum() / bottom.sum())
    values = value + (top - value * bottom) / bottom.mean()
    if drawn.clusters is not None:
        unit = drawn.clusters.cpu().unique(return_inverse=True)[1]
        top, bottom = (torch.zeros(int(unit.max()) + 1, dtype=torch.float64).index_add_(0, unit, x)
                       for x in (top, bottom))
    n = len(top)
    if n < 2:
        return Quality(value, math.nan, drawn.n, values=values, drawn=drawn)
    spread = float((top - value * bottom).std() / bottom.mean()) / math.sqrt(n)
    squares = bottom.square()
    return Quality(value, spread, drawn.n, df=float(squares.sum() ** 2 / squares.square().sum()) - 1, values=values,
                   drawn=drawn)


def transformed(figure: Quality, scale: Callable[[float], float]) -> Quality:
    """A figure on another, rising scale: value and interval mapped, the error what one standard error more adds."""
    value = scale(figure.value)
    more = scale(max(figure.value, 0.0) + figure.stderr) - scale(max(figure.value, 0.0))
    values, step = None, 1e-6 * abs(figure.value)
    if figure.values is not None and step > 0:
        slope = (scale(figure.value + step) - scale(figure.value - step)) / (2 * step)
        values = value + slope * (figure.values - figure.value)
    return Quality(value, more, figure.n, scale(figure.low), scale(figure.high), figure.df, values, figure.drawn)


def difference(a: Quality, b: Quality) -> Quality | None:
    """a - b of figures from the same samples (the same noise, the same cases), by their values sample by sample.

    None where either does not know its values, or they were not drawn alike.
    """
    if a.values is None or b.values is None or a.drawn is None or b.drawn is None or not a.drawn.equals(b.drawn):
        return None
    return a.drawn.mean(a.values - b.values)


def combined(figures: Sequence[Quality]) -> Quality:
    """The mean of figures from independent runs of equal size, such as the seeds of one setting.

    Each run's own variance and the spread between the runs estimate the same thing; they are pooled by their degrees of
    freedom, unless the runs differ by more than their own errors allow (F test at 1 %): then the spread between runs
    counts alone. The interval keeps its runs' asymmetry (the half-widths are combined like standard errors; Zou and
    Donner, Statistics in Medicine 2008). Where the runs' samples are of the same clusters (prompts, say), the runs are
    not independent: their samples are then pooled, and the clusters are the units. Raises ValueError where there are
    none.
    """
    if not figures:
        raise ValueError("no figures: expected at least one")
    k, n = len(figures), sum(q.n for q in figures)
    if k == 1:
        return figures[0]
    units = [q.drawn.clusters for q in figures if q.drawn is not None and q.values is not None]
    if len(units) == k and all(u is not None for u in units):
        pooled = torch.cat([q.values for q in figures if q.values is not None])
        return Drawn(n, clusters=torch.cat([u.cpu() for u in units if u is not None])).mean(pooled)
    means = torch.tensor([q.value for q in figures], dtype=torch.float64)
    value, between = float(means.mean()), float(means.var())
    own = [q for q in figures if math.isfinite(q.stderr)]
    within, df = sum(q.stderr**2 for q in own) / k, sum(q.df for q in own)
    if len(own) < k or not df > 0 or between > _f_quantile(k - 1, df) * within:
        return Quality(value, math.sqrt(between / k), n, df=k - 1.0)
    variance = (df * within + (k - 1) * between) / (df + k - 1)
    stderr, df = math.sqrt(variance / k), df + k - 1
    half = t_quantile(df) * stderr
    down, up = (math.sqrt(sum(w * w for w in widths)) for widths in (
        [q.value - q.low for q in figures], [q.high - q.value for q in figures]))
    total = down + up
    return Quality(value, stderr, n, value - half * (2 * down / total if total else 1),
                   value + half * (2 * up / total if total else 1), df)


@lru_cache(maxsize=1024)
def _f_quantile(k: int, df: float) -> float:
    from scipy.special import fdtri

    return float(fdtri(k, df, 0.99))
