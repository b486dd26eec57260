"""Figures as their authors published them, to stand beside ours and never as ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A published table. rows: {name of the row: values}, in step with x. how: read from a table or off a plot."""

    title: str
    source: str
    how: str
    x_label: str
    x: tuple[float, ...]
    rows: Mapping[str, tuple[float, ...]]


_TENTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

T_STITCH_DIT = Table(
    title="FID-5K of DiT on ImageNet 256, DDIM 100 steps, guidance 1.5",
    source="T-Stitch, arXiv 2402.14167",
    how="read off a plot, about 2 per cent",
    x_label="fraction of the smaller model",
    x=_TENTHS,
    rows={
        "S then XL": (9.2, 9.1, 8.9, 9.1, 8.9, 10.1, 12.6, 17.4, 25.0, 30.5, 33.0),
        "B then XL": (9.20, 9.15, 8.97, 9.21, 8.86, 9.66, 9.93, 10.6, 11.6, 12.0, 12.3),
        "S then B": (12.3, 12.3, 12.4, 12.5, 13.2, 13.5, 15.6, 19.1, 23.6, 30.5, 33.0),
    },
)
T_STITCH_DIT_SECONDS = Table(
    title="seconds for 8 images of DiT on ImageNet 256 on one RTX 3090, DDIM 100 steps",
    source="T-Stitch, arXiv 2402.14167",
    how="read off a plot, about 2 per cent",
    x_label="fraction of the smaller model",
    x=_TENTHS,
    rows={"S then XL": (16.5, 15.0, 13.5, 12.0, 10.5, 9.1, 7.6, 6.1, 4.6, 3.1, 1.6)},
)
T_STITCH_LDM = Table(
    title="latent diffusion U-Nets on ImageNet 256, DDIM 100 steps, guidance 3, eta 1: LDM-S then LDM",
    source="T-Stitch's repository, README",
    how="read from a table",
    x_label="fraction of the smaller model",
    x=_TENTHS,
    rows={
        "FID-5K": (20.11, 19.54, 18.74, 18.64, 18.60, 19.33, 21.81, 26.03, 30.41, 35.24, 40.92),
        "Inception score": (199.24, 201.87, 202.81, 204.01, 193.62, 175.62, 140.69, 110.81, 90.24, 70.91, 54.41),
        "seconds": (7.1, 6.7, 6.2, 5.8, 5.3, 4.9, 4.5, 4.1, 3.6, 3.1, 2.9),
    },
)

_BUDGETS = (3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
_TUNED = ("read from a table; the first three are its authors' runs of others' solvers with the best settings found, "
          "USF's schedules were searched for each number of evaluations")

USF_CIFAR10_SCORE_SDE = Table(
    title="FID on CIFAR-10, Score SDE's model, against evaluations",
    source="USF's repository, README (arXiv 2312.07243)",
    how=_TUNED,
    x_label="evaluations per sample",
    x=_BUDGETS,
    rows={
        "DPM-Solver++": (91.24, 61.37, 28.39, 13.41, 7.44, 5.33, 4.37, 3.99),
        "UniPC": (93.52, 60.43, 23.62, 10.41, 6.49, 5.16, 4.30, 3.89),
        "DPM-Solver-v3": (139.8, 34.69, 12.74, 7.46, 5.18, 3.94, 3.65, 3.39),
        "USF, searched": (13.30, 6.81, 5.40, 4.05, 3.60, 3.00, 2.83, 2.70),
    },
)
USF_CIFAR10_EDM = Table(
    title="FID on CIFAR-10, EDM's model, against evaluations",
    source="USF's repository, README (arXiv 2312.07243)",
    how=_TUNED,
    x_label="evaluations per sample",
    x=_BUDGETS,
    rows={
        "DPM-Solver++": (110.71, 46.47, 25.14, 12.31, 6.96, 4.61, 3.51, 3.08),
        "UniPC": (110.3, 44.38, 24.15, 11.52, 6.03, 4.05, 3.31, 2.98),
        "DPM-Solver-v3": (85.18, 27.18, 12.45, 8.76, 5.60, 3.66, 2.84, 2.62),
        "USF, searched": (10.42, 6.43, 3.93, 2.48, 2.42, 2.43, 2.33, 2.20),
    },
)
USF_IMAGENET = Table(
    title="FID-50K on ImageNet 256, guided diffusion, against evaluations",
    source="USF's repository, README (arXiv 2312.07243)",
    how=_TUNED,
    x_label="evaluations per sample",
    x=_BUDGETS,
    rows={
        "DPM-Solver++": (53.14, 26.3, 16.97, 12.92, 11.04, 9.88, 9.14, 8.75),
        "UniPC": (53.30, 25.00, 15.65, 11.86, 10.20, 9.30, 8.75, 8.43),
        "DPM-Solver-v3": (57.52, 26.87, 15.21, 11.30, 9.74, 8.93, 8.54, 8.22),
        "USF, searched": (32.71, 18.64, 13.42, 10.80, 9.57, 8.85, 8.34, 8.18),
    },
)
DEIS_CIFAR10 = Table(
    title="FID on CIFAR-10, VP model, against evaluations",
    source="DEIS, arXiv 2204.13902, abstract",
    how="read from the text",
    x_label="evaluations per sample",
    x=(10.0, 15.0),
    rows={"DEIS": (4.17, 3.37)},
)

SPECTR_SPEED = Table(
    title="times faster, wall clock, quality unchanged",
    source="SpecTr, arXiv 2310.15141, abstract",
    how="read from the text",
    x_label="one setting",
    x=(1.0,),
    rows={"over autoregressive decoding": (2.13,), "over speculative decoding": (1.37,)},
)
SEQUOIA_SPEED = Table(
    title="times faster than autoregressive decoding, at best, on one A100: Llama2-7B, Llama2-13B, Vicuna-33B",
    source="Sequoia, arXiv 2402.12374, abstract of the NeurIPS 2024 version",
    how="read from the text",
    x_label="billions of parameters of the target",
    x=(7.0, 13.0, 33.0),
    rows={"Sequoia": (4.04, 3.73, 2.27)},
)
VLLM_TREES = Table(
    title="chain and tree of drafts on MT-bench, both with the same attention backend",
    source="vllm-project/vllm, pull request 22752 (closed)",
    how="read from a table",
    x_label="batch size",
    x=(1.0, 8.0, 16.0),
    rows={
        "chain, tokens per target pass": (2.05, 2.06, 2.05),
        "tree, tokens per target pass": (2.37, 2.37, 2.38),
        "chain, tokens per second": (114.27, 847.38, 1567.5),
        "tree, tokens per second": (128.63, 902.72, 1640.95),
    },
)
