"""Quantization mimic: both sides' features rounded before they are compared (Wei et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from taskkd.detection.methods.maps import Adapter
from taskkd.detection.methods.mimic import MimicTerm, Normalise, Proposals, mimic_loss
from taskkd.errors import TaskkdError
from taskkd.losses.primitives import full_precision
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Weight

__all__ = [
    "QuantizationMimic",
    "quantile_step",
    "quantise",
    "quantised",
    "quantised_mimic_loss",
    "quantization_mimic",
]


def quantise(x: Tensor, step: float | Tensor, *, signed: bool = False) -> Tensor:
    """The nearest multiple of `step`, ties to the lower one, negative values to 0; the gradient passes as it is.

    Source: Wei et al. 2018; uniform steps beat powers of 2 in their experiments.

    Args:
        x: any shape.
        step: positive.
        signed: negative multiples too, for maps that do not come out of a ReLU, as those of pyramids.
    """
    rounded = torch.ceil(x.detach() / step - 0.5) * step
    if not signed:
        rounded = rounded.clamp(min=0)
    return rounded + (x - x.detach())


@torch.no_grad()
def quantile_step(maps: Sequence[Tensor], *, share: float = 0.99, steps: int = 16) -> float:
    """The step that brings a share of the absolute values under `steps` steps. Ours; the authors' is not known.

    Args:
        maps: the teacher's.
        share: 0.99: the 99th percentile.
        steps: how many.
    """
    values = torch.cat([m.detach().float().abs().flatten() for m in maps])
    values = values[:: max(len(values) // 2**20, 1)]  # a million of them are enough
    found = float(values.kthvalue(max(round(share * len(values)), 1)).values) / steps
    return found if found > 0 else 1.0


@full_precision
def quantised_mimic_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    step: float | Tensor,
    signed: bool = False,
    normalise: Normalise = "none",
) -> Tensor:
    """`1 / (2 N) sum_i |Q(t_i) - Q(s_i)|^2` over `N` regions: `mimic_loss` of what `quantise` gives.

    Source: Wei, Pan, Qin, Ouyang, Yan 2018, "Quantization Mimic: Towards Very Tiny CNN for Object Detection".

    Args:
        student, teacher: (N, C, h, w).
        step, signed: see `quantise`.
        normalise: see `mimic_loss`.

    Raises:
        ShapeError: shapes differ.
    """
    both = (quantise(x, step, signed=signed) for x in (student, teacher))
    return mimic_loss(*both, normalise=normalise)


@contextmanager
def quantised(model: nn.Module, step: float, *, module: str = "backbone", signed: bool = True) -> Iterator[None]:
    """During this block, what a module of the model gives is rounded by `quantise`; its weights are not touched.

    The second of the authors' three steps fine-tunes the teacher in it::

        with quantised(teacher, step):
            ...  # the usual training of the teacher

    Args:
        model: a detector.
        step, signed: see `quantise`.
        module: the name of the module that gives the maps, a tensor or a dictionary of tensors.

    Raises:
        TaskkdError: the model has no such module.
    """
    modules = dict(model.named_modules())
    if module not in modules:
        raise TaskkdError(
            f"quantised: the model has no module {module!r}; it has {', '.join(dict(model.named_children()))}."
        )

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Mapping):
            return type(output)((k, quantise(v, step, signed=signed)) for k, v in output.items())  # type: ignore[call-arg]
        return quantise(output, step, signed=signed)

    handle = modules[module].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class QuantizationMimic(MimicTerm):
    """`mimic_loss` of both sides' maps after `quantise`, inside proposals.

    Args:
        name, student, teacher, **others: see `MimicTerm`.
        step: "auto": of `quantile_step` on the first batch; fixed in `prepare` and checkpointed.
        signed: None: if the teacher's maps have negative values on the first batch; checkpointed likewise.
    """

    quantiser: Tensor

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        step: float | Literal["auto"] = "auto",
        signed: bool | None = None,
        weight: Weight = 1.0,
        **others: Any,
    ) -> None:
        super().__init__(name, student, teacher, weight=weight, **others)
        self.step, self.signed = step, signed

    def build(self, run: Run) -> None:
        """Pair the levels, make the adapters, choose step and sign."""
        super().build(run)
        if "quantiser" in self._buffers:
            return
        teachers = self.pairs(run)[1]
        step = quantile_step(teachers) if self.step == "auto" else self.step
        signed = any(bool((t < 0).any()) for t in teachers) if self.signed is None else self.signed
        # registered here, so that `prepare`, which restores the buffers that were, keeps it
        self.register_buffer("quantiser", torch.tensor([step, float(signed)], device=teachers[0].device))

    @property
    def built(self) -> bool:
        return super().built and "quantiser" in self._buffers

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        """The loss of all regions."""
        step, signed = self.quantiser.unbind()

        def rounded(x: Tensor) -> Tensor:
            x = x if x.dtype == torch.float64 else x.float()
            both = quantise(x, step.to(x.dtype), signed=True)
            return torch.where(signed > 0, both, quantise(x, step.to(x.dtype)))

        return super().compare([rounded(s) for s in students], [rounded(t) for t in teachers], run)


def quantization_mimic(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: Annotated[float, Ge(0)] | Literal["auto"] = 1.0,
    step: Annotated[float, Gt(0)] | Literal["auto"] = "auto",
    signed: bool | None = None,
    proposals: Proposals = "student",
    pool: Annotated[int, Gt(0)] | None = 7,
    normalise: Normalise = "elements",
    adapter: Adapter = "conv1x1",
    neck: list[str] | None = None,
    teacher_neck: list[str] | None = None,
) -> Method:
    """Features imitated inside proposals, both sides rounded to multiples of a step: fewer values to be right about.

    Source: Wei et al. 2018, in three steps: (1) train the teacher; (2) fine-tune it with its map quantised, by
    `with quantised(teacher, step)`; (3) train the student with this method. Without (2) the teacher's map is rounded in
    the term alone. The student's forward is not changed, unless it is trained inside `quantised(student, step)`, too.
    They found a weight of 1 best, of the sum over a region's elements (`normalise="none"`); a mean over elements, as
    here, is between 10^3 and 10^4 times smaller, and does not drown the task on wide maps.

    Args:
        student, teacher: detectors; any modules with `neck` and `proposals` "gt".
        weight: of the term.
        step: "auto": the 99th percentile of the teacher's values on the first batch over 16; the authors' is not known.
        signed: whether negative values have steps too; the paper's do not, but its maps come out of a ReLU. None: if
            the teacher's maps have negative values.
        proposals, pool, normalise: see `MimicTerm`.
        adapter: see `taskkd.detection.methods.maps.adapter_of`.
        neck, teacher_neck: taps of maps, paired in order; None: those of the detector's family.
    """
    term = QuantizationMimic(
        "mimic",
        student,
        teacher,
        step=step,
        signed=signed,
        weight=weight,
        proposals=proposals,
        pool=pool,
        normalise=normalise,
        adapter=adapter,
        neck=neck,
        teacher_neck=teacher_neck,
    )
    return Method("quantization_mimic", [Stage("distil", [term])], ("labels",))
