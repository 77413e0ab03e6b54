"""Word vectors: the words nearest to a word, from a GloVe file, a table, or a model's own input embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskkd.errors import DataError

__all__ = ["WordVectors", "word_marker"]

WORD = re.compile("[a-z]+")
LIMIT = 100_000


class WordVectors:
    """Words and their vectors, with the nearest words by cosine.

    Args:
        table: word -> vector; all of one length.

    Raises:
        DataError: there is no word, or the vectors differ in length.

    Example:
        >>> vectors = WordVectors({"good": [1.0, 0.1], "great": [1.0, 0.0], "dull": [-1.0, 0.2]})
        >>> vectors.nearest(["good", "unheard"], 1)
        [['great'], []]
    """

    def __init__(self, table: Mapping[str, Sequence[float] | Tensor]) -> None:
        if not table:
            raise DataError("a table of word vectors needs a word.")
        rows = [torch.as_tensor(v, dtype=torch.float32) for v in table.values()]
        for word, row in zip(table, rows, strict=True):
            if row.shape != rows[0].shape or row.ndim != 1:
                raise DataError(f"the vector of {word!r} has shape {tuple(row.shape)}, others {tuple(rows[0].shape)}.")
        self._set(list(table), torch.stack(rows))

    def _set(self, words: list[str], matrix: Tensor) -> None:
        self.words = words
        self._index = {word: i for i, word in enumerate(words)}
        self._matrix = torch.nn.functional.normalize(matrix.detach().cpu().float(), dim=1)
        self._known: dict[tuple[str, int], list[str]] = {}

    @classmethod
    def _of(cls, words: list[str], matrix: Tensor) -> WordVectors:
        vectors = cls.__new__(cls)
        vectors._set(words, matrix)
        return vectors

    @classmethod
    def read(cls, path: str | Path, *, limit: int = LIMIT) -> WordVectors:
        """The first words of a text file with a word and its numbers on each line (GloVe; word2vec's head is skipped).

        Args:
            path: of the file.
            limit: words that are read; such files are sorted by frequency.

        Raises:
            DataError: no such file, or a line that is no word with numbers.
        """
        words: list[str] = []
        rows: list[Any] = []
        try:
            with Path(path).open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    fields = line.rstrip().split(" ")
                    if number == 1 and len(fields) == 2:
                        continue
                    if len(words) >= limit:
                        break
                    size = len(rows[0]) if rows else len(fields) - 1
                    rows.append(_numbers(fields, size, f"{path}, line {number}"))
                    words.append(" ".join(fields[:-size]))  # a few tokens of the largest GloVe file have spaces
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"word vectors {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}.") from None
        if not words:
            raise DataError(f"{path}: the file has no word vectors.")
        return cls._of(words, torch.from_numpy(np.stack(rows)))

    @classmethod
    def of_model(cls, model: Any, tokenizer: Any) -> WordVectors:
        """The rows of a model's input embedding matrix that are whole words of letters a to z.

        Ours, not of a paper: for where neither a masked LM nor word vectors are at hand.

        Raises:
            DataError: the vocabulary has no such word.
        """
        marker = word_marker(tokenizer)
        found = {
            token.removeprefix(marker): i
            for token, i in tokenizer.get_vocab().items()
            if token.startswith(marker) and WORD.fullmatch(token.removeprefix(marker))
        }
        if not found:
            raise DataError(f"the vocabulary of {type(tokenizer).__name__} has no whole words of letters a to z.")
        return cls._of(list(found), model.get_input_embeddings().weight[list(found.values())])

    def __contains__(self, word: str) -> bool:
        return word in self._index

    def __len__(self) -> int:
        return len(self.words)

    def nearest(self, words: Sequence[str], k: int) -> list[list[str]]:
        """For each word the `k` nearest others by cosine, nearest first; none for a word that is not in the table."""
        k = min(k, len(self.words) - 1)
        fresh = [w for w in dict.fromkeys(words) if w in self._index and (w, k) not in self._known]
        for start in range(0, len(fresh), 256):
            chunk = fresh[start : start + 256]
            rows = torch.tensor([self._index[w] for w in chunk])
            similarity = self._matrix[rows] @ self._matrix.T
            similarity[torch.arange(len(chunk)), rows] = -torch.inf
            for word, best in zip(chunk, similarity.topk(k).indices.tolist(), strict=True):
                self._known[word, k] = [self.words[i] for i in best]
        return [self._known.get((w, k), []) for w in words]


def _numbers(fields: Sequence[str], size: int, where: str) -> Any:
    try:
        if size < 1 or len(fields) <= size:
            raise ValueError
        row = np.array(fields[-size:], dtype=np.float32)
        if not np.isfinite(row).all():
            raise ValueError
    except ValueError:
        raise DataError(f"{where}: expected a word and {max(size, 1)} finite numbers, separated by spaces.") from None
    return row


def word_marker(tokenizer: Any) -> str:
    """What a vocabulary writes before a piece that starts a word: "Ġ" (byte-level BPE), "▁" (SentencePiece), or ""."""
    last = (tokenizer.tokenize("a a") or [""])[-1]
    return last[0] if last in ("Ġa", "▁a") else ""
