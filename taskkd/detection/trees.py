"""The embedded sample: tree crowns in aerial images, cut into parts that share no pixel."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from taskkd.detection.coco import read_coco
from taskkd.detection.records import Annotations, Record
from taskkd.detection.tiles import region, tiles

__all__ = ["REGIONS", "tree_crowns"]

#: the parts of the sample's images: file, part, (x0, y0, x1, y1); no pixel is in two of them
REGIONS = (
    ("2019_YELL_2_541000_4977000_image_crop.jpg", "train", (0, 0, 750, 1035)),
    ("2019_YELL_2_541000_4977000_image_crop.jpg", "validation", (750, 0, 1000, 1035)),
    ("2019_YELL_2_541000_4977000_image_crop.jpg", "test", (1000, 0, 1249, 1035)),
    ("OSBS_029.jpg", "train", (0, 0, 400, 200)),
    ("OSBS_029.jpg", "validation", (0, 200, 200, 400)),
    ("OSBS_029.jpg", "test", (200, 200, 400, 400)),
    ("SOAP_061.jpg", "train", (0, 0, 400, 200)),
    ("SOAP_061.jpg", "validation", (0, 200, 200, 400)),
    ("SOAP_061.jpg", "test", (200, 200, 400, 400)),
)


def tree_crowns(size: int = 256, *, overlap: int = 0) -> dict[str, Annotations]:
    """The embedded sample: tree crowns in aerial images of three sites, of one class, "Tree".

    Three images are too few to hold whole ones out, so each is cut into three regions that share no pixel, one for
    each part, and the regions into tiles. The parts show the same sites: results say nothing on other forests.
    A tree that a region or tile shows less than half of is ignored (see `Record.iscrowd`).

    Args:
        size: the largest side of a tile in pixels.
        overlap: of the training tiles, in pixels.

    Returns:
        "train", "validation" and "test".

    The images are of the National Ecological Observatory Network (NEON), the boxes of DeepForest (Weinstein et al.
    2019, 2020), MIT licence.
    """
    with as_file(files("taskkd.detection") / "samples" / "tree_crowns.zip") as path:
        whole = read_coco(path)
    images = {Path(r.source.name).name: r for r in whole.records}
    parts: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    for number, (name, part, window) in enumerate(REGIONS, 1):
        parts[part].append(region(images[name], window, image_id=number, group=f"{name}, {part}"))
    cut: dict[str, Annotations] = {}
    start = 1
    for part, regions in parts.items():
        found = tiles(regions, size, overlap=overlap if part == "train" else 0, start=start)
        start += len(found)
        cut[part] = Annotations(found, whole.classes, whole.category_ids)
    return cut
