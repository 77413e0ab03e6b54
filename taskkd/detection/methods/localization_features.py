"""Feature imitation beside localization distillation: maps compared near the boxes of the ground truth alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.detection.methods.maps import Maps, as_list
from taskkd.detection.methods.vlr import fine_grained_region, inside_region, square_anchors, vlr_weights
from taskkd.detection.shared import SharedImages
from taskkd.detection.terms import NeckTerm
from taskkd.losses.primitives import check_same_shape, full_precision, masked_mean
from taskkd.terms import Run

__all__ = ["Region", "RegionImitation", "anchors_of", "region_imitation"]

Region = Literal["fine_grained", "inside", "vlr"]
Normalise = Literal["sum_w", "authors"]


@full_precision
def region_imitation(student: Maps, teacher: Maps, *, regions: Maps, normalise: Normalise = "sum_w") -> Tensor:
    """Mean squared difference over the cells of a region and their channels.

    Source: Zheng et al. 2022, "Localization Distillation for Dense Object Detection", the imitation beside LD.

    Scaling: the mean is over the cells of all levels; the released code takes the mean of each level and adds these up
    (`normalise="authors"`; it also leaves out levels without a positive anchor, which this does not).

    Args:
        student, teacher: (N, C, h, w), or lists of the levels.
        regions: (N, h, w), above 0 in the region, or a list.
        normalise: "sum_w" or "authors".

    Returns:
        A scalar; 0 where there is no region.

    Raises:
        ShapeError: shapes differ.
    """
    squares, inside = [], []
    for s, t, region in zip(as_list(student), as_list(teacher), as_list(regions), strict=True):
        check_same_shape(s, t, "region_imitation")
        squares.append((s - t).square().mean(1).flatten())
        inside.append((region > 0).flatten())
    if normalise == "authors":
        return torch.stack([masked_mean(*level) for level in zip(squares, inside, strict=True)]).sum()
    return masked_mean(torch.cat(squares), torch.cat(inside))


def anchors_of(
    shapes: Sequence[tuple[int, int]], images: SharedImages, *, strides: Sequence[float] | None, scale: float
) -> Tensor:
    """(A, 4): GFL's anchors, one square at each cell of all levels.

    Args:
        shapes: (height, width) of each level.
        images: that the maps are of.
        strides: of the levels; None: the power of two nearest to image height / map height.
        scale: side of an anchor in strides.
    """
    height = images.tensors.shape[2]
    each = strides or [2.0 ** round(math.log2(height / h)) for h, _ in shapes]
    return square_anchors(shapes, each, scale=scale).to(images.tensors.device)


class RegionImitation(NeckTerm):
    """`region_imitation` of the neck's maps, at the cells whose anchors (one square each, as GFL's) are in the region.

    Padding does not count.

    Args:
        name, student, teacher, **others: see `NeckTerm`.
        region: "fine_grained": anchors that overlap a box more than half as much as the one that overlaps it most;
            "inside": whose centre lies in a box; "vlr": the valuable localization region.
        anchor_scale: side of an anchor in strides.
        legacy_iof: see `vlr_weights`.
        normalise: see `region_imitation`.
    """

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        region: Region = "fine_grained",
        anchor_scale: float = 8.0,
        legacy_iof: bool = False,
        normalise: Normalise = "sum_w",
        **others: Any,
    ) -> None:
        super().__init__(name, student, teacher, **others)
        self.region, self.anchor_scale, self.legacy_iof, self.normalise = region, anchor_scale, legacy_iof, normalise

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        """The loss of all levels."""
        shapes = [(m.shape[2], m.shape[3]) for m in students]
        regions = self.regions(shapes, self.images(run))
        return region_imitation(students, teachers, regions=regions, normalise=self.normalise)

    @torch.no_grad()
    def regions(self, shapes: list[tuple[int, int]], images: SharedImages) -> list[Tensor]:
        """(N, h, w) of each level, above 0 in the region."""
        anchors = anchors_of(shapes, images, strides=None, scale=self.anchor_scale)
        sizes, found = [h * w for h, w in shapes], []
        for boxes in images.boxes:
            own = boxes.to(anchors.dtype)
            if self.region == "vlr":
                found.append(vlr_weights(anchors, own, sizes, legacy_iof=self.legacy_iof))
            else:
                found.append((fine_grained_region if self.region == "fine_grained" else inside_region)(anchors, own))
        inside = images.inside().float()
        return [
            level.reshape(-1, *shape) * F.interpolate(inside, size=list(shape))[:, 0]
            for level, shape in zip(torch.split(torch.stack(found), sizes, 1), shapes, strict=True)
        ]
