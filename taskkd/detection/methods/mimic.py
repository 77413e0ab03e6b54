"""Mimic: features imitated inside proposals (Li, Jin, Yan 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd import losses
from taskkd.detection.families import family_of
from taskkd.detection.methods.maps import Adapter, adapter_of, strides_of, two_stage, zero
from taskkd.detection.pooling import levels_of, pool_own_level
from taskkd.detection.regions import box_sums
from taskkd.detection.responses import check_predictions
from taskkd.detection.terms import DetectionTerm, NeckTerm
from taskkd.errors import RecipeError
from taskkd.losses.primitives import check_same_shape, full_precision
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term, Weight

__all__ = ["HeadMimic", "MimicTerm", "Proposals", "RpnLosses", "mimic", "mimic_loss"]

Normalise = Literal["elements", "none"]
Proposals = Literal["student", "teacher", "gt"]


@full_precision
def mimic_loss(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], *, normalise: Normalise = "elements"
) -> Tensor:
    """`1 / (2 N) sum_i |t_i - s_i|^2 / m_i` over `N` regions; `m_i` is the number of elements of a region's features.

    Source: Li, Jin, Yan 2017, "Mimicking Very Efficient Network for Object Detection". No regions: 0.

    Args:
        student, teacher: (N, C, h, w), or a list of (C, h_i, w_i).
        normalise: "elements"; "none": `m_i = 1`, their form for features pooled to one size.

    Raises:
        ShapeError: shapes differ.
    """
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        check_same_shape(student, teacher, "mimic_loss")
        sums = (student - teacher).square().flatten(1).sum(1)
        return _over_regions(sums, sums.new_full(sums.shape, student[:1].numel()), normalise)
    each = []
    for s, t in zip(student, teacher, strict=True):
        check_same_shape(s, t, "mimic_loss")
        each.append((s - t).square().sum())
    sums = torch.stack(each)
    return _over_regions(sums, sums.new_tensor([s.numel() for s in student]), normalise)


def _over_regions(sums: Tensor, elements: Tensor, normalise: Normalise) -> Tensor:
    """Half the mean over regions of the sums of squares (R,), of so many elements each."""
    each = sums / elements.clamp(min=1) if normalise == "elements" else sums
    return each.sum() / (2 * max(len(each), 1))


class MimicTerm(NeckTerm):
    """`mimic_loss` of what a pair of detectors has inside proposals.

    Each proposal is looked at on the level of its size.

    Args:
        name, student, teacher: see `NeckTerm`.
        proposals: the "student"'s (those that it sampled; of one stage: its predictions and the ground truth), the
            "teacher"'s own, or the ground truth, "gt".
        pool: cells of a side that proposals are pooled to; None: all cells of each.
        normalise: see `mimic_loss`.
        limit: of an image's proposals, for the teacher's.
        weight, neck, teacher_neck, adapter, count: see `NeckTerm`.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        proposals: Proposals = "student",
        pool: int | None = 7,
        normalise: Normalise = "elements",
        limit: int = 256,
        weight: Weight = 1.0,
        neck: Sequence[str] | None = None,
        teacher_neck: Sequence[str] | None = None,
        adapter: Adapter = "conv1x1",
        count: int | None = None,
    ) -> None:
        own, other = (("regions",) if proposals == "student" else ()), ()
        if proposals == "teacher":
            other = ("proposals",) if two_stage(teacher) else ("dense",)  # type: ignore[assignment]
        super().__init__(
            name,
            student,
            teacher,
            neck=neck,
            teacher_neck=teacher_neck,
            adapter=adapter_of(adapter),
            student_views=own,
            teacher_views=other,
            weight=weight,
            count=count,
        )
        self.proposals, self.pool, self.limit = proposals, pool, limit
        self.normalise: Normalise = normalise

    @torch.no_grad()
    def regions(self, run: Run) -> list[Tensor]:
        """Of each image the boxes (r, 4) that are looked at, in pixels of the student's images."""
        images = self.images(run)
        if self.proposals == "gt":
            return images.boxes
        if self.proposals == "student":
            return self.student_views(run).regions
        views = self.teacher_views(run)
        if "proposals" in views.family.views:
            found = [boxes[: self.limit] for boxes in views.proposals]
        else:
            from taskkd.detection.sampling import own_regions

            found = own_regions(views.dense, views.images, count=self.limit)
        (h, w), (height, width) = images.tensors.shape[2:], views.images.tensors.shape[2:]
        by = images.tensors.new_tensor([w / width, h / height, w / width, h / height])
        return [boxes * by for boxes in found]

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        """The loss of all regions."""
        images, boxes = self.images(run), self.regions(run)
        if not any(len(b) for b in boxes):
            return zero([s.float() for s in students])
        boxes = [b.detach().to(images.tensors.dtype) for b in boxes]
        if self.pool is not None:
            height, width = images.tensors.shape[2:]
            pooled = [
                pool_own_level(side, boxes, (int(height), int(width)), self.pool) for side in (students, teachers)
            ]
            return mimic_loss(*pooled, normalise=self.normalise)
        return mimic_crops(students, teachers, boxes, strides_of(images, students), self.normalise)


@full_precision
def mimic_crops(
    students: list[Tensor],
    teachers: list[Tensor],
    boxes: list[Tensor],
    strides: list[tuple[float, float]],
    normalise: Normalise,
) -> Tensor:
    """`mimic_loss` of all cells that each box covers on the map of its level, without cropping one by one.

    Args:
        students, teachers: (N, C, h, w) of each level.
        boxes: of each image (r, 4), in pixels.
        strides: of rows and columns, of each level.
        normalise: see `mimic_loss`.
    """
    level = torch.split(levels_of(torch.cat(boxes), [s[0] for s in strides]), [len(b) for b in boxes])
    sums, elements = [], []
    for i, (s, t, stride) in enumerate(zip(students, teachers, strides, strict=True)):
        own = [b[at == i] for b, at in zip(boxes, level, strict=True)]
        found, cells = box_sums((s - t).square().sum(1), own, stride)
        sums.append(found)
        elements.append(cells * s.shape[1])
    return _over_regions(torch.cat(sums), torch.cat(elements), normalise)


class RpnLosses(Term):
    """The task losses of a two-stage student's first stage alone.

    Args:
        name, weight: see `Term`.
    """

    def __init__(self, name: str = "rpn", weight: Weight = 1.0) -> None:
        super().__init__(name, weight)

    def forward(self, run: Run) -> Tensor:
        total: Tensor = run.output["loss_objectness"] + run.output["loss_rpn_box_reg"]
        return total


class HeadMimic(DetectionTerm):
    """Mean squared differences of the second stage's class logits and box regressions on the same regions, summed.

    Args:
        name, student, teacher, weight: see `DetectionTerm`.
    """

    def __init__(self, name: str, student: nn.Module, teacher: nn.Module, *, weight: Weight = 1.0) -> None:
        views = ("rois",)
        super().__init__(name, student, teacher, student_views=views, teacher_views=views, weight=weight)

    def forward(self, run: Run) -> Tensor:
        own, other = self.student_views(run).rois, self.teacher_views(run).rois
        check_predictions(self.name, own.logits, other.logits, instead="head_weight=0 leaves this term out")
        pairs = (own.logits, other.logits), (own.deltas, other.deltas)
        return torch.stack([losses.mse(s, t) for s, t in pairs]).sum()


def mimic(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Ge(0)] | Literal["auto"] = "auto",
    proposals: Proposals = "student",
    pool: Annotated[int, Gt(0)] | None = 7,
    normalise: Normalise = "elements",
    stages: Literal[1, 2] = 1,
    head_weight: Annotated[float, Ge(0)] = 0.0,
    adapter: Adapter = "conv1x1",
    neck: list[str] | None = None,
    teacher_neck: list[str] | None = None,
) -> Method:
    """Features imitated inside proposals, through a 1x1 convolution.

    Source: Li, Jin, Yan 2017. They have one map; on a pyramid each proposal is looked at on the level of its size. The
    weight of the term is not known, but that it was chosen so that both losses are of one size: "auto" makes it pull as
    hard at the student as the task does. "Mimic over scales", a teacher that sees larger images, is the teacher's
    `size`; their student's map is enlarged by a deconvolution, ours is not: the teacher's is resized to it.

    With `stages=2` the first half of the epochs trains backbone and first stage on its own losses and the term, the
    second half all of the student on all losses; only then `head_weight` counts.

    Args:
        student, teacher: detectors; any modules with `neck` and `proposals` "gt".
        weight: of the features.
        proposals, pool, normalise: see `MimicTerm`. Their forms are `pool=7, normalise="none"` and `pool=None,
            normalise="elements"`.
        stages: 1: the features are imitated beside the whole task. 2: as above, for two-stage students.
        head_weight: of the L2 of class logits and box regressions, two-stage detectors only.
        adapter: see `taskkd.detection.methods.maps.adapter_of`.
        neck, teacher_neck: taps of maps, paired in order; None: those of the detector's family.

    Raises:
        RecipeError: two stages, or the head, are asked for of a detector that has one stage.
    """
    if (stages == 2 or head_weight > 0) and not (two_stage(student) and (head_weight == 0 or two_stage(teacher))):
        raise RecipeError(
            "mimic: stages=2 needs a student of two stages (Faster or Mask R-CNN), head_weight a teacher of two, too; "
            f"the student is a {family_of(student).name}, the teacher a {family_of(teacher, 'teacher').name}."
        )
    options: dict[str, Any] = {"proposals": proposals, "pool": pool, "normalise": normalise, "adapter": adapter}
    options |= {"neck": neck, "teacher_neck": teacher_neck}
    features = MimicTerm("mimic", student, teacher, weight=weight, **options)
    head = [HeadMimic("head", student, teacher, weight=head_weight)] if head_weight > 0 else []
    if stages == 1:
        return Method("mimic", [Stage("distil", [features, *head])], ("labels",))
    first = Stage("rpn", [RpnLosses(), features], 0.0, trains=("backbone", "rpn"), share=0.5, keep="last")
    return Method("mimic", [first, Stage("detector", head, share=0.5)], ("labels",))
