"""Files: written whole or not at all, hashed, named inside of their folder; a sentence where one cannot be written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from taskkd.errors import CheckpointError, DataError

__all__ = ["UNREADABLE", "file_sha256", "fsync", "human", "inside", "listed", "whole", "write_whole", "writing"]

#: what libraries raise of a file of weights that is damaged, or would have to be executed
UNREADABLE = (OSError, ValueError, LookupError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside to write a file under, which becomes `path` only when the block ends well.

    Whenever the process is killed, there is the old file or the new one.
    """
    beside = path.with_name(f"{path.name}.tmp")
    yield beside
    fsync(beside)
    beside.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Write a text file as `whole` does."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def human(size: float) -> str:
    """A number of bytes as people write it: "1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "kB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Say in a sentence that something cannot be written: libraries raise errors of many kinds for a full disk.

    Args:
        what: is written, for the sentence: "checkpoint runs/a/checkpoint-4".

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save raises a RuntimeError, which is an error of many other things, too.
        if isinstance(error, RuntimeError) and not any(w in str(error) for w in ("PytorchStreamWriter", "inline_cont")):
            raise
        why = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        if isinstance(error, RuntimeError):
            why = f"an archive broke off, as on a full disk ({why})"
        raise CheckpointError(f"{what} cannot be written: {why.rstrip('.')}.") from error


def inside(folder: Path, name: str, where: str) -> Path:
    """The file of a name that stands in a data file: in this folder, or in one within it.

    Links that lie in the folder are followed: whoever has set up the folder has made them, not the file that names.

    Args:
        folder: where names start from; an absolute name lies in it.
        name: as the file has it.
        where: it stands, for the error.

    Raises:
        DataError: the name leads out of the folder, or is none that a file can have.
    """
    if name.startswith(os.sep) or os.pardir in name:
        root, found = (os.path.abspath(path) for path in (folder, folder / name))  # noqa: PTH100  (follows no links)
        if not found.startswith(root.rstrip(os.sep) + os.sep):
            raise DataError(f"{where}: {name!r} leads out of {folder}; a data file names files of its own folder only.")
    if "\0" in name or (len(name) > 60 and any(len(p.encode(errors="replace")) > 255 for p in Path(name).parts)):
        raise DataError(f"{where}: {name[:60]!r} is no name that a file can have.")
    return folder / name


def listed(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DataError: it cannot be read, or is not UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list cannot be read: {error}.") from None
    return [line for line in lines if line.strip()]
