"""Losses of a game between a student and a discriminator that tells the teacher's tensors from the student's.

The discriminator gives scores, high for the teacher's. `discriminator_loss` trains it, `generator_loss` the student;
every mean is over all scores (the batch, and the patches of a discriminator that scores patches).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError, nearest
from taskkd.losses.primitives import check_same_shape, full_precision, masked_mean

__all__ = ["Game", "class_loss", "discriminator_loss", "generator_loss", "gradient_penalty"]

Game: TypeAlias = Literal["cross_entropy", "hinge", "least_squares", "wasserstein"]

#: game -> (loss of a teacher's score, of a student's score, of a student's score to the student)
_GAMES: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "cross_entropy": (lambda x: F.softplus(-x), F.softplus, lambda x: F.softplus(-x)),
    "hinge": (lambda x: F.relu(1 - x), lambda x: F.relu(1 + x), torch.neg),
    "least_squares": (lambda x: (x - 1).square(), torch.square, lambda x: (x - 1).square()),
    "wasserstein": (torch.neg, lambda x: x, torch.neg),
}


def _losses(game: str) -> tuple[Callable[[Tensor], Tensor], ...]:
    if game not in _GAMES:
        raise ValueError(f"`game` must be one of {', '.join(_GAMES)}, got {game!r}{nearest(str(game), _GAMES)}.")
    return _GAMES[game]


@full_precision
def _reduced(scores: Tensor, loss: Callable[[Tensor], Tensor], *, mask: Tensor | None = None) -> Tensor:
    return masked_mean(loss(scores), mask)


def discriminator_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    game: Game = "hinge",
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
) -> Tensor:
    """What the discriminator minimises: the mean over the teacher's scores plus the mean over the student's.

    ===============  ====================  ====================  =====================================================
    game             teacher's score t     student's score s     source
    ===============  ====================  ====================  =====================================================
    "cross_entropy"  -log sigmoid(t)       -log sigmoid(-s)      Goodfellow et al. 2014; scores are logits
    "hinge"          max(0, 1 - t)         max(0, 1 + s)         Lim & Ye 2017; SAGAN (Zhang H. et al. 2019)
    "least_squares"  (t - 1)^2             s^2                   Mao et al. 2017; without their halves, as Chung 2020
    "wasserstein"    -t                    s                     Arjovsky et al. 2017; needs `gradient_penalty`
    ===============  ====================  ====================  =====================================================

    Scaling: AdaptSegNet halves "cross_entropy", Mao et al. halve "least_squares"; under Adam neither matters.

    Args:
        student, teacher: the discriminator's scores of both sides' tensors; shapes may differ.
        game: see the table.
        mask: weights or booleans over the scores or their leading dimensions; a side of which nothing counts adds 0.
        teacher_mask: another one for the teacher's scores. None: the same.

    Raises:
        ValueError: there is no such `game`.
        ShapeError: a mask does not fit the scores.
    """
    real, fake, _ = _losses(game)
    return _reduced(teacher, real, mask=mask if teacher_mask is None else teacher_mask) + _reduced(
        student, fake, mask=mask
    )


def generator_loss(student: Tensor, *, game: Game = "hinge", mask: Tensor | None = None) -> Tensor:
    """What the student minimises: `-s` ("hinge", "wasserstein"), `-log sigmoid(s)` ("cross_entropy", non-saturating),
    `(s - 1)^2` ("least_squares"), mean over its scores.

    Source: see `discriminator_loss`.

    Args:
        student: the discriminator's scores of the student's tensors.
        game: as in `discriminator_loss`.
        mask: weights or booleans over the scores or their leading dimensions.

    Raises:
        ValueError: there is no such `game`.
        ShapeError: the mask does not fit the scores.
    """
    return _reduced(student, _losses(game)[2], mask=mask)


@full_precision
def class_loss(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Cross-entropy of the classes that a discriminator with an auxiliary classifier predicts, mean over samples.

    Source: Odena et al. 2017 (AC-GAN), on student and teacher logits in Xu et al. 2018. Both players minimise it.

    Args:
        logits: (batch, classes) of the discriminator's second output.
        labels: (batch,) classes.
        ignore_index: samples of this label count nothing; a batch of them gives 0 with a gradient path.

    Raises:
        ShapeError: the batches differ.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ShapeError(
            f"`class_loss` needs logits (batch, classes) and labels (batch,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    values = F.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    return masked_mean(values, labels != ignore_index)


def gradient_penalty(
    score: Callable[..., Tensor],
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    position: Tensor | None = None,
    target: float = 1.0,
) -> Tensor:
    """`mean_n (|grad_x score(x_n)| - target)^2` at `x = a teacher + (1 - a) student`, `a` uniform in [0, 1].

    Source: Gulrajani et al. 2017 (WGAN-GP), times 10 there and in Liu et al. 2019. It is differentiated a second time:
    the parameters of `score` get its gradient, student and teacher do not.

    Args:
        score: the discriminator, from a tensor (or as many tensors as there are on a side) to scores; of several
            scores for a sample the sum counts.
        student, teacher: (batch, ...) tensors of one shape, or sequences of them, whose gradients make one vector.
        position: `a`, (batch,); default: drawn from torch's global generator of the device.
        target: the norm that is not penalised, default 1; 0: zero-centred (Mescheder et al. 2018).

    Raises:
        ShapeError: student and teacher differ in shape or number.
    """
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if len(students) != len(teachers):
        raise ShapeError(f"`gradient_penalty` got {len(students)} student and {len(teachers)} teacher tensors.")
    count = len(students[0])
    if position is None:
        position = torch.rand(count, device=students[0].device, dtype=students[0].dtype)
    between: list[Tensor] = []
    for s, t in zip(students, teachers, strict=True):
        check_same_shape(s, t, "gradient_penalty")
        a = position.to(s).reshape(-1, *(1,) * (s.ndim - 1))
        between.append((a * t.detach() + (1 - a) * s.detach()).requires_grad_(True))
    with torch.enable_grad():
        slopes = torch.autograd.grad(score(*between).sum(), between, create_graph=True, materialize_grads=True)
        norms = torch.linalg.vector_norm(torch.cat([g.reshape(count, -1) for g in slopes], 1), dim=1)
        penalty: Tensor = (norms - target).square().mean()
    return penalty
