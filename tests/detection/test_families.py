"""Families, shared images and the teacher that is run in parts, against torchvision's own computations."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import taskkd as kd
from taskkd.detection.families import family_of
from taskkd.detection.sampling import own_regions
from taskkd.detection.shared import Normalisation, SharedImages, renormalised
from taskkd.detection.teacher import DetectorTeacher
from taskkd.detection.terms import DetectionTerm, NeckTerm
from taskkd.errors import TaskkdError
from taskkd.taps import Taps
from tests.detection.detectors import batch, faster_rcnn, fcos, mask_rcnn, retinanet, ssdlite

DENSE = {"retinanet": retinanet, "fcos": fcos, "ssdlite": ssdlite}


def seen(model: nn.Module, *views: str, boxes: tuple[int, ...] = (2, 1)) -> tuple[Any, Any, Any]:
    """Family, tapped values and images of one run in train mode."""
    family = family_of(model)
    names = dict.fromkeys([family.images, *(t for v in views for t in family.taps(v))])
    taps = Taps(model.train(), list(names), "student")
    given = batch(boxes)
    given.pop("id")
    with taps.record():
        output = model(**given)
    values = taps.read(output, given)
    taps.close()
    return family, values, SharedImages.of(values[family.images])


class Sees(NeckTerm):
    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Any) -> Tensor:
        self.seen = [tuple(t.shape) for t in teachers]
        return torch.stack([(s - t).square().mean() for s, t in zip(students, teachers, strict=True)]).mean()


class Regions(DetectionTerm):
    def forward(self, run: Any) -> Tensor:
        self.own, self.other = self.student_views(run).regions, self.teacher_views(run).rois
        return self.other.logits.mean() + 0 * self.student_views(run).neck[0].mean()


@pytest.mark.parametrize("name", DENSE)
def test_anchors_are_assigned_as_the_detector_does(name: str) -> None:
    model: Any = DENSE[name]()
    matched: list[Any] = []
    target = model if name == "ssdlite" else model.head
    own = target.compute_loss
    with mock.patch.object(target, "compute_loss", lambda *a: matched.append(a[3]) or own(*a)):
        family, values, images = seen(model, "dense", boxes=(3, 0))
    dense = family.read("dense", values, images)
    assert torch.equal(dense.match(images.boxes), torch.stack(matched[0]))
    assert dense.logits.shape[:2] == dense.regression.shape[:2] == (2, sum(dense.level_sizes))
    assert len(dense.anchors[0]) == sum(dense.level_sizes)
    assert dense.probabilities().shape[-1] == 2


@pytest.mark.parametrize("name", DENSE)
def test_boxes_are_decoded_as_the_detector_does(name: str) -> None:
    model: Any = DENSE[name]().eval()
    family, values, images = seen(model, "dense")
    dense = family.read("dense", values, images)
    boxes = dense.decode()
    assert boxes.shape == dense.regression.shape
    if name != "fcos":  # no offset: the anchors themselves
        zero = dense.decode(torch.zeros_like(dense.regression))
        torch.testing.assert_close(zero[0], dense.anchors[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("make", [faster_rcnn, mask_rcnn])
def test_sampled_proposals_have_the_labels_that_the_student_is_trained_to(make: Any) -> None:
    model: Any = make()
    sampled: list[Any] = []
    heads, own = model.roi_heads, model.roi_heads.select_training_samples
    family = family_of(model)
    taps = Taps(model.train(), [family.images, *family.taps("rois"), *family.taps("rpn")], "student")
    given = batch((3, 0), masks=make is mask_rcnn)
    given.pop("id")
    with (
        mock.patch.object(heads, "select_training_samples", lambda *a: sampled.append(own(*a)) or sampled[0]),
        taps.record(),
    ):
        output = model(**given)
    values = taps.read(output, given)
    rois = family.read("rois", values, SharedImages.of(values[family.images]))
    proposals, _, labels, targets = sampled[0]
    assert all(torch.equal(a, b) for a, b in zip(rois.proposals, proposals, strict=True))
    assert torch.equal(rois.labels, torch.cat(labels))
    assert int((rois.labels > 0).sum()) > 0
    positive = rois.labels > 0
    torch.testing.assert_close(rois.targets[positive], torch.cat(targets)[positive])
    rpn = family.read("rpn", values, SharedImages.of(values[family.images]))
    assert rpn.objectness.shape == rpn.deltas.shape[:2] == (2, sum(rpn.level_sizes))


def test_the_first_stage_is_flattened_as_torchvision_does() -> None:
    from torchvision.models.detection.rpn import concat_box_prediction_layers

    family, values, images = seen(faster_rcnn(), "rpn")
    rpn = family.read("rpn", values, images)
    objectness, deltas = concat_box_prediction_layers(*values["rpn.head"])
    assert torch.equal(rpn.objectness.reshape(-1), objectness.reshape(-1))
    assert torch.equal(rpn.deltas.reshape(-1, 4), deltas)


def test_images_are_normalised_anew_as_the_teachers_own_transform_would() -> None:
    student, teacher = retinanet(min_size=64), retinanet(min_size=64)
    teacher.transform.image_mean, teacher.transform.image_std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    given = batch()
    (own, targets), (other, _) = (m.transform.eval()(given["images"], given["targets"]) for m in (student, teacher))
    found = renormalised(
        SharedImages.of((own, targets)), Normalisation.of(student.transform), Normalisation.of(teacher.transform)
    )
    torch.testing.assert_close(found, other.tensors, atol=1e-5, rtol=1e-5)
    shared = SharedImages.of((own, targets))
    assert renormalised(shared, Normalisation.of(student.transform), None) is shared.tensors


def test_a_teacher_runs_no_further_than_it_must() -> None:
    student, teacher = faster_rcnn(), faster_rcnn(24, seed=1)
    distiller = kd.Distiller(student, DetectorTeacher(teacher, student), [Sees("maps", student, teacher)])
    given = batch()
    distiller.prepare(given)
    ran = []
    for name in ("backbone", "rpn.head", "rpn", "roi_heads.box_head"):
        teacher.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    distiller(**given)["loss"].backward()
    assert ran == ["backbone"] or not ran  # the hook that ends the run may come before ours
    distiller.close()


def test_a_teacher_sees_larger_images_and_its_maps_are_brought_to_the_students_grid() -> None:
    student, teacher = retinanet(), retinanet(24, seed=1)
    term = Sees("maps", student, teacher)
    distiller = kd.Distiller(student, DetectorTeacher(teacher, student, size=2.0), [term])
    sizes = []
    teacher.backbone.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[2:])))
    distiller.prepare(batch())
    loss = distiller(**batch())["loss"]
    assert loss.isfinite()
    assert sizes[-1] == (192, 192)  # twice the padded 96 x 96
    assert term.seen[0][2:] == (12, 12)  # stride 8 of the student's 96 x 96
    distiller.close()
    with pytest.raises(TaskkdError, match=r"a teacher's `size` must be positive, got 0"):
        DetectorTeacher(teacher, student, size=0)


def test_levels_are_paired_by_stride_one_with_one() -> None:
    term = Sees("maps", retinanet(), retinanet())
    cases = [
        ([32, 32, 64], [32, 32, 64], [(0, 0), (1, 1), (2, 2)]),  # fasterrcnn_mobilenet_v3_large_320_fpn
        ([32, 32, 64], [4, 8, 16, 32, 64], [(1, 3), (2, 4)]),
        ([4, 8, 16, 32, 64], [32, 32, 64], [(3, 1), (4, 2)]),
        ([8, 16, 32, 48], [32], [(2, 0)]),  # a level that fits is not given up for one that nearly does
        ([8, 16], [10, 20], [(0, 0), (1, 1)]),
    ]
    for own, other, expected in cases:
        assert term._paired(own, other) == expected


def test_what_a_larger_teacher_saw_is_in_its_own_pixels() -> None:
    student, teacher = retinanet(), faster_rcnn(24, seed=1)
    term = Regions("r", student, teacher, student_views=("neck", "regions"), teacher_views=("rois",))
    distiller = kd.Distiller(student, DetectorTeacher(teacher, student, size=1.5), [term])
    given = batch((2, 1), sizes=((64, 96),))
    distiller.prepare(given)
    run = distiller._run(given)
    own, seen = term.student_views(run).images, term.teacher_views(run).images
    assert (own.tensors.shape[2:], seen.tensors.shape[2:]) == ((64, 96), (96, 128))  # multiples of 32, not 1.5 times
    by = torch.tensor([128 / 96, 96 / 64] * 2)
    for regions, proposals in zip(term.student_views(run).regions, term.teacher_views(run).rois.proposals, strict=True):
        torch.testing.assert_close(proposals, regions * by)
    distiller.close()


def test_a_two_stage_teacher_looks_at_the_regions_of_a_one_stage_student() -> None:
    student, teacher = fcos(), faster_rcnn(24, seed=1)
    term = Regions("r", student, teacher, student_views=("neck", "regions"), teacher_views=("rois",))
    distiller = kd.Distiller(student, DetectorTeacher(teacher, student), [term])
    distiller.prepare(batch((2, 0)))
    distiller(**batch((2, 0)))
    assert sum(len(r) for r in term.own) == len(term.other.features)
    assert all(torch.equal(a, b) for a, b in zip(term.own, term.other.proposals, strict=True))
    distiller.close()


def test_own_regions_hold_the_ground_truth_and_no_more_positives_than_asked_for() -> None:
    from torchvision.ops import box_iou

    family, values, images = seen(retinanet(), "dense", boxes=(3, 0))
    found = own_regions(family.read("dense", values, images), images, count=12, share=0.25)
    assert [len(f) <= 12 for f in found] == [True, True]
    assert torch.equal(found[0][:3], images.boxes[0])
    assert int((box_iou(found[0], images.boxes[0]).amax(1) > 0.5).sum()) == 3


def test_an_unknown_module_is_refused_with_what_is_known() -> None:
    with pytest.raises(TaskkdError, match=r"the teacher is a Linear, of which no tensors are known: expected torchvis"):
        family_of(nn.Linear(2, 2), "teacher")
    with pytest.raises(
        TaskkdError, match=r"term 'r': the student, a RetinaNet, has no 'rois' .a second stage.; it has neck, dense"
    ):
        Regions("r", retinanet(), faster_rcnn(), student_views=("rois",), teacher_views=("rois",))


def test_any_module_by_the_names_of_its_maps() -> None:
    class Own(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, width, 3, stride=4)

        def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
            return {"loss": self.body(images).mean()}

    student, teacher = Own(4), Own(8)
    term = Sees("maps", student, teacher, neck=["body"])
    given = {"images": torch.rand(2, 3, 32, 32), "targets": batch()["targets"]}
    distiller = kd.Distiller(student, teacher, [term])
    distiller.prepare(given)
    assert distiller(**given)["maps"] > 0
    assert term.images(mock.Mock(student={"batch.images": given["images"], "batch.targets": given["targets"]})).sizes
    distiller.close()


def test_scaled_images_take_their_boxes_along() -> None:
    images = SharedImages(torch.rand(1, 3, 64, 96), [(60, 90)], [torch.tensor([[0.0, 0, 30, 60]])], [torch.tensor([1])])
    larger = images.scaled(2.0)
    assert larger.tensors.shape == (1, 3, 128, 192)
    assert larger.sizes == [(120, 180)]
    assert larger.boxes[0].tolist() == [[0, 0, 60, 120]]
    assert images.scaled(1.0) is images
