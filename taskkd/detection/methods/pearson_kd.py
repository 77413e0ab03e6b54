"""PKD for detectors: features compared by their correlation (Cao et al. 2022)."""

from __future__ import annotations

from typing import Annotated, Literal

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
from taskkd.stages import Method, Stage

__all__ = ["pearson_kd", "pearson_loss"]


@full_precision
def pearson_loss(
    student: Maps, teacher: Maps, *, resize: Literal["student", "teacher"] = "student", eps: float = 1e-6
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

    Raises:
        ShapeError: batches or channels differ.
    """
    levels = []
    for s, t in zip(as_list(student), as_list(teacher), strict=True):
        own, other = (resized(s, t), t) if resize == "student" else (s, resized(t, s))
        check_same_shape(own, other, "pearson_loss")
        levels.append(F.mse_loss(_standardised(own, eps), _standardised(other, eps)) / 2)
    total: Tensor = sum(levels[1:], levels[0])
    return total


def _standardised(x: Tensor, eps: float) -> Tensor:
    centred, _, variance = channel_moments(x)
    return centred / (safe_sqrt(variance) + eps)


def pearson_kd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Ge(0)] | Literal["auto"] | None = None,
    levels: Annotated[int, Gt(0)] | None = 4,
    adapter: Adapter = "auto",
    neck: list[str] | None = None,
    teacher_neck: list[str] | None = None,
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
    """
    if weight is None:
        weight = 6.0 if two_stage(student) else 10.0
    term = MapsTerm(
        "pearson",
        student,
        teacher,
        pearson_loss,
        weight=weight,
        adapter=adapter_of(adapter),
        neck=neck,
        teacher_neck=teacher_neck,
        count=levels,
    )
    return Method("pearson_kd", [Stage("distil", [term])], ("labels",))
