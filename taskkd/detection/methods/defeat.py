"""DeFeat: features and classes distilled apart on objects and background (Guo et al. 2021)."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd.detection.methods.maps import Adapter, Maps, adapter_of, as_list, strides_of, two_stage, zero
from taskkd.detection.regions import inside_boxes
from taskkd.detection.responses import check_predictions
from taskkd.detection.terms import DetectionTerm, NeckTerm
from taskkd.losses.primitives import check_same_shape, full_precision, masked_mean, softened_kl
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term

__all__ = ["DecoupledClasses", "DecoupledMaps", "defeat", "defeat_loss", "defeat_response"]


@full_precision
def defeat_loss(
    student: Maps, teacher: Maps, *, masks: Maps, foreground: float = 3.0, background: float = 12.0
) -> Tensor:
    """Mean over levels of `foreground * sum M (s - t)^2 / (2 sum M) + background *` the same with `1 - M`.

    `sum M` counts elements, so both parts are half a mean of squares. Source: Guo, Han, Wang, Wu, Chen, Xu, Xu 2021,
    "Distilling Object Detectors via Decoupled Features"; as in their code. A level without cells of a kind has 0 there.

    Args:
        student, teacher: (N, C, h, w), or lists of the levels.
        masks: (N, h, w), 1 on objects, or a list.
        foreground, background: weights.

    Raises:
        ShapeError: shapes differ.
    """
    students = as_list(student)
    total = zero(students)
    for s, t, mask in zip(students, as_list(teacher), as_list(masks), strict=True):
        check_same_shape(s, t, "defeat_loss")
        squares, inside = (s - t).square().mean(1), mask > 0
        total = total + foreground / 2 * masked_mean(squares, inside) + background / 2 * masked_mean(squares, ~inside)
    return total / len(students)


@full_precision
def defeat_response(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    foreground: float = 2.0,
    background: float = 2.0,
    temperature: float = 1.0,
) -> Tensor:
    """`foreground * T^2 KL(teacher || student)`, mean over the regions on objects, and the same over the others.

    Source: Guo et al. 2021; that each part is a mean over its regions is ours. 0 for a part without regions.

    Args:
        student, teacher: logits (R, classes + 1) of the same regions.
        labels: (R,), 0 for background.
        foreground, background: weights.
        temperature: `T`, positive.

    Raises:
        ShapeError: shapes differ.
    """
    check_same_shape(student, teacher, "defeat_response")
    each = softened_kl(student, teacher, temperature, -1)
    return foreground * masked_mean(each, labels > 0) + background * masked_mean(each, labels == 0)


class DecoupledMaps(NeckTerm):
    """`defeat_loss` of the neck's maps.

    Args:
        name, student, teacher, **others: see `NeckTerm`.
        foreground, background: see `defeat_loss`.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        foreground: float = 3.0,
        background: float = 12.0,
        **others: Any,
    ) -> None:
        super().__init__(name, student, teacher, **others)
        self.foreground, self.background = foreground, background

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        """The loss of all levels."""
        images = self.images(run)
        strides = strides_of(images, students)
        shapes = [(m.shape[2], m.shape[3]) for m in students]
        masks = inside_boxes(images.boxes, shapes, strides, finest=14 * min(min(s) for s in strides))
        return defeat_loss(students, teachers, masks=masks, foreground=self.foreground, background=self.background)


class DecoupledClasses(DetectionTerm):
    """`defeat_response` of two-stage detectors, on the student's sampled proposals.

    Args:
        name, student, teacher, weight: see `DetectionTerm`.
        foreground, background, temperature: see `defeat_response`.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        foreground: float = 2.0,
        background: float = 2.0,
        temperature: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        views = ("rois",)
        super().__init__(name, student, teacher, student_views=views, teacher_views=views, weight=weight)
        self.options = {"foreground": foreground, "background": background, "temperature": temperature}

    def forward(self, run: Run) -> Tensor:
        own, other = self.student_views(run).rois, self.teacher_views(run).rois
        check_predictions(self.name, own.logits, other.logits, instead="classes=False leaves this term out")
        assert own.labels is not None, "a student's view has labels"
        return defeat_response(own.logits, other.logits, labels=own.labels, **self.options)


def defeat(
    student: nn.Module,
    teacher: nn.Module,
    *,
    foreground: Annotated[float, Ge(0)] = 3.0,
    background: Annotated[float, Ge(0)] = 12.0,
    classes: bool | None = None,
    class_foreground: Annotated[float, Ge(0)] = 2.0,
    class_background: Annotated[float, Ge(0)] = 2.0,
    temperature: Annotated[float, Gt(0)] = 1.0,
    adapter: Adapter = "conv3x3",
    neck: list[str] | None = None,
    teacher_neck: list[str] | None = None,
) -> Method:
    """Neck features apart inside and outside of boxes; classes apart of regions on objects and on background.

    Source: Guo et al. 2021 (DeFeat). Their regions are the teacher's proposals; here they are those that the student
    sampled, which both sides look at.

    Args:
        student, teacher: detectors; any modules with `neck`.
        foreground, background: of the maps.
        classes: whether classes are distilled; None: where both have two stages.
        class_foreground, class_background, temperature: of the classes.
        adapter: see `taskkd.detection.methods.maps.adapter_of`.
        neck, teacher_neck: taps of maps, paired in order; None: those of the detector's family.

    Raises:
        TaskkdError: classes are asked for of detectors that have not two stages.
    """
    terms: list[Term] = [
        DecoupledMaps(
            "maps",
            student,
            teacher,
            foreground=foreground,
            background=background,
            adapter=adapter_of(adapter),
            neck=neck,
            teacher_neck=teacher_neck,
        )
    ]
    if classes or (classes is None and two_stage(student) and two_stage(teacher)):
        terms.append(
            DecoupledClasses(
                "classes",
                student,
                teacher,
                foreground=class_foreground,
                background=class_background,
                temperature=temperature,
            )
        )
    return Method("defeat", [Stage("distil", terms)], ("labels",))
