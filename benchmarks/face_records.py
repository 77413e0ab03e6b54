"""Speed of reading faces: RecordIO files, and verification.

    python benchmarks/face_records.py [--records N] [--lines N]

    index      lines a second of a text index, parsed once; later it is read from the .npy beside it
    unpack     records a second, in order and at random (pages cached). Bar 20,000.
    decode     images of 112x112 a second, unpacked and decoded (JPEG, Pillow)
    verify     ten folds of 6000 pairs, in milliseconds. Bar 100.

One thread. Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import io
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from taskkd.face.recordio import RecordFile, read_recordio
from taskkd.face.records import image_of
from taskkd.face.verification import verify

MAGIC = 0xCED7230A


def jpeg(seed: int) -> bytes:
    """A smooth picture of 112x112, of some 4 kB as faces are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(coarse).resize((112, 112), Image.Resampling.BICUBIC).save(content, "JPEG", quality=92)
    return content.getvalue()


def write(folder: Path, count: int) -> Path:
    """A .rec file of so many records, as im2rec writes it."""
    images, lines, at = [jpeg(seed) for seed in range(64)], [], 0
    with (folder / "train.rec").open("wb") as file:
        for key in range(count):
            payload = struct.pack("<IfQQ", 0, key // 50, key, 0) + images[key % 64]
            lines.append(f"{key}\t{at}\n")
            at += file.write(struct.pack("<II", MAGIC, len(payload)) + payload + b"\0" * (-len(payload) % 4))
    (folder / "train.idx").write_text("".join(lines))
    return folder / "train.rec"


def rate(count: int, work: Callable[[], object]) -> float:
    """The best of three, a second."""
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        work()
        best = max(best, count / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--lines", type=int, default=1_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), given.records)
        file, faces = RecordFile(path), read_recordio(path)
        order = np.random.default_rng(0).permutation(given.records).tolist()
        in_order = rate(given.records, lambda: [file.image(n) for n in range(given.records)])
        at_random = rate(given.records, lambda: [file.image(n) for n in order])
        decoded = rate(2000, lambda: [image_of(faces, n) for n in order[:2000]])
        index = path.with_suffix(".idx")
        index.write_text("".join(f"{n}\t{4012 * n}\n" for n in range(given.lines)))
        from taskkd.face.recordio import _parsed

        lines = rate(given.lines, lambda: _parsed(index))
    distances = np.random.default_rng(0).uniform(0, 4, 6000)
    took = 1000 / rate(1, lambda: verify(distances, distances < 1.2))
    print(f"index   {lines:12,.0f} lines/s")
    print(f"unpack  {in_order:12,.0f} records/s in order, {at_random:,.0f} at random")
    print(f"decode  {decoded:12,.0f} images/s")
    print(f"verify  {took:12.2f} ms for 6000 pairs")
    sys.exit(min(in_order, at_random) < 20_000 or took > 100)


if __name__ == "__main__":
    main()
