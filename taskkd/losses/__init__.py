"""Distillation losses: pure functions `(student, teacher, *, options) -> scalar`.

One convention: mean over every non-class dimension, `T^2` included, computed in fp32 (fp64 in, fp64 out).
"""

from taskkd.losses.channels import channel_wise
from taskkd.losses.features import (
    activation_boundaries,
    attention_transfer,
    cosine,
    factor,
    mse,
    neuron_selectivity,
    overhaul,
    partial_mse,
    prediction_aware,
    variational_information,
)
from taskkd.losses.layers import flow_of_solution, patience, pyramid
from taskkd.losses.logits import kl_divergence, logit_mse, soft_cross_entropy

__all__ = [
    "activation_boundaries",
    "attention_transfer",
    "channel_wise",
    "cosine",
    "factor",
    "flow_of_solution",
    "kl_divergence",
    "logit_mse",
    "mse",
    "neuron_selectivity",
    "overhaul",
    "partial_mse",
    "patience",
    "prediction_aware",
    "pyramid",
    "soft_cross_entropy",
    "variational_information",
]
