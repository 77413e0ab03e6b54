"""IFVD: intra-class feature variation distillation (Wang Y. et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd.errors import ShapeError
from taskkd.losses.primitives import check_mask, full_precision, masked_mean
from taskkd.segmentation.methods.beside import feature_of, soft_terms
from taskkd.segmentation.terms import MapTerm, labels_at
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term

__all__ = ["IntraClass", "class_means", "ifvd", "intra_class_variation"]


def class_means(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Of each image the mean of the pixels of each class, (N, K, C), and how many they are, (N, K); 0 of none.

    Args:
        x: (N, C, h, w).
        labels: (N, h, w); those outside 0 to `classes - 1` are of no class.
        classes: K.
    """
    own = labels.flatten(1)[:, None] == torch.arange(classes, device=labels.device)[:, None]
    member = own.to(x.dtype)
    count = member.sum(2)
    return member @ x.flatten(2).mT / (count[..., None] + 1e-6), count


def _own_cosine(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(N, h w): the cosine of each pixel and the mean of its class; anything where it has none."""
    means, _ = class_means(x, labels, classes)
    own, flat = labels.flatten(1).clamp(0, classes - 1), x.flatten(2)
    # Through the products with all means, which are fewer numbers than each pixel's own mean.
    product = (means @ flat).gather(1, own[:, None])[:, 0]
    norms = torch.linalg.vector_norm(means, dim=2).gather(1, own).clamp(min=1e-8)
    lengths: Tensor = torch.linalg.vector_norm(flat, dim=1).clamp(min=1e-8)
    cosine: Tensor = product / (norms * lengths)
    return cosine


@full_precision
def intra_class_variation(
    student: Tensor, teacher: Tensor, *, labels: Tensor, classes: int, mask: Tensor | None = None
) -> Tensor:
    """`(m_s - m_t)^2`, `m` the cosine of a pixel's features and the mean of its class in its image; mean over pixels.

    Gradient flows through the means, too. Source: Wang Y., Zhou, Jiang, Bai, Xu 2020, "Intra-class Feature Variation
    Distillation for Semantic Segmentation".

    Scaling: a mean, over the pixels that have a class. The authors' code counts ignored pixels too, which add 0: that
    is a `mask` of ones.

    Args:
        student, teacher: (N, C, h, w), alike but for the channels.
        labels: (N, h, w) int64 at the size of the maps; outside 0 to `classes - 1`: ignored.
        classes: how many.
        mask: weights or booleans (N, h, w) or (N,), what counts in the mean; None: pixels that have a class.

    Raises:
        ShapeError: batches, sizes, labels or mask do not fit.
    """
    sizes = [(len(x), *x.shape[2:]) for x in (student, teacher)]
    if student.ndim != 4 or sizes[0] != sizes[1] or labels.shape != torch.Size(sizes[0]):
        raise ShapeError(
            "`intra_class_variation` needs maps (batch, channels, height, width) of one size and labels (batch, "
            f"height, width), got {tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(labels.shape)}."
        )
    if mask is not None:
        check_mask(mask, labels.shape)
    known = (labels >= 0) & (labels < classes)
    apart = _own_cosine(student, labels, classes) - _own_cosine(teacher, labels, classes)
    squares = apart.view(labels.shape).square()
    return masked_mean(torch.where(known, squares, torch.zeros_like(squares)), known if mask is None else mask)


class IntraClass(MapTerm):
    """`intra_class_variation` with the batch's labels.

    Args:
        name, student, teacher: see `MapTerm`.
        classes: how many.
        count: which pixels the mean is over: "labels": those with a label; "none": ignored ones too, of samples that
            have labels at all.
        **options: of `MapTerm`.
    """

    def __init__(
        self,
        name: str,
        student: str,
        teacher: str,
        *,
        classes: int,
        count: Literal["labels", "none"] = "labels",
        **options: Any,
    ) -> None:
        options |= {"labels": "batch.labels", "classes": classes, "ignore": "none"}
        super().__init__(name, intra_class_variation, student, teacher, **options)
        self.count = count

    def _options(self, run: Run, like: Tensor) -> dict[str, Any]:
        labels = labels_at(run.batch, like.shape[2:])
        mask = labelled(run.batch, labels) if self.count == "none" else None
        return {**super()._options(run, like), "labels": labels, "mask": mask}


def labelled(batch: Mapping[str, Any], labels: Tensor) -> Tensor:
    """(N, h, w) bool: the pixels of samples that have labels."""
    free = batch.get("unlabelled")
    every = torch.ones_like(labels, dtype=torch.bool)
    return every if free is None else every & ~free[:, None, None]


def ifvd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Ge(0)] = 50.0,
    kd: Annotated[float, Ge(0)] | None = None,
    temperature: Annotated[float, Gt(0)] = 1.0,
    ignore: Literal["labels", "none"] = "labels",
) -> Method:
    """How far each pixel's features are from the mean of its class: the student's as the teacher's.

    Source: Wang Y., Zhou, Jiang, Bai, Xu 2020, "Intra-class Feature Variation Distillation for Semantic Segmentation",
    with pixel-wise soft targets; their adversarial term (1e-3) is not part of this method. Their paper weighs 50, their
    released command 200, the authors of CIRKD 20. Alone it is no good (58.9 mIoU where the student alone has 69): keep
    `kd`.

    Scaling: a mean over labelled pixels; theirs counts ignored ones, too (`ignore="none"`). Samples without labels do
    not take part. Their soft targets are divided by the classes and weighed 10, that is 10 / classes here.

    Args:
        student, teacher: models with `views.feature` and `views.logits`.
        weight: of the intra-class variation.
        kd: of the soft targets on logits. None: 10 / classes.
        temperature: of the soft targets.
        ignore: the pixels that the mean leaves out.
    """
    classes = len(student.classes)  # type: ignore[arg-type]
    taps = feature_of(student, "student"), feature_of(teacher, "teacher")
    terms: list[Term] = [IntraClass("variation", *taps, classes=classes, count=ignore, weight=weight)]
    terms += soft_terms(student, teacher, 10.0 / classes if kd is None else kd, temperature)
    return Method("ifvd", [Stage("distil", terms)], ("labels",))
