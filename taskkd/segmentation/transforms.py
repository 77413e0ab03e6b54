"""Augmentation by torchvision's v2 transforms, of image and labels together, drawn from a generator alone.

`Augmented(dataset, build(["RandomHorizontalFlip", {"name": "RandomCrop", "size": [512, 512], "pad_if_needed": True}]))`
augments a sample in the same way in any worker, before and after an interruption.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taskkd.augmentation import drawn_from, transform_of
from taskkd.errors import DataError, RecipeError
from taskkd.segmentation.labels import IGNORE

__all__ = ["OWN", "TRANSFORMS", "Augmentation", "RandomQuarterTurn", "RandomScale", "build"]

#: the names that a recipe may use beside `OWN`: torchvision's, that move images and masks together or change colours
TRANSFORMS = (
    "RandomHorizontalFlip",
    "RandomVerticalFlip",
    "RandomCrop",
    "RandomResizedCrop",
    "CenterCrop",
    "Resize",
    "RandomResize",
    "RandomShortestSize",
    "ScaleJitter",
    "RandomRotation",
    "RandomAffine",
    "RandomPerspective",
    "ElasticTransform",
    "Pad",
    "RandomZoomOut",
    "RandomPhotometricDistort",
    "ColorJitter",
    "RandomGrayscale",
    "RandomInvert",
    "RandomPosterize",
    "RandomSolarize",
    "RandomEqualize",
    "RandomAutocontrast",
    "RandomAdjustSharpness",
    "GaussianBlur",
    "GaussianNoise",
)
#: what is padded gets ImageNet's mean colour, (0.485, 0.456, 0.406), which most models normalise to about 0
FILL = (124, 116, 104)


class RandomScale:
    """Image and labels scaled by one random factor, relative to the image's own size, as the papers do (0.5 to 2).

    (torchvision's ScaleJitter scales towards a fixed size, and compares its `target_size`'s second number with the
    height.)

    Args:
        scale_range: of the factor, drawn evenly.
    """

    def __init__(self, scale_range: Sequence[float] = (0.5, 2.0)) -> None:
        low, high = (float(v) for v in scale_range)
        if not 0 < low <= high:
            raise ValueError(f"scale_range is {list(scale_range)}, expected two positive numbers, the smaller first")
        self.low, self.high = low, high

    def __call__(self, image: Any, mask: Any) -> tuple[Any, Any]:
        from torchvision.transforms.v2 import functional as F

        factor = self.low + (self.high - self.low) * float(torch.rand(()))
        size = [max(1, round(side * factor)) for side in image.shape[-2:]]
        return F.resize(image, size, antialias=True), F.resize(mask, size)


class RandomQuarterTurn:
    """Image and labels turned by 0, 90, 180 or 270 degrees: for pictures without an upper side."""

    def __call__(self, image: Any, mask: Any) -> tuple[Any, Any]:
        from torchvision import tv_tensors

        turns = int(torch.randint(4, ()))
        image, mask = (tv_tensors.wrap(torch.rot90(part, turns, (-2, -1)), like=part) for part in (image, mask))
        return image, mask


#: transforms that torchvision does not have
OWN: dict[str, Any] = {"RandomScale": RandomScale, "RandomQuarterTurn": RandomQuarterTurn}


def build(config: Sequence[str | Mapping[str, Any]]) -> Augmentation:
    """The augmentation of a recipe.

    Args:
        config: in the order they are applied, names in `TRANSFORMS` and `OWN`, or mappings of `name` and that
            transform's options as torchvision.transforms.v2 has them. `fill` is left out: padding gets the mean colour
            and label 255.

    Raises:
        RecipeError: a name or an option is unknown, or a value is refused by the transform.
    """
    return Augmentation([_transform(entry, f"augmentation {number}") for number, entry in enumerate(config, 1)])


def _transform(entry: str | Mapping[str, Any], where: str) -> Any:
    if not isinstance(entry, str) and "fill" in entry:
        raise RecipeError(f"{where}: leave out fill; padding gets the mean colour, and is ignored in the labels.")
    transform = transform_of(entry, TRANSFORMS, where, OWN)
    if "fill" not in inspect.signature(type(transform)).parameters:
        return transform
    options: dict[str, Any] = {"name": entry} if isinstance(entry, str) else dict(entry)
    return transform_of({**options, "fill": _fill()}, TRANSFORMS, where, OWN)


def _fill() -> dict[type, Any]:
    from torchvision import tv_tensors

    return {tv_tensors.Image: list(FILL), tv_tensors.Mask: IGNORE}


class Augmentation:
    """Applies v2 transforms to samples of `SegmentationDataset`: `(sample, generator) -> sample`, for `kd.Augmented`.

    Images are resized bilinearly, labels to the nearest. What is padded has the mean colour, label 255 and
    `valid` False. Colours are whole numbers 0..255 meanwhile, which is three times faster than fractions.

    Args:
        transforms: of torchvision.transforms.v2, or callables `(image, mask) -> (image, mask)`: an image (3, H, W)
            and a mask (2, H, W) of labels and of 1, both uint8, as tv_tensors. In padding the second is not 1.

    Raises:
        DataError: when it is called, a transform cannot do with an image, as a crop with a smaller one; with its file.
    """

    def __init__(self, transforms: Sequence[Any]) -> None:
        self.transforms = list(transforms)

    def __call__(self, sample: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        from torchvision import tv_tensors

        given, labels = sample["images"], sample["labels"]
        fractions = given.is_floating_point()
        valid = sample.get("valid", torch.ones_like(labels, dtype=torch.bool))
        inside = torch.where(valid, 1, IGNORE)
        whole = (given * 255).round_().clamp_(0, 255) if fractions else given
        image: Any = tv_tensors.Image(whole.to(torch.uint8))
        mask: Any = tv_tensors.Mask(torch.stack([labels.to(torch.uint8), inside.to(torch.uint8)]))
        with drawn_from(generator):
            for number, transform in enumerate(self.transforms, 1):
                try:
                    image, mask = transform(image, mask)
                except (ValueError, RuntimeError) as error:  # as a crop of a smaller image
                    raise DataError(_sentence(sample, number, transform, error)) from None
        plain = image.as_subclass(Tensor).contiguous()
        moved, inside = mask.as_subclass(Tensor)
        images = plain.to(given.dtype) / 255 if fractions else plain
        labels = torch.where(inside == 1, moved, IGNORE).to(labels.dtype)
        return {**sample, "images": images, "labels": labels, "valid": inside == 1}


def _sentence(sample: Mapping[str, Any], number: int, transform: Any, error: Exception) -> str:
    where = sample.get("file", f"image id {sample.get('id')}")
    pad = "" if getattr(transform, "pad_if_needed", True) else " `pad_if_needed: true` pads smaller images."
    return f"{where}: augmentation {number} ({type(transform).__name__}): {str(error).rstrip('.')}.{pad}"
