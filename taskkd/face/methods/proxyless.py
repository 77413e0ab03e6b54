"""ProxylessKD (Shi et al. 2020): the student is classified by the teacher's classifier, which stays as it is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from taskkd.face.heads import Margin, MarginHead
from taskkd.face.methods.beside import centres_of
from taskkd.face.methods.centre_term import CentreTerm, MarginKind
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
        margin, m, s: see `margin_logits`.
        sample_rate, storage: see `MarginHead`.
    """

    def __init__(
        self,
        name: str,
        centres: Tensor,
        student_size: int,
        *,
        margin: MarginKind = "arc",
        m: float = 0.5,
        s: float = 64.0,
        sample_rate: float = 1.0,
        storage: Literal["float32", "float16"] = "float32",
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, len(centres), (student_size, centres.shape[1]), weight=weight)
        self.head = MarginHead(*centres.shape, centres=centres, trained=False, sample_rate=sample_rate, storage=storage)
        arc = margin == "arc"
        self.head.margin = Margin("arcface" if arc else "cosface", m=m, s=s, monotone=not arc)

    def forward(self, run: Run) -> Tensor:
        return self.head.loss(self.embeddings(run), self.labels(run))


def proxyless(
    student: nn.Module,
    teacher: nn.Module,
    *,
    margin: MarginKind = "arc",
    m: Annotated[float, Ge(0)] | None = None,
    s: Annotated[float, Gt(0)] = 64.0,
    sample_rate: Annotated[float, Gt(0), Le(1)] = 1.0,
    storage: Literal["float32", "float16"] = "float32",
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
        sample_rate: each step sees its own identities and a random share of the others: a fifth of the time at 0.1.
        storage: of the centres: "float16" takes half the memory.
        weight: of the term.
        task_weight: of a margin softmax with trained weights beside it.
    """
    size = int(student.embedding_size)  # type: ignore[arg-type]
    chosen = m if m is not None else {"arc": 0.5, "cos": 0.35}[margin]
    centres = centres_of(student, teacher, "proxyless")
    options: dict[str, Any] = {"margin": margin, "m": chosen, "s": s, "sample_rate": sample_rate, "storage": storage}
    term = FrozenCentres("centres", centres, size, weight=weight, **options)
    return Method("proxyless", [Stage("distil", [term], task_weight)], ("labels", "centres"))
