"""Data augmentation by replacing words (TinyBERT): a masked LM's guesses, or words with near vectors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from taskkd.augmentation import generator_for
from taskkd.errors import TaskkdError
from taskkd.nlp.tokenization import positions
from taskkd.nlp.word_vectors import WORD, WordVectors, word_marker
from taskkd.taps import accepted_arguments

__all__ = ["GLUE_COPIES", "STOP_WORDS", "WordReplacement"]

#: copies of each text that TinyBERT makes for a GLUE task
GLUE_COPIES = {"cola": 30, "mnli": 10, "mrpc": 30, "sst2": 20, "stsb": 30, "qqp": 10, "qnli": 20, "rte": 30}

_FUNCTION_WORDS = """
a about above after again against all am an and any are as at be because been before being below between both but
by can cannot could d did do does doing down during each few for from further had has have having he her here hers
herself him himself his how i if in into is it its itself just ll m me might more most must my myself no nor not
now of off on once only or other ought our ours ourselves out over own re s same shall she should so some such t
than that the their theirs them themselves then there these they this those through to too under until up upon ve
very was we were what when where which while who whom why will with would y you your yours yourself yourselves
ain aren couldn didn doesn don hadn hasn haven isn mightn mustn needn shan shouldn wasn weren won wouldn
"""
#: English function words, and what basic tokenization leaves of contractions ("don ' t")
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())
CHUNK = 64


@dataclass
class _Word:
    """A word that may be replaced: where it stands in its text, as the tokenizer sees it, and by what."""

    start: int
    end: int
    text: str
    candidates: list[str] = field(default_factory=list)
    asked: bool = False  # the masked LM was asked, whether or not it gave a word


class WordReplacement:
    """Copies of texts in which words are replaced by words that fit there.

    Source: Jiao et al. 2020 (TinyBERT), algorithm 1, with what the authors' code adds. A word is one of a text's basic
    tokens (cut at spaces and punctuation), of letters a to z, no stop word. A word of one word piece gets the masked
    LM's `k` likeliest pieces in its place, as segment A of `masked text [SEP] text [SEP]`, but for pieces inside words;
    the word itself may be among them. A word of several pieces gets the `k` nearest words by their vectors. In each of
    `n` copies each word is replaced with probability `p` by one of its candidates, all alike; copies that are equal
    are dropped, so there may be fewer.

    Departures: the text between the replaced words stays as it is, spaces and case included (the authors write the
    lower-cased tokens with a space between, the same to an uncased tokenizer). Copies of a pair change one column and
    keep the other as it is (the authors' code pairs the second column's copies with the last copy of the first).

    What is drawn depends on `seed`, the id and the column alone, not on order or batches; the candidates on the masked
    LM to rounding.

    Args:
        mlm: a masked LM (`logits` over the vocabulary); put in eval mode. None: words have their vectors alone.
        tokenizer: of the masked LM, a fast one; without one its vectors are asked for lower-case words.
        vectors: one table or several, asked in this order; for words of several pieces, without a masked LM for all.
        p: probability that a word is replaced.
        n: copies of a text, before equal ones are dropped.
        k: candidates for a word.
        seed: of all draws.
        batch_tokens: of one run of the masked LM, padding included.

    Raises:
        TaskkdError: there is neither a masked LM nor a table, or an option is out of range.

    Example:
        >>> vectors = WordVectors({"good": [1.0, 0.1], "great": [1.0, 0.0], "dull": [-1.0, 0.2]})
        >>> replace = WordReplacement(vectors=vectors, p=1.0, k=1)
        >>> list(replace.texts(["A Good film."]))
        [['A Good film.', 'A Great film.']]
    """

    def __init__(
        self,
        mlm: Any = None,
        tokenizer: Any = None,
        *,
        vectors: WordVectors | Sequence[WordVectors] = (),
        p: float = 0.4,
        n: int = 20,
        k: int = 15,
        seed: int = 0,
        batch_tokens: int = 4096,
    ) -> None:
        self.vectors = [vectors] if isinstance(vectors, WordVectors) else list(vectors)
        if mlm is None and not self.vectors:
            raise TaskkdError("word replacement needs a masked LM, word vectors, or both.")
        if mlm is not None and not getattr(tokenizer, "is_fast", False):
            raise TaskkdError(
                "word replacement needs the masked LM's tokenizer, of the fast kind: it finds words by their offsets."
            )
        if not 0 <= p <= 1 or n < 1 or k < 1:
            raise TaskkdError(f"word replacement: p must be in [0, 1], n and k at least 1; got p={p}, n={n}, k={k}.")
        self.mlm: Any = None if mlm is None else mlm.eval()
        self.tokenizer = tokenizer
        # DistilBERT takes no token types, with whatever tokenizer it comes
        self._accepted = (lambda batch: batch) if mlm is None else accepted_arguments(mlm.forward)
        self.p, self.n, self.k, self.seed, self.batch_tokens = p, n, k, seed, batch_tokens
        self.lowercase = tokenizer is None or tokenizer.tokenize("A") == tokenizer.tokenize("a")
        self._names: dict[int, str | None] = {}

    # ---- what is asked for

    def texts(self, texts: Iterable[str], ids: Iterable[int] | None = None) -> Iterator[list[str]]:
        """For each text: the text itself, then its distinct copies.

        Args:
            texts: the texts.
            ids: one for each, which the draws depend on; default: its position.
        """
        for chunk, own in _chunks(texts, ids):
            words = self._words(chunk)
            for text, number in zip(chunk, own, strict=True):
                yield self._copies(text, words[text], 0, number)

    def pairs(
        self, pairs: Iterable[tuple[str, str]], ids: Iterable[int] | None = None
    ) -> Iterator[list[tuple[str, str]]]:
        """For each pair: itself, copies with another first text, copies with another second one (`n` of each at most).

        Args:
            pairs: the pairs.
            ids: as in `texts`.
        """
        for chunk, own in _chunks(pairs, ids):
            words = self._words([text for pair in chunk for text in pair])
            for (first, second), number in zip(chunk, own, strict=True):
                left = self._copies(first, words[first], 0, number)
                right = self._copies(second, words[second], 1, number)
                yield [*((copy, second) for copy in left), *((first, copy) for copy in right[1:])]

    def count(self, texts: Iterable[str]) -> int:
        """How many predictions of the masked LM these texts need: the words of one piece in each distinct text."""
        distinct = dict.fromkeys(texts)
        return sum(len(self._queries(t, _find(t, self.lowercase))) for t in distinct) if self.mlm is not None else 0

    # ---- copies

    def _copies(self, text: str, words: Sequence[_Word], column: int, number: int) -> list[str]:
        words = [w for w in words if w.candidates]
        copies = [text]
        draws = torch.rand(self.n, 2, len(words), generator=generator_for(self.seed, column, number))
        for chances, picks in draws.tolist():
            parts, end = [], 0
            for word, chance, pick in zip(words, chances, picks, strict=True):
                if chance < self.p:
                    chosen = word.candidates[int(pick * len(word.candidates))]
                    parts += [text[end : word.start], _with_case(chosen, text[word.start : word.end])]
                    end = word.end
            copies.append("".join([*parts, text[end:]]))
        return list(dict.fromkeys(copies))

    # ---- candidates

    def _words(self, texts: Iterable[str]) -> dict[str, list[_Word]]:
        """The words of each distinct text, with their candidates."""
        found = {text: _find(text, self.lowercase) for text in dict.fromkeys(texts)}
        if self.mlm is not None:
            self._predict(found)
        for table in self.vectors:
            open_ = [w for words in found.values() for w in words if not w.candidates and not w.asked]
            for word, near in zip(open_, table.nearest([w.text for w in open_], self.k), strict=True):
                word.candidates = near
        return found

    def _queries(self, text: str, words: Sequence[_Word]) -> list[tuple[_Word, Any, int]]:
        """(word, encoded `text [SEP] text`, the position of the word in it) for each word of one piece."""
        encoded = self.tokenizer(text, text, truncation=True, max_length=self._longest(), return_offsets_mapping=True)
        offsets, sequences = encoded.pop("offset_mapping"), encoded.sequence_ids(0)
        queries = []
        for word in words:
            pieces = [
                i
                for i, ((start, end), sequence) in enumerate(zip(offsets, sequences, strict=True))
                if sequence == 0 and start < word.end and end > word.start
            ]
            if len(pieces) == 1 and encoded["input_ids"][pieces[0]] != self.tokenizer.unk_token_id:
                queries.append((word, encoded, pieces[0]))
        return queries

    def _longest(self) -> int:
        return int(min(self.tokenizer.model_max_length, positions(self.mlm.config) or 512))

    def _predict(self, texts: dict[str, list[_Word]]) -> None:
        """Ask the masked LM for the words of one piece, copies of about the same length together."""
        queries = [query for text, words in texts.items() for query in self._queries(text, words)]
        queries.sort(key=lambda query: len(query[1]["input_ids"]))
        start = 0
        while start < len(queries):
            longest, stop = 0, start
            while stop < len(queries):
                longest = max(longest, len(queries[stop][1]["input_ids"]))
                if stop > start and longest * (stop + 1 - start) > self.batch_tokens:
                    break
                stop += 1
            batch = queries[start:stop]
            for (word, _, _), best in zip(batch, self._likeliest(batch), strict=True):
                word.asked = True
                word.candidates = [name for i in best if (name := self._name(i)) is not None]
            start = stop

    @torch.no_grad()
    def _likeliest(self, queries: Sequence[tuple[_Word, Any, int]]) -> list[list[int]]:
        batch = self.tokenizer.pad(
            [dict(encoded) for _, encoded, _ in queries], padding_side="right", return_tensors="pt"
        )
        rows, asked = torch.arange(len(queries)), torch.tensor([position for _, _, position in queries])
        batch["input_ids"][rows, asked] = self.tokenizer.mask_token_id
        device = next((p.device for p in self.mlm.parameters()), torch.device("cpu"))
        logits: Tensor = self.mlm(**self._accepted(batch.to(device))).logits[rows, asked]
        best: list[list[int]] = logits.topk(min(self.k, logits.shape[-1])).indices.tolist()
        return best

    def _name(self, token: int) -> str | None:
        """A piece of the vocabulary as a word; None if it is inside words or a special one."""
        if token not in self._names:
            piece = self.tokenizer.convert_ids_to_tokens(token)
            inside = piece is None or piece.startswith("##") or not piece.startswith(word_marker(self.tokenizer))
            special = token in self.tokenizer.all_special_ids
            name = "" if inside or special else self.tokenizer.convert_tokens_to_string([piece]).strip()
            self._names[token] = name or None
        return self._names[token]


def _find(text: str, lowercase: bool) -> list[_Word]:
    """The basic tokens of a text that may be replaced."""
    from tokenizers.pre_tokenizers import BertPreTokenizer

    found = []
    for token, (start, end) in BertPreTokenizer().pre_tokenize_str(text):
        word = token.lower() if lowercase else token
        if WORD.fullmatch(word) and word not in STOP_WORDS:
            found.append(_Word(start, end, word))
    return found


def _with_case(word: str, like: str) -> str:
    """The word with the capitals of what it stands for."""
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word


def _chunks(items: Iterable[Any], ids: Iterable[int] | None) -> Iterator[tuple[list[Any], list[int]]]:
    """The items and their ids, some at a time."""
    numbered = iter(enumerate(items) if ids is None else zip(ids, items, strict=True))
    while chunk := list(itertools.islice(numbered, CHUNK)):
        yield [item for _, item in chunk], [int(number) for number, _ in chunk]
