"""Compact BERT-family students: methods, models, data, metrics."""

from taskkd.deprecations import lookup
from taskkd.nlp.architectures import distilbert_from_bert
from taskkd.nlp.kinds.sequences import task_loss
from taskkd.nlp.layers import hidden_taps
from taskkd.nlp.methods import (
    METHODS,
    candidate_kl,
    cofi,
    distilbert,
    embedding_mimic,
    generalized_kd,
    lrc_bert,
    margin_mse,
    minilm,
    minilm_v2,
    mobilebert,
    patient_kd,
    soft_targets,
    tinybert,
    tinybert_general,
    universal_logits,
)
from taskkd.nlp.models import load_model, load_tokenizer, student_from_layers
from taskkd.nlp.sentence import SentenceEncoder, load_sentence_encoder

__all__ = [
    "METHODS",
    "SentenceEncoder",
    "candidate_kl",
    "cofi",
    "distilbert",
    "distilbert_from_bert",
    "embedding_mimic",
    "generalized_kd",
    "hidden_taps",
    "load_model",
    "load_sentence_encoder",
    "load_tokenizer",
    "lrc_bert",
    "margin_mse",
    "minilm",
    "minilm_v2",
    "mobilebert",
    "patient_kd",
    "soft_targets",
    "student_from_layers",
    "task_loss",
    "tinybert",
    "tinybert_general",
    "universal_logits",
]

__getattr__ = lookup(__name__, __all__)
