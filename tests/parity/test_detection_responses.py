"""The terms that the methods on predictions build give the values of the reference cases, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskkd.detection.methods import METHODS
from taskkd.detection.shared import SharedImages
from taskkd.detection.views import Dense, Rois, Views
from taskkd.terms import Run, Term
from tests.detection.detectors import DETECTORS
from tests.parity.test_parity import compare, load, tensors

CASES = Path(__file__).parent / "cases" / "detection"


def case(stem: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    about, arrays = load(CASES / f"{stem}.json")
    return about["params"], tensors(arrays), arrays


def terms(method: str, detector: str, **options: Any) -> dict[str, Term]:
    models = DETECTORS[detector](8), DETECTORS[detector](8, seed=1)
    return {t.name: t for t in METHODS[method](*models, **options).stages[0].terms}


def run_of(view: str, student: Any, teacher: Any, images: int = 1) -> Run:
    """A run of which one view is known on both sides."""
    shared = SharedImages(torch.zeros(images, 3, 64, 64), [(64, 64)] * images, [torch.zeros(0, 4)] * images, [])
    run = Run({}, None)
    for side, value in (("student", student), ("teacher", teacher)):
        run.notes[f"detection.{side}"] = Views(None, {}, shared, {view: value})
    return run


def rois(logits: Tensor, deltas: Tensor, labels: Tensor | None = None, targets: Tensor | None = None) -> Rois:
    nothing = torch.zeros(len(logits), 1)
    return Rois([torch.zeros(len(logits), 4)], nothing, nothing, logits, deltas, lambda d, _: d, labels, targets)


def test_chen_weighs_the_soft_targets_so_that_the_paper_s_share_is_kept() -> None:
    params, given, arrays = case("chen-wce-voc")
    mu = params["mu"]
    term = terms("chen", "faster_rcnn", mu=mu, background_weight=params["w_background"])["soft"]
    s, t = given["in_student"], given["in_teacher"]
    value = term(run_of("rois", rois(s, s), rois(t, t)))
    compare(value, arrays["out_soft"], 1e-7, "soft")
    whole = torch.nn.functional.cross_entropy(s, given["in_labels"]) + term.schedule.value * value
    compare(mu * whole, arrays["out_loss"], 1e-7, "the paper's loss, of which ours is 1 / mu")


def test_chen_bounds_each_proposal() -> None:
    params, given, arrays = case("chen-bounded-m0")
    term = terms("chen", "faster_rcnn", nu=params["nu"], margin=params["margin"])["bound"]
    s, t = given["in_student"], given["in_teacher"]
    labels = torch.ones(len(s), dtype=torch.int64)
    logits = torch.zeros(len(s), 2)
    other = torch.full_like(s, 9.0)  # what the background's regression is has no say
    run = run_of(
        "rois",
        rois(logits, torch.cat([other, s], 1), labels, given["in_target"]),
        rois(logits, torch.cat([-other, t], 1)),
    )
    compare(term(run), arrays["out_bounded"], 1e-7, "bounded")
    whole = float(arrays["out_smooth_l1"]) + term.schedule.value * term(run)
    compare(whole, arrays["out_loss"], 1e-7, "the whole loss")


def test_gid_answers_at_the_anchors_of_the_instances() -> None:
    _, given, arrays = case("gid-response-reg-l1-beta0")
    term: Any = terms("gid", "retinanet")["boxes"]
    term.beta = 0.0
    mask, shape = given["in_mask"], given["in_student"].shape

    def dense(regression: Tensor, sure: float) -> Dense:
        logits = torch.full((1, shape[0], 2), sure)
        anchors = torch.tensor([[0.0, 0, 9, 9]]).expand(shape[0], 4)
        assign = lambda boxes, anchors, levels: torch.where(mask, 0, -1)  # noqa: E731
        return Dense(logits, regression[None], [anchors], [], [shape[0]], "sigmoid", lambda r, boxes: boxes, assign)

    value = term(run_of("dense", dense(given["in_student"], 0.0), dense(given["in_teacher"], 1.0)))
    compare(value, arrays["out_loss"], 1e-7, "boxes")


def test_gdetkd_weighs_regressions_by_the_teacher_s_classes() -> None:
    _, given, arrays = case("gdetkd-reg-c5")
    term = terms("gdetkd", "faster_rcnn")["localisation"]
    p, s, t = given["in_teacher_prob"], given["in_student"], given["in_teacher"]
    logits = torch.cat([torch.full_like(p[:, :1], -1e9), p.log()], 1)  # the case knows no background
    deltas = [torch.nn.functional.pad(x.flatten(1), (4, 0), value=7.0 * i) for i, x in enumerate((s, t))]
    value = term(run_of("rois", rois(logits, deltas[0]), rois(logits, deltas[1])))
    torch.testing.assert_close(p.sum(1), torch.ones(len(p)).double())  # so that a softmax gives them back
    compare(value, arrays["out_loss"], 1e-7, "localisation")


def test_yolo_response_reads_the_parts_of_a_head() -> None:
    params, given, arrays = case("yolo-objscaled-b")
    taps = {"boxes": ["head.box"], "objectness": ["head.object"], "scores": ["head.class"]}
    term = (
        METHODS["yolo_response"](torch.nn.Identity(), torch.nn.Identity(), weight=params["weight"], **taps)
        .stages[0]
        .terms[0]
    )
    sides = [
        {
            "head.box": torch.stack([given[f"in_{side}_{part}"] for part in "xywh"], -1),
            "head.object": given[f"in_{side}_obj"],
            "head.class": given[f"in_{side}_cls"],
        }
        for side in ("student", "teacher")
    ]
    value = term.schedule.value * term(Run({}, None, *sides))
    compare(value, arrays["out_loss"], 1e-7, "response")
