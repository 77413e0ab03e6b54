"""Different tokenizers of teacher and student: what is the same, the data for two, what trains, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import taskkd as kd
from taskkd import losses, plans, recipes, runs
from taskkd.caches import Cached
from taskkd.errors import RecipeError
from taskkd.nlp import tokenization
from taskkd.nlp.methods import patient_kd, soft_targets
from taskkd.nlp.task import TASK
from tests import tiny
from tests.nlp import wordpieces

TRAINING = {"epochs": 4, "learning_rate": 1e-2, "batch_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT teacher, and students with other vocabularies or the same."""
    folder = tmp_path_factory.mktemp("models")
    large, small, bytes_ = wordpieces.wordpiece(1500), wordpieces.wordpiece(700), wordpieces.byte_level(900)
    wordpieces.save(wordpieces.teacher("Bert", large), large, folder / "bert")
    wordpieces.save(wordpieces.model("Bert", small, **wordpieces.LABELS), small, folder / "small")
    wordpieces.save(wordpieces.model("DistilBert", small, **wordpieces.LABELS), small, folder / "distilbert")
    wordpieces.save(wordpieces.model("Roberta", bytes_, **wordpieces.LABELS), bytes_, folder / "roberta")
    wordpieces.save(wordpieces.teacher("Roberta", bytes_), bytes_, folder / "roberta-teacher")
    without_types = PreTrainedTokenizerFast.from_pretrained(folder / "bert")
    without_types.model_input_names = ["input_ids", "attention_mask"]
    wordpieces.save(wordpieces.model("DistilBert", large, **wordpieces.LABELS), without_types, folder / "same")
    tiny.write_csv(folder / "train.csv", tiny.sentences(160))
    tiny.write_csv(folder / "free.csv", tiny.sentences(40, seed=5))
    return folder


def recipe(folder: Path, student: str, teacher: str = "bert", **parts: Any) -> Any:
    files = {"train": str(folder / "train.csv"), "unlabelled": str(folder / "free.csv")}
    return recipes.validate(
        {
            "schema": 1,
            "task": "nlp",
            "data": {"files": files, **parts.pop("data", {})},
            "teacher": {"model": str(folder / teacher), **parts.pop("teacher_options", {})},
            "student": {"model": str(folder / student)},
            "method": {"name": "soft_targets"},
            "training": TRAINING,
            "baseline": None,
            **parts,
        },
        "test",
    )


# ---- the same or not


def test_tokenizers_are_compared_by_what_they_do(tmp_path: Path) -> None:
    one = wordpieces.wordpiece(1500)
    one.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenization.same(one, loaded)
    loaded.model_input_names = ["input_ids"]
    assert tokenization.same(one, loaded)
    assert tokenization.richer(loaded, one) is one
    assert not tokenization.same(one, wordpieces.wordpiece(700))
    assert not tokenization.same(one, wordpieces.byte_level(900))
    cased = AutoTokenizer.from_pretrained(tmp_path)
    cased.backend_tokenizer.normalizer = None  # the same vocabulary, other behaviour
    assert cased.get_vocab() == one.get_vocab()
    assert not tokenization.same(one, cased)


def test_positions() -> None:
    from transformers import BertConfig, ModernBertConfig, RobertaConfig, T5Config

    assert tokenization.positions(BertConfig()) == 512
    assert tokenization.positions(RobertaConfig(max_position_embeddings=514)) == 512
    assert tokenization.positions(RobertaConfig(max_position_embeddings=514, pad_token_id=None)) == 514
    assert tokenization.positions(ModernBertConfig()) == 8192
    assert tokenization.positions(T5Config()) is None
    tokenizer = wordpieces.wordpiece(700)
    short = BertConfig(max_position_embeddings=32)
    assert tokenization.fitting_length(None, tokenizer, 128) == 64
    assert tokenization.fitting_length(None, tokenizer, 128, {"teacher": BertConfig(), "student": short}) == 32
    with pytest.raises(RecipeError, match=r"data\.max_length 40 is more than the student's 32 positions"):
        tokenization.fitting_length(40, tokenizer, 128, {"teacher": BertConfig(), "student": short})


def test_the_longest_texts_fit_a_roberta(folder: Path) -> None:
    student = wordpieces.model("Roberta", wordpieces.byte_level(900))
    length = tokenization.positions(student.config)
    ids = torch.full((1, length), 5)
    assert student(input_ids=ids).logits.shape == (1, 2)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        student(input_ids=torch.full((1, length + 1), 5))


# ---- data


@pytest.mark.parametrize(
    ("student", "teacher"), [("roberta", "bert"), ("distilbert", "bert"), ("small", "roberta-teacher")]
)
def test_each_model_gets_its_own_tokens(folder: Path, student: str, teacher: str) -> None:
    data = TASK.load(recipe(folder, student, teacher))
    rows = [data.everything[i] for i in (3, 1, 150)]
    batch = data.collator(rows)
    tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in (student, teacher)]
    texts = [tokenizers[0].decode(row["input_ids"], skip_special_tokens=True).strip() for row in rows]
    expected = tokenizers[1](texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["teacher_input_ids"], expected["input_ids"])
    assert torch.equal(batch["teacher_attention_mask"], expected["attention_mask"])
    assert batch["input_ids"].shape != batch["teacher_input_ids"].shape
    model = AutoModelForSequenceClassification.from_pretrained(folder / teacher).eval()
    frozen = kd.Frozen(model)
    frozen.attach(["out.logits"])
    with torch.no_grad():
        assert torch.allclose(frozen(batch)["out.logits"], model(**expected).logits, atol=1e-6)
    own = AutoModelForSequenceClassification.from_pretrained(folder / student)
    accepted = {k: v for k, v in batch.items() if not k.startswith("teacher_") and k not in ("id", "labels")}
    assert set(accepted) == set(tokenizers[0].model_input_names)
    if student == "distilbert":
        accepted.pop("token_type_ids")
    own(**accepted)


def test_pairs_keep_each_ones_segments(folder: Path, tmp_path: Path) -> None:
    lines = [f"{text},{text[::-1]},{label}" for text, label in tiny.sentences(40)]
    (tmp_path / "pairs.csv").write_text("a,b,label\n" + "\n".join(lines) + "\n")
    pairs = {"files": {"train": str(tmp_path / "pairs.csv")}, "text": ["a", "b"]}
    batch = (data := TASK.load(recipe(folder, "roberta", data=pairs))).collator([data.train[0], data.train[1]])
    assert "token_type_ids" not in batch
    assert batch["teacher_token_type_ids"].max() == 1


# ---- whole runs


@pytest.mark.parametrize("student", ["roberta", "distilbert"])
def test_a_run_with_two_tokenizers(folder: Path, tmp_path: Path, student: str) -> None:
    result = runs.run_recipe(recipe(folder, student), tmp_path / "run", say=lambda _: None)
    assert result.report["teacher"]["test"]["accuracy"] > 0.9  # the teacher is evaluated on its own tokens
    assert result.report["distilled"]["distilled"]["0"]["test"]["accuracy"] > 0.8
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert tokenization.same(saved, AutoTokenizer.from_pretrained(folder / student))
    assert result.report["models"]["teacher"]["latency_ms"] > 0
    assert runs.evaluate(tmp_path / "run") == pytest.approx(result.report["distilled"]["distilled"]["0"]["test"])
    answers = [a for a, _, _ in runs.predict(tmp_path / "run", ["the film was great", "a dull plot was weak"])]
    assert answers == ["positive", "negative"]


def test_cached_equals_live_and_the_states_of_cls_are_compared(folder: Path, tmp_path: Path) -> None:
    term = {
        "name": "cls", "loss": "mse", "student": "roberta.encoder.layer.1[:, 0]",
        "teacher": "bert.encoder.layer.1[:, 0]", "adapter": "linear",
    }  # fmt: skip
    histories = []
    for name, options in (("cached", {}), ("live", {"cache": None})):
        parts = {"terms": [term], "training": {**TRAINING, "epochs": 1}, "teacher_options": options}
        result = runs.run_recipe(recipe(folder, "roberta", **parts), tmp_path / name, say=lambda _: None)
        history = result.report["distilled"]["distilled"]["0"]["history"]
        histories.append({k: v for k, v in history[0].items() if k.startswith("loss")})
    assert {"loss_task", "loss_logits", "loss_cls"} <= set(histories[0])
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


def test_a_cache_has_the_teachers_length(folder: Path, tmp_path: Path) -> None:
    data = TASK.load(recipe(folder, "roberta"))
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "bert")
    taps = ["bert.encoder.layer.0", "out.logits"]
    cached, live = Cached(teacher, tmp_path / "cache", preprocessing=data.preprocessing), kd.Frozen(teacher)
    cached.attach(taps)
    live.attach(taps)
    table = data.everything
    cached.build([data.collator([table[i]]) for i in range(40)], total=40, announce=lambda _: None)
    batch = data.collator([table[i] for i in (7, 0, 23, 31)])
    found, expected = cached(batch), live(batch)
    mask = batch["teacher_attention_mask"][..., None]
    assert found[taps[0]].shape == expected[taps[0]].shape
    assert torch.allclose(found[taps[0]], expected[taps[0]] * mask, atol=1e-5)
    other = {**batch, "teacher_input_ids": batch["teacher_input_ids"].roll(1, 0)}
    with pytest.raises(kd.errors.CacheError, match="is not the one the cache was built"):
        cached(other)
    cached(data.collator([{**table[7], "input_ids": table[7]["input_ids"][::-1]}]))  # the student's tokens are free


def test_a_student_of_the_same_vocabulary_keeps_its_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    term = {
        "name": "hidden", "loss": "mse", "student": "distilbert.transformer.layer.0", "teacher": "bert.encoder.layer.0",
        "mask": "batch.attention_mask",
    }  # fmt: skip
    own = recipe(folder, "same", terms=[term], training={**TRAINING, "epochs": 1})
    data = TASK.load(own)
    assert data.of_teacher is None
    assert "token_type_ids" in data.train.column_names
    runs.run_recipe(own, tmp_path / "run", say=lambda _: None)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "student").model_input_names == [
        "input_ids",
        "attention_mask",
    ]


def test_in_one_call(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": t, "label": label} for t, label in tiny.sentences(120)]
    large, small = wordpieces.wordpiece(1500), wordpieces.wordpiece(700)
    options: dict[str, Any] = {"task": "nlp", "training": {**TRAINING, "epochs": 10}}
    student, teacher = wordpieces.model("Bert", small, **wordpieces.LABELS), wordpieces.teacher("Bert", large)
    both = {"processing_class": large, "student_processing_class": small}
    result = kd.distill(student, teacher, rows, rows[:20], output_dir=tmp_path / "a", **both, **options)
    named = kd.distill(folder / "small", folder / "bert", rows, rows[:20], output_dir=tmp_path / "b", **options)
    for run in (result, named):
        assert run.report["distilled"]["distilled"]["0"]["test"]["accuracy"] > 0.8
        assert tokenization.same(AutoTokenizer.from_pretrained(run.output_dir / "student"), small)
    from taskkd.nlp.text import Row, tokenized

    table = tokenized([Row("a film", None, "positive", "")] * 20, large, ["negative", "positive"], max_length=16)
    with pytest.raises(RecipeError, match="give data with texts, not with `input_ids`"):
        kd.distill(student, teacher, table, table, output_dir=tmp_path / "c", **both, **options)


# ---- what is refused


@pytest.mark.parametrize(
    ("tap", "teacher"),
    [("roberta.encoder.layer.1", "bert.encoder.layer.1"), ("roberta.embeddings", "bert.embeddings")],
)
def test_terms_on_all_tokens_are_refused_at_plan_time(folder: Path, tmp_path: Path, tap: str, teacher: str) -> None:
    term = {"name": "hidden", "loss": "mse", "student": tap, "teacher": teacher, "mask": "batch.attention_mask"}
    own = recipe(folder, "roberta", terms=[term])
    with pytest.raises(RecipeError, match=rf"term 'hidden' compares the student's '{tap}' token by token.*\[CLS\]"):
        plans.check(own)
    with pytest.raises(RecipeError, match="their tokens are not the same pieces of text"):
        runs.run_recipe(own, tmp_path / "run", say=lambda _: None)
    assert not (tmp_path / "run" / "seed-0").exists()


@pytest.mark.parametrize(
    ("type_", "sentence"),
    [("masked_lm", "Universal Logit Distillation"), ("question_answering", "answers are spans of tokens")],
)
def test_kinds_without_a_common_unit_are_refused(folder: Path, tmp_path: Path, type_: str, sentence: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a film", "question": "what?", "context": "a film", "answers": []}\n' * 20)
    with pytest.raises(RecipeError, match=sentence):
        TASK.load(
            recipe(
                folder, "roberta", data={"files": {"train": str(path)}, "type": type_}, teacher_options={"cache": None}
            )
        )


@pytest.mark.parametrize(
    ("method", "possible"),
    [("soft_targets", True), ("patient_kd", True), ("lrc_bert", True), ("tinybert", False), ("minilm", False),
     ("distilbert", False), ("mobilebert", False), ("cofi", False)],
)  # fmt: skip
def test_methods_with_two_tokenizers(folder: Path, method: str, possible: bool) -> None:
    own = recipe(folder, "roberta", method={"name": method})
    if possible:
        assert plans.check(own).stages
        return
    with pytest.raises(RecipeError, match="but student and teacher have different tokenizers"):
        plans.check(own)


# ---- words


def test_words_begin_where_the_index_says() -> None:
    words = [["The", "unbelievable", "film"], ["plot", "\u0000", "dull"] + ["a"] * 30]
    for tokenizer in (wordpieces.wordpiece(700), wordpieces.byte_level(900)):
        index = tokenization.word_index(words, tokenizer, 20)
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=20)
        for i, row in enumerate(index):
            assert len(row) == len(words[i])
            for word, position in enumerate(row):
                if position >= 0:
                    assert encoded.word_ids(i)[position] == word
                    assert encoded.word_ids(i)[position - 1] != word
        assert index[1][-1] == -1
    assert tokenization.word_index(words, wordpieces.wordpiece(700), 20)[1][1] == -1  # nothing left of it
    with pytest.raises(RecipeError, match="no fast tokenizer"):
        tokenization.word_index(words, object(), 20)


def test_a_loss_over_words_is_that_of_the_first_pieces_both_have() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 3), torch.randn(2, 9, 3)
    own, other = torch.tensor([[1, 3, 4], [1, -1, -1]]), torch.tensor([[1, 5, -1], [2, 3, -1]])
    pairs = [((0, 1), (0, 1)), ((0, 3), (0, 5)), ((1, 1), (1, 2))]
    a, b = (torch.stack([x[p[side]] for p in pairs]) for side, x in enumerate((student, teacher)))
    aligned = tokenization.over_words(losses.kl_divergence)
    value = aligned(student, teacher, word_index=own, teacher_word_index=other, temperature=2.0, dim=-1)
    assert torch.allclose(value, losses.kl_divergence(a, b, temperature=2.0), atol=1e-6)
    # padding of any of the four adds exactly nothing
    pad = torch.nn.functional.pad
    padded = aligned(
        pad(student, (0, 0, 0, 2), value=9.0), pad(teacher, (0, 0, 0, 3), value=9.0),
        word_index=pad(own, (0, 2), value=-1), teacher_word_index=pad(other, (0, 2), value=-1),
        temperature=2.0, dim=-1,
    )  # fmt: skip
    assert torch.equal(padded, value)
    none = aligned(student, teacher, word_index=own * 0 - 1, teacher_word_index=other, temperature=2.0, dim=-1)
    assert none == 0


def test_the_first_position_is_not_read_where_padding_may_be() -> None:
    teacher, student = tiny.teacher(), tiny.classifier()
    terms = patient_kd(student, teacher).stages[0].terms
    tokenization.check_side(terms, wordpieces.wordpiece(700))
    left = wordpieces.wordpiece(700, padding_side="left")
    tokenization.check_side(soft_targets(student, teacher).stages[0].terms, left)
    with pytest.raises(RecipeError, match=r"'patience' reads the first position.*padding_side 'right'"):
        tokenization.check_side(terms, left)


def test_left_padding_moves_the_words() -> None:
    right, left = wordpieces.wordpiece(700), wordpieces.wordpiece(700, padding_side="left")
    words = [["the", "film"], ["a", "dull", "unbelievable", "plot"]]
    samples = []
    for tokenizer in (right, left):
        encoded = tokenizer(words, is_split_into_words=True)
        index = tokenization.word_index(words, tokenizer, 64)
        samples.append((encoded["input_ids"], index))
    rows = [
        {
            "input_ids": samples[0][0][i], "teacher_input_ids": samples[1][0][i],
            "word_index": samples[0][1][i], "teacher_word_index": samples[1][1][i],
        }
        for i in range(2)
    ]  # fmt: skip
    from taskkd.nlp.collation import Collator

    batch = tokenization.TwoCollator(Collator(right), Collator(left), (right, left))(rows)
    for ids, index, name in (("input_ids", "word_index", 0), ("teacher_input_ids", "teacher_word_index", 1)):
        for i in range(2):
            for word in range(len(words[i])):
                assert batch[ids][i, batch[index][i, word]] == samples[name][0][i][samples[name][1][i][word]]
    assert batch["word_index"].shape == (2, 4)
    assert (batch["word_index"][0, 2:] == -1).all()


TAGS = {"great": "GOOD", "lovely": "GOOD", "superb": "GOOD", "awful": "BAD", "dull": "BAD"}


def test_token_classification_with_two_tokenizers(folder: Path, tmp_path: Path) -> None:
    import json

    rows = [text.split() for text, _ in tiny.sentences(300)]
    lines = [json.dumps({"tokens": words, "tags": [TAGS.get(w, "O") for w in words]}) for words in rows]
    (tmp_path / "tags.jsonl").write_text("\n".join(lines))
    large, bytes_ = wordpieces.wordpiece(1500), wordpieces.byte_level(900)
    labels = {"id2label": dict(enumerate(["O", "BAD", "GOOD"])), "label2id": {"O": 0, "BAD": 1, "GOOD": 2}}
    head = "ForTokenClassification"
    wordpieces.save(wordpieces.model("Bert", large, head, **labels), large, tmp_path / "bert")
    wordpieces.save(wordpieces.model("Roberta", bytes_, head, **labels), bytes_, tmp_path / "roberta")
    hidden = {
        "name": "hidden", "loss": "mse", "student": "roberta.encoder.layer.1", "teacher": "bert.encoder.layer.1",
        "adapter": "linear", "mask": "batch.word_mask",
    }  # fmt: skip
    own = recipe(
        tmp_path, "roberta", terms=[hidden],
        data={"files": {"train": str(tmp_path / "tags.jsonl")}, "type": "token_classification"},
        teacher_options={"finetune": {"epochs": 8, "learning_rate": 1e-2, "batch_size": 16}},
        method={"name": "soft_targets", "task_weight": 0, "weight": 1},
        training={**TRAINING, "epochs": 12},
    )  # fmt: skip
    result = runs.run_recipe(own, tmp_path / "run", say=lambda _: None)
    outcome = result.report["distilled"]["distilled"]["0"]
    assert {"loss_logits", "loss_hidden"} <= set(outcome["history"][0])
    # from the teacher's answers alone, which only the words align
    assert result.report["teacher"]["test"]["accuracy"] > 0.98
    assert outcome["test"]["accuracy"] > 0.98
    answers = [a for a, _, _ in runs.predict(tmp_path / "run", ["the film is great", "a dull plot"])]
    assert answers == ["O O O GOOD", "O BAD O"]
    over_all = own.model_copy(update={"terms": [own.terms[0].model_copy(update={"mask": "batch.attention_mask"})]})
    with pytest.raises(RecipeError, match=r"the first pieces of words with `mask: batch\.word_mask`"):
        plans.check(over_all)
