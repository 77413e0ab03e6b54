"""What a run prints and draws: one table, `report.json`, curves."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taskkd.taps import accepted_arguments
from taskkd.teachers import Frozen

__all__ = ["curves", "measure", "rows", "table", "write"]


def measure(
    teacher: nn.Module, student: nn.Module, batches: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Parameters, bytes of the weights, and CPU latency (median and 95th percentile, batch 1, milliseconds) of both.

    Teacher and student take turns on the same real samples, so that a busy machine slows both alike.
    """
    models = {"teacher": teacher.cpu().eval(), "student": student.cpu().eval()}
    accepted = {"teacher": Frozen(teacher).inputs, "student": accepted_arguments(student.forward)}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for round_ in range(4):
            for batch in batches:
                for name, model in models.items():
                    inputs = accepted[name](batch)
                    start = time.perf_counter()
                    model(**inputs)
                    if round_:  # the first round warms up
                        times[name].append(time.perf_counter() - start)
    found = {}
    for name, model in models.items():
        sizes = {p.data_ptr(): p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()]}
        ordered = sorted(times[name])
        found[name] = {
            "parameters": float(sum(p.numel() for p in model.parameters())),
            "bytes": float(sum(sizes.values())),
            "latency_ms": 1e3 * statistics.median(ordered) if ordered else math.nan,
            "latency_p95_ms": 1e3 * ordered[int(0.95 * (len(ordered) - 1))] if ordered else math.nan,
        }
    return found


def _mean(values: Sequence[float], samples: int, share: bool) -> tuple[float, float]:
    """Mean and standard error: over seeds where there are several, else of a share over the test samples."""
    mean = statistics.fmean(values)
    if len(values) > 1:
        return mean, statistics.stdev(values) / math.sqrt(len(values))
    return mean, math.sqrt(max(mean * (1 - mean), 0) / samples) if share and samples else math.nan


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
                "speed_up": models["teacher"]["latency_ms"] / models[kind]["latency_ms"],
            }
        )
    return found


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
            f"{row['latency_ms']:.1f}",
            f"{row['speed_up']:.1f}x",
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

    (folder / "report.json").write_text(
        json.dumps({**short(report), "table": rows(report)}, indent=1), encoding="utf-8"
    )
    curves(report, folder / "curves.png")
