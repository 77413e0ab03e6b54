"""A toy on which distillation shows in seconds: pictures of 64 px with shapes of four classes, and tiny detectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign

import taskkd as kd
from taskkd.detection import METHODS, CocoMetric, DetectorTeacher

__all__ = ["average_precision", "faster_rcnn", "pictures", "retinanet", "train"]

SIZE, CLASSES = 64, ["square", "disc", "triangle", "ring"]
#: of anchors, on levels of stride 8, 16 and 32
SCALES = ((12, 17), (20, 24), (28, 34))
COMMON: dict[str, Any] = {"min_size": SIZE, "max_size": SIZE, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def pictures(count: int, seed: int) -> list[dict[str, Any]]:
    """Samples with one to three shapes of any bright colour on a dull background, both noisy."""
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    samples = []
    for number in range(count):
        picture = draw.uniform(0.3, 0.5, 3) + np.zeros((SIZE, SIZE, 1))
        boxes, labels = [], []
        for _ in range(draw.integers(1, 4)):
            side, kind = int(draw.integers(14, 31)), int(draw.integers(len(CLASSES)))
            x, y = (int(v) for v in draw.integers(0, SIZE - side, 2))
            v, u = (rows - y + 0.5) / side, (columns - x + 0.5) / side
            inside, far = (v > 0) & (v < 1) & (u > 0) & (u < 1), (v - 0.5) ** 2 + (u - 0.5) ** 2
            shape = (inside, far < 0.25, inside & (np.abs(u - 0.5) < v / 2), (far < 0.25) & (far > 0.07))[kind]
            picture[shape] = draw.permutation([0.0, 1.0, draw.uniform()])
            boxes.append([x, y, x + side, y + side])
            labels.append(kind + 1)
        noisy = np.clip(picture + draw.normal(0, 0.05, picture.shape), 0, 1)
        image = torch.from_numpy(noisy.astype(np.float32)).permute(2, 0, 1).contiguous()
        target = {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}
        samples.append({"images": image, "targets": {**target, "image_id": torch.tensor(number)}})
    return samples


def collated(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: [s[key] for s in samples] for key in ("images", "targets")}


# ---- detectors: `width` and `depth` of the body, `channels` of the pyramid


def _pyramid(width: int, depth: int, channels: int) -> BackboneWithFPN:
    body, own = nn.Sequential(), 3
    for stage in range(4):
        layers: list[nn.Module] = []
        for i in range(depth if stage else 1):
            size, stride = (5, 4) if stage == 0 else (3, 2 if i == 0 else 1)
            convolution = nn.Conv2d(own, width * (stage + 1), size, stride, size // 2, bias=False)
            own = width * (stage + 1)
            layers += [convolution, nn.BatchNorm2d(own), nn.ReLU()]
        body.add_module(f"layer{stage}", nn.Sequential(*layers))
    backbone = BackboneWithFPN(
        body, {f"layer{i}": str(i - 1) for i in (1, 2, 3)}, [width * i for i in (2, 3, 4)], channels
    )
    backbone.fpn.extra_blocks = None  # no level of stride 64
    return backbone


def _anchors() -> AnchorGenerator:
    return AnchorGenerator(SCALES, ((1.0,),) * 3)


def retinanet(width: int, depth: int, channels: int, *, seed: int) -> RetinaNet:
    torch.manual_seed(seed)
    head = RetinaNetHead(channels, 2, len(CLASSES) + 1, norm_layer=partial(nn.GroupNorm, 4))
    for tower in (head.classification_head.conv, head.regression_head.conv):
        del tower[2:]
    return RetinaNet(
        _pyramid(width, depth, channels), len(CLASSES) + 1, anchor_generator=_anchors(), head=head,
        detections_per_img=30, topk_candidates=60, **COMMON,
    )  # fmt: skip


def faster_rcnn(width: int, depth: int, channels: int, *, seed: int) -> FasterRCNN:
    torch.manual_seed(seed)
    return FasterRCNN(
        _pyramid(width, depth, channels), rpn_anchor_generator=_anchors(),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 5, 2), box_head=TwoMLPHead(channels * 25, channels * 4),
        box_predictor=FastRCNNPredictor(channels * 4, len(CLASSES) + 1), box_batch_size_per_image=16,
        rpn_pre_nms_top_n_train=60, rpn_post_nms_top_n_train=40, rpn_pre_nms_top_n_test=60, rpn_post_nms_top_n_test=20,
        rpn_batch_size_per_image=64, box_detections_per_img=20, **COMMON,
    )  # fmt: skip


# ---- training


def train(
    student: nn.Module, samples: Sequence[dict[str, Any]], *, steps: int, batch: int = 8, learning_rate: float = 1e-2,
    seed: int = 0, teacher: nn.Module | None = None, method: str = "", **options: Any,
) -> nn.Module:  # fmt: skip
    """Train a detector, alone or by a method, on batches that depend on the seed alone."""
    terms = METHODS[method](student, teacher, **options).stages[0].terms if teacher is not None else ()
    torch.manual_seed(seed)
    distiller = kd.Distiller(student, None if teacher is None else DetectorTeacher(teacher, student), terms)
    distiller.prepare(collated(samples[:batch]))
    distiller.set_total(steps)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.2)
    order = torch.Generator().manual_seed(seed)
    distiller.train()
    for _ in range(steps):
        chosen = torch.randint(len(samples), (batch,), generator=order).tolist()
        distiller(**collated([samples[i] for i in chosen]))["loss"].backward()
        nn.utils.clip_grad_norm_(distiller.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        distiller.step()
    distiller.close()
    return student


@torch.no_grad()
def average_precision(model: nn.Module, samples: Sequence[dict[str, Any]]) -> float:
    metric = CocoMetric(CLASSES)
    for start in range(0, len(samples), 50):
        data = collated(samples[start : start + 50])
        metric.update(model.eval()(data["images"]), data)
    return metric.compute()["AP"]
