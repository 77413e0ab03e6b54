"""What a recipe of task `segmentation` may say."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from taskkd.schema import CacheConfig, Finetune, HubData, Model, TeacherConfig, Training, VisionRecipe, check_one_source
from taskkd.segmentation.config import SegmenterConfig

__all__ = ["Data", "Folder", "Loss", "Part", "SegmentationRecipe", "Source", "Student", "Teacher", "Tiles"]

Size = int | float
Part = Literal["train", "validation", "test"]
#: names in the order of values 0, 1, ...; or names by value or colour ("#rrggbb"), of which several may share a name;
#: or the name of a known coding of classes
Classes = list[str] | dict[int | str, str] | str


class Folder(Model):
    """Folders of images and of masks of the same names, by use; what is missing of validation and test is held out.

    `images` and `masks` are folders in those, or paths of their own, one for all or one for each part. Masks hold
    class numbers (grey or palette PNG) or colours. Values in `ignore`, and 255 and -1 where they are no class, count
    for nothing; any other that is not in `classes` is an error.
    """

    train: str
    validation: str | None = None
    test: str | None = None
    images: str | dict[Part, str] = "images"
    masks: str | dict[Part, str] = "masks"
    classes: Classes
    ignore: list[int | str] = Field([])


class Cityscapes(Model):
    """The folder with `leftImg8bit` and `gtFine`. The labels of its test part are not public: it is tested on val."""

    folder: str
    train: str = "train"
    validation: str | None = None
    test: str | None = "val"


class Ade20k(Model):
    """The folder ADEChallengeData2016."""

    folder: str
    train: str = "training"
    validation: str | None = None
    test: str | None = "validation"


class Voc(Model):
    """A folder in the layout of VOCdevkit/VOC2012, and its lists of images by use.

    `masks`: "SegmentationClass" or "SegmentationClassAug"; left out: the latter for lists with "aug" in their names.
    """

    folder: str
    train: str = "train"
    validation: str | None = None
    test: str | None = "val"
    masks: str | None = None


class Camvid(Model):
    """The folder with `train`, `trainannot`, `val`, ... of SegNet's split, 11 classes."""

    folder: str
    train: str = "train"
    validation: str | None = "val"
    test: str | None = "test"


class Hub(HubData):
    """With columns of images and of masks; `classes` and `ignore` as in `folder`."""

    image: str = "image"
    annotation: str = "annotation"
    classes: Classes
    ignore: list[int | str] = Field([])


class Sample(Model):
    """The embedded sample: nuclei in one microscopy image; background, nucleus and border."""

    name: Literal["nuclei"] = "nuclei"


class Tiles(Model):
    """Large images cut into tiles of at most `size` pixels; those of training may overlap."""

    size: int = Field(512, ge=32)
    overlap: int = Field(0, ge=0)


class Source(Model):
    """Where images and masks come from: exactly one of these."""

    folder: Folder | None = None
    cityscapes: Cityscapes | None = None
    ade20k: Ade20k | None = None
    voc: Voc | None = None
    camvid: Camvid | None = None
    hub: Hub | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        kinds = [k for k in ("folder", "cityscapes", "ade20k", "voc", "camvid", "hub", "sample") if hasattr(self, k)]
        check_one_source(self, kinds)
        return self


class Data(Source):
    """The data: one source of labelled images, and what is done with them.

    `unlabelled` is a second stream that the student is distilled on: folders of images, or a source whose training
    part is read without its masks. Every labelled sample brings `unlabelled_per_sample` of it: a batch of 8 has 8
    labelled and 8 * `unlabelled_per_sample` unlabelled images. `evaluation` is where validation and test come from
    instead: of the target domain, say.
    """

    sample: Sample | None = None
    unlabelled: str | list[str] | Source | None = None
    unlabelled_per_sample: int = Field(1, ge=1)
    evaluation: Source | None = None
    bad: Literal["error", "skip"] = "error"  # a bad image or mask stops the run, or is left out and counted
    tiles: Tiles | None = None
    augment: list[str | dict[str, Any]] = Field(["RandomHorizontalFlip"])
    hold: bool = False  # decoded images and masks stay in memory
    train_size: int | None = Field(None, ge=1)
    validation_size: Size = Field(0.1, gt=0)
    test_size: Size = Field(0.1, gt=0)
    split_seed: int = 0
    metric: Literal["mIoU", "pixel_accuracy", "mean_accuracy"] = "mIoU"  # that models are selected by
    absent: Literal["ignore", "zero"] = "ignore"  # classes that are in no mask and no prediction, in the mean IoU

    @model_validator(mode="after")
    def _tiles_of_the_sample(self) -> Data:
        if self.sample is not None and self.tiles is None:
            self.tiles = Tiles(size=128, overlap=64)
        return self


class Student(SegmenterConfig):
    """The student: a network to build (`architecture`), or one that is there (`model`)."""


class SegmentationFinetune(Finetune):
    """How a teacher is fine-tuned on the labelled data first."""

    epochs: float = Field(20.0, gt=0)
    batch_size: int = Field(8, ge=1)


class Teacher(SegmenterConfig, TeacherConfig):
    """The teacher: a network, how it is fine-tuned first, and which of the student's classes its own are.

    `label_map` (the teacher's class: the student's) is for a teacher of other classes, which is then not fine-tuned.
    """

    finetune: SegmentationFinetune | None = None
    label_map: dict[str, str] | None = None
    cache: CacheConfig | None = None

    @model_validator(mode="after")
    def _never_cached(self) -> Teacher:
        if self.cache is not None:
            raise ValueError("a teacher's maps follow the random augmentation of the images; leave out cache")
        if self.label_map is not None and (self.finetune is not None or self.model is None):
            raise ValueError("`label_map` is for a trained teacher, by `model`, that is not fine-tuned")
        return self


class Loss(Model):
    """The task loss: cross-entropy over the labelled pixels, at the size of the labels.

    `aux_weight` is that of an auxiliary head's, where the student has one; `class_weights` one number for each class.
    """

    aux_weight: float = Field(0.4, ge=0)
    class_weights: list[float] | None = None


class SegmentationTraining(Training):
    """How segmentation networks are trained, unless the recipe says otherwise."""

    epochs: float = Field(20.0, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(8, ge=1)
    eval_batch_size: int = Field(8, ge=1)
    schedule: Literal["linear", "cosine", "constant", "step", "polynomial"] = "polynomial"
    weight_decay: float = Field(1e-4, ge=0)
    warmup: float = Field(0.0, ge=0, lt=1)
    max_grad_norm: float = Field(10.0, ge=0)


class SegmentationRecipe(VisionRecipe):
    """A recipe of task `segmentation`."""

    task: Literal["segmentation"] = "segmentation"
    data: Data
    teacher: Teacher
    student: Student
    loss: Loss = Loss()
    training: SegmentationTraining = SegmentationTraining()
