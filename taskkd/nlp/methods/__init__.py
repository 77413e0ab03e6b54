"""The NLP methods, one file a paper. Each is `method(student, teacher, *, options) -> Method`."""

from collections.abc import Callable

from taskkd.nlp.methods.cofi import cofi
from taskkd.nlp.methods.distilbert import distilbert
from taskkd.nlp.methods.lrc_bert import lrc_bert
from taskkd.nlp.methods.minilm import minilm, minilm_v2
from taskkd.nlp.methods.mobilebert import mobilebert
from taskkd.nlp.methods.patient_kd import patient_kd
from taskkd.nlp.methods.soft_targets import soft_targets
from taskkd.nlp.methods.tinybert import tinybert, tinybert_general
from taskkd.stages import Method

__all__ = [
    "METHODS",
    "cofi",
    "distilbert",
    "lrc_bert",
    "minilm",
    "minilm_v2",
    "mobilebert",
    "patient_kd",
    "soft_targets",
    "tinybert",
    "tinybert_general",
]

METHODS: dict[str, Callable[..., Method]] = {
    "cofi": cofi,
    "distilbert": distilbert,
    "lrc_bert": lrc_bert,
    "minilm": minilm,
    "minilm_v2": minilm_v2,
    "mobilebert": mobilebert,
    "patient_kd": patient_kd,
    "soft_targets": soft_targets,
    "tinybert": tinybert,
    "tinybert_general": tinybert_general,
}
