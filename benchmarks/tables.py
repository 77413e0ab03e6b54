"""What the quality tables of the vision tasks share: rows, running them, and the table in the page of results.

A table has a teacher, the student alone and the student distilled by each method. All trainings share start, data,
augmentation, batch size, schedule and number of optimiser steps, and keep the best epoch on validation. The student
alone has, for every seed, the learning rate that is best on validation; a method has one setting for all seeds: the
learning rate of the table and its own defaults, or what `--search` finds on validation with the first seed (`found`).
Reported is the test: mean and standard error over the seeds, and the mean gain over the student alone, paired by seed.
What is finished is not done again, so an interrupted table goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import error, on_test, publish, spread, verdict
from taskkd import recipes
from taskkd.runs import Result, run_recipe

__all__ = ["Row", "Table", "main"]


@dataclass(frozen=True)
class Row:
    """A way to distil.

    Args:
        title: in the table.
        method: section of the recipe.
        search: dotted keys of the recipe -> what `--search` tries.
        changes: dotted keys of the recipe -> what this row has otherwise.
        against: the row that gains are counted from; None: the student alone.
    """

    title: str
    method: dict[str, Any] | None
    search: dict[str, list[Any]] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    against: str | None = None


class Table:
    """A table of a task; subclasses say of what.

    Args:
        seeds: one run each.
        out: the folder of all runs.
    """

    task: str
    #: which arguments make it ("face --data orl"), and the heading of its task in the page
    title: str
    heading: str
    #: the heading of the table
    about: str
    #: the metric that models are selected by, and others to report beside it, with their names in the table
    metrics: Mapping[str, str]
    rows: Mapping[str, Row]
    #: row -> dotted keys of its recipe, by `--search`
    found: Mapping[str, Mapping[str, Any]] = {}
    #: teacher and student
    networks: tuple[Mapping[str, Any], Mapping[str, Any]]
    finetune: Mapping[str, Any]
    training: Mapping[str, Any]
    #: learning rates of the student alone
    rates: Sequence[float]

    def __init__(self, seeds: list[int], out: Path) -> None:
        self.seeds, self.out = seeds, out

    @property
    def folder(self) -> Path:
        """Of this table's runs."""
        return self.out / self.title.replace(" --data ", "-")

    @property
    def name(self) -> str:
        """What the names of its recipes begin with."""
        return self.folder.name

    def write(self, source: Path) -> None:
        """Make the data, from what is in a folder."""

    def data(self) -> dict[str, Any]:
        """The section of the data."""
        raise NotImplementedError

    def parameters(self, network: Mapping[str, Any]) -> int:
        """How many parameters a network of the recipes has."""
        raise NotImplementedError

    def shown(self, parameters: int) -> str:
        """A number of parameters, in words."""
        return f"{parameters / 1e6:.2f} M"

    def base(self) -> dict[str, Any]:
        """The recipe of every row but for teacher, baseline and method."""
        student, training = dict(self.networks[1]), dict(self.training)
        return {"task": self.task, "data": self.data(), "student": student, "training": training}

    def teacher(self) -> dict[str, Any]:
        """The section of a teacher that is trained first."""
        return {**self.networks[0], "finetune": dict(self.finetune)}

    def alone(self) -> dict[str, Any]:
        """The section of the student alone."""
        return {"learning_rates": list(self.rates), "epochs": self.training["epochs"]}

    def caption(self, report: Mapping[str, Any]) -> list[str]:
        """Lines above the table."""
        large, small = map(self.parameters, self.networks)
        steps, seeds = next(iter(report["alone"].values()))["steps"], ", ".join(map(str, self.seeds))
        return [
            f"### {self.about}",
            "",
            f"Teacher {self.shown(large)} parameters, student {self.shown(small)} ({large / small:.1f} times smaller); "
            f"{report['data']}; {steps} steps of {self.training['batch_size']}; seeds {seeds}.",
        ]

    def recipe(self, row: str | None) -> Any:
        """The recipe of a row; None: teacher and student alone."""
        data = {"schema": 1, **self.base(), "seeds": self.seeds, "name": f"{self.name}-{row or 'alone'}"}
        if row is None:
            data["teacher"], data["baseline"] = self.teacher(), self.alone()
        else:
            data["teacher"] = {"model": str(self.folder / "alone" / "teacher" / "model")}
            data["baseline"] = None if self.rows[row].method is not None else self.alone()
            data["method"] = None if self.rows[row].method is None else dict(self.rows[row].method or {})
            for key, value in {**self.rows[row].changes, **self.found.get(row, {})}.items():
                recipes.set_key(data, key, value)
        return recipes.validate(data, data["name"])

    def run(self, row: str | None) -> Result:
        """Run it, or go on with it, or read what it gave."""
        return run_recipe(self.recipe(row), self.folder / (row or "alone"), say=say)

    def search(self, row: str) -> None:
        """Try the settings of a row's search with the first seed and print what validation says."""
        recipe = self.recipe(row).model_copy(update={"seeds": self.seeds[:1]})
        tried = run_recipe(recipe, self.folder / f"search-{row}", sweep=self.rows[row].search, say=say)
        seed, metric = str(self.seeds[0]), next(iter(self.metrics))
        found = {k: v[seed]["validation"][metric] for k, v in tried.report["distilled"].items()}
        for setting, value in sorted(found.items(), key=lambda item: -item[1]):
            print(f"{row}: {setting}: {metric} {value:.4f} on validation", flush=True)

    def markdown(self, reports: Mapping[str, dict[str, Any]]) -> str:
        """The table: one line for teacher, student alone, and every row."""
        first = reports["alone"]
        teacher, rates = first["teacher"]["test"], ", ".join(run["setting"] for run in first["alone"].values())
        alone = {metric: on_test(first, "alone", metric) for metric in self.metrics}
        titles = [f" {title} | gain over alone |" for title in self.metrics.values()]
        titles[0] += " |"
        lines = [
            *self.caption(first),
            "",
            "| |" + "".join(titles),
            "|---|---|---|---|" + "---|---|" * (len(self.metrics) - 1),
            "| teacher |" + "".join(_cells(f"{100 * teacher[m]:.2f}", "", n) for n, m in enumerate(self.metrics)),
            f"| student alone (learning rates {rates}) |"
            + "".join(_cells(spread(alone[m]), "", n) for n, m in enumerate(self.metrics)),
        ]
        lines += [self._line(name, reports, alone) for name in self.rows if name in reports]
        return "\n".join(lines) + "\n"

    def _line(self, name: str, reports: Mapping[str, dict[str, Any]], alone: Mapping[str, list[float]]) -> str:
        row = self.rows[name]
        kind = "distilled" if row.method is not None else "alone"
        text = f"| {row.title}{self.setting(name)} |"
        for number, metric in enumerate(self.metrics):
            values = on_test(reports[name], kind, metric)
            other = alone[metric]
            if row.against is not None and row.against in reports:
                against = "distilled" if self.rows[row.against].method is not None else "alone"
                other = on_test(reports[row.against], against, metric)
            gains = [value - base for value, base in zip(values, other, strict=True)]
            shown = f"{100 * statistics.mean(gains):+.2f} ± {100 * error(gains):.2f}"
            text += _cells(spread(values), shown, number, verdict(gains))
        return text

    def setting(self, name: str) -> str:
        """What the search found for a row, in words."""
        found = self.found.get(name, {})
        return f" ({', '.join(f'{k.rpartition(chr(46))[2]} {v}' for k, v in found.items())})" if found else ""


def _cells(value: str, gain: str, number: int, judged: str = "") -> str:
    """A metric's cells; the first one's gain is judged."""
    cells = [value, gain, judged] if number == 0 else [value, gain]
    return "".join(f" {cell} |" if cell else " |" for cell in cells)


def say(line: str) -> None:
    """Print a run's line."""
    print(f"  {line}", flush=True)


def main(kinds: Mapping[str, type[Table]], program: str, arguments: Sequence[str] | None = None) -> int:
    """Run or go on with a table.

    Args:
        kinds: the tables of the task, by what `--data` says.
        program: "quality.py face".
        arguments: of the command.
    """
    parser = argparse.ArgumentParser(prog=program, description="Quality tables: teacher, student alone, methods.")
    parser.add_argument("--data", choices=sorted(kinds), default=next(iter(kinds)))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", help="rows of the table (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--source", type=Path, default=Path(os.environ.get("TASKKD_DATA", "data")))
    parser.add_argument("--search", action="store_true", help="try settings on validation instead")
    options = parser.parse_args(arguments)
    table = kinds[options.data](seeds=[int(s) for s in options.seeds.split(",")], out=options.out.resolve())
    names = options.methods.split(",") if options.methods else list(table.rows)
    if unknown := [name for name in names if name not in table.rows]:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(table.rows)}")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.getLogger("taskkd").setLevel(logging.ERROR)
    table.write(options.source)
    reports: dict[str, dict[str, Any]] = {"alone": table.run(None).report}
    for name in names:
        print(f"{name}:", flush=True)
        if options.search:
            table.search(name)
        else:
            reports[name] = table.run(name).report
    if not options.search:
        text = table.markdown(reports)
        print(text)
        publish(table, text, heading=table.heading)
    return 0
