from typing import Any

import pytest
import torch
import transformers

from taskkd.errors import RecipeError
from taskkd.nlp import hidden_taps, models
from taskkd.nlp.architectures import distilbert_from_bert
from taskkd.nlp.sentence import SentenceEncoder
from tests import tiny

IDS = torch.tensor([[2, 6, 18, 3, 0], [2, 7, 22, 9, 3]])
MASK = (IDS != 0).long()
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def bert(kind: str = "Model", **changes: Any) -> Any:
    """A BERT whose token types matter, in fp64."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.5, num_labels=2, **changes,
    )  # fmt: skip
    model = getattr(transformers, f"Bert{kind}")(config).eval().double()
    for parameter in model.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_all_layers_give_the_teachers_hidden_states() -> None:
    teacher = bert()
    student = distilbert_from_bert(teacher, [0, 1, 2, 3]).eval()
    own, other = (m(**BATCH, output_hidden_states=True).hidden_states for m in (student, teacher))
    assert len(own) == len(other) == 5
    kept = MASK.bool()
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a[kept], b[kept], rtol=1e-10, atol=1e-10)
    assert not any("pooler" in name or "token_type" in name for name, _ in student.named_parameters())


@pytest.mark.parametrize(
    ("kind", "output"), [("ForMaskedLM", "logits"), ("ForTokenClassification", "logits"),
                         ("ForQuestionAnswering", "start_logits")]
)  # fmt: skip
def test_heads_that_both_have_give_the_teachers_outputs(kind: str, output: str) -> None:
    teacher = bert(kind)
    student = distilbert_from_bert(teacher, [0, 1, 2, 3]).eval()
    own, other = student(**BATCH)[output], teacher(**BATCH)[output]
    torch.testing.assert_close(own[MASK.bool()], other[MASK.bool()], rtol=1e-10, atol=1e-10)


def test_layers_are_chosen_and_the_classifiers_head_is_a_function_of_the_seed() -> None:
    teacher = tiny.teacher()
    student = models.student_from_layers(teacher, [0, 3], architecture="distilbert")
    assert type(student) is transformers.DistilBertForSequenceClassification
    assert student.config.id2label == {0: "negative", 1: "positive"}
    layer = student.distilbert.transformer.layer[1]
    assert torch.equal(layer.attention.k_lin.weight, teacher.bert.encoder.layer[3].attention.self.key.weight)
    assert layer.attention.k_lin.weight.data_ptr() != teacher.bert.encoder.layer[3].attention.self.key.weight.data_ptr()
    assert hidden_taps(student)[1:] == ["distilbert.transformer.layer.0", "distilbert.transformer.layer.1"]
    before = torch.random.get_rng_state()
    heads = [
        models.student_from_layers(teacher, [0], architecture="distilbert", seed=s).classifier.weight for s in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_sentence_encoder_keeps_its_embeddings() -> None:
    teacher = SentenceEncoder(bert())
    student = models.student_from_layers(teacher, [0, 1, 2, 3], architecture="distilbert").eval()
    torch.testing.assert_close(
        student(**BATCH)["sentence_embedding"], teacher(**BATCH)["sentence_embedding"], rtol=1e-10, atol=1e-10
    )


def test_what_does_not_fit_is_refused() -> None:
    roberta = transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    )
    with pytest.raises(RecipeError, match="layers of RobertaModel do not fit; those of BertModel, BertForMaskedLM"):
        distilbert_from_bert(roberta, [0])
    with pytest.raises(RecipeError, match="layers of BertForNextSentencePrediction do not fit"):
        distilbert_from_bert(bert("ForNextSentencePrediction"), [0])
    with pytest.raises(RecipeError, match="expected numbers from 0 to 3"):
        distilbert_from_bert(bert(), [4])
    with pytest.raises(RecipeError, match="of epsilon 1e-12, the teacher's is 1e-05"):
        distilbert_from_bert(bert(layer_norm_eps=1e-5), [0])
    with pytest.raises(RecipeError, match="no architecture 'distilbret'"):
        models.student_from_layers(tiny.teacher(), [0], architecture="distilbret")  # type: ignore[arg-type]
