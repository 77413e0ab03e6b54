"""DETRDistill and KD-DETR: the losses' contracts, and what the methods build on tiny detectors."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskkd as kd
from taskkd.detection.methods import METHODS
from taskkd.detection.methods.detr_distill import (
    class_cost,
    hungarian_response,
    matched_queries,
    paired_layers,
    query_scores,
    target_aware,
    teacher_assigned,
)
from taskkd.detection.methods.kd_detr import query_difference, random_like, shared_queries
from taskkd.detection.shared import SharedImages
from taskkd.detection.teacher import DetectorTeacher
from taskkd.detection.views import Decoder
from taskkd.errors import RecipeError, ShapeError, TaskkdError
from taskkd.terms import Run
from tests.detection.tiny_detr import batch, detector

Pair = tuple[Tensor, Tensor]


def predictions(queries: int = 6, classes: int = 4, images: int = 2, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, queries, classes, generator=generator, dtype=torch.float64)
    boxes = torch.rand(images, queries, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.2
    return logits, boxes


# ---- the losses


@pytest.mark.parametrize("loss", [hungarian_response, shared_queries])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_repeating_a_batch_changes_nothing(loss: Any, activation: str) -> None:
    s, t = predictions(seed=1), predictions(seed=2)
    once = loss(s, t, activation=activation)
    twice = loss(*(tuple(torch.cat([x, x]) for x in side) for side in (s, t)), activation=activation)
    torch.testing.assert_close(once, twice, rtol=1e-9, atol=0)


def test_official_sums_the_divergence_over_images() -> None:
    s, t = predictions(seed=1), predictions(seed=2)
    ours = shared_queries(s, t, l1=0.0, giou=0.0)
    torch.testing.assert_close(shared_queries(s, t, l1=0.0, giou=0.0, compat="official"), 2 * ours)


@pytest.mark.parametrize("loss", [hungarian_response, shared_queries])
def test_gradients_are_right(loss: Any) -> None:
    (logits, boxes), t = predictions(3, 2, seed=1), predictions(3, 2, seed=2)
    inputs = (logits.requires_grad_(), boxes.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: loss((a, b), t), inputs)


def test_target_aware_gradient_is_right() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 4, 5, 6, dtype=torch.float64) for _ in range(2)]
    queries, scores = torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.rand(2, 2, 3, dtype=torch.float64)
    student = maps[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda s: target_aware([s], [maps[1]], queries=queries, scores=scores), (student,))


def test_padding_counts_for_nothing_in_target_aware() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    options: dict[str, Any] = {"queries": torch.randn(3, 2, 7, 4), "scores": torch.rand(3, 2, 7)}
    inside = F.pad(torch.ones(2, 1, 5, 6), (0, 3, 0, 2))
    values = []
    for garbage in (0.0, 1e4):
        wide = (F.pad(s, (0, 3, 0, 2), value=garbage), F.pad(t, (0, 3, 0, 2), value=-2 * garbage))
        values.append(target_aware([wide[0]], [wide[1]], inside=[inside], **options))
    assert torch.equal(*values)
    torch.testing.assert_close(values[0], target_aware([s], [t], **options), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [hungarian_response, shared_queries])
@pytest.mark.parametrize("case", ["boxes without area", "huge logits", "equal"])
def test_every_finite_input_gives_a_finite_loss_with_a_gradient(loss: Any, case: str) -> None:
    s, t = ([x.float() for x in predictions(seed=i)] for i in (1, 2))
    if case == "boxes without area":
        s[1], t[1] = torch.zeros_like(s[1]), torch.zeros_like(t[1])
    elif case == "huge logits":
        s[0], t[0] = s[0] * 1e4, t[0] * -1e4
    else:
        t = [x.clone() for x in s]
    for x in s:
        x.requires_grad_()
    value = loss(tuple(s), tuple(t))
    value.backward()
    assert value.isfinite()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in s)


def test_half_precision_is_computed_in_float32() -> None:
    s, t = ([x.to(torch.bfloat16) for x in predictions(seed=i)] for i in (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        for loss in (hungarian_response, shared_queries):
            half = loss(tuple(s), tuple(t))
            assert half.dtype == torch.float32
            torch.testing.assert_close(half, loss(tuple(x.float() for x in s), tuple(x.float() for x in t)))


def test_costs_are_sums_of_cross_entropies() -> None:
    (s, _), (t, _) = predictions(5, 3, 1, seed=1), predictions(4, 3, 1, seed=2)
    probability = t[0].sigmoid()
    want = torch.stack(
        [F.binary_cross_entropy_with_logits(s[0], p.expand_as(s[0]), reduction="none").sum(-1) for p in probability], 1
    )
    torch.testing.assert_close(class_cost(s[0], probability), want)
    soft = class_cost(s[0], t[0].softmax(-1), activation="softmax")
    torch.testing.assert_close(soft[2, 1], F.cross_entropy(s[0, 2], t[0, 1].softmax(-1)))


def test_a_permutation_of_the_teachers_queries_is_undone() -> None:
    logits, boxes = predictions(seed=3)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = logits[:, order] * 3, boxes[:, order]
    rows, columns = matched_queries(shuffled, ((logits * 3).sigmoid(), boxes))
    assert torch.equal(order[rows[0]], columns[0])
    kept = hungarian_response(shuffled, (logits * 3, boxes))
    torch.testing.assert_close(kept, hungarian_response((logits * 3, boxes), (logits * 3, boxes)))


def test_queries_without_partner_do_not_count() -> None:
    s, t = predictions(9, seed=1), predictions(4, seed=2)
    rows, columns = matched_queries(s, (t[0].sigmoid(), t[1]))
    assert rows.shape == columns.shape == (2, 4)
    assert hungarian_response(s, t).isfinite()


def test_scores_are_probability_times_overlap() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]]).expand(2, 1, 2, 4)
    logits = torch.tensor([[2.0, -1.0], [0.0, 3.0]]).expand(2, 1, 2, 2)
    truth = [torch.tensor([[10.0, 10.0, 30.0, 30.0]]), torch.zeros(0, 4)]
    images = SharedImages(torch.zeros(2, 3, 40, 40), [(40, 40)] * 2, truth, [torch.ones(1), torch.zeros(0)])
    scores = query_scores(Decoder(logits, boxes, "sigmoid"), images)
    best = logits[0, 0].sigmoid().amax(-1)
    torch.testing.assert_close(scores[0, 0], best * torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(scores[0, 1], best)  # no boxes: the probability alone


@pytest.mark.parametrize(("student", "teacher", "want"), [(6, 6, range(6)), (3, 6, [1, 3, 5]), (3, 1, [0, 0, 0])])
def test_layers_are_paired_evenly_and_the_last_with_the_last(student: int, teacher: int, want: Any) -> None:
    assert paired_layers(student, teacher) == list(want)


def test_random_queries_have_the_moments_of_the_teachers() -> None:
    torch.manual_seed(0)
    own = torch.randn(200, 3) * torch.tensor([1.0, 5.0, 0.0]) + torch.tensor([0.0, 10.0, 2.0])
    drawn = random_like(own, 4000)
    torch.testing.assert_close(drawn.mean(0), own.mean(0), atol=0.3, rtol=0.05)
    torch.testing.assert_close(drawn.std(0), own.std(0), atol=0.1, rtol=0.1)
    assert not torch.equal(drawn, random_like(own, 4000))


# ---- the methods


def build(name: str, student: Any, teacher: Any, **options: Any) -> Any:
    method = METHODS[name](student, teacher, **options)
    return kd.Distiller(student, DetectorTeacher(teacher, student), method.stages[0].terms)


def data(boxes: bool = True) -> dict[str, Any]:
    return dict(zip(("images", "targets"), batch(boxes), strict=True))


@pytest.mark.parametrize(
    ("name", "student", "teacher", "terms"),
    [
        ("detr_distill", "detr", "detr", ["response", "feature", "assignment"]),
        ("detr_distill", "conditional_detr", "rt_detr", ["response", "feature"]),
        ("detr_distill", "deformable_detr", "deformable_detr", ["response", "feature", "assignment"]),
        ("detr_distill", "d_fine", "d_fine", ["response", "feature"]),
        ("kd_detr", "deformable_detr", "deformable_detr", ["queries"]),
    ],
)
def test_methods_have_the_terms_that_a_pair_can_have(name: str, student: str, teacher: str, terms: list[str]) -> None:
    stage = METHODS[name](detector(student), detector(teacher, seed=1, num_queries=12)).stages[0]
    assert [t.name for t in stage.terms] == terms


@pytest.mark.parametrize("name", ["detr_distill", "kd_detr"])
def test_a_copy_of_the_distiller_decodes_with_its_own_student(name: str) -> None:
    own, other = detector("detr"), detector("detr", seed=1)
    first = build(name, own, other, **({"random_queries": 0} if name == "kd_detr" else {}))
    first.prepare(data())
    method = METHODS[name](own, other, **({"random_queries": 0} if name == "kd_detr" else {}))
    twin_student = copy.deepcopy(own)
    with torch.no_grad():
        twin_student.model.class_labels_classifier.weight.zero_()
    terms = copy.deepcopy(method.stages[0].terms)
    twin = kd.Distiller(twin_student, DetectorTeacher(other, twin_student), terms)
    twin.prepare(data())
    twin(**data())["loss"].backward()
    assert twin_student.model.class_labels_classifier.weight.grad is not None
    assert own.model.class_labels_classifier.weight.grad is None
    assert sum(p.numel() for t in terms for p in t.parameters()) == 0  # nothing of the student is in a term


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_the_same_detector_has_nothing_to_learn_from_shared_queries(name: str) -> None:
    own = detector(name, decoder_layers=1)
    distiller = build("kd_detr", own, copy.deepcopy(own), random_queries=4)
    distiller.prepare(data())
    assert distiller(**data())["queries"] < 1e-5


def test_random_queries_are_drawn_anew_in_every_step() -> None:
    own, other = detector("detr"), detector("detr", seed=1)
    distiller = build("kd_detr", own, other, random_queries=5)
    distiller.prepare(data())
    torch.manual_seed(0)
    values = [distiller(**data())["queries"].item() for _ in range(2)]
    torch.manual_seed(0)
    assert distiller(**data())["queries"].item() == values[0] != values[1]


def test_the_term_gives_the_loss_that_was_tested() -> None:
    own, other = detector("detr"), detector("detr", seed=1)
    (term,) = METHODS["kd_detr"](own, other, random_queries=0, temperature=3.0).stages[0].terms
    s, t = predictions(5, 4, seed=1), predictions(5, 4, seed=2)
    student, teacher = (Decoder(x[0][:, None], x[1][:, None], "softmax") for x in (s, t))
    images = SharedImages(torch.zeros(2, 3, 8, 8), [(8, 8)] * 2, [], [])
    queries = SimpleNamespace(own=torch.zeros(5, 32), decode=lambda q: student)
    run = Run({}, None)
    run.notes["detection.student"] = SimpleNamespace(images=images, get=lambda view: queries)
    run.notes["detection.teacher"] = SimpleNamespace(get=lambda view: queries, decoder=teacher)
    want = shared_queries(s, t, temperature=3.0, activation="softmax")
    torch.testing.assert_close(term(run), want)


def test_the_teachers_assignment_is_kept_though_the_student_would_choose_another() -> None:
    model = detector("deformable_detr")
    boxes, labels = [torch.tensor([[0.5, 0.5, 0.2, 0.2]])], [torch.tensor([1])]
    right, wrong = torch.tensor([0.5, 0.5, 0.2, 0.2]), torch.tensor([0.1, 0.1, 0.05, 0.05])
    logits = torch.full((1, 2, 3), -3.0)
    sure = logits.clone()
    sure[0, 1, 1] = 3.0  # the teacher's second query has the box
    teacher = sure, torch.stack([wrong, right])[None]
    student = logits.clone(), torch.stack([right, wrong])[None].requires_grad_()
    options: dict[str, Any] = {"boxes": boxes, "labels": labels, "config": model.config, "assigner": model.config}
    teacher_assigned(student, teacher, **options).backward()
    grad = student[1].grad
    assert grad is not None
    assert grad[0, 0].abs().sum() == 0
    assert grad[0, 1].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "student", "teacher", "options", "message", "error"),
    [
        ("kd_detr", ("rt_detr", {}), ("rt_detr", {}), {}, "RT-DETR, has no queries of its own", RecipeError),
        ("kd_detr", ("detr", {}), ("conditional_detr", {}), {}, "queries of different kinds", RecipeError),
        ("kd_detr", ("detr", {}), ("detr", {"width": 64}), {}, "have 32 numbers each, the teacher's 64", RecipeError),
        ("kd_detr", ("detr", {}), ("detr", {"labels": 5}), {}, "student has 3 classes, the teacher 5", RecipeError),
        ("detr_distill", ("detr", {}), ("rt_detr", {}), {}, "DETR goes with DETR", RecipeError),
        (
            "detr_distill", ("d_fine", {}), ("d_fine", {}), {"assignment_weight": 1.0},
            "leave it out by `assignment_weight=0`", RecipeError,
        ),
    ],
)  # fmt: skip
def test_pairs_that_cannot_be_distilled_are_refused(
    name: str, student: Any, teacher: Any, options: dict[str, Any], message: str, error: type[Exception]
) -> None:
    own, other = (detector(kind, **more) for kind, more in (student, teacher))
    with pytest.raises(error, match=message):
        METHODS[name](own, other, **options)


def test_detectors_without_a_decoder_are_refused() -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    plain: nn.Module = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    other = detector("deformable_detr")
    with pytest.raises(TaskkdError, match=r"the student, a SSD, has no 'decoder' .a decoder of queries.; it has"):
        METHODS["detr_distill"](plain, other)
    with pytest.raises(RecipeError, match="the student, SSD, has no queries"):
        METHODS["kd_detr"](plain, other)
    assert query_difference(other, other) is None


def test_shapes_that_do_not_fit_are_told() -> None:
    s, t = predictions(5), predictions(6)
    with pytest.raises(ShapeError, match="of the same queries"):
        shared_queries(s, t)
    with pytest.raises(ShapeError, match="same images and classes"):
        hungarian_response(s, predictions(5, 3))
    with pytest.raises(ShapeError, match="as wide as their channels"):
        target_aware([torch.ones(1, 4, 2, 2)], [torch.ones(1, 4, 2, 2)], queries=torch.ones(1, 1, 3, 5), scores=s[1])
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        shared_queries(s, s, temperature=0.0)


@pytest.mark.parametrize("name", ["detr_distill", "kd_detr"])
def test_mixed_precision_and_gradient_checkpointing(name: str) -> None:
    own, other = detector("deformable_detr"), detector("deformable_detr", seed=1)
    own.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    distiller = build(name, own, other)
    with torch.autocast("cpu", torch.bfloat16):
        distiller.prepare(data())
        losses = distiller(**data())
    losses["loss"].backward()
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())
    assert all(p.grad.isfinite().all() for p in own.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["detr_distill", "kd_detr"])
def test_a_teacher_may_see_larger_images(name: str) -> None:
    own, other = detector("deformable_detr"), detector("deformable_detr", seed=1)
    terms = METHODS[name](own, other).stages[0].terms
    distiller = kd.Distiller(own, DetectorTeacher(other, own, size=1.5), terms)
    distiller.prepare(data())
    assert all(v.isfinite() for v in distiller(**data()).values())
