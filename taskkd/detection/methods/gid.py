"""General instance distillation (Dai et al. 2021)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_same_shape, full_precision, masked_mean, pairwise_distance, safe_divide

__all__ = [
    "Instances",
    "distribution_boxes",
    "general_instances",
    "instance_classification",
    "instance_feature",
    "instance_regression",
    "instance_relation",
]

Score = Literal["max_abs_diff", "abs_max_diff"]
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
    found = [list(x[keep].split(each)) for x in (boxes, scores, anchors)]
    return Instances(*found)


def distribution_boxes(regression: Tensor, anchors: Tensor, *, stride: float) -> Tensor:
    """Boxes (..., 4) of heads that give a distribution over the distance of each side from the anchor's centre (GFL).

    Args:
        regression: (..., 4 bins) logits, left top right bottom; bin `i` is a distance of `i` strides.
        anchors: (..., 4) x1 y1 x2 y2.
        stride: pixels of a cell.
    """
    sides = regression.unflatten(-1, (4, -1)).softmax(-1)
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
