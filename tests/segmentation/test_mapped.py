"""A teacher of other classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import taskkd as kd
from taskkd import plans, recipes
from taskkd.errors import RecipeError
from taskkd.segmentation import build, channel_wise, save
from taskkd.segmentation.mapped import mapped
from taskkd.segmentation.task import TASK
from tests.segmentation import trees

SMALL = {"architecture": "lraspp", "backbone": "mobilenet_v3_small", "width": 8}
MAP = {"grass": "ground", "soil": "ground", "ball": "disc", "box": "square"}


def test_probabilities_of_classes_are_summed_and_the_rest_is_left_out() -> None:
    teacher = build(SMALL, ["grass", "ball", "sky", "box", "soil"]).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        whole, found = teacher(images)["logits"].softmax(1), mapped(teacher, MAP, trees.CLASSES)(images)["logits"]
    summed = torch.stack([whole[:, 0] + whole[:, 4], whole[:, 1], whole[:, 3]], 1)
    assert found.softmax(1).allclose(summed / summed.sum(1, keepdim=True), atol=1e-6)


def test_classes_in_another_order_are_put_in_order() -> None:
    teacher = build(SMALL, ["disc", "ground", "square"]).eval()
    found, images = mapped(teacher, {c: c for c in trees.CLASSES}, trees.CLASSES), torch.rand(1, 3, 64, 64)
    assert found.views.logits == "out.logits"
    assert found.views.stages == tuple(f"model.network.{stage}" for stage in teacher.views.stages)
    with torch.no_grad():
        torch.testing.assert_close(found(images)["logits"], teacher(images)["logits"][:, [1, 0, 2]])


def test_it_teaches_as_any_other() -> None:
    teacher = mapped(build(SMALL, ["grass", "ball", "sky", "box", "soil"]), MAP, trees.CLASSES)
    student = build(SMALL, trees.CLASSES, seed=1)
    assert teacher.views.logits == "out.logits"
    assert teacher.views.feature is not None
    for on in ("logits", "feature"):
        terms = channel_wise(student, teacher, on=on).stages[0].terms  # type: ignore[arg-type]
        distiller = kd.Distiller(student, kd.Frozen(teacher), terms, task_weight=0.0)
        batch = {"images": torch.rand(2, 3, 64, 64)}
        distiller.prepare(batch)
        assert distiller(**batch)["channels"] > 0
        distiller.close()


def test_a_recipe_names_it(tmp_path: Path) -> None:
    data = trees.folder(tmp_path / "data")
    save(build(SMALL, ["grass", "ball", "sky", "box", "soil"]), tmp_path / "teacher")
    path = tmp_path / "my.yaml"
    path.write_text(f"""schema: 1
task: segmentation
data:
  folder: {{train: {data}, classes: [ground, disc, square]}}
  augment: []
teacher: {{model: {tmp_path / "teacher"}, label_map: {{grass: ground, ball: disc, box: square}}}}
student: {{architecture: lraspp, backbone: mobilenet_v3_small, width: 8}}
method: {{name: soft_targets}}
""")
    recipe = recipes.load_recipe(path)
    assert TASK.teacher(recipe, TASK.load(recipe)).classes == tuple(trees.CLASSES)
    for change, sentence in (
        (
            "teacher.label_map={grass: ground, ball: disc, boxx: square}",
            "the teacher has no class 'boxx' .did you mean",
        ),
        ("teacher.label_map={grass: ground, ball: disc, box: squar}", "the student has no class 'squar'"),
        ("teacher.label_map={grass: ground, ball: disc}", "mapped to the student's 'square'"),
        ("teacher.finetune={}", "not fine-tuned"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            plans.check(recipes.load_recipe(path, [change]))
