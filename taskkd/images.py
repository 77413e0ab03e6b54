"""Where an image is read from, and how its bytes become a tensor."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from taskkd.errors import DataError

__all__ = ["Source", "decode", "existing_folder", "header_size", "in_file", "in_memory", "named_file"]


@dataclass(frozen=True)
class Source:
    """The bytes of an image file, read when they are asked for.

    Args:
        name: the file, for errors and to tell images apart.
        read: gives the bytes; it travels to the workers of a loader, so it can be pickled.
    """

    name: str
    read: Callable[[], bytes]


def in_file(path: Path) -> Source:
    """An image on disk."""
    return Source(str(path), functools.partial(Path.read_bytes, path))


def in_memory(name: str, content: bytes) -> Source:
    """An image whose bytes are held."""
    return Source(name, functools.partial(bytes, content))


def named_file(path: str | Path, use: str) -> Source:
    """The image file that is named on the command line.

    Args:
        path: of the file.
        use: what it is for, for the error: "detectors predict on image files".

    Raises:
        DataError: there is none.
    """
    if not Path(path).is_file():
        what = f"is a folder; name its images ({path}/*)" if Path(path).is_dir() else "no such file"
        raise DataError(f"{path}: {what}; {use}.")
    return in_file(Path(path))


def existing_folder(path: str | Path) -> Path:
    """A folder.

    Raises:
        DataError: there is none.
    """
    if not Path(path).is_dir():
        raise DataError(f"{path}: no such folder.")
    return Path(path)


def header_size(source: Source, image_id: int) -> tuple[int, int]:
    """(height, width) as the file's header has it, without decoding the pixels.

    Raises:
        DataError: the file is missing or no image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source.read())) as image:
            return image.height, image.width
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others, by format
        raise _unreadable(source, image_id, error) from None


def decode(source: Source, image_id: int) -> Tensor:
    """(3, H, W) uint8: grey becomes three equal channels, 16 bits become 8, alpha is dropped.

    The orientation that EXIF data ask for is not applied: COCO's boxes are in the pixels as they are stored.

    Raises:
        DataError: the file is missing, damaged, cut off, or of floating point numbers.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source.read())) as image:
            if image.mode == "F":
                raise ValueError("its pixels are floating point numbers, expected 8 or 16 bits")
            if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion cuts them off at 255
                grey = (np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8)
                return torch.from_numpy(grey).expand(3, -1, -1).contiguous()
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:
        raise _unreadable(source, image_id, error) from None
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _unreadable(source: Source, image_id: int, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{source.name} (image id {image_id}): no such file.")
    from PIL import UnidentifiedImageError

    # Pillow names the buffer that it was given
    why = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
    return DataError(f"{source.name} (image id {image_id}): the image cannot be read: {why}.")
