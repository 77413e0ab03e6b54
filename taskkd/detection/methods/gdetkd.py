"""G-DetKD: general distillation framework for object detectors (Yao et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import (
    check_same_shape,
    check_temperature,
    full_precision,
    l2_normalise,
    masked_mean,
)

__all__ = ["SemanticGuide", "class_aware_regression", "level_weights", "region_contrast", "semantic_guided"]


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
