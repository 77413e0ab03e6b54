"""What two ranks do with detectors, for `test_distributed.py`: `torchrun --nproc-per-node 2 ranks_job.py FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import taskkd as kd
from taskkd.detection import METHODS, DetectionDataset, DetectorTeacher, collate, read
from taskkd.detection.transforms import build
from tests.detection import coco_folder
from tests.detection.detectors import faster_rcnn, retinanet
from tests.engine import arguments, weights

RANK = int(os.environ.get("RANK", "0"))


def train(folder: Path, method: str, student: nn.Module, teacher: nn.Module, **options: Any) -> dict[str, Any]:
    """Three steps on twelve images, of which each rank sees its own; the last two are of one rank without boxes."""
    torch.manual_seed(RANK)  # what is drawn for adapters need not be the same
    data = kd.Augmented(DetectionDataset(read(folder / "coco" / "annotations.json")), build(["RandomHorizontalFlip"]))
    before = [b.clone() for b in teacher.state_dict().values()]
    trainer = kd.Trainer(
        student,
        teacher=DetectorTeacher(teacher, student),
        method=METHODS[method](student, teacher, **options),
        args=arguments(
            folder / method, per_device_train_batch_size=2, optim="sgd", learning_rate=0.01, ddp_timeout=60,
            train_sampling_strategy="sequential",
        ),
        train_dataset=data,
        data_collator=collate,
    )  # fmt: skip
    trainer.train()
    state, names = weights(trainer.distiller), {n for n, _ in trainer.distiller.named_parameters()}
    return {
        "step": trainer.state.global_step,
        "parameters": {n: v for n, v in state.items() if n in names},
        "queue": {n: v for n, v in state.items() if "queue" in n},
        "untouched": all(torch.equal(a, b) for a, b in zip(before, teacher.state_dict().values(), strict=True)),
    }


def everything(folder: Path) -> None:
    arguments(folder, ddp_timeout=60)._setup_devices  # noqa: B018  (joins the process group)
    if RANK == 0:
        coco_folder.write(folder / "coco")
    torch.distributed.barrier()
    start = retinanet(8, min_size=(48, 64)).state_dict()
    found = {}
    for method, teacher in (("pearson_kd", retinanet(16, seed=1)), ("gdetkd", faster_rcnn(16, seed=1))):
        student = retinanet(8, min_size=(48, 64))
        student.load_state_dict(start)
        found[method] = train(folder, method, student, teacher)
    torch.save(found, folder / f"{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    everything(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
