"""Parity adapters of the face recognition package: models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.face import build

Inputs = Mapping[str, Tensor]
Params = Mapping[str, Any]


@torch.no_grad()
def fill(net: nn.Module) -> None:
    """The weights of the cases, by the place of each tensor among parameters and buffers (see their notes)."""
    named = [(n, v) for n, v in [*net.named_parameters(), *net.named_buffers()] if v.is_floating_point()]
    for place, (name, value) in enumerate(named):
        wave = torch.sin(0.7 * torch.arange(value.numel(), dtype=torch.float64) + place).view(value.shape)
        if value.dim() > 1:
            filled = wave * 1.5 / value[0].numel() ** 0.5
        elif name.endswith("running_var"):
            filled = 1 + 0.1 * wave.abs()
        elif name.endswith("running_mean"):
            filled = 0.05 * wave
        elif name.endswith("weight"):
            filled = 0.25 + 0.05 * wave if "prelu" in name else 1 + 0.1 * wave
        else:
            filled = 0.02 * wave
        value.copy_(filled)


def backbone(config: dict[str, Any], params: Params) -> dict[str, Tensor]:
    model = build(config).eval()
    fill(model.backbone)
    assert sum(p.numel() for p in model.parameters()) == params["params"]
    assert len(model.backbone.state_dict()) == params["n_tensors"]
    images = (torch.arange(2 * 3 * 112 * 112) % 255).to(torch.uint8).view(2, 3, 112, 112)
    with torch.no_grad():
        return {"embedding": model(images)["embeddings"]}


def r18(_inputs: Inputs, params: Params) -> dict[str, Tensor]:
    return backbone({"architecture": "iresnet18"}, params)


def mbf(_inputs: Inputs, params: Params) -> dict[str, Tensor]:
    return backbone({"architecture": "mobilefacenet"}, params)


def mbf_scale1(_inputs: Inputs, params: Params) -> dict[str, Tensor]:
    return backbone({"architecture": "mobilefacenet", "width": 64}, params)


ADAPTERS: dict[str, Any] = {
    "face/iresnet_mobilefacenet_r18": r18,
    "face/iresnet_mobilefacenet_mbf": mbf,
    "face/iresnet_mobilefacenet_mbf_scale1": mbf_scale1,
}
