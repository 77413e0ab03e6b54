"""The samples of all ranks together, where a loss or a memory is about all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["gather_ranks", "join_ranks", "world_size"]


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


def _parts(x: Tensor) -> list[Tensor]:
    """What each rank has; the numbers of rows may differ, nothing else."""
    count = torch.tensor([len(x)], device=x.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    sizes = [int(c.item()) for c in counts]
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])]).contiguous()
    rows = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(rows, padded)
    return [r[:n] for r, n in zip(rows, sizes, strict=True)]
