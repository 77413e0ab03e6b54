"""From the arrays of a parity case to taskkd's public API: names and documented factors, no formula.

`ADAPTERS[key](arrays, params) -> {"loss": ..., ...}`; arrays are named `in_*` and `w_*`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd import losses
from taskkd.adapters import ABF, ChannelAssign, ConvReg, Variational
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


def loaded(module: nn.Module, arrays: Arrays, names: Mapping[str, str]) -> nn.Module:
    """`module` in float64 with their weights; `names` are their prefixes by ours."""
    state = {}
    for ours, theirs in names.items():
        found = {n.removeprefix(f"w_{theirs}."): v for n, v in arrays.items() if n.startswith(f"w_{theirs}.")}
        state |= {f"{ours}.{name}": value for name, value in found.items()}
    module.double().load_state_dict(state)
    return module


def hint(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    if "w_conv.weight" not in arrays:
        return {"loss": losses.mse(s, t)}
    regressor = loaded(ConvReg(s.shape[1:], t.shape[1:]), arrays, {"map": "conv", "norm": "bn"})
    mapped = regressor(s, t)
    return {"loss": losses.mse(mapped, t), "reg": mapped}


def review(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    students, teachers = levels(arrays, "s"), levels(arrays, "t")
    fusion = ABF(params["in_channels"], params["out_channels"], mid=params["mid_channel"])
    names, deepest = {}, len(students) - 1  # they count from the deepest
    for level in range(len(students)):
        parts = {"reduce": "conv1", "expand": "conv2"}
        names |= {f"{ours}.{level}": f"abf{deepest - level}.{theirs}" for ours, theirs in parts.items()}
        if level < deepest:
            names[f"attention.{level}"] = f"abf{deepest - level}.att_conv.0"
    mapped = loaded(fusion, arrays, names)(students, teachers)
    return {"loss": losses.pyramid(mapped, teachers) * len(students)}  # they sum over levels


def channel_matching(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, margin, size = arrays["in_student"], arrays["in_margin"], arrays["in_student"].shape[1]
    teacher = ChannelAssign(arrays["in_flow"], size)(arrays["in_teacher"])
    margin = ChannelAssign(arrays["in_flow"], size, reduce="mean")(margin)
    value = losses.overhaul(s, teacher, margin=margin) * s.numel()  # they sum
    return {"loss": value, "teacher_reduced": teacher, "margin_reduced": margin}


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
    s, t = arrays["in_student"], arrays["in_teacher"]
    mid = arrays["w_regressor.0.weight"].shape[0]
    adapter = Variational(s.shape[1], t.shape[1], mid=mid, variance=params["init_pred_var"], eps=params["eps"]).double()
    # `functional_call`, so that the gradients arrive at their weights
    weights = {f"mean.{i}.weight": arrays[f"w_regressor.{i}.weight"] for i in (0, 2, 4)}
    pair = torch.func.functional_call(adapter, {**weights, "scale": arrays["w_log_scale"]}, (s, t))
    return {"loss": losses.variational_information(pair, t, eps=params["eps"])}


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


def dkd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"alpha": params["alpha"], "beta": params["beta"], "temperature": params["T"]}
    student, teacher = arrays["in_student"], arrays["in_teacher"]
    return {"loss": losses.decoupled(student, teacher, labels=arrays["in_labels"], **options)}


def dist(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"inter": params["beta"], "intra": params["gamma"], "temperature": params["tau"]}
    return {"loss": losses.dist(arrays["in_student"], arrays["in_teacher"], dim=1, **options)}


def pair(arrays: Arrays) -> tuple[Tensor, Tensor]:
    """Student and teacher, as the core's cases (`in_student`) or the face ones (`in_s`) name them."""
    short = "in_s" in arrays
    return arrays["in_s" if short else "in_student"], arrays["in_t" if short else "in_teacher"]


def sp(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.similarity_preserving(*pair(arrays))}


def fr_sp(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.similarity_preserving(*pair(arrays), normalise="samples")}


def rkd_distance(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.relational_distance(*pair(arrays))}


def rkd_angle(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.relational_angle(*pair(arrays))}


def rkd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    distance = losses.relational_distance(*pair(arrays), squared=params.get("squared", False))
    angle = losses.relational_angle(*pair(arrays))
    weights = [params.get("distance_weight", params.get("w_d")), params.get("angle_weight", params.get("w_a"))]
    return {"loss": weights[0] * distance + weights[1] * angle}


def cc(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    if "P_order" in params:
        options = {"gamma": params["gamma"], "order": params["P_order"]}
        return {"loss": losses.correlation_congruence(*pair(arrays), **options)}
    return {"loss": losses.consecutive_correlation(*pair(arrays))}


def fr_cc(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    # TFace's loop leaves out the last order (docstring of correlation_congruence).
    options = {"gamma": params["gamma"], "order": params["p"] - 1}
    return {"loss": losses.correlation_congruence(*pair(arrays), **options)}


def irg(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = ([arrays[f"in_{who}_{name}"] for name in ("fm1", "fm2", "feat", "out")] for who in "st")
    options = {
        "vertices": params["w_irg_vert"],
        "edges": params["w_irg_edge"],
        "transformations": params["w_irg_tran"],
    }
    return {"loss": losses.instance_relationship(student, teacher, **options)}


def cat_ka(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    # The authors minimise the negative alignment: ours minus 1 (docstring of kernel_alignment).
    return {"loss": losses.kernel_alignment(*pair(arrays), centred=False) - 1}


def pkt(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = pair(arrays)
    # The authors divide by batch * batch (docstring of probabilistic_transfer).
    return {"loss": losses.probabilistic_transfer(student, teacher, eps=params["eps"]) / student.shape[0]}


def cskd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    labels, total = arrays["in_labels"], torch.zeros((), dtype=torch.float64)
    for name, compact in (("feat", 0.0), ("logits", params["w_center"])):
        student, teacher = arrays[f"in_student_{name}"], arrays[f"in_teacher_{name}"]
        # The authors divide by features and by classes once more (docstring of category_structure).
        intra, inter = params["w_intra"] / student[0].numel(), params["w_inter"] / labels.unique().numel()
        options = {"intra": intra, "inter": inter, "compact": compact}
        total = total + losses.category_structure(student, teacher, labels=labels, **options)
    return {"loss": total}


def darkrank(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"alpha": params["alpha"], "beta": params["beta"], "length": params["permute_len"]}
    return {"loss": losses.dark_rank(*pair(arrays), **options)}


def fr_darkrank(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    options = {"alpha": params["alpha"], "beta": params["beta"], "length": params["permute_len"]}
    return {"loss": losses.dark_rank(*pair(arrays), normalise=True, **options)}


def fr_cosine(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.cosine(*pair(arrays))}


def fr_fitnet(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.mse(*pair(arrays))}


def fr_kd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.kl_divergence(*pair(arrays), temperature=params["t"])}


ADAPTERS: dict[str, Callable[[Arrays, Params], Mapping[str, Tensor]]] = {
    "core/ab": activation_boundaries,
    "core/at": attention_transfer,
    "core/byot": own_teacher,
    "core/cat_ka": cat_ka,
    "core/cc": cc,
    "core/cskd": cskd,
    "core/darkrank": darkrank,
    "core/dist": dist,
    "core/dkd": dkd,
    "core/dml": dml,
    "core/fitnet": hint,
    "core/fsp": flow_of_solution,
    "core/ft": factor_transfer,
    "core/irg": irg,
    "core/kd": kd,
    "core/mgd_match": channel_matching,
    "core/nst": neuron_selectivity,
    "core/ofd": overhaul,
    "core/pad": prediction_aware,
    "core/pkt": pkt,
    "core/reviewkd": review,
    "core/reviewkd_hcl": pyramid,
    "core/rkd": rkd,
    "core/rkd_a": rkd_angle,
    "core/rkd_d": rkd_distance,
    "core/schedule": schedule,
    "core/sp": sp,
    "core/vid": variational_information,
    "face/fr_cc": fr_cc,
    "face/fr_cosine": fr_cosine,
    "face/fr_darkrank": fr_darkrank,
    "face/fr_fitnet": fr_fitnet,
    "face/fr_kd_t4": fr_kd,
    "face/fr_rkd": rkd,
    "face/fr_sp": fr_sp,
    "face/pkt": pkt,
    "nlp/pkd_distillation": pkd_distillation,
    "nlp/pkd_patience": pkd_patience,
}
