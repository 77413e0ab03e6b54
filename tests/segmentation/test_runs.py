"""Whole runs of segmentation recipes and of `kd.distill`, on a folder of images and masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import taskkd as kd
from taskkd import plans, recipes, reports, runs
from taskkd.errors import DataError, RecipeError, TaskkdError
from taskkd.segmentation import Segmenter, models
from taskkd.segmentation.task import SegmentationTask
from tests.segmentation import trees


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trees.folder(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(f"""schema: 1
task: segmentation
data:
  folder: {{train: {data}, classes: [ground, disc, square]}}
  validation_size: 3
  test_size: 3
  augment: [{{name: RandomCrop, size: [48, 48]}}, RandomHorizontalFlip]
teacher: {{architecture: fpn, backbone: timm:mobilenetv3_small_050, width: 32, finetune: {{epochs: 1, batch_size: 3}}}}
student: {{architecture: lraspp, backbone: mobilenet_v3_small, width: 16}}
method: {{name: channel_wise}}
training: {{epochs: 1, batch_size: 3, learning_rate: 1e-3}}
baseline: {{learning_rates: [1e-3], epochs: 1}}
""")
    return path


def run(recipe: Path, folder: Path, *overrides: str, **options: Any) -> runs.Result:
    return runs.run_recipe(recipes.load_recipe(recipe, overrides), folder, say=lambda _: None, **options)


def test_a_recipe_from_start_to_report(
    recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    result = run(recipe, folder)
    report = json.loads((folder / "report.json").read_text())
    assert [row["model"] for row in report["table"]] == ["teacher", "student alone", "distilled"]
    assert report["data"].startswith("train 6 images")
    assert "3 classes (ground, disc, square)" in report["data"]
    with Image.open(folder / "examples.png") as picture:
        assert picture.size[0] > 900

    student = models.load(folder / "student")
    assert student.classes == ("ground", "disc", "square")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(student(image)["logits"], result.student.eval()(image)["logits"])
    assert not any("terms" in key or "teacher" in key for key in student.state_dict())

    # Started again, nothing is trained again.
    monkeypatch.setattr(kd.Trainer, "train", None)
    assert run(recipe, folder).report["distilled"] == result.report["distilled"]
    assert runs.evaluate(folder)["mIoU"] == pytest.approx(report["table"][2]["mIoU"])
    assert 0 <= runs.evaluate(folder, str(data))["IoU/disc"] <= 1
    with pytest.raises(DataError, match=r"lost\.png: no such file; segmentation networks predict on image files"):
        list(runs.predict(folder, ["lost.png"]))
    Image.open(data / "images" / "001.png").save(tmp_path / "one.png")
    found = list(runs.predict(folder, [str(tmp_path / "one.png")]))
    assert sum(share for _, share, _ in found if share is not None) == pytest.approx(1)
    assert {name for name, _, _ in found} <= set(trees.CLASSES)
    with Image.open(tmp_path / "one.mask.png") as mask:
        assert mask.size == (64, 64)
    assert reports.table(report).row_count == 3


def test_check_says_what_would_be_done(recipe: Path) -> None:
    plan = plans.check(recipes.load_recipe(recipe))
    said = dict(plan.summary)
    assert said["student's maps"].startswith("logits model.classifier")
    term = plan.stages["distil"].terms[1]
    assert term.gradient_norm > 0
    assert list(term.student.values()) != list(term.teacher.values())  # strides 8 and 4
    assert "1 epochs" in said["distillation"]


def test_terms_by_hand_bring_maps_to_one_size(recipe: Path) -> None:
    taps = "student: model.classifier, teacher: model.segmentation_head.0"
    given = [f"terms=[{{name: own, loss: kl_divergence, dim: 1, ignore: padding, {taps}}}]", "method=null"]
    plan = plans.check(recipes.load_recipe(recipe, given))
    assert plan.stages["distil"].terms[1].value > 0


def test_unlabelled_images_are_distilled_on(recipe: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(recipe, folder, f"data.unlabelled={data / 'images'}", "baseline=null", "data.unlabelled_per_sample=2")
    assert "unlabelled 6 images" in result.report["data"]  # without those that are validated and tested on
    assert 0 <= result.report["distilled"]["distilled"]["0"]["test"]["mIoU"] <= 1


def test_one_image_that_is_left_over_can_be_trained_on(recipe: Path, tmp_path: Path) -> None:
    """DeepLabV3 normalises one pixel for each image: not in a batch of one."""
    student = "student={architecture: deeplabv3, backbone: mobilenet_v3_small, width: 8}"
    small = ("teacher.finetune.max_steps=1", "training.batch_size=5", "baseline=null")  # of 6 images
    result = run(recipe, tmp_path / "run", student, *small)
    assert len(result.report["distilled"]["distilled"]["0"]["history"]) >= 1


def test_networks_of_other_classes_are_refused(recipe: Path, tmp_path: Path) -> None:
    other = models.build({"architecture": "lraspp", "backbone": "mobilenet_v3_small", "width": 8}, ["sea", "land"])
    models.save(other, tmp_path / "other")
    with pytest.raises(RecipeError, match="is for 2 classes"):
        run(recipe, tmp_path / "run", f"teacher={{model: {tmp_path / 'other'}}}")


def test_wrong_recipes_are_refused_with_a_sentence(recipe: Path) -> None:
    for override, sentence in (
        ("data.augment=[RandomCropp]", "no transform 'RandomCropp' .did you mean 'RandomCrop'"),
        ("method.nam=x", "nam"),
        ("teacher.cache={}", "follow the random augmentation"),
        ("student.architecture=lrasp", "lraspp"),
        ("loss.class_weights=[1, 2]", "loss.class_weights: 2 weights for 3 classes"),
    ):
        with pytest.raises(TaskkdError, match=sentence):
            plans.check(recipes.load_recipe(recipe, [override]))


def small(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU(), nn.Conv2d(channels, channels, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(channels, 3, 1),
    )  # fmt: skip


def test_distil_in_one_call(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegmentationTask, "chance", lambda *_: -1.0)
    torch.manual_seed(0)
    student, teacher = small(4), Segmenter(small(8), trees.CLASSES)
    before = [p.clone() for p in student.parameters()]
    options: dict[str, Any] = {"task": "segmentation", "training": {"epochs": 1, "batch_size": 4}}
    result = kd.distill(student, teacher, data, output_dir=tmp_path / "run", **options)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert result.report["data"].startswith("train 10 images; validation 1 images; test 1 images")
    assert result.report["alone"] == {}
    again = kd.distill(student, teacher, data, output_dir=tmp_path / "run", **options)
    assert again.report["distilled"] == result.report["distilled"]
    with pytest.raises(RecipeError, match="has 2 classes, the data has 3"):
        kd.distill(Segmenter(small(4), 2), teacher, data, output_dir=tmp_path / "other", **options)
    with pytest.raises(DataError, match="got a list"):
        kd.distill(student, teacher, [1, 2], output_dir=tmp_path / "other", **options)


def test_one_command_with_names_and_a_folder(data: Path, tmp_path: Path) -> None:
    saved = models.build({"architecture": "lraspp", "backbone": "mobilenet_v3_small", "width": 8}, trees.CLASSES)
    models.save(saved, tmp_path / "teacher")
    recipe = recipes.load_recipe(
        "segmentation", [f"teacher={tmp_path / 'teacher'}", f"student={tmp_path / 'teacher'}", f"data={data}"]
    )
    assert recipe.data.folder.classes == trees.CLASSES
    with pytest.raises(RecipeError, match=r"'deplabv3' is no folder, and no architecture .did you mean 'deeplabv3'"):
        recipes.load_recipe("segmentation", ["teacher=deplabv3", "student=lraspp", f"data={data}"])
    assert recipe.method.name == "dist"
    with pytest.raises(RecipeError, match=r"no classes\.txt"):
        recipes.load_recipe("segmentation", ["teacher=fcn", "student=lraspp", f"data={tmp_path}"])
    built = recipes.load_recipe("segmentation", ["teacher=deeplabv3/resnet101", "student=lraspp", "data=nuclei"])
    assert (built.teacher.backbone, built.teacher.finetune is not None) == ("resnet101", True)
