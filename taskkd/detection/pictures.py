"""Pictures of what detectors find: ground truth and every model, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["draw"]


@torch.no_grad()
def draw(
    table: Any,
    detectors: Mapping[str, nn.Module],
    classes: Sequence[str],
    path: Path,
    *,
    count: int = 4,
    threshold: float = 0.5,
) -> None:
    """Draw images with boxes: a row for each image, a column for the ground truth and for each model.

    Args:
        table: samples as `DetectionDataset` gives them; those with the most boxes of the evenly spread are shown.
        detectors: title -> model.
        classes: names; label k is `classes[k - 1]`.
        path: of the png file.
        count: images.
        threshold: boxes of a lower score are not shown.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    samples = [table[i] for i in _spread(table, count)]
    columns = ["ground truth", *detectors]
    figure, axes = plt.subplots(
        len(samples), len(columns), figsize=(3.2 * len(columns), 3.3 * len(samples)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, sample in zip(axes, samples, strict=True):
        for axis, title in zip(row, columns, strict=True):
            axis.imshow(sample["images"].permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            if title == "ground truth":
                found = sample["targets"]
                boxes, labels = found["boxes"], found["labels"]
            else:
                model = detectors[title].eval()  # the teacher of a run stays where it was trained
                (found,) = model([sample["images"].to(next(model.parameters()).device)])
                kept = found["scores"] >= threshold
                boxes, labels = found["boxes"][kept], found["labels"][kept]
            axis.set_title(f"{title}: {len(boxes)}", fontsize=10)
            _boxes(axis, boxes, labels, classes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _spread(table: Any, count: int) -> list[int]:
    """Images from all parts of the table, with boxes where there are any."""
    count = min(count, len(table))
    groups = [range(i * len(table) // count, (i + 1) * len(table) // count) for i in range(count)]
    records = getattr(table, "records", None)
    if records is None:
        return [group[0] for group in groups]
    return [max(group, key=lambda i: int((~records[i].iscrowd).sum())) for group in groups]


def _boxes(axis: Any, boxes: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist(), strict=True):
        colour = colours[(label - 1) % len(colours)]
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2))
        if len(classes) > 1:
            axis.text(x0, y0, classes[label - 1], fontsize=6, color="white", backgroundcolor=colour)
