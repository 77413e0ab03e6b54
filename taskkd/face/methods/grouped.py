"""Grouped knowledge distillation (GKD, AAAI 2023), as we read it: the identities that the student takes for likely."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from taskkd.errors import ShapeError
from taskkd.face.heads import cosines_to, frozen_weight
from taskkd.face.methods.beside import EMBEDDINGS, centres_of
from taskkd.face.methods.centre_term import CentreTerm
from taskkd.losses.primitives import check_same_shape, full_precision, l2_normalise, log_softmax, masked_mean
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Weight

__all__ = ["GroupedLogits", "grouped", "grouped_divergence"]


@full_precision
def grouped_divergence(
    student: Tensor, teacher: Tensor, *, tau: float = 0.93, primary: float = 8.0, binary: float = 1.0
) -> Tensor:
    """`primary KL` of softmaxes over the primary group alone, `+ binary KL` of the shares of the group and the rest.

    The primary group of a sample are its likeliest identities, in the student's order, until their probabilities add up
    to `tau`; of the others nothing but their sum is compared. The choice has no gradient.

    Source: Zhao, Zhu, Ling, Fu, Chen 2023, "Grouped Knowledge Distillation for Deep Face Recognition", from notes: no
    code is public, this is our reading.

    Scaling: mean over samples.

    Args:
        student, teacher: logits (batch, identities).
        tau: in (0, 1].
        primary, binary: weights of the two parts.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "grouped_divergence")
    log_s, log_t = log_softmax(student, 1.0, 1), log_softmax(teacher, 1.0, 1)
    ordered, order = log_s.detach().exp().sort(dim=1, descending=True)
    inside = torch.zeros_like(log_s, dtype=torch.bool).scatter(1, order, ordered.cumsum(1) - ordered < tau)
    (in_s, out_s), (in_t, out_t) = _shares(log_s, inside), _shares(log_t, inside)
    among_t = (log_t - in_t).masked_fill(~inside, torch.finfo(log_t.dtype).min)  # beyond the group it may exceed 0
    among = (among_t.exp() * ((log_t - in_t) - (log_s - in_s)).masked_fill(~inside, 0.0)).sum(1)
    between = in_t.exp() * (in_t - in_s) + out_t.exp() * (out_t - out_s)
    return masked_mean(primary * among + binary * between[:, 0])


def _shares(log_p: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the group and of the rest, (batch, 1) each; of nothing about -1e38, not -inf."""
    low = torch.finfo(log_p.dtype).min
    parts = (log_p.masked_fill(~inside, low), log_p.masked_fill(inside, low))
    return parts[0].logsumexp(1, keepdim=True), parts[1].logsumexp(1, keepdim=True)


class GroupedLogits(CentreTerm):
    """`grouped_divergence` of both networks' cosines to the teacher's centres, times `s`.

    Args:
        name, weight: see `Term`.
        centres: (identities, features), a buffer of unit vectors.
        student_size: of the student's embeddings.
        s: the scale of the cosines.
        tau, primary, binary: see `grouped_divergence`.
    """

    student_taps = (EMBEDDINGS,)
    teacher_taps = (EMBEDDINGS,)
    alike_on_ranks = ("centres",)
    centres: Tensor

    def __init__(
        self,
        name: str,
        centres: Tensor,
        student_size: int,
        *,
        s: float = 64.0,
        tau: float = 0.93,
        primary: float = 8.0,
        binary: float = 1.0,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, len(centres), (student_size, centres.shape[1]), weight=weight)
        self.s, self.options = s, {"tau": tau, "primary": primary, "binary": binary}
        self.register_buffer("centres", frozen_weight(len(centres), centres.shape[1], 0, centres, "float32"))

    def forward(self, run: Run) -> Tensor:
        x, t = self.embeddings(run), run.teacher[EMBEDDINGS]
        if t.shape != x.shape:
            raise ShapeError(
                f"term {self.name!r} needs embeddings {tuple(x.shape)} of the teacher, got {tuple(t.shape)}."
            )
        logits = [self.s * _cosines(e.to(x.dtype), self.centres) for e in (x, t)]
        return grouped_divergence(logits[0], logits[1], **self.options)


@full_precision
def _cosines(embeddings: Tensor, centres: Tensor) -> Tensor:
    return cosines_to(l2_normalise(embeddings), centres)


def grouped(
    student: nn.Module,
    teacher: nn.Module,
    *,
    tau: Annotated[float, Gt(0), Le(1)] = 0.93,
    primary: Annotated[float, Ge(0)] = 8.0,
    binary: Annotated[float, Ge(0)] = 1.0,
    s: Annotated[float, Gt(0)] = 64.0,
    weight: Annotated[float, Gt(0)] = 1.0,
    task_weight: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """Experimental: soft targets on the identities that matter, beside the margin softmax on the labels.

    Source: GKD, AAAI 2023, see `grouped_divergence`. Our reading: both networks' logits are `s` times the cosines to
    the teacher's centres, without a margin.

    Args:
        student: a face model.
        teacher: a face model; its `centres` are the classifier's weights, or class means of its embeddings.
        tau, primary, binary: see `grouped_divergence`.
        s: the scale.
        weight: of the term.
        task_weight: of the margin softmax; 0: labels are not needed.
    """
    size = int(student.embedding_size)  # type: ignore[arg-type]
    centres = centres_of(student, teacher, "grouped")
    term = GroupedLogits("groups", centres, size, s=s, tau=tau, primary=primary, binary=binary, weight=weight)
    return Method(
        "grouped", [Stage("distil", [term], task_weight)], ("labels", "centres") if task_weight > 0 else ("centres",)
    )
