import json
import logging
from pathlib import Path

import pytest
import torch

from taskkd.errors import DataError
from taskkd.nlp import text
from taskkd.nlp.entities import Tags, entities, has_entities
from taskkd.nlp.kinds import Encoding
from taskkd.nlp.kinds.tokens import TOKEN_CLASSIFICATION as KIND
from tests.nlp import people

NEWS = Path(__file__).parent / "files" / "news.conll"


def read(path: Path, column: str = "tokens", label: str | None = "tags") -> list[text.Row]:
    return text.read_rows(path, column, label, row=KIND.row, readers=KIND.readers)


def test_a_conll_file() -> None:
    first, second = read(NEWS)
    assert first.words[:2] == ("Maria", "Alvarez")
    assert first.label[:2] == ["B-PER", "I-PER"]
    assert first.where.endswith("news.conll, line 3")
    assert second.words[5] == "#"  # a word, not a comment
    assert KIND.names([first, second], None) == ["O", "B-LOC", "B-ORG", "B-PER", "I-LOC", "I-ORG", "I-PER"]
    assert read(NEWS, label="1")[0].label[:3] == ["NNP", "NNP", "VBD"]
    assert read(NEWS, label=None)[0].label is None


def test_comments_and_other_columns_in_a_conll_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("# id 1 source=web\n# O\nb O\n\n# id 2 source=web\nc O\n")
    assert [row.words for row in read(path)] == [("#", "b"), ("c",)]
    path.write_text("a O\nb\n")
    with pytest.raises(DataError, match=r"a\.txt, line 2: 1 columns, the lines before have 2"):
        read(path)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "line 1: 2 words and 1 tags"),
        ({"tokens": ["a"], "tag": ["O"]}, r"line 1: no column 'tags' \(did you mean 'tag'\?\)"),
        ({"tokens": [], "tags": []}, "expected a list of words"),
        ({"tokens": [1], "tags": ["O"]}, "expected a list of words"),
        ({"tokens": "['a', 'b']", "tags": "['O', 'O']"}, "a list written as text"),
        ({"tokens": 3, "tags": ["O"]}, "holds 3, expected a list"),
    ],
)
def test_malformed_rows_are_a_sentence(tmp_path: Path, entry: dict[str, object], sentence: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(entry))
    with pytest.raises(DataError, match=sentence):
        read(tmp_path / "a.jsonl")


def test_words_and_tags_as_text() -> None:
    row = KIND.row({"tokens": "anna works", "tags": "B-PER O"}, "tokens", "tags", "")
    assert (row.words, row.label) == (("anna", "works"), ["B-PER", "O"])


def test_a_hub_data_set_of_class_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    tags = datasets.List(datasets.ClassLabel(names=["O", "B-PER"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "tags": tags})
    table = datasets.Dataset.from_dict({"tokens": [["anna", "works"]], "tags": [[1, 0]]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    assert text.hub_rows("news", None, "train", "tokens", "tags", row=KIND.row)[0].label == ["B-PER", "O"]


def test_the_first_piece_of_a_word_has_its_label() -> None:
    row = text.Row("", None, ["B-PER", "I-PER", "O"], "", ("Anna", "Lindgren", "zoo"))
    free = text.Row("", None, None, "", row.words)
    table = KIND.encode([row, free], people.tokenizer(), people.TAGS, Encoding(32), first_id=5)
    assert list(table["id"]) == [5, 6]
    # [CLS] anna lind ##gren z ##o ##o [SEP]
    assert table[0]["labels"] == [-100, 2, 3, -100, 0, -100, -100, -100]
    assert table[0]["word_mask"] == table[1]["word_mask"] == [0, 1, 1, 0, 1, 0, 0, 0]
    assert table[1]["labels"] == [-100] * 8
    batch = KIND.collator(people.tokenizer())([table[0], {**table[1], "labels": [-100], "word_mask": [0]}])
    assert batch["labels"][1].tolist() == [-100] * 8
    assert batch["word_mask"][1].tolist() == [0] * 8


def test_an_unknown_tag_is_named() -> None:
    row = text.Row("", None, ["O", "B-PRE"], "f.conll, line 7", ("in", "anna"))
    with pytest.raises(DataError, match=r"f\.conll, line 7: tag 'B-PRE' of word 2, 'anna', is not one of the 4 tags"):
        KIND.encode([row], people.tokenizer(), people.TAGS, Encoding(32))


def test_words_that_are_cut_off_are_told(caplog: pytest.LogCaptureFixture) -> None:
    rows = [text.Row("", None, ["O"] * n, f"line {n}", ("in",) * n) for n in (3, 9, 8)]
    with caplog.at_level(logging.WARNING):
        KIND.encode(rows, people.tokenizer(), people.TAGS, Encoding(8))
    (record,) = caplog.records
    assert "5 words of 2 sentences are beyond 8 tokens" in record.getMessage()
    assert "3, are lost at line 9" in record.getMessage()


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("I-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),  # IOB1
        ("B-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("S-PER B-LOC E-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3), ("LOC", 3, 4)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def logits(labels: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(people.TAGS))[labels.clamp(min=0)]


def test_f1_by_hand_and_from_two_processes() -> None:
    true = torch.tensor([[-100, 2, 3, 0, 1, -100], [-100, 1, 0, -100, -100, -100]])
    guess = torch.tensor([[1, 2, 3, 0, 0, 2], [0, 1, 1, 2, 2, 2]])  # what stands where the label is -100 counts nothing
    whole, parts = Tags(people.TAGS), [Tags(people.TAGS), Tags(people.TAGS)]
    whole.update({"logits": logits(guess)}, {"labels": true})
    for i, part in enumerate(parts):
        part.update({"logits": logits(guess[i : i + 1])}, {"labels": true[i : i + 1]})
    found = whole.compute()
    # true: PER(0,2) LOC(3,4) | LOC(0,1); predicted: PER(0,2) | LOC(0,1) LOC(1,2)
    assert found == pytest.approx({"accuracy": 4 / 6, "f1": 4 / 6, "precision": 2 / 3, "recall": 2 / 3})
    merged = Tags(people.TAGS)
    merged.merge([p.state() for p in parts])
    assert merged.compute() == found
    assert merged.by_class() == whole.by_class()
    assert whole.by_class()["PER"] == {"precision": 1, "recall": 1, "f1": 1, "entities": 1}
    assert whole.by_class()["LOC"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "entities": 2}
    assert Tags(people.TAGS).compute() == {"accuracy": 0, "f1": 0, "precision": 0, "recall": 0}


def test_parts_of_speech_have_accuracy_alone() -> None:
    assert not has_entities(["O", "NOUN"])
    assert KIND.main_metric(["DET", "NOUN"]) == "accuracy"
    assert set(Tags(["DET", "NOUN"]).compute()) == {"accuracy"}
    table = {"labels": [[-100, 0, 1], [1, 1, -100]]}
    assert KIND.chance(["DET", "NOUN"], table) == 3 / 4
    assert KIND.chance(people.TAGS, {"labels": [[0, 0, 0, 1, 0, 2, 3], [0, 0]]}) == pytest.approx(2 * 1 / (9 + 2))
    assert KIND.chance(people.TAGS, {"labels": [[0, 0]]}) == 0


def test_predictions_have_a_tag_for_each_word() -> None:
    line = "Elena Lindgren works in Oslo " + "and " * 60
    ((tags, probability, text),) = KIND.predict(
        people.teacher(KIND.name), people.tokenizer(), [line.strip()], Encoding(48)
    )
    assert len(tags.split()) == 65
    assert tags.split()[:2] == ["B-PER", "I-PER"]
    assert tags.split()[-1] == "?"
    assert (probability, text) == (None, line.strip())


def test_a_table_that_the_caller_has_tokenized() -> None:
    import datasets

    table = datasets.Dataset.from_dict({"input_ids": [[2, 5, 3]], "tags": [[-100, 1, -100]]})
    found = KIND.adopt(table, None, people.TAGS, Encoding(8), label="tags")
    assert found[0] == {"input_ids": [2, 5, 3], "labels": [-100, 1, -100], "word_mask": [0, 1, 0]}
    with pytest.raises(DataError, match="needs the column 'word_mask'"):
        KIND.adopt(table, None, people.TAGS, Encoding(8), label=None)
    free = KIND.adopt(found, None, people.TAGS, Encoding(8), label=None)
    assert free[0]["labels"] == [-100] * 3
