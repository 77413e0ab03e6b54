"""Distillation losses: pure functions `(student, teacher, *, options) -> scalar`.

One convention: mean over every non-class dimension, `T^2` included, computed in fp32 (fp64 in, fp64 out). `targets`
has what papers make of a teacher's logits first.
"""

from taskkd.deprecations import lookup
from taskkd.losses import targets as targets
from taskkd.losses.attention import (
    attention_cross_entropy,
    attention_kl,
    attention_scores,
    self_attention_relation,
)
from taskkd.losses.channels import channel_weighted, channel_wise, matching_guided
from taskkd.losses.contrastive import cosine_nce, info_nce, noise_contrastive, relation_contrastive, triplet
from taskkd.losses.embeddings import margin_mse
from taskkd.losses.features import (
    activation_boundaries,
    attention_transfer,
    cosine,
    euclidean,
    factor,
    mse,
    neuron_selectivity,
    overhaul,
    partial_mse,
    prediction_aware,
    variational_information,
)
from taskkd.losses.layers import (
    attention_based_features,
    dynamic_layers,
    flow_of_solution,
    patience,
    pyramid,
    singular_vectors,
)
from taskkd.losses.logits import (
    decoupled,
    dist,
    generalised_jsd,
    kl_divergence,
    logit_mse,
    pseudo_label_cross_entropy,
    soft_cross_entropy,
)
from taskkd.losses.pairwise import pairwise_similarity
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
from taskkd.losses.tokens import feature_map_transfer, feature_statistics, token_similarity
from taskkd.losses.vocabularies import universal_logits

__all__ = [
    "activation_boundaries",
    "attention_based_features",
    "attention_cross_entropy",
    "attention_kl",
    "attention_scores",
    "attention_transfer",
    "category_structure",
    "channel_weighted",
    "channel_wise",
    "consecutive_correlation",
    "correlation_congruence",
    "cosine",
    "cosine_nce",
    "dark_rank",
    "decoupled",
    "dist",
    "dynamic_layers",
    "euclidean",
    "factor",
    "feature_map_transfer",
    "feature_statistics",
    "flow_of_solution",
    "generalised_jsd",
    "info_nce",
    "instance_relationship",
    "kernel_alignment",
    "kl_divergence",
    "logit_mse",
    "margin_mse",
    "matching_guided",
    "mse",
    "neuron_selectivity",
    "noise_contrastive",
    "overhaul",
    "pairwise_similarity",
    "partial_mse",
    "patience",
    "prediction_aware",
    "probabilistic_transfer",
    "pseudo_label_cross_entropy",
    "pyramid",
    "relation_contrastive",
    "relational_angle",
    "relational_distance",
    "self_attention_relation",
    "similarity_preserving",
    "singular_vectors",
    "soft_cross_entropy",
    "token_similarity",
    "triplet",
    "universal_logits",
    "variational_information",
]

__getattr__ = lookup(__name__, __all__)
