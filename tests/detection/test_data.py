"""Detection data: what the readers give, what they refuse, and what becomes of it in a batch."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from taskkd.detection import DetectionDataset, collate, read, tree_crowns
from taskkd.detection.coco import coco_results, read_coco
from taskkd.detection.hub import read_hub
from taskkd.detection.records import Annotations, Record
from taskkd.detection.tiles import region, split, tiles
from taskkd.detection.trees import REGIONS
from taskkd.detection.voc import VOC_CLASSES, read_voc
from taskkd.errors import DataError
from taskkd.images import decode, header_size, in_file, in_memory
from taskkd.splits import shared_images

WIDTH, HEIGHT = 24, 20


def pixels(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, shape or (HEIGHT, WIDTH, 3), np.uint8)


def encoded(array: np.ndarray[Any, Any], kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


# ---- COCO

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 18, "name": "dog"}]


def annotation(number: int, image_id: int, category_id: int, bbox: Any, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def content() -> dict[str, Any]:
    """Three images; the last has no box, the second a crowd."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (7, 5, 9)],
        "categories": CATEGORIES,
        "annotations": [
            annotation(70, 7, 18, [2, 3, 10, 8], area=55.5, iscrowd=0),
            annotation(71, 7, 3, [-3, 10, 8, 20]),
            annotation(72, 5, 90, [0, 0, 24, 20], iscrowd=1),
            annotation(73, 5, 3, [1.5, 1, 4, 4.25], area=0),
        ],
    }


def coco(folder: Path, data: Any = None, *, images: str = "", file: str = "instances.json") -> Path:
    data = content() if data is None else data
    (folder / images).mkdir(parents=True, exist_ok=True)
    for seed in (7, 5, 9):
        (folder / images / f"{seed}.png").write_bytes(encoded(pixels(seed)))
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_coco(tmp_path: Path) -> None:
    found = read_coco(coco(tmp_path))
    assert found.classes == ["car", "dog", "toothbrush"]  # in the order of their ids 3, 18, 90
    assert found.category_ids == [3, 18, 90]
    assert [r.image_id for r in found.records] == [7, 5, 9]
    first, second, third = found.records
    assert first.boxes.tolist() == [[2, 3, 12, 11], [0, 10, 5, 20]]  # the second is clipped
    assert first.labels.tolist() == [2, 1]
    assert first.area.tolist() == [55.5, 50]  # the file's own; of the clipped box
    assert first.annotation_ids.tolist() == [70, 71]
    assert first.size == (HEIGHT, WIDTH)
    assert second.iscrowd.tolist() == [True, False]
    assert second.area.tolist() == [480, 17]
    assert third.boxes.shape == (0, 4)
    assert found.notes == [f"{tmp_path}/instances.json: 1 boxes stuck out of their images and were clipped."]
    assert found.summary() == "3 images, 3 boxes of 3 classes, 1 ignored boxes, 1 images without boxes"


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("instances.json", "images"),
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val2017.json", "images/val2017"),
    ],
)
def test_the_folder_of_images_is_found(tmp_path: Path, file: str, images: str) -> None:
    path = coco(tmp_path, file=file, images=images)
    assert read(path).records[0].source.name == str(tmp_path / images / "7.png")
    assert read(path, tmp_path / images).records[0].source.name == str(tmp_path / images / "7.png")


def test_coco_in_a_zip(tmp_path: Path) -> None:
    coco(tmp_path)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "instances.json", "set/instances.json")
        for number in (7, 5, 9):
            archive.write(tmp_path / f"{number}.png", f"set/images/{number}.png")
    found = read(tmp_path / "all.zip")
    assert found.records[1].source.name == "all.zip/set/images/5.png"
    assert torch.equal(decode(found.records[1].source, 5), torch.from_numpy(pixels(5)).permute(2, 0, 1))
    (tmp_path / "none.zip").write_text("no zip")
    with pytest.raises(DataError, match=r"none\.zip: not a zip file\."):
        read(tmp_path / "none.zip")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.json", "{}")
        archive.writestr("b.json", "{}")
    with pytest.raises(DataError, match=r"two\.zip: expected one json file in the archive, found 2\."):
        read(tmp_path / "two.zip")


def test_a_size_that_is_not_written_is_read(tmp_path: Path) -> None:
    data = content()
    del data["images"][0]["width"]
    assert read(coco(tmp_path, data)).records[0].size == (HEIGHT, WIDTH)


def test_classes_of_another_file_give_the_labels(tmp_path: Path) -> None:
    path = coco(tmp_path)
    found = read(path, classes=["dog", "cat", "toothbrush", "car"])
    assert found.records[0].labels.tolist() == [1, 4]
    assert found.category_ids == [18, -1, 90, 3]
    with pytest.raises(DataError, match=r"instances\.json: no class 'car' \(did you mean 'cat'\?\); known: dog, cat"):
        read(path, classes=["dog", "cat"])


def test_a_group_of_classes_of_the_same_name_is_no_class(tmp_path: Path) -> None:
    data = content()
    data["categories"] = [{"id": 0, "name": "car"}, *CATEGORIES]
    found = read(coco(tmp_path, data))
    assert found.classes == ["car", "dog", "toothbrush"]
    assert found.category_ids == [3, 18, 90]


BAD_BOXES = [
    ([2, 3, 0, 8], 18, r"7\.png\): the box x 2 to 2, y 3 to 11 has no area\."),
    ([2, 3, 4, -1], 18, "y 3 to 2 has no area"),
    ([float("nan"), 3, 4, 4], 18, "is not finite"),
    ([40, 3, 4, 4], 18, "lies outside of its image of 24x20 pixels"),
    ([1, 2, 3], 18, r"`bbox` is \[1, 2, 3\], expected \[x, y, width, height\]"),
    (None, 18, "`bbox` is None"),
    ([1, 2, 3, 4], 4, "no category has the id 4; there are 3, 18, 90"),
]


@pytest.mark.parametrize(("bbox", "category", "message"), BAD_BOXES)
def test_a_bad_box_is_an_error_or_left_out(tmp_path: Path, bbox: Any, category: int, message: str) -> None:
    data = content()
    data["annotations"].append(annotation(74, 7, category, bbox))
    path = coco(tmp_path, data)
    with pytest.raises(DataError, match=rf"instances\.json: image id 7, annotation id 74.*{message}") as raised:
        read(path)
    assert "(bad='skip' leaves such boxes out and counts them.)" in str(raised.value)
    found = read(path, bad="skip")
    assert len(found.records[0].boxes) == 2
    assert "1 bad boxes left out; the first: " in found.notes[0]


def test_a_box_of_no_image(tmp_path: Path) -> None:
    data = content()
    data["annotations"].append(annotation(74, 8, 3, [1, 1, 2, 2]))
    path = coco(tmp_path, data)
    with pytest.raises(DataError, match="image id 8, annotation id 74: there is no such image"):
        read(path)
    assert read(path, bad="skip").notes[0].startswith(f"{path}: 1 bad boxes left out")


def test_missing_and_damaged_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = coco(tmp_path)
    (tmp_path / "9.png").unlink()
    with pytest.raises(DataError, match=r"instances\.json: the file of image id 9, 9\.png, is missing"):
        read(path)
    whole = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "9.png").write_bytes(whole)
    dataset = DetectionDataset(read(path))  # nothing is decoded yet
    with pytest.raises(DataError, match=r"5\.png \(image id 5\): the image cannot be read: "):
        dataset[1]
    (tmp_path / "9.png").unlink()
    with caplog.at_level(logging.INFO, "taskkd"):
        found = read(path, bad="skip")
    assert [r.image_id for r in found.records] == [7]
    assert f"{path}: 2 bad images left out; the first: " in found.notes[0]
    assert found.notes[0] in caplog.messages
    assert f"{path}: all 2 images are decoded once to find bad ones." in caplog.messages
    (tmp_path / "7.png").write_text("no image")
    with pytest.raises(DataError, match=r"none of the 2 images can be used; the first: .*7\.png"):
        read(path, bad="skip")


def test_an_image_of_another_size(tmp_path: Path) -> None:
    path = coco(tmp_path)
    (tmp_path / "7.png").write_bytes(encoded(pixels(7, 24, 20, 3)))  # as one that was turned
    dataset = DetectionDataset(read(path))
    with pytest.raises(DataError, match=r"7\.png \(image id 7\): the image has 20x24 pixels, but .*json says 24x20\."):
        dataset[0]
    assert [r.image_id for r in read(path, bad="skip").records] == [5, 9]


def changed(**parts: Any) -> dict[str, Any]:
    return {**content(), **parts}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", r"instances\.json: not JSON \("),
        ([], r"expected an object with images, annotations, categories, got a list \(a file of results"),
        ({"image": [], "annotations": [], "categories": []}, r"no list 'images' \(did you mean 'image'"),
        (changed(images=[]), "there is no such image"),
        (changed(images=[], annotations=[]), "there are no images"),
        (changed(images=[{"id": 1}]), r"image 0 \(from 0\) has no `file_name`"),
        (changed(images=[{"id": "1", "file_name": "7.png"}]), "the id of image 7.png is '1', expected a number"),
        (changed(images=[*content()["images"], content()["images"][0]]), "two images have the id 7"),
        (changed(categories=[]), "there are no categories"),
        (changed(categories=[{"id": 1}]), "the category {'id': 1} needs a number `id` and a text `name`"),
        (changed(categories=[*CATEGORIES, {"id": 3, "name": "bus"}]), "the categories 'car' and 'bus' have the id 3"),
        (changed(annotations=[3]), r"annotation 0 \(from 0\) is 3, expected an object"),
        (changed(images=[{"id": 1, "file_name": "lost.png"}]), r"its first image lost.png is in none of .*; name the"),
    ],
)  # fmt: skip
def test_what_is_no_coco_file(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(coco(tmp_path, data))


def test_what_no_reader_takes(tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").touch()
    with pytest.raises(DataError, match=r"none\.json: no such file\."):
        read(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"expected a COCO \.json or \.zip file, or a folder in the layout of VOC"):
        read(tmp_path / "boxes.csv")
    with pytest.raises(DataError, match=r"lost: no such file or folder\."):
        read(tmp_path / "lost")
    with pytest.raises(DataError, match=r"no folder ImageSets in it, as VOC has; of COCO data name the json file\."):
        read(tmp_path)
    (tmp_path / "own.json").touch()
    with pytest.raises(DataError, match=r"name the json file \(.*own\.json\?\)\."):
        read(tmp_path)
    with pytest.raises(DataError, match=r"bad='skipp': expected 'error', 'skip', 'skip_boxes' \(did you mean 'skip'"):
        read_coco(coco(tmp_path), bad="skipp")  # type: ignore[arg-type]


def test_results_in_the_terms_of_the_file(tmp_path: Path) -> None:
    found = {"boxes": torch.tensor([[1.0, 2, 4, 8]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.5])}
    rows = coco_results(7, found, read(coco(tmp_path)).category_ids)
    assert json.loads(json.dumps(rows)) == [{"image_id": 7, "category_id": 18, "bbox": [1, 2, 3, 6], "score": 0.5}]


# ---- Pascal VOC


def voc_object(name: str, *corners: Any, difficult: str = "") -> str:
    box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    part = "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>"
    return f"<object><name>{name}</name>{difficult}{part}<bndbox>{box}</bndbox></object>"


def voc(folder: Path, **objects: str) -> Path:
    """Images named by the keywords; the first is `train`, the others `val`."""
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for seed, (name, text) in enumerate(objects.items()):
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        page = f"<annotation><filename>{name}.jpg</filename>{size}{text}</annotation>"
        (folder / "Annotations" / f"{name}.xml").write_text(page)
        (folder / "JPEGImages" / f"{name}.jpg").write_bytes(encoded(pixels(seed), "JPEG"))
    names = list(objects)
    for part, held in {"train": names[:1], "val": names[1:], "trainval": names, "dog_train": names}.items():
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{n}  1\n" for n in held))
    return folder


def test_voc(tmp_path: Path) -> None:
    root = voc(
        tmp_path / "VOC2007",
        a=voc_object("dog", 1, 1, 1, 1) + voc_object("cat", 5, 6, 24, 20, difficult="<difficult>1</difficult>"),
        b="",
    )
    found = read(root)
    assert found.classes == VOC_CLASSES
    first, second = found.records
    assert first.boxes.tolist() == [[0, 0, 1, 1], [4, 5, 24, 20]]  # 1-based, both corners belong to the box
    assert first.labels.tolist() == [VOC_CLASSES.index("dog") + 1, VOC_CLASSES.index("cat") + 1]
    assert first.iscrowd.tolist() == [False, True]
    assert first.annotation_ids.tolist() == [1, 2]
    assert [r.image_id for r in found.records] == [1, 2]
    assert len(second.boxes) == 0
    assert [r.source.name for r in read(root, part="val").records] == [str(root / "JPEGImages" / "b.jpg")]
    both = read_voc([root, voc(tmp_path / "VOC2012", c=voc_object("cow", 1, 1, 4, 4))], "train")
    assert [Path(r.source.name).name for r in both.records] == ["a.jpg", "c.jpg"]


def test_voc_of_other_classes(tmp_path: Path) -> None:
    root = voc(tmp_path, a=voc_object("screw", 1, 1, 4, 4), b=voc_object("nut", 1, 1, 4, 4))
    assert read(root).classes == ["nut", "screw"]
    with pytest.raises(DataError, match=r"a\.xml: image id 1, annotation id 1: no class 'screw'.*known: nut"):
        read(root, classes=["nut"])
    assert len(read(root, classes=["nut"], bad="skip").records[0].boxes) == 0


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (voc_object("dog", 5, 5, 4, 9), "image id 1, annotation id 1: the box x 4 to 4, y 4 to 9 has no area"),
        (voc_object("dog", 5, "", 4, 9), r"the box is \['5', '', '4', '9'\], expected four numbers"),
        ("<object>", r"a\.xml, line 1: not XML \("),
        ("</annotation><a>", "not XML"),
    ],
)
def test_bad_voc(tmp_path: Path, page: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(voc(tmp_path, a=page))


def test_voc_expands_no_entities(tmp_path: Path) -> None:
    root = voc(tmp_path, a="")
    secret = tmp_path / "secret"
    secret.write_text("dog")
    for entity in ('"dog"', f'SYSTEM "file://{secret}"'):
        (root / "Annotations" / "a.xml").write_text(
            f"<!DOCTYPE annotation [<!ENTITY x {entity}>]><annotation><filename>&x;</filename></annotation>"
        )
        with pytest.raises(DataError, match=r"a\.xml: it declares a document type, which annotations do not"):
            read(root)


def test_missing_parts_of_voc(tmp_path: Path) -> None:
    root = voc(tmp_path / "VOC2007", a=voc_object("dog", 1, 1, 4, 4))
    with pytest.raises(
        DataError, match=r"Main: no list vall\.txt \(did you mean 'val'.*\); it has train, trainval, val"
    ):
        read(root, part="vall")
    with pytest.raises(DataError, match="VOCdevkit: no folder ImageSets/Main; expected the layout of"):
        read_voc(tmp_path / "VOCdevkit")
    (root / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.xml: the image of image id 1 is missing in JPEGImages"):
        read(root)
    (root / "JPEGImages" / "a.png").write_bytes(encoded(pixels(0)))
    assert read(root).records[0].source.name.endswith("a.png")
    (root / "Annotations" / "a.xml").write_text("<page/>")
    with pytest.raises(DataError, match=r"a\.xml: expected an <annotation>, got <page>"):
        read(root)
    (root / "Annotations" / "a.xml").unlink()
    with pytest.raises(DataError, match=r"a\.xml: no such file; .*Main lists it"):
        read(root)


# ---- HF data sets


def hub(rows: list[dict[str, Any]], *, names: list[str] | None = None, listed: bool = False) -> Any:
    import datasets

    category = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    inner = {"id": datasets.Value("int64"), "area": datasets.Value("int64"), "category": category}
    box = datasets.List(datasets.Value("float32"))
    objects = datasets.List(inner | {"bbox": box}) if listed else {
        k: datasets.List(v) for k, v in (inner | {"bbox": box}).items()
    }  # fmt: skip
    features = datasets.Features({"image_id": datasets.Value("int64"), "image": datasets.Image(), "objects": objects})
    return datasets.Dataset.from_list(rows, features=features)


def hub_rows(*, listed: bool = False) -> list[dict[str, Any]]:
    columns = {"id": [4, 5], "area": [30, 8], "category": [1, 0], "bbox": [[1, 2, 5, 6], [20, 0, 8, 2]]}
    objects = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    empty: Any = [] if listed else {key: [] for key in columns}
    return [
        {"image_id": 14 + number, "image": {"bytes": encoded(pixels(number)), "path": None}, "objects": held}
        for number, held in ((1, objects if listed else columns), (2, empty))
    ]


@pytest.mark.parametrize("listed", [False, True])
def test_hub_data(listed: bool) -> None:
    found = read_hub(hub(hub_rows(listed=listed), names=["mask", "glove"], listed=listed))
    assert found.classes == ["mask", "glove"]
    assert found.category_ids == [0, 1]
    first, second = found.records
    assert (first.image_id, second.image_id) == (15, 16)
    assert first.boxes.tolist() == [[1, 2, 6, 8], [20, 0, 24, 2]]
    assert first.labels.tolist() == [2, 1]
    assert first.area.tolist() == [30, 8]
    assert first.annotation_ids.tolist() == [4, 5]
    assert first.size == (HEIGHT, WIDTH)
    assert len(second.boxes) == 0
    sample = DetectionDataset(found)[0]
    assert torch.equal(sample["images"], torch.from_numpy(pixels(1)).permute(2, 0, 1) / 255)


def test_hub_data_without_class_names() -> None:
    table = hub(hub_rows())
    assert read_hub(table).classes == ["0", "1"]
    assert read_hub(table, classes=["mask", "glove"]).records[0].labels.tolist() == [2, 1]
    assert read_hub(table, classes=["1", "0"]).records[0].labels.tolist() == [1, 2]
    rows = hub_rows()
    rows[0]["objects"]["bbox"][0] = [1, 2, 5, 6]
    assert read_hub(hub(rows), box_format="xyxy", bad="skip").records[0].boxes.tolist() == [[1, 2, 5, 6]]


def test_bad_hub_data() -> None:
    rows = hub_rows()
    with pytest.raises(
        DataError, match=r"no column 'img' \(did you mean 'image'.*it has 'image_id', 'image', 'objects'"
    ):
        read_hub(hub(rows), image="img")
    with pytest.raises(DataError, match=r"column 'image_id' holds .*, expected images"):
        read_hub(hub(rows), image="image_id")
    with pytest.raises(DataError, match="the objects in 'image_id' need `bbox` and `category`; they have Value"):
        read_hub(hub(rows), objects="image_id")
    with pytest.raises(DataError, match=r"expected one split as a datasets.Dataset, got dict"):
        read_hub({"train": hub(rows)})
    with pytest.raises(DataError, match="box_format='cxcywh': expected 'xywh' or 'xyxy'"):
        read_hub(hub(rows), box_format="cxcywh")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"data set '/none/such', split 'train' cannot be loaded: "):
        read_hub("/none/such")
    bad = copy.deepcopy(rows)
    bad[0]["objects"]["bbox"][1] = [30, 0, 8, 2]
    with pytest.raises(DataError, match=r"data set, row 0: image id 15, annotation id 5: .* lies outside of its image"):
        read_hub(hub(bad))
    bad[1]["image"] = {"bytes": encoded(pixels(2))[:60], "path": None}
    assert [len(r.boxes) for r in read_hub(hub(bad), bad="skip").records] == [1]
    bad = copy.deepcopy(rows)
    bad[0]["objects"]["area"] = [1]
    with pytest.raises(DataError, match=r"row 0: the objects' lists differ in length: .*1 of 'area'"):
        read_hub(hub(bad))


# ---- images


def test_images_of_all_kinds_have_three_channels_of_bytes(tmp_path: Path) -> None:
    grey, alpha = pixels(1, 6, 5), pixels(2, 6, 5, 4)
    assert torch.equal(decode(in_memory("g", encoded(grey)), 1), torch.from_numpy(grey).expand(3, -1, -1))
    assert torch.equal(decode(in_memory("a", encoded(alpha)), 1), torch.from_numpy(alpha[..., :3]).permute(2, 0, 1))
    deep = np.array([[0, 257, 65535]], np.uint16)
    assert decode(in_memory("d", encoded(deep)), 1)[0].tolist() == [[0, 1, 255]]
    with pytest.raises(DataError, match=r"f \(image id 4\): the image cannot be read: its pixels are floating point"):
        decode(in_memory("f", encoded(np.zeros((2, 2), np.float32), "TIFF")), 4)
    with pytest.raises(DataError, match=r"none\.png \(image id 3\): no such file\."):
        header_size(in_file(tmp_path / "none.png"), 3)


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    source = in_memory("e", encoded(pixels(3), "JPEG", exif=exif.tobytes()))
    assert header_size(source, 1) == (HEIGHT, WIDTH)
    assert decode(source, 1).shape == (3, HEIGHT, WIDTH)


# ---- batches


def test_what_a_sample_holds(tmp_path: Path) -> None:
    found = read(coco(tmp_path))
    sample = DetectionDataset(found)[1]
    assert sample["images"].dtype == torch.float32
    assert torch.equal(sample["images"], torch.from_numpy(pixels(5)).permute(2, 0, 1) / 255)
    assert sample["id"] == 5
    target = sample["targets"]
    assert set(target) == {"boxes", "labels", "area", "iscrowd", "image_id", "size"}  # the crowd is nowhere
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[1.5, 1, 5.5, 5.25]]
    assert target["labels"].tolist() == [1]
    assert target["iscrowd"].tolist() == [0]
    assert target["image_id"].dtype == torch.int64
    assert target["size"].tolist() == [HEIGHT, WIDTH]
    assert DetectionDataset(found)[2]["targets"]["boxes"].shape == (0, 4)
    evaluated = DetectionDataset(found, ignored=True)[1]["targets"]
    assert evaluated["boxes"].tolist() == target["boxes"].tolist()
    assert evaluated["ignored_boxes"].tolist() == [[0, 0, 24, 20]]
    assert evaluated["ignored_labels"].tolist() == [3]
    assert evaluated["ignored_area"].tolist() == [480]


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches(tmp_path: Path, held: bool, workers: int) -> None:
    dataset = DetectionDataset(read(coco(tmp_path)), held=held)
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=workers))
    assert [b["id"].tolist() for b in batches] == [[7, 5], [9]]
    assert [len(b["images"]) for b in batches] == [2, 1]
    assert [t["image_id"].item() for b in batches for t in b["targets"]] == [7, 5, 9]
    for batch, expected in zip(batches, [[7, 5], [9]], strict=True):
        for image, seed in zip(batch["images"], expected, strict=True):
            assert torch.equal(image, torch.from_numpy(pixels(seed)).permute(2, 0, 1) / 255)


def test_a_dataset_can_be_sent_to_another_process(tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(DetectionDataset(read(coco(tmp_path)))))
    assert torch.equal(again[0]["images"], DetectionDataset(read(tmp_path / "instances.json"))[0]["images"])


def test_held_images_are_read_once(tmp_path: Path) -> None:
    dataset = DetectionDataset(read(coco(tmp_path)), held=True)
    (tmp_path / "7.png").unlink()
    assert dataset[0]["images"].shape == (3, HEIGHT, WIDTH)


# ---- tiles and splits


def record(size: tuple[int, int], boxes: list[list[float]], image_id: int = 1, name: str = "a") -> Record:
    array = np.array(boxes, np.float64).reshape(-1, 4)
    count = len(array)
    return Record(
        in_memory(name, b""),
        image_id,
        size,
        array,
        np.arange(1, count + 1),
        (array[:, 2:] - array[:, :2]).prod(1),
        np.zeros(count, bool),
        np.arange(count),
    )


def test_a_region_clips_its_boxes_and_ignores_what_it_shows_little_of() -> None:
    whole = record((10, 20), [[1, 1, 5, 5], [7, 2, 11, 6], [9, 2, 13, 6], [12, 0, 14, 2], [10, 0, 14, 2]])
    part = region(whole, (0, 2, 10, 10), image_id=4)
    assert part.size == (8, 10)
    assert part.boxes.tolist() == [[1, 0, 5, 3], [7, 0, 10, 4], [9, 0, 10, 4]]
    assert part.labels.tolist() == [1, 2, 3]
    assert part.area.tolist() == [12, 12, 4]
    assert part.iscrowd.tolist() == [False, False, True]
    assert region(whole, (0, 2, 10, 10), image_id=4, min_visible=0.2).iscrowd.tolist() == [False] * 3
    deeper = region(part, (2, 1, 8, 5), image_id=5)
    assert deeper.crop == (2, 3, 8, 7)
    assert deeper.side == "a"
    with pytest.raises(DataError, match=r"a: the window \(0, 0, 21, 4\) is not in the image of 20x10 pixels\."):
        region(whole, (0, 0, 21, 4), image_id=4)


def test_tiles_cover_each_pixel_once() -> None:
    whole = record((103, 50), [[0, 0, 50, 103]])
    cut = tiles([whole, record((20, 30), [], 2, "b")], 40, start=10)
    assert [r.image_id for r in cut] == list(range(10, 17))
    seen = np.zeros((103, 50), int)
    for tile in cut[:6]:
        assert tile.crop is not None
        x0, y0, x1, y1 = tile.crop
        assert tile.size == (y1 - y0, x1 - x0)
        assert max(tile.size) <= 40
        seen[y0:y1, x0:x1] += 1
    assert (seen == 1).all()
    assert cut[6].size == (20, 30)
    assert sum(float(t.area.sum()) for t in cut) == pytest.approx(50 * 103)


def test_tiles_that_overlap() -> None:
    cut = tiles([record((40, 100), [])], 40, overlap=10)
    assert [t.crop for t in cut] == [(0, 0, 40, 40), (30, 0, 70, 40), (60, 0, 100, 40)]
    with pytest.raises(DataError, match="tiles of 40 pixels that overlap by 40: expected size >= 1 and 0 <= overlap"):
        tiles([], 40, overlap=40)


def test_a_split_keeps_tiles_of_an_image_together() -> None:
    whole = [record((40, 40), [[0, 0, 9, 9]], i, f"image {i}") for i in range(10)]
    cut = Annotations(tiles(whole, 20), ["tree"], [1])
    parts = split(cut, [0.6, 0.2, 0.2], seed=3)
    assert [len(p) for p in parts] == [24, 8, 8]
    sides = [{r.side for r in p.records} for p in parts]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    again = split(cut, [0.6, 0.2, 0.2], seed=3)
    assert [[r.image_id for r in p.records] for p in again] == [[r.image_id for r in p.records] for p in parts]
    other = split(cut, [0.6, 0.2, 0.2], seed=4)
    assert [[r.image_id for r in p.records] for p in other] != [[r.image_id for r in p.records] for p in parts]
    assert shared_images(parts[0].records, parts[1].records) == ""
    half = Annotations(cut.records[:6], ["tree"], [1])
    assert shared_images(half.records, cut.records[6:12]).startswith("2 of the 6 held-out images are")
    with pytest.raises(DataError, match="1 images cannot be split into 2 parts"):
        split(Annotations(cut.records[:4], ["tree"], [1]), [0.5, 0.5])
    with pytest.raises(DataError, match=r"the fractions \[0.5, 0.4\] of a split must be positive and sum to 1"):
        split(cut, [0.5, 0.4])


# ---- the embedded sample


def test_the_tree_sample_is_split_honestly() -> None:
    parts = tree_crowns()
    assert {name: p.summary() for name, p in parts.items()} == {
        "train": "19 images, 224 boxes of 1 classes, 61 ignored boxes",
        "validation": "7 images, 84 boxes of 1 classes, 19 ignored boxes",
        "test": "7 images, 68 boxes of 1 classes, 15 ignored boxes",
    }
    assert parts["train"].classes == ["Tree"]
    ids = [r.image_id for p in parts.values() for r in p.records]
    assert ids == list(range(1, 34))
    seen: dict[str, np.ndarray[Any, Any]] = {}
    for part in parts.values():
        for tile in part.records:
            assert tile.crop is not None
            x0, y0, x1, y1 = tile.crop
            canvas = seen.setdefault(tile.source.name, np.zeros((1035, 1249), int))
            canvas[y0:y1, x0:x1] += 1
    assert [int(c.max()) for c in seen.values()] == [1, 1, 1]
    assert sum(int(c.sum()) for c in seen.values()) == 1249 * 1035 + 2 * 400 * 400  # all of it is used
    assert all(shared_images(parts["train"].records, parts[name].records) == "" for name in ("validation", "test"))
    assert {part for _, part, _ in REGIONS} == set(parts)
    sample = DetectionDataset(parts["test"], held=True, ignored=True)[0]
    assert sample["images"].shape == (3, 207, 249)
    assert 0.1 < sample["images"].mean() < 0.9


def test_smaller_trees() -> None:
    parts = tree_crowns(128, overlap=32)
    assert max(max(r.size) for r in parts["train"].records) <= 128
    assert len(parts["train"]) > 60
