"""Augmentation is a function of (seed, epoch, id) and of nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from taskkd import Augmented
from taskkd.augmentation import generator_for


def noisy(sample: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {**sample, "x": torch.rand(3, generator=generator)}


def dataset(count: int = 12, seed: int = 0) -> Augmented:
    return Augmented([{"id": 10 + i} for i in range(count)], noisy, seed=seed)


def epoch_of(data: Augmented, epoch: int, **loader: Any) -> dict[int, list[float]]:
    data.set_epoch(epoch)
    return {
        int(i): x.tolist()
        for batch in DataLoader(data, batch_size=5, **loader)
        for i, x in zip(batch["id"], batch["x"], strict=True)
    }


def test_the_same_numbers_give_the_same_stream() -> None:
    first = torch.rand(5, generator=generator_for(1, 2, 3))
    assert torch.equal(first, torch.rand(5, generator=generator_for(1, 2, 3)))


def test_seed_epoch_and_id_each_give_another_stream() -> None:
    draws = {
        torch.rand(1, generator=generator_for(*numbers), dtype=torch.float64).item()
        for numbers in [(s, e, i) for s in range(4) for e in range(4) for i in range(-4, 60)]
    }
    assert len(draws) == 4 * 4 * 64


def test_neighbouring_ids_are_unrelated() -> None:
    draws = torch.stack([torch.rand(2000, generator=generator_for(0, 0, i)) for i in (7, 8)])
    assert abs(torch.corrcoef(draws)[0, 1].item()) < 0.1


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_workers_do_not_matter(workers: int) -> None:
    data = dataset()
    plain = epoch_of(data, 3)
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    shuffled = DataLoader(data, batch_size=5, shuffle=True, **options)
    for epoch in (3, 4, 3):  # the same workers live through several epochs
        data.set_epoch(epoch)
        drawn = {int(i): x.tolist() for b in shuffled for i, x in zip(b["id"], b["x"], strict=True)}
        assert (drawn == plain) == (epoch == 3)


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    list(dataset())  # type: ignore[call-overload]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_global_seed_and_the_start_do_not_matter() -> None:
    plain = epoch_of(dataset(), 1)
    torch.manual_seed(99)
    data = dataset()
    assert data[5]["x"].tolist() != plain[15]  # epoch 0
    data.set_epoch(1)
    assert data[5]["x"].tolist() == plain[15]
    assert epoch_of(dataset(seed=1), 1) != plain


def test_a_sample_without_id_is_seeded_by_its_index() -> None:
    data = Augmented(torch.zeros(4, 1), lambda sample, generator: torch.rand(1, generator=generator))
    assert len(data) == 4
    assert torch.equal(data[2], torch.rand(1, generator=generator_for(0, 0, 2)))
