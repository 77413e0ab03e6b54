"""Heads: what a model predicts, recognised by the name of its class."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CAUSAL_LM",
    "HEADS",
    "MASKED_LM",
    "QUESTION_ANSWERING",
    "SENTENCE",
    "SEQUENCE",
    "TOKENS",
    "Head",
    "head_of",
    "head_of_checkpoint",
]


@dataclass(frozen=True)
class Head:
    """One kind of head.

    Args:
        suffix: of the model class: `Bert<suffix>`, loaded by `AutoModel<suffix>`.
        logits: the taps of its logits; none: there is nothing to train it on but a teacher.
        mask: the tap that says which positions of the logits count; None: all.
        labelled: whether the logits are one for each label of the data.
        other: another name that such classes end in.
    """

    suffix: str
    logits: tuple[str, ...] = ("out.logits",)
    mask: str | None = None
    labelled: bool = False
    other: str | None = None

    @property
    def title(self) -> str:
        """For errors, as "token classification"."""
        return " ".join(re.findall("[A-Z][a-z]+|[A-Z]+", self.suffix.removeprefix("For"))).lower()


SEQUENCE = Head("ForSequenceClassification", labelled=True)
TOKENS = Head("ForTokenClassification", mask="batch.word_mask", labelled=True)
QUESTION_ANSWERING = Head("ForQuestionAnswering", ("out.start_logits", "out.end_logits"), "batch.context_mask")
MASKED_LM = Head("ForMaskedLM", mask="batch.attention_mask")
CAUSAL_LM = Head("ForCausalLM", mask="batch.attention_mask", other="LMHeadModel")
SENTENCE = Head("SentenceEncoder", logits=())
HEADS = (SEQUENCE, TOKENS, QUESTION_ANSWERING, MASKED_LM, CAUSAL_LM, SENTENCE)


def _find(names: Iterable[str]) -> Head | None:
    return next(
        (h for name in names for h in HEADS if h.suffix in name or (h.other is not None and h.other in name)), None
    )


def head_of(model: Any) -> Head:
    """The head of a model; one of an unknown class counts as a sequence classifier."""
    return _find(c.__name__ for c in type(model).__mro__) or SEQUENCE


def head_of_checkpoint(config: Any) -> Head | None:
    """The head that a checkpoint was saved with, from its config; None: a bare encoder, or one not known here."""
    return _find(getattr(config, "architectures", None) or [])
