"""What is wrong with a data set: the first of it is an error, or it is counted."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from taskkd.errors import DataError, nearest

__all__ = ["Problems", "usable"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Problems:
    """What is wrong with a data set: the first of it is an error, or it is counted.

    Args:
        where: the annotation file or folder.
        bad: "error" or "skip".
        known: what `bad` may be.

    Raises:
        DataError: no such way of dealing with bad data.
    """

    def __init__(self, where: str, bad: str, known: Sequence[str] = ("error", "skip")) -> None:
        if bad not in known:
            raise DataError(f"bad={bad!r}: expected {', '.join(map(repr, known))}{nearest(str(bad), known)}.")
        self.where, self.bad = where, bad
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def is_error(self, kind: str) -> bool:
        """Whether a bad one of a kind stops the reading."""
        return self.bad == "error"

    def left_out(self, kind: str, sentence: str) -> None:
        """Leave something out, or stop.

        Args:
            kind: of what is left out, in the plural, for the count.
            sentence: what is wrong with it and where, without a full stop.

        Raises:
            DataError: the sentence, where bad data is an error.
        """
        if self.is_error(kind):
            raise DataError(f"{sentence}. (bad='skip' leaves such {kind} out and counts them.)")
        self.counts[kind] += 1
        self.first.setdefault(kind, sentence)

    def notes(self) -> list[str]:
        """A sentence for each kind of thing that was left out or changed; they are logged, too."""
        lines = [
            f"{self.where}: {count} bad {kind} left out; the first: {self.first[kind]}."
            for kind, count in self.counts.items()
        ]
        for line in lines:
            logger.warning(line)
        return lines


def usable(items: Iterable[T], problems: Problems, look: Callable[[T], object], what: str = "images") -> list[T]:
    """The items that can be decoded.

    Where bad ones are errors nothing is read here: files are decoded in training, and a bad one is an error then.
    Where they are left out this takes one pass over all of them.

    Args:
        items: images, or what stands for them.
        problems: of the data set, to which bad ones are added.
        look: decodes one; a `DataError` says what is wrong with it.
        what: is decoded, for the log.

    Raises:
        DataError: there is no item, or none that is left.
    """
    items = list(items)
    if not items:
        raise DataError(f"{problems.where}: there are no images.")
    if problems.bad != "skip":
        return items
    logger.info("%s: all %d %s are decoded once to find bad ones.", problems.where, len(items), what)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        faults = list(pool.map(lambda item: _fault(item, look), items))
    for fault in faults:
        if fault:
            problems.left_out("images", fault)
    kept = [item for item, fault in zip(items, faults, strict=True) if not fault]
    if not kept:
        raise DataError(f"{problems.where}: none of the {len(items)} images can be used; the first: {faults[0]}.")
    return kept


def _fault(item: T, look: Callable[[T], object]) -> str:
    try:
        look(item)
    except DataError as error:
        return str(error).removesuffix(".")
    return ""
