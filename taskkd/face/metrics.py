"""Verification of pairs of faces, from embeddings that come in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskkd.errors import DataError, NonFiniteError, TaskkdError
from taskkd.face.pairs import Pairs
from taskkd.face.verification import auc, squared_distances, tar_at_far, unit, verify

__all__ = ["VerificationMetric"]


class VerificationMetric:
    """Accuracy by folds, TAR@FAR and the area under the ROC curve of a verification set; a `Metric` of the trainer.

    The embeddings of both views of an image are added and the sum is normalised, as the papers do. What is kept is an
    embedding for each view, by id; shards in any order give exactly what the whole gives, and a view that comes twice
    (as where ranks share the data) counts once.

    Args:
        pairs: the verification set; batches come from `pairs.table`.
        folds: see `verify`.
        far: false accept rates at which `tar@...` are given (strictly: the rate is not exceeded). Where fewer
            than ten false accepts are expected, see `few_negatives`, the figure rests on chance.
        flip: False: the view that is not flipped alone.
        gallery: (M, D) embeddings by image number, of another model: asymmetric search, where the left image of a pair
            is embedded by the model that is measured (the query) and the right one by that of the gallery (say, a
            student and its teacher). They are normalised here.

    Raises:
        TaskkdError: the gallery has not an embedding for each image.
        DataError: fewer pairs than folds, or pairs of one kind alone.
    """

    #: what is read of a batch
    columns = ("id",)

    def __init__(
        self,
        pairs: Pairs,
        *,
        folds: int = 10,
        far: Sequence[float] = (1e-1, 1e-2, 1e-3),
        flip: bool = True,
        gallery: Tensor | None = None,
    ) -> None:
        self.pairs, self.folds, self.far, self.views = pairs, folds, tuple(far), 2 if flip else 1
        if len(pairs) < folds or pairs.same.all() or not pairs.same.any():
            raise DataError(f"{pairs.summary()}: expected pairs of both kinds, and one for each of {folds} folds.")
        if gallery is not None and (gallery.ndim != 2 or len(gallery) != len(pairs.faces)):
            raise TaskkdError(
                f"the gallery is {tuple(gallery.shape)}: expected ({len(pairs.faces)}, D), an embedding for each image."
            )
        self.gallery = None if gallery is None else unit(gallery.detach().cpu().double().numpy())
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._ids: list[Tensor] = []
        self._embeddings: list[Tensor] = []

    @torch.no_grad()
    def update(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Take the embeddings of a batch.

        Args:
            output: (N, D), or a mapping or an object with `embeddings`.
            batch: with `id` (N,).

        Raises:
            DataError: the batch has no `id`, or one is of no image.
            TaskkdError: there is not an embedding for each id.
        """
        if "id" not in batch:
            raise DataError("the batch has no `id`, by which the metric knows the images of pairs.")
        found = output["embeddings"] if isinstance(output, Mapping) else getattr(output, "embeddings", output)
        ids = batch["id"].detach().cpu().long()
        if found.ndim != 2 or len(found) != len(ids):
            raise TaskkdError(f"embeddings {tuple(found.shape)} for {len(ids)} ids: expected ({len(ids)}, D).")
        last = 2 * len(self.pairs.faces) - 1
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) <= last:
            raise DataError(
                f"ids {int(ids.min())} to {int(ids.max())}: the views of the pairs' images are 0 to {last}."
            )
        self._ids.append(ids)
        self._embeddings.append(found.detach().float().cpu() if found.dtype != torch.float64 else found.detach().cpu())

    def state(self) -> tuple[Tensor, Tensor]:
        """(N,) ids and (N, D) embeddings that this process has seen."""
        if not self._ids:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)
        return torch.cat(self._ids), torch.cat(self._embeddings)

    def merge(self, states: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take the embeddings of all processes."""
        there = [(ids, embeddings) for ids, embeddings in states if len(ids)]
        self._ids, self._embeddings = [ids for ids, _ in there], [embeddings for _, embeddings in there]

    def compute(self) -> dict[str, float]:
        """`accuracy`, the mean over folds, `accuracy_std` (of the population of folds), `threshold`, the mean of the
        folds' squared distances, `auc`, `tar@1e-02` and so on, and `norm`, the mean length of the raw embeddings.

        Raises:
            DataError: a view of an image was not seen.
            NonFiniteError: an embedding is not finite.
        """  # fmt: skip
        views = self._views()
        queries = unit(views.sum(1))
        gallery = queries if self.gallery is None else self.gallery
        if gallery.shape[1] != queries.shape[1]:
            raise TaskkdError(
                f"embeddings of {queries.shape[1]} numbers cannot search a gallery of {gallery.shape[1]}: the model "
                "needs a projector."
            )
        distances = squared_distances(queries[self.pairs.left], gallery[self.pairs.right])
        found = verify(distances, self.pairs.same, self.folds)
        results = {
            "accuracy": found.accuracy,
            "accuracy_std": found.std,
            "threshold": float(found.thresholds.mean()),
            "auc": auc(-distances, self.pairs.same),
        }
        rates = tar_at_far(-distances, self.pairs.same, self.far, warn=False)
        results |= {f"tar@{far:.0e}": float(rate) for far, rate in zip(self.far, rates, strict=True)}
        return results | {"norm": float(np.linalg.norm(views, axis=-1).mean())}

    def embeddings(self) -> Tensor:
        """(M, D) float64 unit vectors by image number: what another metric takes for its `gallery`.

        Raises:
            DataError, NonFiniteError: as `compute`.
        """
        return torch.from_numpy(unit(self._views().sum(1)))

    def _views(self) -> Any:
        """(M, views, D) float64."""
        ids, embeddings = self.state()
        count = len(self.pairs.faces)
        place = torch.full((2 * count,), -1)
        place[ids.flip(0)] = torch.arange(len(ids)).flip(0)  # the first of those that came twice
        place = place.reshape(count, 2)[:, : self.views]
        if missing := int((place < 0).sum()):
            image, view = (int(v) for v in (place < 0).nonzero()[0])
            raise DataError(
                f"{missing} of the {place.numel()} views of the pairs' images have no embedding, the first: image "
                f"{image} ({self.pairs.faces.sources[image].name}){', flipped' if view else ''}; go through all of "
                "`pairs.table`."
            )
        if not embeddings.isfinite().all():
            wrong = int(ids[(~embeddings.isfinite()).any(1)][0])
            raise NonFiniteError(f"the embedding of {self.pairs.faces.sources[wrong // 2].name} is not finite.")
        return embeddings[place].double().numpy()
