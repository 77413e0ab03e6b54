"""Losses on logits over different vocabularies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_temperature, full_precision, log_softmax, mean_of_samples, token_weights

__all__ = ["universal_logits"]


@full_precision
def universal_logits(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    teacher_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Universal logit distillation (ULD): `sum_i |p_i - q_i|` of probabilities sorted by size, the fewer padded by 0.

    Source: Boizard, El Haddad, Hudelot, Colombo 2024, "Towards Cross-Tokenizer Distillation". The first token that
    counts of the student is compared with the first of the teacher, and so on; what one of them has more is left out.

    Scaling: mean over the tokens of each example, then over examples; no `T^2`. Equal to trl's, which counts an example
    without tokens as 0 where it is left out here, and by default leaves out each side's last token (the end of the
    text): mask it.

    Args:
        student: logits (batch, tokens, vocabulary).
        teacher: logits of as many samples; tokens and vocabulary may differ.
        temperature: `T`, positive, of both sides: a number, or one for each sample.
        teacher_mask: which of the teacher's tokens count (batch, tokens); the student's mask if left out.
        mask: weights or booleans over the student's (batch, tokens) or (batch,).

    Raises:
        ShapeError: the shapes or masks do not fit.
        ValueError: `temperature` is not positive.

    Example:
        >>> s, t = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[2.0, -90.0, 0.0]]])  # the same but for the order
        >>> round(universal_logits(s, t).item(), 4)
        0.0
    """
    check_temperature(temperature)
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[0] != teacher.shape[0]:
        raise ShapeError(
            "`universal_logits` needs as many samples of both, (batch, tokens, vocabulary), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if mask is not None and mask.ndim > 1 and teacher_mask is None and student.shape[1] != teacher.shape[1]:
        raise ShapeError(
            f"`universal_logits` got a mask of {mask.shape[1]} tokens of the student; the teacher has "
            f"{teacher.shape[1]}: say with `teacher_mask` which of those count."
        )
    (s, weight), (t, others) = (
        _counted(student, mask),
        _counted(teacher, mask if teacher_mask is None else teacher_mask),
    )
    tokens, classes = min(s.shape[1], t.shape[1]), max(s.shape[2], t.shape[2])
    p, q = (log_softmax(x[:, :tokens], temperature, -1).exp().sort(-1, descending=True).values for x in (s, t))
    p, q = (F.pad(x, (0, classes - x.shape[2])) for x in (p, q))
    return mean_of_samples((p - q).abs().sum(-1), weight[:, :tokens] * (others[:, :tokens] > 0))


def _counted(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits with the tokens that count first, in their order, the others as zeros; and the weights in that order."""
    if mask is None:
        return logits, logits.new_ones(logits.shape[:2])
    weight = token_weights(mask, logits)
    order = (weight <= 0).to(torch.uint8).argsort(dim=1, stable=True)
    logits = logits.masked_fill((weight <= 0)[..., None], 0)
    return logits.gather(1, order[..., None].expand_as(logits)), weight.gather(1, order)
