"""One grid over every public loss: whoever adds a loss adds a row here, and has it tested for all of contract 1."""

from __future__ import annotations

import doctest
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd import losses
from taskkd.errors import ShapeError
from taskkd.losses import features, primitives


@dataclass(frozen=True)
class Case:
    """A loss, the shape it is tested with and what holds for it."""

    loss: Callable[..., Tensor]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    mask: tuple[int, ...] = ()
    zero_when_equal: bool = True
    several: bool = False  # a sequence of tensors, one for each index of dimension 1
    beside: Tensor | None = None  # the student is a pair: its tensor and this
    cubic: bool = False  # the gradient grows with the cube of the features: at 1000 no fp16 gradient holds it
    labels: bool = False  # takes `labels`: here the classes in turn
    relational: bool = False  # relates the samples of a batch: one alone gives 0, and doubling the batch changes it
    candidates: bool = False  # the teacher has several candidates along dimension 1, the student the first of them
    where: Callable[[Tensor], Tensor] | None = (
        None  # which entries a mask leaves, where it is not of leading dimensions
    )

    @property
    def name(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.loss.__name__}-{'x'.join(map(str, self.shape))}{'-several' if self.several else ''}-{options}"

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.several:
            student, teacher = student.unbind(1), teacher.unbind(1)  # type: ignore[assignment]
        if self.candidates:
            student = student[:, 0]
        if self.beside is not None:
            student = (student, self.beside)  # type: ignore[assignment]
        options = self.options if mask is None else {**self.options, "mask": mask}
        if self.labels:
            rows = student.select(self.options.get("dim", 1), 0)
            labels = torch.arange(rows.numel()).reshape(rows.shape) % student.shape[self.options.get("dim", 1)]
            options = {**options, "labels": labels}
        return self.loss(student, teacher, **options)

    def spread(self, mask: Tensor) -> Tensor:
        """The mask as booleans over the whole input."""
        if self.where is not None:
            return self.where(mask.bool()).expand(self.shape)
        if self.options.get("dim") == 1 or mask.ndim == 3:
            mask = mask.unsqueeze(1)
        return mask.reshape(mask.shape + (1,) * (len(self.shape) - mask.ndim)).expand(self.shape).bool()


def pairs_of_tokens(mask: Tensor) -> Tensor:
    """Of attention scores: those of a valid query to a valid key."""
    return mask[:, None, :, None] & mask[:, None, None, :]


def queries(mask: Tensor) -> Tensor:
    """Of attention scores: those of a valid query."""
    return mask[:, None, :, None].expand(-1, -1, -1, mask.shape[1])


def behind(mask: Tensor) -> Tensor:
    """Of what has layers or heads before the tokens."""
    return mask[:, None, :, None]


ANCHORS = torch.tensor([[0.3, -0.2, 0.5, 0.1, -0.4], [-0.6, 0.4, 0.2, -0.1, 0.3]])
CASES = [
    Case(losses.kl_divergence, (6, 5), {"temperature": 4.0}, (6,)),
    Case(losses.kl_divergence, (4, 5, 3, 2), {"dim": 1}, (4, 3, 2)),
    Case(losses.kl_divergence, (4, 7, 5), {"dim": -1, "temperature": 2.0}, (4, 7)),
    Case(losses.soft_cross_entropy, (6, 5), {"temperature": 4.0}, (6,), zero_when_equal=False),
    Case(losses.soft_cross_entropy, (4, 5, 3, 2), {"dim": 1}, (4, 3, 2), zero_when_equal=False),
    Case(losses.logit_mse, (6, 5), {}, (6,)),
    Case(
        losses.pseudo_label_cross_entropy, (4, 5, 3, 2), {"dim": 1, "threshold": 0.3}, (4, 3, 2), zero_when_equal=False
    ),
    Case(losses.mse, (4, 7, 5), {}, (4, 7)),
    Case(losses.mse, (4, 7, 5), {"normalise": True}, (4, 7)),
    Case(losses.mse, (4, 5, 3, 2), {}, (4,)),
    Case(losses.cosine, (4, 7, 5), {}, (4, 7)),
    Case(losses.cosine, (4, 5, 3, 2), {"dim": 1}, (4, 3, 2)),
    Case(losses.channel_wise, (4, 5, 3, 2), {}, (4,)),
    Case(losses.channel_wise, (4, 5, 3, 2), {"temperature": 1.0}, (4, 5)),
    Case(losses.channel_wise, (4, 5, 3, 2), {}, (4, 3, 2)),
    Case(losses.patience, (4, 3, 8), {}, (4,)),
    Case(losses.patience, (4, 3, 8), {"normalise": False}, (4, 3)),
    Case(losses.patience, (4, 3, 8), {}, (4,), several=True),
    Case(losses.attention_transfer, (4, 5, 3, 2), {}, (4,)),
    Case(losses.attention_transfer, (4, 5, 3, 2), {"power": 1.5}, (4, 3, 2)),
    Case(losses.attention_transfer, (4, 5, 3, 2), {"distance": "absolute"}, (4, 3, 2)),
    Case(losses.attention_transfer, (4, 5, 3, 2), {"distance": "euclidean"}, (4,)),
    Case(losses.factor, (4, 5, 3, 2), {}, (4,)),
    Case(losses.overhaul, (4, 5, 3, 2), {"margin": -0.5}, (4,)),
    Case(losses.overhaul, (4, 7, 5), {}, (4, 7)),
    Case(losses.partial_mse, (4, 5, 3, 2), {}, (4,)),
    Case(losses.activation_boundaries, (4, 5, 3, 2), {}, (4,), zero_when_equal=False),
    Case(losses.activation_boundaries, (4, 7, 5), {"margin": 0.5}, (4, 7), zero_when_equal=False),
    Case(losses.neuron_selectivity, (4, 3, 3, 2), {}, (4,)),
    Case(losses.neuron_selectivity, (4, 7, 3, 2), {}, (4,)),
    Case(losses.variational_information, (4, 5, 3, 2), {}, (4,), zero_when_equal=False, beside=torch.arange(1.0, 6.0)),
    Case(losses.prediction_aware, (4, 5), {}, (4,), zero_when_equal=False, beside=torch.arange(5.0)),
    Case(losses.flow_of_solution, (4, 3, 5, 3, 2), {}, (4,), several=True, cubic=True),
    Case(losses.flow_of_solution, (4, 2, 5, 3, 2), {"squared": False}, (4,), several=True),
    Case(losses.pyramid, (4, 5, 3, 3), {}, (4,)),
    Case(losses.pyramid, (4, 2, 3, 5, 5), {}, (4,), several=True),
    Case(losses.kl_divergence, (6, 5), {"temperature": 4.0, "direction": "reverse"}, (6,)),
    Case(losses.kl_divergence, (4, 5, 3, 2), {"dim": 1, "direction": "jensen_shannon"}, (4, 3, 2)),
    Case(losses.decoupled, (6, 3), {}, (6,), labels=True),
    Case(losses.decoupled, (4, 4, 3, 2), {"dim": 1, "temperature": 1.0}, (4, 3, 2), labels=True),
    Case(losses.dist, (6, 5), {"temperature": 2.0}, (6,), zero_when_equal=False),  # 4e-6: the authors' eps
    Case(losses.dist, (4, 5, 3, 2), {"dim": 1}, (4,)),
    Case(losses.dist, (4, 5, 3, 2), {"dim": 1, "over": "batch"}, (4, 3, 2)),
    Case(losses.similarity_preserving, (6, 5), {}, (6,), relational=True),
    Case(losses.similarity_preserving, (6, 3, 2), {"normalise": "samples"}, (6,), relational=True),
    Case(losses.relational_distance, (6, 5), {}, (6,), relational=True),
    Case(losses.relational_distance, (6, 3, 2, 2), {"squared": True}, (6,), relational=True),
    Case(losses.relational_angle, (6, 5), {}, (6,), relational=True),
    Case(losses.correlation_congruence, (6, 5), {}, (6,), relational=True),
    Case(losses.consecutive_correlation, (6, 5), {}, (6,), relational=True),
    Case(losses.kernel_alignment, (6, 5), {}, (6,), relational=True),
    Case(losses.kernel_alignment, (6, 3, 2), {"centred": False}, (6,), relational=True),
    Case(losses.probabilistic_transfer, (6, 5), {}, (6,), relational=True),
    Case(losses.dark_rank, (6, 5), {"normalise": True}, (6,), zero_when_equal=False, relational=True),
    Case(losses.dark_rank, (6, 5), {"beta": 1.0}, (6,), zero_when_equal=False, relational=True),
    Case(losses.category_structure, (6, 3), {}, (6,), labels=True, relational=True),
    Case(losses.instance_relationship, (6, 4, 4, 2, 2), {"vertices": 0.0}, (6,), several=True, relational=True),
    Case(losses.instance_relationship, (6, 3, 5), {}, (6,), several=True),
    Case(losses.kl_divergence, (6, 5), {"temperature": 3.0, "target_floor": 1e-3}, (6,), zero_when_equal=False),
    Case(losses.euclidean, (4, 5, 3, 2), {}, (4,)),
    Case(losses.channel_weighted, (4, 5, 3, 2), {}, (4,)),
    Case(losses.channel_weighted, (4, 5, 3, 2), {"channels": torch.arange(1.0, 6.0), "normalise": True}, (4,)),
    Case(losses.matching_guided, (4, 5, 3, 2), {"margin": -0.5}, (4,)),
    Case(losses.matching_guided, (4, 4, 3, 2), {"assignment": torch.arange(4)}, (4,)),
    Case(losses.attention_based_features, (4, 3, 5, 3, 2), {}, (4,), several=True, zero_when_equal=False),
    Case(losses.attention_based_features, (4, 3, 5, 3, 2), {"attention": torch.eye(3)}, (4,), several=True),
    Case(losses.singular_vectors, (4, 2, 5, 3, 3), {}, (4,), several=True),
    Case(losses.singular_vectors, (4, 3, 3, 2, 1), {"count": 2}, (4,), several=True),
    Case(losses.info_nce, (6, 5), {}, (6,), zero_when_equal=False, relational=True),
    Case(
        losses.info_nce, (6, 5), {"symmetric": True, "temperature": 1.0}, (6,), zero_when_equal=False, relational=True
    ),
    Case(losses.attention_scores, (4, 3, 5, 5), {}, (4, 5), where=pairs_of_tokens),
    Case(losses.attention_scores, (4, 3, 5, 5), {"heads": "mean", "clip": -1.0}, (4, 5), where=pairs_of_tokens),
    Case(losses.attention_cross_entropy, (4, 3, 5, 5), {}, (4, 5), zero_when_equal=False, where=pairs_of_tokens),
    Case(
        losses.attention_cross_entropy,
        (4, 3, 5, 5),
        {"heads": "mean", "clip": -1.0},
        (4, 5),
        zero_when_equal=False,
        where=pairs_of_tokens,
    ),
    Case(losses.attention_kl, (4, 3, 5, 5), {}, (4, 5), where=pairs_of_tokens),
    Case(losses.attention_kl, (4, 3, 5, 5), {"heads": "mean"}, (4, 5), where=pairs_of_tokens),
    Case(losses.self_attention_relation, (4, 2, 5, 6), {}, (4, 5), where=behind),
    Case(losses.self_attention_relation, (4, 2, 5, 6), {"heads": 4}, (4, 5), where=behind),
    Case(losses.feature_map_transfer, (4, 7, 5), {}, (4, 7)),
    Case(losses.feature_statistics, (4, 7, 5), {"mean": 3.0}, (4, 7)),
    Case(losses.dynamic_layers, (4, 3, 5, 6), {}, (4, 5), several=True, where=behind),
    Case(losses.dynamic_layers, (4, 3, 5, 6), {"ordered": False}, (4, 5), several=True, where=behind),
    Case(losses.generalised_jsd, (6, 5), {"beta": 0.2, "temperature": 3.0}, (6,)),
    Case(losses.generalised_jsd, (4, 7, 5), {"dim": -1}, (4, 7)),
    Case(losses.generalised_jsd, (4, 7, 5), {"dim": -1, "beta": 1.0, "temperature": 2.0}, (4, 7)),
    Case(losses.universal_logits, (4, 7, 5), {"temperature": 2.0}, (4, 7)),
    Case(losses.margin_mse, (6, 5), {}, (6,)),
    Case(losses.token_similarity, (4, 7, 5), {}, (4, 7), cubic=True),
    Case(losses.token_similarity, (4, 2, 7, 5), {}, (4, 7), several=True, where=behind, cubic=True),
    Case(losses.flow_of_solution, (4, 3, 7, 5), {}, (4, 7), several=True, where=behind, cubic=True),
    Case(losses.cosine_nce, (6, 5), {}, (6,), zero_when_equal=False, relational=True),
    Case(losses.triplet, (6, 5), {"margin": 4.0}, (6,), zero_when_equal=False, relational=True),
    Case(losses.triplet, (6, 5), {"margin": 4.0}, (6,), zero_when_equal=False, relational=True, labels=True),
    Case(losses.noise_contrastive, (4, 3, 5), {"samples": 9}, (4,), zero_when_equal=False, candidates=True),
    Case(
        losses.relation_contrastive,
        (4, 3, 5),
        {"samples": 9, "anchors": ANCHORS},
        (4,),
        zero_when_equal=False,
        candidates=True,
    ),
    Case(losses.pairwise_similarity, (4, 5, 3, 2), {}, (4, 3, 2)),
    Case(losses.pairwise_similarity, (4, 5, 3, 3), {"window": 2, "detach_norm": False}, (4,)),
]
every_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def pair(case: Case, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Random student (with gradient) and teacher tensors."""
    student = (torch.randn(case.shape, dtype=torch.float64) * scale).to(dtype)
    teacher = (torch.randn(case.shape, dtype=torch.float64) * scale).to(dtype)
    return student.requires_grad_(), teacher


def some_mask(case: Case) -> Tensor:
    """A mask with 1s and 0s, at least one of each; four 1s where samples are related to each other."""
    mask = torch.rand(case.mask) > 0.4
    mask.view(-1)[: 4 if case.relational else 1], mask.view(-1)[-1] = True, False
    return mask


def finite_with_gradient(value: Tensor, student: Tensor) -> None:
    assert value.isfinite()
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all()


def test_the_grid_has_every_public_loss() -> None:
    assert {case.loss.__name__ for case in CASES} == set(losses.__all__)


@every_loss
def test_scalar_fp32_with_gradient(case: Case) -> None:
    student, teacher = pair(case)
    value = case(student, teacher)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value > 0
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.abs().sum() > 0


@every_loss
def test_numbers_may_be_tensors_of_no_dimension(case: Case) -> None:
    """What a schedule gives a compiled graph: the same value in the same precision, and no look at it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    parameters = inspect.signature(case.loss).parameters.values()
    numbers = {p.name: case.options.get(p.name, p.default) for p in parameters if isinstance(p.default, float)}
    s, t = pair(case)
    options = {name: torch.tensor(value) for name, value in numbers.items()}
    value = replace(case, options={**case.options, **options})(s, t)
    torch.testing.assert_close(value, case(s, t), rtol=1e-5, atol=1e-6)
    assert value.dtype == torch.float32
    finite_with_gradient(value, s)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # reading a number out of a fake tensor raises
        fakes = {name: mode.from_tensor(option) for name, option in options.items()}
        replace(case, options={**case.options, **fakes})(mode.from_tensor(s), mode.from_tensor(t))


@every_loss
def test_equal_inputs(case: Case) -> None:
    _, teacher = pair(case)
    student = teacher.clone().requires_grad_()
    value = case(student, teacher)
    finite_with_gradient(value, student)
    assert (abs(value.item()) <= 1e-6) == case.zero_when_equal


@every_loss
def test_gradcheck(case: Case) -> None:
    student, teacher = pair(case, torch.float64)
    assert torch.autograd.gradcheck(lambda s: case(s, teacher), (student,))
    mask = some_mask(case)
    assert torch.autograd.gradcheck(lambda s: case(s, teacher, mask), (student,))


@every_loss
def test_float64_stays_float64(case: Case) -> None:
    assert case(*pair(case, torch.float64)).dtype == torch.float64


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_are_computed_in_fp32(case: Case, dtype: torch.dtype) -> None:
    student, teacher = pair(case, dtype, scale=4.0)
    value = case(student, teacher)
    assert value.dtype == torch.float32
    finite_with_gradient(value, student)
    exact = case(student.double(), teacher.double()).item()
    assert value.item() == pytest.approx(exact, rel=1e-5)


@every_loss
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 5e-3)], ids=str)
def test_gradients_of_half_inputs(case: Case, dtype: torch.dtype, bound: float) -> None:
    """Acceptance A2: with a loss scale, as a GradScaler settles on it, for fp16."""
    for seed in range(20):
        torch.manual_seed(seed)
        student, teacher = pair(case, dtype)
        exact_student = student.detach().double().requires_grad_()
        exact = case(exact_student, teacher.double())
        (want,) = torch.autograd.grad(exact, exact_student)
        value = case(student, teacher)
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)
        scale = 2.0**16 if dtype == torch.float16 else 1.0
        while want.abs().max() * scale > 6e4:
            scale /= 2
        (got,) = torch.autograd.grad(value * scale, student)
        assert got.isfinite().all()
        assert (got.double() / scale - want).norm() <= bound * want.norm(), seed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [4.0, 20.0])
def test_soft_targets_near_convergence_in_half_precision(dtype: torch.dtype, temperature: float) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        teacher = torch.randn(16, 100)
        student = (teacher + 0.1 * torch.randn(16, 100)).to(dtype).requires_grad_()
        teacher = teacher.to(dtype)
        value = losses.kl_divergence(student, teacher, temperature=temperature)
        exact = losses.kl_divergence(student.double(), teacher.double(), temperature=temperature)
        assert value.item() == pytest.approx(exact.item(), rel=1e-2)
        finite_with_gradient(value, student)


@every_loss
def test_autocast_changes_nothing(case: Case) -> None:
    student, teacher = pair(case)
    mask = some_mask(case)
    plain = [case(student, teacher), case(student, teacher, mask)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = [case(student, teacher), case(student, teacher, mask)]
        assert torch.is_autocast_enabled("cpu")
    assert [v.dtype for v in inside] == [torch.float32] * 2
    assert torch.equal(torch.stack(plain), torch.stack(inside))


@every_loss
def test_masked_entries_count_nothing(case: Case) -> None:
    student, teacher = pair(case)
    mask = some_mask(case)
    where = case.spread(mask)
    value = case(student, teacher, mask)
    for filler in (0.0, 1e4, -77.0, float("inf"), float("nan")):
        changed = torch.where(where, student, filler)
        other = torch.where(where, teacher, -filler)
        assert torch.equal(case(changed, other, mask), value)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient[~where].eq(0).all()
    assert gradient[where].ne(0).any()


@every_loss
def test_mask_is_the_mean_over_what_counts(case: Case) -> None:
    student, teacher = pair(case, torch.float64)
    rows = torch.tensor([True] * (case.shape[0] - 2) + [False] * 2)
    mask = rows.reshape(-1, *(1,) * (len(case.mask) - 1)).expand(case.mask)
    kept = case(student[rows], teacher[rows])
    torch.testing.assert_close(case(student, teacher, mask), kept, rtol=1e-12, atol=0)
    torch.testing.assert_close(case(student, teacher, mask * 3.0), kept, rtol=1e-12, atol=0)  # weights are relative
    everything = torch.ones(case.mask)
    torch.testing.assert_close(case(student, teacher, everything), case(student, teacher), rtol=1e-12, atol=0)


@every_loss
def test_an_all_masked_batch_is_zero_with_a_gradient_path(case: Case) -> None:
    student, teacher = pair(case)
    value = case(student, teacher, torch.zeros(case.mask, dtype=torch.bool))
    assert value.item() == 0
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.eq(0).all()


@every_loss
def test_a_mask_that_does_not_fit_is_refused(case: Case) -> None:
    with pytest.raises(ShapeError, match=r"a mask of shape \(9,\) does not fit a loss map"):
        case(*pair(case), torch.ones(9))


@every_loss
def test_batch_of_one(case: Case) -> None:
    student, teacher = pair(case)
    one = student[:1].detach().requires_grad_()
    value = case(one, teacher[:1])
    finite_with_gradient(value, one)
    if case.relational and case.loss is not losses.cosine_nce:
        assert abs(value.item()) <= 1e-6


@every_loss
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_zero_vectors(case: Case, s: float, t: float) -> None:
    student, teacher = pair(case)
    student = (student.detach() * s).requires_grad_()
    finite_with_gradient(case(student, teacher * t), student)


@every_loss
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_zero_rows(case: Case, where: str) -> None:
    student, teacher = (x.detach().clone() for x in pair(case))
    if where != "teacher":
        student[0] = 0
    if where != "student":
        teacher[0] = 0
    finite_with_gradient(case(student.requires_grad_(), teacher), student)


@every_loss
def test_samples_that_are_all_alike(case: Case) -> None:
    student, teacher = (x.detach()[:1].expand(case.shape).clone() for x in pair(case))
    finite_with_gradient(case(student.requires_grad_(), teacher), student)
    finite_with_gradient(case(student, student.detach()), student)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_times_thousand(case: Case, dtype: torch.dtype) -> None:
    student, teacher = pair(case, dtype, scale=20.0 if case.cubic and dtype == torch.float16 else 1000.0)
    finite_with_gradient(case(student, teacher), student)


@every_loss
def test_near_duplicates(case: Case) -> None:
    for offset in (0.0, 100.0):
        student, teacher = pair(case)
        student = (student.detach() + offset).requires_grad_()
        twins = student.detach().clone()
        twins[1], twins[2] = twins[0], twins[3] + 1e-6
        finite_with_gradient(case(twins.requires_grad_(), teacher), twins)
        finite_with_gradient(case(student, twins.detach()), student)


@every_loss
def test_a_batch_without_samples_is_zero_with_a_gradient_path(case: Case) -> None:
    student, teacher = pair(case)
    value = case(student[:0], teacher[:0])
    assert value.item() == 0
    finite_with_gradient(value, student)


@every_loss
def test_doubling_the_batch(case: Case) -> None:
    if case.relational or case.loss is losses.instance_relationship:
        pytest.skip("a sample and its double are one more relation")
    student, teacher = pair(case, torch.float64)
    doubled = case(torch.cat([student, student]), torch.cat([teacher, teacher]))
    eps = 1e-7 if case.loss is losses.dist else 1e-12  # the authors add 1e-8 to norms that grow with the batch
    torch.testing.assert_close(doubled, case(student, teacher), rtol=eps, atol=0)


@every_loss
def test_the_teacher_may_be_of_another_precision(case: Case) -> None:
    student, teacher = pair(case)
    value = case(student, teacher.bfloat16())
    torch.testing.assert_close(value, case(student, teacher.bfloat16().float()), rtol=0, atol=0)


@every_loss
def test_compiles_to_one_equal_graph(case: Case, fresh_dynamo: None) -> None:
    student, teacher = pair(case)
    mask = some_mask(case)
    compiled = torch.compile(case.loss, fullgraph=True, backend="aot_eager")
    fast = replace(case, loss=compiled)
    for arguments in ((student, teacher), (student, teacher, mask)):
        expected, got = case(*arguments), fast(*arguments)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
        (a,), (b,) = torch.autograd.grad(expected, student), torch.autograd.grad(got, student)
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-8)


@every_loss
def test_shapes_that_would_broadcast_are_refused(case: Case) -> None:
    student, teacher = pair(case)
    sentence = "(relates the samples of a batch and )?needs (student and teacher tensors of one shape|as many)"
    with pytest.raises(ShapeError, match=rf"`{case.loss.__name__}` {sentence}"):
        case(student, teacher[:1])


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda s, t: losses.kl_divergence(s, t, temperature=-1),
            ValueError,
            "`temperature` must be positive, got -1.",
        ),
        (lambda s, t: losses.kl_divergence(s, t, temperature=0), ValueError, "`temperature` must be positive, got 0."),
        (
            lambda s, t: losses.soft_cross_entropy(s, t, temperature=0),
            ValueError,
            "`temperature` must be positive, got 0.",
        ),
        (
            lambda s, t: losses.channel_wise(s[..., None], t[..., None], temperature=-2.0),
            ValueError,
            "`temperature` must be positive, got -2.0.",
        ),
        (
            losses.channel_wise,
            ShapeError,
            "`channel_wise` needs (batch, channels, height, width), got (4, 5).",
        ),
        (
            lambda s, t: losses.kl_divergence(s, t, direction="backward"),
            ValueError,
            "`direction` is one of forward, reverse, jensen_shannon, got 'backward'.",
        ),
        (
            lambda s, t: losses.similarity_preserving(s, t, normalise="columns"),
            ValueError,
            "`normalise` is one of rows, samples, got 'columns'.",
        ),
        (
            lambda s, t: losses.category_structure(s, t, labels=torch.zeros(3)),
            ShapeError,
            "labels of shape (3,) for 4 samples: expected one per sample.",
        ),
        (
            lambda s, t: losses.decoupled(s, t, labels=torch.zeros(3, dtype=torch.long)),
            ShapeError,
            "labels of shape (3,) do not fit logits of shape (4, 5).",
        ),
        (
            lambda s, t: losses.instance_relationship([s], [t]),
            ShapeError,
            "`instance_relationship` needs as many student as teacher layers, at least one, then the output;",
        ),
        (
            lambda s, t: losses.kl_divergence(s[:, :, None], t[:, :, None]),
            ShapeError,
            "`kl_divergence` got logits of shape (4, 5, 1): say which dimension holds the classes",
        ),
        (
            lambda s, t: losses.soft_cross_entropy(s[0], t[0]),
            ShapeError,
            "`soft_cross_entropy` got logits of shape (5,): say which dimension holds the classes",
        ),
        (
            lambda s, t: losses.mse(s, t[:, :3]),
            ShapeError,
            "`mse` needs student and teacher tensors of one shape, got (4, 5) and (4, 3). An adapter",
        ),
        (losses.attention_transfer, ShapeError, "(batch, channels, height, width) but for their channels and size"),
        (losses.neuron_selectivity, ShapeError, "`neuron_selectivity` needs student and teacher tensors of one shape"),
        (
            lambda s, t: losses.attention_transfer(s[..., None, None], t[..., None, None], power=0.5),
            ValueError,
            "`power` must be at least 1, got 0.5.",
        ),
        (
            lambda s, t: losses.attention_transfer(s[..., None, None], t[..., None, None], distance="l2"),
            ValueError,
            "`distance` must be 'squared', 'absolute' or 'euclidean', got 'l2'.",
        ),
        (
            lambda s, t: losses.flow_of_solution([s], [t]),
            ShapeError,
            "`flow_of_solution` needs two or more maps (batch, channels, height, width) of each",
        ),
        (
            lambda s, t: losses.flow_of_solution([s, s], [t, t]),
            ShapeError,
            "`flow_of_solution` needs two or more maps (batch, channels, height, width) of each",
        ),
        (
            lambda s, t: losses.flow_of_solution([s, s], [t, t], pool="sum"),
            ValueError,
            "`pool` must be 'avg' or 'max', got 'sum'.",
        ),
        (lambda s, t: losses.pyramid([s], [t, t]), ShapeError, "`pyramid` needs as many maps of each, got 1 and 2."),
        (losses.pyramid, ShapeError, "`pyramid` needs maps (batch, channels, height, width), got (4, 5)."),
    ],
)
def test_errors_are_sentences(call: Callable[[Tensor, Tensor], Tensor], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call(torch.randn(4, 5), torch.randn(4, 5))
    assert sentence in str(caught.value)


def test_kl_divergence_is_batchmean_times_temperature_squared() -> None:
    s, t = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    expected = 9 * F.kl_div(F.log_softmax(s / 3, 1), F.softmax(t / 3, 1), reduction="batchmean")
    torch.testing.assert_close(losses.kl_divergence(s, t, temperature=3.0), expected)
    torch.testing.assert_close(losses.kl_divergence(s, t, temperature=torch.tensor(3.0, dtype=torch.float64)), expected)


def test_kl_divergence_over_pixels_is_the_mean_over_pixels() -> None:
    s, t = torch.randn(2, 5, 3, 2), torch.randn(2, 5, 3, 2)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (s, t)]
    torch.testing.assert_close(losses.kl_divergence(s, t, dim=1), losses.kl_divergence(*flat))


def test_soft_cross_entropy_has_the_gradient_of_kl_divergence() -> None:
    s, t = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 5, dtype=torch.float64)
    grads = [
        torch.autograd.grad(f(s, t, temperature=2.0), s)[0] for f in (losses.kl_divergence, losses.soft_cross_entropy)
    ]
    torch.testing.assert_close(*grads)
    entropy = -(F.softmax(t / 2, 1) * F.log_softmax(t / 2, 1)).sum(1).mean() * 4
    difference = losses.soft_cross_entropy(s, t, temperature=2.0) - losses.kl_divergence(s, t, temperature=2.0)
    torch.testing.assert_close(difference, entropy)


def test_channel_wise_is_a_divergence_over_space() -> None:
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    p, q = F.softmax(t.reshape(6, 20) / 4, 1), F.log_softmax(s.reshape(6, 20) / 4, 1)
    torch.testing.assert_close(losses.channel_wise(s, t), 16 * F.kl_div(q, p, reduction="batchmean"))
    torch.testing.assert_close(losses.channel_wise(s + 5, t), losses.channel_wise(s, t))  # a channel's level is free


def test_cosine_and_mse_by_hand() -> None:
    s, t = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [-2.0, 0.0]])
    assert losses.cosine(s, t).item() == pytest.approx(((1 - 24 / 25) + 2) / 2)
    assert losses.mse(s, t).item() == pytest.approx((1 + 1 + 9 + 0) / 4)
    assert losses.mse(s, t, normalise=True).item() == pytest.approx((0.04 + 0.04 + 4 + 0) / 4)
    assert losses.mse(s, t, mask=torch.tensor([1.0, 3.0])).item() == pytest.approx((2 + 3 * 9) / 8)
    assert losses.cosine(torch.zeros(1, 2), t[:1]).item() == 1


def test_patience_stacks_layers() -> None:
    s, t = torch.randn(4, 3, 8), torch.randn(4, 3, 8)
    expected = F.mse_loss(F.normalize(s, dim=-1), F.normalize(t, dim=-1))
    torch.testing.assert_close(losses.patience(s, t), expected)
    torch.testing.assert_close(losses.patience(list(s.unbind(1)), tuple(t.unbind(1))), expected)
    assert losses.patience(s.half().unbind(1), t.half().unbind(1)).dtype == torch.float32


def test_attention_transfer_pools_the_larger_map_and_leaves_masked_positions_out() -> None:
    s, t = torch.randn(2, 3, 6, 4), torch.randn(2, 5, 3, 4)
    pooled = F.adaptive_avg_pool2d(s, (3, 4))
    torch.testing.assert_close(losses.attention_transfer(s, t), losses.attention_transfer(pooled, t))
    inside = torch.zeros(2, 3, 4)
    inside[:, :2, :3] = 1  # a batch of images padded on the right and below
    cut = losses.attention_transfer(pooled[:, :, :2, :3], t[:, :, :2, :3])
    torch.testing.assert_close(losses.attention_transfer(pooled, t, mask=inside), cut)
    q, r = (F.normalize(x.abs().pow(3).sum(1).flatten(1)) for x in (pooled, t))
    by_hand = (q - r).norm(dim=1).mean()
    torch.testing.assert_close(losses.attention_transfer(s, t, power=3.0, distance="euclidean"), by_hand)


@pytest.mark.parametrize("channels", [(3, 4), (7, 4), (30, 2)])
def test_neuron_selectivity_is_the_kernel_of_every_pair_of_channels(channels: tuple[int, int]) -> None:
    s, t = (torch.randn(2, c, 4, 2, dtype=torch.float64) for c in channels)
    a, b = (F.normalize(x.flatten(2), dim=2) for x in (s, t))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, :, None] * y[:, None]).sum(-1).square().mean()

    torch.testing.assert_close(losses.neuron_selectivity(s, t), kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


def test_margins_by_hand() -> None:
    s, t = torch.tensor([[0.5, -0.2, -2.0, 3.0]]), torch.tensor([[2.0, -1.0, -1.0, -1.0]])
    assert losses.overhaul(s, t).item() == pytest.approx((1.5**2 + 0 + 0 + 3**2) / 4)
    assert losses.overhaul(s, t, margin=-0.5).item() == pytest.approx((1.5**2 + 0.3**2 + 0 + 3.5**2) / 4)
    each = torch.tensor([-0.5, -0.1, -0.5, -0.5])
    assert losses.overhaul(s, t, margin=each).item() == pytest.approx((1.5**2 + 0 + 0 + 3.5**2) / 4)
    assert losses.partial_mse(s, t).item() == pytest.approx((1.5**2 + 0 + 0 + 4**2) / 4)
    assert losses.activation_boundaries(s, t).item() == pytest.approx((0.5**2 + 0.8**2 + 0 + 4**2) / 4)


def test_overhaul_margin_is_the_mean_below_zero_and_finite_for_dead_channels() -> None:
    weight, bias = torch.tensor([1.5, -0.7, 0.0, 0.0, 0.0, 1e-8]), torch.tensor([0.4, -0.3, 0.0, -2.0, 2.0, -5.0])
    margin = features.overhaul_margin(weight, bias)
    for i in (0, 1):
        x = torch.randn(200_000) * weight[i].abs() + bias[i]
        assert margin[i].item() == pytest.approx(x[x < 0].mean().item(), rel=0.02)
    torch.testing.assert_close(margin[2:], torch.tensor([0.0, -2.0, 0.0, -5.0]))
    assert features.overhaul_margin(weight.half(), bias.half()).dtype == torch.float16


@pytest.mark.parametrize("loss", [losses.variational_information, losses.prediction_aware], ids=lambda f: f.__name__)
@pytest.mark.parametrize("parameter", [-1e4, -100.0, 90.0, 1e4])
def test_extreme_variances_are_finite(loss: Callable[..., Tensor], parameter: float) -> None:
    mean, scale = torch.randn(2, 3, requires_grad=True), torch.full((3,), parameter, requires_grad=True)
    value = loss((mean, scale), torch.randn(2, 3) * 100)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, (mean, scale)))


def test_likelihoods_by_hand() -> None:
    mean, teacher, parameter = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(3)
    variance = (F.softplus(parameter) + 1e-5)[:, None, None].expand(3, 4, 4)
    gauss = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(teacher).mean() - math.log(2 * math.pi) / 2
    torch.testing.assert_close(losses.variational_information((mean, parameter), teacher), gauss)
    v = torch.randn(2, 3, 4, 4)
    by_hand = ((teacher - mean) ** 2 / (1e-6 + v.exp()) + v).mean()
    torch.testing.assert_close(losses.prediction_aware((mean, v), teacher), by_hand)


def test_flow_of_solution_needs_the_same_channels_only() -> None:
    s, t = [torch.randn(2, 3, 6, 6), torch.randn(2, 5, 3, 3)], [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)]
    for pool, shrink in (("avg", F.adaptive_avg_pool2d), ("max", F.adaptive_max_pool2d)):
        gs = torch.einsum("bixy,bjxy->bij", shrink(s[0], 3), s[1]) / 9
        gt = torch.einsum("bixy,bjxy->bij", *t) / 16
        torch.testing.assert_close(losses.flow_of_solution(s, t, pool=pool), F.mse_loss(gs, gt))


def test_pyramid_of_one_map_and_of_several_levels() -> None:
    s, t = torch.randn(2, 3, 3, 5), torch.randn(2, 3, 3, 5)
    two, one = (F.mse_loss(F.adaptive_avg_pool2d(s, n), F.adaptive_avg_pool2d(t, n)) for n in (2, 1))
    expected = (F.mse_loss(s, t) + two / 2 + one / 4) / 1.75
    torch.testing.assert_close(losses.pyramid(s, t), expected)
    flat = s.mean((2, 3), keepdim=True), t.mean((2, 3), keepdim=True)  # height 1: the maps alone
    torch.testing.assert_close(losses.pyramid([s, flat[0]], [t, flat[1]]), (expected + F.mse_loss(*flat)) / 2)


def test_directions_of_kl_divergence() -> None:
    s, t = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    options = {"temperature": 2.0}
    reverse = losses.kl_divergence(s, t, direction="reverse", **options)
    torch.testing.assert_close(reverse, losses.kl_divergence(t, s, **options))
    p, q = F.softmax(s / 2, 1), F.softmax(t / 2, 1)
    m = (p + q) / 2
    expected = 4 * ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean() / 2
    value = losses.kl_divergence(s, t, direction="jensen_shannon", **options)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(losses.kl_divergence(t, s, direction="jensen_shannon", **options), expected)
    far = losses.kl_divergence(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]), direction="jensen_shannon")
    assert far.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_decoupled_of_two_classes_and_of_confident_logits(scale: float) -> None:
    labels = torch.tensor([0, 1, 0, 1])
    s, t = (torch.randn(4, 2) * scale).requires_grad_(), torch.randn(4, 2) * scale
    value = losses.decoupled(s, t, labels=labels, temperature=1.0)
    finite_with_gradient(value, s)
    # The others of two classes are one: what is left is the divergence itself.
    torch.testing.assert_close(value, losses.kl_divergence(s, t))
    s, t = (torch.randn(4, 9) * scale).requires_grad_(), torch.randn(4, 9) * scale
    finite_with_gradient(losses.decoupled(s, t, labels=labels), s)


def test_decoupled_ignores_the_ignore_index() -> None:
    s, t, labels = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randint(0, 5, (2, 4))
    where = torch.tensor([[True, False, True, True], [False, True, True, False]])
    masked = losses.decoupled(s, t, labels=labels, dim=1, mask=where)
    ignored = losses.decoupled(s, t, labels=labels.masked_fill(~where, 255), dim=1, ignore_index=255)
    torch.testing.assert_close(masked, ignored, rtol=0, atol=0)


@pytest.mark.parametrize("paired", [0, primitives.PAIRED])
def test_pairwise_distance_is_exact_for_near_duplicates(paired: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "PAIRED", paired)
    x = torch.randn(4, 64) + 100
    x[1] = x[0] + torch.linspace(-5e-4, 5e-4, 64)
    exact = torch.linalg.vector_norm(x.double()[0] - x.double()[1])
    assert primitives.pairwise_distance(x)[0, 1].item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("other", [False, True])
def test_pairwise_distance_and_its_gradient_are_those_of_squared_differences(
    other: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(primitives, "PAIRED", 0)
    x, y = torch.randn(6, 40, requires_grad=True), torch.randn(5, 40, requires_grad=True)
    with torch.no_grad():
        x[2] = x[4]
        y[3] = x[1]
    weights = torch.randn(6, 5 if other else 6)
    inputs = (x, y) if other else (x,)
    found = primitives.pairwise_distance(*inputs)
    both = [v.detach().double().requires_grad_() for v in inputs]
    expected = torch.cdist(both[0], both[-1], compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)
    got = torch.autograd.grad((weights * found).sum(), inputs)
    wanted = torch.autograd.grad((weights.double() * expected).sum(), both)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w.float(), rtol=1e-5, atol=1e-6)


def test_pairwise_distance_of_equal_rows_of_many_features_is_0() -> None:
    x = torch.randn(40, 12544).repeat(2, 1)
    distance = primitives.pairwise_distance(x)
    assert (distance == 0).sum() == 160
    assert (distance.diagonal(40) == 0).all()


def test_angles_by_hand() -> None:
    corner = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    found = primitives.angles(corner)
    assert found[0, 1, 2].item() == 0
    assert found[0, 1, 3].item() == pytest.approx(math.sqrt(0.5))
    assert found[0, 0, 1].item() == 0  # degenerate
    assert found[1, 0, 0].item() == 1


def test_kernel_alignment_forgets_scale_rotation_and_mean() -> None:
    s = torch.randn(6, 5, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert losses.kernel_alignment(s, 3 * s @ q + 7).item() == pytest.approx(0, abs=1e-12)
    assert losses.kernel_alignment(s, 3 * s @ q + 7, centred=False).item() > 0.1


def test_dist_forgets_a_shift_and_scale_of_probabilities() -> None:
    p = torch.softmax(torch.randn(6, 5, dtype=torch.float64), 1)
    q = p * 0.5 + 0.1
    assert losses.dist(p.log(), q.log()).item() == pytest.approx(0, abs=1e-6)


def test_student_and_teacher_may_differ_in_features() -> None:
    s, t = torch.randn(6, 5, 2), torch.randn(6, 3)
    alike = (losses.consecutive_correlation, losses.category_structure, losses.info_nce, losses.triplet)
    alike = (*alike, losses.cosine_nce)
    for case in CASES:
        if case.relational and not case.several and case.loss not in alike:
            assert case(s, t).isfinite()


def test_a_confident_teacher_gives_a_finite_divergence() -> None:
    s = torch.zeros(1, 3, requires_grad=True)
    value = losses.kl_divergence(s, torch.tensor([[1e4, 0.0, -1e4]]))
    assert value.item() == pytest.approx(math.log(3))
    finite_with_gradient(value, s)


@pytest.mark.parametrize(
    "module",
    [
        "logits",
        "features",
        "channels",
        "contrastive",
        "layers",
        "relations",
        "primitives",
        "attention",
        "tokens",
        "embeddings",
        "vocabularies",
    ],
)
def test_docstring_examples_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"taskkd.losses.{module}")).failed == 0


def test_there_are_docstring_examples() -> None:
    examples = doctest.DocTestFinder().find(importlib.import_module("taskkd.losses.logits"))
    assert sum(len(e.examples) for e in examples) >= 3


def test_a_loss_of_ones_own_gets_the_same_care() -> None:
    seen: list[torch.dtype] = []

    @primitives.full_precision
    def loss(student: Tensor, teacher: Tensor, *, weight: Tensor) -> Tensor:
        """Mine."""
        seen.extend([student.dtype, teacher.dtype, weight.dtype, (student @ teacher.T).dtype])
        return (student - teacher).square().mean()

    with torch.autocast("cpu", torch.bfloat16):
        loss(torch.ones(2, 2).half(), torch.ones(2, 2).bfloat16(), weight=torch.ones(1).half())
    assert seen == [torch.float32] * 4
    assert (loss.__name__, loss.__doc__) == ("loss", "Mine.")
