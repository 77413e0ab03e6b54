"""Images with their masks as every reader gives them, and what is done about bad ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from taskkd.errors import DataError
from taskkd.images import Source, decode, header_size
from taskkd.problems import Problems, usable
from taskkd.segmentation.labels import IGNORE, Labels
from taskkd.splits import spans

__all__ = ["Annotations", "Bad", "Record", "checked", "decoded", "image_of", "tiles", "window_of"]

logger = logging.getLogger(__name__)

#: what to do about a bad image or mask: stop with an error, or leave it out and say how many there were
Bad: TypeAlias = Literal["error", "skip"]


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """One image and its mask.

    Args:
        source: the image file.
        mask: the file of its mask; None: it has no labels.
        labels: what the mask's values mean.
        image_id: unique among the records of a data set.
        crop: (x0, y0, x1, y1), the part of the files that this is; None: all of it.
        group: records of one group stay on one side of a split; by default the image file.
    """

    source: Source
    mask: Source | None
    labels: Labels
    image_id: int
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
        records: one for each image.
        classes: names; label k is `classes[k]`.
        notes: sentences on what was left out.
    """

    records: list[Record]
    classes: list[str]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)


def decoded(record: Record) -> tuple[Tensor, Tensor]:
    """The whole image (3, H, W) and labels (H, W), both uint8, of a record's files; its crop is not applied.

    Raises:
        DataError: a file is missing or damaged, the two differ in size, or the mask has an unknown value.
    """
    image = decode(record.source, record.image_id)
    height, width = image.shape[-2:]
    if record.mask is None:
        return image, torch.full((height, width), IGNORE, dtype=torch.uint8)
    labels = torch.from_numpy(record.labels.decode(record.mask))
    if labels.shape != (height, width):
        raise DataError(
            f"{record.mask.name}: the mask has {labels.shape[1]}x{labels.shape[0]} pixels, its image "
            f"{record.source.name} has {width}x{height}."
        )
    return image, labels


def window_of(record: Record, image: Tensor) -> Tensor:
    """The part of a file's image or labels (..., H, W) that a record is of.

    Raises:
        DataError: the image is smaller than the part.
    """
    if record.crop is None:
        return image
    height, width = image.shape[-2:]
    x0, y0, x1, y1 = record.crop
    if x1 > width or y1 > height:
        raise DataError(
            f"{record.source.name} (image id {record.image_id}): the image has {width}x{height} pixels, expected at "
            f"least {x1}x{y1}."
        )
    return image[..., y0:y1, x0:x1]


def image_of(record: Record) -> Tensor:
    """(3, H, W) uint8 of a record, without its labels."""
    return window_of(record, decode(record.source, record.image_id))


def checked(records: Iterable[Record], problems: Problems) -> list[Record]:
    """The records whose images and masks can be decoded, fit together and have known values.

    Where bad ones are errors nothing is read here: files are decoded in training, and a bad one is an error then.
    Where they are left out this takes one pass over all of them.

    Raises:
        DataError: there is no record, or none that is left.
    """
    return usable(records, problems, decoded, "images and masks")


def tiles(records: Sequence[Record], size: int, *, overlap: int = 0, start: int = 1) -> list[Record]:
    """Cut images into tiles, evenly: 1035 pixels at `size` 256 become five tiles of 207.

    Args:
        records: the images; one that is not larger than a tile stays whole.
        size: the largest side of a tile in pixels.
        overlap: of neighbouring tiles, in pixels, at least; for training. Evaluation counts what is in two tiles twice.
        start: image id of the first tile; the others follow.

    Raises:
        DataError: `size` or `overlap` are out of range, or an image's header cannot be read.
    """
    if size < 1 or not 0 <= overlap < size:
        raise DataError(
            f"tiles of {size} pixels that overlap by {overlap}: expected size >= 1 and 0 <= overlap < size."
        )
    cut: list[Record] = []
    for record in records:
        height, width = header_size(record.source, record.image_id)
        left, top, right, bottom = record.crop or (0, 0, width, height)
        for y0, y1 in spans(bottom - top, size, overlap):
            for x0, x1 in spans(right - left, size, overlap):
                crop = (left + x0, top + y0, left + x1, top + y1)
                cut.append(replace(record, image_id=start + len(cut), crop=crop, group=record.side))
    return cut
