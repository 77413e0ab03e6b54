"""Whatever a data file holds, a reader gives data or a `DataError` with the file's name: nothing else, and in time."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from taskkd.detection import DetectionDataset
from taskkd.detection.coco import read_coco
from taskkd.detection.voc import read_voc
from taskkd.errors import DataError, RecipeError
from taskkd.face.pairs import read_pairs
from taskkd.face.readers import read_recordio
from taskkd.face.records import image_of
from taskkd.images import decode, header_size, in_file
from taskkd.nlp.answers import squad_questions
from taskkd.nlp.entities import column_sentences
from taskkd.nlp.kinds.questions import QUESTION_ANSWERING
from taskkd.nlp.kinds.tokens import TOKEN_CLASSIFICATION
from taskkd.nlp.text import encode_label, read_rows
from taskkd.nlp.word_vectors import WordVectors
from taskkd.segmentation.labels import labels_of
from taskkd.segmentation.readers import read_folder
from taskkd.segmentation.records import decoded
from tests.detection import coco_folder
from tests.face import people
from tests.face.files import insight, rec_of
from tests.nlp import people as text_people

#: (makes the files of a folder and gives the one that is changed; reads all that there is of it)
Case = tuple[Callable[[Path], Path], Callable[[Path], object]]


def _texts(suffix: str, content: str, *, label: str | None = "label") -> Case:
    def make(folder: Path) -> Path:
        path = folder / f"a{suffix}"
        path.write_text(content)
        return path

    def read(path: Path) -> object:
        return [(r, encode_label(r, None)) for r in read_rows(path, "text", label)]

    return make, read


def _parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a b", "c"], "label": [1.0, 2.0]}), folder / "a.parquet")
    return folder / "a.parquet"


def _squad(folder: Path) -> Path:
    return text_people.write_squad(folder / "a.json", text_people.facts(2))


def _read_squad(path: Path) -> object:
    kind = QUESTION_ANSWERING
    return read_rows(path, ("question", "context"), "answers", row=kind.row, readers={".json": squad_questions})


def _conll(folder: Path) -> Path:
    return text_people.write_conll(folder / "a.conll", text_people.facts(3))


def _read_conll(path: Path) -> object:
    return read_rows(path, "tokens", "tags", row=TOKEN_CLASSIFICATION.row, readers={".conll": column_sentences})


def _coco(folder: Path) -> Path:
    return coco_folder.write(folder / "coco", 3)


def _read_coco(path: Path) -> object:
    return list(DetectionDataset(read_coco(path)))


def _zipped(folder: Path) -> Path:
    found = coco_folder.write(folder / "coco", 2)
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(found.parent.iterdir()):
            archive.write(file, file.name)
    return folder / "a.zip"


def _voc(folder: Path) -> Path:
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(folder / "JPEGImages" / "one.png")
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("one\n")
    box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    (folder / "Annotations" / "one.xml").write_text(
        "<?xml version='1.0' encoding='utf-8'?>\n<annotation><filename>one.png</filename><size><width>20</width>"
        f"<height>10</height></size><object><name>cat</name><difficult>0</difficult>{box}</object></annotation>"
    )
    return folder / "Annotations" / "one.xml"


def _voc_list(folder: Path) -> Path:
    return _voc(folder).parent.parent / "ImageSets" / "Main" / "trainval.txt"


def _read_voc(path: Path) -> object:
    root = path.parent.parent if path.suffix == ".xml" else path.parents[2]
    return list(DetectionDataset(read_voc(root)))


def _image(mode: str, suffix: str) -> Case:
    def make(folder: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 3, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"a{suffix}")
        return folder / f"a{suffix}"

    return make, lambda path: (decode(in_file(path), 1), header_size(in_file(path), 1))


def _mask(folder: Path) -> Path:
    for part in ("images", "masks"):
        (folder / part).mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "a.png")
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(folder / "masks" / "a.png")
    return folder / "masks" / "a.png"


def _read_mask(path: Path) -> object:
    root = path.parent.parent
    found = read_folder(root / "images", root / "masks", classes=labels_of(["ground", "line"]))
    return [decoded(record) for record in found.records]


def _record_index(folder: Path) -> Path:
    return rec_of(folder, insight([0, 0, 1, 1])).with_suffix(".idx")


def _read_recordio(path: Path) -> object:
    faces = read_recordio(path.with_suffix(".rec"))
    return [image_of(faces, n) for n in range(len(faces))]


def _pairs(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        people.folder(folder, 3, 2)
        if name.endswith(".txt"):
            return people.lfw_list(folder / name, folder, 3) if not (folder / name).exists() else folder / name
        files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*.png"))
        (folder / name).write_text("left,right,same\n" + "".join(f"{a},{files[0]},1\n" for a in files[1:]))
        return folder / name

    return make


def _read_pairs(path: Path) -> object:
    pairs = read_pairs(path, path.parent)
    return [image_of(pairs.faces, n) for n in range(len(pairs.faces))]


def _vectors(folder: Path) -> Path:
    (folder / "a.txt").write_text("good 0.1 0.2\ngreat 0.1 0.3\nnew york 1 2\n")
    return folder / "a.txt"


def _description(folder: Path) -> Path:
    from taskkd.detection import models

    config = {"architecture": "retinanet", "backbone": "mobilenet_v3_small", "width": 8, "head_convs": 1}
    models.describe(models.build(config, ["a"])).save_pretrained(folder)
    return folder / "detector.json"


def _read_description(path: Path) -> object:
    from taskkd.detection.models import Description

    return Description.read(path.parent)


LINES = "".join(json.dumps({"text": t, "label": n}) + "\n" for n, t in enumerate(["a b", 'c "d"', "é\n"]))
READERS: dict[str, Case] = {
    "csv": _texts(".csv", 'text,label\n"a, b",1\nc,2.5\n"d ""e""",\n'),
    "tsv": _texts(".tsv", "text\tlabel\na b\t1\nc\t2\n"),
    "jsonl": _texts(".jsonl", LINES),
    "parquet": (_parquet, lambda path: read_rows(path, "text", "label")),
    "squad": (_squad, _read_squad),
    "conll": (_conll, _read_conll),
    "word vectors": (_vectors, WordVectors.read),
    "coco": (_coco, _read_coco),
    "coco zip": (_zipped, _read_coco),
    "voc xml": (_voc, _read_voc),
    "voc list": (_voc_list, _read_voc),
    "png": _image("RGB", ".png"),
    "jpeg": _image("CMYK", ".jpg"),
    "tiff": _image("L", ".tif"),
    "mask": (_mask, _read_mask),
    "rec": (lambda folder: rec_of(folder, insight([0, 0, 1, 1])), _read_recordio),
    "idx": (_record_index, _read_recordio),
    "bin": (lambda folder: people.bin_file(folder / "lfw.bin", folds=2), _read_pairs),
    "pairs.txt": (_pairs("pairs.txt"), _read_pairs),
    "pairs.csv": (_pairs("pairs.csv"), _read_pairs),
    "detector.json": (_description, _read_description),
}
JUNK = [b"", b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x80", b"1e999", b"-1", b"9" * 30, b"null", b'"', b"[", b"{", b"<",
        b"&a;", b"\n", b",", b"\t", b"../", b"NaN", b"\xc2\xb2", b"\\ud800", b"\xe2\x80\xa8"]  # fmt: skip


def mutated(content: bytes, seed: int) -> bytes:
    """The same cut off, or with bytes flipped, removed, doubled, or replaced by what readers may trip over."""
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content) + 1)
        kind = draw.randrange(5)
        if kind == 0:
            content = content[:at]
        elif kind == 1 and content:
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        elif kind == 2:
            content = content[:at] + content[at + draw.randint(1, 20) :]
        elif kind == 3:
            content = content[:at] + content[at : at + 40] + content[at:]
        else:
            content = content[:at] + draw.choice(JUNK) + content[at + draw.choice([0, 1, 4, 8]) :]
    return content


@contextlib.contextmanager
def made(name: str) -> Iterator[tuple[Path, Callable[[Path], object]]]:
    make, read = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        yield make(Path(folder)), read


def attempt(path: Path, read: Callable[[Path], object]) -> None:
    """Read; what a reader keeps beside a file for the next time is forgotten."""
    try:
        read(path)
    except (DataError, RecipeError) as error:
        assert isinstance(error, DataError) or path.name == "detector.json"  # noqa: PT017
        names = (path.name, path.stem, str(path.parent), "image")
        assert any(n in str(error) for n in names), error  # noqa: PT017
    finally:
        for kept in path.parent.glob("*.npy"):
            kept.unlink()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "examples"), [(n, 25) for n in READERS] + [pytest.param(n, 1500, marks=pytest.mark.slow) for n in READERS]
)
def test_data_or_a_sentence(name: str, examples: int) -> None:
    with made(name) as (path, read):
        content = path.read_bytes()
        read(path)  # as it is, it can be read

        @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(st.integers(0, 2**48))
        def check(seed: int) -> None:
            path.write_bytes(mutated(content, seed))
            attempt(path, read)

        check()


# ---- values that JSON can hold and COCO should not

VALUES: list[Any] = [
    None, True, -1, 0, 10**400, -(10**400), 2**63, float("nan"), float("inf"), 1e308, "", "a", "\ud800", [], [1], {},
    {"a": 1}, [[0, 0, 5, 5]], ["x"] * 4, [10**400] * 4, [None] * 4, [1e308, 0, 1e308, 1],
]  # fmt: skip


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_any_value_of_coco(key: str, tmp_path: Path) -> None:
    path = coco_folder.write(tmp_path, 2)
    whole = json.loads(path.read_text())
    for own in whole[key][0]:
        for value in VALUES:
            content = json.loads(json.dumps(whole))
            content[key][0][own] = value
            path.write_text(json.dumps(content))
            attempt(path, _read_coco)
    for value in VALUES:
        path.write_text(json.dumps({**whole, key: [value]}))
        attempt(path, _read_coco)


@pytest.mark.parametrize("value", VALUES, ids=lambda v: repr(v)[:20])
def test_any_value_of_a_line(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for entry in ({"text": value, "label": 1}, {"text": "a", "label": value}, value):
        path.write_text(json.dumps(entry))
        attempt(path, READERS["jsonl"][1])


def test_any_value_of_a_bin(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    picture = people.encoded(people.images(1, 1)[0][0])
    good = ([picture, picture], [True])
    for value in [
        *VALUES,
        b"",
        np.zeros(3),
        np.array(["a"]),
        np.zeros((2, 2, 3), np.uint8),
        {1},
        1j,
        (1, 2),
        bytearray(3),
    ]:
        for content in (value, (value, [True]), ([picture, value], [True]), (good[0], value), (good[0], [value])):
            for protocol in (2, 4, 5):
                file = io.BytesIO()
                pickle.Pickler(file, protocol).dump(content)
                path.write_bytes(file.getvalue())
                attempt(path, _read_pairs)
