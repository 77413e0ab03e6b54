"""Drawn people on disk, in the layouts that users have, and models so small that they train in a second."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from taskkd.face.procedural import drawn_faces

SIZE = 16
NET: dict[str, Any] = {"architecture": "iresnet18", "layers": [1, 1], "width": 4, "embedding_size": 8, "size": SIZE}
LARGE: dict[str, Any] = {**NET, "width": 8}


def images(identities: int, each: int, *, first: int = 0, size: int = SIZE, seed: int = 0) -> list[list[np.ndarray]]:
    """(size, size, 3) uint8 by identity."""
    pixels, _ = drawn_faces(identities, each, first=first, size=size, seed=seed)
    grouped = pixels.transpose(0, 2, 3, 1).reshape(identities, each, size, size, 3)
    return [list(person) for person in grouped]


def folder(root: Path, identities: int, each: int, *, first: int = 0, size: int = SIZE, flat: bool = False) -> Path:
    """`root/p000/p000_0001.png` and so on, as LFW names them; `flat`: without the folders."""
    for person, pictures in enumerate(images(identities, each, first=first, size=size), first):
        own = root if flat else root / f"p{person:03}"
        own.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures, 1):
            Image.fromarray(picture).save(own / f"p{person:03}_{number:04}.png")
    return root


def encoded(picture: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def couples(people: list[list[np.ndarray]], folds: int = 10) -> tuple[list[bytes], list[bool]]:
    """In each fold a pair of one person and one of two, as a verification set has them."""
    files, same = [], []
    for fold in range(folds):
        one, other = people[fold % len(people)], people[(fold + 1) % len(people)]
        files += [encoded(p) for p in (one[0], one[1], one[fold % 2], other[0])]
        same += [True, False]
    return files, same


def bin_file(path: Path, *, first: int = 0, folds: int = 10) -> Path:
    """A verification set as InsightFace's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(couples(images(5, 2, first=first), folds), protocol=2))
    return path


def lfw_list(path: Path, root: Path, folds: int = 10) -> Path:
    """A list of pairs of a folder of people, as LFW's pairs.txt."""
    names = sorted(p.name for p in root.iterdir())
    lines = [str(folds)]
    for fold in range(folds):
        one, other = names[fold % len(names)], names[(fold + 1) % len(names)]
        lines += [f"{one}\t1\t2", f"{one}\t1\t{other}\t2"]
    path.write_text("\n".join(lines) + "\n")
    return path
