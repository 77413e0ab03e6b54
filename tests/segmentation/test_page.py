"""The recipe, the commands and the scripts of docs/segmentation.md run, on small networks; its names are right."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from taskkd import plans, recipes, segmentation
from taskkd.__main__ import main
from taskkd.segmentation import data, models, schema
from taskkd.segmentation.config import SMP, TORCHVISION
from taskkd.segmentation.task import SegmentationTask
from tests.segmentation import trees

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "segmentation.md").read_text()
RECIPE, *SOURCES = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
CALL, LOOP, LOADER = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS = [c for block in re.findall(r"```\n(taskkd.*?)```", PAGE, re.S) for c in block.splitlines()]
TEACHER = {"architecture": "deeplabv3", "backbone": "mobilenet_v3_small", "width": 8}
STUDENT = {"architecture": "lraspp", "backbone": "mobilenet_v3_small", "width": 8}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images that the page speaks of, and a tiny teacher; any teacher will do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SegmentationTask, "chance", lambda *_: -1.0)
    trees.folder(tmp_path / "shapes", 10)
    (trees.folder(tmp_path / "others", 4) / "images").rename(tmp_path / "more")
    (tmp_path / "other.png").write_bytes((tmp_path / "more" / "000.png").read_bytes())
    return tmp_path


def lines(text: str) -> int:
    return len([line for line in text.splitlines() if line.strip()])


def short(text: str) -> str:
    """Smaller crops, fewer steps."""
    text = text.replace("[384, 384]", "[64, 64]").replace("drop_last=True", "drop_last=False")
    return text.replace('"epochs": 40, "batch_size": 8', '"max_steps": 1, "batch_size": 4')


def test_the_recipe_is_ten_lines_and_its_commands_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines(RECIPE) <= 10
    (folder / "shapes.yaml").write_text(short(RECIPE))
    small = [f"{side}.{k}={v}" for side, own in (("teacher", TEACHER), ("student", STUDENT)) for k, v in own.items()]
    small += ["teacher.weights=null", "student.weights=null", "teacher.finetune.max_steps=1", "training.max_steps=1"]
    small += ["training.batch_size=4", "teacher.finetune.batch_size=4"]
    assert [shlex.split(c)[1] for c in COMMANDS] == ["check", "distill", "evaluate", "predict"]
    said = {}
    for command in COMMANDS:
        words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [*words, *(small if words[1] in ("check", "distill") else [])])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, command
        said[words[1]] = capsys.readouterr().out
    assert "teacher: DeepLabV3" in said["check"]
    assert "logits model.classifier.4; feature model.classifier.4:in" in said["check"]
    assert {"mIoU", "pixel_accuracy", "mean_accuracy", "IoU/disc"} <= set(said["evaluate"].split())
    assert "other.mask.png" in said["predict"]
    run = folder / "runs" / "shapes"
    written = ("student/segmenter.json", "student/model.safetensors", "teacher", "report.json", "curves.png")
    assert all((run / name).exists() for name in (*written, "recipe.yaml", "examples.png"))


def test_the_recipe_of_the_recipes_page_is_right(folder: Path) -> None:
    (block,) = re.findall(r"## Segmentation\n.*?```yaml\n(.*?)```", (DOCS / "recipes.md").read_text(), re.S)
    (folder / "more.yaml").write_text(short(block))
    small = ["teacher.backbone=timm:mobilenetv3_small_050", "teacher.width=32", "training.batch_size=2"]
    plan = plans.check(recipes.load_recipe("more.yaml", small))
    assert [term.name for term in plan.stages["distil"].terms] == ["task", "pixels", "pairs", "features"]


def test_the_recipe_from_names_is_right(folder: Path) -> None:
    (command,) = re.findall(r"^taskkd distill segmentation .*$", PAGE, re.M)
    loaded = recipes.load_recipe("segmentation", shlex.split(command)[3:])
    assert (loaded.teacher.backbone, loaded.teacher.weights, loaded.student.weights) == (
        "resnet50",
        "imagenet",
        "imagenet",
    )
    assert loaded.data.folder.classes == trees.CLASSES


def test_the_call_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.save(models.build(STUDENT, trees.CLASSES), folder / "path" / "to" / "teacher")
    build = segmentation.build
    monkeypatch.setattr(segmentation, "build", lambda config, classes: build(STUDENT, classes))
    assert lines(CALL) <= 12
    names: dict[str, Any] = {}
    exec(compile(short(CALL), "segmentation.md, the call", "exec"), names)
    assert isinstance(names["result"].student.model, nn.Module)
    assert names["result"].report["distilled"]


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.ReLU(), nn.Conv2d(width, 3, 1))


def test_the_loop_and_its_batches_run(folder: Path) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"torch": torch, "student_net": net(4), "teacher_net": net(8)}
    exec(compile(short(LOADER), "segmentation.md, the batches", "exec"), names)
    before = [p.clone() for p in names["student_net"].parameters()]
    assert lines(LOOP) <= 14
    exec(compile(LOOP, "segmentation.md, the loop", "exec"), names)
    assert all(not torch.equal(a, b) for a, b in zip(before, names["student_net"].parameters(), strict=True))
    assert not any(m._forward_hooks for m in names["student"].modules())
    assert names["batch"]["images"].shape[1:] == (3, 64, 64)
    assert all(f"`{key}`" in PAGE.partition("### Batches")[2].partition("```")[0] for key in names["batch"])


def test_the_data_sections_are_right(folder: Path) -> None:
    found = [schema.Data.model_validate(entry) for block in SOURCES for entry in yaml.safe_load(block)]
    kinds = set(schema.Source.model_fields) | {"sample"}
    assert {kind for entry in found for kind in kinds if getattr(entry, kind) is not None} == kinds
    here = [entry for entry in found if entry.folder is not None and Path(entry.folder.train).is_dir()]
    assert any("unlabelled 4 images" in data.load(entry).summary() for entry in here)
    section = PAGE.partition("## Data")[2].partition("## Methods")[0]
    assert [name for name in schema.Data.model_fields if name not in section] == []


def test_the_pages_links_lead_somewhere_and_names_are_complete() -> None:
    linked = re.findall(r"\]\(([\w/.-]+\.md)\)", PAGE)
    assert linked
    text = "".join((DOCS / link).read_text() for link in linked if "methods/" in link)
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Methods")[2].partition("**Which")[0], re.M)
    assert sorted(rows) == sorted(segmentation.METHODS)
    for name in segmentation.METHODS:
        assert f"## `{name}`" in text or f"| `{name}` |" in text, name
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", PAGE, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= headings
    table = PAGE.partition("## Models")[2].partition("## Data")[0]
    assert all(f"`{name}`" in table for name in (*TORCHVISION, *SMP))


def test_every_papers_recipe_is_named() -> None:
    section = PAGE.partition("## The papers' recipes")[2].partition("## Limits")[0]
    own = [n for n in recipes.packaged_recipes() if n.startswith("segmentation/") and "nuclei" not in n]
    assert own
    assert all(f"`{n}`" in section or f"`{n.removeprefix('segmentation/cityscapes')}`" in section for n in own)
