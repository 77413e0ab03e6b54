"""Compact BERT-family students: methods, models, data, metrics."""

from taskkd.nlp.distilbert import distilbert_from_bert
from taskkd.nlp.methods import METHODS, candidate_kl, embedding_mimic, margin_mse, patient_kd, soft_targets
from taskkd.nlp.models import layer_taps, load_model, load_tokenizer, student_from_layers
from taskkd.nlp.sentence import SentenceEncoder, load_sentence_encoder
from taskkd.nlp.task import task_loss

__all__ = [
    "METHODS",
    "SentenceEncoder",
    "candidate_kl",
    "distilbert_from_bert",
    "embedding_mimic",
    "layer_taps",
    "load_model",
    "load_sentence_encoder",
    "load_tokenizer",
    "margin_mse",
    "patient_kd",
    "soft_targets",
    "student_from_layers",
    "task_loss",
]
