"""Pictures to files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def save_grid(images: Any, path: str | os.PathLike[str], columns: int | None = None) -> Path:
    """Write pictures side by side, row by row, as one PNG file, whole or not at all; returns its path.

    images: (n, H, W) or (n, H, W, 3) uint8, as a problem's `images` gives them, or a list of PIL images of one size, as
    pipelines give them. columns: pictures per row (default: the square root of n, rounded up); what is left of the last
    row stays black. Raises ValueError for no images, other shapes or types, fewer than 1 column or another suffix.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path={str(path)!r}: expected a name that ends in .png")
    listed = [np.asarray(image) for image in images] if isinstance(images, Sequence) else None
    if listed is not None and len({(a.shape, a.dtype) for a in listed}) > 1:
        raise ValueError(f"images of different sizes, {sorted({str(a.shape) for a in listed})}: expected one size")
    stack = np.asarray(images) if listed is None else np.stack(listed) if listed else np.zeros((0, 0, 0), np.uint8)
    is_known = stack.ndim == 3 or (stack.ndim == 4 and stack.shape[3] == 3)
    if not is_known or stack.dtype != np.uint8 or not len(stack):
        raise ValueError(f"images of shape {stack.shape}, {stack.dtype}: expected uint8 of shape (n, H, W) or "
                         "(n, H, W, 3), n at least 1")
    columns = math.ceil(math.sqrt(len(stack))) if columns is None else columns
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
        raise ValueError(f"columns={columns!r}: expected an integer of at least 1")
    columns = min(columns, len(stack))
    rows = -(-len(stack) // columns)
    height, width, channels = *stack.shape[1:3], stack.shape[3:]
    grid = np.zeros((rows * columns, height, width, *channels), np.uint8)
    grid[: len(stack)] = stack
    grid = grid.reshape(rows, columns, height, width, *channels).swapaxes(1, 2)
    picture = Image.fromarray(grid.reshape(rows * height, columns * width, *channels))
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        picture.save(part, format="PNG")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
