"""Terms whose paper has several losses on the same adapter or memory, each with its own weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from taskkd.errors import ShapeError, TapError
from taskkd.segmentation.terms import Align, resized
from taskkd.terms import Run, Term, Weight

__all__ = ["PartsTerm", "as_weights", "placed"]


def placed(module: nn.Module, like: Tensor) -> nn.Module:
    """`module` on the device of `like`, in fp32, or fp64 with it."""
    return module.to(like.device, torch.promote_types(like.dtype, torch.float32))


def as_weights(x: Tensor, module: nn.Module) -> Tensor:
    """`x` in the precision of a module's weights, which stay fp32 under a half-precision student."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(next(module.parameters()).dtype)


class PartsTerm(Term):
    """The weighted sum of several losses of two maps at one size. Subclasses define `parts(run)`.

    Args:
        name, weight: see `Term`.
        student, teacher: taps of maps (batch, channels, h, w).
        weights: name of a part -> its weight; a part of weight 0 may be left out by `parts`.
        align: to whose size, see `MapTerm`.
    """

    columns = ("labels", "valid", "unlabelled")

    def __init__(
        self,
        name: str,
        student: str,
        teacher: str,
        *,
        weights: Mapping[str, float],
        align: Align = "teacher",
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, weight)
        self.student_taps, self.teacher_taps = (student,), (teacher,)
        self.weights, self.align = dict(weights), align

    def maps(self, run: Run) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's map at one size, the teacher's without gradient.

        Raises:
            TapError: a tap gives no tensor.
            ShapeError: a tensor is no map.
        """
        found = []
        for side, values, tap in (
            ("student", run.student, self.student_taps[0]),
            ("teacher", run.teacher, self.teacher_taps[0]),
        ):
            x = values.get(tap)
            if not isinstance(x, Tensor):
                raise TapError(f"term {self.name!r}: the {side}'s tap {tap!r} gives no tensor.")
            if x.ndim != 4:
                raise ShapeError(
                    f"term {self.name!r}: the {side}'s tap {tap!r} is no map (batch, channels, height, width), but "
                    f"{tuple(x.shape)}."
                )
            found.append(x)
        s, t = found
        sizes = {"student": s.shape[2:], "teacher": t.shape[2:]}
        sizes["smaller"] = min(sizes.values(), key=lambda size: size[0] * size[1])
        return resized(s, sizes[self.align]), resized(t.detach(), sizes[self.align])

    def parts(self, run: Run) -> Mapping[str, Tensor]:
        """The value of each part."""
        raise NotImplementedError

    def forward(self, run: Run) -> Tensor:
        try:
            found = self.parts(run)
        except ShapeError as error:
            raise ShapeError(f"term {self.name!r}: {error}") from None
        return torch.stack([self.weights[name] * value for name, value in found.items()]).sum()
