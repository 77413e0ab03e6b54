"""Detection data: COCO, Pascal VOC and HF data sets, the embedded sample, and the batches that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from taskkd.detection.coco import read_coco
from taskkd.detection.records import Annotations, Array, Bad, Record, cropped, pixels
from taskkd.detection.tiles import region, tiles
from taskkd.detection.voc import read_voc
from taskkd.errors import DataError
from taskkd.images import decode

__all__ = ["DetectionDataset", "collate", "read", "tree_crowns"]


def read(
    path: str | Path,
    images: str | Path | None = None,
    *,
    part: str | None = None,
    classes: Sequence[str] | None = None,
    bad: Bad = "error",
) -> Annotations:
    """Read annotations by what the path is: a COCO json or zip file, or a folder in the layout of Pascal VOC.

    Args:
        path: the file or folder.
        images: the folder of a json file's images; see `read_coco`.
        part: the list of images of a VOC folder; default "trainval".
        classes: names in the order of the labels; give the training data's to the other parts.
        bad: "error" or "skip"; see `read_coco`.

    Raises:
        DataError: neither, or as `read_coco` and `read_voc`.
    """
    path = Path(path)
    if (path / "ImageSets").is_dir():
        return read_voc(path, part or "trainval", classes=classes, bad=bad)
    if path.is_dir():
        found = next(iter(sorted(path.glob("*.json"))), None)
        shown = "" if found is None else f" ({found}?)"
        raise DataError(f"{path}: no folder ImageSets in it, as VOC has; of COCO data name the json file{shown}.")
    if path.suffix not in (".json", ".zip"):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder.")
        raise DataError(f"{path}: expected a COCO .json or .zip file, or a folder in the layout of VOCdevkit/VOC2007.")
    return read_coco(path, images, classes=classes, bad=bad)


class DetectionDataset(Dataset[Any]):
    """Images and boxes as detectors of torchvision take them.

    A sample is `{"images": (3, H, W) float32 in 0..1, "targets": {...}, "id": int}`; its targets are `boxes` (n, 4)
    xyxy float32 in pixels, `labels` (n,) int64 1..C, `area` (n,) float32, `iscrowd` (n,) int64 (all 0), `image_id`
    () int64 and `size` (2,) int64, height and width. Crowds and difficult objects are in none of these.

    Args:
        annotations: as a reader gives them.
        ignored: also give what is to be ignored in evaluation, under names that no detector reads: `ignored_boxes`,
            `ignored_labels`, `ignored_area`.
        held: keep every image file's pixels in memory (one byte for each of 3 H W): for few images, or tiles of them.

    Raises:
        DataError: an image cannot be read or is of another size than the annotations say, when it is asked for.
    """

    def __init__(self, annotations: Annotations, *, ignored: bool = False, held: bool = False) -> None:
        self.annotations, self.ignored = annotations, ignored
        self._held: dict[str, Tensor] | None = None
        if held:
            sources = {r.source.name: r for r in annotations.records}
            self._held = {name: decode(r.source, r.image_id) for name, r in sources.items()}

    @property
    def records(self) -> list[Record]:
        """One for each sample."""
        return self.annotations.records

    @property
    def classes(self) -> list[str]:
        """Names; label k is `classes[k - 1]`."""
        return self.annotations.classes

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = pixels(record) if self._held is None else cropped(self._held[record.source.name], record)
        return {"images": image.float() / 255, "targets": self._targets(record), "id": record.image_id}

    def _targets(self, record: Record) -> dict[str, Tensor]:
        boxes = _tensors(record, ~record.iscrowd)
        targets = {**boxes, "iscrowd": torch.zeros_like(boxes["labels"])}
        targets["image_id"] = torch.tensor(record.image_id)
        targets["size"] = torch.tensor(record.size)
        if self.ignored:
            targets |= {f"ignored_{name}": value for name, value in _tensors(record, record.iscrowd).items()}
        return targets


def _tensors(record: Record, chosen: Array) -> dict[str, Tensor]:
    return {
        "boxes": torch.from_numpy(record.boxes[chosen].astype(np.float32)),
        "labels": torch.from_numpy(record.labels[chosen]),
        "area": torch.from_numpy(record.area[chosen].astype(np.float32)),
    }


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch `{"images": list, "targets": list, "id": (n,) int64}`: images keep their sizes."""
    return {
        "images": [s["images"] for s in samples],
        "targets": [s["targets"] for s in samples],
        "id": torch.tensor([s["id"] for s in samples], dtype=torch.int64),
    }


#: the parts of the sample's images: file, part, (x0, y0, x1, y1); no pixel is in two of them
TREE_REGIONS = (
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
    for number, (name, part, window) in enumerate(TREE_REGIONS, 1):
        parts[part].append(region(images[name], window, image_id=number, group=f"{name}, {part}"))
    cut: dict[str, Annotations] = {}
    start = 1
    for part, regions in parts.items():
        found = tiles(regions, size, overlap=overlap if part == "train" else 0, start=start)
        start += len(found)
        cut[part] = Annotations(found, whole.classes, whole.category_ids)
    return cut
