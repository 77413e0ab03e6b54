"""A toy on which distillation shows in seconds: images of 48 px with shapes of four kinds, and tiny networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskkd as kd
from taskkd.segmentation import METHODS, PixelCrossEntropy, SegmentationMetric, Segmenter

__all__ = ["CLASSES", "mean_iou", "network", "pictures", "train"]

SIZE, CLASSES = 48, ["ground", "square", "disc", "triangle", "ring"]


def pictures(count: int, seed: int) -> dict[str, Tensor]:
    """`images` and `labels` of one to four shapes of any colour on a ground of any colour, with noise.

    The edge of every shape is ignored.
    """
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    images, labels = [], []
    for _ in range(count):
        picture = draw.uniform(0.2, 0.8, 3) + np.zeros((SIZE, SIZE, 1))
        label = np.zeros((SIZE, SIZE), np.int64)
        for _ in range(draw.integers(1, 5)):
            side, kind = int(draw.integers(12, 25)), int(draw.integers(1, len(CLASSES)))
            x, y = (int(v) for v in draw.integers(0, SIZE - side, 2))
            v, u = (rows - y + 0.5) / side, (columns - x + 0.5) / side
            inside, far = (v > 0) & (v < 1) & (u > 0) & (u < 1), (v - 0.5) ** 2 + (u - 0.5) ** 2
            shape = (inside, far < 0.25, inside & (np.abs(u - 0.5) < v / 2), (far < 0.25) & (far > 0.07))[kind - 1]
            picture[shape] = draw.uniform(0, 1, 3)
            label[shape] = kind
        around = np.pad(label, 1, mode="edge")
        edge = np.zeros_like(label, dtype=bool)
        for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
            edge |= around[dy : dy + SIZE, dx : dx + SIZE] != label
        labels.append(np.where(edge, 255, label))
        images.append(np.clip(picture + draw.normal(0, 0.06, picture.shape), 0, 1).transpose(2, 0, 1))
    return {"images": torch.from_numpy(np.stack(images)).float(), "labels": torch.from_numpy(np.stack(labels))}


def network(width: int, *, seed: int, stride: int = 4) -> Segmenter:
    """Four convolutions, two of them dilated, and a classifier at a quarter (a half) of the image's size."""

    def layer(own: int, out: int, step: int = 1, dilation: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(own, out, 3, step, dilation, dilation, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())

    torch.manual_seed(seed)
    body = nn.Sequential(
        layer(3, width, 2), layer(width, 2 * width, stride // 2), layer(2 * width, 2 * width, 1, 2),
        layer(2 * width, 4 * width, 1, 3),
    )  # fmt: skip
    net = nn.Sequential()
    net.add_module("body", body)
    net.add_module("head", nn.Conv2d(4 * width, len(CLASSES), 1))
    return Segmenter(net, CLASSES, mean=[0.5] * 3, std=[0.25] * 3, logits="head", feature="head:in", stages=["body"])


def train(
    student: Segmenter, data: dict[str, Tensor], *, labelled: int, steps: int, batch: int = 8, rate: float = 1e-2,
    seed: int = 0, teacher: Segmenter | None = None, method: str = "", **options: Any,
) -> Segmenter:  # fmt: skip
    """Train alone on the first `labelled` images, or by a method on as many of the others in each batch, too."""
    terms = METHODS[method](student, teacher, **options).stages[0].terms if teacher is not None else ()
    torch.manual_seed(seed)
    distiller = kd.Distiller(student, teacher, terms, task_loss=PixelCrossEntropy())
    order = torch.Generator().manual_seed(seed)
    distiller.set_total(steps)
    total = len(data["images"])

    def drawn() -> dict[str, Tensor]:
        chosen = torch.randint(labelled, (batch,), generator=order)
        if teacher is not None:
            chosen = torch.cat([chosen, torch.randint(labelled, total, (batch,), generator=order)])
        free = chosen >= labelled
        labels = data["labels"][chosen].masked_fill(free[:, None, None], 255)
        return {"images": data["images"][chosen], "labels": labels, "unlabelled": free, "id": chosen}

    distiller.prepare(drawn())
    optimizer = torch.optim.AdamW(distiller.parameters(), rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.2)
    distiller.train()
    for _ in range(steps):
        distiller(**drawn())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        distiller.auxiliary_step()
        distiller.step()
    distiller.close()
    return student


@torch.no_grad()
def mean_iou(model: Segmenter, data: dict[str, Tensor]) -> float:
    metric = SegmentationMetric(CLASSES)
    for start in range(0, len(data["images"]), 50):
        part = {k: v[start : start + 50] for k, v in data.items()}
        metric.update(model.eval()(part["images"]), part)
    return float(F.relu(torch.tensor(metric.compute()["mIoU"])))
