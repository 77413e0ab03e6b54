"""COCO annotations: a json file and a folder of images, or both in one zip file."""

from __future__ import annotations

import json
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from taskkd.detection.records import Annotations, Bad, Boxes, Problems, checked, label_of
from taskkd.errors import DataError, nearest
from taskkd.files import inside
from taskkd.images import Source, header_size, in_file, in_memory

__all__ = ["coco_results", "parse_coco", "read_coco"]

#: bytes, and times: images hardly shrink, annotations by some tens
BOMB, RATIO = 1 << 26, 200
#: sides of images are below
LARGEST = 1 << 31
KEYS = ("images", "annotations", "categories")


def read_coco(
    path: str | Path,
    images: str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    bad: Bad = "error",
) -> Annotations:
    """Read a COCO json file.

    The categories are labelled 1..C in the order of their ids, whatever these are. Crowds are kept, marked. Boxes that
    stick out of their images are clipped.

    Args:
        path: the json file, or a zip file with one json file and the images.
        images: the folder that `file_name` starts from; default: the first of the json file's own folder, `images`
            in it, and COCO's layout (`annotations/instances_x.json` beside `x` or `images/x`) that has the first image.
        classes: names in the order of the labels, where they are given by another file or a model; default: the
            file's.
        bad: "error": the first bad box or image is an error (images when they are first used); "skip": they are left
            out and counted, which takes a pass over all images.

    Raises:
        DataError: no such file; no COCO json; a box has no area or lies outside of its image; a category or image is
            unknown; an image is missing. With file, image id and annotation id.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    if path.suffix == ".zip":
        return _read_zip(path, classes, bad)
    content = _parsed(path.read_bytes(), str(path))
    folder = Path(images) if images is not None else _folder(path, content)

    def source(name: str) -> Source | None:
        file = inside(folder, name, str(path))
        return in_file(file) if file.is_file() else None

    return parse_coco(content, str(path), source, classes=classes, bad=bad)


def _read_zip(path: Path, classes: Sequence[str] | None, bad: Bad) -> Annotations:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, EOFError, struct.error):
        raise DataError(f"{path}: not a zip file.") from None
    with archive:
        members = set(archive.namelist())
        found = [n for n in members if n.endswith(".json")]
        if len(found) != 1:
            raise DataError(f"{path}: expected one json file in the archive, found {len(found)}.")
        content = _parsed(_unpacked(archive, found[0], path), f"{path}/{found[0]}")
        base = PurePosixPath(found[0]).parent
        held: dict[str, Source] = {}
        for entry in content["images"]:
            name = str(entry.get("file_name")) if isinstance(entry, Mapping) else ""
            member = next((m for m in (str(base / name), str(base / "images" / name)) if m in members), None)
            if member is not None:
                held[name] = in_memory(f"{path.name}/{member}", _unpacked(archive, member, path))
    return parse_coco(content, str(path), held.get, classes=classes, bad=bad)


def _unpacked(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    """A member, in memory: nothing of an archive is written to disk, so that no name of one leads anywhere.

    Raises:
        DataError: it is damaged, or a bomb: larger than `BOMB` and `RATIO` times as large as it is packed.
    """
    about = archive.getinfo(name)
    if about.file_size > max(BOMB, RATIO * about.compress_size):
        raise DataError(f"{path}/{name}: {about.compress_size:,} bytes unpack to {about.file_size:,}; it is not read.")
    try:
        return archive.read(about)
    except Exception as error:  # zlib's, of encryption, of a checksum, of a method that is not known
        raise DataError(f"{path}/{name}: cannot be unpacked ({error}).") from None


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}).") from None
    if not isinstance(data, dict):
        hint = " (a file of results has no images)" if isinstance(data, list) else ""
        raise DataError(f"{where}: expected an object with {', '.join(KEYS)}, got a {type(data).__name__}{hint}.")
    for key in KEYS:
        if not isinstance(data.get(key), list):
            raise DataError(f"{where}: no list {key!r}{nearest(key, data)}; COCO files have {', '.join(KEYS)}.")
    return data


def _folder(path: Path, content: Mapping[str, Any]) -> Path:
    """The folder that has the first image."""
    part = path.stem.removeprefix("instances_")
    tried = [path.parent, path.parent / "images", path.parent.parent / part, path.parent.parent / "images" / part]
    first = next((i.get("file_name") for i in content["images"] if isinstance(i, Mapping)), None)
    if not isinstance(first, str):
        return path.parent
    for folder in tried:
        if inside(folder, first, str(path)).is_file():
            return folder
    raise DataError(
        f"{path}: its first image {first} is in none of {', '.join(str(t) for t in tried)}; name the folder of images."
    )


def parse_coco(
    content: Mapping[str, Any],
    where: str,
    source: Callable[[str], Source | None],
    *,
    classes: Sequence[str] | None = None,
    bad: Bad = "error",
) -> Annotations:
    """The records of COCO annotations in memory.

    Args:
        content: with `images`, `annotations` and `categories`.
        where: the file, for errors.
        source: gives an image by its `file_name`; None: there is none.
        classes, bad: as in `read_coco`.

    Raises:
        DataError: as `read_coco`.
    """  # fmt: skip
    problems = Problems(where, bad)
    labels, names, category_ids = _categories(content, where, classes)
    images: dict[int, tuple[Source, Boxes]] = {}
    known: set[int] = set()
    for number, entry in enumerate(content["images"]):
        image_id, name = _image(entry, number, where)
        if image_id in known:
            raise DataError(f"{where}: two images have the id {image_id}; the second is {name}.")
        known.add(image_id)
        file = source(name)
        if file is None:
            problems.left_out("images", f"{where}: the file of image id {image_id}, {name}, is missing")
            continue
        try:
            size = _size(entry) or header_size(file, image_id)
        except DataError as error:
            problems.left_out("images", str(error).removesuffix("."))
            continue
        images[image_id] = (file, Boxes(size, problems))
    for number, entry in enumerate(content["annotations"]):
        if not isinstance(entry, Mapping):
            raise DataError(f"{where}: annotation {number} (from 0) is {entry!r}, expected an object.")
        _annotation(entry, number, images, known, labels, problems)
    records = checked((boxes.record(file, i, where) for i, (file, boxes) in images.items()), problems)
    return Annotations(records, names, category_ids, problems.notes())


def _image(entry: Any, number: int, where: str) -> tuple[int, str]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("file_name"), str):
        raise DataError(f"{where}: image {number} (from 0) has no `file_name`.")
    if type(entry.get("id")) is not int or entry["id"].bit_length() > 63:
        raise DataError(
            f"{where}: the id of image {entry['file_name']} is {entry.get('id')!r}, expected a number of 64 bits."
        )
    return entry["id"], entry["file_name"]


def _size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = entry.get("height"), entry.get("width")
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    return (height, width) if 0 < height < LARGEST and 0 < width < LARGEST else None


def _categories(
    content: Mapping[str, Any], where: str, classes: Sequence[str] | None
) -> tuple[dict[int, int], list[str], list[int]]:
    """Category id -> label, the names by label, and a category id for each label."""
    found: dict[int, str] = {}
    for entry in content["categories"]:
        if not isinstance(entry, Mapping) or type(entry.get("id")) is not int or not isinstance(entry.get("name"), str):
            raise DataError(f"{where}: the category {entry!r} needs a number `id` and a text `name`.")
        if entry["id"] in found:
            raise DataError(
                f"{where}: the categories {found[entry['id']]!r} and {entry['name']!r} have the id {entry['id']}."
            )
        found[entry["id"]] = entry["name"]
    if not found:
        raise DataError(f"{where}: there are no categories.")
    # Some tools write a group of classes as a category of the same name, that no box is of: names decide.
    names = list(classes) if classes is not None else list(dict.fromkeys(found[i] for i in sorted(found)))
    labels = {i: label_of(found[i], names, where) for i in sorted(found)}
    named = (a.get("category_id") for a in content["annotations"] if isinstance(a, Mapping))
    used = Counter(i for i in named if type(i) is int)
    ids = {label: max((i for i in labels if labels[i] == label), key=lambda i: used[i]) for label in labels.values()}
    return labels, names, [ids.get(label, -1) for label in range(1, len(names) + 1)]


def _annotation(
    entry: Mapping[str, Any],
    number: int,
    images: Mapping[int, tuple[Source, Boxes]],
    known: set[int],
    labels: Mapping[int, int],
    problems: Problems,
) -> None:
    annotation = entry.get("id", number)
    image_id, category = entry.get("image_id"), entry.get("category_id")
    where = f"{problems.where}: image id {image_id}, annotation id {annotation}"
    if type(image_id) is not int or image_id not in known:
        problems.left_out("boxes", f"{where}: there is no such image")
        return
    if image_id not in images:  # its image is left out
        return
    if type(category) is not int or category not in labels:
        ids = ", ".join(map(str, list(labels)[:20]))
        problems.left_out("boxes", f"{where}: no category has the id {category!r}; there are {ids}")
        return
    file, boxes = images[image_id]
    where = f"{where} ({file.name})"
    box = entry.get("bbox")
    try:
        x, y, width, height = (float(v) for v in box or ())
    except (TypeError, ValueError, OverflowError):
        problems.left_out("boxes", f"{where}: `bbox` is {box!r}, expected [x, y, width, height]")
        return
    own = annotation if type(annotation) is int and annotation.bit_length() < 64 else number
    boxes.add(
        (x, y, x + width, y + height),
        labels[category],
        annotation_id=own,
        where=where,
        area=entry.get("area"),
        iscrowd=bool(entry.get("iscrowd", 0)),
    )


def coco_results(image_id: int, detections: Mapping[str, Any], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections of one image as COCO's results format has them, ready for json.

    Args:
        image_id: of the image.
        detections: `boxes` (n, 4) xyxy in pixels of the image, `labels` (n,) 1..C, `scores` (n,).
        category_ids: of the labels, as in `Annotations`.
    """
    return [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": [x0, y0, x1 - x0, y1 - y0], "score": s}
        for (x0, y0, x1, y1), label, s in zip(
            detections["boxes"].tolist(), detections["labels"].tolist(), detections["scores"].tolist(), strict=True
        )
    ]
