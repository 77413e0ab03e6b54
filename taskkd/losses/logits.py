"""Losses on logits."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError
from taskkd.losses.chunked import chunked_kl, suits
from taskkd.losses.primitives import (
    check_mask,
    check_same_shape,
    check_temperature,
    full_precision,
    log_softmax,
    masked_mean,
    pearson,
    safe_divide,
    softened_js,
    softened_kl,
    spread,
)

__all__ = [
    "decoupled",
    "dist",
    "generalised_jsd",
    "kl_divergence",
    "logit_mse",
    "pseudo_label_cross_entropy",
    "soft_cross_entropy",
]

Direction = Literal["forward", "reverse", "jensen_shannon"]
DIRECTIONS = get_args(Direction)


def _class_dim(student: Tensor, dim: int | None, loss: str) -> int:
    if dim is not None:
        return dim
    if student.ndim == 2:
        return 1
    raise ShapeError(
        f"`{loss}` got logits of shape {tuple(student.shape)}: say which dimension holds the classes, "
        "dim=1 for (batch, classes, height, width) or dim=-1 for (batch, tokens, classes)."
    )


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    direction: Direction = "forward",
    target_floor: float | None = None,
    dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Soft targets: `T^2 * KL(softmax(teacher/T) || softmax(student/T))`, mean over every non-class dimension.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network".

    `direction="reverse"` is `T^2 * KL(student || teacher)`; `"jensen_shannon"` the mean of both divergences to the mean
    distribution.

    Scaling: for (batch, classes) equal to the usual `batchmean`. For (batch, classes, H, W) the common code divides by
    the batch alone and is `H * W` times larger; TAKD, DGKD and Patient KD divide by `batch * classes` and are
    `classes` times smaller; several packages leave out `T^2`. ONE and OKDDip add 1e-7 to the target's probabilities:
    `target_floor=1e-7`.

    Large tensors (a million numbers or more) are looked at in parts, and take no memory but that of the gradient.

    Args:
        student: logits, (batch, classes), (batch, classes, H, W) or (batch, tokens, classes).
        teacher: logits of the same shape.
        temperature: `T`, positive: a number, or a tensor with the logits' shape without the class dimension or the
            leading ones of it, such as one for each sample (`targets.dynamic_temperature`).
        direction: "forward", "reverse" or "jensen_shannon".
        target_floor: added to each of the teacher's probabilities, "forward" only; the loss is then `classes *
            target_floor * T^2` more than 0 for equal logits. Positive, or None.
        dim: the class dimension; may be left out for two dimensions only.
        mask: weights or booleans over the non-class dimensions or the leading ones of them.

    Returns:
        A scalar; 0 where the logits agree up to a constant.

    Raises:
        ShapeError: shapes differ, or `dim` is missing for more than two dimensions.
        ValueError: `temperature` or `target_floor` is not positive, the direction is none of the three, or not forward
            with a `target_floor`.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> round(kl_divergence(s, t, temperature=2.0).item(), 4)
        1.8485
    """
    check_same_shape(student, teacher, "kl_divergence")
    check_temperature(temperature)
    dim = _class_dim(student, dim, "kl_divergence")
    if direction not in DIRECTIONS:
        raise ValueError(f"`direction` is one of {', '.join(DIRECTIONS)}, got {direction!r}.")
    if target_floor is not None and (not target_floor > 0 or direction != "forward"):
        raise ValueError(f"`target_floor` is positive, and of the forward direction only; got {target_floor}.")
    if target_floor is None and direction != "jensen_shannon" and suits(student, teacher, temperature):
        pair = (student, teacher) if direction == "forward" else (teacher, student)
        return masked_mean(chunked_kl(*pair, temperature, dim), mask)
    return _kl_divergence(student, teacher, temperature, direction, target_floor, dim, mask)


@full_precision
def _kl_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    direction: Direction,
    target_floor: float | None,
    dim: int,
    mask: Tensor | None,
) -> Tensor:
    """`kl_divergence` of small tensors, in one go."""
    if direction == "jensen_shannon":
        return masked_mean(softened_js(student, teacher, temperature, dim), mask)
    if direction == "reverse":
        student, teacher = teacher, student
    number = not isinstance(temperature, Tensor)
    if mask is None and number and target_floor is None and student.numel() > 0:  # the same in fewer kernels
        log_s, log_t = log_softmax(student, temperature, dim), log_softmax(teacher, temperature, dim)
        rows = student.numel() // student.shape[dim]
        return F.kl_div(log_s, log_t, reduction="sum", log_target=True) * (temperature**2 / rows)
    return masked_mean(softened_kl(student, teacher, temperature, dim, target_floor), mask)


@full_precision
def generalised_jsd(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`T^2 * (beta * KL(t || m) + (1 - beta) * KL(s || m))`, `m = beta * t + (1 - beta) * s`, of softmaxes over `T`.

    Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), here of given texts. The formula is
    0 at both ends, where the divergences it tends to by direction stand instead: `KL(t || s)` for beta 0, `KL(s || t)`
    for beta 1. At beta 0.5 it is `kl_divergence(direction="jensen_shannon")`.

    Scaling: mean over every non-class dimension. The authors and trl leave out `T^2`.

    Args:
        student, teacher, temperature, dim, mask: as for `kl_divergence`; tokens that are no answer are masked.
        beta: in [0, 1].

    Raises:
        ShapeError: shapes differ, or `dim` is missing for more than two dimensions.
        ValueError: `temperature` is not positive, or `beta` out of range.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> round(generalised_jsd(s, t, beta=0.1).item(), 4), round(generalised_jsd(s, t, beta=0.0).item(), 4)
        (0.1286, 1.5232)
    """
    check_same_shape(student, teacher, "generalised_jsd")
    check_temperature(temperature)
    dim = _class_dim(student, dim, "generalised_jsd")
    number = not isinstance(beta, Tensor)
    if number and not 0 <= beta <= 1:
        raise ValueError(f"`beta` must be in [0, 1], got {beta}.")
    if number and 0 < beta < 1:
        return masked_mean(softened_js(student, teacher, temperature, dim, beta), mask)
    forward, reverse = (softened_kl(*x, temperature, dim) for x in ((student, teacher), (teacher, student)))
    if isinstance(beta, Tensor):  # a schedule's in a compiled graph: not looked at, that would stop the device
        between = softened_js(student, teacher, temperature, dim, beta)
        return masked_mean(torch.where(beta == 0, forward, torch.where(beta == 1, reverse, between)), mask)
    return masked_mean(reverse if beta == 1 else forward, mask)


@full_precision
def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`-T^2 * sum softmax(teacher/T) * log softmax(student/T)`, mean over every non-class dimension.

    Same gradient as `kl_divergence`; the value has the teacher's entropy added, so it is not 0 where they agree.
    Source: Hinton et al. 2015, eq. 2 with soft targets. BYOT and TOFD use this form without the entropy taken off.

    Scaling: as `kl_divergence`; TinyBERT's code (Jiao et al. 2020) is `classes * T^2` times smaller, TextBrewer's
    `kd_ce` leaves out `T^2`.

    Args, returns, raises: as `kl_divergence`.
    """
    check_same_shape(student, teacher, "soft_cross_entropy")
    check_temperature(temperature)
    dim = _class_dim(student, dim, "soft_cross_entropy")
    log_s, log_t = log_softmax(student, temperature, dim), log_softmax(teacher, temperature, dim)
    return masked_mean(-(log_t.exp() * log_s).sum(dim) * spread(temperature, student, dim) ** 2, mask)


@full_precision
def pseudo_label_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    threshold: float | Tensor = 0.0,
    dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`-log softmax(student)_c` of the teacher's class `c = argmax teacher`, mean over every non-class dimension.

    Source: Lee 2013, "Pseudo-Label"; with the teacher's labels on pixels in Kothandaraman et al. 2021. Equal to
    `F.cross_entropy(student, teacher.argmax(dim))`.

    Args:
        student, teacher, dim, mask: as for `kl_divergence`.
        threshold: of the teacher's probability of its class, in [0, 1); what is below counts nothing, and where nothing
            is left the loss is 0. Default 0: everything counts, as in both papers.

    Raises:
        ShapeError: shapes differ, or `dim` is missing for more than two dimensions.
        ValueError: `threshold` is out of range.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.1, 0.0]])
        >>> round(pseudo_label_cross_entropy(s, t, threshold=0.9).item(), 4)
        0.6931
    """
    check_same_shape(student, teacher, "pseudo_label_cross_entropy")
    dim = _class_dim(student, dim, "pseudo_label_cross_entropy")
    fixed = not isinstance(threshold, Tensor)  # a tensor's value is not looked at, which would stop the device
    if fixed and not 0 <= threshold < 1:
        raise ValueError(f"`threshold` must be in [0, 1), got {threshold}.")
    chosen = teacher.argmax(dim, keepdim=True)
    values = -F.log_softmax(student, dim).gather(dim, chosen).squeeze(dim)
    if not fixed or threshold > 0:
        sure = teacher.softmax(dim).gather(dim, chosen).squeeze(dim) >= threshold
        if mask is not None:
            check_mask(mask, sure.shape)
            mask = mask.reshape(mask.shape + (1,) * (sure.ndim - mask.ndim)) * sure
        mask = sure if mask is None else mask
    return masked_mean(values, mask)


@full_precision
def logit_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of logits, mean over every dimension.

    Source: Ba & Caruana 2014; the limit of `kl_divergence` for a large temperature is `logit_mse / 2` (of centred
    logits) when both sum over classes.

    Scaling: TextBrewer's `kd_mse`, of logits over `T`, is `T^2` times smaller; DistilBERT's sums over classes.

    Args:
        student, teacher: logits of one shape.
        mask: weights or booleans over leading dimensions.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "logit_mse")
    return masked_mean((student - teacher).square(), mask)


@full_precision
def decoupled(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
    dim: int | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
) -> Tensor:
    """Decoupled KD: `T^2 * (alpha * TCKD + beta * NCKD)`, mean over every non-class dimension.

    TCKD is the divergence of (target, all others) as two outcomes, NCKD that among the others alone. With two classes
    there is one other and NCKD is 0.

    Source: Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled Knowledge Distillation" (beta 2 to 8 on CIFAR-100; 0.5 and
    temperature 1 on ImageNet).

    Scaling: equal to the authors' for (batch, classes). They compute the logarithm of a softmax; this stays in log
    space and is finite for confident logits.

    Args:
        student, teacher: logits of one shape, as for `kl_divergence`.
        labels: the true classes, the shape of the logits without the class dimension.
        alpha, beta: weights of TCKD and NCKD.
        temperature: `T`, positive.
        dim: the class dimension; may be left out for two dimensions only.
        ignore_index: the label that counts nothing.
        mask: weights or booleans over the non-class dimensions or the leading ones of them.

    Raises:
        ShapeError: shapes differ, or `dim` is missing for more than two dimensions.
        ValueError: `temperature` is not positive.
    """
    check_same_shape(student, teacher, "decoupled")
    check_temperature(temperature)
    dim = _class_dim(student, dim, "decoupled")
    counts = (labels != ignore_index).to(student.dtype)
    if counts.shape != student.select(dim, 0).shape:
        raise ShapeError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(student.shape)}.")
    target = labels.masked_fill(labels == ignore_index, 0).unsqueeze(dim)
    log_s, log_t = log_softmax(student, temperature, dim), log_softmax(teacher, temperature, dim)
    target_s, others_s, among_s = _split(log_s, target, dim)
    target_t, others_t, among_t = _split(log_t, target, dim)
    tckd = target_t.exp() * (target_t - target_s) + others_t.exp() * (others_t - others_s)
    nckd = (among_t.exp() * (among_t - among_s)).scatter(dim, target, 0.0).sum(dim)
    if mask is not None:
        check_mask(mask, counts.shape)
        counts = counts * mask.reshape(mask.shape + (1,) * (counts.ndim - mask.ndim))
    return masked_mean((alpha * tckd + beta * nckd) * spread(temperature, student, dim) ** 2, counts)


def _split(log_p: Tensor, target: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the target, of all others together, and of each among the others (0 at the target)."""
    rest = log_p.scatter(dim, target, torch.finfo(log_p.dtype).min)
    others = rest.logsumexp(dim, keepdim=True)
    among = (log_p - others).scatter(dim, target, 0.0)
    return log_p.gather(dim, target).squeeze(dim), others.squeeze(dim), among


@full_precision
def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    inter: float = 1.0,
    intra: float = 1.0,
    temperature: float | Tensor = 1.0,
    over: Literal["all", "batch"] = "all",
    dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """DIST: `T^2 * (inter * (1 - r over classes) + intra * (1 - r over samples))`, `r` Pearson's of the softmaxes.

    The first correlation is one per sample (or pixel), the second one per class, over all samples and pixels; each is
    averaged. One sample alone has no correlation over samples: its second part is 1.

    Source: Huang, You, Wang, Qian, Xu 2022, "Knowledge Distillation from A Stronger Teacher" (beta is `inter`, gamma
    is `intra`).

    Scaling: equal; some of their code leaves out `T^2`. mmrazor, given maps, correlates over the batch alone at every
    pixel: `over="batch"`.

    Args:
        student, teacher: logits of one shape, as for `kl_divergence`.
        inter, intra: weights of the two parts.
        temperature: `T`, positive, one for all samples.
        over: what the second correlations go over: "all" samples and pixels, or for each pixel the "batch".
        dim: the class dimension; may be left out for two dimensions only.
        mask: weights or booleans over the non-class dimensions or the leading ones of them.

    Raises:
        ShapeError: shapes differ, or `dim` is missing for more than two dimensions.
        ValueError: `temperature` is not positive, or not one number, or `over` is neither.
    """
    check_same_shape(student, teacher, "dist")
    check_temperature(temperature)
    if isinstance(temperature, Tensor) and temperature.ndim > 0:
        raise ValueError("`dist` relates samples to each other and takes one temperature for all of them.")
    if over not in ("all", "batch"):
        raise ValueError(f"`over` is one of all, batch, got {over!r}.")
    dim = _class_dim(student, dim, "dist")
    p, q = (log_softmax(x, temperature, dim).exp().movedim(dim, -1) for x in (student, teacher))
    weight = p.new_ones(shape := p.shape[:-1])
    if mask is not None:
        check_mask(mask, shape)
        weight = mask.to(p.dtype).reshape(mask.shape + (1,) * (len(shape) - mask.ndim)).expand(shape)
    rest = max(shape[1:].numel(), 1) if over == "batch" else 1
    weight = weight.reshape(shape.numel() // rest, rest, 1)  # what is correlated, what each has its own for
    p, q = (x.reshape(*weight.shape[:2], x.shape[-1]).masked_fill(weight <= 0, 0) for x in (p, q))
    rows = masked_mean(1 - pearson(p, q, 2), weight[..., 0])
    share = safe_divide(weight, masked_mean(weight, weight > 0))  # so that their scale means nothing beside eps
    columns = masked_mean(1 - pearson(p, q, 0, share), (weight > 0).any(0)[:, 0])
    return (inter * rows + intra * columns) * temperature**2
