"""Tiny torchvision detectors with random weights, and batches for them: tens of thousands of parameters, 64 px.

Classes are 1 and 2, 0 is background. `channels` is the width of the pyramid, so that a teacher can be wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

__all__ = ["DETECTORS", "batch", "faster_rcnn", "fcos", "mask_rcnn", "retinanet", "sharpened", "ssdlite", "stages"]

CLASSES = 3  # with the background
RATIOS = (0.5, 1.0, 2.0)
#: how the student resizes: one size, or several at random
Sizes = int | tuple[int, ...]


def stages(width: int = 8) -> nn.Sequential:
    """Four stages with strides 4, 8, 16, 32 and `width` times 1, 2, 3, 4 channels."""
    widths = [width * i for i in (1, 2, 3, 4)]
    body = nn.Sequential()
    for i, (own, out) in enumerate(zip([3, *widths], widths, strict=False)):
        conv = nn.Conv2d(own, out, 3, stride=4 if i == 0 else 2, padding=1, bias=False)
        body.add_module(f"layer{i + 1}", nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()))
    return body


def pyramid(channels: int, levels: Sequence[int], extra: nn.Module | None = None, width: int = 8) -> BackboneWithFPN:
    """`stages` under torchvision's feature pyramid: `levels` are the stages (1 to 4) that it returns."""
    named = {f"layer{i}": str(k) for k, i in enumerate(levels)}
    return BackboneWithFPN(stages(width), named, [width * i for i in levels], channels, extra)


def _rpn_anchors() -> AnchorGenerator:
    return AnchorGenerator(tuple((s,) for s in (8, 16, 24, 32, 48)), (RATIOS,) * 5)


def _two_stage(channels: int, min_size: Sizes) -> dict[str, Any]:
    return {
        "backbone": pyramid(channels, (1, 2, 3, 4), LastLevelMaxPool()),
        "num_classes": None,
        "min_size": min_size,
        "max_size": 128,
        "rpn_anchor_generator": _rpn_anchors(),
        "box_head": TwoMLPHead(channels * 7**2, 32),
        "box_predictor": FastRCNNPredictor(32, CLASSES),
        "rpn_pre_nms_top_n_train": 60,
        "rpn_post_nms_top_n_train": 40,
        "rpn_pre_nms_top_n_test": 60,
        "rpn_post_nms_top_n_test": 20,
        "box_batch_size_per_image": 32,
    }


def faster_rcnn(channels: int = 16, *, min_size: Sizes = 64, seed: int = 0) -> FasterRCNN:
    torch.manual_seed(seed)
    return FasterRCNN(**_two_stage(channels, min_size))


def mask_rcnn(channels: int = 16, *, min_size: Sizes = 64, seed: int = 0) -> MaskRCNN:
    """Its targets need masks: `batch(masks=True)`."""
    torch.manual_seed(seed)
    heads = {"mask_head": MaskRCNNHeads(channels, (8,), 1), "mask_predictor": MaskRCNNPredictor(8, 8, CLASSES)}
    return MaskRCNN(**_two_stage(channels, min_size), **heads)


def retinanet(channels: int = 16, *, min_size: Sizes = 64, seed: int = 0, norm: bool = False) -> RetinaNet:
    """Five levels of stride 8 to 128; `norm`: group norm in the towers, as in torchvision's v2."""
    torch.manual_seed(seed)
    backbone = pyramid(channels, (2, 3, 4), LastLevelP6P7(channels, channels))
    anchors = AnchorGenerator(tuple((s, int(s * 1.4)) for s in (8, 16, 24, 32, 48)), (RATIOS,) * 5)
    head = RetinaNetHead(channels, 6, CLASSES, norm_layer=partial(nn.GroupNorm, 4) if norm else None)
    return RetinaNet(backbone, CLASSES, min_size, 128, anchor_generator=anchors, head=head)


def fcos(channels: int = 16, *, min_size: Sizes = 64, seed: int = 0) -> FCOS:
    torch.manual_seed(seed)
    backbone = pyramid(channels, (2, 3, 4), LastLevelP6P7(channels, channels))
    head = FCOSHead(32, 1, CLASSES)  # its norm layers ask for 32 channels or more
    norm = partial(nn.GroupNorm, 4)
    head.classification_head = FCOSClassificationHead(channels, 1, CLASSES, norm_layer=norm)
    head.regression_head = FCOSRegressionHead(channels, 1, norm_layer=norm)
    return FCOS(backbone, CLASSES, min_size, 128, head=head)


def ssdlite(width: int = 16, *, min_size: Sizes = 64, seed: int = 0) -> SSD:
    """Four levels of stride 4 to 32 without a pyramid; images are resized to a square."""
    torch.manual_seed(seed)
    width //= 2
    size = min_size if isinstance(min_size, int) else max(min_size)
    backbone = IntermediateLayerGetter(stages(width), {f"layer{i + 1}": str(i) for i in range(4)})
    anchors = DefaultBoxGenerator([[2], [2], [2], [2]], min_ratio=15, max_ratio=90)
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    head = SSDLiteHead([width * i for i in (1, 2, 3, 4)], anchors.num_anchors_per_location(), CLASSES, norm)
    return SSD(backbone, anchors, (size, size), CLASSES, head=head)


#: name -> `detector(channels=16, *, min_size=64, seed=0)`
DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "faster_rcnn": faster_rcnn,
    "mask_rcnn": mask_rcnn,
    "retinanet": retinanet,
    "fcos": fcos,
    "ssdlite": ssdlite,
}


def sharpened(model: nn.Module, seed: int) -> nn.Module:
    """With predictions that are far from all alike, which those of untrained heads are."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.head.parameters():  # type: ignore[union-attr]
        if parameter.ndim > 1:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def batch(
    boxes: Sequence[int] = (2, 1), *, sizes: Sequence[tuple[int, int]] = ((48, 64), (64, 56)), masks: bool = False,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """A batch of images with this many boxes each (0: an image without boxes), of `sizes` (h, w) in turn."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for i, count in enumerate(boxes):
        h, w = sizes[i % len(sizes)]
        images.append(torch.rand(3, h, w, generator=generator))
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([w * 0.5, h * 0.5])
        extent = torch.rand(count, 2, generator=generator) * torch.tensor([w * 0.3, h * 0.3]) + 10
        target = {
            "boxes": torch.cat([corner, corner + extent], 1),
            "labels": torch.randint(1, CLASSES, (count,), generator=generator),
        }
        if masks:
            target["masks"] = _filled(target["boxes"], h, w)
        targets.append(target)
    return {"images": images, "targets": targets, "id": torch.arange(len(images))}


def _filled(boxes: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """(n, h, w) masks that fill the boxes."""
    masks = torch.zeros(len(boxes), h, w, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    return masks
