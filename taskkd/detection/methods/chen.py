"""Learning efficient object detection models with knowledge distillation (Chen et al. 2017)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.detection.responses import (
    boxes_at,
    check_anchors,
    check_predictions,
    common_kind,
    same_anchors,
    sampling_weights,
)
from taskkd.detection.terms import DetectionTerm, NeckTerm
from taskkd.detection.views import Dense, Rpn
from taskkd.errors import ShapeError
from taskkd.losses.features import mse
from taskkd.losses.primitives import check_same_shape, check_temperature, full_precision, log_softmax, masked_mean
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term

__all__ = [
    "bounded_distance",
    "bounded_regression",
    "chen",
    "hard_and_soft",
    "weighted_binary_soft_targets",
    "weighted_soft_targets",
]


@full_precision
def weighted_soft_targets(
    student: Tensor,
    teacher: Tensor,
    *,
    background_weight: float = 1.5,
    background: int = 0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Soft targets with a heavier background: `-sum_c w_c softmax(teacher/T)_c log softmax(student/T)_c`, mean of rows.

    Source: Chen, Choi, Yu, Han, Chandraker 2017, "Learning Efficient Object Detection Models with Knowledge
    Distillation", eq. 3: errors with background count more; `T = 1` worked best.

    Scaling: equal to the paper's (1/N over proposals), without `T^2`. A cross-entropy, so not 0 where both agree.

    Args:
        student, teacher: logits (..., classes) of one shape.
        background_weight: `w` of the background; 1 for all other classes.
        background: the channel of the background.
        temperature: `T`, positive.
        mask: weights or booleans over the dimensions before the classes.

    Raises:
        ShapeError: the shapes differ.
        ValueError: `temperature` is not positive.
    """
    check_same_shape(student, teacher, "weighted_soft_targets")
    check_temperature(temperature)
    weight = torch.ones(student.shape[-1], dtype=student.dtype, device=student.device)
    weight[background] = background_weight
    soft = log_softmax(teacher, temperature, -1).exp() * log_softmax(student, temperature, -1)
    return masked_mean(-(weight * soft).sum(-1), mask)


@full_precision
def weighted_binary_soft_targets(
    student: Tensor, teacher: Tensor, *, background_weight: float = 1.5, mask: Tensor | None = None
) -> Tensor:
    """`weighted_soft_targets` of sigmoid detectors: `-sum_c p_t log p_s + w (1 - p_t) log(1 - p_s)`, mean of rows.

    Our reading of Chen et al. 2017 for objectness and for one-stage detectors, where each class has a background of its
    own.

    Args:
        student, teacher: logits (..., classes) of one shape.
        background_weight: `w`.
        mask: weights or booleans over the dimensions before the classes.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "weighted_binary_soft_targets")
    is_object = teacher.sigmoid() * F.logsigmoid(student)
    is_none = (-teacher).sigmoid() * F.logsigmoid(-student)
    return masked_mean(-(is_object + background_weight * is_none).sum(-1), mask)


@full_precision
def hard_and_soft(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    mu: float = 0.5,
    background_weight: float = 1.5,
    background: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """The paper's classification loss: `mu * cross-entropy + (1 - mu) * weighted_soft_targets` (eq. 2).

    Here the cross-entropy is a part of the student's own loss; see `chen` for how the two go together.

    Args:
        student, teacher: logits (R, classes) of the same proposals.
        labels: (R,) int64; the cross-entropy with them is not re-weighted.
        mu: share of the labels.
        background_weight, background, temperature: see `weighted_soft_targets`.

    Raises:
        ShapeError: the shapes differ.
    """
    soft = weighted_soft_targets(
        student, teacher, background_weight=background_weight, background=background, temperature=temperature
    )
    return mu * masked_mean(F.cross_entropy(student, labels, reduction="none")) + (1 - mu) * soft


@full_precision
def bounded_distance(
    student: Tensor, teacher: Tensor, target: Tensor, *, margin: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """The teacher as a bound: `|s - y|^2` where `|s - y|^2 + margin > |t - y|^2`, else 0; mean over rows.

    Source: Chen et al. 2017, eq. 4: a student that is better than the teacher by the margin is left alone. The bound is
    of each RoI by itself, not of the batch.

    Args:
        student, teacher: regressions (R, 4), encoded as the student's own loss has them.
        target: of the ground truth, (R, 4).
        margin: `m`, in the units of the squared distance.
        mask: weights or booleans over (R,): the positives. What is masked may hold anything.

    Raises:
        ShapeError: the shapes differ.
    """
    own, other = _distances(student, teacher, target, mask)
    return masked_mean(torch.where(own + margin > other, own, torch.zeros_like(own)), mask)


@full_precision
def bounded_regression(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    nu: float = 0.5,
    margin: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """The paper's regression loss: `smooth L1(s, y) + nu * bounded_distance`, both means over rows.

    Here the smooth L1 is a part of the student's own loss; the term is `nu * bounded_distance` alone.

    Args:
        student, teacher, target, margin, mask: see `bounded_distance`.
        nu: weight of the bounded part.

    Raises:
        ShapeError: the shapes differ.
    """
    bounded = bounded_distance(student, teacher, target, margin=margin, mask=mask)
    student, target = (_kept(x, mask) for x in (student, target))
    return masked_mean(F.smooth_l1_loss(student, target, reduction="none").sum(-1), mask) + nu * bounded


def _distances(student: Tensor, teacher: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared distances of both to the target, (R,)."""
    check_same_shape(student, teacher, "bounded_distance")
    if target.shape != student.shape:
        raise ShapeError(
            f"`bounded_distance` needs a target for each row, got {tuple(target.shape)} for {tuple(student.shape)}."
        )
    student, teacher, target = (_kept(x, mask) for x in (student, teacher, target))
    return (student - target).square().sum(-1), (teacher - target).square().sum(-1)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """Masked rows as 0: what they hold (the logarithm of an empty box, say) reaches no gradient."""
    return x if mask is None else x.masked_fill(~(mask > 0)[..., None], 0)


class RoiSoftTargets(DetectionTerm):
    """`weighted_soft_targets` of the second stages on the student's sampled proposals."""

    def __init__(
        self, name: str, student: nn.Module, teacher: nn.Module, *, background_weight: float, weight: float
    ) -> None:
        super().__init__(name, student, teacher, student_views=("rois",), teacher_views=("rois",), weight=weight)
        self.background_weight = background_weight

    def forward(self, run: Run) -> Tensor:
        own, other = self.student_views(run).rois.logits, self.teacher_views(run).rois.logits
        check_predictions(self.name, own, other)
        return weighted_soft_targets(own, other, background_weight=self.background_weight)


class RoiBound(DetectionTerm):
    """`bounded_distance` of the regressions of each proposal's class, over all sampled proposals as the box loss."""

    def __init__(self, name: str, student: nn.Module, teacher: nn.Module, *, margin: float, weight: float) -> None:
        super().__init__(name, student, teacher, student_views=("rois",), teacher_views=("rois",), weight=weight)
        self.margin = margin

    def forward(self, run: Run) -> Tensor:
        rois = self.student_views(run).rois
        other = self.teacher_views(run).rois.deltas
        assert rois.labels is not None and rois.targets is not None, "the student's side has them"
        check_predictions(self.name, rois.deltas, other)
        rows = torch.arange(len(rois.labels), device=rois.labels.device)
        own, other = (d.reshape(len(d), d.shape[1] // 4, 4)[rows, rois.labels] for d in (rois.deltas, other))
        positive = rois.labels > 0
        share = positive.to(own.dtype).mean() if len(positive) else 0.0
        return share * bounded_distance(own, other, rois.targets, margin=self.margin, mask=positive)


class AnchorSoftTargets(DetectionTerm):
    """Weighted soft targets at the anchors of a one-stage detector ("dense") or of a first stage ("rpn").

    Anchors count as likely as they are to be sampled (`sampling_weights`).
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        view: Literal["dense", "rpn"],
        background_weight: float,
        sample: tuple[int | None, float] = (None, 0.25),
        weight: float,
    ) -> None:
        super().__init__(name, student, teacher, student_views=(view,), teacher_views=(view,), weight=weight)
        self.view, self.background_weight, self.sample = view, background_weight, sample

    def forward(self, run: Run) -> Tensor:
        views = self.student_views(run)
        own, other = views.get(self.view), self.teacher_views(run).get(self.view)
        check_anchors(self.name, own, other)
        likely = sampling_weights(own.match(views.images.boxes), size=self.sample[0], share=self.sample[1])
        if isinstance(own, Rpn):
            s, t = own.objectness[..., None], other.objectness[..., None]
        elif own.activation == "sigmoid":
            s, t = own.logits[..., own.first :], other.logits[..., other.first :]
        else:
            s, t = own.logits, other.logits
        check_predictions(self.name, s, t)
        softmax = isinstance(own, Dense) and own.activation == "softmax"
        loss = weighted_soft_targets if softmax else weighted_binary_soft_targets
        return loss(s, t, background_weight=self.background_weight, mask=likely)


class AnchorBound(DetectionTerm):
    """`bounded_distance` of the boxes at positive anchors, in units of the ground-truth box's width and height.

    In "dense" a mean over the positives; in "rpn" over the sample, as the box losses of the detectors have it.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        view: Literal["dense", "rpn"],
        margin: float,
        sample: tuple[int | None, float] = (None, 0.25),
        weight: float,
    ) -> None:
        super().__init__(name, student, teacher, student_views=(view,), teacher_views=(view,), weight=weight)
        self.view, self.margin, self.sample = view, margin, sample

    def forward(self, run: Run) -> Tensor:
        views = self.student_views(run)
        own, other = views.get(self.view), self.teacher_views(run).get(self.view)
        check_anchors(self.name, own, other)
        matched = own.match(views.images.boxes)
        likely = sampling_weights(matched, size=self.sample[0], share=self.sample[1])
        where = (matched >= 0).nonzero(as_tuple=True)
        s, t = (boxes_at(v, where, v.deltas if isinstance(v, Rpn) else v.regression) for v in (own, other))
        truth = _matched_boxes(views.images.boxes, where[0], matched[where], s)
        unit = (truth[:, 2:] - truth[:, :2]).clamp(min=1e-3).repeat(1, 2)
        taken = likely[where]
        share = taken.sum() / likely.sum().clamp(min=1e-6) if isinstance(own, Rpn) else 1.0
        return share * bounded_distance(s / unit, t / unit, truth / unit, margin=self.margin, mask=taken)


def _matched_boxes(boxes: list[Tensor], images: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """(n, 4): the boxes that anchors of these images are assigned, by their number in the image."""
    before = torch.tensor([0, *(len(b) for b in boxes)], device=index.device).cumsum(0)
    return torch.cat([*boxes, like.new_zeros(1, 4)]).to(like.dtype)[before[images] + index]


class Hint(NeckTerm):
    """Mean squared difference of the adapted maps, mean over levels; padding does not count."""

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        inside = self.images(run).inside()
        levels = []
        for s, t in zip(students, teachers, strict=True):
            counted = F.interpolate(inside.float(), size=[s.shape[2], s.shape[3]], mode="nearest")[:, 0]
            levels.append(mse(s.movedim(1, -1), t.movedim(1, -1), mask=counted))
        return torch.stack(levels).mean()


def chen(
    student: nn.Module,
    teacher: nn.Module,
    *,
    mu: Annotated[float, Interval(gt=0, le=1)] = 0.5,
    background_weight: Annotated[float, Gt(0)] = 1.5,
    nu: Annotated[float, Ge(0)] = 0.5,
    margin: float = 0.0,
    gamma: Annotated[float, Ge(0)] = 0.5,
    first_stage: Literal["auto", "on", "off"] = "auto",
) -> Method:
    """Weighted soft targets, the teacher as a bound of the regression, and hints; in both stages of a detector.

    Source: Chen, Choi, Yu, Han, Chandraker 2017, "Learning Efficient Object Detection Models with Knowledge
    Distillation"; background weight 1.5 and nu 0.5 are the paper's, mu and the margin are not published, gamma is from
    memory. No code of the authors is public.

    How it maps on the student's own loss: the paper's `mu * CE + (1 - mu) * soft` is divided by mu, so that the
    student's loss stays whole (task weight 1), with the soft targets at `(1 - mu) / mu` beside it; nu stays relative to
    the student's smooth L1. At `mu=1` nothing is learned from the teacher's classes.

    Two-stage detectors compare both second stages on the student's sampled proposals, and, where the anchors of both
    are the same, both first stages. One-stage ones compare at anchors: sigmoid detectors class by class, SSD by
    softmax; positives by the detector's own assigner, and three negatives for each. Instead of drawing a sample every
    anchor counts as likely as it would be drawn. Boxes at anchors are compared in units of their object's size.

    Args:
        student, teacher: two two-stage or two one-stage detectors of the same classes.
        mu: share of the labels in the classification loss.
        background_weight: of errors with background, in the soft targets alone.
        nu: of the bounded regression.
        margin: how much better than the teacher, in squared distance, a student must be to be left alone.
        gamma: of the hint: all levels of the neck, with a 1x1 convolution even where the channels agree.
        first_stage: of two-stage detectors: "auto" where both have the same anchors at a cell, "on", "off".

    Raises:
        RecipeError: the two make no predictions of the same regions.
    """
    kind = common_kind(student, teacher, "chen")
    soft, models = (1 - mu) / mu, (student, teacher)
    terms: list[Term] = []
    if kind == "rois":
        terms.append(RoiSoftTargets("soft", *models, background_weight=background_weight, weight=soft))
        terms.append(RoiBound("bound", *models, margin=margin, weight=nu))
        if first_stage == "on" or (first_stage == "auto" and same_anchors(student, teacher)):
            sampler: Any = student.rpn.fg_bg_sampler  # type: ignore[union-attr]
            sample = (sampler.batch_size_per_image, sampler.positive_fraction)
            terms += _anchor_terms(models, "rpn", "rpn-", background_weight, soft, nu, margin, sample)
    else:
        terms += _anchor_terms(models, "dense", "", background_weight, soft, nu, margin, (None, 0.25))
    terms.append(Hint("hint", *models, adapter="conv1x1", weight=gamma))
    return Method("chen", [Stage("distil", terms)], ("labels",))


def _anchor_terms(
    models: tuple[nn.Module, nn.Module],
    view: Literal["dense", "rpn"],
    prefix: str,
    background_weight: float,
    soft: float,
    nu: float,
    margin: float,
    sample: tuple[int | None, float],
) -> list[Term]:
    return [
        AnchorSoftTargets(
            f"{prefix}soft", *models, view=view, background_weight=background_weight, sample=sample, weight=soft
        ),
        AnchorBound(f"{prefix}bound", *models, view=view, margin=margin, sample=sample, weight=nu),
    ]
