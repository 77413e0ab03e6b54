"""The NLP methods, one file a paper. Each is `method(student, teacher, *, options) -> Method`."""

from collections.abc import Callable

from taskkd.nlp.methods.candidates import candidate_kl, margin_mse
from taskkd.nlp.methods.embedding_mimic import embedding_mimic
from taskkd.nlp.methods.patient_kd import patient_kd
from taskkd.nlp.methods.soft_targets import soft_targets
from taskkd.stages import Method

__all__ = ["METHODS", "candidate_kl", "embedding_mimic", "margin_mse", "patient_kd", "soft_targets"]

METHODS: dict[str, Callable[..., Method]] = {
    "candidate_kl": candidate_kl,
    "embedding_mimic": embedding_mimic,
    "margin_mse": margin_mse,
    "patient_kd": patient_kd,
    "soft_targets": soft_targets,
}
