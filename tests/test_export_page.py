"""The commands and the Python of docs/export.md run; `taskkd inspect` shows what terms may name."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from taskkd import inspection, plans, taps
from taskkd.__main__ import main
from taskkd.errors import RecipeError
from tests import exported, small, tiny
from tests.test_held_exports import segmentation

PAGE = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
COMMANDS = re.findall(r"^taskkd (?:export|inspect) .*$", PAGE, re.M)
PYTHON, HELD = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    exported.nlp(tmp_path).rename(tmp_path / "my")
    (tmp_path / "runs").mkdir()
    (tmp_path / "my").rename(tmp_path / "runs" / "my")
    (tmp_path / "my.yaml").write_text((tmp_path / "runs" / "my" / "recipe.yaml").read_text())
    tiny.classifier(2).save_pretrained(tmp_path / "path" / "to" / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "path" / "to" / "teacher")
    return tmp_path


def test_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) == 7
    # the exporters are slow: test_exports.py has the graphs
    monkeypatch.setattr("taskkd.exports.write_onnx", lambda *_: (True, {"input_ids": {0: "batch"}}))
    said = {}
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, command
        said[command] = capsys.readouterr().out
    hub, graph, _, both, deep, run, model = said.values()
    assert "logits               largest difference 0 (largest value" in hub
    assert (folder / "my-student" / "tokenizer.json").is_file()
    assert "free: batch" in graph
    assert (folder / "runs" / "my" / "export" / "onnx").is_dir()
    assert "teacher: BertForSequenceClassification" in both
    assert "student: BertForSequenceClassification" in both
    assert both.count("bert.encoder.layer.1 ") == 1  # the student has one layer
    assert "bert.encoder.layer.0.attention.self" not in both
    assert "bert.encoder.layer.0.attention " in deep
    assert "student of runs/my" in run
    assert "path/to/teacher: BertForSequenceClassification" in model
    space: dict[str, Any] = {}
    exec(PYTHON, space)
    assert space["exported"].folder == Path("graph")
    shutil.rmtree("graph")
    result = segmentation(folder / "held")
    monkeypatch.setattr("taskkd.distill", lambda *_, **__: result, raising=False)
    images = torch.rand(1, 3, 32, 32)
    exec(HELD, {**space, "my_student": result.student, "my_teacher": result.student, "images": images})
    assert "on 1 given example" in (Path("graph") / "README.md").read_text()


def test_every_tap_that_is_listed_is_one() -> None:
    model = small.ConvNet().eval()
    batch = small.conv_batch(2)
    listed = inspection.seen(model, {"image": batch["image"]})
    assert [s.name for s in listed[:3]] == ["stem", "norm", "relu"]
    kept = [s for s in listed if s.name not in ("norm", "block.norm")]  # overwritten by what follows in place
    watch = taps.Taps(model, [s.name for s in kept])
    with watch.record():
        output = model(batch["image"])
    found = watch.read(output, batch)
    watch.close()
    for one in kept[:-1]:
        assert one.output == str(tuple(found[one.name].shape))
    assert listed[-1].output == ".logits (2, 3)"


def test_several_tensors_and_calls_are_shown_as_they_are_tapped() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.two = torch.nn.Linear(2, 2), Two()

        def forward(self, x: torch.Tensor) -> Any:
            return self.two(self.shared(self.shared(x)))

    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"a": x, "b": [x, x[:1]]}

    model = Twice().train()
    shared, two, out = inspection.seen(model, {"x": torch.zeros(3, 2)})
    assert shared.output == "(3, 2); @1 of 2 calls"
    assert two.output == "[a] (3, 2); [b] [0] (3, 2); [1] (1, 2)"
    assert out.output.startswith(".a (3, 2)")
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("task", "name", "tap"),
    [
        ("detection", "ssdlite/mobilenet_v3_small", "backbone."),
        ("segmentation", "lraspp/mobilenet_v3_small", "model.backbone"),
        ("face", "mobilefacenet", "backbone.layers"),
    ],
)
def test_a_model_by_name(task: str, name: str, tap: str) -> None:
    ((title, found),) = plans.taps_of(name, task=task).items()
    assert title.startswith(name)
    assert any(s.name.startswith(tap) for s in found)


def test_what_is_no_model_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"is no recipe and no finished run.*--task detection\|face\|nlp\|segmentation"
    ):
        plans.taps_of("resnet50")
    with pytest.raises(RecipeError, match=r"task 'nlpp' is not known \(did you mean 'nlp'"):
        plans.taps_of("bert", task="nlpp")
