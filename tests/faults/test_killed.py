"""Runs of every task that are killed and started again end as if nothing had happened: contract 8, R1, R3 and R6.

Where they are killed is drawn over the whole life of a run: in trainings, in saves, among the files of a cache, while
old checkpoints are removed (see `killing.py`). Augmentation is random; NLP and faces have a cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine import run_job
from tests.faults import worlds

TIMINGS = ("seconds", "runtime", "per_second", "preparation_time", "ms", "latency", "speed_up", "date")
CODES = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}


def killed(task: str, root: Path, signal: str, points: int, seed: int = 0) -> dict[str, Any]:
    """The report of `killing.py`, the folders of whose runs are beside it."""
    recipe = worlds.write(task, root / "data")
    words = ("tests.faults.killing", str(recipe), str(root), signal, str(seed), str(points))
    run_job(*words, script="-m", timeout=1500)
    found: dict[str, Any] = json.loads((root / "report.json").read_text())
    return found


def untimed(value: Any) -> Any:
    """A report without what a clock has measured."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if not k.endswith(TIMINGS)}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "student").rglob("*.safetensors"))
    assert files
    return {f"{f.name} {name}": value for f in files for name, value in load_file(f).items()}


def history(folder: Path) -> dict[str, Any]:
    """What was measured after every epoch of every training.

    Losses in between are means since the last entry, or since the training went on: of fewer steps after a kill.
    """
    finished = json.loads((folder / "run.json").read_text())["finished"]
    logs = {step: result["history"] for step, result in finished.items() if "history" in result}
    return {step: [untimed(h) for h in log if any(k.startswith("eval_") for k in h)] for step, log in logs.items()}


def same(run: Path, whole: Path) -> None:
    one, other = weights(run), weights(whole)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    reports = [untimed(json.loads((folder / "report.json").read_text())) for folder in (run, whole)]
    assert json.dumps(reports[0], sort_keys=True) == json.dumps(reports[1], sort_keys=True)  # where NaN equals NaN
    histories = [history(folder) for folder in (run, whole)]
    assert json.dumps(histories[0], sort_keys=True) == json.dumps(histories[1], sort_keys=True)
    assert list(run.rglob("checkpoint-*")) == []


@pytest.mark.parametrize(
    ("task", "signal", "points"),
    [
        ("face", "SIGKILL", 3),
        *(pytest.param(task, "SIGKILL", 20, marks=pytest.mark.slow) for task in worlds.TASKS),
        *(pytest.param(task, "SIGTERM", 6, marks=pytest.mark.slow) for task in worlds.TASKS),
        pytest.param("nlp", "SIGINT", 6, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(task: str, signal: str, points: int, tmp_path: Path) -> None:
    report = killed(task, tmp_path, signal, points)
    attempts = report["attempts"]
    assert report["events"] > 50
    assert sum(bool(a["site"]) for a in attempts) == points
    assert {a["code"] for a in attempts if a["site"]} == {CODES[signal]}, attempts
    assert len({a["site"] for a in attempts}) > points / 3  # not always the same place
    for number in range(report["runs"]):
        same(tmp_path / f"run-{number}", tmp_path / "whole")
    if signal != "SIGKILL":
        logs = [(tmp_path / f"attempt-{n}.log").read_text() for n, a in enumerate(attempts) if a["site"]]
        said = ("taskkd: stopped; the same command goes on", "taskkd: interrupted; the same command goes on")
        assert all(any(s in log for s in said) for log in logs)
        assert not any("Traceback" in log for log in logs)
