"""Parity adapters of detection losses; see `tests/parity/adapters.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from taskkd.detection.methods.detr_distill import class_cost, target_aware
from taskkd.detection.methods.kd_detr import shared_queries, shared_query_parts

Arrays = Mapping[str, Tensor]
Params = Mapping[str, Any]


def detrdistill_cost(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"cost": class_cost(arrays["in_student_logits"], arrays["in_teacher_prob"])}


def detrdistill_feature(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    levels = range(sum(name.startswith("in_student") for name in arrays))
    students, teachers = ([arrays[f"in_{side}{i}"] for i in levels] for side in ("student", "teacher"))
    queries, scores = arrays["in_queries"], arrays["in_scores"]
    stages = [
        target_aware(students, teachers, queries=q[None], scores=s[None]) for q, s in zip(queries, scores, strict=True)
    ]
    loss = target_aware(students, teachers, queries=queries, scores=scores)
    return {"loss": loss, "stage": torch.stack(stages)}


def kddetr(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    sides = [(arrays[f"in_{side}_logits"], arrays[f"in_{side}_boxes"]) for side in ("student", "teacher")]
    options: dict[str, Any] = {"temperature": params["T"], "compat": "official"}
    parts = shared_query_parts(*sides, **options)
    return {"loss": shared_queries(*sides, **params["weights"], **options), **parts}


ADAPTERS: dict[str, Callable[[Arrays, Params], Mapping[str, Tensor]]] = {
    "detection/detrdistill_cost": detrdistill_cost,
    "detection/detrdistill_feature": detrdistill_feature,
    "detection/kddetr": kddetr,
}
