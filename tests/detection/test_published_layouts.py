"""COCO 2017 and Pascal VOC 2007 + 2012 as they are unpacked: file names, keys and oddities of the published files."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taskkd import recipes
from taskkd.detection import DetectionDataset, collate, read
from taskkd.detection.coco import coco_results
from taskkd.detection.metrics import COCO_RESULTS, CocoMetric
from taskkd.detection.task import TASK
from taskkd.detection.voc import VOC_CLASSES, read_voc
from taskkd.errors import DataError

WIDTH, HEIGHT = 64, 48


def photograph(path: Path, seed: int, *, grey: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (HEIGHT, WIDTH) if grey else (HEIGHT, WIDTH, 3)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, np.uint8)).save(path, "JPEG")


# ---- COCO 2017

LEFT_OUT = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # of 1 to 90


def categories() -> list[dict[str, Any]]:
    """The eighty, with the ids that they have."""
    from torchvision.models.detection import SSD300_VGG16_Weights

    names = SSD300_VGG16_Weights.COCO_V1.meta["categories"]
    return [{"supercategory": "thing", "id": i, "name": names[i]} for i in range(1, 91) if i not in LEFT_OUT]


def an_image(number: int, part: str) -> dict[str, Any]:
    name = f"{number:012d}.jpg"
    return {
        "license": 4, "file_name": name, "coco_url": f"http://images.cocodataset.org/{part}/{name}",
        "height": HEIGHT, "width": WIDTH, "date_captured": "2013-11-14 17:02:52",
        "flickr_url": "http://farm7.staticflickr.com/6116/6255196340_da26cf2c9e_z.jpg", "id": number,
    }  # fmt: skip


def an_object(number: int, image: int, category: int, bbox: list[float], *, crowd: bool = False) -> dict[str, Any]:
    x, y, w, h = bbox
    shape: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if crowd:  # counts of pixels outside and inside by turns, down the columns
        shape = {
            "counts": [int(x) * HEIGHT, int(w) * HEIGHT, (WIDTH - int(x) - int(w)) * HEIGHT],
            "size": [HEIGHT, WIDTH],
        }
    return {
        "segmentation": shape, "area": w * h * 0.7, "iscrowd": int(crowd), "image_id": image, "bbox": bbox,
        "category_id": category, "id": number,
    }  # fmt: skip


def coco(root: Path, part: str, images: dict[int, bool], objects: list[dict[str, Any]]) -> Path:
    """`annotations/instances_{part}.json` and `{part}/`; images by their numbers, True for grey ones."""
    for number, grey in images.items():
        photograph(root / part / f"{number:012d}.jpg", number, grey=grey)
    content = {
        "info": {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2017,
                 "contributor": "COCO Consortium", "date_created": "2017/09/01"},
        "licenses": [{"url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "id": 1, "name": "a licence"}],
        "images": [an_image(number, part) for number in images], "annotations": objects, "categories": categories(),
    }  # fmt: skip
    path = root / "annotations" / f"instances_{part}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    for other in ("captions", "person_keypoints"):
        (path.parent / f"{other}_{part}.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    objects = [
        an_object(156, 558840, 58, [9.66, 7.5, 40.23, 30.11]),
        an_object(509, 558840, 90, [30.0, 2.04, 20.5, 20.5]),
        an_object(900100200365, 200365, 1, [8.0, 0.0, 30.0, 48.0], crowd=True),
        an_object(918, 200365, 62, [26.65, 38.33, 1.03, 0.0]),  # there are two such boxes in train2017
        an_object(920, 200365, 1, [50.0, 1.0, 14.21, 30.0]),  # sticks out by a fraction of a pixel
    ]
    coco(root, "train2017", {558840: False, 200365: False, 9: True, 25: False}, objects)
    held = [
        an_object(1, 139, 64, [2.0, 3.0, 30.0, 40.0]), an_object(2, 139, 1, [30.5, 4.25, 20.0, 22.0]),
        an_object(3, 285, 1, [10.0, 10.0, 33.0, 30.0]),
        an_object(900100000285, 285, 1, [40.0, 0.0, 20.0, 48.0], crowd=True),
    ]  # fmt: skip
    coco(root, "val2017", {139: False, 285: True, 632: False}, held)
    return root


def test_coco_as_it_is_published(published: Path) -> None:
    path = published / "annotations" / "instances_train2017.json"
    with pytest.raises(DataError, match=r"image id 200365, annotation id 918 .*has no area"):
        read(path)
    found = read(path, bad="skip_boxes")
    assert len(found.classes) == 80
    assert (found.classes[0], found.classes[79]) == ("person", "toothbrush")
    assert found.category_ids == [i for i in range(1, 91) if i not in LEFT_OUT]
    first, second, grey, empty = found.records
    assert first.source.name == str(published / "train2017" / "000000558840.jpg")
    assert [found.classes[k - 1] for k in first.labels] == ["hot dog", "toothbrush"]
    assert first.boxes[0].tolist() == pytest.approx([9.66, 7.5, 49.89, 37.61])
    assert first.area[0] == pytest.approx(40.23 * 30.11 * 0.7)  # of the outline, not of the box
    assert second.iscrowd.tolist() == [True, False]
    assert second.annotation_ids.tolist() == [900100200365, 920]
    assert second.boxes[1].tolist() == [50, 1, 64, 31]
    assert len(grey.boxes) == len(empty.boxes) == 0
    dataset = DetectionDataset(found)
    assert dataset[1]["targets"]["labels"].tolist() == [1]  # the crowd is not trained on
    assert torch.equal(dataset[2]["images"][0], dataset[2]["images"][2])
    assert dataset[2]["images"].shape == (3, HEIGHT, WIDTH)
    assert any("1 bad boxes left out; the first: " in note and "918" in note for note in found.notes)


def test_results_are_those_of_pycocotools_on_the_published_file(published: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    path = published / "annotations" / "instances_val2017.json"
    found = read(path)
    metric, rows = CocoMetric(found.classes, found.records), []
    draw = np.random.default_rng(0)
    for sample in DetectionDataset(found, ignored=True):  # type: ignore[attr-defined]
        record = next(r for r in found.records if r.image_id == int(sample["targets"]["image_id"]))
        boxes = np.concatenate(
            [record.boxes + draw.normal(0, 2, record.boxes.shape), [[1.0, 2, 9, 9], [41, 1, 50, 40]]]
        )
        labels = np.concatenate([record.labels, [1, 1]])
        output = {
            "boxes": torch.tensor(boxes),
            "labels": torch.tensor(labels),
            "scores": torch.tensor(draw.random(len(boxes))),
        }
        metric.update([output], collate([sample]))
        rows += coco_results(record.image_id, output, found.category_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(json.loads(json.dumps(rows))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    want = {n: v for n, v in zip(COCO_RESULTS, evaluation.stats.tolist(), strict=True) if v >= 0}
    got = metric.compute()
    assert 0 < want["AP"] < 1
    assert got == pytest.approx(want, abs=1e-12)


def test_cocos_recipes_read_it(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "coco").symlink_to(published)
    monkeypatch.chdir(tmp_path)
    loaded = TASK.load(recipes.load_recipe("detection/coco-pearson-kd", ["data.validation_size=1"]))
    assert loaded.summary().startswith("train 3 images")
    assert len(loaded.classes) == 80
    assert [len(loaded.validation), len(loaded.test)] == [1, 3]


# ---- Pascal VOC

#: as VOC2007 writes it
OLD = """<annotation>
\t<folder>VOC2007</folder>
\t<filename>000005.jpg</filename>
\t<source>
\t\t<database>The VOC2007 Database</database>
\t\t<annotation>PASCAL VOC2007</annotation>
\t\t<image>flickr</image>
\t\t<flickrid>325991873</flickrid>
\t</source>
\t<owner>
\t\t<flickrid>archintent louisville</flickrid>
\t\t<name>?</name>
\t</owner>
\t<size>
\t\t<width>64</width>
\t\t<height>48</height>
\t\t<depth>3</depth>
\t</size>
\t<segmented>0</segmented>
\t<object>
\t\t<name>chair</name>
\t\t<pose>Rear</pose>
\t\t<truncated>0</truncated>
\t\t<difficult>0</difficult>
\t\t<bndbox>
\t\t\t<xmin>1</xmin>
\t\t\t<ymin>11</ymin>
\t\t\t<xmax>24</xmax>
\t\t\t<ymax>39</ymax>
\t\t</bndbox>
\t</object>
\t<object>
\t\t<name>chair</name>
\t\t<pose>Unspecified</pose>
\t\t<truncated>1</truncated>
\t\t<difficult>1</difficult>
\t\t<bndbox>
\t\t\t<xmin>5</xmin>
\t\t\t<ymin>24</ymin>
\t\t\t<xmax>64</xmax>
\t\t\t<ymax>48</ymax>
\t\t</bndbox>
\t</object>
</annotation>
"""
#: as VOC2012 does: other orders, fractions, parts, actions, points, and objects without `difficult`
NEW = """<annotation>
\t<filename>2011_003276.jpg</filename>
\t<folder>VOC2012</folder>
\t<object>
\t\t<name>person</name>
\t\t<actions>
\t\t\t<jumping>0</jumping>
\t\t\t<other>1</other>
\t\t</actions>
\t\t<bndbox>
\t\t\t<xmax>45.70000076293945</xmax>
\t\t\t<xmin>9</xmin>
\t\t\t<ymax>40</ymax>
\t\t\t<ymin>2.5</ymin>
\t\t</bndbox>
\t\t<point>
\t\t\t<x>22</x>
\t\t\t<y>20</y>
\t\t</point>
\t\t<part>
\t\t\t<name>head</name>
\t\t\t<bndbox>
\t\t\t\t<xmin>20</xmin>
\t\t\t\t<ymin>3</ymin>
\t\t\t\t<xmax>30</xmax>
\t\t\t\t<ymax>12</ymax>
\t\t\t</bndbox>
\t\t</part>
\t</object>
\t<segmented>1</segmented>
\t<size>
\t\t<depth>3</depth>
\t\t<height>48</height>
\t\t<width>64</width>
\t</size>
\t<source>
\t\t<annotation>PASCAL VOC2011</annotation>
\t\t<database>The VOC2011 Database</database>
\t\t<image>flickr</image>
\t</source>
</annotation>
"""


def voc(root: Path, year: str, pages: dict[str, str], lists: dict[str, list[str]]) -> Path:
    folder = root / "VOCdevkit" / year
    for part in ("Annotations", "ImageSets/Main", "ImageSets/Layout", "ImageSets/Segmentation", "SegmentationClass"):
        (folder / part).mkdir(parents=True)
    for seed, (name, page) in enumerate(pages.items()):
        photograph(folder / "JPEGImages" / f"{name}.jpg", seed)
        (folder / "Annotations" / f"{name}.xml").write_text(page)
    for part, names in lists.items():
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{n}\n" for n in names))
        (folder / "ImageSets" / "Main" / f"chair_{part}.txt").write_text("".join(f"{n} -1\n" for n in names))
    (folder / "ImageSets" / "Layout" / "trainval.txt").write_text("000009 1\n")
    return folder


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    lists = {"train": ["000012"], "val": ["000005"], "trainval": ["000005", "000012"], "test": ["000001"]}
    voc(root, "VOC2007", {"000005": OLD, "000012": OLD, "000001": OLD}, lists)
    lists = {"train": ["2008_000008"], "val": ["2011_003276"], "trainval": ["2008_000008", "2011_003276"]}
    voc(root, "VOC2012", {"2008_000008": OLD, "2011_003276": NEW}, lists)
    return root / "VOCdevkit"


def test_voc_as_it_is_published(devkit: Path) -> None:
    found = read_voc([devkit / "VOC2007", devkit / "VOC2012"], "trainval")
    assert found.classes == VOC_CLASSES
    assert [Path(r.source.name).stem for r in found.records] == ["000005", "000012", "2008_000008", "2011_003276"]
    old, new = found.records[0], found.records[3]
    assert old.boxes.tolist() == [[0, 10, 24, 39], [4, 23, 64, 48]]
    assert old.iscrowd.tolist() == [False, True]  # difficult
    assert [VOC_CLASSES[k - 1] for k in new.labels] == ["person"]  # and no head
    assert new.boxes[0].tolist() == pytest.approx([8, 1.5, 45.70000076293945, 40])
    assert new.iscrowd.tolist() == [False]
    assert not found.notes
    assert DetectionDataset(found)[0]["targets"]["boxes"].tolist() == [[0, 10, 24, 39]]
    with pytest.raises(DataError, match=r"VOC2012.*no list test\.txt.*it has train, trainval, val"):
        read_voc(devkit / "VOC2012", "test")


def test_vocs_recipes_read_it(devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "VOCdevkit").symlink_to(devkit)
    monkeypatch.chdir(tmp_path)
    loaded = TASK.load(recipes.load_recipe("detection/voc-chen", ["data.validation_size=1"]))
    assert [len(loaded.train), len(loaded.validation), len(loaded.test)] == [3, 1, 1]
    assert len(loaded.test[0]["targets"]["ignored_boxes"]) == 1
