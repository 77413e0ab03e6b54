"""Response distillation scaled by the teacher's objectness, for YOLO-like heads (after Mehta & Ozturk 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_same_shape, full_precision, masked_mean

__all__ = ["objectness_scaled"]

Boxes = Literal["centre_size", "distances"]


@full_precision
def objectness_scaled(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    boxes: Boxes = "centre_size",
    parts: tuple[float, float, float] = (1.0, 1.0, 1.0),
    mask: Tensor | None = None,
) -> Tensor:
    """Boxes and classes as far as the teacher sees an object, objectness everywhere; means over all cells.

    `mean o [BCE(x, sig x_t) + BCE(y, sig y_t) + |w - w_t| + |h - h_t|] + mean o BCE(c, sig c_t) + mean BCE(o_s, [o_t >
    0])` with `o = sig(o_t)`. Source: Mehta & Ozturk 2018, "Object Detection at 200 Frames per Second", as
    PaddleDetection has it for YOLOv3.

    Scaling: equal to theirs but for their weight of 1000, which the method has. The box and objectness parts of two
    equal heads are not 0 (cross-entropies).

    Args:
        student, teacher: `(boxes (..., 4), objectness (...), scores (..., classes))`, raw outputs of the head.
        boxes: "centre_size": logits of the offsets in a cell, then logarithms of the size; "distances": all four are
            compared by their absolute difference (FCOS).
        parts: weights of boxes, scores and objectness.
        mask: weights or booleans over (...).

    Raises:
        ShapeError: not three tensors, or the shapes do not fit each other.
    """
    _check(student, teacher)
    (box_s, object_s, score_s), (box_t, object_t, score_t) = student, teacher
    weight = object_t.sigmoid()
    apart = (box_s - box_t).abs()
    if boxes == "centre_size":
        offsets = F.binary_cross_entropy_with_logits(box_s[..., :2], box_t[..., :2].sigmoid(), reduction="none")
        location = offsets.sum(-1) + apart[..., 2:].sum(-1)
    else:
        location = apart.sum(-1)
    classes = F.binary_cross_entropy_with_logits(score_s, score_t.sigmoid(), reduction="none").mean(-1)
    found = F.binary_cross_entropy_with_logits(object_s, (object_t > 0).to(object_s.dtype), reduction="none")
    return (
        parts[0] * masked_mean(weight * location, mask)
        + parts[1] * masked_mean(weight * classes, mask)
        + parts[2] * masked_mean(found, mask)
    )


def _check(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if len(student) != 3 or len(teacher) != 3:
        raise ShapeError("`objectness_scaled` needs boxes, objectness and scores of each side.")
    for own, other in zip(student, teacher, strict=True):
        check_same_shape(own, other, "objectness_scaled")
    if student[0].shape != (*student[1].shape, 4) or student[2].shape[:-1] != student[1].shape:
        raise ShapeError(
            "`objectness_scaled` needs boxes (..., 4), objectness (...) and scores (..., classes), got "
            f"{', '.join(str(tuple(x.shape)) for x in student)}."
        )
