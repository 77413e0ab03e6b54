"""`kd.distill` with networks and images that the caller holds, instead of names and paths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

from torch import nn

from taskkd.errors import DataError
from taskkd.schema import options_of
from taskkd.segmentation import models
from taskkd.segmentation.data import SegmentationData, from_annotations
from taskkd.segmentation.labels import labels_of
from taskkd.segmentation.readers import read_hub
from taskkd.segmentation.records import Annotations
from taskkd.segmentation.schema import Data, SegmentationRecipe
from taskkd.segmentation.segmenter import Segmenter
from taskkd.segmentation.task import SegmentationTask, read_path
from taskkd.tasks import GivenModels

__all__ = ["GivenSegmentation"]


class GivenSegmentation(GivenModels, SegmentationTask):
    """The segmentation task with a given student and teacher; data as paths, HF data sets, or `Annotations`.

    Every training starts from a copy of the given student.

    Args:
        student: a `Segmenter`, a network of torchvision, transformers or segmentation-models-pytorch or any other that
            gives logits (they are wrapped, with ImageNet's mean and std), or a saved folder.
        teacher: the same, trained on the same classes.
        train, eval, test: a folder of images and masks or in the layout of Cityscapes, ADE20K, VOC or CamVid, an HF
            data set, or `Annotations`. Of a folder with several parts `train` is the one that is trained on, the others
            the one that is tested on. Without `eval`, a tenth of `train` each is held out to validate and to test on;
            without `test`, the report is on `eval`.
        classes: as in a recipe's `data.folder` (names in the order of the masks' values, or value -> name); may be
            left out where the folder has a `classes.txt` or a known layout.
        ignore: values of masks that count for nothing.
        unlabelled: a folder of images (or several), a stream beside the labelled ones.
        augment, metric: as in a recipe's data.
        bad: "error" or "skip", for damaged images and masks.

    Raises:
        DataError: data of another kind, or wrong.
        RecipeError: a path is no network's folder, the networks tell other numbers of classes apart, or an option has
            no such value.
    """

    _student: Segmenter

    def __init__(
        self,
        student: nn.Module | str | Path,
        teacher: nn.Module | str | Path,
        train: Any,
        eval: Any = None,  # noqa: A002
        *,
        test: Any = None,
        classes: list[str] | dict[int | str, str] | str | None = None,
        ignore: list[int | str] | None = None,
        unlabelled: str | Path | list[str] | None = None,
        augment: list[Any] | None = None,
        metric: Literal["mIoU", "pixel_accuracy", "mean_accuracy"] = "mIoU",
        bad: Literal["error", "skip"] = "error",
    ) -> None:
        reads = {"classes": classes, "ignore": ignore or [], "bad": bad}
        first = _annotations(train, reads, "train")
        given = {"train": first, "validation": None, "test": None}
        if eval is not None:
            given["validation"] = given["test"] = _annotations(eval, reads, "test")
        if test is not None:
            given["test"] = _annotations(test, reads, "test")
        # Other data is read as these were, see `SegmentationTask.read`.
        coded = labels_of(classes, ignore or []).classes if classes is not None else ()
        if isinstance(classes, dict):  # as they are read from a recipe's file
            classes = {str(value): name for value, name in classes.items()}
        meaning = {"classes": classes, "ignore": ignore or []} if list(coded) == first.classes else {}
        unlabelled = str(unlabelled) if isinstance(unlabelled, Path) else unlabelled
        folder = {"train": "given", "classes": first.classes, **meaning}
        config = options_of(Data, folder=folder, unlabelled=unlabelled, augment=augment, metric=metric, bad=bad)
        self._data = from_annotations(config, given)
        self._student = models.wrap(_read(student), first.classes)
        models.check_student(self._student)
        self._teacher = models.wrap(_read(teacher), first.classes)

    def describe(self) -> dict[str, Any]:
        """What of this run goes into its resolved recipe, so that a run of other models or data is noticed."""
        data = self._data.config.model_dump(exclude_unset=True)
        held = {**data.pop("folder"), "train": f"given:{self._data.fingerprint()[:16]}"}
        return {
            "data": {"folder": held, **data},
            **self.described_models(),
        }

    def load(self, recipe: SegmentationRecipe, folder: Path | None = None) -> SegmentationData:
        """The given data."""
        self._data.pairs = recipe.training.batch_size > 1
        return self._data

    def teacher(self, recipe: SegmentationRecipe, data: SegmentationData, source: str | None = None) -> nn.Module:
        """The given teacher."""
        return self._teacher

    def student(self, recipe: SegmentationRecipe, data: SegmentationData, teacher: nn.Module, seed: int) -> nn.Module:
        """A copy of the given student; one whose classes have no names gets those of the data."""
        own = copy.deepcopy(self._student)
        if own.classes == tuple(map(str, range(len(own.classes)))):
            own.classes = tuple(data.classes)
        return own


def _read(source: nn.Module | str | Path) -> nn.Module:
    return models.load(source) if isinstance(source, str | Path) else source


def _annotations(source: Any, reads: dict[str, Any], part: Literal["train", "test"]) -> Annotations:
    if isinstance(source, Annotations):
        return source
    if isinstance(source, str | Path):
        return read_path(str(source), reads["classes"], reads["ignore"], part=part, bad=reads["bad"])
    if hasattr(source, "column_names"):
        if reads["classes"] is None:
            raise DataError("an HF data set of images and masks needs `classes`: what the masks' values mean.")
        return read_hub(source, **reads)
    raise DataError(
        "data are a folder of images and masks (or in the layout of Cityscapes, ADE20K, VOC or CamVid), an HF data set "
        f"or Annotations; got a {type(source).__name__}."
    )
