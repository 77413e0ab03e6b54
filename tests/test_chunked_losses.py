"""KL divergences of large tensors in parts: the same values and gradients, and no more memory than the gradient."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd import losses
from taskkd.losses import chunked
from taskkd.losses.chunked import chunked_kl
from taskkd.losses.primitives import softened_kl

SHAPES = [((3, 5, 7, 6), 1), ((4, 9, 11), -1), ((6, 5), 1), ((2, 3, 50), 2), ((7, 3, 4), 0)]


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are looked at in parts too."""
    monkeypatch.setattr(chunked, "LARGE", 1)
    monkeypatch.setattr(chunked, "PART_CPU", 32)


def gradients(value: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return torch.autograd.grad((value * weights).sum(), of)


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_values_and_gradients_are_the_same(shape: tuple[int, ...], dim: int, in_parts: None) -> None:
    s, t = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    each = torch.rand(shape[0], dtype=torch.float64) + 0.5
    for temperature in (1.0, 2.5, torch.tensor(3.0, dtype=torch.float64), *((each,) if dim else ())):
        ours, usual = (f(s, t, temperature, dim) for f in (chunked_kl, softened_kl))
        assert ours.shape == usual.shape
        torch.testing.assert_close(ours, usual, rtol=0, atol=1e-13)
        for a, b in zip(gradients(ours, s, t), gradients(usual, s, t), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_second_derivatives_second_backwards_and_one_tensor_on_both_sides(in_parts: None) -> None:
    s, t = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda s, t: chunked_kl(s, t, 2.0, 1), (s, t))
    assert torch.autograd.gradgradcheck(lambda s, t: chunked_kl(s, t, 2.0, 1), (s, t))
    value = chunked_kl(s, t, 2.0, 1).sum()
    first = torch.autograd.grad(value, s, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(value, s)[0], first)
    assert torch.autograd.grad(chunked_kl(s, s, 2.0, 1).sum(), s)[0].abs().max() <= 1e-15


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"direction": "reverse"}], ids=str)
def test_soft_targets_of_maps(options: dict[str, Any], in_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    s = torch.randn(2, 5, 6, 7, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    t = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    for mask in (None, torch.rand(2, 6, 7) > 0.5, torch.rand(2), torch.zeros(2, 6, 7)):
        ours = losses.kl_divergence(s, t, dim=1, mask=mask, **options)
        monkeypatch.setattr(chunked, "LARGE", 10**9)
        usual = losses.kl_divergence(s, t, dim=1, mask=mask, **options)
        monkeypatch.setattr(chunked, "LARGE", 1)
        torch.testing.assert_close(ours, usual, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (ours, usual)), rtol=1e-12, atol=1e-14)


def test_channels_and_left_out_pixels(in_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, 5, 6).double()
    pixels = torch.rand(3, 5, 6) > 0.4
    pixels[2] = False
    for mask in (None, torch.rand(3, 4), pixels):
        ours = losses.channel_wise(s, t, mask=mask)
        monkeypatch.setattr(chunked, "LARGE", 10**9)
        usual = losses.channel_wise(s, t, mask=mask)
        monkeypatch.setattr(chunked, "LARGE", 1)
        torch.testing.assert_close(ours, usual, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (ours, usual)), rtol=1e-12, atol=1e-14)
    kept = [losses.channel_wise(s[i][:, pixels[i]][None], t[i][:, pixels[i]][None]) for i in range(2)]
    torch.testing.assert_close(losses.channel_wise(s, t, mask=pixels), (kept[0] + kept[1]) / 2)
    filled = torch.where(pixels[:, None], s.detach(), float("nan"))
    assert losses.channel_wise(filled, t, mask=pixels).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_raised_part_by_part(dtype: torch.dtype, in_parts: None) -> None:
    s, t = torch.randn(2, 5, 20, 20).to(dtype).requires_grad_(), torch.randn(2, 5, 20, 20).to(dtype)
    exact = s.detach().double().requires_grad_()
    want = losses.kl_divergence(exact, t.double(), dim=1, temperature=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        value = losses.kl_divergence(s, t, dim=1, temperature=2.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(want.item(), rel=1e-5)
    got, truth = (torch.autograd.grad(v * 2.0**12, x)[0].double() for v, x in ((value, s), (want, exact)))
    assert (got - truth).norm() <= 5e-3 * truth.norm()


@pytest.mark.parametrize("deviation", [50.0, 200.0])
def test_confident_channels_are_finite(deviation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax whose logarithm is taken gives NaN here, in value and gradient."""
    for large in (1, 10**9):
        monkeypatch.setattr(chunked, "LARGE", large)
        s, t = (torch.randn(2, 3, 16, 16) * deviation for _ in range(2))
        value = losses.channel_wise(s.requires_grad_(), t, temperature=1.0)
        (gradient,) = torch.autograd.grad(value, s)
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_compiled_and_learned_temperatures_take_the_usual_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LARGE", 1)
    s, t = torch.randn(2, 5, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4)
    temperature = torch.tensor(2.0, requires_grad=True)
    value = losses.kl_divergence(s, t, dim=1, temperature=temperature)
    assert torch.autograd.grad(value, temperature)[0] != 0
    compiled = torch.compile(losses.kl_divergence, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(s, t, dim=1, temperature=2.0), value)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pixels", "channels"])
def test_memory_of_full_resolution(form: str) -> None:
    """Acceptance A4: at most a third of the usual form's, equal to 1e-6."""
    s, t = torch.randn(2, 19, 512, 1024, requires_grad=True), torch.randn(2, 19, 512, 1024)
    if form == "pixels":
        dim, own, count = 1, (s, t), s.numel() // 19
        ours = lambda: losses.kl_divergence(s, t, dim=1)  # noqa: E731
    else:
        dim, own, count = 2, (s.flatten(2), t.flatten(2)), 2 * 19
        ours = lambda: losses.channel_wise(s, t, temperature=1.0)  # noqa: E731

    def usual() -> Tensor:
        return F.kl_div(F.log_softmax(own[0], dim), F.softmax(own[1], dim), reduction="sum") / count

    found = [(*peak(f, s), s.grad) for f in (ours, usual)]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-7)
    assert (found[0][2] - found[1][2]).norm() <= 1e-6 * found[1][2].norm()
    assert found[0][0] <= found[1][0] / 3


def peak(loss: Callable[[], Tensor], student: Tensor) -> tuple[float, Tensor]:
    """What torch allocates at the worst moment, above what it had, and the loss."""
    student.grad = None
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        value = loss()
        value.backward(retain_graph=False)
    worst = now = 0
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        worst = max(worst, now)
    return worst, value.detach()


@pytest.mark.parametrize("large", [False, True])
def test_low_temperatures_with_left_out_pixels_are_finite(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LARGE", 1 if large else 2**20)
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[:, 2:] = False
    value = losses.channel_wise(student, teacher, temperature=0.1, mask=mask)
    torch.testing.assert_close(value, losses.channel_wise(student[:, :, :2], teacher[:, :, :2], temperature=0.1))
    value.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
