"""Several runs side by side: in groups of one task and metric, each with what differs between its recipes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from taskkd.charts import Chart, Point
from taskkd.finished import Finished

__all__ = ["of_runs"]

#: costs on the x axis of the Pareto pictures: key of a row, title
COSTS = (
    ("parameters", "parameters"),
    ("flops", "FLOPs of one sample"),
    ("latency", "CPU latency, batch 1, share of the teacher's"),
)
#: places among the settings that differ between any two runs
NOT_TOLD = ("name", "schema")


def of_runs(runs: Sequence[Finished]) -> dict[str, Any]:
    """What the page of several runs shows."""
    groups: dict[tuple[str, str, int], list[Finished]] = {}
    for run in runs:
        groups.setdefault((run.task, run.metric, int(run.report["test_samples"])), []).append(run)
    return {"title": f"{len(runs)} runs side by side", "groups": [_group(*key, own) for key, own in groups.items()]}


def _group(task: str, metric: str, samples: int, runs: Sequence[Finished]) -> dict[str, Any]:
    names = _names(runs)
    rows = [row for run, name in zip(runs, names, strict=True) for row in _rows(run, name)]
    rows = _teachers_once(rows, metric)
    _add_gains(rows, runs, metric)
    best = max((r for r in rows if r["role"] == "distilled"), key=lambda r: r[metric], default=None)
    return {
        "task": task,
        "metric": metric,
        "samples": samples,
        "rows": rows,
        "best": best,
        "notes": list(_notes(runs, rows)),
        "pareto": {
            f"pareto-{task}-{metric}-{key}": c for key, title in COSTS if (c := _pareto(rows, metric, key, title))
        },
        "names": names,
        "settings": list(_differences(runs)),
        "recipes": [(name, run.recipe) for name, run in zip(names, runs, strict=True)],
    }


def _names(runs: Sequence[Finished]) -> list[str]:
    """Of folders; with those above where two have one name."""
    short = [run.name for run in runs]
    if len(set(short)) == len(short):
        return short
    longer = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    return longer if len(set(longer)) == len(longer) else [str(run.folder) for run in runs]


def _rows(run: Finished, name: str) -> Iterator[dict[str, Any]]:
    alone_title = run.report.get("alone_title", "student alone")
    for row in run.rows():
        role = {"teacher": "teacher", alone_title: "alone"}.get(row["model"], "distilled")
        plain = row["model"] in ("teacher", "distilled")
        shown = name if plain and role != "teacher" else f"{name}: {row['model']}"
        latency = 1 / row["speed_up"] if row["speed_up"] else None  # of one run, so that a busy machine slowed both
        seeds = 1 if role == "teacher" else len(run.report["seeds"])
        yield {**row, "run": name, "role": role, "shown": shown, "seeds": seeds, "gain_of": "own", "latency": latency}


def _teachers_once(rows: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Teachers that are equal in quality and size stand for one; they come first."""
    found: dict[tuple[float, float], dict[str, Any]] = {}
    for row in rows:
        if row["role"] == "teacher":
            found.setdefault((row[metric], row["parameters"]), row)
    if len(found) == 1:
        next(iter(found.values()))["shown"] = "teacher"
    others = sorted((r for r in rows if r["role"] != "teacher"), key=lambda r: (r["role"] != "alone", -r[metric]))
    return [*found.values(), *others]


def _add_gains(rows: Sequence[dict[str, Any]], runs: Sequence[Finished], metric: str) -> None:
    """Where a run has no student alone, its gain is over the only one there is, if student and data are the same."""
    alone = [row for row in rows if row["role"] == "alone"]
    if len(alone) != 1 or len({_data(run) for run in runs}) > 1:
        return
    for row in rows:
        if row["role"] == "distilled" and row["gain"] is None and row["parameters"] == alone[0]["parameters"]:
            row["gain"], row["gain_of"] = row[metric] - alone[0][metric], alone[0]["run"]


def _data(run: Finished) -> str:
    """What tells the data of a run."""
    return str(run.steps.get("inputs", {}).get("data") or run.report["data"])


def _notes(runs: Sequence[Finished], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if len({_data(run) for run in runs}) > 1:
        yield (
            "The runs did not have the same data: compare them with care. "
            + "; ".join(f"{run.name}: {run.report['data']}" for run in runs)
            + "."
        )
    if sum(row["role"] == "teacher" for row in rows) > 1:
        yield "The runs had different teachers: what is kept is a share of each run's own."
    if any(row["seeds"] != rows[-1]["seeds"] for row in rows if row["role"] != "teacher"):
        yield "The runs have different numbers of seeds."
    borrowed = {row["gain_of"] for row in rows if row["gain_of"] != "own"}
    if borrowed:
        yield f"Gains of runs without a student alone of their own are over that of {borrowed.pop()}."
    if len({run.report.get("machine") for run in runs}) > 1:
        yield "The runs were measured on different machines: latencies cannot be compared."
    elif any(row["latency_ms"] is not None for row in rows):
        yield (
            "Each run measured its own latency, and a busy machine shows in it. Its teacher and student were timed in "
            "turns: speed-ups can be compared."
        )
    if any(row["flops"] is None for row in rows):
        yield "Runs of older versions have no FLOPs and no latency at batch 8 on record."


def _pareto(rows: Sequence[Mapping[str, Any]], metric: str, key: str, title: str) -> Chart | None:
    """Share of the teacher kept against a cost; None where the cost is not known."""
    known = [row for row in rows if row[key]]
    if len(known) < 2:
        return None
    points = []
    for place, row in enumerate(known):
        error = row["standard_error"] * row["kept"] / row[metric] if row[metric] else 0.0
        marker = {"teacher": "s", "alone": "^", "distilled": "o"}[row["role"]]
        shown = 0.0 if math.isnan(error) or row["role"] == "teacher" else 100 * error
        points.append(Point(row["shown"], float(row[key]), 100 * row["kept"], shown, place, marker))
    return Chart(
        f"kept against {title}", title, "share of the teacher kept (%)", points=points,
        log_x=max(p.x for p in points) > 3 * min(p.x for p in points),
        alt=f"Share of the teacher kept against {title}: "
        + "; ".join(f"{p.name} {p.y:.1f} % at {p.x:.4g}" for p in points) + ".",
        legend=[(p.name, p.colour) for p in points],
    )  # fmt: skip


def _differences(runs: Sequence[Finished]) -> Iterator[tuple[str, list[str]]]:
    """(setting, its value in each run) of settings that are not the same in all."""
    flat = [dict(_flat(run.settings)) for run in runs]
    for key in dict.fromkeys(k for settings in flat for k in settings):
        values = [settings.get(key) for settings in flat]
        if key not in NOT_TOLD and any(value != values[0] for value in values):
            yield key, ["–" if value is None else str(value) for value in values]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
