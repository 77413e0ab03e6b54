"""Tiny detectors of transformers with random weights, and a batch of which the second image has no boxes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMES = ("detr", "conditional_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine")
ENCODER_DECODER = {
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_layers": 2,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "num_queries": 9, "auxiliary_loss": True,
}  # fmt: skip


def _resnet(stages: int) -> Any:
    from transformers import ResNetConfig

    names = ["stage2", "stage3", "stage4"][-stages:]
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic", out_features=names
    )


def _hgnet() -> Any:
    from transformers import HGNetV2Config

    return HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 16, 16], stage_mid_channels=[8] * 4,
        stage_out_channels=[8, 16, 16, 16], stage_num_blocks=[1] * 4, stage_downsample=[False, True, True, True],
        stage_light_block=[False] * 4, stage_kernel_size=[3] * 4, stage_numb_of_layers=[1] * 4,
        out_features=["stage2", "stage3", "stage4"], hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, embedding_size=8,
    )  # fmt: skip


def _rt_backbone() -> Any:
    from transformers import RTDetrResNetConfig

    return RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def config(name: str, *, width: int = 32, labels: int = 3, **more: Any) -> Any:
    """The config of a detector of a few thousand parameters."""
    import transformers as hf

    options: dict[str, Any] = {"d_model": width, "num_labels": labels, **ENCODER_DECODER}
    if name in ("detr", "conditional_detr"):
        make = hf.DetrConfig if name == "detr" else hf.ConditionalDetrConfig
        options |= {"backbone_config": _resnet(1), "dropout": 0.0}
    elif name == "deformable_detr":
        make = hf.DeformableDetrConfig
        options |= {"backbone_config": _resnet(3), "encoder_n_points": 2, "decoder_n_points": 2, "dropout": 0.0}
    else:
        make = {"rt_detr": hf.RTDetrConfig, "rt_detr_v2": hf.RTDetrV2Config, "d_fine": hf.DFineConfig}[name]
        options |= {
            "encoder_hidden_dim": width, "decoder_in_channels": [width] * 3, "num_denoising": 10,
            "encoder_in_channels": [8, 16, 16], "backbone_config": _rt_backbone(),
        }  # fmt: skip
        if name == "d_fine":
            options |= {
                "backbone_config": _hgnet(), "encoder_in_channels": [16] * 3, "hidden_size": width,
                "decoder_n_points": [2, 2, 2],
            }  # fmt: skip
    return make(**options | more)


def detector(name: str, *, seed: int = 0, size: Any = None, **more: Any) -> Any:
    """A wrapped detector, for images of about 64 px."""
    from transformers import AutoModelForObjectDetection

    from taskkd.detection.transformers_models import TransformersDetector

    torch.manual_seed(seed)
    size = size or ((64, 64) if name in ("rt_detr", "rt_detr_v2", "d_fine") else 64)
    detector = TransformersDetector(AutoModelForObjectDetection.from_config(config(name, **more)), size=size)
    for path, module in detector.named_modules():
        if "backbone" in path and isinstance(module, torch.nn.Conv2d):
            # D-FINE's are drawn so small that its maps vanish, and gradients are infinite behind batch norms
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return detector


def batch(boxes: bool = True) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different shapes; the second, or both, without boxes."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, 48, 72, generator=generator), torch.rand(3, 60, 40, generator=generator)]
    first = [[6.0, 5.0, 30.0, 40.0], [40.0, 10.0, 66.0, 30.0]] if boxes else []
    full = {
        "boxes": torch.tensor(first).reshape(-1, 4),
        "labels": torch.tensor([1, 3][: len(first)], dtype=torch.int64),
    }
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return images, [full, empty]
