"""Features weighted by the teacher's class probability (Ultralytics' SL2, 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.detection.families import family_of
from taskkd.detection.methods.maps import Maps, as_list, zero
from taskkd.detection.terms import NeckTerm
from taskkd.detection.views import Dense, Rpn
from taskkd.errors import TaskkdError
from taskkd.losses.primitives import check_same_shape, full_precision
from taskkd.stages import Method, Stage
from taskkd.terms import Run

__all__ = ["ScoreWeighted", "cell_scores", "score_weighted", "score_weighted_loss"]


@full_precision
def score_weighted_loss(student: Maps, teacher: Maps, *, scores: Maps, eps: float = 1e-9) -> Tensor:
    """`sum p (s - t)^2 / (C sum p + eps)` of each level, summed over levels.

    Source: the distillation loss of Ultralytics' YOLO ("SL2", 2026; no paper), from its formula.

    Scaling: theirs is multiplied by the batch, as all their losses are.

    Args:
        student, teacher: (N, C, h, w), or lists of the levels.
        scores: `p`, (N, h, w) or (N, 1, h w), in [0, 1], or a list.
        eps: as in the formula.

    Raises:
        ShapeError: shapes differ.
    """
    total = zero(as_list(student))
    for s, t, p in zip(as_list(student), as_list(teacher), as_list(scores), strict=True):
        check_same_shape(s, t, "score_weighted_loss")
        weight = p.reshape(len(s), *s.shape[2:]).to(s.dtype)
        total = total + ((s - t).square().sum(1) * weight).sum() / (s.shape[1] * weight.sum() + eps)
    return total


def cell_scores(view: Dense | Rpn) -> list[Tensor]:
    """(N, h, w) of each level: the highest class probability (objectness, of a first stage) of a cell's anchors."""
    scores = view.objectness.sigmoid() if isinstance(view, Rpn) else view.probabilities().amax(-1)
    levels = zip(view.shapes, torch.split(scores, view.level_sizes, 1), strict=True)
    return [level.reshape(len(level), h, w, -1).amax(-1) for (h, w), level in levels]


def _projection(student: Tensor, teacher: Tensor) -> nn.Module:
    own, other = student.shape[1], teacher.shape[1]
    return nn.Sequential(nn.Conv2d(own, other, 1), nn.ReLU(), nn.Conv2d(other, other, 1))


class ScoreWeighted(NeckTerm):
    """`score_weighted_loss` with the teacher's `cell_scores`.

    Args:
        name, student, teacher: see `NeckTerm`.
        project: a 1x1 convolution, ReLU and another on the student's maps, also where widths agree; False: none.
        weight, neck, teacher_neck, count: see `NeckTerm`.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        project: bool = True,
        weight: float = 1.0,
        neck: Sequence[str] | None = None,
        teacher_neck: Sequence[str] | None = None,
        count: int | None = None,
    ) -> None:
        family = family_of(teacher, "teacher")
        view = next((v for v in ("dense", "rpn") if v in family.views), None)
        if view is None:
            raise TaskkdError(f"term {name!r}: the teacher, a {family.name}, has no scores on its maps.")
        super().__init__(
            name,
            student,
            teacher,
            neck=neck,
            teacher_neck=teacher_neck,
            adapter=_projection if project else None,
            teacher_views=(view,),
            weight=weight,
            count=count,
        )
        self.view = view

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        """The loss of all levels."""
        with torch.no_grad():
            scores = cell_scores(self.teacher_views(run).get(self.view))
            if self.teacher_neck_taps is None:
                chosen = [scores[j] for _, j in self.levels]
            else:  # maps by name need not be the levels that the scores are of
                chosen = [min(scores, key=lambda s: abs(s.shape[1] - t.shape[2])) for t in teachers]
            own = [
                F.interpolate(s[:, None], size=[t.shape[2], t.shape[3]])[:, 0]
                for s, t in zip(chosen, teachers, strict=True)
            ]
        return score_weighted_loss(students, teachers, scores=own)


def score_weighted(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Ge(0)] = 6.0,
    project: bool = True,
    levels: Annotated[int, Gt(0)] | None = 3,
    neck: list[str] | None = None,
    teacher_neck: list[str] | None = None,
) -> Method:
    """Features imitated where the teacher is sure of a class.

    Source: Ultralytics' YOLO, 2026 ("SL2", `dis=6`; no paper), written from its formula. A teacher of two stages is
    asked for its objectness. Where a cell has several anchors, the surest counts.

    Args:
        student, teacher: detectors; the student may be any module with `neck`.
        weight: as published; their loss is multiplied by the batch, and so is their task loss, which ours is not.
        project: see `ScoreWeighted`.
        levels: how many, finest first; None: all that both have.
        neck, teacher_neck: taps of maps, paired in order; None: those of the detector's family.

    Raises:
        TaskkdError: the teacher has no scores on its maps.
    """
    term = ScoreWeighted(
        "scored",
        student,
        teacher,
        project=project,
        weight=weight,
        neck=neck,
        teacher_neck=teacher_neck,
        count=levels,
    )
    return Method("score_weighted", [Stage("distil", [term])], ("labels",))
