"""A teacher of other classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import taskkd as kd
from taskkd import plans, recipes
from taskkd.detection import DetectorTeacher, build, models, save
from taskkd.detection.families import family_of
from taskkd.detection.mapped import mapped
from taskkd.detection.methods import METHODS
from taskkd.detection.task import TASK, DetectionTask
from taskkd.errors import RecipeError
from tests.detection import coco_folder, detectors, tiny_detr
from tests.detection.detectors import batch

NAMES = ["cat", "cart", "dog", "car", "sky"]
OWN = ["vehicle", "cat"]
MAP = {"cat": "cat", "car": "vehicle", "cart": "vehicle"}
BUILT: dict[str, Any] = {"backbone": "mobilenet_v3_small", "width": 8, "min_size": 64, "max_size": 96}


def built(architecture: str, classes: list[str], seed: int = 0) -> Any:
    """A tiny detector whose predictions are far from all alike."""
    if architecture in tiny_detr.NAMES:
        model = tiny_detr.detector(architecture, seed=seed, labels=len(classes))
        model.config.id2label = dict(enumerate(classes))
        return model
    more: dict[str, Any] = {"representation_size": 16, "proposals": 60} if "rcnn" in architecture else {"head_convs": 4}
    if architecture == "ssdlite":
        more = {"backbone": "mobilenet_v3_large"}
    return build({"architecture": architecture, **BUILT, **more}, classes, seed=seed)


def spread(model: nn.Module, by: float = 0.2) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("cls_logits", "cls_score", "class", "module_list", "bbox_pred")):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * by)
    return model


class Kept(kd.Distiller):
    """A distiller that keeps its last run."""

    def _run(self, *args: Any, **options: Any) -> Any:
        self.run = super()._run(*args, **options)
        return self.run


def views(teacher: nn.Module, student: nn.Module, method: str) -> tuple[Any, dict[str, Any]]:
    """The teacher's views of one run, and the losses."""
    terms = METHODS[method](student, teacher).stages[0].terms
    distiller = Kept(student, DetectorTeacher(teacher, student), terms)
    distiller.prepare(batch())
    torch.manual_seed(0)
    losses = distiller(**batch())
    distiller.close()
    return next(t for t in terms if hasattr(t, "teacher_views")).teacher_views(distiller.run), losses


# of each family: view, method, whether classes exclude each other, and where the channels of classes begin and end
FAMILIES = [
    ("faster_rcnn", "rois", "chen", True, 1, None),
    ("retinanet", "dense", "bckd", False, 1, None),
    ("fcos", "dense", "yolo_response", False, 1, None),
    ("ssdlite", "dense", "gid", True, 1, None),
    ("detr", "decoder", "detr_distill", True, 0, -1),
    ("rt_detr", "dense", "bckd", False, 0, None),
]


@pytest.mark.parametrize(("name", "view", "method", "exclusive", "first", "last"), FAMILIES)
def test_probabilities_are_merged(
    name: str, view: str, method: str, exclusive: bool, first: int, last: int | None
) -> None:
    teacher = spread(built(name, NAMES)).eval()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    merged = mapped(teacher, MAP, OWN)
    assert models.class_names(merged) == OWN
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    found = {}
    for key, model, classes in (("whole", teacher, NAMES), ("merged", merged, OWN)):
        student = spread(built(name, classes, seed=1))
        torch.manual_seed(0)
        found[key], losses = views(model, student.train(), method)
        assert torch.isfinite(losses["loss"])
        found[key] = found[key].get(view).logits.detach()
    if view != "rois":  # whose samples are drawn by the student
        whole, merged_logits = found["whole"], found["merged"]
    else:
        x = torch.randn(9, 16)
        whole, _ = teacher.roi_heads.box_predictor(x)
        merged_logits, _ = merged.roi_heads.box_predictor(x)
    if exclusive:
        p, q = whole.softmax(-1), merged_logits.softmax(-1)
        none, nothing = (0, 0) if first else (-1, -1)
        classes = p[..., first:last]
        torch.testing.assert_close(q[..., first:last][..., 0], classes[..., 1] + classes[..., 3])
        torch.testing.assert_close(q[..., first:last][..., 1], classes[..., 0])
        torch.testing.assert_close(q[..., none], p[..., nothing] + classes[..., 2] + classes[..., 4])
    else:
        p, q = whole[..., first:].sigmoid(), merged_logits[..., first:].sigmoid()
        torch.testing.assert_close(q[..., 0], 1 - (1 - p[..., 1]) * (1 - p[..., 3]))
        torch.testing.assert_close(q[..., 1], p[..., 0])


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn", "retinanet", "ssdlite", "deformable_detr", "d_fine"])
def test_the_same_classes_in_another_order_are_detected_in_that_order(name: str) -> None:
    teacher = spread(built(name, NAMES), 0.05).eval()
    order, images, some = NAMES[::-1], batch()["images"], slice(20)  # the last are ties, and cut at a number of them
    with torch.no_grad():
        for want, got in zip(teacher(images), mapped(teacher, {c: c for c in NAMES}, order)(images), strict=True):
            assert len(got["scores"]) >= 9
            torch.testing.assert_close(got["scores"][some], want["scores"][some])
            assert [order[i - 1] for i in got["labels"][some]] == [NAMES[i - 1] for i in want["labels"][some]]
            torch.testing.assert_close(got["boxes"][some], want["boxes"][some])


def test_a_merged_box_is_that_of_the_surest_class() -> None:
    teacher = spread(built("faster_rcnn", NAMES)).eval()
    merged, x = mapped(teacher, MAP, OWN), torch.randn(50, 16)
    (logits, deltas), (_, got) = teacher.roi_heads.box_predictor(x), merged.roi_heads.box_predictor(x)
    each, got = deltas.unflatten(1, (-1, 4)), got.unflatten(1, (-1, 4))
    surer = logits[:, 4] > logits[:, 2]
    assert 0 < surer.float().mean() < 1
    assert torch.equal(got[:, 0], each[:, 0])
    assert torch.equal(got[:, 1], torch.where(surer[:, None], each[:, 4], each[:, 2]))
    assert torch.equal(got[:, 2], each[:, 1])


def test_logits_of_any_size_are_finite_with_a_gradient() -> None:
    from taskkd.detection.mapped import _Groups

    x = torch.tensor([[-300.0, -200], [-90, -20], [300, 200], [3e4, -3e4]], requires_grad=True)
    for activation in ("sigmoid", "softmax"):
        found = _Groups([[0, 1]], activation)(x)  # type: ignore[arg-type]
        assert found.isfinite().all()
        (slope,) = torch.autograd.grad(found.sum(), x)
        assert slope.isfinite().all()
    assert _Groups([[0, 1]], "sigmoid")(x)[1].item() == pytest.approx(-20)


@pytest.mark.parametrize(("name", "method"), [
    ("retinanet", "crosskd"), ("retinanet", "chen"), ("retinanet", "channel_wise"), ("retinanet", "gid"),
    ("retinanet", "pearson_kd"), ("faster_rcnn", "gdetkd"), ("faster_rcnn", "defeat"), ("faster_rcnn", "gid"),
    ("deformable_detr", "kd_detr"), ("conditional_detr", "detr_distill"), ("d_fine", "localization"),
])  # fmt: skip
def test_it_teaches_as_any_other(name: str, method: str) -> None:
    teacher, student = mapped(built(name, NAMES), MAP, OWN), built(name, OWN, seed=1).train()
    _, losses = views(teacher, student, method)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert all(p.grad is None for p in teacher.parameters())
    assert family_of(copy.deepcopy(teacher)).name == family_of(teacher).name


def test_classes_without_names_are_called_by_their_labels() -> None:
    teacher = detectors.retinanet()
    found = mapped(teacher, {2: "disc", 1: "square"}, ["disc", "square"])
    assert models.class_names(found) == ["disc", "square"]
    with pytest.raises(RecipeError, match="the teacher has no class '3'; it has 1, 2"):
        mapped(teacher, {3: "disc"}, ["disc"])


def test_what_is_no_detector_says_so() -> None:
    with pytest.raises(RecipeError, match="the classes of the teacher, a Linear, are not known"):
        mapped(nn.Linear(2, 2), {"a": "b"}, ["b"])


# ---- recipes and the one call


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coco_folder.write(tmp_path_factory.mktemp("coco"))  # squares and discs


def test_a_recipe_names_it(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(built("retinanet", ["ball", "box", "sky", "plate"]), tmp_path / "teacher")
    path = tmp_path / "my.yaml"
    path.write_text(f"""schema: 1
task: detection
data: {{coco: {{train: {data}}}, validation_size: 3, test_size: 3}}
teacher: {{model: {tmp_path / "teacher"}, label_map: {{ball: disc, plate: disc, box: square}}}}
student: {{architecture: retinanet, backbone: mobilenet_v3_small, width: 8, min_size: 64, head_convs: 1}}
method: {{name: bckd}}
""")
    recipe = recipes.load_recipe(path)
    loaded = TASK.load(recipe)
    assert models.class_names(TASK.teacher(recipe, loaded)) == loaded.classes == ["square", "disc"]
    assert any("binary-classification" in line for line in str(plans.check(recipe)).splitlines())
    for change, sentence in (
        ("teacher.label_map={ball: disc, boxx: square}", "the teacher has no class 'boxx' .did you mean 'box'"),
        ("teacher.label_map={ball: disc, box: squar}", "the student has no class 'squar'"),
        ("teacher.label_map={ball: disc}", "no class of the teacher is mapped to the student's 'square'"),
        ("teacher.finetune={}", "not fine-tuned"),
        ("teacher.label_map=null", "a teacher of other classes takes a `label_map`"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            plans.check(recipes.load_recipe(path, [change]))


def test_cocos_own_classes_are_those_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkd.detection import architectures

    state = built("ssdlite", [str(i) for i in range(90)]).state_dict()
    monkeypatch.setattr(architectures.Builder, "coco", lambda self: state)
    found = models.existing(models.DetectorConfig(architecture="ssdlite", weights="coco"))
    names = models.class_names(found)
    assert (names[0], names[17], names[89], len(names)) == ("person", "dog", "toothbrush", 90)
    last = "head.classification_head.module_list.0.1.weight"
    assert torch.equal(found.state_dict()[last], state[last])


def test_the_one_call_takes_it(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DetectionTask, "chance", lambda *_: -1.0)
    student, teacher = built("retinanet", ["square", "disc"]), built("retinanet", ["ball", "box", "sky"], seed=1)
    options: dict[str, Any] = {"task": "detection", "output_dir": tmp_path / "run", "training": {"max_steps": 1}}
    result = kd.distill(
        student, teacher, data, data, method="bckd", label_map={"ball": "disc", "box": "square"}, **options
    )
    assert "loss_binary-classification" in str(result.report)
    assert "label_map" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert models.class_names(teacher) == ["ball", "box", "sky"]
    for wrong, sentence in (
        ({"label_map": {"ball": "disc"}}, "no class of the teacher is mapped to the student's 'square'"),
        ({"metric": "AP5"}, "distill: metric: Input should be 'AP'.*got 'AP5'"),
        ({"bad": "skipp"}, "distill: bad: Input should be 'error'.*got 'skipp'"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            kd.distill(student, teacher, data, data, **wrong, **options)
