"""Soft histograms: the product of matrices is the kernel's sum."""

from __future__ import annotations

import pytest
import torch

from taskkd.face.histograms import dense_histogram, soft_histogram


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bins": 100},
        {"bins": 7, "low": -1.0},
        {"bins": 1, "sigma": 0.3},
        {"sigma": 0.02},
        {"sigma": 2.0, "low": -1.0, "high": 1.0, "bins": 333},
    ],
)
def test_equals_the_dense_form_in_value_and_gradient(options: dict[str, float]) -> None:
    values = torch.rand(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight = torch.ones_like(values)
    weight[1, 5:] = 0
    full = {"bins": 1000, "low": 0.0, "high": 1.0, "sigma": 0.1} | options
    width = (full["high"] - full["low"]) / full["bins"]
    nodes = full["low"] + width * torch.arange(full["bins"], dtype=torch.float64)
    found = []
    for form in (
        lambda x: soft_histogram(x, weight=weight, **options),  # type: ignore[arg-type]
        lambda x: dense_histogram(x, nodes, sigma=full["sigma"], weight=weight),
    ):
        x = values.clone().requires_grad_()
        histogram = form(x)
        (histogram.clamp(min=1e-300).log() * torch.linspace(-1, 1, full["bins"]).cos()).sum().backward()
        found.append((histogram.detach(), x.grad))
    assert found[0][0].sum(1).tolist() == pytest.approx([1.0] * 3)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_tails_keep_their_digits_in_single_precision() -> None:
    values = torch.tensor([-0.4, -0.9, -1.0])
    single, double = soft_histogram(values), soft_histogram(values.double())
    normal = double > 1e-30
    assert double[normal].min() < 1e-29
    assert ((single.double() - double) / double).abs()[normal].max() < 1e-4


def test_a_kernel_narrower_than_a_block_does_not_overflow() -> None:
    assert soft_histogram(torch.tensor([-1.0, 0.5, 1.0]), sigma=0.001).isfinite().all()


def test_of_nothing_it_is_zero_with_a_gradient_path() -> None:
    values = torch.zeros(2, 0, requires_grad=True)
    histogram = soft_histogram(values)
    assert histogram.shape == (2, 1000)
    assert (histogram == 0).all()
    histogram.sum().backward()
