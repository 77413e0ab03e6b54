"""HF data sets of images with objects, as cppe-5 is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from taskkd.detection.records import Annotations, Bad, Boxes, Problems, Record, checked, label_of
from taskkd.errors import DataError
from taskkd.hub import check_columns, images_of, load_split
from taskkd.images import Source, header_size

__all__ = ["read_hub"]

CATEGORY = ("category", "categories", "category_id", "label", "labels")
CROWD = ("iscrowd", "is_crowd")


def read_hub(
    data: Any,
    split: str | None = None,
    *,
    subset: str | None = None,
    image: str = "image",
    objects: str = "objects",
    box_format: Literal["xywh", "xyxy"] = "xywh",
    classes: Sequence[str] | None = None,
    bad: Bad = "error",
) -> Annotations:
    """Read a `datasets.Dataset`.

    Args:
        data: the data set, or the hub name or local folder of one.
        split, subset: of a named one.
        image: the column of images.
        objects: the column of objects: `bbox`, `category` (or `categories`, `category_id`, `label`, `labels`: class
            numbers from 0 or names), and if there are any `area`, `id` and `iscrowd`; a mapping of lists or a list of
            mappings. `image_id`, `width` and `height` are read from columns of these names.
        box_format: of `bbox`, in pixels.
        classes: names in the order of the labels; default: the data set's class names; where it has none, what occurs,
            sorted.
        bad: as in `read_coco`.

    Raises:
        DataError: it cannot be loaded; a column is missing; a box is degenerate; an image is damaged.
    """  # fmt: skip
    if box_format not in ("xywh", "xyxy"):
        raise DataError(f"box_format={box_format!r}: expected 'xywh' or 'xyxy'.")
    table = load_split(data, split, subset) if isinstance(data, str | Path) else data
    where = f"{data}, {split}" if isinstance(data, str | Path) else "data set"
    key, names = _described(table, where, image, objects)
    problems = Problems(where, bad)
    images = images_of(table, image, where)
    others = list(table.remove_columns([image]).with_format(None))
    rows = [_columns(row[objects], f"{where}, row {number}") for number, row in enumerate(others)]
    found = sorted({value for row in rows for value in row.get(key, ())}, key=lambda v: (str(type(v)), v))
    known = list(classes) if classes is not None else names or [str(value) for value in found]
    values = _labels(names, found, known, where)
    reader = _Reader(where, key, values, box_format, problems)
    ids = _ids([row.get("image_id") for row in others])
    records = [reader.record(images[n], ids[n], others[n], row) for n, row in enumerate(rows)]
    kept = checked((r for r in records if r is not None), problems)
    numbers = {label: value for value, label in values.items() if isinstance(value, int)}
    return Annotations(kept, known, [numbers.get(k, -1) for k in range(1, len(known) + 1)], problems.notes())


def _labels(names: Sequence[str], found: Sequence[Any], classes: Sequence[str], where: str) -> dict[Any, int]:
    """The labels of what the objects' categories may be: class numbers or names."""
    if names:
        return {number: label_of(name, classes, where) for number, name in enumerate(names)}
    named = {value: label_of(str(value), classes, where) for value in found if str(value) in classes}
    if named or any(isinstance(value, str) for value in found):
        return named
    return {number: number + 1 for number in range(len(classes))}


def _described(table: Any, where: str, image: str, objects: str) -> tuple[str, list[str]]:
    """The key of the categories among the objects' and the class names; checks that the columns are there."""
    check_columns(table, where, (image, objects), (image,))
    features = table.features
    inner = getattr(features[objects], "feature", features[objects])
    held = dict(inner) if isinstance(inner, Mapping) else {}
    key = next((k for k in CATEGORY if k in held), None)
    if key is None or "bbox" not in held:
        has = ", ".join(map(repr, held)) or inner
        raise DataError(f"{where}: the objects in {objects!r} need `bbox` and `category`; they have {has}.")
    names = getattr(held[key], "names", None) or getattr(getattr(held[key], "feature", None), "names", None)
    return key, list(names or ())


def _columns(value: Any, where: str) -> dict[str, list[Any]]:
    """The objects of a row as lists of equal length."""
    if isinstance(value, list):
        value = {key: [entry[key] for entry in value] for key in value[0]} if value else {}
    columns = {key: list(column) for key, column in (value or {}).items() if isinstance(column, list)}
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{len(column)} of {key!r}" for key, column in columns.items())
        raise DataError(f"{where}: the objects' lists differ in length: {lengths}.")
    return columns


def _ids(own: Sequence[Any]) -> list[int]:
    """The data set's own image ids where they are numbers that tell the images apart, else 0, 1, ..."""
    ids = [i for i in own if type(i) is int]
    return ids if len(set(ids)) == len(own) else list(range(len(own)))


class _Reader:
    """Makes records of rows."""

    def __init__(self, where: str, key: str, values: Mapping[Any, int], box_format: str, problems: Problems) -> None:
        self.where, self.key, self.values, self.problems = where, key, values, problems
        self.box_format = box_format

    def record(
        self, source: Source, image_id: int, row: Mapping[str, Any], objects: Mapping[str, list[Any]]
    ) -> Record | None:
        """The record of a row, or None if its image cannot be read."""
        height, width = row.get("height"), row.get("width")
        try:
            size = (height, width) if height and width else header_size(source, image_id)
        except DataError as error:
            self.problems.left_out("images", str(error).removesuffix("."))
            return None
        boxes = Boxes(size, self.problems)
        ids = objects.get("id") or range(len(objects.get("bbox", ())))
        crowd = next((objects[k] for k in CROWD if k in objects), None)
        for number, (box, category) in enumerate(zip(objects.get("bbox", ()), objects.get(self.key, ()), strict=True)):
            where = f"{source.name}: image id {image_id}, annotation id {ids[number]}"
            if category not in self.values:
                self.problems.left_out("boxes", f"{where}: no class {category!r}")
                continue
            if self.box_format == "xywh" and len(box or ()) == 4:
                box = (box[0], box[1], box[0] + box[2], box[1] + box[3])  # noqa: PLW2901
            boxes.add(
                box,
                self.values[category],
                annotation_id=ids[number] if type(ids[number]) is int else number,
                where=where,
                area=objects["area"][number] if "area" in objects else None,
                iscrowd=bool(crowd and crowd[number]),
            )
        return boxes.record(source, image_id, self.where)
