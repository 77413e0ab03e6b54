"""Margin heads: trained, frozen, sampled; what they refuse; memory; resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskkd as kd
from taskkd.checkpoints import load_state, save_state
from taskkd.errors import DataError, ShapeError, TaskkdError
from taskkd.face import margins
from taskkd.face.heads import MarginHead, initial_weight, sample_classes

KINDS = ["arcface", "cosface", "adaface", "curricularface"]


def samples(count: int = 6, size: int = 8, classes: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 10 * torch.randn(count, size, generator=generator)
    return x, torch.randint(0, classes, (count,), generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_finite_where_an_embedding_is_a_centre_its_opposite_or_zero(kind: str, dtype: torch.dtype) -> None:
    head = MarginHead(20, 8, kind=kind)
    x = torch.stack([head.weight.detach()[0], -head.weight.detach()[1], torch.zeros(8)]).to(dtype).requires_grad_()
    loss = head(x, {"labels": torch.tensor([0, 1, 2])})
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    assert x.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()
    assert all(b.isfinite().all() for b in head.buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_identity_changes_nothing(kind: str) -> None:
    x, y = samples()
    one, other = MarginHead(20, 8, kind=kind, ema=0.5), MarginHead(20, 8, kind=kind, ema=0.5)
    expected = one({"embeddings": x}, {"labels": y})
    more = torch.cat([x, torch.full((2, 8), 1e6)])
    torch.testing.assert_close(other({"embeddings": more}, {"labels": F.pad(y, (0, 2), value=-1)}), expected)
    torch.testing.assert_close(one.state_dict(), other.state_dict())
    before = {k: v.clone() for k, v in one.state_dict().items()}
    for nobody in (x.clone().requires_grad_(), torch.zeros(0, 8, requires_grad=True)):
        nothing = one(nobody, {"labels": torch.full((len(nobody),), -1)})
        assert nothing == 0
        nothing.backward()
        assert nobody.grad.eq(0).all()
    assert all(torch.equal(v, before[k]) for k, v in one.state_dict().items())


def test_precision_does_not_depend_on_autocast_and_doubles_stay_doubles() -> None:
    head, (x, y) = MarginHead(20, 8), samples()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(x, {"labels": y})
    assert inside == head(x, {"labels": y})
    assert head.double().loss(x.double(), y).dtype == torch.float64


def test_repeating_a_batch_does_not_change_the_loss_and_a_mask_leaves_samples_out() -> None:
    head, (x, y) = MarginHead(20, 8), samples()
    value = head.loss(x, y)
    torch.testing.assert_close(head.loss(x.repeat(2, 1), y.repeat(2)), value)
    mask = torch.tensor([1, 1, 0, 0, 0, 0])
    torch.testing.assert_close(head.loss(x, y, mask=mask), head.loss(x[:2], y[:2]))


def test_weights_start_alike_on_all_ranks_and_leave_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    weight = MarginHead(50, 8, seed=3).weight
    assert torch.equal(weight, MarginHead(50, 8, seed=3).weight)
    assert not torch.equal(weight, MarginHead(50, 8, seed=4).weight)
    assert torch.equal(torch.random.get_rng_state(), state)
    whole = initial_weight(20000, 4, 1)
    assert whole.std().item() == pytest.approx(0.01, rel=0.02)
    assert torch.equal(whole[8000:17000], initial_weight(20000, 4, 1, 8000, 9000))


def test_centres_start_a_trained_head_and_are_the_weight_of_a_frozen_one() -> None:
    centres = torch.randn(20, 8)
    trained = MarginHead(20, 8, centres=centres)
    assert torch.equal(trained.weight, centres)
    assert isinstance(trained.weight, nn.Parameter)
    frozen = MarginHead(20, 8, centres=centres, trained=False)
    assert not list(frozen.parameters())
    torch.testing.assert_close(frozen.weight.norm(dim=1), torch.ones(20))
    x, y = samples()
    torch.testing.assert_close(frozen.loss(x, y), trained.loss(x, y))
    torch.testing.assert_close(MarginHead(20, 8).loss(x, y, weight=centres), trained.loss(x, y))


def test_half_storage_gives_the_loss_and_the_gradient_of_full_storage() -> None:
    (x, y), results = samples(), []
    centres = torch.randn(20, 8)
    for storage in ("float32", "float16"):
        leaf = x.clone().requires_grad_()
        head = MarginHead(20, 8, centres=centres, trained=False, storage=storage)
        loss = head.loss(leaf, y)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert head.weight.dtype == torch.float16
    torch.testing.assert_close(results[0], results[1], rtol=2e-3, atol=1e-4)


def test_a_share_of_frozen_centres_has_the_labels_and_is_drawn_anew() -> None:
    labels = torch.tensor([3, 17, -1, 3])
    generator = torch.Generator().manual_seed(0)
    first, second = (sample_classes(labels, 50, 0.2, generator) for _ in range(2))
    for index in (first, second):
        assert len(index.unique()) == 10
        assert index.tolist() == sorted(index.tolist())
        assert {3, 17} <= set(index.tolist())
    assert not torch.equal(first, second)
    assert sample_classes(labels, 50, 0.02, generator).tolist() == [3, 17]  # more labels than that
    x, y = samples()
    head = MarginHead(20, 8, trained=False, sample_rate=0.5)
    values = [head.loss(x, y).item() for _ in range(3)]
    whole = head.eval().loss(x, y).item()
    assert len({*values, whole}) == 4
    assert max(values) < whole  # fewer competitors
    again = MarginHead(20, 8, trained=False, sample_rate=0.5)
    assert [again.loss(x, y).item() for _ in range(3)] == values


def test_statistics_of_norms_are_running_means_that_evaluation_leaves_alone() -> None:
    head, (x, y) = MarginHead(20, 8, kind="adaface", ema=0.1), samples()
    norms = x.norm(dim=1)
    head.loss(x, y)
    assert head.margin.norm_mean.item() == pytest.approx(0.1 * norms.mean().item() + 0.9 * 20)
    assert head.margin.norm_std.item() == pytest.approx(0.1 * norms.std().item() + 0.9 * 100)
    before = head.margin.norm_std.clone()
    head.loss(x[:1], y[:1])  # one sample has no deviation
    assert head.margin.norm_std == before
    mean = head.margin.norm_mean.clone()
    head.eval().loss(x, y)
    assert head.margin.norm_mean == mean


OPTIONS: list[dict[str, Any]] = [
    {"kind": "adaface"},
    {"kind": "curricularface"},
    {"trained": False, "sample_rate": 0.4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["adaface", "curricularface", "sampled"])
def test_an_interrupted_training_goes_on_bit_for_bit(options: dict[str, Any]) -> None:
    def parts() -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"net": nn.Linear(5, 8), "head": MarginHead(20, 8, **options)})
        return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def train(model: nn.ModuleDict, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x, y = samples(size=5, seed=step)
            optimizer.zero_grad()
            model["head"]({"embeddings": model["net"](x)}, {"labels": y}).backward()
            optimizer.step()

    straight, optimizer = parts()
    train(straight, optimizer, range(20))
    first, optimizer = parts()
    train(first, optimizer, range(10))
    second, other = parts()
    second.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(second, other, range(10, 20))
    for key, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_in_a_distiller_it_is_trained_and_saved_beside_the_student(tmp_path: Path) -> None:
    def distiller() -> kd.Distiller:
        return kd.Distiller(nn.Linear(5, 8), None, task_loss=MarginHead(20, 8, kind="adaface", seed=1))

    one = distiller()
    x, y = samples(size=5)
    one(input=x, labels=y)["loss"].backward()
    assert sum(p.grad is not None for p in one.parameters()) == 3
    assert set(one.student.state_dict()) == {"weight", "bias"}
    save_state(one, tmp_path / "state.safetensors")
    other = distiller()
    assert other.task_loss.margin.norm_mean == 20
    load_state(other, tmp_path / "state.safetensors")
    assert other.task_loss.margin.norm_mean == one.task_loss.margin.norm_mean != 20


def test_errors_are_sentences() -> None:
    head, (x, y) = MarginHead(20, 8), samples()
    wrong = y.where(torch.arange(6) != 4, 20)
    with pytest.raises(DataError, match=r"sample 4 of the batch \(id 104\) has label 20, but the head has 20 ident"):
        head(x, {"labels": wrong, "id": torch.arange(100, 106)})
    with pytest.raises(ShapeError, match=r"embeddings \(N, 8\), got \(6, 5\)"):
        head(torch.zeros(6, 5), {"labels": y})
    with pytest.raises(ShapeError, match=r"integer labels \(6,\), got \(5,\)"):
        head.loss(x, y[:5])
    with pytest.raises(TaskkdError, match="`labels`, and there are none: 'images'"):
        head(x, {"images": x})
    with pytest.raises(TaskkdError, match="reads the model's `embeddings`, and its output has none: 'logits'"):
        head({"logits": x}, {"labels": y})
    with pytest.raises(ShapeError, match=r"`centres` must be \(20, 8\).*got \(19, 8\)"):
        MarginHead(20, 8, centres=torch.zeros(19, 8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "arcfase"}, "`kind` must be one of .*did you mean 'arcface'"),
        ({"kind": "adaface", "variant": "insightface"}, "`variant` of 'adaface' must be one of 'exact', 'cvlface'"),
        ({"s": 0.0}, "`s` must be positive"),
        ({"ema": 0.0}, "`ema` must be in"),
        ({"easy_margin": True, "kind": "cosface"}, "`easy_margin` must be False but for exact ArcFace"),
        ({"sample_rate": 0.5}, "use `PartialFC`"),
        ({"sample_rate": 0.0, "trained": False}, "`sample_rate` must be in"),
        ({"storage": "float16"}, "for frozen centres"),
        ({"storage": "int8"}, "must be 'float32' or 'float16'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskkdError, match=words):
        MarginHead(20, 8, **options)


def test_default_margins_are_the_papers() -> None:
    assert {k: MarginHead(4, 4, kind=k).margin.m for k in margins.VARIANTS} == {  # type: ignore[arg-type]
        "arcface": 0.5,
        "cosface": 0.4,
        "adaface": 0.4,
        "curricularface": 0.5,
    }


MEMORY = """
import gc, json, torch
from taskkd.face.heads import MarginHead
torch.set_num_threads(1)
def resident():
    gc.collect()
    # What is anonymous: pages of libraries go and come as other processes need memory.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6
centres, x, y = torch.ones(100_000, 512), torch.randn(8, 512, requires_grad=True), torch.arange(8)
found = {}
for storage in ("float16", "float32"):
    MarginHead(9, 512, centres=centres[:9], trained=False, storage=storage).loss(x, y).backward()
    before = resident()
    head = MarginHead(100_000, 512, centres=centres, trained=False, storage=storage)
    built = resident() - before
    head.loss(x, y).backward()
    found[storage] = [built, resident() - before, len(list(head.parameters()))]
    del head
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_frozen_centres_of_100k_identities_take_their_own_memory_only() -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # blocks that are freed go back to the system
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=environment)
    for storage, (built, trained, parameters) in json.loads(done.stdout).items():
        assert 90 < built < {"float32": 250, "float16": 130}[storage]
        assert trained < {"float32": 250, "float16": 130}[storage]
        assert parameters == 0
