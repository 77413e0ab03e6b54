"""Whole runs of detection recipes and of `kd.distill`, on a folder in COCO's layout."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import taskkd as kd
from taskkd import plans, recipes, reports, runs
from taskkd.detection import DetectionDataset, models, pictures, read
from taskkd.detection.task import TASK, DetectionTask
from taskkd.errors import DataError, RecipeError, TaskkdError
from tests.detection import coco_folder
from tests.detection.detectors import faster_rcnn, retinanet

BUILT = "architecture: retinanet, backbone: mobilenet_v3_small, min_size: 64, max_size: 64, head_convs: 1"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coco_folder.write(tmp_path_factory.mktemp("coco"))


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let teachers pass that have seen three batches."""
    monkeypatch.setattr(DetectionTask, "chance", lambda *_: -1.0)


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(f"""schema: 1
task: detection
data:
  coco: {{train: {data}}}
  validation_size: 3
  test_size: 3
teacher: {{{BUILT}, width: 16, finetune: {{epochs: 1, batch_size: 3}}}}
student: {{{BUILT}, width: 8}}
method: {{name: pearson_kd}}
training: {{epochs: 1, batch_size: 3, learning_rate: 1e-3}}
baseline: {{learning_rates: [1e-3], epochs: 1}}
""")
    return path


def run(recipe: Path, folder: Path, *overrides: str, **options: Any) -> runs.Result:
    return runs.run_recipe(recipes.load_recipe(recipe, overrides), folder, say=lambda _: None, **options)


@pytest.mark.usefixtures("untrained")
def test_a_recipe_from_start_to_report(
    recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    result = run(recipe, folder)
    report = json.loads((folder / "report.json").read_text())
    assert [row["model"] for row in report["table"]] == ["teacher", "student alone", "distilled"]
    assert report["data"].startswith("train 6 images")
    assert "2 classes (square, disc)" in report["data"]
    with Image.open(folder / "examples.png") as picture:
        assert picture.size[0] > 600

    student = models.load(folder / "student")
    assert models.class_names(student) == ["square", "disc"]
    image = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        own, other = student(image)[0], result.student.eval()(image)[0]
    assert torch.equal(own["boxes"], other["boxes"])
    assert not any("terms" in key or "teacher" in key for key in student.state_dict())

    # Started again, nothing is trained again.
    monkeypatch.setattr(kd.Trainer, "train", None)
    assert run(recipe, folder).report["distilled"] == result.report["distilled"]
    assert runs.evaluate(folder)["AP"] == pytest.approx(report["table"][2]["AP"])
    assert 0 <= runs.evaluate(folder, str(data))["AP50"] <= 1
    with pytest.raises(DataError, match=r"lost\.png: no such file; detectors predict on image files"):
        list(runs.predict(folder, ["lost.png"]))
    assert all(len(line) == 3 for line in runs.predict(folder, [str(data.parent / "1.png")]))
    assert reports.table(report).row_count == 3


def test_check_says_what_would_be_done(recipe: Path) -> None:
    plan = plans.check(recipes.load_recipe(recipe))
    said = dict(plan.summary)
    assert said["teacher's family"].startswith("RetinaNet, images of 64 to 64; it has neck, dense")
    (term,) = [t for t in plan.stages["distil"].terms if t.name == "pearson"]
    assert term.gradient_norm > 0
    assert term.adapter_parameters > 0
    assert next(iter(term.student.items())) == ("neck[0]", "(3, 8, 8, 8)")
    assert [*term.teacher.items()][-1] == ("neck[3]", "(3, 16, 1, 1)")
    assert "1 epochs" in said["distillation"]


def test_check_shows_what_predictions_are_compared(recipe: Path) -> None:
    plan = plans.check(recipes.load_recipe(recipe, ["method={name: bckd}"]))
    term = plan.stages["distil"].terms[1]
    assert term.student == term.teacher
    assert term.student["dense"].startswith("logits (3, 774, 3), regression (3, 774, 4)")


def test_the_student_alone_is_trained_as_long_unless_it_is_said_otherwise(recipe: Path) -> None:
    text = recipe.read_text().replace("baseline: {learning_rates: [1e-3], epochs: 1}", "")
    for baseline, rates, epochs in (("", [1e-3], 7), ("baseline: {epochs: 2}", [1e-3], 2), ("baseline: null", None, 0)):
        recipe.write_text(text + baseline)
        found = recipes.load_recipe(recipe, ["training.epochs=7"]).baseline
        assert (None if found is None else (found.learning_rates, found.epochs)) == (rates and (rates, epochs))


def test_pictures_are_of_images_with_boxes_from_the_whole_set(data: Path) -> None:
    table = DetectionDataset(read(data))  # the 6th and the 12th image have none
    for count in (4, 5, 7, 11):
        shown = pictures._spread(table, count)
        assert len(shown) == count
        assert shown == sorted(set(shown))
        assert shown[-1] >= 8
    assert all(len(table.records[i].boxes) for i in pictures._spread(table, 6))


def test_a_teacher_that_finds_nothing_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the teacher's AP on validation is 0\.000, no better than chance"):
        run(recipe, tmp_path / "run", "teacher.finetune.max_steps=1")


@pytest.mark.usefixtures("untrained")
def test_one_call(data: Path, tmp_path: Path) -> None:
    student, teacher = retinanet(), retinanet(24, seed=1)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    result = kd.distill(
        student, teacher, data, data, task="detection", output_dir=tmp_path / "run", training={"max_steps": 2}
    )
    assert result.report["models"]["student"]["parameters"] < result.report["models"]["teacher"]["parameters"]
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())
    assert [t for t in result.report["distilled"]["distilled"]["0"] if t == "test"]
    assert "pearson" in (tmp_path / "run" / "run.json").read_text()
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("untrained")
def test_one_call_with_its_defaults_takes_a_minute_at_most(tmp_path: Path) -> None:
    """Acceptance E1; processor time, so that what else the machine does does not count."""
    data = coco_folder.write(tmp_path / "coco", 20)
    student, teacher = retinanet(8), retinanet(24, seed=1)
    options: dict[str, Any] = {"task": "detection", "method": "pearson_kd", "baseline": True}
    start = time.process_time()
    result = kd.distill(student, teacher, data, output_dir=tmp_path / "run", **options)
    assert time.process_time() - start < 60
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["model"] for row in report["table"]] == ["teacher", "student alone", "distilled"]
    assert all(0 <= row["AP"] <= 1 for row in report["table"])
    logged = [h for h in result.report["distilled"]["distilled"]["0"]["history"] if "loss_pearson" in h]
    assert all(h["loss_task"] > 0 and h["loss_pearson"] > 0 for h in logged)
    assert len(logged) >= 12
    saved = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert saved.keys() == student.state_dict().keys()  # the student alone
    assert not list((tmp_path / "run").rglob("*.bin"))


def test_what_the_one_call_cannot_take(data: Path, tmp_path: Path) -> None:
    student, teacher = retinanet(), faster_rcnn(24, seed=1)
    with pytest.raises(DataError, match="data are a COCO json file, a folder as Pascal VOC has it"):
        kd.distill(student, teacher, 3, task="detection", output_dir=tmp_path / "run")
    with pytest.raises(RecipeError, match="'nowhere' is no detector's folder"):
        kd.distill("nowhere", teacher, data, task="detection", output_dir=tmp_path / "run")
    few = retinanet()
    few.head.classification_head.num_classes = 2
    with pytest.raises(RecipeError, match=r"the student tells 1 classes apart .*, the data has 2: square, disc"):
        kd.distill(few, teacher, data, data, task="detection", output_dir=tmp_path / "run")
    with pytest.raises(TaskkdError, match="the student is a Linear, of which no tensors are known"):
        kd.distill(torch.nn.Linear(2, 2), teacher, data, data, task="detection", output_dir=tmp_path / "run")


def test_a_recipe_from_three_names(data: Path) -> None:
    loaded = recipes.load_recipe(
        "detection",
        ["teacher=faster_rcnn/resnet50", "student=ssdlite", f"data={data}", "training.epochs=2"],
    )
    assert loaded.teacher.weights == "coco"
    assert loaded.teacher.finetune.epochs == 12
    assert loaded.student.architecture == "ssdlite"
    assert loaded.data.coco.train == str(data)
    assert loaded.method.name == "auto"
    assert loaded.training.epochs == 2
    with pytest.raises(
        RecipeError, match=r"detection is a task: give teacher=..., student=... and data=.* student is m"
    ):
        recipes.load_recipe("detection", ["teacher=a", "data=b"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.coco.train=lost.json"], r"lost\.json: no such file"),
        (["data.metric=mAP"], r"data\.metric: input should be 'AP'"),
        (["teacher.cache={dtype: float16}"], "a detector's maps depend on the student's random resizing"),
        (["data.augment=[Flip]"], r"augmentation 1: no transform 'Flip'"),
        (["student.widht=8"], r"unknown key 'student\.widht' \(did you mean 'width'"),
        (["data.validation_size=20"], r"data\.validation_size is 20, there are 12 images"),
    ],
)
def test_wrong_recipes_end_in_a_sentence(recipe: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(TaskkdError, match=sentence):
        TASK.load(recipes.load_recipe(recipe, overrides))
