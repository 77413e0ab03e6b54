"""Tiny data on disk: images with discs and squares, in the layouts that people have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["ground", "disc", "square"]


def scene(number: int, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) uint8 and its labels (H, W): a disc and a square of other colours on noise."""
    draw = np.random.default_rng(number)
    image = draw.integers(60, 110, (side, side, 3)).astype(np.uint8)
    labels = np.zeros((side, side), np.uint8)
    y, x = np.mgrid[:side, :side]
    cy, cx = draw.integers(12, side - 12, 2)
    disc = (y - cy) ** 2 + (x - cx) ** 2 < 90
    labels[disc], image[disc] = 1, (210, 70, 70)
    top, left = draw.integers(2, side - 20, 2)
    labels[top : top + 16, left : left + 16] = 2
    image[top : top + 16, left : left + 16] = (70, 90, 220)
    return image, labels


def folder(root: Path, count: int = 12, *, side: int = 64, names: bool = True) -> Path:
    """`images/` and `masks/` of scenes, and `classes.txt`."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, labels = scene(number, side)
        Image.fromarray(image).save(root / "images" / f"{number:03}.png")
        Image.fromarray(labels).save(root / "masks" / f"{number:03}.png")
    if names:
        (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root
