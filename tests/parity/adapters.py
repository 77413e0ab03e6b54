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
from taskkd.losses.features import overhaul_margin
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


def levels(arrays: Arrays, side: str) -> list[Tensor]:
    """`in_s0, in_s1, ...` in order."""
    return [arrays[f"in_{side}{i}"] for i in range(sum(name.startswith(f"in_{side}") for name in arrays))]


def attention_transfer(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    distance = "euclidean" if params.get("mode") == "paper" else "squared"
    s, t = arrays["in_student"], arrays["in_teacher"]
    return {"loss": losses.attention_transfer(s, t, power=params["p"], distance=distance)}


def own_teacher(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    return {"loss": losses.partial_mse(s, t) * s.numel()}  # they sum


def factor_transfer(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    if "p1" in params:  # RepDistiller's loss of this name compares attention maps
        distance = {1: "absolute", 2: "squared"}[params["p2"]]
        return {"loss": losses.attention_transfer(s, t, power=params["p1"], distance=distance)}
    return {"loss": losses.factor(s, t)}


def flow_of_solution(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    students, teachers = levels(arrays, "s"), levels(arrays, "t")
    options = {name: params[name] for name in ("pool", "squared") if name in params}
    value = losses.flow_of_solution(students, teachers, **options)
    columns = 1 if params.get("squared", True) else students[-1].shape[1]
    return {"loss": value * (len(students) - 1) * columns}  # they sum over pairs, and over columns if not squared


def hint(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.mse(arrays["in_student"], arrays["in_teacher"])}


def overhaul(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    if "in_bn_weight" in arrays:
        return {"loss": overhaul_margin(arrays["in_bn_weight"], arrays["in_bn_bias"])}
    s, t = arrays["in_student"], arrays["in_teacher"]
    return {"loss": losses.overhaul(s, t, margin=arrays["in_margin"]) * s.numel()}  # they sum


def activation_boundaries(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    return {"loss": losses.activation_boundaries(s, t, margin=params["margin"]) * s.numel()}  # they sum


def neuron_selectivity(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.neuron_selectivity(arrays["in_student"], arrays["in_teacher"])}


def variational_information(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    mean = arrays["in_student"]  # through their network of 1x1 convolutions
    for i in (0, 2, 4):
        mean = F.conv2d(mean.relu() if i else mean, arrays[f"w_regressor.{i}.weight"])
    pair = (mean, arrays["w_log_scale"])
    return {"loss": losses.variational_information(pair, arrays["in_teacher"], eps=params["eps"])}


def prediction_aware(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    pair = (arrays["in_student"], arrays["in_log_var"])
    return {"loss": losses.prediction_aware(pair, arrays["in_teacher"], eps=params["eps"])}


def pyramid(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    students, teachers = levels(arrays, "s"), levels(arrays, "t")
    return {"loss": losses.pyramid(students, teachers) * len(students)}  # they sum over levels


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
    "core/ab": activation_boundaries,
    "core/at": attention_transfer,
    "core/byot": own_teacher,
    "core/dml": dml,
    "core/fitnet": hint,
    "core/fsp": flow_of_solution,
    "core/ft": factor_transfer,
    "core/kd": kd,
    "core/nst": neuron_selectivity,
    "core/ofd": overhaul,
    "core/pad": prediction_aware,
    "core/reviewkd_hcl": pyramid,
    "core/schedule": schedule,
    "core/vid": variational_information,
    "nlp/pkd_distillation": pkd_distillation,
    "nlp/pkd_patience": pkd_patience,
}
