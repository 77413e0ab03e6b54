"""Partial FC: full softmax at rate 1, sampled rows, its own SGD, resuming; on one rank and (slow) on two."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import taskkd as kd
from taskkd.errors import CheckpointError, DataError, ShapeError, TaskkdError
from taskkd.face.heads import MarginHead
from taskkd.face.partial_fc import PartialFC, shard
from taskkd.schedules import Progress, cosine
from tests.engine import StopAfter, arguments, distance, run_job, weights
from tests.face import partial_fc_job

STEP = Progress(0)


def samples(count: int = 6, classes: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 10 * torch.randn(count, 8, generator=generator)
    return x.requires_grad_(), torch.randint(0, classes, (count,), generator=generator)


@pytest.mark.parametrize("kind", ["arcface", "cosface", "adaface", "curricularface"])
def test_at_rate_one_it_is_the_full_softmax_without_torch_distributed(kind: str) -> None:
    assert not torch.distributed.is_initialized()
    head, whole = PartialFC(20, 8, kind=kind, sample_rate=1.0), MarginHead(20, 8, kind=kind)
    (x, y), (other, _) = samples(), samples()
    y[2] = -1
    loss = head({"embeddings": x}, {"labels": y})
    expected = whole({"embeddings": other}, {"labels": y})
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(head._gradients[0][1], whole.weight.grad, rtol=1e-6, atol=1e-8)


def test_its_weight_is_no_parameter_and_moves_with_it() -> None:
    head = PartialFC(20, 8)
    assert not list(head.parameters())
    assert head.double().weight.dtype == torch.float64
    assert PartialFC(20, 8).half().weight.dtype == torch.float32
    assert copy.deepcopy(head).weight is not head.weight


def test_a_step_is_that_of_sgd() -> None:
    head = PartialFC(20, 8, sample_rate=1.0, learning_rate=0.1)
    weight = nn.Parameter(head.weight.clone())
    sgd = torch.optim.SGD([weight], 0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(3):
        x, y = samples(seed=step)
        head.loss(x, y).backward()
        assert head.waiting
        head.auxiliary_step(Progress(step))
        assert not head.waiting
        sgd.zero_grad()
        MarginHead(20, 8).loss(x, y, weight=weight).backward()
        sgd.step()
        torch.testing.assert_close(head.weight, weight.detach())


def test_only_sampled_rows_get_a_gradient_and_change() -> None:
    head, (x, y) = PartialFC(200, 8, learning_rate=0.1), samples(classes=200)
    before = head.weight.clone()
    head.loss(x, y).backward()
    ((index, gradient),) = head._gradients
    assert gradient.shape == (20, 8)
    assert set(y.tolist()) <= set(index.tolist())
    head.auxiliary_step(STEP)
    changed = (head.weight != before).any(1).nonzero()[:, 0]
    assert changed.tolist() == index.tolist()
    assert (head.velocity != 0).any(1).nonzero()[:, 0].tolist() == index.tolist()


def test_draws_are_its_own() -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    x, y = samples()
    one, other = PartialFC(20, 8, sample_rate=0.5), PartialFC(20, 8, sample_rate=0.5)
    values = [one.loss(x, y).item() for _ in range(4)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [other.loss(x, y).item() for _ in range(4)] == values
    assert len(set(values)) > 1
    assert one.eval().loss(x, y).item() == pytest.approx(MarginHead(20, 8).loss(x, y).item())


def test_gradients_of_several_backwards_add_up_and_nothing_else_is_kept() -> None:
    head, (x, y) = PartialFC(20, 8, sample_rate=0.5, learning_rate=0.1, momentum=0.0, weight_decay=0.0), samples()
    before = head.weight.clone()
    indices, parts = [], []
    for _ in range(2):
        (head.loss(x, y) / 2).backward()
        indices.append(head._gradients[-1][0])
        parts.append(head._gradients[-1][1])
    dense = torch.zeros_like(before)
    for index, part in zip(indices, parts, strict=True):
        dense[index] += part
    head.auxiliary_step(STEP)
    torch.testing.assert_close(head.weight, before - 0.1 * dense)
    assert "momentum" not in head.state_dict()
    head.loss(x, y)  # no backward
    torch.autograd.grad(head.loss(x, y), [x])  # somebody measures
    with torch.no_grad():
        head.loss(x, y)
    assert not head.waiting
    head.loss(x, y).backward()
    head.forget()
    assert not head.waiting
    assert head.auxiliary_step(STEP) is None


def test_the_rate_is_a_number_a_schedule_or_the_trainers() -> None:
    def moved(rate: Any) -> Tensor:
        head, (x, y) = PartialFC(20, 8, learning_rate=rate, sample_rate=1.0, momentum=0.0), samples()
        before = head.weight.clone()
        head.loss(x, y).backward()
        if head.follows_trainer:
            with pytest.raises(TaskkdError, match="`learning_rate` of this Partial FC is None"):
                copy.deepcopy(head).auxiliary_step(STEP)
            head.learning_rate = 0.1
        head.auxiliary_step(Progress(5, 10))
        return head.weight - before

    torch.testing.assert_close(moved(0.2), moved(cosine(0.2)) * 2)
    torch.testing.assert_close(moved(0.1), moved(None))


def test_a_scaled_or_overflown_gradient() -> None:
    plain, scaled = (PartialFC(20, 8, learning_rate=0.1, sample_rate=1.0) for _ in range(2))
    x, y = samples()
    plain.loss(x, y).backward()
    plain.auxiliary_step(STEP)
    (scaled.loss(x, y) * 1024).backward()
    scaled.gradient_scale = 1024.0
    scaled.auxiliary_step(STEP)
    torch.testing.assert_close(scaled.weight, plain.weight)
    before = scaled.state_dict()["weight"].clone()
    (scaled.loss(x, y) * torch.inf).backward()
    scaled.auxiliary_step(STEP)
    assert torch.equal(scaled.weight, before)


def test_the_official_code_bounds_the_value_and_not_the_gradient() -> None:
    (x, y), (other, _) = samples(), samples()
    values = [PartialFC(20, 8, sample_rate=1.0, compat=c).loss(z, y) for c, z in ((None, x), ("official", other))]
    assert values[1] < values[0]
    for value in values:
        value.backward()
    assert torch.equal(x.grad, other.grad)
    opposite = PartialFC(20, 8, centres=-torch.eye(20, 8), sample_rate=1.0, compat="official")
    assert opposite.loss(torch.eye(1, 8), torch.tensor([0])).item() == pytest.approx(69.0776, abs=1e-3)


def test_nobody_has_a_label() -> None:
    head, (x, _) = PartialFC(20, 8, kind="adaface", learning_rate=0.1), samples()
    for nobody in (x, torch.zeros(0, 8, requires_grad=True)):
        loss = head.loss(nobody, torch.full((len(nobody),), -1))
        loss.backward()
        assert loss == 0
        assert nobody.grad.eq(0).all()
    assert head.margin.norm_mean == 20


@pytest.mark.parametrize("kind", ["adaface", "curricularface"])
def test_an_interrupted_training_goes_on_bit_for_bit(kind: str) -> None:
    def parts() -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"net": nn.Linear(8, 8), "head": PartialFC(20, 8, kind=kind, sample_rate=0.5)})
        model["head"].learning_rate = 0.1
        return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def train(model: nn.ModuleDict, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x, y = samples(seed=step)
            model["head"]({"embeddings": model["net"](x)}, {"labels": y}).backward()
            optimizer.step()
            optimizer.zero_grad()
            model["head"].auxiliary_step(Progress(step))

    straight, optimizer = parts()
    train(straight, optimizer, range(20))
    first, optimizer = parts()
    train(first, optimizer, range(10))
    saved = {k: v.clone() for k, v in first.state_dict().items()}
    second, other = parts()
    second.load_state_dict(saved)
    other.load_state_dict(optimizer.state_dict())
    train(second, other, range(10, 20))
    for key, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert {"head.weight", "head.momentum", "head.draws"} < saved.keys()


class Net(nn.Linear):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"embeddings": super().forward(x)}


class Identities(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": index % 20, "id": index}


def test_the_trainer_steps_saves_and_resumes_it_bit_for_bit(tmp_path: Path) -> None:
    def run(name: str, *stop: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        student, head = Net(8, 8), PartialFC(20, 8, kind="adaface", sample_rate=0.5)
        options = {"num_train_epochs": 5, "save_strategy": "steps", "save_steps": 10, "optim": "sgd"}
        kd.Trainer(
            student,
            task_loss=head,
            args=arguments(tmp_path / name, **options),
            train_dataset=Identities(),
            callbacks=list(stop),
        ).train(resume_from_checkpoint=True)
        assert (head.velocity != 0).any()
        return weights(nn.ModuleDict({"student": student, "head": head}))

    straight = run("straight")
    run("parts", StopAfter(10))
    assert distance(run("parts"), straight) == 0.0


def test_errors_are_sentences() -> None:
    head, (x, y) = PartialFC(20, 8), samples()
    wrong = y.where(torch.arange(6) != 4, 20)
    with pytest.raises(DataError, match=r"sample 4 of the batch \(id 104\) has label 20, but the head has 20 ident"):
        head(x, {"labels": wrong, "id": torch.arange(100, 106)})
    with pytest.raises(ShapeError, match=r"embeddings \(N, 8\), got \(6, 5\)"):
        head(torch.zeros(6, 5), {"labels": y})
    with pytest.raises(CheckpointError, match=r"`weight` is \(19, 8\), this Partial FC needs \(20, 8\)"):
        head.load_state_dict(PartialFC(19, 8).state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"momentum"'):
        head.load_state_dict(PartialFC(20, 8, momentum=0.0).state_dict())
    for options, words in (
        ({"kind": "cosfase"}, "did you mean 'cosface'"),
        ({"sample_rate": 1.5}, "`sample_rate` must be in"),
        ({"momentum": -1.0}, "`momentum` must not be negative"),
        ({"compat": "tface"}, "`compat` must be None or 'official'"),
    ):
        with pytest.raises(TaskkdError, match=words):
            PartialFC(20, 8, **options)
    with pytest.raises(TaskkdError, match="3 identities cannot be shared by 4 ranks"):
        shard(3, 0, 4)


# ---- two ranks (torchrun, gloo)


def results(folder: Path, ranks: int) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    run_job(str(folder), ranks=ranks, script=partial_fc_job.__file__, timeout=150)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("one"), 1)[0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, single: dict[str, Any]) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    torch.save({k: single["arcface"][k] for k in ("net", "head", "optimizer")}, folder / "other.pt")
    return results(folder, 2)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """But for rounding, which a few steps of a steep loss make larger."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert (value - other[key]).abs().max() <= 1e-4 * value.abs().max().clamp(min=1e-3), key


@pytest.mark.slow
@pytest.mark.parametrize("name", [*partial_fc_job.RUNS, "accumulated"])
def test_two_ranks_train_as_one_process_with_the_samples_of_both(
    ranks: list[dict[str, Any]], single: dict[str, Any], name: str
) -> None:
    for rank in ranks:
        assert rank[name]["losses"] == ranks[0][name]["losses"]
        assert rank[name]["losses"] == pytest.approx(single[name]["losses"], rel=1e-5)
        close(rank[name]["net"], single[name]["net"])
        close(rank[name]["head"], single[name]["head"])


@pytest.mark.slow
def test_two_ranks_sample_their_shards_and_resume_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    assert [rank["sampled"]["first"] for rank in ranks] == [0, 11]
    for rank in ranks:
        assert rank["sampled"]["losses"] == ranks[0]["sampled"]["losses"]
        assert rank["resumed"]["more"] == rank["sampled"]["more"]
        for key, value in rank["sampled"]["end"]["head"].items():
            assert torch.equal(value, rank["resumed"]["head"][key]), key


@pytest.mark.slow
def test_a_head_of_two_ranks_goes_on_in_one_process_and_the_reverse(
    ranks: list[dict[str, Any]], single: dict[str, Any], tmp_path: Path
) -> None:
    torch.save({k: ranks[1]["arcface"][k] for k in ("net", "head", "optimizer")}, tmp_path / "other.pt")
    (back,) = results(tmp_path, 1)
    for rank in ranks:  # which went on from what one process saved
        assert rank["loaded"]["losses"] == pytest.approx(back["loaded"]["losses"], rel=1e-5)
        close(rank["loaded"]["head"], back["loaded"]["head"])


@pytest.mark.slow
def test_a_head_that_was_made_before_the_ranks_takes_its_shard(ranks: list[dict[str, Any]]) -> None:
    assert [rank["late"]["rows"] for rank in ranks] == [11, 10]
    assert all(rank["late"]["same"] for rank in ranks)
    assert tuple(ranks[0]["late"]["collected"]) == (partial_fc_job.CLASSES, partial_fc_job.SIZE)


@pytest.mark.slow
def test_gathered_statistics_are_those_of_one_process(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    for rank in ranks:
        close(rank["statistics"], single["statistics"])


@pytest.mark.slow
def test_two_ranks_equal_the_authors_code_on_two_ranks(ranks: list[dict[str, Any]]) -> None:
    case = np.load(partial_fc_job.CASES / "pfc_ws2_full_cos.npz")
    for number, rank in enumerate(ranks):
        for name, tolerance in (("loss", 1e-5), ("grad_x", 1e-4), ("grad_weight", 1e-4)):
            prefix = "out_" if name == "loss" else ""
            want = torch.from_numpy(np.array(case[f"{prefix}{name}_rank{number}"])).double()
            assert (rank["parity"][name].double() - want).abs().max() <= tolerance * want.abs().max(), name
