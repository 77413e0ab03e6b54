"""Batches of UNIX-KD (`taskkd/mixup.py`)."""

from __future__ import annotations

import pytest
import torch

from taskkd.errors import ShapeError
from taskkd.mixup import mixing_shares, uncertainty_mixup


def test_the_first_samples_are_mixed_by_less_than_half() -> None:
    shares = mixing_shares(8, turning=5, steepness=10.0)
    assert (shares.diff() > 0).all()
    assert (shares < 0.5).sum() == 5
    assert (shares[4] + shares[5]).item() == pytest.approx(1.0)
    assert mixing_shares(3, turning=1.5)[1] == 0.5


def test_the_uncertain_come_first_and_the_certain_are_dropped() -> None:
    logits = torch.tensor([[9.0, 0.0], [0.0, 0.0], [3.0, 0.0], [1.0, 0.0]])
    inputs = torch.arange(4.0)[:, None].expand(4, 3)
    mixed = uncertainty_mixup(inputs, logits, keep=3, turning=2)
    assert mixed.first.tolist() == [1, 3, 2]
    assert mixed.inputs.shape == (3, 3)
    assert len(set(mixed.second.tolist())) == 3
    assert ((mixed.share >= 0) & (mixed.share <= mixing_shares(4, turning=2)[:3])).all()
    expected = (1 - mixed.share) * mixed.first + mixed.share * mixed.second
    torch.testing.assert_close(mixed.inputs, expected[:, None].expand(3, 3))


def test_one_seed_gives_one_batch() -> None:
    inputs, logits = torch.randn(6, 3, 4, 4), torch.randn(6, 5).half()
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(uncertainty_mixup(inputs, logits, keep=4, turning=3))
    assert torch.equal(found[0].inputs, found[1].inputs)
    assert not torch.equal(found[0].inputs, uncertainty_mixup(inputs, logits, keep=4, turning=3).inputs)


def test_errors_are_sentences() -> None:
    with pytest.raises(ShapeError, match=r"needs logits \(batch, classes\) for 4 samples, got \(3, 5\)\."):
        uncertainty_mixup(torch.randn(4, 2), torch.randn(3, 5), keep=2, turning=2)
    with pytest.raises(ValueError, match="`keep` must be from 1 to the batch of 4, got 5"):
        uncertainty_mixup(torch.randn(4, 2), torch.randn(4, 5), keep=5, turning=2)
