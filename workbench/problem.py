"""Problem: what every family's problems have in common, and all that the runner asks of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from workbench.cost import Counted, Network, Price
from workbench.quality.statistics import Drawn, Quality

if TYPE_CHECKING:
    from workbench.rng import Rng
    from workbench.runs import Inputs

SHARING = ("batch", "memo", "none")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of a family: networks, cases, and the judge of what is made with them.

    digest: of weights and data, part of every key. judge(answer, cases) -> {metric: Quality}. reference and baseline:
    (method, knobs) of the full budget and of the cheap rival. flops: {network: operations per row}, or, where a call's
    arguments decide, a function of them (`cost.Price`). counted: {callable: Counted}, work outside networks that is
    counted too. preset: knob values that suit this problem. source: Python lines that build this problem under the name
    `problem`. code(inputs): the script that does a run without the workbench, where it can. check() raises ValueError
    where the models are no longer what the digest says; runs ask it before they start. methods: names of those that it
    is for, where these are not all of its family.
    images(answer) -> (n, H, W) or (n, H, W, 3) uint8, or None where answers are no pictures.

    A family's class gives `family` and `wrapped`, and where they differ from the defaults `cases`, `drawn`, `sizes`,
    `prices`, `state_dtype` and `sharing`, how runs may share evaluations: "batch", rows of several runs go through a
    network at once, as each row's output follows from that row; "memo", a call may be remembered by its arguments;
    "none", networks keep what they were given.
    """

    name: str
    digest: str
    judge: Callable[[Any, Any], Mapping[str, Quality]]
    flops: Mapping[str, Any]
    reference: tuple[str, Mapping[str, Any]]
    baseline: tuple[str, Mapping[str, Any]]
    counted: Mapping[str, Counted] = field(default_factory=dict)
    images: Callable[[Any], Tensor] | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    preset: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    code: Callable[[Inputs], str | None] | None = None
    check: Callable[[], None] = lambda: None
    methods: tuple[str, ...] = ()
    family: ClassVar[str]
    sharing: ClassVar[str] = "none"

    def wrapped(self, wrap: Callable[[str, Network], Network]) -> Any:
        """This problem with each of its networks and counted callables replaced by wrap(name, callable)."""
        raise TypeError(f"{type(self).__name__} is of no family: its class gives no `wrapped`")

    def cases(self, seed: int, n: int) -> Any:
        """What n samples are asked (labels, prompts, test images, ...), seen by method and judge; None: nothing.

        A sequence or tensor over the samples; sample i's case never depends on n.
        """
        return None

    def cases_of(self, rng: Rng) -> Any:
        """The cases of a run's samples, which may continue an earlier batch: what methods ask."""
        cases = self.cases(rng.seed, rng.first + rng.n_samples)
        return None if cases is None else cases[rng.first :]

    def drawn(self, cases: Any, n: int) -> Drawn:
        """How n samples with these cases were drawn, which decides the errors of all figures."""
        return Drawn(n)

    def sizes(self, knobs: Mapping[str, Any]) -> dict[str, int]:
        """What cost formulas may name beside the knobs: the family's `sizes`."""
        return {}

    @property
    def prices(self) -> Mapping[str, Price]:
        """What the meter charges for each network's calls."""
        return self.flops

    @property
    def state_dtype(self) -> torch.dtype:
        """Of a method's states."""
        return self.dtype
