"""The kinds of NLP tasks: one object each, by the name that `data.type` of a recipe has."""

from __future__ import annotations

from typing import Any

from taskkd.nlp.heads import head_of
from taskkd.nlp.kinds.base import ComparesWithTeacher, Encoding, Kind
from taskkd.nlp.kinds.causal import CAUSAL_LM
from taskkd.nlp.kinds.masked import MASKED_LM
from taskkd.nlp.kinds.questions import QUESTION_ANSWERING
from taskkd.nlp.kinds.sentences import SENTENCE_EMBEDDING
from taskkd.nlp.kinds.sequences import CLASSIFICATION, REGRESSION
from taskkd.nlp.kinds.tokens import TOKEN_CLASSIFICATION
from taskkd.nlp.models import is_regression

__all__ = ["KINDS", "ComparesWithTeacher", "Encoding", "Kind", "kind_of"]

ALL: tuple[Kind, ...] = (
    CLASSIFICATION, REGRESSION, TOKEN_CLASSIFICATION, QUESTION_ANSWERING, MASKED_LM, CAUSAL_LM,
    SENTENCE_EMBEDDING,
)  # fmt: skip
KINDS: dict[str, Kind] = {kind.name: kind for kind in ALL}


def kind_of(model: Any) -> Kind:
    """The kind of task that a model is for, by its head."""
    if is_regression(model):
        return REGRESSION
    return next(kind for kind in KINDS.values() if kind.head is head_of(model))
