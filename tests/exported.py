"""Finished runs without a training: a student at its start, small data, a report, as a run leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from taskkd import recipes, reports, runs
from taskkd.checkpoints import save_student
from tests import tiny
from tests.detection import coco_folder
from tests.face import people
from tests.segmentation import trees


def finished(folder: Path, recipe: dict[str, Any]) -> Path:
    """A run's folder: the student of a recipe at its start, as a run would leave it."""
    _left(folder, recipes.task_named(recipe["task"]), recipe)
    return folder


def held(folder: Path, name: str, method: str, *given: Any, **options: Any) -> runs.Result:
    """What `kd.distill` gives back for models and data that the caller holds, without a training."""
    task = recipes.task_named(name).given(*given, **options)
    student = _left(folder, task, {"task": name, **task.describe(), "method": {"name": method}})
    return runs.Result(student, {}, folder)


def _left(folder: Path, task: Any, recipe: dict[str, Any]) -> Any:
    """Write a run's folder; gives its student."""
    recipe = {"schema": 1, "name": folder.name, "training": {"epochs": 1}, "baseline": None, **recipe}
    loaded = recipes.validate(recipe, "a test")
    data = task.load(loaded)
    torch.manual_seed(0)
    teacher = task.teacher(loaded, data)
    student = task.student(loaded, data, teacher, 0)
    for module in student.modules():  # as if trained: no normalisation that changes nothing
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    save_student(student, folder / "student", data.processing)
    (folder / "recipe.yaml").write_text(recipes.dump_recipe(loaded))
    report(folder, task.main_metric(data), data.summary())
    return student


def report(folder: Path, metric: str, data: str) -> None:
    cost = {"parameters": 1e6, "bytes": 4e6, "latency_ms": 1.5}
    teacher, student = ({"test": {metric: value}, "validation": {metric: value}} for value in (0.9, 0.8125))
    content: dict[str, Any] = {
        "recipe": folder.name, "metric": metric, "data": data, "test_samples": 20, "seeds": [0], "teacher": teacher,
        "alone": {}, "distilled": {"distilled": {"0": student}}, "models": {"teacher": cost, "student": cost},
        "selected": "distilled", "selected_seed": 0,
    }  # fmt: skip
    content["table"] = reports.rows(content)
    (folder / "report.json").write_text(json.dumps(content))


def nlp(root: Path) -> Path:
    files = {}
    for seed, part in enumerate(("train", "validation", "test")):
        files[part] = str(tiny.write_csv(root / f"{part}.csv", tiny.sentences(20, seed)))
    tiny.classifier(2).save_pretrained(root / "teacher")
    tiny.tokenizer().save_pretrained(root / "teacher")
    own = {"task": "nlp", "data": {"files": files}, "teacher": {"model": str(root / "teacher")}}
    method = {"name": "soft_targets", "temperature": 2}
    return finished(root / "texts", {**own, "student": {"layers": [1]}, "method": method})


def detection(root: Path) -> Path:
    path = coco_folder.write(root / "coco")
    built = {
        "architecture": "faster_rcnn", "backbone": "mobilenet_v3_small", "stages": [3, 4], "extra_levels": False,
        "width": 8, "representation_size": 16, "min_size": 64, "max_size": 80, "proposals": 40, "detections": 10,
    }  # fmt: skip
    data = {"coco": {"train": str(path)}, "validation_size": 3, "test_size": 3}
    own = {"task": "detection", "data": data, "teacher": {**built, "finetune": {}}, "student": built}
    return finished(root / "boxes", {**own, "method": {"name": "mimic"}})


def segmentation(root: Path) -> Path:
    path = trees.folder(root / "shapes")
    built = {"architecture": "lraspp", "backbone": "mobilenet_v3_small", "width": 8}
    data = {"folder": {"train": str(path), "classes": trees.CLASSES}, "validation_size": 3, "test_size": 3}
    own = {"task": "segmentation", "data": data, "teacher": {**built, "finetune": {}}, "student": built}
    return finished(root / "masks", {**own, "method": {"name": "channel_wise"}})


def face(root: Path) -> Path:
    parts = {}
    for number, part in enumerate(("train", "validation", "test")):
        people.folder(root / "people" / part, 4, 4, first=10 * number)
        parts[part] = str(root / "people" / part)
    data = {"folder": parts, "folds": 2, "far": [0.1]}
    own = {"task": "face", "data": data, "teacher": {**people.LARGE, "finetune": {}}, "student": people.NET}
    return finished(root / "faces", {**own, "method": {"name": "embedding_mimic"}})


RUNS = {"nlp": nlp, "detection": detection, "segmentation": segmentation, "face": face}
