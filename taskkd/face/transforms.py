"""Augmentation beyond flips: crops, low resolution and colours, as AdaFace has them, and torchvision's v2 transforms.

`Augmented(FaceDataset(faces), build(["RandomHorizontalFlip", "RandomRegion", "RandomLowResolution", "RandomLight"]))`
augments a sample in the same way in any worker, before and after an interruption. It has no `views`: there is no end of
them, so that no cache can hold a teacher's embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taskkd.augmentation import drawn_from, transform_of
from taskkd.errors import DataError

__all__ = ["OWN", "TRANSFORMS", "Augmentation", "RandomLight", "RandomLowResolution", "RandomRegion", "build"]

#: the names that a recipe may use beside `OWN`: torchvision's that leave a face a face
TRANSFORMS = (
    "RandomHorizontalFlip",
    "RandomCrop",
    "RandomResizedCrop",
    "CenterCrop",
    "Resize",
    "Pad",
    "RandomRotation",
    "RandomAffine",
    "RandomPerspective",
    "RandomErasing",
    "RandomPhotometricDistort",
    "ColorJitter",
    "RandomGrayscale",
    "RandomAdjustSharpness",
    "RandomAutocontrast",
    "GaussianBlur",
    "GaussianNoise",
    "JPEG",
)


def _chance(p: float, what: str) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"{what} is {p}, expected 0 to 1")
    return float(p)


def _between(span: Sequence[float], what: str) -> tuple[float, float]:
    low, high = (float(v) for v in span)
    if not 0 < low <= high <= 1:
        raise ValueError(f"{what} is {list(span)}, expected two numbers in 0..1, the smaller first")
    return low, high


class RandomRegion:
    """Keep a part of the image where it is, and make the rest black (AdaFace, Kim et al. 2022: its random crop).

    Args:
        p: chance.
        scale: of the part's area.
        ratio: of the part's width to its height.
    """

    def __init__(
        self, p: float = 0.2, scale: Sequence[float] = (0.2, 1.0), ratio: Sequence[float] = (0.75, 4 / 3)
    ) -> None:
        self.p, self.scale = _chance(p, "p"), _between(scale, "scale")
        self.ratio = [float(v) for v in ratio]

    def __call__(self, image: Any) -> Any:
        from torchvision.transforms.v2 import RandomResizedCrop

        if float(torch.rand(())) >= self.p:
            return image
        top, left, height, width = RandomResizedCrop.get_params(image, list(self.scale), self.ratio)
        kept = torch.zeros_like(image)
        kept[..., top : top + height, left : left + width] = image[..., top : top + height, left : left + width]
        return kept


class RandomLowResolution:
    """Make the image smaller, and as large as it was again (AdaFace, Kim et al. 2022).

    Args:
        p: chance.
        scale: of the sides.
    """

    def __init__(self, p: float = 0.2, scale: Sequence[float] = (0.2, 1.0)) -> None:
        self.p, self.scale = _chance(p, "p"), _between(scale, "scale")

    def __call__(self, image: Any) -> Any:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        if float(torch.rand(())) >= self.p:
            return image
        low, high = self.scale
        factor = low + (high - low) * float(torch.rand(()))
        modes = (InterpolationMode.NEAREST, InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
        down, up = (modes[int(torch.randint(3, ()))] for _ in range(2))
        sides = [int(side) for side in image.shape[-2:]]
        small = F.resize(image, [max(1, round(side * factor)) for side in sides], down)
        return F.resize(small, sides, up)


class RandomLight:
    """Change brightness, contrast and saturation (AdaFace, Kim et al. 2022).

    Args:
        p: chance.
        strength: factors are from 1 - strength to 1 + strength.
    """

    def __init__(self, p: float = 0.2, strength: float = 0.5) -> None:
        from torchvision.transforms.v2 import ColorJitter

        self.p, self.jitter = _chance(p, "p"), ColorJitter(strength, strength, strength)

    def __call__(self, image: Any) -> Any:
        return image if float(torch.rand(())) >= self.p else self.jitter(image)


#: transforms that torchvision does not have
OWN: dict[str, Any] = {
    "RandomRegion": RandomRegion,
    "RandomLowResolution": RandomLowResolution,
    "RandomLight": RandomLight,
}


def build(config: Sequence[str | Mapping[str, Any]]) -> Augmentation:
    """The augmentation of a recipe.

    Args:
        config: in the order they are applied, names in `TRANSFORMS` and `OWN`, or mappings of `name` and that
            transform's options as torchvision.transforms.v2 has them. No flip is made that is not listed.

    Raises:
        RecipeError: a name or an option is unknown, or a value is refused by the transform.
    """
    return Augmentation(
        [transform_of(entry, TRANSFORMS, f"augmentation {number}", OWN) for number, entry in enumerate(config, 1)]
    )


class Augmentation:
    """Applies v2 transforms to samples of `FaceDataset`: `(sample, generator) -> sample`, for `kd.Augmented`.

    Args:
        transforms: of torchvision.transforms.v2, or callables of one image (3, H, W) uint8, as a tv_tensor.

    Raises:
        DataError: when it is called, a transform cannot do with an image, as a crop with a smaller one; with its file.
    """

    def __init__(self, transforms: Sequence[Any]) -> None:
        self.transforms = list(transforms)

    def __call__(self, sample: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        from torchvision import tv_tensors

        image: Any = tv_tensors.Image(sample["images"])
        with drawn_from(generator):
            for number, transform in enumerate(self.transforms, 1):
                try:
                    image = transform(image)
                except (ValueError, RuntimeError) as error:  # as a crop of a smaller image
                    where = sample.get("file", f"image {int(sample['id']) // 2}")
                    name = type(transform).__name__
                    raise DataError(f"{where}: augmentation {number} ({name}): {str(error).rstrip('.')}.") from None
        plain: Tensor = image.as_subclass(Tensor).contiguous()
        return {**sample, "images": plain}
