"""Contract 3: a frozen teacher is outside the module tree, untouched, and run no further than needed."""

from __future__ import annotations

import copy
import doctest
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskkd as kd
import taskkd.teachers
from taskkd import losses
from taskkd.errors import TapError, TaskkdError
from taskkd.teachers import Frozen, Teacher, computes_bfloat16, first_tensor
from tests import small


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def calls_of(model: nn.Module) -> list[str]:
    """The names of the modules that run from now on, in order."""
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, a, name=name: ran.append(name))
    return ran


def distiller(teacher: Any, *taps: str, **options: Any) -> kd.Distiller:
    return kd.Distiller(
        small.ConvNet(4), teacher, [kd.Match(f"t{i}", losses.mse, t) for i, t in enumerate(taps)], **options
    )


def test_a_frozen_teacher_is_a_teacher() -> None:
    assert isinstance(Frozen(nn.Linear(1, 1)), Teacher)
    with pytest.raises(TypeError, match=r"`Frozen` takes a torch.nn.Module, got str\."):
        Frozen("model")  # type: ignore[arg-type]


def test_the_docstring_examples_run() -> None:
    result = doctest.testmod(taskkd.teachers, extraglobs={"torch": torch, "nn": nn})
    assert (result.failed, result.attempted >= 3) == (0, True)


def test_it_is_in_no_list_of_the_distiller() -> None:
    teacher = small.ConvNet(4)
    pair = distiller(teacher, "head")
    own = {id(p) for p in teacher.parameters()} | {id(b) for b in teacher.buffers()}
    assert not own & {id(p) for p in [*pair.parameters(), *pair.buffers()]}
    assert teacher not in list(pair.modules())
    keys = set(pair.state_dict())
    assert keys == {f"student.{k}" for k in pair.student.state_dict()} | {"_extra_state"}
    assert not any(p.requires_grad for p in teacher.parameters())


def test_train_does_not_reach_it() -> None:
    teacher = small.ConvNet(4).train()
    pair = distiller(teacher, "head")
    pair.train()
    assert not any(m.training for m in teacher.modules())
    assert all(m.training for m in pair.student.modules())


def test_it_is_bit_equal_after_twenty_steps() -> None:
    teacher = small.ConvNet(4)
    before = state_of(teacher)
    pair = distiller(teacher, "head", "block", "norm:in")
    pair.prepare(small.conv_batch())
    pair.train()
    optimiser = torch.optim.SGD(pair.parameters(), 0.1)
    student = state_of(pair.student)
    for step in range(20):
        pair(**small.conv_batch(seed=step))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        pair.step()
    assert same_state(teacher, before)
    assert not same_state(pair.student, student)


def test_somebody_elses_train_is_put_back() -> None:
    teacher = small.ConvNet(4)
    before = state_of(teacher)
    frozen = Frozen(teacher)
    frozen.attach(["out.logits"])
    expected = frozen(small.conv_batch())["out.logits"]
    teacher.train()
    assert torch.equal(frozen(small.conv_batch())["out.logits"], expected)
    assert not any(m.training for m in teacher.modules())
    teacher.train()
    frozen.apply("block", torch.randn(2, 4, 3, 3))
    assert not teacher.training
    assert same_state(teacher, before)


def test_its_outputs_carry_no_gradient() -> None:
    frozen = Frozen(small.ConvNet(4))
    frozen.attach(["out.logits", "block", "head:in"])
    values = frozen({"image": torch.randn(2, 3, 6, 6, requires_grad=True)})
    assert [v.grad_fn for v in values.values()] == [None] * 3
    assert not any(v.requires_grad for v in values.values())


def test_a_deep_copy_shares_it() -> None:
    pair = distiller(small.ConvNet(4), "head")
    other = copy.deepcopy(pair)
    assert other.teacher is pair.teacher
    assert other.student is not pair.student


@pytest.mark.parametrize(
    ("taps", "runs"),
    [
        (["stem"], ["", "stem"]),
        (["norm:in"], ["", "stem"]),  # `norm` itself need not run for its input
        (["stem", "block.conv"], ["", "stem", "norm", "relu", "block", "block.conv"]),
        (["norm"], ["", "stem", "norm"]),  # overwritten in place later, copied
    ],
)
def test_it_stops_after_the_last_tap(taps: list[str], runs: list[str]) -> None:
    model = small.ConvNet(4)
    frozen = Frozen(model)
    frozen.attach(taps)
    batch = small.conv_batch()
    full = frozen.prepare(batch)
    ran = calls_of(model)
    values = frozen(batch)
    assert ran == runs
    assert all(torch.equal(values[t], full[t]) for t in taps)


def test_it_runs_to_the_end_where_the_output_is_tapped() -> None:
    model = small.ConvNet(4)
    frozen = Frozen(model)
    frozen.attach(["stem", "out.logits"])
    frozen.prepare(small.conv_batch())
    ran = calls_of(model)
    frozen(small.conv_batch())
    assert ran[-1] == "head"


def test_it_stops_after_the_last_call_of_a_module_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(self.b(self.a(x))))

    model = Twice()
    frozen = Frozen(model)
    frozen.attach(["a@1"])
    x = torch.randn(3, 2)
    expected = model.a(model.b(model.a(x)))
    frozen.prepare({"x": x})
    ran = calls_of(model)
    assert torch.equal(frozen({"x": x})["a@1"], expected)
    assert ran == ["", "a", "b", "a"]


def test_it_runs_once_a_step_whatever_number_of_terms_reads_it() -> None:
    teacher = small.ConvNet(4)
    pair = kd.Distiller(small.ConvNet(4), teacher, [kd.Match(f"t{i}", losses.mse, "out.logits") for i in range(3)])
    ran = calls_of(teacher)
    pair(**small.conv_batch())
    assert ran.count("") == 1


def test_it_does_not_run_while_all_terms_are_off() -> None:
    teacher = small.ConvNet(4)
    pair = kd.Distiller(small.ConvNet(4), teacher, [kd.Match("t", losses.mse, "out.logits", weight=0.0)])
    ran = calls_of(teacher)
    assert set(pair(**small.conv_batch())) == {"loss", "task"}
    assert ran == []


# ---- what it is given


class Keeper(nn.Module):
    """Keeps the arguments of its last call."""

    def forward(self, x: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        self.got = {"x": x, "labels": labels, "mask": mask}
        return x


def test_it_gets_what_its_forward_names_but_no_labels() -> None:
    frozen = Frozen(Keeper())
    frozen.attach(["out"])
    frozen({"x": torch.ones(1), "labels": torch.ones(1), "other": 3, "id": torch.ones(1)})
    assert frozen.model.got == {"x": torch.ones(1), "labels": None, "mask": None}


def test_teacher_columns_take_the_place_of_their_twins() -> None:
    frozen = Frozen(Keeper())
    frozen.attach(["out"])
    out = frozen({"x": torch.ones(1), "teacher_x": torch.zeros(2), "teacher_mask": torch.ones(2)})["out"]
    assert torch.equal(out, torch.zeros(2))
    assert torch.equal(frozen.model.got["mask"], torch.ones(2))
    assert frozen.columns() == {"x", "mask", "teacher_x", "teacher_mask"}


def test_a_call_of_ones_own() -> None:
    frozen = Frozen(nn.Linear(2, 3), call=lambda model, batch, run: model(batch["x"] + run))
    frozen.attach(["out"])
    x = torch.randn(4, 2)
    torch.testing.assert_close(frozen({"x": x}, 1.0)["out"], frozen.model(x + 1))


def test_it_needs_taps() -> None:
    with pytest.raises(
        TapError, match="this teacher has no taps: it is used through a Distiller, or call `attach` first"
    ):
        Frozen(nn.Linear(1, 1))({"input": torch.ones(1)})
    with pytest.raises(TapError, match="the teacher has no module 'headd' \\(did you mean 'head'"):
        distiller(small.ConvNet(4), "head").teacher.attach(["headd"])


def test_attach_and_close_leave_no_hooks() -> None:
    model = small.ConvNet(4)
    frozen = Frozen(model)
    for taps in (["head"], ["stem"]):
        frozen.attach(taps)
        assert sum(len(m._forward_hooks) for m in model.modules()) == 1
    frozen.close()
    assert sum(len(m._forward_hooks) for m in model.modules()) == 0


def test_an_unknown_tap_leaves_no_hooks_on_the_student() -> None:
    student = small.ConvNet(4)
    with pytest.raises(TapError, match="the teacher has no module 'hed'"):
        kd.Distiller(student, small.ConvNet(4), [kd.Match("t", losses.mse, "head", "hed")])
    assert sum(len(m._forward_hooks) for m in student.modules()) == 0


# ---- apply


def test_apply_gives_gradient_to_its_input() -> None:
    teacher = small.ConvNet(4)
    frozen = Frozen(teacher)
    x = torch.randn(2, 4, requires_grad=True)
    out = frozen.apply("head", x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, teacher.head.weight.sum(0).expand(2, 4))
    assert teacher.head.weight.grad is None
    with pytest.raises(TapError, match="the teacher has no module 'heat' \\(did you mean 'head'"):
        frozen.apply("heat", x)


def test_apply_is_not_recorded() -> None:
    frozen = Frozen(small.ConvNet(4))
    frozen.attach(["head"])
    batch = small.conv_batch()
    frozen.prepare(batch)
    expected = frozen(batch)["head"]
    frozen.apply("head", torch.zeros(1, 4))
    assert torch.equal(frozen(batch)["head"], expected)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"a": 1, "b": [None, torch.tensor(3.0)]}, 3.0),
        ([{"x": torch.tensor(1.0)}, torch.tensor(2.0)], 1.0),
        ({}, None),
        ("text", None),
    ],
)
def test_first_tensor(value: Any, found: float | None) -> None:
    tensor = first_tensor(value)
    assert (None if tensor is None else tensor.item()) == found


# ---- what a teacher computes in


def computed(dtype: Any) -> torch.dtype:
    teacher = Frozen(nn.Linear(2, 2), dtype=dtype)
    teacher.attach(["out"])
    found: torch.dtype = teacher({"input": torch.ones(1, 2)})["out"].dtype
    return found


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_f": True, "avx2": True}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16),
     ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16), ({}, torch.float32)],
)  # fmt: skip
def test_auto_is_bfloat16_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert computed("auto") == expected


def test_a_gpu_says_by_itself_whether_it_has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, a=answer: a)
        assert computes_bfloat16(torch.device("cuda", 0)) == answer
    assert not computes_bfloat16(torch.device("meta"))


def test_a_teachers_dtype_holds_against_the_training_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert computed(None) == computed("float32") == torch.float32
    assert computed("bfloat16") == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert computed(None) == computed("auto") == torch.bfloat16
        assert computed("float32") == torch.float32


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(TaskkdError, match="'auto', 'float32', 'bfloat16' or None, got 'fp16'"):
        Frozen(nn.Linear(1, 1), dtype="fp16")  # type: ignore[arg-type]
