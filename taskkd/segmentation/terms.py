"""Terms of segmentation networks: maps of two networks brought to one size, and which pixels count."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import ShapeError, TaskkdError
from taskkd.segmentation.labels import IGNORE
from taskkd.terms import Match, Run

__all__ = ["Align", "Ignore", "MapTerm", "labels_at", "resized", "valid_at"]

Align: TypeAlias = Literal["teacher", "student", "smaller"]
Ignore: TypeAlias = Literal["padding", "labels", "none"]
Size: TypeAlias = "tuple[int, int]"


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (batch, channels, H, W) at another height and width: bilinear, `align_corners=False`."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def labels_at(batch: Mapping[str, Any], size: Sequence[int]) -> Tensor:
    """The labels of a batch at the height and width of a map: the nearest pixel's, (batch, h, w) int64.

    Raises:
        TaskkdError: the batch has no `labels`.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise TaskkdError(f"the batch has no `labels` (batch, height, width), which are needed; it has {_of(batch)}.")
    return _nearest(labels, size)


def valid_at(batch: Mapping[str, Any], size: Sequence[int], ignore: Ignore = "padding") -> Tensor | None:
    """Which pixels count, (batch, h, w) bool, at the height and width of a map; None: all of them.

    Args:
        batch: with `valid` (batch, H, W), False where augmentation padded, and for "labels" `labels`; what is not
            there excludes nothing.
        size: height and width.
        ignore: "padding": what was padded does not count; "labels": nor do pixels that are labelled `IGNORE`, in
            samples with labels; "none": all count.
    """
    if ignore == "none":
        return None
    valid = batch.get("valid")
    labels = batch.get("labels")
    if ignore == "labels" and isinstance(labels, Tensor):
        known = labels != IGNORE
        free = batch.get("unlabelled")
        if free is not None:
            known = known | free[:, None, None]
        valid = known if valid is None else valid & known
    return None if valid is None else _nearest(valid, size)


def _nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[1:]) == tuple(size):
        return x
    return F.interpolate(x[:, None].float(), size=tuple(size), mode="nearest")[:, 0].to(x.dtype)


def _of(batch: Mapping[str, Any]) -> str:
    return ", ".join(batch) or "nothing"


class MapTerm(Match):
    """`Match` over maps (batch, channels, h, w), which are first resized to one height and width.

    Args:
        name, loss, student, teacher: see `Match`; teacher and student may differ in stride, whatever the adapter.
        align: to whose size: the "teacher"'s (default), the "student"'s, or the "smaller" of both. Bilinear.
        ignore: pixels that do not count, see `valid_at`; for losses that take `mask`, which others look at all.
        per_channel: the loss takes a mask over (batch, channels, h, w): it gets (batch, 1, h, w), not (batch, h, w).
        **options: of `Match` (adapter, weight, ...) and of the loss.

    Raises:
        TaskkdError: as `Match`, or an unknown `align` or `ignore`.
        ShapeError: when it runs, a tapped tensor is no map.
    """

    columns = ("labels", "valid", "unlabelled")

    def __init__(
        self,
        name: str,
        loss: Callable[..., Tensor],
        student: str | Sequence[str],
        teacher: str | Sequence[str] | None = None,
        *,
        align: Align = "teacher",
        ignore: Ignore = "padding",
        per_channel: bool = False,
        **options: Any,
    ) -> None:
        for option, value, known in (
            ("align", align, ("teacher", "student", "smaller")),
            ("ignore", ignore, ("padding", "labels", "none")),
        ):
            if value not in known:
                raise TaskkdError(f"term {name!r}: `{option}` is one of {', '.join(known)}, got {value!r}.")
        masked = ignore != "none" and "mask" in inspect.signature(loss).parameters and options.get("mask") is None
        if masked:
            options["mask"] = self._valid
        super().__init__(name, loss, student, teacher, **options)
        self.align: Align = align
        self.ignore: Ignore = ignore
        self.per_channel = per_channel

    def _valid(self, batch: Mapping[str, Any], student: Tensor) -> Tensor | None:
        valid = valid_at(batch, student.shape[2:], self.ignore)
        return valid[:, None] if valid is not None and self.per_channel else valid

    def _aligned(self, run: Run) -> Run:
        """The run with its maps at one size."""
        students, teachers = dict(run.student), dict(run.teacher)
        for own, other in zip(self.student_pairs, self.teacher_pairs, strict=True):
            s, t = students.get(own), teachers.get(other)
            for side, tap, x in (("student", own, s), ("teacher", other, t)):
                if x is not None and (not isinstance(x, Tensor) or x.ndim != 4):
                    shown = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                    raise ShapeError(
                        f"term {self.name!r}: the {side}'s tap {tap!r} is no map (batch, channels, height, width), but "
                        f"{shown}."
                    )
            if s is None or t is None:
                continue  # `Match` says what is missing
            size = self._size(s, t)
            students[own], teachers[other] = resized(s, size), resized(t, size)
        return replace(run, student=students, teacher=teachers)

    def _size(self, student: Tensor, teacher: Tensor) -> tuple[int, ...]:
        if self.align == "smaller":
            return min(tuple(student.shape[2:]), tuple(teacher.shape[2:]), key=lambda size: size[0] * size[1])
        return tuple((teacher if self.align == "teacher" else student).shape[2:])

    def build(self, run: Run) -> None:
        super().build(self._aligned(run))

    def forward(self, run: Run) -> Tensor:
        return super().forward(self._aligned(run))
