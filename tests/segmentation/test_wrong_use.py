"""What users get wrong, through `taskkd check`: each is a sentence, with the file where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from taskkd import plans, recipes
from taskkd.errors import DataError, RecipeError, TaskkdError
from taskkd.segmentation import models
from tests.segmentation import trees

RECIPE = """schema: 1
task: segmentation
data:
  folder: {train: shapes, classes: [ground, disc, square]}
  augment: [{name: RandomCrop, size: [32, 32], pad_if_needed: true}]
teacher: {architecture: lraspp, backbone: mobilenet_v3_small, width: 8}
student: {architecture: lraspp, backbone: mobilenet_v3_small, width: 8}
method: {name: channel_wise}
training: {batch_size: 4}
baseline: null
"""


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What `taskkd check my.yaml KEY=VALUE` does, in a folder with images and masks."""
    monkeypatch.chdir(tmp_path)
    trees.folder(tmp_path / "shapes", 8, side=48)
    (tmp_path / "my.yaml").write_text(RECIPE)
    return lambda *overrides: plans.check(recipes.load_recipe("my.yaml", overrides))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.foldr=x", r"my\.yaml: unknown key 'data\.foldr' \(did you mean 'folder'"),
        ("data.folder.trian=x", r"unknown key 'data\.folder\.trian' \(did you mean 'train'"),
        ("method.temperatur=2", r"unknown key 'method\.temperatur' \(did you mean 'temperature'"),
        ("method.name=channelwise", r"no method 'channelwise' \(did you mean 'channel_wise'"),
        ("student.architecture=lrasp", r"student\.architecture: input should be .*'lraspp', 'unet'.* got 'lrasp'"),
        ("data.folder.classes=citscapes", r"no coding of classes 'citscapes' \(did you mean 'cityscapes'"),
        ("data.folder.train=nowhere", r"nowhere/images: no such folder"),
        ("data.unlabelled=nowhere", r"nowhere: no such folder"),
        ("data.folder=null", r"exactly one of folder, cityscapes"),
        ("teacher.weights=lost.pth", r"weights 'lost\.pth': no such file"),
        ("loss.class_weights=[1, 2]", r"loss.class_weights: 2 weights for 3 classes"),
        ("data.validation_size=20", r"data\.validation_size is 20, there are 8 images"),
        ("data.folder.classes=[ground, disc]", r"shapes/masks/\d+\.png: the value 2 at x \d+, y \d+ .*known: .*0, 1"),
        (
            "data.augment=[RandomHorizontalFlip, {name: RandomCrop, size: [99, 99]}]",
            r"shapes/images/\d+\.png: augmentation 2 \(RandomCrop\): .*\(48, 48\)\. `pad_if_needed: true` pads",
        ),
    ],
)
def test_recipes(check: Any, override: str, sentence: str) -> None:
    with pytest.raises(TaskkdError, match=sentence):
        check(override)


def _masks(write: Callable[[int, np.ndarray], np.ndarray]) -> None:
    for number, path in enumerate(sorted(Path("shapes/masks").iterdir())):
        Image.fromarray(write(number, np.asarray(Image.open(path)))).save(path)


def _another_size() -> None:
    _masks(lambda _, mask: mask[:40])


def _out_of_range() -> None:
    _masks(lambda _, mask: np.where(mask == 2, 7, mask).astype(np.uint8))


def _colours() -> None:
    _masks(lambda _, mask: np.stack([mask, mask, mask * 0], -1))


def _cut_short() -> None:
    for path in Path("shapes/images").iterdir():
        path.write_bytes(path.read_bytes()[:2000])


def _no_image() -> None:
    for path in Path("shapes/masks").iterdir():
        path.write_bytes(b"no image")


def _missing() -> None:
    Path("shapes/masks/003.png").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            _another_size,
            r"shapes/masks/\d+\.png: the mask has 48x40 pixels, its image shapes/images/\d+\.png has 48x48",
        ),
        (_out_of_range, r"shapes/masks/\d+\.png: the value 7 at x .*neither a class nor ignored; known: .*0, 1, 2"),
        (_colours, r"shapes/masks/\d+\.png: the mask has colours, but classes are given by number"),
        (_cut_short, r"shapes/images/\d+\.png .*the image cannot be read: image file is truncated"),
        (_no_image, r"shapes/masks/\d+\.png: the mask cannot be read: it is no image"),
        (_missing, r"shapes/images/003\.png: its mask shapes/masks/003\.png is missing.*bad='skip'"),
    ],
)
def test_files(check: Any, damage: Callable[[], None], sentence: str) -> None:
    damage()
    with pytest.raises(DataError, match=sentence):
        check()


def test_damaged_files_may_be_left_out(check: Any) -> None:
    _missing()
    Path("shapes/images/005.png").write_bytes(b"no image")
    said = dict(check("data.bad=skip", "data.validation_size=1", "data.test_size=1").summary)
    assert said["data"].startswith("train 4 images; validation 1 images; test 1 images")


def test_images_of_a_batch_of_different_sizes(check: Any) -> None:
    for number in range(0, 8, 2):
        for kind, values in zip(("images", "masks"), trees.scene(number, 64), strict=True):
            Image.fromarray(values).save(f"shapes/{kind}/{number:03}.png")
    with pytest.raises(DataError, match=r"48x48 \(shapes/images/\d+\.png\), 64x64 \(shapes/.*end data\.augment with"):
        check("data.augment=[RandomHorizontalFlip]")
    check()  # cropped


def test_an_empty_folder_of_unlabelled_images(check: Any) -> None:
    Path("others").mkdir()
    with pytest.raises(DataError, match=r"others: there are no images \(\.jpg"):
        check("data.unlabelled=others")
    shutil.copy("shapes/images/001.png", "others")
    Path("others/bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"others/bad\.png .*the image cannot be read"):
        check("data.unlabelled=others")


def test_networks_of_other_classes(check: Any) -> None:
    other = models.build({"architecture": "lraspp", "backbone": "mobilenet_v3_small", "width": 8}, ["sea", "land"])
    models.save(other, "other")
    for side in ("teacher", "student"):
        with pytest.raises(RecipeError, match=r"'other' is for 2 classes \(sea, land\), the data has 3 \(ground, disc"):
            check(f"{side}={{model: other}}")


def test_a_student_that_predicts_by_queries(check: Any) -> None:
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, hidden_size=32, mask_feature_size=32, feature_size=32, num_labels=3, num_queries=4,
        num_attention_heads=2, encoder_layers=1, decoder_layers=2, dim_feedforward=16, encoder_feedforward_dim=16,
    )  # fmt: skip
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained("queries")
    with pytest.raises(RecipeError, match=r"Mask2FormerForUniversalSegmentation predicts by queries.*as the teacher"):
        check("student={model: queries}")
    with pytest.raises(RecipeError, match=r"teacher\.finetune: Mask2Former\w+ predicts by queries.*Leave finetune out"):
        check("teacher={model: queries, finetune: {epochs: 1}}")
    assert "out.logits" in str(check("teacher={model: queries}").stages["distil"].terms[1].teacher)


def test_folders_that_cannot_be_read_by_their_layout(check: Any) -> None:
    Path("empty").mkdir()
    with pytest.raises(RecipeError, match=r"empty has no classes\.txt"):
        recipes.load_recipe("segmentation", ["teacher=fcn", "student=lraspp", "data=empty"])
    Path("empty/classes.txt").write_text("a\nb\n")
    with pytest.raises(RecipeError, match=r"empty has neither `images` and `masks` nor a folder `train`"):
        recipes.load_recipe("segmentation", ["teacher=fcn", "student=lraspp", "data=empty"])


def test_predicting_on_what_is_no_image(check: Any) -> None:
    from taskkd.segmentation.task import TASK

    student = models.build({"architecture": "lraspp", "backbone": "mobilenet_v3_small", "width": 8}, trees.CLASSES)
    for path, sentence in (
        ("lost.png", "lost.png: no such file; segmentation networks predict on image files"),
        ("shapes", r"shapes: is a folder; name its images \(shapes/\*\)"),
        ("my.yaml", r"my\.yaml .*the image cannot be read: it is no image"),
    ):
        with pytest.raises(DataError, match=sentence):
            list(TASK.predict(recipes.load_recipe("my.yaml"), student.eval(), None, [path]))
