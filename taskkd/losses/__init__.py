"""Distillation losses: pure functions `(student, teacher, *, options) -> scalar`.

One convention: mean over every non-class dimension, `T^2` included, computed in fp32 (fp64 in, fp64 out).
"""

from taskkd.losses.channels import channel_wise
from taskkd.losses.features import cosine, mse
from taskkd.losses.layers import patience
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
    "category_structure",
    "channel_wise",
    "consecutive_correlation",
    "correlation_congruence",
    "cosine",
    "dark_rank",
    "decoupled",
    "dist",
    "instance_relationship",
    "kernel_alignment",
    "kl_divergence",
    "logit_mse",
    "mse",
    "patience",
    "probabilistic_transfer",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
    "soft_cross_entropy",
]
