"""Speed of reading faces: RecordIO files, and verification.

    python -m benchmarks.face_records [--records N] [--lines N] [--json FILE]

    index      lines a second of a text index, parsed once; later it is read from the .npy beside it
    unpack     records a second, in order and at random (pages cached). Bar 20,000.
    decode     images of 112x112 a second, unpacked and decoded (JPEG, Pillow)

One thread, wall time, the best of three. Exits 1 if a bar is missed. Ten folds of verification are in `face.py`.
"""

from __future__ import annotations

import io
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.figures import Figure, Options, Part, parser, run
from taskkd.face.recordio import RecordFile, _parsed, read_recordio
from taskkd.face.records import image_of

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


def rates(records: int, lines: int, options: Options) -> list[Figure]:
    """Of a file of so many records, and an index of so many lines."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), records)
        file, faces = RecordFile(path), read_recordio(path)
        order = np.random.default_rng(0).permutation(records).tolist()
        few = order[: 100 if options.quick else 2000]
        in_order = rate(records, lambda: [file.image(n) for n in range(records)])
        at_random = rate(records, lambda: [file.image(n) for n in order])
        decoded = rate(len(few), lambda: [image_of(faces, n) for n in few])
        index = path.with_suffix(".idx")
        index.write_text("".join(f"{n}\t{4012 * n}\n" for n in range(lines)))
        parsed = rate(lines, lambda: _parsed(index))
    return [
        Figure("lines of a text index, parsed", parsed, unit="a second"),
        Figure("records unpacked, in order", in_order, unit="a second", at_least=20_000),
        Figure("records unpacked, at random", at_random, unit="a second", at_least=20_000),
        Figure("images of 112 x 112 unpacked and decoded", decoded, unit="a second"),
    ]


def parts(records: int = 20_000, lines: int = 300_000) -> dict[str, Part]:
    """Of files of these sizes."""
    return {
        "records": Part(f"a file of {records:,} records, an index of {lines:,} lines", partial(rates, records, lines))
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a bar is missed."""
    command = parser(__doc__, parts())
    command.add_argument("--records", type=int, default=20_000)
    command.add_argument("--lines", type=int, default=300_000)
    given = command.parse_args(arguments)
    return run(parts(given.records, given.lines), given)


if __name__ == "__main__":
    sys.exit(main())
