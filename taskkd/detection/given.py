"""`kd.distill` with detectors and images that the caller holds, instead of names and paths."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from taskkd.detection import models
from taskkd.detection.data import DetectionData
from taskkd.detection.description import DETECTOR
from taskkd.detection.hub import read_hub
from taskkd.detection.mapped import mapped
from taskkd.detection.readers import read
from taskkd.detection.records import Annotations
from taskkd.detection.schema import Data
from taskkd.detection.task import DetectionTask
from taskkd.detection.tiles import split
from taskkd.errors import DataError, RecipeError
from taskkd.schema import options_of
from taskkd.tasks import GivenModels

__all__ = ["GivenDetection"]


class GivenDetection(GivenModels, DetectionTask):
    """The detection task with a given student and teacher; data as paths, HF data sets, or `Annotations`.

    Every training starts from a copy of the given student.

    Args:
        student: a detector of torchvision or `TransformersDetector`, its saved folder, or a model of `transformers`
            (which is wrapped).
        teacher: the same, trained on the same classes, or with a `label_map`.
        train, eval, test: a COCO json file, a folder in the layout of Pascal VOC, an HF data set, or `Annotations`.
            Without `eval`, a tenth of `train` each is held out to validate and to test on; without `test`, the report
            is on `eval`.
        images: the folder of the images of json files; default: beside the file, as in COCO's layout.
        classes: names in the order of their labels; default: the teacher's (with a `label_map` the student's), or as
            in `train` where it has no names.
        augment: as in a recipe's data.
        metric: that models are selected by.
        size: how much larger the teacher's images are.
        label_map: of a teacher of other classes, its class -> the student's; see `mapped`.
        bad: "error", "skip" or "skip_boxes", for damaged images and boxes without area.

    Raises:
        DataError: data of another kind, or wrong.
        RecipeError: a path is no detector's folder, the student tells too few classes apart, an option has no such
            value, or `label_map` does not fit.
    """

    def __init__(
        self,
        student: nn.Module | str | Path,
        teacher: nn.Module | str | Path,
        train: Any,
        eval: Any = None,  # noqa: A002
        *,
        test: Any = None,
        images: str | Path | None = None,
        classes: list[str] | None = None,
        augment: list[Any] | None = None,
        metric: Literal["AP", "AP50", "VOC_AP50", "VOC07_AP50"] = "AP",
        size: float = 1.0,
        label_map: Mapping[Any, str] | None = None,
        bad: Literal["error", "skip", "skip_boxes"] = "error",
    ) -> None:
        config = options_of(Data, coco={"train": "given"}, metric=metric, bad=bad, augment=augment)
        self._student, self._teacher, self._size = _detector(student), _detector(teacher), size
        named = self._teacher if label_map is None else self._student
        first = _annotations(train, images, classes or models.class_names(named) or None, bad)
        parts = {"train": first}
        if eval is None:
            parts["train"], parts["validation"], parts["test"] = split(first, [0.8, 0.1, 0.1])
        else:
            parts["validation"] = _annotations(eval, images, first.classes, bad)
            parts["test"] = parts["validation"]
        if test is not None:
            parts["test"] = _annotations(test, images, first.classes, bad)
        self._data = DetectionData(parts, config)
        self._label_map = None if label_map is None else {str(name): own for name, own in label_map.items()}
        if self._label_map is not None:
            self._teacher = mapped(self._teacher, self._label_map, first.classes)
        own = models.class_count(self._student)
        if own is not None and own < len(first.classes):
            raise RecipeError(
                f"the student tells {own} classes apart (beside the background), the data has {len(first.classes)}: "
                f"{', '.join(first.classes[:20])}."
            )
        for model in (self._student, self._teacher):
            if getattr(model, "description", None) is None and not hasattr(model, "save_pretrained"):
                model.description = models.describe(model, first.classes)  # type: ignore[assignment]

    def describe(self) -> dict[str, Any]:
        """What of this run goes into its resolved recipe, so that a run of other models or data is noticed."""
        data = self._data.config.model_dump(exclude={"coco"}, exclude_unset=True)
        found = {
            "data": {"coco": {"train": f"given:{self._data.fingerprint()[:16]}"}, **data},
            **self.described_models(),
        }
        mapping = {} if self._label_map is None else {"label_map": self._label_map}
        found["teacher"] |= {"size": self._size, **mapping}
        return found

    def load(self, recipe: Any, folder: Path | None = None) -> DetectionData:
        """The given data."""
        return self._data

    def teacher(self, recipe: Any, data: DetectionData, source: str | None = None) -> nn.Module:
        """The given teacher."""
        return self._teacher

    def student(self, recipe: Any, data: DetectionData, teacher: nn.Module, seed: int) -> nn.Module:
        """A copy of the given student; one of transformers whose classes have no names gets those of the data."""
        own = copy.deepcopy(self._student)
        if hasattr(own, "save_pretrained") and not models.class_names(own):
            own.config.id2label = dict(enumerate(data.classes))  # type: ignore[union-attr]
            own.config.label2id = {name: i for i, name in enumerate(data.classes)}  # type: ignore[union-attr]
        return own


def _detector(source: nn.Module | str | Path) -> nn.Module:
    """A detector with torchvision's interface."""
    if isinstance(source, str | Path):
        if not any((Path(source) / name).is_file() for name in (DETECTOR, "config.json")):
            raise RecipeError(
                f"{str(source)!r} is no detector's folder: expected {DETECTOR} in it, or config.json of transformers."
            )
        return models.load(source)
    from taskkd.detection.transformers_models import TransformersDetector, is_transformers

    return TransformersDetector(source) if is_transformers(source) else source


def _annotations(source: Any, images: Any, classes: Any, bad: Any) -> Annotations:
    if isinstance(source, Annotations):
        return source if classes is None or source.classes == list(classes) else _renamed(source, classes)
    if isinstance(source, str | Path):
        return read(source, images, classes=classes, bad=bad)
    if hasattr(source, "column_names"):
        return read_hub(source, classes=classes, bad=bad)
    raise DataError(
        f"data are a COCO json file, a folder as Pascal VOC has it, an HF data set or Annotations; got a "
        f"{type(source).__name__}."
    )


def _renamed(source: Annotations, classes: list[str]) -> Annotations:
    """Annotations in the order of other class names, of which theirs are some.

    Raises:
        DataError: a class is not among them.
    """
    import numpy as np

    missing = [name for name in source.classes if name not in classes]
    if missing:
        raise DataError(f"class {missing[0]!r} of the data is not of the teacher, which has {', '.join(classes[:20])}.")
    to = np.array([0, *(list(classes).index(name) + 1 for name in source.classes)])
    records = [replace(r, labels=to[r.labels]) for r in source.records]
    ids = [source.category_ids[source.classes.index(n)] if n in source.classes else -1 for n in classes]
    return replace(source, records=records, classes=list(classes), category_ids=ids)
