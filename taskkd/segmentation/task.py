"""How a recipe of task `segmentation` becomes data, models and metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from taskkd.errors import DataError, RecipeError, nearest
from taskkd.images import decode, named_file
from taskkd.portable import Portable
from taskkd.segmentation import models
from taskkd.segmentation.config import SMP, TORCHVISION, SegmenterConfig
from taskkd.segmentation.data import SegmentationData, load, read_part
from taskkd.segmentation.datasets import SegmentationDataset, collate
from taskkd.segmentation.loss import PixelCrossEntropy
from taskkd.segmentation.mapped import mapped
from taskkd.segmentation.methods import METHODS
from taskkd.segmentation.metrics import SegmentationMetric, predicted
from taskkd.segmentation.nuclei import nuclei
from taskkd.segmentation.portable import portable
from taskkd.segmentation.records import Annotations, Bad
from taskkd.segmentation.schema import Part, SegmentationRecipe, Source
from taskkd.segmentation.segmenter import Segmenter
from taskkd.segmentation.terms import MapTerm
from taskkd.tasks import Task, groups_of
from taskkd.terms import Term

if TYPE_CHECKING:
    from taskkd.segmentation.given import GivenSegmentation

__all__ = ["TASK", "SegmentationTask", "read_path"]

logger = logging.getLogger(__name__)

#: the names of the classes in a folder of images and masks, a line each
CLASSES = "classes.txt"
#: what tells the layout of a folder
LAYOUTS = {
    "cityscapes": "gtFine",
    "ade20k": "annotations/training",
    "voc": "ImageSets/Segmentation",
    "camvid": "trainannot",
}


class SegmentationTask(Task):
    """The glue between recipes and this package."""

    name = "segmentation"
    recipe = SegmentationRecipe
    methods = METHODS
    #: gained most on real data, needs no weight that follows scale or classes (docs/results.md)
    default_method = "dist"
    #: what a term of a recipe becomes: maps of two networks at one size
    term = staticmethod(partial(MapTerm, ignore="none"))

    # ---- data

    def load(self, recipe: SegmentationRecipe, folder: Path | None = None) -> SegmentationData:
        """Read and divide the data.

        Raises:
            DataError: a file, class or split is wrong.
            RecipeError: there are more or fewer class weights than classes.
        """
        data = load(recipe.data)
        weights = recipe.loss.class_weights
        if weights is not None and len(weights) != len(data.classes):
            raise RecipeError(f"loss.class_weights: {len(weights)} weights for {len(data.classes)} classes.")
        data.pairs = recipe.training.batch_size > 1
        return data

    def shorthand(self, teacher: Any, student: Any, data: Any) -> dict[str, Any]:
        """The sections of a recipe that a name or a path stands for.

        Args:
            teacher, student: a saved folder, a network of `transformers`, or an architecture and its backbone
                (`deeplabv3/resnet50`), which begins with the weights that there are; such a teacher is fine-tuned.
            data: a folder with `images`, `masks` and a file `classes.txt` (a name in each line, in the order of the
                masks' values); one in the layout of Cityscapes, ADE20K, VOC or CamVid; or `nuclei`, the embedded
                sample.
        """
        return {
            "data": _source(str(data)),
            "teacher": _named(str(teacher), {"finetune": {}}),
            "student": _named(str(student), {}),
            "method": {"name": self.default_method},
        }

    def read(self, recipe: SegmentationRecipe, path: str, student: Any, processing: Any) -> Any:
        """Other images with masks, with the classes of a trained student."""
        own = recipe.data.folder
        known: tuple[Any, Any] = (list(student.classes), []) if own is None else (own.classes, own.ignore)
        if (Path(path) / CLASSES).is_file():
            known = (None, known[1])  # which knows better
        folders = {} if own is None else {"images": own.images, "masks": own.masks}
        there = {k: v for k, v in folders.items() if isinstance(v, str) and (Path(path) / v).is_dir()}
        found = read_path(path, *known, part="test", bad=recipe.data.bad, folders=there)
        if found.classes != list(student.classes):
            raise DataError(
                f"{path} has the classes {', '.join(found.classes[:20])}, the student others: "
                f"{', '.join(student.classes[:20])}."
            )
        return SegmentationDataset(found)

    def latency_batches(self, data: SegmentationData, count: int, size: int = 1) -> list[dict[str, Any]]:
        """Real test images in batches of `size`, as the models' keyword arguments; cut to the smallest of a batch."""
        images = [data.test[i]["images"] for i in range(min(count, 16, len(data.test)))]
        return [{"images": _stacked(group)} for group in groups_of(images, size)]

    # ---- models

    def teacher(self, recipe: SegmentationRecipe, data: SegmentationData, source: str | None = None) -> nn.Module:
        """The teacher (from `source`, a folder of this run, once it is fine-tuned).

        Raises:
            RecipeError: it cannot be built, or is to be fine-tuned though it predicts by queries.
            CheckpointError: it is not fine-tuned, and a part of it has no weights.
        """
        if source is not None:
            return models.load(source)
        own = recipe.teacher
        if own.label_map is not None:
            return mapped(models.existing(own.segmenter), own.label_map, data.classes)
        built = models.build(own.segmenter, data.classes, whole=own.finetune is None)
        if own.finetune is not None and built.universal:
            raise RecipeError(
                f"teacher.finetune: {built.kind} predicts by queries, which are learnt by matching them with masks; a "
                "loss on its map of classes does not do that. Leave finetune out, and train it on these classes first."
            )
        return built

    def student(self, recipe: SegmentationRecipe, data: SegmentationData, teacher: nn.Module, seed: int) -> nn.Module:
        """The student at its start; the same for a seed, whatever it is then trained with.

        Raises:
            RecipeError: it predicts by queries, which it would not learn.
        """
        student = models.build(recipe.student.segmenter, data.classes, seed=seed)
        models.check_student(student)
        return student

    def given(self, *args: Any, **options: Any) -> GivenSegmentation:
        """This task with models and data that the caller holds; see `GivenSegmentation`."""
        from taskkd.segmentation.given import GivenSegmentation

        return GivenSegmentation(*args, **options)

    def trained(self, folder: Path) -> tuple[nn.Module, Any]:
        """A trained student, from the folder it was saved in."""
        return models.load(folder).eval(), None

    def portable(self, recipe: SegmentationRecipe | None, student: nn.Module, processing: Any) -> Portable:
        """A trained student as it leaves a run."""
        return portable(student)

    def named(self, name: str) -> tuple[nn.Module, Any]:
        """A model by what a recipe calls it, for a look at it: what is built has random weights."""
        own = {key: value for key, value in _named(name, {}).items() if key != "weights"}
        config = SegmenterConfig.of(own)
        return (models.existing(config) if config.model else models.build(config, 2)).eval(), None

    def pair(self, data: SegmentationData, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
        """What is to be known of a pair of networks before they are distilled.

        Raises:
            RecipeError: they tell other numbers of classes apart.
        """
        lines = []
        for who, model in (("teacher", teacher), ("student", student)):
            assert isinstance(model, Segmenter)
            if len(model.classes) != len(data.classes):
                raise RecipeError(
                    f"the {who} tells {len(model.classes)} classes apart, the data has {len(data.classes)}: "
                    f"{', '.join(data.classes[:20])}."
                )
            views = model.views
            aux = "" if views.aux is None else f"; aux {views.aux}"
            stages = ", ".join(views.stages) or "none"
            lines.append((f"{who}'s maps", f"logits {views.logits}; feature {views.feature}{aux}; stages {stages}"))
        return lines

    # ---- training and evaluation

    def check_terms(
        self, data: SegmentationData, terms: Sequence[Term], student: nn.Module, batch: Mapping[str, Any]
    ) -> None:
        """Say so where the student pads its images, which terms then see; else terms say what they cannot do."""
        height, width = batch["images"].shape[2:]
        divisor = getattr(student, "divisor", 1)
        if terms and (height % divisor or width % divisor):
            logger.warning(
                "the student pads images of %dx%d to multiples of %d: its maps are larger than the teacher's and are "
                "compared askew; end data.augment with a crop to such a size.", width, height, divisor,
            )  # fmt: skip

    def loss(self, recipe: SegmentationRecipe, student: nn.Module | None = None, seed: int = 0) -> Any:
        """The task loss."""
        return PixelCrossEntropy(aux_weight=recipe.loss.aux_weight, class_weights=recipe.loss.class_weights)

    def metric(self, data: SegmentationData, table: Any) -> Any:
        """A fresh metric for a table of the data."""
        return SegmentationMetric(data.classes, absent=data.config.absent)

    def metric_of(self, recipe: SegmentationRecipe, student: nn.Module, table: Any) -> Any:
        """A fresh metric for a trained student on a table."""
        return SegmentationMetric(table.classes, absent=recipe.data.absent)

    def collator(self, recipe: SegmentationRecipe, processing: Any) -> Any:
        """Makes a batch."""
        return collate

    def chance(self, data: SegmentationData) -> float:
        """What one class everywhere gives: mean accuracy 1/K, mean IoU less."""
        return 1 / len(data.classes) if data.config.metric == "mean_accuracy" else 0.0

    def predict(
        self, recipe: SegmentationRecipe, student: Any, processing: Any, inputs: Sequence[str]
    ) -> Iterator[tuple[str, float | None, str]]:
        """(class, share of the pixels, mask file) of each class that is found in each image file.

        The mask (PNG, class numbers) is written beside the image as `<name>.mask.png`.
        """
        for path in inputs:
            image = decode(named_file(path, "segmentation networks predict on image files"), 0).float() / 255
            with torch.no_grad():
                logits: Tensor = student(image[None])["logits"]
            mask = predicted(logits, (image.shape[1], image.shape[2]))[0]
            written = _write(mask, Path(path))
            share = torch.bincount(mask.flatten(), minlength=len(student.classes)).double() / mask.numel()
            for number in share.argsort(descending=True).tolist():
                if share[number] > 0:
                    yield student.classes[number], float(share[number]), f"{path} -> {written}"

    def draw(self, data: SegmentationData, networks: Mapping[str, nn.Module], path: Path) -> None:
        """Draw test images with the masks of the ground truth and of every model, side by side."""
        from taskkd.segmentation.pictures import draw

        draw(data.test, networks, data.classes, path)


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """Images as one batch, each cut to the smallest height and width."""
    height, width = (min(image.shape[side] for image in images) for side in (1, 2))
    return torch.stack([image[:, :height, :width] for image in images])


def _write(mask: Tensor, path: Path) -> Path:
    from PIL import Image

    target = path.with_name(f"{path.stem}.mask.png")
    Image.fromarray(mask.to(torch.uint8).numpy()).save(target)
    return target


# ---- names and paths


def _source(
    data: str, classes: Any = None, ignore: Sequence[Any] = (), folders: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """The data section for a folder, by its layout; `classes` go before what it says itself of its masks."""
    folder = Path(data)
    if data == "nuclei":
        return {"sample": {"name": "nuclei"}}
    for kind, sign in LAYOUTS.items():
        if (folder / sign).is_dir():
            return {kind: {"folder": data}}
    if not folder.is_dir():
        raise RecipeError(f"data: {data!r} is no folder, nor `nuclei`, the embedded sample.")
    names = folder / CLASSES
    if classes is None and names.is_file():
        classes = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif classes is None:
        raise RecipeError(
            f"data: {data} has no classes.txt (the names of the classes, a line each, in the order of the masks' "
            "values 0, 1, ...), and is not in the layout of Cityscapes, ADE20K, VOC or CamVid; a recipe can say what "
            "its masks mean."
        )
    own = _parts(folder, folders.get("images", "images"))
    return {"folder": {**own, **folders, "classes": classes, "ignore": list(ignore)}}


def read_path(
    path: str,
    classes: Any = None,
    ignore: Sequence[Any] = (),
    *,
    part: Literal["train", "test"] = "train",
    bad: Bad = "error",
    folders: Mapping[str, str] | None = None,
) -> Annotations:
    """Images with masks by what a folder holds.

    Args:
        path: of images and masks, or in the layout of Cityscapes, ADE20K, VOC or CamVid; or `nuclei`.
        classes, ignore: what the masks' values mean. Default: as the layout or the folder's `classes.txt` has it.
        part: what is read of it: what is trained on, or what is tested on (else validated on, else all there is).
        bad: "error" or "skip".
        folders: the names of its folders of `images` and `masks`, where they are others.

    Raises:
        DataError: a file is wrong.
        RecipeError: it cannot be told what the masks mean.
    """
    given = _source(path, classes, ignore, folders or {})
    if "sample" in given:
        return nuclei(128)[part]
    source = Source.model_validate(given)
    parts: tuple[Part, ...] = ("train",) if part == "train" else ("test", "validation", "train")
    return next(found for name in parts if (found := read_part(source, name, bad)) is not None)


def _parts(folder: Path, images: str) -> dict[str, str]:
    """`images` and masks in the folder itself, or in its folders train, validation (val) and test."""
    if (folder / images).is_dir() and not (folder / "train").is_dir():
        return {"train": str(folder)}
    found = {part: folder / part for part in ("train", "validation", "test")}
    if not found["train"].is_dir():
        raise RecipeError(f"data: {folder} has neither `images` and `masks` nor a folder `train` with these.")
    if not found["validation"].is_dir() and (folder / "val").is_dir():
        found["validation"] = folder / "val"
    return {part: str(path) for part, path in found.items() if part == "train" or path.is_dir()}


def _named(name: str, built: dict[str, Any]) -> dict[str, Any]:
    architecture, _, backbone = name.partition("/")
    known = (*TORCHVISION, *SMP)
    if Path(name).exists() or architecture not in known:
        if "/" not in name and not Path(name).exists():
            raise RecipeError(
                f"{name!r} is no folder, and no architecture{nearest(name, known)}; known: {', '.join(known)}. "
                "Networks of the hub have an owner, as nvidia/segformer-b0-finetuned-ade-512-512."
            )
        return {"model": name}
    return {
        "architecture": architecture,
        **({"backbone": backbone} if backbone else {}),
        "weights": "imagenet",
        **built,
    }


TASK = SegmentationTask()
