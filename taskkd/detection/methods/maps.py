"""What the methods on feature maps share: adapters, strides, which detectors have two stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskkd.adapters import AdapterSpec
from taskkd.detection.families import family_of
from taskkd.detection.shared import SharedImages
from taskkd.detection.terms import NeckTerm
from taskkd.errors import TaskkdError
from taskkd.ranks import gather_ranks, join_ranks, whole_loss
from taskkd.terms import Run, Weight

__all__ = [
    "Adapter",
    "Maps",
    "MapsTerm",
    "adapter_of",
    "as_list",
    "channel_moments",
    "family_name",
    "safe_sqrt",
    "strides_of",
    "two_stage",
    "zero",
]

#: one map, or those of several levels
Maps = Tensor | Sequence[Tensor]
Adapter = Literal["auto", "none", "conv1x1", "conv3x3", "conv3x3_relu"]


def as_list(maps: Maps) -> list[Tensor]:
    """The maps of the levels."""
    return [maps] if isinstance(maps, Tensor) else list(maps)


def channel_moments(x: Tensor, *, correction: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Each channel's values less their mean over batch and space, that mean, and the variance.

    `torch.std` and `torch.var_mean` over these dimensions take some ten times as long on a CPU.

    Args:
        x: (N, C, h, w).
        correction: 1: unbiased; a single cell has variance 0.

    Returns:
        (N, C, h, w), (1, C, 1, 1) and (1, C, 1, 1).
    """
    count = x.shape[0] * x.shape[2] * x.shape[3]
    mean = x.mean((0, 2, 3), keepdim=True)
    centred = x - mean
    return centred, mean, centred.square().sum((0, 2, 3), keepdim=True) / max(count - correction, 1)


def safe_sqrt(x: Tensor) -> Tensor:
    """The root, with a gradient of 0 at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def adapter_of(kind: Adapter) -> AdapterSpec | None:
    """The adapter of a kind: "auto": a 1x1 convolution where the numbers of channels differ; "none": none ever.

    "conv3x3_relu" is that of Wang T. et al. 2019 (FGFI), whose weights start near 0.
    """
    if kind == "none":
        return None
    if not kind.startswith("conv3x3"):
        return kind

    def make(student: Tensor, teacher: Tensor) -> nn.Module:
        conv = nn.Conv2d(student.shape[1], teacher.shape[1], 3, padding=1)
        if kind == "conv3x3":
            return conv
        nn.init.trunc_normal_(conv.weight, std=1e-4, a=-2e-4, b=2e-4)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        return nn.Sequential(conv, nn.ReLU())

    return make


def strides_of(images: SharedImages, maps: Sequence[Tensor]) -> list[tuple[float, float]]:
    """How many pixels a cell of each map is high and wide."""
    height, width = images.tensors.shape[2:]
    return [(height / m.shape[2], width / m.shape[3]) for m in maps]


def family_name(model: nn.Module) -> str:
    """The name of a detector's family; empty for other modules."""
    try:
        return family_of(model).name
    except TaskkdError:
        return ""


def two_stage(model: nn.Module) -> bool:
    """Whether a detector has regions of interest."""
    try:
        return "rois" in family_of(model).views
    except TaskkdError:
        return False


class MapsTerm(NeckTerm):
    """A loss of the maps of all levels, `loss(students, teachers, **options)`.

    Args:
        name, student, teacher: see `NeckTerm`.
        loss: of two lists of tensors (N, C, h, w), of one shape at each level.
        options: of the loss.
        gather: on several ranks the loss of the maps of all of them, which must be of one size.
        weight, **others: see `NeckTerm`.
    """

    needs_images = False

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        loss: Callable[..., Tensor],
        options: Mapping[str, Any] | None = None,
        *,
        gather: bool = False,
        weight: Weight = 1.0,
        **others: Any,
    ) -> None:
        super().__init__(name, student, teacher, weight=weight, **others)
        self.loss, self.options, self.gather = loss, dict(options or {}), gather

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        """The loss of all levels."""
        if self.gather:
            students, teachers = [join_ranks(m) for m in students], [gather_ranks(m) for m in teachers]
            return whole_loss(self.loss(students, teachers, **self.options))
        return self.loss(students, teachers, **self.options)


def zero(maps: Sequence[Tensor]) -> Tensor:
    """0 with a path of gradient to the maps."""
    return torch.stack([m.flatten()[:0].sum() for m in maps]).sum()
