"""Files of faces that tests make."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parent / "data"


def png(seed: int, height: int = 8, width: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def folder_of(root: Path, counts: dict[str, int], height: int = 8, width: int = 8) -> Path:
    """`root/name/0000.png` and so on: so many images of each name."""
    for person, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number:04d}.png").write_bytes(png(100 * person + number, height, width))
    return root


def record(payload: bytes) -> bytes:
    return struct.pack("<II", 0xCED7230A, len(payload)) + payload + b"\0" * (-len(payload) % 4)


def labelled(labels: float | Sequence[float], image: bytes = b"") -> bytes:
    if isinstance(labels, float | int):
        return struct.pack("<IfQQ", 0, labels, 0, 0) + image
    return struct.pack(f"<IfQQ{len(labels)}f", len(labels), 0.0, 0, 0, *labels) + image


def rec_of(folder: Path, payloads: Sequence[bytes], keys: Sequence[int] | None = None) -> Path:
    """train.rec and train.idx of payloads."""
    folder.mkdir(parents=True, exist_ok=True)
    content, lines = b"", []
    for key, payload in zip(keys or range(len(payloads)), payloads, strict=True):
        lines.append(f"{key}\t{len(content)}\n")
        content += record(payload)
    (folder / "train.rec").write_bytes(content)
    (folder / "train.idx").write_text("".join(lines))
    return folder / "train.rec"


def insight(labels: Sequence[int], spans: Sequence[tuple[int, int]] | None = None) -> list[bytes]:
    """The payloads of an InsightFace file of images with these labels, in order."""
    if spans is None:
        found = sorted(set(labels), key=list(labels).index)
        spans = [(1 + list(labels).index(v), 1 + len(labels) - list(labels)[::-1].index(v)) for v in found]
    images = [labelled([float(label), 0.0], png(n)) for n, label in enumerate(labels)]
    head = labelled([len(labels) + 1.0, len(labels) + 1.0 + len(spans)])
    return [head, *images, *(labelled([float(a), float(b)]) for a, b in spans)]
