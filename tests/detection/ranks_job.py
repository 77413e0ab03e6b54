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
from tests.engine import arguments, doubled, step_losses, weights
from tests.segmentation.ranks_job import frozen

#: method, options: what is of each image by itself, or on both ranks of the images of both
ALIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "channel_wise": ("channel_wise", {}),
    "normalised": ("channel_wise", {"normalise": True, "gather": True}),
    "correlated": ("pearson_kd", {"gather": True}),
    "instances": ("gid", {"gather": True, "class_weight": 0.0, "box_weight": 0.0}),
}
#: the same as "correlated", of each rank's own
PER_RANK: dict[str, tuple[str, dict[str, Any]]] = {"correlated by rank": ("pearson_kd", {})}
RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def train(
    folder: Path, method: str, student: nn.Module, teacher: nn.Module, *, fixed: bool = False, **options: Any
) -> dict[str, Any]:
    """Three steps on twelve images in double precision, four in each, of which every rank sees its own.

    The last two are of one rank, without boxes.
    """
    torch.manual_seed(RANK)  # what is drawn for adapters need not be the same
    data = kd.Augmented(DetectionDataset(read(folder / "coco" / "annotations.json")), build(["RandomHorizontalFlip"]))
    student, teacher = student.double(), teacher.double()
    before = [b.clone() for b in teacher.state_dict().values()]
    trainer = kd.Trainer(
        student,
        teacher=DetectorTeacher(teacher, student),
        method=METHODS[method](student, teacher, **options),
        args=arguments(
            folder / method, per_device_train_batch_size=4 // RANKS, optim="sgd", learning_rate=0.01, ddp_timeout=60,
            train_sampling_strategy="sequential", logging_strategy="steps", logging_steps=1,
        ),
        train_dataset=data,
        data_collator=doubled(collate),
    )  # fmt: skip
    if fixed:  # torchvision draws a size for each image: new weights depend on the batch
        trainer.prepare()
        torch.manual_seed(RANK)
        with torch.no_grad():
            for parameter in trainer.distiller.terms.parameters():
                parameter.normal_(std=0.1)
    trainer.train()
    state, names = weights(trainer.distiller), {n for n, _ in trainer.distiller.named_parameters()}
    return {
        "step": trainer.state.global_step,
        "losses": step_losses(trainer),
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
    found = {}
    for name, (method, options) in (ALIKE | (PER_RANK if RANKS > 1 else {})).items():
        student = retinanet(8, min_size=64)
        student.load_state_dict(start)
        teacher = retinanet(16, min_size=64, seed=1)
        found[name] = train(folder, method, frozen(student), teacher, fixed=True, **options)
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
