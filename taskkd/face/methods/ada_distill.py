"""AdaDistill (Boutros et al. 2024): centres that follow the teacher's embeddings, as far as the student has come."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from taskkd.errors import ShapeError
from taskkd.face.heads import initial_weight
from taskkd.face.methods.beside import EMBEDDINGS, identities_of
from taskkd.face.methods.centre_term import CentreTerm, MarginKind, margin_softmax
from taskkd.losses.primitives import full_precision, l2_normalise
from taskkd.ranks import gather_ranks
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Weight

__all__ = ["AdaDistill", "Alpha", "ada_distill", "adaptive_alpha", "move_centres"]

Alpha: TypeAlias = Literal["weighted", "plain", "fixed"]


@torch.no_grad()
@full_precision
def adaptive_alpha(student: Tensor, teacher: Tensor, *, centres: Tensor | None = None) -> Tensor:
    """How much of its centre a sample keeps: `clip(cos(s, t) clip(cos(w, t), 1e-6, 1), 1e-6, 1)`, (batch,).

    Early in training it is about 0, the centre is the teacher's embedding; later it nears 1, the centre is a mean.

    Source: Boutros, Štruc, Damer 2024, "AdaDistill". No gradient flows.

    Args:
        student, teacher: embeddings (batch, features).
        centres: of each sample's identity, (batch, features), for alpha', which gives hard samples less; None: alpha,
            without the second factor.
    """
    t = l2_normalise(teacher)
    alpha = (l2_normalise(student) * t).sum(1)
    if centres is not None:
        alpha = alpha * (l2_normalise(centres) * t).sum(1).clamp(1e-6, 1)
    return alpha.clamp(1e-6, 1)


@torch.no_grad()
@full_precision
def move_centres(centres: Tensor, teacher: Tensor, *, labels: Tensor, alpha: Tensor) -> Tensor:
    """`w_y <- alpha w_y + (1 - alpha) t / |t|`, in place; the centres are not normalised again.

    An identity with several samples in the batch moves to the mean of where each of them alone would move it: their
    order does not matter, and a batch that is repeated moves it no further. (In the authors' code the last sample
    written wins, which on a GPU is any, and each rank has centres of its own.)

    Args:
        centres: (identities, features), fp32 or fp64.
        teacher: embeddings (batch, features).
        labels: (batch,); a sample of label -1 moves nothing.
        alpha: (batch,), of `adaptive_alpha`. A sample whose alpha or embedding is not finite moves nothing.

    Returns:
        the centres.
    """
    usable = (labels >= 0) & alpha.isfinite() & teacher.isfinite().all(1)
    labels, keep, unit = labels[usable], alpha[usable].to(centres.dtype)[:, None], l2_normalise(teacher[usable])
    moved = keep * centres[labels] + (1 - keep) * unit.to(centres.dtype)
    # By a product, in one order on every rank; adding by index is not deterministic on a GPU.
    found, place = torch.unique(labels, return_inverse=True)
    share = (torch.arange(len(found), device=labels.device)[:, None] == place).to(centres.dtype)
    centres[found] = share @ moved / share.sum(1, keepdim=True)
    return centres


class AdaDistill(CentreTerm):
    """Margin softmax against centres that move to the teacher's embeddings before each loss and are never trained.

    The centres are a buffer, so checkpoints carry it; they begin as `N(0, 0.01^2)`, alike on all ranks, and move with
    the samples of all ranks. There is no copy of them: the gradient of a forward is taken before the next forward.

    Args:
        name, weight: see `Term`.
        identities: their number.
        sizes: of the student's and of the teacher's embeddings.
        margin, m, s: see `margin_softmax`.
        alpha: "weighted" (alpha'), "plain" (alpha), see `adaptive_alpha`, or "fixed".
        momentum: alpha, where it is "fixed".
        seed: of the centres at first.
    """

    centres: Tensor
    teacher_taps = (EMBEDDINGS,)
    alike_on_ranks = ("centres",)

    def __init__(
        self,
        name: str,
        identities: int,
        sizes: tuple[int, int],
        *,
        margin: MarginKind = "arc",
        m: float = 0.45,
        s: float = 64.0,
        alpha: Alpha = "weighted",
        momentum: float = 0.9,
        seed: int = 0,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, identities, sizes, weight=weight)
        self.margin: MarginKind = margin
        self.alpha: Alpha = alpha
        self.m, self.s, self.momentum = m, s, momentum
        self.register_buffer("centres", initial_weight(identities, sizes[1], seed))

    def forward(self, run: Run) -> Tensor:
        x, labels, t = self.embeddings(run), self.labels(run), run.teacher[EMBEDDINGS]
        if t.shape != x.shape:
            raise ShapeError(
                f"term {self.name!r} needs embeddings {tuple(x.shape)} of the teacher, got {tuple(t.shape)}."
            )
        self.update(x.detach(), t.detach(), labels)
        centres = self.centres.to(x.dtype)
        return margin_softmax(x, centres, labels=labels, margin=self.margin, m=self.m, s=self.s)

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        """Move the centres with this batch, and with those of the other ranks."""
        if self.alpha == "fixed":
            alpha = student.new_full(labels.shape, self.momentum)
        else:
            own = self.centres[labels.clamp(min=0)] if self.alpha == "weighted" else None
            alpha = adaptive_alpha(student, teacher, centres=own)
        labels, teacher, alpha = gather_ranks(labels), gather_ranks(teacher), gather_ranks(alpha)
        move_centres(self.centres, teacher, labels=labels, alpha=alpha)


def ada_distill(
    student: nn.Module,
    teacher: nn.Module,
    *,
    margin: MarginKind = "arc",
    m: Annotated[float, Ge(0)] | None = None,
    s: Annotated[float, Gt(0)] = 64.0,
    alpha: Alpha = "weighted",
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9,
    seed: int = 0,
    weight: Annotated[float, Gt(0)] = 1.0,
    task_weight: Annotated[float, Ge(0)] = 0.0,
) -> Method:
    """Margin softmax against centres that follow the teacher's embeddings: from sample to sample to sample to centre.

    Source: Boutros, Štruc, Damer 2024, "AdaDistill: Adaptive Knowledge Distillation for Deep Face Recognition":
    AdaArcDistill ("arc") and AdaCosDistill ("cos"). They train with SGD, learning rate 0.1 for a batch of 512, divided
    by 10 after 8, 14, 20 and 25 of 26 epochs, weight decay 5e-4, the gradient clipped at 5.

    Departures: identities with several samples in a batch, and several ranks, see `move_centres`.

    Args:
        student: a face model; `student.identities` is the number of centres.
        teacher: a face model.
        margin: "arc" (ArcFace, without a fallback beyond `pi - m`) or "cos" (CosFace).
        m: the margin. None: 0.45 for "arc", 0.35 for "cos".
        s: the scale.
        alpha: "weighted" is the paper's alpha', "plain" its alpha, "fixed" a constant.
        momentum: alpha, where it is "fixed".
        seed: of the centres at first.
        weight: of the term.
        task_weight: of a margin softmax with trained weights beside it.
    """
    sizes = (int(student.embedding_size), int(teacher.embedding_size))  # type: ignore[arg-type]
    term = AdaDistill(
        "centres",
        identities_of(student, "ada_distill"),
        sizes,
        margin=margin,
        m=m if m is not None else {"arc": 0.45, "cos": 0.35}[margin],
        s=s,
        alpha=alpha,
        momentum=momentum,
        seed=seed,
        weight=weight,
    )
    return Method("ada_distill", [Stage("distil", [term], task_weight)], ("labels",))
