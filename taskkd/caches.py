"""`Cached`: a frozen teacher's outputs on disk, read sample by sample, so that later epochs cost no teacher.

Layout of a cache folder: `index.json` (what the cache was built for, shapes, sha256 of every file) and shards
`shard-00000/` with `ids.npy`, `hashes.npy` and for each tap `tap-0.npy`: the rows one below the other, or, where rows
have a length of their own (tokens; tokens by tokens for attention), all their numbers in a line, with
`tap-0.offsets.npy`. A shard is written beside and renamed; an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from taskkd.errors import CacheError
from taskkd.files import file_sha256, human
from taskkd.shards import Files, Writer, input_hashes, load_file, sized, token_mask
from taskkd.taps import parse_tap
from taskkd.teachers import Frozen, first_tensor

__all__ = ["CACHE_KEY", "Cached", "weights_sha256"]

#: the batch entry under which a collator hands over what it looked up
CACHE_KEY = "teacher_cache"
FORMAT = 2
#: a shard is collected in memory: of wide taps it has fewer samples
SHARD_BYTES = 2**28


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of every parameter and buffer, hex.

    With `input_settings`, where the model has any: plain data on how it shows inputs to its network (order of channels,
    mean, size), which no weight tells.
    """
    digest = hashlib.sha256()
    if (settings := getattr(model, "input_settings", None)) is not None:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous()
            digest.update(f"{name} {data.dtype} {tuple(data.shape)};".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _to_device(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_device(v, device) for v in value)
    return value


class Cached:
    """A frozen teacher whose outputs for known samples are read from disk.

    Batches must carry `id` (int64, unique for each sample). Every read compares a 64-bit hash of the unpadded teacher
    input with the one seen when the cache was built: changed data, another tokenizer or random augmentation is an
    error.

    Args:
        teacher: the model, or a `Frozen`.
        path: the cache folder; made by `build`.
        dtype: "float32" (cached equals live to rounding of the batch) or "float16" (half the size, 1e-3).
        preprocessing: anything JSON can hold that describes how inputs are made (tokenizer, max length, transforms);
            part of the key.
        shard_size: samples in a shard, at most; a shard of 256 MB is closed before.
        budget: largest size in bytes that may be built; None: what the disk has.

    Raises:
        CacheError: the cache at `path` was built for something else, or a file of it is damaged.
    """

    def __init__(
        self,
        teacher: nn.Module | Frozen,
        path: str | Path,
        *,
        dtype: Literal["float32", "float16"] = "float32",
        preprocessing: Any = None,
        shard_size: int = 4096,
        budget: int | None = None,
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise CacheError(f"a cache holds 'float32' or 'float16', not {dtype!r}.")
        self.live = teacher if isinstance(teacher, Frozen) else Frozen(teacher)
        self.path, self.dtype, self.preprocessing = Path(path), dtype, preprocessing
        self.shard_size, self.budget = shard_size, budget
        self.taps: list[str] = []
        self._weights: str | None = None
        self._index: dict[str, Any] | None = None
        self._clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Cached:
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For loader workers that are spawned: files are opened anew there, the model stays behind."""
        state = self.__dict__.copy()
        state["_shards"] = None
        state["live"] = live = copy.copy(self.live)  # a worker looks up, for which it needs `inputs` alone
        live.model, live._taps, live._call = nn.Identity(), None, None
        return state

    # ---- what a distiller asks

    def attach(self, taps: Iterable[str]) -> None:
        """Be ready to supply these taps, from disk or live.

        Raises:
            TapError: a name is not in the teacher.
            CacheError: a tap reads the batch, or the existing cache does not hold it or is stale.
        """
        self.taps = list(taps)
        for tap in self.taps:
            if parse_tap(tap).root == "batch":
                raise CacheError(f"tap {tap!r} reads the batch, not the teacher; it cannot be cached.")
        self.live.attach(self.taps)
        if (self.path / "index.json").exists():
            self._open()

    def columns(self) -> set[str]:
        """The names of the batch entries that the teacher reads, and `id`."""
        return self.live.columns() | {"id", CACHE_KEY}

    def __call__(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """The cached values for this batch; see `lookup`."""
        found = batch.get(CACHE_KEY)
        if found is None:
            found = self.lookup(batch)
        tensor = first_tensor({k: v for k, v in batch.items() if k != CACHE_KEY})
        device = tensor.device if tensor is not None else torch.device("cpu")
        return {tap: found[tap].to(device, non_blocking=True) for tap in self.taps}

    def prepare(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """From disk if all of the batch is there, else live."""
        if CACHE_KEY in batch or self.has(_ids(batch)):
            return self(batch, run)
        return self.live.prepare(batch, run)

    def close(self) -> None:
        """Remove the hooks and let go of the files."""
        self.live.close()
        self._clear()
        self._index = None

    # ---- reading

    def _clear(self) -> None:
        self._shards: list[dict[str, Any]] | None = None
        # All that is held of a sample: its id, the number of its row in all shards, and (in the shards) its hash.
        self._ids: NDArray[np.int64] = np.empty(0, np.int64)
        self._order: NDArray[Any] = np.empty(0, np.uint32)
        self._starts: NDArray[np.int64] = np.empty(0, np.int64)

    def key(self) -> dict[str, Any]:
        """What the cache depends on, but for the taps."""
        if self._weights is None:
            self._weights = weights_sha256(self.live.model)
        described = json.dumps(self.preprocessing, sort_keys=True, default=str)
        return {
            "format": FORMAT,
            "weights": self._weights,
            "preprocessing": described,
            "dtype": self.dtype,
            "teacher dtype": self.live.dtype,
        }

    def _open(self) -> None:
        file = self.path / "index.json"
        try:
            index = json.loads(file.read_text())
            stored, shards, _ = dict(index["key"]), list(index["shards"]), index["taps"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"cache {self.path}: {file.name} cannot be read ({error}); delete the folder to build it anew."
            ) from None
        for part, wanted in self.key().items():
            if stored.get(part) != wanted:
                raise CacheError(
                    f"cache {self.path} is stale: it was built with another {part} ({_short(stored.get(part))}, now "
                    f"{_short(wanted)}); delete the folder or give another path."
                )
        missing = [t for t in self.taps if t not in index["taps"]]
        if missing:
            raise CacheError(
                f"cache {self.path} holds the taps {', '.join(map(repr, index['taps']))} but not "
                f"{', '.join(map(repr, missing))}; delete the folder or give another path."
            )
        for shard in shards:
            for name, digest in shard["files"].items():
                path = self.path / shard["name"] / name
                if not path.exists() or file_sha256(path) != digest:
                    raise CacheError(
                        f"cache {self.path}: file {shard['name']}/{name} is missing or damaged; delete the folder to "
                        "build it anew."
                    )
        self._index = index
        self._map()

    def _map(self) -> None:
        """Open the shards of the index and sort the ids."""
        assert self._index is not None
        self._shards, files = [], Files()
        ids = []
        for shard in self._index["shards"]:
            folder = self.path / shard["name"]
            arrays = {n: load_file(folder / n, files) for n in shard["files"]}
            ids.append(arrays.pop("ids.npy"))
            self._shards.append(arrays)
        if ids:
            self._starts = np.cumsum([0, *map(len, ids)])[:-1]
            all_ids = np.concatenate(ids)
            order = np.argsort(all_ids, kind="stable")
            self._ids, self._order = all_ids[order], order.astype(np.min_scalar_type(len(order)))

    def _where(self, positions: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Shard and row in it of the samples at these positions of the sorted ids."""
        rows = self._order[positions].astype(np.int64)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        return list(zip(shards.tolist(), (rows - self._starts[shards]).tolist(), strict=True))

    def _positions(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        if self._shards is None and self._index is not None:
            self._map()
        positions = np.searchsorted(self._ids, ids)
        inside = positions < len(self._ids)
        known = inside.copy()
        known[inside] = self._ids[positions[inside]] == ids[inside]
        return positions, known

    def has(self, ids: NDArray[np.int64]) -> bool:
        """Whether all of these samples are in the cache."""
        return bool(self._positions(ids)[1].all()) if self._index is not None else False

    def __len__(self) -> int:
        return len(self._ids)

    def lookup(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The cached values of every tap for a batch, on the CPU, rows padded with 0 to the batch's length.

        Raises:
            CacheError: a sample is not in the cache, or its teacher input is not the one the cache was built with.
        """
        ids = _ids(batch)
        positions, known = self._positions(ids)
        if not known.all():
            raise CacheError(
                f"cache {self.path}: sample id {ids[~known][0]} is not in it ({len(self)} samples); build it "
                "with all of the training data."
            )
        assert self._index is not None and self._shards is not None
        where = self._where(positions)
        inputs = self.live.inputs(batch)
        for sample, digest, (shard, row) in zip(ids, input_hashes(inputs, len(ids)), where, strict=True):
            if self._shards[shard]["hashes.npy"][row] != digest:
                raise CacheError(
                    f"cache {self.path}: the teacher input of sample id {sample} is not the one the cache was built "
                    "with (changed data, another tokenizer, or random augmentation, which a cache does not allow)."
                )
        mask = token_mask(inputs)
        return {tap: self._rows(tap, where, mask) for tap in self.taps}

    def _rows(self, tap: str, where: Sequence[tuple[int, int]], mask: NDArray[np.bool_] | None) -> Tensor:
        assert self._index is not None and self._shards is not None
        number, about = list(self._index["taps"]).index(tap), self._index["taps"][tap]
        first = self._shards[where[0][0]][f"tap-{number}.npy"]
        ragged = about["ragged"]
        if not ragged or mask is None:
            rows = np.empty((len(where), *first.shape[1:]), first.dtype)
            for i, (shard, row) in enumerate(where):
                rows[i] = self._shards[shard][f"tap-{number}.npy"][row]
            return torch.from_numpy(rows)
        lengths = mask.sum(1)
        # Texts stand at the beginning of their rows as a rule; else each token is put in its place.
        at_start = [bool(m[:n].all()) for m, n in zip(mask, lengths, strict=True)]
        rows = np.zeros((len(where), *sized(about, mask.shape[1])), first.dtype)
        for i, (shard, row) in enumerate(where):
            arrays = self._shards[shard]
            start, end = arrays[f"tap-{number}.offsets.npy"][row : row + 2]
            values = arrays[f"tap-{number}.npy"][start:end].reshape(sized(about, lengths[i]))
            if at_start[i]:
                rows[i][tuple(slice(lengths[i]) if d in ragged else slice(None) for d in range(values.ndim))] = values
            else:
                own = np.flatnonzero(mask[i])
                rows[i][np.ix_(*(own if d in ragged else range(s) for d, s in enumerate(values.shape)))] = values
        return torch.from_numpy(rows)

    # ---- building

    def build(
        self,
        batches: Iterable[Mapping[str, Any]],
        *,
        total: int,
        lengths: Sequence[int] | NDArray[np.int32] | None = None,
        device: torch.device | str = "cpu",
        announce: Callable[[str], None] = print,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Run the teacher over `batches` and store every tap; samples that are there already are left out.

        Args:
            batches: batches with `id`, unaugmented, as the training will see them (padding does not matter).
            total: number of samples, for the size that is announced before anything is written.
            lengths: their numbers of tokens; None: they are taken to be as those of the first batch.
            device: where the teacher runs.
            announce: gets one sentence with the size.
            progress: called with the number of samples done after each batch.

        Raises:
            CacheError: the cache would not fit the budget or the disk, a tap cannot be stored, or ids repeat.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._index is None and (self.path / "index.json").exists():
            self._open()
        writer: Writer | None = None
        done = 0
        try:
            for raw in batches:
                ids = _ids(raw)
                fresh = ~self._positions(ids)[1] if self._index is not None else np.ones(len(ids), bool)
                done += len(ids)
                if fresh.any():
                    batch = _to_device(dict(raw), torch.device(device))
                    values = self.live(batch)
                    inputs = self.live.inputs(batch)
                    if writer is None:
                        writer = self._start(batch, values, inputs, total - len(self), lengths, announce)
                    writer.add(ids, fresh, values, inputs)
                    if writer.rows >= self.shard_size or writer.bytes >= SHARD_BYTES:
                        writer.flush()
                progress(done)
        except SystemExit:  # asked to stop: what was worked out is kept
            if writer is not None:
                writer.flush()
            raise
        if writer is not None:
            writer.flush()
        if self._index is None:
            raise CacheError(f"cache {self.path}: there was nothing to build it from.")
        self._map()

    def _start(
        self,
        batch: Mapping[str, Any],
        values: Mapping[str, Any],
        inputs: Mapping[str, Any],
        total: int,
        lengths: Sequence[int] | NDArray[np.int32] | None,
        announce: Callable[[str], None],
    ) -> Writer:
        ragged = self._ragged(batch, values, inputs)
        if self._index is None:
            taps = {t: {"shape": list(v.shape[1:]), "ragged": ragged[t]} for t, v in values.items()}
            self._index = {"key": self.key(), "taps": taps, "shards": []}
        elif unasked := [t for t in self._index["taps"] if t not in values]:
            raise CacheError(
                f"cache {self.path} holds the taps {', '.join(map(repr, self._index['taps']))} and is not complete; "
                f"to go on building it, {', '.join(map(repr, unasked))} must be asked for too. Or delete the folder."
            )
        writer = Writer(self.path, self._index, self.dtype)
        if lengths is None:
            mask = token_mask(inputs)
            lengths = [0] if mask is None else mask.sum(1).tolist()
        size = writer.bytes_per_sample(lengths) * total
        free = shutil.disk_usage(self.path).free
        limit = min(free, self.budget) if self.budget is not None else free
        announce(f"teacher cache: {total} samples, about {human(size)} as {self.dtype} in {self.path}")
        if size > limit:
            raise CacheError(f"cache {self.path}: about {human(size)} are needed, {human(limit)} are allowed or free.")
        return writer

    def _ragged(
        self, batch: Mapping[str, Any], values: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> dict[str, list[int]]:
        """The dimensions of each tap's samples that grow with padding: [0] for tokens, [1, 2] for attention."""
        length = _padded_length(inputs)
        for tap, value in values.items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 1:
                raise CacheError(
                    f"cache {self.path}: tap {tap!r} is not a floating point tensor with a batch dimension."
                )
        if length is None or not any(v.ndim > 1 and length in v.shape[1:] for v in values.values()):
            return {tap: [] for tap in values}
        # One column less shows it too, and unlike one more it is never beyond the model's position embeddings.
        change = (0, -1) if length > 1 else (0, 1)
        other = {
            k: torch.nn.functional.pad(v, change)
            if isinstance(v, Tensor) and v.ndim == 2 and v.shape[1] == length
            else v
            for k, v in batch.items()
        }
        grown = self.live(other)
        ragged = {}
        for tap, value in values.items():
            sizes = list(zip(value.shape[1:], grown[tap].shape[1:], strict=True))
            ragged[tap] = [d for d, (a, b) in enumerate(sizes) if a != b]
            if any(sizes[d][0] != length for d in ragged[tap]):
                raise CacheError(
                    f"cache {self.path}: tap {tap!r} of shape {tuple(value.shape)} grows with padding, but not as the "
                    f"{length} tokens of the batch; it cannot be cached. Tap a slice of it, as in '[:, 0]'."
                )
        return ragged


def _ids(batch: Mapping[str, Any]) -> NDArray[np.int64]:
    ids = batch.get("id")
    if ids is None:
        raise CacheError(
            "a cached teacher needs `id` in every batch (int64, unique for each sample); add such a column to the data."
        )
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    return array.astype(np.int64).reshape(-1)


def _padded_length(inputs: Mapping[str, Any]) -> int | None:
    mask = inputs.get("attention_mask")
    return int(mask.shape[1]) if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:12] + "…"
