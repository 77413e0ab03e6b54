"""What is read of the detectors of transformers is what they compute, at the places where it is computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskkd as kd
from taskkd.detection.boxes import as_corners
from taskkd.detection.families import Family, family_of
from taskkd.detection.shared import SharedImages
from taskkd.detection.teacher import DetectorTeacher
from taskkd.detection.terms import DetectionTerm, NeckTerm
from taskkd.detection.transformers_families import assign_centres
from taskkd.taps import Taps
from taskkd.terms import Run
from tests.detection.tiny_detr import NAMES, batch, detector

RT = ("rt_detr", "rt_detr_v2", "d_fine")


def look(model: Any, *views: str, boxes: bool = True) -> tuple[Family, dict[str, Any], SharedImages, Any]:
    """The family, the tapped values of a run, the images, and the model's own output."""
    family = family_of(model)
    taps = Taps(model, dict.fromkeys(["transform", *(t for v in views for t in family.taps(v))]))
    images, targets = batch(boxes)
    kept: list[Any] = []
    handle = model.model.register_forward_hook(lambda m, a, o: kept.append(o))
    with taps.record():
        model(images, targets)
    values = taps.read(None, {})
    handle.remove()
    taps.close()
    return family, values, SharedImages.of(values["transform"]), kept[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_the_decoders_last_layer_is_the_output(name: str, training: bool) -> None:
    model = detector(name).train(training)
    family, values, images, output = look(model, "decoder")
    decoder = family.read("decoder", values, images)
    count = 9
    torch.testing.assert_close(decoder.logits[:, -1], output.logits[:, -count:])
    layers = 1 if name == "d_fine" and not training else 2
    assert decoder.logits.shape[:3] == decoder.boxes.shape[:3] == decoder.hidden.shape[:3] == (2, layers, count)
    boxes = decoder.boxes[:, -1]
    if name in RT:  # relative to the padded batch, which is 64x64 without padding here
        assert images.sizes == [(64, 64)] * 2
    torch.testing.assert_close(boxes, output.pred_boxes[:, -count:])
    assert decoder.activation == ("softmax" if name == "detr" else "sigmoid")
    assert (decoder.corners is not None) == (name == "d_fine")
    if decoder.corners is not None:
        assert decoder.corners.shape == (2, layers, count, 4, 33)


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "deformable_detr", "rt_detr"])
def test_earlier_layers_are_those_that_are_trained(name: str) -> None:
    model = detector(name).train()
    family, values, images, output = look(model, "decoder")
    decoder = family.read("decoder", values, images)
    first = output.auxiliary_outputs[0]
    torch.testing.assert_close(decoder.logits[:, 0], first["logits"])
    torch.testing.assert_close(decoder.boxes[:, 0], first["pred_boxes"])


def test_a_teacher_that_does_not_train_its_layers_has_predictions_of_all_the_same() -> None:
    model = detector("detr", auxiliary_loss=False).eval()
    family, values, images, output = look(model, "decoder")
    decoder = family.read("decoder", values, images)
    assert decoder.logits.shape[1] == 2
    torch.testing.assert_close(decoder.logits[:, -1], output.logits)


@pytest.mark.parametrize("name", NAMES)
def test_necks_are_maps_and_sources_are_as_wide_as_queries(name: str) -> None:
    model = detector(name).eval()
    family, values, images, _ = look(model, "neck", "sources", "decoder")
    neck, sources = family.read("neck", values, images), family.read("sources", values, images)
    assert len(neck) == {"detr": 1, "conditional_detr": 1, "deformable_detr": 4}.get(name, 3)
    heights = [m.shape[2] for m in neck]
    assert heights == sorted(heights, reverse=True)
    assert {m.shape[1] for m in sources} == {family.read("decoder", values, images).hidden.shape[-1]}


@pytest.mark.parametrize("name", RT)
def test_dense_predictions_decode_to_the_boxes_that_queries_start_from(name: str) -> None:
    model = detector(name).train()
    family, values, images, output = look(model, "dense", "regions")
    dense = family.read("dense", values, images)
    assert dense.logits.shape == (2, sum(dense.level_sizes), 3)
    assert dense.shapes == [(8, 8), (4, 4), (2, 2)]
    assert dense.probabilities().shape[-1] == 3
    decoded = dense.decode()
    best = output.enc_outputs_class.amax(-1).topk(9, 1).indices
    theirs = as_corners(output.enc_topk_bboxes) * 64
    valid = ((as_corners_of(dense, images) > 0.01) & (as_corners_of(dense, images) < 0.99)).all(-1)[best[0]]
    torch.testing.assert_close(decoded[0, best[0]][valid], theirs[0][valid], atol=1e-3, rtol=1e-4)
    assert dense.regression.isfinite().all()
    found = dense.match(images.boxes)
    assert (found[0] >= 0).any()
    assert (found[1] < 0).all()
    regions = family.read("regions", values, images)
    assert all(len(r) for r in regions)


def as_corners_of(dense: Any, images: SharedImages) -> Tensor:
    """The anchors as centre and size relative to the batch."""
    from torchvision.ops import box_convert

    found: Tensor = box_convert(dense.anchors[0], "xyxy", "cxcywh") / 64
    return found


def test_the_smaller_of_two_boxes_takes_an_anchor() -> None:
    anchors = torch.tensor([[4.0, 4.0, 6.0, 6.0], [14.0, 14.0, 16.0, 16.0], [30.0, 30.0, 31.0, 31.0]])
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0], [2.0, 2.0, 8.0, 8.0]])
    assert assign_centres(boxes, anchors, [3]).tolist() == [1, 0, -1]


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "deformable_detr"])
def test_the_own_queries_decode_to_the_own_predictions(name: str) -> None:
    model = detector(name).eval()
    family, values, images, output = look(model, "queries", "decoder")
    queries = family.read("queries", values, images)
    again = queries.decode(queries.own)
    torch.testing.assert_close(again.logits[:, -1], output.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.boxes[:, -1], output.pred_boxes, atol=1e-5, rtol=1e-5)
    more = queries.decode(torch.randn(13, queries.own.shape[-1]))
    assert more.logits.shape[2] == 13


def test_two_stage_queries_are_boxes_of_the_image() -> None:
    model = detector("deformable_detr", two_stage=True, with_box_refine=True, two_stage_num_proposals=9).eval()
    family, values, images, output = look(model, "queries")
    queries = family.read("queries", values, images)
    assert queries.own.shape == (2, 9, 4)
    torch.testing.assert_close(queries.decode(queries.own).logits[:, -1], output.logits, atol=1e-4, rtol=1e-4)


def test_decoding_again_is_that_of_the_copy_that_ran() -> None:
    model = detector("detr").eval()
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.model.class_labels_classifier.weight)
    family, values, images, output = look(twin, "queries")
    queries = family.read("queries", values, images)
    torch.testing.assert_close(queries.decode(queries.own).logits[:, -1], output.logits)
    assert not twin.model.model.decoder._forward_pre_hooks


def test_decoders_boxes_are_relative_to_the_image_in_all_families() -> None:
    model = detector("rt_detr", size=64).eval()  # images of several shapes, so that the batch is padded
    family, values, images, output = look(model, "decoder")
    (h, w), (height, width) = images.sizes[0], images.tensors.shape[2:]
    assert (h, w) != (height, width)
    pixels = family.read("decoder", values, images).boxes[0, -1] * torch.tensor([w, h, w, h])
    torch.testing.assert_close(pixels, output.pred_boxes[0] * torch.tensor([width, height, width, height]))


class Squared(DetectionTerm):
    """Mean square of one view's tensor of both sides, so that everything is run."""

    def __init__(self, student: nn.Module, teacher: nn.Module, view: str) -> None:
        super().__init__("squared", student, teacher, student_views=(view,), teacher_views=(view,))
        self.view = view

    def forward(self, run: Run) -> Tensor:
        s, t = (views.get(self.view).logits for views in (self.student_views(run), self.teacher_views(run)))
        assert not t.requires_grad
        return s.square().mean() + t.square().mean()


class Apart(NeckTerm):
    """Mean squared difference of necks."""

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        return torch.stack([(s - t).square().mean() for s, t in zip(students, teachers, strict=True)]).sum()


@pytest.mark.parametrize(
    ("student", "teacher"), [("detr", "conditional_detr"), ("deformable_detr", "rt_detr"), ("d_fine", "rt_detr_v2")]
)
def test_pairs_of_families_distil_and_leave_the_teacher_untouched(student: str, teacher: str) -> None:
    images, targets = batch()
    own, other = detector(student), detector(teacher, seed=1, width=64)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    keys = set(own.state_dict())
    terms = [Apart("neck", own, other), Squared(own, other, "decoder")]
    distiller = kd.Distiller(own, DetectorTeacher(other, own), terms)
    data = {"images": images, "targets": targets}
    distiller.prepare(data)
    losses = distiller(**data)
    losses["loss"].backward()
    assert losses["neck"].isfinite()
    assert not [n for n, p in own.named_parameters() if p.requires_grad and p.grad is None]
    after = other.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.grad is not None for p in other.parameters())
    distiller.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())
    assert set(distiller.student.state_dict()) == keys


def test_a_teacher_is_run_no_further_than_its_neck() -> None:
    images, targets = batch()
    own, other = detector("rt_detr"), detector("rt_detr", seed=1)
    ran: list[int] = []
    other.model.model.decoder.register_forward_hook(lambda *_: ran.append(1))
    data = {"images": images, "targets": targets}
    distiller = kd.Distiller(own, DetectorTeacher(other, own), [Apart("neck", own, other)])
    distiller.prepare(data)
    ran.clear()
    distiller(**data)
    assert not ran


def test_identical_detectors_agree() -> None:
    own = detector("rt_detr", num_denoising=0).eval()
    other = copy.deepcopy(own)
    data = dict(zip(("images", "targets"), batch(), strict=True))
    distiller = kd.Distiller(own, DetectorTeacher(other, own), [Apart("neck", own, other)])
    distiller.prepare(data)
    distiller.train()
    own.eval()  # the same normalisation by running statistics
    for m in own.modules():
        m.training = False
    own.training = True
    assert distiller(**data)["neck"] < 1e-10
