"""What `kd.distill` and `taskkd evaluate` read of a path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import taskkd as kd
from taskkd.errors import RecipeError
from taskkd.segmentation import PixelCrossEntropy, SegmentationDataset, SegmentationMetric, Segmenter, collate
from taskkd.segmentation.given import GivenSegmentation
from taskkd.segmentation.task import TASK, read_path
from tests.engine import arguments
from tests.segmentation import trees


def names(annotations: object) -> set[str]:
    return {r.source.name for r in annotations.records}  # type: ignore[attr-defined]


def test_a_folder_with_parts_is_trained_on_by_the_one_and_tested_on_by_the_other(tmp_path: Path) -> None:
    trees.folder(tmp_path / "train", 4, names=False)
    trees.folder(tmp_path / "val", 2, names=False)
    (tmp_path / "classes.txt").write_text("\n".join(trees.CLASSES))
    trained, tested = read_path(str(tmp_path)), read_path(str(tmp_path), part="test")
    assert (len(trained), len(tested)) == (4, 2)
    assert all("/val/" in name for name in names(tested))
    assert len(read_path("nuclei")) > len(read_path("nuclei", part="test")) == 1


def net(*classes: str) -> Segmenter:
    return Segmenter(nn.Conv2d(3, len(classes) or 2, 1), classes or 2)


def test_classes_that_are_given_go_before_those_of_the_folder_and_are_kept(tmp_path: Path) -> None:
    root = trees.folder(tmp_path, 4)
    meaning = {0: "ground", 1: "thing", 2: "thing"}
    task = GivenSegmentation(net(), net(), root, classes=meaning, unlabelled=root / "images")
    described = task.describe()
    assert described["data"]["folder"]["classes"] == {"0": "ground", "1": "thing", "2": "thing"}
    # Other images are read in the same way, where they do not say it themselves, and the student has the names.
    (root / "classes.txt").unlink()
    (root / "masks").rename(root / "labels")
    described["data"]["folder"]["masks"] = "labels"
    recipe = TASK.recipe.model_validate({"schema": 1, "name": "x", **described})
    data = task.load(recipe)
    student = task.student(recipe, data, net(), 0)
    assert TASK.read(recipe, str(root), student, None).classes == data.classes == ["ground", "thing"]


def test_what_does_not_go_with_the_data_is_refused_with_a_sentence(tmp_path: Path) -> None:
    root, classes = trees.folder(tmp_path, 4), {0: "ground", 1: "thing", 2: "thing"}
    with pytest.raises(RecipeError, match="same, in the same order"):
        GivenSegmentation(net(), net("thing", "ground"), root, classes=classes)
    with pytest.raises(RecipeError, match=r"metric: .*got 'IoU'"):
        GivenSegmentation(net(), net(), root, classes=classes, metric="IoU")  # type: ignore[arg-type]


def test_images_of_several_sizes_are_evaluated_in_one_batch(tmp_path: Path) -> None:
    root = trees.folder(tmp_path, 4)
    for number, side in enumerate((48, 64)):
        for part, array in zip(("images", "masks"), trees.scene(number, side), strict=True):
            Image.fromarray(array).save(root / part / f"{number:03}.png")
    model, table = net(*"abc"), SegmentationDataset(read_path(str(root)))
    trainer = kd.Trainer(
        model,
        task_loss=PixelCrossEntropy(),
        metric=SegmentationMetric(trees.CLASSES),
        args=arguments(tmp_path / "out", per_device_eval_batch_size=4),
        data_collator=collate,
    )
    assert trainer.evaluate(table)["eval_loss"] > 0


def test_a_student_that_pads_what_it_is_trained_on_is_noticed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    student = Segmenter(nn.Conv2d(3, 2, 1), 2, divisor=32)
    for side in (64, 48):
        assert not caplog.text
        TASK.check_terms(None, [kd.Match("x", kd.losses.mse, "out")], student, {"images": torch.zeros(1, 3, side, 64)})  # type: ignore[arg-type]
    assert "64x48 to multiples of 32" in caplog.text
