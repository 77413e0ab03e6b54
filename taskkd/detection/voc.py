"""Pascal VOC annotations: `Annotations/*.xml`, `ImageSets/Main/*.txt`, `JPEGImages/*`."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers import expat

from taskkd.detection.records import Annotations, Bad, Boxes, Problems, Record, checked, label_of
from taskkd.errors import DataError, nearest
from taskkd.files import inside, listed
from taskkd.images import Source, header_size, in_file

__all__ = ["VOC_CLASSES", "read_voc"]

VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]
SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".tif")


@dataclass(frozen=True)
class _Object:
    """An object of a file: its class name, its corners as they are written, whether it is difficult."""

    name: str
    corners: list[str]
    difficult: bool


@dataclass(frozen=True)
class _Page:
    """What is read of one xml file."""

    file: Path
    image: Source | None
    size: tuple[int, int] | None
    objects: list[_Object]


def read_voc(
    root: str | Path | Sequence[str | Path],
    part: str = "trainval",
    *,
    classes: Sequence[str] | None = None,
    bad: Bad = "error",
) -> Annotations:
    """Read data in the layout of Pascal VOC.

    VOC counts pixels from 1 and both corners belong to the box: x from 1 to 1 becomes x from 0 to 1. Difficult objects
    are kept, marked as crowds are.

    Args:
        root: the folder with `Annotations`, `ImageSets` and `JPEGImages` (`VOCdevkit/VOC2007`), or several that are
            joined (2007 and 2012).
        part: the list of images: "train", "val", "trainval", "test", or another in `ImageSets/Main`.
        classes: names in the order of the labels; default: the twenty of VOC where there are no others, else those that
            occur, in alphabetical order. Give the training data's for the other parts.
        bad: as in `read_coco`.

    Raises:
        DataError: a folder, list, annotation or image is missing; a file is no annotation; a box is degenerate; a class
            is unknown. With file, image id (1, 2, ... over all the images) and annotation id (1, 2, ... in the file).
    """
    roots = [Path(r) for r in ([root] if isinstance(root, str | Path) else root)]
    where = f"{' and '.join(map(str, roots))}, {part}"
    problems = Problems(where, bad)
    pages = [_page(folder, name) for folder in roots for name in _names(folder, part)]
    if classes is None:
        found = {o.name for page in pages for o in page.objects}
        classes = VOC_CLASSES if found <= set(VOC_CLASSES) else sorted(found)
    numbered = [_record(page, number, classes, problems) for number, page in enumerate(pages, 1)]
    records = checked((r for r in numbered if r is not None), problems)
    return Annotations(records, list(classes), list(range(1, len(classes) + 1)), problems.notes())


def _names(folder: Path, part: str) -> list[str]:
    lists = folder / "ImageSets" / "Main"
    file = lists / f"{part}.txt"
    if not lists.is_dir():
        raise DataError(f"{folder}: no folder ImageSets/Main; expected the layout of VOCdevkit/VOC2007.")
    if not file.is_file():
        known = sorted(f.stem for f in lists.glob("*.txt") if "_" not in f.stem)
        raise DataError(f"{lists}: no list {part}.txt{nearest(part, known)}; it has {', '.join(known)}.")
    names = [line.split()[0] for line in listed(file)]
    for name in names:
        inside(folder, name, str(file))
    return names


def _page(folder: Path, name: str) -> _Page:
    file = folder / "Annotations" / f"{name}.xml"
    if not file.is_file():
        raise DataError(f"{file}: no such file; {folder / 'ImageSets' / 'Main'} lists it.")
    tree = _tree(file)
    images = [folder / "JPEGImages" / f"{name}{suffix}" for suffix in SUFFIXES]
    images.append(inside(folder / "JPEGImages", tree.findtext("filename") or f"{name}.jpg", str(file)))
    image = next((in_file(path) for path in images if path.is_file()), None)
    height, width = (_number(tree.findtext(f"size/{side}")) for side in ("height", "width"))
    objects = [
        _Object(
            (entry.findtext("name") or "").strip(),
            [entry.findtext(f"bndbox/{corner}") or "" for corner in ("xmin", "ymin", "xmax", "ymax")],
            (entry.findtext("difficult") or "0").strip() == "1",
        )
        for entry in tree.findall("object")
    ]
    return _Page(file, image, (height, width) if height and width else None, objects)


def _tree(file: Path) -> ET.Element:
    """The parsed file; one that declares a document type, and so might declare entities, is refused."""
    builder, parser = ET.TreeBuilder(), expat.ParserCreate()

    def refuse(*_: Any) -> None:
        raise DataError(f"{file}: it declares a document type, which annotations do not; it is not read.")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(file.read_bytes(), True)
        tree = builder.close()
    except (expat.ExpatError, ValueError, LookupError) as error:
        if not isinstance(error, expat.ExpatError):  # an encoding that is not known
            raise DataError(f"{file}: not XML ({error}).") from None
        raise DataError(f"{file}, line {error.lineno}: not XML ({expat.ErrorString(error.code)}).") from None
    if tree.tag != "annotation":
        raise DataError(f"{file}: expected an <annotation>, got <{tree.tag}>.")
    return tree


def _number(text: str | None) -> int:
    return int(text) if text and text.strip().isdecimal() and len(text) < 10 else 0


def _record(page: _Page, image_id: int, classes: Sequence[str], problems: Problems) -> Record | None:
    if page.image is None:
        problems.left_out("images", f"{page.file}: the image of image id {image_id} is missing in JPEGImages")
        return None
    try:
        boxes = Boxes(page.size or header_size(page.image, image_id), problems)
    except DataError as error:
        problems.left_out("images", str(error).removesuffix("."))
        return None
    for number, entry in enumerate(page.objects, 1):
        where = f"{page.file}: image id {image_id}, annotation id {number}"
        try:
            label = label_of(entry.name, classes, where)
        except DataError as error:
            problems.left_out("boxes", str(error).removesuffix("."))
            continue
        try:
            x0, y0, x1, y1 = map(float, entry.corners)
        except ValueError:
            problems.left_out("boxes", f"{where}: the box is {entry.corners!r}, expected four numbers")
            continue
        boxes.add((x0 - 1, y0 - 1, x1, y1), label, annotation_id=number, where=where, iscrowd=entry.difficult)
    return boxes.record(page.image, image_id, str(page.file))
