"""Losses on sentence embeddings: the scores of a query's candidates.

Embeddings themselves are compared by `mse`, `euclidean` and `cosine`, a ranking of candidates by `kl_divergence` of
`candidate_scores`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskkd.errors import ShapeError
from taskkd.losses.primitives import full_precision, l2_normalise, masked_mean

__all__ = ["candidate_scores", "margin_mse"]


@full_precision
def candidate_scores(queries: Tensor, candidates: Tensor | Sequence[Tensor], *, normalise: bool = False) -> Tensor:
    """The scores of each query's candidates, (batch, candidates): dot products, or cosines.

    For `kl_divergence` (sentence-transformers' `DistillKLDivLoss`) and `margin_mse`.

    Args:
        queries: embeddings (batch, features).
        candidates: (batch, candidates, features), or a sequence of tensors (batch, features); the positive first.
        normalise: cosines.

    Raises:
        ShapeError: the candidates do not fit.

    Example:
        >>> candidate_scores(torch.tensor([[1.0, 2.0]]), [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
        tensor([[3., 2.]])
    """
    found = candidates if isinstance(candidates, Tensor) else torch.stack(tuple(candidates), 1)
    if queries.ndim != 2 or found.ndim != 3 or found.shape[::2] != queries.shape:
        raise ShapeError(
            "`candidate_scores` needs queries (batch, features) and candidates (batch, candidates, features), got "
            f"{tuple(queries.shape)} and {tuple(found.shape)}."
        )
    if normalise:
        queries, found = l2_normalise(queries), l2_normalise(found)
    return (found @ queries[:, :, None]).squeeze(2)


@full_precision
def margin_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Margin-MSE: mean squared difference of how much better the positive scores than each negative.

    Source: Hofstätter, Althammer, Schröder, Sertkan, Hanbury 2020, "Improving Efficient Neural Ranking Models with
    Cross-Architecture Knowledge Distillation".

    Scaling: mean over queries and negatives, as sentence-transformers' `MarginMSELoss`.

    Args:
        student: scores (batch, 1 + negatives), the positive's first, such as `embeddings.candidate_scores`.
        teacher: scores of that shape; or the margins themselves (batch, negatives), as data sets have them.
        mask: weights or booleans over (batch,) or (batch, negatives).

    Raises:
        ShapeError: the shapes do not fit.

    Example:
        >>> margin_mse(torch.tensor([[5.0, 2.0]]), torch.tensor([[9.0, 5.0]]))  # margins 3 and 4
        tensor(1.)
        >>> margin_mse(torch.tensor([[5.0, 2.0]]), torch.tensor([[4.0]]))
        tensor(1.)
    """
    if student.ndim != 2 or student.shape[1] < 2 or teacher.ndim != 2 or student.shape[0] != teacher.shape[0]:
        fits = False
    else:
        fits = student.shape[1] - teacher.shape[1] in (0, 1)
    if not fits:
        raise ShapeError(
            "`margin_mse` needs student and teacher tensors of one shape (batch, 1 + negatives), or margins (batch, "
            f"negatives) of the teacher, got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    margins = student[:, :1] - student[:, 1:]
    wanted = teacher if teacher.shape == margins.shape else teacher[:, :1] - teacher[:, 1:]
    return masked_mean((margins - wanted).square(), mask)
