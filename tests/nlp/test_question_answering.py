import json
from pathlib import Path
from typing import Any

import pytest
import torch

from taskkd.errors import DataError
from taskkd.nlp import text
from taskkd.nlp.answers import Answers, exact_match, f1
from taskkd.nlp.collation import FullLength
from taskkd.nlp.kinds import Encoding
from taskkd.nlp.kinds.questions import QUESTION_ANSWERING as KIND
from taskkd.nlp.kinds.questions import span_loss
from tests.nlp import people

MILL = Path(__file__).parent / "files" / "questions.json"
TEXT = ["question", "context"]


def read(path: Path, label: str | None = "answers") -> list[text.Row]:
    return text.read_rows(path, TEXT, label, row=KIND.row, readers=KIND.readers)


def windows(*, training: bool = True, length: int = 120, stride: int = 30) -> Any:
    encoding = Encoding(length, stride=stride, no_answer=True)
    return KIND.encode(read(MILL), people.tokenizer(), [], encoding, first_id=10, training=training)


def test_a_squad_file() -> None:
    first, second, third = read(MILL)
    assert first.text == "Who built the old mill?"
    assert first.label == [("Anna Weber", 51), ("Weber", 56)]
    assert third.label == []
    assert KIND.has_label(third)
    assert second.where.endswith("questions.json, 'The old mill', paragraph 1, question 'mill-2'")
    assert not KIND.has_label(read(MILL, None)[0])


def test_jsonl_and_both_forms_of_answers(tmp_path: Path) -> None:
    entries = [
        {"question": "who ?", "context": "anna .", "answers": {"text": ["anna"], "answer_start": [0]}},
        {"question": "who ?", "context": "anna .", "answers": [{"text": "anna", "answer_start": 0}]},
        {"question": "who ?", "context": "anna .", "answers": None},
    ]
    path = tmp_path / "a.json"
    path.write_text("\n".join(map(json.dumps, entries)))
    assert [row.label for row in read(path)] == [[("anna", 0)], [("anna", 0)], None]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answers": [{"text": "Weber", "answer_start": 50}]},
         r"question 'mill-1': the answer 'Weber' is not at 50 of the context, ' Anna' is"),
        ({"answers": [{"text": "", "answer_start": 50}]}, "the answer '' is not at 50"),
        ({"answers": [{"text": "Weber"}]}, "expected answers with 'text' and 'answer_start'"),
        ({"answers": "Weber"}, "column 'answers' holds 'Weber', expected answers"),
        ({"question": 5}, "column 'question' holds 5, expected text"),
    ],
)  # fmt: skip
def test_malformed_questions_are_a_sentence(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    content = json.loads(MILL.read_text())
    content["data"][0]["paragraphs"][0]["qas"][0] |= change
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=sentence):
        read(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"paragraphs"')
    with pytest.raises(DataError, match="not a file of SQuAD"):
        read(tmp_path / "b.json")


def test_one_column_is_refused() -> None:
    with pytest.raises(DataError, match="two columns, question and context"):
        KIND.row({"text": "x"}, "text", None, "line 1")


def test_windows_cover_the_context_and_are_labelled() -> None:
    rows, table = read(MILL), windows(training=False)
    tokenizer = people.tokenizer()
    assert list(table["id"]) == list(range(10, 10 + len(table)))
    assert len(table) > 3
    assert all(len(ids) <= 120 for ids in table["input_ids"])
    seen: dict[int, list[str]] = {}
    for row in table:
        inside = [i for i, m in enumerate(row["context_mask"]) if m]
        assert inside[0] == 0  # [CLS]
        sep = row["input_ids"].index(tokenizer.sep_token_id)
        assert inside[1] == sep + 1
        assert inside[-1] == len(row["input_ids"]) - 2
        start, end = row["start_positions"], row["end_positions"]
        if start:
            text = row["context"][row["offsets"][start][0] : row["offsets"][end][1]]
            seen.setdefault(row["question"], []).append(text)
        else:
            assert end == 0
    assert set(seen[10]) == {"Anna Weber"}
    assert set(seen[11]) == {"bread"}
    assert set(seen) == {10, 11}
    covered = {o for row in table if row["question"] == 10 for b, e in row["offsets"] if b >= 0 for o in range(b, e)}
    assert {i for i, c in enumerate(rows[0].pair) if not c.isspace()} <= covered


def test_unlabelled_questions_have_no_positions() -> None:
    table = KIND.encode(read(MILL, None), people.tokenizer(), [], Encoding(200, stride=20))
    assert set(table["start_positions"]) == set(table["end_positions"]) == {-100}


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(DataError, match="'mill-3': the question has no answer; say `no_answer: true`"):
        KIND.encode(read(MILL), people.tokenizer(), [], Encoding(200, stride=20))
    with pytest.raises(
        DataError, match=r"with data.max_length 40 and an overlap of 20 \(data.stride\) there is no room"
    ):
        KIND.encode(read(MILL), people.tokenizer(), [], Encoding(40, stride=20, no_answer=True))


def test_answers_are_compared_as_squad_does() -> None:
    assert exact_match("The  Mill!", ["a mill", "river"]) == 1
    assert exact_match("mill wheel", ["mill"]) == 0
    assert f1("the old mill", ["old mill wheel"]) == pytest.approx(2 * 2 / (2 + 3))
    assert f1("mill mill", ["mill"]) == pytest.approx(2 / 3)
    assert f1("", [""]) == exact_match("", [""]) == 1
    assert f1("mill", [""]) == 0


def pointed(table: Any, spans: dict[int, tuple[str, float]], null: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Logits that point at these texts by question, with these scores, and at [CLS] with `null`."""
    length = max(len(row["input_ids"]) for row in table)
    starts, ends = torch.full((len(table), length), -9.0), torch.full((len(table), length), -9.0)
    starts[:, 0] = ends[:, 0] = null / 2
    for i, row in enumerate(table):
        text, score = spans[row["question"]]
        begin = row["context"].index(text)
        offsets = [tuple(o) for o in row["offsets"]]
        first = [j for j, (b, _) in enumerate(offsets) if b == begin]
        last = [j for j, (_, e) in enumerate(offsets) if e == begin + len(text)]
        if first and last:
            starts[i, first[0]], ends[i, last[0]] = score / 2, score / 2
    return {"start_logits": starts, "end_logits": ends}, {"id": torch.tensor(table["id"])}


def test_the_best_span_of_all_windows_counts() -> None:
    table = windows(training=False)
    metric = Answers([table])
    spans = {10: ("Anna Weber", 8.0), 11: ("summer children", 8.0), 12: ("1843", 2.0)}
    output, batch = pointed(table, spans, null=4.0)
    metric.update(output, batch)
    found = {q: text for q, (text, _) in metric.answers().items()}
    assert found == {10: "Anna Weber", 11: "summer children", 12: ""}
    assert metric.compute() == pytest.approx({"exact_match": 2 / 3, "f1": 2 / 3})
    # The question and padding are no answer, whatever their logits are; nor is a span of over 30 tokens, or backwards.
    outside = ~torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(m) for m in table["context_mask"]], batch_first=True
    ).bool()  # fmt: skip
    for logits in output.values():
        logits[outside] = 99.0
    again = Answers([table])
    again.update(output, batch)
    assert again.compute() == metric.compute()
    parts = [Answers([table]), Answers([table])]
    for i, part in enumerate(parts):
        part.update({k: v[i::2] for k, v in output.items()}, {"id": batch["id"][i::2]})
    merged = Answers([table])
    merged.merge([p.state() for p in parts])
    assert merged.compute() == metric.compute()


def test_spans_are_valid() -> None:
    table = windows(training=False, length=240, stride=40)
    metric = Answers([table])
    output, batch = pointed(table, dict.fromkeys((10, 11, 12), ("1843", 1.0)), null=0.0)
    row = table[0]
    first = row["context_mask"].index(1, 1)
    output["end_logits"][0, first] = 20.0  # before the start
    output["start_logits"][0, first + 40] = 20.0
    output["end_logits"][0, first + 80] = 19.0  # too far behind it
    metric.update(output, batch)
    (begin, end) = row["offsets"][first]
    assert metric.answers()[10][0] == row["context"][begin:end]  # from `first` to `first`: valid, and best


def test_without_no_answer_there_is_always_one() -> None:
    rows = read(MILL)[:2]
    table = KIND.encode(rows, people.tokenizer(), [], Encoding(240, stride=40), training=False)
    metric = Answers([table])
    metric.update(*pointed(table, {0: ("Weber", 2.0), 1: ("bread", 2.0)}, null=9.0))
    assert metric.compute() == {"exact_match": 1, "f1": 1}
    assert KIND.chance([], table) == 0
    assert KIND.chance([], windows(training=False)) == pytest.approx(1 / 3)


def test_the_loss_counts_labelled_windows_and_no_padding() -> None:
    torch.manual_seed(0)
    output = {k: torch.randn(3, 6, requires_grad=True) for k in ("start_logits", "end_logits")}
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[:, 5] = 0
    batch = {"start_positions": torch.tensor([1, -100, 2]), "end_positions": torch.tensor([3, -100, 2]),
             "attention_mask": mask}  # fmt: skip
    loss = span_loss(output, batch)
    entropy = torch.nn.functional.cross_entropy
    own = [entropy(output[f"{k}_logits"][[0, 2], :5], batch[f"{k}_positions"][[0, 2]]) for k in ("start", "end")]
    assert loss.item() == pytest.approx((sum(own) / 2).item())
    loss.backward()
    assert torch.equal(output["start_logits"].grad[:, 5], torch.zeros(3))
    empty = span_loss(output, {**batch, **{f"{k}_positions": torch.full((3,), -100) for k in ("start", "end")}})
    assert empty.item() == 0
    assert empty.requires_grad


def test_predictions() -> None:
    teacher, encoding = people.teacher(KIND.name), Encoding(48, stride=8)
    line = "what job ?\tclara novak works as a pilot . then she came to oslo ."
    ((answer, probability, text),) = KIND.predict(teacher, people.tokenizer(), [line], encoding)
    assert (answer, text) == ("pilot", line)
    assert 0 < probability <= 1
    with pytest.raises(DataError, match="input 1, 'no tab': expected a question, a tab"):
        next(iter(KIND.predict(teacher, people.tokenizer(), ["no tab"], encoding)))


def test_a_table_that_the_caller_has_tokenized() -> None:
    table = windows().remove_columns(["context_mask", "id"])
    found = KIND.adopt(table, people.tokenizer(), [], Encoding(8), label="answers")
    assert list(found["context_mask"]) == list(windows()["context_mask"])
    assert set(KIND.adopt(table, people.tokenizer(), [], Encoding(8), label=None)["start_positions"]) == {-100}
    with pytest.raises(DataError, match="give questions with their contexts for `eval`"):
        KIND.adopt(table, people.tokenizer(), [], Encoding(8), label="answers", training=False)
    with pytest.raises(DataError, match="needs the column 'start_positions'"):
        KIND.adopt(table.remove_columns("start_positions"), people.tokenizer(), [], Encoding(8), label="answers")
    with pytest.raises(DataError, match="needs the column 'context_mask'"):
        KIND.adopt(table.remove_columns("token_type_ids"), people.tokenizer(), [], Encoding(8), label="answers")


def test_positions_hold_whatever_side_the_tokenizer_pads() -> None:
    left, right = people.tokenizer(), people.tokenizer()
    left.padding_side = "left"
    table = windows(length=60)
    rows = [table[i] for i in range(len(table))]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    for one, other in (
        (KIND.collator(left), KIND.collator(right)),
        (FullLength(KIND.collator(left), left, 64), FullLength(KIND.collator(right), right, 64)),
    ):
        batch, same = one(rows), other(rows)
        assert all(torch.equal(batch[name], same[name]) for name in same)
    assert left.padding_side == "left"
