"""Data that the caller of `kd.distill` holds, as every kind of it is read."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from taskkd.detection import Annotations, read
from taskkd.detection.given import GivenDetection
from taskkd.errors import DataError
from tests.detection import coco_folder
from tests.detection.detectors import retinanet


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coco_folder.write(tmp_path_factory.mktemp("coco"), 12)


def labels(given: Annotations) -> list[list[str]]:
    return [[given.classes[k - 1] for k in record.labels] for record in given.records]


def test_annotations_in_another_order_of_classes_keep_their_names(data: Path) -> None:
    own = read(data)
    turned = own.classes[::-1]
    task = GivenDetection(retinanet(), retinanet(24), own, own, test=own, classes=turned)
    held = task.load(None)
    for part in ("train", "validation", "test"):
        found = held.annotations[part]
        assert found.classes == turned == held.classes
        assert labels(found) == labels(own)
        assert found.category_ids == own.category_ids[::-1]


def test_annotations_have_no_class_that_the_teacher_has_not(data: Path) -> None:
    own = read(data)
    with pytest.raises(DataError, match=r"class 'square' of the data is not of the teacher, which has disc"):
        GivenDetection(retinanet(), retinanet(24), own, own, classes=["disc"])


def test_without_eval_a_tenth_each_is_held_out(data: Path) -> None:
    held = GivenDetection(retinanet(), retinanet(24), data).load(None).annotations
    assert [len(held[part]) for part in ("train", "validation", "test")] == [10, 1, 1]


def test_an_hf_data_set() -> None:
    rows = []
    for number in range(4):
        pixels = np.full((32, 40, 3), 40 * number, np.uint8)
        objects = {"bbox": [[2.0, 3.0, 10.0, 12.0]], "category": [number % 2]}
        rows.append({"image": Image.fromarray(pixels), "image_id": number, "objects": objects})
    names = datasets.ClassLabel(names=["square", "disc"])
    kinds = {"bbox": datasets.Sequence(datasets.Value("float32"), 4), "category": names}
    features = {"image": datasets.Image(), "image_id": datasets.Value("int64"), "objects": datasets.Sequence(kinds)}
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    held = GivenDetection(retinanet(), retinanet(24), table, table).load(None)
    assert labels(held.annotations["train"]) == [["square"], ["disc"], ["square"], ["disc"]]
    assert held.train[1]["targets"]["labels"].tolist() == [2]
