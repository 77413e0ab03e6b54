"""Procedural identities: drawn faces that are nobody's, to try methods on without any data.

An identity is a point of a 24-dimensional cube: shape and colours of head, hair, eyes, brows, nose and mouth. An image
of it is drawn under a rotation, shift, shear and scale, a light from one side, and noise; a hard one under stronger
ones, at a low resolution. Telling identities apart takes what face recognition takes: to see past the nuisances.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LATENT", "drawn_faces"]

LATENT = 24
Array = NDArray[Any]


def drawn_faces(
    identities: int, images: int, *, hard: float = 0.0, seed: int = 0, first: int = 0, size: int = 24
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Faces of some identities.

    Args:
        identities: how many.
        images: of each.
        hard: 0 to 1: how strong the nuisances are, and how low the resolution.
        seed: of the nuisances. The identities are the same for every seed.
        first: number of the first identity: identity n looks the same wherever it is asked for.
        size: of the square images, in pixels.

    Returns:
        (N, 3, size, size) uint8 RGB, identity by identity, and (N,) the identities' numbers from `first` on.
    """
    latent = np.stack([np.random.default_rng(977 + first + n).uniform(-1, 1, LATENT) for n in range(identities)])
    labels = np.repeat(np.arange(first, first + identities), images)
    rng = np.random.default_rng([seed, first, round(1000 * hard)])
    z = np.repeat(latent, images, axis=0).astype(np.float32)
    parts = [_draw(part, hard, size, rng) for part in np.array_split(z, max(1, len(z) // 500))]
    return np.concatenate(parts), labels.astype(np.int64)


def _soft(x: Array, sharpness: float) -> Array:
    """1 where x is positive, 0 where it is negative, smooth between."""
    covered: Array = 1 / (1 + np.exp(-np.clip(sharpness * x, -30, 30)))
    return covered


def _draw(z: Array, hard: float, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    n = len(z)

    def draw(spread: float) -> Array:
        drawn: Array = rng.uniform(-spread, spread, (n, 1, 1)).astype(np.float32)
        return drawn

    def of(index: int, low: float, high: float) -> Array:
        """A trait of the identity."""
        return (low + (high - low) * (z[:, index] + 1) / 2)[:, None, None]

    def colour(index: int, centre: tuple[float, float, float], spread: float) -> Array:
        chosen: Array = np.array(centre, np.float32) + spread * z[:, index : index + 3]
        return chosen

    strength = 1 + 1.2 * hard
    x, y = _moved(size, draw(0.25 * strength), draw(0.12 * strength), draw(0.12 * strength), draw(0.15 * strength),
                  1 + draw(0.1 * strength))  # fmt: skip
    edge = size / 2.0
    head = 1 - (x / of(0, 0.55, 0.8)) ** 2 - (y / of(1, 0.75, 0.95)) ** 2
    eye_y, eye_x = of(2, -0.25, -0.02), of(3, 0.22, 0.38)
    eyes = 1 - ((np.abs(x) - eye_x) / of(4, 0.08, 0.17)) ** 2 - ((y - eye_y) / of(5, 0.05, 0.12)) ** 2
    brow_y = eye_y - of(6, 0.15, 0.28)
    brows = of(7, 0.03, 0.09) - np.abs(y - brow_y - of(8, -0.3, 0.3) * (np.abs(x) - eye_x))
    brows = np.minimum(brows, 0.16 - np.abs(np.abs(x) - eye_x))
    mouth_y = of(9, 0.4, 0.62)
    mouth = 1 - (x / of(10, 0.14, 0.36)) ** 2 - ((y - mouth_y - of(11, -0.4, 0.4) * x**2) / of(12, 0.04, 0.11)) ** 2
    nose = 1 - (x / of(13, 0.05, 0.13)) ** 2 - ((y - 0.15) / of(14, 0.1, 0.26)) ** 2
    hair = of(15, -0.65, -0.3) - y + 0.25 * z[:, 16, None, None] * x

    skin, hairs = colour(17, (0.72, 0.56, 0.46), 0.07), colour(20, (0.35, 0.27, 0.2), 0.1)
    image: Array = np.broadcast_to(0.5 + draw(0.35)[:, None], (n, 3, size, size)).astype(np.float32)  # what is behind
    lips, eye_colour = of(23, 0.5, 0.85)[:, 0], np.float32(0.12)
    layers = (
        (_soft(head, edge / 2), skin),
        (_soft(nose, edge / 4) * 0.6, skin * 0.75),
        (_soft(eyes, edge / 4), np.broadcast_to(eye_colour, skin.shape)),
        (_soft(brows, edge * 2) * _soft(head, edge / 2), hairs * 0.8),
        (_soft(mouth, edge / 4), np.concatenate([lips, lips * 0.45, lips * 0.5], 1)),
        (_soft(hair, edge) * _soft(head + 0.15, edge / 2), hairs),
    )
    for cover, paint in layers:
        image = image + cover[:, None] * (paint[:, :, None, None] - image)
    light = 1 + draw(0.25 * strength) + draw(0.3 * strength) * x + draw(0.2 * strength) * y
    image = image * light[:, None]
    if hard > 0:
        image = _coarse(image, rng.uniform(1 - 0.65 * hard, 1 - 0.3 * hard, n), size)
    image = image + rng.normal(0, 0.04 * strength, image.shape).astype(np.float32)
    return (255 * np.clip(image, 0, 1)).round().astype(np.uint8)


def _moved(size: int, angle: Array, dx: Array, dy: Array, shear: Array, scale: Array) -> tuple[Array, Array]:
    """The coordinates, in -1..1, of every image's pixels in the face's own frame."""
    line = np.linspace(-1, 1, size, dtype=np.float32)
    x: Array = line[None, None, :] - dx
    y: Array = line[None, :, None] - dy
    x, y = (np.cos(angle) * x + np.sin(angle) * y) / scale, (np.cos(angle) * y - np.sin(angle) * x) / scale
    return x + shear * y, y


def _coarse(images: Array, shares: NDArray[np.float64], size: int) -> Array:
    """Each image at a share of its resolution (bilinear), brought back to its size."""
    import torch
    from torch.nn import functional as F

    found: Array = np.empty_like(images)
    sizes = np.clip((shares * size).round().astype(int), 4, size)
    for own in np.unique(sizes):
        rows = np.flatnonzero(sizes == own)
        small = F.interpolate(torch.from_numpy(images[rows]), size=(int(own),) * 2, mode="area")
        found[rows] = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False).numpy()
    return found
