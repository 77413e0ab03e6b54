"""What a recipe says of a face model."""

from __future__ import annotations

from typing import Any

import pytest

from taskkd.errors import RecipeError
from taskkd.face import FaceConfig


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "expected `architecture`"),
        ({"architecture": "iresnet51"}, "no architecture 'iresnet51'.*did you mean 'iresnet50'"),
        ({"architecture": "iresnet18", "layer": [1]}, "unknown key 'layer'.*did you mean 'layers'"),
        ({"architecture": "iresnet18", "layout": "gdc"}, "has the layouts 'insightface' and 'ir', got 'gdc'"),
        ({"architecture": "mobilefacenet", "layout": "ir"}, "has the layouts 'insightface' and 'gdc', got 'ir'"),
        ({"architecture": "mobilefacenet", "layers": [1, 1]}, "has four stages, got 2"),
        ({"architecture": "mobilefacenet", "dropout": 0.4}, "has no dropout"),
        ({"architecture": "iresnet18", "weights": "imagenet"}, "no ImageNet weights of iresnet18"),
        ({"architecture": "iresnet18", "native_stem": True}, "`native_stem` is of timm's networks"),
        ({"architecture": "timm:resnet18", "width": 8}, "leave out width"),
        ({"architecture": "iresnet18", "sha256": "0" * 64}, "`sha256` is of a file"),
        ({"model": "folder", "architecture": "iresnet18", "size": 32}, "leave out architecture, size"),
        ({"architecture": "iresnet18", "channels": "grb"}, "channels: input should be 'rgb' or 'bgr', got 'grb'"),
        ({"architecture": "iresnet18", "std": [0.5, 0.5, 0.0]}, "std: .*greater than 0"),
        ({"architecture": "iresnet18", "layers": []}, "layers: list should have at least 1 item"),
    ],
)
def test_what_does_not_go_together_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        FaceConfig.of(config)


def test_families() -> None:
    assert FaceConfig(architecture="timm:vit_tiny_patch16_224").family == "timm"
    assert FaceConfig(architecture="mobilefacenet").family == "mobilefacenet"
    assert FaceConfig(weights="backbone.pth").family == "iresnet"


def test_a_teachers_other_keys_are_left_out() -> None:
    class Teacher(FaceConfig):
        cache: bool = True

    teacher = Teacher(architecture="iresnet50", size=96, cache=False)
    assert teacher.face == FaceConfig(architecture="iresnet50", size=96)
    assert type(teacher.face) is FaceConfig
