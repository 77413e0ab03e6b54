"""Images with their boxes as every reader gives them, and what is done about bad ones."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from taskkd.errors import DataError, nearest
from taskkd.images import Source, decode
from taskkd.problems import Problems as _Problems
from taskkd.problems import usable

__all__ = ["Annotations", "Array", "Bad", "Boxes", "Problems", "Record", "checked", "label_of"]

logger = logging.getLogger(__name__)

Array: TypeAlias = npt.NDArray[Any]
#: what to do about a bad box or image: stop with an error, or leave it out and say how many there were; "skip_boxes"
#: leaves out boxes only, which needs no look at the images
Bad: TypeAlias = Literal["error", "skip", "skip_boxes"]


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """One image and what is known of it.

    Args:
        source: the image file.
        image_id: unique among the records of a data set.
        size: (height, width) in pixels, of the crop where there is one.
        boxes: (n, 4) xyxy float64 in pixels of the image (of the crop).
        labels: (n,) int64, 1..C; 0 is the background.
        area: (n,) float64, of the objects in pixels: COCO's own (of their masks), else of the boxes.
        iscrowd: (n,) bool: crowds of COCO, difficult objects of VOC, objects that a tile shows little of. They are
            left out of training and neither right nor wrong in evaluation.
        annotation_ids: (n,) int64, as in the file.
        where: the annotation file, for errors.
        crop: (x0, y0, x1, y1), the part of the file's image that this is; None: all of it.
        group: records of one group stay on one side of a split; by default the image file.
    """

    source: Source
    image_id: int
    size: tuple[int, int]
    boxes: Array
    labels: Array
    area: Array
    iscrowd: Array
    annotation_ids: Array
    where: str = ""
    crop: tuple[int, int, int, int] | None = None
    group: str = ""

    @property
    def side(self) -> str:
        """What may stand on one side of a split only."""
        return self.group or self.source.name


@dataclass(frozen=True)
class Annotations:
    """What a reader gives.

    Args:
        records: one for each image, those without boxes too.
        classes: names; label k is `classes[k - 1]`.
        category_ids: the number that the file has for a label, `category_ids[k - 1]`: for results in the file's terms.
        notes: sentences on what was left out or clipped.
    """

    records: list[Record]
    classes: list[str]
    category_ids: list[int]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def summary(self) -> str:
        """One line with the numbers of images and boxes."""
        crowd = sum(int(r.iscrowd.sum()) for r in self.records)
        boxes = sum(len(r.boxes) for r in self.records) - crowd
        empty = sum(not len(r.boxes) for r in self.records)
        line = f"{len(self.records)} images, {boxes} boxes of {len(self.classes)} classes"
        return (
            line + (f", {crowd} ignored boxes" if crowd else "") + (f", {empty} images without boxes" if empty else "")
        )


class Problems(_Problems):
    """What is wrong with a data set: the first of it is an error, or it is counted.

    Args:
        where: the annotation file.
        bad: see `Bad`.

    Raises:
        DataError: no such way of dealing with bad data.
    """

    def __init__(self, where: str, bad: Bad) -> None:
        super().__init__(where, bad, ("error", "skip", "skip_boxes"))
        self.clipped = 0

    def is_error(self, kind: str) -> bool:
        """Whether a bad one of a kind stops the reading."""
        return super().is_error(kind) or (self.bad == "skip_boxes" and kind != "boxes")

    def notes(self) -> list[str]:
        """A sentence for each kind of thing that was left out or changed; the former are logged, too."""
        lines = super().notes()
        if self.clipped:
            lines.append(f"{self.where}: {self.clipped} boxes stuck out of their images and were clipped.")
        return lines


class Boxes:
    """Collects the boxes of one image."""

    def __init__(self, size: tuple[int, int], problems: Problems) -> None:
        self.size, self.problems = size, problems
        self.rows: list[tuple[list[float], int, float, bool, int]] = []

    def add(
        self, box: Any, label: int, *, annotation_id: int, where: str, area: Any = None, iscrowd: bool = False
    ) -> None:
        """Add a box, clipped to the image.

        Args:
            box: x0, y0, x1, y1 in pixels.
            label: 1..C.
            annotation_id: in the file.
            where: file, image and annotation, for errors.
            area: of the object; default: of the box.
            iscrowd: whether it is to be ignored.

        Raises:
            DataError: it is degenerate, and bad boxes are errors.
        """
        height, width = self.size
        try:
            x0, y0, x1, y1 = (float(v) for v in box)
        except (TypeError, ValueError, OverflowError):
            self.problems.left_out("boxes", f"{where}: the box is {box!r}, expected four numbers")
            return
        inside = [max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))]
        fault = ""
        if not math.isfinite(x0 + y0 + x1 + y1):
            fault = "is not finite"
        elif x1 <= x0 or y1 <= y0:
            fault = "has no area"
        elif inside[2] <= inside[0] or inside[3] <= inside[1]:
            fault = f"lies outside of its image of {width}x{height} pixels"
        if fault:
            self.problems.left_out("boxes", f"{where}: the box x {x0:g} to {x1:g}, y {y0:g} to {y1:g} {fault}")
            return
        # Files that round their numbers stick out by a fraction of a pixel everywhere.
        self.problems.clipped += max(-x0, -y0, x1 - width, y1 - height) > 1
        own = area if isinstance(area, int | float) and 0 < area <= sys.float_info.max else None
        full = (inside[2] - inside[0]) * (inside[3] - inside[1])
        self.rows.append((inside, label, float(own if own is not None else full), iscrowd, annotation_id))

    def record(self, source: Source, image_id: int, where: str) -> Record:
        """The record of the image with the boxes so far."""
        boxes, labels, area, crowd, ids = zip(*self.rows, strict=True) if self.rows else ((), (), (), (), ())
        return Record(
            source,
            image_id,
            self.size,
            np.array(boxes, np.float64).reshape(-1, 4),
            np.array(labels, np.int64),
            np.array(area, np.float64),
            np.array(crowd, bool),
            np.array(ids, np.int64),
            where,
        )


def label_of(name: str, classes: Sequence[str], where: str) -> int:
    """The label 1..C of a class name.

    Raises:
        DataError: there is no such class.
    """
    if name not in classes:
        known = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
        raise DataError(f"{where}: no class {name!r}{nearest(name, classes)}; known: {known}.")
    return list(classes).index(name) + 1


def checked(records: Iterable[Record], problems: Problems) -> list[Record]:
    """The records whose images can be decoded and are of the size that the annotations say.

    Where bad images are errors nothing is read here: images are decoded in training, and a bad one is an error then.
    Where it is left out this takes one pass over all the images.

    Raises:
        DataError: there is no record, or none that is left.
    """
    return usable(records, problems, pixels)


def pixels(record: Record) -> Any:
    """(3, H, W) uint8 of a record.

    Raises:
        DataError: the image cannot be read, or is of another size than the annotations say.
    """
    return cropped(decode(record.source, record.image_id), record)


def cropped(image: Any, record: Record) -> Any:
    """The part of a file's image (3, H, W) that a record is of.

    Raises:
        DataError: the image is of another size than the annotations say.
    """
    height, width = image.shape[-2:]
    x0, y0, x1, y1 = record.crop or (0, 0, width, height)
    if (y1 - y0, x1 - x0) != record.size or y1 > height or x1 > width:
        need = f"{record.size[1]}x{record.size[0]}" if record.crop is None else f"at least {x1}x{y1}"
        raise DataError(
            f"{record.source.name} (image id {record.image_id}): the image has {width}x{height} pixels, but "
            f"{record.where or 'its annotation'} says {need}."
        )
    return image[:, y0:y1, x0:x1]
