"""Parity adapters of detection losses; see `tests/parity/adapters.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from taskkd.detection.methods.chen import (
    bounded_distance,
    bounded_regression,
    hard_and_soft,
    weighted_soft_targets,
)
from taskkd.detection.methods.gdetkd import (
    SemanticGuide,
    class_aware_regression,
    level_weights,
    region_contrast,
    semantic_guided,
)
from taskkd.detection.methods.gid import (
    distribution_boxes,
    general_instances,
    instance_classification,
    instance_feature,
    instance_regression,
    instance_relation,
)
from taskkd.detection.methods.yolo_response import objectness_scaled

Arrays = Mapping[str, Tensor]
Params = Mapping[str, Any]


def chen_wce(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    options = {
        "background_weight": params["w_background"],
        "background": params["background_index"],
        "temperature": params["T"],
    }
    whole = hard_and_soft(s, t, labels=arrays["in_labels"], mu=params["mu"], **options)
    return {"loss": whole, "soft": weighted_soft_targets(s, t, **options)}


def chen_bounded(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    given = arrays["in_student"], arrays["in_teacher"], arrays["in_target"]
    whole = bounded_regression(*given, nu=params["nu"], margin=params["margin"])
    return {"loss": whole, "bounded": bounded_distance(*given, margin=params["margin"])}


def gid_feature(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    distance = params.get("mode", "L2").lower()
    return {"loss": instance_feature(arrays["in_student"], arrays["in_teacher"], distance=distance)}


def gid_relation(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    return {"loss": instance_relation(s, t, beta=params["beta"], pairs="all").reshape(1)}


def gid_response(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t, mask = arrays["in_student"], arrays["in_teacher"], arrays["in_mask"]
    mode = params["mode"].lower()
    if mode == "bce":
        return {"loss": instance_classification(s, t, mask=mask)}
    return {"loss": instance_regression(s, t, mask=mask, beta=params.get("beta", 1.0), distance=mode)}


def gid_select(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    height, width = arrays["in_image_size"].tolist()
    s, t = arrays["in_student_logits"].sigmoid(), arrays["in_teacher_logits"].sigmoid()
    found = general_instances(
        s,
        t,
        arrays["in_student_boxes"],
        arrays["in_teacher_boxes"],
        sizes=[(height, width)] * len(s),
        score="abs_max_diff",
        nms=params["nms"],
        candidates=params["pre_topk"],
        instances=params["post_topk"],
        min_side=params["min_side"],
    )
    low, high = params["matcher"]
    matcher = Matcher(high, low, params["allow_low_quality"])
    matches = [matcher(box_iou(boxes, arrays["in_anchors"])) for boxes in found.boxes]
    result = {f"boxes{i}": boxes for i, boxes in enumerate(found.boxes)}
    result |= {f"scores{i}": scores for i, scores in enumerate(found.scores)}
    return result | {"response_mask": torch.stack(matches) >= 0}


def gid_select_ld(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    boxes = [
        distribution_boxes(arrays[f"in_{side}_reg"], arrays["in_anchors"], stride=params["stride"])
        for side in ("student", "teacher")
    ]
    s, t = arrays["in_student_cls"].sigmoid(), arrays["in_teacher_cls"].sigmoid()
    found = general_instances(
        s[None],
        t[None],
        boxes[0][None],
        boxes[1][None],
        side="by_class",
        nms=params["nms"],
        candidates=len(s),
        instances=params["topk"],
        min_side=0.0,
    )
    return {"indices": found.indices[0]}


def gdetkd_sgfi(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    embedding = arrays["w_embed.2.weight"].shape[0]
    guide = SemanticGuide(s.shape[2], t.shape[1], embedding=embedding).to(s.dtype)
    tau = torch.as_tensor(params["tau"], dtype=s.dtype)
    weights = {name[2:]: value for name, value in arrays.items() if name.startswith("w_")} | {"log_tau": tau.log()}
    adapted, keys, others = functional_call(guide, weights, (list(s), t))
    loss = semantic_guided(adapted, t, keys=keys, teacher_keys=others, tau=params["tau"])
    return {"loss": loss, "alpha": level_weights(keys, others, tau=params["tau"])}


def gdetkd_ckd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    loss = region_contrast(
        arrays["in_student"],
        arrays["in_teacher"],
        boxes=arrays["in_boxes"],
        queue=arrays["in_queue"],
        gamma=params["gamma"],
        iou=params["iou_filter"],
    )
    return {"loss": loss}


def gdetkd_reg(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = arrays["in_student"], arrays["in_teacher"]
    return {"loss": class_aware_regression(s, t, probabilities=arrays["in_teacher_prob"])}


def yolo_objscaled(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = (
        (
            torch.stack([arrays[f"in_{side}_{part}"] for part in "xywh"], -1),
            arrays[f"in_{side}_obj"],
            arrays[f"in_{side}_cls"],
        )
        for side in ("student", "teacher")
    )
    result = {"loss": params["weight"] * objectness_scaled(student, teacher)}
    for name, parts in {"reg": (1.0, 0.0, 0.0), "cls": (0.0, 1.0, 0.0), "obj": (0.0, 0.0, 1.0)}.items():
        result[name] = objectness_scaled(student, teacher, parts=parts)
    return result


ADAPTERS: dict[str, Callable[[Arrays, Params], Mapping[str, Tensor]]] = {
    "detection/chen_bounded": chen_bounded,
    "detection/chen_wce": chen_wce,
    "detection/gdetkd_ckd": gdetkd_ckd,
    "detection/gdetkd_reg": gdetkd_reg,
    "detection/gdetkd_sgfi": gdetkd_sgfi,
    "detection/gid_feature": gid_feature,
    "detection/gid_relation": gid_relation,
    "detection/gid_response": gid_response,
    "detection/gid_select": gid_select,
    "detection/gid_select_ld": gid_select_ld,
    "detection/yolo_objscaled": yolo_objscaled,
}
