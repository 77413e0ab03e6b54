"""Interrupted trainings of detectors go on bit by bit as if they had not been: acceptance E2 of the specification.

Detectors draw the size of their images and the samples of their losses from the global generator, some methods their
masks; augmentation draws from generators of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import taskkd as kd
from taskkd import recipes, runs
from taskkd.detection import DetectionDataset, DetectorTeacher, collate, read
from taskkd.detection.methods import METHODS
from taskkd.detection.task import DetectionTask
from taskkd.detection.transforms import build
from tests.detection import coco_folder
from tests.detection.detectors import faster_rcnn
from tests.engine import StopAfter, arguments, changed, distance, weights

AUGMENT = ["RandomHorizontalFlip", "RandomPhotometricDistort"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coco_folder.write(tmp_path_factory.mktemp("coco"), 8)


def trainer(data: Path, folder: Path, *callbacks: Any, workers: int) -> kd.Trainer:
    """Eight images in batches of two; random sizes, samples, masks and colours, a queue and automatic weights."""
    student, teacher = faster_rcnn(8, min_size=(48, 64, 80)), faster_rcnn(16, seed=1)
    terms = [t for name in ("masked_generative", "gdetkd") for t in METHODS[name](student, teacher).stages[0].terms]
    made = kd.Trainer(
        student,
        teacher=DetectorTeacher(teacher, student),
        terms=terms,
        args=arguments(
            folder,
            per_device_train_batch_size=2,
            num_train_epochs=2,
            learning_rate=1e-3,
            logging_strategy="steps",
            logging_steps=1,
            dataloader_num_workers=workers,
        ),
        train_dataset=kd.Augmented(DetectionDataset(read(data)), build(AUGMENT), seed=5),
        data_collator=collate,
        callbacks=list(callbacks),
    )
    made.sizes = []  # type: ignore[attr-defined]
    student.backbone.register_forward_pre_hook(lambda _, args: made.sizes.append(tuple(args[0].shape[2:])))  # type: ignore[attr-defined]
    return made


def everything(done: kd.Trainer) -> dict[str, Tensor]:
    state = weights(done.distiller)
    for number, slots in done.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{k}": torch.as_tensor(v).clone() for k, v in slots.items()}
    return state


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> kd.Trainer:
    """The training that nothing interrupts."""
    done = trainer(data, tmp_path_factory.mktemp("whole"), workers=0)
    done.train()
    return done


@pytest.mark.parametrize(("workers", "stop"), [(0, 2), (2, 6)])
def test_resuming_is_bit_exact(whole: kd.Trainer, data: Path, tmp_path: Path, workers: int, stop: int) -> None:
    first = trainer(data, tmp_path / "run", StopAfter(stop), workers=workers)
    first.train()
    assert distance(everything(first), everything(whole)) > 1e-4
    again = trainer(data, tmp_path / "run", workers=workers)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == 8
    assert len(set(whole.sizes)) > 1  # type: ignore[attr-defined]
    assert again.sizes[-(8 - stop) :] == whole.sizes[-(8 - stop) :]  # type: ignore[attr-defined]
    logged = [[log for log in t.state.log_history if "loss" in log] for t in (whole, again)]
    assert logged[0] == logged[1]
    assert changed(everything(whole), everything(again)) == set()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_started_again_gives_the_same_losses(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    teacher = {"architecture": "retinanet", "backbone": "mobilenet_v3_small", "head_convs": 1, "max_size": 80}
    own = {**teacher, "width": 8, "min_size": [48, 64, 80]}
    recipe = {
        "schema": 1,
        "task": "detection",
        "data": {"coco": {"train": str(data)}, "validation_size": 2, "test_size": 2, "augment": AUGMENT},
        "teacher": {**teacher, "width": 16, "min_size": 64},
        "student": own,
        "method": {"name": "masked_generative", "weight": 1e-3},
        "training": {"epochs": 6, "batch_size": 2, "learning_rate": 1e-3, "workers": workers},
        "baseline": None,
    }
    monkeypatch.setattr(DetectionTask, "chance", lambda *_: -1.0)
    path = tmp_path / "my.yaml"
    path.write_text(recipes.dump_recipe(recipes.validate(recipe, "test")))
    program = "import sys; from taskkd.detection.task import DetectionTask; DetectionTask.chance = lambda *_: -1.0; "
    program += "sys.argv[0] = 'taskkd'; from taskkd.__main__ import main; main()"
    command = [sys.executable, "-c", program, "distill", str(path), "--output-dir", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    stage = tmp_path / "killed" / "seed-0" / "distilled" / "stages" / "0-distil"
    deadline = time.monotonic() + 300
    while not list(stage.glob("checkpoint-*/manifest.json")):
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # its workers, too
    process.wait(60)
    assert "distilled" not in (tmp_path / "killed" / "run.json").read_text()
    loaded = recipes.load_recipe(str(path))
    killed, whole = (runs.run_recipe(loaded, tmp_path / n, say=lambda _: None) for n in ("killed", "whole"))
    a, b = (
        [h for h in r.report["distilled"]["distilled"]["0"]["history"] if "loss" in h or "eval_AP" in h]
        for r in (killed, whole)
    )
    timed = ("runtime", "per_second", "preparation_time")
    assert [{k: v for k, v in h.items() if not k.endswith(timed)} for h in a] == [
        {k: v for k, v in h.items() if not k.endswith(timed)} for h in b
    ]
    assert all(torch.equal(x, y) for x, y in zip(killed.student.parameters(), whole.student.parameters(), strict=True))
