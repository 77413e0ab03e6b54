"""PKD for detectors: features compared by their correlation (Cao et al. 2022)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.detection.methods.maps import (
    Adapter,
    Maps,
    MapsTerm,
    adapter_of,
    as_list,
    channel_moments,
    safe_sqrt,
    two_stage,
)
from taskkd.detection.terms import resized
from taskkd.losses.primitives import check_same_shape, full_precision
from taskkd.ranks import gather_ranks, sum_ranks, whole_loss, world_size
from taskkd.stages import Method, Stage

__all__ = ["pearson_kd", "pearson_loss"]


@full_precision
def pearson_loss(
    student: Maps,
    teacher: Maps,
    *,
    resize: Literal["student", "teacher"] = "student",
    eps: float = 1e-6,
    gather: bool = False,
) -> Tensor:
    """Half the mean squared difference of standardised maps, summed over levels; `1 - r` of each channel, on average.

    Each channel is shifted and scaled to mean 0 and (unbiased) deviation 1 over batch and space together. Source: Cao,
    Zhang, Gao, Cheng, Cheng, Wang, Zhang 2022, "PKD: General Distillation Framework for Object Detectors via Pearson
    Correlation Coefficient".

    Scaling: as in their code, for each level a mean over everything. Where sizes differ one side is resized (bilinear);
    their code does so only where the heights do.

    Args:
        student, teacher: (N, C, h, w), or lists of the levels.
        resize: which side.
        eps: added to the deviation.
        gather: on several ranks, of the maps of all of them, whose sizes may differ: each rank has the whole loss, with
            gradient to its own maps, see `taskkd.ranks.whole_loss`.

    Raises:
        ShapeError: batches or channels differ.
    """
    levels = []
    for s, t in zip(as_list(student), as_list(teacher), strict=True):
        own, other = (resized(s, t), t) if resize == "student" else (s, resized(t, s))
        check_same_shape(own, other, "pearson_loss")
        if gather and world_size() > 1:
            levels.append(_of_all_ranks(own, other, eps))
        else:
            levels.append(F.mse_loss(_standardised(own, eps), _standardised(other, eps)) / 2)
    total: Tensor = sum(levels[1:], levels[0])
    return total


def _gathered(student: Maps, teacher: Maps) -> Tensor:
    return whole_loss(pearson_loss(student, teacher, gather=True))


def _standardised(x: Tensor, eps: float) -> Tensor:
    centred, _, variance = channel_moments(x)
    return centred / (safe_sqrt(variance) + eps)


def _of_all_ranks(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    """The same of one level from the sums over all ranks: a few numbers of each channel travel, no maps."""
    count = int(gather_ranks(torch.tensor([student[:, 0].numel()], device=student.device)).sum())
    # A shift of the means changes no sum over all ranks: they are constants.
    s, t = (x - sum_ranks(x.detach().sum((0, 2, 3), keepdim=True)) / count for x in (student, teacher))
    ss, tt, st = sum_ranks(torch.stack([(a * b).sum((0, 2, 3)) for a, b in ((s, s), (t, t), (s, t))]))
    own, other = (safe_sqrt(x / max(count - 1, 1)) + eps for x in (ss, tt))
    value: Tensor = (ss / own**2 + tt / other**2 - 2 * st / (own * other)).mean() / (2 * count)
    return value


def pearson_kd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Ge(0)] | Literal["auto"] | None = None,
    levels: Annotated[int, Gt(0)] | None = 4,
    adapter: Adapter = "auto",
    neck: list[str] | None = None,
    teacher_neck: list[str] | None = None,
    gather: bool = False,
) -> Method:
    """The neck's maps, each channel standardised: what varies counts, not how strong it is.

    Source: Cao et al. 2022, "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient", weights as in mmrazor. Teacher and student may be of different families: it is the
    method that asks least of a pair. The authors have no adapter, and maps of 256 channels on both sides.

    Args:
        student, teacher: detectors, or any modules with `neck`.
        weight: None: 6 for two-stage students, 10 for others, as published; "auto": see `kd.Auto`.
        levels: how many, finest first; None: all that both have.
        adapter: see `taskkd.detection.methods.maps.adapter_of`.
        neck, teacher_neck: taps of maps, paired in order; None: those of the detector's family.
        gather: on several ranks standardise over the images of all of them; False: of each rank its own.
    """
    if weight is None:
        weight = 6.0 if two_stage(student) else 10.0
    term = MapsTerm(
        "pearson",
        student,
        teacher,
        _gathered if gather else pearson_loss,
        weight=weight,
        adapter=adapter_of(adapter),
        neck=neck,
        teacher_neck=teacher_neck,
        count=levels,
    )
    return Method("pearson_kd", [Stage("distil", [term])], ("labels",))
