"""Compressing a Siamese network by attention and distillation, after Geng et al. 2020; no reproduction."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd import losses
from taskkd.errors import RecipeError, ShapeError
from taskkd.losses.primitives import cosines, full_precision, masked_mean
from taskkd.stages import Method, Stage
from taskkd.terms import Match, Term

__all__ = ["pair_contrastive", "siamese_attention"]


@full_precision
def pair_contrastive(
    student: Tensor,
    teacher: Tensor,  # noqa: ARG001
    *,
    labels: Tensor,
    margin: float = 1.0,
) -> Tensor:
    """Contrastive loss of all pairs of a batch: `mean_+ d^2 + mean_- max(0, margin - d)^2`, `d` of unit embeddings.

    Source: Hadsell, Chopra, LeCun 2006, "Dimensionality Reduction by Learning an Invariant Mapping". Scaling: a mean
    over the pairs of one identity and another over those of two, of which a batch has far more; without the factor 1/2.

    Args:
        student: embeddings (N, features).
        teacher: not looked at: the signature is that of all losses.
        labels: (N,) identities; pairs with one below 0 do not count.
        margin: distance at which two identities are far enough apart, of 2 at most.

    Returns:
        A scalar; a mean over no pairs is exactly 0.

    Raises:
        ShapeError: embeddings or labels do not fit.
        ValueError: `margin` is not positive.

    Example:
        >>> pair_contrastive(torch.eye(2), torch.eye(2), labels=torch.tensor([7, 7]))
        tensor(2.)
    """
    if student.ndim != 2 or labels.shape != student.shape[:1]:
        raise ShapeError(
            f"`pair_contrastive` needs embeddings (N, features) and labels (N,), got {tuple(student.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if not margin > 0:
        raise ValueError(f"`margin` must be positive, got {margin}.")
    squares = (2 - 2 * cosines(student)).clamp(min=0)
    # no slope where two embeddings are one: it has no direction there
    distance = torch.where(squares > 1e-12, squares, 1.0).sqrt() * (squares > 1e-12)
    known = (labels >= 0) & (labels >= 0)[:, None]
    same = labels == labels[:, None]
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return masked_mean(squares, same & known & ~itself) + masked_mean(
        (margin - distance).clamp(min=0).square(), ~same & known
    )


def siamese_attention(
    student: nn.Module,
    teacher: nn.Module,
    *,
    contrastive: Annotated[float, Ge(0)] = 1.0,
    margin: Annotated[float, Gt(0)] = 1.0,
    attention: Annotated[float, Ge(0)] = 1000.0,
    mimic: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """A Siamese network's pairs, the teacher's attention maps and its embeddings. Experimental.

    Source: after Geng et al. 2020 (Journal of Image and Graphics 25(12), 2563-2577), on the compression of Siamese
    networks by attention and distillation. Not a reproduction: the text was not to be had; this is the generic form of
    what its title names, and all weights are ours, that of attention Zagoruyko & Komodakis's (2017). Batches should
    have several images of an identity, as those of `taskkd.face.batches.IdentityBalanced`.

    Args:
        student, teacher: models whose output has `embeddings`, with `embedding_size` and `views.stages`: stages are
            paired from the last. A linear adapter maps the student's embeddings where sizes differ.
        contrastive: weight of `pair_contrastive` of the student's embeddings.
        margin: of it.
        attention: weight of `losses.attention_transfer` of the stages, their mean; 0: without.
        mimic: weight of `losses.cosine` of the embeddings.

    Raises:
        RecipeError: a model names no stages.
    """
    terms: list[Term] = []
    if contrastive > 0:
        options = {"labels": "batch.labels", "margin": margin, "gather": True, "weight": contrastive}
        terms.append(Match("pairs", pair_contrastive, "out.embeddings", **options))  # type: ignore[arg-type]
    if attention > 0:
        pairs = _paired(student, teacher)
        for number, (own, other) in enumerate(pairs):
            weight = attention / len(pairs)
            terms.append(Match(f"attention{number}", losses.attention_transfer, own, other, weight=weight))
    if mimic > 0:
        adapter = None if student.embedding_size == teacher.embedding_size else "linear"
        terms.append(Match("mimic", losses.cosine, "out.embeddings", adapter=adapter, weight=mimic))
    return Method("siamese_attention", [Stage("distil", terms)], ("labels",))


def _paired(student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Taps of stages of both, the last with the last."""
    stages = [tuple(m.views.stages) for m in (student, teacher)]  # type: ignore[union-attr, arg-type]
    count = min(map(len, stages))
    if count == 0:
        who = "student" if not stages[0] else "teacher"
        raise RecipeError(
            f"the {who}'s `views.stages`, the taps of its backbone's maps, are empty; attention=0 leaves them out."
        )
    return list(zip(stages[0][-count:], stages[1][-count:], strict=True))
