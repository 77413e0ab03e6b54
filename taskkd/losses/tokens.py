"""Losses on hidden states of tokens, (batch, tokens, features)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_mask, check_same_shape, full_precision, masked_mean, token_weights

__all__ = ["feature_map_transfer", "feature_statistics", "token_similarity"]


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """States of weight 0 as zeros, whatever they hold."""
    if mask is None:
        return x
    check_mask(mask, x.shape[:-1])
    return x.masked_fill(~(mask > 0).reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), 0)


@full_precision
def feature_map_transfer(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Feature map transfer: mean squared difference of layer-normalised states (a layer norm without parameters).

    Source: Sun Z. et al. 2020, "MobileBERT": the code's normalisation (variance epsilon 1e-12); the paper writes the
    plain mean squared error. Blind to the mean and the scale of each state, which `feature_statistics` compares.

    Scaling: mean over every dimension, as theirs (weight 100, divided by the number of layers); they take in the
    padding.

    Args:
        student, teacher: states of one shape, (batch, tokens, features) or (batch, ..., features).
        mask: weights or booleans over the leading dimensions.

    Raises:
        ShapeError: the shapes differ.

    Example:
        >>> import torch
        >>> s = torch.tensor([[[1.0, 2.0, 4.0]]])
        >>> feature_map_transfer(s, 10 * s + 3).item() < 1e-12
        True
    """
    check_same_shape(student, teacher, "feature_map_transfer")
    s, t = (F.layer_norm(_kept(x, mask), x.shape[-1:], eps=1e-12) for x in (student, teacher))
    return masked_mean((s - t).square(), mask)


@full_precision
def feature_statistics(
    student: Tensor,
    teacher: Tensor,
    *,
    mean: float | Tensor = 1.0,
    variance: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """`mean * (m_s - m_t)^2 + variance * |v_s - v_t|` of the mean and variance over the features of each state.

    Source: Sun Z. et al. 2020, "MobileBERT": what `feature_map_transfer` does not see.

    Scaling: mean over tokens, as theirs (weights 5000 and 5, divided by the number of layers), who take in the padding.
    Their code compares each student layer with the teacher's states of all layers at once, which is not copied.

    Args:
        student, teacher: states (batch, tokens, features) or (batch, ..., features) of one shape.
        mean, variance: weights of the two parts.
        mask: weights or booleans over the leading dimensions.

    Raises:
        ShapeError: the shapes differ.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[3.0, 3.0]]])
        >>> feature_statistics(s, t), feature_statistics(s, t, mean=0.0)  # means 1 and 3, variances 1 and 0
        (tensor(5.), tensor(1.))
    """
    check_same_shape(student, teacher, "feature_statistics")
    means, variances = [], []
    for x in (_kept(student, mask), _kept(teacher, mask)):
        means.append(x.mean(-1))
        variances.append((x - means[-1][..., None]).square().mean(-1))
    of_means, of_variances = (means[0] - means[1]).square(), (variances[0] - variances[1]).abs()
    return masked_mean(mean * of_means + variance * of_variances, mask)


@full_precision
def token_similarity(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], *, mask: Tensor | None = None
) -> Tensor:
    """How similar tokens are to each other: mean squared difference of `a b' / features`, over pairs of valid tokens.

    Source: Yang et al. 2020, "TextBrewer" (`mmd` and `nst`, after Huang & Wang 2017): of two layers, or of one layer
    with itself. Student and teacher may differ in features, not in tokens.

    Scaling: mean over pairs of tokens of the batch, equal to TextBrewer's. The gradient grows with the cube of the
    features, so large fp16 features may overflow the fp16 gradient.

    Args:
        student, teacher: states (batch, tokens, features) of one layer, or a pair of layers.
        mask: weights or booleans over (batch, tokens) or (batch,).

    Raises:
        ShapeError: more than two layers, or tokens differ.

    Example:
        >>> import torch
        >>> s, t = torch.eye(2)[None], torch.eye(2, 5)[None]
        >>> round(token_similarity(s, t).item(), 4)  # the diagonal: 1 / 2 and 1 / 5
        0.045
    """
    grams = []
    for x in (student, teacher):
        layers = (x, x) if isinstance(x, Tensor) else tuple(x)
        if len(layers) != 2 or any(y.ndim != 3 for y in layers) or layers[0].shape != layers[1].shape:
            raise ShapeError(
                "`token_similarity` needs states (batch, tokens, features) of one layer or of two, got "
                f"{[tuple(y.shape) for y in layers]}."
            )
        grams.append(layers[0] @ layers[1].mT / layers[0].shape[2])
    check_same_shape(grams[0], grams[1], "token_similarity")
    difference = grams[0] - grams[1]
    if mask is None:
        return masked_mean(difference.square())
    weight = token_weights(mask, difference)
    pairs = weight[:, :, None] * (weight[:, None] > 0)
    return masked_mean(difference.masked_fill(pairs <= 0, 0).square(), pairs)
