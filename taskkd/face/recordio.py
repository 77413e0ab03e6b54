"""RecordIO files (.rec with .idx) of InsightFace and of MXNet's im2rec, read without MXNet.

A record is a u32 magic number, a u32 whose upper 3 bits say which part of a payload it is (0 all of it, 1 the first, 2
one between, 3 the last) and whose lower 29 give its length, and the payload, padded to 4 bytes. A payload that holds
the magic number at a multiple of 4 bytes is cut there, without it. The payload of an image is a u32 flag, a f32 label,
two u64, then `flag` labels of f32, then the encoded image. All numbers are little-endian.

InsightFace writes a record of key 0 without an image, whose labels are 1 + the key of the last image and 1 + the last
key: the keys between are a record for each identity, whose labels are the range of its images' keys. A file of im2rec
has images alone.
"""

from __future__ import annotations

import bisect
import functools
import logging
import os
import struct
import threading
import warnings
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from taskkd.errors import DataError
from taskkd.face.records import Array, Bad, Faces, Sources, checked
from taskkd.images import Source
from taskkd.problems import Problems

__all__ = ["RecordFile", "read_recordio", "write_index"]

logger = logging.getLogger(__name__)

MAGIC = struct.pack("<I", 0xCED7230A)
HEAD = struct.Struct("<4sI")
LABEL = struct.Struct("<IfQQ")
#: what is read at once of a record, at most
CHUNK = 1 << 16
#: whole numbers from here on are rounded in the f32 of a label
EXACT = 1 << 24


class Header(NamedTuple):
    """What stands before the image in a record: its labels, and how many bytes that is."""

    labels: tuple[float, ...]
    length: int


class RecordFile:
    """Random access to the records of a .rec file.

    Its handle is opened where it is first used, so it travels to the workers of a loader; threads may share it.

    Args:
        path: the .rec file. Its index is the file of the same name with the suffix .idx, whose parsed form is kept
            beside it (.idx.npy) where the folder can be written to.

    Raises:
        DataError: a file is missing, empty, foreign or cut off, or the index is of another file; with the offset.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self.path.with_suffix(".idx")
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file.")
        if not index.is_file():
            raise DataError(
                f"{index}: no such file; `taskkd.face.recordio.write_index({str(self.path)!r})` makes it of the file."
            )
        self._start()
        self.bytes = self.path.stat().st_size
        found = _kept(index, index.with_name(f"{index.name}.npy"), lambda: _parsed(index))
        found = found[np.argsort(found[:, 0], kind="stable")]
        #: (N,) of the records, ascending, and where they start in the file
        self.keys, self.offsets = found[:, 0], found[:, 1]
        self._check(index)
        order = np.argsort(self.offsets)
        self._ends = np.empty_like(self.offsets)
        self._ends[order] = np.append(self.offsets[order][1:], self.bytes)

    def __len__(self) -> int:
        return len(self.keys)

    def payload(self, position: int) -> bytes:
        """All of a record, by its place in `keys`."""
        start, end = int(self.offsets[position]), int(self._ends[position])
        return self._record(start, self._read(start, min(end - start, CHUNK)))[0]

    def header(self, position: int) -> Header:
        """The labels of a record, without reading the image."""
        start = int(self.offsets[position])
        content = self._read(start, HEAD.size + LABEL.size + 32)
        part, length = self._head(start, content, first=True)
        body = content[HEAD.size : HEAD.size + length]
        if part or (found := _header(body)) is None:  # cut within, or of many labels
            found = _header(self.payload(position))
        if found is None:
            raise DataError(f"{self._where(start)}: the record is too short for that of an image.")
        return found

    def image(self, position: int) -> bytes:
        """The encoded image of a record.

        Raises:
            DataError: there is none, or the file is damaged there.
        """
        content = self.payload(position)
        found = _header(content)
        if found is None or found.length >= len(content):
            raise DataError(f"{self._where(int(self.offsets[position]))}: the record has no image.")
        return content[found.length :]

    def position(self, key: int) -> int:
        """The place of a key in `keys`.

        Raises:
            DataError: the index does not have it.
        """
        place = int(np.searchsorted(self.keys, key))
        if place == len(self) or self.keys[place] != key:
            raise DataError(f"{self.path.with_suffix('.idx')}: there is no key {key}.")
        return place

    # ---- bytes

    def _check(self, index: Path) -> None:
        """That the index is that of the file, as far as its first and its last record tell."""
        if not len(self):
            raise DataError(f"{index}: the index is empty.")
        if (np.diff(self.keys) == 0).any():
            raise DataError(f"{index}: key {self.keys[:-1][np.diff(self.keys) == 0][0]} is there twice.")
        beyond = self.offsets[(self.offsets >= self.bytes) | (self.offsets < 0)]
        if len(beyond):
            raise DataError(f"{self._where(int(beyond[0]))}: no record, the file ends at {self.bytes}: it is cut off.")
        for offset in {int(self.offsets.min()), int(self.offsets.max())}:
            self._record(offset, b"")

    def _record(self, start: int, block: bytes) -> tuple[bytes, int]:
        """The payload of the record at an offset, of which a part is read already, and where the next one starts."""
        parts: list[bytes] = []
        at = start
        while True:
            inside = block[at - start : at - start + HEAD.size]
            part, length = self._head(at, inside if len(inside) == HEAD.size else self._read(at, HEAD.size), not parts)
            body = block[at - start + HEAD.size : at - start + HEAD.size + length]
            body = body if len(body) == length else self._read(at + HEAD.size, length)
            if len(body) < length:
                raise DataError(
                    f"{self._where(at)}: a record of {length} bytes is cut off, the file ends at {self.bytes}."
                )
            parts.append(body)
            at += HEAD.size + (length + 3) // 4 * 4
            if part in (0, 3):
                return MAGIC.join(parts), at

    def _head(self, at: int, content: bytes, first: bool) -> tuple[int, int]:
        """Which part of a record stands at an offset, and its length in bytes."""
        if len(content) < HEAD.size:
            raise DataError(f"{self._where(at)}: no record, the file ends at {self.bytes}: it is cut off.")
        magic, word = HEAD.unpack_from(content)
        part, length = word >> 29, word & (1 << 29) - 1
        if magic != MAGIC or part not in ((0, 1) if first else (2, 3)):
            raise DataError(
                f"{self._where(at)}: no record {'starts' if first else 'goes on'} here; the file is damaged or no "
                "RecordIO, or the index is of another one."
            )
        return part, length

    def _where(self, at: int) -> str:
        return f"{self.path}, offset {at}"

    def _start(self) -> None:
        self._file: BufferedReader | None = None
        self._lock = threading.Lock()

    def _read(self, at: int, count: int) -> bytes:
        """Up to `count` bytes; a handle's own position is not used where the system can do without."""
        if self._file is None:
            with self._lock:
                self._file = self._file or self.path.open("rb")
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), count, at)
        with self._lock:
            self._file.seek(at)
            return self._file.read(count)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_file", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def read_recordio(path: str | Path, *, size: int | None = None, bad: Bad = "error") -> Faces:
    """Read a data set of InsightFace (train.rec, train.idx) or a file of im2rec.

    Labels are those of the images' records (of several the first). Where an InsightFace file says which images are of
    which identity two are read for each, else the labels of all, once: they are kept beside the file (.labels.npy).

    Args:
        path: the .rec file, or its folder.
        size: see `Faces`.
        bad: "error" stops at an image that cannot be decoded when it is read; "skip" leaves these out and counts them,
            which takes one pass over all of them.

    Returns:
        Faces in the order of their keys. Identities are the labels that occur, in order, named by their numbers: where
        none is missing identity k is label k, else `int(identities[k])` is the row of a classifier that was trained on
        all.

    Raises:
        DataError: as `RecordFile`, or a label is no whole number.
    """
    file = RecordFile(_rec(Path(path)))
    positions, people = _layout(file)
    labels = _by_ranges(file, positions, people)
    if labels is None:
        cache = file.path.with_suffix(".labels.npy")
        kept = _kept(file.path, cache, lambda: np.stack([file.keys[positions], _scanned(file, positions)], 1))
        labels = kept[:, 1]
    values = np.unique(labels[labels >= 0])
    numbers = np.where(labels >= 0, np.searchsorted(values, labels), -1)
    faces = Faces(_Images(file, positions), numbers, [str(v) for v in values], size)
    return checked(faces, Problems(str(file.path), bad))


def write_index(path: str | Path) -> Path:
    """Make the missing index of a .rec file by one pass over it; keys are 0, 1, ... in the order of the records.

    Raises:
        DataError: there is an index, or the file is missing, damaged or cut off; with the offset.
    """
    rec, index = Path(path), Path(path).with_suffix(".idx")
    if index.exists():
        raise DataError(f"{index}: there is an index already.")
    if not rec.is_file():
        raise DataError(f"{rec}: no such file.")
    file = RecordFile.__new__(RecordFile)
    file.path, file.bytes = rec, rec.stat().st_size
    file._start()
    offsets = [0]
    while offsets[-1] < file.bytes:
        offsets.append(file._record(offsets[-1], b"")[1])
    index.write_text("".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets[:-1])), encoding="ascii")
    return index


class _Images(Sources):
    """The images of a file."""

    def __init__(self, file: RecordFile, positions: Array) -> None:
        self.file, self.positions = file, positions

    def __len__(self) -> int:
        return len(self.positions)

    def at(self, number: int) -> Source:
        position = int(self.positions[number])
        name = f"{self.file.path}, key {self.file.keys[position]}"
        return Source(name, functools.partial(self.file.image, position))


def _rec(path: Path) -> Path:
    """The .rec file that a path is or has."""
    if not path.is_dir():
        return path
    known = sorted(path.glob("*.rec"))
    if (path / "train.rec") in known:
        return path / "train.rec"
    if len(known) != 1:
        names = ", ".join(f.name for f in known) or "none"
        raise DataError(f"{path}: expected train.rec, or one .rec file; there is {names}.")
    return known[0]


def _header(content: bytes) -> Header | None:
    """None: the content is too short."""
    if len(content) < LABEL.size:
        return None
    flag, label, _, _ = LABEL.unpack_from(content)
    if flag == 0:
        return Header((label,), LABEL.size)
    if len(content) < LABEL.size + 4 * flag:
        return None
    return Header(struct.unpack_from(f"<{flag}f", content, LABEL.size), LABEL.size + 4 * flag)


def _layout(file: RecordFile) -> tuple[Array, Array]:
    """Positions of the images and of the records of identities, of which im2rec writes none."""
    every = np.arange(len(file))
    if file.keys[0] != 0:
        return every, every[:0]
    content = file.payload(0)
    found = _header(content)
    if found is None or found.length < len(content) or len(found.labels) != 2:
        return every, every[:0]
    count = int(found.labels[0]) - 1
    if count >= EXACT:
        count = _count(file)
    images = int(np.searchsorted(file.keys, count, side="right")) - 1
    if images != count or (images and file.keys[1] != 1):
        raise DataError(f"{file.path}: its first record says that there are {count} images, the index has {images}.")
    return every[1 : count + 1], every[count + 1 :]


def _count(file: RecordFile) -> int:
    """How many images there are before the records of identities, which have none."""

    def without(position: int) -> bool:
        content = file.payload(position)
        found = _header(content)
        return found is None or found.length == len(content)

    return bisect.bisect_left(range(1, len(file)), True, key=without)


def _by_ranges(file: RecordFile, positions: Array, people: Array) -> Array | None:
    """The label of each image by the ranges of the identities; None: they do not tell.

    What the first and the last image of a range have for a label is that of all.
    """
    found = [file.header(position).labels for position in people]
    if not found or not len(positions) or any(len(span) != 2 for span in found):
        return None
    numbers = np.asarray(found, dtype=np.float64)
    if not (np.abs(numbers) < 2**53).all():  # damaged, or no ranges at all
        return None
    spans = numbers.astype(np.int64)
    spans = spans[spans[:, 0] < spans[:, 1]]
    spans = spans[np.argsort(spans[:, 0])]
    keys = file.keys[positions]
    edges = np.append(spans[:, 0], keys[-1] + 1)
    if len(spans) == 0 or edges[0] != keys[0] or (edges[1:] != spans[:, 1]).any():
        return None
    first = _scanned(file, positions[spans[:, 0] - keys[0]])
    if (first != _scanned(file, positions[spans[:, 1] - 1 - keys[0]])).any():
        return None
    labels: Array = np.repeat(first, spans[:, 1] - spans[:, 0])
    return labels


def _scanned(file: RecordFile, positions: Array) -> Array:
    """The labels in the images' records."""
    if len(positions) > 1_000_000:
        logger.info("%s: the labels of all %d images are read once.", file.path, len(positions))
    labels = np.asarray([file.header(position).labels[0] for position in positions], dtype=np.float64)
    if (wrong := np.flatnonzero(~((np.abs(labels) < 2**53) & (labels == np.round(labels))))).size:
        raise DataError(
            f"{file.path}, key {file.keys[positions[wrong[0]]]}: the label is {labels[wrong[0]]}, expected a whole "
            "number."
        )
    return labels.astype(np.int64)


# ---- what is worked out once


def _parsed(index: Path) -> Array:
    """(N, 2) keys and offsets of an index."""
    text = index.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy's way of saying that it stopped
            numbers = np.fromstring(text, dtype=np.int64, sep=" ")
        if len(numbers) == 2 * len(text.split(b"\n")[: -1 if text.endswith(b"\n") else None]):
            return numbers.reshape(-1, 2)
    except (ValueError, DeprecationWarning, RuntimeWarning):
        pass
    return _slowly(index, text)


def _slowly(index: Path, text: bytes) -> Array:
    """The same line by line, to name one that is wrong."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        cells = line.split()
        if cells and (len(cells) != 2 or not all(cell.isdigit() and len(cell) < 19 for cell in cells)):
            shown = line[:60].decode("ascii", "replace")
            raise DataError(f"{index}, line {number}: {shown!r}: expected a key and an offset.")
        if cells:
            rows.append([int(cell) for cell in cells])
    return np.asarray(rows, dtype=np.int64).reshape(-1, 2)


def _kept(source: Path, cache: Path, make: Callable[[], Array]) -> Array:
    """(N, 2) int64 that follow from a file: from the cache, if it was made of the file as it is; else made and kept."""
    stat = source.stat()
    stamp = np.asarray([[stat.st_size, stat.st_mtime_ns]])
    try:
        held: Array = np.load(cache, allow_pickle=False)
        if held.ndim == 2 and (held[:1] == stamp).all():
            return held[1:]
    except (OSError, ValueError, EOFError):
        pass  # none, or a damaged one
    made = make()
    beside = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            np.save(file, np.concatenate([stamp, made]))
        beside.replace(cache)
    except OSError as error:
        logger.info("%s is not kept: %s.", cache, error)
    return made
