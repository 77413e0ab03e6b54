"""Terms that classify the student's embeddings by centres of identities in the teacher's space."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.adapters import build_adapter
from taskkd.errors import ShapeError, TaskkdError
from taskkd.face.heads import check_labels
from taskkd.face.margins import arcface, cosface
from taskkd.face.methods.beside import EMBEDDINGS, LABELS
from taskkd.losses.primitives import full_precision, l2_normalise, masked_mean
from taskkd.terms import Run, Term, Weight

__all__ = ["CentreTerm", "MarginKind", "centre_cosines", "margin_logits", "margin_softmax"]

MarginKind: TypeAlias = Literal["arc", "cos"]


def centre_cosines(embeddings: Tensor, centres: Tensor) -> Tensor:
    """The cosines of embeddings (batch, features) and centres (identities, features): (batch, identities).

    No second matrix of centres is made: what is divided by their lengths are the products.

    Args:
        embeddings, centres: of any length; a zero vector has cosine 0.
    """
    lengths: Tensor = torch.linalg.vector_norm(centres, dim=1).clamp(min=1e-12)
    return l2_normalise(embeddings) @ centres.T / lengths


@full_precision
def margin_logits(
    student: Tensor,
    centres: Tensor,
    *,
    labels: Tensor,
    margin: MarginKind = "arc",
    m: float | Tensor = 0.5,
    s: float = 64.0,
) -> Tensor:
    """`s` times the cosines to given centres, with a margin on the true one: (batch, identities).

    Source: Deng et al. 2019 (ArcFace, `cos(theta + m)`, here without a fallback beyond `pi - m`) and Wang H. et al.
    2018 (CosFace, `cos(theta) - m`), against the centres of a teacher (Shi et al. 2020, Boutros et al. 2024).

    Args:
        student: embeddings (batch, features).
        centres: (identities, features).
        labels: (batch,), -1 for a sample without identity.
        margin: "arc" on the angle, "cos" on the cosine.
        m: the margin; for "arc" also (batch,), one for each sample.
        s: the scale of the cosines.
    """
    cos = centre_cosines(student, centres)
    if margin == "arc":
        return arcface(cos, labels, m=m, s=s, monotone=False)
    if isinstance(m, Tensor):
        raise TaskkdError("margin='cos' takes one margin for all samples, got a tensor.")
    return cosface(cos, labels, m=m, s=s)


@full_precision
def margin_softmax(student: Tensor, centres: Tensor, *, labels: Tensor, **options: Any) -> Tensor:
    """Cross-entropy of `margin_logits`: mean over samples with an identity; without any, 0.

    Args:
        student, centres, labels: see `margin_logits`.
        **options: its others.
    """
    logits = margin_logits(student, centres, labels=labels, **options)
    return masked_mean(F.cross_entropy(logits, labels.clamp(min=0), reduction="none"), labels >= 0)


class CentreTerm(Term):
    """What such terms share: checked labels, and a linear map where the student's embeddings are of another size.

    The map is trained and left out of the student; a `projector` of the student's own stays in it.

    Args:
        name, weight: see `Term`.
        identities: the number of centres.
        sizes: of the student's embeddings and of the centres.
    """

    student_taps: tuple[str, ...] = (EMBEDDINGS, LABELS)

    def __init__(self, name: str, identities: int, sizes: tuple[int, int], *, weight: Weight = 1.0) -> None:
        super().__init__(name, weight)
        self.identities, self.sizes = identities, sizes
        self.layers = nn.ModuleDict()

    @property
    def built(self) -> bool:
        return self.sizes[0] == self.sizes[1] or len(self.layers) == 1

    def build(self, run: Run) -> None:
        """Make the map, where there is one."""
        if self.built:
            return
        s = run.student[EMBEDDINGS]
        layer = build_adapter("linear", s, s.new_empty(len(s), self.sizes[1])).to(s.device)
        self.layers["map"] = layer.double() if s.dtype == torch.float64 else layer

    def embeddings(self, run: Run) -> Tensor:
        """The student's, (batch, features) of the centres' size, fp32 or fp64.

        Raises:
            ShapeError: they are of another size than the student said.
        """
        x: Tensor = run.student[EMBEDDINGS]
        if x.ndim != 2 or x.shape[1] != self.sizes[0]:
            raise ShapeError(
                f"term {self.name!r} needs embeddings (batch, {self.sizes[0]}) of the student, which is what its "
                f"`embedding_size` says, got {tuple(x.shape)}."
            )
        precise = torch.promote_types(x.dtype, torch.float32)
        return self.layers["map"](x.to(precise)).to(precise) if "map" in self.layers else x.to(precise)

    def labels(self, run: Run) -> Tensor:
        """The identities, (batch,) int64.

        Raises:
            ShapeError: not one whole number for each sample.
            DataError: one is beyond the centres: one look at the device in every step.
        """
        value, batch = run.student[LABELS], len(run.student[EMBEDDINGS])
        if not isinstance(value, Tensor) or value.shape != (batch,) or value.is_floating_point():
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"term {self.name!r} needs whole numbers `labels` ({batch},), got {got}.")
        check_labels(value, self.identities, run.batch.get("id"))
        return value.long()
