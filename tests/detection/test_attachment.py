"""Detectors under distillation: untouched teachers, shared images, nothing left behind, sentences for wrong use."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskkd as kd
from taskkd.detection.families import family_of
from taskkd.detection.methods import METHODS
from taskkd.detection.teacher import DetectorTeacher
from taskkd.detection.terms import DetectionTerm, NeckTerm
from taskkd.errors import RecipeError, ShapeError, TapError, TaskkdError
from tests.detection.detectors import DETECTORS, batch, faster_rcnn, fcos, retinanet, ssdlite


class Maps(NeckTerm):
    """Mean squared difference of the maps."""

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Any) -> Tensor:
        return torch.stack([F.mse_loss(s, t) for s, t in zip(students, teachers, strict=True)]).sum()


class Predictions(DetectionTerm):
    """Mean squared difference of all that both sides predict at anchors, or of the same regions."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        views = [v for v in ("dense", "rpn", "rois") if v in family_of(student).views]
        super().__init__("predictions", student, teacher, student_views=views, teacher_views=views)
        self.names = views

    def forward(self, run: Any) -> Tensor:
        value = torch.zeros(())
        parts = {"dense": ("logits", "regression"), "rpn": ("objectness", "deltas"), "rois": ("logits", "deltas")}
        for name in self.names:
            own, other = self.student_views(run).get(name), self.teacher_views(run).get(name)
            for part in parts[name]:
                value = value + F.mse_loss(getattr(own, part), getattr(other, part))
        return value


def pair(name: str, *, min_size: Any = 64) -> tuple[nn.Module, nn.Module]:
    return DETECTORS[name](min_size=min_size), DETECTORS[name](24, min_size=min_size, seed=1)


def distiller_of(student: nn.Module, teacher: nn.Module, method: str | None = None, **options: Any) -> kd.Distiller:
    supplier = DetectorTeacher(teacher, student)
    if method is None:
        return kd.Distiller(student, supplier, [Maps("maps", student, teacher), Predictions(student, teacher)])
    return kd.Distiller(student, supplier, METHODS[method](student, teacher, **options).stages[0].terms)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", DETECTORS)
def test_one_step_trains_the_student_and_leaves_the_teacher_as_it_was(name: str) -> None:
    student, teacher = pair(name)
    before = copy.deepcopy(teacher.state_dict())
    distiller = distiller_of(student, teacher)
    data = batch(masks=name == "mask_rcnn")
    distiller.prepare(data)
    losses = distiller.train()(**data)
    losses["loss"].backward()
    assert len(losses) >= 3
    assert all(bool(v.isfinite()) for v in losses.values())
    assert all(v > 0 for v in losses.values())
    assert not any(p.grad is not None or p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert same(before, teacher.state_dict())
    assert [n for n, p in distiller.student.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad is not None for p in distiller.terms.parameters())
    assert list(student.state_dict()) == list(DETECTORS[name]().state_dict())
    assert not any(k.startswith("teacher") for k in distiller.state_dict())


@pytest.mark.parametrize("name", DETECTORS)
def test_images_without_boxes_give_finite_losses(name: str) -> None:
    student, teacher = pair(name)
    distiller = distiller_of(student, teacher)
    masks = name == "mask_rcnn"
    distiller.prepare(batch((0, 0), masks=masks))
    for boxes in ((0, 2), (0, 0), (0,)):
        losses = distiller(**batch(boxes, masks=masks))
        losses["loss"].backward()
        assert all(bool(v.isfinite()) for v in losses.values())
    assert all(bool(p.grad.isfinite().all()) for p in student.parameters())  # type: ignore[union-attr]


def test_both_see_images_of_one_size_though_the_student_draws_it() -> None:
    sizes = (64, 80, 96)
    student, teacher = pair("retinanet", min_size=sizes)
    seen: list[tuple[list[Any], list[Any]]] = []

    class Shapes(Maps):
        def compare(self, students: list[Tensor], teachers: list[Tensor], run: Any) -> Tensor:
            own, other = self.maps(run)
            seen.append(([m.shape[2:] for m in own], [m.shape[2:] for m in other]))
            return super().compare(students, teachers, run)

    distiller = kd.Distiller(student, DetectorTeacher(teacher, student), [Shapes("maps", student, teacher)])
    torch.manual_seed(0)
    distiller.prepare(batch())
    seen.clear()
    with torch.no_grad():
        for seed in range(20):
            distiller(**batch(seed=seed))
    assert len(seen) == 20
    assert all(own == other for own, other in seen)
    assert len({tuple(own) for own, _ in seen}) > 1  # else nothing was shown


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_nothing_is_left_behind(name: str) -> None:
    student, teacher = pair(name)
    fresh = DETECTORS[name]()
    distiller = distiller_of(student, teacher, "crosskd" if name == "retinanet" else None)
    assert hooks(student) > 0
    distiller.prepare(batch())
    distiller(**batch())["loss"].backward()
    copied = copy.deepcopy(distiller)  # as an average of the weights does, in the midst of training
    assert copied.teacher.model is teacher
    for own, other in zip(distiller.terms.values(), copied.terms.values(), strict=True):
        assert getattr(own, "head", None) is getattr(other, "head", None)  # CrossKD's part of the teacher
    distiller.close()
    for model, like in ((student, fresh), (teacher, fresh)):
        assert hooks(model) == 0
        for (path, module), (_, other) in zip(model.named_modules(), like.named_modules(), strict=True):
            assert vars(module).keys() == vars(other).keys(), path
    again = pickle.loads(pickle.dumps(copy.deepcopy(student)))
    again.eval()
    assert len(again(batch()["images"])) == 2
    written, plain = io.BytesIO(), io.BytesIO()
    torch.save(student.state_dict(), written)
    torch.save(fresh.state_dict(), plain)
    assert abs(written.tell() - plain.tell()) < 1024


def test_the_same_seed_gives_the_same_losses_though_sizes_and_samples_are_drawn() -> None:
    def losses() -> list[float]:
        student, teacher = pair("faster_rcnn", min_size=(64, 80))
        distiller = distiller_of(student, teacher)
        torch.manual_seed(3)
        distiller.prepare(batch())
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
        found = []
        for seed in range(5):
            loss = distiller(**batch(seed=seed))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            distiller.step()
            found.append(loss.item())
        return found

    first = losses()
    assert first == losses()
    assert len(set(first)) == 5


@pytest.mark.slow
def test_backbones_may_be_compiled() -> None:
    """Of detectors the backbone with its pyramid alone: proposals have no fixed shape."""
    found = []
    for compiled in (False, True):
        student, teacher = pair("retinanet")
        distiller = distiller_of(student, teacher, "pearson_kd")
        distiller.prepare(batch())
        if compiled:
            student.backbone.compile(backend="eager")
            teacher.backbone.compile(backend="eager")
        losses = distiller(**batch())
        losses["loss"].backward()
        found.append((losses["pearson"], losses["loss"].detach(), student.backbone.body.layer1[0].weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- wrong use


def test_a_method_that_does_not_fit_a_detector_says_so() -> None:
    with pytest.raises(RecipeError, match=r"the head of the student \(FasterRCNN\) has no tower.*RetinaNet and FCOS"):
        METHODS["crosskd"](faster_rcnn(), faster_rcnn())
    with pytest.raises(RecipeError, match=r"`convolutions` is 5, the student's classification tower has 4"):
        METHODS["crosskd"](retinanet(), retinanet(), convolutions=5)
    with pytest.raises(
        TaskkdError, match=r"the student, a Faster R-CNN, has no 'dense' \(predictions at .*\); it has neck, rpn, rois"
    ):
        METHODS["bckd"](faster_rcnn(), retinanet())
    with pytest.raises(RecipeError, match=r"the student \(RetinaNet\) or .* one number for each side.*sides="):
        METHODS["localization"](retinanet(), retinanet())
    student, teacher = ssdlite(), ssdlite(seed=1)
    with pytest.raises(RecipeError, match=r"the student's class scores are a softmax with background"):
        distiller_of(student, teacher, "bckd").prepare(batch())


def test_a_pair_whose_anchors_or_levels_differ_says_so() -> None:
    student = fcos()
    teacher = retinanet(seed=1)
    with pytest.raises(
        ShapeError, match=r"the student predicts at \[144, .* anchors of its levels, the teacher at \[864"
    ):
        distiller_of(student, teacher, "bckd").prepare(batch())
    terms = METHODS["crosskd"](student, teacher).stages[0].terms
    larger = DetectorTeacher(teacher, student, size=2.0)
    with pytest.raises(ShapeError, match=r"same levels and, for the teacher, images of the same size"):
        kd.Distiller(student, larger, terms).prepare(batch())


def test_classes_of_another_number_say_so() -> None:
    student, teacher = retinanet(), retinanet(seed=1)
    head = teacher.head.classification_head
    head.num_classes, head.cls_logits = 4, nn.Conv2d(16, 6 * 4, 3, padding=1)
    with pytest.raises(ShapeError, match=r"the student has 2 classes, the teacher 3"):
        distiller_of(student, teacher, "bckd").prepare(batch())


def test_names_that_are_not_there_say_so() -> None:
    student, teacher = retinanet(), retinanet(seed=1)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(TaskkdError, match=r"the teacher is a Sequential, of which no tensors are known"):
        DetectorTeacher(plain, student)
    with pytest.raises(TaskkdError, match=r"the student is a Sequential.*`neck`"):
        Maps("maps", plain, teacher)
    term = Maps("maps", student, teacher, neck=["backbone.fpn.layer_blocks.9"])
    with pytest.raises(TapError, match=r"no module 'backbone.fpn.layer_blocks.9' \(did you mean"):
        kd.Distiller(student, DetectorTeacher(teacher, student), [term])
    with pytest.raises(TaskkdError, match=r"2 maps of the student and 1 of the teacher"):
        Maps("maps", student, teacher, neck=["a", "b"], teacher_neck=["a"])
    with pytest.raises(TaskkdError, match=r"`size` must be positive, got 0"):
        DetectorTeacher(teacher, student, size=0.0)


def test_maps_without_a_partner_say_so() -> None:
    student, teacher = retinanet(), retinanet(seed=1)
    term = Maps("maps", student, teacher, adapter=None)
    distiller = kd.Distiller(student, DetectorTeacher(retinanet(24), student), [term])
    with pytest.raises(ShapeError, match=r"level 0: student \(2, 16, .* and teacher \(2, 24, .*adapter='conv1x1'"):
        distiller.prepare(batch())
