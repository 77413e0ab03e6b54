"""What a recipe of task `detection` may say."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from taskkd.detection.config import DetectorConfig
from taskkd.schema import CacheConfig, Finetune, HubData, Model, TeacherConfig, Training, VisionRecipe, check_one_source

__all__ = ["Data", "DetectionRecipe", "Student", "Teacher"]

Size = int | float


class Coco(Model):
    """COCO json files by use; what is missing of validation and test is held out from train.

    `images` is the folder of their images, one for all or one for each part; left out: beside the json file, as in
    COCO's own layout.
    """

    train: str
    validation: str | None = None
    test: str | None = None
    images: str | dict[Literal["train", "validation", "test"], str] | None = None


class Voc(Model):
    """A folder, or several, in the layout of VOCdevkit/VOC2007, and its lists of images by use."""

    folder: str | list[str]
    train: str = "trainval"
    validation: str | None = None
    test: str | None = "test"
    test_folder: str | None = None  # None: the (last) folder


class Hub(HubData):
    """With columns of images and of their objects."""

    image: str = "image"
    objects: str = "objects"
    box_format: Literal["xywh", "xyxy"] = "xywh"


class Sample(Model):
    """The embedded sample of tree crowns, in tiles."""

    name: Literal["trees"] = "trees"


class Tiles(Model):
    """Large images cut into tiles of at most `size` pixels; those of training may overlap."""

    size: int = Field(256, ge=32)
    overlap: int = Field(0, ge=0)


class Data(Model):
    """Where images and boxes come from: exactly one of `coco`, `voc`, `hub`, `sample`."""

    coco: Coco | None = None
    voc: Voc | None = None
    hub: Hub | None = None
    sample: Sample | None = None
    classes: list[str] | None = None  # names in the order of their labels; None: as the training data has them
    bad: Literal["error", "skip", "skip_boxes"] = (
        "error"  # a bad box or image stops the run, or is left out and counted
    )
    tiles: Tiles | None = None
    augment: list[str | dict[str, Any]] = Field(["RandomHorizontalFlip"])
    hold: bool = False  # decoded images stay in memory
    train_size: int | None = Field(None, ge=1)
    validation_size: Size = Field(0.1, gt=0)
    test_size: Size = Field(0.1, gt=0)
    split_seed: int = 0
    metric: Literal["AP", "AP50", "VOC_AP50", "VOC07_AP50"] = "AP"  # that models are selected by
    backend: Literal["pycocotools", "faster"] = "pycocotools"

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        check_one_source(self, ("coco", "voc", "hub", "sample"))
        if self.sample is not None and self.tiles is None:
            self.tiles = Tiles()
        return self


class Student(DetectorConfig):
    """The student: a detector to build (`architecture`), or one that is there (`model`)."""


class DetectionFinetune(Finetune):
    """How a teacher is fine-tuned on the labelled data first."""

    epochs: float = Field(12.0, gt=0)
    batch_size: int = Field(4, ge=1)


class Teacher(DetectorConfig, TeacherConfig):
    """The teacher: a detector, how much larger its images are, and which of the student's classes its own are.

    `label_map` (the teacher's class: the student's) is for a trained teacher of other classes, by `model` or with
    `weights: coco`, which is then not fine-tuned.
    """

    size: float = Field(1.0, gt=0)
    label_map: dict[int | str, str] | None = None
    finetune: DetectionFinetune | None = None
    cache: CacheConfig | None = None

    @model_validator(mode="after")
    def _never_cached(self) -> Teacher:
        if self.cache is not None:
            raise ValueError("a detector's maps depend on the student's random resizing and are large; leave out cache")
        if self.label_map is not None and (self.finetune is not None or (self.model or self.weights) is None):
            raise ValueError("`label_map` is for a trained teacher, by `model` or `weights: coco`, not fine-tuned")
        if self.label_map is not None and self.model is None and self.weights != "coco":
            raise ValueError(f"`label_map`: the classes of `weights: {self.weights}` are not known; use `model`")
        return self


class DetectionTraining(Training):
    """How detectors are trained, unless the recipe says otherwise."""

    epochs: float = Field(12.0, gt=0)
    batch_size: int = Field(4, ge=1)
    eval_batch_size: int = Field(4, ge=1)
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(10.0, ge=0)


class DetectionRecipe(VisionRecipe):
    """A recipe of task `detection`."""

    task: Literal["detection"] = "detection"
    data: Data
    teacher: Teacher
    student: Student
    training: DetectionTraining = DetectionTraining()
