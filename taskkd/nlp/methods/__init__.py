"""The NLP methods, one file a paper. Each is `method(student, teacher, *, options) -> Method`."""

from collections.abc import Callable

from taskkd.nlp.methods.candidates import candidate_kl, margin_mse
from taskkd.nlp.methods.cofi import cofi
from taskkd.nlp.methods.distilbert import distilbert
from taskkd.nlp.methods.embedding_mimic import embedding_mimic
from taskkd.nlp.methods.generalized_kd import generalized_kd, universal_logits
from taskkd.nlp.methods.lrc_bert import lrc_bert
from taskkd.nlp.methods.minilm import minilm, minilm_v2
from taskkd.nlp.methods.mobilebert import mobilebert
from taskkd.nlp.methods.patient_kd import patient_kd
from taskkd.nlp.methods.soft_targets import soft_targets
from taskkd.nlp.methods.tinybert import tinybert, tinybert_general
from taskkd.stages import Method

__all__ = [
    "METHODS",
    "candidate_kl",
    "cofi",
    "distilbert",
    "embedding_mimic",
    "generalized_kd",
    "lrc_bert",
    "margin_mse",
    "minilm",
    "minilm_v2",
    "mobilebert",
    "patient_kd",
    "soft_targets",
    "tinybert",
    "tinybert_general",
    "universal_logits",
]

METHODS: dict[str, Callable[..., Method]] = {
    "candidate_kl": candidate_kl,
    "cofi": cofi,
    "distilbert": distilbert,
    "embedding_mimic": embedding_mimic,
    "generalized_kd": generalized_kd,
    "lrc_bert": lrc_bert,
    "margin_mse": margin_mse,
    "minilm": minilm,
    "minilm_v2": minilm_v2,
    "mobilebert": mobilebert,
    "patient_kd": patient_kd,
    "soft_targets": soft_targets,
    "tinybert": tinybert,
    "tinybert_general": tinybert_general,
    "universal_logits": universal_logits,
}
