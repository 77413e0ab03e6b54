"""Pairs of images for verification: InsightFace's .bin files, lists of pairs, and pairs made of identities."""

from __future__ import annotations

import csv
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from taskkd.errors import DataError
from taskkd.face.datasets import FaceDataset, TwoViews
from taskkd.face.pickles import load_bin
from taskkd.face.records import Array, Faces
from taskkd.files import inside
from taskkd.images import Source, in_file

__all__ = ["Pairs", "make_pairs", "read_bin", "read_csv", "read_lfw", "read_pairs"]

SUFFIXES = ("jpg", "png", "jpeg", "bmp", "webp", "JPG", "PNG")
TRUE, FALSE = ("1", "true", "yes"), ("0", "-1", "false", "no")


class Pairs:
    """Pairs of images and whether both are of one person.

    Args:
        images: `Faces`, or sources of images of unknown people.
        left, right: (P,) numbers of images.
        same: (P,) bool. Folds are contiguous in this order.
        size: of images that are sources, see `Faces`.

    Raises:
        DataError: there is no pair, the three differ in length, or a number is that of no image.
    """

    def __init__(
        self, images: Faces | Sequence[Source], left: ArrayLike, right: ArrayLike, same: ArrayLike, *,
        size: int | None = None,
    ) -> None:  # fmt: skip
        self.faces = images if isinstance(images, Faces) else Faces(images, np.full(len(images), -1), [], size)
        self.left, self.right = np.asarray(left, dtype=np.int64), np.asarray(right, dtype=np.int64)
        self.same = np.asarray(same, dtype=bool)
        if not self.left.shape == self.right.shape == self.same.shape == (len(self.same),) or not len(self.same):
            raise DataError(
                f"pairs of {self.left.shape} and {self.right.shape} images and {self.same.shape} labels: expected (P,) "
                "of each, and at least one pair."
            )
        numbers = np.concatenate([self.left, self.right])
        if not 0 <= numbers.min() <= numbers.max() < len(self.faces):
            raise DataError(
                f"pairs name images {numbers.min()} to {numbers.max()}: there are images 0 to {len(self.faces) - 1}."
            )

    def __len__(self) -> int:
        return len(self.same)

    @property
    def table(self) -> TwoViews:
        """What is to be embedded: both views of every image, without labels."""
        return TwoViews(FaceDataset(self.faces, labels=False))

    def summary(self) -> str:
        """A few words."""
        return f"{len(self)} pairs ({int(self.same.sum())} of one person) of {len(self.faces)} images"


def read_pairs(path: str | Path, images: str | Path | None = None, *, size: int | None = None) -> Pairs:
    """Read pairs by the file's suffix: `read_bin` for .bin, `read_csv` for .csv, `read_lfw` for .txt.

    Raises:
        DataError: another suffix, or as these.
    """
    suffix = Path(path).suffix.lower()
    if not suffix and not Path(path).exists():
        raise DataError(f"{path}: no such file or folder.")
    if suffix == ".bin":
        return read_bin(path, size=size)
    if suffix == ".csv":
        return read_csv(path, images, size=size)
    if suffix == ".txt":
        return read_lfw(path, Path(path).parent if images is None else images, size=size)
    raise DataError(f"{path}: pairs are read from .bin, .txt (as LFW's pairs.txt) and .csv files.")


def read_bin(path: str | Path, *, size: int | None = None) -> Pairs:
    """Read a verification set of InsightFace (lfw.bin, cfp_fp.bin, agedb_30.bin, ...).

    The file is a pickle of a list of encoded images and a list of whether pairs of them, in turn, are of one person.
    It is read without executing anything of it. The encoded images are kept in memory; they are decoded one by one when
    they are asked for.

    Raises:
        DataError: the file is missing, damaged, or holds anything else.
    """
    contents, same = load_bin(Path(path))
    sources = [Source(f"{path}, image {number}", content) for number, content in enumerate(contents)]
    numbers = np.arange(len(sources))
    return Pairs(sources, numbers[::2], numbers[1::2], same, size=size)


def read_lfw(path: str | Path, images: str | Path, *, size: int | None = None) -> Pairs:
    """Read a list of pairs in the format of LFW's pairs.txt (Huang et al. 2007).

    A line is `name n1 n2` (two images of a person) or `name1 n1 name2 n2`, in columns divided by tabs or spaces; a
    first line of one or two numbers (how many folds and pairs there are) is passed over. Image n of a person is
    `images/name/name_000n` with a suffix of images.

    Args:
        path: the list.
        images: the folder.
        size: see `Faces`.

    Raises:
        DataError: a file is missing or a line is of another form; with the line.
    """
    folder = Path(images)
    table = _Table(path)
    for where, cells in _rows(table.path, tabs=True):
        first, other = cells[:2], [cells[0], cells[2]] if len(cells) == 3 else cells[2:]
        if len(cells) not in (3, 4) or not all(n.isdecimal() and len(n) < 10 for n in (first[1], other[1])):
            raise DataError(f"{where}: {' '.join(cells)!r}: expected 'name n1 n2' or 'name1 n1 name2 n2'.")
        table.add(_file_of(folder, first, where), _file_of(folder, other, where), len(cells) == 3)
    return table.pairs(size)


def read_csv(path: str | Path, images: str | Path | None = None, *, size: int | None = None) -> Pairs:
    """Read a list of pairs: lines of two paths and whether they are of one person (1 or 0, true or false).

    Args:
        path: the list, with commas; a first line of names of columns is passed over.
        images: the folder of the paths; default: that of the list.
        size: see `Faces`.

    Raises:
        DataError: a file is missing or a line is of another form; with the line.
    """
    folder = Path(path).parent if images is None else Path(images)
    table = _Table(path)
    for number, (where, cells) in enumerate(_rows(table.path, tabs=False)):
        truth = cells[2].lower() if len(cells) == 3 else ""
        if truth not in (*TRUE, *FALSE):
            if number == 0 and len(cells) == 3 and not inside(folder, cells[0], where).is_file():
                continue  # names of columns
            raise DataError(f"{where}: {','.join(cells)!r}: expected two paths and 1 or 0.")
        one, other = (inside(folder, name, where) for name in cells[:2])
        for file in (one, other):
            if not file.is_file():
                raise DataError(f"{where}: {file}: no such image.")
        table.add(one, other, truth in TRUE)
    return table.pairs(size)


class _Table:
    """Pairs of files, each file one image, however often it is named."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.numbers: dict[Path, int] = {}
        self.rows: list[tuple[int, int, bool]] = []

    def add(self, one: Path, other: Path, same: bool) -> None:
        first, second = (self.numbers.setdefault(file, len(self.numbers)) for file in (one, other))
        self.rows.append((first, second, same))

    def pairs(self, size: int | None) -> Pairs:
        if not self.rows:
            raise DataError(f"{self.path}: there are no pairs.")
        left, right, same = zip(*self.rows, strict=True)
        return Pairs([in_file(file) for file in self.numbers], left, right, same, size=size)


def _rows(path: Path, *, tabs: bool) -> Iterator[tuple[str, list[str]]]:
    """Where a line stands, and its cells; without empty lines and LFW's first."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list cannot be read: {error}.") from None
    for number, line in enumerate(lines, 1):
        cells = (line.split("\t") if "\t" in line else line.split()) if tabs else next(csv.reader([line]), [])
        cells = [cell.strip() for cell in cells]
        counts = tabs and number == 1 and len(cells) <= 2 and all(c.isdigit() for c in cells)
        if any(cells) and not counts:
            yield f"{path}, line {number}", cells


def _file_of(folder: Path, image: Sequence[str], where: str) -> Path:
    name, number = image
    stem = inside(folder, f"{name}/{name}_{int(number):04d}", where)
    for suffix in SUFFIXES:
        if (file := stem.with_name(f"{stem.name}.{suffix}")).is_file():
            return file
    raise DataError(f"{where}: {stem}.jpg (or another suffix of images): no such image.")


def make_pairs(faces: Faces, count: int | None = None, *, seed: int = 0, folds: int = 10) -> Pairs:
    """Make a verification set of faces with identities: as many pairs of one person as of two, in each fold.

    No pair comes twice; an image may be in several. As in LFW each contiguous fold has its pairs of one person first.

    Args:
        faces: those without an identity are passed over.
        count: of pairs, a multiple of 2 * folds; None: the most that there can be, at most 6000.
        seed: of the draw.
        folds: default 10, as `verify` has it.

    Returns:
        Pairs whose images are the faces that are in a pair.

    Raises:
        DataError: `count` is no such multiple, or there are not so many pairs.
    """
    if folds < 1 or (count is not None and (count < 1 or count % (2 * folds))):
        raise DataError(f"{count} pairs in {folds} folds: expected a multiple of {2 * folds}, half of one person each.")
    order, sizes = _by_identity(faces.labels)
    alike = int((sizes * (sizes - 1) // 2).sum())
    unlike = math.comb(len(order), 2) - alike
    most = min(alike, unlike) // folds * folds * 2
    wanted = min(most, 6000 // (2 * folds) * 2 * folds) if count is None else count
    if not 0 < wanted <= most:
        raise DataError(
            f"{faces.summary()}: they give {alike} pairs of one person and {unlike} of two; {count or 2 * folds} pairs "
            f"in {folds} balanced folds are wanted, there can be {most}."
        )
    same = _alike(order, sizes, wanted // 2, seed).reshape(folds, -1, 2)
    different = _unlike(faces.labels[order], wanted // 2, seed)
    different = order[different].reshape(folds, -1, 2)
    chosen = np.concatenate([same, different], 1).reshape(-1, 2)
    truth = np.tile(np.repeat([True, False], wanted // (2 * folds)), folds)
    used, places = np.unique(chosen, return_inverse=True)
    left, right = places.reshape(-1, 2).T
    return Pairs(faces.select(used), left, right, truth)


def _by_identity(labels: Array) -> tuple[Array, Array]:
    """Numbers of the labelled images, those of an identity one after the other, and how many each has."""
    known = np.flatnonzero(labels >= 0)
    order = known[np.argsort(labels[known], kind="stable")]
    return order, np.unique(labels[known], return_counts=True)[1]


def _alike(order: Array, sizes: Array, count: int, seed: int) -> Array:
    """(count, 2) numbers of images of one person each, drawn evenly from all such pairs."""
    ends = np.cumsum(sizes * (sizes - 1) // 2)
    drawn = np.asarray(random.Random(seed).sample(range(int(ends[-1])), count), dtype=np.int64)  # noqa: S311
    person = np.searchsorted(ends, drawn, side="right")
    within = _triangle(drawn - (ends - sizes * (sizes - 1) // 2)[person])
    found: Array = order[(np.cumsum(sizes) - sizes)[person][:, None] + within]
    return found


def _unlike(labels: Array, count: int, seed: int) -> Array:
    """(count, 2) places of images of two people each, drawn evenly from all such pairs."""
    every = math.comb(len(labels), 2)
    for power in itertools.count(1):
        drawn = random.Random(seed + 1).sample(range(every), min(every, count << power))  # noqa: S311
        places = _triangle(np.asarray(drawn, dtype=np.int64))
        found: Array = places[labels[places[:, 0]] != labels[places[:, 1]]][:count]
        if len(found) == count:
            break
    return found


def _triangle(numbers: Array) -> Array:
    """(N, 2) pairs a < b: pair number k of (0, 1), (0, 2), (1, 2), (0, 3), ..."""
    b = ((1 + np.sqrt(1 + 8 * numbers.astype(np.float64))) / 2).astype(np.int64)
    b -= b * (b - 1) // 2 > numbers  # the root is rounded
    b += b * (b + 1) // 2 <= numbers
    return np.stack([numbers - b * (b - 1) // 2, b], 1)
