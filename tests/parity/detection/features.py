"""Parity adapters of detection losses; see `tests/parity/adapters.py`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from taskkd.detection.methods.channel_wise import channel_wise_loss
from taskkd.detection.methods.defeat import defeat_loss
from taskkd.detection.methods.fbkd import NonLocal, StudentMaps, fbkd_loss
from taskkd.detection.methods.fgd import GlobalContext, attention_maps, fgd_loss, focal_loss, global_loss
from taskkd.detection.methods.fgfi import fgfi_loss
from taskkd.detection.methods.masked_generative import kept_cells, masked_generative_loss
from taskkd.detection.methods.mimic import mimic_loss
from taskkd.detection.methods.pearson_kd import pearson_loss
from taskkd.detection.methods.quantization_mimic import quantise, quantised_mimic_loss
from taskkd.detection.methods.score_weighted import score_weighted_loss
from taskkd.detection.regions import assign_levels, fgd_masks, fgfi_masks, inside_boxes

Arrays = Mapping[str, Tensor]
Params = Mapping[str, Any]


def numbered(arrays: Arrays, name: str) -> list[Tensor]:
    found = [n for n in arrays if re.fullmatch(rf"in_{name}\d+", n)]
    return [arrays[n] for n in sorted(found, key=lambda n: int(n.removeprefix(f"in_{name}")))]


class Given(nn.Module):
    """A module with the case's weights in place of its own, with their gradients."""

    def __init__(self, module: nn.Module, arrays: Arrays, rename: Callable[[str], str | None]) -> None:
        super().__init__()
        weights = {rename(n.removeprefix("w_")): v for n, v in arrays.items() if n.startswith("w_")}
        self.module = module.double()
        self.weights = {n: v for n, v in weights.items() if n is not None}
        # so that no weight stays as it was drawn
        assert set(self.weights) == {n for n, _ in self.module.named_parameters()}

    def forward(self, x: Tensor) -> Any:
        return functional_call(self.module, self.weights, (x,))


def under(prefix: str, then: str = "") -> Callable[[str], str | None]:
    """The names below a prefix, put below another."""
    return lambda name: then + name.removeprefix(prefix) if name.startswith(prefix) else None


def adapted(arrays: Arrays, prefix: str = "align.") -> Tensor:
    """The student's map, through the 1x1 convolution if there is one."""
    weight = arrays.get(f"w_{prefix}weight")
    if weight is None:
        return arrays["in_student"]
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    mapped: Tensor = Given(conv, arrays, under(prefix))(arrays["in_student"])
    return mapped


def fgfi(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    height, width = arrays["in_student"].shape[2:]
    base, stride = arrays["in_base_anchors"], params["feat_stride"]
    y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
    anchors = (torch.stack([x, y, x, y], -1).reshape(-1, 1, 4) + base).flatten(0, 1)
    (mask,) = fgfi_masks(
        [arrays["in_boxes"].reshape(-1, 4)],
        [anchors],
        [(height, width)],
        psi=params["threshold_factor"],
        plus_one=True,
    )
    weight = arrays["w_adap.0.weight"]
    adapter = nn.Sequential(nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1), nn.ReLU())
    student = Given(adapter, arrays, under("adap."))(arrays["in_student"])
    loss = fgfi_loss(student, arrays["in_teacher"], masks=mask)
    return {"loss": params["imitation_loss_weight"] * loss, "mask": mask[:, None].float()}


def defeat(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    boxes, students, teachers = (numbered(arrays, n) for n in ("boxes", "student", "teacher"))
    shapes = [(s.shape[2], s.shape[3]) for s in students]
    masks = inside_boxes(boxes, shapes, [(s, s) for s in params["strides"]], finest=56.0)
    near = fgfi_masks(boxes, numbered(arrays, "anchors"), shapes, psi=params["phi"])
    parts = {"fg": (params["hint_neck_w"], 0.0), "bg": (0.0, params["hint_neck_back_w"])}
    found = {
        name: defeat_loss(students, teachers, masks=masks, foreground=fg, background=bg).reshape(1)
        for name, (fg, bg) in parts.items()
    }
    found |= {f"levels{i}": assign_levels(b, len(shapes)) for i, b in enumerate(boxes)}
    found |= {f"gt_mask{i}": m.double() for i, m in enumerate(masks)}
    found |= {f"fgfi_mask{i}": m.double() for i, m in enumerate(near)}
    return {**found, "loss": found["fg"] + found["bg"]}


def fgd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = adapted(arrays), arrays["in_teacher"]
    shape = [(student.shape[2], student.shape[3])]
    ((foreground, background),) = fgd_masks(numbered(arrays, "boxes"), shape, arrays["in_img_shapes"].tolist())
    contexts = {}
    for side in ("student", "teacher"):
        known = {f"conv_mask_{side[0]}.": "mask.", f"channel_add_conv_{side[0]}.": "add."}

        def rename(name: str, known: dict[str, str] = known) -> str | None:
            return next((under(a, b)(name) for a, b in known.items() if name.startswith(a)), None)

        contexts[f"{side}_context"] = Given(GlobalContext(teacher.shape[1]), arrays, rename)
    masks = {"foreground": foreground, "background": background}
    loss = fgd_loss(
        student,
        teacher,
        **masks,
        **contexts,
        temperature=params["temp"],
        alpha=params["alpha_fgd"],
        beta=params["beta_fgd"],
        gamma=params["gamma_fgd"],
        relation=params["lambda_fgd"],
    )
    where, which = attention_maps(teacher, params["temp"])
    attention = focal_loss(student, teacher, **masks, temperature=params["temp"], alpha=0.0, beta=0.0, gamma=1.0)
    relations = global_loss(student, teacher, **contexts)
    return {"loss": loss, "mask_loss": attention, "rela_loss": relations, "S_t": where, "C_t": which}


def mgd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    student, teacher = adapted(arrays), arrays["in_teacher"]
    c = teacher.shape[1]
    generator = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1))
    loss = masked_generative_loss(
        student,
        teacher,
        generator=Given(generator, arrays, under("generation.")),
        kept=kept_cells(student, params["lambda_mgd"], draw=arrays["in_rand"]),
    )
    return {"loss": params["alpha_mgd"] * loss}


def pkd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    resize = "student" if params["resize_stu"] else "teacher"
    loss = pearson_loss(numbered(arrays, "student"), numbered(arrays, "teacher"), resize=resize)
    return {"loss": params["loss_weight"] * loss}


def cwd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    loss = channel_wise_loss(arrays["in_student"], arrays["in_teacher"], temperature=params["tau"])
    return {"loss": params["loss_weight"] * loss}


BLOCK = {"theta.conv": "theta", "conv_out.conv": "out", "conv_out.bn": "norm"}
STUDENT = {
    "channel_wise_adaptation": "channels",
    "spatial_wise_adaptation": "space",
    "adaptation_layers": "map",
    "non_local_adaptation": "relations.1",
}


def block_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    sampled = re.sub(r"^(g|phi)(\.0)*\.conv$", r"\1", module)  # wrapped once for each pooling
    return f"{BLOCK.get(module, sampled)}.{kind}"


def student_name(name: str) -> str | None:
    if not name.startswith("student."):
        return None
    name = name.removeprefix("student.")
    if name.startswith("student_non_local."):
        return "relations.0." + block_name(name.removeprefix("student_non_local."))
    module, _, kind = name.rpartition(".")
    return f"{STUDENT[module]}.{kind}"


def teacher_name(name: str) -> str | None:
    prefix = "teacher.teacher_non_local."
    return block_name(name.removeprefix(prefix)) if name.startswith(prefix) else None


def fbkd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    c = params["in_channels"]
    pool = 2 * params["maxpool_stride"] if params["sub_sample"] else 1  # mmrazor pools twice
    options = {"reduction": params["reduction"], "pool": pool, "mode": params["mode"]}
    loss = fbkd_loss(
        arrays["in_student"],
        arrays["in_teacher"],
        student_maps=Given(StudentMaps(c, c, **options), arrays, student_name),
        teacher_relations=Given(NonLocal(c, **options), arrays, teacher_name),
        temperature=params["spatial_T"],
        feature=params["mask_l2_weight"],
        channel=params["channel_weight"],
        space=params["spatial_weight"],
        relation=params["nonlocal_weight"],
        over="batch",
    )
    return {"loss": loss}


def sl2(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": score_weighted_loss(arrays["in_student"], arrays["in_teacher"], scores=arrays["in_score"])}


def li_mimic(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    weight = arrays["w_weight"]
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    kernel = {"w_weight": weight[..., None, None], "w_bias": arrays["w_bias"]}
    adapter = Given(conv, kernel, lambda name: name)
    students = [adapter(s[None])[0] for s in numbered(arrays, "student")]
    normalise = "elements" if params["normalize"] else "none"
    return {"loss": mimic_loss(students, numbered(arrays, "teacher"), normalise=normalise)}


def quant_mimic(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t, step = arrays["in_student_adapted"], arrays["in_teacher"], params["step"]
    quantised = {"q_student": quantise(s, step), "q_teacher": quantise(t, step)}
    return {"loss": quantised_mimic_loss(s, t, step=step), **quantised}


ADAPTERS: dict[str, Callable[[Arrays, Params], Mapping[str, Tensor]]] = {
    "detection/cwd": cwd,
    "detection/defeat": defeat,
    "detection/fbkd": fbkd,
    "detection/fgd": fgd,
    "detection/fgfi": fgfi,
    "detection/li_mimic": li_mimic,
    "detection/mgd": mgd,
    "detection/pkd": pkd,
    "detection/quant_mimic": quant_mimic,
    "detection/sl2": sl2,
}
