"""The samples of all ranks together, where a loss or a memory is about all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from taskkd.errors import ShapeError

__all__ = ["gather_ranks", "join_ranks", "sum_ranks", "whole_loss", "world_size"]


def world_size() -> int:
    """The number of ranks; 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_ranks(x: Tensor) -> Tensor:
    """The rows of all ranks in order of rank, without gradient; `x` itself where there is one process."""
    return x if world_size() == 1 else torch.cat(_parts(x.detach()))


def join_ranks(x: Tensor) -> Tensor:
    """The rows of all ranks in order of rank, with gradient to this rank's own; `x` itself in one process."""
    if world_size() == 1:
        return x
    parts = _parts(x.detach())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def sum_ranks(x: Tensor) -> Tensor:
    """The sum over all ranks, with gradient to this rank's own part; `x` itself in one process."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return x + (total - x.detach())


def whole_loss(value: Tensor) -> Tensor:
    """A loss of the samples of all ranks, which each rank has worked out with gradient to its own.

    DDP averages the gradients of the ranks, where theirs is the sum: they are multiplied by the number of ranks.
    """
    return value + (world_size() - 1) * (value - value.detach()) if world_size() > 1 else value


def _parts(x: Tensor) -> list[Tensor]:
    """What each rank has; the numbers of rows may differ, nothing else."""
    shape = torch.tensor(x.shape, device=x.device)
    shapes = [torch.empty_like(shape) for _ in range(world_size())]
    dist.all_gather(shapes, shape)
    known = [tuple(s.tolist()) for s in shapes]
    if any(s[1:] != known[0][1:] for s in known):
        raise ShapeError(f"what is gathered must be alike on all ranks but for the batch, got {known}.")
    sizes = [s[0] for s in known]
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])]).contiguous()
    rows = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(rows, padded)
    return [r[:n] for r, n in zip(rows, sizes, strict=True)]
