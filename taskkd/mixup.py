"""Batches that need fewer teacher runs: uncertain samples are kept, the others mixed or dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError

__all__ = ["Mixed", "mixing_shares", "uncertainty_mixup"]


@dataclass(frozen=True)
class Mixed:
    """A batch of `uncertainty_mixup`.

    Args:
        inputs: `(1 - share) * inputs[first] + share * inputs[second]`, (keep, ...).
        first, second: which samples of the batch went into each, (keep,) int64.
        share: of the second, (keep,); labels mix with the same shares.
    """

    inputs: Tensor
    first: Tensor
    second: Tensor
    share: Tensor


def mixing_shares(batch: int, *, turning: float, steepness: float = 10.0) -> Tensor:
    """How much each rank is mixed, from the most uncertain sample on.

    `sigmoid(steepness * (r - (turning - 1/2)) / batch)` of the rank `r`, counted from 0.

    Source: Xu G., Liu, Loy 2020, "Computation-Efficient Knowledge Distillation via Uncertainty-Aware Mixup".

    Args:
        batch: the number of samples.
        turning: how many samples, the most uncertain ones, are mixed by less than half.
        steepness: of the sigmoid.

    Returns:
        (batch,) fp32, rising.
    """
    return torch.sigmoid(steepness * (torch.arange(batch) - (turning - 0.5)) / batch)


@torch.no_grad()
def uncertainty_mixup(inputs: Tensor, student: Tensor, *, keep: int, turning: float, steepness: float = 10.0) -> Mixed:
    """UNIX-KD: samples ranked by the student's entropy, the certain ones mixed with others, the most certain dropped.

    A sample of rank `r` becomes `(1 - l c_r) x_r + l c_r x'`, `x'` a random sample of the batch, `c_r` of
    `mixing_shares`, `l` uniform in [0, 1] and one for the batch; the first `keep` of them go to teacher and student.

    Source: Xu G., Liu, Loy 2020, "Computation-Efficient Knowledge Distillation via Uncertainty-Aware Mixup" (batch 64,
    keep 48). Randomness comes from torch's global generator of the inputs' device.

    Args:
        inputs: (batch, ...), of floating point.
        student: the student's logits for them (batch, classes), of a run without gradient.
        keep: how many samples are left, 1 to batch.
        turning, steepness: see `mixing_shares`.

    Raises:
        ShapeError: not one row of logits for each sample.
        ValueError: `keep` is out of range.
    """
    count = len(inputs)
    if student.ndim != 2 or len(student) != count:
        raise ShapeError(
            f"`uncertainty_mixup` needs logits (batch, classes) for {count} samples, got {tuple(student.shape)}."
        )
    if not 1 <= keep <= count:
        raise ValueError(f"`keep` must be from 1 to the batch of {count}, got {keep}.")
    log_p = F.log_softmax(student.float(), 1)
    first = (log_p.exp() * log_p).sum(1).argsort(stable=True)[:keep]  # the largest entropy first
    second = torch.randperm(count, device=inputs.device)[:keep]
    share = mixing_shares(count, turning=turning, steepness=steepness)[:keep].to(inputs.device)
    share = torch.rand((), device=inputs.device) * share
    mix = share.to(inputs.dtype).reshape(-1, *(1,) * (inputs.ndim - 1))
    return Mixed(torch.lerp(inputs[first], inputs[second], mix), first, second, share)
