"""G-DetKD: general distillation framework for object detectors (Yao et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.adapters import Embedding
from taskkd.detection.families import family_of
from taskkd.detection.pooling import pool_all_levels, pool_own_level
from taskkd.detection.responses import check_predictions
from taskkd.detection.terms import DetectionTerm
from taskkd.errors import RecipeError, ShapeError
from taskkd.losses.logits import kl_divergence
from taskkd.losses.primitives import (
    check_same_shape,
    check_temperature,
    full_precision,
    l2_normalise,
    masked_mean,
)
from taskkd.ranks import gather_ranks
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term, Weight

__all__ = [
    "SemanticGuide",
    "class_aware_regression",
    "gdetkd",
    "level_weights",
    "region_contrast",
    "semantic_guided",
    "transfer_head",
]


class SemanticGuide(nn.Module):
    """What semantic-guided imitation learns: an adaptation, an embedding shared by both sides, a temperature.

    Source: Yao, Pi, Xu, Zhang, Li, Zhang 2021. The embedding is two 3x3 convolutions of stride 2, each with a ReLU,
    which take 7x7 regions to one vector; the adaptation is a 1x1 convolution.

    Args:
        student, teacher: numbers of channels.
        embedding: size of the vector; None: the teacher's channels.
        tau: the temperature to begin with; it is learned, as its logarithm, so that it stays positive.
    """

    def __init__(self, student: int, teacher: int, *, embedding: int | None = None, tau: float = 1.0) -> None:
        super().__init__()
        check_temperature(tau)
        self.adapt = nn.Conv2d(student, teacher, 1)
        self.embed = nn.Sequential(
            nn.Conv2d(teacher, teacher, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(teacher, embedding or teacher, 3, stride=2),
            nn.ReLU(),
        )
        self.log_tau = nn.Parameter(torch.tensor(float(tau)).log())

    def forward(self, students: Sequence[Tensor], teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `semantic_guided` takes: adapted (L, R, C, h, w), and keys (L, R, d) and (R, d).

        Args:
            students: of each level, all R regions pooled from it, (R, channels, 7, 7).
            teacher: (R, channels, 7, 7), each region pooled from its own level.
        """
        adapted = torch.stack([self.adapt(s) for s in students])
        keys = self.embed(adapted.flatten(0, 1)).flatten(1).unflatten(0, adapted.shape[:2])
        return adapted, keys, self.embed(teacher).flatten(1)

    def loss(self, students: Sequence[Tensor], teacher: Tensor) -> Tensor:
        """`semantic_guided` of these regions."""
        adapted, keys, teacher_keys = self(students, teacher)
        return semantic_guided(adapted, teacher, keys=keys, teacher_keys=teacher_keys, tau=self.log_tau.exp())


def level_weights(keys: Tensor, teacher_keys: Tensor, *, tau: float | Tensor = 1.0) -> Tensor:
    """(R, L): softmax over the student's levels of `<key_l, teacher's key> / tau`.

    Args:
        keys: (L, R, d) of the student.
        teacher_keys: (R, d).
        tau: positive.
    """
    check_temperature(tau)
    return ((keys * teacher_keys).sum(-1) / tau).softmax(0).T


@full_precision
def semantic_guided(
    student: Tensor,
    teacher: Tensor,
    *,
    keys: Tensor,
    teacher_keys: Tensor,
    tau: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Semantic-guided feature imitation: each region from a mixture of the student's levels; mean of all elements.

    `mean (sum_l a_l S_l - T)^2` with `a = level_weights(...)`: which levels of a student mean what the teacher's level
    of a region means is learned, not fixed by the region's size. Source: Yao et al. 2021; no code of the authors is
    public. The softmax is over levels (a port takes it over regions, which is a defect).

    Scaling: mean over regions, channels and cells.

    Args:
        student: (L, R, C, h, w), adapted to the teacher's channels.
        teacher: (R, C, h, w).
        keys, teacher_keys, tau: see `level_weights`.
        mask: weights or booleans over (R,).

    Raises:
        ShapeError: the shapes do not fit each other.
        ValueError: `tau` is not positive.
    """
    if student.ndim != teacher.ndim + 1 or student.shape[1:] != teacher.shape or keys.shape[:2] != student.shape[:2]:
        raise ShapeError(
            "`semantic_guided` needs the student's regions of all levels (L, R, C, h, w), the teacher's (R, C, h, w) "
            f"and keys (L, R, d), got {tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(keys.shape)}."
        )
    weights = level_weights(keys, teacher_keys, tau=tau).T
    mixed = (weights.reshape(weights.shape + (1,) * (student.ndim - 2)) * student).sum(0)
    return masked_mean((mixed - teacher).square(), mask)


@full_precision
def region_contrast(
    student: Tensor,
    teacher: Tensor,
    *,
    boxes: Tensor | None = None,
    images: Tensor | None = None,
    queue: Tensor | None = None,
    gamma: float = 0.07,
    iou: float = 0.5,
    mask: Tensor | None = None,
) -> Tensor:
    """Contrast of regions: `-log softmax(cos(student_i, teacher_j) / gamma)` at `j = i`; mean over regions.

    The negatives are the teacher's embeddings of the batch's other regions and of a queue of earlier ones; regions that
    overlap region `i` show the same object and are left out. The positive is in the denominator (a port leaves it out,
    a defect). Source: Yao et al. 2021.

    One region alone, without a queue, has no negatives and gives 0. Not 0 for equal tensors.

    Args:
        student, teacher: embeddings (R, d) of one shape, after the projections; L2-normalised here.
        boxes: (R, 4) x1 y1 x2 y2 of the regions; None: none overlap.
        images: (R,) int64, the image of each: only regions of one image overlap. None: all are of one.
        queue: (Q, d) embeddings of the teacher, without gradient.
        gamma: temperature, positive.
        iou: above which another region is no negative.
        mask: weights or booleans over (R,); a region of weight 0 is no negative either.

    Raises:
        ShapeError: the shapes do not fit each other.
        ValueError: `gamma` is not positive.
    """
    check_same_shape(student, teacher, "region_contrast")
    check_temperature(gamma)
    if queue is not None and queue.shape[1:] != student.shape[1:]:
        raise ShapeError(f"a queue of shape {tuple(queue.shape)} does not fit embeddings of {tuple(student.shape)}.")
    s, t = l2_normalise(student), l2_normalise(teacher)
    scores = s @ t.T / gamma
    out = torch.zeros_like(scores, dtype=torch.bool) if boxes is None else _same_object(boxes, images, iou)
    if mask is not None:
        out = out | ~(mask > 0)
    out = out & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    scores = scores.masked_fill(out, torch.finfo(scores.dtype).min)
    if queue is not None and len(queue):
        scores = torch.cat([scores, s @ l2_normalise(queue.to(s.dtype)).T / gamma], 1)
    return masked_mean(-F.log_softmax(scores, 1).diagonal(), mask)


@torch.no_grad()
def _same_object(boxes: Tensor, images: Tensor | None, iou: float) -> Tensor:
    """(R, R): overlapping regions of one image."""
    from torchvision.ops import box_iou

    over: Tensor = box_iou(boxes, boxes) > iou
    return over if images is None else over & (images[:, None] == images)


@full_precision
def class_aware_regression(
    student: Tensor, teacher: Tensor, *, probabilities: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Class-aware localisation: `|sum_c p_c (t_c - s_c)|_1`, `p` the teacher's probabilities; mean over regions.

    Source: Yao et al. 2021: the regressions of all classes count, as likely as the teacher holds them.

    Args:
        student, teacher: regressions (R, classes, 4) of one shape.
        probabilities: (R, classes), the teacher's.
        mask: weights or booleans over (R,).

    Raises:
        ShapeError: the shapes do not fit each other.
    """
    check_same_shape(student, teacher, "class_aware_regression")
    if probabilities.shape != student.shape[:-1]:
        raise ShapeError(
            f"`class_aware_regression` needs a probability for each regression, got {tuple(probabilities.shape)} for "
            f"{tuple(student.shape)}."
        )
    expected = (probabilities[..., None] * (teacher - student)).sum(-2)
    return masked_mean(expected.abs().sum(-1), mask)


class RegionQueue(nn.Module):
    """The last embeddings of the teacher's regions, first in, first out: a buffer, so checkpoints carry it.

    On several ranks it takes in the regions of all, on every rank alike.

    Args:
        size: how many.
        features: of an embedding.
    """

    rows: Tensor
    seen: Tensor

    def __init__(self, size: int, features: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, features))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def known(self) -> Tensor:
        """(Q, features), those that there are so far; a copy, as rows change before the backward."""
        return self.rows[: min(int(self.seen), len(self.rows))].clone()

    @torch.no_grad()
    def push(self, embeddings: Tensor) -> None:
        """Take in (R, features); the oldest go. Every rank must call it in every step."""
        embeddings = gather_ranks(embeddings.detach().to(self.rows.dtype))[-len(self.rows) :]
        where = (self.seen + torch.arange(len(embeddings), device=self.rows.device)) % len(self.rows)
        self.rows[where] = embeddings
        self.seen += len(embeddings)


class SemanticImitation(DetectionTerm):
    """`semantic_guided` of the regions that both sides look at; memory grows with regions times levels."""

    def __init__(self, name: str, student: nn.Module, teacher: nn.Module, *, tau: float, weight: Weight) -> None:
        views = ("neck", "regions")
        super().__init__(name, student, teacher, student_views=views, teacher_views=("rois",), weight=weight)
        self.tau = tau
        self.guide: SemanticGuide | None = None

    @property
    def built(self) -> bool:
        return self.guide is not None

    def build(self, run: Run) -> None:
        if self.guide is not None:
            return
        maps, target = self.student_views(run).neck, self.teacher_views(run).rois.features
        widths = [x.shape[1] for x in maps]
        if len(set(widths)) > 1:
            raise ShapeError(
                f"term {self.name!r}: the student's levels have {widths} channels; regions are mixed over levels, "
                "which takes a pyramid of one width."
            )
        self.guide = SemanticGuide(widths[0], target.shape[1], tau=self.tau).to(maps[0].device, _precision(maps[0]))

    def forward(self, run: Run) -> Tensor:
        assert self.guide is not None
        views, target = self.student_views(run), self.teacher_views(run).rois.features
        shape = (views.images.tensors.shape[2], views.images.tensors.shape[3])
        pooled = pool_all_levels(views.neck, views.regions, shape, target.shape[-1])
        return self.guide.loss(pooled, target)


class ContrastiveImitation(DetectionTerm):
    """`region_contrast` of projected embeddings, with a queue of the teacher's.

    The student's embedding of a region is that of its own second stage; of a one-stage student the region pooled from
    its classification tower, or from its neck where it has none.

    Args:
        name, student, teacher, weight: see `DetectionTerm`.
        tower: taps of the tower, one for each level; of one-stage students.
        features: of the projected embeddings.
        queue: how many embeddings of earlier regions are remembered; 0: none.
        gamma, iou: of `region_contrast`.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        tower: Sequence[str] = (),
        features: int,
        queue: int,
        gamma: float,
        iou: float,
        weight: Weight,
    ) -> None:
        self.two_stage = "rois" in family_of(student, "student").views
        views = ("rois",) if self.two_stage else ("neck", "regions")
        super().__init__(name, student, teacher, student_views=views, teacher_views=("rois",), weight=weight)
        self.student_taps = tuple(dict.fromkeys([*self.student_taps, *tower]))
        self.tower, self.features, self.queue_size, self.gamma, self.iou = tuple(tower), features, queue, gamma, iou
        self.projections = nn.ModuleList()
        self.queue: RegionQueue | None = None

    @property
    def built(self) -> bool:
        return len(self.projections) == 2

    def _embeddings(self, run: Run) -> tuple[Tensor, Tensor]:
        """(R, ...) of student and teacher."""
        views, other = self.student_views(run), self.teacher_views(run).rois.embeddings
        if self.two_stage:
            return views.rois.embeddings, other
        maps = [run.student[tap] for tap in self.tower] or views.neck
        shape = (views.images.tensors.shape[2], views.images.tensors.shape[3])
        return pool_own_level(maps, views.regions, shape), other

    def build(self, run: Run) -> None:
        if self.built:
            return
        both = self._embeddings(run)
        for x in both:
            self.projections.append(Embedding(x.shape[1:].numel(), self.features).to(x.device, _precision(both[0])))
        if self.queue_size:
            self.queue = RegionQueue(self.queue_size, self.features).to(both[0].device, _precision(both[0]))

    def forward(self, run: Run) -> Tensor:
        boxes = self.student_views(run).regions
        s, t = (project(x) for project, x in zip(self.projections, self._embeddings(run), strict=True))
        images = torch.cat([torch.full((len(b),), i, device=b.device) for i, b in enumerate(boxes)])
        known = None if self.queue is None else self.queue.known()
        loss = region_contrast(
            s, t, boxes=torch.cat(boxes).detach(), images=images, queue=known, gamma=self.gamma, iou=self.iou
        )
        if self.queue is not None:
            self.queue.push(t)
        return loss


class ClassAwareLocalisation(DetectionTerm):
    """`class_aware_regression` of both second stages; background has no box and does not count."""

    def __init__(self, name: str, student: nn.Module, teacher: nn.Module, *, weight: Weight) -> None:
        super().__init__(name, student, teacher, student_views=("rois",), teacher_views=("rois",), weight=weight)

    def forward(self, run: Run) -> Tensor:
        own, other = self.student_views(run).rois, self.teacher_views(run).rois
        check_predictions(self.name, own.logits, other.logits)
        s, t = (x.deltas.reshape(*x.logits.shape, 4)[:, 1:] for x in (own, other))
        return class_aware_regression(s, t, probabilities=other.logits.softmax(-1)[:, 1:])


class RoiDivergence(DetectionTerm):
    """Soft targets of both second stages."""

    def __init__(self, name: str, student: nn.Module, teacher: nn.Module, *, weight: Weight) -> None:
        super().__init__(name, student, teacher, student_views=("rois",), teacher_views=("rois",), weight=weight)

    def forward(self, run: Run) -> Tensor:
        own, other = self.student_views(run).rois.logits, self.teacher_views(run).rois.logits
        check_predictions(self.name, own, other)
        return kl_divergence(own, other)


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.no_grad()
def transfer_head(student: Any, teacher: Any) -> list[str]:
    """Copy the teacher's second stage into the student, parameter by parameter, where the shapes agree.

    Source: Yao et al. 2021. The student is changed.

    Args:
        student, teacher: two-stage detectors.

    Returns:
        The names of what was copied.
    """
    own = student.roi_heads.state_dict()
    known = {
        name: value
        for name, value in teacher.roi_heads.state_dict().items()
        if name.startswith(("box_head.", "box_predictor.")) and name in own and own[name].shape == value.shape
    }
    for name, value in known.items():
        own[name].copy_(value)
    return [f"roi_heads.{name}" for name in known]


def gdetkd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    feature_weight: Annotated[float, Ge(0)] | Literal["auto"] = "auto",
    contrast_weight: Annotated[float, Ge(0)] | Literal["auto"] = 0.1,
    localisation_weight: Annotated[float, Ge(0)] = 1.0,
    class_weight: Annotated[float, Ge(0)] = 1.0,
    tau: Annotated[float, Gt(0)] = 1.0,
    gamma: Annotated[float, Gt(0)] = 0.07,
    iou: Annotated[float, Interval(ge=0, le=1)] = 0.5,
    queue: Annotated[int, Ge(0)] = 4096,
    embedding: Annotated[int, Gt(0)] = 128,
    head_transfer: bool = True,
) -> Method:
    """Regions imitated from the levels that mean the same, and told from other regions; of two second stages more.

    Source: Yao, Pi, Xu, Zhang, Li, Zhang 2021, "G-DetKD: Towards General Distillation Framework for Object Detectors
    via Contrastive and Semantic-guided Feature Imitation". No code of the authors is public, and the weights, gamma,
    queue and IoU are not published: gamma and IoU are a port's, the rest is ours ("auto": the gradient of the feature
    term begins as large as the task loss's).

    A two-stage student looks at its sampled proposals; class-aware localisation and soft targets are compared too, and
    the teacher's second stage is copied into it where the shapes agree. **`gdetkd(...)` then changes the student.** A
    one-stage student (RetinaNet, FCOS, the encoder of RT-DETR) looks at its own predictions and the ground truth, one
    positive to three negatives, with the feature and the contrastive term alone; classes may then differ.

    Args:
        student: a two-stage detector, RetinaNet, FCOS, RT-DETR or D-FINE.
        teacher: a two-stage detector.
        feature_weight, contrast_weight: of the two general terms.
        localisation_weight, class_weight: of the two terms for two-stage students.
        tau: temperature over levels to begin with; it is learned.
        gamma, iou: of the contrast, see `region_contrast`.
        queue: how many of the teacher's earlier regions are negatives too; 0: none.
        embedding: features of the projected embeddings.
        head_transfer: copy the teacher's second stage.

    Raises:
        RecipeError: the teacher has no second stage, or the student no pyramid.
    """
    own, other = family_of(student, "student"), family_of(teacher, "teacher")
    if "rois" not in other.views:
        raise RecipeError(f"gdetkd: the teacher, a {other.name}, has no second stage; expected Faster or Mask R-CNN.")
    if "regions" not in own.views or own.name == "SSD":
        raise RecipeError(
            f"gdetkd: the student is a {own.name}; expected a two-stage detector, RetinaNet, FCOS or RT-DETR."
        )
    two_stage, models = "rois" in own.views, (student, teacher)
    terms: list[tuple[Weight, Callable[[Weight], Term]]] = [
        (feature_weight, lambda w: SemanticImitation("feature", *models, tau=tau, weight=w)),
        (
            contrast_weight,
            lambda w: ContrastiveImitation(
                "contrast", *models, tower=() if two_stage else _tower(student), features=embedding, queue=queue,
                gamma=gamma, iou=iou, weight=w,
            ),
        ),
    ]  # fmt: skip
    if two_stage:
        terms.append((localisation_weight, lambda w: ClassAwareLocalisation("localisation", *models, weight=w)))
        terms.append((class_weight, lambda w: RoiDivergence("classes", *models, weight=w)))
        if head_transfer:
            transfer_head(student, teacher)
    return Method("gdetkd", [Stage("distil", [make(w) for w, make in terms if w != 0])], ("labels",))


def _tower(student: Any) -> list[str]:
    """Taps of the classification tower at each level; none where a detector (RT-DETR) has no such tower."""
    from torchvision.models import detection as tv

    if not isinstance(student, tv.RetinaNet | tv.FCOS):
        return []
    return [f"head.classification_head.conv@{i}" for i in range(len(student.anchor_generator.sizes))]
