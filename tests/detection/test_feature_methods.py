"""Methods on feature maps; acceptance A2 to A4 and B8 of the specification, of their losses."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from ruamel.yaml import YAML
from torch import Tensor, nn

import taskkd as kd
from taskkd.detection.methods import METHODS
from taskkd.detection.methods.channel_wise import channel_wise_loss, class_maps
from taskkd.detection.methods.defeat import defeat_loss, defeat_response
from taskkd.detection.methods.fbkd import NonLocal, StudentMaps, fbkd_loss
from taskkd.detection.methods.fgd import GlobalContext, fgd_loss, inherit_parts
from taskkd.detection.methods.fgfi import FineGrained, fgfi_loss
from taskkd.detection.methods.maps import channel_moments, safe_sqrt
from taskkd.detection.methods.masked_generative import kept_cells, masked_generative_loss
from taskkd.detection.methods.mimic import MimicTerm, mimic_crops, mimic_loss
from taskkd.detection.methods.pearson_kd import pearson_loss
from taskkd.detection.methods.quantization_mimic import (
    QuantizationMimic,
    quantile_step,
    quantise,
    quantised,
    quantised_mimic_loss,
)
from taskkd.detection.methods.score_weighted import cell_scores, score_weighted_loss
from taskkd.detection.regions import fgd_masks, fgfi_masks, inside_boxes
from taskkd.detection.teacher import DetectorTeacher
from taskkd.errors import RecipeError, ShapeError, TaskkdError
from taskkd.recipes import options_schema
from tests.detection import tiny_detr
from tests.detection.detectors import DETECTORS, batch

Loss = Callable[[Tensor, Tensor], Tensor]
MINE = [
    "channel_wise",
    "defeat",
    "fbkd",
    "fgd",
    "fgfi",
    "masked_generative",
    "mimic",
    "pearson_kd",
    "quantization_mimic",
    "score_weighted",
]
SHAPE = (2, 4, 5, 6)
BOXES = [torch.tensor([[1.0, 2.0, 17.0, 12.0], [8.0, 0.0, 20.0, 19.0]]), torch.zeros(0, 4)]


def boxes_for(x: Tensor) -> list[Tensor]:
    return BOXES * (len(x) // 2)


def masks_for(x: Tensor) -> Tensor:
    return inside_boxes(boxes_for(x), [(5, 6)], [(4, 4)])[0]


def module(make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    made = make()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.to(torch.promote_types(x.dtype, torch.float32))


def focal_global(s: Tensor, t: Tensor) -> Tensor:
    ((foreground, background),) = fgd_masks(boxes_for(s), [(5, 6)], [(20, 24)] * len(s))
    contexts = {f"{n}_context": module(lambda: GlobalContext(4), s) for n in ("student", "teacher")}
    weights = {"alpha": 1.0, "beta": 1.0, "gamma": 1.0, "relation": 1.0}
    return fgd_loss(s, t, foreground=foreground, background=background, **contexts, **weights)


def feature_based(s: Tensor, t: Tensor) -> Tensor:
    maps, relations = module(lambda: StudentMaps(4, 4, pool=2), s), module(lambda: NonLocal(4, pool=2), s)
    return fbkd_loss(s, t, student_maps=maps, teacher_relations=relations)


def generative(s: Tensor, t: Tensor) -> Tensor:
    kept = (torch.arange(30).reshape(1, 1, 5, 6) % 3 > 0).repeat(len(s), 1, 1, 1)
    return masked_generative_loss(s, t, generator=module(lambda: nn.Conv2d(4, 4, 3, padding=1), s), kept=kept)


def crops(s: Tensor, t: Tensor) -> Tensor:
    return mimic_crops([s], [t], boxes_for(s), [(4.0, 4.0)], "elements")


#: name -> (loss of raw tensors, whether it is 0 of equal ones)
LOSSES: dict[str, tuple[Loss, bool]] = {
    "pearson": (pearson_loss, True),
    "channel_wise": (channel_wise_loss, True),
    "channel_wise_normalised": (lambda s, t: channel_wise_loss(s, t, normalise=True), True),
    "fgfi": (lambda s, t: fgfi_loss(s, t, masks=masks_for(s)), True),
    "fgfi_elements": (lambda s, t: fgfi_loss(s, t, masks=masks_for(s), normalise="elements"), True),
    "defeat": (lambda s, t: defeat_loss(s, t, masks=masks_for(s)), True),
    "defeat_response": (
        lambda s, t: defeat_response(
            s.flatten(1)[:, :4], t.flatten(1)[:, :4], labels=torch.tensor([1, 0]).repeat(len(s) // 2)
        ),
        True,
    ),
    "fgd": (focal_global, False),
    "masked_generative": (generative, False),
    "fbkd": (feature_based, False),
    "score_weighted": (
        lambda s, t: score_weighted_loss(s, t, scores=torch.full((len(s), 5, 6), 0.25, dtype=t.dtype)),
        True,
    ),
    "mimic": (mimic_loss, True),
    "mimic_crops": (crops, True),
}


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    s, t = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    return s.to(dtype).requires_grad_(), t.to(dtype)


# ---- losses


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_right_gradient_and_does_not_grow_with_the_batch(name: str) -> None:
    loss, zero_of_equals = LOSSES[name]
    s, t = pair()
    assert torch.autograd.gradcheck(lambda x: loss(x, t), (s,), fast_mode=True)
    doubled = loss(torch.cat([s, s]), torch.cat([t, t]))
    # an unbiased deviation is that of another number of values
    torch.testing.assert_close(doubled, loss(s, t), rtol=1e-2 if name == "pearson" else 1e-9, atol=1e-12)
    if zero_of_equals:
        assert loss(t, t).abs() <= 1e-12
    half = [x.detach().half() for x in (s, t)]
    result = loss(*half)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), loss(*(x.double() for x in half)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["equal", "zeros", "constant"])
def test_a_loss_and_its_gradient_are_finite(name: str, kind: str) -> None:
    s, t = pair()
    s, t = {"equal": (t, t), "zeros": (t * 0, t), "constant": (t * 0 + 3, t * 0 + 1)}[kind]
    s = s.clone().requires_grad_()
    value = LOSSES[name][0](s, t)
    value.backward()
    assert s.grad is not None
    assert value.isfinite()
    assert s.grad.isfinite().all()


def test_one_cell_of_one_image_is_finite() -> None:
    s = torch.randn(1, 4, 1, 1, requires_grad=True)
    t = torch.randn(1, 4, 1, 1)
    maps, relations = StudentMaps(4, 4), NonLocal(4)
    values = [pearson_loss(s, t), channel_wise_loss(s, t, normalise=True)]
    values.append(fbkd_loss(s, t, student_maps=maps, teacher_relations=relations))
    torch.stack(values).sum().backward()
    assert torch.stack(values).isfinite().all()
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_without_boxes_what_is_limited_to_them_is_0_with_a_gradient() -> None:
    s, t = pair()
    nothing = torch.zeros(2, 5, 6, dtype=torch.bool)
    values = [
        fgfi_loss(s, t, masks=nothing),
        fgfi_loss(s, t, masks=nothing, normalise="elements"),
        defeat_loss(s, t, masks=nothing, background=0.0),
        mimic_loss(s[:0], t[:0]),
        mimic_crops([s], [t], [torch.zeros(0, 4)] * 2, [(4.0, 4.0)], "none"),
        score_weighted_loss(s, t, scores=torch.zeros(2, 5, 6)),
    ]
    assert [v.item() for v in values] == [0.0] * len(values)
    torch.stack(values).sum().backward()
    assert s.grad is not None
    assert (s.grad == 0).all()


def test_quantised_values_and_their_gradient() -> None:
    x = torch.tensor([-1.0, 0.25, 0.2500001, 0.75, 0.7500001, 5.0], dtype=torch.float64)
    assert quantise(x, 0.5).tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 5.0]  # ties go down
    assert quantise(x, 0.5, signed=True).tolist() == [-1.0, 0.0, 0.5, 0.5, 1.0, 5.0]
    s, t = pair()
    value = quantised_mimic_loss(s, t, step=0.5)
    value.backward()
    assert s.grad is not None
    assert torch.equal(s.grad, (quantise(s.detach(), 0.5) - quantise(t, 0.5)) / len(s))  # straight through
    torch.testing.assert_close(quantised_mimic_loss(torch.cat([s, s]), torch.cat([t, t]), step=0.5), value)
    assert quantile_step([torch.linspace(-16, 16, 3201)]) == pytest.approx(0.99, abs=1e-3)
    assert quantile_step([torch.zeros(9)]) == 1.0


def test_crops_are_those_of_each_box() -> None:
    s, t = pair()
    found = mimic_crops([s], [t], boxes_for(s), [(4.0, 4.0)], "elements")
    cut = [(0, 0, 3, 0, 4), (0, 0, 4, 2, 5)]  # image, rows, columns
    pieces = [[x[n, :, a:b, c:d] for n, a, b, c, d in cut] for x in (s, t)]
    torch.testing.assert_close(found, mimic_loss(*pieces))


def test_moments_are_those_of_torch_and_a_channel_without_deviation_has_a_gradient() -> None:
    maps = torch.randn(2, 3, 4, 4, dtype=torch.float64) + 5
    for constant in (False, True):
        if constant:
            maps[:, 1] = 5
        maps = maps.detach().requires_grad_()
        centred, mean, variance = channel_moments(maps)
        torch.testing.assert_close(centred + mean, maps)
        torch.testing.assert_close(safe_sqrt(variance), maps.std((0, 2, 3), keepdim=True))
        (ours,) = torch.autograd.grad(safe_sqrt(variance).sum(), maps)
        (theirs,) = torch.autograd.grad(maps.std((0, 2, 3)).sum(), maps)
        torch.testing.assert_close(ours, theirs)
        maps = maps.detach()


def test_pearson_is_one_minus_the_correlation() -> None:
    s, t = (x.transpose(0, 1).flatten(1) for x in pair())
    r = torch.stack([torch.corrcoef(torch.stack(x))[0, 1] for x in zip(s, t, strict=True)])
    count = s.shape[1]
    torch.testing.assert_close(pearson_loss(*pair()), ((1 - r) * (count - 1) / count).mean(), rtol=1e-5, atol=1e-8)
    larger = pair()[0].repeat_interleave(2, 2)
    with pytest.raises(ShapeError, match="one shape"):
        pearson_loss(pair()[0][:, :2], pair()[1])
    assert pearson_loss(larger, pair()[1]).isfinite()  # resized, here where one side is


def test_a_share_of_cells_is_masked_by_the_global_generator() -> None:
    like = torch.zeros(8, 3, 40, 50)
    torch.manual_seed(1)
    kept = kept_cells(like, 0.65)
    assert kept.shape == (8, 1, 40, 50)
    assert kept.mean().item() == pytest.approx(0.35, abs=0.01)
    torch.manual_seed(1)
    assert torch.equal(kept, kept_cells(like, 0.65))


# ---- detectors


def distiller_of(
    name: str, student: nn.Module, teacher: nn.Module, example: dict[str, Any], size: float = 1.0, **options: Any
) -> kd.Distiller:
    stage = METHODS[name](student, teacher, **options).stages[0]
    torch.manual_seed(0)
    distiller = kd.Distiller(
        student, DetectorTeacher(teacher, student, size=size), stage.terms, task_weight=stage.task_weight
    )
    distiller.prepare(example)
    return distiller


def step(distiller: kd.Distiller, example: dict[str, Any]) -> dict[str, Tensor]:
    distiller.set_total(10)
    distiller.zero_grad()
    torch.manual_seed(0)
    losses: dict[str, Tensor] = distiller(**example)
    losses["loss"].backward()
    return losses


@pytest.mark.parametrize("name", ["pearson_kd", "mimic", "fgfi", "fgd"])
def test_a_teacher_of_larger_images(name: str) -> None:
    student, teacher = DETECTORS["retinanet"](8), DETECTORS["retinanet"](16, seed=1)
    distiller = distiller_of(name, student, teacher, batch(), size=2.0)
    assert all(v.isfinite() for v in step(distiller, batch()).values())


def test_fgfi_looks_at_the_students_own_anchors() -> None:
    student, teacher = DETECTORS["faster_rcnn"](8), DETECTORS["faster_rcnn"](16, seed=1)
    found: list[Any] = []

    class Watched(FineGrained):
        def compare(self, students: list[Tensor], teachers: list[Tensor], run: Any) -> Tensor:
            view, images = self.student_views(run).rpn, self.images(run)
            anchors = list(view.anchors[0].split(view.level_sizes))
            expected = fgfi_masks(images.boxes, anchors, view.shapes, finest=56.0)
            found.append((self.masks(students, run), expected))
            return super().compare(students, teachers, run)

    term = Watched("imitation", student, teacher)
    distiller = kd.Distiller(student, DetectorTeacher(teacher, student), [term])
    distiller.prepare(batch())
    masks, expected = found[-1]
    assert len(masks) == 5
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))
    assert sum(int(m.sum()) for m in masks) > 0


def test_scores_are_those_of_the_surest_anchor_of_a_cell() -> None:
    teacher = DETECTORS["retinanet"](8)
    student = DETECTORS["retinanet"](8, seed=1)
    distiller = distiller_of("score_weighted", student, teacher, batch())
    term = distiller.terms["scored"]
    assert isinstance(term, METHODS["score_weighted"](student, teacher).stages[0].terms[0].__class__)
    run = distiller._run(batch())
    dense = term.teacher_views(run).dense
    scores = cell_scores(dense)
    h, w = dense.shapes[0]
    first = dense.logits[1, : dense.level_sizes[0]].reshape(h, w, -1, dense.logits.shape[2])[2, 3, :, 1:].sigmoid()
    torch.testing.assert_close(scores[0][1, 2, 3], first.max())
    maps = class_maps(dense)
    assert maps[0].shape == (2, dense.level_sizes[0] // (h * w) * dense.logits.shape[2], h, w)
    torch.testing.assert_close(
        maps[0][1, :, 2, 3], dense.logits[1].reshape(-1)[: maps[0][0].numel()].view(h, w, -1)[2, 3]
    )


def test_mimic_in_two_stages() -> None:
    student, teacher = DETECTORS["faster_rcnn"](8), DETECTORS["faster_rcnn"](16, seed=1)
    method = METHODS["mimic"](student, teacher, stages=2, head_weight=0.5)
    first, second = method.stages
    assert (first.trains, first.task_weight, first.share + second.share) == (("backbone", "rpn"), 0.0, 1.0)
    distiller = kd.Distiller(student, DetectorTeacher(teacher, student), first.terms, task_weight=0.0)
    distiller.prepare(batch())
    with kd.stages.training_only(student, first.trains):
        losses = step(distiller, batch())
    assert set(losses) == {"loss", "rpn", "mimic"}
    got = {n.split(".")[0] for n, p in student.named_parameters() if p.grad is not None}
    assert got == {"backbone", "rpn"}
    distiller.close()
    distiller = kd.Distiller(student, DetectorTeacher(teacher, student), second.terms)
    distiller.prepare(batch())
    assert set(step(distiller, batch())) == {"loss", "task", "head"}


@pytest.mark.parametrize("proposals", ["teacher", "gt"])
@pytest.mark.parametrize("pool", [7, None])
def test_mimic_looks_where_it_is_told(proposals: str, pool: int | None) -> None:
    student = DETECTORS["retinanet"](8)
    for teacher in (DETECTORS["faster_rcnn"](16, seed=1), DETECTORS["fcos"](16, seed=1)):
        distiller = distiller_of("mimic", student, teacher, batch(), proposals=proposals, pool=pool, size=1.5)
        term = distiller.terms["mimic"]
        assert isinstance(term, MimicTerm)
        run = distiller._run(batch(sizes=((64, 96),)))
        regions, images = term.regions(run), term.images(run)
        if proposals == "gt":
            assert all(torch.equal(a, b) for a, b in zip(regions, images.boxes, strict=True))
        else:  # the teacher saw 96 x 128 pixels
            height, width = images.tensors.shape[2:]
            assert all(len(r) and (r <= r.new_tensor([width, height] * 2) + 1e-3).all() for r in regions)
            assert max(float(r[:, 2].amax()) for r in regions) > 0.9 * width
        assert step(distiller, batch())["mimic"] > 0
        distiller.close()


def test_the_quantisers_step_is_fixed_in_prepare_and_saved() -> None:
    student, teacher = DETECTORS["retinanet"](8), DETECTORS["retinanet"](16, seed=1)
    distiller = distiller_of("quantization_mimic", student, teacher, batch())
    term = distiller.terms["mimic"]
    assert isinstance(term, QuantizationMimic)
    wanted = [quantile_step(term.pairs(distiller._run(batch()))[1]), 1.0]  # a pyramid's maps have negative values
    torch.testing.assert_close(term.quantiser, torch.tensor(wanted))
    assert "terms.mimic.quantiser" in distiller.state_dict()
    other = distiller_of("quantization_mimic", copy.deepcopy(student), teacher, batch(seed=5))
    assert not torch.equal(other.terms["mimic"].quantiser, term.quantiser)
    other.load_state_dict(distiller.state_dict())
    assert torch.equal(other.terms["mimic"].quantiser, term.quantiser)


def test_a_teacher_whose_maps_are_rounded_while_it_is_fine_tuned() -> None:
    teacher = DETECTORS["retinanet"](8)
    seen: list[Tensor] = []
    handle = teacher.head.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    with quantised(teacher, 0.25):
        loss = torch.stack(list(teacher(batch()["images"], batch()["targets"]).values())).sum()
        loss.backward()
    assert all(torch.equal(x, (x / 0.25).round() * 0.25) for x in seen)
    assert all(p.grad is not None for p in teacher.backbone.parameters())
    seen.clear()
    teacher(batch()["images"], batch()["targets"])
    assert not torch.equal(seen[0], (seen[0] / 0.25).round() * 0.25)
    handle.remove()
    with pytest.raises(TaskkdError, match="no module 'neck'; it has"), quantised(teacher, 0.25, module="neck"):
        pass


def test_neck_and_head_are_inherited_where_they_fit(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = DETECTORS["retinanet"](16), DETECTORS["retinanet"](16, seed=1)
    body = copy.deepcopy(student.backbone.body.state_dict())
    with caplog.at_level("INFO", logger="taskkd"):
        METHODS["fgd"](student, teacher, inherit=True)
    assert all(torch.equal(v, teacher.head.state_dict()[n]) for n, v in student.head.state_dict().items())
    assert all(torch.equal(v, body[n]) for n, v in student.backbone.body.state_dict().items())
    assert "tensors of neck and head are the teacher's" in caplog.text
    copied, left = inherit_parts(DETECTORS["retinanet"](8), teacher)
    assert any(n.startswith("head.") for n in left)
    assert not set(copied) & set(left)
    with pytest.raises(TaskkdError, match="nothing of the teacher's neck and head fits"):
        inherit_parts(nn.Linear(3, 4), nn.Linear(4, 4, bias=False))


def test_published_weights_follow_the_kind_of_detector() -> None:
    kinds = {n: (DETECTORS[n](8), DETECTORS[n](8, seed=1)) for n in ("faster_rcnn", "retinanet", "fcos")}

    def term(name: str, kind: str, **options: Any) -> Any:
        return METHODS[name](*kinds[kind], **options).stages[0].terms[0]

    assert [term("pearson_kd", k).schedule.value for k in kinds] == [6, 10, 10]
    assert [term("masked_generative", k).schedule.value for k in kinds] == [5e-7, 2e-5, 2e-5]
    assert [term("fgd", k).options["alpha"] for k in kinds] == [5e-5, 1e-3, 1.6e-3]
    assert [term("fgd", k).count for k in kinds] == [4, None, None]
    assert term("fgd", "fcos", alpha=0.1).options["alpha"] == 0.1
    assert [term("channel_wise", "retinanet", on=on).schedule.value for on in ("neck", "classes")] == [10, 5]
    assert term("channel_wise", "retinanet", normalise=True, until=0.5).schedule.needs_total


def test_maps_of_any_modules_by_their_taps() -> None:
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, width, 3, stride=4, padding=1)
            self.up = nn.Conv2d(width, width, 3, stride=2, padding=1)

        def forward(self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
            return {"loss": self.up(self.body(images)).square().mean()}

    torch.manual_seed(0)
    example = {
        "images": torch.rand(2, 3, 32, 32),
        "targets": [{"boxes": b, "labels": torch.ones(len(b))} for b in BOXES],
    }
    for name in sorted(set(MINE) - {"score_weighted"}):
        options = {"proposals": "gt"} if "mimic" in name else {}
        student, teacher = Net(4), Net(6)
        method = METHODS[name](student, teacher, neck=["body", "up"], **options)
        distiller = kd.Distiller(student, kd.Frozen(teacher), method.stages[0].terms)
        maps_alone = name in ("channel_wise", "fbkd", "masked_generative", "pearson_kd")
        given = {"images": example["images"]} if maps_alone else example
        distiller.prepare(given)
        losses = step(distiller, given)
        assert all(v.isfinite() and v > 0 for v in losses.values()), name


def test_scores_of_maps_by_name_are_those_of_their_level() -> None:
    student, teacher = DETECTORS["retinanet"](16), DETECTORS["retinanet"](16, seed=1)
    named = ["backbone.fpn.layer_blocks.1", "backbone.fpn.layer_blocks.2"]
    method = METHODS["score_weighted"](student, teacher, neck=named, project=False)
    distiller = kd.Distiller(student, DetectorTeacher(teacher, student), method.stages[0].terms)
    distiller.prepare(batch())
    (term,) = distiller.terms.values()
    run = distiller._run(batch())
    scores = cell_scores(term.teacher_views(run).dense)[1:3]
    expected = score_weighted_loss(*([side[n] for n in named] for side in (run.student, run.teacher)), scores=scores)
    torch.testing.assert_close(term(run), expected)


def test_detectors_of_transformers() -> None:
    images, targets = tiny_detr.batch()
    example = {"images": images, "targets": targets, "id": torch.arange(2)}
    for name in ("fgd", "mimic"):  # of other widths; `mimic` where there are no regions but the ground truth's
        student, teacher = (tiny_detr.detector("deformable_detr", seed=w, width=w) for w in (32, 64))
        options = {"proposals": "gt"} if name == "mimic" else {}
        losses = step(distiller_of(name, student, teacher, example, **options), example)
        assert all(v.isfinite() and v > 0 for v in losses.values()), name


def test_a_teacher_in_half_precision() -> None:
    student, teacher = DETECTORS["faster_rcnn"](8), DETECTORS["faster_rcnn"](16, seed=1)
    for name in MINE:
        terms = METHODS[name](student, teacher).stages[0].terms
        distiller = kd.Distiller(student, DetectorTeacher(teacher, student, dtype="bfloat16"), terms)
        distiller.prepare(batch())
        losses = step(distiller, batch())
        assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values()), name
        distiller.close()


@pytest.mark.parametrize("name", MINE)
def test_options_go_through_a_recipe(name: str) -> None:
    schema = options_schema(METHODS[name])
    defaults = schema().model_dump()
    text = StringIO()
    YAML().dump(defaults, text)
    assert schema.model_validate(YAML(typ="safe").load(text.getvalue())).model_dump() == defaults
    with pytest.raises(ValidationError):
        schema.model_validate({"no_such_option": 1})


def test_the_page_knows_every_method_and_option() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods" / "detection-features.md").read_text()
    sections = {s.partition("`")[0]: s for s in page.split("\n## `")[1:]}
    assert set(sections) == set(MINE)
    for name, text in sections.items():
        options = [p.name for p in inspect.signature(METHODS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
        missing = [
            o for o in options if f"`{o}`" not in text and o not in ("neck", "teacher_neck", "adapter", "levels")
        ]
        assert not missing, (name, missing)
    (first, second) = re.findall(r"```python\n(.*?)```", page, re.S)
    student, teacher = DETECTORS["retinanet"](8), DETECTORS["retinanet"](16, seed=1)
    names: dict[str, Any] = {"student": student, "teacher": teacher, "batch": batch()}
    exec(compile(first, "page", "exec"), names)
    assert set(names["losses"]) == {"loss", "task", "focal_global"}
    names |= {"fine_tune": lambda model: None, "quantization_mimic": METHODS["quantization_mimic"]}
    exec(compile(second, "page", "exec"), names)
    assert names["method"].name == "quantization_mimic"


def test_what_cannot_be_is_refused() -> None:
    one, two = DETECTORS["retinanet"](8), DETECTORS["faster_rcnn"](8)
    with pytest.raises(RecipeError, match="stages=2 needs a student of two stages"):
        METHODS["mimic"](one, two, stages=2)
    with pytest.raises(TaskkdError, match="has no 'rois'"):
        METHODS["defeat"](one, two, classes=True)
    with pytest.raises(TaskkdError, match="has no 'dense'"):
        METHODS["channel_wise"](two, two, on="classes")
    with pytest.raises(TaskkdError, match="no anchors that are known"):
        FineGrained("imitation", one, two, neck=["backbone"], region="anchors")
    wider = DETECTORS["retinanet"](16)
    with pytest.raises(ShapeError, match="adapter='conv1x1'"):
        distiller_of("pearson_kd", one, wider, batch(), adapter="none")
