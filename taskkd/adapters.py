"""Adapters: small trainable maps from student shapes to teacher shapes.

They are built by `distiller.prepare(batch)` from the tensors of one dry run, before any optimiser exists, are trained
and checkpointed with the student, and are no part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import ShapeError, TaskkdError, nearest

__all__ = ["ADAPTERS", "AdapterSpec", "Conv1x1", "Linear", "build_adapter"]

AdapterSpec: TypeAlias = "str | nn.Module | Callable[[Tensor, Tensor], nn.Module]"


class Linear(nn.Module):
    """`(..., student features) -> (..., teacher features)`, one affine map of the last dimension (FitNets, TinyBERT).

    Args:
        student, teacher: sizes of the last dimension.
        bias: default True.
    """

    def __init__(self, student: int, teacher: int, *, bias: bool = True) -> None:
        super().__init__()
        self.map = nn.Linear(student, teacher, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.map(x)
        return out


class Conv1x1(nn.Module):
    """`(batch, student channels, h, w) -> (batch, teacher channels, H, W)`: a 1x1 convolution.

    Args:
        student, teacher: numbers of channels.
        size: the teacher's (H, W) where it differs from the student's: bilinear resizing before the convolution.
    """

    def __init__(self, student: int, teacher: int, *, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.map = nn.Conv2d(student, teacher, kernel_size=1)
        self.scale = size

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is not None:
            x = F.interpolate(x, size=self.scale, mode="bilinear", align_corners=False)
        out: Tensor = self.map(x)
        return out


def _linear(student: Tensor, teacher: Tensor) -> nn.Module:
    if student.ndim != teacher.ndim or student.shape[:-1] != teacher.shape[:-1]:
        raise ShapeError(
            f"adapter 'linear' maps the last dimension only, got student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)}."
        )
    return Linear(student.shape[-1], teacher.shape[-1])


def _conv1x1(student: Tensor, teacher: Tensor) -> nn.Module:
    if student.ndim != 4 or teacher.ndim != 4:
        raise ShapeError(
            f"adapter 'conv1x1' needs (batch, channels, height, width), got student {tuple(student.shape)} and "
            f"teacher {tuple(teacher.shape)}; adapter='linear' maps (..., features)."
        )
    size = None if student.shape[2:] == teacher.shape[2:] else (teacher.shape[2], teacher.shape[3])
    return Conv1x1(student.shape[1], teacher.shape[1], size=size)


ADAPTERS: dict[str, Callable[[Tensor, Tensor], nn.Module]] = {"linear": _linear, "conv1x1": _conv1x1}


def build_adapter(spec: AdapterSpec, student: Tensor, teacher: Tensor) -> nn.Module:
    """The adapter that `spec` describes, for tensors of these shapes.

    Args:
        spec: a kind (a key of `ADAPTERS`), a module used as it is, or a function of both tensors.

    Raises:
        ShapeError: the kind does not fit these shapes.
        TaskkdError: no such kind.
    """
    if isinstance(spec, nn.Module):
        return spec
    if isinstance(spec, str):
        if spec not in ADAPTERS:
            raise TaskkdError(f"no adapter {spec!r}{nearest(spec, ADAPTERS)}; known: {', '.join(ADAPTERS)}.")
        return ADAPTERS[spec](student, teacher)
    return spec(student, teacher)
