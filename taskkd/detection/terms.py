"""Terms of detectors: what they read of both sides, and maps that are paired level by level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskkd.adapters import AdapterSpec, build_adapter
from taskkd.detection.families import Family, family_of
from taskkd.detection.shared import SharedImages
from taskkd.detection.views import Views, shapes
from taskkd.errors import ShapeError, TaskkdError
from taskkd.terms import Run, Term, Weight

__all__ = ["DetectionTerm", "NeckTerm", "views_of"]

#: in `Run.notes`: the images as the teacher saw them, larger or smaller where its `size` is not 1
TEACHER_IMAGES = "detection.teacher_images"
#: views that not all families have, in errors
MEANT = {
    "dense": "predictions at every anchor or point",
    "rpn": "a first stage",
    "rois": "a second stage",
    "proposals": "a first stage's proposals",
    "decoder": "a decoder of queries",
    "sources": "maps that a decoder of queries looks at",
    "queries": "queries that another decoder can run on",
}


def views_of(run: Run, family: Family, images: SharedImages | None = None) -> Views:
    """The views of one side of a run, shared by all that look at it.

    Args:
        run: of the batch.
        family: of the student or, with `images`, of the teacher.
        images: the student's; the teacher's view has them as the teacher saw them.
    """
    side = "student" if images is None else "teacher"
    key = f"detection.{side}"
    if key not in run.notes:
        if images is None:
            shared = SharedImages.of(run.student[family.images])
        else:
            shared = run.notes.get(TEACHER_IMAGES, images)
        run.notes[key] = Views(family, getattr(run, side), shared)
    views: Views = run.notes[key]
    return views


class DetectionTerm(Term):
    """Base of terms that read what detectors compute.

    Args:
        name, weight: see `Term`.
        student, teacher: the models; only what is known of their families is kept.
        student_views, teacher_views: what the term reads of each side ("neck", "dense", "rois", "rpn", "proposals",
            "regions", "decoder").

    Raises:
        TaskkdError: a model is of no known family, or its family has no such view.
    """

    needs_student_run = True

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        student_views: Sequence[str] = ("neck",),
        teacher_views: Sequence[str] = ("neck",),
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, weight)
        self.view_names = tuple(student_views), tuple(teacher_views)
        self.student_family, self.teacher_family = family_of(student, "student"), family_of(teacher, "teacher")
        self.student_taps = (
            self.student_family.images,
            *_taps(self.student_family, student_views, f"term {name!r}: the student, a"),
        )
        self.teacher_taps = _taps(self.teacher_family, teacher_views, f"term {name!r}: the teacher, a")

    def student_views(self, run: Run) -> Views:
        """What the student computed, and the images."""
        return views_of(run, self.student_family)

    def teacher_views(self, run: Run) -> Views:
        """What the teacher computed; its `images` and boxes are in the pixels that it saw."""
        return views_of(run, self.teacher_family, self.student_views(run).images)

    def shown(self, run: Run) -> tuple[dict[str, str], dict[str, str]]:
        """The views with their shapes."""
        own, other = (
            {name: shapes(views.get(name)) for name in names}
            for names, views in zip(self.view_names, (self.student_views(run), self.teacher_views(run)), strict=True)
        )
        return own, other


def _taps(family: Family, views: Sequence[str], who: str) -> tuple[str, ...]:
    for view in views:
        if view not in family.views:
            meant = f" ({MEANT[view]})" if view in MEANT else ""
            raise TaskkdError(f"{who} {family.name}, has no {view!r}{meant}; it has {', '.join(family.views)}.")
    return tuple(dict.fromkeys(tap for view in views for tap in family.taps(view)))


class NeckTerm(Term):
    """Base of terms over feature maps, which are paired level by level and brought to one size and width.

    Levels are paired by their strides, finest first; those without a partner within a factor of 1.5 are left out, and
    of several of one stride on one side alone the later ones have the partners. Maps of a teacher that saw larger
    images (`size` of `DetectorTeacher`) are resized to the student's.

    Args:
        name, weight: see `Term`.
        student, teacher: the models.
        neck, teacher_neck: taps of maps (N, C, h, w) for modules of no known family, paired in order; default: the
            families' own.
        adapter: of each level: a kind or a function as in `kd.Match`; "auto": a 1x1 convolution where the numbers of
            channels differ, else none; None: none. Where sizes differ the student's map is resized (bilinear).
        student_views, teacher_views: what is read beside the maps, as in `DetectionTerm`.
        count: at most so many of the pairs that are found, finest first; None: all.

    Raises:
        TaskkdError: a model is of no known family and no taps are named, or a family has no such view.
    """

    needs_student_run = True
    #: images and boxes are looked at; of modules of no known family the batch must have `images` and `targets` then
    needs_images = True

    def __init__(
        self,
        name: str,
        student: nn.Module,
        teacher: nn.Module,
        *,
        neck: Sequence[str] | None = None,
        teacher_neck: Sequence[str] | None = None,
        adapter: AdapterSpec | None = "auto",
        student_views: Sequence[str] = (),
        teacher_views: Sequence[str] = (),
        count: int | None = None,
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(name, weight)
        self.count = count
        self.neck_taps = None if neck is None else tuple(neck)
        self.teacher_neck_taps = self.neck_taps if teacher_neck is None else tuple(teacher_neck)
        if neck is not None and len(self.neck_taps or ()) != len(self.teacher_neck_taps or ()):
            raise TaskkdError(
                f"term {name!r}: {len(self.neck_taps or ())} maps of the student and "
                f"{len(self.teacher_neck_taps or ())} of the teacher; named taps are paired in order."
            )
        self.student_family = _family(student, "student", named=neck is not None and not student_views)
        self.teacher_family = _family(
            teacher, "teacher", named=self.teacher_neck_taps is not None and not teacher_views
        )
        own = self.neck_taps or self._family_taps(self.student_family, ("neck",), "student")
        other = self.teacher_neck_taps or self._family_taps(self.teacher_family, ("neck",), "teacher")
        images: tuple[str, ...] = ("batch.images", "batch.targets") if self.needs_images else ()
        if self.student_family is not None:
            images = (self.student_family.images,)
        self.student_taps = tuple(
            dict.fromkeys([*images, *own, *self._family_taps(self.student_family, student_views, "student")])
        )
        self.teacher_taps = tuple(
            dict.fromkeys([*other, *self._family_taps(self.teacher_family, teacher_views, "teacher")])
        )
        self.adapter_spec, self.adapters = adapter, nn.ModuleList()
        #: of each pair the positions of its levels on both sides; known after `prepare`
        self.levels: list[tuple[int, int]] = []

    def _family_taps(self, family: Family | None, views: Sequence[str], who: str) -> tuple[str, ...]:
        return () if family is None else _taps(family, views, f"term {self.name!r}: the {who}, a")

    # ---- what was computed

    def images(self, run: Run) -> SharedImages:
        """The images that both sides saw, with their boxes."""
        if self.student_family is not None:
            return views_of(run, self.student_family).images
        return batch_images(run)

    def student_views(self, run: Run) -> Views:
        """What the student computed, of a known family."""
        assert self.student_family is not None
        return views_of(run, self.student_family)

    def teacher_views(self, run: Run) -> Views:
        """What the teacher computed, of a known family."""
        assert self.teacher_family is not None
        return views_of(run, self.teacher_family, self.images(run))

    def maps(self, run: Run) -> tuple[list[Tensor], list[Tensor]]:
        """All maps of student and teacher, as they are."""
        return (
            [run.student[t] for t in self.neck_taps] if self.neck_taps else self.student_views(run).neck,
            [run.teacher[t] for t in self.teacher_neck_taps]
            if self.teacher_neck_taps
            else self.teacher_views(run).neck,
        )

    # ---- pairs

    def build(self, run: Run) -> None:
        """Pair the levels and make the adapters."""
        students, teachers = self.maps(run)
        if not self.levels and self.neck_taps is not None:
            self.levels = [(i, i) for i in range(len(students))]
        elif not self.levels:
            own = self.images(run)
            seen: SharedImages = run.notes.get(TEACHER_IMAGES, own)
            height, other = own.tensors.shape[2], seen.tensors.shape[2]
            self.levels = self._paired([height / m.shape[2] for m in students], [other / m.shape[2] for m in teachers])
        if self.adapter_spec is None or len(self.adapters):
            return
        students, teachers = self._picked(run)
        for position, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
            try:
                self.adapters.append(_adapter(self.adapter_spec, student, teacher))
            except ShapeError as error:
                raise ShapeError(f"term {self.name!r}, level {position}: {error}") from None

    def _paired(self, own: Sequence[float], other: Sequence[float]) -> list[tuple[int, int]]:
        apart = [(abs(math.log2(s / t)), -i, -j) for i, s in enumerate(own) for j, t in enumerate(other)]
        pairs: dict[int, int] = {}  # student's level -> teacher's; the nearest first, of equal ones the later
        for distance, i, j in sorted(apart):
            if distance <= math.log2(1.5) and -i not in pairs and -j not in pairs.values():
                pairs[-i] = -j
        if not pairs:
            shown = " and ".join(", ".join(f"{s:g}" for s in side) for side in (own, other))
            raise ShapeError(
                f"term {self.name!r}: no level of the student has a stride of the teacher's; the strides are {shown}. "
                "Name the maps that belong together with `neck` and `teacher_neck`."
            )
        return sorted(pairs.items())[: self.count]

    def _picked(self, run: Run) -> tuple[list[Tensor], list[Tensor]]:
        students, teachers = self.maps(run)
        own, other = [students[i] for i, _ in self.levels], [teachers[j] for _, j in self.levels]
        if TEACHER_IMAGES in run.notes:
            other = [resized(t, s) for s, t in zip(own, other, strict=True)]
        return own, other

    @property
    def built(self) -> bool:
        return bool(self.levels) and (self.adapter_spec is None or len(self.adapters) > 0)

    def pairs(self, run: Run) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of student (adapted) and teacher, level by level, of one shape each."""
        students, teachers = self._picked(run)
        if len(self.adapters):
            adapted = []
            for adapter, s, t in zip(self.adapters, students, teachers, strict=True):
                adapted.append(adapter(s, t) if getattr(adapter, "takes_target", False) else adapter(s))
            students = adapted
        return [resized(s, t) for s, t in zip(students, teachers, strict=True)], teachers

    def shown(self, run: Run) -> tuple[dict[str, str], dict[str, str]]:
        """The levels that are paired, as they are before adapters."""
        sides = zip(
            self.maps(run), (self.neck_taps, self.teacher_neck_taps), zip(*self.levels, strict=True), strict=True
        )
        own, other = (
            {taps[i] if taps else f"neck[{i}]": shapes(maps[i]) for i in levels} for maps, taps, levels in sides
        )
        return own, other

    def forward(self, run: Run) -> Tensor:
        students, teachers = self.pairs(run)
        for position, (s, t) in enumerate(zip(students, teachers, strict=True)):
            if s.shape != t.shape:
                raise ShapeError(
                    f"term {self.name!r}, level {position}: student {tuple(s.shape)} and teacher {tuple(t.shape)}; "
                    "adapter='conv1x1' maps one to the other."
                )
        return self.compare(students, teachers, run)

    def compare(self, students: list[Tensor], teachers: list[Tensor], run: Run) -> Tensor:
        """The loss of the paired maps, which are of one shape at each level."""
        raise NotImplementedError


def _family(model: nn.Module, who: str, *, named: bool) -> Family | None:
    try:
        return family_of(model, who)
    except TaskkdError:
        if not named:
            raise
        return None


def batch_images(run: Run) -> SharedImages:
    """The images of a batch that a module of no known family gets: `images` (N, 3, H, W) or a list of one size."""
    images, targets = run.student["batch.images"], run.student["batch.targets"]
    tensors = images if isinstance(images, Tensor) else torch.stack(list(images))
    sizes = [(int(tensors.shape[2]), int(tensors.shape[3]))] * len(tensors)
    return SharedImages(tensors, sizes, [t["boxes"] for t in targets], [t["labels"] for t in targets])


def resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the height and width of `like`, bilinear."""
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, size=[like.shape[2], like.shape[3]], mode="bilinear", align_corners=False)


def _adapter(spec: Any, student: Tensor, teacher: Tensor) -> nn.Module:
    if spec == "auto":
        spec = nn.Identity() if student.shape[1] == teacher.shape[1] else "conv1x1"
    adapter = build_adapter(spec, student, teacher).to(student.device)
    return adapter.double() if student.dtype == torch.float64 else adapter
