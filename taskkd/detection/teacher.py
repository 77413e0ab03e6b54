"""The teacher of a pair of detectors: run in parts, on the images and regions of the student."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from taskkd.detection.families import family_of
from taskkd.detection.shared import renormalised
from taskkd.detection.terms import TEACHER_IMAGES, views_of
from taskkd.errors import TaskkdError
from taskkd.suppliers import Supplier
from taskkd.taps import parse_tap
from taskkd.teachers import Dtype, Frozen, Teacher

__all__ = ["DetectorTeacher"]


class DetectorTeacher(Supplier):
    """A frozen detector that sees what the student sees: the images as the student's `transform` made them.

    Only what the terms read is run: the backbone, then those of its heads that are tapped, never its own resizing,
    sampling or non-maximum suppression. A second stage looks at the student's regions. Images are normalised anew
    where the two differ in that.

    Args:
        model: the teacher; `eval()`, without gradients, untouched, as by `kd.Frozen`.
        student: the detector that is trained; nothing of it is kept but its family.
        size: how much larger the teacher's images are, in height and width.
        dtype: see `kd.Frozen`.

    Raises:
        TaskkdError: a model is of no known family, or `size` is not positive.

    Example:
        >>> import taskkd as kd
        >>> from taskkd.detection import DetectorTeacher, pearson_kd
        >>> teacher = DetectorTeacher(model, student)  # doctest: +SKIP
        >>> distiller = kd.Distiller(student, teacher, pearson_kd(student, model).stages[0].terms)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, student: nn.Module, *, size: float = 1.0, dtype: Dtype | None = None) -> None:
        if not size > 0:
            raise TaskkdError(f"a teacher's `size` must be positive, got {size}.")
        self.family, self.student_family = family_of(model, "teacher"), family_of(student, "student")
        self.size = float(size)
        self.frozen = Frozen(model, call=self._run, dtype=dtype)
        self.parts_run: frozenset[str] = frozenset()

    @property
    def model(self) -> nn.Module:
        """The teacher itself."""
        return self.frozen.model

    def parts(self) -> list[Teacher]:
        """The frozen model."""
        return [self.frozen]

    def attach(self, taps: Iterable[str]) -> None:
        """Set the hooks of these taps, and ask for what the teacher reads of the student.

        Raises:
            TapError: a name is not in the model.
            TaskkdError: the student has no regions for the teacher's second stage.
        """
        taps = list(taps)
        self.frozen.attach(taps)
        self.parts_run = frozenset(parse_tap(tap).path for tap in taps)
        own = [self.student_family.images]
        if self._second_stage:
            own += self.student_family.taps("regions")
        self.student_taps = tuple(dict.fromkeys(own))

    @property
    def _second_stage(self) -> bool:
        return any(part.startswith("roi_heads") for part in self.parts_run)

    def _run(self, model: nn.Module, batch: Mapping[str, Any], run: Any) -> None:
        from torchvision.models.detection.image_list import ImageList

        views = views_of(run, self.student_family)
        shared = views.images.scaled(self.size)
        regions = None
        if self._second_stage:
            factor = [a / b for a, b in zip(shared.tensors.shape[2:], views.images.tensors.shape[2:], strict=True)]
            by = shared.tensors.new_tensor([factor[1], factor[0], factor[1], factor[0]])
            regions = [r.detach() if self.size == 1 else r.detach() * by for r in views.regions]
        tensors = renormalised(shared, self.student_family.normalisation, self.family.normalisation)
        if shared is not views.images:
            run.notes[TEACHER_IMAGES] = shared
        self.family.run(model, ImageList(tensors, shared.sizes), self.parts_run, regions)

    def __call__(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """The value of every tap for the student's run of this batch."""
        return self.frozen(batch, run)

    def prepare(self, batch: Mapping[str, Any], run: Any = None) -> dict[str, Any]:
        """One run to the end, which counts how far later ones must go."""
        return self.frozen.prepare(batch, run)

    def columns(self) -> set[str]:
        """The names of the batch entries that it reads."""
        return {"images", "targets"}

    def close(self) -> None:
        """Remove the hooks."""
        self.frozen.close()
