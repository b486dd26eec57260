"""The data set "glyphs": digits and capital letters of many typefaces, drawn on demand.

Its true distribution can be sampled at will, so a distance to the data needs no download.
Letters come from the TrueType fonts which matplotlib carries: DejaVu, STIX and Computer Modern (licences: see
the model cards).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

CLASSES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIZE = 24  # pixels per side of an image
SPLITS = ("train", "held_out")

# Every bundled text font with all 36 characters as ordinary letters. Left out after a look: the display and
# STIX size/non-Unicode fonts (empty), LastResort (boxes), cmex10 and cmsy10 (symbols), cmmi10 (old-style
# digits, whose 0 and 1 are small letters o and i).
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSans-Oblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSansMono-Oblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "STIXGeneralItalic",
    "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip

_OVERSAMPLE = 3  # each pixel is the mean of 3x3 samples
MASTER = (
    2 * SIZE * _OVERSAMPLE
)  # side of a master drawing; twice the canvas, so that no turned letter is cut
_CAP_HEIGHT = 14.5  # pixels of a capital H before the random size
_MAX_TURN = math.radians(8.0)
_MAX_SHIFT = 1.25  # pixels
_SIZES = (0.86, 1.10)


@functools.cache
def masters() -> list:
    """One centred drawing per (font, class), as PIL images of MASTER^2, font-major."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawings = []
    for name in FONTS:
        path = str(folder / f"{name}.ttf")
        # Layout BASIC does not depend on whether the Pillow build has Raqm, so all machines draw the same.
        box = ImageFont.truetype(path, 200, layout_engine=ImageFont.Layout.BASIC).getbbox("H")
        points = round(200 * _CAP_HEIGHT * _OVERSAMPLE / (box[3] - box[1]))
        font = ImageFont.truetype(path, points, layout_engine=ImageFont.Layout.BASIC)
        for letter in CLASSES:
            left, top, right, bottom = font.getbbox(letter)
            drawing = Image.new("L", (MASTER, MASTER), 0)
            corner = ((MASTER - left - right) / 2, (MASTER - top - bottom) / 2)
            ImageDraw.Draw(drawing).text(corner, letter, fill=255, font=font)
            drawings.append(drawing)
    return drawings


def glyphs(
    n: int, split: Literal["train", "held_out"] = "train", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `n` independent images with their labels.

    Class, typeface, turn (up to 8 degrees), shift (up to 1.25 pixels per axis) and size (.86 to 1.10) are
    uniform. The same (split, seed) gives the same stream, of which a smaller `n` is a prefix; each split has
    streams of its own.

    Args:
        n: number of images, at least 1.
        split: "train" or "held_out".
        seed: a non-negative integer; other seeds give other draws of the same split.

    Returns:
        images, float32 of shape (n, 1, 24, 24), -1 (ground) to 1 (ink);
        labels, int64 of shape (n,), indices into `CLASSES`.

    Raises:
        ValueError: for an argument out of its range, naming the argument, its value and what is allowed.
    """
    import torch
    from PIL import Image

    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"n is {n!r}; it must be an integer of at least 1")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(map(repr, SPLITS))}")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed is {seed!r}; it must be an integer of at least 0")

    # Row by row, so that glyphs(100) is the beginning of glyphs(1000).
    uniform = np.random.default_rng([SPLITS.index(split), int(seed)]).random((int(n), 6))
    labels = (uniform[:, 0] * len(CLASSES)).astype(np.int64)
    fonts = (uniform[:, 1] * len(FONTS)).astype(np.int64)
    turn = (2 * uniform[:, 2] - 1) * _MAX_TURN
    shift = (2 * uniform[:, 3:5] - 1) * _MAX_SHIFT * _OVERSAMPLE
    size = _SIZES[0] + (_SIZES[1] - _SIZES[0]) * uniform[:, 5]

    # PIL wants the map from output to input: centre, undo shift, undo turn and size, centre of the master.
    cosine, sine = np.cos(turn) / size, np.sin(turn) / size
    canvas = SIZE * _OVERSAMPLE
    x0, y0 = canvas / 2 + shift[:, 0], canvas / 2 + shift[:, 1]
    coefficients = np.stack(
        [
            cosine, sine, MASTER / 2 - cosine * x0 - sine * y0,
            -sine, cosine, MASTER / 2 + sine * x0 - cosine * y0,
        ],
        axis=1,
    ).tolist()  # fmt: skip

    drawings = masters()
    ink = np.empty((int(n), SIZE, SIZE), dtype=np.float32)
    chunk = 1024  # bounds the memory of the oversampled drawings
    fine = np.empty((chunk, canvas, canvas), dtype=np.uint8)
    for start in range(0, int(n), chunk):
        stop = min(start + chunk, int(n))
        for row in range(start, stop):
            master = drawings[fonts[row] * len(CLASSES) + labels[row]]
            fine[row - start] = master.transform(
                (canvas, canvas), Image.Transform.AFFINE, coefficients[row], Image.Resampling.BILINEAR
            )
        cells = fine[: stop - start].reshape(-1, SIZE, _OVERSAMPLE, SIZE, _OVERSAMPLE)
        ink[start:stop] = cells.sum(axis=(2, 4), dtype=np.uint16)
    images = torch.from_numpy(ink).mul_(2 / (255 * _OVERSAMPLE**2)).sub_(1)
    return images[:, None], torch.from_numpy(labels)
