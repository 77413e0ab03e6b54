"""The terms that the methods with judges build give the values of the authors' code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from taskkd.schedules import Progress
from taskkd.segmentation.discriminators import conditioned
from taskkd.segmentation.methods import METHODS
from taskkd.segmentation.methods.structured import Holistic
from taskkd.terms import Run
from tests.parity.segmentation.adversary import Network, self_attention
from tests.parity.test_parity import CASES, compare, load, tensors


def cases(start: str) -> Any:
    found = [p for p in CASES if p.parent.name == "segmentation" and p.stem.startswith(start)]
    return pytest.mark.parametrize("path", found, ids=[p.stem for p in found])


def terms_of(classes: int, **options: Any) -> dict[str, Any]:
    made = METHODS["structured"](Network(classes), Network(classes), **options).stages[0].terms
    return {t.name: t for t in made}


def value_of(term: Any, run: Run) -> torch.Tensor:
    value: torch.Tensor = term.schedule.value * term(run)
    return value


@cases("skd_adversarial")
def test_the_judge_of_the_release_is_the_one_that_was_tested(path: Path) -> None:
    about, arrays = load(path)
    inputs = {n: x.double() for n, x in tensors(arrays).items()}
    student, teacher = inputs["in_s"].requires_grad_(), inputs["in_t"]
    width = len(inputs["w_l1.0.module.bias"])
    term = terms_of(student.shape[1], preset="ce208e1", width=width)["holistic"]
    assert isinstance(term, Holistic) and term.penalty == about["params"]["lambda_gp"]
    run = Run({}, None, {"head": student}, {"head": teacher})
    term.build(run)
    state = self_attention(inputs, student.shape[1], preprocessing="batch_norm").state_dict()
    term.discriminator.load_state_dict(state)
    value = value_of(term, run)
    compare(value, 0.1 * arrays["out_g_loss"], 1e-7, "the student's loss")
    (slope,) = torch.autograd.grad(value, student)
    compare(slope[:, :, ::8, ::8], 0.1 * arrays["grad_s_g_loss_stride8"], 1e-6, "its gradient")
    term.discriminator.load_state_dict(state)
    term.penalty = 0.0  # its positions are random
    found = term.auxiliary_step(Progress(0, 1))
    assert found is not None
    compare(found, 0.1 * arrays["out_d_wgan_gp"], 1e-7, "the judge's loss")


@cases("skd_conditional")
def test_the_conditional_judge_is_the_one_that_was_tested(path: Path) -> None:
    _, arrays = load(path)
    inputs = {n: x.double() for n, x in tensors(arrays).items()}
    student, images = inputs["in_s"], inputs["in_img"]
    channels, width = student.shape[1] + images.shape[1], len(inputs["w_l1.0.module.bias"])
    term = terms_of(student.shape[1], preset="cvpr_19", width=width)["holistic"]
    run = Run({}, None, {"head": student, "batch.images": images}, {"head": student})
    term.build(run)
    term.discriminator.load_state_dict(self_attention(inputs, channels).state_dict())
    compare(value_of(term, run), 0.1 * arrays["out_g_loss"], 1e-7, "the student's loss")
    term.discriminator.load_state_dict(self_attention(inputs, channels).state_dict())
    seen = term._seen
    both = conditioned(*seen.student, images, align_corners=True)
    assert torch.equal(both, conditioned(*seen.student, *seen.conditions))
    compare(term._gradient_penalty(seen), arrays["out_gp"], 1e-7, "the penalty, where both sides are the student")


@cases("skd_pixelwise")
def test_the_pixels_of_the_release_are_what_was_tested(path: Path) -> None:
    _, arrays = load(path)
    inputs = tensors(arrays)
    student, teacher = inputs["in_s"], inputs["in_t"]
    term = terms_of(student.shape[1], preset="ce208e1")["pixels"]
    value = value_of(term, Run({}, None, {"head": student}, {"head": teacher}))
    compare(value, 10 * arrays["out_loss"], 1e-7, "pixels")
    value.backward()
    compare(student.grad, 10 * arrays["grad_s"], 1e-6, "gradient")  # type: ignore[arg-type]
    mean = terms_of(student.shape[1])["pixels"]
    own = torch.autograd.grad(value_of(mean, Run({}, None, {"head": student}, {"head": teacher})), student)[0]
    compare(own, 10 * 8 / len(student) * arrays["grad_s"], 1e-6, "the corrected gradient, of a batch of eight")


@cases("skd_pairwise")
def test_the_pairs_of_the_release_are_what_was_tested(path: Path) -> None:
    about, arrays = load(path)
    inputs = tensors(arrays)
    term = terms_of(3, preset="ce208e1", scale=about["params"]["scale"])["pairs"]
    value = value_of(term, Run({}, None, {"feature": inputs["in_s"]}, {"feature": inputs["in_t"]}))
    compare(value, 0.5 * arrays["out_loss"], 1e-7, "pairs")
    value.backward()
    compare(inputs["in_s"].grad, 0.5 * arrays["grad_s"], 1e-6, "gradient")  # type: ignore[arg-type]


@cases("cirkd_skd_pairwise")
def test_the_pairs_of_cirkd_are_what_was_tested(path: Path) -> None:
    _, arrays = load(path)
    inputs = tensors(arrays)
    term = terms_of(3, preset="cirkd")["pairs"]
    value = value_of(term, Run({}, None, {"feature": inputs["in_s"]}, {"feature": inputs["in_t"]}))
    compare(value, 10 * arrays["out_loss"], 1e-7, "pairs")
