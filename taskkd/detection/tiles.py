"""Large images cut into regions and tiles, and records divided so that no image is on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from taskkd.detection.records import Annotations, Record
from taskkd.errors import DataError
from taskkd.splits import divided, spans

__all__ = ["region", "split", "tiles"]


def region(
    record: Record,
    window: tuple[int, int, int, int],
    *,
    image_id: int,
    min_visible: float = 0.5,
    group: str | None = None,
) -> Record:
    """A part of an image as a record of its own, with the boxes clipped to it.

    Args:
        record: the image, or a part of one.
        window: (x0, y0, x1, y1) in pixels of the record.
        image_id: of the part.
        min_visible: an object of whose box less than this share is in the window is marked as a crowd is: it is not
            trained on, and finding it is neither right nor wrong.
        group: which records it stays together with; default: those of the same image.

    Raises:
        DataError: the window is not in the image.
    """
    x0, y0, x1, y1 = window
    height, width = record.size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise DataError(f"{record.source.name}: the window {window} is not in the image of {width}x{height} pixels.")
    boxes = record.boxes.copy()
    boxes[:, 0::2] = boxes[:, 0::2].clip(x0, x1) - x0
    boxes[:, 1::2] = boxes[:, 1::2].clip(y0, y1) - y0
    sides = boxes[:, 2:] - boxes[:, :2]
    visible = sides.prod(1) / (record.boxes[:, 2:] - record.boxes[:, :2]).prod(1)
    kept = (sides > 0).all(1)
    left, top = record.crop[:2] if record.crop else (0, 0)
    return replace(
        record,
        image_id=image_id,
        size=(y1 - y0, x1 - x0),
        boxes=boxes[kept],
        labels=record.labels[kept],
        area=(record.area * visible)[kept],
        iscrowd=(record.iscrowd | (visible < min_visible))[kept],
        annotation_ids=record.annotation_ids[kept],
        crop=(left + x0, top + y0, left + x1, top + y1),
        group=record.side if group is None else group,
    )


def tiles(
    records: Sequence[Record], size: int, *, overlap: int = 0, min_visible: float = 0.5, start: int = 1
) -> list[Record]:
    """Cut images into tiles.

    An image is cut evenly, so no tile is much smaller than another: 1035 pixels at `size` 256 become five tiles of 207.
    Without overlap no pixel is in two tiles.

    Args:
        records: the images; one that is not larger than a tile stays whole.
        size: the largest side of a tile in pixels.
        overlap: of neighbouring tiles, in pixels, at least; for training. Evaluation counts what is in two tiles twice.
        min_visible: as in `region`.
        start: image id of the first tile; the others follow.

    Raises:
        DataError: `size` or `overlap` are out of range.
    """
    if size < 1 or not 0 <= overlap < size:
        raise DataError(
            f"tiles of {size} pixels that overlap by {overlap}: expected size >= 1 and 0 <= overlap < size."
        )
    cut: list[Record] = []
    for record in records:
        for y0, y1 in spans(record.size[0], size, overlap):
            for x0, x1 in spans(record.size[1], size, overlap):
                number = start + len(cut)
                cut.append(region(record, (x0, y0, x1, y1), image_id=number, min_visible=min_visible))
    return cut


def split(annotations: Annotations, fractions: Sequence[float], *, seed: int = 0) -> list[Annotations]:
    """Divide records at random, so that an image (with all its tiles) is in one part only.

    Args:
        annotations: of all the images.
        fractions: of the records in each part; they sum to 1. Each part has at least one group.
        seed: of the shuffle.

    Raises:
        DataError: the fractions do not sum to 1, or there are fewer images than parts.
    """
    parts = divided(annotations.records, fractions, seed=seed)
    return [replace(annotations, records=part, notes=[]) for part in parts]
