"""The methods on relations: any pair of networks, hard batches, their memories, resuming."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import taskkd as kd
from taskkd.banks import ClassQueues
from taskkd.errors import RecipeError, ShapeError, TaskkdError
from taskkd.segmentation.methods import METHODS
from taskkd.segmentation.methods.cirkd_memory import ChannelMemory, PixelMemory
from taskkd.segmentation.methods.ifvd import IntraClass
from taskkd.terms import Run
from tests.engine import StopAfter, arguments, changed, distance, weights
from tests.segmentation.tiny import CLASSES, TinyNetwork, batch, cross_entropy

MINE = ["af_dcd", "attention_transfer", "cirkd", "dsd", "ifvd", "masked_generative"]
SMALL: dict[str, dict[str, Any]] = {
    "cirkd": {"pixels": 40, "regions": 40, "channel": 1.0, "channel_memory": 0.1, "channel_mse": 1.0},
    "af_dcd": {"groups": 4},
}


def networks(stride: int = 16) -> tuple[TinyNetwork, TinyNetwork]:
    """A student of 6 channels and a stride, a teacher of 16 and stride 8."""
    return TinyNetwork(3, stride), TinyNetwork(8, 8, seed=1)


def distiller_of(name: str, stride: int = 16, **options: Any) -> kd.Distiller:
    student, teacher = networks(stride)
    (stage,) = METHODS[name](student, teacher, **SMALL.get(name, {}), **options).stages
    terms = stage.terms
    return kd.Distiller(student, kd.Frozen(teacher), terms, task_loss=cross_entropy, task_weight=stage.task_weight)


def hard(kind: str) -> dict[str, Tensor]:
    data = batch(1 if kind == "one image" else 2, *((49, 71) if kind == "odd size" else (64, 64)))
    if kind == "no labels":
        data["labels"] = torch.full_like(data["labels"], 255)
    elif kind == "one class":
        data["labels"] = torch.ones_like(data["labels"])
    elif kind == "class absent":
        data["labels"] = data["labels"].masked_fill(data["labels"] == 2, 255)
    elif kind == "unlabelled":
        data["unlabelled"] = torch.tensor([False, True])
        data["labels"][1] = 255
    elif kind == "no mask":
        del data["valid"], data["unlabelled"], data["id"]
    return data


@pytest.mark.parametrize("name", MINE)
class TestEveryMethod:
    """Acceptance A6."""

    def test_hard_batches_are_finite_and_train_the_student_alone(self, name: str) -> None:
        for stride in (8, 16):
            distiller = distiller_of(name, stride)
            teacher = distiller.teacher.model  # type: ignore[union-attr]
            before = copy.deepcopy(teacher.state_dict())
            distiller.prepare(batch())
            distiller.train()
            for kind in ("plain", "no labels", "one class", "class absent", "odd size", "one image", "unlabelled"):
                if stride == 8 and kind not in ("plain", "odd size"):
                    continue
                distiller.zero_grad(set_to_none=True)
                found = distiller(**hard(kind))
                assert all(value.isfinite() for value in found.values()), (kind, found)
                found["loss"].backward()
                own = [p.grad for p in distiller.parameters() if p.grad is not None]
                assert all(g.isfinite().all() for g in own), kind
                assert distiller.student.early[0].weight.grad.abs().sum() > 0, kind
            assert all(p.grad is None for p in teacher.parameters())
            assert all(torch.equal(before[n], v) for n, v in teacher.state_dict().items())

    def test_a_hand_loop_needs_no_masks(self, name: str) -> None:
        distiller = distiller_of(name)
        data = hard("no mask")
        distiller.prepare(data)
        assert distiller(**data)["loss"].isfinite()

    def test_every_term_pulls_at_the_student(self, name: str) -> None:
        prepared = distiller_of(name).prepare(batch())
        pulls = {t.name: t.gradient_norm for t in prepared.terms}
        assert len(pulls) >= 2
        assert all(pull > 0 for pull in pulls.values()), pulls


def test_options_are_those_of_recipes() -> None:
    from taskkd.recipes import options_schema

    for name in MINE:
        defaults = {
            n: p.default for n, p in inspect.signature(METHODS[name]).parameters.items() if p.kind is p.KEYWORD_ONLY
        }
        options_schema(METHODS[name])(**defaults)


def test_weights_are_those_published() -> None:
    def weights_of(name: str, **options: Any) -> dict[str, float]:
        return {t.name: t.schedule.value for t in METHODS[name](*networks(), **options).stages[0].terms}

    assert weights_of("ifvd") == {"variation": 50.0, "logits": 10.0 / CLASSES}
    assert weights_of("cirkd") == {"minibatch": 1.0, "memory": 1.0, "logits": 1.0}
    assert weights_of("attention_transfer") == {"attention": 10000.0, "logits": 1.0}
    assert weights_of("dsd") == {"attention": 1000.0, "categories": 10.0, "logits": 1.0}
    assert weights_of("masked_generative") == {"generation": 2e-5, "channels": 3.0}
    terms: Any = METHODS["masked_generative"](*networks()).stages[0].terms
    assert [t.ignore for t in terms] == ["padding", "padding"]
    assert weights_of("af_dcd", kd=0.0) == {"contrast": 1.0}
    (term, *_) = METHODS["af_dcd"](*networks()).stages[0].terms
    assert term.weights == {"mimic": 4e-5, "contrast": 16e-3}
    memory = METHODS["cirkd"](*networks()).stages[0].terms[1]
    assert memory.weights == {"pixel": 0.1, "region": 0.1}
    assert memory.drawn == {"pixel": 1025, "region": 257}


def test_networks_without_the_taps_that_are_needed_are_refused() -> None:
    student, teacher = networks()
    student.views.feature = None
    with pytest.raises(RecipeError, match="the student does not name its features"):
        METHODS["cirkd"](student, teacher)
    (term, *_) = METHODS["dsd"](student, teacher).stages[0].terms
    assert (term.student_taps, term.teacher_taps) == (("late", "classifier"),) * 2
    teacher.views.stages = ()
    with pytest.raises(RecipeError, match="nothing but logits in common"):
        METHODS["dsd"](student, teacher)
    with pytest.raises(RecipeError, match=r"the teacher's `views\.stages`"):
        METHODS["af_dcd"](student, teacher)
    student.classes = ("a", "b")
    for name, options in (("dsd", {"pixel": 0.0}), ("masked_generative", {"on": "feature", "weight": 0.0})):
        student.views.feature = "classifier:in"
        with pytest.raises(RecipeError, match=r"the student has 2, the teacher\s+4"):
            METHODS[name](student, teacher, **options)


# ---- labels


def run(s: Tensor, t: Tensor, **data: Tensor) -> Run:
    return Run(data, None, {"x": s, **{f"batch.{n}": v for n, v in data.items()}}, {"x": t})


def test_variation_leaves_samples_without_labels_out() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 6, 6)
    labels = torch.randint(0, 3, (2, 12, 12))
    labels[0, :6] = labels[1] = 255
    free = torch.tensor([False, True])
    for count in ("labels", "none"):
        term = IntraClass("v", "x", "x", classes=3, count=count)  # type: ignore[arg-type]
        both = term(run(s, t, labels=labels, unlabelled=free))
        torch.testing.assert_close(both, term(run(s[:1], t[:1], labels=labels[:1])))
    kept, every = (IntraClass("v", "x", "x", classes=3, count=c)(run(s, t, labels=labels)) for c in ("labels", "none"))
    torch.testing.assert_close(kept, every * 4)  # a quarter of all pixels has a class


# ---- memories


def memory(**options: Any) -> PixelMemory:
    options = {"pixels": 30, "regions": 6, "draw_pixels": 5, "draw_regions": 3, "storage": "float32"} | options
    return PixelMemory("memory", "x", "x", classes=3, **options)


def coloured() -> Run:
    """Each class has a direction of its own in the teacher's features."""
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (2, 6, 6))
    labels[0, 0] = 255
    t = F.one_hot(labels.clamp(max=2), 3).movedim(3, 1).float() * 5
    return run(torch.randn(2, 4, 6, 6, requires_grad=True), t, labels=labels)


@pytest.mark.parametrize("compat", [None, "official"])
def test_the_memory_of_a_class_holds_its_own_pixels(compat: Any) -> None:
    given, term = coloured(), memory(compat=compat)
    term.build(given)
    term(given)
    rows, filled = term.queues["pixel"].rows, term.queues["pixel"].places
    assert filled.min() > 8
    own = torch.eye(3)
    right = [torch.equal(rows[k, : filled[k]], own[k].expand(int(filled[k]), 3)) for k in range(3)]
    assert right == [compat is None] * 3  # the released code takes the first pixels of the image
    for k in range(3):
        torch.testing.assert_close(term.queues["region"].rows[k, :2], own[k].expand(2, 3))


def test_the_memory_of_a_batch_without_labels_gives_0_and_stays() -> None:
    given, term = coloured(), memory()
    term.build(given)
    given.batch["labels"].fill_(255)  # type: ignore[union-attr]
    before = copy.deepcopy(term.queues.state_dict())
    value = term(given)
    assert value == 0
    value.backward()
    assert given.student["x"].grad.abs().max() == 0
    assert changed(before, term.queues.state_dict()) == set()


def test_the_memory_stays_within_its_limit_and_holds_what_is_drawn() -> None:
    torch.manual_seed(0)
    given = run(torch.randn(1, 4, 4, 4), torch.randn(1, 64, 4, 4), labels=torch.zeros(1, 4, 4, dtype=torch.long))
    for classes, limit in ((10, 1.0), (40, 1.0), (10, 0.5)):
        term = PixelMemory("m", "x", "x", classes=classes, draw_pixels=3, draw_regions=2, limit=limit)
        term.build(given)
        taken = sum(b.numel() * b.element_size() for b in term.buffers() if b.dtype == torch.float16)
        assert 0.95 * limit * 1e6 < taken <= limit * 1e6
    tight = PixelMemory("m", "x", "x", classes=10, draw_pixels=30, draw_regions=20, limit=1e-9)
    tight.build(given)
    assert [q.rows.shape[1] for q in tight.queues.values()] == [30, 20]
    assert tight(given).dtype == torch.float32


def test_the_memory_looks_at_no_more_pixels_than_said() -> None:
    labels = torch.zeros(1, 64, 96, dtype=torch.long)
    given = run(torch.randn(1, 4, 32, 48), torch.randn(1, 6, 32, 48), labels=labels)
    term = memory(most=100)
    assert [tuple(x.shape[2:]) for x in term.maps(given)] == [(8, 12)] * 2
    term.build(given)
    assert term(given).isfinite()


def test_half_precision_of_the_memory_hardly_matters() -> None:
    values = []
    for storage in ("float16", "float32"):
        torch.manual_seed(0)
        given, term = coloured(), memory(storage=storage)
        term.build(given)
        torch.manual_seed(1)
        values.append(term(given))
    torch.testing.assert_close(*values, rtol=2e-3, atol=0)


def test_channels_of_another_size_fit_the_queue() -> None:
    torch.manual_seed(0)
    term = ChannelMemory("c", "x", "x", channels=20, drawn=5, pushed=4)
    term.build(run(torch.randn(2, 3, 16, 16), torch.randn(2, 5, 16, 16)))
    for size in ((16, 16), (21, 30), (5, 3)):
        s = torch.randn(2, 3, *size, requires_grad=True)
        value = term(run(s, torch.randn(2, 5, *size)))
        assert value.isfinite()
        value.backward()
        assert s.grad is not None
        assert s.grad.abs().sum() > 0
    assert term.queues["channel"].places.tolist() == [12]


def test_queues_take_the_latest() -> None:
    ring, again = (ClassQueues(2, 4, 3, wrap=wrap) for wrap in ("ring", "restart"))  # type: ignore[arg-type]
    again.load_state_dict(ring.state_dict())
    for queue in (ring, again):
        torch.testing.assert_close(queue.rows.norm(dim=2), torch.ones(2, 4))
        untouched = queue.rows[0].clone()
        for value in (1.0, 2.0):
            queue.push(torch.tensor([1]), torch.tensor([3]), torch.full((3, 3), value))
        assert torch.equal(queue.rows[0], untouched)
    assert ring.rows[1, :, 0].tolist() == [2, 2, 1, 2]
    assert ring.places.tolist() == [0, 2]
    assert again.rows[1, :, 0].tolist() == [1, 2, 2, 2]
    assert again.places.tolist() == [0, 0]
    ring.push(torch.tensor([0]), torch.tensor([6]), torch.arange(6.0)[:, None].expand(6, 3))
    assert sorted(ring.rows[0, :, 0].tolist()) == [2, 3, 4, 5]
    assert ring.take(torch.tensor([0, 3])).shape == (4, 3)
    ring.push(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0, 3))
    with pytest.raises(ShapeError, match="rows of 3 features"):
        ring.push(torch.tensor([0]), torch.tensor([1]), torch.zeros(1, 2))
    with pytest.raises(TaskkdError, match="positive"):
        ClassQueues(0, 4, 3)


# ---- resuming


class Streets(torch.utils.data.Dataset[Any]):
    """Eight images with labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[0] for name, value in batch(1, 32, 32, seed=index).items()}


def trainer(folder: Path, *callbacks: Any) -> kd.Trainer:
    student, teacher = networks(8)
    terms = [t for n in ("cirkd", "af_dcd") for t in METHODS[n](student, teacher, **SMALL[n], kd=0.0).stages[0].terms]
    extra = arguments(
        folder, per_device_train_batch_size=2, num_train_epochs=2, logging_strategy="steps", logging_steps=1
    )
    return kd.Trainer(
        student,
        teacher=teacher,
        terms=terms,
        args=extra,
        train_dataset=Streets(),
        task_loss=cross_entropy,
        callbacks=list(callbacks),
    )


def test_resuming_is_bit_exact(tmp_path: Path) -> None:
    """Acceptance A12 with memories of pixels, regions and channels, what is drawn of them, and random masks."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "run", StopAfter(3))
    first.train()
    assert distance(weights(first.distiller), weights(whole.distiller)) > 1e-4
    again = trainer(tmp_path / "run")
    again.train(resume_from_checkpoint=True)
    state = weights(again.distiller)
    assert any("queues.pixel.rows" in name for name in state)
    assert changed(weights(whole.distiller), state) == set()
    logged = [[log for log in t.state.log_history if "loss" in log] for t in (whole, again)]
    assert logged[0][-5:] == logged[1][-5:]
    assert len(logged[0]) == 8


# ---- several ranks


def push_on(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(7)
    queues = ClassQueues(2, 5, 3)
    for classes, counts, rows in chunks(rank):
        queues.push(classes, counts, rows)
    torch.save(queues.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def chunks(rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each step: the second rank has nothing in the first, and more than the first in the second."""
    generator = torch.Generator().manual_seed(rank)
    counts = [[[2], []], [[1, 1], [3, 1, 2]]]
    found = []
    for step in counts:
        own = step[rank]
        classes = torch.arange(len(own)) % 2
        rows = torch.randn(sum(own), 3, generator=generator)
        found.append((classes, torch.tensor(own, dtype=torch.int64), rows))
    return found


@pytest.mark.slow
def test_queues_of_two_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(push_on, (str(tmp_path),), nprocs=2)
    torch.manual_seed(7)
    whole = ClassQueues(2, 5, 3)
    for one, other in zip(chunks(0), chunks(1), strict=True):
        whole.push(*(torch.cat(pair) for pair in zip(one, other, strict=True)))
    for rank in (0, 1):
        assert changed(whole.state_dict(), torch.load(tmp_path / f"{rank}.pt")) == set()


def test_the_page_names_every_option() -> None:
    page = (Path(kd.__file__).parents[1] / "docs" / "methods" / "segmentation-relations.md").read_text()
    for name in MINE:
        section = page.partition(f"\n## `{name}`")[2].partition("\n## ")[0]
        for option, parameter in inspect.signature(METHODS[name]).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                assert f"`{option}`" in section, f"{name}: {option}"
