"""Augmentation: boxes follow their pixels, what vanishes is gone, and only the generator is drawn from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from taskkd.augmentation import Augmented, generator_for
from taskkd.detection import collate
from taskkd.detection.transforms import TRANSFORMS, Augmentation, build
from taskkd.errors import RecipeError, TaskkdError

ALL: list[Any] = [
    "RandomPhotometricDistort",
    {"name": "RandomZoomOut", "side_range": [1.0, 2.0]},
    "RandomIoUCrop",
    "RandomHorizontalFlip",
    {"name": "RandomVerticalFlip", "p": 0.3},
    {"name": "ScaleJitter", "target_size": [40, 40], "scale_range": [0.5, 1.5]},
]


def sample(number: int = 0, boxes: list[list[float]] | None = None) -> dict[str, Any]:
    """An image of 30 x 40 pixels that is bright in its boxes."""
    corners = torch.tensor([[4.0, 6, 12, 20], [20, 2, 36, 10]] if boxes is None else boxes).reshape(-1, 4)
    image = torch.rand(3, 30, 40, generator=generator_for(0, 0, number)) / 10
    for x0, y0, x1, y1 in corners.int().tolist():
        image[:, y0:y1, x0:x1] += 0.8
    labels = torch.arange(1, len(corners) + 1)
    area = (corners[:, 2:] - corners[:, :2]).prod(1) / 2
    size, image_id = torch.tensor([30, 40]), torch.tensor(number)
    target = {"boxes": corners, "labels": labels, "area": area, "iscrowd": labels * 0}
    return {"images": image, "targets": {**target, "size": size, "image_id": image_id}, "id": number}


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(100 + index)


def brightness(found: dict[str, Any]) -> list[float]:
    """The mean of the image inside each box."""
    boxes = found["targets"]["boxes"].round().int().tolist()
    return [float(found["images"][:, y0:y1, x0:x1].mean()) for x0, y0, x1, y1 in boxes]


def test_a_flip() -> None:
    before = sample()
    after = build([{"name": "RandomHorizontalFlip", "p": 1}])(before, generator_for(0, 0, 0))
    assert torch.equal(after["images"], before["images"].flip(-1))
    assert after["targets"]["boxes"].tolist() == [[28, 6, 36, 20], [4, 2, 20, 10]]
    assert after["targets"]["labels"].tolist() == [1, 2]
    assert torch.equal(after["targets"]["area"], before["targets"]["area"])
    assert type(after["images"]) is type(after["targets"]["boxes"]) is Tensor
    assert before["targets"]["boxes"].tolist() == [[4, 6, 12, 20], [20, 2, 36, 10]]  # the sample itself is as it was


def test_boxes_follow_their_pixels() -> None:
    geometric = build(ALL[1:])
    kept = 0
    for number in range(40):
        found = geometric(sample(number), generator_for(1, 0, number))
        target, (height, width) = found["targets"], found["images"].shape[-2:]
        assert target["size"].tolist() == [height, width]
        assert len(target["boxes"]) == len(target["labels"]) == len(target["area"]) == len(target["iscrowd"])
        assert (target["boxes"] >= 0).all()
        assert (target["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert (target["boxes"][:, 2:] - target["boxes"][:, :2] >= 1).all()
        large = [b for b, area in zip(brightness(found), target["area"], strict=True) if area > 20]
        assert all(b > 0.6 for b in large)
        kept += len(large)
    assert 20 < kept < 80


def test_boxes_that_vanish_go_with_their_labels() -> None:
    crop = build(["RandomIoUCrop"])
    counts, areas = set(), set()
    for number in range(60):
        target = crop(sample(), generator_for(0, 0, number))["targets"]
        assert set(target["labels"].tolist()) <= {1, 2}
        counts.add(len(target["labels"]))
        for label, box, area in zip(target["labels"], target["boxes"], target["area"], strict=True):
            assert float(area) == pytest.approx(float((box[2:] - box[:2]).prod()) / 2, rel=1e-5)
            areas.add((int(label), float(area)))
    assert counts == {1, 2}  # it looks for a box to keep
    assert len(areas) > 5


def test_images_without_boxes() -> None:
    for number in range(20):
        found = build(ALL)(sample(number, []), generator_for(0, 0, number))
        assert found["targets"]["boxes"].shape == (0, 4)
        assert found["targets"]["labels"].shape == (0,)


def test_boxes_below_one_pixel_stay_where_nothing_shrinks_them() -> None:
    tiny = sample(0, [[4, 4, 4.5, 8]])
    flipped = build([{"name": "RandomHorizontalFlip", "p": 1}])(tiny, generator_for(0, 0, 0))
    assert flipped["targets"]["boxes"].tolist() == [[35.5, 4, 36, 8]]
    shrunk = build([{"name": "Resize", "size": [6, 4]}])(sample(), generator_for(0, 0, 0))
    assert shrunk["targets"]["labels"].tolist() == [2]  # 0.8 x 2.8 pixels are gone, 1.6 x 1.6 are not


def epoch(workers: int, number: int = 3) -> dict[int, tuple[Tensor, Tensor]]:
    data = Augmented(Samples(), build(ALL), seed=5)
    data.set_epoch(number)
    loader = DataLoader(data, batch_size=4, collate_fn=collate, num_workers=workers, shuffle=True)
    return {
        int(i): (image, target["boxes"])
        for batch in loader
        for i, image, target in zip(batch["id"], batch["images"], batch["targets"], strict=True)
    }


def equal(first: dict[int, tuple[Tensor, Tensor]], second: dict[int, tuple[Tensor, Tensor]]) -> bool:
    return all(
        torch.equal(a, b) for i in first for a, b in zip(first[i], second[i], strict=True)
    )  # fmt: skip


def test_workers_and_order_do_not_matter() -> None:
    alone = epoch(0)
    assert len(alone) == 12
    torch.manual_seed(7)
    random.seed(7)
    assert equal(alone, epoch(2))
    assert not equal(alone, epoch(0, number=4))


def test_the_global_generators_are_left_alone() -> None:
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    augmentation = build(ALL)
    first = augmentation(sample(), generator_for(0, 0, 1))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # type: ignore[index]
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    again = augmentation(sample(), generator_for(0, 0, 1))
    assert torch.equal(first["images"], again["images"])
    assert torch.equal(first["targets"]["boxes"], again["targets"]["boxes"])
    assert not torch.equal(first["images"], augmentation(sample(), generator_for(0, 0, 2))["images"])


def test_the_global_generator_is_put_back_after_an_error() -> None:
    def fails(*_: Any) -> None:
        torch.rand(3)
        raise ValueError("stop")

    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="stop"):
        Augmentation([fails])(sample(), generator_for(0, 0, 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_for_evaluation_are_refused() -> None:
    own = sample()
    own["targets"]["ignored_boxes"] = torch.zeros(0, 4)
    with pytest.raises(TaskkdError, match="use a dataset without `ignored=True`"):
        build(ALL)(own, generator_for(0, 0, 0))


def test_every_name_is_known_to_torchvision() -> None:
    needed: dict[str, dict[str, Any]] = {
        "ScaleJitter": {"target_size": [40, 40]},
        "RandomShortestSize": {"min_size": [20, 30], "max_size": 60},
        "Resize": {"size": [20, 20]},
    }
    for name in TRANSFORMS:
        found = build([{"name": name, **needed.get(name, {})}])(sample(), generator_for(0, 0, 0))
        assert found["images"].ndim == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (["RandomHorizontalFlipp"], r"augmentation 1: no transform 'RandomHorizontalFlipp' \(did you mean 'RandomHo"),
        (["RandomVerticalFlip", {"p": 1}], "augmentation 2: no transform None; known: RandomHorizontalFlip"),
        ([{"name": "RandomIoUCrop", "min_scal": 1}], r"RandomIoUCrop has no option 'min_scal' \(did you mean 'min"),
        ([{"name": "RandomHorizontalFlip", "p": 2}], "augmentation 1: RandomHorizontalFlip refuses its options: "),
        (["ScaleJitter"], "ScaleJitter refuses its options: .*target_size"),
        ([{"name": "RandomIoUCrop", "sampler_options": [0.5]}], r"sampler_options \[0.5\] of RandomIoUCrop need 1.0"),
    ],
)  # fmt: skip
def test_wrong_recipes(config: list[Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(config)
