"""What `taskkd check` says about a pair of models."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from taskkd.nlp.pairs import describe_pair
from tests.nlp import wordpieces

LARGE, SMALL = wordpieces.wordpiece(1500), wordpieces.wordpiece(700)


def facts(student: Any, teacher: Any, tokenizer: Any = LARGE, other: Any = None) -> dict[str, str]:
    encoding = SimpleNamespace(max_length=48)
    of_teacher = None if other is None else SimpleNamespace(tokenizer=other, encoding=SimpleNamespace(max_length=32))
    data = SimpleNamespace(tokenizer=tokenizer, encoding=encoding, of_teacher=of_teacher)
    return dict(describe_pair(data, student, teacher))


@pytest.fixture(scope="module")
def teacher() -> Any:
    return wordpieces.model("Bert", LARGE, layers=4, **wordpieces.LABELS)


def test_a_pair_that_fits(teacher: Any) -> None:
    found = facts(wordpieces.model("Bert", LARGE, **wordpieces.LABELS), teacher)
    assert found["sizes"].endswith("of the teacher's parameters; hidden states of 16 in both")
    assert found["layers"] == "2 of 4; uniform map 0 <- 1, 1 <- 3 (from 0)"
    assert found["attention"] == "heads: 2 in both; scores, probabilities and relations can be compared"
    assert found["vocabulary"] == "the same, 1,500 pieces"
    assert found["length"] == "texts are cut to 48 tokens; positions: 64 and 64"
    assert found["labels"] == "the same 2: negative, positive"


def test_what_does_not_fit(teacher: Any) -> None:
    student = wordpieces.model("Bert", SMALL, layers=5)
    student.config.num_attention_heads, student.config.hidden_size = 4, 8
    found = facts(student, teacher)
    assert "hidden states of 8 and 16: terms on them need an adapter" in found["sizes"]
    assert "the student is deeper" in found["layers"]
    assert found["attention"].startswith("heads: 4 and 2; scores and probabilities (TinyBERT) cannot be compared")
    assert found["vocabulary"].endswith("a model has embeddings for 700 only")
    assert found["labels"] == "['LABEL_0', 'LABEL_1'] and ['negative', 'positive']"


def test_two_tokenizers(teacher: Any) -> None:
    found = facts(wordpieces.model("DistilBert", SMALL), teacher, SMALL, LARGE)
    assert found["vocabulary"].startswith("different, 700 and 1,500 pieces")
    assert found["attention"] == "of different tokens: it cannot be compared"
    assert found["length"] == "texts are cut to 48 tokens, the teacher's to 32; positions: 64 and 64"


def test_models_without_attention_to_be_read(teacher: Any) -> None:
    config = DebertaV2Config(
        vocab_size=1500, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    found = facts(teacher, DebertaV2ForSequenceClassification(config))
    assert found["attention"].startswith("not to be had of the teacher (DebertaV2ForSequenceClassification)")


def test_regression_and_other_heads(teacher: Any) -> None:
    regressor = wordpieces.model("Bert", LARGE, num_labels=1)
    assert facts(regressor, regressor)["labels"] == "regression"
    masked = wordpieces.model("Bert", LARGE, "ForMaskedLM")
    assert facts(masked, masked)["labels"] == "none, masked lm"
