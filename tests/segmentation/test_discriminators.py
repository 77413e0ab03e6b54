"""Discriminators of maps: any number of classes and any size, spectral normalisation, gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from taskkd.errors import ShapeError, TaskkdError
from taskkd.losses.adversarial import gradient_penalty
from taskkd.segmentation.discriminators import (
    PatchDiscriminator,
    SelfAttention,
    SelfAttentionDiscriminator,
    SpectralConv2d,
    conditioned,
    probabilities,
)


@pytest.mark.parametrize("classes", [1, 2, 150])
def test_any_number_of_classes_given_an_image_of_any_size(classes: int) -> None:
    judge = SelfAttentionDiscriminator(3 + classes, width=4)
    assert judge(torch.randn(2, classes, 64, 64), torch.rand(2, 3, 33, 47)).shape == (2, 1, 1, 1)
    assert PatchDiscriminator(3 + classes, width=4)(torch.randn(1, classes, 32, 40), torch.rand(1, 3, 9, 9)).shape[
        :2
    ] == (1, 1)


@pytest.mark.parametrize(
    ("size", "scores"), [((65, 65), (1, 1)), ((64, 128), (1, 5)), ((101, 71), (3, 1)), ((1, 1), (1, 1))]
)
@pytest.mark.parametrize("preprocessing", ["batch_norm", "tanh", None])
def test_any_size(size: tuple[int, int], scores: tuple[int, int], preprocessing: Any) -> None:
    judge = SelfAttentionDiscriminator(3, width=4, preprocessing=preprocessing)
    found = judge(torch.randn(2, 3, *size))
    assert found.shape == (2, 1, *scores) and found.isfinite().all()


@pytest.mark.parametrize(("make", "least"), [(SelfAttentionDiscriminator, 64), (PatchDiscriminator, 32)])
def test_small_maps_are_enlarged_or_padded(make: Any, least: int) -> None:
    x = torch.randn(2, 3, 16, 20)
    for small in ("resize", "pad"):
        torch.manual_seed(0)
        judge = make(3, width=4, small=small)
        enlarged = F.interpolate(x, (least, 5 * least // 4), mode="bilinear")
        by_hand = enlarged if small == "resize" else F.pad(x, (0, least - 20, 0, least - 16))
        assert torch.equal(copy.deepcopy(judge)(x), judge(by_hand))
    with pytest.raises(TaskkdError, match=r"`small` is 'resize' or 'pad', got 'padd' \(did you mean 'pad'"):
        make(3, small="padd")


def test_errors_are_sentences() -> None:
    with pytest.raises(TaskkdError, match=r"'batch_norm', 'tanh' or None, got 'tanhh' \(did you mean 'tanh'"):
        SelfAttentionDiscriminator(3, preprocessing="tanhh")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"of one batch, got \(2, 3, 64, 64\), \(1, 3, 64, 64\)"):
        SelfAttentionDiscriminator(6)(torch.zeros(2, 3, 64, 64), torch.zeros(1, 3, 64, 64))


def test_the_condition_comes_first_and_is_resized() -> None:
    x, image = torch.randn(1, 2, 4, 6), torch.rand(1, 3, 8, 12)
    both = conditioned(x, image, align_corners=True)
    assert torch.equal(both[:, 3:], x)
    assert torch.equal(both[:, :3], F.interpolate(image, (4, 6), mode="bilinear", align_corners=True))
    assert not torch.equal(both, conditioned(x, image))


def test_probabilities_are_full_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = probabilities(torch.randn(1, 3, 2, 2).bfloat16())
    assert found.dtype == torch.float32 and found.sum(1).allclose(torch.ones(1, 2, 2))
    assert probabilities(torch.randn(1, 3, 2, 2).double()).dtype == torch.float64


# ---- spectral normalisation


def test_the_weight_tends_to_a_largest_singular_value_of_one() -> None:
    torch.manual_seed(0)
    layer, x = SpectralConv2d(3, 8, 4).double(), torch.randn(1, 3, 8, 8).double()
    for _ in range(200):
        layer(x)
    top = torch.linalg.svdvals(layer.weight.flatten(1))[0]
    by_hand = F.conv2d(x, layer.weight / top, layer.bias)
    torch.testing.assert_close(layer(x), by_hand, rtol=1e-9, atol=1e-9)
    kept = layer.u.clone()
    layer.eval()(x)
    assert torch.equal(kept, layer.u)


def test_two_forwards_before_a_backward_have_the_gradient_of_the_loss() -> None:
    """Which the authors' do not: there the first forward's backward uses the second's vectors."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 3, 6, 6, dtype=torch.float64)
    for overwrite in (False, True):
        layer = SpectralConv2d(3, 8, 4, overwrite=overwrite).double()
        twin = copy.deepcopy(layer)
        value = layer(x).square().sum() + layer(y).sum()
        (ours,) = torch.autograd.grad(value, layer.weight)
        each = [torch.autograd.grad(v, twin.weight)[0] for v in (twin(x).square().sum(),)]
        each += [torch.autograd.grad(v, twin.weight)[0] for v in (twin(y).sum(),)]
        assert torch.allclose(ours, each[0] + each[1], rtol=1e-10) is not overwrite


def test_attention_begins_as_the_identity_and_has_a_second_derivative() -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(8).double(), torch.randn(1, 8, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), x)
    nn.init.constant_(layer.gamma, 0.7)
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("preprocessing", ["batch_norm", None])
def test_the_gradient_penalty_reaches_every_weight(preprocessing: Any) -> None:
    torch.manual_seed(0)
    judge, image = SelfAttentionDiscriminator(5, width=4, preprocessing=preprocessing), torch.rand(2, 3, 64, 64)
    for attention in judge.attentions[2:]:
        nn.init.constant_(attention.gamma, 0.1)  # type: ignore[union-attr, arg-type]
    penalty = gradient_penalty(lambda x: judge(x, image), torch.rand(2, 2, 64, 64), torch.rand(2, 2, 64, 64))
    penalty.backward()
    assert penalty.isfinite()
    for name, parameter in judge.named_parameters():
        if "bias" not in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0
