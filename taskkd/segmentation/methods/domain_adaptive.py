"""Domain-adaptive distillation (Kothandaraman et al. 2021): labels of one domain, images of another, one teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd import losses
from taskkd.adversarial import Adversarial
from taskkd.errors import RecipeError, TaskkdError
from taskkd.losses.adversarial import discriminator_loss
from taskkd.losses.primitives import check_same_shape, full_precision, masked_mean
from taskkd.schedules import polynomial
from taskkd.segmentation.discriminators import PatchDiscriminator, Small, probabilities
from taskkd.segmentation.terms import Ignore, MapTerm, resized, valid_at
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term, Weight

__all__ = ["DomainAdversarial", "DomainTerm", "domain_adaptive", "log_probability_mse"]


@full_precision
def log_probability_mse(student: Tensor, teacher: Tensor, *, dim: int = 1, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of log-softmaxes, mean over every dimension.

    Source: Kothandaraman et al. 2021, whose networks end in a log-softmax.

    Args:
        student, teacher: logits of one shape.
        dim: the class dimension.
        mask: weights or booleans over the non-class dimensions or the leading ones of them.

    Raises:
        ShapeError: the shapes differ.
    """
    check_same_shape(student, teacher, "log_probability_mse")
    difference = F.log_softmax(student, dim) - F.log_softmax(teacher, dim)
    return masked_mean(difference.square().mean(dim), mask)


def _unlabelled(batch: Mapping[str, Any], name: str) -> Tensor:
    """Which samples are of the target domain, (batch,) bool."""
    found = batch.get("unlabelled")
    if not isinstance(found, Tensor) or found.ndim != 1:
        raise TaskkdError(
            f"term {name!r} needs `unlabelled` (batch,) in the batch, True for the samples of the domain without "
            f"labels; the batch has {', '.join(batch) or 'nothing'}."
        )
    return found.bool()


class DomainTerm(MapTerm):
    """A loss of maps as its mean over the labelled domain plus `target` times its mean over the unlabelled one.

    A domain that is not in the batch adds exactly 0.

    Args:
        name, loss, student, teacher: see `MapTerm`; the loss takes `mask`.
        target: factor of the unlabelled domain.
        ignore, **options: see `MapTerm`.

    Raises:
        TaskkdError: as `MapTerm`; when it runs, the batch has no `unlabelled`.
    """

    def __init__(
        self,
        name: str,
        loss: Callable[..., Tensor],
        student: str,
        teacher: str,
        *,
        target: float = 1.0,
        ignore: Ignore = "padding",
        **options: Any,
    ) -> None:
        # What counts comes as the batch's `valid`, see `forward`.
        super().__init__(name, loss, student, teacher, ignore="padding", **options)
        self.target, self.ignored = target, ignore

    def forward(self, run: Run) -> Tensor:
        run = self._aligned(run)
        size = run.student[self.student_pairs[0]].shape[2:]
        unlabelled = _unlabelled(run.batch, self.name)[:, None, None].expand(-1, *size)
        valid = valid_at(run.batch, size, self.ignored)
        values = []
        for domain in (~unlabelled, unlabelled):
            counts = domain if valid is None else domain & valid
            values.append(super().forward(replace(run, batch={**run.batch, "valid": counts})))
        return values[0] + self.target * values[1]


class DomainAdversarial(Adversarial):
    """A judge tells the student's maps of one domain from those of the other; on the unlabelled one it is to be misled.

    Source: Tsai et al. 2018 (AdaptSegNet), vanilla cross-entropy. The labelled domain's score is high; there it is the
    label 0, which is the same game with the sign of the scores turned.

    Every sample goes through the judge and those of the other domain are masked, so the judge must look at each alone
    (no batch norm).

    Args:
        name, weight: see `Term`.
        student: the tap of logits (batch, classes, h, w).
        size: softmax and judge are at the height and width of the "images" or of the "logits".
        **options: of `Adversarial`.

    Raises:
        TaskkdError: as `Adversarial`; when it runs, the batch has no `unlabelled`, or no `images` of `size="images"`.
    """

    columns = ("images", "unlabelled")

    def __init__(
        self,
        name: str,
        student: str,
        *,
        size: Literal["images", "logits"] = "images",
        weight: Weight = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(name, student, game="cross_entropy", weight=weight, **options)
        self.teacher_taps, self.teacher_pairs = (), ()
        self.size = size

    def _sides(self, run: Run) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        (x,) = self._values(run.student, self.student_pairs)
        if self.size == "images":
            images = run.batch.get("images")
            if not isinstance(images, Tensor):
                raise TaskkdError(f"term {self.name!r}: the batch has no tensor `images`; size='logits' needs none.")
            x = resized(x, images.shape[2:])
        maps = probabilities(x)
        return (maps,), (maps.detach(),), ()

    def _masks(self, run: Run) -> tuple[Tensor, Tensor]:
        unlabelled = _unlabelled(run.batch, self.name)
        return unlabelled, ~unlabelled

    def _discriminator_loss(self, seen: Any) -> Tensor:
        scores, _ = self._judge(seen.student, ())  # both sides are the same maps: once is enough
        own, other = seen.masks
        value = discriminator_loss(scores, scores, game=self.game, mask=own, teacher_mask=other)
        return self.discriminator_weight * value


def _adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-4, betas=(0.9, 0.99))


def domain_adaptive(
    student: nn.Module,
    teacher: nn.Module,
    *,
    pseudo_label_weight: Annotated[float, Ge(0)] = 1.0,
    kl_weight: Annotated[float, Ge(0)] = 0.1,
    mse_weight: Annotated[float, Ge(0)] = 0.01,
    aux_weight: Annotated[float, Ge(0)] = 0.1,
    adversarial_weight: Annotated[float, Ge(0)] = 1e-3,
    adversarial_aux_weight: Annotated[float, Ge(0)] = 2e-4,
    target_distill: Annotated[float, Ge(0)] = 1.0,
    threshold: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    size: Literal["images", "logits"] = "images",
    ignore: Ignore = "padding",
    width: Annotated[int, Gt(0)] = 64,
    learning_rate: Annotated[float, Gt(0)] = 1e-4,
    small: Small = "resize",
    task_weight: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """Labels of the source domain, the teacher's answers on both, and judges that make the student's maps alike there.

    Source: Kothandaraman, Nambiar, Mittal 2021, "Domain Adaptive Knowledge Distillation for Driving Scene Semantic
    Segmentation". The teacher should have been adapted to the target domain itself. A batch holds samples of both
    domains, `unlabelled` (batch,) says which are of the target; their labels are all 255. On each domain::

        pseudo_label_weight CE(s, argmax t) + kl_weight (KL + aux_weight KL of the auxiliary head)
        + mse_weight MSE(log softmax) of the auxiliary head

    that of the target times `target_distill`, and on the target `adversarial_weight` and `adversarial_aux_weight` times
    the judges' cross-entropies.

    Departures. As released, the KL has the teacher's log-probabilities where its probabilities belong: it was exactly
    0 without gradient in the PyTorch of 2020 and is NaN today, so their numbers are without it. Here it is the KL that
    was meant, of the teacher's distribution to the student's; `kl_weight=0` is what they ran. Their teacher stays in
    train mode, its batch norm drifting; ours is frozen. Losses are at the native logits, which they enlarge eightfold
    first; judges at the images' size, as theirs.

    Scaling: their KL is a mean over classes too; ours is divided by the number of classes, so the weight is theirs.

    Args:
        student, teacher: segmentation networks with `views` and the same classes. Terms of an auxiliary head are left
            out where `views.aux` is None, of either network for the distillation, of the student for its judge.
        pseudo_label_weight, kl_weight, mse_weight: see above; 0: left out.
        aux_weight: of the auxiliary head's KL beside the main one's.
        adversarial_weight, adversarial_aux_weight: of the judges of main and auxiliary maps.
        target_distill: factor of distillation on the target domain; 0: on the source alone.
        threshold: of the teacher's probability for a pseudo-label to count, below 1; theirs 0.
        size: see `DomainAdversarial`.
        ignore: see `MapTerm`.
        width: of the judges' first convolution.
        learning_rate: of the judges, Adam, falling with power 0.9 (so a loop by hand calls `distiller.set_total`). The
            factor of their losses is 1/2, as theirs.
        small: what is done to maps of less than 32 pixels before a judge.
        task_weight: of the labels; the auxiliary head's own share (theirs 0.1) is the task's.

    Raises:
        RecipeError: the networks have different classes.
    """
    classes = [len(m.classes) for m in (student, teacher)]  # type: ignore[arg-type]
    if classes[0] != classes[1]:
        raise RecipeError(f"domain_adaptive: the student has {classes[0]} classes, the teacher {classes[1]}.")
    own: Any = student.views
    other: Any = teacher.views
    main, aux = (own.logits, other.logits), (own.aux, other.aux)
    kl: Callable[..., Tensor] = partial(losses.kl_divergence, dim=1)
    pseudo: Callable[..., Tensor] = partial(losses.pseudo_label_cross_entropy, dim=1, threshold=threshold)
    wanted = [
        ("pseudo-labels", pseudo, main, pseudo_label_weight),
        ("kl", kl, main, kl_weight / classes[0]),
        ("kl-aux", kl, aux, kl_weight * aux_weight / classes[0]),
        ("log-probabilities-aux", log_probability_mse, aux, mse_weight),
    ]
    options: dict[str, Any] = {"target": target_distill, "ignore": ignore}
    terms: list[Term] = [
        DomainTerm(name, loss, taps[0], taps[1], weight=weight, **options)
        for name, loss, taps, weight in wanted
        if weight > 0 and None not in taps
    ]

    def judge(maps: Tensor) -> nn.Module:
        return PatchDiscriminator(maps.shape[1], width=width, small=small)

    levels = (("adversarial", main[0], adversarial_weight), ("adversarial-aux", aux[0], adversarial_aux_weight))
    terms += [
        DomainAdversarial(
            name,
            tap,
            size=size,
            discriminator=judge,
            discriminator_weight=0.5,
            optimizer=_adam,
            learning_rate=polynomial(learning_rate),
            weight=weight,
        )
        for name, tap, weight in levels
        if weight > 0 and tap is not None
    ]
    return Method("domain_adaptive", [Stage("distil", terms, task_weight)], ("labels", "unlabelled"))
