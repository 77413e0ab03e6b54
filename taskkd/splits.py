"""Large images cut evenly, and records divided so that no image is on both sides."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from taskkd.errors import DataError

__all__ = ["Sided", "divided", "shared_images", "shares_of", "spans"]


class Sided(Protocol):
    """A record: its number, and what may stand on one side of a split only."""

    @property
    def image_id(self) -> int:
        """Unique among the records."""

    @property
    def side(self) -> str:
        """Records of one side stay together."""


R = TypeVar("R", bound=Sided)


def divided(records: Sequence[R], fractions: Sequence[float], *, seed: int = 0) -> list[list[R]]:
    """Divide records at random, so that an image (with all its tiles) is in one part only.

    Args:
        records: of all the images.
        fractions: of the records in each part; they sum to 1. Each part has at least one group.
        seed: of the shuffle.

    Raises:
        DataError: the fractions do not sum to 1, or there are fewer images than parts.
    """
    if any(f <= 0 for f in fractions) or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise DataError(f"the fractions {list(fractions)} of a split must be positive and sum to 1.")
    groups: dict[str, list[R]] = {}
    for record in records:
        groups.setdefault(record.side, []).append(record)
    if len(groups) < len(fractions):
        raise DataError(f"{len(groups)} images cannot be split into {len(fractions)} parts.")
    order = list(groups.values())
    random.Random(seed).shuffle(order)  # noqa: S311
    parts = [list(group) for group in order[: len(fractions)]]
    for group in order[len(fractions) :]:  # to the part that lacks the most
        lacks = [f * len(records) - len(p) for f, p in zip(fractions, parts, strict=True)]
        parts[lacks.index(max(lacks))].extend(group)
    order_of = {r.image_id: n for n, r in enumerate(records)}
    return [sorted(part, key=lambda r: order_of[r.image_id]) for part in parts]


def shares_of(sizes: Mapping[str, float], total: int, of: str = "images", *, least: int = 0) -> list[float]:
    """The shares of what is trained on, and of each part that is held out of it.

    Args:
        sizes: of the parts as a recipe has them: a number of images from 1 on, else a share already.
        total: of how many.
        of: what is counted, for errors.
        least: a part whose size is a share has so many.

    Raises:
        DataError: nothing is left to train on.
    """
    shares = [size / total if size >= 1 else float(size) for size in sizes.values()]
    for (name, size), share in zip(sizes.items(), shares, strict=True):
        if share >= 1:
            raise DataError(f"data.{name}_size is {size}, there are {total} {of}.")
    few = least / total if total else 0.0
    shares = [s if isinstance(size, int) else max(s, few) for size, s in zip(sizes.values(), shares, strict=True)]
    if sum(shares) >= 1:
        raise DataError(f"data.{' and data.'.join(sizes)}: nothing is left of {total} {of} to train on.")
    return [1 - sum(shares), *shares]


def shared_images(trained: Sequence[Sided], held_out: Sequence[Sided]) -> str:
    """A sentence if images (or regions of one) that are held out are trained on too, else an empty string."""
    sides = {r.side for r in trained}
    both = sum(r.side in sides for r in held_out)
    if not both:
        return ""
    return f"{both} of the {len(held_out)} held-out images are in the training data too; the figures may be too good."


def spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """As few spans of at most `size` as cover the length, evenly."""
    count = max(1, math.ceil((length - overlap) / (size - overlap)))
    if overlap == 0:
        edges = np.linspace(0, length, count + 1).round().astype(int).tolist()
        return list(itertools.pairwise(edges))
    span = math.ceil((length + (count - 1) * overlap) / count)
    starts = np.linspace(0, length - span, count).round().astype(int).tolist()
    return [(s, s + span) for s in starts]
