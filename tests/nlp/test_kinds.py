"""What all kinds share: terms on logits, students, whole runs by recipe, by `kd.distill` and by the command line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import taskkd as kd
from taskkd import losses, recipes, runs
from taskkd.__main__ import main
from taskkd.errors import CacheError, DataError, RecipeError, TaskkdError
from taskkd.nlp import heads, models
from taskkd.nlp.kinds import KINDS, Encoding, kind_of
from taskkd.nlp.methods import patient_kd, soft_targets
from taskkd.nlp.methods.logit_terms import logit_terms
from tests import tiny
from tests.nlp import people

NEW = ["token_classification", "question_answering", "masked_lm"]
ENCODING = Encoding(48, stride=8, no_answer=True, masking="static", mask_share=0.3)


def table(kind: str, count: int = 24, *, labelled: bool = True) -> Any:
    rows = people.rows_of(kind, count, seed=3)
    if not labelled:
        rows = [type(r)(r.text, r.pair, None, r.where, r.words) for r in rows]
    return KINDS[kind].encode(rows, people.tokenizer(), people.TAGS, ENCODING)


def batch(kind: str, count: int = 6, *, labelled: bool = True) -> dict[str, Any]:
    rows = table(kind, count, labelled=labelled)
    return KINDS[kind].collator(people.tokenizer())([rows[i] for i in range(len(rows))])


# ---- heads and terms


@pytest.mark.parametrize("kind", NEW)
def test_a_model_says_its_kind(kind: str, tmp_path: Path) -> None:
    model = people.model(kind)
    assert kind_of(model) is KINDS[kind]
    assert kind_of(tiny.classifier()) is KINDS["classification"]
    model.save_pretrained(tmp_path)
    loaded = models.load_model(str(tmp_path))
    assert type(loaded) is type(model)
    assert heads.head_of(loaded) is KINDS[kind].head


def test_labels_of_a_checkpoint_are_checked(tmp_path: Path) -> None:
    people.model("token_classification").save_pretrained(tmp_path)
    folder, head = str(tmp_path), heads.TOKENS
    with pytest.raises(DataError, match="a classifier of 4 labels, the data has 2: O, B-PER"):
        models.load_model(folder, ["O", "B-PER"], head=head)
    assert models.same_order(folder, ["O", "B-PER"], trained=True, head=head) == people.TAGS
    assert models.same_order(folder, ["O", "I-PER", "B-PER", "B-LOC"], trained=True, head=head) == people.TAGS
    with pytest.raises(
        RecipeError, match="is trained for the classes O, B-LOC, B-PER, I-PER, the data has O, B-X, C, D"
    ):
        models.same_order(folder, ["O", "B-X", "C", "D"], trained=True, head=head)
    # A head of another kind is none.
    assert models.load_model(folder, ["yes", "no"], head=heads.SEQUENCE).config.num_labels == 2


def test_pairs_that_cannot_be_compared() -> None:
    with pytest.raises(RecipeError, match="the student is for token classification, the teacher for masked lm"):
        soft_targets(people.model("token_classification"), people.model("masked_lm"))
    other = people.model("masked_lm")
    other.config.vocab_size = 7
    with pytest.raises(RecipeError, match="the student has a vocabulary of 7, the teacher of"):
        soft_targets(other, people.model("masked_lm"))


def values(kind: str, rows: dict[str, Any], *pair: Any, **options: Any) -> torch.Tensor:
    """The terms' sum for these outputs of student and teacher."""
    run = kd.Run(rows, pair[0])
    total = torch.zeros(())
    for term in logit_terms(people.model(kind), people.model(kind), **options):
        for side, output, taps in (("student", pair[0], term.student_taps), ("teacher", pair[1], term.teacher_taps)):
            for tap in taps:
                root, _, name = tap.partition(".")
                getattr(run, side)[tap] = rows[name] if root == "batch" else output[name]
        total = total + term(run)
    return total


def outputs(kind: str, rows: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    size = rows["input_ids"].shape
    if kind == "question_answering":
        return {k: torch.randn(size, requires_grad=True) for k in ("start_logits", "end_logits")}
    width = len(people.TAGS) if kind == "token_classification" else 20
    return {"logits": torch.randn(*size, width, requires_grad=True)}


def counted(kind: str, rows: dict[str, Any]) -> torch.Tensor:
    names = {"token_classification": "word_mask", "question_answering": "context_mask", "masked_lm": "attention_mask"}
    return rows[names[kind]].bool()


@pytest.mark.parametrize("loss", [losses.kl_divergence, losses.soft_cross_entropy, losses.logit_mse])
@pytest.mark.parametrize("kind", NEW)
def test_only_positions_that_count_are_compared(kind: str, loss: Any) -> None:
    """Acceptance A8: nothing at -100, in the question or in the padding changes the loss, or gets a gradient."""
    rows = batch(kind, labelled=False)
    student, teacher = outputs(kind, rows, 1), outputs(kind, rows, 2)
    mask = counted(kind, rows)
    assert not mask.all()
    before = values(kind, rows, student, teacher, loss=loss)
    before.backward()
    for logits in student.values():
        assert logits.grad[mask].abs().sum() > 0
        assert torch.equal(logits.grad[~mask], torch.zeros_like(logits.grad[~mask]))
    with torch.no_grad():
        for logits in (*student.values(), *teacher.values()):
            logits[~mask] = 1e4
    assert values(kind, rows, student, teacher, loss=loss).item() == before.item()


def test_the_values_are_those_of_the_chosen_positions() -> None:
    rows = batch("token_classification")
    student, teacher = outputs("token_classification", rows, 1), outputs("token_classification", rows, 2)
    mask = rows["word_mask"].bool()
    expected = losses.kl_divergence(student["logits"][mask], teacher["logits"][mask], temperature=3.0)
    assert values("token_classification", rows, student, teacher, temperature=3.0).item() == pytest.approx(
        expected.item()
    )

    rows = batch("question_answering")
    student, teacher = outputs("question_answering", rows, 1), outputs("question_answering", rows, 2)
    masks = rows["context_mask"].bool()
    each = [
        losses.kl_divergence(student[name][i, mask][None], teacher[name][i, mask][None], temperature=3.0)
        for name in student
        for i, mask in enumerate(masks)
    ]
    found = values("question_answering", rows, student, teacher, temperature=3.0)
    assert found.item() == pytest.approx((sum(each) / len(each)).item(), rel=1e-5)

    rows = batch("masked_lm")
    student, teacher = outputs("masked_lm", rows, 1), outputs("masked_lm", rows, 2)
    chosen = rows["labels"] >= 0
    expected = losses.kl_divergence(student["logits"][chosen], teacher["logits"][chosen])
    found = values("masked_lm", rows, student, teacher, positions="masked")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_more_padding_changes_nothing() -> None:
    for kind in NEW:
        rows = batch(kind)
        student, teacher = outputs(kind, rows, 1), outputs(kind, rows, 2)
        longer = {k: torch.nn.functional.pad(v, (0, 5)) if v.ndim == 2 else v for k, v in rows.items()}
        wide = (0, 0, 0, 5) if kind != "question_answering" else (0, 5)
        padded = [{k: torch.nn.functional.pad(v, wide, value=7.0) for k, v in o.items()} for o in (student, teacher)]
        before = values(kind, rows, student, teacher, temperature=2.0).item()
        assert values(kind, longer, *padded, temperature=2.0).item() == pytest.approx(before, rel=1e-6)


def test_confident_and_half_precision_answers_stay_finite() -> None:
    rows = batch("question_answering")
    student = {
        k: torch.full(rows["input_ids"].shape, 6e4).half().requires_grad_() for k in ("start_logits", "end_logits")
    }
    teacher = {k: -v.detach() for k, v in student.items()}
    rows["context_mask"][0] = 0  # nothing to choose from
    loss = values("question_answering", rows, student, teacher, temperature=50.0)
    loss.backward()
    assert loss.isfinite()
    assert all(v.grad.isfinite().all() for v in student.values())


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("method", [soft_targets, patient_kd])
def test_methods_train_every_kind_with_and_without_labels(kind: str, method: Any) -> None:
    teacher = people.teacher(kind)
    student = models.student_from_layers(teacher, [0, 1])
    for labelled in (True, False):
        stage = method(student, teacher).stages[0]
        distiller = kd.Distiller(
            student, teacher, stage.terms, task_weight=stage.task_weight, task_loss=KINDS[kind].loss
        )  # fmt: skip
        rows = batch(kind, labelled=labelled)
        distiller.prepare(rows)
        found = distiller(**rows)
        assert found["loss"].isfinite()
        if not labelled and kind != "masked_lm":
            assert found["task"].item() == 0
        found["loss"].backward()
        distiller.close()


@pytest.mark.parametrize("kind", NEW)
def test_a_student_of_the_teachers_layers_keeps_the_head(kind: str) -> None:
    teacher = people.teacher(kind)
    student = models.student_from_layers(teacher, [0, 1]).eval()
    rows = {k: v for k, v in batch(kind).items() if k in people.tokenizer().model_input_names}
    for own, other in zip(student(**rows).to_tuple(), teacher(**rows).to_tuple(), strict=True):
        assert torch.equal(own, other)
    if kind == "masked_lm":  # tied to the embeddings still
        assert student.cls.predictions.decoder.weight is student.bert.embeddings.word_embeddings.weight


# ---- whole runs


def write_recipe(kind: str, folder: Path, count: int = 90) -> Path:
    teacher = people.save_teacher(kind, folder / "teacher")
    train = people.write(kind, folder, "train", people.facts(count, seed=1))
    held = people.write(kind, folder, "held", people.facts(45, seed=2))
    free = people.write(kind, folder, "free", people.facts(30, seed=4))
    extra = {"question_answering": ", no_answer: true, stride: 8", "masked_lm": ", mask_share: 0.3"}.get(kind, "")
    path = folder / "my.yaml"
    path.write_text(f"""schema: 1
task: nlp
data:
  {{type: {kind}, files: {{train: {train}, validation: {held}, unlabelled: {free}}}, max_length: 48,
   test_size: 0.3{extra}}}
teacher: {{model: {teacher}}}
student: {{layers: [0]}}
method: {{name: soft_targets, temperature: 2}}
training: {{epochs: 2, learning_rate: 3e-3, batch_size: 16}}
baseline: {{learning_rates: [3e-3], epochs: 1}}
""")
    return path


INPUTS = {
    "token_classification": "elena novak works as a baker in prague .",
    "question_answering": "in which city ?\telena novak works as a baker . then she came to prague .",
    "masked_lm": "elena novak works as a baker [MASK] prague .",
}
METRICS = {
    "token_classification": {"accuracy", "f1", "precision", "recall"},
    "question_answering": {"exact_match", "f1"},
    "masked_lm": {"accuracy", "perplexity"},
}


@pytest.mark.parametrize("kind", NEW)
def test_the_command_line_from_check_to_predict(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["taskkd", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out = capsys.readouterr()
        assert not stop.value.code, out.err
        return out.out

    recipe, folder = write_recipe(kind, tmp_path), tmp_path / "run"
    shown = call("check", str(recipe))
    assert "logits: " in shown
    assert KINDS[kind].describe(people.TAGS) in shown
    assert "distilled" in call("distill", str(recipe), "--output-dir", str(folder))
    report = json.loads((folder / "report.json").read_text())
    assert METRICS[kind] <= set(report["teacher"]["test"])
    assert report["teacher"]["test"][report["metric"]] > 0.5
    assert (folder / "cache").is_dir() == (kind != "masked_lm")
    lines = dict(line.split() for line in call("evaluate", str(folder)).splitlines())
    assert METRICS[kind] <= set(lines)
    assert float(lines[report["metric"]]) == pytest.approx(report["table"][2][report["metric"]], abs=1e-4)
    other = people.write(kind, tmp_path, "other", people.facts(20, seed=8))
    assert report["metric"] in call("evaluate", str(folder), "--data", str(other))
    predicted = call("predict", str(folder), INPUTS[kind])
    assert predicted.rstrip("\n").endswith(INPUTS[kind])
    if kind == "token_classification":
        assert len(predicted.split("\t")[0].split()) == 9
    # The student is an ordinary model.
    assert kind_of(models.load_model(str(folder / "student"))) is KINDS[kind]


@pytest.mark.parametrize("kind", NEW)
def test_cached_equals_live(kind: str, tmp_path: Path) -> None:
    recipe = write_recipe(kind, tmp_path)
    static = ["data.masking=static"] if kind == "masked_lm" else []
    histories = []
    for name, cache in (("cached", "{}"), ("live", "null")):
        overrides = [*static, "baseline=null", "training.epochs=1", f"teacher.cache={cache}"]
        result = runs.run_recipe(recipes.load_recipe(recipe, overrides), tmp_path / name, say=lambda _: None)
        histories.append(result.report["distilled"]["distilled"]["0"]["history"][0])
        assert (tmp_path / name / "cache").is_dir() == (name == "cached")
    losses_of = [{k: v for k, v in h.items() if k.startswith("loss")} for h in histories]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-3)


def test_random_masks_are_not_cached(tmp_path: Path) -> None:
    recipe = write_recipe("masked_lm", tmp_path)
    assert recipes.load_recipe(recipe).teacher.cache is None
    assert recipes.load_recipe(recipe, ["data.masking=static"]).teacher.cache is not None
    with pytest.raises(
        RecipeError, match=r"the teacher cannot be cached, as masks are drawn anew .* say `cache: null`"
    ):
        recipes.load_recipe(recipe, ["teacher.cache={}"])
    from taskkd.caches import Cached

    rows = people.rows_of("masked_lm", 20)
    dynamic = KINDS["masked_lm"].encode(rows, people.tokenizer(), [], Encoding(48))
    pair = people.model("masked_lm", 1), Cached(people.teacher("masked_lm"), tmp_path / "cache")
    trainer = kd.Trainer(
        pair[0], teacher=pair[1], method=soft_targets(pair[0], pair[1].live.model), train_dataset=dynamic,
        data_collator=KINDS["masked_lm"].collator(people.tokenizer()),
    )  # fmt: skip
    with pytest.raises(CacheError, match="cannot follow random augmentation"):
        trainer.train()


@pytest.mark.parametrize("kind", NEW)
def test_a_distilbert_student_of_a_bert_teacher(kind: str, tmp_path: Path) -> None:
    """Acceptance A8: the student has no token types, the teacher has."""
    recipe = write_recipe(kind, tmp_path)
    student = people.model(kind, layers=1, family="DistilBert")
    student.save_pretrained(tmp_path / "student")
    overrides = [f"student={{model: {tmp_path}/student}}", "baseline=null", "training.epochs=1"]
    result = runs.run_recipe(recipes.load_recipe(recipe, overrides), tmp_path / "run", say=lambda _: None)
    assert type(result.student) is type(student)
    before, after = student.state_dict(), result.student.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert next(iter(runs.predict(tmp_path / "run", [INPUTS[kind]])))[2] == INPUTS[kind]


@pytest.mark.parametrize("kind", NEW)
def test_distil_in_one_call_with_models_in_memory(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"task": "nlp", "processing_class": people.tokenizer(), "max_length": 48}
    options |= {"question_answering": {"stride": 8, "no_answer": True}, "masked_lm": {"mask_share": 0.3}}.get(kind, {})
    facts = people.facts(60, seed=6)
    data: dict[str, Any] = {
        "token_classification": [dict(zip(("tokens", "tags"), people.tagged(f), strict=True)) for f in facts],
        "question_answering": [people.asked(f, i) for i, f in enumerate(facts)],
        "masked_lm": [{"text": " ".join(people.tagged(f)[0])} for f in facts],
    }
    free = people.write(kind, tmp_path, "free", people.facts(20, seed=7))
    result = kd.distill(
        [0], people.teacher(kind), data[kind], unlabelled=free, output_dir=tmp_path / "run",
        training={"epochs": 1, "batch_size": 16, "learning_rate": 1e-3}, **options,
    )  # fmt: skip
    assert METRICS[kind] <= set(result.report["distilled"]["distilled"]["0"]["test"])
    assert recipes.load_recipe(tmp_path / "run" / "recipe.yaml").data.type == kind
    assert next(iter(runs.predict(tmp_path / "run", [INPUTS[kind]])))[2] == INPUTS[kind]


def test_whole_numbers_are_values_of_a_regression() -> None:
    import datasets

    found = dict(tiny.tokenizer()(["the film was great", "dull"]))
    table = datasets.Dataset.from_dict({**found, "labels": [3, -1]})
    kind = KINDS["regression"]
    adopted = kind.adopt(table, tiny.tokenizer(), [], ENCODING, label="label")
    labels = kind.collator(tiny.tokenizer())([adopted[i] for i in range(2)])["labels"]
    loss = kind.loss({"logits": torch.tensor([[1.0], [1.0]])}, {"labels": labels})
    assert float(loss) == pytest.approx((4 + 4) / 2)
    free = kind.adopt(table, tiny.tokenizer(), [], ENCODING, label=None)
    assert all(value != value for value in free["labels"])  # NaN: no label


def test_class_numbers_in_memory_are_tags(tmp_path: Path) -> None:
    from taskkd.nlp.given import GivenNlp

    rows = [dict(zip(("tokens", "tags"), people.tagged(f), strict=True)) for f in people.facts(10)]
    numbered = [{**r, "tags": [people.TAGS.index(t) for t in r["tags"]]} for r in rows]
    given = {"processing_class": people.tokenizer()}
    teacher = people.model("token_classification")
    tables = [GivenNlp([0], teacher, data, data, **given).load(None).train for data in (rows, numbered)]
    assert list(tables[0]["labels"]) == list(tables[1]["labels"])
    numbered[3]["tags"][2] = 4
    with pytest.raises(DataError, match=r"sample 3: label 4 is not in 0 \.\. 3"):
        GivenNlp([0], teacher, numbered, numbered, **given)


@pytest.mark.parametrize(
    ("kind", "overrides", "sentence"),
    [
        ("token_classification", ["data.stride=4"], "stride is for the type question_answering, not for token_class"),
        ("question_answering", ["data.masking=static"], "masking is for the type masked_lm, not for question"),
        ("token_classification", ["data.files=null", "data.sample={}"], "the embedded sample is for classif"),
        ("token_classification", ["data.text=[a, b]"], "takes one column of words, got a, b"),
        ("question_answering", ["data.text=context"], "takes two columns, question and context"),
        ("question_answering", ["data.no_answer=false"], "the question has no answer; say `no_answer: true`"),
        ("question_answering", ["data.stride=40"], "there is no room for its context"),
        ("token_classification", ["data.label=tag"], r"no column 'tag' \(did you mean 'tags'"),
    ],
)  # fmt: skip
def test_mistakes_are_a_sentence(kind: str, overrides: list[str], sentence: str, tmp_path: Path) -> None:
    recipe = write_recipe(kind, tmp_path)
    with pytest.raises(TaskkdError, match=sentence):
        runs.run_recipe(recipes.load_recipe(recipe, overrides), tmp_path / "run", say=lambda _: None)


def test_a_tag_of_the_validation_file_that_training_has_not(tmp_path: Path) -> None:
    recipe = write_recipe("token_classification", tmp_path)
    with (tmp_path / "held.conll").open("a") as file:
        file.write("\nvienna B-CITY\nis O\n")
    with pytest.raises(
        DataError, match=r"held\.conll, line 451: tag 'B-CITY' of word 1, 'vienna', is not one of the 4"
    ):
        runs.run_recipe(recipes.load_recipe(recipe), tmp_path / "run", say=lambda _: None)


@pytest.mark.parametrize("kind", NEW)
def test_a_teacher_at_chance_is_refused(kind: str, tmp_path: Path) -> None:
    recipe = write_recipe(kind, tmp_path)
    untrained = people.model(kind)
    for name in {"token_classification": ["classifier"], "question_answering": ["qa_outputs"]}.get(kind, []):
        torch.nn.init.zeros_(getattr(untrained, name).weight)  # the same answer whatever the text is
    untrained.save_pretrained(tmp_path / "teacher")
    with pytest.raises(RecipeError, match="no better than chance"):
        runs.run_recipe(recipes.load_recipe(recipe), tmp_path / "run", say=lambda _: None)


def test_a_sample_without_labels_for_masked_language_modelling(tmp_path: Path) -> None:
    recipe = write_recipe("masked_lm", tmp_path)
    overrides = ["data.files=null", "data.sample={domains: [nyt]}"]
    loaded = recipes.load_recipe(recipe, overrides)
    data = recipes.task_named("nlp").load(loaded)
    assert len(data.train) > 1000
    assert set(data.train[0]) >= {"input_ids", "labels", "id"}


def test_a_bare_encoder_is_fine_tuned_first(tmp_path: Path) -> None:
    recipe = write_recipe("token_classification", tmp_path)
    people.teacher("token_classification").bert.save_pretrained(tmp_path / "teacher")
    overrides = ["teacher.finetune={epochs: 3, learning_rate: 5e-3, batch_size: 8}", "baseline=null"]
    result = runs.run_recipe(recipes.load_recipe(recipe, overrides), tmp_path / "run", say=lambda _: None)
    assert result.report["teacher"]["test"]["f1"] > 0.8
    assert result.student.config.id2label == dict(enumerate(people.TAGS))


def test_a_table_that_the_caller_has_tokenized_beside_unlabelled_text(tmp_path: Path) -> None:
    import datasets

    from taskkd.nlp.given import GivenNlp

    kind = KINDS["token_classification"]
    rows = kind.encode(people.rows_of(kind.name, 12), people.tokenizer(), people.TAGS, ENCODING)
    own = datasets.Dataset.from_dict({**rows.remove_columns(["id", "word_mask"]).to_dict(), "source": ["x"] * 12})
    free = people.write(kind.name, tmp_path, "free", people.facts(5))
    task = GivenNlp(
        [0], people.model(kind.name), own, own, unlabelled=free, processing_class=people.tokenizer()
    )  # fmt: skip
    everything = task.load(None).everything
    assert len(set(everything["id"])) == len(everything) == 17
    assert list(everything["word_mask"][:12]) == list(rows["word_mask"])
    assert max(max(row) for row in everything["labels"][12:]) == -100
    kind.collator(people.tokenizer())([everything[i] for i in (0, 16)])


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    people.byte_level_tokenizer().save_pretrained(tmp_path)
    kind = KINDS["token_classification"]
    tokenizer = models.load_tokenizer(str(tmp_path), kind.tokenizer_options)
    words, tags = people.tagged(people.facts(1)[0])
    row = kind.row({"tokens": words, "tags": tags}, "tokens", "tags", "")
    (sample,) = kind.encode([row], tokenizer, people.TAGS, Encoding(64))
    assert [people.TAGS[x] for x in sample["labels"] if x >= 0] == tags
    # Words in a list are read as in a sentence, with the space before them.
    assert sample["input_ids"] == tokenizer(" ".join(words))["input_ids"]
    tokenizer.save_pretrained(tmp_path / "student")
    again = models.load_tokenizer(str(tmp_path / "student"))
    assert again(words, is_split_into_words=True)["input_ids"] == sample["input_ids"]

    kind, tokenizer = KINDS["question_answering"], models.load_tokenizer(str(tmp_path))
    rows = people.rows_of("question_answering", 12)
    answered = kind.encode(rows, tokenizer, [], Encoding(128, stride=8, no_answer=True), training=False)
    for sample in answered:
        start, end = sample["start_positions"], sample["end_positions"]
        found = sample["context"][sample["offsets"][start][0] : sample["offsets"][end][1]] if start else ""
        assert [found] == (sample["answers"] or [""])
        assert sample["context_mask"][0] == 1
        assert sample["context_mask"][-1] == 0
