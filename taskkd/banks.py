"""Memories of embeddings: one for each sample of a training set, or the latest of each class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskkd.errors import ShapeError, TaskkdError
from taskkd.losses.primitives import l2_normalise
from taskkd.ranks import gather_ranks

__all__ = ["ClassQueues", "MemoryBank", "sample_ids"]


def sample_ids(batch: Mapping[str, Any], samples: int, who: str) -> Tensor:
    """The batch's `id` as int64, (batch,), each in 0 to `samples - 1`: one look at the device in every step.

    Raises:
        TaskkdError: there is no `id`, or one is outside; `who` begins the sentence.
    """
    if "id" not in batch:
        raise TaskkdError(f"{who} remembers samples by their number and needs `id` in every batch (int64, one each).")
    ids = torch.as_tensor(batch["id"])
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TaskkdError(f"{who}: `id` must be whole numbers (batch,), got {ids.dtype} {tuple(ids.shape)}.")
    outside = ids[(ids < 0) | (ids >= samples)]
    if len(outside):
        raise TaskkdError(
            f"{who}: sample id {outside[0].item()} is outside the memory of {samples} samples; ids run from 0 to "
            f"{samples - 1}, `samples` is the size of the training set."
        )
    return ids.long()


class MemoryBank(nn.Module):
    """L2-normalised embeddings of all samples of a training set, by id: a buffer, so checkpoints carry it.

    Rows begin uniform in `+-sqrt(3 / features)` and move by `row <- normalise(momentum * row + (1 - momentum) * new)`.
    Source: Wu, Xiong, Yu, Lin 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", as Tian
    et al. 2020 use it. It takes `4 * samples * features` bytes: 656 MB for ImageNet with 128 features.

    Args:
        samples: the number of samples; ids are 0 to `samples - 1`.
        features: the size of an embedding.
        momentum: in [0, 1).

    Raises:
        TaskkdError: a number is out of range.
    """

    rows: Tensor

    def __init__(self, samples: int, features: int, *, momentum: float = 0.5) -> None:
        super().__init__()
        if samples < 1 or features < 1 or not 0 <= momentum < 1:
            raise TaskkdError(
                "a memory bank needs positive `samples` and `features` and `momentum` in [0, 1), got "
                f"{samples}, {features} and {momentum}."
            )
        self.momentum = momentum
        self.register_buffer("rows", (torch.rand(samples, features) * 2 - 1) * (3 / features) ** 0.5)

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def update(self, ids: Tensor, embeddings: Tensor) -> None:
        """Take in a batch: of all ranks on every rank alike, in order of rank; of an id seen twice, the last.

        Under DDP every rank must come here in every step: it gathers, and rank 0's buffers are sent to all others.

        Args:
            ids: (batch,) int64, checked by `sample_ids`.
            embeddings: (batch, features), L2-normalised.

        Raises:
            ShapeError: not one embedding of the bank's size for each id.
        """
        if embeddings.shape != (*ids.shape, self.rows.shape[1]):
            raise ShapeError(
                f"the memory takes one embedding of {self.rows.shape[1]} features for each of {len(ids)} ids, got "
                f"{tuple(embeddings.shape)}."
            )
        ids, embeddings = gather_ranks(ids), gather_ranks(embeddings.to(self.rows.dtype))
        if len(ids) == 0:
            return
        order = torch.arange(len(ids), device=ids.device)
        last = torch.where(ids[:, None] == ids, order, -1).amax(1)  # all writes of one id are the same
        moved = self.momentum * self.rows[ids] + (1 - self.momentum) * embeddings[last]
        self.rows[ids] = l2_normalise(moved)


class ClassQueues(nn.Module):
    """The latest L2-normalised embeddings of each class: a ring for each, buffers, so checkpoints carry them.

    Rows begin as random directions. Source: Yang C. et al. 2022 (CIRKD), after Wang W. et al. 2021, "Exploring
    Cross-Image Pixel Contrast for Semantic Segmentation". It takes `classes * size * features` numbers.

    Args:
        classes, size, features: how many rings, rows of each, numbers of a row.
        dtype: of the rows; half precision takes half the memory.
        wrap: "ring": what does not fit before the end goes on at the beginning; "restart": the whole of what is pushed
            goes to the end, the next to the beginning (the released code of CIRKD).

    Raises:
        TaskkdError: a number is not positive, or no such `wrap`.
    """

    rows: Tensor
    places: Tensor

    def __init__(
        self,
        classes: int,
        size: int,
        features: int,
        *,
        dtype: torch.dtype = torch.float32,
        wrap: Literal["ring", "restart"] = "ring",
    ) -> None:
        super().__init__()
        if min(classes, size, features) < 1:
            raise TaskkdError(
                f"queues need positive `classes`, `size` and `features`, got {classes}, {size} and {features}."
            )
        if wrap not in ("ring", "restart"):
            raise TaskkdError(f"`wrap` must be 'ring' or 'restart', got {wrap!r}.")
        self.wrap = wrap
        self.register_buffer("rows", torch.empty(classes, size, features, dtype=dtype))
        for ring in self.rows:  # one at a time: the random numbers are fp32
            ring.copy_(l2_normalise(torch.randn(size, features)))
        self.register_buffer("places", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def push(self, classes: Tensor, counts: Tensor, rows: Tensor) -> None:
        """Take in chunks of rows, each of one class; of all ranks on every rank alike, in order of rank.

        Under DDP every rank must come here in every step, also with nothing.

        Args:
            classes: (chunks,) int64.
            counts: (chunks,) int64, rows of each chunk.
            rows: (sum of counts, features), L2-normalised, chunk after chunk.

        Raises:
            ShapeError: the rows are not as many or not of this size.
        """
        if rows.ndim != 2 or rows.shape[1] != self.rows.shape[2]:
            raise ShapeError(f"the queues take rows of {self.rows.shape[2]} features, got {tuple(rows.shape)}.")
        classes, counts = gather_ranks(classes), gather_ranks(counts)
        rows = gather_ranks(rows.to(self.rows.dtype))
        places, size = self.places.tolist(), self.rows.shape[1]
        for number, whole in zip(classes.tolist(), torch.split(rows, counts.tolist()), strict=True):
            chunk = whole[-size:]
            start, end = places[number], places[number] + len(chunk)
            if self.wrap == "restart" and end >= size:
                start, end = size - len(chunk), 0
            index = torch.arange(start, start + len(chunk), device=rows.device) % size
            self.rows[number, index] = chunk
            places[number] = end % size
        self.places.copy_(torch.tensor(places))

    def take(self, index: Tensor) -> Tensor:
        """The rows of these places of every class, (classes * len(index), features), in fp32 or fp64."""
        found = self.rows[:, index.to(self.rows.device)].flatten(0, 1)
        return found.to(torch.promote_types(found.dtype, torch.float32))
