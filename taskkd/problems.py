"""What is wrong with a data set: the first of it is an error, or it is counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from taskkd.errors import DataError, nearest

__all__ = ["Problems"]

logger = logging.getLogger(__name__)


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
