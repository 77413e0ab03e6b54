"""Maps between shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taskkd.adapters import ADAPTERS, Conv1x1, Linear, build_adapter
from taskkd.errors import ShapeError, TaskkdError


@pytest.mark.parametrize(
    ("kind", "student", "teacher"),
    [
        ("linear", (2, 5), (2, 7)),
        ("linear", (2, 3, 5), (2, 3, 7)),
        ("conv1x1", (2, 3, 8, 6), (2, 5, 8, 6)),
        ("conv1x1", (2, 3, 8, 6), (2, 5, 4, 3)),
        ("conv1x1", (2, 3, 4, 3), (2, 5, 9, 7)),
    ],
)
def test_a_kind_gives_the_shape_of_the_teacher(kind: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    adapter = build_adapter(kind, torch.randn(student), torch.randn(teacher))
    out = adapter(torch.randn(student))
    assert out.shape == teacher
    out.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_linear_is_one_affine_map() -> None:
    adapter = Linear(3, 2)
    x = torch.randn(4, 3)
    torch.testing.assert_close(adapter(x), x @ adapter.map.weight.T + adapter.map.bias)
    assert Linear(3, 2, bias=False).map.bias is None


def test_conv1x1_resizes_before_it_maps() -> None:
    adapter = Conv1x1(3, 2, size=(2, 2))
    x = torch.randn(1, 3, 4, 4)
    small = nn.functional.interpolate(x, size=(2, 2), mode="bilinear", align_corners=False)
    torch.testing.assert_close(adapter(x), adapter.map(small))


def test_a_module_is_used_as_it_is() -> None:
    module = nn.Linear(2, 2)
    assert build_adapter(module, torch.zeros(1, 2), torch.zeros(1, 2)) is module


def test_a_function_gets_both_tensors() -> None:
    adapter = build_adapter(
        lambda s, t: nn.Linear(s.shape[-1], t.shape[-1], bias=False), torch.zeros(1, 2), torch.zeros(1, 3)
    )
    assert adapter(torch.zeros(4, 2)).shape == (4, 3)


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "sentence"),
    [
        ("linear", (2, 3, 5), (2, 4, 7), "adapter 'linear' maps the last dimension only, got student (2, 3, 5)"),
        ("linear", (2, 5), (2, 3, 7), "adapter 'linear' maps the last dimension only, got student (2, 5)"),
        ("conv1x1", (2, 3, 5), (2, 4, 7), "adapter 'conv1x1' needs (batch, channels, height, width), got student"),
    ],
)
def test_shapes_that_do_not_fit(kind: str, student: tuple[int, ...], teacher: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ShapeError) as caught:
        build_adapter(kind, torch.zeros(student), torch.zeros(teacher))
    assert sentence in str(caught.value)


def test_an_unknown_kind_lists_the_known() -> None:
    with pytest.raises(TaskkdError, match=r"no adapter 'conv1' \(did you mean 'conv1x1'\?\); known: linear, conv1x1"):
        build_adapter("conv1", torch.zeros(1), torch.zeros(1))
    assert set(ADAPTERS) == {"linear", "conv1x1"}
