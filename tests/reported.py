"""Folders as finished runs leave them, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from taskkd.reports import FORMAT

COSTS = {
    "teacher": {"parameters": 100.0, "bytes": 400.0, "flops": 1e9, "latency_ms": 10.0, "latency_p95_ms": 12.0,
                "latency_8_ms": 70.0, "latency_8_p95_ms": 80.0},
    "student": {"parameters": 25.0, "bytes": 100.0, "flops": 2.5e8, "latency_ms": 4.0, "latency_p95_ms": 5.0,
                "latency_8_ms": 20.0, "latency_8_p95_ms": 24.0},
}  # fmt: skip


def entry(value: float, metric: str = "accuracy") -> dict[str, Any]:
    classes = {name: {"precision": value, "recall": value, "f1": value, "samples": 50} for name in ("<b>no</b>", "yes")}
    return {"validation": {metric: value}, "test": {metric: value, "mcc": value / 2}, "by_class": classes}


def report(
    alone: tuple[float, ...] = (0.70, 0.72), distilled: tuple[float, ...] = (0.80, 0.82), **changes: Any
) -> dict[str, Any]:
    metric = changes.get("metric", "accuracy")
    answer = {"label": "yes", "probability": 0.9, "right": True}
    answers = {"teacher": answer, "student alone": answer | {"label": "no", "right": False}, "distilled": answer}
    texts = [{"text": "a <script>alert(1)</script> film", "label": "yes", "answers": answers}]
    return {
        "format": FORMAT, "recipe": "my", "task": "nlp", "method": "soft_targets", "metric": metric, "chance": 0.5,
        "data": "100 labelled", "test_samples": 100, "further_tests": [], "seeds": list(range(len(distilled or alone))),
        "teacher": entry(0.9, metric), "alone_title": "student alone",
        "alone": {str(s): entry(v, metric) | {"setting": "0.001"} for s, v in enumerate(alone)},
        "distilled": {"distilled": {str(s): entry(v, metric) for s, v in enumerate(distilled)}} if distilled else {},
        "selected": "distilled" if distilled else "alone", "selected_seed": 0, "models": COSTS,
        "examples": {"looked_at": 100, "agreed": 99, "patterns": [{"right": ["teacher"], "count": 1}], "texts": texts},
        "date": "2026-01-02T03:04:05+00:00", "versions": {"taskkd": "0"}, "machine": "one",
    } | changes  # fmt: skip


def run(folder: Path, content: dict[str, Any] | None = None, name: str = "my") -> Path:
    """A folder with the report, logs of two stages and of the student alone, and a recipe."""
    folder.mkdir(parents=True)
    content = report() if content is None else content
    metric = content["metric"]
    steps: dict[str, Any] = {"inputs": {"data": "d", "teacher": "t"}}
    for seed in range(2):
        log = [{"step": s, "loss": 1 / s, "loss_logits": 0.5 / s, "loss_<i>x</i>": 0.2 / s} for s in (10, 20)]
        steps[f"seed-{seed}/alone-0.001"] = {"history": [*log, {"step": 20, f"eval_{metric}": 0.7}]}
        steps[f"seed-{seed}/distilled/stages/0-first"] = {"history": log}
        steps[f"seed-{seed}/distilled/stages/1-second"] = {"history": [*log, {"step": 20, f"eval_{metric}": 0.8}]}
    recipe = {"schema": 1, "name": name, "task": content.get("task", "nlp"), "method": {"name": "soft_targets"}}
    (folder / "report.json").write_text(json.dumps(content))
    (folder / "run.json").write_text(json.dumps({"finished": steps}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder
