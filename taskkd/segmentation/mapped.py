"""A teacher of other classes: the probabilities of its classes summed into those of the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from taskkd.errors import RecipeError, nearest
from taskkd.segmentation.segmenter import Segmenter

__all__ = ["mapped"]


class _Merged(nn.Module):
    """The logits of a network, merged: class k's is the log of the summed exponentials of the classes that it is."""

    order: Tensor

    def __init__(self, network: Segmenter, places: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.network, self.sizes = network, [len(own) for own in places]
        self.register_buffer("order", torch.tensor([place for own in places for place in own]), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)["logits"].index_select(1, self.order)
        full = logits if logits.dtype == torch.float64 else logits.float()
        return torch.stack([group.logsumexp(1) for group in torch.split(full, self.sizes, 1)], 1)


def mapped(teacher: Segmenter, label_map: Mapping[str, str], classes: Sequence[str]) -> Segmenter:
    """A teacher whose classes are others than the student's, as one of the student's classes.

    A class that several of the teacher's are mapped to has the sum of their probabilities. The teacher's classes that
    are not mapped are left out, and what is left is normalised. Its logits are those of its output, at their size; its
    features are those of the teacher.

    Args:
        teacher: with named classes.
        label_map: the teacher's class -> the student's.
        classes: the student's, in the order of their labels.

    Raises:
        RecipeError: a name is not among the classes of its side, or a class of the student has none of the teacher.
    """
    for name, to in label_map.items():
        for which, known, who in ((name, teacher.classes, "teacher"), (to, classes, "student")):
            if which not in known:
                raise RecipeError(
                    f"label_map: the {who} has no class {which!r}{nearest(which, known)}; it has "
                    f"{', '.join(map(str, known[:20]))}."
                )
    if missing := [c for c in classes if c not in label_map.values()]:
        raise RecipeError(f"label_map: no class of the teacher is mapped to the student's {missing[0]!r}.")
    places = [[k for k, name in enumerate(teacher.classes) if label_map.get(name) == own] for own in classes]
    views = teacher.views  # not looked for again: an inner layer may have as many channels as there are classes now
    found = Segmenter(
        _Merged(teacher, places), list(classes), mean=(0, 0, 0), std=(1, 1, 1), logits="out.logits",
        feature=None if views.feature is None else f"network.{views.feature}",
        stages=[f"network.{stage}" for stage in views.stages],
    )  # fmt: skip
    return found.train(teacher.training)
