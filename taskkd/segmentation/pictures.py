"""Pictures of what segmentation networks find: image, ground truth and every model, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taskkd.segmentation.labels import IGNORE
from taskkd.segmentation.metrics import SegmentationMetric, predicted

__all__ = ["draw"]


@torch.no_grad()
def draw(table: Any, networks: Mapping[str, nn.Module], classes: Sequence[str], path: Path, *, count: int = 4) -> None:
    """Draw images and masks: a row for each image; a column for the image, the ground truth and each model.

    Over each model's mask stands its mean IoU on that image; the first row has the colours of the classes.

    Args:
        table: samples as `SegmentationDataset` gives them; evenly spread ones are shown.
        networks: title -> model.
        classes: names; label k is `classes[k]`.
        path: of the png file.
        count: images.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    colours = _colours(len(classes))
    count = min(count, len(table))
    samples = [table[i * len(table) // count] for i in range(count)]
    columns = ["image", "ground truth", *networks]
    figure, axes = plt.subplots(
        len(samples), len(columns), figsize=(2.9 * len(columns), 3.0 * len(samples) + 0.5), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    seen: set[int] = set()
    for row, sample in zip(axes, samples, strict=True):
        masks = _masks(sample, networks)
        seen |= {int(v) for mask in masks.values() for v in torch.unique(mask)}
        for axis, title in zip(row, columns, strict=True):
            axis.set(xticks=[], yticks=[])
            if title == "image":
                axis.imshow(sample["images"].permute(1, 2, 0).numpy())
                axis.set_title(title, fontsize=10)
                continue
            axis.imshow(colours[masks[title].numpy()], interpolation="nearest")
            own = "" if title == "ground truth" else f": {_score(masks[title], sample['labels'], classes):.3f}"
            axis.set_title(f"{title}{own}", fontsize=10)
    shown = [Patch(color=colours[k] / 255, label=name) for k, name in enumerate(classes) if k in seen]
    figure.legend(handles=shown[:20], loc="outside lower center", ncols=min(len(shown), 6) or 1, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _masks(sample: Mapping[str, Any], networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    labels = sample["labels"]
    masks = {"ground truth": labels}
    for title, model in networks.items():
        device = next(model.parameters()).device  # the teacher of a run stays where it was trained
        logits = model.eval()(sample["images"][None].to(device))["logits"]
        masks[title] = predicted(logits, (int(labels.shape[0]), int(labels.shape[1])))[0].cpu()
    return masks


def _score(mask: Tensor, labels: Tensor, classes: Sequence[str]) -> float:
    metric = SegmentationMetric(classes, per_class=False)
    metric.update(mask[None], {"labels": labels[None]})
    return metric.compute()["mIoU"]


def _colours(count: int) -> np.ndarray[Any, Any]:
    """(256, 3) uint8: a colour for every label; what is ignored is white."""
    from matplotlib import colormaps

    named = np.array([colormaps["tab10"](k)[:3] for k in range(10)])
    many = np.array([colormaps["gist_ncar"]((k * 0.618) % 1)[:3] for k in range(256)])
    table = np.zeros((256, 3))
    table[:] = many
    table[: min(count, 10)] = named[: min(count, 10)]
    table[0] = (0.12, 0.12, 0.14)  # mostly the background
    table[IGNORE] = 1.0
    return (table * 255).astype(np.uint8)
