"""Maps between shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import taskkd as kd
from taskkd import losses
from taskkd.adapters import (
    ABF,
    ADAPTERS,
    ChannelAssign,
    Conv1x1,
    ConvReg,
    Embedding,
    Linear,
    Paraphraser,
    Translator,
    VarianceHead,
    Variational,
    build_adapter,
    fit_paraphraser,
    maps_all_levels,
)
from taskkd.errors import ShapeError, TapError, TaskkdError
from tests import small


@pytest.mark.parametrize(
    ("kind", "student", "teacher"),
    [
        ("linear", (2, 5), (2, 7)),
        ("linear", (2, 3, 5), (2, 3, 7)),
        ("conv1x1", (2, 3, 8, 6), (2, 5, 8, 6)),
        ("conv1x1", (2, 3, 8, 6), (2, 5, 4, 3)),
        ("conv1x1", (2, 3, 4, 3), (2, 5, 9, 7)),
        ("conv1x1_bn", (2, 3, 4, 3), (2, 5, 9, 7)),
        ("conv1x1_bn_relu", (2, 3, 4, 3), (2, 5, 9, 7)),
        ("conv_regressor", (2, 3, 8, 6), (2, 5, 4, 3)),
        ("conv_regressor", (2, 3, 4, 3), (2, 5, 8, 6)),
        ("conv_regressor", (2, 3, 7, 6), (2, 5, 5, 6)),
        ("translator", (2, 3, 4, 3), (2, 5, 8, 6)),
    ],
)
def test_a_kind_gives_the_shape_of_the_teacher(kind: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    x, t = torch.randn(student), torch.randn(teacher)
    adapter = build_adapter(kind, x, t)
    out = adapter(x, t) if getattr(adapter, "takes_target", False) else adapter(x)
    assert out.shape == teacher
    out.square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert not maps_all_levels(adapter)


def test_linear_is_one_affine_map() -> None:
    adapter = Linear(3, 2)
    x = torch.randn(4, 3)
    torch.testing.assert_close(adapter(x), x @ adapter.map.weight.T + adapter.map.bias)
    assert Linear(3, 2, bias=False).map.bias is None


def test_conv1x1_resizes_before_it_maps() -> None:
    adapter = Conv1x1(3, 2)
    x = torch.randn(1, 3, 4, 4)
    small_x = F.interpolate(x, size=(2, 2), mode="bilinear", align_corners=False)
    torch.testing.assert_close(adapter(x, torch.zeros(1, 2, 2, 2)), adapter.map(small_x))
    torch.testing.assert_close(adapter(x), adapter.map(x))


def test_conv1x1_with_norm_and_relu() -> None:
    adapter = Conv1x1(3, 2, bn=True, relu=True)
    assert adapter.map.bias is None
    out = adapter(torch.randn(8, 3, 5, 5))
    assert out.min() == 0
    normed = Conv1x1(3, 2, bn=True)(torch.randn(8, 3, 5, 5))
    torch.testing.assert_close(normed.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "kernel", "stride"),
    [
        ((3, 8, 8), (4, 4, 4), (3, 3), (2, 2)),
        ((3, 4, 4), (4, 8, 8), (4, 4), (2, 2)),
        ((3, 7, 9), (4, 5, 9), (3, 1), (1, 1)),
        ((3, 5, 5), (4, 5, 5), (1, 1), (1, 1)),
    ],
)
def test_the_size_rule_of_the_regressor(student: Any, teacher: Any, kernel: Any, stride: Any) -> None:
    adapter = ConvReg(student, teacher)
    assert (adapter.map.kernel_size, adapter.map.stride) == (kernel, stride)
    assert isinstance(adapter.map, nn.ConvTranspose2d) == (stride == (2, 2) and kernel == (4, 4))
    out = adapter(torch.randn(2, *student))
    assert out.shape == (2, *teacher)
    assert out.min() == 0
    assert ConvReg(student, teacher, relu=False)(torch.randn(2, *student)).min() < 0


def test_the_regressor_follows_other_sizes() -> None:
    adapter = ConvReg((3, 7, 7), (4, 5, 5))
    assert adapter(torch.randn(2, 3, 14, 14), torch.zeros(2, 4, 10, 10)).shape == (2, 4, 10, 10)


def test_embeddings_are_unit_vectors() -> None:
    adapter = build_adapter("embedding", torch.randn(4, 3, 2, 2), torch.randn(4, 7))
    out = adapter(torch.randn(4, 3, 2, 2))
    assert out.shape == (4, 128)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(4))
    dead, zero = Embedding(12, 5), torch.zeros(2, 12, requires_grad=True)
    nn.init.zeros_(dead.map.bias)
    dead(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()
    assert dead.half()(zero.half()).eq(0).all()  # in fp16 the eps of a norm would be 0, and this NaN
    plain, x = Embedding(12, 5, normalise=False), torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(plain(x), plain.map(x.flatten(1)))


# ---- all levels together


def levels(channels: list[int], sizes: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, c, n, n, dtype=dtype) for c, n in zip(channels, sizes, strict=True))


def test_fusion_lets_deeper_levels_flow_up() -> None:
    students, teachers = levels([4, 6, 8], [8, 4, 1]), levels([5, 7, 9], [8, 4, 2])
    adapter = build_adapter("abf", students, teachers)
    assert isinstance(adapter, ABF)
    assert adapter.reduce[0][0].out_channels == 8  # the student's deepest, up to 512
    for s in students:
        s.requires_grad_()
    out = adapter(students, teachers)
    assert [o.shape for o in out] == [t.shape for t in teachers]
    above = torch.autograd.grad(out[0].square().sum(), students, retain_graph=True, allow_unused=True)
    assert all(g is not None and g.abs().sum() > 0 for g in above)
    below = torch.autograd.grad(out[2].square().sum(), students, allow_unused=True)
    assert [g is not None for g in below] == [False, False, True]


def test_fusion_over_levels_that_differ_in_number() -> None:
    with pytest.raises(ShapeError, match="adapter 'abf' needs as many levels of each, got 2 and 1"):
        ABF([4, 6], [5])


@pytest.mark.parametrize("adapter", ["abf", ABF([4, 4], [6, 6], mid=3)], ids=["kind", "module"])
def test_a_term_with_one_adapter_for_all_levels(conv_pair: tuple[nn.Module, nn.Module], adapter: Any) -> None:
    term = kd.Match("review", losses.pyramid, ["norm", "block"], adapter=copy.deepcopy(adapter))
    distiller = kd.Distiller(*conv_pair, [term])
    assert term.built == isinstance(adapter, nn.Module)
    distiller.prepare(small.conv_batch())
    assert len(term.adapters) == 1
    assert term.adapters[0].reduce[0][0].out_channels == (4 if adapter == "abf" else 3)
    distiller(**small.conv_batch())["loss"].backward()
    assert all(p.grad is not None for p in term.parameters())


def test_levels_that_do_not_fit_name_all_taps() -> None:
    term = kd.Match("review", losses.pyramid, ["a", "b"], adapter="abf")
    run = kd.Run({}, None, {"a": torch.ones(1, 2, 3, 3), "b": torch.ones(1, 2)}, dict.fromkeys("ab", torch.ones(1, 2)))
    with pytest.raises(ShapeError, match="term 'review', tap 'a, b': adapter 'abf' needs"):
        term.build(run)


# ---- what gives a distribution


@pytest.mark.parametrize("variance", [1e-3, 5.0, 2000.0])
def test_the_variance_starts_as_said(variance: float) -> None:
    adapter = Variational(3, 4, variance=variance).double()
    _, scale = adapter(torch.randn(2, 3, 5, 5).double())
    torch.testing.assert_close(F.softplus(scale) + 1e-5, torch.full_like(scale, variance), rtol=1e-4, atol=0)
    with pytest.raises(TaskkdError, match="`variance` must be above eps=1e-05, got 0"):
        Variational(3, 4, variance=0)


@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 3, 4, 4), (2, 5, 2, 2)), ((2, 3), (2, 5)), ((2, 7, 3), (2, 7, 5))]
)
def test_variational_gives_what_its_loss_takes(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    x, t = torch.randn(student), torch.randn(teacher)
    adapter = build_adapter("variational", x, t)
    mean, scale = adapter(x, t)
    assert mean.shape == t.shape
    with torch.no_grad():  # each channel has its own
        adapter.scale.copy_(torch.arange(5.0))
    mean, scale = adapter(x, t)
    each = torch.arange(5.0).reshape(1, 5, 1, 1) if t.ndim == 4 else torch.arange(5.0)
    var = F.softplus(each) + 1e-5
    expected = (((mean - t).square() / var + var.log()) / 2).mean()
    torch.testing.assert_close(losses.variational_information((mean, scale), t), expected)
    losses.variational_information((mean, scale), t).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize(("student", "teacher"), [((4, 3, 4, 4), (4, 5, 2, 2)), ((4, 3), (4, 5)), ((4, 5), (4, 5))])
def test_a_variance_head_gives_what_its_loss_takes(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    x, t = torch.randn(student), torch.randn(teacher)
    adapter = build_adapter("variance", x, t)
    features, v = adapter(x, t)
    assert features.shape == v.shape == t.shape
    assert (features is x) == (student == teacher)
    losses.prediction_aware((features, v), t).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    assert isinstance(adapter, VarianceHead)


@pytest.mark.parametrize(
    ("kind", "loss"), [("variational", losses.variational_information), ("variance", losses.prediction_aware)]
)
def test_pairs_go_through_a_term(conv_pair: tuple[nn.Module, nn.Module], kind: str, loss: Any) -> None:
    distiller = kd.Distiller(*conv_pair, [kd.Match("v", loss, "block", adapter=kind)])
    distiller.prepare(small.conv_batch())
    distiller(**small.conv_batch())["loss"].backward()
    assert all(p.grad is not None for p in distiller.terms["v"].parameters())


def test_batch_norm_over_one_sample_names_the_term() -> None:
    term = kd.Match("v", losses.prediction_aware, "x", adapter=VarianceHead(3, 3))
    with pytest.raises(TaskkdError, match=r"term 'v': Expected more than 1 value per channel"):
        term(kd.Run({}, None, {"x": torch.randn(1, 3)}, {"x": torch.randn(1, 3)}))


# ---- the teacher's side


def test_a_teacher_adapter_is_built_first_and_trained(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    term = kd.Match("cc", losses.correlation_congruence, "block", adapter="embedding", teacher_adapter="embedding")
    distiller = kd.Distiller(*conv_pair, [term])
    assert not term.built
    distiller.prepare(small.conv_batch())
    assert term.built
    assert [a.map.in_features for a in (*term.adapters, *term.teacher_adapters)] == [4 * 36, 6 * 36]
    distiller(**small.conv_batch())["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())
    assert any(name.startswith("terms.cc.teacher_adapters.0") for name in distiller.state_dict())
    assert all(p.grad is None for p in conv_pair[1].parameters())


def test_the_student_is_mapped_to_the_adapted_teacher() -> None:
    run = kd.Run({}, None, {"x": torch.randn(2, 3, 4, 4)}, {"x": torch.randn(2, 8, 4, 4)})
    paraphraser = Paraphraser(8, rate=0.25)
    term = kd.Match("ft", losses.factor, "x", adapter="translator", teacher_adapter=paraphraser)
    term.build(run)
    assert isinstance(term.adapters[0], Translator)
    assert term.adapters[0](run.student["x"]).shape == (2, 2, 4, 4)
    expected = losses.factor(term.adapters[0](run.student["x"]), paraphraser(run.teacher["x"]))
    torch.testing.assert_close(term(run), expected)


def test_a_teacher_adapter_alone_takes_the_teacher_to_the_student() -> None:
    run = kd.Run({}, None, {"x": torch.randn(2, 3)}, {"x": torch.randn(2, 8)})
    term = kd.Match("a", losses.mse, "x", teacher_adapter="linear")
    term.build(run)
    assert tuple(term.teacher_adapters[0].map.weight.shape) == (3, 8)
    assert torch.equal(term(run), losses.mse(run.student["x"], term.teacher_adapters[0](run.teacher["x"])))


def test_a_frozen_teacher_adapter_stays_as_it_is(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    frozen = Conv1x1(6, 4, bn=True).requires_grad_(False)
    free = Conv1x1(6, 4, bn=True)
    terms = [
        kd.Match("frozen", losses.mse, "block", teacher_adapter=frozen),
        kd.Match("free", losses.mse, "block", teacher_adapter=free),
    ]
    distiller = kd.Distiller(*conv_pair, terms)
    before = copy.deepcopy(frozen.state_dict())
    distiller.prepare(small.conv_batch())
    distiller.train()
    distiller(**small.conv_batch())["loss"].backward()
    assert not frozen.norm.training
    assert free.norm.training
    assert all(torch.equal(before[k], v) for k, v in frozen.state_dict().items())
    assert int(free.norm.num_batches_tracked) == 1  # the look of `prepare` left no trace
    assert free.map.weight.grad is not None


def test_a_built_teacher_adapter_with_norm_is_left_untouched_by_prepare(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    term = kd.Match("a", losses.mse, "block", adapter="conv1x1_bn", teacher_adapter="conv1x1_bn")
    distiller = kd.Distiller(*conv_pair, [term])
    distiller.prepare(small.conv_batch())
    norms = [m for m in term.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [int(m.num_batches_tracked) for m in norms] == [0, 0]
    assert all(m.training for m in norms)


def test_a_paraphraser_learns_to_reconstruct(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    teacher = conv_pair[1]
    paraphraser = Paraphraser(6)
    batches = [small.conv_batch(8, seed=s) for s in range(3)]
    history = fit_paraphraser(paraphraser, teacher, "block", batches, epochs=20)
    assert len(history) == 20
    assert history[-1] < 0.7 * history[0]
    assert not any(p.requires_grad for p in paraphraser.parameters())
    assert not paraphraser.training
    assert not any(m._forward_hooks for m in teacher.modules())
    weights = copy.deepcopy(paraphraser.state_dict())
    term = kd.Match("ft", losses.factor, "block", adapter="translator", teacher_adapter=paraphraser)
    distiller = kd.Distiller(*conv_pair, [term])
    distiller.prepare(batches[0])
    trained = [p for p in distiller.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, 0.1)
    distiller(**batches[0])["loss"].backward()
    optimiser.step()
    assert all(torch.equal(weights[k], v) for k, v in paraphraser.state_dict().items())


def test_what_a_paraphraser_cannot_learn_from(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(TaskkdError, match="`fit_paraphraser` got no batches"):
        fit_paraphraser(Paraphraser(6), conv_pair[1], "block", [])
    with pytest.raises(TapError, match="no module 'blok'"):
        fit_paraphraser(Paraphraser(6), conv_pair[1], "blok", [small.conv_batch()])
    with pytest.raises(TaskkdError, match="lower `learning_rate`, now 1e\\+09"):
        fit_paraphraser(Paraphraser(6), conv_pair[1], "block", [small.conv_batch()] * 9, learning_rate=1e9)


def test_channels_are_assigned_and_reduced() -> None:
    x = torch.tensor([1.0, -4.0, 3.0, 2.0]).reshape(1, 4, 1)
    for how, expected in (("absolute", [3.0, -4.0]), ("max", [3.0, 2.0]), ("mean", [2.0, -1.0])):
        adapter = ChannelAssign([2, 1, 0, 3], 2, reduce=how)  # slots 0 and 2: channels 2 and 0
        assert adapter(x).flatten().tolist() == expected
    assert "indices" in adapter.state_dict()
    adapter.assign(torch.tensor([0, 1, 2, 3]))
    assert adapter(x).flatten().tolist() == [2.0, -1.0]
    other = ChannelAssign(range(4), 2)
    other.load_state_dict(ChannelAssign([3, 2, 1, 0], 2).state_dict())
    assert other.indices.tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ChannelAssign([0, 1, 2], 2), "3 channel indices are no multiple of 2 channels."),
        (lambda: ChannelAssign([0, 1], 2, reduce="sum"), "`reduce` must be 'absolute', 'max' or 'mean', got 'sum'."),  # type: ignore[arg-type]
        (lambda: ChannelAssign([0, 1], 2).assign([0]), "expected 2 channel indices, got shape (1,)."),
    ],
)
def test_bad_assignments_are_sentences(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(TaskkdError) as caught:
        make()
    assert str(caught.value) == sentence


# ---- in a distiller


def test_images_may_change_their_size(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    class Strided(small.ConvNet):
        """Half the teacher's size from here on."""

        def features(self, image: Tensor) -> Tensor:
            return self.block(self.relu(self.norm(F.avg_pool2d(self.stem(image), 2))))

    terms = [
        kd.Match("conv", losses.mse, "block", adapter="conv1x1"),
        kd.Match("reg", losses.mse, "block", adapter="conv_regressor"),
        kd.Match("vid", losses.variational_information, "block", adapter="variational"),
    ]
    distiller = kd.Distiller(Strided(4), conv_pair[1], terms)
    distiller.prepare(small.conv_batch(size=8))
    for size in (8, 12, 9):
        assert distiller(**small.conv_batch(size=size))["loss"].isfinite()


KINDS = {
    "conv1x1_bn_relu": losses.mse,
    "conv_regressor": losses.mse,
    "translator": losses.factor,
    "variational": losses.variational_information,
    "variance": losses.prediction_aware,
}


def fresh(pair: tuple[nn.Module, nn.Module], seed: int = 0, batch: Any = None) -> kd.Distiller:
    terms = [kd.Match(kind, loss, "block", adapter=kind) for kind, loss in KINDS.items()]
    terms += [
        kd.Match("review", losses.pyramid, ["norm", "block"], adapter="abf"),
        kd.Match(
            "cc", losses.correlation_congruence, "block", adapter="embedding", teacher_adapter="embedding"
        ),
    ]  # fmt: skip
    distiller = kd.Distiller(*copy.deepcopy(pair), terms)
    torch.manual_seed(seed)
    distiller.prepare(batch or small.conv_batch())
    return distiller


def train(distiller: kd.Distiller, optimiser: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        distiller(**small.conv_batch(seed=step))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        distiller.step()


def test_every_kind_resumes_bit_equal(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    whole = fresh(conv_pair)
    optimiser = torch.optim.AdamW(whole.parameters(), 0.01)
    start = copy.deepcopy(whole.state_dict())
    train(whole, optimiser, range(3))
    saved = copy.deepcopy((whole.state_dict(), optimiser.state_dict()))
    changed = [k for k, v in saved[0].items() if k.startswith("terms.") and not torch.equal(start[k], v)]
    assert {k.split(".")[1] for k in changed} == {*KINDS, "review", "cc"}
    train(whole, optimiser, range(3, 6))
    other = fresh(conv_pair, seed=1)
    again = torch.optim.AdamW(other.parameters(), 0.01)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(other, again, range(3, 6))
    states = whole.state_dict(), other.state_dict()
    assert all(torch.equal(v.nan_to_num(), states[1][k].nan_to_num()) for k, v in states[0].items())


def test_every_kind_in_double_and_in_a_copy(conv_pair: tuple[nn.Module, nn.Module]) -> None:
    batch = {k: v.double() if v.is_floating_point() else v for k, v in small.conv_batch().items()}
    distiller = fresh((conv_pair[0].double(), conv_pair[1].double()), batch=batch)
    assert all(p.dtype == torch.float64 for p in distiller.parameters())
    other = copy.deepcopy(distiller)
    out = distiller(**batch)
    assert out["loss"].dtype == torch.float64
    assert torch.equal(other(**batch)["loss"], out["loss"])
    out["loss"].backward()
    assert all(p.grad is None for p in other.parameters())


def test_every_kind_compiles_to_one_graph(fresh_dynamo: None, conv_pair: tuple[nn.Module, nn.Module]) -> None:
    distiller = fresh(conv_pair)
    other = copy.deepcopy(distiller)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, backend=counter)
    for step in range(3):
        distiller.load_state_dict(other.state_dict())
        batch = small.conv_batch(seed=step)
        expected, out = distiller(**batch), compiled(**batch)
        for name, value in expected.items():
            torch.testing.assert_close(out[name], value, rtol=1e-5, atol=1e-7)
        out["loss"].backward()
        other.step()
    assert counter.frame_count <= 2


def test_one_module_on_the_teachers_side_of_several_taps() -> None:
    with pytest.raises(TaskkdError, match="term 'a': one teacher_adapter module for several taps; name a kind or give"):
        kd.Match("a", losses.pyramid, ["x", "y"], teacher_adapter=nn.Conv2d(2, 2, 1))


def test_a_module_is_used_as_it_is() -> None:
    module = nn.Linear(2, 2)
    assert build_adapter(module, torch.zeros(1, 2), torch.zeros(1, 2)) is module


def test_a_function_gets_both_tensors() -> None:
    adapter = build_adapter(
        lambda s, t: nn.Linear(s.shape[-1], t.shape[-1], bias=False), torch.zeros(1, 2), torch.zeros(1, 3)
    )
    assert adapter(torch.zeros(4, 2)).shape == (4, 3)


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "sentence"),
    [
        ("linear", (2, 3, 5), (2, 4, 7), "adapter 'linear' maps the last dimension only, got student (2, 3, 5)"),
        ("linear", (2, 5), (2, 3, 7), "adapter 'linear' maps the last dimension only, got student (2, 5)"),
        ("conv1x1", (2, 3, 5), (2, 4, 7), "adapter 'conv1x1' needs (batch, channels, height, width), got student"),
        ("conv1x1_bn", (2, 5), (2, 7), "adapter 'conv1x1_bn' needs (batch, channels, height, width), got student"),
        ("translator", (2, 5), (2, 7), "adapter 'translator' needs (batch, channels, height, width), got student"),
        ("variance", (2, 3, 5), (2, 3, 7), "adapter 'variance' needs (batch, channels, height, width), got student"),
        ("variational", (2, 3, 5), (2, 5), "adapter 'variational' needs (batch, channels, height, width), got"),
        (
            "conv_regressor",
            (2, 3, 4, 4),
            (2, 5, 7, 7),
            "adapter 'conv_regressor' takes maps of 4x4 to 7x7 of the teacher by no rule: expected half of it",
        ),
    ],
)
def test_shapes_that_do_not_fit(kind: str, student: tuple[int, ...], teacher: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ShapeError) as caught:
        build_adapter(kind, torch.zeros(student), torch.zeros(teacher))
    assert sentence in str(caught.value)


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(
        TaskkdError, match=r"no adapter 'variatonal' \(did you mean 'variational'.*known: abf, conv1x1,"
    ):
        build_adapter("variatonal", torch.zeros(1), torch.zeros(1))
    assert set(ADAPTERS) == {
        "abf", "conv1x1", "conv1x1_bn", "conv1x1_bn_relu", "conv_regressor", "embedding", "linear", "translator",
        "variance", "variational",
    }  # fmt: skip
    assert [kind for kind in ADAPTERS if maps_all_levels(kind)] == ["abf"]
