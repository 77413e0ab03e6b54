"""What a finished run has left in its folder, read again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskkd.errors import DataError, RecipeError
from taskkd.reports import FORMAT, rows

__all__ = ["Finished", "read_run"]

STAGE = re.compile(r"seed-(\d+)/(.+)/stages/(\d+)-(.+)")
COSTS = ("parameters", "bytes", "latency_ms", "latency_p95_ms", "flops", "latency_8_ms", "latency_8_p95_ms")


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Args:
        folder: of the run.
        report: `report.json`.
        steps: what `run.json` has on record, step by step, with the logs.
        recipe: `recipe.yaml` as text.
        settings: the recipe as a mapping.
    """

    folder: Path
    report: dict[str, Any]
    steps: dict[str, Any]
    recipe: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return self.folder.resolve().name

    @property
    def task(self) -> str:
        """As in the recipe."""
        return str(self.report.get("task") or self.settings.get("task", "unknown"))

    @property
    def method(self) -> str | None:
        """Its name, None without one."""
        method = self.settings.get("method")
        return str(method.get("name")) if isinstance(method, Mapping) else None

    @property
    def metric(self) -> str:
        """That models were selected by."""
        return str(self.report["metric"])

    def rows(self) -> list[dict[str, Any]]:
        """The table: teacher, student alone, distilled variants; costs that are not on record are None."""
        return [dict.fromkeys(COSTS) | row for row in rows(self.report)]

    def by_class(self) -> dict[str, list[dict[str, dict[str, float]]]]:
        """Title of a model -> for each seed class -> metric -> value; empty where nothing is on record."""
        entries = {"teacher": [self.report["teacher"]]}
        if self.report["alone"]:
            entries[self.report.get("alone_title", "student alone")] = list(self.report["alone"].values())
        entries |= {name: list(runs.values()) for name, runs in self.report["distilled"].items()}
        found = {title: [_classes(run) for run in runs] for title, runs in entries.items()}
        return found if all(all(seeds) for seeds in found.values()) else {}

    def stages(self) -> dict[tuple[str, str], dict[int, list[dict[str, Any]]]]:
        """(title of a model, stage) -> seed -> the log, in the order of training."""
        found: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {}
        if "history" in self.steps.get("teacher", {}):
            found["teacher", "fine-tuning"] = {0: self.steps["teacher"]["history"]}
        for seed, run in self.report["alone"].items():
            log = self.steps.get(f"seed-{seed}/alone-{run.get('setting')}", {}).get("history", [])
            if log:
                key = self.report.get("alone_title", "student alone"), "task"
                found.setdefault(key, {})[int(seed)] = log
        for step, result in self.steps.items():
            match = STAGE.fullmatch(step)
            if match and match[2] in self.report["distilled"] and result.get("history"):
                found.setdefault((match[2], match[4]), {})[int(match[1])] = result["history"]
        return found


def _classes(run: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By class as it is on record, or as older runs have it among the metrics (`IoU/road`)."""
    if run.get("by_class"):
        return dict(run["by_class"])
    found: dict[str, dict[str, float]] = {}
    for key, value in run["test"].items():
        metric, slash, name = key.partition("/")
        if slash:
            found.setdefault(name, {})[metric] = value
    return found


def read_run(folder: Path) -> Finished:
    """Read what a finished run has left.

    Raises:
        RecipeError: the folder is not one of a run, or the run is not finished, or another version wrote it.
        DataError: a file of it is damaged.
    """
    if not (folder / "recipe.yaml").is_file():
        what = "there is no recipe.yaml in it" if folder.is_dir() else "it is no folder"
        raise RecipeError(f"{folder} is not the folder of a run: {what}.")
    if not (folder / "report.json").is_file():
        raise RecipeError(
            f"the run in {folder} is not finished: it has no report.json. Start it again, and it goes on where it "
            "stopped."
        )
    report = _checked(_json(folder / "report.json"), folder / "report.json")
    steps = _json(folder / "run.json").get("finished") if (folder / "run.json").is_file() else {}
    if not isinstance(steps, dict):
        raise DataError(f"{folder / 'run.json'} is damaged: expected the finished steps under 'finished'.")
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    return Finished(folder, report, steps, recipe, _settings(recipe, folder / "recipe.yaml"))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. Start the run again, which writes it anew.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: expected a mapping, it holds a {type(found).__name__}.")
    return found


def _checked(report: dict[str, Any], path: Path) -> dict[str, Any]:
    """A report in which everything is that a page is made of.

    Raises:
        RecipeError: a newer version wrote it.
        DataError: something is missing.
    """
    version = report.get("format", 1)
    if not isinstance(version, int) or version > FORMAT:
        raise RecipeError(
            f"{path} was written by another version of taskkd (format {version}; this one reads up to {FORMAT}): "
            "update taskkd."
        )
    try:
        metric = report["metric"]
        for entry in [{"-": report["teacher"]}, report["alone"], *report["distilled"].values()]:
            for run in entry.values():
                float(run["test"][metric]), float(run["validation"][metric])
        for kind in ("teacher", "student"):
            float(report["models"][kind]["parameters"]), float(report["models"][kind]["bytes"])
        missing = [key for key in ("recipe", "data", "test_samples", "seeds") if key not in report]
        if missing:
            raise KeyError(missing[0])
        rows(report)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"{path} is damaged, or of another version of taskkd ({type(error).__name__}: {error}). Start the run "
            "again, which writes it anew."
        ) from None
    return report


def _settings(text: str, path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise DataError(f"{path} is damaged: not YAML ({str(error).splitlines()[0]}).") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: expected a mapping.")
    return found
