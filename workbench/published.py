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
