"""Pictures of what face models tell apart: similarities of pairs, and ROC curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from taskkd.face.pairs import Pairs
from taskkd.face.verification import roc

__all__ = ["draw"]

GENUINE, IMPOSTOR = "tab:blue", "tab:orange"


def draw(sets: Mapping[str, tuple[Pairs, Mapping[str, Tensor]]], path: Path) -> None:
    """A row for each verification set: a histogram of similarities for each model, and all their ROC curves.

    Args:
        sets: name -> the pairs, and by model the (M, D) unit embeddings of their images.
        path: of the picture (png).
    """
    from matplotlib.figure import Figure

    count = max(len(models) for _, models in sets.values())
    figure = Figure(figsize=(3.1 * count + 3.6, 3.1 * len(sets)), layout="constrained")
    axes = figure.subplots(len(sets), count + 1, squeeze=False)
    for row, (title, (pairs, models)) in zip(axes, sets.items(), strict=True):
        for axis, (name, embeddings) in zip(row, models.items(), strict=False):
            scores = _scores(pairs, embeddings)
            bins = np.linspace(min(-0.2, scores.min()), 1, 51)
            axis.hist(scores[~pairs.same], bins=list(bins), alpha=0.6, color=IMPOSTOR, label="two people")
            axis.hist(scores[pairs.same], bins=list(bins), alpha=0.6, color=GENUINE, label="one person")
            axis.set(title=name, xlabel="similarity", yticks=[])
            far, tar, _ = roc(scores, pairs.same)
            row[-1].plot(far, tar, label=name)
        row[0].legend(fontsize="small")
        row[0].set_ylabel(f"{title}\npairs")
        least = 1 / max(2, int((~pairs.same).sum()))
        row[-1].set(
            xscale="log", xlim=(least, 1), ylim=(0, 1.02), xlabel="false accept rate", ylabel="true accept rate"
        )
        row[-1].set_title("ROC")
        row[-1].grid(alpha=0.3)
        row[-1].legend(fontsize="small", loc="lower right")
        for axis in row[len(models) : -1]:
            axis.set_visible(False)
    figure.savefig(path, dpi=110)


def _scores(pairs: Pairs, embeddings: Tensor) -> np.ndarray:
    rows = embeddings.double().numpy()
    found: np.ndarray = (rows[pairs.left] * rows[pairs.right]).sum(1)
    return found
