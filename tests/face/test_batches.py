"""Batches by identity: what they hold, that they are functions of (seed, epoch, index), and what they refuse."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from taskkd.errors import DataError
from taskkd.face.batches import EasyHard, GeneralPlusBalanced, IdentityBalanced, split_easy_hard

LABELS = np.repeat(np.arange(10), 6)
HARD = np.tile([False, False, False, True, True, True], 10)


class Faces:
    """Sixty images of ten identities; the left column of each is its number."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> dict[str, Any]:
        images = torch.zeros(3, 2, 2, dtype=torch.uint8)
        images[..., 0] = index + 1
        return {"images": images, "labels": int(LABELS[index]), "id": 2 * index}


def made(kind: str, seed: int = 0) -> Any:
    if kind == "identities":
        return IdentityBalanced(Faces(), LABELS, 12, 3, seed=seed)
    if kind == "general":
        return GeneralPlusBalanced(Faces(), LABELS, 10, 3, 4, seed=seed)
    return EasyHard(Faces(), LABELS, HARD, 5, 4, seed=seed)


def ids(samples: list[dict[str, Any]]) -> list[int]:
    return [s["id"] for s in samples]


def images_of(samples: list[dict[str, Any]]) -> list[int]:
    return [s["id"] // 2 for s in samples]


@pytest.mark.parametrize("kind", ["identities", "general", "branches"])
class TestEvery:
    def test_an_item_is_a_function_of_seed_epoch_and_index(self, kind: str) -> None:
        first, again, other = made(kind), pickle.loads(pickle.dumps(made(kind))), made(kind, seed=1)
        assert first.whole_batches
        found = [ids(first[i]) for i in range(len(first))]
        assert found[::-1] == [ids(again[i]) for i in reversed(range(len(again)))]
        assert found[0] != ids(other[0])
        assert ids(first.with_seed(1)[0]) == ids(other[0])
        first.set_epoch(1)
        assert ids(first[0]) != found[0]
        first.set_epoch(0)
        assert ids(first[0]) == found[0]
        with pytest.raises(IndexError):
            first[len(first)]

    def test_ids_say_which_view_an_image_is(self, kind: str) -> None:
        flips = []
        for epoch in range(3):
            data = made(kind)
            data.set_epoch(epoch)
            for sample in data[0]:
                column = sample["images"][0, 0].tolist()
                image, flip = divmod(sample["id"], 2)
                assert column == ([0, image + 1] if flip else [image + 1, 0])
                flips.append(flip)
        assert 0.2 < np.mean(flips) < 0.8


def test_identities_are_balanced_and_all_come_in_turn() -> None:
    data = IdentityBalanced(Faces(), LABELS, 6, 3)
    seen = []
    for i in range(5):
        images = images_of(data[i])
        assert len(set(images)) == 6
        present, counts = np.unique(LABELS[images], return_counts=True)
        assert counts.tolist() == [3, 3]
        seen += present.tolist()
    assert sorted(seen) == list(range(10))


def test_random_images_come_once_in_an_epoch() -> None:
    data = made("general")
    assert len(data) == 6
    items = [data[i] for i in range(6)]
    assert sorted(n for item in items for n in images_of(item[:10])) == list(range(60))
    for item in items:
        assert np.unique(LABELS[images_of(item[10:])], return_counts=True)[1].tolist() == [4, 4, 4]
        assert all(s["labels"] == LABELS[s["id"] // 2] and "identity" not in s for s in item)
    apart = GeneralPlusBalanced(Faces(), LABELS, 10, 3, 4, label_balanced=False)[0]
    assert [s["labels"] for s in apart[10:]] == [-1] * 12
    assert [s["identity"] for s in apart] == LABELS[images_of(apart)].tolist()
    assert ids(apart) == ids(items[0])


def test_branches_of_easy_and_hard_images() -> None:
    data = made("branches")
    for i in range(len(data)):
        samples = data[i]
        images, branch = np.array(images_of(samples)), np.array([s["branch"] for s in samples])
        assert branch.tolist() == [0] * 5 + [1] * 5 + [2] * 8 + [3] * 8
        assert (HARD[images] == (branch % 2 == 1)).all()
        for b in (0, 1):
            assert len(set(LABELS[images[branch == b]])) == 5
        for b in (2, 3):
            pairs = images[branch == b].reshape(-1, 2)
            assert (pairs[:, 0] != pairs[:, 1]).all()
            assert (LABELS[pairs[:, 0]] == LABELS[pairs[:, 1]]).all()
        labels = np.array([s["labels"] for s in samples])
        assert (labels == np.where(branch < 2, LABELS[images], -1)).all()


def test_pairs_may_be_given_mixed_and_labelled() -> None:
    given = EasyHard(Faces(), LABELS, HARD, 2, 3, easy_pairs=[[0, 1]], mixed=True, label_pairs=True)
    samples = given[0]
    assert images_of(samples[4:10]) == [0, 1] * 3
    images = np.array(images_of(samples[10:]))
    assert HARD[images].tolist() == [True, False] * 3
    assert (LABELS[images[::2]] == LABELS[images[1::2]]).all()
    assert all(s["labels"] == LABELS[s["id"] // 2] for s in samples)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: IdentityBalanced(Faces(), LABELS, 10, 3), "cannot be made of 3 images"),
        (lambda: IdentityBalanced(Faces(), LABELS, 24, 2), "12 identities, but there are 20; batch_size=20 would do"),
        (lambda: IdentityBalanced(Faces(), LABELS[:5], 4, 2), "label for each of the 60 images"),
        (lambda: GeneralPlusBalanced(Faces(), LABELS, 32, 11, 4), "11 identities with 4 images or more, but there are"),
        (lambda: GeneralPlusBalanced(Faces(), LABELS, 100), "100 random images, but there are 60; general=60"),
        (lambda: EasyHard(Faces(), LABELS, HARD, 11), "11 identities with easy images, each once, but there are 10"),
        (lambda: EasyHard(Faces(), LABELS, ~HARD & False, 4), "4 identities with hard images"),
        (lambda: EasyHard(Faces(), LABELS, np.arange(60) % 6 == 5, 4), "two hard images, .* mixed=True"),
        (lambda: EasyHard(Faces(), LABELS, HARD, 4, hard_pairs=[[0, 60]]), "names image 60; the dataset has 60"),
        (lambda: EasyHard(Faces(), LABELS, HARD[:3], 4), "`hard` is"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        make()


class TestSplit:
    def test_by_resolution(self) -> None:
        sizes = [[112, 90], [20, 300], [64, 64], [16, 16]]
        assert split_easy_hard("resolution", sizes).tolist() == [False, True, False, True]
        assert split_easy_hard("resolution", sizes, share=0.25).tolist() == [False, False, False, True]
        assert split_easy_hard("resolution", sizes, threshold=65).tolist() == [False, True, True, True]

    def test_by_embeddings(self) -> None:
        embeddings = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.5, 0.1], [4.0, 0.2], [0.2, 0.0], [9.0, 9.0]])
        labels = [0, 0, 0, 1, 1, -1]
        assert split_easy_hard("norm", embeddings, threshold=1.5).tolist() == [False, True, True, False, True, False]
        assert split_easy_hard("centre", embeddings, labels, threshold=0.8).tolist() == [False, True] + [False] * 4
        each = split_easy_hard("norm", embeddings, labels, each_identity=True)
        assert each.tolist() == [False, False, True, False, True, False]

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"by": "size", "values": [1.0]}, "got 'size'"),
            ({"by": "norm", "values": [1.0]}, r"embeddings \(N, D\)"),
            ({"by": "centre", "values": [[1.0]]}, "'centre' needs `labels`"),
            ({"by": "norm", "values": [[1.0]], "share": 0.5, "threshold": 1.0}, "goes neither"),
            ({"by": "norm", "values": [[1.0]], "share": 1.5}, "between 0 and 1"),
            ({"by": "norm", "values": [[1.0]], "labels": [1, 2]}, "labels for 1 images"),
        ],
    )
    def test_wrong_use(self, options: dict[str, Any], sentence: str) -> None:
        with pytest.raises(DataError, match=sentence):
            split_easy_hard(**options)
