"""Text data: the embedded sentiment sample, csv / tsv / jsonl / parquet files, HF data sets.

Every source becomes a `datasets.Dataset` with `id`, the tokenizer's columns and `labels`; a sample without a label has
-100 (classification) or NaN (regression).
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from taskkd.errors import DataError, nearest

__all__ = [
    "Reader",
    "Row",
    "Splits",
    "as_table",
    "columns_of",
    "holdout",
    "hub_rows",
    "in_chunks",
    "joined",
    "read_rows",
    "sentiment_rows",
    "text_row",
    "tokenized",
]

DOMAINS = ("movie", "amazon", "nyt", "tweets")


@dataclass(frozen=True)
class Row:
    """One sample: its text, a second text for pairs, its raw label (None: unlabelled) and where it stands.

    Where words have labels of their own, `words` holds them, and `text` is their line. Where texts are encoded one by
    one, `texts` holds them all.
    """

    text: str
    pair: str | None
    label: Any
    where: str
    words: tuple[str, ...] | None = None
    texts: tuple[str, ...] | None = None


MakeRow: TypeAlias = Callable[[Mapping[str, Any], str | Sequence[str], str | None, str], Row]
#: what yields (where it stands, columns) of a file's samples
Reader: TypeAlias = Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]


@dataclass
class Splits:
    """Rows by use. `unlabelled` is text for distillation only; labels it may have had are dropped.

    `mismatched` is a second test set, of other genres than the training text (MNLI).
    """

    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    unlabelled: list[Row] = field(default_factory=list)
    mismatched: list[Row] = field(default_factory=list)


# ---- reading


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 kB
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row:
                    raise DataError(f"{path}, line {reader.line_num}: more fields than the header has columns.")
                yield f"{path}, line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}.") from None


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected an object, got {type(row).__name__}.")
            yield f"{path}, line {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a parquet file ({str(error).splitlines()[0]}).") from None
    yield from ((f"{path}, line {number}", row) for number, row in enumerate(rows, 1))


READERS: dict[str, Reader] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".parquet": _parquet,
}


def read_rows(
    path: str | Path,
    text: str | Sequence[str],
    label: str | None,
    *,
    row: MakeRow | None = None,
    readers: Mapping[str, Reader] = {},
) -> list[Row]:
    """The rows of a csv, tsv, jsonl or parquet file.

    Args:
        path: the file; its suffix decides the format.
        text: the text column, or two for pairs.
        label: the label column; None: the file is unlabelled.
        row: makes a row of a mapping of columns; default: `text_row`.
        readers: of further formats, by suffix.

    Raises:
        DataError: no such file or format, a column is missing, a line is malformed, or there is no row.
    """
    path, known, make = Path(path), {**READERS, **readers}, row or text_row
    if path.suffix not in known:
        raise DataError(
            f"{path}: no reader for {path.suffix!r} files{nearest(path.suffix, known)}; known: {', '.join(known)}."
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    try:
        rows = [make(entry, text, label, where) for where, entry in known[path.suffix](path)]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
    if not rows:
        raise DataError(f"{path}: the file has no rows.")
    return rows


def columns_of(entry: Mapping[str, Any], columns: Sequence[str], where: str) -> list[Any]:
    """The values of these columns.

    Raises:
        DataError: one is missing.
    """
    for column in columns:
        if column not in entry:
            raise DataError(
                f"{where}: no column {column!r}{nearest(column, entry)}; it has {', '.join(map(repr, entry))}."
            )
    return [entry[column] for column in columns]


def text_row(entry: Mapping[str, Any], text: str | Sequence[str], label: str | None, where: str) -> Row:
    """One sample from a mapping of columns; `where` is for errors.

    Raises:
        DataError: a column is missing or its value is no text.
    """
    columns = [text] if isinstance(text, str) else list(text)
    values = columns_of(entry, columns if label is None else [*columns, label], where)
    for column, content in zip(columns, values, strict=False):
        if not isinstance(content, str):
            raise DataError(f"{where}: column {column!r} holds {content!r}, expected text.")
    return Row(values[0], values[1] if len(columns) > 1 else None, None if label is None else values[-1], where)


def hub_rows(
    name: str,
    subset: str | None,
    split: str,
    text: str | Sequence[str],
    label: str | None,
    *,
    row: MakeRow | None = None,
) -> list[Row]:
    """The rows of a split of an HF data set (hub name or local folder), class names instead of class numbers.

    Args:
        name, subset, split: of the data set.
        text, label, row: as for `read_rows`.

    Raises:
        DataError: it cannot be loaded, or a column is missing.
    """  # fmt: skip
    import datasets

    try:
        table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises many kinds, from connection errors to ValueError
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"data set {name!r}, split {split!r} cannot be loaded: {first}") from error
    feature = table.features.get(label) if label is not None else None
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    rows, make = [], row or text_row
    for number, sample in enumerate(table):
        entry = dict(sample)
        if names and label is not None:
            entry[label] = _named(entry[label], names)
        rows.append(make(entry, text, label, f"{name}/{split}, row {number}"))
    return rows


def _named(value: Any, names: Sequence[str]) -> Any:
    """Class names for class numbers, one or a list; None for none."""
    if isinstance(value, list):
        return [_named(v, names) for v in value]
    return names[value] if value is not None and value >= 0 else None


def sentiment_rows(domains: Sequence[str] = ("movie",), *, label: str = "binary", threshold: float = 0.5) -> list[Row]:
    """The embedded sample: sentences rated by 20 people each (Hutto & Gilbert 2014), without repeated texts.

    Args:
        domains: of "movie", "amazon", "nyt", "tweets".
        label: "binary" (negative, positive; ratings within `threshold` of 0 are left out), "score" (the mean rating in
            [-4, 4]), or "none".
        threshold: see `label`.

    Raises:
        DataError: no such domain or label.
    """
    for domain in domains:
        if domain not in DOMAINS:
            raise DataError(
                f"the sentiment sample has no domain {domain!r}{nearest(domain, DOMAINS)}; it has {', '.join(DOMAINS)}."
            )
    if label not in ("binary", "score", "none"):
        raise DataError(f"label {label!r} of the sentiment sample: expected 'binary', 'score' or 'none'.")
    source = files("taskkd.nlp") / "samples" / "vader_sentiment.jsonl.gz"
    rows, seen = [], set()
    for number, line in enumerate(gzip.decompress(source.read_bytes()).decode().splitlines(), 1):
        entry = json.loads(line)
        key = same_text(entry["text"])
        if entry["domain"] not in domains or key in seen or (label == "binary" and abs(entry["score"]) <= threshold):
            continue
        seen.add(key)
        value: str | float | None = None
        if label != "none":
            value = entry["score"] if label == "score" else ("positive" if entry["score"] > 0 else "negative")
        rows.append(Row(entry["text"], None, value, f"sentiment sample, line {number}"))
    return rows


def same_text(text: str) -> str:
    """What two texts share that count as the same: words without case and spacing."""
    return " ".join(text.lower().split())


# ---- splitting and labels


def shared_texts(splits: Splits) -> list[str]:
    """A sentence for each held-out part that has texts which are also trained on."""

    def keys(rows: Sequence[Row]) -> set[tuple[str, str]]:
        return {(same_text(r.text), same_text(r.pair or "")) for r in rows}

    trained = keys(splits.train) | keys(splits.unlabelled)
    lines = []
    for part in ("validation", "test"):
        both = len(keys(getattr(splits, part)) & trained)
        if both:
            total = len(getattr(splits, part))
            lines.append(
                f"{both} of the {total} {part} texts are in the training data too; the figures may be too good."
            )
    return lines


def holdout(rows: list[Row], sizes: Sequence[int], seed: int) -> list[list[Row]]:
    """Shuffle from `seed` and cut into parts of these sizes; the rest is the last part.

    Raises:
        DataError: there are not as many rows.
    """
    if sum(sizes) > len(rows):
        raise DataError(f"{len(rows)} rows cannot be cut into parts of {', '.join(map(str, sizes))}.")
    shuffled = rows[:]
    random.Random(seed).shuffle(shuffled)  # noqa: S311
    parts, start = [], 0
    for size in sizes:
        parts.append(shuffled[start : start + size])
        start += size
    return [*parts, shuffled[start:]]


def has_label(row: Row) -> bool:
    """Whether a row is labelled."""
    return row.label is not None and str(row.label) != ""


def label_names(rows: Sequence[Row]) -> list[str]:
    """The distinct labels of labelled rows, sorted (as numbers where all are)."""
    found = {str(r.label) for r in rows if r.label is not None and str(r.label) != ""}
    try:
        return sorted(found, key=float)
    except ValueError:
        return sorted(found)


def encode_label(row: Row, names: Sequence[str] | None) -> int | float:
    """The label as the model takes it: a class number, or with `names=None` a number.

    Raises:
        DataError: it is not one of the names, or not a number.
    """
    if row.label is None or row.label == "":
        return -100 if names is not None else math.nan
    if names is None:
        try:
            number = float(row.label)
        except (ValueError, TypeError, OverflowError):
            number = math.inf
        if math.isinf(number):
            raise DataError(f"{row.where}: label {row.label!r} is not a finite number.")
        return number
    text = str(row.label)
    if text not in names:
        raise DataError(
            f"{row.where}: label {row.label!r} is not one of the {len(names)} labels "
            f"{', '.join(names)}{nearest(text, names)}."
        )
    return list(names).index(text)


def tokenized(
    rows: Sequence[Row], tokenizer: Any, names: Sequence[str] | None, *, max_length: int, first_id: int = 0
) -> Any:
    """Rows as a `datasets.Dataset`: `id`, the tokenizer's columns (not padded), `labels`.

    Args:
        rows: at least one.
        tokenizer: an HF tokenizer.
        names: class names; None: regression.
        max_length: longer texts are truncated.
        first_id: ids count up from here.

    Raises:
        DataError: there are no rows, or a label is not one of the names.
    """
    import datasets

    if not rows:
        raise DataError("there are no rows to tokenize.")
    pairs = [r.pair or "" for r in rows] if any(r.pair is not None for r in rows) else None
    columns = dict(tokenizer([r.text for r in rows], pairs, truncation=True, max_length=max_length))
    columns["labels"] = [encode_label(r, names) for r in rows]
    columns["id"] = list(range(first_id, first_id + len(rows)))
    return datasets.Dataset.from_dict(columns)


def in_chunks(rows: Sequence[Row], size: int = 1000) -> list[Sequence[Row]]:
    """Rows in pieces that are tokenized together.

    Raises:
        DataError: there are none.
    """
    if not rows:
        raise DataError("there are no rows to tokenize.")
    return [rows[i : i + size] for i in range(0, len(rows), size)]


#: columns of tokens whose numbers are small, or fit four bytes
BYTES = frozenset(("attention_mask", "token_type_ids", "context_mask", "word_mask", "special_tokens_mask"))
NUMBERS = frozenset(("input_ids", "labels"))


def as_table(chunks: Iterable[Mapping[str, Sequence[Any]]], first_id: int = 0) -> Any:
    """Columns, a piece of the data at a time, as one `datasets.Dataset` with `id`s; those of tokens are kept small.

    Args:
        chunks: at least one, with the same columns.
        first_id: ids count up from here.
    """
    import datasets

    kinds = {**dict.fromkeys(BYTES, np.int8), **dict.fromkeys(NUMBERS, np.int32)}
    tables = []
    for chunk in chunks:
        columns = {k: [np.array(v, kinds[k]) for v in vs] if k in kinds else vs for k, vs in chunk.items()}
        ids = range(first_id, first_id + len(next(iter(columns.values()))))
        tables.append(datasets.Dataset.from_dict({**columns, "id": list(ids)}))
        first_id = ids.stop
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)


def joined(first: Any, second: Any) -> Any:
    """Two tables as one, with the columns that both have; where their types differ, with the first one's."""
    import datasets

    shared = [c for c in first.column_names if c in second.column_names]
    first, second = first.select_columns(shared), second.select_columns(shared)
    if first.features != second.features:
        second = second.cast(first.features)
    return datasets.concatenate_datasets([first, second])
