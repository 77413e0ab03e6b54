"""The towers of convolutions in the heads of one-stage detectors: where they are tapped, and the frozen rest of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import RecipeError

__all__ = ["Cut", "FrozenHead", "box_activation", "branch_of", "called", "flat_predictions"]


@dataclass(frozen=True)
class Cut:
    """One branch of a head: a tower that is run at each level, and the convolution that predicts.

    Args:
        taps: where the tower is tapped, one for each level, finest first; no taps: the maps of the neck themselves.
        rest: what comes after the tap, in order.
        channels: predicted for each anchor.
    """

    taps: tuple[str, ...]
    rest: tuple[nn.Module, ...]
    channels: int


class FrozenHead:
    """The rest of a teacher's branch, from a tapped feature to predictions; gradients flow through it to its input.

    It is no module, so that it is in nobody's `parameters()` or `state_dict()`; copies share it. Its first part may
    work in place on what it is given.
    """

    def __init__(self, parts: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.parts = list(parts)
        for module in self._modules:
            module.requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenHead:
        return self

    @property
    def _modules(self) -> list[nn.Module]:
        return [part for part in self.parts if isinstance(part, nn.Module)]

    def __call__(self, x: Tensor) -> Tensor:
        for module in self._modules:
            if module.training:  # somebody holds the teacher and called train() on it
                module.eval()
            weight = next(module.parameters(), None)
            if weight is not None and weight.device != x.device:
                module.to(x.device)
        for part in self.parts:
            weight = next(part.parameters(), None) if isinstance(part, nn.Module) else None
            if weight is not None and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                x = x.to(weight.dtype)
            x = part(x)
        return x


def called(model: nn.Module) -> str:
    """The architecture of a detector, for errors."""
    return str(getattr(getattr(model, "kind", None), "title", type(model).__name__))


def branch_of(model: nn.Module, kind: Literal["classification", "box"], convolutions: int, who: str) -> Cut:
    """A branch of torchvision's RetinaNet or FCOS, cut before the activation after its first `convolutions`.

    Args:
        model: the detector.
        kind: which branch.
        convolutions: how many of the tower's convolutions, with their norm, come before the cut; 0: none.
        who: in errors.

    Raises:
        RecipeError: the detector has no such towers, or fewer convolutions.
    """
    from torchvision.models import detection as tv

    if not isinstance(model, tv.RetinaNet | tv.FCOS):
        raise RecipeError(
            f"crosskd: the head of the {who} ({called(model)}) has no tower of convolutions to cut; those of RetinaNet "
            "and FCOS have. For other pairs: bckd, gid, or methods of the neck such as pearson_kd."
        )
    path = "head.classification_head" if kind == "classification" else "head.regression_head"
    head = model.get_submodule(path)
    leaves = [(name, m) for name, m in head.get_submodule("conv").named_modules() if not list(m.children())]
    starts = [i for i, (_, m) in enumerate(leaves) if isinstance(m, nn.Conv2d)]
    if not 0 <= convolutions <= len(starts):
        raise RecipeError(
            f"crosskd: `convolutions` is {convolutions}, the {who}'s {kind} tower has {len(starts)}; expected 0 to "
            f"{len(starts)}."
        )
    cut = 0
    if convolutions:
        cut = [*starts, len(leaves)][convolutions]
        cut -= not leaves[cut - 1][1].state_dict()  # the activation belongs to the rest
    levels = len(model.anchor_generator.sizes)
    tapped = f"{path}.conv.{leaves[cut - 1][0]}"
    taps = tuple(f"{tapped}@{i}" for i in range(levels)) if convolutions else ()
    last = head.get_submodule("cls_logits" if kind == "classification" else "bbox_reg")
    channels = int(head.num_classes) if kind == "classification" else 4
    return Cut(taps, (*(m for _, m in leaves[cut:]), last), channels)


def flat_predictions(maps: Sequence[Tensor], channels: int) -> Tensor:
    """Maps (N, anchors per cell * channels, h, w) of all levels as (N, A, channels), in torchvision's order."""
    cells = [m.reshape(len(m), -1, channels, *m.shape[2:]) for m in maps]
    flat = [m.permute(0, 3, 4, 1, 2).flatten(1, 3) for m in cells]
    return torch.cat(flat, 1)


def box_activation(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], ...]:
    """What a detector does to its raw box predictions before they count as regression: FCOS's ReLU."""
    from torchvision.models import detection as tv

    return (F.relu,) if isinstance(model, tv.FCOS) else ()
