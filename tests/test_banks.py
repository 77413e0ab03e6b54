"""The memory of embeddings (`taskkd/banks.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from taskkd.banks import MemoryBank, sample_ids
from taskkd.errors import ShapeError, TaskkdError
from taskkd.ranks import gather_ranks, join_ranks


def test_rows_begin_with_a_mean_square_of_one() -> None:
    bank = MemoryBank(500, 32)
    assert len(bank) == 500
    assert bank.rows.shape == (500, 32)
    assert bank.rows.abs().max() <= (3 / 32) ** 0.5
    assert bank.rows.square().sum(1).mean().item() == pytest.approx(1.0, rel=0.05)
    assert list(bank.state_dict()) == ["rows"]
    assert not list(bank.parameters())


def test_a_row_moves_by_its_momentum_and_stays_normalised() -> None:
    bank = MemoryBank(6, 4, momentum=0.25)
    before, new = bank.rows.clone(), F.normalize(torch.randn(2, 4), dim=1)
    bank.update(torch.tensor([4, 1]), new.requires_grad_())
    expected = F.normalize(0.25 * before[[4, 1]] + 0.75 * new, dim=1)
    torch.testing.assert_close(bank.rows[[4, 1]], expected)
    others = [0, 2, 3, 5]
    assert torch.equal(bank.rows[others], before[others])
    assert not bank.rows.requires_grad


def test_of_an_id_seen_twice_the_last_counts() -> None:
    one, other = MemoryBank(6, 4), MemoryBank(6, 4)
    other.load_state_dict(one.state_dict())
    new = F.normalize(torch.randn(4, 4), dim=1)
    one.update(torch.tensor([3, 2, 3, 3]), new)
    other.update(torch.tensor([2, 3]), new[[1, 3]])
    assert torch.equal(one.rows, other.rows)


def test_an_empty_batch_and_half_precision_embeddings() -> None:
    bank = MemoryBank(6, 4)
    before = bank.rows.clone()
    bank.update(torch.empty(0, dtype=torch.long), torch.empty(0, 4))
    assert torch.equal(bank.rows, before)
    bank.update(torch.tensor([0]), torch.ones(1, 4).half())
    assert bank.rows.dtype == torch.float32
    assert not torch.equal(bank.rows[0], before[0])


def test_one_process_gathers_nothing() -> None:
    x = torch.randn(3, 2)
    assert gather_ranks(x) is join_ranks(x) is x


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ({}, "term 'crd' remembers samples by their number and needs `id` in every batch (int64, one each)."),
        (
            {"id": torch.tensor([0, 7])},
            "term 'crd': sample id 7 is outside the memory of 6 samples; ids run from 0 to 5",
        ),
        ({"id": [-1]}, "term 'crd': sample id -1 is outside the memory of 6 samples"),
        ({"id": torch.tensor([0.5])}, "term 'crd': `id` must be whole numbers (batch,), got torch.float32 (1,)."),
        ({"id": torch.tensor(3)}, "term 'crd': `id` must be whole numbers (batch,), got torch.int64 ()."),
    ],
)
def test_ids_are_checked(batch: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TaskkdError) as caught:
        sample_ids(batch, 6, "term 'crd'")
    assert sentence in str(caught.value)


def test_ids_of_any_whole_kind() -> None:
    for ids in ([1, 2], torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 2])):
        found = sample_ids({"id": ids}, 6, "x")
        assert found.tolist() == [1, 2]
        assert found.dtype == torch.int64


def test_errors_are_sentences() -> None:
    for options in ({"samples": 0, "features": 4}, {"samples": 4, "features": 4, "momentum": 1.0}):
        with pytest.raises(TaskkdError, match="a memory bank needs positive `samples` and `features`"):
            MemoryBank(**options)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"one embedding of 4 features for each of 2 ids, got \(2, 3\)"):
        MemoryBank(6, 4).update(torch.tensor([0, 1]), torch.randn(2, 3))
