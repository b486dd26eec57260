"""Grids of pictures as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from workbench.pictures import save_grid


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize(("columns", "layout"), [(None, (2, 3)), (2, (3, 2)), (9, (1, 5))])
def test_every_picture_is_in_its_place(channels: tuple[int, ...], columns: int | None, layout: tuple[int, int],
                                       tmp_path: Path) -> None:
    images = torch.randint(1, 256, (5, 4, 6, *channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = save_grid(images, tmp_path / "grid.png", columns)
    read = np.asarray(Image.open(path))
    assert read.shape[:2] == (layout[0] * 4, layout[1] * 6)
    for i in range(layout[0] * layout[1]):
        row, column = divmod(i, layout[1])
        place = read[row * 4 : row * 4 + 4, column * 6 : column * 6 + 6]
        assert (place == (images[i].numpy() if i < 5 else 0)).all()
    pictures = [Image.fromarray(image.numpy()) for image in images]
    assert (np.asarray(Image.open(save_grid(pictures, tmp_path / "list.png", columns))) == read).all()


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_grid(np.ones((1, 2, 2), np.uint8), tmp_path / "a.png")
    before = path.read_bytes()

    def half(self: Any, name: Any, **options: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="no space"):
        save_grid(np.zeros((4, 2, 2), np.uint8), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize(("images", "name", "columns", "words"), [
    ([], "a.png", None, r"images of shape \(0, 0, 0\)"),
    (np.zeros((1, 2, 2, 4), np.uint8), "a.png", None, r"\(1, 2, 2, 4\), uint8: expected uint8 of shape"),
    (np.zeros((1, 2, 2)), "a.png", None, "float64: expected uint8"),
    ([np.zeros((2, 2), np.uint8), np.zeros((3, 2), np.uint8)], "a.png", None, "images of different sizes"),
    (np.zeros((1, 2, 2), np.uint8), "a.jpg", None, r"a\.jpg': expected a name that ends in \.png"),
    (np.zeros((1, 2, 2), np.uint8), "a.png", 0, "columns=0: expected an integer of at least 1"),
    (np.zeros((1, 2, 2), np.uint8), "a.png", 1.5, r"columns=1\.5: expected an integer"),
])
def test_bad_arguments_are_named(images: Any, name: str, columns: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        save_grid(images, tmp_path / name, columns)
