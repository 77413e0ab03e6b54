"""Segmentation data: what the readers give, what they refuse, and what becomes of it in a batch."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.utils.data import DataLoader

from taskkd.errors import DataError
from taskkd.images import in_file
from taskkd.segmentation.data import SegmentationData, load
from taskkd.segmentation.datasets import SegmentationDataset, WithUnlabelled, collate
from taskkd.segmentation.labels import ADE20K, CAMVID, CITYSCAPES, VOC, Labels, labels_of
from taskkd.segmentation.nuclei import REGIONS, nuclei, three_classes
from taskkd.segmentation.readers import (
    read_ade20k,
    read_camvid,
    read_cityscapes,
    read_folder,
    read_hub,
    read_images,
    read_voc,
)
from taskkd.segmentation.records import decoded, tiles
from taskkd.segmentation.schema import Data
from taskkd.splits import shared_images

WIDTH, HEIGHT = 12, 10
Pixels = np.ndarray[Any, Any]


def picture(seed: int, *shape: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 255, shape or (HEIGHT, WIDTH, 3), np.uint8)


def mask(*values: int, dtype: Any = np.uint8) -> Pixels:
    """Each value in as many columns, from the left."""
    return np.repeat(np.array(values, dtype).reshape(1, -1), HEIGHT, 0).repeat(WIDTH // len(values), 1)


def put(path: Path, array: Pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def folder(root: Path, count: int = 3, *values: int) -> Path:
    for number in range(count):
        put(root / "images" / f"{number}.png", picture(number))
        put(root / "masks" / f"{number}.png", mask(*(values or (0, 1, 255))))
    return root


def labels_in(path: Path, labels: Labels) -> list[int]:
    found: list[int] = labels.decode(in_file(path))[0].tolist()
    return list(dict.fromkeys(found))


# ---- labels


def test_codings_of_the_benchmarks(tmp_path: Path) -> None:
    assert [len(c.classes) for c in (CITYSCAPES, ADE20K, VOC, CAMVID)] == [19, 150, 21, 11]
    assert len(set(ADE20K.classes)) == 150
    path = put(tmp_path / "m.png", mask(7, 8, 11, 33, 0, 255))
    assert labels_in(path, CITYSCAPES) == [0, 1, 2, 18, 255]
    assert labels_in(put(tmp_path / "m.png", mask(0, 1, 150)), ADE20K) == [255, 0, 149]
    assert labels_in(put(tmp_path / "m.png", mask(0, 20, 255)), VOC) == [0, 20, 255]
    assert labels_in(put(tmp_path / "m.png", mask(0, 10, 11)), CAMVID) == [0, 10, 255]
    with pytest.raises(DataError, match=r"m\.png: the value 40 at x 6, y 0 \(and 59 more unknown pixels\) is neither"):
        labels_in(put(tmp_path / "m.png", mask(7, 40)), CITYSCAPES)


def test_values_names_and_colours(tmp_path: Path) -> None:
    binary = labels_of({0: "background", "255": "nucleus"})  # 255 is a class where it is said to be one
    assert labels_in(put(tmp_path / "m.png", mask(0, 255)), binary) == [0, 1]
    joined = labels_of({3: "thing", 1: "stuff", 2: "thing"}, ignore=[9])
    assert joined.classes == ("thing", "stuff")
    assert labels_in(put(tmp_path / "m.png", mask(1, 2, 3, 9)), joined) == [1, 0, 255]
    signed = put(tmp_path / "m.tif", mask(-1, 1, dtype=np.int32))
    assert labels_in(signed, labels_of(["a", "b"])) == [255, 1]
    coloured = np.zeros((2, 3, 3), np.uint8)
    coloured[:, 1] = (128, 64, 128)
    path = put(tmp_path / "c.png", coloured)
    assert labels_in(path, labels_of({"#804080": "road"}, ignore=["#000000"])) == [255, 0]
    with pytest.raises(DataError, match=r"c\.png: the colour #000000 at x 0, y 0"):
        labels_in(path, labels_of({"#804080": "road"}))
    with pytest.raises(DataError, match=r"c\.png: the mask has colours, but classes are given by number"):
        labels_in(path, labels_of(["road"]))


def test_masks_with_a_palette_are_numbers_or_colours(tmp_path: Path) -> None:
    image = Image.fromarray(mask(0, 1), mode="P")
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "p.png")
    assert labels_in(tmp_path / "p.png", labels_of(["a", "b"])) == [0, 1]
    assert labels_in(tmp_path / "p.png", labels_of({"#0a141e": "b", "#000000": "a"})) == [1, 0]


@pytest.mark.parametrize(
    ("classes", "ignore", "message"),
    [
        ("cityscape", (), "no coding of classes 'cityscape'"),
        (["a"], (0,), "0 is a class and ignored"),
        ({"#000000": "a", 1: "b"}, (), "all numbers or all colours"),
        ({"red": "a"}, (), "'red' is neither a value of a mask nor a colour"),
        ([], (), "there is a class"),
    ],
)
def test_classes_that_are_refused(classes: Any, ignore: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        labels_of(classes, ignore)


# ---- readers


def test_folder(tmp_path: Path) -> None:
    folder(tmp_path)
    put(tmp_path / "images" / "more" / "x.jpg", picture(9))
    put(tmp_path / "masks" / "more" / "x.tif", mask(1, 0))
    found = read_folder(tmp_path / "images", tmp_path / "masks", classes=["a", "b"])
    assert [Path(r.source.name).name for r in found.records] == ["0.png", "1.png", "2.png", "x.jpg"]
    image, labels = decoded(found.records[0])
    assert torch.equal(image, torch.from_numpy(picture(0)).permute(2, 0, 1))
    assert labels.unique().tolist() == [0, 1, 255]
    assert decoded(found.records[3])[1][0].tolist() == [1] * 6 + [0] * 6
    sample = SegmentationDataset(found)[0]
    assert sample["images"].dtype == torch.float32
    assert sample["labels"].dtype == torch.int64
    assert pickle.loads(pickle.dumps(SegmentationDataset(found)))[3]["id"] == 4


def broken(root: Path, fault: str) -> str:
    """Break the second of three; what the error says."""
    image, own = root / "images" / "1.png", root / "masks" / "1.png"
    if fault == "missing":
        own.unlink()
        return f"{image}: its mask {own} is missing"
    if fault == "size":
        put(own, mask(0, 1)[:4])
        return f"{own}: the mask has 12x4 pixels, its image {image} has 12x10"
    if fault == "value":
        put(own, mask(0, 7, 1))
        return f"{own}: the value 7 at x 4, y 0"
    if fault == "image":
        image.write_bytes(image.read_bytes()[:60])
        return f"{image} (image id 2): the image cannot be read"
    own.write_text("no image")
    return f"{own}: the mask cannot be read: it is no image that Pillow knows"


@pytest.mark.parametrize("fault", ["missing", "size", "value", "image", "mask"])
def test_what_is_wrong_is_named_or_left_out(tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    sentence = broken(folder(tmp_path), fault)
    paths, classes = (tmp_path / "images", tmp_path / "masks"), ["a", "b"]
    with pytest.raises(DataError) as caught:
        _ = SegmentationDataset(read_folder(*paths, classes=classes))[1]
    assert str(caught.value).startswith(sentence)
    with caplog.at_level(logging.WARNING):
        found = read_folder(*paths, classes=classes, bad="skip")
    assert [Path(r.source.name).stem for r in found.records] == ["0", "2"]
    assert found.notes[0].startswith(f"{paths[0]}: 1 bad images left out; the first: {sentence}")
    assert found.notes[0] in caplog.text


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="there are no images"):
        read_folder(tmp_path / "images", None)
    with pytest.raises(DataError, match=r"masks: no such folder\."):
        read_folder(tmp_path / "images", tmp_path / "masks", classes=["a"])
    broken(folder(tmp_path, 2), "size")
    (tmp_path / "masks" / "0.png").unlink()
    with pytest.raises(DataError, match="none of the 1 images can be used"):
        read_folder(tmp_path / "images", tmp_path / "masks", classes=["a", "b"], bad="skip")


def test_cityscapes(tmp_path: Path) -> None:
    for city in ("ulm", "bonn"):
        put(tmp_path / f"leftImg8bit/train/{city}/{city}_0_leftImg8bit.png", picture(1))
        put(tmp_path / f"gtFine/train/{city}/{city}_0_gtFine_labelIds.png", mask(7, 26, 3))
        put(tmp_path / f"gtFine/train/{city}/{city}_0_gtFine_color.png", picture(2))
    put(tmp_path / "leftImg8bit/train_extra/ulm/ulm_1_leftImg8bit.png", picture(3))
    found = read_cityscapes(tmp_path)
    assert [Path(r.source.name).parent.name for r in found.records] == ["bonn", "ulm"]
    assert decoded(found.records[0])[1].unique().tolist() == [0, 13, 255]
    assert found.classes[13] == "car"
    assert read_cityscapes(tmp_path, "train_extra", labelled=False).records[0].mask is None
    with pytest.raises(DataError, match=r"leftImg8bit: no folder trian.*; it has train, train_extra\."):
        read_cityscapes(tmp_path, "trian")
    with pytest.raises(DataError, match=r"ulm_1_gtFine_labelIds\.png is missing"):
        read_cityscapes(tmp_path, "train_extra")


def test_ade20k(tmp_path: Path) -> None:
    put(tmp_path / "images/training/ADE_train_00000001.jpg", picture(1))
    put(tmp_path / "annotations/training/ADE_train_00000001.png", mask(0, 1, 150))
    found = read_ade20k(tmp_path)
    assert decoded(found.records[0])[1].unique().tolist() == [0, 149, 255]
    assert (found.classes[0], found.classes[149]) == ("wall", "flag")


def test_voc(tmp_path: Path) -> None:
    for name in ("2007_000032", "2008_000002"):
        put(tmp_path / f"JPEGImages/{name}.jpg", picture(1))
        put(tmp_path / f"SegmentationClassAug/{name}.png", mask(0, 15))
    image = Image.fromarray(mask(0, 20, 255), mode="P")
    image.putpalette(list(range(256)) * 3)
    (tmp_path / "SegmentationClass").mkdir()
    image.save(tmp_path / "SegmentationClass/2007_000032.png")
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "train_aug.txt").write_text(
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n2008_000002\n"
    )
    assert decoded(read_voc(tmp_path).records[0])[1].unique().tolist() == [0, 20, 255]
    own = read_voc(tmp_path, "train_aug")
    assert [decoded(r)[1].unique().tolist() for r in own.records] == [[0, 15], [0, 15]]
    with pytest.raises(DataError, match=r"2008_000002\.png is missing"):
        read_voc(tmp_path, "train_aug", masks="SegmentationClass")
    with pytest.raises(DataError, match=r"no list val\.txt.*; it has train, train_aug\."):
        read_voc(tmp_path, "val")


def test_camvid(tmp_path: Path) -> None:
    put(tmp_path / "val/a.png", picture(1))
    put(tmp_path / "valannot/a.png", mask(0, 10, 11))
    assert decoded(read_camvid(tmp_path, "val").records[0])[1].unique().tolist() == [0, 10, 255]


def test_hub() -> None:
    import datasets

    rows = {
        "image": [Image.fromarray(picture(n)) for n in range(3)],
        "annotation": [Image.fromarray(mask(0, 1, 2)) for _ in range(3)],
        "scene": ["a", "b", "c"],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table = table.cast_column("annotation", datasets.Image())
    found = read_hub(table, classes="ade20k")
    assert decoded(found.records[1])[1].unique().tolist() == [0, 1, 255]
    assert len({r.side for r in found.records}) == 3
    assert read_hub(table, annotation=None).records[0].mask is None
    with pytest.raises(DataError, match="no column 'mask'"):
        read_hub(table, annotation="mask", classes=["a"])
    with pytest.raises(DataError, match="column 'scene' holds"):
        read_hub(table, annotation="scene", classes=["a"])
    with pytest.raises(DataError, match="column annotation, row 0: the value 2 at x 8, y 0"):
        _ = SegmentationDataset(read_hub(table, classes=["a", "b"]))[0]


# ---- the sample, tiles


def test_three_classes() -> None:
    instances = np.zeros((9, 12), np.uint16)
    instances[2:8, 1:6], instances[2:8, 6:11] = 5, 9  # two nuclei that touch
    found = three_classes(instances)
    assert found[4].tolist() == [2, 2, 1, 1, 1, 2, 2, 1, 1, 1, 2, 2]  # the rims, and where they touch
    assert found[0].tolist() == [0] * 12
    assert found[1].tolist() == [2] * 12
    assert three_classes(instances, 2)[4].tolist() == [2, 2, 2, 1, 2, 2, 2, 2, 1, 2, 2, 2]


def test_nuclei() -> None:
    parts = nuclei()
    assert {name: len(part) for name, part in parts.items()} == {"train": 28, "validation": 1, "test": 1}
    seen = np.zeros((512, 512), int)
    for x0, y0, x1, y1 in REGIONS.values():
        seen[y0:y1, x0:x1] += 1
    assert (seen == 1).all()  # every pixel in one part
    for name, part in parts.items():
        x0, y0, x1, y1 = REGIONS[name]
        for record in part.records:
            assert record.crop is not None
            assert x0 <= record.crop[0] < record.crop[2] <= x1
            assert y0 <= record.crop[1] < record.crop[3] <= y1
    shares = [
        np.bincount(np.concatenate([s["labels"].ravel() for s in data]), minlength=3)
        for data in (SegmentationDataset(part, held=True) for part in parts.values())
    ]
    assert all((s / s.sum() > 0.05).all() and s.argmax() == 0 for s in shares)
    assert SegmentationDataset(parts["train"])[0]["images"].shape == (3, 128, 128)


def test_tiles(tmp_path: Path) -> None:
    found = read_folder(folder(tmp_path) / "images", tmp_path / "masks", classes=["a", "b"])
    cut = tiles(found.records, 6)
    assert [r.crop for r in cut[:4]] == [(0, 0, 6, 5), (6, 0, 12, 5), (0, 5, 6, 10), (6, 5, 12, 10)]
    assert [r.image_id for r in cut] == list(range(1, 13))
    again = SegmentationDataset(type(found)(cut, found.classes), held=True)
    assert torch.equal(again[3]["labels"], SegmentationDataset(found)[0]["labels"][5:, 6:])
    assert shared_images(cut, found.records).startswith("3 of the 3 held-out images")
    with pytest.raises(DataError, match="expected size >= 1 and 0 <= overlap < size"):
        tiles(found.records, 6, overlap=6)


# ---- what a recipe says


def recipe(**more: Any) -> SegmentationData:
    return load(Data.model_validate(more))


def test_a_recipe_holds_out_what_is_missing(tmp_path: Path) -> None:
    folder(tmp_path, 20)
    given = {"folder": {"train": str(tmp_path), "classes": ["a", "b"]}, "validation_size": 0.2, "test_size": 3}
    data = recipe(**given, train_size=10, hold=True)
    assert data.summary() == "train 10 images; validation 4 images; test 3 images; 2 classes (a, b)"
    names = [{r.source.name for r in data.annotations[p].records} for p in ("train", "validation", "test")]
    assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
    assert data.fingerprint() == recipe(**given, train_size=10).fingerprint()
    assert data.fingerprint() != recipe(**given, train_size=11).fingerprint()
    assert data.everything is data.train
    assert data.unlabelled is None
    assert len(data.first(data.test, 2)) == 2
    with pytest.raises(DataError, match=r"data\.test_size is 20, there are 20 images"):
        recipe(**{**given, "test_size": 20})


def test_parts_in_folders_of_their_own(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for number in range(3):
            put(tmp_path / "rgb" / part / f"{part}{number}.png", picture(number))
            put(tmp_path / "labels" / part / f"{part}{number}.png", mask(0, 1))
    own = {"train": str(tmp_path), "test": str(tmp_path), "classes": {0: "a", 1: "b"}}
    own |= {kind: {"train": f"{name}/train", "test": f"{name}/val"} for kind, name in (("images", "rgb"),)}
    own["masks"] = {"train": "labels/train", "test": "labels/val"}
    data = recipe(folder=own, validation_size=1)
    assert [len(p) for p in data.annotations.values()] == [2, 1, 3]
    own["masks"] = {"train": "labels/train"}
    with pytest.raises(DataError, match=r"data\.folder\.masks has no test; it has train\."):
        recipe(folder=own)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of folder, cityscapes, ade20k, voc, camvid, hub and sample must be given"),
        ({"sample": {}, "camvid": {"folder": "x"}}, "exactly one of"),
        ({"sample": {}, "unlabelled": {}}, "exactly one of folder, cityscapes, ade20k, voc, camvid and hub"),
        ({"sample": {}, "unlabelled": "x", "unlabelled_per_sample": 0}, "greater than or equal to 1"),
    ],
)
def test_sections_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Data.model_validate(given)


def test_masks_of_0_and_255_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path, 5, 0, 255)
    own = {"train": str(tmp_path), "classes": ["background", "nucleus"]}
    recipe(folder=own)
    assert "If 255 is a class, say so" in caplog.text
    caplog.clear()
    recipe(folder=own | {"classes": {0: "background", 255: "nucleus"}})
    assert "If 255" not in caplog.text


def test_evaluation_on_another_domain(tmp_path: Path) -> None:
    folder(tmp_path / "games", 4)
    folder(tmp_path / "streets", 10)
    streets = {"folder": {"train": str(tmp_path / "streets"), "classes": ["a", "b"]}}
    own = {"folder": {"train": str(tmp_path / "games"), "classes": ["a", "b"]}, "evaluation": streets}
    data = recipe(**own, unlabelled=streets)
    assert [len(p) for p in data.annotations.values()] == [4, 1, 1, 8]  # what is evaluated on is not distilled on
    assert "streets" in data.annotations["test"].records[0].source.name
    assert all(r.mask is None for r in data.annotations["unlabelled"].records)
    with pytest.raises(DataError, match=r"other classes than the training data, 2 and 2; the first that differs is 0"):
        recipe(**own | {"folder": {"train": str(tmp_path / "games"), "classes": ["b", "a"]}})


# ---- batches, the second stream


def streams(tmp_path: Path, count: int = 3, **more: Any) -> SegmentationData:
    folder(tmp_path / "labelled", 6)
    for number in range(count):
        put(tmp_path / "others" / f"{number}.jpg", picture(100 + number))
    own = {
        "folder": {"train": str(tmp_path / "labelled"), "classes": ["a", "b"]},
        "unlabelled": str(tmp_path / "others"),
    }
    return recipe(**own, **more)


def test_every_batch_has_its_share_of_unlabelled_images(tmp_path: Path) -> None:
    data = streams(tmp_path, unlabelled_per_sample=2)
    assert len(data.everything) == len(data.train) == 4
    batch = data.collator([data.everything[i] for i in range(2)])
    assert batch["images"].shape == (6, 3, HEIGHT, WIDTH)
    assert batch["unlabelled"].tolist() == [False, True, True] * 2
    assert (batch["labels"][batch["unlabelled"]] == 255).all()
    assert (batch["labels"][~batch["unlabelled"]] != 255).any()
    assert batch["valid"].all()
    train = {r.image_id for r in data.annotations["train"].records}
    assert not train & set(batch["id"][batch["unlabelled"]].tolist())
    assert data.collator([data.train[0]])["unlabelled"].tolist() == [False]
    assert len(data.unlabelled) == 3


def drawn(table: Any, workers: int = 0) -> list[Any]:
    loader = DataLoader(table, 2, collate_fn=collate, num_workers=workers, shuffle=False)
    return [(batch["id"].tolist(), float(batch["images"].sum())) for batch in loader]


def test_unlabelled_images_are_a_function_of_seed_epoch_and_sample(tmp_path: Path) -> None:
    data = streams(tmp_path, augment=[{"name": "ColorJitter", "brightness": 0.5}], hold=True)
    table = data.everything
    first = drawn(table)
    assert drawn(table, workers=2) == first
    table.set_epoch(1)
    second = drawn(table)
    assert second != first
    assert drawn(pickle.loads(pickle.dumps(table))) == second
    other = table.with_seed(7)
    assert drawn(other) != second
    table.set_epoch(0)
    assert drawn(table) == first
    assert isinstance(table, WithUnlabelled)


def test_each_unlabelled_image_comes_once_before_any_comes_again(tmp_path: Path) -> None:
    table = streams(tmp_path, 3).everything
    taken = []
    for epoch in range(3):
        table.set_epoch(epoch)
        taken += [table[i][1]["id"] for i in range(len(table))]
    assert len(taken) == 12
    assert all(len(set(taken[n : n + 3])) == 3 for n in range(0, 12, 3))
    assert taken[:3] != taken[3:6] or taken[:3] != taken[6:9]


def test_sizes_in_a_batch(tmp_path: Path) -> None:
    folder(tmp_path, 2)
    put(tmp_path / "images" / "wide.png", picture(5, 8, 30, 3))
    put(tmp_path / "masks" / "wide.png", np.zeros((8, 30), np.uint8))
    found = read_folder(tmp_path / "images", tmp_path / "masks", classes=["a", "b"])
    evaluated, trained = SegmentationDataset(found), SegmentationDataset(found, training=True)
    batch = collate([evaluated[1], evaluated[2]])
    assert [tuple(i.shape) for i in batch["images"]] == [(3, 10, 12), (3, 8, 30)]
    assert batch["labels"][1].shape == (8, 30)
    assert collate([evaluated[0], evaluated[1]])["images"].shape == (2, 3, 10, 12)
    same = collate([trained[0]])
    assert torch.equal(same["images"], collate([evaluated[0]])["images"])
    assert same["labels"].dtype == torch.int64
    with pytest.raises(DataError, match=r"30x8 \(\S+\), 12x10 .*end data\.augment with a transform to one size"):
        collate([trained[1], trained[2]])


def test_images_without_labels(tmp_path: Path) -> None:
    put(tmp_path / "a" / "x.jpg", picture(1))
    put(tmp_path / "b" / "deep" / "y.png", picture(2))
    found = read_images([tmp_path / "a", tmp_path / "b"])
    assert len(found) == 2
    assert (SegmentationDataset(found)[1]["labels"] == 255).all()
