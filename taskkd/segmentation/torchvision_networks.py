"""torchvision's DeepLabV3, FCN and LRASPP, on its own backbones as it builds them, or on any of timm's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import ASPP

from taskkd.backbones import IMAGENET, TIMM, TimmMaps, timm_body, torchvision_body, torchvision_classifier
from taskkd.errors import RecipeError
from taskkd.segmentation.config import SegmenterConfig

__all__ = ["COCO", "Normal", "assemble", "coco_weights"]

Weights = Mapping[str, Tensor] | str | None
#: mean and standard deviation of the images that weights were trained on
Normal = tuple[Sequence[float], Sequence[float]]

#: what torchvision has weights for, trained on COCO with VOC's labels
COCO = (
    ("deeplabv3", "resnet50"),
    ("deeplabv3", "resnet101"),
    ("deeplabv3", "mobilenet_v3_large"),
    ("fcn", "resnet50"),
    ("fcn", "resnet101"),
    ("lraspp", "mobilenet_v3_large"),
)


def coco_weights(config: SegmenterConfig) -> Mapping[str, Tensor]:
    """torchvision's weights of a whole network, from its server or cache.

    Raises:
        RecipeError: it has none of this architecture on this backbone.
    """
    key = (config.architecture or "", config.body)
    if key not in COCO:
        known = ", ".join(f"{a} on {b}" for a, b in COCO)
        raise RecipeError(f"no COCO weights of {key[0]} on {key[1]}; torchvision has those of {known}.")
    weights = torchvision.models.get_model_weights("_".join(key))["COCO_WITH_VOC_LABELS_V1"]
    state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    return state


def assemble(config: SegmenterConfig, classes: int, weights: Weights) -> tuple[nn.Module, Normal]:
    """A network of torchvision's own class.

    Args:
        config: with one of its architectures.
        classes: the channels of its logits.
        weights: of the backbone: tensors, "imagenet", or None.

    Raises:
        RecipeError: the backbone is unknown, cannot have this output stride, or the weights are of another.
    """
    names = ["low", "high"] if config.architecture == "lraspp" else ["aux", "out"]
    body, normal = _body(config, names, weights)
    channels = body.channels if isinstance(body, Named) else _channels(body)
    if config.architecture == "lraspp":
        width = config.width or 128
        return segmentation.LRASPP(body, channels["low"], channels["high"], classes, width), normal
    aux = _fcn_head(channels["aux"], channels["aux"] // 4, classes) if config.aux else None
    if config.architecture == "fcn":
        head = _fcn_head(channels["out"], config.width or channels["out"] // 4, classes)
        return segmentation.FCN(body, head, aux), normal
    return segmentation.DeepLabV3(body, _deeplab_head(channels["out"], config.width or 256, classes), aux), normal


def _deeplab_head(channels: int, width: int, classes: int) -> nn.Sequential:
    """torchvision's, of any width."""
    return nn.Sequential(
        ASPP(channels, (12, 24, 36), width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, classes, 1),
    )


def _fcn_head(channels: int, width: int, classes: int) -> nn.Sequential:
    """torchvision's, of any width."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(width, classes, 1),
    )


# ---- backbones


def _body(config: SegmenterConfig, names: list[str], weights: Weights) -> tuple[nn.Module, Normal]:
    """The backbone, whose maps have these names: of stride 8 and the last (LRASPP), else the last but one and the last.

    Without an auxiliary head the last but one is left out.
    """
    name, source = config.body, config.weights or ""
    wanted = names if config.architecture == "lraspp" or config.aux else names[1:]
    stages = [2, 4] if config.architecture == "lraspp" else [3, 4][-len(wanted) :]
    if name.startswith(TIMM):
        body = timm_body(name.removeprefix(TIMM), stages, weights, source, output_stride=config.output_stride or 16)
        assert isinstance(body.module, TimmMaps)
        return Named(body.module.net, dict(zip(wanted, body.channels, strict=True))), (body.mean, body.std)
    if name.startswith("mobilenet_v3"):
        return _mobilenet(config, wanted, weights), IMAGENET
    if name.startswith(("resnet", "resnext", "wide_resnet")):
        return _resnet(config, wanted, weights), IMAGENET
    if config.output_stride not in (None, 32):
        raise RecipeError(f"backbone {name!r} of torchvision is not dilated here: expected `output_stride` 32.")
    body = torchvision_body(name, stages, weights, source)
    layers = dict(zip(body.module.return_layers, wanted, strict=True))  # type: ignore[arg-type]
    return _cut(body.module, layers), IMAGENET


def _resnet(config: SegmenterConfig, names: list[str], weights: Weights) -> nn.Module:
    net = torchvision_classifier(config.body, weights, config.weights or "")
    _dilate(net, config.output_stride or 8)
    layers = {"low": "layer2", "aux": "layer3", "high": "layer4", "out": "layer4"}
    return _cut(net, {layers[name]: name for name in names})


def _cut(net: nn.Module, layers: dict[str, str]) -> nn.Module:
    cut: nn.Module = IntermediateLayerGetter(net, layers)
    return cut


def _dilate(net: Any, output_stride: int) -> None:
    """Dilation instead of stride in a ResNet's last layers, as torchvision does it; it refuses to for basic blocks."""
    dilation = 1
    for stride, layer in ((16, net.layer3), (32, net.layer4)):
        if stride <= output_stride:
            continue
        before, dilation = dilation, 2 * dilation
        for conv in layer.modules():
            if isinstance(conv, nn.Conv2d):
                own = before if conv.stride == (2, 2) else dilation
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (own, own)


def _mobilenet(config: SegmenterConfig, names: list[str], weights: Weights) -> nn.Module:
    if config.output_stride == 8:
        raise RecipeError(f"backbone {config.body!r} is dilated in its last layers only: `output_stride` 16 or 32.")
    dilated = config.output_stride != 32
    net = torchvision_classifier(config.body, weights, config.weights or "", dilated=dilated).features
    # torchvision's choice: the first layer of stride 8, and the last of all
    strided = [i for i, block in enumerate(net) if getattr(block, "_is_cn", False)]
    layers = {"low": strided[-3], "aux": strided[-3], "high": len(net) - 1, "out": len(net) - 1}
    return _cut(net, {str(layers[name]): name for name in names})


class Named(nn.Module):
    """timm's list of maps as torchvision's heads want it: by name."""

    def __init__(self, net: nn.Module, channels: dict[str, int]) -> None:
        super().__init__()
        self.net, self.channels = net, channels
        self.channels_last = getattr(net, "output_fmt", None) == "NHWC"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.net(x)
        if self.channels_last:
            maps = [value.movedim(-1, 1).contiguous() for value in maps]
        return dict(zip(self.channels, maps, strict=True))


@torch.no_grad()
def _channels(body: nn.Module, side: int = 64) -> dict[str, int]:
    body.eval()
    found = {name: int(value.shape[1]) for name, value in body(torch.zeros(1, 3, side, side)).items()}
    body.train()
    return found
