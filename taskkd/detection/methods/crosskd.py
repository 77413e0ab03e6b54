"""CrossKD (Wang J. et al. 2023): the student's head features go through the rest of the teacher's head."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from taskkd.adapters import build_adapter
from taskkd.detection.methods.dense_losses import box_overlap, quality_focal
from taskkd.detection.methods.maps import channel_moments, safe_sqrt
from taskkd.detection.methods.towers import FrozenHead, box_activation, branch_of, flat_predictions
from taskkd.detection.shared import SharedImages
from taskkd.detection.terms import DetectionTerm
from taskkd.detection.views import Dense
from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_same_shape, full_precision
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Weight

__all__ = ["Branch", "CrossHead", "centredness", "counted", "crosskd", "positives", "proper", "standardise_like"]

Branch = Literal["classification", "box"]
#: torchvision's mark of an anchor whose overlap is between the thresholds: neither positive nor negative
BETWEEN = -2


@full_precision
def standardise_like(student: Tensor, teacher: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The student's map with the mean and standard deviation that the teacher's has, channel by channel.

    `(s - mean(s)) / (std(s) + eps) * std(t) + mean(t)`, over batch, height and width, unbiased. Source: CrossKD.

    Args:
        student, teacher: (N, C, h, w).
        eps: added to the student's deviation.

    Raises:
        ShapeError: the shapes differ.

    Example:
        >>> s, t = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2), torch.tensor([3.0, 7.0]).reshape(1, 1, 1, 2)
        >>> [round(x, 3) for x in standardise_like(s, t).flatten().tolist()]
        [3.0, 7.0]
    """
    check_same_shape(student, teacher, "standardise_like")
    centred, _, variance = channel_moments(student)
    _, teacher_mean, teacher_variance = channel_moments(teacher.detach())
    return centred / (safe_sqrt(variance) + eps) * safe_sqrt(teacher_variance) + teacher_mean


def _centres(anchors: Tensor) -> Tensor:
    """(A, 2), in fp32 at least: under autocast anchors are in half precision."""
    full = anchors.to(torch.promote_types(anchors.dtype, torch.float32))
    return (full[:, :2] + full[:, 2:]) / 2


def counted(dense: Dense, images: SharedImages) -> tuple[Tensor, Tensor]:
    """(N, A): what the detector's assigner gives each anchor; and whether it counts: not ignored, not in padding."""
    matched = dense.match(images.boxes)
    centres = torch.stack([_centres(a) for a in dense.anchors])
    sizes = centres.new_tensor([(w, h) for h, w in images.sizes])[:, None]
    return matched, (matched != BETWEEN) & (centres < sizes).all(-1)


def positives(matched: Tensor, counts: Tensor) -> Tensor:
    """The number of positive anchors of a batch, at least one for each image."""
    return ((matched >= 0) & counts).sum().clamp(min=len(matched))


def centredness(dense: Dense, matched: Tensor, boxes: list[Tensor]) -> Tensor:
    """(N, A): how central a positive point lies in its box, 0 to 1, as FCOS trains its centre-ness; 0 elsewhere.

    Args:
        dense: for its anchors, whose centres are the points.
        matched: (N, A) index of each point's box.
        boxes: of each image (n, 4).
    """
    found = []
    for anchors, index, given in zip(dense.anchors, matched, boxes, strict=True):
        points, positive = _centres(anchors), index >= 0
        own, value = given.to(points.dtype)[index[positive]], points.new_zeros(len(anchors))
        low, high = points[positive] - own[:, :2], own[:, 2:] - points[positive]
        value[positive] = (torch.minimum(low, high) / torch.maximum(low, high)).clamp(min=0).prod(-1).sqrt()
        found.append(value)
    return torch.stack(found)


def proper(boxes: Tensor) -> Tensor:
    """(...): whether boxes (..., 4) have an area; that of a teacher says nothing otherwise."""
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


class CrossHead(DetectionTerm):
    """The student's feature in a head's tower, aligned, through the rest of the teacher's; compared with the teacher.

    The classification branch: `quality_focal` over all anchors. The box branch: `box_overlap` of decoded boxes,
    weighted by the teacher's largest class probability. Both are divided by the number of positives of the teacher's
    own assigner, or for FCOS by the sum of their centredness; at least by the number of images.

    Args:
        name, weight: see `Term`.
        student, teacher: torchvision's RetinaNet or FCOS. Where their towers differ in width, a 1x1 convolution (one
            for all levels, as the towers are) brings the student's to the teacher's.
        branch: which.
        convolutions: how many convolutions of the tower come before the cut, on both sides.
        beta: of `quality_focal`.
        boxes: of `box_overlap`.

    Raises:
        RecipeError: a detector has no such towers.
        ShapeError: the maps of both sides differ in number or size.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        branch: Branch,
        convolutions: int = 3,
        beta: float = 1.0,
        boxes: Literal["giou", "iou"] = "giou",
        weight: Weight = 1.0,
    ) -> None:
        own = branch_of(student, branch, convolutions, "student")
        other = branch_of(teacher, branch, convolutions, "teacher")
        super().__init__(
            name, student, teacher, student_views=("neck",), teacher_views=("neck", "dense"), weight=weight
        )
        self.tower_taps, self.teacher_tower_taps = own.taps, other.taps
        self.student_taps = (*self.student_taps, *own.taps)
        self.teacher_taps = (*self.teacher_taps, *other.taps)
        self.branch, self.beta, self.boxes, self.channels = branch, beta, boxes, other.channels
        self.head = FrozenHead([*other.rest, *(box_activation(teacher) if branch == "box" else ())])
        self.adapters = nn.ModuleList()

    @property
    def built(self) -> bool:
        return len(self.adapters) > 0

    def build(self, run: Run) -> None:
        """Make the adapter where the towers differ in width."""
        if not self.built:
            students, teachers = self._features(run)
            same = students[0].shape[1] == teachers[0].shape[1]
            adapter = build_adapter(nn.Identity() if same else "conv1x1", students[0], teachers[0])
            adapter = adapter.to(students[0].device)
            self.adapters.append(adapter.double() if students[0].dtype == torch.float64 else adapter)

    def _features(self, run: Run) -> tuple[list[Tensor], list[Tensor]]:
        """The towers' features of student and teacher, level by level."""
        own = [run.student[t] for t in self.tower_taps] or self.student_views(run).neck
        other = [run.teacher[t] for t in self.teacher_tower_taps] or self.teacher_views(run).neck
        sizes = [[tuple(m.shape[2:]) for m in maps] for maps in (own, other)]
        if sizes[0] != sizes[1]:
            raise ShapeError(
                f"term {self.name!r}: the heads' maps are {sizes[0]} of the student and {sizes[1]} of the teacher; "
                "crosskd needs the same levels and, for the teacher, images of the same size."
            )
        return own, other

    def predictions(self, run: Run) -> Tensor:
        """(N, A, channels): what the teacher's head predicts from the student's features."""
        students, teachers = self._features(run)
        adapter = self.adapters[0]
        aligned = [standardise_like(adapter(s), t) for s, t in zip(students, teachers, strict=True)]
        return flat_predictions([self.head(x) for x in aligned], self.channels)

    def forward(self, run: Run) -> Tensor:
        crossed, dense = self.predictions(run), self.teacher_views(run).dense
        matched, counts = counted(dense, self.student_views(run).images)
        number = positives(matched, counts)
        if dense.quality is not None:
            central = centredness(dense, matched, self.student_views(run).images.boxes) * counts
            number = central.sum().clamp(min=len(matched))
        if self.branch == "classification":
            own, other = crossed[..., dense.first :], dense.logits[..., dense.first :]
            return quality_focal(own, other, beta=self.beta, weights=counts, divisor=number)
        boxes = dense.decode()
        certain = dense.probabilities().amax(-1) * (counts & proper(boxes))
        return box_overlap(dense.decode(crossed), boxes, kind=self.boxes, weights=certain, divisor=number)


def crosskd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    convolutions: Annotated[int, Ge(0)] | None = None,
    class_weight: Annotated[float, Ge(0)] | None = None,
    box_weight: Annotated[float, Ge(0)] | None = None,
    boxes: Literal["giou", "iou"] | None = None,
    beta: Annotated[float, Ge(0)] = 1.0,
    task_weight: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """Task loss + what the teacher's head makes of the student's features, compared with what it makes of its own.

    Source: Wang J. et al. 2023, "CrossKD: Cross-Head Knowledge Distillation for Object Detection". So labels and
    teacher do not pull at the same predictions. The defaults (None) are the paper's for the teacher's family: RetinaNet
    cut after 3 convolutions, weights 1 and 1, GIoU; FCOS after 2, weights 0.4 and 0.75, IoU.

    Scaling: divided by the positives, for FCOS by the sum of their centredness, as the authors do, but at least by the
    number of images (theirs: by 1, for FCOS by 1e-6). Anchors in padding, anchors that the assigner ignores and boxes
    of the teacher without area do not count.

    Args:
        student, teacher: torchvision's RetinaNet or FCOS, with as many levels.
        convolutions: how many convolutions of the towers are the student's; the rest is the teacher's.
        class_weight, box_weight: of the two branches; 0: left out.
        boxes: how boxes are compared.
        beta: of the focal factor.
        task_weight: of the detector's own loss.

    Raises:
        RecipeError: a detector has no such towers, or fewer convolutions.
    """
    from torchvision.models import detection as tv

    defaults: tuple[int, float, float, Literal["giou", "iou"]] = (3, 1.0, 1.0, "giou")
    if isinstance(teacher, tv.FCOS):
        defaults = (2, 0.4, 0.75, "iou")
    cut = defaults[0] if convolutions is None else convolutions
    weights: dict[Branch, float] = {
        "classification": defaults[1] if class_weight is None else class_weight,
        "box": defaults[2] if box_weight is None else box_weight,
    }
    kind = defaults[3] if boxes is None else boxes
    terms = [
        CrossHead(f"cross-{branch}", student, teacher, branch=branch, convolutions=cut, beta=beta, boxes=kind, weight=w)
        for branch, w in weights.items()
        if w > 0
    ]  # fmt: skip
    return Method("crosskd", [Stage("distil", terms, task_weight)], ("labels",))
