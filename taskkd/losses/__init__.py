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
from taskkd.losses.logits import decoupled, dist, kl_divergence, logit_mse, soft_cross_entropy
from taskkd.losses.relations import (
    category_structure,
    consecutive_correlation,
    correlation_congruence,
    dark_rank,
    instance_relationship,
    kernel_alignment,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)

__all__ = [
    "activation_boundaries",
    "attention_transfer",
    "category_structure",
    "channel_wise",
    "consecutive_correlation",
    "correlation_congruence",
    "cosine",
    "dark_rank",
    "decoupled",
    "dist",
    "factor",
    "flow_of_solution",
    "instance_relationship",
    "kernel_alignment",
    "kl_divergence",
    "logit_mse",
    "mse",
    "neuron_selectivity",
    "overhaul",
    "partial_mse",
    "patience",
    "prediction_aware",
    "probabilistic_transfer",
    "pyramid",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
    "soft_cross_entropy",
    "variational_information",
]
