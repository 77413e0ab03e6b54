"""ProxylessKD (Shi et al. 2020): the student is classified by the teacher's classifier, which stays as it is."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd.face.methods.beside import centres_of
from taskkd.face.methods.centre_term import CentreTerm, Margin, margin_softmax
from taskkd.losses.primitives import l2_normalise
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Weight

__all__ = ["FrozenCentres", "proxyless"]


class FrozenCentres(CentreTerm):
    """Margin softmax of the student's embeddings against fixed centres, which no optimiser knows.

    The centres are a buffer of unit vectors: checkpoints carry it.

    Args:
        name, weight: see `Term`.
        centres: (identities, features).
        student_size: of the student's embeddings.
        margin, m, s: see `margin_softmax`.
    """

    centres: Tensor

    def __init__(
        self,
        name: str,
        centres: Tensor,
        student_size: int,
        *,
        margin: Margin = "arc",
        m: float = 0.5,
        s: float = 64.0,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, len(centres), (student_size, centres.shape[1]), weight=weight)
        self.margin: Margin = margin
        self.m, self.s = m, s
        self.register_buffer("centres", l2_normalise(centres.detach()))

    def forward(self, run: Run) -> Tensor:
        x = self.embeddings(run)
        centres, labels = self.centres.to(x.dtype), self.labels(run)
        return margin_softmax(x, centres, labels=labels, margin=self.margin, m=self.m, s=self.s, unit=True)


def proxyless(
    student: nn.Module,
    teacher: nn.Module,
    *,
    margin: Margin = "arc",
    m: Annotated[float, Ge(0)] | None = None,
    s: Annotated[float, Gt(0)] = 64.0,
    weight: Annotated[float, Gt(0)] = 1.0,
    task_weight: Annotated[float, Ge(0)] = 0.0,
) -> Method:
    """Margin softmax against the teacher's classifier, frozen: the spaces are aligned, and the teacher never runs.

    A gallery of the teacher's embeddings can be searched with the student's.

    Source: Shi, Ren, Zhang, Yan, Yang 2020, "ProxylessKD: Direct Knowledge Distillation with Inherited Classifier for
    Face Recognition", of whom no code is public; the same as "ArcDistill" and "CosDistill" of Boutros et al. 2024.

    Args:
        student: a face model.
        teacher: its `centres` are the classifier's weights; where it has none, class means of its embeddings.
        margin: "arc" (ArcFace, without a fallback beyond `pi - m`) or "cos" (CosFace).
        m: the margin. None: 0.5 for "arc", 0.35 for "cos".
        s: the scale.
        weight: of the term.
        task_weight: of a margin softmax with trained weights beside it.
    """
    size = int(student.embedding_size)  # type: ignore[arg-type]
    chosen = m if m is not None else {"arc": 0.5, "cos": 0.35}[margin]
    centres = centres_of(student, teacher, "proxyless")
    term = FrozenCentres("centres", centres, size, margin=margin, m=chosen, s=s, weight=weight)
    return Method("proxyless", [Stage("distil", [term], task_weight)], ("labels", "centres"))
