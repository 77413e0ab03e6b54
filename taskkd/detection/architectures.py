"""torchvision's detectors put together from a config: backbone, pyramid, anchors and heads of the sizes asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD, SSDFeatureExtractorVGG, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from taskkd.backbones import (
    IMAGENET,
    TIMM,
    Body,
    groups_of,
    parts_of,
    timm_body,
    torchvision_body,
    torchvision_classifier,
    with_norm,
)
from taskkd.detection.config import SSD as SSDS
from taskkd.detection.config import DetectorConfig
from taskkd.errors import RecipeError

__all__ = ["COCO", "Builder", "Pyramid", "SSDMaps", "assemble", "builder_of"]

Weights = Mapping[str, Tensor] | str | None


@dataclass(frozen=True)
class Builder:
    """A detector of torchvision that comes with COCO weights.

    Args:
        name: of the function that builds it.
        eps: of its frozen BatchNorm, where the weights were trained with another than the backbone's.
    """

    name: str
    eps: float | None = None

    def coco(self) -> Mapping[str, Tensor]:
        """Its COCO weights, from torchvision's server or cache."""
        weights = torchvision.models.get_model_weights(self.name)["COCO_V1"]
        state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
        return state

    def classes(self) -> list[str]:
        """The names of the classes of these weights, without the background; those that COCO left out are "N/A"."""
        names: list[str] = torchvision.models.get_model_weights(self.name)["COCO_V1"].meta["categories"]
        return names[1:]


COCO = {
    ("faster_rcnn", "resnet50"): Builder("fasterrcnn_resnet50_fpn", 0.0),
    ("faster_rcnn", "mobilenet_v3_large"): Builder("fasterrcnn_mobilenet_v3_large_fpn"),
    ("mask_rcnn", "resnet50"): Builder("maskrcnn_resnet50_fpn", 0.0),
    ("retinanet", "resnet50"): Builder("retinanet_resnet50_fpn", 0.0),
    ("fcos", "resnet50"): Builder("fcos_resnet50_fpn"),
    ("ssd", "vgg16"): Builder("ssd300_vgg16"),
    ("ssdlite", "mobilenet_v3_large"): Builder("ssdlite320_mobilenet_v3_large"),
}


def builder_of(config: DetectorConfig) -> Builder:
    """Raises:
    RecipeError: torchvision has no COCO weights for this architecture and backbone.
    """
    key = (config.architecture or "", config.body)
    if key not in COCO:
        known = ", ".join(f"{a} on {b}" for a, b in COCO)
        raise RecipeError(f"no COCO weights of {key[0]} on {key[1]}; torchvision has those of {known}.")
    return COCO[key]


def assemble(
    config: DetectorConfig, classes: int, weights: Weights, *, load: Callable[[nn.Module, Any, str], None]
) -> tuple[nn.Module, DetectorConfig]:
    """The detector of a config, and the config with what the weights decided.

    Args:
        config: with an architecture.
        classes: without the background.
        weights: tensors, "imagenet", or None: everything as it is initialised, in the shape that `config` says.
        load: puts a whole detector's tensors into it.
    """
    whole = isinstance(weights, Mapping) and any(key.startswith("backbone.") for key in weights)
    if config.weights == "coco":
        model, body = _by_torchvision(config, classes + 1)
    else:
        model, body = _by_parts(config, classes + 1, None if whole else weights)
    if whole:
        load(model, weights, config.weights or "")
    norm = config.norm or ("frozen" if config.weights and config.architecture not in SSDS else "batch")
    if norm == "group" and config.weights:
        raise RecipeError(
            f"norm: weights {config.weights!r} were trained with BatchNorm: expected 'batch' or 'frozen'."
        )
    with_norm(body.module, norm)
    if config.weights == "coco" and (eps := builder_of(config).eps) is not None:
        for module in body.module.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = eps
    body.train_last(_trained(config))
    settled = {"mean": list(model.transform.image_mean), "std": list(model.transform.image_std)}  # type: ignore[union-attr, arg-type]
    return model, config.model_copy(update=settled)


def _trained(config: DetectorConfig) -> int:
    if config.trainable_layers is not None:
        return config.trainable_layers
    return 3 if config.weights and config.architecture not in SSDS else 5


def _by_torchvision(config: DetectorConfig, channels: int) -> tuple[nn.Module, Body]:
    """torchvision's own, without weights."""
    options = _image(config) | _limits(config)
    if config.architecture in SSDS:
        if config.min_size is not None:
            raise RecipeError("min_size: torchvision's SSD with COCO weights has a fixed size; leave `min_size` out.")
        options = {k: v for k, v in options.items() if k not in ("min_size", "max_size")}
    model = getattr(detection, builder_of(config).name)(
        weights=None, weights_backbone=None, num_classes=channels, **options
    )
    trunk = model.backbone.features if config.architecture in SSDS else model.backbone.body
    return model, Body(trunk, [], parts_of(trunk), *IMAGENET)


def _by_parts(config: DetectorConfig, channels: int, weights: Weights) -> tuple[nn.Module, Body]:
    if config.architecture in SSDS:
        return _ssd(config, channels, weights)
    stages = config.stages or ([1, 2, 3, 4] if config.two_stage else [2, 3, 4])
    body = _body(config, stages, weights)
    pyramid = Pyramid(body, config)
    options = _image(config, body) | _limits(config)
    strides = [2 ** (s + 1) for s in stages]
    if config.extra_levels:
        strides += [strides[-1] * 2] if config.two_stage else [strides[-1] * 2, strides[-1] * 4]
    anchors = _anchors(config, strides)
    if config.two_stage:
        return _rcnn(config, channels, pyramid, anchors, len(stages), options), body
    count, convs = anchors.num_anchors_per_location()[0], 4 if config.head_convs is None else config.head_convs
    if config.architecture == "fcos":
        head = _fcos_head(config.width, count, channels, convs)
        return detection.FCOS(pyramid, channels, anchor_generator=anchors, head=head, **options), body
    head = RetinaNetHead(config.width, count, channels)
    for part in (head.classification_head, head.regression_head):
        part.conv = part.conv[:convs]
    return detection.RetinaNet(pyramid, channels, anchor_generator=anchors, head=head, **options), body


def _body(config: DetectorConfig, stages: list[int], weights: Weights) -> Body:
    source = config.weights or ""
    if config.body.startswith(TIMM):
        return timm_body(config.body.removeprefix(TIMM), stages, weights, source)
    return torchvision_body(config.body, stages, weights, source)


def _image(config: DetectorConfig, body: Body | None = None) -> dict[str, Any]:
    """Options of the transform."""
    mean, std = config.mean, config.std
    if body is not None:
        mean, std = mean or body.mean, std or body.std
    found = {"min_size": config.min_size, "max_size": config.max_size, "image_mean": mean, "image_std": std}
    return {k: v for k, v in found.items() if v is not None}


def _limits(config: DetectorConfig) -> dict[str, Any]:
    """Options of proposals and detections; torchvision's own where none is given."""
    if not config.two_stage:
        found = {"score_thresh": config.score_threshold, "detections_per_img": config.detections}
        return {k: v for k, v in found.items() if v is not None}
    found = {"box_score_thresh": config.score_threshold, "box_detections_per_img": config.detections}
    rpn = {"train": config.proposals, "test": config.proposals // 2}
    found |= {f"rpn_{when}_nms_top_n_{mode}": n for when in ("pre", "post") for mode, n in rpn.items()}
    return {k: v for k, v in found.items() if v is not None} | {"box_batch_size_per_image": config.rois_per_image}


# ---- pyramid, anchors, heads


class Pyramid(BackboneWithFPN):  # type: ignore[misc]
    """torchvision's backbone with a feature pyramid, around any body that gives maps by name; its keys are the same."""

    def __init__(self, body: Body, config: DetectorConfig) -> None:
        nn.Module.__init__(self)
        extra = None
        if config.extra_levels:
            extra = LastLevelMaxPool() if config.two_stage else LastLevelP6P7(config.width, config.width)
        self.body = body.module
        self.fpn = FeaturePyramidNetwork(body.channels, config.width, extra)
        self.out_channels = config.width


def _anchors(config: DetectorConfig, strides: list[int]) -> AnchorGenerator:
    """One list of sizes for each level.

    Raises:
        RecipeError: there are more or fewer lists than levels, or lists of different lengths.
    """
    default: list[list[float]] = [[8 * s] for s in strides]
    if config.architecture == "retinanet":
        default = [[4 * s, int(4 * s * 2 ** (1 / 3)), int(4 * s * 2 ** (2 / 3))] for s in strides]
    elif config.architecture == "fcos":
        default = [[s] for s in strides]
    sizes = config.anchor_sizes or default
    if len(sizes) != len(strides) or len({len(s) for s in sizes}) != 1:
        raise RecipeError(
            f"anchor_sizes: expected {len(strides)} lists of one length, for the levels of stride "
            f"{', '.join(map(str, strides))}, got {sizes}."
        )
    ratios = (1.0,) if config.architecture == "fcos" else tuple(config.anchor_ratios or (0.5, 1.0, 2.0))
    if config.architecture == "fcos" and len(sizes[0]) != 1:
        raise RecipeError(f"anchor_sizes: FCOS has one point of one size in a cell, got {sizes}.")
    return AnchorGenerator(tuple(tuple(s) for s in sizes), (ratios,) * len(sizes))


def _rcnn(
    config: DetectorConfig, channels: int, pyramid: Pyramid, anchors: AnchorGenerator, levels: int, options: Any
) -> nn.Module:
    names, width, size = [str(i) for i in range(levels)], config.width, config.representation_size
    head: nn.Module = TwoMLPHead(width * 49, size)
    if config.head_convs:
        head = FastRCNNConvFCHead((width, 7, 7), [width] * config.head_convs, [size], norm_layer=nn.BatchNorm2d)
    options = {
        **options,
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        "box_head": head,
        "box_predictor": FastRCNNPredictor(size, channels),
    }
    if config.architecture == "faster_rcnn":
        faster: nn.Module = detection.FasterRCNN(pyramid, None, **options)
        return faster
    masks: nn.Module = detection.MaskRCNN(
        pyramid,
        None,
        mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(width, width, channels),
        **options,
    )
    return masks


def _fcos_head(width: int, anchors: int, channels: int, convs: int) -> FCOSHead:
    """torchvision's, whose groups are of 32 channels fixed, with groups that divide any width."""
    head = FCOSHead(32, anchors, channels, num_convs=0)
    norm = partial(nn.GroupNorm, groups_of(width))
    head.classification_head = type(head.classification_head)(width, anchors, channels, convs, norm_layer=norm)
    head.regression_head = type(head.regression_head)(width, anchors, convs, norm_layer=norm)
    return head


# ---- SSD

SSD300_SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
SSD300_STEPS = [8, 16, 32, 64, 100, 300]


class SSDMaps(nn.Module):
    """The maps of a backbone, and coarser ones of strided convolutions after them, as SSD wants them."""

    def __init__(self, body: Body, extra: nn.ModuleList, widths: list[int]) -> None:
        super().__init__()
        self.body, self.extra = body.module, extra
        self.out_channels = [*body.channels, *widths]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = list(self.body(x).values())
        for block in self.extra:
            maps.append(block(maps[-1]))
        return OrderedDict((str(i), value) for i, value in enumerate(maps))


def _ssd(config: DetectorConfig, channels: int, weights: Weights) -> tuple[nn.Module, Body]:
    light = config.architecture == "ssdlite"
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03) if light else None
    own = (config.architecture or "", config.body) in COCO and config.stages is None
    if own and config.trainable_layers not in (None, 5):
        raise RecipeError(f"trainable_layers: {config.architecture} on {config.body} is trained as a whole.")
    maps, body, widths = _ssd_own(config, weights, norm) if own else _ssd_maps(config, weights, norm)
    count = len(widths)
    side = int(config.min_size or (320 if light else 300))  # type: ignore[arg-type]
    if light:
        generator = DefaultBoxGenerator([[2, 3]] * count, min_ratio=0.2, max_ratio=0.95)
        head = SSDLiteHead(widths, generator.num_anchors_per_location(), channels, norm)
    else:
        exact = {"scales": SSD300_SCALES, "steps": SSD300_STEPS} if own and side == 300 else {}
        generator = DefaultBoxGenerator([[2]] + [[2, 3]] * (count - 3) + [[2]] * 2, **exact)
        head = SSDHead(widths, generator.num_anchors_per_location(), channels)
    options = {k: v for k, v in (_image(config, body) | _limits(config)).items() if k not in ("min_size", "max_size")}
    if light:  # torchvision's
        options = {
            "score_thresh": 0.001,
            "nms_thresh": 0.55,
            "detections_per_img": 300,
            "topk_candidates": 300,
            **options,
        }
    return SSD(maps, generator, (side, side), channels, head=head, **options), body


def _ssd_own(config: DetectorConfig, weights: Weights, norm: Any) -> tuple[nn.Module, Body, list[int]]:
    """The maps of torchvision's own SSD and SSDLite."""
    source = config.weights or ""
    if config.architecture == "ssdlite":
        # torchvision: the last layers are half as wide unless they have ImageNet weights
        net = torchvision_classifier(
            config.body, weights, source, norm_layer=norm, reduced_tail=config.weights != "imagenet"
        )
        strided = [i for i, block in enumerate(net.features) if getattr(block, "_is_cn", False)]
        maps = SSDLiteFeatureExtractorMobileNet(net.features, strided[-1], norm)
        widths = [net.features[strided[-1]].block[0].out_channels, net.features[-1].out_channels, 512, 256, 256, 128]
        body = Body(maps.features, widths, [""] * 5, [0.5] * 3, [0.5] * 3)
        return maps, body, widths
    net = torchvision_classifier(config.body, weights, source)
    maps = SSDFeatureExtractorVGG(net.features, highres=False)
    return maps, Body(maps.features, [], [""] * 5, *IMAGENET), [512, 1024, 512, 256, 256, 256]


def _ssd_maps(config: DetectorConfig, weights: Weights, norm: Any) -> tuple[nn.Module, Body, list[int]]:
    """Maps of any backbone and four coarser ones."""
    body = _body(config, config.stages or [3, 4], weights)
    widths = [2 * config.width, config.width, config.width, config.width // 2]
    blocks = nn.ModuleList()
    for before, after in zip([body.channels[-1], *widths], widths, strict=False):
        inner = after // 2
        light = {"norm_layer": norm, "activation_layer": nn.ReLU6, "groups": inner} if norm else {"norm_layer": None}
        same = {k: v for k, v in light.items() if k != "groups"}
        strided = Conv2dNormActivation(inner, inner if norm else after, 3, stride=2, **light)
        last = [Conv2dNormActivation(inner, after, 1, **same)] if norm else []
        blocks.append(nn.Sequential(Conv2dNormActivation(before, inner, 1, **same), strided, *last))
    maps = SSDMaps(body, blocks, widths)
    return maps, body, maps.out_channels
