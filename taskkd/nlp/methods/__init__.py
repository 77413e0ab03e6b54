"""The NLP methods, one file a paper. Each is `method(student, teacher, *, options) -> Method`."""

from collections.abc import Callable

from taskkd.nlp.methods.patient_kd import patient_kd
from taskkd.nlp.methods.soft_targets import soft_targets
from taskkd.stages import Method

__all__ = ["METHODS", "patient_kd", "soft_targets"]

METHODS: dict[str, Callable[..., Method]] = {
    "patient_kd": patient_kd,
    "soft_targets": soft_targets,
}
