"""The data set of the quality table of segmentation, written as folders of images and masks.

    nuclei  DSB2018 (Caicedo et al. 2019, CC0): 334 grey microscopy images of 256 x 256 pixels; background, nucleus and
            border, the rim of a pixel on both sides of each edge (`taskkd.segmentation.nuclei.three_classes`).

Whole images are in one part only. The file has no word on which images are of one slide; no two of them are alike (the
highest correlation of any two, of blocks of 8 x 8 pixels, is 0.45), so nothing is known that would divide them better.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.io import write_png

from taskkd.segmentation.nuclei import CLASSES, three_classes

__all__ = ["CLASSES", "NUCLEI", "PARTS", "write_nuclei"]

PARTS = ("train", "validation", "test")
NUCLEI = "dsb2018_gray256.npz"


def write_nuclei(source: Path, folder: Path, sizes: tuple[int, int, int] = (160, 54, 120)) -> dict[str, object]:
    """DSB2018 as `<part>/images/*.png` and `<part>/masks/*.png`; what is there already stays.

    Args:
        source: the folder with `dsb2018_gray256.npz` (`images` (n, 256, 256) uint8, `instances` the same, 0 is the
            background, `ids`).
        folder: where it is written.
        sizes: images in train, validation and test, the same as in the detection table.

    Returns:
        The section `data` of a recipe.

    Raises:
        SystemExit: the file is missing.
    """
    recipe = {"folder": {part: str(folder / part) for part in PARTS} | {"classes": list(CLASSES)}}
    if all(len(list((folder / p / "masks").glob("*.png"))) == size for p, size in zip(PARTS, sizes, strict=True)):
        return recipe
    path = source / NUCLEI
    if not path.is_file():
        sys.exit(f"{path} is missing: name its folder with --source or TASKKD_DATA.")
    data = np.load(path, allow_pickle=False)
    images, instances, ids = data["images"], data["instances"], data["ids"]
    order = np.random.default_rng(0).permutation(len(images))
    starts = np.cumsum([0, *sizes])
    for part, first, last in zip(PARTS, starts[:-1], starts[1:], strict=True):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
        for index in order[first:last]:
            for kind, pixels in (("images", images[index]), ("masks", three_classes(instances[index]))):
                write_png(torch.from_numpy(pixels)[None], str(folder / part / kind / f"{ids[index][:16]}.png"))
    return recipe
