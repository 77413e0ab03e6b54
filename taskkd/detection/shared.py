"""What both networks of a pair of detectors see: the batch as the student's own `transform` made it, once.

torchvision's detectors resize inside the model, in train mode to a size that is drawn at random; a teacher that did so
again would see other pixels and give maps of other sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import TapError

__all__ = ["Normalisation", "SharedImages", "inside_images", "renormalised"]


@dataclass(frozen=True)
class SharedImages:
    """A batch of images with their ground truth, in the pixels that the networks see.

    Args:
        tensors: (batch, 3, height, width), normalised as the student wants it, zero where padded.
        sizes: (height, width) of each image without padding.
        boxes: of each image (n, 4), x1 y1 x2 y2 in pixels of `tensors`; n may be 0.
        labels: of each image (n,), 1 to the number of classes; 0 is background.
    """

    tensors: Tensor
    sizes: list[tuple[int, int]]
    boxes: list[Tensor]
    labels: list[Tensor]

    @classmethod
    def of(cls, transformed: Any) -> SharedImages:
        """From what torchvision's `GeneralizedRCNNTransform` returns.

        Raises:
            TapError: it is something else, or there were no targets.
        """
        try:
            images, targets = transformed
            tensors, sizes = images.tensors, [(int(h), int(w)) for h, w in images.image_sizes]
        except (TypeError, ValueError, AttributeError):
            raise TapError(
                "the student's `transform` gave no (images, targets) as torchvision's does; "
                f"it gave a {type(transformed).__name__}."
            ) from None
        if targets is None:
            raise TapError("the batch has no `targets`: detectors are distilled on images with their boxes.")
        return cls(tensors, sizes, [t["boxes"] for t in targets], [t["labels"] for t in targets])

    def scaled(self, factor: float) -> SharedImages:
        """The same images larger or smaller (bilinear), height and width a multiple of 32; boxes go along.

        Args:
            factor: of height and width.
        """
        if factor == 1:
            return self
        height, width = self.tensors.shape[2:]
        size = [max(32, round(x * factor / 32) * 32) for x in (height, width)]
        fy, fx = size[0] / height, size[1] / width
        tensors = F.interpolate(self.tensors, size=size, mode="bilinear", align_corners=False, antialias=factor < 1)
        by = self.tensors.new_tensor([fx, fy, fx, fy])
        sizes = [(round(h * fy), round(w * fx)) for h, w in self.sizes]
        return SharedImages(tensors, sizes, [b * by.to(b.dtype) for b in self.boxes], self.labels)

    def inside(self) -> Tensor:
        """(batch, 1, height, width), True where there is image, False where it is padded."""
        return inside_images(self.tensors, self.sizes)[:, None]


def inside_images(tensors: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """(batch, height, width), True where there is image, False where the batch is padded.

    Args:
        tensors: (batch, channels, height, width).
        sizes: (height, width) of each image without padding.
    """
    height, width = tensors.shape[2:]
    known = torch.tensor(sizes, device=tensors.device)
    rows = torch.arange(height, device=known.device) < known[:, :1]
    columns = torch.arange(width, device=known.device) < known[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of the channels that a detector subtracts and divides by."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, transform: Any) -> Normalisation | None:
        """That of a detector's `transform`; None where it says nothing."""
        mean, std = getattr(transform, "image_mean", None), getattr(transform, "image_std", None)
        return cls(tuple(map(float, mean)), tuple(map(float, std))) if mean and std else None


def renormalised(images: SharedImages, student: Normalisation | None, teacher: Normalisation | None) -> Tensor:
    """The shared images as the teacher wants them normalised, (batch, 3, height, width); padding stays zero.

    Args:
        images: normalised as the student wants them.
        student, teacher: None or equal: nothing is to be done.
    """
    if student is None or teacher is None or student == teacher:
        return images.tensors
    like, shape = images.tensors, (1, -1, 1, 1)
    own_mean, own_std, mean, std = (
        like.new_tensor(values).reshape(shape) for values in (student.mean, student.std, teacher.mean, teacher.std)
    )
    return (like * (own_std / std) + (own_mean - mean) / std) * images.inside()
