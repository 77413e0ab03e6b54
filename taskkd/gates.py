"""Gates: how much each sample (or token, or pixel) of a batch counts in a term.

A gate is a function of the `Run` that says which taps it reads; a `Match` adds those to its own. Its weights are in
[0, 1], (batch,) or (batch, ...), the shape of the logits without their classes; a gated loss is the mean of
`gate * loss` over all that the mask counts, so what is shut out counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from taskkd.errors import ShapeError, TaskkdError

if TYPE_CHECKING:
    from taskkd.terms import Run

__all__ = ["Gate", "confidence", "entropy", "teacher_correct", "teacher_wrong"]


@dataclass(frozen=True)
class Gate:
    """A function of the run with the taps that it reads.

    Args:
        function: `run -> weights`; it finds the taps' values in `run.student` and `run.teacher`.
        student_taps: what it reads of the student's run, entries of the batch (`batch.labels`) too.
        teacher_taps: what it reads of the teacher's.

    Example:
        >>> easy = Gate(lambda run: run.student["batch.difficulty"] < 0.5, student_taps=("batch.difficulty",))
    """

    function: Callable[[Run], Tensor]
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    def __call__(self, run: Run) -> Tensor:
        return self.function(run)


def teacher_correct(
    logits: str = "out.logits", labels: str = "batch.labels", *, dim: int | None = None, ignore_index: int = -100
) -> Gate:
    """1 where the teacher's largest logit is that of the label, else 0; 0 where there is no label.

    Source: Meng, Li, Zhao, Gong 2019, "Conditional Teacher-Student Learning": soft targets where the teacher is right,
    the label elsewhere (`teacher_wrong`).

    Args:
        logits: the teacher's tap: (batch, classes), tokens (batch, tokens, classes) or pixels (batch, classes, H, W).
        labels: the tap of the true classes, the shape of the logits without the class dimension.
        dim: the class dimension; may be left out for two dimensions only.
        ignore_index: the label of what has none (padding, 255 in segmentation); a mask keeps it out of the mean too.

    Raises:
        ShapeError: when it runs: the shapes do not fit, `dim` is missing, or the labels are no integers.
    """
    return Gate(lambda run: _right(run, logits, labels, dim, ignore_index)[0], (labels,), (logits,))


def teacher_wrong(
    logits: str = "out.logits", labels: str = "batch.labels", *, dim: int | None = None, ignore_index: int = -100
) -> Gate:
    """1 where the teacher's largest logit is not that of the label, else 0; 0 where there is no label.

    The complement of `teacher_correct` for a term that learns from the label there. Args, raises: as there.
    """

    def function(run: Run) -> Tensor:
        right, labelled = _right(run, logits, labels, dim, ignore_index)
        return labelled & ~right

    return Gate(function, (labels,), (logits,))


def confidence(
    logits: str = "out.logits",
    *,
    threshold: float | None = None,
    whose: Literal["teacher", "student"] = "teacher",
    dim: int | None = None,
) -> Gate:
    """The largest class probability; with a threshold, 1 where it is at least that, else 0. No gradient.

    Args:
        logits: the tap.
        threshold: in (0, 1]; None: the probability itself.
        whose: whose logits.
        dim: the class dimension; may be left out for two dimensions only.

    Raises:
        TaskkdError: an option is out of range.
        ShapeError: when it runs: `dim` is missing for more than two dimensions.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise TaskkdError(f"gate `confidence`: `threshold` must be in (0, 1], got {threshold}.")

    def function(run: Run) -> Tensor:
        x = _logits(run, logits, whose, dim, "confidence")
        top = x.softmax(-1).amax(-1)
        return top if threshold is None else top >= threshold

    return _one_sided(function, logits, whose, "confidence")


def entropy(
    logits: str = "out.logits",
    *,
    threshold: float | None = None,
    high: bool = False,
    whose: Literal["teacher", "student"] = "teacher",
    dim: int | None = None,
) -> Gate:
    """`1 - H / log(classes)`: 1 for a certain prediction, 0 for a uniform one. No gradient.

    Args:
        logits: the tap.
        threshold: of `H / log(classes)`, in [0, 1]: 1 where the entropy is at most that, else 0. None: graded.
        high: the other way round: what is uncertain counts (`H / log(classes)`, or 1 above the threshold).
        whose: whose logits. The student's with `high=True` is the uncertainty by which Xu et al. 2020 (UNIX) rank.
        dim: the class dimension; may be left out for two dimensions only.

    Raises:
        TaskkdError: an option is out of range.
        ShapeError: when it runs: `dim` is missing for more than two dimensions.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise TaskkdError(f"gate `entropy`: `threshold` must be in [0, 1], got {threshold}.")

    def function(run: Run) -> Tensor:
        log_p = _logits(run, logits, whose, dim, "entropy").log_softmax(-1)
        share = -(log_p.exp() * log_p).sum(-1) / math.log(max(log_p.shape[-1], 2))
        if threshold is None:
            share = share.clamp(0, 1)
            return share if high else 1 - share
        return share > threshold if high else share <= threshold

    return _one_sided(function, logits, whose, "entropy")


def _one_sided(function: Callable[[Run], Tensor], logits: str, whose: str, name: str) -> Gate:
    if whose not in ("teacher", "student"):
        raise TaskkdError(f"gate `{name}`: `whose` must be 'teacher' or 'student', got {whose!r}.")
    return Gate(function, (logits,), ()) if whose == "student" else Gate(function, (), (logits,))


def _logits(run: Run, tap: str, whose: str, dim: int | None, name: str) -> Tensor:
    """The tapped logits, detached, in full precision, the classes last."""
    x = (run.student if whose == "student" else run.teacher)[tap]
    if not isinstance(x, Tensor) or x.ndim < 2:
        what = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ShapeError(f"gate `{name}`: tap {tap!r} must give logits (batch, classes, ...), got {what}.")
    if dim is None and x.ndim > 2:
        raise ShapeError(
            f"gate `{name}` got logits of shape {tuple(x.shape)}: say which dimension holds the classes, dim=1 for "
            "(batch, classes, height, width) or dim=-1 for (batch, tokens, classes)."
        )
    x = x.detach().movedim(1 if dim is None else dim, -1)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _right(run: Run, tap: str, labels: str, dim: int | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Where the teacher is right, and where there is a label."""
    x, y = _logits(run, tap, "teacher", dim, "teacher_correct"), run.student[labels]
    if y.is_floating_point():
        raise ShapeError(f"gate `teacher_correct` needs classes as labels, {labels!r} holds {y.dtype}.")
    if y.shape != x.shape[:-1]:
        raise ShapeError(
            f"gate `teacher_correct`: labels of shape {tuple(y.shape)} do not fit logits that are, without their "
            f"classes, {tuple(x.shape[:-1])}."
        )
    labelled = y != ignore_index
    return (x.argmax(-1) == y.to(x.device)) & labelled.to(x.device), labelled.to(x.device)
