"""What the tasks on images share: the teacher's files, the given models, terms as they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from taskkd.caches import file_sha256, weights_sha256
from taskkd.tasks import GivenModels, VisionTask


def recipe(model: Path | None = None, weights: str | None = None) -> Any:
    return SimpleNamespace(teacher=SimpleNamespace(model=None if model is None else str(model), weights=weights))


def test_the_teachers_files_are_told_by_their_bytes(tmp_path: Path) -> None:
    task, folder, file = VisionTask(), tmp_path / "model", tmp_path / "weights.pth"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1")
    (folder / "other.json").write_bytes(b"2")
    file.write_bytes(b"3")
    assert task.fingerprint(recipe(folder)) == file_sha256(folder / "model.safetensors")
    assert task.fingerprint(recipe(None, str(file))) == file_sha256(file)
    assert task.fingerprint(recipe(None, "imagenet")) == ""


def test_given_models_go_before_the_task() -> None:
    class Given(GivenModels, VisionTask):
        def __init__(self) -> None:
            self._student, self._teacher = nn.Linear(2, 2), nn.Linear(2, 3)

    given = Given()
    assert given.fingerprint(recipe()) == weights_sha256(given._teacher)
    assert given.described_models() == {
        "teacher": {"model": f"given:{weights_sha256(given._teacher)[:16]}"},
        "student": {"model": f"given:{weights_sha256(given._student)[:16]}"},
    }
