"""Whole runs on a tiny teacher and synthetic text: what a user does with a recipe or `kd.distill`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import taskkd as kd
from taskkd import plans, recipes, reports, runs, session, steps, tasks, teachers
from taskkd.errors import CacheError, DataError, RecipeError, TapError, TaskkdError
from taskkd.nlp.task import TASK, NlpTask
from tests import tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture
def recipe(tmp_path: Path, teacher: Path) -> Path:
    tiny.write_csv(tmp_path / "train.csv", tiny.sentences(120))
    tiny.write_csv(tmp_path / "free.csv", tiny.sentences(60, seed=5))
    path = tmp_path / "my.yaml"
    path.write_text(f"""schema: 1
task: nlp
data:
  files: {{train: {tmp_path}/train.csv, unlabelled: {tmp_path}/free.csv}}
teacher: {{model: {teacher}}}
student: {{layers: [0, 2]}}
method: {{name: soft_targets, temperature: 2}}
training: {{epochs: 2, learning_rate: 3e-3, batch_size: 16}}
baseline: {{learning_rates: [3e-3], epochs: 2}}
""")
    return path


def run(recipe: Path, folder: Path, *overrides: str, **options: Any) -> runs.Result:
    return runs.run_recipe(recipes.load_recipe(recipe, overrides), folder, say=lambda _: None, **options)


def test_a_recipe_from_start_to_report(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    result = run(recipe, folder)
    report = json.loads((folder / "report.json").read_text())
    assert [row["model"] for row in report["table"]] == ["teacher", "student alone", "distilled"]
    assert report["table"][0]["accuracy"] > 0.9
    assert report["table"][2]["parameters"] < report["table"][0]["parameters"]
    assert (folder / "curves.png").stat().st_size > 10_000
    assert "keeps" in (folder / "report.html").read_text()
    assert set(report["teacher"]["by_class"]["positive"]) == {"precision", "recall", "f1", "samples"}
    costs = report["models"]
    assert 0.4 < costs["student"]["flops"] / costs["teacher"]["flops"] < 0.6  # two layers of four
    assert costs["student"]["latency_8_ms"] > 0
    assert report["examples"]["looked_at"] == report["test_samples"]
    assert report["versions"]["torch"]
    assert recipes.load_recipe(folder / "recipe.yaml").training.epochs == 2

    student = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    assert student.config.num_hidden_layers == 2
    assert student.config.id2label == {0: "negative", 1: "positive"}
    batch = tiny.tokenizer()(["the film was great"], return_tensors="pt")
    assert torch.equal(student.eval()(**batch).logits, result.student.eval()(**batch).logits)

    # Started again, nothing is trained again.
    monkeypatch.setattr(kd.Trainer, "train", None)
    again = run(recipe, folder)
    assert again.report["distilled"] == result.report["distilled"]

    assert runs.evaluate(folder)["accuracy"] == pytest.approx(report["table"][2]["accuracy"])
    tiny.write_csv(tmp_path / "other.csv", tiny.sentences(50, seed=9))
    assert 0 <= runs.evaluate(folder, str(tmp_path / "other.csv"))["accuracy"] <= 1
    labels = [label for label, _, _ in runs.predict(folder, ["the film was great", "a very dull plot"])]
    assert set(labels) <= {"negative", "positive"}
    shown = reports.table(report)
    assert shown.row_count == 3


def test_seeds_and_a_sweep(recipe: Path, tmp_path: Path) -> None:
    result = run(
        recipe,
        tmp_path / "run",
        "seeds=[0, 1]",
        "baseline=null",
        "training.epochs=1",
        sweep={"method.temperature": [1, 4]},
    )
    assert set(result.report["distilled"]) == {"method.temperature=1", "method.temperature=4"}
    assert set(result.report["distilled"]["method.temperature=1"]) == {"0", "1"}
    assert result.report["selected"] in result.report["distilled"]
    rows = reports.rows(result.report)
    assert rows[1]["standard_error"] >= 0
    assert len(list((tmp_path / "run" / "cache").iterdir())) == 1  # the same taps: one cache for all
    with pytest.raises(RecipeError, match="keys under method, terms and training can be swept"):
        run(recipe, tmp_path / "other", sweep={"data.max_length": [8]})
    with pytest.raises(RecipeError, match=r"unknown key 'method\.temprature'"):
        run(recipe, tmp_path / "other", sweep={"method.temprature": [8]})


def test_patient_kd_and_a_frozen_teacher(recipe: Path, tmp_path: Path) -> None:
    patient = ["method={name: patient_kd}", "baseline=null"]
    cached = run(recipe, tmp_path / "a", *patient)
    live = run(recipe, tmp_path / "b", *patient, "teacher.cache=null", "teacher.dtype=float32")
    a, b = (r.report["distilled"]["distilled"]["0"]["history"] for r in (cached, live))
    assert {"loss_task", "loss_logits", "loss_patience"} <= set(a[0])
    # Cached equals live to the rounding of another batch, which the optimiser then lets grow: the first ten steps.
    assert {k: a[0][k] for k in a[0] if k.startswith("loss")} == pytest.approx(
        {k: b[0][k] for k in b[0] if k.startswith("loss")}, rel=1e-4
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [((), "float32"), (("teacher.dtype=auto",), "float32"), (("teacher.cache=null",), None),
     (("teacher.cache=null", "teacher.dtype=auto"), "auto"),
     (("teacher.dtype=bfloat16",), "bfloat16"), (("teacher.cache=null", "teacher.dtype=float32"), "float32")],
)  # fmt: skip
def test_what_a_teacher_computes_in(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], expected: str | None
) -> None:
    seen: list[Any] = []
    made = teachers.Frozen
    for module in (steps, tasks):  # cached, live
        monkeypatch.setattr(module, "Frozen", lambda model, dtype: seen.append(dtype) or made(model, dtype=dtype))
    run(recipe, tmp_path / "run", "baseline=null", "training.epochs=0.2", *overrides)
    assert seen[-1] == expected  # before it the look at one batch


def test_layers_of_another_model(recipe: Path, tmp_path: Path) -> None:
    other = tiny.classifier(seed=9)
    other.save_pretrained(tmp_path / "other")
    loaded = recipes.load_recipe(recipe, [f"student.start={tmp_path / 'other'}"])
    data = TASK.load(loaded)
    student: Any = TASK.student(loaded, data, tiny.teacher(), 0)
    assert torch.equal(
        student.bert.encoder.layer[1].output.dense.weight, other.bert.encoder.layer[2].output.dense.weight
    )


def test_terms_by_hand_and_a_sweep_of_a_weight(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "terms.yaml"
    text = recipe.read_text().replace(
        "method: {name: soft_targets, temperature: 2}",
        """terms:
  - {name: hidden, loss: mse, student: "bert.encoder.layer.1", teacher: "bert.encoder.layer.3", adapter: linear,
     mask: batch.attention_mask, weight: {warmup: 2, fraction: 0.5}, normalise: true}
  - {name: logits, loss: kl_divergence, student: out.logits, temperature: 2}""",
    )
    path.write_text(text)
    result = run(
        path, tmp_path / "run", "baseline=null", "training.epochs=1", sweep={"terms.logits.weight": [0.5, 1.0]}
    )
    assert set(result.report["distilled"]) == {"terms.logits.weight=0.5", "terms.logits.weight=1.0"}
    history = result.report["distilled"]["terms.logits.weight=1.0"]["0"]["history"]
    assert {"loss_task", "loss_hidden", "loss_logits"} <= set(history[0])
    for override, error, sentence in (
        (
            "terms.hidden.student=bert.encoder.layers.1",
            TapError,
            r"no module 'bert.encoder.layers.1' \(did you mean 'bert.enc",
        ),
        ("terms.logits.temprature=1", TaskkdError, r"no option 'temprature' \(did you mean 'temperature'"),
        ("terms.logits.loss=kl_divergenc", RecipeError, r"no loss 'kl_divergenc' \(did you mean 'kl_divergence'"),
        ("terms.hidden.adapter=linea", RecipeError, r"no adapter 'linea' \(did you mean 'linear'"),
        ("terms.hiden.weight=1", RecipeError, r"no item 'hiden' in a list of 2 \(did you mean 'hidden'"),
        ("terms.hidden.teacher=out.pooled", TapError, r"no item 'pooled'"),
    ):
        with pytest.raises(error, match=sentence):
            run(path, tmp_path / "bad", override, "baseline=null", restart=True)


def test_a_recipe_that_did_not_start_may_be_corrected(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for wrong in ("terms.hidden.teacher=out.pooled", "teacher.model=lost"):
        with pytest.raises(TaskkdError):
            run(recipe, folder, wrong, "baseline=null")
    run(recipe, folder, "baseline=null")


def test_a_run_of_another_recipe_is_not_overwritten(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(recipe, folder, "baseline=null", "training.epochs=1")
    with pytest.raises(RecipeError, match=r"holds a run of another recipe \('epochs: 1.0' there, 'epochs: 2.0' now\)"):
        run(recipe, folder, "baseline=null", "training.epochs=2")
    run(recipe, folder, "baseline=null", "training.epochs=2", restart=True)


def test_a_stale_cache_is_refused(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(recipe, folder, "baseline=null", "training.epochs=1")
    record = json.loads((folder / "run.json").read_text())
    record["finished"] = {k: v for k, v in record["finished"].items() if k in ("inputs", "teacher")}
    (folder / "run.json").write_text(json.dumps(record))
    index = next((folder / "cache").iterdir()) / "index.json"
    content = json.loads(index.read_text())
    content["key"]["weights"] = "0" * 64
    index.write_text(json.dumps(content))
    with pytest.raises(CacheError, match="is stale: it was built with another weights"):
        run(recipe, folder, "baseline=null", "training.epochs=1")


def test_a_teacher_at_chance_is_refused(recipe: Path, tmp_path: Path) -> None:
    untrained = tmp_path / "untrained"
    tiny.classifier(seed=4).save_pretrained(untrained)
    tiny.tokenizer().save_pretrained(untrained)
    with pytest.raises(RecipeError, match="no better than chance"):
        run(recipe, tmp_path / "run", f"teacher.model={untrained}")


def test_a_teacher_that_is_worse_than_the_student_alone_is_pointed_out(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(NlpTask, "chance", lambda *_: -1.0)
    wrong, folder = tiny.teacher(), tmp_path / "wrong"
    with torch.no_grad():
        wrong.classifier.weight.neg_()
        wrong.classifier.bias.neg_()
    wrong.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    report = run(recipe, tmp_path / "run", f"teacher.model={folder}").report
    own, other = report["alone"]["0"]["validation"]["accuracy"], report["teacher"]["validation"]["accuracy"]
    assert own > other
    said = f"the teacher's accuracy on validation, {other:.4f}, is below that of the student alone, {own:.4f}"
    assert said in caplog.text


def test_a_teacher_is_fine_tuned_first(recipe: Path, tmp_path: Path) -> None:
    finetune = "teacher.finetune={epochs: 1, learning_rate: 1e-3, batch_size: 16}"
    result = run(recipe, tmp_path / "run", finetune, "baseline=null", "data.validation_size=30")
    assert result.report["teacher"]["steps"] == 5
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "teacher" / "model")
    assert not torch.equal(tuned.classifier.weight, tiny.teacher().classifier.weight)


def test_a_run_of_an_older_version_goes_on(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = run(recipe, folder, "baseline=null", "training.epochs=1")
    written = (folder / "recipe.yaml").read_text()
    assert "  power: 0.9\n" in written
    (folder / "recipe.yaml").write_text(written.replace("  power: 0.9\n", ""))  # a key that came since
    again = run(recipe, folder, "baseline=null", "training.epochs=1")
    assert again.report["distilled"] == first.report["distilled"]
    assert (folder / "recipe.yaml").read_text() == written


def test_check_looks_without_training(recipe: Path) -> None:
    plan = plans.check(recipes.load_recipe(recipe, ["method={name: patient_kd}"]))
    terms = {t.name: t for t in plan.stages["distil"].terms}
    assert set(terms) == {"task", "logits", "patience"}
    assert terms["logits"].student == {"out.logits": "a tensor of shape (16, 2)"}
    assert any("accuracy" in name for name, _ in plan.summary)


def test_distil_in_one_call_with_models_and_data_in_memory(tmp_path: Path) -> None:
    rows = [{"text": t, "label": label} for t, label in tiny.sentences(100)]
    numbered = [{"text": r["text"], "label": int(r["label"] == "positive")} for r in rows]
    teacher, student = tiny.teacher(), tiny.classifier(layers=1, seed=2)
    before = [p.clone() for p in student.parameters()]
    options = {"task": "nlp", "processing_class": tiny.tokenizer(), "training": {"epochs": 1, "batch_size": 16}}
    result = kd.distill(student, teacher, rows, numbered[:40], output_dir=tmp_path / "run", **options)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, result.student.parameters(), strict=True))
    again = kd.distill(student, teacher, rows, numbered[:40], output_dir=tmp_path / "run", **options)
    assert again.report["distilled"] == result.report["distilled"]
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        kd.distill(
            tiny.classifier(layers=1, seed=3), teacher, rows, numbered[:40], output_dir=tmp_path / "run", **options
        )
    with pytest.raises(RecipeError, match="give the tokenizer"):
        kd.distill(student, teacher, rows, task="nlp")


def test_data_in_memory_of_other_kinds(tmp_path: Path) -> None:
    import numpy
    import pandas

    rows = [{"text": t, "label": numpy.int64(label == "positive")} for t, label in tiny.sentences(60)]
    options = {"task": "nlp", "processing_class": tiny.tokenizer(), "training": {"epochs": 1, "batch_size": 16}}
    teacher, student = tiny.teacher(), tiny.classifier(layers=1, seed=2)
    plain = kd.distill(student, teacher, rows, rows[:20], output_dir=tmp_path / "rows", **options)
    frame = pandas.DataFrame(rows)
    framed = kd.distill(student, teacher, frame, frame[:20], output_dir=tmp_path / "frame", **options)
    test = [r.report["distilled"]["distilled"]["0"]["test"] for r in (plain, framed)]
    assert test[0] == test[1]
    with pytest.raises(DataError, match="one table, not a mapping of 'train', 'test'"):
        kd.distill(student, teacher, {"train": rows, "test": rows}, output_dir=tmp_path / "no", **options)


def test_distil_in_one_call_with_paths(tmp_path: Path, teacher: Path) -> None:
    path = tiny.write_csv(tmp_path / "a.csv", tiny.sentences(80), ("review", "stars"))
    result = kd.distill(
        [0, 3], str(teacher), path, task="nlp", output_dir=tmp_path / "run", text="review", label="stars",
        method="patient_kd", options={"beta": 10.0}, training={"epochs": 1, "batch_size": 16},
    )  # fmt: skip
    assert result.student.config.num_hidden_layers == 2
    assert set(result.report["distilled"]["distilled"]["0"]["test"]) >= {"accuracy", "f1", "mcc"}


def test_a_second_run_in_one_folder_is_kept_out(tmp_path: Path) -> None:
    with session.locked(tmp_path), pytest.raises(RecipeError, match="another run is at work"), session.locked(tmp_path):
        pass


@pytest.mark.slow  # faults/test_killed.py has kills in the fast set
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_killed_in_training_and_started_again_gives_the_same_student(
    recipe: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    overrides = ["baseline=null", "training.epochs=30", "training.batch_size=4"]
    command = [sys.executable, "-m", "taskkd", "distill", str(recipe), *overrides, "--output-dir"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stderr=subprocess.PIPE, text=True)
    stage = tmp_path / "killed" / "seed-0" / "distilled" / "stages" / "0-distil"
    deadline = time.monotonic() + 120
    while not list(stage.glob("checkpoint-*/manifest.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == code, process.stderr.read()
    assert "distilled" not in (tmp_path / "killed" / "run.json").read_text()
    killed = run(recipe, tmp_path / "killed", *overrides)
    whole = run(recipe, tmp_path / "whole", *overrides)
    for a, b in zip(killed.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_changed_data_is_not_taken_for_the_old(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(recipe, folder, "baseline=null", "training.epochs=1")
    tiny.write_csv(tmp_path / "train.csv", tiny.sentences(120, seed=8))
    with pytest.raises(RecipeError, match="was started with another data"):
        run(recipe, folder, "baseline=null", "training.epochs=1")
    with pytest.raises(RecipeError, match=r"the data of .* has changed"):
        runs.evaluate(folder)


def test_the_teachers_own_order_of_classes_is_kept(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reversed"
    model = tiny.teacher()
    with torch.no_grad():  # the same classifier with its two outputs swapped
        model.classifier.weight.copy_(model.classifier.weight.flip(0))
        model.classifier.bias.copy_(model.classifier.bias.flip(0))
    model.config.id2label, model.config.label2id = {0: "positive", 1: "negative"}, {"positive": 0, "negative": 1}
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    result = run(recipe, tmp_path / "run", "baseline=null", f"teacher.model={folder}")
    assert result.report["teacher"]["test"]["accuracy"] > 0.9
    assert result.student.config.id2label == {0: "positive", 1: "negative"}
    model.config.id2label = {0: "spam", 1: "ham"}
    model.save_pretrained(folder)
    with pytest.raises(RecipeError, match="is trained for the classes spam, ham, the data has negative, positive"):
        run(recipe, tmp_path / "other", f"teacher.model={folder}")


def test_held_out_files_need_labels(recipe: Path, tmp_path: Path) -> None:
    tiny.write_csv(tmp_path / "test.csv", [(t, "") for t, _ in tiny.sentences(9)])
    with pytest.raises(DataError, match=r"test\.csv: no row of the test data has a label"):
        run(recipe, tmp_path / "run", f"data.files.test={tmp_path}/test.csv")


def test_a_stopped_training_goes_on_from_where_it_stopped(recipe: Path, tmp_path: Path) -> None:
    """With the best epoch kept beside the newest: the engine deletes the newest where only one may stay."""
    import transformers

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 27:
                os.kill(os.getpid(), signal.SIGTERM)

    overrides = ["baseline=null", "training.epochs=9"]
    original = session.ProgressBar

    class Both(original):  # type: ignore[misc, valid-type]
        on_step_end = Stop.on_step_end

    session.ProgressBar = Both  # type: ignore[misc]
    try:
        with pytest.raises(SystemExit) as stop:
            run(recipe, tmp_path / "run", *overrides)
    finally:
        session.ProgressBar = original  # type: ignore[misc]
    assert stop.value.code == 143
    stage = tmp_path / "run" / "seed-0" / "distilled" / "stages" / "0-distil"
    steps = [int(p.name.partition("-")[2]) for p in stage.glob("checkpoint-*")]
    assert 27 <= max(steps) <= 28


def test_no_stage_has_more_steps_than_asked_for(recipe: Path, tmp_path: Path) -> None:
    short = run(recipe, tmp_path / "short", "training.max_steps=3").report
    long = run(recipe, tmp_path / "long", "training.max_steps=100", "training.epochs=1", "baseline=null").report
    distilled, alone = short["distilled"]["distilled"]["0"], short["alone"]["0"]
    assert (distilled["steps"], alone["steps"]) == (3, 3)
    assert distilled["validation"]["accuracy"] >= 0  # evaluated at the end, though no epoch is over
    assert any(h.get("step") == 3 and "loss" in h for h in distilled["history"])
    assert long["distilled"]["distilled"]["0"]["steps"] == 10  # 156 texts in batches of 16: a limit is no length


def test_a_teacher_has_its_own_limit(recipe: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path / "run", "teacher.finetune={epochs: 1}", "training.max_steps=1", "baseline=null")
    finished = json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    assert finished["teacher"]["steps"] == 3
    run(recipe, tmp_path / "other", "teacher.finetune={max_steps: 2}", "baseline=null", "training.epochs=1")
    finished = json.loads((tmp_path / "other" / "run.json").read_text())["finished"]
    assert finished["teacher"]["steps"] == 2


def test_models_are_selected_by_the_metric_asked_for(recipe: Path, tmp_path: Path) -> None:
    report = run(recipe, tmp_path / "run", "data.metric=mcc", "training.epochs=3").report
    history = report["distilled"]["distilled"]["0"]["history"]
    found = [h["eval_mcc"] for h in history if "eval_mcc" in h]
    assert len(found) == 3
    assert report["distilled"]["distilled"]["0"]["validation"]["mcc"] == max(found)
    assert report["metric"] == "mcc"
    assert reports.rows(report)[0]["mcc"] == report["teacher"]["test"]["mcc"]
    rows = [{"text": text, "label": label} for text, label in tiny.sentences(60)]
    given = {"task": "nlp", "processing_class": tiny.tokenizer(), "training": {"epochs": 1}}
    result = kd.distill([0, 2], tiny.teacher(), rows, output_dir=tmp_path / "call", metric="f1", **given)
    assert result.report["metric"] == "f1"
    with pytest.raises(RecipeError, match=r"by 'f2', there is none \(did you mean 'f1'"):
        kd.distill([0, 2], tiny.teacher(), rows, output_dir=tmp_path / "other", metric="f2", **given)
