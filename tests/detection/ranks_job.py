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
from tests.segmentation.ranks_job import frozen

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


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
            folder / method, per_device_train_batch_size=4 // RANKS, optim="sgd", learning_rate=0.01, ddp_timeout=60,
            train_sampling_strategy="sequential",
        ),
        train_dataset=data,
        data_collator=collate,
    )  # fmt: skip
    if method == "channel_wise":  # torchvision draws a size for each image: new weights depend on the batch
        trainer.prepare()
        torch.manual_seed(RANK)
        with torch.no_grad():
            for parameter in trainer.distiller.terms.parameters():
                parameter.normal_(std=0.1)
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
    if RANKS > 1:
        torch.distributed.barrier()
    start = retinanet(8, min_size=(48, 64)).state_dict()
    student = retinanet(8, min_size=64)
    student.load_state_dict(start)
    frozen(student)
    found = {"channel_wise": train(folder, "channel_wise", student, retinanet(16, min_size=64, seed=1))}
    for method, teacher in (("pearson_kd", retinanet(16, seed=1)), ("gdetkd", faster_rcnn(16, seed=1))):
        if RANKS == 1:  # random sizes, and what is normalised over a batch
            break
        student = retinanet(8, min_size=(48, 64))
        student.load_state_dict(start)
        found[method] = train(folder, method, student, teacher)
    torch.save(found, folder / f"{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    everything(Path(sys.argv[1]))
    if RANKS > 1:
        torch.distributed.destroy_process_group()
