"""Faces aligned by five landmarks, as those that nearly all models are trained on (ArcFace, Deng et al. 2019)."""

from __future__ import annotations

from typing import Any, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from taskkd.errors import DataError

__all__ = ["TEMPLATE", "norm_crop", "similarity_transform", "template"]

Array: TypeAlias = NDArray[Any]
#: (x, y) of the eyes, the nose and the corners of the mouth in a crop of 112x112 pixels, the left ones first
TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
#: parts of a pixel to which positions are rounded, as OpenCV's warpAffine does
STEPS = 32


def template(size: int = 112) -> Array:
    """(5, 2) float64: where landmarks are in a crop of `size` pixels.

    Multiples of 128 show more on the left and right: the width of 112 is that of 112 of 128 pixels, as InsightFace has
    it. All other sizes are the one of 112 scaled.

    Raises:
        DataError: the size is not positive.
    """
    if size < 1:
        raise DataError(f"a crop of {size} pixels: expected a positive size.")
    wide = size % 128 == 0 and size % 112 != 0
    scale = size / (128 if wide else 112)
    points: Array = np.asarray(TEMPLATE) * scale + np.asarray([8.0 * scale if wide else 0.0, 0.0])
    return points


def similarity_transform(points: ArrayLike, size: int = 112, *, target: ArrayLike | None = None) -> Array:
    """The rotation, scale and shift that brings landmarks nearest to the template in least squares (Umeyama 1991).

    It never mirrors.

    Args:
        points: (5, 2) of (x, y) in the image: the eyes, the nose and the corners of the mouth, those that are left in
            the image first.
        size: of the crop.
        target: other points than those of `template(size)`, as many as `points`.

    Returns:
        (2, 3) float64 M: a point p of the image is at `M[:, :2] @ p + M[:, 2]` in the crop.

    Raises:
        DataError: another shape, a number that is not finite, or all points are one.
    """
    goal = template(size) if target is None else np.asarray(target, dtype=np.float64)
    given = np.asarray(points, dtype=np.float64)
    if given.shape != goal.shape or given.ndim != 2 or given.shape[1] != 2 or not np.isfinite(given).all():
        raise DataError(f"landmarks {given.shape}: expected {goal.shape} finite numbers, (x, y) of each point.")
    centre, centre_of_goal = given.mean(0), goal.mean(0)
    moved = given - centre
    spread = (moved**2).sum() / len(given)
    if spread <= np.finfo(np.float64).tiny:
        raise DataError(f"all {len(given)} landmarks are at {tuple(given[0].tolist())}: they give no scale.")
    left, sizes, right = np.linalg.svd((goal - centre_of_goal).T @ moved / len(given))
    sign = np.asarray([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right)) or 1.0])
    turn = (left * sign) @ right * ((sizes * sign).sum() / spread)
    return np.concatenate([turn, (centre_of_goal - turn @ centre)[:, None]], 1)


@overload
def norm_crop(image: Tensor, points: ArrayLike, size: int = 112) -> Tensor: ...
@overload
def norm_crop(image: Array, points: ArrayLike, size: int = 112) -> Array: ...
def norm_crop(image: Tensor | Array, points: ArrayLike, size: int = 112) -> Tensor | Array:
    """The aligned crop of a face: bilinear, black outside of the image, as OpenCV's warpAffine within rounding.

    Args:
        image: (3, H, W) uint8 tensor, or (H, W, 3) uint8 array.
        points: (5, 2), see `similarity_transform`; from any detector.
        size: of the crop in pixels.

    Returns:
        (3, size, size) uint8 tensor, or (size, size, 3) uint8 array.

    Raises:
        DataError: as `similarity_transform`, or the image is of another shape or kind.
    """
    pixels = (
        image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) and image.ndim == 3 else np.asarray(image)
    )
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise DataError(
            f"an image {tuple(image.shape)} of {image.dtype}: expected (3, H, W) uint8 (an array (H, W, 3))."
        )
    crop = _warped(pixels, similarity_transform(points, size), size)
    return torch.from_numpy(crop).permute(2, 0, 1).contiguous() if isinstance(image, Tensor) else crop


def _warped(pixels: Array, matrix: Array, size: int) -> Array:
    """(size, size, C) uint8."""
    back = np.linalg.inv(matrix[:, :2])
    y, x = np.mgrid[0:size, 0:size]
    at = np.stack([x - matrix[0, 2], y - matrix[1, 2]], -1) @ back.T
    steps = np.floor(at * STEPS + 0.5).clip(-(1 << 40), 1 << 40).astype(np.int64)
    whole, part = steps // STEPS, (steps % STEPS) / STEPS
    crop = np.zeros((size, size, pixels.shape[2]))
    for down in (0, 1):
        for right in (0, 1):
            row, column = whole[..., 1] + down, whole[..., 0] + right
            inside = (row >= 0) & (row < pixels.shape[0]) & (column >= 0) & (column < pixels.shape[1])
            weight = np.abs(1 - down - part[..., 1]) * np.abs(1 - right - part[..., 0]) * inside
            crop += weight[..., None] * pixels[row.clip(0, pixels.shape[0] - 1), column.clip(0, pixels.shape[1] - 1)]
    found: Array = np.floor(crop + 0.5).astype(np.uint8)
    return found
