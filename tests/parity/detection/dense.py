"""Parity adapters of detection losses; see `tests/parity/adapters.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from taskkd.detection.methods.crosskd import standardise_like
from taskkd.detection.methods.dense_losses import distribution_kl, quality_focal
from taskkd.detection.methods.localization import ld_terms
from taskkd.detection.methods.vlr import assign_atss, fine_grained_region, inside_region, vlr_weights

Arrays = Mapping[str, Tensor]
Params = Mapping[str, Any]


def ld_kl(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    value = distribution_kl(
        arrays["in_student"],
        arrays["in_teacher"],
        temperature=params["T"],
        weights=arrays.get("in_weight"),
        divisor=params["avg_factor"],
    )
    return {"loss": value * params["loss_weight"]}


def crosskd_ld(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    value = distribution_kl(
        arrays["in_student"],
        arrays["in_teacher"],
        temperature=params["T"],
        bins="sum",
        weights=arrays.get("in_weight"),
        divisor=params["avg_factor"],
    )
    return {"loss": value * params["loss_weight"]}


def crosskd_qfl(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    value = quality_focal(
        arrays["in_student"],
        arrays["in_teacher"],
        beta=params["beta"],
        weights=arrays.get("in_weight"),
        divisor=params["avg_factor"],
    )
    return {"loss": value * params["loss_weight"]}


def crosskd_align(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    aligned = standardise_like(arrays["in_student"], arrays["in_teacher"])
    return {"aligned": aligned, "loss": aligned.square().sum()}  # the case's scalar, for the gradient alone


def ld_regions(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    anchors, boxes, sizes = arrays["in_anchors"], arrays["in_boxes"], arrays["in_level_sizes"].tolist()
    return {
        "vlr": vlr_weights(anchors, boxes, sizes, candidates=params["topk"], legacy_iof=True),
        "finegrained": fine_grained_region(anchors, boxes),
        "insidegt": inside_region(anchors, boxes),
        "atss_assigned": assign_atss(anchors, boxes, sizes, candidates=params["topk"]) + 1,
    }


def ld_head(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    def rows(name: str) -> Tensor:  # (N, k, h, w) -> (N, A, k)
        return arrays[name].flatten(2).transpose(1, 2)

    def sides(name: str) -> Tensor:
        return rows(name).unflatten(-1, (4, params["reg_max"] + 1))

    values = ld_terms(
        rows("in_student_cls"),
        rows("in_teacher_cls"),
        sides("in_student_reg"),
        sides("in_teacher_reg"),
        positive=arrays["in_labels"] < arrays["in_student_cls"].shape[1],
        vlr=arrays["in_vlr"],
        temperature=params["ld"][1],
        vlr_temperature=params["ld_vlr"][1],
        class_temperature=params["kd"][1],
        normalise="authors",
    )
    weights = {name: params[name][0] for name in ("ld", "ld_vlr", "kd")}
    found = {name: weights[name] * values[name] for name in weights}
    return {**found, "loss": torch.stack(list(found.values())).sum()}


ADAPTERS: dict[str, Callable[[Arrays, Params], Mapping[str, Tensor]]] = {
    "detection/ld_kl": ld_kl,
    "detection/ld_regions": ld_regions,
    "detection/ld_head": ld_head,
    "detection/crosskd_align": crosskd_align,
    "detection/crosskd_qfl": crosskd_qfl,
    "detection/crosskd_ld": crosskd_ld,
}
