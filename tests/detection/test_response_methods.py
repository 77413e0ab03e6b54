"""Methods on predictions and regions: Chen, GID, G-DetKD, the objectness-scaled response; acceptance A2 to A4, B4
and B8 of the specification."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, roi_align

import taskkd as kd
from taskkd.detection.methods import METHODS, chen, gdetkd, gid, yolo_response
from taskkd.detection.methods.chen import (
    bounded_distance,
    hard_and_soft,
    weighted_binary_soft_targets,
    weighted_soft_targets,
)
from taskkd.detection.methods.gdetkd import (
    RegionQueue,
    SemanticGuide,
    class_aware_regression,
    region_contrast,
    transfer_head,
)
from taskkd.detection.methods.gid import (
    InstanceFeature,
    InstanceRelation,
    Instances,
    Selection,
    general_instances,
    instance_classification,
    instance_feature,
    instance_regression,
    instance_relation,
)
from taskkd.detection.methods.yolo_response import HeadResponse, objectness_scaled
from taskkd.detection.pooling import levels_of, pool_all_levels, pool_own_level
from taskkd.detection.responses import sampling_weights
from taskkd.detection.teacher import DetectorTeacher
from taskkd.errors import RecipeError, ShapeError, TaskkdError
from taskkd.terms import Run
from tests.detection import tiny_detr
from tests.detection.detectors import DETECTORS, batch

Loss = Callable[[Tensor, Tensor], Tensor]
LABELS, MASK = torch.tensor([1, 0, 2, 1]), torch.tensor([True, False, True, True])
# exact in half precision
PROBABILITIES = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.125, 0.125, 0.75], [0.25, 0.25, 0.5]])
TARGET = torch.arange(16).reshape(4, 4) / 8 - 1


def head(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A row of features as the outputs of a YOLO-like head."""
    x = x.flatten(0, -2)
    return x[:, :4], x[:, 4], x[:, 5:]


#: name -> (loss of raw tensors, their shape, whether doubling the batch leaves it)
LOSSES: dict[str, tuple[Loss, tuple[int, ...], bool]] = {
    "soft": (weighted_soft_targets, (2, 4, 5), True),
    "binary_soft": (weighted_binary_soft_targets, (2, 4, 5), True),
    "hard_and_soft": (lambda s, t: hard_and_soft(s, t, labels=LABELS.repeat(len(s) // 4)), (4, 5), True),
    "bounded": (
        lambda s, t: bounded_distance(s, t, TARGET.to(s).repeat(len(s) // 4, 1), mask=MASK.repeat(len(s) // 4)),
        (4, 4),
        True,
    ),
    "instance_feature": (instance_feature, (4, 5, 3, 3), True),
    "instance_relation": (instance_relation, (4, 5, 3, 3), True),
    "instance_classification": (
        lambda s, t: instance_classification(s, t, mask=MASK.repeat(len(s) // 4)),
        (4, 5),
        True,
    ),
    "instance_regression": (lambda s, t: instance_regression(s, t, mask=MASK.repeat(len(s) // 4)), (4, 4), True),
    "region_contrast": (lambda s, t: region_contrast(s, t, gamma=0.5), (4, 6), False),
    "class_aware_regression": (
        lambda s, t: class_aware_regression(s, t, probabilities=PROBABILITIES.to(s).repeat(len(s) // 4, 1)),
        (4, 3, 4),
        True,
    ),
    "objectness_scaled": (lambda s, t: objectness_scaled(head(s), head(t)), (2, 3, 7), True),
}


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    s, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return s.to(dtype).requires_grad_(), t.to(dtype)


# ---- losses


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_right_gradient_and_does_not_grow_with_the_batch(name: str) -> None:
    loss, shape, invariant = LOSSES[name]
    s, t = pair(shape)
    assert torch.autograd.gradcheck(lambda x: loss(x, t), (s,))
    if invariant:
        torch.testing.assert_close(loss(torch.cat([s, s]), torch.cat([t, t])), loss(s, t), rtol=1e-9, atol=1e-12)
    half = [x.detach().half() for x in (s, t)]
    result = loss(*half)
    assert result.dtype == torch.float32
    exact = loss(*(x.double() for x in half))
    assert result.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-5)


def test_what_is_masked_reaches_no_gradient() -> None:
    s, t = pair((4, 4))
    target = TARGET.clone()
    target[1] = -torch.inf  # the logarithm of an empty box
    loss = bounded_distance(s, t, target, mask=MASK)
    loss.backward()
    assert loss.isfinite()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert s.grad[1].abs().sum() == 0


def test_nothing_to_look_at_is_exactly_zero_with_a_gradient_path() -> None:
    none = torch.zeros(0, dtype=torch.bool)
    empty: list[tuple[Loss, tuple[int, ...]]] = [
        (lambda s, t: bounded_distance(s, t, t, mask=none), (0, 4)),
        (weighted_soft_targets, (0, 5)),
        (instance_feature, (0, 5, 3, 3)),
        (instance_relation, (2, 5, 3, 3)),
        (instance_relation, (0, 5, 3, 3)),
        (lambda s, t: instance_classification(s, t, mask=torch.zeros(4, dtype=torch.bool)), (4, 5)),
        (lambda s, t: instance_regression(s, t, mask=torch.zeros(4, dtype=torch.bool)), (4, 4)),
        (lambda s, t: region_contrast(s, t, boxes=torch.zeros(0, 4)), (0, 6)),
        (lambda s, t: class_aware_regression(s, t, probabilities=torch.zeros(0, 3)), (0, 3, 4)),
        (lambda s, t: objectness_scaled(head(s), head(t)), (0, 7)),
    ]
    for loss, shape in empty:
        s, t = pair(shape)
        value = loss(s, t)
        value.backward()
        assert value.item() == 0
        assert s.grad is not None
        assert s.grad.isfinite().all()


def test_a_better_student_is_left_alone() -> None:
    target = torch.zeros(2, 4)
    student, teacher = torch.full((2, 4), 0.1), torch.full((2, 4), 0.2)
    assert bounded_distance(student, teacher, target) == 0
    # 0.04 + margin > 0.16 from a margin of 0.12 on
    assert bounded_distance(student, teacher, target, margin=0.13).item() == pytest.approx(0.04)
    assert bounded_distance(teacher, student, target).item() == pytest.approx(0.16)


def test_background_counts_more_in_the_soft_targets() -> None:
    background, other = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 9.0, 0.0]])
    even = torch.zeros(1, 3)
    ratio = weighted_soft_targets(even, background) / weighted_soft_targets(even, other)
    assert ratio.item() == pytest.approx(1.5, rel=1e-3)


def test_a_region_is_no_negative_of_one_that_overlaps_it() -> None:
    s, t = pair((3, 6))
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 9], [50.0, 50, 60, 60]])
    free, apart = region_contrast(s, t), region_contrast(s, t, boxes=boxes)
    assert apart < free
    images = torch.tensor([0, 1, 0])  # of other images they do not overlap
    torch.testing.assert_close(region_contrast(s, t, boxes=boxes, images=images), free)
    assert region_contrast(s, t, boxes=boxes, queue=torch.randn(5, 6).double()) > apart
    assert region_contrast(s[:1], t[:1]).item() == 0


def test_the_queue_keeps_the_last() -> None:
    queue = RegionQueue(5, 1)
    for first in (0, 3, 6):
        queue.push(torch.arange(first, first + 3.0)[:, None])
    assert sorted(queue.known()[:, 0].tolist()) == [4, 5, 6, 7, 8]
    other = RegionQueue(5, 1)
    assert len(other.known()) == 0
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.known(), queue.known())
    queue.push(torch.arange(10.0, 20.0)[:, None])  # more than it holds
    assert sorted(queue.known()[:, 0].tolist()) == [15, 16, 17, 18, 19]


def test_the_guide_prefers_the_level_that_means_the_same() -> None:
    torch.manual_seed(0)
    guide = SemanticGuide(4, 4, tau=0.1)
    with torch.no_grad():
        nn.init.dirac_(guide.adapt.weight)
        guide.adapt.bias.zero_()
    teacher = torch.randn(3, 4, 7, 7)
    far = [torch.zeros_like(teacher) for _ in range(2)]
    right = guide.loss([far[0], teacher, far[1]], teacher)
    wrong = guide.loss(far, teacher)
    assert right < wrong
    right.backward()
    assert all(p.grad is not None for p in guide.parameters())


# ---- general instances


def by_hand(
    s: Tensor, t: Tensor, boxes_s: Tensor, boxes_t: Tensor, size: tuple[int, int], score: str, side: str
) -> list[int]:
    """The anchors of one image's instances, by loops."""
    found = []
    for a in range(len(s)):
        c = int((t[a] - s[a]).abs().argmax())
        gap = abs(t[a].max() - s[a].max()) if score == "abs_max_diff" else abs(t[a, c] - s[a, c])
        teacher = t[a].max() > s[a].max() if side == "surer" else t[a, c] >= s[a, c]
        x0, y0, x1, y1 = (boxes_t if teacher else boxes_s)[a].tolist()
        box = [min(max(x0, 0), size[1]), min(max(y0, 0), size[0]), min(max(x1, 0), size[1]), min(max(y1, 0), size[0])]
        if box[2] - box[0] > 1 and box[3] - box[1] > 1:
            found.append((float(gap), a, torch.tensor([box])))
    kept: list[tuple[float, int, Tensor]] = []
    for entry in sorted(found, key=lambda f: -f[0]):
        if all(box_iou(entry[2], k[2]) <= 0.3 for k in kept):
            kept.append(entry)
    return [a for _, a, _ in kept[:10]]


@pytest.mark.parametrize(
    ("score", "side"), [("max_abs_diff", "surer"), ("abs_max_diff", "surer"), ("max_abs_diff", "by_class")]
)
def test_general_instances_are_those_of_the_rule(score: Any, side: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = torch.rand(2, 3, 60, 4, generator=generator).unbind(0)
    corners = torch.rand(2, 3, 60, 2, generator=generator) * 90 - 10
    boxes_s, boxes_t = torch.cat([corners, corners + torch.rand(2, 3, 60, 2, generator=generator) * 40], -1).unbind(0)
    sizes = [(64, 80), (80, 64), (30, 30)]
    found = general_instances(s, t, boxes_s, boxes_t, sizes=sizes, score=score, side=side)
    for i, size in enumerate(sizes):
        assert found.indices[i].tolist() == by_hand(s[i], t[i], boxes_s[i], boxes_t[i], size, score, side)
    assert any(len(b) < 10 for b in found.boxes)


def test_an_image_may_have_no_instance() -> None:
    nothing = torch.zeros(2, 5, 4)
    found = general_instances(torch.rand(2, 5, 1), torch.rand(2, 5, 1), nothing, nothing, sizes=[(8, 8)] * 2)
    assert isinstance(found, Instances)
    assert [len(b) for b in found.boxes] == [0, 0]


# ---- regions and anchors


def test_regions_are_pooled_from_the_level_of_their_size() -> None:
    boxes = [
        torch.tensor([[0.0, 0, 224, 224], [3.0, 5, 20, 30]]),
        torch.zeros(0, 4),
        torch.tensor([[0.0, 0, 500, 400]]),
    ]
    assert levels_of(torch.cat(boxes), [8, 16, 32]).tolist() == [1, 0, 1]
    assert levels_of(torch.cat(boxes), [4, 40]).tolist() == [1, 0, 1]
    maps = [torch.rand(3, 2, 512 // stride, 512 // stride, requires_grad=True) for stride in (8, 16, 32)]
    pooled = pool_own_level(maps, boxes, (512, 512), 3)
    want = [(1, 0, boxes[0][:1]), (0, 0, boxes[0][1:]), (1, 2, boxes[2])]
    for row, (level, image, box) in enumerate(want):
        own = roi_align(maps[level][image : image + 1], [box], 3, 1 / 2 ** (3 + level), 2, aligned=True)
        torch.testing.assert_close(pooled[row : row + 1], own)
    assert [x.shape for x in pool_all_levels(maps, boxes, (512, 512))] == [(3, 2, 7, 7)] * 3
    pool_own_level(maps, [torch.zeros(0, 4)] * 3, (512, 512)).sum().backward()  # no regions: a gradient path still


def test_levels_of_other_widths_are_filled_up() -> None:
    maps = [torch.rand(1, 2, 8, 8), torch.rand(1, 5, 4, 4)]
    pooled = pool_own_level(maps, [torch.tensor([[0.0, 0, 30, 30], [0.0, 0, 60, 60]])], (64, 64), 2)
    assert pooled.shape == (2, 5, 2, 2)
    assert pooled[0, 2:].abs().sum() == 0


def test_anchors_count_as_likely_as_they_are_sampled() -> None:
    matched = torch.tensor([[0, 0, 1, -1, -1, -1, -1, -2], [-1] * 8])
    weights = sampling_weights(matched, size=4, share=0.5)
    torch.testing.assert_close(weights[0], torch.tensor([2 / 3] * 3 + [0.5] * 4 + [0.0]))
    torch.testing.assert_close(weights[1], torch.full((8,), 0.5))
    free = sampling_weights(matched, size=None)
    assert free.sum(1).tolist() == [7.0, 3.0]  # 3 and as many negatives as there are; 3 negatives


# ---- the objectness-scaled response


def test_maps_and_parts_of_a_head_give_the_same() -> None:
    s, t = (torch.randn(2, 2 * 8, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    whole = HeadResponse("a", outputs=["y"], anchors=2)
    split = HeadResponse("b", boxes=["y.b"], objectness=["y.o"], scores=["y.c"])
    cells = [x.reshape(2, 2, 8, 3, 4).permute(0, 1, 3, 4, 2) for x in (s, t)]
    parts = [{"y.b": x[..., :4], "y.o": x[..., 4], "y.c": x[..., 5:]} for x in cells]
    one = whole(Run({}, None, {"y": s}, {"y": t}))
    torch.testing.assert_close(one, split(Run({}, None, *parts)))
    with pytest.raises(ShapeError, match=r"'y' has shape .* with 3 anchors"):
        HeadResponse("c", outputs=["y"])(Run({}, None, {"y": s}, {"y": t}))
    with pytest.raises(TaskkdError, match="either `outputs`"):
        HeadResponse("d", outputs=["y"], boxes=["y"])


# ---- methods on tiny detectors


def distil(
    method: str, student: nn.Module, teacher: nn.Module, *, data: dict[str, Any] | None = None, **options: Any
) -> kd.Distiller:
    """A prepared distiller; batch norms do not move, so that a copy of the student is its equal."""
    stage = METHODS[method](student, teacher, **options).stages[0]
    distiller = kd.Distiller(student, DetectorTeacher(teacher, student), stage.terms, task_weight=stage.task_weight)
    torch.manual_seed(0)
    distiller.prepare(batch() if data is None else data)
    distiller.train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return distiller


def same(name: str) -> tuple[nn.Module, nn.Module]:
    model = DETECTORS[name](16)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet", "fcos"])
def test_an_equal_teacher_bounds_nothing_unless_there_is_a_margin(name: str) -> None:
    distiller = distil("chen", *same(name))
    losses = distiller(**batch())
    assert all(losses[n] == 0 for n in ("bound", "rpn-bound") if n in losses)
    distiller.close()
    distiller = distil("chen", *same(name), margin=1e-6)
    assert distiller(**batch())["bound"] > 0
    distiller.close()


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_an_equal_teacher_has_nothing_to_teach(name: str) -> None:
    student, teacher = same(name)
    # with noise, so that there are instances, and no adapter, so that their features agree
    options: dict[str, Any] = {"view": "rpn" if name == "faster_rcnn" else "dense", "score": "max_abs_diff"}
    selection = Selection(side="surer", nms=0.3, instances=10, min_side=0.0, **options)
    shared: dict[str, Any] = {"selection": selection, "adapter": None, "size": 4, "weight": 1.0}
    terms = [
        InstanceFeature("feature", student, teacher, **shared),
        InstanceRelation("relation", student, teacher, **shared),
    ]
    distiller = kd.Distiller(student, DetectorTeacher(teacher, student), terms)
    distiller.prepare(batch())
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    losses = distiller(**batch())
    assert losses["feature"] <= 1e-6
    assert losses["relation"] <= 1e-6
    distiller.close()


def test_the_teachers_head_is_copied_where_it_fits() -> None:
    student, teacher = DETECTORS["faster_rcnn"](8), DETECTORS["faster_rcnn"](16, seed=1)
    old = student.roi_heads.box_head.fc6.weight.clone()
    copied = transfer_head(student, teacher)
    assert "roi_heads.box_predictor.cls_score.weight" in copied
    assert torch.equal(
        student.roi_heads.box_predictor.cls_score.weight, teacher.roi_heads.box_predictor.cls_score.weight
    )
    assert torch.equal(student.roi_heads.box_head.fc6.weight, old)  # the pyramid is narrower
    other = DETECTORS["faster_rcnn"](8)
    before = copy.deepcopy(other.state_dict())
    gdetkd(other, teacher, head_transfer=False)
    assert all(torch.equal(v, before[n]) for n, v in other.state_dict().items())


def test_pairs_that_cannot_be_compared_are_refused() -> None:
    two, one, points = (DETECTORS[n](8) for n in ("faster_rcnn", "retinanet", "fcos"))
    for method in (chen, gid):
        with pytest.raises(RecipeError, match="a RetinaNet student and a Faster R-CNN teacher"):
            method(one, two)
    with pytest.raises(RecipeError, match="a RetinaNet, has no second stage"):
        gdetkd(two, one)
    with pytest.raises(RecipeError, match="the student is a SSD"):
        gdetkd(DETECTORS["ssdlite"](), two)
    with pytest.raises(RecipeError, match="the student is a DETR"):
        gdetkd(tiny_detr.detector("detr"), two)
    with pytest.raises(RecipeError, match="expected two FCOS, or the taps"):
        yolo_response(one, points)
    with pytest.raises(ShapeError, match="compared anchor by anchor"):
        distil("chen", one, points)
    narrow = DETECTORS["retinanet"](8)
    narrow.head.classification_head.cls_logits = nn.Conv2d(8, 6 * 5, 3, padding=1)
    narrow.head.classification_head.num_classes = 5
    with pytest.raises(ShapeError, match="a teacher of the same classes"):
        distil("gid", one, narrow)


def test_the_page_names_every_option_and_its_snippet_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods" / "detection-response.md").read_text()
    for name in ("chen", "gid", "gdetkd", "yolo_response"):
        section = page.partition(f": `{name}`")[2].partition("\n## ")[0]
        options = [p for p in inspect.signature(METHODS[name]).parameters if p not in ("student", "teacher")]
        missing = [o for o in options if o not in section and not (name == "gid" and o.endswith("_weight"))]
        assert section
        assert not missing
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict[str, Any] = dict(zip(("student", "teacher"), (DETECTORS["fcos"](c) for c in (8, 16)), strict=True))
    exec(compile(snippet, "snippet", "exec"), names | {"batch": batch()})


def test_first_stages_with_other_anchors_are_left_out() -> None:
    student, teacher = DETECTORS["faster_rcnn"](8), DETECTORS["faster_rcnn"](16, seed=1)
    names = [t.name for t in chen(student, teacher).stages[0].terms]
    assert names == ["soft", "bound", "rpn-soft", "rpn-bound", "hint"]
    student.rpn.anchor_generator.sizes = ((4,), (8,), (16,), (24,), (32,))
    assert [t.name for t in chen(student, teacher).stages[0].terms] == ["soft", "bound", "hint"]
    assert gid(student, teacher).stages[0].terms[0].selection.view == "rois"
    weights = {t.name: t.schedule.value for t in chen(student, teacher, mu=0.8, nu=0.3).stages[0].terms}
    assert weights == pytest.approx({"soft": 0.25, "bound": 0.3, "hint": 0.5})
