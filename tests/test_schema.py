"""What the sections of recipes share: sentences instead of pydantic's errors, and a baseline that follows."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import Field

from taskkd.detection.schema import Data as DetectionData
from taskkd.errors import RecipeError
from taskkd.face.schema import Data as FaceData
from taskkd.schema import (
    Baseline,
    Model,
    Training,
    VisionRecipe,
    check_one_source,
    model_of,
    options_of,
    own_part,
    own_settings,
)


class Network(Model):
    layers: int = Field(1, ge=1)
    width: Annotated[int, Field(ge=1)] = 8


class Teacher(Network):
    size: float = 1.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"widht": 3}, r"^network: unknown key 'widht' \(did you mean 'width'\?\)\.$"),
        ({"layers": 0}, r"^network: layers: input should be greater than or equal to 1, got 0\.$"),
    ],
)
def test_a_wrong_model_is_a_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        model_of(Network, given, "network")
    assert model_of(Network, {"width": 3}, "network").width == 3


def test_a_teacher_has_more_than_its_model() -> None:
    teacher = Teacher(width=3, layers=1, size=2.0)
    assert own_settings(teacher, Network) == ["width"]
    assert own_part(teacher, Network).model_fields_set == {"width", "layers"}


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (DetectionData, {"coco": {"train": "x"}, "metric": "mAP"}, r"^distill: metric: .*'AP50'.*, got 'mAP'\.$"),
        (
            FaceData,
            {"folder": {"train": "x"}, "metric": "AP"},
            r"^distill: metric: expected one of accuracy, .*'AP'\.$",
        ),
        (DetectionData, {}, r"^distill: exactly one of coco, voc, hub and sample must be given\.$"),
    ],
)
def test_wrong_options_of_distill_are_sentences(kind: type[Model], given: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        options_of(kind, **given)
    assert options_of(DetectionData, coco={"train": "x"}, augment=None).model_fields_set == {"coco"}


def test_one_source_is_given() -> None:
    with pytest.raises(ValueError, match="exactly one of layers and width must be given"):
        check_one_source(Network(), ("layers", "width"))


def test_the_student_alone_is_trained_as_the_distilled_one() -> None:
    class Own(VisionRecipe):
        task: str = "own"
        training: Training = Training()

    own = Own(training=Training(epochs=7, learning_rate=0.3), baseline=Baseline(learning_rates=[0.1]))
    assert own.baseline is not None
    assert (own.baseline.epochs, own.baseline.learning_rates) == (7, [0.1])
    assert Own(baseline=None).baseline is None
