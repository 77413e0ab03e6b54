"""Exports of a student that is a module of the caller's own, which no folder can build."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import taskkd as kd
from taskkd import portable, runs
from taskkd.errors import DataError, RecipeError, TaskkdError
from taskkd.face import FaceModel
from tests import exported, tiny
from tests.detection import coco_folder, detectors
from tests.face import people
from tests.segmentation import trees


class Own(nn.Module):
    """Somebody's network of two layers: a map, or its mean."""

    def __init__(self, outputs: int, *, pooled: bool) -> None:
        super().__init__()
        self.body, self.head, self.pooled = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, outputs, 1), pooled

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(images).relu())
        return found.mean((2, 3)) if self.pooled else found


class OwnBert(BertForSequenceClassification):
    """Somebody's class, which the library does not know."""

    def forward(self, *args: Any, **options: Any) -> Any:
        found = super().forward(*args, **options)
        found.logits = 2 * found.logits
        return found


def own_detector() -> nn.Module:
    """One that finds something."""
    model = detectors.fcos()
    nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    return model


def map_network() -> nn.Module:
    return Own(len(trees.CLASSES), pooled=False)


def segmentation(root: Path) -> runs.Result:
    path = trees.folder(root / "shapes", 12)
    return exported.held(
        root / "run", "segmentation", "dist", map_network(), map_network(), path, classes=trees.CLASSES
    )


def face(root: Path) -> runs.Result:
    people.folder(root / "train", 4, 4)
    people.folder(root / "test", 6, 5, first=30)
    pair = [FaceModel(Own(8, pooled=True), size=16, channels="bgr") for _ in range(2)]
    return exported.held(root / "run", "face", "embedding_mimic", *pair, root / "train", root / "test", far=[0.1])


def detection(root: Path) -> runs.Result:
    path = coco_folder.write(root / "coco")
    return exported.held(root / "run", "detection", "mimic", own_detector(), detectors.fcos(24), str(path))


def nlp(root: Path) -> runs.Result:
    rows = [{"text": text, "label": label} for text, label in tiny.sentences(40)]
    student = OwnBert(tiny.classifier(1).config)
    return exported.held(
        root / "run", "nlp", "soft_targets", student, tiny.classifier(2), rows, processing_class=tiny.tokenizer()
    )


RUNS: dict[str, Callable[[Path], runs.Result]] = {
    "nlp": nlp, "detection": detection, "segmentation": segmentation, "face": face,
}  # fmt: skip
#: what the lines of the card want of the user
NAMES: dict[str, dict[str, Callable[[], Any]]] = {
    "nlp": {"OwnBert": lambda: OwnBert},
    "detection": {"model": lambda: detectors.fcos(seed=5)},
    "segmentation": {"network": map_network},
    "face": {"backbone": lambda: Own(8, pooled=True)},
}


@pytest.mark.parametrize("task", RUNS)
def test_the_weights_of_a_network_of_ones_own(task: str, tmp_path: Path) -> None:
    result = RUNS[task](tmp_path)
    before = {key: value.clone() for key, value in result.student.state_dict().items()}
    done = kd.export(result, "safetensors", tmp_path / "out")
    assert done.difference == 0
    assert done.inputs == "3 synthetic inputs, since the run's test set could not be read"
    assert all(torch.equal(value, before[key]) for key, value in result.student.state_dict().items())
    (code,) = re.findall(r"```python\n(.*?)```", (done.folder / "README.md").read_text(), re.S)
    space = {name: make() for name, make in NAMES[task].items()}
    exec(code.replace('folder = "."', f"folder = {str(done.folder)!r}"), space)
    own = runs.recipe_of(result.output_dir)[1].portable(None, result.student.eval(), tiny.tokenizer())
    for sample in own.synthetic():
        inputs = own.signature.arrange(sample)
        live, other = (portable.outputs_of(model, own.signature, inputs) for model in (result.student, space["model"]))
        assert set(own.signature.compare(live, other)) == {0}


@pytest.mark.parametrize("task", RUNS)
def test_what_cannot_be_had_says_what_can(task: str, tmp_path: Path) -> None:
    result = RUNS[task](tmp_path)
    with pytest.raises(
        TaskkdError, match=r"format hf: .*export (it|the model) as onnx, or as safetensors to load into"
    ):
        kd.export(result, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if task != "nlp":  # whose folder loads as a class of the library's
        with pytest.raises(DataError, match=r"was not built by .*kd.export\(run, ..., student=...\)"):
            kd.export(result.output_dir, "onnx", tmp_path / "out")


@pytest.mark.parametrize(
    "task", ["segmentation", *(pytest.param(t, marks=pytest.mark.slow) for t in ("nlp", "detection", "face"))]
)
def test_a_network_of_ones_own_as_a_graph(task: str, tmp_path: Path) -> None:
    result = RUNS[task](tmp_path)
    examples = None
    if task == "segmentation":
        examples = {"images": torch.rand(2, 3, 40, 56)}
    done = kd.export(result.output_dir, "onnx", tmp_path / "out", student=result.student, example=examples)
    assert done.difference < 1e-4
    if examples is not None:
        assert done.inputs == "1 given example, and the graph on 4 synthetic of other sizes"
        assert done.exporter.endswith("free: batch, height, width")
        for shape in ((1, 3, 64, 64), (2, 3, 50, 71)):
            images = torch.rand(shape)
            logits = nn.functional.interpolate(result.student(images)["logits"], size=shape[2:], mode="bilinear")
            (found,) = portable.run_onnx(done.folder / "model.onnx", {"images": images})
            torch.testing.assert_close(found, logits.detach(), atol=1e-5, rtol=1e-4)


def test_wrong_use_of_what_is_held(tmp_path: Path) -> None:
    result = segmentation(tmp_path)
    with pytest.raises(RecipeError, match=r"a Own is no segmenter: wrap it, `taskkd.segmentation.wrap\(network\)`"):
        kd.export(result, student=map_network())
    for example in ([], [torch.rand(1, 3, 8, 8)]):
        with pytest.raises(DataError, match="`example` is a batch, or several: the student's keyword arguments"):
            kd.export(result, example=example)
