import math
import re
from pathlib import Path

import pytest

from taskkd.errors import DataError
from taskkd.nlp import text
from tests import tiny


def rows(count: int) -> list[text.Row]:
    return [text.Row(f"text {i}", None, "a" if i % 2 else "b", f"row {i}") for i in range(count)]


def test_csv_tsv_jsonl_parquet_give_the_same_rows(tmp_path: Path) -> None:
    import datasets

    content = tiny.sentences(7)
    tiny.write_csv(tmp_path / "a.csv", content)
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in content))
    table = datasets.Dataset.from_list([{"text": t, "label": label} for t, label in content])
    table.to_json(tmp_path / "a.jsonl")
    table.to_parquet(tmp_path / "a.parquet")
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        found = text.read_rows(tmp_path / f"a.{suffix}", "text", "label")
        assert [(r.text, r.label) for r in found] == content, suffix


def test_a_byte_order_mark_and_quoted_line_breaks_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('\ufefftext,label\n"two\nlines, really",x\n'.encode())
    (found,) = text.read_rows(tmp_path / "a.csv", "text", "label")
    assert (found.text, found.label, found.where[-6:]) == ("two\nlines, really", "x", "line 3")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.csv",
            "text,lable\nx,1\n",
            r"a\.csv, line 2: no column 'label' \(did you mean 'lable'\?\); it has 'text', 'lable'",
        ),
        ("a.csv", "", r"a\.csv: the file has no rows"),
        ("a.csv", "text,label\n", r"a\.csv: the file has no rows"),
        ("a.csv", "text,label\nx,1,2\n", r"a\.csv, line 2: more fields than the header"),
        ("a.csv", "text,label\nx\n", r"line 2: column 'text' holds|label"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{oops\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1]\n", r"line 1: expected an object, got list"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', r"line 1: column 'text' holds 3, expected text"),
        ("a.parquet", "nonsense", r"a\.parquet: not a parquet file"),
        ("a.xlsx", "x", r"no reader for '\.xlsx' files"),
    ],
)
def test_bad_files_end_in_a_sentence(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    if content == "text,label\nx\n":  # a short line: the label is missing, the sample counts as unlabelled
        assert text.read_rows(tmp_path / name, "text", "label")[0].label is None
        return
    with pytest.raises(DataError, match=sentence):
        text.read_rows(tmp_path / name, "text", "label")


def test_a_missing_file_and_other_encodings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        text.read_rows(tmp_path / "none.csv", "text", "label")
    (tmp_path / "a.csv").write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 text"):
        text.read_rows(tmp_path / "a.csv", "text", "label")


def test_labels() -> None:
    names = text.label_names([text.Row("", None, v, "") for v in ("10", "9", "2", None, "")])
    assert names == ["2", "9", "10"]
    assert text.label_names(rows(3)) == ["a", "b"]
    assert text.encode_label(text.Row("", None, "9", ""), names) == 1
    assert text.encode_label(text.Row("", None, None, ""), names) == -100
    assert math.isnan(text.encode_label(text.Row("", None, None, ""), None))
    assert text.encode_label(text.Row("", None, "1.5", ""), None) == 1.5
    with pytest.raises(DataError, match=re.escape("f.csv, line 4: label '11' is not one of the 3 labels 2, 9, 10")):
        text.encode_label(text.Row("", None, "11", "f.csv, line 4"), names)
    with pytest.raises(DataError, match=r"line 4: label 'x' is not a finite number"):
        text.encode_label(text.Row("", None, "x", "line 4"), None)


def test_holdout_is_disjoint_complete_and_the_same_for_a_seed() -> None:
    first, second, rest = text.holdout(rows(20), [5, 3], seed=3)
    assert [len(first), len(second), len(rest)] == [5, 3, 12]
    assert {r.text for r in [*first, *second, *rest]} == {r.text for r in rows(20)}
    assert text.holdout(rows(20), [5, 3], seed=3)[0] == first
    assert text.holdout(rows(20), [5, 3], seed=4)[0] != first
    with pytest.raises(DataError, match="20 rows cannot be cut"):
        text.holdout(rows(20), [15, 6], seed=0)


def test_the_sentiment_sample_has_no_text_twice() -> None:
    movie = text.sentiment_rows(["movie"])
    assert 9_900 < len(movie) <= 10_072
    assert {r.label for r in movie} == {"positive", "negative"}
    assert len({text.same_text(r.text) for r in movie}) == len(movie)
    scores = text.sentiment_rows(["movie", "nyt"], label="score")
    assert len(scores) > len(movie)
    assert all(-4 <= float(r.label) <= 4 for r in scores if r.label is not None)
    with pytest.raises(DataError, match="no domain 'movies' \\(did you mean 'movie'"):
        text.sentiment_rows(["movies"])


def test_tokenized_pairs_ids_and_truncation() -> None:
    table = text.tokenized(
        [text.Row("the film", "was dull", "a", ""), text.Row("a " * 99, "plot", None, "")],
        tiny.tokenizer(), ["a", "b"], max_length=16, first_id=40,
    )  # fmt: skip
    assert table["id"] == [40, 41] if isinstance(table["id"], list) else list(table["id"]) == [40, 41]
    assert list(table["labels"]) == [0, -100]
    assert len(table[0]["input_ids"]) == 7
    assert len(table[1]["input_ids"]) == 16
    with pytest.raises(DataError, match="no rows"):
        text.tokenized([], tiny.tokenizer(), ["a"], max_length=8)


def test_a_hub_data_set_from_a_local_folder(tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "train.csv", tiny.sentences(9))
    found = text.hub_rows(str(tmp_path), None, "train", "text", "label")
    assert [(r.text, r.label) for r in found] == tiny.sentences(9)
    with pytest.raises(DataError, match="cannot be loaded"):
        text.hub_rows(str(tmp_path / "nothing"), None, "train", "text", "label")


def test_texts_on_both_sides_are_told() -> None:
    train, test = rows(5), rows(3)
    lines = text.shared_texts(text.Splits(train=train, validation=[text.Row("new", None, "a", "")], test=test))
    assert lines == ["3 of the 3 test texts are in the training data too; the figures may be too good."]
    assert (
        text.shared_texts(text.Splits(train=[text.Row("one", "two", "a", "")], test=[text.Row("one", "x", "a", "")]))
        == []
    )
