"""Random augmentation that does not depend on workers, prefetching or interruptions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
from torch.utils.data import Dataset

from taskkd.errors import RecipeError, nearest

__all__ = ["Augmented", "drawn_from", "generator_for", "transform_of"]

Sample = TypeVar("Sample")


def generator_for(seed: int, epoch: int, sample_id: int) -> torch.Generator:
    """A generator that is a function of these three numbers alone."""
    mixed = 0
    for number in (seed, epoch, sample_id):  # one round of splitmix64 each: neighbouring numbers get unrelated streams
        mixed = (mixed + 0x9E3779B97F4A7C15 + (number & 0xFFFFFFFFFFFFFFFF)) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)


class Augmented(Dataset[Any]):
    """A dataset whose samples are augmented from a generator seeded by (seed, epoch, id).

    The same sample of the same epoch is augmented in the same way in any worker, in any order, before and after an
    interruption. The trainer calls `set_epoch`; a hand loop calls it at the start of each epoch.

    Args:
        dataset: a map-style dataset; a sample that is a dict with `id` is seeded by it, others by their index.
        transform: `(sample, generator) -> sample`; draws all its randomness from the generator.
        seed: default 0.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any, torch.Generator], Any], *, seed: int = 0) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        # In shared memory, so that workers that live through several epochs see the change.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch."""
        self._epoch.fill_(epoch)

    def with_seed(self, seed: int) -> Self:
        """The same with another seed, and epochs of its own."""
        other = copy.copy(self)
        other.seed, other._epoch = seed, self._epoch.clone().share_memory_()
        return other

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        key = int(sample["id"]) if isinstance(sample, dict) and "id" in sample else index
        return self.transform(sample, generator_for(self.seed, int(self._epoch), key))


def transform_of(
    entry: str | Mapping[str, Any],
    known: Sequence[str],
    where: str,
    own: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """The transform of torchvision.transforms.v2 that a recipe names.

    Args:
        entry: a name, or a mapping of `name` and that transform's options.
        known: the names that may be used.
        where: in the recipe, for errors.
        own: transforms that torchvision does not have, by name.

    Raises:
        RecipeError: a name or an option is unknown, or a value is refused by the transform.
    """
    from torchvision.transforms import v2

    options: dict[str, Any] = {} if isinstance(entry, str) else dict(entry)
    name = entry if isinstance(entry, str) else options.pop("name", None)
    known = [*known, *(own or {})]
    if name not in known:
        raise RecipeError(f"{where}: no transform {name!r}{nearest(str(name), known)}; known: {', '.join(known)}.")
    kind = (own or {}).get(str(name)) or getattr(v2, str(name))
    names = [p for p in inspect.signature(kind).parameters if p != "self"]
    for option in options:
        if option not in names:
            raise RecipeError(
                f"{where}: {name} has no option {option!r}{nearest(option, names)}; it has {', '.join(names)}."
            )
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {name} refuses its options: {error}.") from None


@contextmanager
def drawn_from(generator: torch.Generator) -> Iterator[None]:
    """Lend the CPU's global generator, which torchvision's transforms draw from, seeded from `generator`."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    own = torch.default_generator
    state = own.get_state()
    own.manual_seed(seed)
    try:
        yield
    finally:
        own.set_state(state)
