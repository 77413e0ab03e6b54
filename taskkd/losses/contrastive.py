"""Contrastive losses: a sample's embedding against that of the same sample and those of others."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.primitives import (
    as_samples,
    check_mask,
    check_same_shape,
    check_temperature,
    full_precision,
    l2_normalise,
    masked_mean,
    pairs,
    pairwise_distance,
    safe_divide,
)

__all__ = [
    "cosine_nce",
    "info_nce",
    "noise_contrast",
    "noise_contrastive",
    "relation_contrastive",
    "relation_similarities",
    "similarities",
    "triplet",
]

#: for each sample the positive and its negatives, (batch, 1 + negatives, features); or (bank, their row numbers)
Candidates: TypeAlias = "Tensor | tuple[Tensor, Tensor]"


@full_precision
def info_nce(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """InfoNCE within the batch: `-log softmax(cos(student_i, teacher_j) / T)` at `j = i`, mean over samples.

    Source: van den Oord, Li, Vinyals 2018, "Representation Learning with Contrastive Predictive Coding"; the positive
    is the teacher's embedding of the same sample, the negatives are those of the other samples.

    A batch of one has no negatives and gives 0. Not 0 for equal tensors. On several ranks each contrasts its own batch.

    Args:
        student, teacher: embeddings of one shape, (batch, ...); flattened and L2-normalised here.
        temperature: `T`, positive.
        symmetric: add the teacher's view of the students, half of each.
        mask: weights or booleans over (batch,); a sample of weight 0 is no negative either.

    Raises:
        ShapeError: the shapes differ.
        ValueError: `temperature` is not positive.
    """
    check_same_shape(student, teacher, "info_nce")
    check_temperature(temperature)
    s, t, weight = as_samples(student, teacher, mask, "info_nce")
    scores = l2_normalise(s) @ l2_normalise(t).T / temperature
    out = ~(weight > 0)
    least = torch.finfo(scores.dtype).min
    loss = -F.log_softmax(scores.masked_fill(out, least), 1).diagonal()
    if symmetric:
        loss = (loss - F.log_softmax(scores.T.masked_fill(out, least), 1).diagonal()) / 2
    return masked_mean(loss, weight)


@full_precision
def cosine_nce(
    student: Tensor, teacher: Tensor, *, negatives: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """COS-NCE: `mean_n (2 - (g(n, s) - g(t, s))) / 2 + g(t, s)` with the cosine distance `g = 1 - cos`, in [0, 4].

    Source: Fu et al. 2021, "LRC-BERT", eq. 1 and 2, on every student layer through an adapter; no code of the authors
    is public. The negatives `n` are the teacher's states of the other samples of the batch. Neither logarithm nor
    temperature; not 0 for equal tensors. Without negatives (a batch of one) `g(t, s)` is left.

    Scaling: mean over the batch; a third party's code sums over it.

    Args:
        student, teacher: states of one shape, (batch, ...); flattened.
        negatives: for each sample its own instead, (batch, negatives, ...); flattened as the states are.
        mask: weights or booleans over (batch,); a sample of weight 0 is no negative of others either.

    Raises:
        ShapeError: the shapes differ, or the negatives do not fit.

    Example:
        >>> s, t = torch.eye(2), torch.eye(2)
        >>> cosine_nce(s, t), cosine_nce(s, t, negatives=-t[:, None])  # the farther the negatives, the lower
        (tensor(0.5000), tensor(0.))
    """
    check_same_shape(student, teacher, "cosine_nce")
    s, t, weight = as_samples(student, teacher, mask, "cosine_nce")
    s, t = l2_normalise(s), l2_normalise(t)
    if negatives is None:
        cosines, counts = s @ t.T, (weight > 0) & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    else:
        if negatives.ndim < 3 or negatives.shape[:1] + negatives.shape[2:] != student.shape:
            raise ShapeError(
                f"negatives of shape {tuple(negatives.shape)} for {tuple(student.shape)}: (batch, n, ...)."
            )
        n = negatives.flatten(2).masked_fill(~(weight > 0)[:, None, None], 0)
        cosines = (l2_normalise(n) @ s[:, :, None]).squeeze(2)
        counts = torch.ones_like(cosines, dtype=torch.bool)
    positive = 1 - (s * t).sum(1)
    apart = (2 - ((1 - cosines) - positive[:, None])) / 2
    return masked_mean(positive + safe_divide((apart * counts).sum(1), counts.sum(1)), weight)


@full_precision
def triplet(
    student: Tensor,
    teacher: Tensor,
    *,
    margin: float | Tensor = 1.0,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Triplets with the teacher's output as anchor: `max(0, |t_i - s_i| - |t_i - s_j| + margin)`, mean over (i, j).

    Source: Oki, Abe, Miyama, Kurita 2020, "Triplet Loss for Knowledge Distillation": the student's output for the same
    sample is pulled to the teacher's, those for other samples are pushed away. No code of the authors is public;
    distances are Euclidean here. A batch without a negative gives 0.

    Args:
        student, teacher: outputs of one shape, (batch, ...); flattened.
        margin: at least 0, in the units of the outputs.
        labels: classes (batch,); given, only samples of another class are negatives.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: the shapes differ, or the labels are not one per sample.
        ValueError: `margin` is negative.
    """
    check_same_shape(student, teacher, "triplet")
    if not isinstance(margin, Tensor) and not margin >= 0:
        raise ValueError(f"`margin` must not be negative, got {margin}.")
    s, t, weight = as_samples(student, teacher, mask, "triplet")
    different = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    if labels is not None:
        if labels.shape != weight.shape:
            raise ShapeError(f"labels of shape {tuple(labels.shape)} for {len(s)} samples: expected one per sample.")
        different = labels[:, None] != labels
    distance = pairwise_distance(t, s)
    hinge = F.relu(distance.diagonal()[:, None] - distance + margin)
    return masked_mean(hinge, pairs(weight) * different)


@full_precision
def noise_contrastive(
    student: Tensor,
    teacher: Candidates,
    *,
    samples: int,
    temperature: float | Tensor = 0.07,
    log_z: float | Tensor = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Contrastive representation distillation, one direction: is a candidate the positive or one of K noise samples?

    `P = exp(<s, c> / T) / Z`, noise `K / N`; `-log P / (P + K/N)` of the positive and `-log K/N / (P + K/N)` of each
    negative, summed over candidates, mean over the batch. Source: Tian, Krishnan, Isola 2020 and 2022, "Contrastive
    Representation Distillation", eq. 18 of the appendix (K 16384, T 0.07, 128 features, weight 0.8). They add the other
    direction, the teacher's embedding against the bank of the student's; `ContrastiveRepresentation` is the whole term.

    Scaling: equal to the authors' (sum over candidates, mean over the batch). Not 0 for equal tensors.

    Args:
        student: embeddings (batch, features), as they are (L2-normalised by the authors).
        teacher: candidates (batch, 1 + K, features), the positive first; or `(bank, rows)`: all embeddings (N,
            features) and the candidates' numbers (batch, 1 + K), which takes far less memory.
        samples: N, the number of samples of the training set.
        temperature: `T`, positive.
        log_z: `log Z`; the authors fix Z as the mean of `exp(<s, c> / T)` over the first batch, times N.
        mask: weights or booleans over (batch,).

    Raises:
        ShapeError: the shapes do not fit each other.
        ValueError: `temperature` or `samples` is not positive.
    """
    scores = similarities(student, teacher, temperature=temperature, mask=mask)
    return masked_mean(noise_contrast(scores, log_z, samples), mask)


@full_precision
def relation_contrastive(
    student: Tensor,
    teacher: Candidates,
    *,
    anchors: Tensor,
    samples: int,
    temperature: float | Tensor = 0.05,
    log_z: float | Tensor = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Complementary relation contrastive distillation, one direction: `noise_contrastive` of relations to anchors.

    The relation of an embedding to an anchor is their difference, L2-normalised; for each sample and each anchor the
    student's relation is contrasted with those of the candidates. Source: Zhu, Tang, Chen, Yu, Liu, Rong, Yang, Wang
    2021, "Complementary Relation Contrastive Distillation" (K 500, T 0.05, as many anchors as samples).

    Scaling: equal to the authors' (sum over candidates, mean over batch and anchors). Memory grows with `batch *
    anchors * (1 + K) * features`: 1 GiB in fp32 for 64 samples and anchors, K 500 and 128 features.

    Args:
        student: embeddings (batch, features).
        teacher: candidates, as for `noise_contrastive`.
        anchors: embeddings of the teacher (anchors, features); the authors take those of the batch from the bank.
        samples, temperature, log_z, mask: as for `noise_contrastive`.

    Raises:
        ShapeError: the shapes do not fit each other.
        ValueError: `temperature` or `samples` is not positive.
    """
    scores = relation_similarities(student, teacher, anchors=anchors, temperature=temperature, mask=mask)
    return masked_mean(noise_contrast(scores, log_z, samples), mask)


@full_precision
def similarities(
    student: Tensor, teacher: Candidates, *, temperature: float | Tensor = 0.07, mask: Tensor | None = None
) -> Tensor:
    """`<student, candidate> / T`, (batch, 1 + K); arguments as for `noise_contrastive`."""
    check_temperature(temperature)
    student, teacher = _kept(student, teacher, mask, "noise_contrastive")
    if isinstance(teacher, tuple):
        bank, rows = teacher
        # Against the whole bank where that is less than to copy the candidates out of it (a bank changes before the
        # backward, so it is copied once).
        if len(bank) * (bank.shape[1] + len(student)) <= rows.numel() * bank.shape[1]:
            return (student @ bank.clone().T).gather(1, rows) / temperature
        teacher = bank[rows]
    return (teacher @ student[:, :, None]).squeeze(2) / temperature


@full_precision
def relation_similarities(
    student: Tensor,
    teacher: Candidates,
    *,
    anchors: Tensor,
    temperature: float | Tensor = 0.05,
    mask: Tensor | None = None,
) -> Tensor:
    """`<relation of the student, relation of a candidate> / T`, (batch, anchors, 1 + K); see `relation_contrastive`."""
    check_temperature(temperature)
    student, teacher = _kept(student, teacher, mask, "relation_contrastive")
    candidates = teacher[0][teacher[1]] if isinstance(teacher, tuple) else teacher
    if anchors.ndim != 2 or anchors.shape[1] != student.shape[1]:
        raise ShapeError(
            f"`relation_contrastive` needs anchors (anchors, {student.shape[1]}), got {tuple(anchors.shape)}."
        )
    # The authors' 1e-6 gives the difference of an embedding to itself a direction.
    of_student = l2_normalise(student[:, None] - anchors + 1e-6)
    of_candidates = l2_normalise(candidates[:, None] - anchors[:, None] + 1e-6)
    return (of_candidates @ of_student[..., None]).squeeze(-1) / temperature


def noise_contrast(scores: Tensor, log_z: float | Tensor, samples: int) -> Tensor:
    """Minus the log-likelihood of telling the positive from noise; the last dimension of `scores` is summed over.

    Args:
        scores: (..., 1 + K) logarithms of unnormalised likelihoods, the positive first.
        log_z: `log Z`.
        samples: N; the noise is uniform over them.

    Returns:
        (...,), fp32 or fp64.

    Raises:
        ValueError: `samples` is not positive.
    """
    if samples < 1:
        raise ValueError(f"`samples` must be positive, got {samples}.")
    negatives = scores.shape[-1] - 1
    if negatives == 0:
        return scores.sum(-1) * 0.0  # nothing to tell the positive from
    noise = negatives / samples
    log_p = scores - log_z
    log_all = torch.logaddexp(log_p, log_p.new_full((), math.log(noise + 1e-7)))  # their eps
    positive = log_all[..., 0] - log_p[..., 0]
    return positive + (log_all[..., 1:] - math.log(noise)).sum(-1)


def _kept(student: Tensor, teacher: Candidates, mask: Tensor | None, loss: str) -> tuple[Tensor, Candidates]:
    """Both after a look at their shapes; samples of weight 0 are 0, whatever they hold."""
    features = teacher[0].shape[1:] if isinstance(teacher, tuple) else teacher.shape[2:]
    rows = teacher[1] if isinstance(teacher, tuple) else teacher
    if student.ndim != 2 or features != student.shape[1:] or rows.shape[:1] != student.shape[:1]:
        raise ShapeError(
            f"`{loss}` needs as many rows of candidates (batch, 1 + negatives, features), the positive first, as "
            f"student embeddings (batch, features), got {tuple(student.shape)} and "
            f"{[tuple(x.shape) for x in teacher] if isinstance(teacher, tuple) else tuple(teacher.shape)}."
        )
    if mask is None:
        return student, teacher
    check_mask(mask, student.shape[:1])
    out = ~(mask > 0)[:, None]
    student = student.masked_fill(out, 0)
    return student, teacher if isinstance(teacher, tuple) else teacher.masked_fill(out[..., None], 0)
