"""The terms that the feature methods build give the values of the reference cases, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskkd.detection.methods import METHODS
from taskkd.detection.methods.channel_wise import ClassMaps
from taskkd.detection.methods.fgd import FocalGlobal, GlobalContext
from taskkd.detection.methods.fgfi import FineGrained
from taskkd.detection.shared import SharedImages
from taskkd.detection.terms import NeckTerm
from taskkd.detection.views import Dense, Views
from taskkd.terms import Run
from tests.detection.detectors import DETECTORS
from tests.parity.detection.features import numbered
from tests.parity.test_parity import compare, load, tensors

CASES = Path(__file__).parent / "cases" / "detection"


def case(stem: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    about, arrays = load(CASES / f"{stem}.json")
    return about["params"], tensors(arrays), arrays


def term_of(method: str, kind: str = "retinanet", **options: Any) -> Any:
    models = DETECTORS[kind](8), DETECTORS[kind](8, seed=1)
    (term,) = METHODS[method](*models, **options).stages[0].terms
    return term


def run_of(boxes: list[Tensor], size: tuple[int, int], sizes: Any = None, **views: Any) -> Run:
    """A run of which the images are known, and a view of both sides."""
    sizes = [size] * len(boxes) if sizes is None else [tuple(s) for s in sizes]
    shared = SharedImages(torch.zeros(len(boxes), 3, *size), sizes, boxes, [])
    run = Run({}, None)
    for side in ("student", "teacher"):
        run.notes[f"detection.{side}"] = Views(None, {}, shared, {n: v[side] for n, v in views.items()})
    return run


@pytest.mark.parametrize(("stem", "kind"), [("pkd-four-levels", "faster_rcnn"), ("pkd-one-level", "retinanet")])
def test_pearson_kd(stem: str, kind: str) -> None:
    params, given, arrays = case(stem)
    term = term_of("pearson_kd", kind)
    assert term.schedule.value == params["loss_weight"]
    value = term.compare(numbered(given, "student"), numbered(given, "teacher"), run_of([], (64, 64)))
    compare(term.schedule.value * value, arrays["out_loss"], 1e-7, "the weighted loss")


def test_channel_wise_on_class_maps() -> None:
    params, given, arrays = case("cwd-cls-tau4")
    term = term_of("channel_wise", on="classes", temperature=params["tau"])
    assert isinstance(term, ClassMaps)
    n, c, h, w = given["in_student"].shape
    views = {}
    for side in ("student", "teacher"):
        logits = given[f"in_{side}"].permute(0, 2, 3, 1).reshape(n, h * w, c)
        views[side] = Dense(logits, logits, [], [(h, w)], [h * w], "sigmoid", lambda d, _: d)
    value = term(run_of([torch.zeros(0, 4)] * n, (64, 64), dense=views))
    compare(term.schedule.value * value, arrays["out_loss"], 1e-7, "the weighted loss")


def test_defeat() -> None:
    params, given, arrays = case("defeat-fpn5")
    term = term_of("defeat", foreground=params["hint_neck_w"], background=params["hint_neck_back_w"])
    run = run_of(numbered(given, "boxes"), (96, 128))
    value = term.compare(numbered(given, "student"), numbered(given, "teacher"), run)
    compare(value.reshape(1), arrays["out_loss"], 1e-5, "loss")


def test_fgd_with_the_authors_coordinates() -> None:
    params, given, arrays = case("fgd-align-conv")
    names = {"temperature": "temp"} | {n: f"{n}_fgd" for n in ("alpha", "beta", "gamma")}
    published = {n: params[p] for n, p in names.items()} | {"relation": params["lambda_fgd"]}
    term = term_of("fgd", "fcos", coords="authors")
    assert isinstance(term, FocalGlobal)
    assert term.options == published
    teacher, weights = given["in_teacher"], {n.removeprefix("w_"): v for n, v in given.items() if n.startswith("w_")}
    align = nn.Conv2d(8, 12, 1).double()
    align.load_state_dict({n: weights[f"align.{n}"] for n in ("weight", "bias")})
    for blocks, side in ((term.student_contexts, "s"), (term.teacher_contexts, "t")):
        block = GlobalContext(teacher.shape[1]).double()
        parts = {"mask": f"conv_mask_{side}", "add": f"channel_add_conv_{side}"}
        block.load_state_dict(
            {n: weights[n.replace(*next(p for p in parts.items() if n.startswith(p[0])))] for n in block.state_dict()}
        )
        blocks.append(block)
    boxes, shape = numbered(given, "boxes"), (72, 72)
    value = term.compare([align(given["in_student"])], [teacher], run_of(boxes, shape, given["in_img_shapes"].tolist()))
    compare(value, arrays["out_loss"], 1e-7, "loss")


def test_fgfi_with_the_authors_pixels() -> None:
    params, given, arrays = case("fgfi-two-boxes")
    term = term_of("fgfi", adapter="conv3x3_relu", plus_one=True)
    assert isinstance(term, FineGrained)
    stride, (n, _, h, w) = params["feat_stride"], given["in_student"].shape
    y, x = torch.meshgrid(torch.arange(h) * stride, torch.arange(w) * stride, indexing="ij")
    anchors = (torch.stack([x, y, x, y], -1).reshape(-1, 1, 4) + given["in_base_anchors"]).flatten(0, 1)
    nothing = torch.zeros(n, len(anchors), 1)
    dense = Dense(nothing, nothing, [anchors], [(h, w)], [len(anchors)], "sigmoid", lambda d, _: d)
    run = run_of([given["in_boxes"]], (h * stride, w * stride), dense={"student": dense, "teacher": dense})
    term.levels = [(0, 0)]
    adapter: Any = term.adapter_spec
    made = adapter(given["in_student"], given["in_teacher"]).double()
    made.load_state_dict({f"0.{k}": given[f"w_adap.0.{k}"] for k in ("weight", "bias")})
    value = term.compare([made(given["in_student"])], [given["in_teacher"]], run)
    assert term.schedule.value == params["imitation_loss_weight"]
    compare(term.schedule.value * value, arrays["out_loss"], 1e-5, "the weighted loss")


def test_every_feature_method_is_a_term_on_maps() -> None:
    for name in ("fbkd", "masked_generative", "mimic", "quantization_mimic", "score_weighted"):
        assert isinstance(term_of(name), NeckTerm)
