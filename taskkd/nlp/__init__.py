"""Compact BERT-family students: methods, models, data, metrics."""

from taskkd.nlp.methods import METHODS, patient_kd, soft_targets
from taskkd.nlp.models import layer_taps, load_model, load_tokenizer, student_from_layers
from taskkd.nlp.task import task_loss

__all__ = [
    "METHODS",
    "layer_taps",
    "load_model",
    "load_tokenizer",
    "patient_kd",
    "soft_targets",
    "student_from_layers",
    "task_loss",
]
