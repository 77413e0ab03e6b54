"""RecordIO of real MXNet (`data/`, made with 1.9.1), and files that are made here, whole and damaged."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from taskkd.errors import DataError
from taskkd.face import recordio
from taskkd.face.datasets import FaceDataset, TwoViews, collate
from taskkd.face.recordio import RecordFile, read_recordio, write_index
from taskkd.face.records import image_of
from tests.face.files import DATA, insight, labelled, png, rec_of, record

EXPECTED = json.loads((DATA / "expected.json").read_text())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A copy without caches, which are written beside."""
    for file in DATA.rglob("train.*"):
        if file.suffix in (".rec", ".idx"):
            copy = tmp_path / file.relative_to(DATA)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return tmp_path


def test_a_file_of_insightface(data: Path) -> None:
    faces, want = read_recordio(data / "insight"), EXPECTED["insight"]
    assert len(faces) == want["n_images"]
    assert faces.labels.tolist() == want["labels"]
    assert faces.identities == [str(n) for n in range(want["n_ids"])]
    assert [hashlib.sha1(source.read()).hexdigest() for source in faces.sources] == want["payload_sha1"]
    for number, mean in enumerate(want["rgb_mean_per_image"]):
        assert np.abs(image_of(faces, number).float().mean((1, 2)).numpy() - mean).max() <= 2
    file = RecordFile(data / "insight" / "train.rec")
    assert list(file.header(0).labels) == want["header0"] == [13, 17]
    assert len(file) == want["keys"]
    assert "mxnet" not in sys.modules


def test_a_file_of_im2rec_has_images_alone(data: Path) -> None:
    faces = read_recordio(data / "im2rec" / "train.rec")
    assert faces.labels.tolist() == EXPECTED["im2rec"]["labels"]
    assert image_of(faces, 5).dtype == torch.uint8
    first = RecordFile(data / "im2rec" / "train.rec").header(0)
    assert first.labels == (EXPECTED["im2rec"]["header0_label"],)


def test_payloads_that_hold_the_magic_number(data: Path) -> None:
    file = RecordFile(data / "multipart" / "train.rec")
    assert [file.payload(n).hex() for n in range(5)] == EXPECTED["multipart"]["payload_hex"]
    with pytest.raises(DataError, match=r"offset 56: the record has no image"):
        file.image(2)


def test_an_index_is_parsed_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rec = data / "im2rec" / "train.rec"
    before = read_recordio(rec).labels
    assert rec.with_name("train.idx.npy").is_file()
    assert rec.with_name("train.labels.npy").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(recordio, "_parsed", None)
        patch.setattr(recordio, "_scanned", None)
        assert (read_recordio(rec).labels == before).all()
    rec.with_name("train.idx.npy").write_bytes(b"damaged")
    assert (read_recordio(rec).labels == before).all()


def test_a_changed_index_is_parsed_anew(tmp_path: Path) -> None:
    rec = rec_of(tmp_path, [labelled(3.0, png(0)), labelled(4.0, png(1))])
    assert len(read_recordio(rec)) == 2
    rec_of(tmp_path, [labelled(float(n), png(n)) for n in (3, 4, 9)])
    assert read_recordio(rec).identities == ["3", "4", "9"]


def test_a_folder_that_cannot_be_written_to_is_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(np, "save", refuse)
    assert len(read_recordio(data / "insight")) == 12


def test_any_worker_and_thread_reads(data: Path) -> None:
    faces = read_recordio(data / "insight")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: hashlib.sha1(faces.sources[n % 12].read()).hexdigest(), range(240)))
    assert found == EXPECTED["insight"]["payload_sha1"] * 20
    views = TwoViews(FaceDataset(faces))
    (batch,) = DataLoader(views, batch_size=24, num_workers=1, collate_fn=collate)
    assert batch["labels"].tolist() == [label for label in EXPECTED["insight"]["labels"] for _ in range(2)]
    again = pickle.loads(pickle.dumps(faces))
    assert again.sources[3].read() == faces.sources[3].read()


def test_ranges_that_do_not_tell_the_labels_are_not_believed(tmp_path: Path) -> None:
    rec = rec_of(tmp_path / "b", insight([5, 5, 2, 2], [(1, 4), (4, 5)]))
    faces = read_recordio(rec)
    assert faces.labels.tolist() == [1, 1, 0, 0]
    assert faces.identities == ["2", "5"]
    rec = rec_of(tmp_path / "c", insight([5, 5, 2], [(1, 3)]))  # an image in no range
    assert read_recordio(rec).labels.tolist() == [1, 1, 0]
    rec = rec_of(tmp_path / "d", insight([5, 5, 2], []))
    assert read_recordio(rec).labels.tolist() == [1, 1, 0]
    for number in (1e30, math.inf, math.nan):  # a damaged header
        rec = rec_of(tmp_path / str(number), insight([5, 5, 2], [(1, 3), (3, number)]))
        assert read_recordio(rec).labels.tolist() == [1, 1, 0]


def test_labels_that_are_rounded_in_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2^24 images on an f32 does not say how many there are; the records do."""
    monkeypatch.setattr(recordio, "EXACT", 4)
    payloads = insight([0, 0, 0, 1, 1, 1])
    payloads[0] = labelled([9.0, 9.0])
    assert read_recordio(rec_of(tmp_path, payloads)).labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_records_of_several_labels_and_unordered_keys(tmp_path: Path) -> None:
    payloads = [labelled([float(n), 7.0, 8.0], png(n)) for n in range(3)]
    faces = read_recordio(rec_of(tmp_path, payloads, keys=[4, 0, 2]))
    assert faces.labels.tolist() == [1, 2, 0]
    assert [source.read() for source in faces.sources] == [png(1), png(2), png(0)]
    wide = labelled([3.0] * 40, png(0))
    assert read_recordio(rec_of(tmp_path / "wide", [wide])).identities == ["3"]


def test_images_without_identity(tmp_path: Path) -> None:
    faces = read_recordio(rec_of(tmp_path, [labelled(-1.0, png(0)), labelled(8.0, png(1))]))
    assert faces.labels.tolist() == [-1, 0]


@pytest.mark.parametrize("label", [0.5, float("nan"), float("inf"), 1e30])
def test_a_label_that_is_no_whole_number(tmp_path: Path, label: float) -> None:
    rec = rec_of(tmp_path, [labelled(0.0, png(0)), labelled(label, png(1))])
    with pytest.raises(DataError, match=r"train.rec, key 1: the label is .*, expected a whole number"):
        read_recordio(rec)


def test_bad_images_are_left_out_and_counted(tmp_path: Path) -> None:
    rec = rec_of(tmp_path, [labelled(0.0, png(0)), labelled(1.0, b"no image"), labelled(2.0), labelled(3.0, png(1))])
    with pytest.raises(DataError, match=r"key 1 .image id 1.: the image cannot be read"):
        image_of(read_recordio(rec), 1)
    faces = read_recordio(rec, bad="skip")
    assert faces.labels.tolist() == [0, 1]
    assert faces.identities == ["0", "3"]
    assert "2 bad images left out" in faces.notes[0]


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected train.rec, or one .rec file; there is none"):
        read_recordio(tmp_path)
    with pytest.raises(DataError, match=r"train.rec: no such file"):
        read_recordio(tmp_path / "train.rec")
    rec = rec_of(tmp_path, insight([0, 0, 1]))
    index = rec.with_suffix(".idx")
    want = index.read_text()
    with pytest.raises(DataError, match="there is an index already"):
        write_index(rec)
    index.unlink()
    with pytest.raises(DataError, match=r"train.idx: no such file; `taskkd.face.recordio.write_index"):
        read_recordio(tmp_path)
    assert write_index(rec).read_text() == want
    assert read_recordio(tmp_path).labels.tolist() == [0, 0, 1]


def test_an_index_of_multipart_records_can_be_made(data: Path) -> None:
    rec = data / "multipart" / "train.rec"
    want = rec.with_suffix(".idx").read_text()
    rec.with_suffix(".idx").unlink()
    assert write_index(rec).read_text() == want


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", r"train.idx: the index is empty"),
        ("0\t0\nx\t8\n", r"train.idx, line 2: 'x\\t8': expected a key and an offset"),
        ("0\t0\n1\n", r"train.idx, line 2: '1': expected"),
        ("0\t0\n0\t0\n", r"train.idx: key 0 is there twice"),
        ("0\t0\n1\t12\n", r"train.rec, offset 12: no record starts here"),
        ("0\t0\n1\t99999\n", r"train.rec, offset 99999: no record, the file ends at"),
    ],
)
def test_a_bad_index(tmp_path: Path, content: str, sentence: str) -> None:
    rec = rec_of(tmp_path, [labelled(0.0, png(0))])
    rec.with_suffix(".idx").write_text(content)
    with pytest.raises(DataError, match=sentence):
        read_recordio(rec)


def test_a_file_that_is_cut_off_or_foreign(tmp_path: Path) -> None:
    rec = rec_of(tmp_path, [labelled(0.0, png(0)), labelled(1.0, png(1))])
    whole = rec.read_bytes()
    rec.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"offset \d+: a record of \d+ bytes is cut off, the file ends at"):
        read_recordio(rec)
    rec.write_bytes(b"PK\3\4" + whole[4:])
    with pytest.raises(DataError, match="offset 0: no record starts here; the file is damaged or no RecordIO"):
        read_recordio(rec)
    rec.write_bytes(b"")
    with pytest.raises(DataError, match="the file ends at 0"):
        read_recordio(rec)
    rec.with_suffix(".idx").unlink()
    rec.write_bytes(whole[:-20])
    with pytest.raises(DataError, match="cut off"):
        write_index(rec)


def test_a_part_without_its_end(tmp_path: Path) -> None:
    rec = rec_of(tmp_path, [labelled(0.0, png(0))])
    first = record(b"abcd")
    rec.write_bytes(first[:7] + bytes([first[7] | 0x20]) + first[8:] + record(b"efgh"))
    with pytest.raises(DataError, match="offset 12: no record goes on here"):
        read_recordio(rec)


def test_a_header_that_does_not_fit_the_index(tmp_path: Path) -> None:
    payloads = insight([0, 0, 1])
    payloads[0] = labelled([9.0, 11.0])
    with pytest.raises(DataError, match=r"its first record says that there are 8 images, the index has 5"):
        read_recordio(rec_of(tmp_path, payloads))
