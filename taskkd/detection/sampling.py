"""Boxes that both sides of a pair look at when the student has no proposals of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from taskkd.detection.shared import SharedImages
from taskkd.detection.views import Dense

__all__ = ["own_regions"]


@torch.no_grad()
def own_regions(
    dense: Dense,
    images: SharedImages,
    *,
    count: int = 64,
    candidates: int = 500,
    threshold: float = 0.5,
    share: float = 0.25,
) -> list[Tensor]:
    """A one-stage student's own predictions as regions, and the ground truth, of each image (r, 4).

    Source: Yao et al. 2021 (G-DetKD): predictions that overlap the ground truth by more than 0.5 are positive, positive
    to negative 1:3. That the ground truth is among them, as in Faster R-CNN, is ours; so are `count` and `candidates`.

    Args:
        dense: the student's predictions.
        images: with the ground truth.
        count: regions of an image, at most.
        candidates: the predictions of an image that are looked at, by score, after non-maximum suppression at 0.7.
        threshold: overlap of a positive.
        share: of positives, at most.
    """
    from torchvision.ops import box_iou, clip_boxes_to_image, nms, remove_small_boxes

    scores, boxes = dense.probabilities().amax(-1), dense.decode()
    found = []
    for score, predicted, truth, size in zip(scores, boxes, images.boxes, images.sizes, strict=True):
        best, index = score.topk(min(candidates, len(score)))
        own = clip_boxes_to_image(predicted[index], size)
        kept = remove_small_boxes(own, 1.0)
        kept = kept[nms(own[kept].float(), best[kept].float(), 0.7)]
        own = torch.cat([truth.to(own.dtype), own[kept]])
        positive = torch.ones(len(own), dtype=torch.bool, device=own.device)
        if len(truth):
            positive = box_iou(own, truth.to(own.dtype)).amax(1) > threshold
        else:
            positive[:] = False
        ahead, behind = positive.nonzero().flatten(), (~positive).nonzero().flatten()
        ahead = ahead[: int(count * share)]
        found.append(own[torch.cat([ahead, behind[: count - len(ahead)]])])
    return found
