"""What a teacher's cache is built from and read into: a training set in batches by length, a collator that looks up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taskkd.caches import CACHE_KEY, Cached
from taskkd.suppliers import Supplier
from taskkd.teachers import Teacher

__all__ = ["CachedCollator", "Parts", "caches_of", "is_complete", "token_counts"]


class Parts:
    """The numbers of samples in batches of one size. (A list of a million numbers takes 40 MB, an array 8.)"""

    def __init__(self, order: NDArray[np.int64], size: int) -> None:
        self.order, self.size = order, size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.order), self.size):
            yield self.order[start : start + self.size].tolist()


class CachedCollator:
    """A collator that looks the teacher's outputs up, in the loader's worker, before the batch goes to a device."""

    def __init__(self, collator: Callable[[list[Any]], Any], cached: Cached) -> None:
        self.collator, self.cached = collator, cached

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        batch = dict(self.collator(features))
        batch[CACHE_KEY] = self.cached.lookup(batch)
        return batch


def token_counts(dataset: Any) -> NDArray[np.int32] | None:
    """The numbers of the teacher's tokens of all samples, where samples have them."""
    columns = getattr(dataset, "column_names", None) or ()
    for name in ("teacher_input_ids", "input_ids"):
        if name in columns:
            # a part at a time: as Python's numbers all tokens take ten times what they do on disk
            own = dataset.select_columns(name) if hasattr(dataset, "select_columns") else dataset
            parts = (own[start : start + 1000][name] for start in range(0, len(own), 1000))
            return np.fromiter((len(ids) for part in parts for ids in part), np.int32, len(own))
    return None


def caches_of(teacher: Teacher | None) -> list[Cached]:
    """The caches that a teacher is or is made of."""
    if isinstance(teacher, Cached):
        return [teacher]
    return [c for part in teacher.parts() for c in caches_of(part)] if isinstance(teacher, Supplier) else []


def is_complete(cached: Cached, dataset: Any) -> bool:
    """Whether every sample is in the cache; by the ids where the data set has a column of them, else by the number."""
    if "id" in (getattr(dataset, "column_names", None) or ()):
        return cached.has(np.array(dataset["id"], np.int64))
    return len(cached) >= len(dataset)
