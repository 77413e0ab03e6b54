"""What is used where no method is named."""

from __future__ import annotations

import pytest

import taskkd as kd
from taskkd.detection import DetectorTeacher, auto
from taskkd.errors import RecipeError
from tests.detection.detectors import batch, faster_rcnn, fcos, retinanet


@pytest.mark.parametrize(
    ("student", "teacher", "names"),
    [
        (retinanet, retinanet, {"pearson"}),
        (fcos, faster_rcnn, {"pearson"}),
        (faster_rcnn, faster_rcnn, {"pearson", "soft", "bound", "rpn-soft", "rpn-bound"}),
    ],
)
def test_it_is_chosen_by_the_pair(student: object, teacher: object, names: set[str]) -> None:
    s, t = student(), teacher(24, seed=1)  # type: ignore[operator]
    terms = auto(s, t, share=0.5).stages[0].terms
    assert {term.name for term in terms} == names
    distiller = kd.Distiller(s, DetectorTeacher(t, s), terms)
    found = {term.name: term for term in distiller.prepare(batch()).terms}
    assert found["pearson"].pull == pytest.approx(0.5 * found["task"].pull, rel=1e-3)
    distiller.close()


def test_answers_of_different_stages_are_refused() -> None:
    with pytest.raises(RecipeError, match="a FCOS student and a Faster R-CNN teacher make no predictions of the same"):
        auto(fcos(), faster_rcnn(), response="on")
    assert {t.name for t in auto(faster_rcnn(), faster_rcnn(), response="off").stages[0].terms} == {"pearson"}
