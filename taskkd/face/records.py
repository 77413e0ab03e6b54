"""Images of faces with the identities of the people on them, as every reader gives them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from taskkd.errors import DataError
from taskkd.images import Source, decode
from taskkd.problems import Problems, usable
from taskkd.splits import divided

__all__ = [
    "Bad",
    "Face",
    "Faces",
    "Sources",
    "checked",
    "image_of",
    "shared_identities",
    "split",
    "squared",
    "with_unlabelled",
]

logger = logging.getLogger(__name__)

Array: TypeAlias = NDArray[Any]
#: what to do about a bad image: stop with an error, or leave it out and say how many there were
Bad: TypeAlias = Literal["error", "skip"]


@dataclass(frozen=True, slots=True)
class Face:
    """One image.

    Args:
        source: the image file.
        identity: the number of the person, -1: not known.
        number: of the image among its `Faces`; its views have the ids 2 * number and, flipped, 2 * number + 1.
    """

    source: Source
    identity: int
    number: int


@dataclass(frozen=True, eq=False)
class Faces:
    """What a reader gives: images by number, from 0.

    Millions of images are two arrays and what makes a source when it is asked for, not millions of objects.

    Args:
        sources: of the images.
        labels: (N,) int64, the identity of each; -1: not known.
        identities: names; identity k is `identities[k]`.
        size: the images are made square with this side by `squared`; None: they stay as they are.
        notes: sentences on what was left out.

    Raises:
        DataError: as many labels as images are expected, each -1 or the number of a name.
    """

    sources: Sequence[Source]
    labels: Array
    identities: list[str]
    size: int | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=np.int64))
        if self.labels.shape != (len(self.sources),):
            raise DataError(f"{len(self.sources)} images have labels {self.labels.shape}: expected one for each.")
        if len(self.labels) and not -1 <= self.labels.min() <= self.labels.max() < len(self.identities):
            raise DataError(
                f"labels are from {self.labels.min()} to {self.labels.max()}: expected 0 to "
                f"{len(self.identities) - 1}, the identities, or -1 for none."
            )
        if self.size is not None and self.size < 1:
            raise DataError(f"size={self.size}: expected the side of a square in pixels, or None.")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> Face:
        return Face(self.sources[number], int(self.labels[number]), int(number) % len(self))

    def __iter__(self) -> Iterator[Face]:
        return (self[number] for number in range(len(self)))

    def select(self, numbers: Sequence[int] | Array) -> Faces:
        """Some of the images, numbered anew from 0; the identities stay as they are."""
        chosen = np.asarray(numbers, dtype=np.int64)
        return replace(self, sources=_Chosen(self.sources, chosen), labels=self.labels[chosen], notes=[])

    def compact(self) -> Faces:
        """The same without the identities of which there is no image; the others are numbered anew, in their order."""
        there = np.unique(self.labels[self.labels >= 0])
        numbers = np.full(len(self.identities) + 1, -1, dtype=np.int64)  # the last is that of label -1
        numbers[there] = np.arange(len(there))
        return replace(self, labels=numbers[self.labels], identities=[self.identities[k] for k in there])

    def summary(self) -> str:
        """A few words: how many images, identities, and images of an identity there are."""
        if not len(self):
            return "no image"
        counts = np.bincount(self.labels[self.labels >= 0], minlength=len(self.identities))
        text = f"{len(self)} images"
        if len(counts):
            text += (
                f" of {len(counts)} identities ({counts.min()} to {counts.max()} each, median {np.median(counts):g})"
            )
        unknown = int((self.labels < 0).sum())
        return text + (f", {unknown} of them without an identity" if unknown and len(counts) else "")


class Sources(Sequence[Source], ABC):
    """Images that are made into sources when they are asked for."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def at(self, number: int) -> Source:
        """One of them, by its number from 0 on."""

    @overload
    def __getitem__(self, number: int) -> Source: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Source]: ...
    def __getitem__(self, number: int | slice) -> Source | Sequence[Source]:
        if isinstance(number, slice):
            return _Chosen(self, np.arange(len(self))[number])
        return self.at(range(len(self))[number])


class _Chosen(Sources):
    """Some of some sources."""

    def __init__(self, sources: Sequence[Source], numbers: Array) -> None:
        self.sources: Sequence[Source] = sources.sources if isinstance(sources, _Chosen) else sources
        self.numbers: Array = sources.numbers[numbers] if isinstance(sources, _Chosen) else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, number: int) -> Source:
        return self.sources[int(self.numbers[number])]


class _Joined(Sources):
    """Some sources after others."""

    def __init__(self, first: Sequence[Source], others: Sequence[Source]) -> None:
        self.first, self.others = first, others

    def __len__(self) -> int:
        return len(self.first) + len(self.others)

    def at(self, number: int) -> Source:
        return self.first[number] if number < len(self.first) else self.others[number - len(self.first)]


def with_unlabelled(faces: Faces, others: Faces) -> Faces:
    """Faces and, after them, images of unknown people, whatever is said of these; the numbers of the first stay."""
    labels = np.concatenate([faces.labels, np.full(len(others), -1)])
    return replace(faces, sources=_Joined(faces.sources, others.sources), labels=labels, notes=[])


def squared(image: Tensor, size: int | None) -> Tensor:
    """A square with a face as large as it fits, evenly padded with black.

    Args:
        image: (3, H, W) uint8; one that is (3, size, size) already is given back as it is.
        size: in pixels; None: the image stays as it is.

    Returns:
        (3, size, size) uint8: bilinear, with antialiasing, where the longer side is not `size`.
    """
    height, width = int(image.shape[-2]), int(image.shape[-1])
    if size is None or height == width == size:
        return image
    if max(height, width) != size:
        scale = size / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        resized = F.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)[0]
        image = resized.round_().clamp_(0, 255).to(image.dtype)
    left, top = (size - width) // 2, (size - height) // 2
    return F.pad(image, (left, size - width - left, top, size - height - top))


def image_of(faces: Faces, number: int) -> Tensor:
    """(3, H, W) uint8 RGB of an image, made square where the faces have a size.

    Raises:
        DataError: its file is missing or damaged.
    """
    return squared(decode(faces.sources[number], number), faces.size)


def checked(faces: Faces, problems: Problems) -> Faces:
    """The faces whose images can be decoded, with the notes of `problems`.

    Where bad ones are errors nothing is read here: files are decoded in training, and a bad one is an error then.
    Where they are left out this takes one pass over all of them.

    Raises:
        DataError: there is no image, or none that is left.
    """
    kept = usable(range(len(faces)), problems, lambda n: decode(faces.sources[n], n))
    faces = faces if len(kept) == len(faces) else faces.select(kept).compact()
    return replace(faces, notes=[*faces.notes, *problems.notes()])


@dataclass(frozen=True, slots=True)
class _Person:
    """An identity, as `divided` takes records."""

    image_id: int

    @property
    def side(self) -> str:
        return str(self.image_id)


def split(faces: Faces, shares: Sequence[float], *, seed: int = 0) -> list[Faces]:
    """Divide faces at random so that an identity is in one part only: evaluation is of people never seen in training.

    Args:
        faces: all with identities.
        shares: of the identities in each part; they sum to 1. Each part has one at least.
        seed: of the shuffle.

    Returns:
        The parts; images and identities are numbered anew from 0 in each, in the order of the whole.

    Raises:
        DataError: the shares do not sum to 1, there are fewer identities than parts, or an image has none.
    """
    if (faces.labels < 0).any():
        first = int(np.flatnonzero(faces.labels < 0)[0])
        raise DataError(
            f"{faces.sources[first].name} has no identity: only faces whose people are known can be divided by them."
        )
    present = np.unique(faces.labels)
    if len(present) < len(shares):
        raise DataError(f"{len(present)} identities cannot be split into {len(shares)} parts.")
    parts = divided([_Person(int(k)) for k in present], shares, seed=seed)
    chosen = [np.isin(faces.labels, [p.image_id for p in part]) for part in parts]
    return [faces.select(np.flatnonzero(inside)).compact() for inside in chosen]


def shared_identities(trained: Faces, held_out: Faces) -> str:
    """A sentence if people (by name) that are held out are trained on too, else an empty string."""
    both = set(trained.identities) & set(held_out.identities)
    if not both:
        return ""
    return (
        f"{len(both)} of the {len(held_out.identities)} held-out identities are in the training data too, as "
        f"{min(both)!r}; the figures may be too good."
    )
