"""Terms: what `Match` checks when it is made and what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskkd as kd
from taskkd import losses
from taskkd.errors import ShapeError, TapError, TaskkdError
from taskkd.schedules import Progress, warmup
from taskkd.terms import Match, Run, Term
from tests import small


def run_of(student: Any, teacher: Any, tap: str = "x", **batch: Any) -> Run:
    return Run(batch, None, {tap: student, **{f"batch.{k}": v for k, v in batch.items()}}, {tap: teacher})


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, requires_grad=True), torch.randn(shape)


# ---- what is checked at construction


@pytest.mark.parametrize("name", ["loss", "task", "a b", "", "a.b", "keys", "items", "ünder"])
def test_bad_names(name: str) -> None:
    with pytest.raises(TaskkdError, match="cannot name a term: expected letters, digits, '_' and '-'"):
        Match(name, losses.mse, "x")


@pytest.mark.parametrize("name", ["logits", "layer-4", "hidden_0", "0"])
def test_good_names(name: str) -> None:
    assert Match(name, losses.mse, "x").name == name


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"temprature": 2.0},
            "term 'a': `kl_divergence` has no option 'temprature' (did you mean 'temperature'?); "
            "it has temperature, direction, target_floor, dim, mask.",
        ),
        ({"weight": -1.0}, "term 'a': its weight must be a finite number >= 0, got -1.0."),
        ({"weight": float("nan")}, "term 'a': its weight must be a finite number >= 0, got nan."),
        ({"weight": float("inf")}, "term 'a': its weight must be a finite number >= 0, got inf."),
        ({"weight": "automatic"}, "term 'a': weight 'automatic' is neither a number, a schedule nor 'auto'."),
        (
            {"gate": "teacher_correct"},
            "term 'a': a gate is a function of the run, as those of `taskkd.gates`; got 'teacher_correct'.",
        ),
        (
            {"teacher": ["x", "y"]},
            "term 'a': 1 student taps and 2 teacher taps; expected as many of each, at least one.",
        ),
    ],
)
def test_errors_are_sentences(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TaskkdError) as caught:
        Match("a", losses.kl_divergence, "x", **options)
    assert str(caught.value) == sentence


def test_no_taps_at_all() -> None:
    with pytest.raises(TapError, match="0 student taps"):
        Match("a", losses.mse, [])


def test_a_mask_for_a_loss_without_mask() -> None:
    def plain(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().mean()

    for options in ({"mask": "batch.mask"}, {"gate": lambda run: torch.ones(1)}):
        with pytest.raises(TaskkdError, match="a mask or gate was given, but `plain` takes no `mask`"):
            Match("a", plain, "x", **options)
    with pytest.raises(TaskkdError, match=r"`plain` has no option 'scale'; it has none\."):
        Match("a", plain, "x", scale=2)
    assert Match("a", plain, "x").forward(run_of(*pair(2, 3))) > 0


def test_an_option_without_default_must_be_given() -> None:
    def margin(student: Tensor, teacher: Tensor, *, margin: float, mask: Tensor) -> Tensor:
        return ((student - teacher).abs() - margin).clamp(min=0)[mask].mean()

    with pytest.raises(TaskkdError, match=r"term 'a': `margin` needs 'margin', which has no default\."):
        Match("a", margin, "x", mask="batch.m")
    with pytest.raises(TaskkdError, match="`margin` needs 'mask', which has no default"):
        Match("a", margin, "x", margin=0.5)
    Match("a", margin, "x", margin=0.5, mask="batch.m")


def test_a_loss_that_takes_anything_is_believed() -> None:
    def loose(student: Tensor, teacher: Tensor, **options: float) -> Tensor:
        return (student - teacher).abs().mean() * options["scale"]

    s, t = pair(2, 3)
    torch.testing.assert_close(Match("a", loose, "x", scale=2.0)(run_of(s, t)), 2 * (s - t).abs().mean())


def test_one_module_for_several_taps() -> None:
    with pytest.raises(TaskkdError, match="one adapter module for several taps"):
        Match("a", losses.patience, ["x", "y"], adapter=nn.Linear(2, 2))


def test_taps_of_a_term() -> None:
    term = Match("a", losses.patience, ["x", "y"], ["p", "q"], mask="batch.m")
    assert (term.student_taps, term.teacher_taps) == (("x", "y", "batch.m"), ("p", "q"))
    assert Match("a", losses.mse, "x").teacher_taps == ("x",)


def test_weights() -> None:
    assert Match("a", losses.mse, "x").weight(Progress()) == 1.0
    assert Match("a", losses.mse, "x", weight=0.25).weight(Progress(7)) == 0.25
    scheduled = Match("a", losses.mse, "x", weight=warmup(2.0, steps=4))
    assert (scheduled.weight(Progress(0)), scheduled.scheduled) == (0.5, True)
    assert Match("a", losses.mse, "x", weight="auto").automatic


def test_a_term_of_ones_own() -> None:
    class Norm(Term):
        student_taps = ("x",)

        def forward(self, run: Run) -> Tensor:
            return run.student["x"].square().mean()

    s, _ = pair(2, 3)
    assert Norm("norm")(run_of(s, None)) == s.square().mean()
    with pytest.raises(NotImplementedError):
        Term("bare")(run_of(s, None))


# ---- what is computed


def test_options_reach_the_loss() -> None:
    s, t = pair(4, 5)
    value = Match("a", losses.kl_divergence, "x", temperature=3.0)(run_of(s, t))
    assert torch.equal(value, losses.kl_divergence(s, t, temperature=3.0))


def test_different_taps() -> None:
    s, t = pair(4, 5)
    term = Match("a", losses.mse, "small.x", "big.y")
    assert torch.equal(term(Run({}, None, {"small.x": s}, {"big.y": t})), losses.mse(s, t))


def test_mask_from_a_tap_or_a_function() -> None:
    s, t = pair(4, 7, 5)
    mask = torch.rand(4, 7) > 0.3
    expected = losses.mse(s, t, mask=mask)
    assert torch.equal(Match("a", losses.mse, "x", mask="batch.m")(run_of(s, t, m=mask)), expected)
    seen: list[Any] = []

    def function(batch: Any, tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return batch["m"]

    assert torch.equal(Match("a", losses.mse, "x", mask=function)(run_of(s, t, m=mask)), expected)
    assert seen[0] is s


@pytest.mark.parametrize("select", [(slice(None), 0), lambda x: x[:, 0]], ids=["index", "function"])
def test_select(select: Any) -> None:
    s, t = pair(4, 7, 5)
    assert torch.equal(Match("a", losses.mse, "x", select=select)(run_of(s, t)), losses.mse(s[:, 0], t[:, 0]))


def test_several_taps_reach_the_loss_as_tuples() -> None:
    s, t = pair(4, 2, 5)
    run = Run({}, None, {"a": s[:, 0], "b": s[:, 1]}, {"p": t[:, 0], "q": t[:, 1]})
    assert torch.equal(Match("m", losses.patience, ["a", "b"], ["p", "q"])(run), losses.patience(s, t))
    alone = Match("m", losses.patience, ["a"], ["p"])(run)  # a list of one stays a sequence
    assert torch.equal(alone, losses.patience(s[:, :1], t[:, :1]))


def test_a_tap_that_is_no_tensor() -> None:
    with pytest.raises(TapError, match="term 'a': tap 'x' is a tuple, not a tensor; select an item"):
        Match("a", losses.mse, "x")(run_of((torch.ones(1),), torch.ones(1)))


def test_a_shape_error_names_the_term() -> None:
    with pytest.raises(
        ShapeError, match=r"term 'a': `mse` needs student and teacher tensors of one shape, got \(2, 3\) and"
    ):
        Match("a", losses.mse, "x")(run_of(torch.ones(2, 3), torch.ones(2, 4)))


# ---- gates


@pytest.mark.parametrize("gate", [[1.0, 0.0, 1.0, 0.0], [0.25, 0.5, 1.0, 0.0], [1.0] * 4, [0.0] * 4])
def test_a_gated_loss_is_the_mean_of_gate_times_loss(gate: list[float]) -> None:
    s, t = pair(4, 5)
    g = torch.tensor(gate)
    value = Match("a", losses.kl_divergence, "x", gate=lambda run: g)(run_of(s, t))
    each = torch.stack([losses.kl_divergence(s[i : i + 1], t[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(value, (g * each).mean())
    (gradient,) = torch.autograd.grad(value, s)
    assert gradient[g == 0].eq(0).all()


def test_a_gate_on_top_of_a_mask() -> None:
    s, t = pair(4, 7, 5)
    mask, gate = torch.rand(4, 7) > 0.3, torch.tensor([1.0, 0.0, 0.5, 1.0])
    value = Match("a", losses.mse, "x", mask="batch.m", gate=lambda run: gate)(run_of(s, t, m=mask))
    each = (s - t).square().mean(-1) * mask
    torch.testing.assert_close(value, (gate[:, None] * each).sum() / mask.sum())


def test_a_gate_sees_the_run() -> None:
    s, t = pair(6, 3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def teacher_is_right(run: Run) -> Tensor:
        return run.teacher["x"].argmax(1) == run.batch["labels"]

    right = t.argmax(1) == labels
    assert 0 < right.sum() < 6
    value = Match("a", losses.kl_divergence, "x", gate=teacher_is_right)(run_of(s, t, labels=labels))
    each = F.kl_div(F.log_softmax(s, 1), F.log_softmax(t, 1), reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(value, each[right].sum() / 6)


# ---- adapters


def test_an_adapter_kind_is_built_from_a_run() -> None:
    s, t = torch.randn(4, 5), torch.randn(4, 8)
    term = Match("a", losses.mse, "x", adapter="linear")
    assert not term.built
    assert not list(term.parameters())
    term.build(run_of(s, t))
    assert term.built
    assert [tuple(p.shape) for p in term.parameters()] == [(8, 5), (8,)]
    first = list(term.parameters())
    term.build(run_of(s, t))  # once is enough
    assert all(a is b for a, b in zip(first, term.parameters(), strict=True))
    assert torch.equal(term(run_of(s, t)), losses.mse(term.adapters[0](s), t))


def test_one_adapter_for_each_tap() -> None:
    run = Run(
        {}, None, {"a": torch.randn(4, 5), "b": torch.randn(4, 6)}, {"a": torch.randn(4, 8), "b": torch.randn(4, 8)}
    )
    term = Match("m", losses.patience, ["a", "b"], adapter="linear")
    term.build(run)
    assert [a.map.in_features for a in term.adapters] == [5, 6]
    expected = losses.patience(
        [f(run.student[n]) for f, n in zip(term.adapters, "ab", strict=True)], list(run.teacher.values())
    )
    assert torch.equal(term(run), expected)


def test_adapters_that_do_not_fit_name_term_and_tap() -> None:
    term = Match("a", losses.mse, "x", adapter="conv1x1")
    with pytest.raises(ShapeError, match="term 'a', tap 'x': adapter 'conv1x1' needs"):
        term.build(run_of(*pair(2, 3)))


def test_a_term_that_failed_to_build_can_be_built_again() -> None:
    run = Run(
        {}, None, {"a": torch.randn(4, 5), "b": torch.randn(3, 6)}, {"a": torch.randn(4, 8), "b": torch.randn(4, 8)}
    )
    term = Match("m", losses.patience, ["a", "b"], adapter="linear")
    with pytest.raises(ShapeError, match="tap 'b'"):
        term.build(run)
    run.student["b"] = torch.randn(4, 6)
    term.build(run)
    assert len(term.adapters) == 2
    assert term(run) > 0


def test_an_adapter_module_needs_no_run() -> None:
    module = nn.Linear(5, 8)
    term = Match("a", losses.mse, "x", adapter=module)
    assert term.built
    assert list(term.parameters()) == list(module.parameters())


def test_an_option_that_is_a_tap() -> None:
    batch = small.conv_batch()
    student, teacher = small.ConvNet(), small.ConvNet()
    options = {"beta": 2.0, "temperature": 2.0}
    pair = kd.Distiller(
        student, teacher, [kd.Match("dkd", losses.decoupled, "out.logits", labels="batch.labels", **options)]
    )
    teacher.eval()
    with torch.no_grad():
        expected = losses.decoupled(
            student(batch["image"])["logits"], teacher(batch["image"])["logits"], labels=batch["labels"], **options
        )
    torch.testing.assert_close(pair(**batch)["dkd"], expected)
    with pytest.raises(TapError, match="no item 'lables'"):
        kd.Distiller(student, teacher, [kd.Match("dkd", losses.decoupled, "out.logits", labels="batch.lables")])(
            **batch
        )


def test_gather_and_gate_do_not_go_together() -> None:
    with pytest.raises(TaskkdError, match="`gather` does not go with a gate"):
        Match("a", losses.mse, "out", gather=True, gate=lambda run: torch.ones(2))


def test_an_automatic_weight_brings_a_term_to_a_share_of_the_task_loss() -> None:
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    batch = {"input": torch.rand(8, 4)}
    found = []
    for weight in ("auto", kd.Auto(0.25)):
        term = Match("a", losses.mse, "out", weight=weight)
        distiller = kd.Distiller(student, teacher, [term], task_loss=lambda out, _: out.square().mean())
        task, own = distiller.prepare(batch).terms
        found.append(own.pull / task.pull)
        distiller.close()
    assert found == pytest.approx([1.0, 0.25])
    with pytest.raises(TaskkdError, match=r"the share of an automatic weight must be positive, got 0"):
        kd.Auto(0)


def test_a_term_that_hardly_moves_the_student_keeps_its_weight() -> None:
    student = torch.nn.Linear(4, 3)
    term = Match("a", lambda s, t: 1e-15 * losses.mse(s, t), "out", weight="auto")
    distiller = kd.Distiller(student, torch.nn.Linear(4, 3), [term], task_loss=lambda out, _: out.square().mean())
    found = {r.name: r for r in distiller.prepare({"input": torch.rand(8, 4)}).terms}
    assert 0 < found["a"].gradient_norm < 1e-10
    assert found["a"].weight == 1.0
    distiller.close()
