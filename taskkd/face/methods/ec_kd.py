"""EC-KD: exclusivity of weights and consistency of features (Wang X. et al. 2020), as we read it. Experimental."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn

from taskkd.errors import RecipeError, ShapeError
from taskkd.losses.primitives import check_same_shape, full_precision, l2_normalise, masked_mean
from taskkd.stages import Method, Stage
from taskkd.terms import Match, Run, Term, Weight

__all__ = ["WeightExclusivity", "ec_kd", "hardness_aware_consistency", "weight_exclusivity"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weight_exclusivity(weight: Tensor) -> Tensor:
    """How much filters share positions: `sum_i sum_{j != i} |W_i * W_j|_1`, the products entry by entry.

    0 where at every position one filter alone is not 0. It is `sum_k (sum_i |W_ik|)^2 - sum_ik W_ik^2`, which takes
    time in proportion to the number of weights, not to the pairs of filters. Source: Wang X. et al. 2020, "Exclusivity-
    Consistency Regularized Knowledge Distillation for Face Recognition"; the formula is our reading.

    Args:
        weight: (filters, ...).

    Raises:
        ShapeError: it has no dimension of filters.

    Example:
        >>> import torch
        >>> weight_exclusivity(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))  # 1 * 2, in both orders
        tensor(4.)
    """
    if weight.ndim < 2:
        raise ShapeError(f"`weight_exclusivity` needs the weight (filters, ...), got {tuple(weight.shape)}.")
    filters = (weight if weight.dtype.itemsize > 2 else weight.float()).flatten(1)
    return filters.abs().sum(0).square().sum() - filters.square().sum()


@full_precision
def hardness_aware_consistency(student: Tensor, teacher: Tensor, *, normalise: bool = True) -> Tensor:
    """`mean_i w_i d_i`, `d_i = |s_i - t_i|^2`, samples that are far from the teacher weighing more.

    `w_i = exp(d_i / mean d)` over its mean, a constant to the gradient. Source: Wang X. et al. 2020 (EC-KD), "hardness-
    aware feature consistency"; the weights are our reading.

    Args:
        student, teacher: embeddings (N, features) of one shape.
        normalise: compare directions, which is `2 - 2 cos`, not raw embeddings.

    Raises:
        ShapeError: the shapes differ or are not (N, features).

    Example:
        >>> import torch
        >>> hardness_aware_consistency(torch.eye(2), torch.eye(2).flip(0))
        tensor(2.)
    """
    check_same_shape(student, teacher, "hardness_aware_consistency")
    if student.ndim != 2:
        raise ShapeError(f"`hardness_aware_consistency` needs embeddings (N, features), got {tuple(student.shape)}.")
    if normalise:
        student, teacher = l2_normalise(student), l2_normalise(teacher)
    distance = (student - teacher).square().sum(1)
    apart = distance.detach()
    share = (apart / apart.mean().clamp(min=1e-12)).softmax(0) if len(apart) else apart
    return masked_mean(distance * share * len(share))


class WeightExclusivity(Term):
    """`weight_exclusivity` of every convolution of the student over one less than its filters, summed over layers.

    Divided so, it is of the size of the sum of squared weights, and its weight of the size of a weight decay. Filters
    of a grouped convolution are compared within their group, so that depthwise ones add nothing.

    Args:
        name, weight: see `Term`.
        student: the module whose convolutions are meant; it is not registered here.

    Raises:
        RecipeError: it has no convolution.
    """

    def __init__(self, name: str, student: nn.Module, *, weight: Weight = 1e-4) -> None:
        super().__init__(name, weight)
        # a tuple: the student's parameters are not this term's
        self._layers = tuple(m for m in student.modules() if isinstance(m, CONVOLUTIONS))
        if not self._layers:
            raise RecipeError(
                f"term {name!r}: the student ({type(student).__name__}) has no convolution whose filters could be made "
                "exclusive; exclusivity=0 leaves the term out."
            )

    def forward(self, run: Run) -> Tensor:
        values = []
        for layer in self._layers:
            for group in layer.weight.chunk(layer.groups):
                values.append(weight_exclusivity(group) / max(len(group) - 1, 1))
        return sum(values[1:], values[0])


def ec_kd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    exclusivity: Annotated[float, Ge(0)] = 1e-4,
    consistency: Annotated[float, Ge(0)] = 1.0,
    normalise: bool = True,
) -> Method:
    """Filters that do not share positions, and embeddings as the teacher's, most of hard samples. Experimental.

    Source: Wang X. B., Fu, Liao, Wang, Lei, Mei 2020, "Exclusivity-Consistency Regularized Knowledge Distillation for
    Face Recognition". Our reading: there is no public code and we had not the formulas; both weights are ours.

    Args:
        student, teacher: models whose output has `embeddings`, with `embedding_size`; where it differs a linear adapter
            maps the student's.
        exclusivity: weight of `WeightExclusivity`, of the size of a weight decay; 0: without it.
        consistency: weight of `hardness_aware_consistency`.
        normalise: compare directions of embeddings; False: raw ones.
    """
    adapter = None if student.embedding_size == teacher.embedding_size else "linear"
    terms: list[Term] = []
    if exclusivity > 0:
        terms.append(WeightExclusivity("exclusivity", student, weight=exclusivity))
    if consistency > 0:
        terms.append(
            Match(
                "consistency",
                hardness_aware_consistency,
                "out.embeddings",
                adapter=adapter,
                normalise=normalise,
                weight=consistency,
            )
        )
    return Method("ec_kd", [Stage("distil", terms)])
