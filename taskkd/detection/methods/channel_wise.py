"""Channel-wise distillation for detectors (Shu et al. 2021)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from taskkd import losses
from taskkd.detection.methods.maps import Adapter, Maps, MapsTerm, adapter_of, as_list, channel_moments
from taskkd.detection.terms import DetectionTerm
from taskkd.detection.views import Dense
from taskkd.errors import ShapeError
from taskkd.losses.primitives import full_precision
from taskkd.schedules import stop_after
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term, Weight

__all__ = ["channel_wise", "channel_wise_loss", "class_maps"]


@full_precision
def channel_wise_loss(student: Maps, teacher: Maps, *, temperature: float = 1.0, normalise: bool = False) -> Tensor:
    """`losses.channel_wise` of each level, summed over levels.

    Args:
        student, teacher: (N, C, h, w), or lists of the levels.
        temperature: `T`, positive.
        normalise: standardise each channel over batch and space first, as batch norm without parameters does.

    Raises:
        ShapeError: shapes differ.
    """
    levels = []
    for s, t in zip(as_list(student), as_list(teacher), strict=True):
        pair = (_normalised(s), _normalised(t)) if normalise else (s, t)
        levels.append(losses.channel_wise(*pair, temperature=temperature))
    total: Tensor = sum(levels[1:], levels[0])
    return total


def _normalised(x: Tensor, eps: float = 1e-5) -> Tensor:
    centred, _, variance = channel_moments(x, correction=0)
    return centred * (variance + eps).rsqrt()


def class_maps(dense: Dense) -> list[Tensor]:
    """The class logits of each level as maps (N, anchors of a cell x classes, h, w)."""
    found = []
    for (h, w), level in zip(dense.shapes, torch.split(dense.logits, dense.level_sizes, 1), strict=True):
        found.append(level.reshape(len(level), h, w, -1).permute(0, 3, 1, 2))
    return found


class ClassMaps(DetectionTerm):
    """`channel_wise_loss` of the class logits of two one-stage detectors."""

    def __init__(
        self, name: str, student: nn.Module, teacher: nn.Module, *, temperature: float, weight: Weight
    ) -> None:
        super().__init__(name, student, teacher, student_views=("dense",), teacher_views=("dense",), weight=weight)
        self.temperature = temperature

    def forward(self, run: Run) -> Tensor:
        own, other = class_maps(self.student_views(run).dense), class_maps(self.teacher_views(run).dense)
        if [m.shape for m in own] != [m.shape for m in other]:
            shapes = (", ".join(str(tuple(m.shape)) for m in side) for side in (own, other))
            raise ShapeError(
                f"term {self.name!r}: class maps of the student and the teacher differ, {' and '.join(shapes)}; "
                "on='neck' compares maps of any width."
            )
        return channel_wise_loss(own, other, temperature=self.temperature)


def _projection(student: Tensor, teacher: Tensor) -> nn.Module:
    return nn.Conv2d(student.shape[1], teacher.shape[1], 1, bias=False)


def channel_wise(
    student: nn.Module,
    teacher: nn.Module,
    *,
    on: Literal["neck", "classes"] = "neck",
    temperature: Annotated[float, Gt(0)] = 1.0,
    weight: Annotated[float, Ge(0)] | None = None,
    normalise: bool = False,
    gather: bool = False,
    until: Annotated[float, Interval(gt=0, le=1)] = 1.0,
    levels: Annotated[int, Gt(0)] | None = None,
    adapter: Adapter = "auto",
    neck: list[str] | None = None,
    teacher_neck: list[str] | None = None,
) -> Method:
    """Each channel's softmax over space: where a channel is active counts.

    Source: Shu, Liu, Gao, Yan, Shen 2021, "Channel-wise Knowledge Distillation for Dense Prediction"; on detectors as
    in mmrazor (neck, 10), mmdetection-distiller and PaddleDetection (classes, 5). mmyolo's RTMDet is `normalise=True,
    weight=1, until=280 / 300`.

    Args:
        student, teacher: detectors; any modules with `neck`.
        on: the "neck"'s maps, or the "classes" of one-stage detectors with equal classes and anchors.
        temperature: of the softmax.
        weight: None: 10 on the neck, 5 on classes, 1 with `normalise`.
        normalise: neck only: a 1x1 convolution without bias on the student's maps, whatever their width, then batch
            norm without parameters on both sides.
        gather: with `normalise`: on several ranks standardise over the maps of all of them, which must be of one size;
            False: of each rank its own. Without `normalise` ranks make no difference.
        until: the share of the training after which the term is off.
        levels: how many maps of the neck, finest first; None: all that both have.
        adapter: without `normalise`; see `taskkd.detection.methods.maps.adapter_of`.
        neck, teacher_neck: taps of maps, paired in order; None: those of the detector's family.
    """
    if weight is None:
        weight = 5.0 if on == "classes" else 1.0 if normalise else 10.0
    scheduled: Any = weight if until == 1 else stop_after(weight, fraction=until)
    term: Term
    if on == "classes":
        term = ClassMaps("channels", student, teacher, temperature=temperature, weight=scheduled)
    else:
        term = MapsTerm(
            "channels",
            student,
            teacher,
            channel_wise_loss,
            {"temperature": temperature, "normalise": normalise},
            gather=gather and normalise,
            weight=scheduled,
            adapter=_projection if normalise else adapter_of(adapter),
            neck=neck,
            teacher_neck=teacher_neck,
            count=levels,
        )
    return Method("channel_wise", [Stage("distil", [term])], ("labels",))
