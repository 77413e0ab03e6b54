"""The embedded sample: nuclei in one fluorescence microscopy image, cut into parts that share no pixel."""

from __future__ import annotations

import io
from importlib.resources import as_file, files
from typing import Any

import numpy as np

from taskkd.images import Source, in_memory
from taskkd.segmentation.labels import Array, labels_of
from taskkd.segmentation.records import Annotations, Record, tiles

__all__ = ["CLASSES", "REGIONS", "nuclei", "three_classes"]

CLASSES = ("background", "nucleus", "border")
#: (x0, y0, x1, y1) of each part
REGIONS = {"train": (0, 0, 320, 512), "validation": (320, 0, 416, 512), "test": (416, 0, 512, 512)}


def three_classes(instances: Array, radius: int = 1) -> Array:
    """Background, nucleus and border (0, 1, 2) from the numbers of nuclei.

    Border is every pixel, of a nucleus or of the background, whose square of 2 * radius + 1 pixels holds two different
    numbers: the rim of `radius` pixels on both sides of each edge, also between nuclei that touch. (Cf. the boundary
    class of Caicedo et al. 2019, two pixels wide.)

    Args:
        instances: (H, W) whole numbers; 0 is the background.
        radius: in pixels.

    Returns:
        (H, W) uint8.
    """
    height, width = instances.shape
    around = np.pad(instances, radius, mode="edge")
    steps = range(2 * radius + 1)
    windows = [around[y : y + height, x : x + width] for y in steps for x in steps]
    border = np.maximum.reduce(windows) != np.minimum.reduce(windows)
    found: Array = np.where(border, 2, instances > 0).astype(np.uint8)
    return found


def nuclei(size: int = 128, *, overlap: int = 64) -> dict[str, Annotations]:
    """The embedded sample: 125 nuclei in one image of 512 x 512 pixels; background, nucleus and border.

    One image is too little to hold whole ones out: the left 320 columns are for training, in tiles, 96 each for
    validation and test, whole. The parts show the same slide: results say nothing on other microscopes.

    Args:
        size: the largest side of a training tile in pixels.
        overlap: of the training tiles, in pixels.

    Returns:
        "train", "validation" and "test".

    The image is of StarDist (Schmidt et al. 2018), BSD-3-Clause licence.
    """
    with as_file(files("taskkd.segmentation") / "samples" / "nuclei_512.npz") as path:
        data = np.load(path, allow_pickle=False)
        image, instances = data["image"].astype(np.uint8), data["instances"]
    source, mask = _png("image", image), _png("classes", three_classes(instances))
    labels = labels_of(CLASSES)
    parts = {}
    for number, (part, crop) in enumerate(REGIONS.items(), 1):
        records = [Record(source, mask, labels, 1000 + number, crop, part)]
        if part == "train":
            records = tiles(records, size, overlap=overlap)
        parts[part] = Annotations(records, list(CLASSES))
    return parts


def _png(name: str, array: Any) -> Source:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return in_memory(f"nuclei_512.npz/{name}", content.getvalue())
