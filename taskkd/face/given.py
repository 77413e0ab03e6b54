"""`kd.distill` with face models and faces that the caller holds, instead of names and paths."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from taskkd.errors import DataError
from taskkd.face import models
from taskkd.face.config import FaceConfig
from taskkd.face.data import FaceData, from_faces
from taskkd.face.pairs import Pairs, read_pairs
from taskkd.face.readers import orl, read_folder, read_hub, read_images
from taskkd.face.recordio import read_recordio
from taskkd.face.records import Faces
from taskkd.face.schema import Data, FaceRecipe
from taskkd.face.task import FaceTask, check_gallery
from taskkd.schema import options_of
from taskkd.tasks import GivenModels

__all__ = ["GivenFace"]


class GivenFace(GivenModels, FaceTask):
    """The face task with a given student and teacher; data as paths, HF data sets, `Faces` or `Pairs`.

    Every training starts from a copy of the given student.

    Args:
        student: a `FaceModel`, any network (N, 3, 112, 112) -> (N, D) (it is wrapped: RGB, mean and std 0.5), or a
            saved folder or a file of weights.
        teacher: the same, trained.
        train: a folder of aligned crops, one folder in them for each identity; a folder with `train.rec` and
            `train.idx`; "orl"; an HF data set with columns `image` and `label`; or `Faces`.
        eval: what is validated on: a `.bin` file, a list of pairs (.txt, .csv), a folder of people, `Faces` or `Pairs`.
            None: a tenth of the identities of `train` is held out to validate on, and a fifth to test on.
        test: the same, to test on; None: `eval`, where that is given.
        unlabelled: a folder of images of unknown people, or `Faces`, that are distilled on as well.
        size: side that images are made square with. Default: as the student takes them.
        batches: as in a recipe's data: {"kind": "balanced"} or {"kind": "easy_hard"}.
        asymmetric: also report the student's embeddings searched among the teacher's.
        flip, metric, pairs, far: as in a recipe's data.
        bad: "error" or "skip", for damaged images.

    Raises:
        DataError: data are of another kind, or wrong.
        RecipeError: a path is no model's folder or file, or an option has no such value.
    """

    _student: Any

    def __init__(
        self,
        student: nn.Module | str | Path,
        teacher: nn.Module | str | Path,
        train: Any,
        eval: Any = None,  # noqa: A002
        *,
        test: Any = None,
        unlabelled: Any = None,
        size: int | None = None,
        batches: dict[str, Any] | None = None,
        asymmetric: bool = False,
        flip: bool = True,
        metric: str = "accuracy",
        pairs: int | None = None,
        far: list[float] | None = None,
        bad: Literal["error", "skip"] = "error",
    ) -> None:
        if student is teacher:  # as for DDL; the teacher will be frozen
            teacher = copy.deepcopy(teacher)
        self._student, self._teacher = _model(student), _model(teacher)
        models.check_student(self._student)
        side: int = size or self._student.size
        own = {"batches": batches, "asymmetric": asymmetric, "flip": flip, "metric": metric, "pairs": pairs, "far": far}
        config = options_of(Data, folder={"train": "given"}, size=side, bad=bad, **own)
        faces = _faces(train, side, bad)
        given: dict[str, Any] = {"validation": None, "test": None}
        if eval is not None:
            given["validation"] = given["test"] = _verified(eval, side, bad)
        if test is not None:
            given["test"] = _verified(test, side, bad)
        self._data = from_faces(config, faces, given, _unknown(unlabelled, side, bad))

    def describe(self) -> dict[str, Any]:
        """What of this run goes into its resolved recipe, so that a run of other models or data is noticed."""
        data = self._data.config.model_dump(exclude_unset=True)
        data["folder"] = {"train": f"given:{self._data.fingerprint()[:16]}"}
        return {"data": data, **self.described_models()}

    def load(self, recipe: FaceRecipe, folder: Path | None = None) -> FaceData:
        """The given data, in the batches that the method wants."""
        if recipe.data.batches != self._data.config.batches:
            config = self._data.config.model_copy(update={"batches": recipe.data.batches})
            self._data = replace(self._data, config=config)
        return self._data

    def teacher(self, recipe: FaceRecipe, data: FaceData, source: str | None = None) -> nn.Module:
        """The given teacher, with class centres if it has as many as there are identities.

        A shallow copy: the centres that a run works out are of its own people, and never the caller's.
        """
        model: Any = copy.copy(self._teacher)
        model.identities = len(data.identities)
        if model.centres is not None and len(model.centres) != model.identities:
            model.centres = None
        chosen: nn.Module = model
        return chosen

    def student(self, recipe: FaceRecipe, data: FaceData, teacher: nn.Module, seed: int) -> nn.Module:
        """A copy of the given student."""
        own = copy.deepcopy(self._student)
        check_gallery(data, own, teacher)
        own.identities, own.centres = len(data.identities), None
        student: nn.Module = own
        return student


def _model(given: nn.Module | str | Path) -> Any:
    if isinstance(given, nn.Module):
        return models.wrap(given)
    if Path(given).is_dir():
        return models.existing(FaceConfig(model=str(given)))
    return models.load_checkpoint(given)


def _faces(source: Any, size: int, bad: Literal["error", "skip"]) -> Faces:
    if isinstance(source, Faces):
        return source
    if source == "orl":
        return orl(size)
    if isinstance(source, str | Path):
        if (Path(source) / "train.rec").is_file() or Path(source).suffix == ".rec":
            return read_recordio(source, size=size, bad=bad)
        return read_folder(source, size=size, bad=bad)
    if hasattr(source, "column_names"):
        return read_hub(source, size=size, bad=bad)
    raise DataError(
        "faces are a folder of aligned crops (one folder in it for each identity), one with train.rec and train.idx, "
        f"an HF data set or Faces; got a {type(source).__name__}."
    )


def _unknown(source: Any, size: int, bad: Literal["error", "skip"]) -> Faces | None:
    if isinstance(source, str | Path):
        return read_images(source, size=size, bad=bad)
    if source is None or isinstance(source, Faces):
        return source
    raise DataError(f"unlabelled faces are a folder of images or Faces; got a {type(source).__name__}.")


def _verified(source: Any, size: int, bad: Literal["error", "skip"]) -> Pairs | Faces:
    if isinstance(source, Pairs):
        return source
    if isinstance(source, str | Path) and Path(source).is_file():
        return read_pairs(source, size=size)
    return _faces(source, size, bad)
