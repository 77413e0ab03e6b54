"""Mean IoU and its kin: by their definition, in shards, with classes that are absent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from taskkd.errors import DataError, TaskkdError
from taskkd.segmentation import metrics
from taskkd.segmentation.metrics import SegmentationMetric, confusion, predicted

NAMES = ["sky", "road", "car", "tree"]


def batch(number: int = 3, seed: int = 0) -> tuple[torch.Tensor, dict[str, Any]]:
    """Predictions and labels in which "tree" does not occur."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (number, 13, 17), generator=generator)
    guess = torch.randint(0, 3, labels.shape, generator=generator)
    prediction = torch.where(torch.rand(labels.shape, generator=generator) < 0.6, labels, guess)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return prediction, {"labels": labels}


def measured(output: Any, given: dict[str, Any], **options: Any) -> dict[str, float]:
    metric = SegmentationMetric(NAMES, **options)
    metric.update(output, given)
    return metric.compute()


def test_the_definition() -> None:
    prediction, given = batch()
    found, labels = prediction.numpy(), given["labels"].numpy()
    counted = labels != 255
    ious, accuracies = [], []
    for k in range(3):
        ours, theirs = (found == k) & counted, (labels == k) & counted
        ious.append((ours & theirs).sum() / (ours | theirs).sum())
        accuracies.append((ours & theirs).sum() / theirs.sum())
    result = measured(prediction, given)
    assert result["mIoU"] == pytest.approx(np.mean(ious), abs=1e-15)
    assert result["mean_accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-15)
    assert result["pixel_accuracy"] == pytest.approx((found == labels)[counted].mean(), abs=1e-15)
    assert [result[f"IoU/{n}"] for n in NAMES[:3]] == pytest.approx(ious, abs=1e-15)
    assert "IoU/tree" not in result
    assert measured(prediction, given, absent="zero")["mIoU"] == pytest.approx(np.sum(ious) / 4, abs=1e-15)
    assert set(measured(prediction, given, per_class=False)) == {"mIoU", "pixel_accuracy", "mean_accuracy"}


def test_a_class_that_is_only_predicted_counts() -> None:
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    result = measured(torch.tensor([[[0, 0], [0, 3]]]), {"labels": labels})
    assert result["mIoU"] == pytest.approx((0.75 + 0) / 2)
    assert result["mean_accuracy"] == 0.75
    assert result["IoU/tree"] == 0


def test_nothing_seen_or_all_ignored() -> None:
    empty = SegmentationMetric(NAMES).compute()
    assert empty == {"mIoU": 0.0, "pixel_accuracy": 0.0, "mean_accuracy": 0.0}
    prediction, given = batch()
    assert measured(prediction, {"labels": torch.full_like(given["labels"], 255)}) == empty


def test_shards_give_exactly_what_the_whole_gives() -> None:
    prediction, given = batch(6)
    whole = SegmentationMetric(NAMES)
    whole.update(prediction, given)
    shards = [SegmentationMetric(NAMES) for _ in range(3)]
    for rank, shard in enumerate(shards):
        for index in range(rank, 6, 3):
            shard.update(prediction[index : index + 1], {"labels": given["labels"][index : index + 1]})
    shards[0].merge([shard.state() for shard in shards])
    assert torch.equal(shards[0].matrix, whole.matrix)
    assert whole.matrix.dtype == torch.int64
    assert shards[0].compute() == whole.compute()
    whole.reset()
    assert whole.matrix.sum() == 0


def test_many_pixels_are_counted_exactly() -> None:
    metric = SegmentationMetric(NAMES)
    metric.merge([torch.full((4, 4), 2**40 + 1), torch.full((4, 4), 2**24 + 1)])  # float32 would lose the ones
    assert metric.matrix[0, 0] == 2**40 + 2**24 + 2


@pytest.mark.parametrize("form", ["tensor", "mapping", "object", "list"])
def test_logits_in_any_form(form: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, 6)
    _, given = batch(2)
    size = tuple(given["labels"].shape[-2:])
    full = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)
    output: Any = {
        "tensor": logits,
        "mapping": {"logits": logits},
        "object": SimpleNamespace(logits=logits),
        "list": {"logits": list(logits)},
    }[form]
    labels = list(given["labels"]) if form == "list" else given["labels"]
    assert measured(output, {"labels": labels}) == measured(full, given)


def test_sizes_that_differ() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(4, 3, 4), torch.randn(4, 5, 2)]
    labels = [torch.randint(0, 4, (12, 16)), torch.randint(0, 4, (9, 7))]
    both = measured(logits, {"labels": labels})
    one = SegmentationMetric(NAMES)
    for a, b in zip(logits, labels, strict=True):
        one.update(a[None], {"labels": b[None]})
    assert one.compute() == both


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("size", [(33, 47), (8, 9), (4, 5), (3, 20)])
def test_rows_at_a_time_equal_the_whole(size: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", rows * 2 * 5 * size[1])
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 8, 9, dtype=torch.float64)
    whole = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    assert torch.equal(predicted(logits, size), whole.argmax(1))


def test_ties_go_to_the_first_class() -> None:
    assert predicted(torch.zeros(1, 300, 2, 2), (2, 2)).sum() == 0
    last = torch.zeros(1, 300, 2, 2)
    last[:, 299] = 1
    assert (predicted(last, (4, 4)) == 299).all()


def test_minus_one_is_ignored_too() -> None:
    prediction, given = batch()
    other = torch.where(given["labels"] == 255, -1, given["labels"])
    assert torch.equal(confusion(prediction, other, 4), confusion(prediction, given["labels"], 4))


@pytest.mark.parametrize(
    ("output", "labels", "error", "message"),
    [
        (torch.zeros(1, 3, 3, dtype=torch.int64), torch.full((1, 3, 3), 4), DataError, "label 4 is none of 0 to 3"),
        (torch.full((1, 3, 3), 5), torch.zeros(1, 3, 3), DataError, "predictions are from 5 to 5"),
        (torch.zeros(1, 7, 3, 3), torch.zeros(1, 3, 3), TaskkdError, r"metric of 4 classes .* got \(7, 3, 3\)"),
        (torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), TaskkdError, "expected logits"),
    ],
)
def test_what_is_refused(output: Any, labels: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        measured(output, {"labels": labels})


def test_options_that_are_refused() -> None:
    with pytest.raises(TaskkdError, match="absent='none'"):
        SegmentationMetric(NAMES, absent="none")  # type: ignore[arg-type]
    with pytest.raises(TaskkdError, match="names of the classes"):
        SegmentationMetric([])
    with pytest.raises(DataError, match="no `labels`"):
        SegmentationMetric(NAMES).update(torch.zeros(1, 4, 2, 2), {})


def test_classes_that_occur_have_their_own_results() -> None:
    prediction, given = batch()
    metric = SegmentationMetric(NAMES)
    metric.update(prediction, given)
    results, classes = metric.compute(), metric.by_class()
    assert {f"IoU/{name}": own["IoU"] for name, own in classes.items()} == {k: results[k] for k in results if "/" in k}
    assert "tree" not in classes
    assert sum(own["accuracy"] for own in classes.values()) / 3 == pytest.approx(results["mean_accuracy"])
