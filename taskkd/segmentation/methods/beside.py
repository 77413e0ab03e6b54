"""What methods on relations share: the tap of the features, and the soft targets that papers add to their own loss."""

from __future__ import annotations

from torch import nn

from taskkd import losses
from taskkd.errors import RecipeError
from taskkd.segmentation.terms import Ignore, MapTerm
from taskkd.terms import Term

__all__ = ["check_classes", "feature_of", "last_stage", "soft_terms"]


def feature_of(model: nn.Module, who: str) -> str:
    """The tap of the features before the classifier.

    Raises:
        RecipeError: the model does not say which they are.
    """
    tap = model.views.feature  # type: ignore[union-attr]
    if tap is None:
        raise RecipeError(
            f"the {who} does not name its features: `feature=` of its `Segmenter` is the tap of the map before the "
            "classifier."
        )
    return str(tap)


def last_stage(model: nn.Module, who: str) -> str:
    """The tap of the backbone's last map.

    Raises:
        RecipeError: the model does not say which it is.
    """
    stages: tuple[str, ...] = model.views.stages  # type: ignore[union-attr, assignment]
    if not stages:
        raise RecipeError(
            f"the {who}'s `views.stages`, the taps of its backbone's maps, are empty; on='feature' looks at the map "
            "before the classifier."
        )
    return stages[-1]


def check_classes(student: nn.Module, teacher: nn.Module, otherwise: str) -> None:
    """Refuse networks that differ in the number of classes; `otherwise` ends the sentence.

    Raises:
        RecipeError: they do.
    """
    counts = [len(m.classes) for m in (student, teacher)]  # type: ignore[arg-type]
    if counts[0] != counts[1]:
        raise RecipeError(
            f"logits can be compared between the same classes alone; the student has {counts[0]}, the teacher "
            f"{counts[1]}. {otherwise}"
        )


def soft_terms(
    student: nn.Module, teacher: nn.Module, weight: float, temperature: float = 1.0, ignore: Ignore = "padding"
) -> list[Term]:
    """Pixel-wise soft targets on the native logits, `T^2 KL`, mean over pixels; none of weight 0.

    Raises:
        RecipeError: the numbers of classes differ.
    """
    if weight == 0:
        return []
    check_classes(student, teacher, "kd=0 leaves soft targets out.")
    taps = (str(m.views.logits) for m in (student, teacher))  # type: ignore[union-attr]
    return [
        MapTerm("logits", losses.kl_divergence, *taps, weight=weight, ignore=ignore, temperature=temperature, dim=1)
    ]
