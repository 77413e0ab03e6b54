"""Runs that end when their time is up, and caches that are built ahead of them."""

import logging
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from taskkd import __main__, recipes, runs, shards
from taskkd import signals as module
from taskkd.errors import CacheError, RecipeError
from taskkd.signals import Budget, TimeUp
from tests import tiny

DROPOUT = ("training.dropout=0.1",)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    tiny.write_csv(folder / "train.csv", tiny.sentences(80))
    path = folder / "my.yaml"
    path.write_text(f"""schema: 1
task: nlp
data: {{files: {{train: {folder}/train.csv}}}}
teacher: {{model: {teacher}}}
student: {{layers: [0, 2]}}
method: {{name: soft_targets}}
training: {{epochs: 2, learning_rate: 3e-3, batch_size: 16}}
baseline: null
""")
    return path


def run(recipe: Path, folder: Path, *overrides: str) -> runs.Result:
    return runs.run_recipe(recipes.load_recipe(recipe, overrides), folder, say=lambda _: None)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """The student of a run in one go."""
    return run(recipe, tmp_path_factory.mktemp("whole") / "run", *DROPOUT).student


class Clock:
    """Every look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now

    def perf_counter(self) -> float:
        return 0.0


def test_a_run_in_parts_is_the_run_in_one_go(
    recipe: Path, whole: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start is given another time: it is no part of what the run is."""
    starts = 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "time", Clock())
        for starts in range(1, 20):
            try:
                part = run(recipe, tmp_path / "parts", *DROPOUT, f"training.wall_time={(14 + starts) / 3600}")
                break
            except TimeUp:
                continue
    assert starts > 1
    for a, b in zip(part.student.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "wall_time" not in (tmp_path / "parts" / "recipe.yaml").read_text()


def test_the_command_says_what_to_do(recipe: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    words = ["distill", str(recipe), "--output-dir", str(tmp_path / "run"), "--wall-time", "0.000001"]
    monkeypatch.setattr("sys.argv", ["taskkd", *words])
    monkeypatch.setattr(logging.getLogger("taskkd"), "handlers", [])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 75
    assert "the time is up (wall_time or SIGUSR1); the same command goes on from here" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="wall_time"):
        run(recipe, tmp_path / "run", "training.wall_time=0")


def test_sigusr1_says_that_the_time_is_up() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Budget() as budget:
        budget.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(TimeUp):
            budget.check()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_one_of_several_processes_runs_no_recipe(recipe: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="run by one process, and this is one of 2"):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_built_ahead_is_the_one_the_run_reads(
    recipe: Path, whole: nn.Module, tmp_path: Path, monkeypatch, workers: int
) -> None:
    said: list[str] = []
    overrides = (*DROPOUT, f"training.workers={workers}")
    loaded = recipes.load_recipe(recipe, overrides)
    (cache,) = runs.build_caches(loaded, tmp_path / "ahead", say=said.append)
    size = re.search(r": (\d+) samples, [\d.]+ kB in .*/ahead/cache/", said[-1])
    assert size is not None
    assert int(size[1]) == len(np.load(cache / "shard-00000" / "ids.npy")) > 60
    files = {p: p.stat().st_mtime_ns for p in cache.rglob("*.npy")}
    with monkeypatch.context() as patch:
        patch.setattr("taskkd.caches.Cached.build", None)
        ahead = run(recipe, tmp_path / "ahead", *overrides)
    assert files == {p: p.stat().st_mtime_ns for p in cache.rglob("*.npy")}
    for a, b in zip(ahead.student.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_build_that_is_stopped_goes_on(recipe: Path, tmp_path: Path, monkeypatch) -> None:
    loaded = recipes.load_recipe(recipe, ["training.eval_batch_size=8", "training.wall_time=1000"])
    looks = iter([False] * 6)
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "up", property(lambda self: next(looks, True)))
        with pytest.raises(TimeUp):
            runs.build_caches(loaded, tmp_path / "run", say=lambda _: None)
    (index,) = (tmp_path / "run" / "cache").glob("*/index.json")
    before = [len(np.load(p)) for p in sorted(index.parent.glob("shard-*/ids.npy"))]
    assert len(before) == 1 and before[0] % 8 == 0
    runs.build_caches(loaded, tmp_path / "run", say=lambda _: None)
    after = [len(np.load(p)) for p in sorted(index.parent.glob("shard-*/ids.npy"))]
    assert (after[0], sum(after)) == (before[0], 64)


def test_why_there_is_nothing_to_build(recipe: Path, tmp_path: Path) -> None:
    for overrides, why in (
        (["teacher.cache=null"], "`teacher.cache` is null"),
        (["method={name: tinybert, compat: official, intermediate_epochs: 1}"], "what the teacher gives for padding"),
    ):
        with pytest.raises(RecipeError, match=why):
            runs.build_caches(recipes.load_recipe(recipe, overrides), tmp_path / why, say=lambda _: None)


def test_ids_that_repeat_are_found_among_many(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "RECENT", 8)
    writer = shards.Writer(tmp_path, {"taps": {"out": {"shape": [2], "ragged": []}}, "shards": []}, "float32")
    for start in (100, 0, 50):
        ids = np.arange(start, start + 20)
        writer.add(ids, np.ones(20, bool), {"out": torch.zeros(20, 2)}, {"x": torch.zeros(20, 1)})
        writer.flush()
    again = shards.Writer(tmp_path, writer.index, "float32")
    for one in (writer, again):
        with pytest.raises(CacheError, match="sample id 105 occurs twice"):
            one.add(np.array([200, 105]), np.ones(2, bool), {"out": torch.zeros(2, 2)}, {"x": torch.zeros(2, 1)})
