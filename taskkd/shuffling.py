"""The engine's random order of the samples, drawn as it draws it, without a list of all their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, Sampler

__all__ = ["shuffle_in_parts"]

PART = 4096


class InParts(Sampler[int]):
    """The order of a `SeedableRandomSampler`, number for number; a list of a million takes 40 MB, a tensor 8.

    Args:
        engine: the sampler, whose seed and epoch count.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __len__(self) -> int:
        return len(self.engine)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.engine.epoch + self.engine.initial_seed)
        for part in torch.split(torch.randperm(len(self), generator=generator), PART):
            yield from part.tolist()
        self.set_epoch(self.engine.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """The order is that of the seed plus this number."""
        self.engine.set_epoch(epoch)


def shuffle_in_parts(loader: DataLoader[Any]) -> None:
    """Give a loader that `accelerate` prepared `InParts` for its `SeedableRandomSampler`; others stay as they are."""
    if not hasattr(loader, "get_sampler"):
        return
    sampler: Any = loader.get_sampler()
    plain = type(sampler) is SeedableRandomSampler and not sampler.replacement
    if plain and sampler.generator is None and len(sampler) == len(sampler.data_source):
        loader.set_sampler(InParts(sampler))  # type: ignore[attr-defined]
