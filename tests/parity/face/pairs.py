"""Parity adapters of the face recognition package: pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taskkd.face.methods.ddl import ddl_loss, ddl_parts
from taskkd.face.methods.ekd import EvaluationDistillation
from taskkd.terms import Run

Arrays = Mapping[str, Tensor]
Params = Mapping[str, Any]


def branches_of(arrays: Arrays) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Features of identities and pairs of each branch."""
    count = sum(name.startswith("in_neg") for name in arrays)
    identities = [arrays[f"in_neg{i}"] for i in range(count)]
    return identities, [(arrays[f"in_pos1{i}"], arrays[f"in_pos2{i}"]) for i in range(count)]


def ddl_options(params: Params) -> dict[str, Any]:
    """Their weights by our names."""
    ours = {"positive": "pos_kl_weight", "negative": "neg_kl_weight", "order": "order_loss_weight"}
    return {name: params[theirs] for name, theirs in ours.items()} | {"sigma": params["sigma"]}


def ddl(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    arrays = {n: x.requires_grad_() if n.startswith(("in_neg", "in_pos")) else x for n, x in arrays.items()}
    branches, bins = branches_of(arrays), arrays["w_t"].numel()
    loss = ddl_loss(*branches, bins=bins, compat="tface", **ddl_options(params))
    parts = ddl_parts(*branches, bins=bins, compat="tface", sigma=params["sigma"])
    found = {"loss": loss, **{name: parts[name] for name in ("kl_pos", "kl_neg", "order")}}
    for name in ("pos", "neg"):
        for i, (row, weight) in enumerate(zip(parts[name], parts[f"{name}_weight"], strict=True)):
            found[f"{name}dist{i}"] = row[weight > 0]
            found[f"{name}hist{i}"] = parts[f"{name}_hist"][i, ::10]
    # Gradients of pairs are named otherwise than the inputs.
    names = [n for n in arrays if n.startswith("in_pos")]
    slopes = torch.autograd.grad(loss, [arrays[n] for n in names], retain_graph=True)
    return found | {f"grad_{n[3:7]}_{n[7:]}": g for n, g in zip(names, slopes, strict=True)}


def ekd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    term = EvaluationDistillation(
        anchors=params["anchor"],
        topk=params["topk"],
        temperature=params["t"],
        momentum=params["momentum"],
        positive=params["w_pos"],
        negative=params["w_neg"],
    ).double()
    found: dict[str, Tensor] = {}
    total = []
    for step in range(sum(name.startswith("in_y") for name in arrays)):
        value = term(Run({"labels": arrays[f"in_y{step}"]}, None, *embeddings(arrays, step)))
        total.append(value)
        found[f"loss{step}"] = value
        found |= {
            f"s_anchor{step}": term.student_thresholds.clone(),
            f"t_anchor{step}": term.teacher_thresholds.clone(),
        }
    return found | {"loss": torch.stack(total)}


def embeddings(arrays: Arrays, step: int) -> list[dict[str, Tensor]]:
    return [{"out.embeddings": arrays[f"in_{side}{step}"]} for side in "st"]


ADAPTERS: dict[str, Any] = {"face/ddl": ddl, "face/ekd": ekd}
