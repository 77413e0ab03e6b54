"""Tags of words: CoNLL column files, entities, and their F1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskkd.errors import DataError
from taskkd.nlp.metrics import precision_recall

__all__ = ["Tags", "column_sentences", "entities", "has_entities"]

BEGINS, ENDS, INSIDE = frozenset("BSU"), frozenset("ELS") | {"U"}, frozenset("BIELSU")


def column_sentences(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sentences of a CoNLL file: a word a line, columns separated by white space, an empty line between sentences.

    The columns are named "0", "1", ..., "-1" for the last one, "tokens" for the first and "tags" for the last. Lines
    with -DOCSTART-, and lines before a sentence that begin with # and have another number of columns, are left out.

    Raises:
        DataError: a line has more or fewer columns than the first one.
    """
    with path.open(encoding="utf-8-sig") as file:
        lines = [line.split() for line in file]
    width = next((len(x) for x in lines if x and x[0] != "-DOCSTART-" and not x[0].startswith("#")), 0)
    sentence: list[list[str]] = []
    for number, parts in enumerate([*lines, []], 1):
        if not parts or parts[0] == "-DOCSTART-":
            if sentence:
                yield f"{path}, line {number - len(sentence)}", _columns(sentence)
            sentence = []
        elif len(parts) == width:
            sentence.append(parts)
        elif sentence or not parts[0].startswith("#"):
            raise DataError(f"{path}, line {number}: {len(parts)} columns, the lines before have {width}.")


def _columns(sentence: Sequence[Sequence[str]]) -> dict[str, Any]:
    columns = [list(column) for column in zip(*sentence, strict=True)]
    named = {"tokens": columns[0], **({"tags": columns[-1]} if len(columns) > 1 else {})}
    return {**named, **{str(i): c for i, c in enumerate(columns)}, "-1": columns[-1]}


def has_entities(names: Sequence[str]) -> bool:
    """Whether these are tags of entities: O, and B-..., I-... (or E, L, S, U)."""
    others = [n for n in names if n != "O"]
    return bool(others) and all(n[:1] in INSIDE and n[1:2] == "-" for n in others)


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, word after the last) of every entity, as the evaluation of CoNLL-2003 finds them.

    An entity begins at B (or S, U), at any tag of another type than the one before, and after O or E (or L, S, U); so
    IOB1, IOB2 and BIOES are all read rightly, and an I without a B counts as a beginning.
    """
    found: list[tuple[str, int, int]] = []
    open_since, kind, ended = -1, "", True
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-")
        inside = tag != "O"
        if open_since >= 0 and (not inside or ended or prefix in BEGINS or own != kind):
            found.append((kind, open_since, i))
            open_since = -1
        if inside and open_since < 0:
            open_since = i
        kind, ended = own, prefix in ENDS
    return found


class Tags:
    """Entity-level precision, recall and F1 (micro averages) and the accuracy of tags; labels -100 are left out.

    Source: Tjong Kim Sang & De Meulder 2003 (CoNLL-2003): an entity counts if its type and both its ends are right.

    Args:
        names: of the tags, in the order of the logits. Where they are not tags of entities (parts of speech), there
            is accuracy alone.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.entities = has_entities(names)
        self.types = sorted({name[2:] for name in names if name != "O"}) if self.entities else []
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        #: entities that are right, predicted, true; tags that are right, all tags
        self.counts = torch.zeros(5, dtype=torch.int64)
        #: (types, 3): of each type of entity those that are right, predicted, true
        self.of_types = torch.zeros(len(self.types), 3, dtype=torch.int64)

    def update(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Count one batch: `output.logits` (batch, tokens, tags) against `batch["labels"]` (batch, tokens)."""
        labels, guesses = batch["labels"].cpu(), output["logits"].detach().argmax(-1).cpu()
        known = labels >= 0
        right = int((guesses == labels)[known].sum())
        counts = [0, 0, 0, right, int(known.sum())]
        if self.entities:
            for guess, label, kept in zip(guesses, labels, known, strict=True):
                found, true = (set(entities([self.names[i] for i in x[kept].tolist()])) for x in (guess, label))
                counts = [c + n for c, n in zip(counts, (len(found & true), len(found), len(true), 0, 0), strict=True)]
                for column, those in enumerate((found & true, found, true)):
                    for kind, _, _ in those:
                        self.of_types[self.types.index(kind), column] += 1
        self.counts += torch.tensor(counts)

    def state(self) -> tuple[Tensor, Tensor]:
        """The five counts, and those of each type of entity."""
        return self.counts, self.of_types

    def merge(self, states: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take the sum of all processes' counts."""
        self.counts, self.of_types = (torch.stack(list(part)).sum(0) for part in zip(*states, strict=True))

    def compute(self) -> dict[str, float]:
        """`accuracy` of tags, and `f1`, `precision`, `recall` of entities; in [0, 1], 0 where undefined."""
        right, predicted, true, tags, total = self.counts.tolist()
        accuracy = {"accuracy": tags / max(total, 1)}
        if not self.entities:
            return accuracy
        f1 = 2 * right / max(predicted + true, 1)
        return {**accuracy, "f1": f1, "precision": right / max(predicted, 1), "recall": right / max(true, 1)}

    def by_class(self) -> dict[str, dict[str, float]]:
        """`precision`, `recall` and `f1` of each type of entity, and the number of true `entities`."""
        return {
            kind: precision_recall(right, predicted, true) | {"entities": true}
            for kind, (right, predicted, true) in zip(self.types, self.of_types.tolist(), strict=True)
        }
