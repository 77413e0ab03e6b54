"""Compact BERT-family students: methods, models, data, metrics."""

from taskkd.nlp.layers import hidden_taps
from taskkd.nlp.methods import (
    METHODS,
    cofi,
    distilbert,
    lrc_bert,
    minilm,
    minilm_v2,
    mobilebert,
    patient_kd,
    soft_targets,
    tinybert,
    tinybert_general,
)
from taskkd.nlp.models import load_model, load_tokenizer, student_from_layers
from taskkd.nlp.task import task_loss

__all__ = [
    "METHODS",
    "cofi",
    "distilbert",
    "hidden_taps",
    "load_model",
    "load_tokenizer",
    "lrc_bert",
    "minilm",
    "minilm_v2",
    "mobilebert",
    "patient_kd",
    "soft_targets",
    "student_from_layers",
    "task_loss",
    "tinybert",
    "tinybert_general",
]
