"""A folder in COCO's layout with small pictures of squares and discs, for whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["write"]


def write(folder: Path, count: int = 12, *, size: int = 64, seed: int = 0) -> Path:
    """Write `count` images (every sixth without objects) and `annotations.json`; the path of the latter."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    rows, columns = np.mgrid[:size, :size]
    for number in range(1, count + 1):
        picture = draw.integers(90, 130, (size, size, 3)).astype(np.uint8)
        for _ in range(0 if number % 6 == 0 else draw.integers(1, 4)):
            side = int(draw.integers(14, 28))
            x, y = (int(v) for v in draw.integers(0, size - side, 2))
            kind = int(draw.integers(2))
            if kind:
                middle = (rows - y - side / 2) ** 2 + (columns - x - side / 2) ** 2 < (side / 2) ** 2
                picture[middle] = (30, 60, 230)
            else:
                picture[y : y + side, x : x + side] = (230, 60, 30)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": [3, 7][kind], "iscrowd": 0,
                 "bbox": [x, y, side, side], "area": side * side}
            )  # fmt: skip
        Image.fromarray(picture).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": size, "height": size})
    categories = [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path
