"""The trainer does what `transformers.Trainer` does, and trains on the terms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, TrainerCallback, default_data_collator

import taskkd as kd
from taskkd import losses
from taskkd.errors import CacheError, NonFiniteError, TaskkdError
from taskkd.nlp.metrics import Classification
from tests.engine import (
    CLASSES,
    Faulty,
    Mlp,
    Points,
    Recorder,
    Sentences,
    arguments,
    bert,
    changed,
    cross_entropy,
    distance,
    hidden_term,
    logits_term,
    mask_a_token,
    point_trainer,
    text_trainer,
    weights,
)

# ---- evaluation and data


def accuracy(prediction) -> dict[str, float]:
    logits, labels = prediction
    assert isinstance(logits, np.ndarray), "a tuple: hidden states or the loss came along"
    assert isinstance(labels, np.ndarray)
    return {
        "accuracy": float((logits.argmax(-1) == labels).mean()),
        "count": float(len(labels)),
        "width": logits.shape[1],
    }


@pytest.mark.parametrize(
    "config", [{}, {"output_hidden_states": True, "output_attentions": True, "attn_implementation": "eager"}]
)
def test_compute_metrics_gets_logits_and_labels(tmp_path, config):
    student, data = bert(0, **config), Sentences(10)
    trainer = text_trainer(tmp_path, student=student, eval_dataset=data, compute_metrics=accuracy)
    found = trainer.evaluate()
    batch = default_data_collator([data[i] for i in range(10)])
    with torch.no_grad():
        output = student.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        )
    assert found["eval_accuracy"] == pytest.approx((output.logits.argmax(-1) == batch["labels"]).float().mean().item())
    assert (found["eval_count"], found["eval_width"]) == (10, CLASSES)
    assert found["eval_loss"] == pytest.approx(output.loss.item(), abs=1e-5)


def test_streaming_metric_gives_the_same_numbers(tmp_path):
    class Spy(TrainerCallback):
        seen = 0

        def on_prediction_step(self, args, state, control, eval_dataloader=None, **_):
            assert eval_dataloader is not None
            self.seen += 1

    data, spy = Sentences(10), Spy()
    engine = text_trainer(tmp_path, eval_dataset=data, compute_metrics=accuracy).evaluate()
    trainer = text_trainer(tmp_path, eval_dataset=data, metric=Classification(CLASSES), callbacks=[spy])
    for _ in range(2):  # a metric starts anew each time
        streamed = trainer.evaluate()
        assert streamed["eval_accuracy"] == pytest.approx(engine["eval_accuracy"])
        assert streamed["eval_loss"] == pytest.approx(engine["eval_loss"], abs=1e-6)
    assert spy.seen == 6


def test_predict_gives_predictions_with_a_metric_too(tmp_path):
    trainer = text_trainer(tmp_path, metric=Classification(CLASSES))
    found = trainer.predict(Sentences(10))
    assert found.predictions.shape == (10, CLASSES)
    assert found.label_ids.shape == (10,)


def test_a_plain_module_is_evaluated_with_its_task_loss(tmp_path):
    student, data = Mlp(8, 0), Points(10)
    trainer = point_trainer(
        tmp_path, student=student, eval_dataset=data, compute_metrics=accuracy, label_names=["labels"]
    )
    found = trainer.evaluate()
    assert (found["eval_count"], found["eval_width"]) == (10, CLASSES)
    assert found["eval_loss"] == pytest.approx(cross_entropy(student(data.x), {"labels": data.labels}).item(), abs=1e-6)
    assert found["eval_accuracy"] == pytest.approx((student(data.x).argmax(-1) == data.labels).float().mean().item())


@pytest.mark.parametrize("as_datasets", [False, True])
def test_columns_that_somebody_reads_are_kept(tmp_path, as_datasets):
    seen = []

    def collator(features):
        seen.append(set(features[0]))
        return default_data_collator(features)

    data = [
        {**s, "teacher_input_ids": s["input_ids"], "text": "words"} for s in map(Sentences(8).__getitem__, range(8))
    ]
    if as_datasets:
        import datasets

        data = datasets.Dataset.from_list(
            [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in s.items()} for s in data]
        )
    trainer = text_trainer(tmp_path, train=data, data_collator=collator, max_steps=1)
    trainer.train()
    assert seen
    for columns in seen:
        assert columns == {"id", "input_ids", "attention_mask", "labels", "teacher_input_ids"}
    assert trainer.label_names == ["labels"]


def test_callbacks_run_unchanged(tmp_path):
    recorder = Recorder()
    trainer = text_trainer(tmp_path, callbacks=[recorder], logging_strategy="steps", logging_steps=2)
    trainer.train()
    assert recorder.steps == [1, 2, 3, 4, 5, 6]
    logged = [log for log in recorder.logs if "loss" in log]
    assert len(logged) == 3
    assert set(logged[0]) >= {"loss", "loss_task", "loss_logits", "loss_hidden", "grad_norm", "learning_rate", "epoch"}


def test_stage_overrides_change_the_arguments_of_that_stage_only(tmp_path):
    args = arguments(tmp_path, num_train_epochs=1)
    stage = kd.Stage("only", [logits_term()], overrides={"max_steps": 2, "learning_rate": 0.5})
    trainer = kd.Trainer(bert(0), teacher=bert(1), method=kd.Method("m", [stage]), args=args, train_dataset=Sentences())
    assert (trainer.args.max_steps, trainer.args.learning_rate) == (2, 0.5)
    assert (args.max_steps, args.learning_rate, args.logging_nan_inf_filter) == (-1, 1e-2, True)
    trainer.train()
    assert trainer.state.global_step == 2


# ---- optimisation


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_accumulation_equals_the_large_batch(tmp_path, max_grad_norm):
    after = []
    for size, accumulate in ((32, 1), (8, 4)):
        student = bert(0)
        trainer = text_trainer(
            tmp_path,
            student=student,
            train=Sentences(96),
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=max_grad_norm,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
        )
        trainer.prepare()
        before = weights(trainer.distiller)
        trainer.train()
        assert trainer.state.global_step == 3
        after.append(weights(trainer.distiller))
    assert distance(*after) <= 1e-6
    assert distance(before, after[0]) > 1e-3


def test_adapters_are_optimised_clipped_and_in_their_own_group(tmp_path):
    norms = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            grads = [p.grad for p in trainer.distiller.parameters() if p.grad is not None]
            norms.append(torch.stack([g.norm() for g in grads]).norm().item())

    trainer = text_trainer(
        tmp_path, callbacks=[Norm()], max_steps=2, weight_decay=0.25, adapter_learning_rate=0.5, max_grad_norm=1e-3
    )
    trainer.prepare()
    before = weights(trainer.distiller.terms)
    assert set(before) == {"hidden.adapters.0.map.weight", "hidden.adapters.0.map.bias"}
    trainer.train()
    assert changed(before, weights(trainer.distiller.terms)) == set(before)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)
    own = {id(p): n for n, p in trainer.distiller.terms.named_parameters()}
    held = {}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            assert (group["initial_lr"] == 0.5) == (id(p) in own)
            held[id(p)] = group
    assert held.keys() == {id(p) for p in trainer.distiller.parameters()}
    # Decay is the student's where none is given: that of the arguments for matrices, none for biases.
    decay = {name: held[key]["weight_decay"] for key, name in own.items()}
    assert decay == {"hidden.adapters.0.map.weight": 0.25, "hidden.adapters.0.map.bias": 0.0}


def test_adapter_weight_decay_alone(tmp_path):
    trainer = text_trainer(tmp_path, max_steps=1, weight_decay=0.25, adapter_weight_decay=0.75)
    trainer.train()
    adapter = trainer.distiller.terms["hidden"].adapters[0].map.weight
    found = [g for g in trainer.optimizer.param_groups if any(p is adapter for p in g["params"])]
    assert [g["weight_decay"] for g in found] == [0.75]
    assert found[0]["initial_lr"] == 1e-2


def test_an_optimiser_of_the_users_own_trains_the_adapters(tmp_path):
    student = bert(0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    trainer = text_trainer(tmp_path, student=student, optimizers=(optimizer, None), max_steps=1)
    trainer.prepare()
    before = weights(trainer.distiller)
    trainer.train()
    assert {k for k in before if k.startswith("terms.")} <= changed(before, weights(trainer.distiller))


def test_stage_trains_freezes_the_rest(tmp_path):
    student = bert(0)
    stage = kd.Stage("one", [hidden_term()], task_weight=0.0, trains=("bert.encoder.layer.1",))
    trainer = text_trainer(tmp_path, student=student, method=kd.Method("m", [stage]), max_steps=2, weight_decay=0.1)
    before = weights(student)
    trainer.train()
    moved = changed(before, weights(student))
    assert moved
    assert all(name.startswith("bert.encoder.layer.1.") for name in moved)


def test_what_the_user_froze_stays_frozen(tmp_path):
    student = bert(0)
    student.bert.embeddings.requires_grad_(False)
    before = weights(student.bert.embeddings)
    text_trainer(tmp_path, student=student, max_steps=2).train()
    assert changed(before, weights(student.bert.embeddings)) == set()


@pytest.mark.parametrize("alone", [False, True])
def test_a_later_stage_trains_what_an_earlier_one_froze(tmp_path, alone):
    """Also where each stage comes as a method of its own, as in `kd.distill`; what the user froze stays so."""
    student = bert(0)
    student.bert.embeddings.LayerNorm.requires_grad_(False)
    stages = [kd.Stage("one", [hidden_term()], trains=("bert.encoder.layer.1",)), kd.Stage("two", [hidden_term()])]
    for number in (0, 1):
        before = weights(student)
        method = kd.Method("m", stages[number : number + 1] if alone else stages)
        text_trainer(tmp_path, student=student, method=method, stage=0 if alone else number, max_steps=1).train()
    moved = changed(before, weights(student))
    assert "bert.embeddings.word_embeddings.weight" in moved
    assert "bert.embeddings.LayerNorm.weight" not in moved


def test_a_part_that_is_not_there_is_told_at_once(tmp_path):
    with pytest.raises(kd.errors.TapError, match=r"no module 'bert.encodr'.*bert.encoder"):
        text_trainer(tmp_path, method=kd.Method("m", [kd.Stage("one", [hidden_term()], trains=("bert.encodr",))]))


def test_the_teacher_is_untouched(tmp_path):
    teacher = bert(1, width=32, dropout=0.5).train()
    before = weights(teacher)
    trainer = text_trainer(tmp_path, teacher=teacher, max_steps=2)
    trainer.train()
    assert not teacher.training
    assert changed(before, weights(teacher)) == set()
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(id(p) in {id(q) for q in teacher.parameters()} for p in trainer.model.parameters())


# ---- logging


def test_every_term_is_logged_as_the_mean_of_its_steps(tmp_path):
    given = []

    class Spy(kd.Trainer):
        def compute_loss(self, model, inputs, **options):
            loss, values = super().compute_loss(model, inputs, return_outputs=True)
            if model.training:
                given.append({k: v.item() for k, v in values.items()})
            return loss

    late = kd.schedules.Schedule(1.0, lambda p: float(p.step >= 2))  # not computed in the first two steps
    recorder = Recorder()
    Spy(
        bert(0, dropout=0.1),
        teacher=bert(1, width=32),
        terms=[logits_term(0.5), hidden_term(late)],
        args=arguments(
            tmp_path, num_train_epochs=2, gradient_accumulation_steps=2, logging_strategy="steps", logging_steps=3
        ),
        train_dataset=Sentences(),
        callbacks=[recorder],
    ).train()
    logs = [log for log in recorder.logs if "loss" in log]
    assert len(given) == 12
    assert len(logs) == 2
    for log, steps in zip(logs, (given[:6], given[6:]), strict=True):
        for name, key in (
            ("loss", "loss"),
            ("task", "loss_task"),
            ("logits", "loss_logits"),
            ("hidden", "loss_hidden"),
        ):
            values = [step[name] for step in steps if name in step]
            assert log[key] == pytest.approx(sum(values) / len(values), rel=1e-5), key
    assert sum("hidden" in step for step in given[:6]) == 2


class CountSyncs(TorchDispatchMode):
    """Counts what reads a number back from the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            CountSyncs.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_read_of_the_device_per_optimiser_step(tmp_path, accumulate):
    counts = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            counts.append(CountSyncs.count)

    terms = [logits_term(kd.schedules.warmup(1.0, fraction=0.5), tap="out"), hidden_term(tap="body")]
    trainer = point_trainer(
        tmp_path,
        train=Points(96),  # one epoch: making a loader's iterator draws a seed
        terms=terms,
        callbacks=[Count()],
        optim="sgd",
        max_steps=6,
        gradient_accumulation_steps=accumulate,
    )
    trainer.prepare()
    CountSyncs.count = 0
    with CountSyncs():
        trainer.train()
    assert len(counts) == 6
    assert np.diff(counts).tolist() == [1] * 5


# ---- what is not finite


def test_nan_stops_before_the_optimiser_steps(tmp_path):
    recorder, student = Recorder(), bert(0)
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            kept[state.global_step] = weights(student)

    trainer = text_trainer(
        tmp_path,
        student=student,
        terms=[logits_term(), Faulty(bad=[9], weight=0.25)],
        callbacks=[recorder, Keep()],
        train_sampling_strategy="sequential",
        logging_strategy="steps",
        logging_steps=1,
    )
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    text = str(error.value)
    assert "'faulty' (weight 0.25) is nan" in text
    assert "step 2" in text
    assert "[8, 9, 10, 11]" in text
    assert "logits" not in text
    assert changed(kept[2], weights(student)) == set()
    assert [log["loss"] for log in recorder.logs if "loss" in log] != []
    assert all(log["loss_faulty"] > 0 for log in recorder.logs)


def test_nan_in_one_micro_batch_of_many(tmp_path):
    trainer = text_trainer(
        tmp_path, terms=[Faulty(bad=[13])], gradient_accumulation_steps=3, train_sampling_strategy="sequential"
    )
    with pytest.raises(NonFiniteError, match=r"'faulty'.*step 1, sample ids \[12, 13, 14, 15\]"):
        trainer.train()


def test_skip_leaves_the_step_out(tmp_path):
    """Training with a broken batch that is skipped equals training without that batch (plain SGD, constant rate)."""
    options = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_strategy": "steps",
        "logging_steps": 3,
    }
    recorder = Recorder()
    skipping = text_trainer(
        tmp_path, terms=[logits_term(), Faulty(bad=[9])], on_nonfinite="skip", callbacks=[recorder], **options
    )
    skipping.train()
    plain = Recorder()
    without = torch.utils.data.Subset(Sentences(), [*range(8), *range(12, 24)])
    reference = text_trainer(tmp_path, train=without, terms=[logits_term(), Faulty()], callbacks=[plain], **options)
    reference.train()
    assert skipping.state.global_step == 6
    assert distance(weights(skipping.distiller.student), weights(reference.distiller.student)) == 0.0
    logs = [log for log in recorder.logs if "loss" in log]
    # The first log is of two good steps; a step that was left out counts neither as NaN nor as 0.
    assert len(logs) == 2
    for log in logs:
        assert log["loss"] == pytest.approx(log["loss_task"] + log["loss_logits"] + 0.5 * log["loss_faulty"], rel=1e-4)


def test_skip_stops_after_ten_in_a_row(tmp_path):
    bad = [i for i in range(4, 80) if i not in range(20, 24)]  # steps 1-4, not 5, then all
    trainer = text_trainer(
        tmp_path,
        train=Sentences(80),
        terms=[Faulty(bad=bad)],
        on_nonfinite="skip",
        train_sampling_strategy="sequential",
    )
    with pytest.raises(NonFiniteError, match="10 steps in a row"):
        trainer.train()
    assert trainer.state.global_step == 15


# ---- what is saved


def test_saved_student_is_a_plain_model(tmp_path):
    trainer = text_trainer(tmp_path / "run", max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert changed(weights(trainer.distiller.student), weights(loaded)) == set()
    assert loaded.state_dict().keys() == bert(0).state_dict().keys()
    batch = default_data_collator([Sentences()[i] for i in range(4)])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert torch.equal(loaded.eval()(**inputs).logits, trainer.distiller.student.eval()(**inputs).logits)


def test_saved_plain_module_is_safetensors(tmp_path):
    from safetensors.torch import load_file

    trainer = point_trainer(tmp_path / "run", max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    state = load_file(tmp_path / "student" / "model.safetensors")
    assert state.keys() == Mlp().state_dict().keys()
    assert changed(weights(trainer.distiller.student), state) == set()


# ---- caches


class Calls(nn.Module):
    """Counts the forwards of a teacher."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.count = model, 0

    def forward(self, input_ids, attention_mask):
        self.count += 1
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_cache_never_runs_the_teacher(tmp_path, workers):
    term = kd.Match("hidden", losses.mse, "bert.encoder.layer.1", "model.bert.encoder.layer.1", adapter="linear")
    live = text_trainer(tmp_path / "live", teacher=Calls(bert(1, width=32)), terms=[logits_term(), term])
    live.train()
    for built in (False, True):
        teacher = Calls(bert(1, width=32))
        cached = kd.Cached(teacher, tmp_path / "cache")
        trainer = text_trainer(
            tmp_path / "run",
            teacher=cached,
            terms=[
                logits_term(),
                kd.Match("hidden", losses.mse, *term.student_taps, *term.teacher_taps, adapter="linear"),
            ],
            dataloader_num_workers=workers,
            num_train_epochs=1,
        )
        trainer.train()
        assert (teacher.count == 0) == built
        # Padded positions are 0 in a cache and something else live; the masked loss is another test's.
        assert distance(weights(trainer.distiller.student), weights(live.distiller.student)) < 1e-1


def test_cached_training_equals_live(tmp_path):
    after = []
    for teacher in (bert(1, width=32), kd.Cached(bert(1, width=32), tmp_path / "cache")):
        terms = [logits_term(), kd.Match("cls", losses.mse, "bert.encoder.layer.1[:, 0]", adapter="linear")]
        trainer = text_trainer(tmp_path / "run", teacher=teacher, terms=terms, num_train_epochs=2, optim="sgd")
        trainer.train()
        after.append(weights(trainer.distiller))
    assert distance(*after) < 1e-5


def test_a_cache_refuses_random_augmentation_and_streams(tmp_path):
    data = kd.Augmented(Sentences(), mask_a_token)
    trainer = text_trainer(tmp_path, teacher=kd.Cached(bert(1), tmp_path / "cache"), train=data, terms=[logits_term()])
    with pytest.raises(CacheError, match="random augmentation"):
        trainer.train()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([Sentences()[i] for i in range(8)])

    trainer = text_trainer(
        tmp_path, teacher=kd.Cached(bert(1), tmp_path / "cache"), train=Stream(), terms=[logits_term()], max_steps=1
    )
    with pytest.raises(CacheError, match="not a stream"):
        trainer.train()


def test_augmentation_hidden_in_a_subset_is_found_by_its_hash(tmp_path):
    data = torch.utils.data.Subset(kd.Augmented(Sentences(), mask_a_token), range(8))
    cached = kd.Cached(bert(1), tmp_path / "cache")
    trainer = text_trainer(tmp_path / "run", teacher=cached, train=data, terms=[logits_term()], num_train_epochs=3)
    data.dataset.set_epoch(0)
    trainer.add_callback(NextEpoch(data.dataset))
    with pytest.raises(CacheError, match="is not the one the cache was built with"):
        trainer.train()


class NextEpoch(TrainerCallback):
    def __init__(self, augmented: kd.Augmented) -> None:
        self.augmented = augmented

    def on_epoch_begin(self, args, state, control, **_):
        self.augmented.set_epoch(int(state.epoch or 0))


# ---- options of the engine


@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}])
def test_activation_checkpointing_trains_to_the_same_weights(tmp_path, options):
    after = []
    for on in (False, True):
        student = bert(0)
        trainer = text_trainer(
            tmp_path,
            student=student,
            max_steps=2,
            optim="sgd",
            activation_checkpointing=on,
            **({"activation_checkpointing_kwargs": options} if options and on else {}),
        )
        trainer.train()
        assert student.is_activation_checkpointing == on
        after.append(weights(trainer.distiller))
    assert distance(*after) <= 1e-6


def test_bf16_on_cpu_has_fp32_losses(tmp_path):
    dtypes, inside = set(), set()

    class Spy(kd.Trainer):
        def compute_loss(self, model, inputs, **options):
            loss, values = super().compute_loss(model, inputs, return_outputs=True)
            dtypes.update(v.dtype for v in values.values())
            return loss

    student = bert(0)
    student.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda m, a, out: inside.add(out.dtype))
    trainer = Spy(
        student,
        teacher=bert(1, width=32),
        terms=[logits_term(), hidden_term()],
        args=arguments(tmp_path, bf16=True, max_steps=3),
        train_dataset=Sentences(),
        eval_dataset=Sentences(6),
        metric=Classification(CLASSES),
    )
    trainer.prepare()
    inside.clear()
    trainer.train()
    assert inside == {torch.bfloat16}
    assert dtypes == {torch.float32}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.distiller.parameters())
    assert 0 < trainer.evaluate()["eval_loss"] < 10


@pytest.mark.slow
def test_torch_compile_trains_to_the_same_weights(tmp_path):
    after = []
    for on in (False, True):
        torch._dynamo.reset()
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if on else {}
        trainer = text_trainer(
            tmp_path,
            optim="sgd",
            max_steps=3,
            terms=[logits_term(kd.schedules.warmup(1.0, steps=3)), hidden_term()],
            **options,
        )
        trainer.train()
        after.append(weights(trainer.distiller))
    assert distance(*after) <= 1e-5


@pytest.mark.slow
def test_nan_is_named_under_torch_compile(tmp_path):
    torch._dynamo.reset()
    trainer = text_trainer(
        tmp_path,
        terms=[Faulty(bad=[9])],
        train_sampling_strategy="sequential",
        torch_compile=True,
        torch_compile_backend="aot_eager",
    )
    with pytest.raises(NonFiniteError, match=r"'faulty'.*step 2, sample ids \[8, 9, 10, 11\]"):
        trainer.train()


# ---- what is refused


def test_a_method_with_stages_needs_to_be_told_which(tmp_path):
    method = kd.Method("two", [kd.Stage("first", [logits_term()]), kd.Stage("second", [logits_term()])])
    with pytest.raises(TaskkdError, match=r"2 stages \(first, second\).*stage=0"):
        text_trainer(tmp_path, method=method)
    assert text_trainer(tmp_path, method=method, stage=1).distiller.weights() == {"task": 1.0, "logits": 1.0}


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(TaskkdError, match="label_smoothing_factor"):
        text_trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(TaskkdError, match="`method` or `terms`"):
        text_trainer(tmp_path, method=kd.Method("m", [kd.Stage("s", [])]), terms=[logits_term()])
    with pytest.raises(TaskkdError, match="the training set is empty"):
        text_trainer(tmp_path, train=Sentences(0)).prepare()
    with pytest.raises(TaskkdError, match="on_nonfinite"):
        text_trainer(tmp_path, on_nonfinite="ignore")


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    assert args.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TaskkdError, match=r"2 processes were started .* `TrainingArguments\(use_cpu=True\)`"):
        kd.Trainer(nn.Linear(2, 2), args=args)
