"""CrossKD, BCKD and LD: what their terms compute, and how their methods are put together."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

import taskkd as kd
from taskkd.detection.boxes import as_corners
from taskkd.detection.methods import METHODS
from taskkd.detection.methods.crosskd import CrossHead, centredness, counted, standardise_like
from taskkd.detection.methods.dense_losses import box_overlap, quality_focal
from taskkd.detection.methods.localization import Localization, ld_terms
from taskkd.detection.methods.localization_queries import PAIRS, QueryLocalization, on_other_bins
from taskkd.detection.methods.vlr import assign_atss, square_anchors, vlr_weights
from taskkd.detection.teacher import DetectorTeacher
from taskkd.detection.views import Decoder
from taskkd.errors import RecipeError, ShapeError, TaskkdError
from taskkd.terms import Run
from tests.detection import tiny_detr
from tests.detection.detectors import batch, fcos, retinanet, sharpened


class Kept(kd.Distiller):
    """A distiller that keeps its last run."""

    def _run(self, *args: Any, **options: Any) -> Run:
        self.run = super()._run(*args, **options)
        return self.run


def run_of(student: nn.Module, teacher: nn.Module, terms: Any, data: Any) -> Run:
    distiller = Kept(student, DetectorTeacher(teacher, student), terms)
    distiller.prepare(data)
    torch.manual_seed(0)
    distiller(**data)
    distiller.close()
    return distiller.run


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Two of the same weights that compute the same in train and in eval mode: batch norm of the batch."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean, norm.running_var, norm.track_running_stats = None, None, False
    return model, copy.deepcopy(model)


# ---- CrossKD


@pytest.mark.parametrize("make", [retinanet, lambda **o: retinanet(norm=True, **o), fcos], ids=["v1", "v2", "fcos"])
@pytest.mark.parametrize("convolutions", [0, 2, 4])
def test_a_twins_features_give_the_teachers_predictions(make: Any, convolutions: int) -> None:
    """The cut, the activation, the order of the predictions and FCOS's ReLU are right, at every level."""
    student, teacher = twins(sharpened(make(), 1))
    terms = [CrossHead(b, student, teacher, branch=b, convolutions=convolutions) for b in ("classification", "box")]  # type: ignore[arg-type]
    run = run_of(student, teacher, terms, batch())
    dense = terms[0].teacher_views(run).dense
    for term, want in zip(terms, (dense.logits, dense.regression), strict=True):
        got = term.predictions(run)
        assert got.shape == want.shape
        assert (got - want).abs().max() < 1e-3 * want.abs().max()
        assert want.std() > 1e-2
    assert terms[0](run) < 1e-4


def test_the_terms_of_crosskd_by_hand() -> None:
    student, teacher = sharpened(retinanet(), 1), sharpened(retinanet(24, seed=1), 2)
    method = METHODS["crosskd"](student, teacher)
    classes, box = method.stages[0].terms
    run = run_of(student, teacher, [classes, box], batch((2, 1, 0)))
    assert (classes.name, classes.schedule.value, box.name, box.schedule.value) == (
        "cross-classification", 1.0, "cross-box", 1.0,
    )  # fmt: skip
    predicted = []
    with torch.no_grad():
        for level in range(5):
            tap = f"head.classification_head.conv.2.0@{level}"
            s, t = run.student[tap], run.teacher[tap]
            x = standardise_like(classes.adapters[0](s), t).relu()
            head = teacher.head.classification_head
            out = head.cls_logits(head.conv[3](x))
            predicted.append(out.reshape(3, 6, 3, *out.shape[2:]).permute(0, 3, 4, 1, 2).reshape(3, -1, 3))
    own, dense = torch.cat(predicted, 1), classes.teacher_views(run).dense
    matched = dense.match(classes.student_views(run).images.boxes)
    counts = torch.ones_like(matched, dtype=torch.bool)
    for image, (height, width) in enumerate(classes.student_views(run).images.sizes):
        x, y = ((dense.anchors[image][:, i] + dense.anchors[image][:, i + 2]) / 2 for i in (0, 1))
        counts[image] = (matched[image] != -2) & (x < width) & (y < height)
    number = max(3, int(((matched >= 0) & counts).sum()))
    want = quality_focal(own[..., 1:], dense.logits[..., 1:], weights=counts, divisor=number)
    assert torch.allclose(classes(run), want)
    assert 0 < counts.float().mean() < 1
    certain = dense.logits[..., 1:].sigmoid().amax(-1) * counts
    want = box_overlap(dense.decode(box.predictions(run)), dense.decode(), weights=certain, divisor=number)
    assert torch.allclose(box(run), want)


def test_crosskd_has_the_papers_defaults_for_each_detector() -> None:
    student, teacher = fcos(), fcos(24, seed=1)
    terms = METHODS["crosskd"](student, teacher).stages[0].terms
    assert [t.schedule.value for t in terms] == [0.4, 0.75]
    assert [t.boxes for t in terms] == ["iou", "iou"]
    assert terms[0].tower_taps[0] == "head.classification_head.conv.4@0"  # the norm of the second convolution
    assert len(METHODS["crosskd"](student, teacher, box_weight=0.0).stages[0].terms) == 1


def test_fcos_counts_positives_by_how_central_they_are() -> None:
    student, teacher = fcos(), fcos(24, seed=1)
    terms = METHODS["crosskd"](student, teacher).stages[0].terms
    run = run_of(student, teacher, terms, batch())
    dense, images = terms[0].teacher_views(run).dense, terms[0].student_views(run).images
    matched = dense.match(images.boxes)
    found, want = centredness(dense, matched, images.boxes), torch.zeros(matched.shape)
    for i, boxes in enumerate(images.boxes):
        for a in (matched[i] >= 0).nonzero().flatten().tolist():
            x, y = dense.anchors[i][a].reshape(2, 2).mean(0).tolist()
            x0, y0, x1, y1 = boxes[matched[i, a]].tolist()
            pairs = ((x - x0, x1 - x), (y - y0, y1 - y))
            want[i, a] = math.prod(min(p) / max(p) for p in pairs) ** 0.5
    assert torch.allclose(found, want, atol=1e-6)
    total = max(2.0, want.sum().item())
    assert total > 2
    own, other = terms[0].predictions(run)[..., 1:], dense.logits[..., 1:]
    counts = counted(dense, images)[1]
    assert torch.allclose(terms[0](run), quality_focal(own, other, weights=counts, divisor=total))


def test_crosskd_goes_between_families() -> None:
    student, teacher = fcos(), retinanet(24, seed=1)
    terms = METHODS["crosskd"](student, teacher).stages[0].terms
    assert all(t(run_of(student, teacher, terms, batch())) > 0 for t in terms)


@pytest.mark.parametrize("method", ["crosskd", "bckd"])
def test_twice_the_batch_is_the_same_and_half_precision_nearly(method: str) -> None:
    student, teacher, data = sharpened(fcos(), 1), sharpened(fcos(24, seed=1), 2), batch((2, 1, 0))
    twice = {**data, "images": data["images"] * 2, "targets": [dict(t) for t in data["targets"] * 2]}
    terms = METHODS[method](student, teacher).stages[0].terms
    distiller = kd.Distiller(student, DetectorTeacher(teacher, student), terms)
    distiller.prepare(data)
    once, again = distiller(**data), distiller(**twice)
    with torch.autocast("cpu", torch.bfloat16):
        half = distiller(**data)
    for term in terms:
        assert once[term.name].item() == pytest.approx(again[term.name].item(), rel=1e-3)  # the deviation's n - 1
        assert half[term.name].dtype == torch.float32
        assert half[term.name].item() == pytest.approx(once[term.name].item(), rel=0.1)


def test_the_teachers_head_is_nobodys_module() -> None:
    student, teacher = retinanet(), retinanet(24, seed=1)
    term = METHODS["crosskd"](student, teacher).stages[0].terms[0]
    assert list(term.parameters()) == []
    assert copy.deepcopy(term).head is term.head
    teacher.train()  # somebody does
    x = torch.randn(1, 24, 4, 4, requires_grad=True)
    term.head(x * 1).sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())
    assert not any(p.grad is not None for p in teacher.parameters())
    assert not teacher.head.classification_head.cls_logits.training
    assert term.head((x * 1).double()).dtype == torch.float32


# ---- BCKD


def test_the_terms_of_bckd_by_hand() -> None:
    student, teacher = sharpened(fcos(), 1), sharpened(fcos(24, seed=1), 2)
    classes, box = METHODS["bckd"](student, teacher).stages[0].terms
    assert (classes.schedule.value, box.schedule.value) == (1.0, 4.0)
    run = run_of(student, teacher, [classes, box], batch())
    own, other = classes.student_views(run).dense, classes.teacher_views(run).dense
    images = classes.student_views(run).images
    matched = own.match(images.boxes)
    value, weighted, positive = 0.0, 0.0, 0
    boxes = own.decode(), other.decode()
    for i, (height, width) in enumerate(images.sizes):
        for a in range(own.logits.shape[1]):
            x, y = own.anchors[i][a].reshape(2, 2).mean(0).tolist()
            if x >= width or y >= height:
                continue
            positive += int(matched[i, a] >= 0)
            s, t = own.logits[i, a, 1:], other.logits[i, a, 1:]
            value += quality_focal(s[None], t[None]).item()
            b = boxes[1][i, a]
            if b[2] > b[0] and b[3] > b[1]:
                weight = (s.sigmoid() - t.sigmoid()).abs().max().item()
                weighted += weight * box_overlap(boxes[0][i, a][None], b[None]).item()
    assert positive > 2
    assert classes(run).item() == pytest.approx(value / positive, rel=1e-4)
    assert box(run).item() == pytest.approx(weighted / positive, rel=1e-4)


def test_twins_have_nothing_to_learn() -> None:
    student, teacher = twins(sharpened(retinanet(), 1))
    terms = METHODS["bckd"](student, teacher).stages[0].terms
    run = run_of(student, teacher, terms, batch())
    assert [round(t(run).item(), 6) for t in terms] == [0, 0]


# ---- LD


class Distributions(nn.Module):
    """Two levels of class logits and of distributions with five bins, as a GFL head gives them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.ModuleList([nn.Conv2d(3, 8, 3, 8, 1), nn.Conv2d(3, 8, 3, 16, 1)])
        self.classes = nn.ModuleList(nn.Conv2d(8, 3, 1) for _ in range(2))
        self.sides = nn.ModuleList(nn.Conv2d(8, 20, 1) for _ in range(2))

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        maps = [(c(x), s(x)) for x, c, s in zip((f(images) for f in self.stem), self.classes, self.sides, strict=True)]
        return {"loss": torch.stack([c.square().mean() + s.square().mean() for c, s in maps]).sum()}


TAPS = {"sides": ["sides.0", "sides.1"], "classes": ["classes.0", "classes.1"]}


def square_batch(boxes: tuple[int, ...]) -> dict[str, Any]:
    data = batch(boxes, sizes=((64, 64),))
    for target in data["targets"]:
        target["boxes"] *= 2.5  # as large as the anchors
    return {**data, "images": torch.stack(data["images"])}


@pytest.mark.parametrize("normalise", ["sum_w", "authors"])
def test_the_terms_of_ld_on_a_head_with_distributions(normalise: str) -> None:
    student, teacher, data = Distributions(0), Distributions(1), square_batch((2, 1, 0))
    method = METHODS["localization"](student, teacher, **TAPS, normalise=normalise, legacy_iof=True)
    terms = method.stages[0].terms
    assert {t.name: t.schedule.value for t in terms} == {
        "localization": 0.25, "localization-vlr": 0.25, "classification": 10.0,
    }  # fmt: skip
    distiller = Kept(student, kd.Frozen(teacher), terms)
    distiller.prepare(data)
    losses = distiller(**data)
    losses["loss"].backward()
    assert all(p.grad is not None for p in student.parameters())
    run, anchors = distiller.run, square_anchors([(8, 8), (4, 4)], [8, 16])
    boxes = [t["boxes"] for t in data["targets"]]
    positive = torch.stack([assign_atss(anchors, b, [64, 16]) >= 0 for b in boxes])
    vlr = torch.stack([vlr_weights(anchors, b, [64, 16], legacy_iof=True) for b in boxes])
    assert positive.any() and vlr.any()

    def rows(values: dict[str, Tensor], kind: str) -> Tensor:
        return torch.cat([values[t].flatten(2).transpose(1, 2) for t in TAPS[kind]], 1)

    logits = rows(run.student, "classes"), rows(run.teacher, "classes")
    sides = [rows(v, "sides").reshape(3, 80, 4, 5) for v in (run.student, run.teacher)]
    levels = [slice(0, 80)] if normalise == "sum_w" else [slice(0, 64), slice(64, 80)]
    for part, term in zip(("ld", "ld_vlr", "kd"), terms, strict=True):
        want = sum(
            ld_terms(*(x[:, at] for x in (*logits, *sides)), positive=positive[:, at], vlr=vlr[:, at],
                     normalise=normalise)[part]  # type: ignore[arg-type]
            for at in levels
        )  # fmt: skip
        assert torch.allclose(losses[term.name], want.detach())  # type: ignore[union-attr]
        assert losses[term.name] > 0
    empty = distiller(**square_batch((0, 0)))
    assert [empty[t.name].item() for t in terms] == [0, 0, 0]


@pytest.mark.parametrize("normalise", ["sum_w", "authors"])
@pytest.mark.parametrize("region", ["fine_grained", "inside", "vlr"])
def test_features_are_imitated_around_boxes_where_it_is_asked_for(region: str, normalise: str) -> None:
    student, teacher, data = Distributions(0), Distributions(1), square_batch((2, 1, 0))
    options = {"imitation_weight": 2.0, "imitation_region": region, "normalise": normalise, "legacy_iof": True}
    method = METHODS["localization"](student, teacher, **TAPS, neck=["stem.0", "stem.1"], **options)
    term = method.stages[0].terms[-1]
    assert (term.name, term.schedule.value) == ("imitation", 2.0)
    distiller = Kept(student, kd.Frozen(teacher), [term])
    distiller.prepare(data)
    found, run = distiller(**data)["imitation"], distiller.run
    anchors, means, squares = square_anchors([(8, 8), (4, 4)], [8, 16]), [], []
    for level, (part, width) in enumerate(((slice(0, 64), 8), (slice(64, 80), 4))):
        own = []
        for image, boxes in enumerate(t["boxes"] for t in data["targets"]):
            overlaps = box_iou(anchors, boxes)
            if region == "vlr":
                inside = vlr_weights(anchors, boxes, [64, 16], legacy_iof=True) > 0
            elif region == "inside":
                x, y = ((anchors[:, i, None] + anchors[:, i + 2, None]) / 2 for i in (0, 1))
                inside = ((x > boxes[:, 0]) & (x < boxes[:, 2]) & (y > boxes[:, 1]) & (y < boxes[:, 3])).any(1)
            else:
                inside = (
                    torch.stack([o > 0.5 * o.max() for o in overlaps.T], 1).any(1) if len(boxes) else overlaps.any(1)
                )
            for cell in inside[part].nonzero()[:, 0].tolist():
                s, t = (v[f"stem.{level}"][image, :, cell // width, cell % width] for v in (run.student, run.teacher))
                own.append((s - t).square().mean())
        means.append(torch.stack(own).mean() if own else torch.zeros(()))
        squares += own
    assert squares
    want = torch.stack(squares).mean() if normalise == "sum_w" else torch.stack(means).sum()
    assert torch.allclose(found, want.detach())
    assert distiller(**square_batch((0, 0)))["imitation"].item() == 0
    twice = {k: torch.cat([v, v]) if isinstance(v, Tensor) else [*v, *v] for k, v in data.items()}
    torch.testing.assert_close(distiller(**twice)["imitation"], found)


def test_d_fines_features_are_imitated_too() -> None:
    student, teacher = (tiny_detr.detector("d_fine", seed=seed) for seed in (0, 1))
    terms = METHODS["localization"](student.train(), teacher, imitation_weight=2.0).stages[0].terms
    assert [t.name for t in terms] == ["localization", "classification", "imitation"]
    images, targets = tiny_detr.batch()
    run = run_of(student, teacher, terms[-1:], {"images": images, "targets": targets})
    assert terms[-1](run) > 0


def test_ld_says_what_it_needs() -> None:
    student, teacher = Distributions(0), Distributions(1)
    with pytest.raises(TaskkdError, match="the student is a Distributions, of which no tensors are known"):
        METHODS["localization"](student, teacher, **TAPS, imitation_weight=2.0)
    with pytest.raises(RecipeError, match=r"taps of 2 levels for the sides, \[1, 1\] for the classes"):
        METHODS["localization"](student, teacher, sides=TAPS["sides"], classes=["classes.0"])
    term = Localization("ld", student, teacher, part="ld", sides=["classes.0"], classes=["classes.0"], temperature=10.0)
    with pytest.raises(ShapeError, match=r"maps of 3 channels are no distributions of four sides"):
        kd.Distiller(student, kd.Frozen(teacher), [term]).prepare(square_batch((1,)))


# ---- LD of D-FINE


def test_a_distribution_on_other_bins_keeps_its_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    bins = torch.rand(5, 7, generator=generator, dtype=torch.float64).cumsum(-1)
    probabilities = torch.rand(5, 4, generator=generator, dtype=torch.float64).softmax(-1)
    low, high = bins[:, :1], bins[:, -1:]
    positions = low + (high - low) * torch.rand(5, 4, generator=generator, dtype=torch.float64)
    found = on_other_bins(probabilities, positions, bins)
    assert torch.allclose(found.sum(-1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose((found * bins).sum(-1), (probabilities * positions).sum(-1))
    assert torch.allclose(on_other_bins(found, bins, bins), found)
    assert on_other_bins(torch.tensor([0.25, 0.75]), torch.tensor([-5.0, 9.0]), torch.arange(3.0)).tolist() == [
        0.25, 0, 0.75,
    ]  # fmt: skip


def test_the_edges_of_d_fine_are_where_its_boxes_come_from() -> None:
    student, teacher = tiny_detr.detector("d_fine"), tiny_detr.detector("d_fine", seed=1)
    terms = METHODS["localization"](student, teacher).stages[0].terms
    assert [(t.name, t.schedule.value, t.temperature) for t in terms] == [
        ("localization", 0.25, 10.0), ("classification", 10.0, 2.0),
    ]  # fmt: skip
    run = run_of(student, teacher, terms, batch((2, 1)))
    assert all(t(run) > 0 for t in terms)
    for views in (terms[0].student_views(run), terms[0].teacher_views(run)):
        decoder = views.decoder
        assert decoder.corners is not None and decoder.edges is not None
        expected = (decoder.corners.softmax(-1) * decoder.edges).sum(-1)
        assert torch.allclose(expected, as_corners(decoder.boxes), atol=1e-5)


def test_the_same_queries_have_nothing_to_learn() -> None:
    student, teacher = tiny_detr.detector("d_fine"), tiny_detr.detector("d_fine", seed=1)
    terms = METHODS["localization"](student, teacher).stages[0].terms
    run = run_of(student, teacher, terms, batch((2, 1)))
    views = terms[0].student_views(run)
    own = views.decoder
    order = torch.randperm(own.logits.shape[2])
    shuffled = {k: getattr(own, k)[:, :, order] for k in ("logits", "boxes", "corners", "edges")}
    terms[0].teacher_views(run).read["decoder"] = Decoder(**shuffled, activation="sigmoid")
    run.notes.pop(PAIRS)  # matched anew
    assert [round(t(run).item(), 5) for t in terms] == [0, 0]
    empty = run_of(student, teacher, terms, batch((0, 0)))
    assert [t(empty).item() for t in terms] == [0, 0]
    with pytest.raises(RecipeError, match=r"queries with distributions are D-FINE's"):
        QueryLocalization("ld", student, tiny_detr.detector("rt_detr"), part="ld", temperature=10.0)
    with pytest.raises(RecipeError, match=r"the student \(D-FINE\) or the teacher \(RT-DETR\) regresses"):
        METHODS["localization"](student, tiny_detr.detector("rt_detr"))


def test_bckd_compares_what_rt_detrs_encoder_predicts() -> None:
    student, teacher = tiny_detr.detector("rt_detr"), tiny_detr.detector("rt_detr", seed=1, width=16)
    terms = METHODS["bckd"](student, teacher).stages[0].terms
    run = run_of(student, teacher, terms, batch())
    assert all(t(run) > 0 for t in terms)
