"""The recipe, the commands and the scripts of docs/nlp.md run, on a tiny teacher."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from taskkd import recipes
from taskkd.__main__ import main
from tests import small, tiny

PAGE = (Path(__file__).parents[2] / "docs" / "nlp.md").read_text()
(RECIPE,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
CALL, LOOP = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS = [c for block in re.findall(r"```\n(taskkd.*?)```", PAGE, re.S) for c in block.splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    tiny.save_teacher(tmp_path / "path" / "to" / "teacher")
    for seed, name in enumerate(("reviews", "more", "other", "train")):
        tiny.write_csv(tmp_path / f"{name}.csv", tiny.sentences(60, seed), ("review", "stars"))
    return tmp_path


def test_the_recipe_is_ten_lines_and_its_commands_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len([line for line in RECIPE.splitlines() if line.strip()]) <= 10
    text = RECIPE.replace("bert-base-uncased", "path/to/teacher").replace("[0, 4, 8]", "[0, 2]")
    (folder / "reviews.yaml").write_text(text + "baseline: {learning_rates: [1e-4], epochs: 1}\n")
    assert [shlex.split(c)[1] for c in COMMANDS] == ["check", "distill", "evaluate", "predict"]
    said = {}
    for command in COMMANDS:
        words = shlex.split(command)
        short = ["training.max_steps=1", "teacher.finetune.epochs=1"] if words[1] in ("check", "distill") else []
        monkeypatch.setattr(sys, "argv", [*words, *short])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, command
        said[words[1]] = capsys.readouterr().out
    assert "uniform map" in said["check"]
    assert {"accuracy", "f1", "mcc"} <= set(said["evaluate"].split())
    assert said["predict"].split()[0] in ("positive", "negative")
    written = ("student/model.safetensors", "student/tokenizer.json", "report.json", "curves.png", "recipe.yaml")
    assert all((folder / "runs" / "reviews" / name).exists() for name in written)


def test_the_recipes_from_names_are_right(folder: Path) -> None:
    (command,) = re.findall(r"^taskkd distill nlp .*$", PAGE, re.M)
    loaded = recipes.load_recipe("nlp", shlex.split(command)[3:])
    assert (loaded.teacher.model, loaded.student.layers) == ("path/to/teacher", [0, 2])
    assert set(re.findall(r"^taskkd distill (nlp/\S+)$", PAGE, re.M)) <= set(recipes.packaged_recipes())


def test_the_call_runs(folder: Path) -> None:
    names: dict[str, Any] = {}
    exec(compile(CALL.replace('"epochs": 3', '"max_steps": 1'), "nlp.md, the call", "exec"), names)
    assert names["result"].student.config.num_hidden_layers == 2
    assert names["result"].report["distilled"]


def test_the_loop_trains() -> None:
    student, teacher = small.bert(2, 16, seed=1), small.bert(4, 32, seed=2)
    before = [p.detach().clone() for p in student.parameters()]
    batches = [small.tokens([5, 9, 3], seed=seed) for seed in range(2)]
    exec(
        compile(LOOP, "nlp.md, the loop", "exec"),
        names := {"torch": torch, "student": student, "teacher": teacher, "loader": batches},
    )
    assert set(names["distiller"].terms) == {"logits", "hidden-0", "hidden-1"}
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
