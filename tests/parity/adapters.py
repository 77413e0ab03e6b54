"""From the arrays of a parity case to taskkd's public API: names and documented factors, no formula.

`ADAPTERS[key](arrays, params) -> {"loss": ..., ...}`; arrays are named `in_*` and `w_*`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd import losses
from taskkd.schedules import Progress, warmup

Arrays = Mapping[str, Tensor]
Params = Mapping[str, Any]


def kd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = arrays["in_student"], arrays["in_teacher"]
    value = losses.kl_divergence(student, teacher, temperature=params["T"], dim=1)
    # DistillKL (its cases record dtype and scale) divides maps by the batch alone: a sum over pixels.
    pixels = student[0, 0].numel() if "scale" in params else 1
    return {"loss": value * pixels}


def dml(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = arrays["in_student"], arrays["in_teacher"]
    return {"loss": losses.kl_divergence(student, teacher, temperature=params["T"])}


def schedule(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    weight = warmup(1.0, steps=params["warmup"])
    epochs = arrays["in_epoch"].tolist()  # counted from 1, our steps from 0
    return {"loss": torch.tensor([weight(Progress(epoch - 1)) for epoch in epochs], dtype=torch.float64)}


def pkd_distillation(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = arrays["in_student_logits"], arrays["in_teacher_logits"]
    task = F.cross_entropy(student, arrays["in_labels"])
    # The authors divide by batch * classes (docstring of patient_kd).
    soft = losses.kl_divergence(student, teacher, temperature=params["T"]) / student.shape[1]
    alpha = params["alpha"]
    return {"loss": alpha * soft + (1 - alpha) * task, "loss_kd": soft, "loss_ce": task}


def pkd_patience(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = arrays["in_student_patience"], arrays["in_teacher_patience"]
    return {"loss": losses.patience(student, teacher, normalise=params["normalized_patience"])}


ADAPTERS: dict[str, Callable[[Arrays, Params], Mapping[str, Tensor]]] = {
    "core/dml": dml,
    "core/kd": kd,
    "core/schedule": schedule,
    "nlp/pkd_distillation": pkd_distillation,
    "nlp/pkd_patience": pkd_patience,
}
