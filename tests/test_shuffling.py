"""The order of the samples is the engine's own, number for number."""

from __future__ import annotations

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from torch.utils.data import DataLoader, TensorDataset

from taskkd.shuffling import PART, InParts, shuffle_in_parts
from tests.engine import point_trainer


def loader(count: int, *, ranks: int = 1, rank: int = 0) -> DataLoader:
    torch.manual_seed(7)
    plain = DataLoader(TensorDataset(torch.arange(count)), batch_size=10, shuffle=True)
    options = {"num_processes": ranks, "process_index": rank, "put_on_device": False, "use_seedable_sampler": True}
    return prepare_data_loader(plain, **options)


def orders(data: DataLoader, epochs: int = 2) -> list[list[int]]:
    return [[int(i) for (batch,) in data for i in batch] for _ in range(epochs)]


@pytest.mark.parametrize("count", [1, 25, PART, 2 * PART + 7])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_orders_are_the_engines(count: int, ranks: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.data_loader.synchronize_rng_states", lambda *_: None)  # there is one process
    engine, own = (loader(count, ranks=ranks, rank=rank) for _ in range(2))
    shuffle_in_parts(own)
    assert isinstance(own.get_sampler(), InParts)
    first, second = orders(engine)
    assert orders(own) == [first, second]
    assert first != second or count < 3
    for data in (engine, own):
        data.set_epoch(5)
    assert orders(engine, 1) == orders(own, 1)


def test_the_trainer_shuffles_in_parts_and_other_samplers_stay(tmp_path) -> None:
    assert isinstance(point_trainer(tmp_path).get_train_dataloader().get_sampler(), InParts)
    ordered = point_trainer(tmp_path, train_sampling_strategy="sequential").get_train_dataloader()
    assert not isinstance(ordered.get_sampler(), InParts)
    replaced = loader(5)
    replaced.set_sampler(SeedableRandomSampler(range(5), replacement=True, num_samples=5))
    shuffle_in_parts(replaced)
    assert isinstance(replaced.get_sampler(), SeedableRandomSampler)
