"""Streaming metrics: classification from a confusion matrix, regression from the predictions, masked tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taskkd.errors import RecipeError, nearest

__all__ = [
    "Classification", "MaskedTokens", "NextTokens", "Regression", "best_constant", "chosen", "precision_recall",
    "spearman",
]  # fmt: skip

#: metrics that models cannot be selected by, as less is better
LESS_IS_BETTER = ("perplexity", "rmse")


def chosen(name: str, metric: Any) -> str:
    """The name of a metric that models may be selected by.

    Args:
        name: as a recipe has it.
        metric: whose results are to choose from.

    Raises:
        RecipeError: there is no such result, or less of it is better.
    """
    known = [n for n in metric.compute() if n not in LESS_IS_BETTER]
    if name not in known:
        why = "less of it is better" if name in LESS_IS_BETTER else f"there is none{nearest(name, known)}"
        raise RecipeError(f"data.metric: models cannot be selected by {name!r}, {why}; choose of {', '.join(known)}.")
    return name


def best_constant(name: str, metric: Classification, labels: Sequence[int]) -> float:
    """A metric of the best answer that is the same for every text.

    Args:
        name: of the result.
        metric: works it out; it is reset.
        labels: class numbers, -100 for none.
    """
    found = []
    for label in range(metric.labels):
        logits = F.one_hot(torch.full((len(labels),), label), metric.labels)
        metric.reset()
        metric.update({"logits": logits}, {"labels": torch.tensor(labels)})
        found.append(metric.compute()[name])
    return max(found)


class Classification:
    """Accuracy, F1 and Matthews correlation; samples with label -100 are left out.

    Args:
        labels: number of classes.
        names: of the classes, for `by_class`; default: their numbers.
    """

    def __init__(self, labels: int, names: Sequence[str] | None = None) -> None:
        self.labels = labels
        self.names = [str(i) for i in range(labels)] if names is None else list(names)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.matrix = torch.zeros(self.labels, self.labels, dtype=torch.int64)

    def update(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Count one batch: `output.logits` (batch, classes) against `batch["labels"]` (batch,)."""
        logits, labels = output["logits"].detach(), batch["labels"].reshape(-1)
        kept = labels >= 0
        flat = labels[kept] * self.labels + logits.argmax(-1).reshape(-1)[kept]
        self.matrix += torch.bincount(flat, minlength=self.labels**2).reshape(self.labels, self.labels).cpu()

    def state(self) -> Tensor:
        """The confusion matrix, rows: true, columns: predicted."""
        return self.matrix

    def merge(self, states: Sequence[Tensor]) -> None:
        """Take the sum of all processes' matrices."""
        self.matrix = torch.stack(list(states)).sum(0)

    def compute(self) -> dict[str, float]:
        """`accuracy`, `f1` (macro), `mcc`, and of two classes `binary_f1`, that of the second; 0 where undefined.

        All are in [0, 1] but `mcc`, which is in [-1, 1].
        """
        m = self.matrix.double()
        total, right = m.sum().item(), m.diagonal()
        true, predicted = m.sum(1), m.sum(0)
        f1 = torch.where(true + predicted > 0, 2 * right / (true + predicted).clamp(min=1), torch.zeros_like(right))
        seen = (true + predicted) > 0
        covariance = right.sum().item() * total - (true @ predicted).item()
        spread = math.sqrt((total**2 - (predicted @ predicted).item()) * (total**2 - (true @ true).item()))
        return {
            "accuracy": right.sum().item() / total if total else 0.0,
            "f1": f1[seen].mean().item() if bool(seen.any()) else 0.0,
            **({"binary_f1": f1[1].item()} if self.labels == 2 else {}),
            "mcc": covariance / spread if spread else 0.0,
        }

    def by_class(self) -> dict[str, dict[str, float]]:
        """`precision`, `recall` and `f1` of each class, and the number of its `samples`; 0 where undefined."""
        right, true, predicted = (t.tolist() for t in (self.matrix.diagonal(), self.matrix.sum(1), self.matrix.sum(0)))
        return {
            name: precision_recall(right[i], predicted[i], true[i]) | {"samples": true[i]}
            for i, name in enumerate(self.names)
        }


def precision_recall(right: int, predicted: int, true: int) -> dict[str, float]:
    """`precision`, `recall` and `f1` from counts; 0 where undefined."""
    return {
        "precision": right / max(predicted, 1),
        "recall": right / max(true, 1),
        "f1": 2 * right / max(predicted + true, 1),
    }


class Regression:
    """Pearson and Spearman correlation and root mean squared error; samples whose label is NaN are left out."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.pairs: list[Tensor] = []

    def update(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Keep one batch: `output.logits` (batch, 1) against `batch["labels"]` (batch,)."""
        pair = torch.stack([output["logits"].detach().reshape(-1).double(), batch["labels"].reshape(-1).double()])
        self.pairs.append(pair[:, ~pair[1].isnan()].cpu())

    def state(self) -> Tensor:
        """(2, samples): predictions and labels."""
        return torch.cat(self.pairs, 1) if self.pairs else torch.zeros(2, 0, dtype=torch.float64)

    def merge(self, states: Sequence[Tensor]) -> None:
        """Take all processes' pairs."""
        self.pairs = list(states)

    def compute(self) -> dict[str, float]:
        """`pearson`, `spearman` (mean ranks for ties), `rmse`; correlations are 0 where undefined."""
        predictions, labels = self.state()
        if len(labels) == 0:
            return {"pearson": 0.0, "spearman": 0.0, "rmse": 0.0}
        return {
            "pearson": _correlation(predictions, labels),
            "spearman": spearman(predictions, labels),
            "rmse": (predictions - labels).square().mean().sqrt().item(),
        }


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two rows of numbers, mean ranks for ties; 0 where undefined."""
    return _correlation(_ranks(x.double()), _ranks(y.double())) if len(x) else 0.0


class MaskedTokens:
    """Accuracy and perplexity at the masked tokens, those with a label that is not -100."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        #: sum of the cross-entropies, tokens that are right, all masked tokens
        self.sums = torch.zeros(3, dtype=torch.float64)

    def update(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Count one batch: `output.logits` (batch, tokens, vocabulary) against `batch["labels"]` (batch, tokens)."""
        known = batch["labels"] >= 0
        logits, labels = output["logits"].detach()[known].float(), batch["labels"][known]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(-1) == labels).sum()
        self.sums += torch.tensor([loss.item(), right.item(), len(labels)], dtype=torch.float64)

    def state(self) -> Tensor:
        """The three sums."""
        return self.sums

    def merge(self, states: Sequence[Tensor]) -> None:
        """Take the total of all processes' sums."""
        self.sums = torch.stack(list(states)).sum(0)

    def compute(self) -> dict[str, float]:
        """`accuracy` in [0, 1] and `perplexity`; 0 where nothing was masked."""
        loss, right, count = self.sums.tolist()
        if not count:
            return {"accuracy": 0.0, "perplexity": 0.0}
        return {"accuracy": right / count, "perplexity": math.exp(min(loss / count, 700.0))}


class NextTokens(MaskedTokens):
    """Accuracy and perplexity of each token given those before it, at tokens with a label that is not -100."""

    def update(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Count one batch: `output.logits` (batch, tokens, vocabulary) against `batch["labels"]` (batch, tokens)."""
        super().update({"logits": output["logits"][:, :-1]}, {"labels": batch["labels"][:, 1:]})


def _correlation(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x @ y).item() / scale if scale else 0.0


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0, tied values share their mean rank."""
    _, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks: Tensor = (ends - (counts.double() + 1) / 2)[inverse]
    return ranks
