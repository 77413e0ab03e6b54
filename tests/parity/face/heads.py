"""Parity adapters of the face recognition package: heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from taskkd.face import margins
from taskkd.face.heads import MarginHead
from taskkd.face.partial_fc import PartialFC

Inputs = Mapping[str, Tensor]
Params = Mapping[str, Any]


def head_of(inputs: Inputs, **options: Any) -> tuple[MarginHead, Tensor]:
    """A head of the case's sizes and precision, and the case's classifier, one row per class."""
    weight = inputs["w_kernel"].T if "w_kernel" in inputs else inputs["w_weight"]
    head = MarginHead(*weight.shape, **options)
    return (head.double() if weight.dtype == torch.float64 else head), weight


def run(inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    head, weight = head_of(inputs, **options)
    result = {"loss": head.loss(inputs["in_x"], inputs["in_y"], weight)}
    state = {"norm_mean": "batch_mean", "norm_std": "batch_std", "t": "t"}
    return result | {theirs: getattr(head.margin, ours) for ours, theirs in state.items() if hasattr(head.margin, ours)}


def arcface(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    if "scale" not in params:  # the AdaFace repository names its options otherwise
        return run(inputs, s=params["s"], m=params["m"], variant="adaface_repo")
    return run(inputs, s=params["scale"], m=params["margin"], easy_margin=params.get("easy_margin", False))


def cosface(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    if "scale" not in params:
        return run(inputs, kind="cosface", s=params["s"], m=params["m"], variant="adaface_repo")
    return run(inputs, kind="cosface", s=params["scale"], m=params["margin"])


def curricularface(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    return run(inputs, kind="curricularface", s=params["scale"], m=params["margin"], ema=params["alpha"])


def adaface(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    options = {"kind": "adaface", **{k: params[k] for k in ("s", "m", "h")}, "ema": params["t_alpha"]}
    if "w_kernel" in inputs:
        return run(inputs, **options)
    return run(inputs, **options, variant="cvlface", filter_above=params.get("interclass_filtering_threshold") or None)


def combined(params: Params) -> dict[str, Any]:
    """insightface's three margins as a kind: the second is ArcFace's, the third CosFace's."""
    return {
        "kind": "cosface" if params["m3"] > 0 else "arcface",
        "m": params["m3"] if params["m3"] > 0 else params["m2"],
        "s": params["s"],
        "variant": "insightface",
        "filter_above": params.get("interclass_filtering_threshold") or None,
    }


def combined_margin_loss(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    options = combined(params)
    result = run(inputs, **options)
    logits = getattr(margins, options.pop("kind"))(inputs["in_cos"], inputs["in_y"], **options)
    return result | {"logits": logits}


def partial_fc(inputs: Inputs, params: Params) -> dict[str, Tensor]:
    """One process sees the classes that all ranks saw: the softmax is the same. `test_partial_fc.py` runs the ranks."""
    ranks = range(params["world_size"])
    weight, x = inputs["w_weight"], inputs["in_x"].detach().clone().requires_grad_()
    head = PartialFC(*weight.shape, centres=weight, sample_rate=1.0, compat="official", **combined(params["margin"]))
    starts = [int(inputs[f"in_class_start_rank{r}"]) for r in ranks]
    seen = [inputs.get(f"in_weight_index_rank{r}") for r in ranks]
    index = (
        None if any(i is None for i in seen) else torch.cat([i + start for i, start in zip(seen, starts, strict=True)])
    )
    value = head.loss(x, inputs["in_y"], index)
    value.backward()
    ((_, gradient),) = head._gradients
    dense = gradient if index is None else torch.zeros_like(weight).index_copy_(0, index, gradient)
    result = {"loss": value}
    for r, (start, end) in enumerate(zip(starts, [*starts[1:], len(weight)], strict=True)):
        own = slice(r * params["n"], (r + 1) * params["n"])
        result[f"loss_rank{r}"] = value
        result[f"grad_x_rank{r}"] = x.grad[own] * len(ranks)  # which DDP divides by
        result[f"grad_weight_rank{r}"] = dense[start:end]
    return result


ADAPTERS: dict[str, Callable[..., Any]] = {
    "face/adaface": adaface,
    "face/adaface_ema": adaface,
    "face/arcface": arcface,
    "face/arcface_easy": arcface,
    "face/combinedmarginloss_arc": combined_margin_loss,
    "face/combinedmarginloss_arc_filter": combined_margin_loss,
    "face/combinedmarginloss_cos": combined_margin_loss,
    "face/cosface": cosface,
    "face/curricularface": curricularface,
    "face/partialfc_v2": partial_fc,
}
