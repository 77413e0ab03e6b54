"""Alignment by five landmarks, beside the crops that OpenCV made (acceptance A6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taskkd.errors import DataError
from taskkd.face.alignment import TEMPLATE, norm_crop, similarity_transform, template

CASE = dict(np.load(Path(__file__).parents[1] / "parity" / "cases" / "face" / "align_5pt.npz"))
NUMBERS = range(len(CASE["in_size"]))


def picture(k: int) -> Any:
    """The case's, by its notes."""
    y, x = np.mgrid[:160, :180]
    return np.stack([127 + 100 * np.sin(x / k), 127 + 100 * np.cos(y / 7), (x + y) % 256], -1).astype(np.uint8)


@pytest.mark.parametrize("number", NUMBERS)
def test_equals_the_authors_code(number: int) -> None:
    points, size = CASE["in_landmarks"][number], int(CASE["in_size"][number])
    matrix = similarity_transform(points, size)
    assert np.abs(matrix - CASE["out_M"][number]).max() < 1e-4
    assert np.linalg.det(matrix[:, :2]) > 0
    crop = norm_crop(picture(int(CASE["in_k"][number])), points, size)
    assert crop.shape == (size, size, 3)
    assert np.abs(crop[::4, ::4].astype(int) - CASE[f"out_crop{number}"]).max() <= 2


def test_the_template_by_size() -> None:
    assert template(112) == pytest.approx(np.asarray(TEMPLATE))
    assert template(224) == pytest.approx(2 * np.asarray(TEMPLATE))
    assert template(128) == pytest.approx(np.asarray(TEMPLATE) + np.asarray([8, 0]))
    assert template(256) == pytest.approx(2 * np.asarray(TEMPLATE) + np.asarray([16, 0]))
    assert template(896) == pytest.approx(8 * np.asarray(TEMPLATE))
    assert template(56) == pytest.approx(np.asarray(TEMPLATE) / 2)


def test_landmarks_in_place_change_nothing() -> None:
    image = torch.randint(256, (3, 112, 112), dtype=torch.uint8)
    assert (norm_crop(image, TEMPLATE) == image).all()
    wide = torch.zeros(3, 128, 128, dtype=torch.uint8)
    wide[:, :112, 8:120] = image
    assert (norm_crop(wide, template(128)) == image).all()
    crop = norm_crop(image, np.asarray(TEMPLATE) + np.asarray([30, 0]))
    assert (crop[..., :82] == image[..., 30:]).all()
    assert (crop[..., 82:] == 0).all()


def test_a_known_transform_is_found() -> None:
    angle, scale, shift = 0.7, 1.8, np.asarray([13.0, -40.0])
    turn = scale * np.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (np.asarray(TEMPLATE) - shift) @ np.linalg.inv(turn).T
    matrix = similarity_transform(points)
    assert matrix[:, :2] == pytest.approx(turn)
    assert matrix[:, 2] == pytest.approx(shift)
    mirrored = similarity_transform(np.asarray(TEMPLATE) * [-1, 1])
    assert np.linalg.det(mirrored[:, :2]) > 0
    other = similarity_transform([[0, 0], [1, 0]], target=[[0, 0], [0, 2]])
    assert other == pytest.approx(np.asarray([[0, -2, 0], [2, 0, 0]]), abs=1e-12)


def test_bad_input() -> None:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"landmarks \(4, 2\): expected \(5, 2\)"):
        norm_crop(image, TEMPLATE[:4])
    with pytest.raises(DataError, match="finite numbers"):
        norm_crop(image, np.full((5, 2), np.nan))
    with pytest.raises(DataError, match=r"all 5 landmarks are at \(3.0, 3.0\)"):
        norm_crop(image, np.full((5, 2), 3))
    with pytest.raises(DataError, match="expected a positive size"):
        norm_crop(image, TEMPLATE, 0)
    for wrong in (image[0], image.float(), image[:, :0]):
        with pytest.raises(DataError, match=r"expected \(3, H, W\) uint8"):
            norm_crop(wrong, TEMPLATE)
    assert norm_crop(image, np.asarray(TEMPLATE) * 1e9).sum() == 0  # far outside, nearly one point
