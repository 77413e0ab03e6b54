"""Checkpoints: resuming is bit-exact, what is damaged is passed over, a killed save loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import taskkd as kd
from taskkd import losses
from taskkd.checkpoints import (
    load_state,
    load_student,
    newest_checkpoint,
    save_state,
    save_student,
    seal,
    staged,
    verify,
)
from taskkd.errors import CheckpointError
from taskkd.nlp.metrics import Classification
from tests.engine import (
    JOB,
    Mlp,
    Points,
    Recorder,
    Sentences,
    StopAfter,
    bert,
    changed,
    distance,
    hidden_term,
    logits_term,
    mask_a_token,
    point_trainer,
    run_job,
    text_trainer,
    weights,
)
from tests.engine_job import KILLS, killed_trainer

# ---- resuming


def everything(trainer: kd.Trainer) -> dict[str, torch.Tensor]:
    """Weights, adapters, progress, automatic weights, optimiser and schedule, as one state."""
    state = weights(trainer.distiller)
    assert "_extra_state" in state
    for number, slots in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{k}": torch.as_tensor(v).clone() for k, v in slots.items()}
    state["learning_rate"] = torch.tensor(trainer.lr_scheduler.get_last_lr())
    return state


def resumable(folder, *, workers=0, cached=False, augmented=False, accumulate=1, epochs=2, callbacks=(), **options):
    """Dropout, shuffling, schedules in the middle of which the run stops, an automatic weight, adapters, memories."""
    data = Sentences(24)
    teacher = bert(1, width=32)
    terms = [
        logits_term(kd.schedules.warmup(1.0, fraction=0.9)),
        kd.Match("cls", losses.mse, "bert.encoder.layer.1[:, 0]", adapter="linear"),
        kd.Match(
            "relations",
            losses.correlation_congruence,
            "bert.encoder.layer.1[:, 0]",
            adapter="embedding",
            teacher_adapter="embedding",
            gate=kd.gates.teacher_correct(),
            gamma=kd.schedules.anneal(0.2, 0.8),
        ),
        kd.Match(
            "embedding", losses.cosine, "bert.embeddings", adapter="linear", weight="auto", mask="batch.attention_mask"
        ),
        kd.ContrastiveRepresentation("crd", "bert.encoder.layer.1[:, 0]", samples=24, negatives=4, weight=0.1),
    ]
    return text_trainer(
        folder,
        student=bert(0, dropout=0.2),
        teacher=kd.Cached(teacher, folder.parent / "cache") if cached else teacher,
        train=kd.Augmented(data, mask_a_token, seed=5) if augmented else data,
        terms=terms,
        num_train_epochs=epochs,
        gradient_accumulation_steps=accumulate,
        dataloader_num_workers=workers,
        adapter_learning_rate=3e-3,
        logging_strategy="steps",
        logging_steps=1,
        callbacks=[Recorder(), *callbacks],
        **options,
    )


CASES = {
    "middle of an epoch": ({}, 4),
    "end of an epoch": ({}, 6),
    "second epoch": ({}, 9),
    "accumulation": ({"accumulate": 2}, 2),
    "uneven accumulation": ({"accumulate": 4, "epochs": 3}, 3),
    "augmentation": ({"augmented": True, "epochs": 3}, 8),
    "augmentation in workers": ({"augmented": True, "workers": 2}, 8),
    "workers that live on": ({"augmented": True, "workers": 2, "dataloader_persistent_workers": True}, 8),
    "cache": ({"cached": True}, 4),
    "cache in workers": ({"cached": True, "workers": 2, "accumulate": 2}, 4),
}


# Persistent workers of a loader that was left in mid-epoch take 5 s each to go away.
SLOW = "workers that live on"


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c == SLOW else c for c in CASES])
def test_resuming_is_bit_exact(tmp_path, case):
    options, stop = CASES[case]
    whole = resumable(tmp_path / "whole", **options)
    whole.train()
    first = resumable(tmp_path / "run", **options, callbacks=[StopAfter(stop)])
    first.train()
    assert first.state.global_step == stop
    assert distance(everything(first), everything(whole)) > 1e-4
    again = resumable(tmp_path / "run", **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step
    assert changed(everything(whole), everything(again)) == set()
    logged = [[log for log in t.state.log_history if "loss" in log] for t in (whole, again)]
    assert logged[0] == logged[1]


def test_augmentation_differs_between_epochs_and_is_the_same_after_resuming(tmp_path):
    """The resume test would pass with an augmentation that does nothing."""
    data = kd.Augmented(Sentences(24), mask_a_token, seed=5)
    epochs = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        epochs.append(torch.stack([data[i]["input_ids"] for i in range(24)]))
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0], epochs[2])


def test_resuming_ignores_the_weights_that_it_is_given(tmp_path):
    point_trainer(tmp_path, callbacks=[StopAfter(3)]).train()
    whole, again = point_trainer(tmp_path / "whole"), point_trainer(tmp_path, student=Mlp(8, seed=77))
    whole.train()
    again.train(resume_from_checkpoint=True)
    assert changed(everything(whole), everything(again)) == set()


def test_resuming_where_there_is_nothing_starts_from_the_beginning(tmp_path):
    trainer = point_trainer(tmp_path / "nothing", max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_a_checkpoint_holds_what_the_design_says(tmp_path):
    point_trainer(tmp_path, callbacks=[StopAfter(3)]).train()
    folder = tmp_path / "checkpoint-3"
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "student",
        "taskkd_state.safetensors",
        "manifest.json",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
    }
    assert load_file(folder / "student" / "model.safetensors").keys() == Mlp().state_dict().keys()
    state = load_file(folder / "taskkd_state.safetensors")
    assert state.keys() == {"_extra_state", "terms.hidden.adapters.0.map.weight", "terms.hidden.adapters.0.map.bias"}
    assert not list(tmp_path.glob("*.tmp"))
    verify(folder)


# ---- damage


def two_checkpoints(folder):
    point_trainer(folder, save_strategy="steps", save_steps=2, max_steps=4).train()
    return folder / "checkpoint-2", folder / "checkpoint-4"


FILES = (
    "student/model.safetensors",
    "taskkd_state.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "trainer_state.json",
    "scheduler.pt",
)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, caplog, name, damage):
    previous, newest = two_checkpoints(tmp_path)
    path = newest / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-7])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert newest_checkpoint(tmp_path) == previous
    assert str(newest) in caplog.text
    assert name in caplog.text
    with pytest.raises(CheckpointError, match=name):
        point_trainer(tmp_path).train(resume_from_checkpoint=str(newest))


def test_training_goes_on_from_the_previous_checkpoint(tmp_path):
    whole = point_trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    point_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=6, callbacks=[StopAfter(4)]).train()
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    trainer = point_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert changed(everything(whole), everything(trainer)) == set()
    verify(tmp_path / "checkpoint-4")  # written again in its place
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", '{"sha256": []}', '{"sha256": {"a": 1}'])
def test_without_a_readable_manifest_a_checkpoint_is_incomplete(tmp_path, caplog, manifest):
    previous, newest = two_checkpoints(tmp_path)
    (newest / "manifest.json").unlink()
    if manifest is not None:
        (newest / "manifest.json").write_text(manifest)
    assert newest_checkpoint(tmp_path) == previous
    assert "incomplete" in caplog.text
    assert str(newest) in caplog.text


def test_all_damaged_is_an_error_that_names_each(tmp_path):
    previous, newest = two_checkpoints(tmp_path)
    for folder in (previous, newest):
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as error:
        point_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert str(previous) in str(error.value)
    assert str(newest) in str(error.value)


def test_newest_is_by_number(tmp_path):
    for number in (9, 10, 100):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "file").write_text("content")
        seal(folder)
    (tmp_path / "checkpoint-200.tmp").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_staged_folders_appear_whole_or_not_at_all(tmp_path):
    final = tmp_path / "thing"
    with staged(final) as folder:
        (folder / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"

    def fail():
        with staged(final) as folder:
            (folder / "a").write_text("2")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (final / "a").read_text() == "1"
    with staged(final) as folder:
        (folder / "b").write_text("3")
    assert [p.name for p in final.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


# ---- of something else


def save_points(folder, terms, student=None, teacher=None):
    trainer = point_trainer(folder, terms=terms, student=student, teacher=teacher, callbacks=[StopAfter(2)])
    trainer.train()
    return str(folder / "checkpoint-2")


OTHERS = {
    "another term": [hidden_term(tap="body")],
    "a term more": [logits_term(tap="out"), hidden_term(tap="body"), hidden_term(name="more", tap="body")],
    "other names": [logits_term(tap="out", name="soft"), hidden_term(tap="body")],
    "another order": [hidden_term(tap="body"), logits_term(tap="out")],
    "no terms": [],
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_other_terms_is_refused(tmp_path, other):
    path = save_points(tmp_path, [logits_term(tap="out"), hidden_term(tap="body")])
    with pytest.raises(CheckpointError, match="belongs to other terms"):
        point_trainer(tmp_path, terms=OTHERS[other]).train(resume_from_checkpoint=path)


def test_a_checkpoint_with_other_adapters_is_refused(tmp_path):
    path = save_points(tmp_path, [hidden_term(tap="body")])
    with pytest.raises(CheckpointError, match=r"hidden.adapters.0.map.*\(12"):
        point_trainer(tmp_path, terms=[hidden_term(tap="body")], teacher=Mlp(20, 1)).train(resume_from_checkpoint=path)


def test_a_checkpoint_of_another_plain_student_is_refused(tmp_path):
    path = save_points(tmp_path, [logits_term(tap="out")])
    with pytest.raises(CheckpointError, match=r"does not load into this student.*body\.0\.weight"):
        point_trainer(tmp_path, terms=[logits_term(tap="out")], student=Mlp(10)).train(resume_from_checkpoint=path)


@pytest.mark.parametrize("change", [{"width": 32}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_a_checkpoint_of_another_bert_is_refused(tmp_path, change):
    save_student(bert(0), tmp_path)
    other = bert_like(**change)
    with pytest.raises(CheckpointError, match=r"does not load into this student.*bert\."):
        load_student(other, tmp_path)


def bert_like(width=16, num_hidden_layers=2):
    student = bert(0, width=width)
    if num_hidden_layers == 1:
        del student.bert.encoder.layer[1]
    if num_hidden_layers == 3:
        student.bert.encoder.layer.append(type(student.bert.encoder.layer[0])(student.config))
    return student


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    save_student(Mlp(), tmp_path / "student")
    with pytest.raises(CheckpointError, match="incomplete"):
        point_trainer(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "student"))
    seal(tmp_path)
    with pytest.raises(CheckpointError, match="not a checkpoint of taskkd"):
        point_trainer(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path))


def test_an_adapter_shared_by_two_terms_is_saved_and_loaded(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        shared = kd.adapters.Linear(8, 12)
        terms = [kd.Match(n, losses.mse, "body", adapter=shared, normalise=n == "b") for n in ("a", "b")]
        return point_trainer(tmp_path, terms=terms).distiller

    one, other = build(1), build(2)
    save_state(one, tmp_path / "state.safetensors")
    load_state(other, tmp_path / "state.safetensors")
    assert changed(weights(one.terms), weights(other.terms)) == set()


# ---- best and limited


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = text_trainer(
        tmp_path,
        eval_dataset=Sentences(12, seed=9),
        metric=Classification(3),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=5e-2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        save_total_limit=2,
    )
    trainer.train()
    history = [log for log in trainer.state.log_history if "eval_loss" in log]
    best = min(history, key=lambda log: log["eval_loss"])
    assert best["step"] < 6, "the best step must not be the last for this test to say anything"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], abs=1e-7)
    kept = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert kept == sorted([f"checkpoint-{best['step']}", "checkpoint-6"])
    assert trainer.distiller.progress.step == best["step"]


def test_a_damaged_best_checkpoint_is_an_error(tmp_path):
    class Damage(Recorder):
        def on_save(self, args, state, control, **_):
            for file in tmp_path.glob("checkpoint-*/student/model.safetensors"):
                file.write_bytes(b"")

    trainer = text_trainer(
        tmp_path,
        eval_dataset=Sentences(12),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        callbacks=[Damage()],
    )
    with pytest.raises(CheckpointError, match=r"student/model.safetensors"):
        trainer.train()


def test_save_total_limit_keeps_the_newest_and_sweeps_what_a_kill_left(tmp_path):
    for left in ("checkpoint-3.tmp", "checkpoint-1.old"):
        (tmp_path / left).mkdir(parents=True)
    point_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]


# ---- killed while saving


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """One process forks a child for each point of a save, which dies there; see `engine_job.py`."""
    folder = tmp_path_factory.mktemp("killed")
    run_job("kill", str(folder))
    return folder


@pytest.mark.parametrize("point", KILLS)
def test_killed_while_saving(killed, caplog, point):
    folder = killed / point
    assert json.loads((killed / "codes.json").read_text())[point] == 9, "the child was not killed where it should be"
    expected = 4 if point == "rotate" else 2
    assert newest_checkpoint(folder) == folder / f"checkpoint-{expected}"
    trainer = killed_trainer(folder)
    trainer.train(resume_from_checkpoint=True)
    whole = killed_trainer(killed / "whole")
    whole.train()
    assert changed(everything(whole), everything(trainer)) == set()
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_killed_in_the_first_save_of_all(killed):
    folder = killed / "first"
    assert json.loads((killed / "codes.json").read_text())["first"] == 9
    assert list(folder.iterdir()) != []
    assert newest_checkpoint(folder) is None


# ---- signals


@pytest.fixture(scope="module")
def signalled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signalled")
    whole = killed_trainer(folder / "whole")
    whole.train()
    return folder, everything(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(signalled, number, code):
    folder, expected = signalled
    run = folder / number.name
    environment = {**os.environ, "PYTHONPATH": str(JOB.parent.parent)}
    process = subprocess.Popen(
        [sys.executable, str(JOB), "signal", str(run)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout:
            if line.startswith("in step 3"):
                process.send_signal(number)
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
    assert [p.name for p in run.iterdir()] == ["checkpoint-3"]
    trainer = killed_trainer(run)
    trainer.train(resume_from_checkpoint=True)
    assert changed(expected, everything(trainer)) == set()


def test_handlers_are_put_back(tmp_path):
    from taskkd.signals import SignalStop

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    point_trainer(tmp_path, max_steps=1, callbacks=[SignalStop()]).train()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_interrupted_in_this_process_and_a_second_signal(tmp_path):
    from taskkd.signals import Interrupted, SignalStop

    class Send(Recorder):
        def __init__(self, times):
            super().__init__()
            self.times = times

        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                for _ in range(self.times):
                    os.kill(os.getpid(), signal.SIGTERM)

    stop = SignalStop()
    with pytest.raises(Interrupted) as caught:
        point_trainer(tmp_path / "once", callbacks=[stop, Send(1)]).train()
    assert caught.value.code == 143
    assert [p.name for p in (tmp_path / "once").iterdir()] == ["checkpoint-3"]
    again = point_trainer(tmp_path / "once", callbacks=[stop])  # a callback that is used again has forgotten it
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    with pytest.raises(Interrupted) as caught:
        point_trainer(tmp_path / "twice", callbacks=[SignalStop(), Send(2)]).train()
    assert caught.value.code == 143
    assert list((tmp_path / "twice").glob("checkpoint-*")) == []


def test_points_are_not_all_alike():
    """What is compared above differs if a step is left out."""
    assert len({tuple(x.tolist()) for x in Points().x}) == 24
