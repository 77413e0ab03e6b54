"""Augmentation by torchvision's v2 transforms, drawn from a generator alone.

`Augmented(dataset, build(["RandomHorizontalFlip", {"name": "RandomIoUCrop", "min_scale": 0.5}]))` augments a sample in
the same way in any worker, before and after an interruption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taskkd.augmentation import drawn_from, transform_of
from taskkd.errors import RecipeError, TaskkdError

__all__ = ["TRANSFORMS", "Augmentation", "build"]

#: the names that a recipe may use: torchvision's, that move images and boxes together or change colours only
TRANSFORMS = (
    "RandomHorizontalFlip",
    "RandomVerticalFlip",
    "RandomIoUCrop",
    "RandomZoomOut",
    "RandomPhotometricDistort",
    "ScaleJitter",
    "RandomShortestSize",
    "Resize",
)
#: what belongs to each box, beside `boxes` itself
OF_BOXES = ("labels", "area", "iscrowd")


def build(config: Sequence[str | Mapping[str, Any]]) -> Augmentation:
    """The augmentation of a recipe.

    Args:
        config: in the order they are applied, names in `TRANSFORMS`, or mappings of `name` and that transform's
            options as torchvision.transforms.v2 has them.

    Raises:
        RecipeError: a name or an option is unknown, or a value is refused by the transform.
    """
    return Augmentation([_transform(entry, number) for number, entry in enumerate(config)])


def _transform(entry: str | Mapping[str, Any], number: int) -> Any:
    where = f"augmentation {number + 1}"
    scales = None if isinstance(entry, str) else entry.get("sampler_options")
    if scales is not None and not any(s >= 1 for s in scales):
        # RandomIoUCrop draws until a crop fits; 1.0, the image as it is, always does.
        raise RecipeError(f"{where}: the sampler_options {scales} of RandomIoUCrop need 1.0, or it may never end.")
    return transform_of(entry, TRANSFORMS, where)


class Augmentation:
    """Applies v2 transforms to samples of `DetectionDataset`: `(sample, generator) -> sample`, for `kd.Augmented`.

    Boxes are clipped to the image; those that are left with a side of less than one pixel are removed with their labels
    and areas. `area` shrinks and grows as the box does, `size` is the new image's.

    Args:
        transforms: of torchvision.transforms.v2, of an image and its boxes. None may remove or reorder boxes.

    Raises:
        TaskkdError: the sample is of a dataset for evaluation, with boxes to ignore.
    """

    def __init__(self, transforms: Sequence[Any]) -> None:
        self.transforms = list(transforms)

    def __call__(self, sample: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        from torchvision import tv_tensors

        target = sample["targets"]
        if "ignored_boxes" in target:
            raise TaskkdError("augmentation moves the boxes that are trained on: use a dataset without `ignored=True`.")
        size = tuple(sample["images"].shape[-2:])
        image = tv_tensors.Image(sample["images"])
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        with drawn_from(generator):
            for transform in self.transforms:
                if len(boxes) or type(transform).__name__ != "RandomIoUCrop":  # which looks for a box to crop to
                    image, boxes = transform(image, boxes)
        plain = image.as_subclass(Tensor)
        return {**sample, "images": plain, "targets": _targets(target, boxes.as_subclass(Tensor), plain)}


def _targets(target: Mapping[str, Any], boxes: Tensor, image: Tensor) -> dict[str, Any]:
    """The targets of the boxes that are still there."""
    height, width = image.shape[-2:]
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    sides, before = boxes[:, 2:] - boxes[:, :2], target["boxes"]
    was = before[:, 2:] - before[:, :2]
    kept = ((sides > 0) & ((sides >= 1) | (was < 1))).all(1)  # those that were smaller before stay
    changed = {**target, "boxes": boxes[kept]}
    changed |= {name: target[name][kept] for name in OF_BOXES if name in target}
    if "area" in target:
        changed["area"] = (target["area"] * sides.prod(1) / was.prod(1))[kept]
    if "size" in target:
        changed["size"] = torch.tensor([height, width])
    return changed
