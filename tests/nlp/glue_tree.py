"""A small copy of GLUE in the layout of the hub's data set: parquet files by task, a README that says which."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets

from taskkd.nlp.glue import GLUE_TASKS
from tests import tiny

SPLITS = {"train": 40, "validation": 16, "test": 6}
MNLI = {"train": 40, "validation_matched": 16, "validation_mismatched": 10, "test_matched": 6, "test_mismatched": 6}


def splits(task: str) -> dict[str, int]:
    return MNLI if task == "mnli" else SPLITS


def rows(task: str, split: str, count: int, seed: int) -> dict[str, list[Any]]:
    """Columns of a split: a text is good or bad, pairs agree or do not; test labels are hidden."""
    own, rng = GLUE_TASKS[task], random.Random(seed)
    texts = tiny.sentences(2 * count, seed)
    columns = [own.text] if isinstance(own.text, str) else list(own.text)
    found: dict[str, list[Any]] = {c: [] for c in (*columns, "label", "idx")}
    for i in range(count):
        (first, mood), (second, other) = texts[2 * i : 2 * i + 2]
        for column, text in zip(columns, (first, second), strict=False):
            found[column].append(text)
        if len(columns) == 1:
            label: float = int(mood == "positive")
        elif own.labels:
            label = (mood != other) * (len(own.labels) - 1)
        else:
            label = 5.0 * (mood == other) - rng.random() * (mood == other)
        found["label"].append(label if not split.startswith("test") else -1)
        found["idx"].append(i)
    return found


def write(folder: Path, tasks: list[str] | None = None) -> Path:
    """Write the tasks; returns the folder."""
    lines = ["---", "configs:"]
    for task in tasks or list(GLUE_TASKS):
        own = GLUE_TASKS[task]
        label = datasets.ClassLabel(names=list(own.labels)) if own.labels else datasets.Value("float32")
        lines += [f"- config_name: {task}", "  data_files:"]
        for number, (split, count) in enumerate(splits(task).items()):
            columns = rows(task, split, count, seed=100 * number + len(lines))
            types = {c: datasets.Value("string") for c in columns if c not in ("label", "idx")}
            features = datasets.Features({**types, "label": label, "idx": datasets.Value("int32")})
            (folder / task).mkdir(parents=True, exist_ok=True)
            table = datasets.Dataset.from_dict(columns, features=features)
            table.to_parquet(folder / task / f"{split}-00000-of-00001.parquet")
            lines += [f"  - split: {split}", f"    path: {task}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# GLUE", ""]))
    return folder
