"""Tiny segmentation networks of every library with random weights, by name: `NETWORKS[name](classes)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torchvision
import transformers
from torch import nn
from torchvision.models import segmentation as tv
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead


def some(all_of_them: Iterable[Any], *slow: Any) -> list[Any]:
    """All of them as parameters of a test, of which those that are like others are slow."""
    return [pytest.param(one, marks=[pytest.mark.slow] if one in slow else []) for one in all_of_them]


Build = Callable[[int], nn.Module]


def _resnet(head: str, blocks: tuple[int, ...], aux: bool = True) -> Build:
    """torchvision's own network, as thin as ResNet's bottlenecks go."""

    def build(classes: int) -> nn.Module:
        kind = torchvision.models.resnet.Bottleneck
        dilated = [False, True, True]
        net = torchvision.models.ResNet(kind, list(blocks), width_per_group=4, replace_stride_with_dilation=dilated)
        layers = {"layer4": "out"} | ({"layer3": "aux"} if aux else {})
        body = IntermediateLayerGetter(net, layers)
        second = FCNHead(1024, classes) if aux else None
        if head == "fcn":
            return FCN(body, FCNHead(2048, classes), second)
        return DeepLabV3(body, DeepLabHead(2048, classes), second)

    return build


def _transformers(model: str, config: str, **options: Any) -> Build:
    def build(classes: int) -> nn.Module:
        made = getattr(transformers, config)(num_labels=classes, **options)
        return getattr(transformers, model)(made)

    return build


def _upernet(classes: int) -> nn.Module:
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=8, auxiliary_channels=8, num_labels=classes
    )
    return transformers.UperNetForSemanticSegmentation(config)


def _smp(name: str, encoder: str = "resnet18", **options: Any) -> Build:
    return lambda classes: getattr(smp, name)(encoder, encoder_weights=None, classes=classes, **options)


VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
BEIT = {
    **VIT, "image_size": 64, "patch_size": 16, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2],
    "auxiliary_channels": 8,
}  # fmt: skip
#: name -> builder, taps of native logits (in the network), channels of the feature, stride of the logits
NETWORKS: dict[str, tuple[Build, str, int, int]] = {
    "deeplabv3_resnet50": (_resnet("deeplabv3", (1, 1, 1, 1)), "classifier.4", 256, 8),
    "deeplabv3_resnet101": (_resnet("deeplabv3", (1, 1, 2, 1), aux=False), "classifier.4", 256, 8),
    "deeplabv3_mobilenet": (
        lambda k: tv.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=k, aux_loss=True),
        "classifier.4",
        256,
        16,
    ),
    "fcn_resnet50": (_resnet("fcn", (1, 1, 1, 1)), "classifier.4", 512, 8),
    "lraspp": (
        lambda k: tv.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=k),
        "classifier",
        128,
        8,
    ),
    "segformer": (
        _transformers(
            "SegformerForSemanticSegmentation", "SegformerConfig", hidden_sizes=[8, 8, 16, 16], depths=[1] * 4,
            num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        ),
        "decode_head.classifier", 16, 4,
    ),
    "upernet": (_upernet, "decode_head.classifier", 16, 4),
    "dpt": (
        _transformers(
            "DPTForSemanticSegmentation", "DPTConfig", **VIT, image_size=64, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        ),
        "head.head.4", 8, 2,
    ),
    "beit": (_transformers("BeitForSemanticSegmentation", "BeitConfig", **BEIT), "decode_head.classifier", 16, 4),
    "data2vec": (
        _transformers("Data2VecVisionForSemanticSegmentation", "Data2VecVisionConfig", **BEIT),
        "decode_head.classifier", 16, 4,
    ),
    "mobilevit": (
        _transformers(
            "MobileViTForSemanticSegmentation", "MobileViTConfig", hidden_sizes=[8, 8, 8],
            neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], num_attention_heads=2, aspp_out_channels=8,
        ),
        "segmentation_head.classifier.convolution", 8, 32,
    ),
    "mobilevitv2": (
        _transformers(
            "MobileViTV2ForSemanticSegmentation", "MobileViTV2Config", width_multiplier=0.25, aspp_out_channels=8,
            base_attn_unit_dims=[32, 32, 32], n_attn_blocks=[1, 1, 1],
        ),
        "segmentation_head.classifier.convolution", 8, 32,
    ),
    "mobilenet_v2": (
        _transformers("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config", depth_multiplier=0.25),
        "segmentation_head.classifier.convolution", 256, 32,
    ),
    "unet": (_smp("Unet", decoder_channels=(16, 16, 8, 8, 8)), "segmentation_head.0", 8, 1),
    "unetplusplus": (_smp("UnetPlusPlus", decoder_channels=(16, 16, 8, 8, 8)), "segmentation_head.0", 8, 1),
    "fpn": (
        _smp("FPN", "tu-mobilenetv3_small_050", decoder_pyramid_channels=16, decoder_segmentation_channels=32),
        "segmentation_head.0", 32, 4,
    ),
    "deeplabv3plus": (_smp("DeepLabV3Plus", decoder_channels=16), "segmentation_head.0", 16, 4),
    "pspnet": (_smp("PSPNet", psp_out_channels=16), "segmentation_head.0", 16, 8),
    "manet": (_smp("MAnet", decoder_channels=(16, 16, 8, 8, 8)), "segmentation_head.0", 8, 1),
    "linknet": (_smp("Linknet"), "segmentation_head.0", 32, 1),
    "pan": (_smp("PAN", decoder_channels=8), "segmentation_head.0", 8, 4),
    "smp_segformer": (_smp("Segformer", "mit_b0", decoder_segmentation_channels=16), "segmentation_head.0", 16, 4),
    "smp_upernet": (_smp("UPerNet", decoder_channels=16), "segmentation_head.0", 16, 4),
}  # fmt: skip
