"""General instance distillation (Dai et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.adapters import AdapterSpec
from taskkd.detection.pooling import pool_own_level
from taskkd.detection.responses import check_anchors, check_predictions, common_kind, same_anchors
from taskkd.detection.terms import DetectionTerm, NeckTerm
from taskkd.detection.views import Dense, Rois, Rpn, Views
from taskkd.errors import ShapeError
from taskkd.losses.logits import kl_divergence
from taskkd.losses.primitives import check_same_shape, full_precision, masked_mean, pairwise_distance, safe_divide
from taskkd.ranks import gather_ranks, join_ranks, whole_loss
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term

__all__ = [
    "Instances",
    "distribution_boxes",
    "general_instances",
    "gid",
    "instance_classification",
    "instance_feature",
    "instance_regression",
    "instance_relation",
]

Score = Literal["max_abs_diff", "abs_max_diff"]
View = Literal["dense", "rpn", "rois"]
Side = Literal["surer", "by_class"]


class Instances(NamedTuple):
    """General instances of a batch: of each image, the best first.

    Args:
        boxes: (k, 4) x1 y1 x2 y2; k may be 0.
        scores: (k,).
        indices: (k,) int64, the anchor that each comes from.
    """

    boxes: list[Tensor]
    scores: list[Tensor]
    indices: list[Tensor]


@torch.no_grad()
def general_instances(
    student: Tensor,
    teacher: Tensor,
    student_boxes: Tensor,
    teacher_boxes: Tensor,
    *,
    sizes: list[tuple[int, int]] | None = None,
    score: Score = "max_abs_diff",
    side: Side = "surer",
    nms: float = 0.3,
    candidates: int = 3000,
    instances: int = 10,
    min_side: float = 1.0,
) -> Instances:
    """Where student and teacher disagree most: boxes without labels, of each image, over all levels together.

    An anchor's score is how far the two probabilities are apart, its box that of the surer side; of those that overlap
    the one with the highest score is left. Source: Dai, Jiang, Wu, Bao, Wang, Liu, Zhou 2021, "General Instance
    Distillation for Object Detection".

    Three rules are in use. The paper's is the default. The first author's code takes the maximum over classes first:
    `score="abs_max_diff"`. LD's authors (Zheng et al. 2022) take the box of the side that is surer of the very class
    that differs most: `side="by_class"`; their suppression across the images of a batch is a defect, not copied.

    Args:
        student, teacher: probabilities (N, A, classes) of one shape; (N, A, 1) objectness.
        student_boxes, teacher_boxes: (N, A, 4), x1 y1 x2 y2 in pixels.
        sizes: (height, width) of each image, to which boxes are clipped; None: they are not.
        score: "max_abs_diff", `max_c |t_c - s_c|`, or "abs_max_diff", `|max_c t_c - max_c s_c|`.
        side: whose box: "surer", the teacher's where its highest probability is higher, or "by_class".
        nms: IoU above which the lower of two is suppressed.
        candidates: of each image, before the suppression.
        instances: of each image, after it.
        min_side: boxes with a side of this many pixels or less are dropped (10 in the code, of images of 800 pixels).

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "general_instances")
    check_same_shape(student_boxes, teacher_boxes, "general_instances")
    if student.ndim != 3 or student_boxes.shape != (*student.shape[:2], 4):
        raise ShapeError(
            f"`general_instances` needs probabilities (N, A, classes) and boxes (N, A, 4), got {tuple(student.shape)} "
            f"and {tuple(student_boxes.shape)}."
        )
    scores, teachers = _scores(student, teacher, score, side)
    scores, anchors = scores.topk(min(candidates, scores.shape[1]), 1)
    picked = torch.where(teachers[..., None], teacher_boxes, student_boxes)
    boxes = _clipped(picked.gather(1, anchors[..., None].expand(-1, -1, 4)), sizes)
    wide = ((boxes[..., 2:] - boxes[..., :2]) > min_side).all(-1)
    images = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(wide)[wide]
    return _suppressed(boxes[wide], scores[wide], anchors[wide], images, len(student), nms, instances)


def _scores(student: Tensor, teacher: Tensor, score: Score, side: Side) -> tuple[Tensor, Tensor]:
    """(N, A) how far the two are apart, and (N, A) whether the box is the teacher's."""
    best_s, best_t = student.amax(-1), teacher.amax(-1)
    apart, which = (teacher - student).abs().max(-1)
    if score == "abs_max_diff":
        apart = (best_t - best_s).abs()
    elif score != "max_abs_diff":
        raise ValueError(f"`score` is one of max_abs_diff, abs_max_diff, got {score!r}.")
    if side == "surer":
        return apart, best_t > best_s
    if side != "by_class":
        raise ValueError(f"`side` is one of surer, by_class, got {side!r}.")
    return apart, (teacher - student).gather(-1, which[..., None]).squeeze(-1) >= 0


def _clipped(boxes: Tensor, sizes: list[tuple[int, int]] | None) -> Tensor:
    boxes = boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes
    if sizes is None:
        return boxes
    limits = boxes.new_tensor([(w, h, w, h) for h, w in sizes])
    return torch.minimum(boxes.clamp(min=0), limits[:, None])


def _suppressed(
    boxes: Tensor, scores: Tensor, anchors: Tensor, images: Tensor, count: int, nms: float, instances: int
) -> Instances:
    """The best of each image after the suppression, without a look at images or boxes one by one."""
    from torchvision.ops import batched_nms

    # batched_nms shifts images beside each other, which takes coordinates that are not negative
    shifted = boxes - boxes.amin().clamp(max=0) if len(boxes) else boxes
    keep = batched_nms(shifted, scores.to(boxes.dtype), images, nms)
    own = F.one_hot(images[keep], count)
    keep = keep[(own.cumsum(0) * own).sum(1) <= instances]
    keep = keep[images[keep].argsort(stable=True)]
    each = images[keep].bincount(minlength=count).tolist()
    found = [list(torch.split(x[keep], each)) for x in (boxes, scores, anchors)]
    return Instances(*found)


def distribution_boxes(regression: Tensor, anchors: Tensor, *, stride: float) -> Tensor:
    """Boxes (..., 4) of heads that give a distribution over the distance of each side from the anchor's centre (GFL).

    Args:
        regression: (..., 4 bins) logits, left top right bottom; bin `i` is a distance of `i` strides.
        anchors: (..., 4) x1 y1 x2 y2.
        stride: pixels of a cell.
    """
    sides = regression.reshape(*regression.shape[:-1], 4, -1).softmax(-1)
    bins = torch.arange(sides.shape[-1], dtype=sides.dtype, device=sides.device)
    distances = (sides * bins).sum(-1) * stride
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    return torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], -1)


@full_precision
def instance_feature(student: Tensor, teacher: Tensor, *, distance: Literal["l2", "l1"] = "l2") -> Tensor:
    """Features of the instances: squared differences, summed over channels, mean over the cells of all instances.

    Source: Dai et al. 2021; scaling of the first author's code (weight 5e-4). No instances: 0.

    Args:
        student, teacher: (K, C, h, w) of one shape.
        distance: "l2" squared, "l1" absolute differences.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "instance_feature")
    difference = student - teacher
    return masked_mean((difference.square() if distance == "l2" else difference.abs()).sum(1))


@full_precision
def instance_relation(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, pairs: Literal["different", "all"] = "different"
) -> Tensor:
    """Relations of the instances: smooth L1 of all pairwise distances, each network's over its own mean; mean of pairs.

    Fewer than three instances have no relations: 0. Source: Dai et al. 2021 (weight 40).

    Scaling: as the first author's code where all instances differ. Pairs that are equal in both networks (a batch that
    holds an image twice) do not count here; theirs counts them (`pairs="all"`).

    Args:
        student, teacher: (K, ...) of one shape: the instances of all images of the batch.
        beta: of the smooth L1; 0: absolute differences.
        pairs: "different" or "all" of them.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "instance_relation")
    count = len(student)
    if count < 3:
        return (student * 0.0).sum()
    apart = ~torch.eye(count, dtype=torch.bool, device=student.device)
    s, t = (pairwise_distance(x.flatten(1)) for x in (student, teacher))
    if pairs == "all":
        s, t = s.clamp(min=1e-6), t.clamp(min=1e-6)
    relations = [safe_divide(d, masked_mean(d, apart & (d > 0))) for d in (s, t)]
    counted = apart & ((s > 0) | (t > 0))
    return masked_mean(F.smooth_l1_loss(relations[0], relations[1], beta=beta, reduction="none"), counted)


@full_precision
def instance_classification(student: Tensor, teacher: Tensor, *, mask: Tensor) -> Tensor:
    """Binary cross-entropy with the teacher's sigmoid, summed over classes, mean over the anchors of the mask.

    Source: Dai et al. 2021 (weight 0.1). An empty mask gives 0; equal logits do not (entropy is left).

    Args:
        student, teacher: logits (..., classes) of one shape.
        mask: (...,) booleans: the anchors that the detector's own assigner gives to the instances.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "instance_classification")
    loss = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
    return masked_mean(loss.sum(-1), mask)


@full_precision
def instance_regression(
    student: Tensor, teacher: Tensor, *, mask: Tensor, beta: float = 0.1, distance: Literal["l1", "l2"] = "l1"
) -> Tensor:
    """Smooth L1 of the raw regressions, summed over the four, mean over the anchors of the mask.

    Source: Dai et al. 2021 (weight 1). An empty mask gives 0.

    Args:
        student, teacher: (..., 4) of one shape.
        mask: as in `instance_classification`.
        beta: of the smooth L1; 0: absolute differences.
        distance: "l1", or "l2": squared differences, an option of the first author's code.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "instance_regression")
    if distance == "l2":
        loss = (student - teacher).square()
    else:
        loss = F.smooth_l1_loss(student, teacher, beta=beta, reduction="none")
    return masked_mean(loss.sum(-1), mask)


@dataclass(frozen=True)
class Selection:
    """Which predictions general instances are chosen from, and how; see `general_instances`.

    Args:
        view: "dense" predictions, a first stage ("rpn"), or a second stage on the student's proposals ("rois").
        score, side, nms, instances, min_side: of `general_instances`.
    """

    view: View
    score: Score
    side: Side
    nms: float
    instances: int
    min_side: float

    def of(self, name: str, student: Views, teacher: Views, run: Run) -> Instances:
        """The instances of this batch, chosen once for all terms.

        Args:
            name: of the term that asks, for errors.
            student, teacher: both sides.
            run: keeps them.
        """
        key = f"detection.{self}"
        if key not in run.notes:
            s, t = student.get(self.view), teacher.get(self.view)
            run.notes[key] = general_instances(
                *_predictions(name, s, t),
                sizes=student.images.sizes,
                score=self.score,
                side=self.side,
                nms=self.nms,
                instances=self.instances,
                min_side=self.min_side,
            )
        found: Instances = run.notes[key]
        return found


@torch.no_grad()
def _predictions(name: str, student: Any, teacher: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities and boxes of both sides, as `general_instances` takes them."""
    if isinstance(student, Rois):
        check_predictions(name, student.logits, teacher.logits)
        probabilities, boxes = zip(*(_of_rois(x, student.proposals) for x in (student, teacher)), strict=True)
        return (*probabilities, *boxes)
    check_anchors(name, student, teacher)
    if isinstance(student, Rpn):
        objects = [x.objectness.sigmoid()[..., None] for x in (student, teacher)]
        return objects[0], objects[1], student.decode(), teacher.decode()
    check_predictions(name, student.logits, teacher.logits)
    return student.probabilities(), teacher.probabilities(), student.decode(), teacher.decode()


def _of_rois(rois: Rois, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Probabilities (N, r, classes) and boxes (N, r, 4) of the surest class; images with fewer regions are padded."""
    probabilities = rois.logits.softmax(-1)[:, 1:]
    best = probabilities.argmax(1) + 1
    rows = torch.arange(len(best), device=best.device)
    deltas = rois.deltas if rois.deltas.dtype == torch.float64 else rois.deltas.float()
    boxes = rois.decoder(deltas, torch.cat(proposals)).reshape(len(best), -1, 4)[rows, best]
    each = [len(p) for p in proposals]
    padded = [nn.utils.rnn.pad_sequence(list(torch.split(x, each)), batch_first=True) for x in (probabilities, boxes)]
    return padded[0], padded[1]


class _Instances(NeckTerm):
    """Base of the terms on the features of the instances: adapted, pooled from the level of their size, once.

    With `gather` the instances are those of all ranks.
    """

    loss: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        selection: Selection,
        adapter: AdapterSpec | None,
        size: int,
        gather: bool = False,
        weight: float,
    ) -> None:
        views = (selection.view,)
        super().__init__(
            name, student, teacher, adapter=adapter, student_views=views, teacher_views=views, weight=weight
        )
        self.selection, self.size, self.gather = selection, size, gather

    def features(self, run: Run) -> tuple[Tensor, Tensor]:
        """(K, C, size, size) of student and teacher, of all images."""
        # the adapters are shared by the terms of one method, so they say whose features these are
        key = f"detection.{self.selection} {self.size} {[id(a) for a in self.adapters]}"
        if key not in run.notes:
            students, teachers = self.pairs(run)
            own = self.student_views(run)
            boxes = self.selection.of(self.name, own, self.teacher_views(run), run).boxes
            shape = (own.images.tensors.shape[2], own.images.tensors.shape[3])
            pooled = [pool_own_level(maps, boxes, shape, self.size) for maps in (students, teachers)]
            run.notes[key] = (pooled[0], pooled[1])
        found: tuple[Tensor, Tensor] = run.notes[key]
        return found

    def forward(self, run: Run) -> Tensor:
        student, teacher = self.features(run)
        if self.gather:
            return whole_loss(self.loss(join_ranks(student), gather_ranks(teacher)))
        return self.loss(student, teacher)


class InstanceFeature(_Instances):
    """`instance_feature` of the general instances."""

    loss = staticmethod(instance_feature)


class InstanceRelation(_Instances):
    """`instance_relation` of the general instances of all images of the batch."""

    loss = staticmethod(instance_relation)


class InstanceResponse(DetectionTerm):
    """Predictions at the anchors (or regions) that the general instances are assigned to: classes or boxes."""

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        selection: Selection,
        part: Literal["classes", "boxes"],
        beta: float = 0.1,
        weight: float,
    ) -> None:
        views = (selection.view,)
        super().__init__(name, student, teacher, student_views=views, teacher_views=views, weight=weight)
        self.selection, self.part, self.beta = selection, part, beta

    def forward(self, run: Run) -> Tensor:
        views, others = self.student_views(run), self.teacher_views(run)
        boxes = self.selection.of(self.name, views, others, run).boxes
        s, t = views.get(self.selection.view), others.get(self.selection.view)
        mask = _near(s, boxes)
        if self.part == "boxes":
            return instance_regression(_regression(s, t), _regression(t, t), mask=mask, beta=self.beta)
        if isinstance(s, Rpn):
            return instance_classification(s.objectness[..., None], t.objectness[..., None], mask=mask)
        if isinstance(s, Dense) and s.activation == "sigmoid":
            return instance_classification(s.logits[..., s.first :], t.logits[..., t.first :], mask=mask)
        return kl_divergence(s.logits, t.logits, dim=-1, mask=mask)


@torch.no_grad()
def _near(view: Any, boxes: list[Tensor]) -> Tensor:
    """Which predictions the instances are assigned to: by the detector's own assigner; of regions by IoU 0.5."""
    from torchvision.ops import box_iou

    if not isinstance(view, Rois):
        matched: Tensor = view.match(boxes) >= 0
        return matched
    near = [
        (box_iou(p, b.to(p.dtype)) >= 0.5).any(1)  # any() of no box is False
        for p, b in zip(view.proposals, boxes, strict=True)
    ]
    return torch.cat(near)


def _regression(view: Any, teacher: Any) -> Tensor:
    """Raw regressions (..., 4); of a second stage those of the teacher's surest class."""
    if isinstance(view, Rpn):
        return view.deltas
    if isinstance(view, Dense):
        return view.regression
    best = teacher.logits[:, 1:].argmax(1) + 1
    rows = torch.arange(len(best), device=best.device)
    deltas: Tensor = view.deltas.reshape(len(view.deltas), view.deltas.shape[1] // 4, 4)
    return deltas[rows, best]


def _shared() -> Callable[[Tensor, Tensor], nn.Module]:
    """A 3x3 convolution for all levels (of the same numbers of channels) and all terms."""
    made: dict[tuple[int, int], nn.Module] = {}

    def make(student: Tensor, teacher: Tensor) -> nn.Module:
        widths = (student.shape[1], teacher.shape[1])
        if widths not in made:
            made[widths] = nn.Conv2d(*widths, 3, padding=1)
        return made[widths]

    return make


def gid(
    student: nn.Module,
    teacher: nn.Module,
    *,
    instances: Annotated[int, Gt(0)] = 10,
    nms: Annotated[float, Interval(gt=0, le=1)] = 0.3,
    score: Score = "max_abs_diff",
    side: Side = "surer",
    min_side: Annotated[float, Ge(0)] = 1.0,
    pool: Annotated[int, Gt(0)] = 10,
    feature_weight: Annotated[float, Ge(0)] = 5e-4,
    relation_weight: Annotated[float, Ge(0)] = 40.0,
    class_weight: Annotated[float, Ge(0)] = 0.1,
    box_weight: Annotated[float, Ge(0)] = 1.0,
    stage: Literal["auto", "first", "second"] = "auto",
    gather: bool = False,
) -> Method:
    """General instances, where the two networks disagree most: their features, the relations of those, the response.

    Source: Dai, Jiang, Wu, Bao, Wang, Liu, Zhou 2021, "General Instance Distillation for Object Detection"; weights and
    scalings of the first author's code. The adapter is the paper's, a 3x3 convolution that all levels share (in the
    code it is never applied). No boxes of the ground truth are needed.

    Two-stage detectors: objectness and boxes of the first stage take the place of classes and boxes where both have the
    same anchors; else (ours) both second stages on the student's sampled proposals. Softmax detectors (SSD, second
    stages): the divergence of the class distributions instead of binary cross-entropies, ours too.

    Args:
        student, teacher: two two-stage or two one-stage detectors of the same classes.
        instances: of an image.
        nms, score, side, min_side: of the choice, see `general_instances`.
        pool: cells of a side of an instance's features.
        feature_weight, relation_weight, class_weight, box_weight: of the four terms; 0 leaves one out.
        stage: of two-stage detectors, the "first" or "second" (see above).
        gather: on several ranks the features and relations of the instances of all of them; False: of each rank its
            own. The responses are means over a rank's own anchors.

    Raises:
        RecipeError: the two make no predictions of the same regions.
    """
    kind = common_kind(student, teacher, "gid")
    view: View = "dense" if kind == "dense" else "rois"
    if kind == "rois" and (stage == "first" or (stage == "auto" and same_anchors(student, teacher))):
        view = "rpn"
    selection, adapter, models = Selection(view, score, side, nms, instances, min_side), _shared(), (student, teacher)
    shared: dict[str, Any] = {"selection": selection, "adapter": adapter, "size": pool, "gather": gather}
    terms: list[Term] = [
        InstanceFeature("feature", *models, weight=feature_weight, **shared),
        InstanceRelation("relation", *models, weight=relation_weight, **shared),
        InstanceResponse("classes", *models, selection=selection, part="classes", weight=class_weight),
        InstanceResponse("boxes", *models, selection=selection, part="boxes", weight=box_weight),
    ]
    return Method("gid", [Stage("distil", [t for t in terms if t.schedule.value > 0])], ("labels",))
