"""Tokenizers of teacher and student: whether they are the same, how long texts may be, and data for two of them.

With two tokenizers the student's columns are plain, the teacher's are named `teacher_input_ids` and so on, which is
where `Frozen` looks for them; each is padded by its own tokenizer to its own length. Words of token classification are
the one unit both have: `word_index` and `teacher_word_index`, (batch, words), say where each begins, -1 nowhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from taskkd.adapters import build_adapter
from taskkd.errors import RecipeError
from taskkd.losses import universal_logits
from taskkd.nlp.heads import MASKED_LM, QUESTION_ANSWERING, TOKENS, Head
from taskkd.taps import Taps, accepted_arguments, parse_tap
from taskkd.terms import Match, Term

__all__ = [
    "TwoCollator",
    "by_answers",
    "by_words",
    "check_kind",
    "check_side",
    "check_terms",
    "fitting_length",
    "joined",
    "next_mask",
    "over_words",
    "positions",
    "richer",
    "same",
    "word_index",
]

Collate: TypeAlias = Callable[[Any], Mapping[str, Any]]
TEACHER = "teacher_"
WORDS = ("word_index", "teacher_word_index")
#: families whose positions are counted from the padding's number on
OFFSET = ("roberta", "camembert", "mpnet", "longformer", "data2vec-text", "xmod")
#: texts on which tokenizers that differ at all do: case, accents, spaces, digits, punctuation, rare words
PROBES = (
    "The quick brown fox can't jump over 12,345.67 dogs!",
    "  Crème brûlée costs €3 — antidisestablishmentarianism\t(ÄÖÜ) 你好 #x_y",
)


def same(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids for every text, as far as vocabularies and a few texts tell.

    Their classes do not matter, nor which further columns they give (DistilBERT's has no token types).
    """
    if one is other:
        return True
    if one.get_vocab() != other.get_vocab() or one.pad_token_id != other.pad_token_id:
        return False
    return all(one(*texts)["input_ids"] == other(*texts)["input_ids"] for texts in (*((p,) for p in PROBES), PROBES))


def richer(teacher: Any, student: Any) -> Any:
    """Of two tokenizers that are the same the one to make data with: the one that gives more columns."""
    return student if len(student.model_input_names) > len(teacher.model_input_names) else teacher


def check_kind(head: Head) -> None:
    """Refuse what cannot be distilled with different tokenizers.

    Raises:
        RecipeError: the head's logits are of tokens.
    """
    reasons = {
        MASKED_LM: "the logits are over different vocabularies. Losses that sort them (`uld`, Universal Logit "
        "Distillation) need no common vocabulary, but masked tokens still do not correspond",
        QUESTION_ANSWERING: "answers are spans of tokens, which do not correspond",
    }
    if head in reasons:
        raise RecipeError(
            f"{head.title} needs one tokenizer for teacher and student: {reasons[head]}. Give a student of the "
            "teacher's vocabulary."
        )


def positions(config: Any) -> int | None:
    """The longest text that a model takes, in tokens with the special ones, by its config; None: no limit is known."""
    longest = getattr(config, "max_position_embeddings", None)
    if not longest or longest < 0:
        return None
    offset = any(name in getattr(config, "model_type", "") for name in OFFSET)
    # A config that was not made for a checkpoint (512) has not counted the offset in; such a model fails at 511.
    return int(longest) - (config.pad_token_id + 1 if offset and config.pad_token_id is not None else 0)


def fitting_length(
    asked: int | None, tokenizer: Any, default: int = 128, configs: Mapping[str, Any] | None = None
) -> int:
    """The length that texts are cut to: what is asked for, or the default if the models take as much.

    Args:
        asked: `data.max_length`.
        tokenizer: knows a length, unless it was saved without.
        default: of the kind of task.
        configs: of the models that get these texts, by who they are ("teacher", "student").

    Raises:
        RecipeError: more is asked for than a model has positions.
    """
    limits = {who: positions(config) for who, config in (configs or {}).items()}
    known = {who: limit for who, limit in limits.items() if limit is not None}
    who = " and ".join(configs or {}) or "teacher"
    known.setdefault(who, 2**31)
    known[who] = min(known[who], int(min(getattr(tokenizer, "model_max_length", default), 2**31)))
    for owner, limit in known.items():
        if asked is not None and asked > limit:
            raise RecipeError(f"data.max_length {asked} is more than the {owner}'s {limit} positions.")
    return asked or min(default, *known.values())


# ---- data for two tokenizers


def joined(student: Any, teacher: Any, inputs: Sequence[str]) -> Any:
    """A student's table with the teacher's model inputs beside it, named `teacher_...`.

    Args:
        student, teacher: tables of the same samples by each tokenizer.
        inputs: the teacher's columns that its model reads.
    """
    import datasets

    columns = [c for c in inputs if c in teacher.column_names]
    other = teacher.select_columns(columns).rename_columns({c: TEACHER + c for c in columns})
    table = datasets.concatenate_datasets([student, other], axis=1)
    if "token_type_ids" in student.column_names and "token_type_ids" not in columns:
        # otherwise a teacher that could read the student's would get them
        table = table.add_column(TEACHER + "token_type_ids", [_zeros(ids) for ids in other[TEACHER + "input_ids"]])
    return table


def _zeros(ids: Sequence[Any]) -> list[Any]:
    """Zeros for the tokens of a sample, which may be several texts."""
    return [_zeros(own) if isinstance(own, list) else 0 for own in ids]


def word_index(words: Sequence[Sequence[str]], tokenizer: Any, max_length: int) -> list[list[int]]:
    """For each sample the position of the first piece of each word, -1 for words that are cut off or have no piece.

    Raises:
        RecipeError: the tokenizer is not of the fast kind, which knows words.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise RecipeError(
            f"{type(tokenizer).__name__} is no fast tokenizer, it does not say which piece belongs to which word: "
            "teacher and student with different tokenizers cannot be compared word by word."
        )
    found = tokenizer([list(w) for w in words], is_split_into_words=True, truncation=True, max_length=max_length)
    rows = []
    for i, own in enumerate(words):
        first: dict[int, int] = {}
        for position, word in enumerate(found.word_ids(i)):
            if word is not None:
                first.setdefault(word, position)
        rows.append([first.get(word, -1) for word in range(len(own))])
    return rows


class TwoCollator:
    """Batches for a student and a teacher with different tokenizers.

    Args:
        student, teacher: pad the columns of one tokenizer each.
        tokenizers: the two.
    """

    def __init__(self, student: Collate, teacher: Collate, tokenizers: tuple[Any, Any]) -> None:
        self.student, self.teacher, self.tokenizers = student, teacher, tokenizers
        self.fills = {**getattr(student, "fills", {}), **dict.fromkeys(WORDS, -1)}
        self.inputs = {
            TEACHER + name: name for name in {*tokenizers[1].model_input_names, "token_type_ids", "next_mask"}
        }

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these samples, as tensors."""
        plain = [{k: v for k, v in s.items() if k not in self.inputs and k not in WORDS} for s in samples]
        other = [{self.inputs[k]: v for k, v in s.items() if k in self.inputs} for s in samples]
        batch = dict(self.student(plain))
        if other[0]:
            batch |= {TEACHER + name: value for name, value in self.teacher(other).items()}
        for name, ids, tokenizer in zip(WORDS, ("input_ids", TEACHER + "input_ids"), self.tokenizers, strict=True):
            if name in samples[0]:
                gaps = [0] * len(samples)
                if tokenizer.padding_side == "left":
                    gaps = [batch[ids].shape[1] - len(sample[ids]) for sample in samples]
                batch[name] = _padded([sample[name] for sample in samples], gaps)
        return batch


def _padded(rows: Sequence[Sequence[int]], shifts: Sequence[int]) -> Tensor:
    """Positions as a tensor, moved by what stands before each row, padded with -1."""
    longest = max(map(len, rows))
    return torch.tensor(
        [
            [p + shift if p >= 0 else -1 for p in row] + [-1] * (longest - len(row))
            for row, shift in zip(rows, shifts, strict=True)
        ]
    )


# ---- terms


def over_words(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`loss` of tensors (batch, tokens, ...) of two tokenizations at the first piece of each word that both have."""

    def wrapped(
        student: Tensor, teacher: Tensor, *, word_index: Tensor, teacher_word_index: Tensor, **options: Any
    ) -> Tensor:
        mask = (word_index >= 0) & (teacher_word_index >= 0)
        return loss(_at(student, word_index), _at(teacher, teacher_word_index), mask=mask, **options)

    kind = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.signature(loss)
    own = [p for p in signature.parameters.values() if p.name != "mask"]
    own += [inspect.Parameter(name, kind, annotation=Tensor) for name in WORDS]
    wrapped.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    wrapped.__name__ = getattr(loss, "__name__", "loss")
    return wrapped


def _at(values: Tensor, index: Tensor) -> Tensor:
    """(batch, tokens, ...) at (batch, words): (batch, words, ...); where the index is -1, any value."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, index.clamp(min=0)]


def by_words(term: Term) -> Term:
    """A term over the first pieces of words (`mask: batch.word_mask`), for two tokenizers; any other as it is."""
    if not isinstance(term, Match) or term.mask != TOKENS.mask or term.several:
        return term
    options: dict[str, Any] = {name: f"batch.{name}" for name in WORDS}
    options |= {**term.option_taps, **term.option_schedules, **term.options}
    return Match(
        term.name,
        over_words(term.loss),
        term.student_pairs[0],
        term.teacher_pairs[0],
        adapter=_given(term.adapters, term.adapter_spec),
        teacher_adapter=_given(term.teacher_adapters, term.teacher_adapter_spec),
        select=term.select,
        weight=term.automatic or term.schedule,
        **options,
    )


def next_mask(labels: Sequence[Sequence[int]]) -> list[list[int]]:
    """1 at the positions before a token with a label, for each sample: where a causal model is asked for it."""
    return [[*(int(label >= 0) for label in row[1:]), 0] for row in labels]


def by_answers(term: Term) -> Term:
    """A term of universal logits, told where the teacher's answers are; any other as it is."""
    if not isinstance(term, Match) or term.loss is not universal_logits or "teacher_mask" in term.option_taps:
        return term
    return Match(
        term.name,
        term.loss,
        term.student_pairs[0],
        term.teacher_pairs[0],
        mask=term.mask,
        weight=term.automatic or term.schedule,
        teacher_mask="batch.teacher_next_mask",
        **{**term.option_schedules, **term.options},
    )


def _given(adapters: nn.ModuleList, spec: Any) -> Any:
    """The adapter that exists, or what builds it: of one token each, as the two have different numbers of them."""
    if len(adapters) or spec is None:
        return adapters[0] if len(adapters) else None
    return lambda own, other: build_adapter(spec, own[:, :1], other[:, :1])


def check_terms(terms: Sequence[Term], student: nn.Module, batch: Mapping[str, Any]) -> None:
    """Refuse what compares tokens of two tokenizations: terms on what grows with the student's padding.

    Args:
        terms: those of a stage.
        student: run twice, without gradient.
        batch: for two tokenizers.

    Raises:
        RecipeError: a term compares token by token.
    """
    read = {term: _compared(term) for term in terms}
    values = _grown(student, [tap for taps in read.values() for tap in taps], batch)
    words = "; the first pieces of words with `mask: batch.word_mask`" if "word_index" in batch else ""
    for term, taps in read.items():
        for tap in taps:
            if isinstance(term, Match):
                one, other = (term._values(v, [tap])[0] for v in values)
            else:
                one, other = (v[tap] for v in values)
            if isinstance(one, Tensor) and one.shape != other.shape:
                raise RecipeError(
                    f"term {term.name!r} compares the student's {tap!r} token by token, but student and teacher have "
                    "different tokenizers: their tokens are not the same pieces of text. What works: logits, a slice "
                    f"of one position ('[:, 0]' is [CLS]), the pooler, a sentence embedding{words}."
                )


def check_side(terms: Sequence[Term], tokenizer: Any) -> None:
    """Refuse terms on the first position of texts that are padded there.

    Raises:
        RecipeError: there is such a term, and the tokenizer pads on the left.
    """
    if tokenizer.padding_side != "left":
        return
    for term in terms:
        first = next((tap for tap in term.student_taps if tap.endswith("[:, 0]")), None)
        if first is not None:
            raise RecipeError(
                f"term {term.name!r} reads the first position of a text, {first!r}, and the tokenizer puts padding "
                "there (padding_side 'left'): save the tokenizer with padding_side 'right'."
            )


def _compared(term: Term) -> list[str]:
    """The student's taps that a term compares with the teacher's; none if it aligns words."""
    if isinstance(term, Match):
        aligned = {"teacher_word_index", "teacher_mask"} & set(term.option_taps)
        return [] if aligned else list(term.student_pairs)
    return [tap for tap in term.student_taps if parse_tap(tap).root != "batch"] if term.teacher_taps else []


@torch.no_grad()
def _grown(student: nn.Module, names: Sequence[str], batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The values of taps for a batch, and for the same with one column of padding (or tokens) less."""
    length = batch["input_ids"].shape[1]
    shorter = {
        k: v[:, :-1] if isinstance(v, Tensor) and v.ndim == 2 and v.shape[1] == length and k not in WORDS else v
        for k, v in batch.items()
    }
    taps, training = Taps(student, dict.fromkeys(names), "student"), student.training
    accepted = accepted_arguments(student.forward)
    found = []
    try:
        student.eval()
        for own in (batch, shorter):
            with taps.record():
                output = student(**{k: v for k, v in accepted(own).items() if k != "labels"})
            found.append(taps.read(output, own))
    finally:
        taps.close()
        student.train(training)
    return found
