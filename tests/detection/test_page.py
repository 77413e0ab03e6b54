"""The recipe, the commands and the scripts of docs/detection.md run, on small models; its links and names are right."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from taskkd import detection, recipes
from taskkd.__main__ import main
from taskkd.detection import models
from taskkd.detection.schema import Data, Teacher
from taskkd.detection.task import DetectionTask
from tests.detection import coco_folder

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "detection.md").read_text()
RECIPE, MAPPED = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS = [c for block in re.findall(r"```\n(taskkd.*?)```", PAGE, re.S) for c in block.splitlines()]
SMALL = {
    "architecture": "faster_rcnn", "width": 16, "min_size": 64, "max_size": 64, "representation_size": 32,
    "rois_per_image": 16, "proposals": 50, "backbone": "mobilenet_v3_small",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images that the page speaks of, and a tiny teacher; any teacher will do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DetectionTask, "chance", lambda *_: -1.0)
    coco_folder.write(tmp_path / "shop")
    models.save(models.build(SMALL, ["square", "disc"]), tmp_path / "path" / "to" / "teacher")
    return tmp_path


def test_the_recipe_is_ten_lines_and_its_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len([line for line in RECIPE.splitlines() if line.strip()]) <= 10
    (folder / "shop.yaml").write_text(RECIPE)
    small = [f"{side}.{k}={v}" for side in ("teacher", "student") for k, v in SMALL.items()]
    small += ["teacher.weights=null", "student.weights=null", "teacher.finetune.max_steps=2", "training.max_steps=2"]
    small += ["training.batch_size=4", "baseline.learning_rates=[1e-4]"]
    assert [shlex.split(c)[1] for c in COMMANDS] == ["check", "distill", "evaluate", "predict"]
    for command in COMMANDS:
        words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [*words, *(small if words[1] in ("check", "distill") else [])])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, command
    assert {p.name for p in (folder / "runs" / "shop").iterdir()} > {
        "student",
        "report.json",
        "curves.png",
        "examples.png",
    }


def test_the_recipe_from_names_is_right() -> None:
    (command,) = re.findall(r"^taskkd distill detection .*$", PAGE, re.M)
    loaded = recipes.load_recipe("detection", shlex.split(command)[3:])
    assert (loaded.student.backbone, loaded.student.weights) == ("mobilenet_v3_large", "coco")


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_the_scripts_run(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build = detection.build
    monkeypatch.setattr(detection, "build", lambda config, names: build({**SMALL}, names))
    code = SCRIPTS[number].replace('"epochs": 12, "batch_size": 8', '"max_steps": 2, "batch_size": 2')
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    names: dict[str, Any] = {}
    exec(compile(code, f"detection.md, script {number}", "exec"), names)
    if "loss" in names:
        assert names["loss"].isfinite()
        assert any(p.grad is not None for p in names["student"].parameters())
        assert not any(m._forward_hooks for m in names["student"].modules())
    else:
        assert isinstance(names["result"].student.state_dict()["rpn.head.cls_logits.weight"], torch.Tensor)


def test_the_sections_of_a_teacher_of_other_classes_are_right() -> None:
    sections = yaml.safe_load(MAPPED)
    assert Data(**sections["data"]).coco is not None
    assert Teacher(**sections["teacher"]).label_map["bus"] == "vehicle"  # type: ignore[index]


def test_the_pages_links_lead_somewhere_and_every_method_is_described() -> None:
    linked = re.findall(r"\]\(([\w/.-]+\.md)\)", PAGE)
    assert linked
    text = PAGE
    for link in linked:
        text += (DOCS / link).read_text()
    for name in detection.METHODS:
        assert f"`{name}`" in text, name
