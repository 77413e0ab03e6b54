"""Runs of methods with several stages: order, what is handed on, restarts, full-length batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from taskkd import recipes, runs
from taskkd.session import Session
from taskkd.teachers import Frozen
from tests import tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture
def recipe(tmp_path: Path, teacher: Path) -> Path:
    tiny.write_csv(tmp_path / "train.csv", tiny.sentences(120))
    path = tmp_path / "my.yaml"
    path.write_text(f"""schema: 1
task: nlp
data: {{files: {{train: {tmp_path}/train.csv}}, max_length: 16}}
teacher: {{model: {teacher}}}
student: {{layers: [0, 2]}}
method: {{name: tinybert, intermediate_epochs: 2, intermediate_learning_rate: 1e-3}}
training: {{epochs: 2, learning_rate: 3e-3, batch_size: 16}}
baseline: null
""")
    return path


def run(recipe: Path, folder: Path, *overrides: str) -> runs.Result:
    return runs.run_recipe(recipes.load_recipe(recipe, overrides), folder, say=lambda _: None)


def test_tinybert_from_a_recipe(recipe: Path, tmp_path: Path) -> None:
    result = run(recipe, tmp_path / "run")
    stages = tmp_path / "run" / "seed-0" / "distilled" / "stages"
    assert sorted(p.name for p in stages.iterdir()) == ["0-intermediate", "1-prediction"]
    finished = json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    first = finished["seed-0/distilled/stages/0-intermediate"]
    second = finished["seed-0/distilled/stages/1-prediction"]
    assert first["validation"] == {} and not any("eval_accuracy" in h for h in first["history"])
    rates = {h["learning_rate"] for h in first["history"] if "learning_rate" in h}
    assert rates == {1e-3}  # constant
    losses = [h["loss"] for h in first["history"] if "loss" in h]
    assert losses[-1] < losses[0]
    assert any("loss_attention-0-1" in h for h in first["history"])
    outcome = result.report["distilled"]["distilled"]["0"]
    assert outcome["steps"] == first["steps"] + second["steps"] == 2 * first["steps"]
    assert outcome["test"]["accuracy"] > 0.7
    assert len(list((tmp_path / "run" / "cache").iterdir())) == 2  # one for each set of taps


def test_a_restart_hands_on_what_the_first_stage_has_learned(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("method={name: lrc_bert, contrast_share: 0.5, projection: layer}",)
    whole = run(recipe, tmp_path / "whole", *overrides)
    adapters = tmp_path / "whole" / "seed-0" / "distilled" / "stages" / "0-contrast" / "adapters.safetensors"
    assert any("adapters" in name for name in load_file(adapters))

    fit, ran = Session.fit, []

    def stopping(self: Session, step: str, *args: Any, **options: Any) -> Any:
        ran.append(step)
        if "1-all" in step:
            raise KeyboardInterrupt
        return fit(self, step, *args, **options)

    monkeypatch.setattr(Session, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "halves", *overrides)
    monkeypatch.setattr(Session, "fit", fit)
    halves = run(recipe, tmp_path / "halves", *overrides)
    for (name, a), b in zip(whole.student.named_parameters(), halves.student.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len(ran) == 2


def test_official_averages_pad_to_the_full_length_with_a_live_teacher(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    call = Frozen.__call__

    def looking(self: Frozen, batch: Any, run: Any = None) -> Any:
        seen.append(tuple(batch["input_ids"].shape))
        return call(self, batch, run)

    monkeypatch.setattr(Frozen, "__call__", looking)
    run(recipe, tmp_path / "run", "method.compat=official")
    assert seen and {length for _, length in seen} == {16}
    assert not (tmp_path / "run" / "cache").exists()


def test_a_method_whose_only_stage_keeps_the_last_is_evaluated_at_the_end(recipe: Path, tmp_path: Path) -> None:
    result = run(recipe, tmp_path / "run", "method={name: tinybert_general}")
    assert "accuracy" in result.report["distilled"]["distilled"]["0"]["validation"]
