"""DETRDistill (Chang et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.detection.boxes import as_corners, paired_giou, pairwise_giou
from taskkd.detection.methods.kd_detr import check_classes, query_difference
from taskkd.detection.shared import SharedImages
from taskkd.detection.terms import DetectionTerm, NeckTerm
from taskkd.detection.views import Decoder
from taskkd.errors import RecipeError, ShapeError, TaskkdError
from taskkd.losses.primitives import full_precision, l2_normalise, masked_mean, safe_divide
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term, Weight

__all__ = [
    "HungarianResponse",
    "TargetAware",
    "TeacherQueries",
    "class_cost",
    "detr_distill",
    "hungarian_response",
    "matched_queries",
    "query_scores",
    "target_aware",
    "teacher_assigned",
]

Activation = Literal["sigmoid", "softmax"]
Predictions = tuple[Tensor, Tensor]


@full_precision
def class_cost(student: Tensor, teacher: Tensor, *, activation: Activation = "sigmoid") -> Tensor:
    """How badly each query of the student fits the classes of each of the teacher.

    "sigmoid": `sum_c BCE(s_n, p_m)`; "softmax" (ours, for DETR): `-sum_c p_m log softmax(s_n)`.

    Args:
        student: logits (..., n, classes).
        teacher: probabilities (..., m, classes).
        activation: of the detectors.

    Returns:
        (..., n, m).
    """
    if activation == "softmax":
        return -F.log_softmax(student, -1) @ teacher.mT
    return F.softplus(student).sum(-1, keepdim=True) - student @ teacher.mT


@torch.no_grad()
def matched_queries(
    student: Predictions,
    teacher: Predictions,
    *,
    cls: float = 1.0,
    l1: float = 5.0,
    giou: float = 2.0,
    activation: Activation = "sigmoid",
) -> tuple[Tensor, Tensor]:
    """One-to-one matches of the queries of both sides that make the sum of their costs smallest.

    Args:
        student: logits (batch, n, classes) and boxes (batch, n, 4), centre x, centre y, width, height in 0 to 1.
        teacher: probabilities (batch, m, classes) and boxes (batch, m, 4).
        cls, l1, giou: weights of the costs.
        activation: of the detectors.

    Returns:
        Indices (batch, min(n, m)) of the student's queries and of the teacher's.

    Raises:
        TaskkdError: scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise TaskkdError("queries are matched by scipy, which is not installed: pip install scipy.") from error
    cost = cls * class_cost(student[0], teacher[0], activation=activation)
    cost = cost + l1 * torch.cdist(student[1].float(), teacher[1].float(), p=1)
    cost = cost - giou * pairwise_giou(student[1].float(), teacher[1].float())
    limit = torch.finfo(cost.dtype).max / 1e3
    every = cost.nan_to_num(limit, limit, -limit).cpu().numpy()
    pairs = np.array([linear_sum_assignment(one) for one in every])  # (batch, 2, min(n, m))
    rows, columns = torch.from_numpy(pairs).to(cost.device).unbind(1)
    return rows, columns


@full_precision
def hungarian_response(
    student: Predictions,
    teacher: Predictions,
    *,
    cls: float = 1.0,
    l1: float = 5.0,
    giou: float = 2.0,
    activation: Activation = "sigmoid",
) -> Tensor:
    """The teacher's predictions as ground truth of the student's queries, matched one to one.

    Mean over matches of `cls * sum_c BCE(s, p_t) + l1 * sum|s - t| + giou * (1 - GIoU)`. For "softmax" (DETR) the first
    part is the cross-entropy with the teacher's probabilities, "no object" among them.

    Source: Chang et al. 2023, "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families",
    Hungarian-matching logits distillation; the reduction is the authors'.

    Args:
        student, teacher: logits (batch, queries, classes) and boxes (batch, queries, 4), centre x, centre y, width,
            height in 0 to 1; the numbers of queries may differ, what finds no partner does not count.
        cls, l1, giou: weights of costs and parts.
        activation: of the detectors.

    Raises:
        ShapeError: the numbers of classes differ.
        TaskkdError: scipy is missing.
    """
    (s, s_boxes), (t, t_boxes) = student, teacher
    if s.shape[-1] != t.shape[-1] or len(s) != len(t):
        raise ShapeError(
            "`hungarian_response` needs logits (batch, queries, classes) of the same images and classes, got "
            f"{tuple(s.shape)} and {tuple(t.shape)}."
        )
    t = t.sigmoid() if activation == "sigmoid" else t.softmax(-1)
    rows, columns = matched_queries((s, s_boxes), (t, t_boxes), cls=cls, l1=l1, giou=giou, activation=activation)
    s, s_boxes = (x.take_along_dim(rows[..., None], 1) for x in (s, s_boxes))
    t, t_boxes = (x.take_along_dim(columns[..., None], 1) for x in (t, t_boxes))
    if activation == "sigmoid":
        classes = F.binary_cross_entropy_with_logits(s, t, reduction="none").sum(-1)
    else:
        classes = -(t * F.log_softmax(s, -1)).sum(-1)
    boxes = l1 * (s_boxes - t_boxes).abs().sum(-1) + giou * (1 - paired_giou(s_boxes, t_boxes))
    return masked_mean(cls * classes + boxes)


@full_precision
def target_aware(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    queries: Tensor,
    scores: Tensor,
    inside: Sequence[Tensor] | None = None,
    floor: float = 0.01,
) -> Tensor:
    """Maps compared where the teacher's queries look for objects.

    For every layer of the decoder and every level: `m = max(sum_q score_q cos(query_q, pixel), floor)`, divided by its
    largest value in the image, and the mean of `(m (s - t))^2`; summed over levels and layers.

    Source: Chang et al. 2023, target-aware feature distillation; the mask is applied before squaring, as released.

    Args:
        student, teacher: maps (batch, width, height, width) of each level.
        queries: (layers, batch, queries, width) of the teacher, as wide as its maps.
        scores: (layers, batch, queries): the teacher's highest probability times the largest overlap with a box.
        inside: (batch, 1, height, width) of each level, 0 where it is padded; there nothing counts. None: all counts.
        floor: of the mask.

    Raises:
        ShapeError: maps differ, or the queries are not as wide as them.
    """
    total: Tensor | None = None
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape != t.shape or t.shape[1] != queries.shape[-1]:
            raise ShapeError(
                f"`target_aware`, level {level}: student {tuple(s.shape)}, teacher {tuple(t.shape)}, queries "
                f"{tuple(queries.shape)}; expected maps of one shape and queries as wide as their channels."
            )
        # sum_q score_q cos(query_q, pixel) needs no map for each query
        direction = (scores[..., None] * l2_normalise(queries)).sum(2)
        focus = torch.einsum("lbc,bchw->lbhw", direction, l2_normalise(t, dim=1)).clamp(min=floor)
        where = None if inside is None else inside[level].to(focus.dtype)
        if where is not None:
            focus = focus * where[:, 0]
        focus = safe_divide(focus, focus.amax((2, 3), keepdim=True))
        apart = (focus.square().sum(0)[:, None] * (s - t).square()).mean(1)
        value = masked_mean(apart, None if where is None else where[:, 0])
        total = value if total is None else total + value
    if total is None:
        raise ShapeError("`target_aware` got no maps.")
    return total


@torch.no_grad()
def query_scores(decoder: Decoder, images: SharedImages) -> Tensor:
    """How much each query has found: its highest probability times its largest overlap with a box.

    In images without boxes it is the probability alone, as released. The authors take the 100 best pairs of query and
    class; here each query counts once.

    Args:
        decoder: of the teacher.
        images: with the ground truth.

    Returns:
        (layers, batch, queries).
    """
    from torchvision.ops import box_iou

    exact = torch.promote_types(decoder.logits.dtype, torch.float32)
    logits, every = decoder.logits.to(exact), decoder.boxes.to(exact)
    probability = logits.softmax(-1)[..., :-1] if decoder.activation == "softmax" else logits.sigmoid()
    scores, found = probability.amax(-1), []
    for score, boxes, truth, (h, w) in zip(scores, every, images.boxes, images.sizes, strict=True):
        if len(truth):
            corners = as_corners(boxes).flatten(0, 1) * boxes.new_tensor([w, h, w, h])
            overlap = box_iou(corners, truth.to(corners.dtype)).amax(1).nan_to_num(0.0)
            found.append(score * overlap.reshape(score.shape))
        else:
            found.append(score)
    return torch.stack(found, 1)


@full_precision
def teacher_assigned(
    student: Predictions,
    teacher: Predictions,
    *,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    config: Any,
    assigner: Any,
) -> Tensor:
    """The student's own detection loss for predictions from the teacher's queries, assigned as the teacher's were.

    Source: Chang et al. 2023, query-prior assignment distillation: the queries of a trained teacher tell the student
    which query a box belongs to, before its own matching has settled.

    Args:
        student, teacher: logits (batch, queries, classes) and boxes (batch, queries, 4) from the same queries.
        boxes: of each image (n, 4), centre x, centre y, width, height in 0 to 1; n may be 0.
        labels: of each image (n,), from 0.
        config: the student's, of `transformers`: kind and weights of the loss.
        assigner: the teacher's: kind and weights of the costs.

    Raises:
        TaskkdError: scipy is missing.
    """
    from transformers.loss import loss_deformable_detr as sigmoid
    from transformers.loss import loss_for_object_detection as softmax

    from taskkd.detection.transformers_models import KINDS, weighted_losses

    kind = KINDS[config.model_type]
    costs = assigner.class_cost, assigner.bbox_cost, assigner.giou_cost
    classes, losses = int(config.num_labels), ["labels", "boxes"]
    criterion: Any
    try:
        if kind.activation == "softmax":
            matcher = softmax.HungarianMatcher(*costs)
            criterion = softmax.ImageLoss(matcher, classes, config.eos_coefficient, losses).to(student[0].device)
        else:
            matcher = sigmoid.DeformableDetrHungarianMatcher(*costs)
            criterion = sigmoid.DeformableDetrImageLoss(matcher, classes, config.focal_alpha, losses)
    except ImportError as error:
        raise TaskkdError("queries are matched by scipy, which is not installed: pip install scipy.") from error
    targets = [{"class_labels": c, "boxes": b.to(student[1].dtype)} for c, b in zip(labels, boxes, strict=True)]
    assigned = matcher({"logits": teacher[0], "pred_boxes": teacher[1]}, targets)
    outputs = {"logits": student[0], "pred_boxes": student[1]}
    number = max(sum(len(b) for b in boxes), 1)
    parts: dict[str, Tensor] = {}
    for loss in losses:
        parts |= criterion.get_loss(loss, outputs, targets, assigned, number)
    total: Tensor = torch.stack(list(weighted_losses(kind, config, parts).values())).sum()
    return total


def paired_layers(student: int, teacher: int) -> list[int]:
    """Which of the teacher's layers each of the student's learns from: spread evenly, the last from the last."""
    return [-(-(i + 1) * teacher // student) - 1 for i in range(student)]


# ---- the terms


class HungarianResponse(DetectionTerm):
    """`hungarian_response` of every layer of the student's decoder with a layer of the teacher's; the sum over layers.

    Where one has fewer layers they are spread evenly. D-FINE in eval mode has predictions of its last layer alone.

    Args:
        name, student, teacher, weight: see `Term`.
        options: of `hungarian_response`.

    Raises:
        RecipeError: the classes differ, or DETR is paired with another.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        options: dict[str, Any] | None = None,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, student, teacher, student_views=("decoder",), teacher_views=("decoder",), weight=weight)
        check_classes(name, student, teacher)
        self.options = dict(options or {})

    def forward(self, run: Run) -> Tensor:
        own, other = self.student_views(run).decoder, self.teacher_views(run).decoder
        layers = own.logits.shape[1]
        chosen = paired_layers(layers, other.logits.shape[1])
        student = own.logits.flatten(0, 1), own.boxes.flatten(0, 1)
        teacher = other.logits[:, chosen].flatten(0, 1), other.boxes[:, chosen].flatten(0, 1)
        return layers * hungarian_response(student, teacher, activation=own.activation, **self.options)


class TargetAware(NeckTerm):
    """`target_aware` of the maps that the decoders attend to, paired by stride; a 1x1 convolution where widths differ.

    Args:
        name, student, teacher, weight: see `Term`.
    """

    def __init__(self, name: str, student: nn.Module, teacher: nn.Module, *, weight: Weight = 1.0) -> None:
        theirs = ("sources", "decoder")
        super().__init__(name, student, teacher, student_views=theirs[:1], teacher_views=theirs, weight=weight)

    def maps(self, run: Run) -> tuple[list[Tensor], list[Tensor]]:
        """The maps that the decoders attend to."""
        return self.student_views(run).get("sources"), self.teacher_views(run).get("sources")

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        decoder, images = self.teacher_views(run).decoder, self.images(run)
        assert decoder.hidden is not None  # all families here have it
        inside = images.inside().to(images.tensors.dtype)
        return target_aware(
            students,
            teachers,
            queries=decoder.hidden.transpose(0, 1),
            scores=query_scores(decoder, images),
            inside=[(F.interpolate(inside, size=m.shape[2:]) > 0).to(inside.dtype) for m in students],
        )


class TeacherQueries(DetectionTerm):
    """The student's decoder on the teacher's queries, trained to the boxes that the teacher gave to each of them.

    It runs once more, on what the encoder gave in this run. The sum over the layers that the student trains on.

    Args:
        name, student, teacher, weight: see `Term`.

    Raises:
        RecipeError: the two cannot share queries, or their classes differ.
    """

    def __init__(self, name: str, student: nn.Module, teacher: nn.Module, *, weight: Weight = 1.0) -> None:
        difference = query_difference(student, teacher)
        if difference is not None:
            raise RecipeError(f"term {name!r}: {difference}; leave it out by `assignment_weight=0`.")
        views = {"student_views": ("queries",), "teacher_views": ("queries", "decoder")}
        super().__init__(name, student, teacher, **views, weight=weight)
        check_classes(name, student, teacher)
        self.configs: tuple[Any, Any] = (student.config, teacher.config)

    def forward(self, run: Run) -> Tensor:
        views, teacher = self.student_views(run), self.teacher_views(run)
        own, other = views.get("queries").decode(teacher.get("queries").own.detach()), teacher.decoder
        boxes, labels = _relative(views.images), [c - 1 for c in views.images.labels]
        config, assigner = self.configs
        values: list[Tensor] = []
        for i, j in enumerate(paired_layers(own.logits.shape[1], other.logits.shape[1])):
            student, found = (own.logits[:, i], own.boxes[:, i]), (other.logits[:, j], other.boxes[:, j])
            values.append(
                teacher_assigned(student, found, boxes=boxes, labels=labels, config=config, assigner=assigner)
            )
        return torch.stack(values).sum()


def _relative(images: SharedImages) -> list[Tensor]:
    """The ground truth as centre and size relative to each image."""
    from torchvision.ops import box_convert

    return [
        box_convert(b, "xyxy", "cxcywh") / b.new_tensor([w, h, w, h])
        for b, (h, w) in zip(images.boxes, images.sizes, strict=True)
    ]


def detr_distill(
    student: nn.Module,
    teacher: nn.Module,
    *,
    cls: Annotated[float, Ge(0)] = 1.0,
    l1: Annotated[float, Ge(0)] = 5.0,
    giou: Annotated[float, Ge(0)] = 2.0,
    response_weight: Annotated[float, Ge(0)] = 1.0,
    feature_weight: Annotated[float, Ge(0)] = 1.0,
    assignment_weight: Annotated[float, Ge(0)] | None = None,
) -> Method:
    """Matched predictions, maps where the teacher's queries look, and the teacher's queries as a second group.

    Source: Chang, Wang, Xu, Wang, Zhao, Xu, Liu 2023, "DETRDistill: A Universal Knowledge Distillation Framework for
    DETR-families"; weights and reductions of the released code (Deformable DETR, R101 to R50).

    Args:
        student, teacher: detectors of `transformers` with a decoder (`TransformersDetector`), of the same classes; of
            any two architectures but DETR, whose probabilities come of a softmax and which goes with DETR.
        cls, l1, giou: of costs and parts of the matched predictions.
        response_weight, feature_weight: of the first two terms; 0 leaves one out.
        assignment_weight: of the third, which needs two detectors of one kind with learned queries of one width (DETR,
            Conditional or Deformable DETR). None: 1 for such pairs, for others it is left out.

    Raises:
        RecipeError: the classes differ, DETR is paired with another, or queries are to be shared that cannot be.
        TaskkdError: a model has no decoder of queries.
    """
    if assignment_weight is None:
        assignment_weight = 1.0 if query_difference(student, teacher) is None else 0.0
    terms: list[Term] = []
    if response_weight > 0:
        options = {"cls": cls, "l1": l1, "giou": giou}
        terms.append(HungarianResponse("response", student, teacher, options=options, weight=response_weight))
    if feature_weight > 0:
        terms.append(TargetAware("feature", student, teacher, weight=feature_weight))
    if assignment_weight > 0:
        terms.append(TeacherQueries("assignment", student, teacher, weight=assignment_weight))
    return Method("detr_distill", [Stage("distil", terms)], ("labels",))
