"""Losses that compare how the samples of a batch relate to each other.

Student and teacher may differ in features, not in samples; whatever follows the batch dimension is flattened. `mask` is
one weight per sample: a relation counts with the product of its samples' weights. A batch of one has no relations and
gives 0. On several ranks each rank relates its own samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import (
    angles,
    as_samples,
    check_same_shape,
    cosines,
    full_precision,
    l2_normalise,
    masked_mean,
    pairs,
    pairwise_distance,
    safe_divide,
)

__all__ = [
    "category_structure",
    "consecutive_correlation",
    "correlation_congruence",
    "dark_rank",
    "instance_relationship",
    "kernel_alignment",
    "probabilistic_transfer",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
]


@full_precision
def similarity_preserving(
    student: Tensor,
    teacher: Tensor,
    *,
    normalise: Literal["rows", "samples"] = "rows",
    mask: Tensor | None = None,
) -> Tensor:
    """Similarity preserving: mean squared difference of the normalised Gram matrices of a batch.

    Source: Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation" (`gamma / batch^2` is 3000 in common code).
    TFace's face code compares cosines instead: `normalise="samples"`.

    Scaling: mean over batch^2, as the authors. Their gradient, kept here, is of order 1e11 at a sample whose features
    are exactly 0 (one over the eps of their normalisation): finite in fp32, but an fp16 input overflows.

    Args:
        student, teacher: (batch, ...).
        normalise: "rows" of the Gram matrix, or the "samples" before it.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: the numbers of samples differ.
        ValueError: `normalise` is neither.
    """
    if normalise not in ("rows", "samples"):
        raise ValueError(f"`normalise` is one of rows, samples, got {normalise!r}.")
    s, t, weight = as_samples(student, teacher, mask, "similarity_preserving")
    if normalise == "samples":
        grams = cosines(s), cosines(t)
    else:
        grams = l2_normalise(s @ s.T), l2_normalise(t @ t.T)
    return masked_mean((grams[0] - grams[1]).square(), pairs(weight))


@full_precision
def relational_distance(
    student: Tensor, teacher: Tensor, *, squared: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Relational KD, distances: Huber loss of the pairwise distances, each divided by their mean.

    Source: Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation" (weight 1; 25 in common benchmarks).

    Scaling: mean over batch^2 with the zero diagonal, as the authors; the mean distance is that of different samples.
    A distance under 1e-6 counts as 1e-6, as theirs.

    Args:
        student, teacher: (batch, ...).
        squared: compare squared distances (mdistiller's option).
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: the numbers of samples differ.
    """
    s, t, weight = as_samples(student, teacher, mask, "relational_distance")
    different = 1 - torch.eye(len(s), dtype=s.dtype, device=s.device)
    relations = []
    for x in (s, t):
        distance = pairwise_distance(x).clamp(min=1e-6) * different
        distance = distance.square() if squared else distance
        relations.append(safe_divide(distance, masked_mean(distance, pairs(weight) * different)))
    return masked_mean(F.smooth_l1_loss(relations[0], relations[1], reduction="none"), pairs(weight))


@full_precision
def relational_angle(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Relational KD, angles: Huber loss of the cosines of the angles in all triplets.

    Source: Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation" (weight 2; 50 in common benchmarks).

    Scaling: mean over batch^3 with the degenerate triplets, as the authors. Memory grows with `batch^2 * features` and
    `batch^3`: 64 MB in fp32 for the angles of 256 samples. Their gradient, kept here, is of order 1e10 at two equal
    student samples whose teacher samples differ.

    Args:
        student, teacher: (batch, ...).
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: the numbers of samples differ.
    """
    s, t, weight = as_samples(student, teacher, mask, "relational_angle")
    triplets = pairs(weight)[:, :, None] * weight
    return masked_mean(F.smooth_l1_loss(angles(s), angles(t), reduction="none"), triplets)


@full_precision
def correlation_congruence(
    student: Tensor, teacher: Tensor, *, gamma: float | Tensor = 0.4, order: int = 2, mask: Tensor | None = None
) -> Tensor:
    """Correlation congruence: mean squared difference of Gaussian kernels of unit vectors, as Taylor series.

    `K = exp(-2 gamma) * sum_p (2 gamma)^p / p! * cos^p` for `p` up to `order`.

    Source: Peng et al. 2019, "Correlation Congruence for Knowledge Distillation". RepDistiller's code of that name is
    another formula: `consecutive_correlation`. TFace's loop leaves out the last order: its `p` is `order + 1`.

    Scaling: mean over batch^2, as the code of Knowledge-Distillation-Zoo and TFace.

    Args:
        student, teacher: (batch, ...).
        gamma: of the Gaussian.
        order: of the series, at least 1.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: the numbers of samples differ.
    """
    s, t, weight = as_samples(student, teacher, mask, "correlation_congruence")
    cos_s, cos_t = cosines(s), cosines(t)
    scale = (-2 * gamma).exp() if isinstance(gamma, Tensor) else math.exp(-2 * gamma)
    factors = [scale * (2 * gamma) ** p / math.factorial(p) for p in range(1, order + 1)]
    difference = sum((f * (cos_s**p - cos_t**p) for p, f in enumerate(factors, 1)), start=torch.zeros_like(cos_s))
    return masked_mean(difference.square(), pairs(weight))  # order 0 is the same on both sides


@full_precision
def consecutive_correlation(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """`sum |s - t|_b * |s - t|_(b+1)` over features, mean over consecutive samples.

    Source: RepDistiller's correlation loss (weight 0.02 on embeddings of 128), which stands for Peng et al. 2019 in
    many tables but is not their kernel (`correlation_congruence`) and depends on the order of samples.

    Scaling: equal.

    Args:
        student, teacher: (batch, ...) of one shape.
        mask: weights or booleans over (batch,); a pair with a sample of weight 0 does not count.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "consecutive_correlation")
    s, t, weight = as_samples(student, teacher, mask, "consecutive_correlation")
    difference = (s - t).abs()
    return masked_mean((difference[:-1] * difference[1:]).sum(1), weight[:-1] * weight[1:])


@full_precision
def kernel_alignment(student: Tensor, teacher: Tensor, *, centred: bool = True, mask: Tensor | None = None) -> Tensor:
    """`1 - <Ks, Kt> / (|Ks| |Kt|)` of the linear kernels of a batch (CKA where the features are centred first).

    Source: Kornblith et al. 2019 (centred); Jin et al. 2021, "Teachers Do More Than Teach" (CAT), uncentred.

    Scaling: CAT's loss is the negative alignment, this value minus 1; its gradient is the same. Where the teacher has
    no relations (one sample, all samples equal) the value is 0.

    Args:
        student, teacher: (batch, ...).
        centred: take the mean sample off first.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: the numbers of samples differ.
    """
    s, t, weight = as_samples(student, teacher, mask, "kernel_alignment")
    share = safe_divide(weight, weight.sum())[:, None]
    kernels = []
    for x in (s, t):
        weighted = share.sqrt() * (x - (share * x).sum(0) if centred else x)
        kernels.append(l2_normalise((weighted @ weighted.T).flatten()))
    return (kernels[1] * (kernels[1] - kernels[0])).sum()


@full_precision
def probabilistic_transfer(
    student: Tensor, teacher: Tensor, *, eps: float = 1e-7, mask: Tensor | None = None
) -> Tensor:
    """Probabilistic knowledge transfer: KL divergence of each sample's distribution over the batch, mean over samples.

    `p(j | i)` is `(cos + 1) / 2`, divided by its sum over `j`.

    Source: Passalis & Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer".

    Scaling: the authors' mean over batch^2 is `batch` times smaller (their weight of 30000 belongs to it).

    Args:
        student, teacher: (batch, ...).
        eps: added to norms and probabilities, as the authors' code.
        mask: weights or booleans over (batch,); a sample of weight 0 is in no distribution.

    Raises:
        ShapeError: the numbers of samples differ.
    """
    s, t, weight = as_samples(student, teacher, mask, "probabilistic_transfer")
    p, q = _affinities(s, weight, eps), _affinities(t, weight, eps)
    return masked_mean((q * ((q + eps) / (p + eps)).log()).sum(1), weight)


def _affinities(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + eps)
    near = (unit @ unit.T + 1) / 2 * (weight > 0)
    return safe_divide(near, near.sum(1, keepdim=True))


@full_precision
def dark_rank(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 3.0,
    beta: float = 3.0,
    length: int = 4,
    normalise: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Hard DarkRank: negative log-likelihood (ListMLE) of the teacher's order of each sample's nearest neighbours.

    A neighbour's score is `-alpha * distance^beta`. Not 0 where student and teacher agree.

    Source: Chen, Wang, Zhang 2018, "DarkRank"; the hard variant as in RKD's code.

    Scaling: sum over the ranks, mean over samples, as theirs.

    Args:
        student, teacher: (batch, ...).
        alpha, beta: of the score.
        length: how many neighbours, in the teacher's order, are ranked.
        normalise: L2-normalise the samples first (as TFace on face embeddings).
        mask: weights or booleans over (batch,); a sample of weight 0 is nobody's neighbour.

    Raises:
        ShapeError: the numbers of samples differ.
    """
    s, t, weight = as_samples(student, teacher, mask, "dark_rank")
    if normalise:
        s, t = l2_normalise(s), l2_normalise(t)
    others = (weight > 0) & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    far = torch.where(others, pairwise_distance(t), math.inf)
    order = far.argsort(1)[:, : min(length, max(len(s) - 1, 0))]
    counts = others.gather(1, order)
    score = (-alpha * pairwise_distance(s) ** beta).gather(1, order).masked_fill(~counts, torch.finfo(s.dtype).min)
    log_p = score - score.flip(1).logcumsumexp(1).flip(1)
    return masked_mean(-log_p.masked_fill(~counts, 0).sum(1), weight)


@full_precision
def category_structure(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    intra: float = 1.0,
    inter: float = 1.0,
    compact: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Category structure: samples around the mean of their class, and the cosines between those means.

    `intra * mean (r_s - r_t)^2 + inter * mean (cos_s - cos_t)^2 + compact * mean r_s^2` where `r` is a sample less the
    mean of its class in the batch and `cos` the matrix over the classes in the batch.

    Source: Chen, Zheng, Shen, Zeng, Zhou, Zhao 2020, "Improving Knowledge Distillation via Category Structure".

    Scaling: means. The authors' weights are, for the last feature map and for the logits each, intra 0.002 / features
    and inter 0.04 / classes in the batch; compact is 0.1 for the logits and 0 for the features.

    Args:
        student, teacher: (batch, ...) of one shape.
        labels: (batch,), the classes.
        intra, inter, compact: weights of the three parts.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: the shapes differ, or there is not one label per sample.
    """
    check_same_shape(student, teacher, "category_structure")
    s, t, weight = as_samples(student, teacher, mask, "category_structure")
    if labels.shape != weight.shape:
        raise ShapeError(f"labels of shape {tuple(labels.shape)} for {len(s)} samples: expected one per sample.")
    same = (labels[:, None] == labels) * weight
    share = safe_divide(same, same.sum(1, keepdim=True))  # of each sample in the mean of the row's class
    centre_s, centre_t = share @ s, share @ t
    apart_s, apart_t = s - centre_s, t - centre_t
    around = intra * (apart_s - apart_t).square() + compact * apart_s.square()
    between = (cosines(centre_s) - cosines(centre_t)).square()  # once per pair of samples: each class counts as one
    return masked_mean(around, weight) + inter * masked_mean(between, pairs(share.diagonal()))


@full_precision
def instance_relationship(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    vertices: float = 0.1,
    edges: float = 5.0,
    transformations: float = 5.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Instance relationship graph: vertices (outputs), edges (relations in each layer), transformations between layers.

    Edges are squared distances divided by the largest, transformations each sample's squared distance between two
    successive feature maps divided by the largest; each is compared by its mean square, mean over layers. The earlier
    map is pooled to the later one's size, the later one's channels are averaged in groups to the earlier one's number.

    Source: Liu et al. 2019, "Knowledge Distillation via Instance Relationship Graph"; formula and weights of
    Knowledge-Distillation-Zoo.

    Scaling: equal (means).

    Args:
        student, teacher: the layers in order, at least one, then the output; each (batch, ...). Transformations are
            between successive layers that are (batch, channels, height, width).
        vertices, edges, transformations: weights of the three parts; vertices alone need outputs of one shape.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: the numbers of layers or of samples differ, or the outputs' shapes.
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise ShapeError(
            "`instance_relationship` needs as many student as teacher layers, at least one, then the output; "
            f"got {len(student)} and {len(teacher)} tensors."
        )
    check_same_shape(student[-1], teacher[-1], "instance_relationship")
    total = vertices * masked_mean((student[-1] - teacher[-1]).square(), mask)
    layers = [as_samples(s, t, mask, "instance_relationship") for s, t in zip(student[:-1], teacher[:-1], strict=True)]
    for s, t, weight in layers:
        both = [_over_largest(pairwise_distance(x).square(), pairs(weight)) for x in (s, t)]
        total = total + edges / len(layers) * masked_mean((both[0] - both[1]).square(), pairs(weight))
    weight = layers[0][2]
    steps = [i for i in range(len(layers) - 1) if student[i].ndim == student[i + 1].ndim == 4]
    for i in steps:
        both = [_over_largest(_step(x[i], x[i + 1], weight), weight) for x in (student, teacher)]
        total = total + transformations / len(steps) * masked_mean((both[0] - both[1]).square(), weight)
    return total


def _over_largest(x: Tensor, weight: Tensor) -> Tensor:
    counted = x.masked_fill(weight <= 0, 0)
    return safe_divide(counted, counted.amax()) if x.numel() > 0 else counted


def _step(earlier: Tensor, later: Tensor, weight: Tensor) -> Tensor:
    """Squared distance of each sample's feature maps, brought to one size."""
    pooled = F.adaptive_avg_pool2d(earlier, (later.shape[2], later.shape[3]))
    channels = earlier.shape[1]
    grouped = later.reshape(len(later), channels, later.shape[1] // channels, *later.shape[2:]).mean(2)
    difference = (pooled - grouped).flatten(1).masked_fill((weight <= 0)[:, None], 0)
    return difference.square().sum(1)
