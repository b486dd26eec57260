"""The data set "clutter": one whole letter at a random place and size, among fragments of others, on an uneven ground.

The letters are those of `workbench.zoo.glyphs`, 36 classes in 21 typefaces. An image of 48 x 48 pixels falls into 64
patches of 6 x 6, of which the letter touches ten or eleven on average; the others tell nothing about its class. How
many fragments lie about differs from image to image, so that some need a closer look than others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.zoo.glyphs import CLASSES, FONTS, MASTER, SPLITS, masters

SIDE = 48  # pixels per side of an image
PATCH = 6  # pixels per side of a patch
CAP_HEIGHTS = (13.0, 20.0)  # pixels of a capital H
FRAGMENTS = 10  # at most; their number is uniform from 0
FRAGMENT = 9  # pixels per side
NOISE = 0.06  # of values from 0 to 1

_CELL = 36  # side of a letter in the atlas: half of the middle of its master drawing
_CELL_CAP_HEIGHT = 21.75  # there
_MARGIN = 0.7  # cap heights from a letter's centre to the edge of the image, so that it is whole
_MAX_TURN = 0.14  # radians, 8 degrees
_CHUNK = 2048  # images drawn at once, which bounds the memory


@functools.cache
def _atlas() -> Tensor:
    """Every letter of every typeface, font-major: (756, 36, 36), 0 (ground) to 1 (ink)."""
    low = (MASTER - 2 * _CELL) // 2
    cut = [np.asarray(drawing)[low : low + 2 * _CELL, low : low + 2 * _CELL] for drawing in masters()]
    fine = torch.from_numpy(np.stack(cut)).float().div_(255)
    return F.avg_pool2d(fine[:, None], 2)[:, 0]


def clutter(n: int, split: Literal["train", "held_out"] = "train", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw `n` independent images with their labels; 40,000 take some seconds on one core.

    Class, typeface, place, cap height (13 to 20 pixels), turn (up to 8 degrees) and brightness of the letter are
    uniform. The same (split, seed) gives the same stream, of which a smaller `n` is a prefix; each split has streams of
    its own.

    Args:
        n: number of images, at least 1.
        split: "train" or "held_out".
        seed: a non-negative integer; other seeds give other draws of the same split.

    Returns:
        images, float32 of shape (n, 1, 48, 48), -1 (dark) to 1 (bright; ink is bright);
        labels, int64 of shape (n,), indices into `CLASSES`.

    Raises:
        ValueError: for an argument out of its range, naming the argument, its value and what is allowed.
    """
    pieces = _pieces(n, split, seed)
    images, labels = torch.empty(n, 1, SIDE, SIDE), torch.empty(n, dtype=torch.int64)
    for rows, some, _, theirs in pieces:
        images[rows], labels[rows] = some, theirs
    return images, labels


def scenes(n: int, split: Literal["train", "held_out"] = "train", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`clutter`, and between its images and labels the letter's own ink (n, 1, 48, 48), 0 to 1: what lies where."""
    images, ink, labels = zip(*(piece[1:] for piece in _pieces(n, split, seed)), strict=True)
    return torch.cat(images), torch.cat(ink), torch.cat(labels)


def _pieces(n: int, split: str, seed: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Rows of the whole, with their images, ink and labels. The arguments are checked at once, not at the first."""
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"n is {n!r}; it must be an integer of at least 1")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(map(repr, SPLITS))}")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed is {seed!r}; it must be an integer of at least 0")
    # Row by row, so that clutter(100) is the beginning of clutter(1000); the noise has a stream of its own, and both
    # are streams that `glyphs` does not use.
    streams = np.random.SeedSequence([len(SPLITS) + SPLITS.index(split), int(seed)]).spawn(2)
    chance, noise = map(np.random.default_rng, streams)
    return (
        (slice(start, min(start + _CHUNK, n)), *_draw(min(_CHUNK, n - start), chance, noise))
        for start in range(0, n, _CHUNK)
    )


def _draw(n: int, chance: np.random.Generator, noise: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The next n images (n, 1, 48, 48), ink and labels (n,) of the streams."""
    uniform = torch.from_numpy(chance.random((n, 12 + 6 * FRAGMENTS)))
    labels, ink = _letters(uniform[:, :6])
    picture = _ground(uniform[:, 6:10])
    _strew(picture, uniform[:, 10], uniform[:, 12:].unflatten(1, (FRAGMENTS, 6)))
    picture.lerp_(_between(0.75, 1.0, uniform[:, 11, None, None]).expand_as(picture), ink)
    picture.add_(torch.from_numpy(noise.standard_normal(picture.shape, dtype=np.float32)), alpha=NOISE)
    return picture.clamp_(0, 1).mul_(2).sub_(1)[:, None], ink[:, None], labels


def patches_of(ink: Tensor) -> Tensor:
    """Which patches (n, 64), row by row, a letter's ink (n, 1, 48, 48) from `scenes` touches: bool."""
    return F.max_pool2d(ink, PATCH).flatten(1) > 0.1


def _between(low: float, high: float, uniform: Tensor) -> Tensor:
    return (low + (high - low) * uniform).float()


def _letters(uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (n,) and ink (n, 48, 48) of letters, from uniform numbers (n, 6)."""
    labels = (uniform[:, 0] * len(CLASSES)).long()
    fonts = (uniform[:, 1] * len(FONTS)).long()
    cap_height = _between(*CAP_HEIGHTS, uniform[:, 2])
    turn = _between(-_MAX_TURN, _MAX_TURN, uniform[:, 3])
    centre = _MARGIN * cap_height[:, None] + (SIDE - 2 * _MARGIN * cap_height[:, None]) * uniform[:, 4:6].float()
    # From pixels of the image about the letter's centre to the atlas, where -1 to 1 is the width of a cell.
    scale = _CELL_CAP_HEIGHT / cap_height / (_CELL / 2)
    cosine, sine = turn.cos() * scale, turn.sin() * scale
    axis = torch.arange(SIDE) + 0.5
    x, y = axis - centre[:, :1], axis - centre[:, 1:]  # (n, 48) each
    cosine, sine = cosine[:, None, None], sine[:, None, None]
    at = torch.stack([cosine * x[:, None] + sine * y[:, :, None], cosine * y[:, :, None] - sine * x[:, None]], dim=-1)
    cells = _atlas()[fonts * len(CLASSES) + labels]
    return labels, F.grid_sample(cells[:, None], at, align_corners=False)[:, 0]


def _ground(uniform: Tensor) -> Tensor:
    """Even slopes (n, 48, 48) of brightness, 0 to .45, from uniform numbers (n, 4): those of the corners."""
    corners = 0.45 * uniform.float().view(-1, 1, 2, 2)
    return F.interpolate(corners, size=(SIDE, SIDE), mode="bilinear", align_corners=True)[:, 0]


def _strew(ground: Tensor, count: Tensor, uniform: Tensor) -> None:
    """Lay fragments of letters on the ground (n, 48, 48), in place: where one is brighter, it shows.

    count: (n,), how many, as a share. uniform: (n, FRAGMENTS, 6): letter, what to cut, brightness, where to.
    """
    n = len(ground)
    letter = (uniform[:, :, 0] * len(_atlas())).long()
    # What is cut lies where letters have ink: within 6 cells' pixels of the edge there is none.
    cut = 6 + (uniform[:, :, 1:3] * (_CELL - 12 - FRAGMENT + 1)).long()
    place = (uniform[:, :, 4:6] * (SIDE - FRAGMENT + 1)).long()
    bright = _between(0.4, 1.0, uniform[:, :, 3])
    shown = torch.arange(FRAGMENTS) < (count[:, None] * (FRAGMENTS + 1)).long()
    inside = (torch.arange(FRAGMENT)[:, None] * _CELL + torch.arange(FRAGMENT)).flatten()
    onto = (torch.arange(FRAGMENT)[:, None] * SIDE + torch.arange(FRAGMENT)).flatten()
    source = letter * _CELL**2 + cut[:, :, 0] * _CELL + cut[:, :, 1]
    target = torch.arange(n)[:, None] * SIDE**2 + place[:, :, 0] * SIDE + place[:, :, 1]
    pieces = _atlas().flatten()[source[:, :, None] + inside] * (bright * shown)[:, :, None]
    ground.view(-1).scatter_reduce_(0, (target[:, :, None] + onto).flatten(), pieces.flatten(), "amax")
