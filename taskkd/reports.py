"""What a run prints and writes: one table, `report.json`, curves; and the score of quality and compression."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taskkd.costs import measure
from taskkd.files import write_whole

__all__ = ["FORMAT", "curves", "measure", "rows", "score", "table", "write"]

#: of `report.json`; a newer one is not read
FORMAT = 2


def _mean(values: Sequence[float], samples: int, share: bool) -> tuple[float, float]:
    """Mean and standard error: over seeds where there are several, else of a share over the test samples."""
    mean = statistics.fmean(values)
    if len(values) > 1:
        return mean, statistics.stdev(values) / math.sqrt(len(values))
    return mean, math.sqrt(max(mean * (1 - mean), 0) / samples) if share and samples else math.nan


def score(kept: float, parameters: float, flops: float) -> float:
    """One number for quality and compression: `kept**(3/4) * (1 - sqrt(parameters * flops))**(1/4)`.

    It is 0 for a student that keeps nothing or saves nothing (the teacher itself), and nears 1 for one that keeps all
    of its teacher's quality at next to no cost. Quality weighs three times as much as compression. Ours;
    docs/reports.md says what it rewards and what it cannot tell.

    Args:
        kept: what the student keeps of the teacher's metric above chance, `(student - chance) / (teacher - chance)`;
            below 0 it counts as 0, above 1 as 1.
        parameters, flops: of the student, as shares of the teacher's.
    """
    saved = 1 - math.sqrt(parameters * flops)
    return float(min(max(kept, 0.0), 1.0) ** 0.75 * max(saved, 0.0) ** 0.25)


def _score(value: float, kind: str, report: Mapping[str, Any]) -> float | None:
    """The score of a row, None where something that it needs is not on record."""
    chance, top = report.get("chance"), report["teacher"]["test"][report["metric"]]
    own, other = (report["models"][k] for k in (kind, "teacher"))
    if chance is None or not own.get("flops") or not other.get("flops") or top <= chance:
        return None
    return score(
        (value - chance) / (top - chance), own["parameters"] / other["parameters"], own["flops"] / other["flops"]
    )


def rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of a report: one row for the teacher, the student alone, and every distilled variant."""
    name, samples = report["metric"], report["test_samples"]
    share = name == "accuracy"
    models, alone_title = report["models"], report.get("alone_title", "student alone")
    entries = [("teacher", {"-": report["teacher"]}, "teacher")]
    if report["alone"]:
        entries.append((alone_title, report["alone"], "student"))
    entries += [(variant, runs, "student") for variant, runs in report["distilled"].items()]
    top = report["teacher"]["test"][name]
    alone = statistics.fmean(r["test"][name] for r in report["alone"].values()) if report["alone"] else None
    found = []
    for title, runs, kind in entries:
        mean, error = _mean([r["test"][name] for r in runs.values()], samples, share)
        found.append(
            {
                "model": title,
                name: mean,
                "standard_error": error,
                "gain": mean - alone if alone is not None and kind == "student" and title != alone_title else None,
                "kept": mean / top if top else math.nan,
                "further": {
                    t: statistics.fmean(r["test"][f"{t}_{name}"] for r in runs.values()) for t in _further(report)
                },
                "validation": statistics.fmean(r["validation"][name] for r in runs.values()),
                "seconds": sum(r.get("seconds", 0.0) for r in runs.values()),
                **models[kind],
                "speed_up": _ratio(models["teacher"].get("latency_ms"), models[kind].get("latency_ms")),
                "score": _score(mean, kind, report),
            }
        )
    return found


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _further(report: Mapping[str, Any]) -> list[str]:
    """The test sets beside the first that have the metric."""
    own = report["teacher"]["test"]
    return [t for t in report.get("further_tests", ()) if f"{t}_{report['metric']}" in own]


def table(report: Mapping[str, Any]) -> Any:
    """The rows as a rich table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    name = report["metric"]
    seeds = len(report["seeds"])
    over = f"mean over {seeds} seeds" if seeds > 1 else "1 seed"
    title = f"{report['recipe']}: {name} on {report['test_samples']} test samples, {over}"
    shown = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    short = {"accuracy": "acc", "pairwise_spearman": "pairwise"}.get(name, name)
    further = _further(report)
    for column in ("", short, "± s.e.", "gain", "kept", *further, "params", "size", "ms", "speed"):
        shown.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for row in rows(report):
        shown.add_row(
            row["model"],
            f"{row[name]:.4f}",
            "" if math.isnan(row["standard_error"]) else f"{row['standard_error']:.4f}",
            "" if row["gain"] is None else f"{row['gain']:+.4f}",
            f"{row['kept']:.1%}",
            *(f"{row['further'][t]:.4f}" for t in further),
            _millions(row["parameters"]),
            f"{row['bytes'] / 1e6:.1f} MB",
            "-" if row["latency_ms"] is None else f"{row['latency_ms']:.1f}",
            "-" if row["speed_up"] is None else f"{row['speed_up']:.1f}x",
        )
    return shown


def _millions(count: float) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e6:.3f} M"


def curves(report: Mapping[str, Any], path: Path) -> None:
    """Draw training loss and validation metric of the student alone and of every distilled variant (first seed)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    name = report["metric"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    runs = {report.get("alone_title", "student alone"): report["alone"], **report["distilled"]}
    for title, seeds in runs.items():
        if not seeds:
            continue
        run = next(iter(seeds.values()))
        total = max(run["steps"], 1)
        points = [(h["step"] / total, h["loss"]) for h in run["history"] if "loss" in h]
        left.plot(*zip(*points, strict=True), label=f"{title} ({run['steps']} steps)") if points else None
        scores = [(h["step"] / total, h[f"eval_{name}"]) for h in run["history"] if f"eval_{name}" in h]
        right.plot(*zip(*scores, strict=True), marker="o", label=title) if scores else None
    right.axhline(report["teacher"]["validation"][name], color="grey", linestyle="--", label="teacher")
    left.set(title="training loss", xlabel="share of the training", yscale="log")
    right.set(title=f"{name} on validation", xlabel="share of the training")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.json` (without the logs, which are in `run.json`) and `curves.png`."""

    def short(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: short(v) for k, v in value.items() if k != "history"}
        return value

    content = {"format": FORMAT, **short(report), "table": rows(report)}
    write_whole(folder / "report.json", json.dumps(content, indent=1))
    curves(report, folder / "curves.png")
