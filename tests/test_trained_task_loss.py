"""A task loss with parameters of its own (a classifier that the student alone does not keep), and sets of all views."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

import taskkd as kd
from taskkd import losses
from taskkd.augmentation import Augmented
from taskkd.caches import Cached
from taskkd.checkpoints import STATE, hand_on, save_state
from taskkd.distiller import Distiller
from taskkd.errors import TaskkdError

WIDTH = 4


class Embedder(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"embeddings": self.body(x)}


class Head(nn.Module):
    training_only = True

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, WIDTH, generator=generator) * scale)

    def forward(self, output, batch) -> Tensor:
        return nn.functional.cross_entropy(output["embeddings"] @ self.weight.T, batch["labels"])


class Stepping(Head):
    """Trains a row of its own, once per optimiser step."""

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate, self.rates, self.waiting = None, [], False
        self.follows_trainer = True

    def forward(self, output, batch) -> Tensor:
        self.waiting = True
        return super().forward(output, batch)

    def auxiliary_step(self, progress) -> None:
        self.rates.append(self.learning_rate)
        self.waiting = False

    def forget(self) -> None:
        self.waiting = False


class Points(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict:
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": index % 3, "id": 2 * index}


class BothSigns(Dataset):
    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return 2 * len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        sample = self.dataset[index // 2]
        return {**sample, "x": -sample["x"] if index % 2 else sample["x"], "id": index}


class RandomSign(Augmented):
    def __init__(self, dataset) -> None:
        super().__init__(dataset, self.sign)

    @staticmethod
    def sign(sample, generator):
        turned = bool(torch.rand((), generator=generator) < 0.5)
        return {**sample, "x": -sample["x"] if turned else sample["x"], "id": sample["id"] + turned}

    @property
    def views(self):
        return BothSigns(self.dataset)


def arguments(folder, **changes) -> TrainingArguments:
    own = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "seed": 1,
        "report_to": [],
        "use_cpu": True,
        "optim": "sgd",
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**own, **changes})


def mimic() -> kd.Match:
    return kd.Match("mimic", losses.mse, "out.embeddings")


def test_its_parameters_are_trained_and_saved_beside_the_student(tmp_path) -> None:
    head = Head()
    before = head.weight.detach().clone()
    trainer = kd.Trainer(
        Embedder(), task_loss=head, args=arguments(tmp_path), train_dataset=Points(), eval_dataset=Points()
    )
    trainer.train()
    assert not torch.equal(head.weight, before)
    trainer.save_model(str(tmp_path / "model"))
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == {"body.weight", "body.bias"}
    assert "task_loss.weight" in load_file(tmp_path / "checkpoint-4" / STATE)


def test_resuming_is_exact(tmp_path) -> None:
    def run(folder, steps):
        student, head = Embedder(), Head()
        args = arguments(folder, max_steps=4)
        trainer = kd.Trainer(student, task_loss=head, args=args, train_dataset=Points())
        if steps < 4:
            trainer.args.num_train_epochs, trainer.args.max_steps = 1, steps
            trainer.args.lr_scheduler_type = "constant"
        trainer.args.lr_scheduler_type = "constant"
        trainer.train(resume_from_checkpoint=True)
        return student.body.weight, head.weight

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(tmp_path / "parts", 4), strict=True))


def test_it_is_left_out_where_its_weight_is_0() -> None:
    distiller = Distiller(Embedder(), Embedder(1), [mimic()], task_weight=0, task_loss=Head())
    assert all(name.startswith("student.") for name, _ in distiller.named_parameters())


def test_it_is_not_clipped_with_the_student(tmp_path) -> None:
    def gradients(scale: float) -> tuple[float, float]:
        head = Head(scale)
        trainer = kd.Trainer(
            Embedder(), task_loss=head, args=arguments(tmp_path, max_grad_norm=1e-3), train_dataset=Points()
        )
        trainer.distiller.train()
        batch = trainer._collated(range(4))
        trainer.distiller(**batch)["loss"].backward()
        trainer.create_accelerator_and_postprocess()
        before = head.weight.grad.norm().item()
        trainer._clip_grad_norm(trainer.distiller)
        norm = torch.stack([p.grad.norm() for p in trainer.distiller.student.parameters()]).norm().item()
        return norm, head.weight.grad.norm().item() / before

    norm, kept = gradients(50.0)
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert kept == 1


def test_the_next_stage_goes_on_with_it(tmp_path) -> None:
    first = Distiller(Embedder(), None, task_loss=Head())
    with torch.no_grad():
        first.task_loss.weight.fill_(7)
    save_state(first, tmp_path / "state.safetensors")
    second = Distiller(Embedder(), None, task_loss=Head())
    hand_on(second, tmp_path / "state.safetensors")
    assert torch.equal(second.task_loss.weight, first.task_loss.weight)


def test_rows_of_its_own_are_trained_once_a_step_at_the_optimisers_rate(tmp_path) -> None:
    head = Stepping()
    kd.Trainer(Embedder(), task_loss=head, args=arguments(tmp_path), train_dataset=Points()).train()
    assert head.rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_a_hand_loop_that_forgets_it_is_told() -> None:
    distiller = Distiller(Embedder(), None, task_loss=Stepping()).train()
    distiller(x=torch.ones(2, 6), labels=torch.tensor([0, 1]))
    with pytest.raises(TaskkdError, match="auxiliary_step"):
        distiller.step()


def test_classes_of_the_training_data_are_not_asked_for_in_evaluation(tmp_path) -> None:
    class Count:
        def reset(self):
            self.seen = 0

        def update(self, output, batch):
            self.seen += len(output["embeddings"])

        def state(self):
            return self.seen

        def merge(self, states):
            self.seen = sum(states)

        def compute(self):
            return {"seen": self.seen}

    class Others(Points):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "labels": 99}

    trainer = kd.Trainer(Embedder(), task_loss=Head(), metric=Count(), args=arguments(tmp_path), eval_dataset=Others())
    metrics = trainer.evaluate()
    assert metrics["eval_seen"] == 12
    assert "eval_loss" not in metrics


def test_a_cache_of_all_views_follows_random_ones(tmp_path) -> None:
    teacher, calls = Embedder(1), []
    cached = Cached(teacher, tmp_path / "cache")
    student = Embedder()
    trainer = kd.Trainer(
        student,
        teacher=cached,
        terms=[mimic()],
        task_weight=0,
        args=arguments(tmp_path / "run"),
        train_dataset=RandomSign(Points()),
    )
    trainer.complete_cache()
    assert len(cached) == 24
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert not calls
    live = Embedder()
    kd.Trainer(
        live,
        teacher=teacher,
        terms=[mimic()],
        task_weight=0,
        args=arguments(tmp_path / "live"),
        train_dataset=RandomSign(Points()),
    ).train()
    assert torch.allclose(live.body.weight, student.body.weight, atol=1e-6)


def test_what_is_evaluated_is_all_of_it_where_training_drops_its_last_batch(tmp_path) -> None:
    args = arguments(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=5, per_device_train_batch_size=5)
    trainer = kd.Trainer(Embedder(), task_loss=Head(), args=args, train_dataset=Points(), eval_dataset=Points())
    assert sum(len(batch["x"]) for batch in trainer.get_eval_dataloader()) == 12
    assert sum(len(batch["x"]) for batch in trainer.get_train_dataloader()) == 10
