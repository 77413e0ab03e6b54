"""Augmentation of images and labels: together, from a generator alone, with padding that is known."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from taskkd.augmentation import Augmented, generator_for
from taskkd.errors import RecipeError
from taskkd.segmentation.transforms import FILL, OWN, TRANSFORMS, Augmentation, build

#: options of those that need some, and of those that would leave so small an image as it is
OPTIONS: dict[str, dict[str, Any]] = {
    "RandomCrop": {"size": [20, 40], "pad_if_needed": True},
    "RandomResizedCrop": {"size": [16, 16]},
    "CenterCrop": {"size": [40, 16]},
    "Resize": {"size": [20, 20]},
    "RandomResize": {"min_size": 16, "max_size": 40},
    "RandomShortestSize": {"min_size": [16, 32]},
    "ScaleJitter": {"target_size": [32, 32]},
    "RandomRotation": {"degrees": 30},
    "RandomAffine": {"degrees": 10, "translate": [0.2, 0.2]},
    "RandomPerspective": {"p": 1.0},
    "Pad": {"padding": 3},
    "ColorJitter": {"brightness": 0.5},
    "RandomPosterize": {"bits": 3},
    "RandomSolarize": {"threshold": 0.5},
    "RandomAdjustSharpness": {"sharpness_factor": 2.0},
    "GaussianBlur": {"kernel_size": 3},
}
HEIGHT, WIDTH = 24, 32


def sample(number: int = 0) -> dict[str, Any]:
    """Labels are the quarters of the image, whose red is 20 times the label."""
    labels = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    labels[:, WIDTH // 2 :] += 1
    labels[HEIGHT // 2 :] += 2
    labels[0, 0] = 255
    image = torch.stack([labels.clamp(max=3) * 20] * 3)
    return {"images": image, "labels": labels, "valid": torch.ones_like(labels, dtype=torch.bool), "id": number}


def augmented(*config: Any, seed: int = 0) -> dict[str, Any]:
    return build(config)(sample(), generator_for(seed, 0, 0))


@pytest.mark.parametrize("name", [*TRANSFORMS, *OWN])
def test_every_transform(name: str) -> None:
    config = {"name": name, **OPTIONS.get(name, {})}
    found = [augmented(config, seed=seed) for seed in range(6)]
    for one in found:
        image, labels, valid = one["images"], one["labels"], one["valid"]
        assert image.dtype == labels.dtype == torch.uint8
        assert labels.shape == valid.shape == image.shape[1:]
        assert set(labels[valid].tolist()) <= {0, 1, 2, 3, 255}
        assert (labels[~valid] == 255).all()
    again = augmented(config, seed=5)
    assert all(torch.equal(again[key], found[5][key]) for key in ("images", "labels", "valid"))


@pytest.mark.parametrize(
    "config",
    ["RandomHorizontalFlip", "RandomVerticalFlip", "RandomQuarterTurn", {"name": "RandomCrop", "size": [12, 16]}],
)
def test_labels_move_with_the_image(config: Any) -> None:
    for seed in range(5):
        one = augmented(config, seed=seed)
        inside = one["labels"] != 255
        assert torch.equal(one["images"][0][inside], one["labels"][inside] * 20)
        assert one["valid"].all()  # what is ignored in the mask is not what augmentation added


def test_padding_is_known_and_has_the_mean_colour() -> None:
    one = augmented({"name": "RandomCrop", "size": [40, 48], "pad_if_needed": True})
    assert one["images"].shape == (3, 40, 48)
    assert int(one["valid"].sum()) == 24 * 32
    assert (one["labels"] == 255).sum() == (~one["valid"]).sum() + 1
    assert (one["images"][:, ~one["valid"]] == torch.tensor(FILL, dtype=torch.uint8)[:, None]).all()
    twice = build(["RandomVerticalFlip"])(one, generator_for(0, 0, 0))
    assert twice["valid"].sum() == 24 * 32  # what was padded before stays so


def test_scales_are_of_the_own_size() -> None:
    sizes = [augmented({"name": "RandomScale", "scale_range": [0.5, 2.0]}, seed=n)["labels"].shape for n in range(40)]
    factors = torch.tensor([h / HEIGHT for h, _ in sizes])
    assert all(abs(h / HEIGHT - w / WIDTH) < 0.05 for h, w in sizes)
    assert 0.5 <= factors.min() < 0.7 < 1.7 < factors.max() <= 2.0
    assert set(augmented({"name": "RandomScale"}, seed=1)["labels"].unique().tolist()) <= {0, 1, 2, 3, 255}


def test_fractions_stay_fractions() -> None:
    given = sample()
    floats = {**given, "images": given["images"].float() / 255, "labels": given["labels"].long()}
    config = ["RandomHorizontalFlip", {"name": "ColorJitter", "brightness": 0.5}]
    ours = build(config)(floats, generator_for(0, 0, 0))
    whole = build(config)(given, generator_for(0, 0, 0))
    assert ours["images"].dtype == torch.float32
    assert ours["labels"].dtype == torch.int64
    assert torch.equal(ours["images"], whole["images"].float() / 255)
    assert torch.equal(floats["images"], given["images"].float() / 255)  # the sample is not changed


def test_only_the_generator_counts() -> None:
    def look(table: Augmented) -> Tensor:
        return torch.stack([table[i]["images"] for i in range(4)])

    config = [{"name": "RandomScale"}, {"name": "RandomCrop", "size": [16, 16], "pad_if_needed": True}]
    table = Augmented([sample(n) for n in range(4)], build([*config, "RandomPhotometricDistort"]))
    first = look(table)
    state = torch.get_rng_state()
    assert torch.equal(look(pickle.loads(pickle.dumps(table))), first)
    assert torch.equal(torch.get_rng_state(), state)
    table.set_epoch(1)
    assert not torch.equal(look(table), first)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("RandomScal", "augmentation 1: no transform 'RandomScal'"),
        ({"name": "RandomScale", "scale": [1, 2]}, "RandomScale has no option 'scale'"),
        ({"name": "RandomScale", "scale_range": [2, 1]}, "RandomScale refuses its options: scale_range is"),
        ({"name": "RandomCrop", "size": [8, 8], "fill": 0}, "leave out fill"),
        ("RandomCrop", "RandomCrop refuses its options"),
    ],
)
def test_what_is_refused(entry: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build([entry])


def test_a_callable_of_ones_own() -> None:
    def darker(image: Any, mask: Any) -> Any:
        return image // 2, mask

    one = Augmentation([darker])(sample(), generator_for(0, 0, 0))
    assert torch.equal(one["images"], sample()["images"] // 2)
