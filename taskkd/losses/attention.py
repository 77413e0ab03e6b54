"""Losses on what self-attention computes: scores (before the softmax), probabilities, queries, keys, values.

Scores are (batch, heads, queries, keys), `Q K' / sqrt(head size)`; queries, keys and values (batch, heads, tokens,
head size). `mask` is one weight for each token, (batch, tokens), or sample, (batch,): a query counts with its weight, a
key counts where its weight is not 0.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import full_precision, log_softmax, masked_mean, mean_of_samples, token_weights

__all__ = ["attention_cross_entropy", "attention_kl", "attention_scores", "self_attention_relation"]

Heads = Literal["each", "mean"]
Average = Literal["valid", "official"]
FLOOR = 1e-12  # of probabilities whose logarithm is taken


def _check_scores(student: Tensor, teacher: Tensor, heads: Heads, loss: str) -> None:
    if heads not in get_args(Heads):
        raise ValueError(f"`heads` is 'each' or 'mean', got {heads!r}.")
    s, t = student.shape, teacher.shape
    if len(s) != 4 or len(t) != 4 or s[0] != t[0] or s[2:] != t[2:]:
        raise ShapeError(
            f"`{loss}` needs student and teacher tensors of one shape (batch, heads, queries, keys), got {tuple(s)} "
            f"and {tuple(t)}."
        )
    if heads == "each" and s[1] != t[1]:
        raise ShapeError(
            f"`{loss}` compares head by head, but the student has {s[1]} heads and the teacher {t[1]}. With "
            "heads='mean' it compares the means over heads; `self_attention_relation` compares queries, keys or values "
            "of any number of heads."
        )


@full_precision
def attention_scores(
    student: Tensor,
    teacher: Tensor,
    *,
    heads: Heads = "each",
    average: Average = "valid",
    clip: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean squared difference of attention scores before the softmax.

    Source: Jiao et al. 2020, "TinyBERT", eq. 7.

    Scaling: the mean over heads and over pairs of a valid query and a valid key, TextBrewer's `attention_mse`. The
    released code of TinyBERT averages over all pairs of the padded batch, so its value depends on the padding: masked
    keys count 0 but stay in the denominator, and padded queries are compared. That is `average="official"` with a mask,
    or `clip=-100.0` without one where the scores hold an additive mask of -10000. TextBrewer's `attention_mse_sum` sums
    scores over heads: `heads="mean"`, `heads^2` times larger. Its losses without a mask set to 0 what is at most -0.001
    (`clip=-1e-3`), which for scores, unlike probabilities, is every negative one.

    Args:
        student, teacher: scores (batch, heads, queries, keys) of one shape, for "mean" but for the number of heads.
        heads: "each" head with its like, or their "mean".
        average: over "valid" pairs, or all of them as the "official" code.
        clip: scores of at most this become 0 on both sides.
        mask: weights or booleans over (batch, tokens) or (batch,).

    Returns:
        A scalar; 0 where the scores agree.

    Raises:
        ShapeError: the shapes differ, the heads differ with `heads="each"`, or the mask does not fit.
        ValueError: `heads` or `average` is none of those named.

    Example:
        >>> s, t = torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
        >>> mask = torch.tensor([[1, 1, 0]])
        >>> attention_scores(s, t, mask=mask), attention_scores(s, t, average="official", mask=mask)
        (tensor(1.), tensor(0.6667))
    """
    _check_scores(student, teacher, heads, "attention_scores")
    if average not in get_args(Average):
        raise ValueError(f"`average` is 'valid' or 'official', got {average!r}.")
    if clip is not None:
        student, teacher = (x.masked_fill(x <= clip, 0) for x in (student, teacher))
    if heads == "mean":
        student, teacher = (x.mean(1, keepdim=True) for x in (student, teacher))
    difference = student - teacher
    if mask is None:
        return masked_mean(difference.square())
    weight = token_weights(mask, student)[:, None, :, None]
    if average == "official":
        return masked_mean(difference.masked_fill(weight.mT <= 0, 0).square())
    pairs = (weight * (weight.mT > 0)).expand_as(difference)
    return masked_mean(difference.masked_fill(pairs <= 0, 0).square(), pairs)


@full_precision
def attention_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    heads: Heads = "each",
    keys: Literal["valid", "all"] = "valid",
    clip: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of attention: `-sum_k softmax(teacher)_k log softmax(student)_k`, mean over heads and queries.

    Same gradient as `attention_kl` but for how examples are averaged; not 0 where both agree. Source: Sun Z. et al.
    2020, "MobileBERT", attention transfer (weight 1, divided by the number of layers); TextBrewer's `attention_ce`.

    Scaling: equal to both without padding. TextBrewer takes the softmax over the padding's keys too and then drops
    them, so that the probabilities left sum to less than 1: `keys="all"`; with scores that hold an additive mask both
    are the same. Its `attention_ce_mean` is `heads="mean"`, and without a mask it sets the teacher's probability to 0
    where a score is at most -0.001 (`clip=-1e-3`).

    Args:
        student, teacher: scores (batch, heads, queries, keys) of one shape, for "mean" but for the number of heads.
        heads: "each" head with its like, or the "mean" of their scores.
        keys: those of the softmax: "valid" ones, or "all".
        clip: where the teacher's score is at most this, its probability becomes 0.
        mask: weights or booleans over (batch, tokens) or (batch,).

    Raises:
        ShapeError: the shapes differ, the heads differ with `heads="each"`, or the mask does not fit.
        ValueError: `heads` or `keys` is none of those named.

    Example:
        >>> scores = torch.zeros(1, 1, 2, 4)
        >>> round(attention_cross_entropy(scores, scores).item(), 4)  # log 4
        1.3863
    """
    _check_scores(student, teacher, heads, "attention_cross_entropy")
    if keys not in ("valid", "all"):
        raise ValueError(f"`keys` is 'valid' or 'all', got {keys!r}.")
    if heads == "mean":
        student, teacher = (x.mean(1, keepdim=True) for x in (student, teacher))
    weight = None if mask is None else token_weights(mask, student)[:, None, :, None].expand(*student.shape[:3], 1)
    s, t = (_kept(x, weight, keys == "valid") for x in (student, teacher))
    p = t.softmax(-1)
    if clip is not None:
        p = p.masked_fill(t <= clip, 0)
    if weight is not None:
        p = p.masked_fill(weight[:, :1].mT <= 0, 0)
    return masked_mean(-(p * F.log_softmax(s, -1)).sum(-1), None if weight is None else weight[..., 0])


def _kept(scores: Tensor, weight: Tensor | None, drop_keys: bool = True) -> Tensor:
    """Scores of queries of weight 0 as 0 and, if wished, those of such keys as nothing beside any other."""
    if weight is None:
        return scores
    scores = scores.masked_fill(weight <= 0, 0)
    out = weight[:, :1].mT <= 0
    return scores.masked_fill(out, torch.finfo(scores.dtype).min) if drop_keys else scores


@full_precision
def attention_kl(
    student: Tensor, teacher: Tensor, *, heads: Heads = "each", probabilities: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Attention transfer: `KL(teacher || student)` of the attention distributions, of each query over the keys.

    Source: Wang W. et al. 2020, "MiniLM", on the last layer. The mean over heads and valid queries of each example,
    then over the batch; masked keys are left out of the softmax.

    Args:
        student, teacher: scores (batch, heads, queries, keys) of one shape, for "mean" but for the number of heads; or
            probabilities.
        heads: "each" head with its like, or their "mean" (of scores or of probabilities, whichever is given).
        probabilities: the tensors are softmaxes already. Those below 1e-12 count as that.
        mask: weights or booleans over (batch, tokens) or (batch,).

    Raises:
        ShapeError: the shapes differ, the heads differ with `heads="each"`, or the mask does not fit.
        ValueError: `heads` is neither.

    Example:
        >>> s, t = torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[[0.0, 50.0]]]])
        >>> round(attention_kl(s, t).item(), 4)  # log 2
        0.6931
    """
    _check_scores(student, teacher, heads, "attention_kl")
    if heads == "mean":
        student, teacher = (x.mean(1, keepdim=True) for x in (student, teacher))
    weight = None if mask is None else token_weights(mask, student)
    each = None if weight is None else weight[:, None, :, None]
    if probabilities:
        log_s, log_t = (_kept(x, each, False).clamp(min=FLOOR).log() for x in (student, teacher))
    else:
        log_s, log_t = (log_softmax(_kept(x, each), 1.0, -1) for x in (student, teacher))
    divergence = log_t.exp() * (log_t - log_s)
    if each is not None:
        divergence = divergence.masked_fill(each.mT <= 0, 0)
    return mean_of_samples(divergence.sum(-1).mean(1), weight)


@full_precision
def self_attention_relation(
    student: Tensor, teacher: Tensor, *, heads: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Self-attention relations: `KL` of `softmax(A A' / sqrt(d))` of queries, keys or values, teacher against student.

    Source: Wang W. et al. 2021, "MiniLMv2": queries, keys and values of one layer (the last of BERT-base, the 21st of
    24), each with weight 1 and 48 or 64 relation heads; Wang W. et al. 2020, "MiniLM": values, with their own heads.
    The concatenated heads are split anew, so that student and teacher may differ in heads and in head size.

    Scaling: the mean over heads and valid queries of each example, then over the batch. The authors publish no
    distillation code; equal to Bloomberg's, the padding cut off each example.

    Args:
        student, teacher: queries, keys or values (batch, heads, tokens, head size), of as many samples and tokens.
        heads: the number of relation heads, which divides heads times head size of both; None: their own heads, of
            which there must be as many.
        mask: weights or booleans over (batch, tokens) or (batch,).

    Raises:
        ShapeError: the shapes do not fit, the numbers of heads differ, or `heads` does not divide.

    Example:
        >>> q = torch.eye(4).reshape(1, 1, 4, 4)
        >>> self_attention_relation(q, q.reshape(1, 2, 4, 2) * 0, heads=2).item() > 0
        True
    """
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[::2] != teacher.shape[::2]:
        raise ShapeError(
            "`self_attention_relation` needs as many samples and tokens of both, (batch, heads, tokens, head size), "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if heads is None and student.shape[1] != teacher.shape[1]:
        raise ShapeError(
            f"`self_attention_relation` got {student.shape[1]} heads of the student and {teacher.shape[1]} of the "
            "teacher: say how many relation heads both are split into, heads=48."
        )
    weight = None if mask is None else token_weights(mask, student)
    each = None if weight is None else weight[:, None, :, None]
    log_s, log_t = (log_softmax(_relation(x, heads, each), 1.0, -1) for x in (student, teacher))
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True)
    return mean_of_samples(divergence.sum(-1).mean(1), weight)


def _relation(x: Tensor, heads: int | None, weight: Tensor | None) -> Tensor:
    """`A A' / sqrt(d)` of each relation head, (batch, heads, tokens, tokens); keys of weight 0 far below."""
    if weight is not None:
        x = x.masked_fill(weight <= 0, 0)
    if heads is not None and heads != x.shape[1]:
        width = x.shape[1] * x.shape[3]
        if heads < 1 or width % heads:
            raise ShapeError(
                f"`self_attention_relation` cannot split {x.shape[1]} heads of size {x.shape[3]}, {width} features, "
                f"into {heads} relation heads: expected a divisor of {width}."
            )
        x = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], heads, width // heads).transpose(1, 2)
    x = x * x.shape[3] ** -0.25
    if weight is None:
        return x @ x.mT
    return x @ x.mT + torch.zeros_like(weight.mT).masked_fill(weight.mT <= 0, torch.finfo(x.dtype).min)
