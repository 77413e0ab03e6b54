"""Every method on every kind of detector: acceptance A3, A4, B1, B3, B4, B7 and B8 of the specification."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

import taskkd as kd
from taskkd.detection.methods import METHODS
from taskkd.detection.teacher import DetectorTeacher
from taskkd.errors import TaskkdError
from tests.detection import tiny_detr
from tests.detection.detectors import DETECTORS, batch, sharpened

TWO_STAGE, ONE_STAGE = {"faster_rcnn", "mask_rcnn"}, {"retinanet", "fcos", "ssdlite"}
QUERIES, RT = {"detr", "conditional_detr", "deformable_detr"}, {"rt_detr", "rt_detr_v2", "d_fine"}
ALL = TWO_STAGE | ONE_STAGE | QUERIES | RT
#: method -> the detectors of which a pair can be distilled with its defaults
SUPPORTED: dict[str, set[str]] = {
    "auto": ALL,
    "bckd": {"retinanet", "fcos"} | RT,
    "channel_wise": ALL,
    "chen": ALL - QUERIES,
    "crosskd": {"retinanet", "fcos"},
    "defeat": ALL,
    "detr_distill": QUERIES | RT,
    "fbkd": ALL,
    "fgd": ALL,
    "fgfi": ALL,
    "gdetkd": TWO_STAGE,
    "gid": ALL - QUERIES,
    "kd_detr": QUERIES,
    "localization": {"d_fine"},
    "masked_generative": ALL,
    "mimic": ALL - QUERIES,
    "pearson_kd": ALL,
    "quantization_mimic": ALL - QUERIES,
    "score_weighted": ALL - QUERIES,
    "yolo_response": {"fcos"},
}
#: what is read of these as of others; methods that read no more than the others do are not tried on them again
LIKE_OTHERS = {"mask_rcnn", "conditional_detr", "deformable_detr", "rt_detr_v2", "d_fine"}
THOROUGH = {"auto", "detr_distill", "kd_detr", "localization"}
MORE: list[tuple[str, str, str, dict[str, Any]]] = [
    ("pearson_kd", "fcos", "retinanet", {}),
    ("pearson_kd", "faster_rcnn", "rt_detr", {}),
    ("gdetkd", "retinanet", "faster_rcnn", {"queue": 0}),
    ("gdetkd", "fcos", "faster_rcnn", {}),
    ("gdetkd", "rt_detr", "faster_rcnn", {}),
    ("gid", "faster_rcnn", "faster_rcnn", {"stage": "second"}),
    ("yolo_response", "fcos", "fcos", {"points": "confidence"}),
    ("crosskd", "fcos", "retinanet", {}),
    ("detr_distill", "conditional_detr", "rt_detr", {}),
]
PAIRS = [
    (method, name, name, {})
    for method, names in SUPPORTED.items()
    for name in sorted(names)
    if method in THOROUGH or name not in LIKE_OTHERS
] + MORE
#: of each method, one of its detectors
ONE = {
    m: next(n for n in ("retinanet", "fcos", "faster_rcnn", "detr", "d_fine") if n in s) for m, s in SUPPORTED.items()
}


@cache
def built(name: str, wide: bool) -> nn.Module:
    if name in tiny_detr.NAMES:
        return tiny_detr.detector(name, seed=1, num_queries=12) if wide else tiny_detr.detector(name)
    return DETECTORS[name](16 if wide else 8, seed=int(wide))


def pair(student: str, teacher: str) -> tuple[nn.Module, nn.Module]:
    return copy.deepcopy(built(student, False)), built(teacher, True)


def images(name: str, *boxes: int) -> dict[str, Any]:
    return batch(boxes, masks=name == "mask_rcnn")


def distiller_of(method: str, student: nn.Module, teacher: nn.Module, **options: Any) -> kd.Distiller:
    stage = METHODS[method](student, teacher, **options).stages[0]
    distiller = kd.Distiller(student, DetectorTeacher(teacher, student), stage.terms, task_weight=stage.task_weight)
    distiller.set_total(10)
    return distiller


def still(distiller: kd.Distiller) -> kd.Distiller:
    """In train mode, but for the batch norms, so that what is computed of an image depends on it alone."""
    for module in distiller.train().student.modules():
        if "BatchNorm" in type(module).__name__:
            module.eval()
    return distiller


def terms_of(losses: dict[str, Tensor]) -> dict[str, float]:
    return {n: v.item() for n, v in losses.items() if n not in ("loss", "task")}


def test_the_table_knows_every_method() -> None:
    assert set(SUPPORTED) == set(METHODS)


# ---- what fits together


@pytest.mark.parametrize(
    ("method", "student", "teacher", "options"), PAIRS, ids=["-".join([*p[:3], *p[3]]) for p in PAIRS]
)
def test_a_step(method: str, student: str, teacher: str, options: dict[str, Any]) -> None:
    own, other = pair(student, teacher)
    keys, before = list(own.state_dict()), {n: v.clone() for n, v in other.state_dict().items()}
    distiller = distiller_of(method, own, other, **options)
    reports = distiller.prepare(images(student, 2)).terms  # a batch of one image
    # A student that nobody trained is on no side of the teacher's bound.
    assert all(r.gradient_norm > 0 for r in reports if not r.name.endswith("bound")), reports
    losses = distiller.train()(**images(student, 2, 0))
    losses["loss"].backward()
    assert all(v.isfinite() for v in losses.values())
    assert [n for n, p in own.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [n for n, p in distiller.terms.named_parameters() if p.grad is None] == []
    distiller.zero_grad()
    none = distiller(**images(student, 0))  # one image, and no box
    none["loss"].backward()
    assert all(v.isfinite() for v in none.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in distiller.parameters())
    distiller.close()
    assert list(own.state_dict()) == keys
    assert all(torch.equal(v, before[n]) for n, v in other.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in other.parameters())
    assert not any(m.training for m in other.modules())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_supported_is_refused_in_a_sentence(method: str) -> None:
    for name in sorted(ALL - SUPPORTED[method]):
        with pytest.raises(TaskkdError, match=r"\w+ .*(has no|have no|expected|make no|compares|are a softmax)"):
            distiller_of(method, built(name, False), built(name, True)).prepare(images(name, 2))


@pytest.mark.parametrize("method", METHODS)
def test_one_seed_gives_the_same_losses_and_a_state_that_another_takes(method: str) -> None:
    def steps() -> tuple[list[float], kd.Distiller]:
        student, teacher = pair(ONE[method], "faster_rcnn" if method == "gdetkd" else ONE[method])
        torch.manual_seed(3)
        distiller = distiller_of(method, student, teacher)
        distiller.prepare(batch((2,)))
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
        found = []
        for seed in range(5 if method == "auto" else 2):
            loss = distiller.train()(**batch((2,), seed=seed))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            distiller.step()
            found.append(loss.item())
        return found, distiller

    (first, distiller), (again, other) = steps(), steps()
    assert first == again
    assert len(set(first)) == len(first)
    state = {n: v.clone() for n, v in distiller.state_dict().items()}
    assert not any(n.startswith("teacher") for n in state)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    other.load_state_dict(state)
    assert all(torch.equal(v, state[n]) for n, v in other.state_dict().items())


# ---- what the losses of a pair are


#: terms that draw cells at random, or tell each region from all others
NOT_INVARIANT = {"masked_generative": {"generation"}, "gdetkd": {"contrast"}}


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"auto"}))
def test_a_batch_that_is_repeated_has_the_same_losses(method: str) -> None:
    student, teacher = pair(ONE[method] if method != "gdetkd" else "retinanet", ONE[method])
    # Where all predictions are alike, it is chance which of them are chosen.
    student, teacher = (
        sharpened(copy.deepcopy(m), seed) if hasattr(m, "head") else m for seed, m in enumerate((student, teacher))
    )
    options: dict[str, Any] = {"kd_detr": {"random_queries": 0}, "pearson_kd": {"levels": 2}}.get(method, {})
    distiller = distiller_of(method, student, teacher, **options)
    once, twice = batch((2, 1)), batch((2, 1))
    for key in ("images", "targets"):
        twice[key] = [*twice[key], *copy.deepcopy(twice[key])]
    distiller.prepare(once)
    still(distiller)
    with torch.no_grad():
        a, b = terms_of(distiller(**once)), terms_of(distiller(**twice))
    # deviations are of n - 1 values
    tolerance = 1e-2 if method in ("pearson_kd", "crosskd") else 2e-5
    for name in set(a) - NOT_INVARIANT.get(method, set()):
        assert b[name] == pytest.approx(a[name], rel=tolerance, abs=1e-8), name


#: terms that say nothing where there is no box
REGIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "chen": ({}, {"bound"}),
    "defeat": ({"background": 0.0}, {"maps"}),
    "fgfi": ({}, {"imitation"}),
    "localization": ({}, {"localization", "classification"}),
    "mimic": ({"proposals": "gt"}, {"mimic"}),
    "quantization_mimic": ({"proposals": "gt"}, {"mimic"}),
}


@pytest.mark.parametrize("method", REGIONS)
def test_without_boxes_what_is_limited_to_them_is_exactly_0(method: str) -> None:
    options, names = REGIONS[method]
    distiller = distiller_of(method, *pair(ONE[method], ONE[method]), **options)
    distiller.prepare(batch((2, 1)))
    losses = terms_of(distiller.train()(**batch((0, 0))))
    assert {n: losses[n] for n in names} == dict.fromkeys(names, 0.0)


#: options that leave out what a pair of equals differs by (adapters), and the terms that must be 0
IDENTITY: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "auto": ("retinanet", {}, {"pearson"}),
    "bckd": ("retinanet", {}, {"binary-box"}),
    "channel_wise": ("faster_rcnn", {}, {"channels"}),
    "crosskd": ("retinanet", {}, {"cross-box"}),
    "defeat": ("faster_rcnn", {"adapter": "none"}, {"maps", "classes"}),
    "fgd": ("faster_rcnn", {}, {"focal_global"}),
    "fgfi": ("faster_rcnn", {"adapter": "none"}, {"imitation"}),
    "gdetkd": ("faster_rcnn", {}, {"localisation", "classes"}),
    "gid": ("retinanet", {}, {"boxes"}),
    "kd_detr": ("detr", {"random_queries": 4}, {"queries"}),
    "mimic": ("faster_rcnn", {"adapter": "none", "head_weight": 1.0}, {"mimic", "head"}),
    "pearson_kd": ("faster_rcnn", {}, {"pearson"}),
    "quantization_mimic": ("faster_rcnn", {"adapter": "none"}, {"mimic"}),
    "score_weighted": ("faster_rcnn", {"project": False}, {"scored"}),
}


@pytest.mark.parametrize("method", IDENTITY)
def test_a_student_that_is_its_teacher_loses_nothing(method: str) -> None:
    name, options, zero = IDENTITY[method]
    # KD-DETR compares all of the student's layers with the teacher's last
    teacher = built(name, True) if method != "kd_detr" else tiny_detr.detector(name, decoder_layers=1)
    distiller = distiller_of(method, copy.deepcopy(teacher).requires_grad_(), teacher, **options)
    distiller.prepare(batch((2, 1)))
    with torch.no_grad():
        losses = terms_of(still(distiller)(**batch((2, 1))))
    tolerance = 1e-5 if method == "kd_detr" else 1e-6
    assert zero <= set(losses)
    assert {n: v for n, v in losses.items() if n in zero and abs(v) > tolerance} == {}


@pytest.mark.parametrize(
    ("method", "options"),
    [("chen", {}), ("defeat", {}), ("gdetkd", {}), ("gid", {"stage": "second"}), ("mimic", {"head_weight": 1.0})],
)
def test_both_second_stages_look_at_the_students_sampled_proposals(method: str, options: dict[str, Any]) -> None:
    student, teacher = pair("faster_rcnn", "faster_rcnn")
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for side, model in (("student", student), ("teacher", teacher)):

        def keep(module: nn.Module, args: tuple[Any, ...], side: str = side) -> None:
            seen[side] = [p.clone() for p in args[1]]

        handles.append(model.roi_heads.box_roi_pool.register_forward_pre_hook(keep))
    distiller = distiller_of(method, student, teacher, **options)
    data = batch((2, 1))
    distiller.prepare(data)
    seen.clear()
    distiller.train()(**data)
    for handle in handles:
        handle.remove()
    distiller.close()
    assert all(torch.equal(a, b) for a, b in zip(seen["student"], seen["teacher"], strict=True))
    assert [len(p) for p in seen["teacher"]] == [32, 32]
    _, targets = student.transform(data["images"], data["targets"])
    for proposals, target in zip(seen["teacher"], targets, strict=True):
        assert (box_iou(target["boxes"], proposals).amax(1) > 0.999).all()  # the ground truth is among them
