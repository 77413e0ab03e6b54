"""FGFI: imitation of features near objects (Wang T. et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.detection.families import family_of
from taskkd.detection.methods.maps import Adapter, Maps, adapter_of, as_list, strides_of, zero
from taskkd.detection.regions import fgfi_masks, inside_boxes
from taskkd.detection.terms import NeckTerm
from taskkd.errors import TaskkdError
from taskkd.losses.primitives import check_same_shape, full_precision, safe_divide
from taskkd.stages import Method, Stage
from taskkd.terms import Run

__all__ = ["FineGrained", "fgfi", "fgfi_loss"]


@full_precision
def fgfi_loss(
    student: Maps, teacher: Maps, *, masks: Maps, normalise: Literal["cells", "elements"] = "cells"
) -> Tensor:
    """`sum M (s - t)^2 / (2 sum M)` over all cells and levels; the sum of squares is over channels.

    Source: Wang T., Yuan, Zhang, Feng 2019, "Distilling Object Detectors with Fine-grained Feature Imitation", who have
    one level and one image; with several, cells of all count alike. No cells: 0, where their code gives NaN.

    Args:
        student, teacher: (N, C, h, w), or lists of the levels.
        masks: (N, h, w), or a list.
        normalise: what `sum M` counts: "cells", or "elements", `C` times as many (the port in DeFeat's code).

    Raises:
        ShapeError: shapes differ.
    """
    pairs = list(zip(as_list(student), as_list(teacher), as_list(masks), strict=True))
    sums, counts = zero(as_list(student)), zero(as_list(teacher))
    for s, t, mask in pairs:
        check_same_shape(s, t, "fgfi_loss")
        weight = mask.to(s.dtype)
        sums = sums + ((s - t).square().sum(1) * weight).sum()
        counts = counts + weight.sum() * (s.shape[1] if normalise == "elements" else 1)
    return safe_divide(sums, 2 * counts)


class FineGrained(NeckTerm):
    """`fgfi_loss` in the cells that `regions.fgfi_masks` finds with the student's own anchors.

    Args:
        name, student, teacher, **others: see `NeckTerm`.
        region: "anchors"; "boxes": the cells inside a box; "auto": anchors where the student has some.
        psi, plus_one, assign: see `regions.fgfi_masks`.
        normalise: see `fgfi_loss`.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        region: Literal["auto", "anchors", "boxes"] = "auto",
        psi: float = 0.5,
        plus_one: bool = False,
        assign: bool = True,
        normalise: Literal["cells", "elements"] = "cells",
        neck: Sequence[str] | None = None,
        teacher_neck: Sequence[str] | None = None,
        adapter: Adapter = "conv3x3",
        weight: float = 1.0,
    ) -> None:
        views = () if neck is not None else family_of(student).views
        self_view = next((v for v in ("rpn", "dense") if v in views), None) if region != "boxes" else None
        if region == "anchors" and self_view is None:
            raise TaskkdError(
                f"term {name!r}: the student has no anchors that are known; region='boxes' takes the cells in boxes."
            )
        super().__init__(
            name,
            student,
            teacher,
            neck=neck,
            teacher_neck=teacher_neck,
            adapter=adapter_of(adapter),
            student_views=(self_view,) if self_view else (),
            weight=weight,
        )
        self.view = self_view
        self.psi, self.plus_one, self.assign = psi, plus_one, assign
        self.normalise: Literal["cells", "elements"] = normalise

    def masks(self, maps: Sequence[Tensor], run: Run) -> list[Tensor]:
        """(N, h, w) bool for each of the maps."""
        images = self.images(run)
        strides = strides_of(images, maps)
        finest = 14 * min(min(s) for s in strides)
        if self.view is None:
            shapes = [(m.shape[2], m.shape[3]) for m in maps]
            return inside_boxes(images.boxes, shapes, strides, finest=finest if self.assign else None)
        view = self.student_views(run).get(self.view)
        anchors = view.anchors[0].split(view.level_sizes)
        own = [i for i, _ in self.levels]
        found = fgfi_masks(
            images.boxes,
            [anchors[i] for i in own],
            [view.shapes[i] for i in own],
            psi=self.psi,
            plus_one=self.plus_one,
            assign=self.assign,
            finest=finest,
        )
        return [_at(mask, m) for mask, m in zip(found, maps, strict=True)]

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        """The loss of all levels."""
        return fgfi_loss(students, teachers, masks=self.masks(students, run), normalise=self.normalise)


def _at(mask: Tensor, like: Tensor) -> Tensor:
    """A mask at the size of a map."""
    if mask.shape[1:] == like.shape[2:]:
        return mask
    return F.interpolate(mask[:, None].float(), size=[like.shape[2], like.shape[3]])[:, 0] > 0


def fgfi(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Ge(0)] = 0.01,
    psi: Annotated[float, Interval(ge=0, le=1)] = 0.5,
    region: Literal["auto", "anchors", "boxes"] = "auto",
    assign: bool = True,
    plus_one: bool = False,
    normalise: Literal["cells", "elements"] = "cells",
    adapter: Adapter = "conv3x3",
    neck: list[str] | None = None,
    teacher_neck: list[str] | None = None,
) -> Method:
    """Features imitated near objects: where an anchor overlaps a box nearly as much as the best anchor does.

    Source: Wang T. et al. 2019 (FGFI; one map of stride 16), over the levels of an FPN as in Guo et al. 2021 (DeFeat).
    `adapter="conv3x3_relu", plus_one=True` is the authors' code; their maps come out of a ReLU, those of an FPN do not,
    so the default is DeFeat's adapter. They leave the term out for the first 400 of their iterations and clip gradients
    to 10 (`training.max_grad_norm`).

    Args:
        student, teacher: detectors; any modules with `neck`, and then `region` "boxes".
        weight: the authors' lambda; with `normalise="elements"` a weight must be as many times larger as there are
            channels.
        psi: see `regions.fgfi_masks`.
        region: see `FineGrained`.
        assign: each box counts on the level of its size; False: on all, the best anchor being that of all levels.
        plus_one: a pixel has width 1 in overlaps.
        normalise: see `fgfi_loss`.
        adapter: see `taskkd.detection.methods.maps.adapter_of`.
        neck, teacher_neck: taps of maps, paired in order; None: those of the detector's family.
    """
    term = FineGrained(
        "imitation",
        student,
        teacher,
        region=region,
        psi=psi,
        plus_one=plus_one,
        assign=assign,
        normalise=normalise,
        neck=neck,
        teacher_neck=teacher_neck,
        adapter=adapter,
        weight=weight,
    )
    return Method("fgfi", [Stage("distil", [term])], ("labels",))
