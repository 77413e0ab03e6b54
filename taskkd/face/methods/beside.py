"""What methods on embeddings share: their taps, adapters where sizes differ, the teacher's centres."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from taskkd.errors import RecipeError

__all__ = ["EMBEDDINGS", "LABELS", "adapter_of", "centres_of", "identities_of"]

#: taps: the raw embedding of every face model, (batch, features); the identities of a batch, -1 where there is none
EMBEDDINGS, LABELS = "out.embeddings", "batch.labels"


def adapter_of(student: nn.Module, teacher: nn.Module) -> Literal["linear"] | None:
    """A linear map where the embeddings differ in size, else none."""
    return None if student.embedding_size == teacher.embedding_size else "linear"


def identities_of(student: nn.Module, method: str) -> int:
    """How many identities the training data has.

    Raises:
        RecipeError: the student does not say.
    """
    count = student.identities
    if not isinstance(count, int) or count < 1:
        raise RecipeError(
            f"`{method}` has a centre for each identity of the training data: set `student.identities` to their number "
            f"(a recipe does it), got {count!r}."
        )
    return count


def centres_of(student: nn.Module, teacher: nn.Module, method: str) -> Tensor:
    """The teacher's centres, (identities, features): its classifier's weights or its class means.

    Where it has none yet, zeros, until they are worked out from the data.

    Raises:
        RecipeError: they are of other identities than the student's, or of another size than the teacher's embeddings.
    """
    centres, features = teacher.centres, int(teacher.embedding_size)  # type: ignore[arg-type]
    if not isinstance(centres, Tensor):
        return torch.zeros(identities_of(student, method), features)
    wanted = (student.identities if isinstance(student.identities, int) else len(centres), features)
    if tuple(centres.shape) != wanted:
        raise RecipeError(
            f"`{method}`: `teacher.centres` is {tuple(centres.shape)}, expected {wanted}: an identity of the training "
            "data, in the order of the labels, times the size of the teacher's embedding. With `teacher.centres = "
            "None` they are the class means of the data."
        )
    return centres.detach().to(torch.promote_types(centres.dtype, torch.float32))
