"""Images and boxes by what a path is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from taskkd.detection.coco import read_coco
from taskkd.detection.records import Annotations, Bad
from taskkd.detection.voc import read_voc
from taskkd.errors import DataError

__all__ = ["read"]


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
