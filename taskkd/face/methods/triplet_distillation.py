"""TripletDistillation (Feng et al. 2019): a triplet loss whose margins are as large as the teacher's distances say."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd.errors import ShapeError
from taskkd.face.methods.beside import EMBEDDINGS, LABELS
from taskkd.losses.primitives import as_samples, cosines, full_precision, masked_mean, safe_divide
from taskkd.stages import Method, Stage
from taskkd.terms import Match

__all__ = ["batch_triplet_loss", "batch_triplets", "triplet_distillation", "triplet_margin_loss"]

Kind: TypeAlias = Literal["l2", "cosine"]
Negatives: TypeAlias = Literal["hardest", "random"]


def _distances(x: Tensor, kind: Kind) -> Tensor:
    """(batch, batch): squared distances of unit vectors, or angles."""
    cos = cosines(x)
    return 2 - 2 * cos if kind == "l2" else cos.clamp(-1 + 1e-7, 1 - 1e-7).acos()  # finite slopes at both ends


@torch.no_grad()
def batch_triplets(teacher: Tensor, labels: Tensor, *, kind: Kind = "l2", negatives: Negatives = "hardest") -> Tensor:
    """Every ordered pair of samples of one identity, each with one sample of another: (3, triplets) indices.

    Args:
        teacher: embeddings (batch, features).
        labels: identities (batch,); a sample of label -1 is in no triplet.
        kind: the distance, see `triplet_margin_loss`.
        negatives: the "hardest" is the one that is nearest to the anchor; "random" draws from torch's global generator.
    """
    known = labels >= 0
    same = labels[:, None] == labels
    others = ~same & known
    pairs = same & known & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    anchors, positives = (pairs & others.any(1, keepdim=True)).nonzero(as_tuple=True)
    if negatives == "random" and len(anchors):
        chosen = torch.multinomial(others[anchors].float(), 1)[:, 0]
    else:
        chosen = _distances(teacher, kind).masked_fill(~others, torch.inf).argmin(1)[anchors]
    return torch.stack((anchors, positives, chosen))


@full_precision
def triplet_margin_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    triplets: Tensor,
    kind: Kind = "l2",
    m_min: float = 0.2,
    m_max: float = 0.5,
) -> Tensor:
    """`max(0, dp_s - dn_s + m)`, mean over triplets, with margins `m` as large as the teacher's lead.

    `m = m_min + (m_max - m_min) r / max r`, `r = max(0, dn_t - dp_t)`; `dp` and `dn` are the distances of anchor and
    positive, anchor and negative: of the student, of the teacher.

    Source: Feng, Wang, Hu 2019, "Triplet Distillation for Deep Face Recognition", in the form of Svitov & Alyamkin
    2020 ("MarginDistillation").

    Scaling: equal. Where the teacher orders no triplet (`max r = 0`) theirs is NaN; here every margin is `m_min`.

    Args:
        student, teacher: embeddings (batch, features).
        triplets: indices (3, triplets) of anchors, positives and negatives; without any the loss is 0.
        kind: "l2": squared distance of unit vectors; "cosine": the angle.
        m_min, m_max: the margins' range.

    Raises:
        ShapeError: the numbers of samples differ.
    """
    s, t, _ = as_samples(student, teacher, None, "triplet_margin_loss")
    anchors, positives, negatives = triplets
    near_s, far_s, near_t, far_t = (
        found[anchors, others]
        for found in (_distances(s, kind), _distances(t, kind))
        for others in (positives, negatives)
    )
    ahead = (far_t - near_t).clamp(min=0)
    if len(ahead):
        ahead = safe_divide(ahead, ahead.max())
    margin = m_min + (m_max - m_min) * ahead
    return masked_mean((near_s - far_s + margin).clamp(min=0))


@full_precision
def batch_triplet_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    kind: Kind = "l2",
    negatives: Negatives = "hardest",
    m_min: float = 0.2,
    m_max: float = 0.5,
) -> Tensor:
    """`triplet_margin_loss` of the triplets of a batch, `batch_triplets`.

    Args:
        student, teacher: embeddings (batch, features).
        labels, negatives: see `batch_triplets`.
        kind, m_min, m_max: see `triplet_margin_loss`.

    Raises:
        ShapeError: the numbers of samples or labels differ.
    """
    if labels.shape != student.shape[:1]:
        raise ShapeError(
            f"`batch_triplet_loss` needs one label for each of {len(student)} samples, got {tuple(labels.shape)}."
        )
    triplets = batch_triplets(teacher, labels, kind=kind, negatives=negatives)
    return triplet_margin_loss(student, teacher, triplets=triplets, kind=kind, m_min=m_min, m_max=m_max)


def triplet_distillation(
    student: nn.Module,  # noqa: ARG001
    teacher: nn.Module,  # noqa: ARG001
    *,
    kind: Kind = "l2",
    negatives: Negatives = "hardest",
    m_min: Annotated[float, Ge(0)] = 0.2,
    m_max: Annotated[float, Gt(0)] = 0.5,
    weight: Annotated[float, Gt(0)] = 1.0,
    gather: bool = False,
    task_weight: Annotated[float, Ge(0)] = 0.0,
) -> Method:
    """A triplet loss on the student's embeddings with the teacher's margins, to fine-tune a trained student.

    Source: Feng, Wang, Hu 2019, "Triplet Distillation for Deep Face Recognition". Svitov & Alyamkin train
    with it alone, learning rate 1e-3, on bags of 7200 faces, 18 of each identity, from which they choose triplets; here
    triplets are those of a batch, which should hold several faces of each identity (`IdentityBalanced`). Embeddings may
    differ in size.

    Args:
        student, teacher: face models.
        kind, negatives, m_min, m_max: see `batch_triplet_loss`.
        weight: of the term.
        gather: triplets of the samples of all ranks.
        task_weight: of the margin softmax.
    """
    term = Match(
        "triplets",
        batch_triplet_loss,
        EMBEDDINGS,
        labels=LABELS,
        kind=kind,
        negatives=negatives,
        m_min=m_min,
        m_max=m_max,
        gather=gather,
        weight=weight,
    )
    return Method("triplet_distillation", [Stage("distil", [term], task_weight)], ("labels",))
