import math
from pathlib import Path

import pytest
import torch

from taskkd.augmentation import generator_for
from taskkd.errors import DataError
from taskkd.nlp import text
from taskkd.nlp.kinds import Encoding
from taskkd.nlp.kinds.masked import MASKED_LM as KIND
from taskkd.nlp.masking import Masked, Masker
from taskkd.nlp.metrics import MaskedTokens
from tests.nlp import people

DYNAMIC, STATIC = Encoding(32, mask_share=0.3), Encoding(32, masking="static", mask_share=0.3)


def rows(count: int = 20) -> list[text.Row]:
    return people.rows_of(KIND.name, count)


def test_a_text_file_has_a_text_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("anna works in paris .\n\n  bruno lives in oslo .\n")
    found = text.read_rows(path, "text", "", row=KIND.row, readers=KIND.readers)
    assert [(r.text, r.where) for r in found] == [
        ("anna works in paris .", f"{path}, line 1"),
        ("bruno lives in oslo .", f"{path}, line 3"),
    ]
    assert all(KIND.has_label(r) for r in found)
    with pytest.raises(DataError, match="one column of text"):
        KIND.row({}, ["a", "b"], None, "line 1")


def test_masking_follows_the_shares_and_never_takes_special_tokens() -> None:
    ids = [2, *range(10, 110), 3] * 40
    special = [int(i < 5) for i in ids]
    masker = Masker(mask_token=4, vocabulary=1000, share=0.15)
    found = masker({"input_ids": ids, "special_tokens_mask": special, "id": 7}, generator_for(0, 0, 7))
    assert set(found) == {"input_ids", "labels", "id"}
    picked = [i for i, label in enumerate(found["labels"]) if label != -100]
    assert not any(special[i] for i in picked)
    assert all(found["labels"][i] == ids[i] for i in picked)
    assert all(a == b for i, (a, b) in enumerate(zip(ids, found["input_ids"], strict=True)) if i not in set(picked))
    assert len(picked) / 4000 == pytest.approx(0.15, abs=0.02)
    masked = sum(found["input_ids"][i] == 4 for i in picked) / len(picked)
    same = sum(found["input_ids"][i] == ids[i] for i in picked) / len(picked)
    assert masked == pytest.approx(0.8, abs=0.06)
    assert same == pytest.approx(0.1, abs=0.05)


def test_dynamic_masks_are_a_function_of_seed_epoch_and_id() -> None:
    table = KIND.encode(rows(), people.tokenizer(), [], DYNAMIC, first_id=3)
    assert isinstance(table, Masked)
    first = [table[i] for i in range(20)]
    torch.manual_seed(99)
    assert [table[i] for i in reversed(range(20))][::-1] == first
    table.set_epoch(1)
    assert [table[i] for i in range(20)] != first
    table.set_epoch(0)
    assert [table[i] for i in range(20)] == first
    other = table.with_seed(1)
    assert [other[i] for i in range(20)] != first
    other.set_epoch(5)
    assert table[0] == first[0]  # epochs of its own
    assert [row["id"] for row in first] == list(range(3, 23))


def test_static_masks_and_those_of_evaluation_are_fixed() -> None:
    table = KIND.encode(rows(), people.tokenizer(), [], STATIC)
    assert table.to_dict() == KIND.encode(rows(), people.tokenizer(), [], STATIC).to_dict()
    held = KIND.encode(rows(), people.tokenizer(), [], DYNAMIC, first_id=900, training=False)
    assert list(held["labels"]) == list(table["labels"])  # whatever the ids are
    assert 0 < KIND.chance([], held) < 1


def test_long_texts_are_cut_into_pieces() -> None:
    row = text.Row("anna works in paris . " * 20, None, None, "")
    table = KIND.encode([row], people.tokenizer(), [], Encoding(32))
    assert len(table) == math.ceil(100 / 30)
    assert list(table["id"]) == [0, 1, 2, 3]
    assert sum(len(ids) - 2 for ids in table["input_ids"]) == 100


def test_accuracy_and_perplexity_by_hand_and_from_two_processes() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [[0.2, 0.7, 0.1], [0.9, 0.05, 0.05]]]))
    labels = torch.tensor([[0, -100], [2, -100]])
    whole, parts = MaskedTokens(), [MaskedTokens(), MaskedTokens()]
    whole.update({"logits": logits}, {"labels": labels})
    for i, part in enumerate(parts):
        part.update({"logits": logits[i : i + 1]}, {"labels": labels[i : i + 1]})
    assert whole.compute() == pytest.approx({"accuracy": 0.5, "perplexity": math.exp(-math.log(0.5 * 0.1) / 2)})
    merged = MaskedTokens()
    merged.merge([p.state() for p in parts])
    assert merged.compute() == pytest.approx(whole.compute())
    assert MaskedTokens().compute() == {"accuracy": 0, "perplexity": 0}


def test_predictions_fill_the_masks() -> None:
    teacher = people.teacher(KIND.name)
    line = "anna weber works as a pilot [MASK] [MASK] ."
    ((filled, probability, text),) = KIND.predict(teacher, people.tokenizer(), [line], DYNAMIC)
    assert filled.split()[0] == "in"
    assert filled.split()[1] in people.CITIES
    assert 0 < probability < 1
    assert text == line
    with pytest.raises(DataError, match=r"there is no \[MASK\] to fill"):
        next(iter(KIND.predict(teacher, people.tokenizer(), ["anna"], DYNAMIC)))


def test_a_table_that_the_caller_has_tokenized() -> None:
    import datasets

    table = datasets.Dataset.from_dict({"input_ids": [[2, 10, 11, 12, 3]] * 9})
    found = KIND.adopt(table, people.tokenizer(), [], STATIC, label="")
    assert all(row["labels"][0] == row["labels"][4] == -100 for row in found)
    assert any(x >= 0 for row in found for x in row["labels"])
    assert isinstance(KIND.adopt(table, people.tokenizer(), [], DYNAMIC, label=""), Masked)
    assert KIND.adopt(found, people.tokenizer(), [], DYNAMIC, label="") is found


def test_a_tokenizer_without_a_mask_token() -> None:
    from tests import tiny

    with pytest.raises(DataError, match="no mask token"):
        KIND.encode(rows(), tiny.tokenizer(), [], DYNAMIC)
