"""What the tasks share: one interface, the teacher's files, the given models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from taskkd.caches import weights_sha256
from taskkd.detection.task import DetectionTask
from taskkd.files import file_sha256
from taskkd.recipes import task_named
from taskkd.tasks import GivenModels, Task


def recipe(model: Path | None = None, weights: str | None = None) -> Any:
    return SimpleNamespace(teacher=SimpleNamespace(model=None if model is None else str(model), weights=weights))


def test_the_teachers_files_are_told_by_their_bytes(tmp_path: Path) -> None:
    task, folder, file = DetectionTask(), tmp_path / "model", tmp_path / "weights.pth"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1")
    (folder / "other.json").write_bytes(b"2")
    file.write_bytes(b"3")
    assert task.fingerprint(recipe(folder)) == file_sha256(folder / "model.safetensors")
    assert task.fingerprint(recipe(None, str(file))) == file_sha256(file)
    assert task.fingerprint(recipe(None, "imagenet")) == ""


def test_given_models_go_before_the_task() -> None:
    class Given(GivenModels, DetectionTask):
        def __init__(self) -> None:
            self._student, self._teacher = nn.Linear(2, 2), nn.Linear(2, 3)

        def describe(self) -> dict[str, Any]:
            return self.described_models()

    given = Given()
    assert given.fingerprint(recipe()) == weights_sha256(given._teacher)
    assert given.described_models() == {
        "teacher": {"model": f"given:{weights_sha256(given._teacher)[:16]}"},
        "student": {"model": f"given:{weights_sha256(given._student)[:16]}"},
    }


@pytest.mark.parametrize("name", ["detection", "segmentation", "nlp", "face"])
def test_tasks_are_alike(name: str) -> None:
    """What only one task has is listed here; everything else is declared, and documented, in `Task`."""
    task = task_named(name)
    assert isinstance(task, Task)
    assert task.name == name
    assert task.default_method in task.methods
    own = {key for key in vars(type(task)) if not key.startswith("_")} - set(dir(Task)) - set(Task.__annotations__)
    assert own <= ({"complete"} if name == "nlp" else set())
