"""Parity adapters of the segmentation losses: dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from taskkd import losses
from taskkd.segmentation.methods.channel_wise import ChannelTerm, normalised_loss
from taskkd.segmentation.methods.soft_targets import pixel_loss
from taskkd.segmentation.methods.structured import pixel_sum
from taskkd.terms import Run

Inputs = Mapping[str, Tensor]
Params = Mapping[str, Any]


def cwd(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    s, t, norm = inputs["in_s"], inputs["in_t"], params["norm_type"]
    factor = 1.0
    if norm == "none":  # the first sample alone, over the whole batch
        s, t, factor = s[:1], t[:1], 1 / len(s)
    value = normalised_loss(s, t, norm=norm, divergence=params["divergence"], temperature=params["temperature"])
    return {"loss": value * factor}


def cwd_cirkd_feat(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    s, t = inputs["in_s"], inputs["in_t"]
    adapter = None
    if s.shape[1] != t.shape[1]:
        adapter = nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False)
        del adapter.weight
        adapter.weight = inputs["w_conv.weight"]  # no parameter: gradients are the case's
    term = ChannelTerm(
        "channels", normalised_loss, "x", divide_by="student", temperature=params["temperature"], adapter=adapter
    )
    run = Run({}, None, {"x": s}, {"x": t})
    term.build(run)
    return {"loss": term(run)}


def cwd_mmrazor(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    value = losses.channel_wise(inputs["in_s"], inputs["in_t"], temperature=params["tau"])
    return {"loss": value * params["loss_weight"]}


def kl_mmrazor(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    s = inputs["in_s"]
    value = losses.kl_divergence(s, inputs["in_t"], temperature=params["tau"], dim=1)
    pixels = s[0, 0].numel()
    factor = {"batchmean": pixels, "sum": pixels * len(s), "mean": 1 / s.shape[1]}[params["reduction"]]
    return {"loss": value * factor * params.get("loss_weight", 1.0)}


def kd_pixel_cirkd(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    return {"loss": pixel_loss(inputs["in_s"], inputs["in_t"], temperature=params["temperature"])}


def ifvd_pixelkd(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    s, temperature = inputs["in_s"], params["temperature"]
    value = pixel_loss(s, inputs["in_t"], temperature=temperature, upsample=8 if params["upsample"] else 1)
    return {"loss": value / (s.shape[1] * temperature**2)}


def skd_pixelwise(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    return {"loss": pixel_sum(inputs["in_s"], inputs["in_t"])}


def skd_pairwise(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.pairwise_similarity(inputs["in_s"], inputs["in_t"], scale=params["scale"], detach_norm=True)}


def cirkd_skd_pairwise(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.pairwise_similarity(inputs["in_s"], inputs["in_t"], window=2)}


def dist_seg(inputs: Inputs, params: Params) -> dict[str, Tensor]:  # the code for segmentation has no temperature
    weights = {"inter": params["beta"], "intra": params["gamma"]}
    return {"loss": losses.dist(inputs["in_s"], inputs["in_t"], dim=1, **weights)}


def dist_mmrazor4d(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    weights = {ours: params[f"{ours}_loss_weight"] for ours in ("inter", "intra") if f"{ours}_loss_weight" in params}
    value = losses.dist(inputs["in_s"], inputs["in_t"], temperature=params["tau"], dim=1, over="batch", **weights)
    return {"loss": value * params.get("loss_weight", 1.0)}


ADAPTERS: dict[str, Callable[..., Any]] = {
    "segmentation/cirkd_skd_pairwise": cirkd_skd_pairwise,
    "segmentation/cwd": cwd,
    "segmentation/cwd_cirkd_feat": cwd_cirkd_feat,
    "segmentation/cwd_mmrazor": cwd_mmrazor,
    "segmentation/dist_mmrazor4d": dist_mmrazor4d,
    "segmentation/dist_seg": dist_seg,
    "segmentation/ifvd_pixelkd": ifvd_pixelkd,
    "segmentation/kd_pixel_cirkd": kd_pixel_cirkd,
    "segmentation/kl_mmrazor": kl_mmrazor,
    "segmentation/skd_pairwise": skd_pairwise,
    "segmentation/skd_pixelwise": skd_pixelwise,
}
