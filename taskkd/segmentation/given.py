"""`kd.distill` with networks and images that the caller holds, instead of names and paths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

from torch import nn

from taskkd.caches import weights_sha256
from taskkd.errors import DataError
from taskkd.segmentation import models
from taskkd.segmentation.data import SegmentationData, from_annotations
from taskkd.segmentation.readers import read_hub
from taskkd.segmentation.records import Annotations
from taskkd.segmentation.schema import Data, SegmentationRecipe
from taskkd.segmentation.task import SegmentationTask, read_path

__all__ = ["GivenSegmentation"]


class GivenSegmentation(SegmentationTask):
    """The segmentation task with a given student and teacher; data as paths, HF data sets, or `Annotations`.

    Every training starts from a copy of the given student.

    Args:
        student: a `Segmenter`, a network of torchvision, transformers or segmentation-models-pytorch or any other that
            gives logits (they are wrapped, with ImageNet's mean and std), or a saved folder.
        teacher: the same, trained on the same classes.
        train, eval, test: a folder of images and masks or in the layout of Cityscapes, ADE20K, VOC or CamVid, an HF
            data set, or `Annotations`. Without `eval`, a tenth of `train` each is held out to validate and to test on;
            without `test`, the report is on `eval`.
        classes: as in a recipe's `data.folder` (names in the order of the masks' values, or value -> name); may be
            left out where the folder has a `classes.txt` or a known layout.
        ignore: values of masks that count for nothing.
        unlabelled: a folder of images (or several), a stream beside the labelled ones.
        augment, metric: as in a recipe's data.
        bad: "error" or "skip", for damaged images and masks.

    Raises:
        DataError: data of another kind, or wrong.
        RecipeError: a path is no network's folder, or the networks tell other numbers of classes apart.
    """

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
        unlabelled: str | list[str] | None = None,
        augment: list[Any] | None = None,
        metric: Literal["mIoU", "pixel_accuracy", "mean_accuracy"] = "mIoU",
        bad: Literal["error", "skip"] = "error",
    ) -> None:
        reads = {"classes": classes, "ignore": ignore or [], "bad": bad}
        first = _annotations(train, reads)
        given = {"train": first, "validation": None, "test": None}
        if eval is not None:
            given["validation"] = given["test"] = _annotations(eval, reads)
        if test is not None:
            given["test"] = _annotations(test, reads)
        options: dict[str, Any] = {} if augment is None else {"augment": augment}
        named = {"folder": {"train": "given", "classes": first.classes}}
        config = Data.model_validate({**named, "unlabelled": unlabelled, "metric": metric, "bad": bad, **options})
        self._data = from_annotations(config, given)
        self._student = models.wrap(_read(student), first.classes)
        models.check_student(self._student)
        self._teacher = models.wrap(_read(teacher), first.classes)

    def describe(self) -> dict[str, Any]:
        """What of this run goes into its resolved recipe, so that a run of other models or data is noticed."""
        data = self._data.config.model_dump(exclude={"folder"}, exclude_unset=True)
        held = {"train": f"given:{self._data.fingerprint()[:16]}", "classes": self._data.classes}
        return {
            "data": {"folder": held, **data},
            "teacher": {"model": f"given:{weights_sha256(self._teacher)[:16]}"},
            "student": {"model": f"given:{weights_sha256(self._student)[:16]}"},
        }

    def fingerprint(self, recipe: SegmentationRecipe) -> str:
        """The digest of the given teacher."""
        return weights_sha256(self._teacher)

    def load(self, recipe: SegmentationRecipe, folder: Path | None = None) -> SegmentationData:
        """The given data."""
        self._data.pairs = recipe.training.batch_size > 1
        return self._data

    def teacher(self, recipe: SegmentationRecipe, data: SegmentationData, source: str | None = None) -> nn.Module:
        """The given teacher."""
        return self._teacher

    def student(self, recipe: SegmentationRecipe, data: SegmentationData, teacher: nn.Module, seed: int) -> nn.Module:
        """A copy of the given student."""
        return copy.deepcopy(self._student)


def _read(source: nn.Module | str | Path) -> nn.Module:
    return models.load(source) if isinstance(source, str | Path) else source


def _annotations(source: Any, reads: dict[str, Any]) -> Annotations:
    if isinstance(source, Annotations):
        return source
    if isinstance(source, str | Path):
        return read_path(str(source), reads["classes"], reads["ignore"], bad=reads["bad"])
    if hasattr(source, "column_names"):
        if reads["classes"] is None:
            raise DataError("an HF data set of images and masks needs `classes`: what the masks' values mean.")
        return read_hub(source, **reads)
    raise DataError(
        "data are a folder of images and masks (or in the layout of Cityscapes, ADE20K, VOC or CamVid), an HF data set "
        f"or Annotations; got a {type(source).__name__}."
    )
