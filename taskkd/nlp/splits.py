"""The rows of a recipe's data by use: read, held out, cut to size."""

from __future__ import annotations

import functools
from dataclasses import replace

from taskkd.errors import DataError
from taskkd.nlp import text
from taskkd.nlp.kinds.sentences import texts_row
from taskkd.nlp.schema import Data, ScoredPairs, Size

__all__ = ["read_splits"]


def read_splits(config: Data) -> text.Splits:
    """The rows that a recipe names; what is missing of validation and test is held out from train.

    Raises:
        DataError: a file, column, label or split is wrong.
    """
    splits, kind = text.Splits(), config.kind
    if config.sample is not None:
        own = config.sample
        splits.train = text.sentiment_rows(own.domains, label=own.label if kind.head.labelled else "none")
        taken = {text.same_text(r.text) for r in splits.train}
        extra = text.sentiment_rows(own.unlabelled_domains, label="none") if own.unlabelled_domains else []
        splits.unlabelled = [r for r in extra if text.same_text(r.text) not in taken]
    elif config.files is not None:
        files = config.files
        read = functools.partial(text.read_rows, text=config.text, row=kind.row, readers=kind.readers)
        splits.train = read(files.train, label=config.label)
        splits.validation = read(files.validation, label=config.label) if files.validation else []
        splits.test = read(files.test, label=config.label) if files.test else []
        free = [files.unlabelled] if isinstance(files.unlabelled, str) else files.unlabelled or []
        splits.unlabelled = [r for f in free for r in read(f, label=None)]
    elif config.hub is not None:
        hub = config.hub
        for part in ("train", "validation", "test", "unlabelled"):
            name = getattr(hub, part)
            if name:
                label = None if part == "unlabelled" else config.label
                setattr(splits, part, text.hub_rows(hub.name, hub.subset, name, config.text, label, row=kind.row))
    elif config.glue is not None:
        splits = config.glue.read()
    if config.scored_pairs is not None:
        _score(config.scored_pairs, splits)
    return _cut(config, splits)


def _score(pairs: ScoredPairs, splits: text.Splits) -> None:
    """Evaluate on scored pairs.

    Raises:
        DataError: there is other data to evaluate on, or a pair has no score.
    """
    for part in ("validation", "test"):
        if getattr(splits, part):
            raise DataError(f"data.scored_pairs are what is evaluated on; there is other {part} data too.")
        rows = text.read_rows(getattr(pairs, part), pairs.text, pairs.label, row=texts_row)
        for row in rows:
            if not text.has_label(row):
                raise DataError(f"{row.where}: the pair has no score in column {pairs.label!r}.")
        setattr(splits, part, rows)


def _cut(config: Data, splits: text.Splits) -> text.Splits:
    """Hold out what is missing, then limit the sizes; training rows that are left over serve as unlabelled text."""
    has_label = config.kind.has_label
    labelled = [r for r in splits.train if has_label(r)]
    left = [r for r in splits.train if not has_label(r)]
    for part in ("validation", "test"):
        rows = getattr(splits, part)
        kept = [r for r in rows if has_label(r)]
        if rows and not kept:
            raise DataError(f"{rows[0].where.partition(', ')[0]}: no row of the {part} data has a label.")
        setattr(splits, part, kept)
    total = len(labelled)
    sizes = [_count(config.test_size, total) if not splits.test else 0]
    sizes.append(_count(config.validation_size, total) if not splits.validation else 0)
    sizes.append(config.train_size if config.train_size is not None else total - sum(sizes))
    if sizes[2] < 1:
        raise DataError(
            f"{total} labelled rows are too few for a test set of {sizes[0]} and a validation set of {sizes[1]}."
        )
    test, validation, train, rest = text.holdout(labelled, sizes, config.split_seed)
    unlabelled = [*rest, *left, *splits.unlabelled]
    if config.unlabelled_size is not None:
        if config.unlabelled_size > len(unlabelled):
            raise DataError(
                f"data.unlabelled_size is {config.unlabelled_size}, but only {len(unlabelled)} rows are left for it."
            )
        unlabelled = text.holdout(unlabelled, [config.unlabelled_size], config.split_seed + 1)[0]
    stripped = [replace(r, label=None) for r in unlabelled]
    return text.Splits(train, splits.validation or validation, splits.test or test, stripped, splits.mismatched)


def _count(size: Size, total: int) -> int:
    return max(1, round(size * total)) if isinstance(size, float) and size < 1 else int(size)
