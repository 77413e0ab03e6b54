"""Maps of two networks at one size, and the pixels that count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taskkd as kd
from taskkd import losses
from taskkd.errors import ShapeError, TaskkdError
from taskkd.losses.primitives import masked_mean
from taskkd.segmentation.terms import MapTerm, labels_at, resized, valid_at
from taskkd.terms import Run


def squares(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    return masked_mean((student - teacher).pow(2).mean(1), mask)


def run(student: tuple[int, ...], teacher: tuple[int, ...], **batch: Tensor) -> Run:
    torch.manual_seed(0)
    return Run(batch, None, {"x": torch.randn(student, requires_grad=True)}, {"x": torch.randn(teacher)})


@pytest.mark.parametrize(("align", "size"), [("teacher", (9, 7)), ("student", (4, 5)), ("smaller", (4, 5))])
def test_maps_are_brought_to_one_size(align: str, size: tuple[int, int]) -> None:
    given = run((2, 3, 4, 5), (2, 3, 9, 7))
    value = MapTerm("map", squares, "x", align=align)(given)  # type: ignore[arg-type]
    assert value.allclose(squares(resized(given.student["x"], size), resized(given.teacher["x"], size)))
    value.backward()
    assert given.student["x"].grad.abs().sum() > 0


def test_padding_counts_nothing() -> None:
    given = run((2, 3, 4, 4), (2, 3, 4, 4))
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[0, 4:] = False
    left = Run({"valid": valid}, None, given.student, given.teacher)
    term = MapTerm("map", squares, "x")
    got = term(left)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, 2:] = False
    assert got.allclose(squares(given.student["x"], given.teacher["x"], mask=mask))
    changed = {"x": given.teacher["x"].clone()}
    changed["x"][0, :, 2:] = 100.0
    assert torch.equal(got, term(Run({"valid": valid}, None, given.student, changed)))
    assert not torch.equal(got, MapTerm("map", squares, "x", ignore="none")(left))


def test_labels_that_are_ignored_count_only_where_asked_and_not_without_labels() -> None:
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[:, :2] = 255
    batch = {"labels": labels, "unlabelled": torch.tensor([False, True])}
    assert valid_at(batch, (4, 4)) is None
    assert valid_at(batch, (4, 4), "none") is None
    found = valid_at(batch, (2, 2), "labels")
    assert found is not None
    assert found.tolist() == [[[False, False], [True, True]], [[True, True], [True, True]]]
    assert labels_at(batch, (2, 2))[0].tolist() == [[255, 255], [0, 0]]


def test_an_adapter_and_all_masked_pixels_give_a_finite_loss_with_a_gradient() -> None:
    given = run((1, 2, 3, 3), (1, 5, 6, 6), valid=torch.zeros(1, 12, 12, dtype=torch.bool))
    term = MapTerm("map", squares, "x", adapter="conv1x1")
    term.build(given)
    value = term(given)
    value.backward()
    assert value == 0
    assert given.student["x"].grad is not None


def test_errors_are_sentences() -> None:
    with pytest.raises(TaskkdError, match="`align` is one of teacher, student, smaller, got 'techer'"):
        MapTerm("map", squares, "x", align="techer")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="the teacher's tap 'x' is no map"):
        MapTerm("map", squares, "x")(Run({}, None, {"x": torch.ones(1, 2, 3, 3)}, {"x": torch.ones(1, 2)}))
    with pytest.raises(TaskkdError, match="the batch has no `labels`"):
        labels_at({"images": torch.ones(1)}, (2, 2))


def test_the_batch_entries_that_a_term_reads_are_kept_by_the_trainer() -> None:
    student, teacher = (nn.Sequential(nn.Conv2d(3, 2, 1)) for _ in range(2))
    term = MapTerm("map", losses.mse, "0", per_channel=True)
    distiller = kd.Distiller(student, kd.Frozen(teacher), [term], task_loss=lambda out, _: out.mean())
    assert {"labels", "valid", "unlabelled", "id"} <= distiller.columns()
