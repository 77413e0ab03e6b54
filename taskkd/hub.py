"""HF data sets with columns of images, whose bytes are read when they are asked for."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from taskkd.errors import DataError, nearest
from taskkd.images import Source

__all__ = ["check_columns", "images_of", "load_split"]


def load_split(name: str | Path, split: str | None, subset: str | None) -> Any:
    """One split of a data set by hub name or local folder.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(str(name), subset, split=split or "train")
    except Exception as error:  # the library raises many kinds, from connection errors to ValueError
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"data set {str(name)!r}, split {split or 'train'!r} cannot be loaded: {first}") from error


def check_columns(table: Any, where: str, columns: tuple[str, ...], images: tuple[str, ...]) -> None:
    """Check that columns are there, and that some of them hold images.

    Raises:
        DataError: they are not, or the table is no split of a data set.
    """
    import datasets

    if not isinstance(table, datasets.Dataset):
        raise DataError(f"{where}: expected one split as a datasets.Dataset, got {type(table).__name__}.")
    features = table.features
    for column in columns:
        if column not in features:
            raise DataError(
                f"{where}: no column {column!r}{nearest(column, features)}; it has {', '.join(map(repr, features))}."
            )
    for column in images:
        if not isinstance(features[column], datasets.Image):
            raise DataError(f"{where}: column {column!r} holds {features[column]}, expected images.")


def images_of(table: Any, column: str, where: str) -> list[Source]:
    """The images of a column, one for each row, not decoded."""
    import datasets

    encoded = table.select_columns([column]).cast_column(column, datasets.Image(decode=False)).with_format(None)
    return [Source(f"{where}, row {n}", functools.partial(_bytes, encoded, n)) for n in range(len(encoded))]


def _bytes(images: Any, number: int) -> bytes:
    (value,) = images[number].values()
    if value is None:
        raise FileNotFoundError
    content: bytes = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    return content
