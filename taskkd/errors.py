"""Errors a user can act on: each is one sentence, each has the exit code the command line ends with.

Exit codes: 2 usage or recipe, 3 data or files, 4 non-finite loss.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CacheError",
    "CheckpointError",
    "DataError",
    "NonFiniteError",
    "RecipeError",
    "ShapeError",
    "TapError",
    "TaskkdError",
    "nearest",
]


class TaskkdError(Exception):
    """Base of every error that taskkd raises for a reason the user can change.

    A `DataLoader`'s worker hands an error on as text with a traceback in it: the sentence alone is kept as the message,
    the rest as a note.
    """

    exit_code = 2

    def __init__(self, *args: object) -> None:
        if args and isinstance(args[0], str) and "\nOriginal Traceback" in args[0]:
            self.add_note(args[0])
            args = (args[0].rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].strip(),)
        super().__init__(*args)


class TapError(TaskkdError):
    """A tap names something that the model does not have or did not run."""


class ShapeError(TaskkdError):
    """Student and teacher tensors do not fit each other or the loss."""


class RecipeError(TaskkdError):
    """A recipe, an override or an option is wrong."""


class DataError(TaskkdError):
    """A data file or a sample is missing, empty or malformed."""

    exit_code = 3


class CheckpointError(TaskkdError):
    """A checkpoint is incomplete, damaged or belongs to something else."""

    exit_code = 3


class CacheError(TaskkdError):
    """A teacher cache is incomplete, damaged or stale."""

    exit_code = 3


class NonFiniteError(TaskkdError):
    """A loss became NaN or infinite."""

    exit_code = 4


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """`" (did you mean 'a', 'b'?)"` for the known names nearest to `name`, or an empty string."""
    # The last part of a dotted name decides as much as the whole: `layer.3` is near `encoder.layer.3`.
    candidates = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, candidates, n=count, cutoff=0.5)
    close += [c for c in candidates if c.endswith("." + name) and c not in close]
    if not close:
        close = difflib.get_close_matches(name, candidates, n=count, cutoff=0.3)
    return f" (did you mean {', '.join(repr(c) for c in close[:count])}?)" if close else ""
