"""Verification sets: .bin files of InsightFace, lists, pairs made of identities; and what a pickle must not do."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import taskkd.images
from taskkd.errors import DataError
from taskkd.face.pairs import Pairs, _triangle, make_pairs, read_bin, read_csv, read_lfw, read_pairs
from taskkd.face.readers import read_folder
from taskkd.images import in_memory
from tests.face.files import DATA, folder_of, png

EXPECTED = json.loads((DATA / "expected.json").read_text())["bin"]


@pytest.mark.parametrize("name", ["toy_p4", "toy_py2like", "toy_nparray"])
def test_a_bin_file(name: str) -> None:
    pairs = read_bin(DATA / f"{name}.bin")
    assert pairs.same.tolist() == EXPECTED["issame"]
    assert pairs.left.tolist() == list(range(0, 20, 2))
    assert pairs.right.tolist() == list(range(1, 20, 2))
    for number, mean in enumerate(EXPECTED["mean_rgb"]):
        image, mirrored = pairs.table[2 * number], pairs.table[2 * number + 1]
        assert image["images"].shape == (3, 112, 112)
        assert np.abs(image["images"].float().mean((1, 2)).numpy() - mean).max() <= 2
        assert (image["images"].flip(-1) == mirrored["images"]).all()
        assert (image["id"], mirrored["id"]) == (2 * number, 2 * number + 1)
        assert "labels" not in image
    assert pairs.summary() == "10 pairs (5 of one person) of 20 images"


def test_images_are_decoded_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file: (opened.append(1), real(file))[1])
    pairs = read_bin(DATA / "toy_p4.bin")
    assert len(pairs.table) == 40
    assert not opened
    assert pairs.table[7]["file"].endswith("toy_p4.bin, image 3")
    assert len(opened) == 1
    assert taskkd.images.decode(pairs.faces.sources[0], 0).shape == (3, 112, 112)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickles(tmp_path: Path, protocol: int) -> None:
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    kinds = [png(0), np.frombuffer(png(1), np.uint8), pixels, bytearray(png(2))]
    file = tmp_path / "x.bin"
    file.write_bytes(pickle.dumps((kinds, [np.bool_(True), 0]), protocol=protocol))
    pairs = read_bin(file)
    assert pairs.same.tolist() == [True, False]
    assert pairs.faces.sources[1].read() == png(1)
    assert (pairs.table[4]["images"].permute(1, 2, 0).numpy() == pixels).all()
    file.write_bytes(pickle.dumps((kinds, np.asarray([False, True])), protocol=protocol))
    assert read_bin(file).same.tolist() == [False, True]


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """Strings of bytes are its images."""
    content = b"\x80\x02]q\x00(T" + len(png(0)).to_bytes(4, "little") + png(0) + b"U\x03abce]q\x01\x88a\x86."
    (tmp_path / "x.bin").write_bytes(content)
    pairs = read_bin(tmp_path / "x.bin")
    assert pairs.faces.sources[0].read() == png(0)
    assert pairs.faces.sources[1].read() == b"abc"


class Calls:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("function", ["eval", "exec", "getattr", "__import__"])
def test_nothing_is_executed(tmp_path: Path, function: str, protocol: int) -> None:
    import builtins

    mark = tmp_path / "executed"
    call = Calls(getattr(builtins, function), f"__import__('pathlib').Path({str(mark)!r}).touch()")
    file = tmp_path / "x.bin"
    file.write_bytes(pickle.dumps(([call, b""], [True]), protocol=protocol))
    with pytest.raises(DataError, match=rf"x.bin: the file is refused: it names \w+.{function}, .* nothing of it was"):
        read_bin(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cposix\nsystem\n(S'true'\ntR.",
        b"(S'true'\niposix\nsystem\n.",  # INST
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n)R.",
        b"\x80\x04\x8c\x0bnumpy.core.multiarray\x94.",
        b"P1\n.",  # a persistent id
        b"c_codecs\nencode\n}S'__defaults__'\nNsb.",  # BUILD, to change a function
        b"c_codecs\nencode\nN}S'__code__'\nNs\x86b.",
        b"cnumpy\nndarray\n}S'fill'\nNsb.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"c_codecs.encode\n__call__\n.",
        b"\x80\x04\x8c\x07_codecs\x8c\x12encode.__globals__\x93.",
    ],
)
def test_other_doors_are_shut(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"x.bin: the file is (refused|damaged or no pickle of pairs)"):
        read_bin(tmp_path / "x.bin")
    read_bin(DATA / "toy_py2like.bin")  # and nothing has been changed


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([b"", b""], "expected a pickle of two lists"),
        (([], []), "0 images and 0 pairs"),
        (([b"", b"", b""], [True]), "3 images and 1 pairs: expected two images for each pair"),
        (([b"", 7], [True]), "image 1 is int, expected the bytes of an image file"),
        (([b"", np.zeros((4, 4), np.uint8)], [True]), r"image 1 is \(4, 4\), expected"),
        (([b"", b""], ["yes"]), "pair 0 is bytes|pair 0 is str"),
        (([b"", np.zeros(4)], [True]), "an array of 'f8'; images are arrays of u1"),
        (([b"", np.asarray([{}])], [True]), "an array of 'O8'"),
        ({"images": 1}, "expected a pickle of two lists"),
    ],
)
def test_other_contents(tmp_path: Path, content: Any, sentence: str) -> None:
    (tmp_path / "x.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=f"x.bin: .*({sentence})"):
        read_bin(tmp_path / "x.bin")


def test_damaged_bin_files(tmp_path: Path) -> None:
    whole = (DATA / "toy_p4.bin").read_bytes()
    for content in (whole[:-100], b"", b"PK\3\4", whole[:2], b"\x80\x09" + whole[2:]):
        (tmp_path / "x.bin").write_bytes(content)
        refusal = r"x.bin: the file is (damaged or no pickle of pairs|refused: it refers to objects)"
        with pytest.raises(DataError, match=refusal):
            read_bin(tmp_path / "x.bin")
    with pytest.raises(DataError, match=r"y.bin: no such file"):
        read_bin(tmp_path / "y.bin")
    (tmp_path / "x.bin").write_bytes(pickle.dumps(([b"no image", png(0)], [True])))
    with pytest.raises(DataError, match=r"x.bin, image 0 .* cannot be read"):
        read_bin(tmp_path / "x.bin").table[0]


def lfw(root: Path) -> Path:
    for name in ("Ada_L", "Bo"):
        (root / name).mkdir(parents=True)
        for number in (1, 2):
            (root / name / f"{name}_{number:04d}.png").write_bytes(png(number))
    return root


def test_lists_as_those_of_lfw(tmp_path: Path) -> None:
    lfw(tmp_path)
    (tmp_path / "pairs.txt").write_text("1\t2\nAda_L\t1\t2\nBo\t2\tAda_L\t1\n\n")
    pairs = read_pairs(tmp_path / "pairs.txt")
    assert pairs.same.tolist() == [True, False]
    assert [Path(pairs.faces.sources[n].name).name for n in pairs.left] == ["Ada_L_0001.png", "Bo_0002.png"]
    assert [Path(pairs.faces.sources[n].name).name for n in pairs.right] == ["Ada_L_0002.png", "Ada_L_0001.png"]
    assert len(pairs.faces) == 3
    (tmp_path / "pairs.txt").write_text("Ada_L 1 2\n")
    assert len(read_lfw(tmp_path / "pairs.txt", tmp_path)) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("10\t300\n", "there are no pairs"),
        ("1\nAda_L\t1\n", "line 2: 'Ada_L 1': expected 'name n1 n2'"),
        ("Ada_L\tx\t2\n", "line 1: 'Ada_L x 2': expected"),
        ("Ada_L\t1\tBo\tx\n", "expected 'name n1 n2' or 'name1 n1 name2 n2'"),
        ("Ada_L\t1\tBo\t3\n", "line 1: .*Bo_0003.jpg .* no such image"),
        ("Ada_L 1 2 Bo 3", "line 1"),
    ],
)
def test_bad_lists(tmp_path: Path, text: str, sentence: str) -> None:
    lfw(tmp_path)
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(DataError, match=f"pairs.txt.*{sentence}"):
        read_pairs(tmp_path / "pairs.txt")


def test_lists_of_paths(tmp_path: Path) -> None:
    lfw(tmp_path / "images")
    one, other, bo = "Ada_L/Ada_L_0001.png", "Ada_L/Ada_L_0002.png", "Bo/Bo_0001.png"
    file = tmp_path / "pairs.csv"
    file.write_text(f'left,right,same\n{one},"{other}",1\n{bo},{one},false\n')
    pairs = read_pairs(file, tmp_path / "images")
    assert pairs.same.tolist() == [True, False]
    assert (len(pairs.faces), pairs.right.tolist()) == (3, [1, 0])
    for text, sentence in (
        (f"{one},{other}\n", "line 1: .* expected two paths and 1 or 0"),
        (f"{one},{other},1\n{one},{bo},maybe\n", "line 2: .* expected two paths and 1 or 0"),
        (f"{one},nothing.png,1\n", r"line 1: .*nothing.png: no such image"),
        ("left,right,same\n", "there are no pairs"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=sentence):
            read_csv(file, tmp_path / "images")
    with pytest.raises(DataError, match=r"z.csv: no such file"):
        read_csv(tmp_path / "z.csv")
    with pytest.raises(DataError, match=r"pairs are read from .bin, .txt"):
        read_pairs(tmp_path / "z.json")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="the list cannot be read"):
        read_csv(file)


def test_pairs_that_are_none() -> None:
    images = [in_memory("a", png(0)), in_memory("b", png(1))]
    with pytest.raises(DataError, match="at least one pair"):
        Pairs(images, [], [], [])
    with pytest.raises(DataError, match=r"expected \(P,\) of each"):
        Pairs(images, [0], [1, 0], [True])
    with pytest.raises(DataError, match="pairs name images 0 to 2: there are images 0 to 1"):
        Pairs(images, [0], [2], [True])


def test_pairs_are_made_of_identities(tmp_path: Path) -> None:
    faces = read_folder(folder_of(tmp_path, {f"p{n}": 2 + n % 4 for n in range(12)}))
    pairs = make_pairs(faces, 40, seed=1, folds=5)
    people = pairs.faces.labels
    assert ((people[pairs.left] == people[pairs.right]) == pairs.same).all()
    assert pairs.same.reshape(5, 8).sum(1).tolist() == [4] * 5
    files = [face.source.name for face in pairs.faces]
    found = Counter(frozenset((files[a], files[b])) for a, b in zip(pairs.left, pairs.right, strict=True))
    assert max(found.values()) == 1
    assert all(len(names) == 2 for names in found)
    again = make_pairs(faces, 40, seed=1, folds=5)
    assert [files[n] for n in pairs.left] == [again.faces.sources[n].name for n in again.left]
    other = make_pairs(faces, 40, seed=2, folds=5)
    assert [files[n] for n in pairs.left] != [other.faces.sources[n].name for n in other.left]
    whole = make_pairs(faces, folds=3)
    assert len(whole) == 2 * (sum(n * (n - 1) // 2 for n in (2, 3, 4, 5)) * 3 // 3 * 3)


def test_pairs_that_cannot_be_made(tmp_path: Path) -> None:
    faces = read_folder(folder_of(tmp_path, {"a": 4, "b": 3}))
    with pytest.raises(DataError, match="50 pairs in 10 folds: expected a multiple of 20"):
        make_pairs(faces, 50)
    with pytest.raises(DataError, match=r"9 pairs of one person and 12 of two; 20 pairs in 10 balanced folds .* be 0"):
        make_pairs(faces)
    with pytest.raises(DataError, match=r"24 pairs in 2 balanced folds are wanted, there can be 16"):
        make_pairs(faces, 24, folds=2)
    with pytest.raises(DataError, match="there can be 0"):
        make_pairs(faces.select([0]), folds=1)  # one image


def test_numbered_pairs_are_all_pairs() -> None:
    want = [(a, b) for b in range(60) for a in range(b)]
    assert list(map(tuple, _triangle(np.arange(len(want))).tolist())) == want
    for b in (94_906_267, 2_000_000_000):  # where the root is rounded
        first = b * (b - 1) // 2
        assert _triangle(np.asarray([first - 1, first])).tolist() == [[b - 2, b - 1], [0, b]]
