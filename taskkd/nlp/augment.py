"""Augmented training texts of a recipe: made once, kept in the run's folder, used as unlabelled text."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from taskkd.errors import DataError
from taskkd.files import file_sha256, whole
from taskkd.nlp import models
from taskkd.nlp.text import Row, same_text
from taskkd.nlp.word_replacement import WordReplacement
from taskkd.nlp.word_vectors import WordVectors
from taskkd.schema import Model

__all__ = ["Augment", "augmented", "describe", "replacement", "write_copies"]

logger = logging.getLogger(__name__)
FOLDER = "augmented"


class Augment(Model):
    """Copies of training texts with replaced words; see `WordReplacement`. At least one source of words is needed.

    `mlm` is a masked LM (hub name or path), `vectors` a file of word vectors, `neighbours` says whether words also
    come from the teacher's own input embeddings.
    """

    n: int = Field(20, ge=1)
    p: float = Field(0.4, ge=0, le=1)
    k: int = Field(15, ge=1)
    mlm: str | None = None
    vectors: str | None = None
    neighbours: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _a_source(self) -> Augment:
        if not (self.mlm or self.vectors or self.neighbours):
            raise ValueError("words need a source: mlm, vectors or neighbours")
        return self

    def build(self, teacher: str) -> WordReplacement:
        """The replacement that this part of a recipe asks for.

        Raises:
            DataError: a model or a file cannot be loaded.
        """
        own = teacher if self.neighbours else None
        return replacement(self.mlm, self.vectors, own, n=self.n, p=self.p, k=self.k, seed=self.seed)


def replacement(
    mlm: str | None, vectors: str | None, neighbours: str | None, *, n: int, p: float, k: int, seed: int
) -> WordReplacement:
    """A `WordReplacement` from names and paths.

    Args:
        mlm: a masked LM by hub name or path.
        vectors: a file of word vectors.
        neighbours: a model whose input embeddings serve as word vectors, after those of the file.
        n, p, k, seed: as for `WordReplacement`.

    Raises:
        DataError: one cannot be loaded, or the masked LM's head is not in its checkpoint.
        TaskkdError: none is given.
    """
    model, tokenizer = _masked_lm(mlm) if mlm else (None, None)
    tables = [WordVectors.read(vectors)] if vectors else []
    if neighbours:
        tables.append(WordVectors.of_model(models.load_model(neighbours), models.load_tokenizer(neighbours)))
    return WordReplacement(model, tokenizer, vectors=tables, p=p, n=n, k=k, seed=seed)


def _masked_lm(source: str) -> tuple[Any, Any]:
    from transformers import AutoModelForMaskedLM

    with models._quiet():
        model, info = models._from_pretrained(
            AutoModelForMaskedLM, models.resolve(source), dtype=torch.float32, output_loading_info=True
        )
    if info["missing_keys"]:
        raise DataError(
            f"model {source!r} has no masked LM head (its checkpoint lacks {sorted(info['missing_keys'])[0]}): its "
            "guesses would be random. Name a masked LM, or use its embeddings (`neighbours`)."
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), models.load_tokenizer(source)


# ---- copies


def describe(rows: Sequence[Row], config: Augment, teacher: str) -> str:
    """What the copies of these rows will cost, in a sentence; loads the sources, makes no copy."""
    return _cost(rows, config.build(teacher))


def _cost(rows: Sequence[Row], replace: WordReplacement) -> str:
    texts = [text for row in rows for text in (row.text, row.pair) if text is not None]
    asked = f"; {replace.count(texts):,} words to be predicted by the masked LM" if replace.mlm is not None else ""
    return f"up to {replace.n * len(texts):,} copies of {len(rows):,} training texts{asked}"


def augmented(
    rows: Sequence[Row], held_out: Sequence[Row], config: Augment, *, teacher: str, folder: Path
) -> list[Row]:
    """Unlabelled copies of training rows, without those that equal a row of either list or another copy.

    Finished copies are kept in `folder/augmented/`, in a file named by a digest of what they depend on, and read from
    there the next time.

    Args:
        rows: training rows, texts or pairs.
        held_out: validation and test rows.
        config: what to replace, how often, by what.
        teacher: of `config.neighbours`.
        folder: the run's folder.

    Raises:
        DataError: a source of words cannot be loaded.
    """
    path = folder / FOLDER / f"{_digest(rows, config, teacher)}.jsonl"
    if not path.is_file():
        from taskkd.progress import track

        replace = config.build(teacher)
        logger.info("augmentation: %s", _cost(rows, replace))
        start = time.perf_counter()
        with track("augmentation", len(rows)) as advance:
            count = write_copies(replace, rows, path, ("text", "pair"), originals=False, progress=advance)
        logger.info("augmentation: %s copies in %.0f s", f"{count:,}", time.perf_counter() - start)
    seen = {_key(row) for row in (*rows, *held_out)}
    kept = []
    with path.open(encoding="utf-8") as file:
        for entry in map(json.loads, file):
            copy = Row(entry["text"], entry.get("pair"), None, f"{rows[entry['of']].where}, a copy")
            if _key(copy) not in seen:
                seen.add(_key(copy))
                kept.append(copy)
    return kept


def write_copies(
    replace: WordReplacement,
    rows: Sequence[Row],
    path: Path,
    columns: Sequence[str],
    *,
    originals: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write the copies of rows as jsonl, with `of` (the row's number from 0); beside, and renamed at the end.

    Args:
        replace: makes the copies.
        rows: texts or pairs.
        path: of the file.
        columns: the names of the text columns.
        originals: each row itself first, before its copies.
        progress: called with the number of rows done.

    Returns:
        The number of copies, originals not counted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with whole(path) as beside, beside.open("w", encoding="utf-8") as file:
        for number, copies in enumerate(_copies(replace, rows)):
            for texts in copies if originals else copies[1:]:
                entry = {"of": number, **dict(zip(columns, texts, strict=False))}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            count += len(copies) - 1
            progress(number + 1)
    return count


def _copies(replace: WordReplacement, rows: Sequence[Row]) -> Iterator[list[tuple[str, ...]]]:
    """Each row's texts and their copies, as tuples of one or two."""
    if any(row.pair is not None for row in rows):
        for pairs in replace.pairs((row.text, row.pair or "") for row in rows):
            yield list(pairs)
    else:
        for texts in replace.texts(row.text for row in rows):
            yield [(text,) for text in texts]


def _key(row: Row) -> tuple[str, str]:
    return same_text(row.text), same_text(row.pair or "")


def _digest(rows: Sequence[Row], config: Augment, teacher: str) -> str:
    """What the copies depend on: texts, options, and the files of models and vectors."""
    digest = hashlib.sha256(repr([(row.text, row.pair) for row in rows]).encode())
    digest.update(config.model_dump_json().encode())
    for source in (config.mlm, teacher if config.neighbours else None):
        folder = Path(models.resolve(source)) if source else None
        for file in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []:
            if file.suffix in (".safetensors", ".bin", ".json", ".txt"):
                digest.update(f"{file.name} {file_sha256(file)}".encode())
        digest.update(repr(source).encode())
    if config.vectors and Path(config.vectors).is_file():
        digest.update(file_sha256(Path(config.vectors)).encode())
    return digest.hexdigest()[:16]
