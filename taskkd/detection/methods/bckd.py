"""BCKD (Yang L. et al. 2023): class scores as binary decisions, boxes by their overlap."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn

from taskkd.detection.methods.crosskd import Branch, counted, positives, proper
from taskkd.detection.methods.dense_losses import box_overlap, quality_focal
from taskkd.detection.responses import check_anchors
from taskkd.detection.terms import DetectionTerm
from taskkd.detection.views import Dense
from taskkd.errors import RecipeError, ShapeError
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Weight

__all__ = ["BinaryDense", "bckd"]


class BinaryDense(DetectionTerm):
    """Class scores or boxes at every anchor of two detectors that look at the same anchors.

    Args:
        name, weight: see `Term`.
        student, teacher: one-stage detectors whose class scores are sigmoids.
        what: "classification": `quality_focal`. "box": `1 - GIoU`, weighted by the largest difference of the class
            scores. Both are divided by the number of positives of the student's assigner, at least one for each image.
        beta: of `quality_focal`.

    Raises:
        ShapeError: the two sides have other anchors or classes.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        what: Branch,
        beta: float = 1.0,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, student, teacher, student_views=("dense",), teacher_views=("dense",), weight=weight)
        self.what, self.beta = what, beta

    def _pair(self, run: Run) -> tuple[Dense, Dense]:
        own, other = self.student_views(run).dense, self.teacher_views(run).dense
        for dense, who in ((own, "student"), (other, "teacher")):
            if dense.activation != "sigmoid":
                raise RecipeError(
                    f"bckd: the {who}'s class scores are a softmax with background; it compares sigmoids, as of "
                    "RetinaNet and FCOS. Chen's method compares softmaxes."
                )
        classes = [d.logits.shape[-1] - d.first for d in (own, other)]
        if classes[0] != classes[1]:
            raise ShapeError(f"term {self.name!r}: the student has {classes[0]} classes, the teacher {classes[1]}.")
        check_anchors(self.name, own, other)
        return own, other

    def forward(self, run: Run) -> Tensor:
        own, other = self._pair(run)
        matched, counts = counted(own, self.student_views(run).images)
        number = positives(matched, counts)
        if self.what == "classification":
            scores = own.logits[..., own.first :], other.logits[..., other.first :]
            return quality_focal(*scores, beta=self.beta, weights=counts, divisor=number)
        boxes = other.decode()
        apart = (own.probabilities() - other.probabilities()).detach().abs().amax(-1) * (counts & proper(boxes))
        return box_overlap(own.decode(), boxes, weights=apart, divisor=number)


def bckd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    class_weight: Annotated[float, Ge(0)] = 1.0,
    box_weight: Annotated[float, Ge(0)] = 4.0,
    beta: Annotated[float, Ge(0)] = 1.0,
    task_weight: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """Task loss + binary classification distillation + GIoU of both networks' boxes.

    Source: Yang L. et al. 2023, "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object
    Detection": the scores of a dense detector are independent yes/no decisions, which a softmax does not see.

    Scaling: both are divided by the positives as the authors do, but at least by the number of images. Their code
    leaves out levels without positives; ours takes all. Anchors in padding, anchors that the assigner ignores and boxes
    of the teacher without area do not count.

    Args:
        student, teacher: torchvision's RetinaNet or FCOS with the same classes, anchors and levels.
        class_weight, box_weight: of the two terms; 0: left out.
        beta: of the focal factor.
        task_weight: of the detector's own loss.

    Raises:
        TaskkdError: a detector does not predict at anchors.
    """
    weights: dict[Branch, float] = {"classification": class_weight, "box": box_weight}
    terms = [
        BinaryDense(f"binary-{what}", student, teacher, what=what, beta=beta, weight=w)
        for what, w in weights.items()
        if w > 0
    ]
    return Method("bckd", [Stage("distil", terms, task_weight)], ("labels",))
