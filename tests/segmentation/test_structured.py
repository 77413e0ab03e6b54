"""Structured distillation: what each preset builds, who gets which gradient, and that whole runs resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import taskkd as kd
from taskkd import losses
from taskkd.errors import RecipeError, ShapeError
from taskkd.segmentation.discriminators import SelfAttentionDiscriminator
from taskkd.segmentation.methods import METHODS
from taskkd.segmentation.methods.structured import Holistic, pixel_sum
from taskkd.terms import Run
from tests.engine import StopAfter, arguments, changed, distance, weights
from tests.segmentation.domains import Net, Pictures, batch, task_loss

PRESETS = ["corrected", "ce208e1", "d1ec858", "cvpr_19", "cirkd"]


def prepared(teacher: Net | None = None, data: Any = None, **options: Any) -> kd.Distiller:
    student = Net()
    teacher = Net(8, seed=1) if teacher is None else teacher
    method = METHODS["structured"](student, teacher, **{"width": 4, **options})
    torch.manual_seed(0)
    pair = kd.Distiller(student, teacher, method.stages[0].terms, task_loss=task_loss)
    pair.prepare(batch() if data is None else data)
    pair.set_total(10)
    return pair


def judge_of(pair: kd.Distiller) -> SelfAttentionDiscriminator:
    term = pair.terms["holistic"]
    assert isinstance(term, Holistic)
    judge = term.discriminator
    assert isinstance(judge, SelfAttentionDiscriminator)
    return judge


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [("corrected", (80, 0.5, 0.1)), ("ce208e1", (10, 0.5, 0.1)), ("d1ec858", (10, 0.5, 0.1)),
     ("cvpr_19", (10, 0.5, 0.1)), ("cirkd", (1, 10, 1e-3))],
)  # fmt: skip
def test_weights_are_the_published_ones(preset: Any, sizes: tuple[float, ...]) -> None:
    terms = METHODS["structured"](Net(), Net(), preset=preset).stages[0].terms
    found = {t.name: t.schedule.value for t in terms}
    assert found == pytest.approx(dict(zip(("pixels", "pairs", "holistic"), sizes, strict=True)))
    for name in ("pixel", "pair", "holistic"):
        fewer = METHODS["structured"](Net(), Net(), preset=preset, **{f"{name}_weight": 0.0}).stages[0].terms
        assert {t.name for t in fewer} == found.keys() - {name, f"{name}s"}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no preset 'cirk' \(did you mean 'cirkd'"):
        METHODS["structured"](Net(), Net(), preset="cirk")
    with pytest.raises(RecipeError, match="looks at all pixels"):
        METHODS["structured"](Net(), Net(), preset="ce208e1", ignore="padding")
    with pytest.raises(RecipeError, match="the student has 3 classes, the teacher 4"):
        METHODS["structured"](Net(), Net(classes=4))
    bare = Net()
    bare.views.feature = None
    with pytest.raises(RecipeError, match="the teacher does not name its features"):
        METHODS["structured"](Net(), bare)
    assert len(METHODS["structured"](Net(), bare, pair_weight=0.0).stages[0].terms) == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_the_players_move_in_turn(preset: Any) -> None:
    """The student's step leaves the judge as it was but for its vectors, the judge's step the student (A7)."""
    pair = prepared(preset=preset)
    optimizer = torch.optim.SGD(pair.parameters(), 0.01)
    judge = judge_of(pair)
    channels = judge.channels
    assert channels == (6 if preset in ("corrected", "cvpr_19") else 3)
    for seed in range(2):
        parameters = {n: p.clone() for n, p in judge.named_parameters()}
        out = pair(**batch(seed=seed))
        out["loss"].backward()
        assert all(v.isfinite() for v in out.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in pair.student.parameters())
        assert all(torch.equal(p, parameters[n]) and p.grad is None for n, p in judge.named_parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        student = weights(pair.student)
        assert pair.auxiliary_step()["holistic_discriminator"].isfinite()
        assert all(p.grad is None for p in pair.student.parameters())
        assert changed(student, weights(pair.student)) == set()
        assert any(not torch.equal(p, parameters[n]) for n, p in judge.named_parameters())
        pair.step()


@pytest.mark.parametrize(
    ("strides", "size", "count"), [((4, 8), (64, 64), 2), ((8, 4), (68, 44), 1), ((4, 4), (300, 260), 1)]
)
def test_strides_sizes_and_one_image(strides: tuple[int, int], size: tuple[int, int], count: int) -> None:
    """Maps of 8 to 75 pixels, sides that are multiples of nothing."""
    teacher = Net(8, stride=strides[1], seed=1)
    method = METHODS["structured"](Net(stride=strides[0]), teacher, width=4)
    pair = kd.Distiller(Net(stride=strides[0]), teacher, method.stages[0].terms, task_loss=task_loss)
    before = weights(teacher)
    data = batch(count, size)
    pair.prepare(data)
    pair.set_total(1)
    out = pair(**data)
    out["loss"].backward()
    assert all(v.isfinite() for v in out.values()) and pair.auxiliary_step()["holistic_discriminator"].isfinite()
    assert all(p.grad is not None for p in pair.student.parameters())
    assert distance(before, weights(teacher)) == 0


def test_unlabelled_images_and_batches_without_labels() -> None:
    pair = prepared()
    out = pair(**batch(targets="all"))
    assert out["task"] == 0 and all(out[n] > 0 for n in ("pixels", "pairs"))
    free = kd.Distiller(
        Net(), Net(8, seed=1), METHODS["structured"](Net(), Net(), width=4).stages[0].terms, task_weight=0
    )
    data = {"images": batch()["images"]}
    free.prepare(data)
    free.set_total(1)
    assert free(**data)["loss"].isfinite()


def test_the_corrected_pixels_are_a_mean_and_the_released_a_sum() -> None:
    values: dict[str, Any] = {}
    data = batch(2)
    twice = {k: torch.cat([v, v]) for k, v in data.items()}
    for preset in ("corrected", "ce208e1"):
        pair = prepared(preset=preset, data=data)
        values[preset] = [pair(**d)["pixels"].item() for d in (data, twice)]
    assert values["corrected"][0] == pytest.approx(values["corrected"][1], rel=1e-5)
    assert values["ce208e1"][0] * 2 == pytest.approx(values["ce208e1"][1], rel=1e-5)


def test_pixels_over_classes_or_over_memory() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 2, 4, 3, 6).double().unbind()
    rows = losses.soft_cross_entropy(s.permute(0, 2, 3, 1).reshape(-1, 4), t.permute(0, 2, 3, 1).reshape(-1, 4))
    assert pixel_sum(s, t).item() == pytest.approx(2 * rows.item())
    wrong = losses.soft_cross_entropy(s.reshape(-1, 4), t.reshape(-1, 4))
    assert pixel_sum(s, t, over="memory").item() == pytest.approx(2 * wrong.item())
    assert pixel_sum(s, t, over="memory") != pixel_sum(s, t)


def test_padding_counts_nothing_before_the_judge() -> None:
    pair, data = prepared(), batch()
    valid = torch.ones(4, 64, 64, dtype=torch.bool)
    valid[:, 32:] = False
    run = Run({"valid": valid}, None, *({"head": torch.randn(4, 3, 16, 16)} for _ in range(2)))
    value = pair.terms["pixels"](run)
    run.teacher["head"][:, :, 8:] += 5 * torch.randn(4, 3, 8, 16)
    assert value == pair.terms["pixels"](run)
    assert pair(**data, valid=valid)["pixels"] != pair(**data)["pixels"]


def test_the_judge_of_the_corrected_preset_sees_probabilities_and_the_image() -> None:
    pair, data = prepared(), batch()
    seen: list[list[Tensor]] = []
    judge_of(pair).register_forward_pre_hook(lambda _, args: seen.append(list(args)))
    pair(**data)
    pair.auxiliary_step()
    assert len(seen) == 4  # the student's move; teacher, student and the penalty between
    for maps, image in seen:
        assert maps.shape == (4, 3, 16, 16) == image.shape and maps.min() >= 0
        torch.testing.assert_close(maps.sum(1), torch.ones(4, 16, 16))
        torch.testing.assert_close(image, torch.nn.functional.interpolate(data["images"], (16, 16), mode="bilinear"))
    assert seen[3][0].requires_grad and not seen[3][1].requires_grad
    both = prepared(preset="cvpr_19")
    judge_of(both).register_forward_pre_hook(lambda _, args: seen.append(list(args)))
    both(**data)
    both.auxiliary_step()
    assert all(t.requires_grad for t in seen[-1])  # its penalty is on the image, too


def test_half_precision_and_other_classes() -> None:
    pair = prepared()
    with torch.autocast("cpu", torch.bfloat16):
        out = pair(**batch())
    assert out["holistic"].dtype == torch.float32 and out["loss"].isfinite()
    term = METHODS["structured"](Net(), Net(), width=4).stages[0].terms[-1]
    wrong = Run(
        batch(),
        None,
        {"head": torch.randn(4, 3, 8, 8), "batch.images": batch()["images"]},
        {"head": torch.randn(4, 5, 8, 8)},
    )
    with pytest.raises(ShapeError, match="term 'holistic', tap 'head'"):
        term.build(wrong)


# ---- resuming


def trainer(folder: Path, name: str, *callbacks: Any, **options: Any) -> kd.Trainer:
    student, teacher = Net(), Net(8, seed=1)
    return kd.Trainer(
        student,
        teacher=kd.Frozen(teacher),
        method=METHODS[name](student, teacher, width=4, **options),
        args=arguments(
            folder, per_device_train_batch_size=2, num_train_epochs=2, logging_strategy="steps", logging_steps=1
        ),
        train_dataset=Pictures(8),
        task_loss=task_loss,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("name", ["structured", "domain_adaptive"])
def test_resuming_is_bit_exact(name: str, tmp_path: Path) -> None:
    """Judges, their optimisers and the random numbers of the penalty are in the checkpoint (A12)."""
    whole = trainer(tmp_path / "whole", name)
    whole.train()
    trainer(tmp_path / "run", name, StopAfter(5)).train()
    again = trainer(tmp_path / "run", name)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == 8
    logged = [[log for log in t.state.log_history if "loss" in log] for t in (whole, again)]
    assert logged[0] == logged[1] and len(logged[0]) == 8
    assert any(key.endswith("_discriminator") for key in logged[0][-1])
    assert changed(weights(whole.distiller), weights(again.distiller)) == set()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["structured", "domain_adaptive"])
def test_compiled_whole_and_once(name: str) -> None:
    student, teacher = Net(), Net(8, seed=1)
    terms = METHODS[name](student, teacher, width=4).stages[0].terms
    pair = kd.Distiller(student, teacher, terms, task_loss=task_loss)
    pair.prepare(batch())
    pair.set_total(3)
    eager, counter = copy.deepcopy(pair), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pair, backend=counter, fullgraph=True)
    for seed in range(3):
        found = []
        for one in (compiled, eager):
            out = one(**batch(seed=seed))
            out["loss"].backward()
            torch.manual_seed(seed)
            found.append({**out, **one.auxiliary_step()})
            one.step()
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_a_copy_has_a_judge_of_its_own() -> None:
    pair = prepared()
    twin = copy.deepcopy(pair)
    before = weights(judge_of(pair))
    twin(**batch())
    twin.auxiliary_step()
    assert distance(before, weights(judge_of(pair))) == 0 < distance(before, weights(judge_of(twin)))
