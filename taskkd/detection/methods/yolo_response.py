"""Response distillation scaled by the teacher's objectness, for YOLO-like heads (after Mehta & Ozturk 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.detection.responses import check_anchors, check_predictions
from taskkd.detection.terms import DetectionTerm
from taskkd.detection.views import Dense
from taskkd.errors import RecipeError, ShapeError, TaskkdError
from taskkd.losses.primitives import check_same_shape, full_precision, masked_mean
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term, Weight

__all__ = ["HeadResponse", "objectness_scaled", "yolo_response"]

Objectness = Literal["centreness", "confidence"]
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


class PointResponse(DetectionTerm):
    """`objectness_scaled` of two detectors that predict centre-ness at every point (FCOS)."""

    def __init__(
        self, name: str, student: nn.Module, teacher: nn.Module, *, objectness: Objectness, weight: Weight
    ) -> None:
        super().__init__(name, student, teacher, student_views=("dense",), teacher_views=("dense",), weight=weight)
        self.objectness = objectness

    def forward(self, run: Run) -> Tensor:
        own, other = self.student_views(run).dense, self.teacher_views(run).dense
        check_anchors(self.name, own, other)
        check_predictions(self.name, own.logits, other.logits)
        return objectness_scaled(self._outputs(own), self._outputs(other), boxes="distances")

    def _outputs(self, view: Dense) -> tuple[Tensor, Tensor, Tensor]:
        if view.quality is None:
            raise TaskkdError(f"term {self.name!r}: the detector predicts no centre-ness; expected FCOS.")
        logits, objects = view.logits[..., view.first :], view.quality
        if self.objectness == "confidence":
            sure = F.logsigmoid(objects.float()) + F.logsigmoid(logits.float()).amax(-1)
            objects = sure - (-sure.clamp(max=-1e-6).expm1()).log()  # the logit of a probability in log space
        return view.regression, objects, logits


class HeadResponse(Term):
    """`objectness_scaled` of tapped outputs, of any modules.

    Args:
        name, weight: see `Term`.
        outputs: taps of maps (N, anchors (5 + classes), h, w), one for each level: x, y, w, h, objectness, classes.
        boxes, objectness, scores: instead of `outputs`, taps of tensors (..., 4), (...) and (..., classes).
        anchors: at each cell of `outputs`.

    Raises:
        TaskkdError: neither `outputs` nor all three others are given, or not as many of each.
    """

    def __init__(
        self,
        name: str,
        *,
        outputs: Sequence[str] | None = None,
        boxes: Sequence[str] | None = None,
        objectness: Sequence[str] | None = None,
        scores: Sequence[str] | None = None,
        anchors: int = 3,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, weight)
        parts = [list(p or ()) for p in (boxes, objectness, scores)]
        if bool(outputs) == any(parts) or len({len(p) for p in parts}) > 1:
            raise TaskkdError(
                f"term {name!r}: expected either `outputs`, taps of whole maps, or `boxes`, `objectness` and `scores`, "
                f"as many taps of each; got {len(outputs or ())} and {', '.join(str(len(p)) for p in parts)}."
            )
        self.outputs, self.parts, self.anchors = list(outputs or ()), parts, anchors
        self.student_taps = self.teacher_taps = tuple(dict.fromkeys([*self.outputs, *(t for p in parts for t in p)]))

    def forward(self, run: Run) -> Tensor:
        try:
            return objectness_scaled(self._read(run.student), self._read(run.teacher))
        except ShapeError as error:
            raise ShapeError(f"term {self.name!r}: {error}") from None

    def _read(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (cells, 4), objectness (cells,) and scores (cells, classes) of all levels together."""
        if self.outputs:
            cells = torch.cat([self._cells(tap, values[tap]) for tap in self.outputs])
            return cells[:, :4], cells[:, 4], cells[:, 5:]
        boxes, objects, scores = ([values[tap] for tap in part] for part in self.parts)
        return (
            torch.cat([b.flatten(0, -2) for b in boxes]),
            torch.cat([o.flatten() for o in objects]),
            torch.cat([s.flatten(0, -2) for s in scores]),
        )

    def _cells(self, tap: str, x: Tensor) -> Tensor:
        """(cells, 5 + classes) of a map."""
        if x.ndim != 4 or x.shape[1] % self.anchors or x.shape[1] // self.anchors < 6:
            raise ShapeError(
                f"tap {tap!r} has shape {tuple(x.shape)}; expected (N, anchors (5 + classes), h, w) with "
                f"{self.anchors} anchors."
            )
        return x.reshape(len(x), self.anchors, -1, *x.shape[2:]).permute(0, 1, 3, 4, 2).flatten(0, 3)


def yolo_response(
    student: nn.Module,
    teacher: nn.Module,
    *,
    outputs: list[str] | None = None,
    boxes: list[str] | None = None,
    objectness: list[str] | None = None,
    scores: list[str] | None = None,
    anchors: Annotated[int, Gt(0)] = 3,
    points: Objectness = "centreness",
    weight: Annotated[float, Ge(0)] | Literal["auto"] = "auto",
) -> Method:
    """The response, scaled by the teacher's objectness: boxes and classes count where the teacher sees an object.

    Source: Mehta & Ozturk 2018, "Object Detection at 200 Frames per Second", as PaddleDetection distils YOLOv3 with it.
    Experimental: it is our reading of the survey's YOLOv4 system (Chu 2022), of which neither abstract nor text could
    be had, so none of its numbers is claimed. Theirs weighs 1000 beside a task loss that is a sum over cells; beside
    the losses of torchvision, means over objects, it would drown them, hence "auto".

    For YOLO-like modules name the taps of the head (the same in both; two modules with as many cells and classes). For
    two FCOS centre-ness takes the place of objectness.

    Args:
        student, teacher: two FCOS of the same classes and strides, or any two modules with the taps below.
        outputs: taps of maps (N, anchors (5 + classes), h, w), of each level: x, y, w, h, objectness, classes.
        boxes, objectness, scores: instead, taps of (..., 4), (...) and (..., classes).
        anchors: at each cell of `outputs`.
        points: of FCOS: "centreness" as it is, or "confidence", times the highest class probability (centre-ness is
            trained at positive points only and means little elsewhere).
        weight: of the whole.

    Raises:
        RecipeError: no taps are named, and the two are no FCOS.
    """
    term: Term
    if outputs or boxes or objectness or scores:
        term = HeadResponse(
            "response", outputs=outputs, boxes=boxes, objectness=objectness, scores=scores, anchors=anchors,
            weight=weight,
        )  # fmt: skip
    else:
        for model in (student, teacher):
            if not _is_fcos(model):
                raise RecipeError(
                    f"yolo_response: a {type(model).__name__} has no objectness that is known: expected two FCOS, or "
                    "the taps of a YOLO-like head as `outputs`, or as `boxes`, `objectness` and `scores`."
                )
        term = PointResponse("response", student, teacher, objectness=points, weight=weight)
    return Method("yolo_response", [Stage("distil", [term])], ("labels",))


def _is_fcos(model: nn.Module) -> bool:
    from torchvision.models.detection import FCOS

    return isinstance(model, FCOS)
