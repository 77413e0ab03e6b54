"""The files of a teacher's cache: how rows are written, and read again without holding them in memory."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from taskkd.errors import CacheError
from taskkd.files import file_sha256, write_whole

__all__ = ["Files", "Rows", "Writer", "input_hashes", "load_file", "sized", "token_mask"]


#: so many ids are held in a set while a cache is built
RECENT = 2**16


class Files:
    """The files that were read last, open; a process may not have as many open as a large cache has."""

    def __init__(self, most: int = 256) -> None:
        self.most = most
        self.open: OrderedDict[Path, Any] = OrderedDict()

    def number(self, path: Path) -> int:
        """The descriptor of a file."""
        file = self.open.pop(path, None) or path.open("rb", buffering=0)
        self.open[path] = file
        while len(self.open) > self.most:
            self.open.popitem(last=False)[1].close()
        found: int = file.fileno()
        return found


class Rows:
    """The rows of a .npy file, read from it when they are asked for.

    In a memory map every row that was ever read, and its neighbours, would count as resident memory: soon all.
    """

    def __init__(self, path: Path, files: Files) -> None:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        self.dtype, self.shape, self._start = mapped.dtype, mapped.shape, mapped.offset
        self._size = self.dtype.itemsize * math.prod(self.shape[1:])
        self._path, self._files = path, files

    def __getitem__(self, key: int | slice) -> NDArray[Any]:
        start, stop = (key.start, key.stop) if isinstance(key, slice) else (key, key + 1)
        # At a place of its own choice: workers of a loader share the file and its position.
        number = self._files.number(self._path)
        data = os.pread(number, int(stop - start) * self._size, int(self._start + start * self._size))
        rows = np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:])
        return rows if isinstance(key, slice) else rows[0]


def load_file(path: Path, files: Files) -> Any:
    """A file of a shard: values stay on disk; ids, hashes and offsets, a few bytes a sample, are read."""
    values = path.name.startswith("tap-") and not path.name.endswith(".offsets.npy")
    return Rows(path, files) if values else np.load(path, allow_pickle=False)


class Writer:
    """Collects rows and writes shards.

    Args:
        path: the cache folder.
        index: what `index.json` holds; new shards are added to it.
        dtype: of the numbers on disk.

    Raises:
        CacheError: a value is not finite in this dtype, or an id occurs twice.
    """

    def __init__(self, path: Path, index: dict[str, Any], dtype: str) -> None:
        self.path, self.index, self.dtype = path, index, np.dtype(dtype)
        # A set of a million numbers takes 60 MB, a sorted array 8: only those that came last are in a set.
        written = [np.load(path / s["name"] / "ids.npy", allow_pickle=False) for s in index["shards"]]
        self._sorted: NDArray[np.int64] = np.sort(np.concatenate([np.empty(0, np.int64), *written]))
        self._recent: set[int] = set()
        self._reset()

    def _note(self, sample: int) -> None:
        """Take note of an id.

        Raises:
            CacheError: it occurred before.
        """
        place = int(np.searchsorted(self._sorted, sample))
        if sample in self._recent or (place < len(self._sorted) and self._sorted[place] == sample):
            raise CacheError(f"sample id {sample} occurs twice in the data; ids must be unique.")
        self._recent.add(sample)
        if len(self._recent) >= RECENT:
            self._sorted = np.sort(np.concatenate([self._sorted, np.array(list(self._recent), np.int64)]))
            self._recent.clear()

    def _reset(self) -> None:
        self.rows = self.bytes = 0
        self.ids: list[int] = []
        self.hashes: list[int] = []
        self.values: dict[str, list[NDArray[Any]]] = {t: [] for t in self.index["taps"]}

    def bytes_per_sample(self, lengths: Sequence[int] | NDArray[np.int32]) -> float:
        """The mean over samples of these numbers of tokens."""
        tokens = np.array(lengths, float)
        numbers = 0.0
        for about in self.index["taps"].values():
            fixed = math.prod(size for d, size in enumerate(about["shape"]) if d not in about["ragged"])
            numbers += fixed * float((tokens ** len(about["ragged"])).mean())
        return 16 + numbers * self.dtype.itemsize

    def add(
        self, ids: NDArray[np.int64], fresh: NDArray[np.bool_], values: Mapping[str, Tensor], inputs: Mapping[str, Any]
    ) -> None:
        """Collect those samples of a batch that are fresh; values, (samples, ...), are kept without padding.

        Raises:
            CacheError: see the class.
        """
        digests = input_hashes(inputs, len(ids))
        mask = token_mask(inputs)
        arrays = {t: values[t].detach().float().cpu().numpy().astype(self.dtype) for t in self.index["taps"]}
        for tap, array in arrays.items():
            if not np.isfinite(array).all():
                raise CacheError(
                    f"tap {tap!r} of the teacher is not finite as {self.dtype} for some of the samples {ids.tolist()}."
                )
        for i in np.flatnonzero(fresh):
            self._note(int(ids[i]))
            self.ids.append(int(ids[i]))
            self.hashes.append(digests[i])
            for tap, array in arrays.items():
                row, ragged = array[i], self.index["taps"][tap]["ragged"]
                for dimension in ragged:
                    row = row if mask is None else np.compress(mask[i], row, axis=dimension)
                self.values[tap].append(row.reshape(-1) if ragged else row)
                self.bytes += row.nbytes
            self.rows += 1

    def flush(self) -> None:
        """Write what was collected as a shard, beside, and rename it; then the index."""
        if not self.rows:
            return
        name = f"shard-{len(self.index['shards']):05d}"
        staging = self.path / f"{name}.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        np.save(staging / "ids.npy", np.array(self.ids, np.int64))
        np.save(staging / "hashes.npy", np.array(self.hashes, np.uint64))
        for number, (tap, rows) in enumerate(self.values.items()):
            if self.index["taps"][tap]["ragged"]:
                np.save(staging / f"tap-{number}.offsets.npy", np.cumsum([0, *(len(r) for r in rows)]))
                np.save(staging / f"tap-{number}.npy", np.concatenate(rows))
            else:
                np.save(staging / f"tap-{number}.npy", np.stack(rows))
        files = {f.name: file_sha256(f) for f in sorted(staging.iterdir())}
        shutil.rmtree(self.path / name, ignore_errors=True)
        staging.replace(self.path / name)
        self.index["shards"].append({"name": name, "rows": self.rows, "files": files})
        write_whole(self.path / "index.json", json.dumps(self.index, indent=1))
        self._reset()


def sized(about: Mapping[str, Any], length: Any) -> tuple[Any, ...]:
    """The shape of a sample of so many tokens."""
    return tuple(length if d in about["ragged"] else size for d, size in enumerate(about["shape"]))


def token_mask(inputs: Mapping[str, Any]) -> NDArray[np.bool_] | None:
    """The attention mask (samples, tokens) of a teacher's inputs; None: they have none."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim < 2:
        return None
    array: NDArray[np.bool_] = mask.detach().cpu().numpy().astype(bool)
    return array


def input_hashes(inputs: Mapping[str, Any], count: int) -> list[int]:
    """A 64-bit hash of each sample's unpadded teacher input."""
    mask = token_mask(inputs)
    columns: list[tuple[str, Any, bool]] = []
    for name in sorted(inputs):
        value = inputs[name]
        if isinstance(value, Tensor):
            array = value.detach().cpu()
            array = array.float() if array.dtype == torch.bfloat16 else array
            columns.append((name, array.numpy(), mask is not None and array.shape[: mask.ndim] == mask.shape))
        elif isinstance(value, list | tuple) and len(value) == count:
            columns.append((name, [v.detach().cpu().numpy() if isinstance(v, Tensor) else v for v in value], False))
    digests = []
    for i in range(count):
        digest = xxhash.xxh3_64()
        for name, column, padded in columns:
            row = column[i]
            if padded and mask is not None:
                row = row[mask[i]]
            digest.update(name.encode())
            digest.update(
                np.ascontiguousarray(row).tobytes() if isinstance(row, np.ndarray | np.generic) else repr(row).encode()
            )
        digests.append(digest.intdigest())
    return digests
