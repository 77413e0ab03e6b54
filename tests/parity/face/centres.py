"""Parity adapters of the face recognition package: centres."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskkd import losses
from taskkd.face.methods.ada_distill import adaptive_alpha, move_centres
from taskkd.face.methods.centre_term import margin_logits, margin_softmax
from taskkd.face.methods.margin_distillation import teacher_margins
from taskkd.face.methods.triplet_distillation import triplet_margin_loss

Arrays = Mapping[str, Tensor]
Params = Mapping[str, Any]


def margin_of(params: Params) -> dict[str, Any]:
    """Which margin: theirs is added as a float32; the cases of CosFace are those of 0.35, which alone says it."""
    margin = "cos" if params["m"] < 0.4 else "arc"
    return {"margin": margin, "m": float(np.float32(params["m"])), "s": float(params["s"])}


def classified(arrays: Arrays, centres: Tensor, params: Params) -> dict[str, Tensor]:
    options = {"labels": arrays["in_y"], **margin_of(params)}
    s = arrays["in_s"]
    return {"loss": margin_softmax(s, centres, **options), "logits": margin_logits(s, centres, **options)}


def proxyless(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return classified(arrays, arrays["w_kernel"].T, params)


def ada_distill(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t, labels = arrays["in_s"].detach(), arrays["in_t"], arrays["in_y"]
    centres = arrays["w_kernel"].detach().T.clone()
    if "momentum" in params:
        alpha = torch.full_like(s[:, 0], params["momentum"])
    else:
        own = centres[labels] if params["adaptive_weighted_alpha"] else None
        alpha = adaptive_alpha(s, t, centres=own)
    move_centres(centres, t, labels=labels, alpha=alpha)
    return {**classified(arrays, centres, params), "kernel": centres.T, "alpha_mean": alpha.mean()}


def gradients(value: Tensor, arrays: Arrays) -> dict[str, Tensor]:
    """Of what their case differentiates, where that is more than the loss that it reports."""
    names = [n for n in ("in_s", "w_student_weight") if n in arrays and arrays[n].requires_grad]
    found = torch.autograd.grad(value, [arrays[n] for n in names])
    return {f"grad_{n.partition('_')[2]}": g for n, g in zip(names, found, strict=True)}


def softmax_of(arrays: Arrays, params: Params, m: float | Tensor) -> dict[str, Tensor]:
    s, centres = arrays["in_s"], arrays["w_student_weight"]
    options = {"labels": arrays["in_y"], "m": m, "s": params["loss_s"]}
    loss = margin_softmax(s, centres, **options)
    return {"loss": loss, "softmax": margin_logits(s, centres, **options).softmax(1)}


def margin_distillation(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"m_min": params["Mmin"], "m_max": params["Mmax"], "clip": False}
    margins = teacher_margins(arrays["w_student_weight"], arrays["in_t"], labels=arrays["in_y"], **options)
    return softmax_of(arrays, params, margins)


def angular_distillation(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    found = softmax_of(arrays, params, params.get("loss_m", 0.5))
    angle = losses.cosine(arrays["in_s"], arrays["in_t"])
    # Their weight `alpha` has no effect on the gradient (docstring of angular_distillation).
    return {**found, "cos_loss": angle, **gradients(found["loss"] + angle, arrays)}


def blocks(samples: int) -> Tensor:
    """Their batches are anchors, positives and negatives, a third each."""
    return torch.arange(samples).reshape(3, -1)


def triplet(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    kind: Any = {"triplet_distillation_L2": "l2", "triplet_distillation_cos": "cosine"}[params["loss_name"]]
    options = {"kind": kind, "m_min": params["Mmin"], "m_max": params["Mmax"]}
    s, t = arrays["in_s"], arrays["in_t"]
    return {"loss": triplet_margin_loss(s, t, triplets=blocks(len(s)), **options)}


def fsp(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    maps = [[arrays[f"in_{side}{i}"] for i in (1, 2)] for side in "st"]
    return {"loss": losses.flow_of_solution(*maps)}


ADAPTERS: dict[str, Any] = {
    "face/adadistill": ada_distill,
    "face/adadistill_fixed_momentum": ada_distill,
    "face/angular_distillation": angular_distillation,
    "face/arcdistill_cosdistill": proxyless,
    "face/fsp": fsp,
    "face/margin_distillation": margin_distillation,
    "face/triplet_distillation_cos": triplet,
    "face/triplet_distillation_l2": triplet,
}
