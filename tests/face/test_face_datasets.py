"""Views and their ids, flips, batches, augmentation beyond flips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from taskkd.augmentation import Augmented, generator_for
from taskkd.errors import DataError, RecipeError
from taskkd.face.datasets import FaceDataset, RandomFlip, TwoViews, collate
from taskkd.face.readers import read_folder
from taskkd.face.records import Faces
from taskkd.face.transforms import RandomLight, RandomLowResolution, RandomRegion, build
from tests.face.files import folder_of, png


@pytest.fixture
def faces(tmp_path: Path) -> Faces:
    return read_folder(folder_of(tmp_path / "faces", {"a": 3, "b": 2}))


def test_samples(faces: Faces) -> None:
    dataset = FaceDataset(faces)
    sample = dataset[3]
    assert sample["images"].dtype == torch.uint8
    assert sample["images"].shape == (3, 8, 8)
    assert (sample["labels"], sample["id"], Path(sample["file"]).name) == (1, 6, "0000.png")
    assert dataset.identities == ["a", "b"]
    assert "labels" not in FaceDataset(faces, labels=False)[0]
    held = FaceDataset(faces, held=True)
    first = held[0]["images"]
    Path(faces[0].source.name).unlink()
    assert held[0]["images"] is first
    with pytest.raises(DataError, match=r"0000.png .image id 0.: no such file"):
        dataset[0]


def test_both_views(faces: Faces) -> None:
    views = TwoViews(FaceDataset(faces))
    assert len(views) == 10
    assert [views[n]["id"] for n in range(10)] == list(range(10))
    assert (views[5]["images"] == views[4]["images"].flip(-1)).all()
    assert views[5]["labels"] == views[4]["labels"] == 0
    with pytest.raises(IndexError):
        views[10]
    (batch,) = DataLoader(views, batch_size=16, collate_fn=collate)  # a loader stops at the end
    assert batch["id"].tolist() == list(range(10))


def test_flips_are_a_function_of_seed_epoch_and_id(faces: Faces) -> None:
    flips = RandomFlip(FaceDataset(faces), seed=3)
    drawn = []
    for epoch in range(40):
        flips.set_epoch(epoch)
        samples = [flips[n] for n in range(5)]
        assert [s["id"] // 2 for s in samples] == list(range(5))
        for sample in samples:
            assert (sample["images"] == flips.views[sample["id"]]["images"]).all()
        drawn.append([s["id"] % 2 for s in samples])
        assert drawn[-1] == [flips[n]["id"] % 2 for n in range(5)]
    assert 70 < sum(map(sum, drawn)) < 130
    again = flips.with_seed(4)
    again.set_epoch(39)
    flips.set_epoch(0)
    assert [flips[n]["id"] % 2 for n in range(5)] == drawn[0]
    assert len(flips.views) == 10


def test_batches(faces: Faces) -> None:
    dataset = FaceDataset(faces)
    batch = collate([dataset[0], dataset[4]])
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        "images": ((2, 3, 8, 8), torch.uint8),
        "labels": ((2,), torch.int64),
        "id": ((2,), torch.int64),
    }
    lists = [[{**dataset[n], "branch": n, "identity": 7} for n in (0, 1)]]
    lists.append([{**dataset[3], "branch": 3, "identity": 8}])
    flat = collate(lists)
    assert flat["branch"].tolist() == [0, 1, 3]
    assert flat["labels"].tolist() == [0, 0, 1]
    assert flat["identity"].tolist() == [7, 7, 8]
    assert "labels" not in collate([FaceDataset(faces, labels=False)[0]])
    assert {"images", "labels", "id", "branch", "identity", "file"} == set(collate.columns)


def test_a_mix_of_sizes_names_the_files(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 1}, 8, 6)
    (tmp_path / "a" / "wide.png").write_bytes(png(0, 8, 16))
    dataset = FaceDataset(read_folder(tmp_path))
    with pytest.raises(DataError, match=r"of 6x8 .*0000.png., 16x8 .*wide.png.: give a size"):
        collate([dataset[0], dataset[1]])
    squares = FaceDataset(read_folder(tmp_path, size=10))
    assert collate([squares[0], squares[1]])["images"].shape == (2, 3, 10, 10)


def augmented(dataset: Any, config: Sequence[Any], seed: int = 0) -> Augmented:
    return Augmented(dataset, build(config), seed=seed)


def test_augmentation_is_repeatable_and_has_no_views(faces: Faces) -> None:
    config = [
        "RandomHorizontalFlip",
        {"name": "RandomRegion", "p": 0.5},
        {"name": "RandomLowResolution", "p": 0.5},
        {"name": "RandomLight", "p": 0.5},
        {"name": "RandomRotation", "degrees": 10},
    ]
    dataset = augmented(FaceDataset(faces), config, seed=1)
    assert not hasattr(dataset, "views")
    first = [dataset[n]["images"] for n in range(5)]
    torch.manual_seed(7)
    assert all((dataset[n]["images"] == first[n]).all() for n in reversed(range(5)))
    assert all(type(image) is torch.Tensor and image.dtype == torch.uint8 for image in first)
    dataset.set_epoch(1)
    assert any((dataset[n]["images"] != first[n]).any() for n in range(5))


def test_what_the_transforms_do() -> None:
    image = torch.randint(1, 256, (3, 24, 24), dtype=torch.uint8)
    torch.manual_seed(0)
    part = RandomRegion(p=1, scale=(0.2, 0.3))(image)
    kept = (part != 0).all(0)
    assert 0.1 < kept.float().mean() < 0.4
    assert (part[:, kept] == image[:, kept]).all()
    coarse = RandomLowResolution(p=1, scale=(0.25, 0.25))(image)
    assert coarse.shape == image.shape
    assert coarse.float().std() < image.float().std()
    assert (RandomLight(p=1)(image) != image).any()
    for kind in (RandomRegion, RandomLowResolution, RandomLight):
        assert kind(p=0)(image) is image
    drawn = [bool((RandomLight(p=0.2)(image) != image).any()) for _ in range(200)]
    assert 20 < sum(drawn) < 60


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("RandomHorizontalFlop", "augmentation 1: no transform 'RandomHorizontalFlop' .did you mean"),
        ({"name": "RandomLight", "power": 2}, "RandomLight has no option 'power'"),
        ({"name": "RandomRegion", "p": 1.5}, "RandomRegion refuses its options: p is 1.5, expected 0 to 1"),
        ({"name": "RandomLowResolution", "scale": [0.9, 0.2]}, "scale is .0.9, 0.2., expected two numbers"),
    ],
)
def test_bad_augmentation(entry: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        build([entry])


def test_an_image_that_is_too_small_is_named(faces: Faces) -> None:
    crop = build([{"name": "RandomCrop", "size": [64, 64]}])
    with pytest.raises(DataError, match=r"0000.png: augmentation 1 .RandomCrop.: "):
        crop(FaceDataset(faces)[0], generator_for(0, 0, 0))


def test_going_through_both_views_decodes_each_image_once(faces: Faces, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = FaceDataset(faces)
    asked: list[int] = []
    decode = FaceDataset.__getitem__
    monkeypatch.setattr(FaceDataset, "__getitem__", lambda self, i: (asked.append(i), decode(self, i))[1])
    views = TwoViews(dataset)
    samples = [views[i] for i in range(len(views))]
    assert asked == [0, 1, 2, 3, 4]
    assert [s["id"] for s in samples] == list(range(10))
    assert torch.equal(samples[0]["images"].flip(-1), samples[1]["images"])
    samples[9]["id"] = -1  # what was given out is the caller's
    assert views[8]["id"] == 8
