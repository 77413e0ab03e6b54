"""What `distiller.prepare` measures of every term on one batch, and what follows from it: advice, automatic weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from taskkd.errors import NonFiniteError, TaskkdError
from taskkd.terms import Run, Term

__all__ = ["Preparation", "TermReport", "advise", "even_out", "measure"]


@dataclass(frozen=True)
class TermReport:
    """What `prepare` measured of one term (or of the task loss, named "task")."""

    name: str
    value: float
    weight: float
    gradient_norm: float
    student: dict[str, str] = field(default_factory=dict)
    teacher: dict[str, str] = field(default_factory=dict)
    adapter_parameters: int = 0

    @property
    def weighted(self) -> float:
        """`weight * value`."""
        return self.weight * self.value

    @property
    def pull(self) -> float:
        """`weight * gradient_norm`: how hard the term pulls at the student."""
        return self.weight * self.gradient_norm


@dataclass(frozen=True)
class Preparation:
    """The result of `prepare`: sizes and gradients of every term on one batch, and advice in sentences."""

    terms: list[TermReport]
    advice: list[str]


def of_the_teacher(taught: Mapping[str, Any]) -> str:
    """A sentence that names the teacher's taps that are not finite; "" where all are."""
    bad = ", ".join(repr(tap) for tap, value in taught.items() if not _finite(value))
    return f" It comes from the teacher: its {bad} is not finite; the student is not to blame." if bad else ""


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.detach().isfinite().all())
    if isinstance(value, Mapping):
        value = list(value.values())
    return not isinstance(value, list | tuple) or all(map(_finite, value))


def measure(
    losses: Sequence[tuple[str, Tensor, Term | None]],
    parameters: Sequence[Tensor],
    weights: Mapping[str, float],
    run: Run,
) -> list[TermReport]:
    """Value and gradient norm on `parameters` of every loss (name, unweighted value, its term or None for the task).

    Raises:
        NonFiniteError: a value is not finite.
    """
    reports = []
    for name, value, term in losses:
        if not bool(value.detach().isfinite()):
            why = of_the_teacher(run.teacher) or " Look at the student's tensors and the labels there."
            raise NonFiniteError(f"term {name!r} is {value.item()} on the first batch, before any training.{why}")
        gradients = _gradients(value, parameters) if parameters and value.requires_grad else ()
        norms = [g.detach().float().norm() for g in gradients if g is not None]
        reports.append(
            TermReport(
                name,
                value.item(),
                weights[name],
                float(torch.stack(norms).norm()) if norms else 0.0,
                *(term.shown(run) if term else ({}, {})),
                sum(p.numel() for p in term.parameters()) if term else 0,
            )
        )
    return reports


def even_out(
    shares: Mapping[str, float], reports: Sequence[TermReport], weights: Mapping[str, float]
) -> dict[str, float]:
    """Weights that make the gradients of terms a share of the task loss's (or the first other term's), the same on all
    ranks.

    Args:
        shares: term to be weighted -> share.
        reports: what `measure` gave.
        weights: the weights of the others.

    Raises:
        TaskkdError: there is nothing to measure against, or its gradient is 0 or not finite.
    """
    reference = next((r for r in reports if r.name not in shares), None)
    if reference is None:
        raise TaskkdError("weight='auto' needs a task loss or a term of given weight to be measured against.")
    target = weights[reference.name] * reference.gradient_norm
    if not math.isfinite(target):
        raise TaskkdError(
            f"weight='auto': the gradient of {reference.name!r} is {target} on this batch, nothing to measure against."
        )
    norms = {r.name: r.gradient_norm for r in reports}
    # A term that hardly moves the student at its start (twins, a branch that ends in a 0) would weigh billions.
    found = [s * target / norms[n] if norms[n] > 1e-8 * target else 1.0 for n, s in shares.items()]
    chosen = torch.tensor(found, dtype=torch.float64)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        shared = chosen.to("cuda") if torch.distributed.get_backend() == "nccl" else chosen
        torch.distributed.all_reduce(shared)
        chosen = (shared / torch.distributed.get_world_size()).cpu()
    if target == 0:
        raise TaskkdError(
            f"weight='auto': the gradient of {reference.name!r} is 0 on this batch, nothing to measure against."
        )
    return dict(zip(shares, chosen.tolist(), strict=True))


def _gradients(value: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise TaskkdError(
            "the student's gradient checkpointing is the reentrant kind, which hides tensors from taps; use "
            "`use_reentrant=False`."
        ) from None


def advise(terms: Sequence[TermReport]) -> list[str]:
    """Sentences about terms whose pull is out of proportion to the task loss's (or the strongest term's)."""
    others = [t for t in terms if t.name != "task" and t.weight > 0]
    task = next((t for t in terms if t.name == "task" and t.weight > 0), None)
    reference = task or max(others, key=lambda t: t.pull, default=None)
    advice = []
    for term in others:
        if reference is None or term is reference or reference.pull == 0:
            continue
        ratio = term.pull / reference.pull
        if ratio == 0:
            advice.append(f"term {term.name!r} has no gradient on this batch (student and teacher agree there).")
        elif not 1 / 50 <= ratio <= 50:
            how = f"{ratio:.0f} times" if ratio > 1 else f"1/{1 / ratio:.0f} of"
            advice.append(
                f"term {term.name!r} pulls at the student with {how} the gradient of {reference.name!r}; "
                f"weight {term.weight / ratio:.3g} would even them out (weight='auto' does)."
            )
    return advice
