"""Distillation losses: pure functions `(student, teacher, *, options) -> scalar`.

One convention: mean over every non-class dimension, `T^2` included, computed in fp32 (fp64 in, fp64 out).
"""

from taskkd.losses.channels import channel_wise
from taskkd.losses.features import cosine, mse
from taskkd.losses.layers import patience
from taskkd.losses.logits import kl_divergence, logit_mse, soft_cross_entropy

__all__ = ["channel_wise", "cosine", "kl_divergence", "logit_mse", "mse", "patience", "soft_cross_entropy"]
