"""The distiller in a plain loop, compiled, copied, checkpointed and in accelerate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import taskkd as kd
from taskkd import losses, schedules
from taskkd.errors import NonFiniteError, ShapeError, TapError, TaskkdError
from taskkd.preparation import TermReport, even_out
from taskkd.terms import Run, Term
from tests import small


def terms(**options: Any) -> list[Term]:
    return [
        kd.Match("logits", losses.kl_divergence, "out.logits", temperature=4.0, weight=0.9),
        kd.Match("block", losses.mse, "block", adapter="conv1x1", **options),
    ]


@pytest.fixture
def distiller(conv_pair: tuple[nn.Module, nn.Module]) -> kd.Distiller:
    return kd.Distiller(*conv_pair, terms(weight=2.0), task_weight=0.1)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a)


# ---- what forward returns


def test_named_losses(distiller: kd.Distiller) -> None:
    batch = small.conv_batch()
    distiller.prepare(batch)
    out = distiller(**batch)
    assert list(out) == ["loss", "task", "logits", "block"]
    assert all(v.shape == () and v.dtype == torch.float32 for v in out.values())
    assert [n for n, v in out.items() if v.requires_grad] == ["loss"]
    expected = 0.1 * out["task"] + 0.9 * out["logits"] + 2 * out["block"]
    torch.testing.assert_close(out["loss"].detach(), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_equal_to_a_hand_written_loop(
    conv_pair: tuple[nn.Module, nn.Module], dtype: torch.dtype, tolerance: float
) -> None:
    def batch_of(step: int) -> dict[str, Tensor]:
        batch = small.conv_batch(seed=step)
        return {**batch, "image": batch["image"].to(dtype)}

    student, teacher = (model.to(dtype) for model in conv_pair)
    pair = kd.Distiller(
        copy.deepcopy(student), teacher, terms(weight=schedules.warmup(2.0, fraction=0.5)), task_weight=0.1
    )
    pair.prepare(batch_of(0))
    pair.set_total(20)
    adapter = copy.deepcopy(pair.terms["block"].adapters[0])
    ours, by_hand = [], []

    optimiser = torch.optim.SGD(pair.parameters(), 0.05, momentum=0.9)
    for step in range(20):
        out = pair(**batch_of(step))
        out["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        pair.step()
        ours.append(out["loss"].item())

    teacher = copy.deepcopy(teacher).eval()
    optimiser = torch.optim.SGD([*student.parameters(), *adapter.parameters()], 0.05, momentum=0.9)
    for step in range(20):
        batch = batch_of(step)
        s = student.features(batch["image"])
        logits = student.head(s.mean((2, 3)))
        with torch.no_grad():
            t = teacher.features(batch["image"])
            targets = F.log_softmax(teacher.head(t.mean((2, 3))) / 4, 1)
        soft = 16 * F.kl_div(F.log_softmax(logits / 4, 1), targets, reduction="batchmean", log_target=True)
        hint = F.mse_loss(adapter(s), t)
        loss = 0.1 * F.cross_entropy(logits, batch["labels"]) + 0.9 * soft + 2 * min((step + 1) / 10, 1) * hint
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        by_hand.append(loss.item())

    assert ours == pytest.approx(by_hand, rel=tolerance)
    trained = pair.student.state_dict()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-6)


def test_eval_mode_returns_the_output_of_the_student(distiller: kd.Distiller) -> None:
    batch = small.conv_batch()
    distiller.prepare(batch)
    distiller.eval()
    assert torch.equal(distiller(**batch)["logits"], distiller.student(batch["image"])["logits"])
    assert distiller(image=batch["image"])["loss"] is None
    distiller.train()
    assert "block" in distiller(**batch)


def test_a_task_weight_of_zero_needs_no_labels(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = kd.Distiller(*conv_pair, terms(), task_weight=0)
    batch = small.conv_batch()
    del batch["labels"]
    pair.prepare(batch)
    assert set(pair(**batch)) == {"loss", "logits", "block"}
    out = pair(**batch, labels=torch.full((4,), 99))  # labels that the student's loss could not take
    assert out["loss"].isfinite()


def test_no_loss_anywhere(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = kd.Distiller(*conv_pair, [])
    with pytest.raises(
        TaskkdError, match=r"the student's output \(a mapping with the keys 'loss', 'logits'\) has no loss: give"
    ):
        pair(image=small.conv_batch()["image"])
    with pytest.raises(TaskkdError, match="nothing to train: the task weight is 0 and no term is active at this step"):
        kd.Distiller(*conv_pair, [], task_weight=0)(**small.conv_batch())


def test_a_student_that_returns_a_dict_of_losses() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.body(x)
            return {"boxes": y.abs().mean(), "classes": y.square().mean()}

    pair = kd.Distiller(Detector(), Detector(), [kd.Match("body", losses.mse, "body")])
    x = torch.randn(4, 2)
    out = pair(x=x)
    torch.testing.assert_close(out["task"], sum(pair.student(x).values()).detach())


def test_a_task_loss_of_ones_own(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    def task_loss(output: Any, batch: Any) -> Tensor:
        return F.cross_entropy(output["logits"], batch["target"])

    pair = kd.Distiller(*conv_pair, [], task_loss=task_loss)
    batch = small.conv_batch()
    batch["target"] = batch.pop("labels")
    out = pair(**batch)
    expected = F.cross_entropy(pair.student(batch["image"])["logits"], batch["target"])
    torch.testing.assert_close(out["task"], expected.detach())


def test_double_precision_stays_double(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = conv_pair
    pair = kd.Distiller(student.double(), teacher.double(), terms())
    batch = {k: v.double() if v.is_floating_point() else v for k, v in small.conv_batch().items()}
    pair.prepare(batch)
    assert {v.dtype for v in pair(**batch).values()} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_student_has_a_working_adapter(
    conv_pair: tuple[nn.Module, nn.Module], dtype: torch.dtype
) -> None:
    student, teacher = (model.to(dtype) for model in conv_pair)
    pair = kd.Distiller(student, teacher, terms(), task_weight=0)
    batch = small.conv_batch()
    batch["image"] = batch["image"].to(dtype)
    pair.prepare(batch)
    pair(**batch)["loss"].backward()
    adapter = pair.terms["block"].adapters[0]
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in pair.parameters())


def test_autocast_with_an_adapter(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = kd.Distiller(*conv_pair, terms())
    pair.prepare(small.conv_batch())
    plain = pair(**small.conv_batch())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = pair(**small.conv_batch())
    mixed["loss"].backward()
    assert {v.dtype for v in mixed.values()} == {torch.float32}
    assert mixed["loss"].item() == pytest.approx(plain["loss"].item(), rel=0.05)


def test_one_tensor_feeds_many_terms(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    batch, gradients = small.conv_batch(), []
    for count in (1, 4):
        student, teacher = copy.deepcopy(conv_pair)
        many = [kd.Match(f"t{i}", losses.logit_mse, "out.logits", weight=1 / count) for i in range(count)]
        kd.Distiller(student, teacher, many, task_weight=0)(**batch)["loss"].backward()
        gradients.append([p.grad for p in student.parameters()])
    for one, four in zip(*gradients, strict=True):
        torch.testing.assert_close(four, one)


def test_a_term_without_a_teacher(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    class Small(Term):
        student_taps = ("block",)

        def forward(self, run: Run) -> Tensor:
            return run.student["block"].square().mean()

    pair = kd.Distiller(conv_pair[0], None, [Small("small", 0.5)], task_weight=0)
    out = pair(**small.conv_batch())
    torch.testing.assert_close(out["loss"].detach(), out["small"] / 2)


# ---- what is checked at construction


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (
            lambda s, t: kd.Distiller(s, t, [kd.Match("a", losses.mse, "head"), kd.Match("a", losses.mse, "stem")]),
            TaskkdError,
            "two terms are named 'a'; names must be unique.",
        ),
        (lambda s, t: kd.Distiller(s, t, task_weight=-1), TaskkdError, "`task_weight` must not be negative, got -1."),
        (
            lambda s, t: kd.Distiller(s, t, on_nonfinite="ignore"),
            TaskkdError,
            "`on_nonfinite` must be 'raise' or 'skip', got 'ignore'.",
        ),
        (
            lambda s, t: kd.Distiller(s, None, [kd.Match("a", losses.mse, "head")]),
            TaskkdError,
            "there are terms that compare with a teacher, but `teacher` is None.",
        ),
        (
            lambda s, t: kd.Distiller(s, t, [kd.Match("a", losses.mse, "blok")]),
            TapError,
            "the student has no module 'blok'",
        ),
    ],
)
def test_errors_are_sentences(
    conv_pair: tuple[nn.Module, nn.Module], make: Callable[..., Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        make(*conv_pair)
    assert sentence in str(caught.value)


# ---- prepare


def test_prepare_leaves_everything_as_it_was(distiller: kd.Distiller) -> None:
    distiller.train()
    distiller.student.norm.eval()  # a user's frozen BatchNorm
    modes = [m.training for m in distiller.modules()]
    before, teacher = state_of(distiller.student), state_of(distiller.teacher.model)
    random = torch.random.get_rng_state()
    distiller.prepare(small.conv_batch())
    assert same(before, distiller.student.state_dict())
    assert same(teacher, distiller.teacher.model.state_dict())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [m.training for m in [distiller, *distiller.student.modules()]] == [
        modes[0],
        *(name != "norm" for name, _ in distiller.student.named_modules()),
    ]
    assert all(p.grad is None for p in distiller.parameters())
    assert distiller.progress.step == 0


def normalised(student: Tensor, teacher: Tensor) -> nn.Module:
    return nn.Sequential(nn.Conv2d(student.shape[1], teacher.shape[1], 1), nn.BatchNorm2d(teacher.shape[1]))


@pytest.mark.parametrize("made", ["before", "by prepare"])
def test_prepare_leaves_buffers_of_adapters(conv_pair: tuple[nn.Module, nn.Module], made: str) -> None:
    adapter = normalised(torch.empty(1, 4), torch.empty(1, 6)) if made == "before" else normalised
    pair = kd.Distiller(*conv_pair, [kd.Match("block", losses.mse, "block", adapter=adapter)])
    pair.prepare(small.conv_batch())
    norm = pair.terms["block"].adapters[0][1]
    assert norm.running_mean.eq(0).all()
    assert norm.num_batches_tracked == 0
    pair(**small.conv_batch())
    assert norm.num_batches_tracked == 1


def test_prepare_keeps_eval_mode(distiller: kd.Distiller) -> None:
    distiller.eval()
    distiller.prepare(small.conv_batch())
    assert not any(m.training for m in distiller.modules())


def test_prepare_inside_no_grad(distiller: kd.Distiller) -> None:
    with torch.no_grad():
        report = distiller.prepare(small.conv_batch())
    assert all(t.gradient_norm > 0 for t in report.terms)


def test_adapters_exist_before_the_optimiser(distiller: kd.Distiller) -> None:
    batch = small.conv_batch()
    assert not distiller.built
    with pytest.raises(
        TaskkdError, match=r"the adapter of 'block' does not exist yet: call `distiller.prepare\(batch\)` before"
    ):
        distiller(**batch)
    distiller.prepare(batch)
    assert distiller.built
    optimiser = torch.optim.SGD(distiller.parameters(), 0.1)
    adapter = distiller.terms["block"].adapters[0]
    before = state_of(adapter)
    distiller(**batch)["loss"].backward()
    optimiser.step()
    assert not same(before, adapter.state_dict())
    assert not any("adapter" in k for k in distiller.student.state_dict())


def test_the_report_of_prepare(distiller: kd.Distiller) -> None:
    batch = small.conv_batch()
    report = distiller.prepare(batch)
    out = distiller(**batch)
    assert [t.name for t in report.terms] == ["task", "logits", "block"]
    for term in report.terms:
        assert term.value == pytest.approx(out[term.name].item(), rel=1e-6)
        assert term.weighted == term.weight * term.value
    assert [t.weight for t in report.terms] == [0.1, 0.9, 2.0]
    block = report.terms[2]
    assert block.student == {"block": "a tensor of shape (4, 4, 6, 6)"}
    assert block.teacher == {"block": "a tensor of shape (4, 6, 6, 6)"}
    assert block.adapter_parameters == 4 * 6 + 6
    gradient = torch.autograd.grad(
        losses.kl_divergence(
            distiller.student(batch["image"])["logits"],
            distiller.teacher.model(batch["image"])["logits"],
            temperature=4.0,
        ),
        list(distiller.student.parameters()),
        allow_unused=True,
    )
    norm = torch.cat([g.flatten() for g in gradient if g is not None]).norm().item()
    assert report.terms[1].gradient_norm == pytest.approx(norm, rel=1e-5)


def test_advice_where_a_term_drowns_the_task(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    def advice(weight: float) -> list[str]:
        pair = kd.Distiller(
            *copy.deepcopy(conv_pair), [kd.Match("logits", losses.kl_divergence, "out.logits", weight=weight)]
        )
        return pair.prepare(small.conv_batch()).advice

    assert advice(1.0) == []
    (sentence,) = advice(1e6)
    assert sentence.startswith("term 'logits' pulls at the student with ")
    assert "times the gradient of 'task'; weight " in sentence
    (sentence,) = advice(1e-6)
    assert " with 1/" in sentence


def test_advice_where_student_and_teacher_agree() -> None:
    student = small.ConvNet().eval()
    pair = kd.Distiller(student, copy.deepcopy(student), [kd.Match("stem", losses.mse, "stem")])
    assert pair.prepare(small.conv_batch()).advice == [
        "term 'stem' has no gradient on this batch (student and teacher agree there)."
    ]


def test_prepare_names_what_does_not_work_out(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(
        ShapeError, match=r"term 'b': `mse` needs student and teacher tensors of one shape.*adapter='conv1x1'"
    ):
        kd.Distiller(*conv_pair, [kd.Match("b", losses.mse, "block")]).prepare(small.conv_batch())
    with torch.no_grad():
        conv_pair[1].head.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="term 'l' is nan on the first batch, before any training"):
        kd.Distiller(*conv_pair, [kd.Match("l", losses.mse, "out.logits")]).prepare(small.conv_batch())


# ---- weight="auto"


def test_auto_makes_gradients_equal(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = kd.Distiller(*conv_pair, terms(weight="auto"), task_weight=0.5)
    pulls = {t.name: t.pull for t in pair.prepare(small.conv_batch()).terms}
    assert pulls["block"] == pytest.approx(pulls["task"], rel=1e-5)
    assert pulls["logits"] != pytest.approx(pulls["task"], rel=1e-2)
    again = pair.weights()
    pair.prepare(small.conv_batch(seed=3))
    assert pair.weights() == again  # chosen once


def test_auto_is_restored_from_a_checkpoint(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    first = kd.Distiller(*copy.deepcopy(conv_pair), terms(weight="auto"))
    first.prepare(small.conv_batch())
    second = kd.Distiller(*copy.deepcopy(conv_pair), terms(weight="auto"))
    second.prepare(small.conv_batch(seed=9))
    assert second.weights() != first.weights()
    second.load_state_dict(first.state_dict())
    assert second.weights() == first.weights()
    batch = small.conv_batch()
    assert second(**batch)["loss"].item() == first(**batch)["loss"].item()


@pytest.mark.parametrize("norm", [0.0, math.inf, math.nan])
def test_auto_against_no_gradient(norm: float) -> None:
    reports = [TermReport("task", 1.0, 1.0, norm), TermReport("block", 1.0, 1.0, 2.0)]
    with pytest.raises(TaskkdError, match=rf"the gradient of 'task' is {norm:g} on this batch, nothing to measure"):
        even_out({"block": 1.0}, reports, {"task": 1.0})


def test_auto_against_another_term(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = kd.Distiller(*conv_pair, terms(weight="auto"), task_weight=0)
    pulls = {t.name: t.pull for t in pair.prepare(small.conv_batch()).terms}
    assert pulls["block"] == pytest.approx(pulls["logits"], rel=1e-5)
    alone = kd.Distiller(*conv_pair, terms(weight="auto")[1:], task_weight=0)
    with pytest.raises(
        TaskkdError, match="weight='auto' needs a task loss or a term of given weight to be measured against"
    ):
        alone.prepare(small.conv_batch())


# ---- weights over time


def test_a_term_of_weight_zero_is_not_computed(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    calls: list[int] = []

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        calls.append(1)
        return losses.logit_mse(student, teacher)

    late = schedules.Schedule(1.0, lambda progress: float(progress.step >= 2))
    pair = kd.Distiller(*conv_pair, [kd.Match("late", loss, "out.logits", weight=late)])
    pair.prepare(small.conv_batch())
    calls.clear()
    seen = []
    for _ in range(4):
        out = pair(**small.conv_batch())
        seen.append(("late" in out, len(calls)))
        pair.step()
    assert seen == [(False, 0), (False, 0), (True, 1), (True, 2)]


def test_schedules_follow_step_and_total(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = kd.Distiller(*conv_pair, terms(weight=schedules.warmup(2.0, fraction=0.4)), task_weight=0.5)
    batch = small.conv_batch()
    pair.prepare(batch)
    with pytest.raises(
        TaskkdError, match=r"a schedule is a fraction of the training: call `distiller.set_total\(optimiser_steps\)`"
    ):
        pair(**batch)
    pair.set_total(10)
    weights = []
    for _ in range(6):
        out = pair(**batch)
        weight = pair.weights()["block"]
        torch.testing.assert_close(
            out["loss"].detach(), 0.5 * out["task"] + 0.9 * out["logits"] + weight * out["block"]
        )
        weights.append(weight)
        pair.step()
    assert weights == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert (pair.progress.step, pair.progress.total) == (6, 10)


# ---- what is not finite


def poisoned(pair: tuple[nn.Module, nn.Module], **options: Any) -> kd.Distiller:
    """A distiller whose term `bad` is NaN from its second step on."""

    class Bad(Term):
        student_taps = ("out.logits",)

        def forward(self, run: Run) -> Tensor:
            return run.student["out.logits"].mean() * (math.nan if run.batch["id"][0] >= 100 else 1.0)

    return kd.Distiller(*pair, [Bad("bad", 0.25), *terms()[:1]], **options)


def test_a_non_finite_term_is_named(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = poisoned(conv_pair)
    pair.prepare(small.conv_batch())
    pair(**small.conv_batch())
    pair.step()
    with pytest.raises(NonFiniteError) as caught:
        pair(**small.conv_batch(seed=1))
    assert str(caught.value) == (
        "term 'bad' (weight 0.25) is nan at step 1, sample ids [100, 101, 102, 103]; "
        "the optimiser has not stepped on it."
    )
    assert caught.value.exit_code == 4
    pair(**small.conv_batch())  # the next batch is another one


def test_a_non_finite_task_loss_is_named(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = kd.Distiller(*conv_pair, [], task_loss=lambda output, batch: output["logits"].mean() * math.inf)
    with pytest.raises(NonFiniteError, match=r"term 'task' \(weight 1\) is -?inf at step 0"):
        pair(image=small.conv_batch()["image"])


def test_skip_tells_the_loop(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = poisoned(conv_pair, on_nonfinite="skip")
    pair.prepare(small.conv_batch())
    finite = []
    for seed in (0, 1, 0):
        pair(**small.conv_batch(seed=seed))["loss"].backward()
        finite.append(pair.check_finite())
        pair.zero_grad()
        pair.step()
    assert finite == [True, False, True]


def test_a_loop_that_checks_by_itself(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = poisoned(conv_pair)
    pair.prepare(small.conv_batch())
    pair.check_in_forward = False
    for seed in (0, 1):
        batch = small.conv_batch(seed=seed)
        pair.watch(pair(**batch), batch)
    with pytest.raises(NonFiniteError, match=r"term 'bad' .* sample ids \[100, 101, 102, 103\]"):
        pair.step()  # nobody has looked
    assert pair.check_finite()


# ---- compile


def compiled_equals_eager(pair: kd.Distiller, batches: list[dict[str, Tensor]]) -> int:
    """Train a compiled copy beside an eager one; returns the number of graphs."""
    pair.prepare(batches[0])
    pair.set_total(20)
    other = copy.deepcopy(pair)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, backend=counter)
    steppers = [(p, torch.optim.SGD(p.parameters(), 0.05)) for p in (pair, other)]
    for batch in batches:
        results = []
        for (module, optimiser), call in zip(steppers, (pair, compiled), strict=True):
            out = call(**batch)
            out["loss"].backward()
            optimiser.step()
            optimiser.zero_grad()
            module.step()
            results.append({n: v.item() for n, v in out.items()})
        assert results[1] == pytest.approx(results[0], rel=1e-5)
    return int(counter.frame_count)


def test_a_conv_pair_compiles(fresh_dynamo: None, conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = kd.Distiller(
        *conv_pair,
        [*terms(weight=schedules.warmup(2.0, fraction=0.5)), kd.Match("norm", losses.mse, "norm", adapter="conv1x1")],
    )
    assert compiled_equals_eager(pair, [small.conv_batch(seed=s) for s in range(10)]) <= 2


def test_a_bert_pair_compiles(fresh_dynamo: None, bert_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = kd.Distiller(
        *bert_pair,
        [
            kd.Match("logits", losses.kl_divergence, "out.logits", weight=schedules.warmup(1.0, steps=8)),
            kd.Match(
                "hidden",
                losses.mse,
                "bert.encoder.layer.0",
                "bert.encoder.layer.1",
                adapter="linear",
                mask="batch.attention_mask",
            ),
        ],
    )
    assert compiled_equals_eager(pair, [small.tokens([4, 8, 6], seed=s) for s in range(10)]) <= 2


# ---- state


def test_state_goes_round(distiller: kd.Distiller) -> None:
    batch = small.conv_batch()
    distiller.prepare(batch)
    distiller.set_total(50)
    for _ in range(3):
        distiller(**batch)
        distiller.step()
    torch.manual_seed(7)
    teacher = copy.deepcopy(distiller.teacher.model)
    other = kd.Distiller(small.ConvNet(4), teacher, terms(weight=2.0), task_weight=0.1)
    other.prepare(batch)
    assert not same(other.state_dict(), distiller.state_dict())
    assert str(other.load_state_dict(distiller.state_dict())) == "<All keys matched successfully>"
    assert (other.progress.step, other.progress.total) == (3, 50)
    assert same(other.state_dict(), distiller.state_dict())
    assert other(**batch)["loss"].item() == distiller(**batch)["loss"].item()


def test_state_of_other_terms_is_refused(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    first = kd.Distiller(*copy.deepcopy(conv_pair), terms()[:1])
    second = kd.Distiller(*copy.deepcopy(conv_pair), [])
    with pytest.raises(TaskkdError, match="this state has 1 terms, the distiller 0"):
        second.load_state_dict(first.state_dict())


def test_a_resumed_run_is_bit_equal(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    def fresh(seed: int) -> tuple[kd.Distiller, torch.optim.Optimizer]:
        student, teacher = copy.deepcopy(conv_pair)
        pair = kd.Distiller(student, teacher, terms(weight=schedules.warmup(2.0, fraction=0.8)))
        torch.manual_seed(seed)
        pair.prepare(small.conv_batch())
        pair.set_total(10)
        return pair, torch.optim.AdamW(pair.parameters(), 0.01)

    def train(pair: kd.Distiller, optimiser: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            pair(**small.conv_batch(seed=step))["loss"].backward()
            optimiser.step()
            optimiser.zero_grad()
            pair.step()

    whole, optimiser = fresh(0)
    train(whole, optimiser, range(5))
    saved = copy.deepcopy((whole.state_dict(), optimiser.state_dict()))
    train(whole, optimiser, range(5, 10))
    resumed, other = fresh(1)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(resumed, other, range(5, 10))
    assert same(resumed.state_dict(), whole.state_dict())


def test_a_deep_copy_is_independent(distiller: kd.Distiller) -> None:
    batch = small.conv_batch()
    distiller.prepare(batch)
    other = copy.deepcopy(distiller)
    before = state_of(distiller)
    assert other(**batch)["loss"].item() == distiller(**batch)["loss"].item()
    distiller.load_state_dict(before)  # BatchNorm moved
    optimiser = torch.optim.SGD(other.parameters(), 0.1)
    other(**batch)["loss"].backward()
    optimiser.step()
    other.step()
    assert same(before, distiller.state_dict())
    assert not same(before, other.state_dict())


def test_close_leaves_a_plain_student(distiller: kd.Distiller) -> None:
    models = (distiller.student, distiller.teacher.model)
    assert all(any(m._forward_hooks for m in model.modules()) for model in models)
    distiller.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in models for m in model.modules())


def test_columns(bert_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = kd.Distiller(*bert_pair, [kd.Match("l", losses.mse, "out.logits", mask="batch.weight")])
    assert {"id", "input_ids", "attention_mask", "labels", "teacher_input_ids", "weight"} <= pair.columns()
    assert "teacher_labels" not in pair.columns()


def test_engines_find_the_config_of_the_student(bert_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = kd.Distiller(*bert_pair, [])
    assert pair.config is bert_pair[0].config
    assert pair._no_split_modules == bert_pair[0]._no_split_modules
    assert pair.accepts_loss_kwargs is False


def test_gradient_checkpointing_of_the_student(bert_pair: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = bert_pair
    batch = small.tokens([4, 8, 6])
    grads = []
    for on in (False, True):
        pair = kd.Distiller(
            copy.deepcopy(student),
            teacher,
            [
                kd.Match("h", losses.mse, "out.logits"),
                kd.Match("i", losses.mse, "bert.encoder.layer.0", "bert.encoder.layer.0[..., :8]"),
            ],
        )
        if on:
            pair.activation_checkpointing_enable()
            assert pair.student.is_gradient_checkpointing
            assert not teacher.is_gradient_checkpointing
        pair.prepare(batch)
        pair(**batch)["loss"].backward()
        grads.append([p.grad for p in pair.student.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


# ---- accelerate


def test_an_accelerate_loop(conv_pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    from accelerate import Accelerator

    def make(seed: int) -> kd.Distiller:
        pair = kd.Distiller(*copy.deepcopy(conv_pair), terms(weight=schedules.warmup(2.0, fraction=0.5)))
        torch.manual_seed(seed)
        pair.prepare(small.conv_batch())
        pair.set_total(6)
        return pair

    def train(
        pair: Any, module: kd.Distiller, optimiser: Any, steps: range, backward: Callable[[Tensor], None]
    ) -> list[float]:
        values = []
        for step in steps:
            out = pair(**small.conv_batch(seed=step))
            backward(out["loss"])
            optimiser.step()
            optimiser.zero_grad()
            module.step()
            values.append(out["loss"].item())
        return values

    plain = make(0)
    expected = train(plain, plain, torch.optim.SGD(plain.parameters(), 0.05, 0.9), range(6), Tensor.backward)

    accelerator = Accelerator(cpu=True)
    module = make(0)
    pair, optimiser = accelerator.prepare(module, torch.optim.SGD(module.parameters(), 0.05, 0.9))
    got = train(pair, module, optimiser, range(3), accelerator.backward)
    accelerator.save_state(str(tmp_path))
    got += train(pair, module, optimiser, range(3, 6), accelerator.backward)
    assert got == pytest.approx(expected, rel=1e-6)

    accelerator = Accelerator(cpu=True)
    module = make(1)
    pair, optimiser = accelerator.prepare(module, torch.optim.SGD(module.parameters(), 0.05, 0.9))
    accelerator.load_state(str(tmp_path))
    assert (module.progress.step, module.progress.total) == (3, 6)
    assert train(pair, module, optimiser, range(3, 6), accelerator.backward) == pytest.approx(expected[3:], rel=1e-6)
    assert accelerator.unwrap_model(pair).student.state_dict().keys() == conv_pair[0].state_dict().keys()


def test_a_task_loss_that_reads_a_missing_column(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    pair = kd.Distiller(*conv_pair, [], task_loss=lambda output, batch: output["logits"].mean() * batch["lables"].sum())
    with pytest.raises(TaskkdError, match=r"reads 'lables'.*did you mean 'labels'.*remove_unused_columns=False"):
        pair(**small.conv_batch())


def test_a_term_that_is_no_scalar(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    def per_sample(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().mean(-1)

    pair = kd.Distiller(*conv_pair, [kd.Match("each", per_sample, "out.logits")])
    with pytest.raises(TaskkdError, match=r"term 'each' gave a tensor of shape \(\d+,\), expected a scalar"):
        pair(**small.conv_batch())
