"""What ranks do with segmentation networks, for `test_distributed.py`.

`torchrun --nproc-per-node 2 ranks_job.py FOLDER`, or a single process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import taskkd as kd
from taskkd.segmentation import METHODS, PixelCrossEntropy, SegmentationDataset, SegmentationMetric, collate
from taskkd.segmentation.readers import read_folder
from tests.engine import arguments, doubled, step_losses, weights
from tests.segmentation import toy, trees

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
#: of means over pixels, channels or images alone: the mean of the ranks' losses is that of their images together
#: (DIST is no such mean: it correlates over all pixels of a batch)
MEANS: dict[str, dict[str, Any]] = {
    "soft_targets": {},
    "channel_wise": {},
    "structured": {"holistic_weight": 0.0},
}
#: relations of the pixels of all images, on those of both ranks
GATHERED: dict[str, dict[str, Any]] = {
    "dist": {"gather": True},
    "cirkd": {"gather": True, "pixel": 0.0, "region": 0.0},
}
#: whose judge and memory are of all ranks
SHARED: dict[str, dict[str, Any]] = {"structured": {"width": 4}, "cirkd": {"pixels": 24, "regions": 6}}


def frozen(model: nn.Module) -> nn.Module:
    """Batch norm as it is, so that what an image gives does not depend on the others of its batch."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, FrozenBatchNorm2d(child.num_features).to(child.weight.dtype))
        else:
            frozen(child)
    return model


def train(folder: Path, methods: dict[str, dict[str, Any]], *, free: bool = False) -> dict[str, Any]:
    """Three steps on twelve images in double precision, four in each, of which every rank sees its own; then five."""
    student, teacher = toy.network(2, seed=0).double(), toy.network(4, seed=1, stride=2).double()
    if not free:
        frozen(student)
    terms = [t for name, given in methods.items() for t in METHODS[name](student, teacher, **given).stages[0].terms]
    for number, term in enumerate(terms):
        term.name = f"{number}-{term.name}"
    torch.manual_seed(RANK)  # what is drawn for adapters need not be the same
    table = read_folder(folder / "data" / "images", folder / "data" / "masks", classes=toy.CLASSES)
    before = [b.clone() for b in teacher.state_dict().values()]
    trainer = kd.Trainer(
        student,
        teacher=teacher,
        terms=terms,
        task_loss=PixelCrossEntropy(),
        metric=SegmentationMetric(toy.CLASSES),
        args=arguments(
            folder / "-".join(methods),
            per_device_train_batch_size=4 // RANKS,
            per_device_eval_batch_size=1,
            optim="sgd",
            learning_rate=0.05,
            ddp_timeout=60,
            train_sampling_strategy="sequential",
            logging_strategy="steps",
            logging_steps=1,
        ),
        train_dataset=SegmentationDataset(table, training=True),
        eval_dataset=torch.utils.data.Subset(SegmentationDataset(table), range(5)),
        data_collator=doubled(collate),
    )
    trainer.train()
    measured = trainer.evaluate()
    return {
        "step": trainer.state.global_step,
        "losses": step_losses(trainer),
        "parameters": {
            n: v for n, v in weights(trainer.distiller).items() if v.is_floating_point() and "_extra" not in n
        },
        "measured": {k: v for k, v in measured.items() if k.startswith(("eval_mIoU", "eval_IoU", "eval_pixel"))},
        "untouched": all(torch.equal(a, b) for a, b in zip(before, teacher.state_dict().values(), strict=True)),
    }


def everything(folder: Path) -> None:
    arguments(folder, ddp_timeout=60)._setup_devices  # noqa: B018  (joins the process group)
    if RANK == 0:
        trees.folder(folder / "data", 12, side=32)
    if RANKS > 1:
        torch.distributed.barrier()
    found = {"means": train(folder, MEANS), "gathered": train(folder, GATHERED)}
    if RANKS > 1:
        found["shared"] = train(folder, SHARED, free=True)
    torch.save(found, folder / f"{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    everything(Path(sys.argv[1]))
    if RANKS > 1:
        torch.distributed.destroy_process_group()
