"""Pair-wise similarity: every algorithm gives what all pairs give, and the sizes decide which is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import taskkd as kd
from taskkd import losses
from taskkd.errors import ShapeError
from taskkd.losses import pairwise
from taskkd.losses.pairwise import pairwise_similarity

ALGORITHMS = ("gram", "blocked", "dense")


def formula(student: Tensor, teacher: Tensor, detach: bool = False) -> Tensor:
    """All pairs, as the paper writes it."""
    both = []
    for x in (student.flatten(2), teacher.flatten(2)):
        norm = x.detach().norm(dim=1, keepdim=True) + 1e-8 if detach else x.norm(dim=1, keepdim=True)
        both.append((x / norm).mT @ (x / norm))
    return (both[0] - both[1]).square().mean()


def value_and_gradient(loss: Any, student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, **options)
    value.backward()
    assert student.grad is not None
    return value.detach().double(), student.grad.double()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("sizes", [(12, 20, 150), (40, 40, 130), (8, 256, 49)], ids=str)
@pytest.mark.parametrize("detach", [False, True])
def test_every_algorithm_gives_what_all_pairs_give(sizes: tuple[int, int, int], detach: bool) -> None:
    same_in_every_algorithm(*sizes, detach)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(128, 512, 1089), (512, 512, 1024), (8, 2048, 49)], ids=str)
def test_every_algorithm_gives_what_all_pairs_give_at_real_sizes(sizes: tuple[int, int, int]) -> None:
    for detach in (False, True):
        same_in_every_algorithm(*sizes, detach)


def same_in_every_algorithm(own: int, other: int, nodes: int, detach: bool) -> None:
    student = torch.randn(2, own, nodes, dtype=torch.float64)
    teacher = torch.randn(2, other, nodes, dtype=torch.float64)
    want = value_and_gradient(formula, student, teacher, detach=detach)
    for algorithm in ALGORITHMS:
        got = value_and_gradient(pairwise_similarity, student, teacher, detach_norm=detach, algorithm=algorithm)
        assert apart(got[0], want[0]) <= 1e-12
        assert apart(got[1], want[1]) <= 1e-12


@pytest.mark.parametrize("sizes", [(64, 256), (16, 40), (300, 140)], ids=str)
def test_float32_holds_where_student_and_teacher_nearly_agree(sizes: tuple[int, int]) -> None:
    """Differences of 0.001: float32 cosines would give the gradient to 1e-2."""
    channels, nodes = sizes
    teacher = torch.randn(1, channels, nodes).relu()
    student = teacher + 0.001 * torch.randn(1, channels, nodes)
    want = value_and_gradient(formula, student.double(), teacher.double())
    for algorithm in ("auto", "gram", "blocked"):
        got = value_and_gradient(pairwise_similarity, student, teacher, algorithm=algorithm)
        assert apart(got[0], want[0]) <= 1e-5
        assert apart(got[1], want[1]) <= 1e-4
    single = value_and_gradient(formula, student, teacher)
    assert apart(single[1], want[1]) > 1e-4 or nodes < 100, "the test would not notice"


def test_the_sizes_choose_the_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(own: int, other: int, nodes: int, dtype: torch.dtype = torch.float32) -> str:
        return pairwise._choose(torch.empty(1, own, nodes, dtype=dtype), torch.empty(1, other, nodes, dtype=dtype))

    assert chosen(128, 512, 9) == "dense"
    assert chosen(128, 512, 8192) == "gram"
    assert chosen(512, 2048, 1089) == "blocked"
    monkeypatch.setattr(pairwise, "_fast_double", lambda device: False)
    assert chosen(128, 512, 8192) == "blocked"
    assert chosen(128, 512, 8192, torch.float64) == "gram"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_weights_of_nodes_half_precision_and_autocast(algorithm: Any) -> None:
    student, teacher = torch.randn(2, 6, 15, 10), torch.randn(2, 9, 15, 10)
    mask = torch.rand(2, 15, 10) > 0.5
    options: dict[str, Any] = {"mask": mask, "algorithm": algorithm, "detach_norm": True}
    want = value_and_gradient(pairwise_similarity, student, teacher, **{**options, "algorithm": "dense"})
    kept = [formula(s[:, m][None], t[:, m][None]) for s, t, m in zip(student, teacher, mask, strict=True)]
    counts = mask.flatten(1).sum(1).double().square()
    assert apart(want[0], (torch.stack(kept) * counts).sum() / counts.sum()) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16, enabled=algorithm != "dense"):  # whose backward autocast would round
        got = value_and_gradient(pairwise_similarity, student, teacher, **options)
    assert apart(got[0], want[0]) <= 1e-6
    assert apart(got[1], want[1]) <= 1e-5
    assert got[1][~mask[:, None].expand_as(student)].eq(0).all()
    half = value_and_gradient(pairwise_similarity, student.bfloat16(), teacher, **options)
    exact = value_and_gradient(pairwise_similarity, student.bfloat16().float(), teacher, **options)
    assert apart(half[0], exact[0]) <= 1e-6
    assert apart(half[1], exact[1]) <= 1e-2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_of_both_sides_and_of_gradients(algorithm: Any) -> None:
    pair = [torch.randn(2, c, 4, dtype=torch.float64, requires_grad=True) for c in (2, 3)]
    mask = torch.rand(2, 4)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return pairwise_similarity(s, t, algorithm=algorithm, mask=mask)

    assert torch.autograd.gradcheck(loss, pair)
    assert torch.autograd.gradgradcheck(loss, pair)


def test_nodes_of_every_kind() -> None:
    student, teacher = torch.randn(2, 4, 17, 13), torch.randn(2, 6, 17, 13)
    windows = [F.max_pool2d(x, (4, 3), (4, 3), ceil_mode=True) for x in (student, teacher)]
    assert pairwise_similarity(student, teacher, scale=0.25).allclose(formula(*windows))
    assert pairwise_similarity(student, teacher, scale=0.01).allclose(formula(student, teacher))
    means = [F.adaptive_avg_pool2d(x, 3) for x in (student, teacher)]
    assert pairwise_similarity(student, teacher, grid=3, pool="avg").allclose(formula(*means))
    assert pairwise_similarity(student, teacher[..., ::2, ::2], grid=2).isfinite()
    mask = torch.ones(2, 17, 13, dtype=torch.bool)
    mask[:, 8:] = False
    for options in ({"window": 4}, {"window": 4, "pool": "avg"}):
        upper = pairwise_similarity(student[:, :, :8], teacher[:, :, :8], **options)  # type: ignore[arg-type]
        got = pairwise_similarity(student, teacher, mask=mask, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(got, upper)


def test_dead_nodes_are_similar_to_none_and_get_no_gradient() -> None:
    student, teacher = torch.randn(1, 5, 200), torch.randn(1, 5, 200)
    student[..., 3] = 0
    for detach in (False, True):
        for algorithm in ALGORITHMS:
            value, gradient = value_and_gradient(
                pairwise_similarity, student, teacher, algorithm=algorithm, detach_norm=detach
            )
            assert value.isfinite()
            assert gradient[..., 3].eq(0).all()
            assert gradient.abs().max() < 1


def test_it_compiles_and_is_a_term() -> None:
    student, teacher = torch.randn(1, 4, 12, 12), torch.randn(1, 6, 12, 12)
    compiled = torch.compile(pairwise_similarity, backend="eager", fullgraph=True)
    assert compiled(student, teacher).allclose(pairwise_similarity(student, teacher))
    kd.Match("pairs", losses.pairwise_similarity, "x", scale=0.5)


def test_errors_are_sentences() -> None:
    maps = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"at most one of scale, window, grid .* got scale, grid"):
        pairwise_similarity(maps, maps, scale=0.5, grid=2)
    with pytest.raises(ValueError, match=r"`scale` is in \(0, 1\], got 2"):
        pairwise_similarity(maps, maps, scale=2.0)
    with pytest.raises(ValueError, match="`algorithm` is one of auto, gram"):
        pairwise_similarity(maps, maps, algorithm="fast")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="maps of the same nodes"):
        pairwise_similarity(maps, maps[..., :3])
