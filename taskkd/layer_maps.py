"""Layer maps: which student layer learns from which teacher layer, as pairs of 0-based indices.

All of them count the top layers; a method that leaves those to the logits drops the last pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from taskkd.errors import TapError, TaskkdError
from taskkd.terms import Match

__all__ = ["all_pairs", "first", "last", "matches", "review", "skip", "uniform"]

Pairs = list[tuple[int, int]]


def uniform(student_layers: int, teacher_layers: int) -> Pairs:
    """Evenly over the teacher, its last layer for the student's last: student layer `i` with `(i + 1) * T // S - 1`.

    Source: Jiao et al. 2020 (TinyBERT), `g(m) = 3m` for 4 of 12. For other ratios rounded down.

    Raises:
        TaskkdError: a number of layers is below 1, or the student is deeper than the teacher.

    Example:
        >>> uniform(4, 12)
        [(0, 2), (1, 5), (2, 8), (3, 11)]
    """
    _check("uniform", student_layers, teacher_layers)
    return [(i, (i + 1) * teacher_layers // student_layers - 1) for i in range(student_layers)]


def skip(student_layers: int, teacher_layers: int) -> Pairs:
    """Every k-th teacher layer, `k = T / S` an integer: 1, 3, 5, 7, 9, 11 for 6 of 12.

    Source: Sun et al. 2019 (Patient KD), who leave the last pair to the logits.

    Raises:
        TaskkdError: as `uniform`, or the teacher's layers are no multiple of the student's.
    """
    _check("skip", student_layers, teacher_layers)
    if teacher_layers % student_layers:
        raise TaskkdError(
            f"{teacher_layers} teacher layers are no multiple of {student_layers} student layers, layer map 'skip' "
            "takes every k-th; 'uniform' and 'last' take any numbers."
        )
    return uniform(student_layers, teacher_layers)


def first(student_layers: int, teacher_layers: int) -> Pairs:
    """The teacher's first layers, in order: 0 .. 5 for 6 of 12.

    Source: Jiao et al. 2020 (TinyBERT), the "bottom" strategy of their ablation.

    Raises:
        TaskkdError: as `uniform`.
    """
    _check("first", student_layers, teacher_layers)
    return [(i, i) for i in range(student_layers)]


def last(student_layers: int, teacher_layers: int) -> Pairs:
    """The teacher's last layers, in order: 6 .. 11 for 6 of 12.

    Source: Sun et al. 2019 (Patient KD), who leave the last pair to the logits.

    Raises:
        TaskkdError: as `uniform`.
    """
    _check("last", student_layers, teacher_layers)
    return [(i, teacher_layers - student_layers + i) for i in range(student_layers)]


def all_pairs(student_layers: int, teacher_layers: int) -> Pairs:
    """Every student layer with every teacher layer (Jang et al. 2019 and others weigh them afterwards).

    Raises:
        TaskkdError: a number of layers is below 1.
    """
    _check("all_pairs", student_layers, teacher_layers, deeper=True)
    return [(i, j) for i in range(student_layers) for j in range(teacher_layers)]


def review(student_layers: int, teacher_layers: int) -> Pairs:
    """Student level `i` with the teacher's levels up to `i`.

    Source: Chen P., Liu, Zhao, Jia 2021 (knowledge review). Their residual framework fuses these pairs into one for
    each level: `adapter="abf"`.

    Raises:
        TaskkdError: as `uniform`.
    """
    _check("review", student_layers, teacher_layers)
    return [(i, j) for i in range(student_layers) for j in range(i + 1)]


def _check(name: str, student: int, teacher: int, deeper: bool = False) -> None:
    if student < 1 or teacher < 1:
        raise TaskkdError(
            f"layer map {name!r} needs at least one layer of each, got {student} of the student and {teacher} of the "
            "teacher."
        )
    if student > teacher and not deeper:
        raise TaskkdError(
            f"layer map {name!r}: the student has {student} layers, the teacher only {teacher}; expected no more "
            "than the teacher's."
        )


def matches(
    name: str,
    loss: Callable[..., Tensor],
    student: str,
    teacher: str | None = None,
    *,
    pairs: Sequence[tuple[int, int]],
    **match_options: Any,
) -> list[Match]:
    """One `Match` for each pair of layers, named `<name>-<student layer>-<teacher layer>`.

    Args:
        name: the names' beginning.
        loss: see `Match`.
        student: the pattern of the student's taps, `{}` in place of the layer's number: `"encoder.layer.{}"`.
        teacher: the teacher's pattern; the same as the student's if left out.
        pairs: what a map of this module gives, or any pairs of indices.
        **match_options: further arguments of every `Match`. An adapter is a kind or a function, which makes one for
            each pair.

    Raises:
        TapError: a pattern has no `{}`.
        TaskkdError: there are no pairs, or an adapter is a module, which all terms would share.

    Example:
        >>> from taskkd import losses
        >>> terms = matches("hidden", losses.mse, "layer.{}", pairs=last(2, 4), weight=0.5)
        >>> [(t.name, t.student_taps, t.teacher_taps) for t in terms]
        [('hidden-0-2', ('layer.0',), ('layer.2',)), ('hidden-1-3', ('layer.1',), ('layer.3',))]
    """
    teacher = student if teacher is None else teacher
    for pattern in (student, teacher):
        if "{}" not in pattern:
            raise TapError(f"terms {name!r}: {pattern!r} is one tap; expected '{{}}' in place of the layer's number.")
    if not pairs:
        raise TaskkdError(f"terms {name!r}: there are no pairs of layers.")
    for side in ("adapter", "teacher_adapter"):
        if isinstance(match_options.get(side), nn.Module) and len(pairs) > 1:
            raise TaskkdError(f"terms {name!r}: one {side} module for several terms; name a kind or give a function.")
    return [
        Match(f"{name}-{i}-{j}", loss, student.replace("{}", str(i)), teacher.replace("{}", str(j)), **match_options)
        for i, j in pairs
    ]
