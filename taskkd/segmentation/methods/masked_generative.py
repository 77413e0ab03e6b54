"""MGD on segmentation networks: masked generative distillation (Yang Z. et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from taskkd import losses
from taskkd.losses.generation import conv_generator, kept_cells, masked_generative_loss
from taskkd.segmentation.methods.beside import check_classes, feature_of, last_stage
from taskkd.segmentation.parts import PartsTerm, as_weights, placed
from taskkd.segmentation.terms import Ignore, MapTerm, valid_at
from taskkd.stages import Method, Stage
from taskkd.terms import Run, Term

__all__ = ["MaskedGeneration", "masked_generative"]


class MaskedGeneration(PartsTerm):
    """`masked_generative_loss` of a map, with a generator, and a 1x1 convolution where the channels differ.

    Args:
        name, student, teacher: see `PartsTerm`.
        masked: the share of cells that are masked.
        ignore: pixels that do not count, see `valid_at`.
        weights, **options: of `PartsTerm`; the only part here is "generation".
    """

    def __init__(
        self,
        name: str,
        student: str,
        teacher: str,
        *,
        masked: float = 0.75,
        ignore: Ignore = "padding",
        weights: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name, student, teacher, weights=weights or {"generation": 1.0}, **options)
        self.masked, self.ignore = masked, ignore
        self.layers = nn.ModuleDict()

    @property
    def built(self) -> bool:
        return "generator" in self.layers

    def build(self, run: Run) -> None:
        """Make what is trained."""
        if self.built:
            return
        s, t = self.maps(run)
        if s.shape[1] != t.shape[1]:
            self.layers["align"] = placed(nn.Conv2d(s.shape[1], t.shape[1], 1), s)
        self.layers["generator"] = placed(conv_generator(t.shape[1]), s)

    def keep(self, like: Tensor) -> Tensor:
        """(N, 1, h, w), 0 where the student's map is masked."""
        return kept_cells(like, self.masked)

    def aligned(self, run: Run) -> tuple[Tensor, Tensor, Tensor | None]:
        """Both maps with the teacher's channels, and the pixels that count."""
        s, t = self.maps(run)
        if "align" in self.layers:
            s = self.layers["align"](as_weights(s, self.layers["align"]))
        return as_weights(s, self.layers["generator"]), t, valid_at(run.batch, t.shape[2:], self.ignore)

    def parts(self, run: Run) -> Mapping[str, Tensor]:
        """The loss."""
        s, t, valid = self.aligned(run)
        generator, kept = self.layers["generator"], self.keep(s)
        return {"generation": masked_generative_loss(s, t, generator=generator, kept=kept, mask=valid)}


def masked_generative(
    student: nn.Module,
    teacher: nn.Module,
    *,
    on: Literal["backbone", "feature"] = "backbone",
    weight: Annotated[float, Ge(0)] = 2e-5,
    masked: Annotated[float, Interval(ge=0, lt=1)] = 0.75,
    channels: Annotated[float, Ge(0)] = 3.0,
    temperature: Annotated[float, Gt(0)] = 4.0,
    ignore: Ignore = "padding",
) -> Method:
    """The student's masked map must generate the teacher's whole one; channel-wise distillation of the logits.

    Source: Yang Z., Li, Shao, Shi, Yuan, Yuan 2022, "Masked Generative Distillation", their segmentation code. The sum
    over channels and cells is theirs, and so is the weight, for maps of 2048 channels and crops of 512 x 512. The masks
    are random, from torch's global generator: the loss of a student that equals its teacher is not 0.

    Args:
        student, teacher: models with `views.stages` or `views.feature`, and `views.logits`.
        on: the "backbone"'s last map (theirs), or the "feature" before the classifier.
        weight: their alpha.
        masked: the share of cells that are masked.
        channels, temperature: of `losses.channel_wise` on logits; 0: without it, for other classes.
        ignore: pixels that do not count; the authors count all ("none").
    """
    tap = last_stage if on == "backbone" else feature_of
    taps = tap(student, "student"), tap(teacher, "teacher")
    terms: list[Term] = []
    if weight > 0:
        terms.append(MaskedGeneration("generation", *taps, masked=masked, ignore=ignore, weight=weight))
    if channels > 0:
        check_classes(student, teacher, "channels=0 leaves this out.")
        logits = (str(m.views.logits) for m in (student, teacher))  # type: ignore[union-attr]
        terms.append(
            MapTerm("channels", losses.channel_wise, *logits, weight=channels, temperature=temperature, ignore=ignore)
        )
    return Method("masked_generative", [Stage("distil", terms)], ("labels",))
