"""Large images cut evenly, and records divided so that no image is on both sides."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from taskkd.errors import DataError

__all__ = ["Sided", "divided", "held_out", "limited", "shared_images", "shares_of", "spans"]


class Sided(Protocol):
    """A record: its number, and what may stand on one side of a split only."""

    @property
    def image_id(self) -> int:
        """Unique among the records."""

    @property
    def side(self) -> str:
        """Records of one side stay together."""


R = TypeVar("R", bound=Sided)
P = TypeVar("P")  # a part of a data set
Q = TypeVar("Q")


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


def held_out(
    train: P,
    given: Mapping[str, Q | None],
    sizes: Mapping[str, float],
    split: Callable[[P, Sequence[float]], Sequence[P]],
    total: int,
    of: str = "images",
    *,
    least: int = 0,
) -> tuple[P, dict[str, P | Q]]:
    """What is left to train on, and the parts that are evaluated on: what is missing is taken from the training data.

    Args:
        train: the training data.
        given: the other parts; None or left out: held out.
        sizes: of those that may be held out, see `shares_of`.
        split: divides a part by shares.
        total, of, least: see `shares_of`.

    Returns:
        The training data; the parts in the order of `sizes`, then what else was given.

    Raises:
        DataError: see `shares_of` and `divided`.
    """
    missing = [name for name in sizes if given.get(name) is None]
    taken: dict[str, P] = {}
    if missing:
        shares = shares_of({name: sizes[name] for name in missing}, total, of, least=least)
        train, *rest = split(train, shares)
        taken = dict(zip(missing, rest, strict=True))
    found: dict[str, P | Q] = {}
    for name in (*sizes, *(n for n in given if n not in sizes)):
        part = taken[name] if name in taken else given[name]
        if part is not None:
            found[name] = part
    return train, found


def limited(train: P, size: int | None, total: int, split: Callable[[P, Sequence[float]], Sequence[P]]) -> P:
    """So much of the training data as a recipe's `train_size` allows, of `total`; None: all."""
    if size is None or size >= total:
        return train
    return split(train, [size / total, 1 - size / total])[0]


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
