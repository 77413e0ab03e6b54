"""What the methods share that compare predictions: checks that they are comparable, and how anchors are weighed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taskkd.detection.families import family_of
from taskkd.detection.views import Dense, Rpn
from taskkd.errors import RecipeError, ShapeError

__all__ = ["boxes_at", "check_anchors", "check_predictions", "common_kind", "same_anchors", "sampling_weights"]


def common_kind(student: nn.Module, teacher: nn.Module, method: str) -> str:
    """ "rois" for two two-stage detectors, "dense" for two one-stage ones.

    Raises:
        RecipeError: the predictions of the two cannot be compared one by one.
    """
    own, other = family_of(student, "student"), family_of(teacher, "teacher")
    for kind in ("rois", "dense"):
        if kind in own.views and kind in other.views:
            return kind
    raise RecipeError(
        f"{method}: a {own.name} student and a {other.name} teacher make no predictions of the same regions: expected "
        "two two-stage or two one-stage detectors. Methods on feature maps take any two, gdetkd a one-stage student "
        "with a two-stage teacher."
    )


def same_anchors(student: Any, teacher: Any) -> bool:
    """Whether the first stages of two two-stage detectors have the same anchors at each cell."""
    own, other = student.rpn.anchor_generator, teacher.rpn.anchor_generator
    return bool(own.sizes == other.sizes and own.aspect_ratios == other.aspect_ratios)


def check_anchors(name: str, student: Dense | Rpn, teacher: Dense | Rpn) -> None:
    """Refuse predictions at different anchors.

    Raises:
        ShapeError: they are not the same; `name` is the term's.
    """
    if student.level_sizes != teacher.level_sizes:
        raise ShapeError(
            f"term {name!r}: the student predicts at {student.level_sizes} anchors of its levels, the teacher at "
            f"{teacher.level_sizes}; they are compared anchor by anchor, so strides and anchors must be the same "
            "(those of a teacher that sees larger images are not)."
        )


def check_predictions(name: str, student: Tensor, teacher: Tensor, *, instead: str = "") -> None:
    """Refuse logits of other classes.

    Args:
        name: of the term.
        student, teacher: logits.
        instead: how to do without the term, for the error.

    Raises:
        ShapeError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ShapeError(
            f"term {name!r}: the student's logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; "
            f"methods on predictions need a teacher of the same classes, or a `label_map`{instead and f' ({instead})'}."
        )


def sampling_weights(matched: Tensor, *, size: int | None = 256, share: float = 0.5) -> Tensor:
    """How likely each anchor is to be in the sample that a detector draws to train on, (N, A); without drawing it.

    Args:
        matched: (N, A), the box that an anchor is assigned; -1: background, below: neither.
        size: of an image's sample. None: all positives and three times as many negatives, at least three.
        share: of positives in the sample, at most.
    """
    positive, negative = matched >= 0, matched == -1
    ahead, behind = positive.sum(1, keepdim=True), negative.sum(1, keepdim=True)
    taken = ahead if size is None else ahead.clamp(max=int(size * share))
    rest = 3 * ahead.clamp(min=1) if size is None else size - taken
    rest = torch.minimum(rest, behind)
    return positive * (taken / ahead.clamp(min=1)) + negative * (rest / behind.clamp(min=1))


def boxes_at(view: Dense | Rpn, where: tuple[Tensor, Tensor], regression: Tensor) -> Tensor:
    """Boxes (n, 4) of a raw regression (N, A, 4) at some anchors `(images, anchors)` alone."""
    raw = regression[where]
    raw = raw if raw.dtype == torch.float64 else raw.float()  # as `decode`
    return view.decoder(raw, torch.stack(view.anchors)[where])
