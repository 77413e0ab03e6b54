"""A tiny recipe of every task that draws at random and, where the task has one, keeps a cache of its teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests import tiny
from tests.detection import coco_folder
from tests.face import people
from tests.segmentation import trees

__all__ = ["TASKS", "write"]

#: no more than a few steps and epochs, but with a search of the student alone and checkpoints to choose from
TRAINING = "epochs: 2, batch_size: {batch}, learning_rate: 1e-3"
BUILT = "architecture: retinanet, backbone: mobilenet_v3_small, min_size: 64, max_size: 64, head_convs: 1"


def _nlp(root: Path) -> str:
    """Copies of texts with words replaced, dropout, two stages with a cache each."""
    teacher = tiny.save_teacher(root / "model")
    tiny.write_csv(root / "train.csv", tiny.sentences(48))
    tiny.write_csv(root / "free.csv", tiny.sentences(24, seed=5))
    return f"""
data:
  files: {{train: {root}/train.csv, unlabelled: {root}/free.csv}}
  validation_size: 8
  test_size: 8
  augment: {{neighbours: true, n: 1}}
teacher: {{model: {teacher}}}
student: {{layers: [0, 2]}}
method: {{name: tinybert}}
training: {{{TRAINING.format(batch=8)}, max_steps: 8}}
baseline: {{learning_rates: [1e-3], epochs: 1}}
"""


def _detection(root: Path) -> str:
    """Flips and colours; a teacher that is fine-tuned first."""
    return f"""
data:
  coco: {{train: {coco_folder.write(root / "coco", 10)}}}
  validation_size: 2
  test_size: 2
  augment: [RandomHorizontalFlip, RandomPhotometricDistort]
teacher: {{{BUILT}, width: 16, finetune: {{epochs: 1, batch_size: 3}}}}
student: {{{BUILT}, width: 8}}
method: {{name: pearson_kd}}
training: {{{TRAINING.format(batch=3)}}}
baseline: {{learning_rates: [1e-3], epochs: 1}}
"""


def _segmentation(root: Path) -> str:
    """Crops and flips; a teacher that is fine-tuned first, a discriminator with an optimiser of its own."""
    return f"""
data:
  folder: {{train: {trees.folder(root / "shapes", 10)}, classes: [ground, disc, square]}}
  validation_size: 2
  test_size: 2
  augment: [{{name: RandomCrop, size: [48, 48]}}, RandomHorizontalFlip]
teacher: {{architecture: lraspp, backbone: mobilenet_v3_small, width: 32, finetune: {{epochs: 1, batch_size: 3}}}}
student: {{architecture: lraspp, backbone: mobilenet_v3_small, width: 16}}
method: {{name: structured}}
training: {{{TRAINING.format(batch=3)}}}
baseline: {{learning_rates: [1e-3], epochs: 1}}
"""


def _face(root: Path) -> str:
    """Flips, of both of which the cache has the teacher's embedding, and the means of identities."""
    people.folder(root / "train", 6, 6)
    people.folder(root / "validation", 6, 5, first=20)
    people.folder(root / "test", 6, 5, first=30)
    return f"""
data:
  folder: {{train: {root}/train, validation: {root}/validation, test: {root}/test}}
  folds: 5
  far: [0.1]
teacher: {json.dumps({**people.LARGE, "finetune": {"epochs": 1, "batch_size": 16}})}
student: {json.dumps(people.NET)}
head: {{s: 16, m: 0.2}}
method: {{name: ada_distill}}
training: {{{TRAINING.format(batch=12)}}}
baseline: {{learning_rates: [0.1], epochs: 1}}
"""


TASKS: dict[str, Callable[[Path], str]] = {
    "nlp": _nlp, "detection": _detection, "segmentation": _segmentation, "face": _face,
}  # fmt: skip


def write(task: str, root: Path) -> Path:
    """The recipe of a task, with its data beside it."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / "my.yaml"
    path.write_text(f"schema: 1\ntask: {task}\n{TASKS[task](root).lstrip()}")
    return path
