"""The terms that the DETR methods build give the values of the authors' code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from taskkd.detection.methods import METHODS
from taskkd.detection.shared import SharedImages
from taskkd.detection.views import Decoder
from taskkd.terms import Run
from tests.detection.tiny_detr import detector
from tests.parity.test_parity import CASES, compare, load, tensors

KD = [p for p in CASES if p.stem.startswith("kddetr")]
FEATURE = [p for p in CASES if p.stem.startswith("detrdistill-feature")]


def run_of(images: SharedImages, student: Any, teacher: Any) -> Run:
    """A run whose views are given."""
    run = Run({}, None)
    student.images = images
    run.notes.update({"detection.student": student, "detection.teacher": teacher})
    return run


@pytest.mark.parametrize("path", KD, ids=lambda p: p.stem)
def test_kd_detr_builds_the_term_that_was_tested(path: Any) -> None:
    about, arrays = load(path)
    inputs, params = tensors(arrays), about["params"]
    s, t = ((inputs[f"in_{side}_logits"], inputs[f"in_{side}_boxes"]) for side in ("student", "teacher"))
    model = detector("deformable_detr", labels=s[0].shape[-1])
    options = {"temperature": params["T"], "compat": "official", "random_queries": 0, **params["weights"]}
    (term,) = METHODS["kd_detr"](model, detector("deformable_detr", labels=s[0].shape[-1]), **options).stages[0].terms
    known = Decoder(t[0][:, None], t[1][:, None], "sigmoid")
    queries = SimpleNamespace(own=torch.zeros(1, 64), decode=lambda _: Decoder(s[0][:, None], s[1][:, None], "sigmoid"))
    images = SharedImages(torch.zeros(len(s[0]), 3, 8, 8), [(8, 8)] * len(s[0]), [], [])
    sides = [SimpleNamespace(get=lambda _: queries, decoder=known) for _ in range(2)]
    value = term.schedule.value * term(run_of(images, *sides))
    compare(value, arrays["out_loss"], 1e-7, "kd_detr")
    value.backward()
    compare(inputs["in_student_logits"].grad, arrays["grad_student_logits"], 1e-6, "gradient")


@pytest.mark.parametrize("path", FEATURE, ids=lambda p: p.stem)
def test_detr_distill_builds_the_feature_term_that_was_tested(path: Any) -> None:
    _, arrays = load(path)
    inputs = tensors(arrays)
    levels = range(sum(name.startswith("in_student") for name in inputs))
    maps = [[inputs[f"in_{side}{i}"] for i in levels] for side in ("student", "teacher")]
    terms = METHODS["detr_distill"](detector("rt_detr"), detector("rt_detr"), response_weight=0.0).stages[0].terms
    (term,) = terms
    scores = inputs["in_scores"].transpose(0, 1)
    # without boxes a query's score is its probability
    known = Decoder(
        scores.logit()[..., None], torch.rand(*scores.shape, 4), "sigmoid", inputs["in_queries"].transpose(0, 1)
    )
    count = len(scores)
    size = (4 * maps[0][0].shape[2], 4 * maps[0][0].shape[3])
    none = [torch.zeros(0, 4)] * count
    images = SharedImages(torch.zeros(count, 3, *size, dtype=torch.float64), [size] * count, none, none)
    sides = [SimpleNamespace(get=lambda _, own=own: own, decoder=known) for own in maps]
    run = run_of(images, *sides)
    term.build(run)
    compare(term.schedule.value * term(run), arrays["out_loss"], 1e-7, "feature")
