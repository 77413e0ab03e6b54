"""MarginDistillation (Svitov & Alyamkin 2020): margins as the teacher's distances to its own centres."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd.errors import ShapeError
from taskkd.face.methods.beside import EMBEDDINGS, centres_of
from taskkd.face.methods.centre_term import CentreTerm, margin_softmax
from taskkd.losses.primitives import full_precision, l2_normalise, safe_divide
from taskkd.ranks import gather_ranks
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Weight

__all__ = ["TeacherMargins", "margin_distillation", "teacher_margins"]


@full_precision
def teacher_margins(
    centres: Tensor, teacher: Tensor, *, labels: Tensor, m_min: float = 0.2, m_max: float = 0.5, clip: bool = True
) -> Tensor:
    """`m_i = m_min + (m_max - m_min) d_i / max_j d_j`, `d_i = cos(t_i, w_y)`: (batch,), with gradient to the centres.

    Source: Svitov & Alyamkin 2020, "MarginDistillation: distillation for margin-based softmax".

    Args:
        centres: (identities, features).
        teacher: embeddings (batch, features).
        labels: (batch,); a sample of label -1 has the margin `m_min` and is not among those of the maximum.
        m_min, m_max: the margins' range.
        clip: no margin is below `m_min`; without it a sample that is more than a right angle from its centre has one,
            as in the authors' code. Where every `d` is 0 or less the margins are `m_min`.
    """
    near = (l2_normalise(teacher) * l2_normalise(centres[labels.clamp(min=0)])).sum(1) * (labels >= 0)
    largest = near.max() if len(near) else near.new_zeros(())
    share = safe_divide(near, largest.clamp(min=0)) * (largest > 0)
    return m_min + (m_max - m_min) * (share.clamp(min=0) if clip else share)


class TeacherMargins(CentreTerm):
    """ArcFace whose weights begin as the teacher's centres and are trained, with a margin for each sample.

    Args:
        name, weight: see `Term`.
        centres: (identities, features).
        student_size: of the student's embeddings.
        m_min, m_max, clip: see `teacher_margins`; the maximum is over the samples of all ranks.
        s: the scale.
    """

    teacher_taps = (EMBEDDINGS,)

    def __init__(
        self,
        name: str,
        centres: Tensor,
        student_size: int,
        *,
        m_min: float = 0.2,
        m_max: float = 0.5,
        clip: bool = True,
        s: float = 64.0,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, len(centres), (student_size, centres.shape[1]), weight=weight)
        self.centres = nn.Parameter(centres.detach().clone())
        self.m_min, self.m_max, self.clip, self.s = m_min, m_max, clip, s

    def forward(self, run: Run) -> Tensor:
        x, labels, t = self.embeddings(run), self.labels(run), run.teacher[EMBEDDINGS]
        if t.shape != x.shape:
            raise ShapeError(
                f"term {self.name!r} needs embeddings {tuple(x.shape)} of the teacher, got {tuple(t.shape)}."
            )
        return margin_softmax(x, self.centres.to(x.dtype), labels=labels, m=self.margins(t, labels), s=self.s)

    def margins(self, teacher: Tensor, labels: Tensor) -> Tensor:
        """Those of this rank's samples."""
        everyone, theirs = gather_ranks(labels), gather_ranks(teacher)
        options = {"m_min": self.m_min, "m_max": self.m_max}
        found = teacher_margins(self.centres, theirs, labels=everyone, clip=self.clip, **options)
        if len(found) == len(labels):
            return found
        counts = gather_ranks(labels.new_tensor([len(labels)]))
        start = int(counts[: torch.distributed.get_rank()].sum())
        return found[start : start + len(labels)]


def margin_distillation(
    student: nn.Module,
    teacher: nn.Module,
    *,
    m_min: Annotated[float, Ge(0)] = 0.2,
    m_max: Annotated[float, Gt(0)] = 0.5,
    clip: bool = True,
    s: Annotated[float, Gt(0)] = 64.0,
    weight: Annotated[float, Gt(0)] = 1.0,
    task_weight: Annotated[float, Ge(0)] = 0.0,
) -> Method:
    """ArcFace with the teacher's classifier as the student's first, and a larger margin where the teacher is surer.

    Source: Svitov & Alyamkin 2020. They train with a learning rate of 0.1, divided by 10 after 100, 160 and 220
    thousand batches of 512.

    Departures: no margin is below `m_min`; `clip=False` is their code.

    Args:
        student: a face model.
        teacher: its `centres` are the classifier's weights; where it has none, class means of its embeddings.
        m_min, m_max, clip: see `teacher_margins`.
        s: the scale.
        weight: of the term.
        task_weight: of another margin softmax beside it.
    """
    size = int(student.embedding_size)  # type: ignore[arg-type]
    centres = centres_of(student, teacher, "margin_distillation")
    term = TeacherMargins("margins", centres, size, m_min=m_min, m_max=m_max, clip=clip, s=s, weight=weight)
    return Method("margin_distillation", [Stage("distil", [term], task_weight)], ("labels", "centres"))
