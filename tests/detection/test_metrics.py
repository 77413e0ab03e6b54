"""COCO's and Pascal VOC's metrics against pycocotools and by hand."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from taskkd.detection.metrics import COCO_RESULTS, CocoMetric, VocMetric, average_precision
from taskkd.detection.records import Record
from taskkd.errors import DataError, TaskkdError
from taskkd.images import in_memory

CLASSES = ["cat", "dog", "cow", "hen", "yak"]
Batch = tuple[list[dict[str, Tensor]], dict[str, Any]]


def random_set(images: int, seed: int = 0) -> tuple[list[Record], list[Batch]]:
    """Ground truth of four of the five classes with crowds, and detections of which some are near it."""
    draw = np.random.default_rng(seed)

    def boxes(count: int) -> Any:
        corner, side = draw.uniform(0, 300, (count, 2)), np.exp(draw.uniform(1.5, 5.5, (count, 2)))
        return np.concatenate([corner, corner + side], 1)

    records, batches = [], []
    for number in range(images):
        count = int(draw.integers(0, 8))
        own, labels = boxes(count), draw.integers(1, 5, count)
        area = (own[:, 2:] - own[:, :2]).prod(1) * draw.uniform(0.5, 1, count)
        source, crowd, ids = in_memory("x", b""), draw.random(count) < 0.15, np.arange(count)
        records.append(Record(source, 3 * number + 1, (500, 500), own, labels, area, crowd, ids))
        near = own.repeat(2, 0) + draw.normal(0, 4, (2 * count, 4))
        found = np.concatenate([near, boxes(5)])
        wrong = draw.random(len(found)) < 0.2
        names = np.where(wrong, draw.integers(1, 6, len(found)), np.append(labels.repeat(2), [1, 2, 3, 4, 5]))
        scores = draw.random(len(found)).round(2)  # some are equal
        output = {"boxes": found, "labels": names, "scores": scores}
        target = {"image_id": torch.tensor(3 * number + 1), "boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}
        batches.append(([{k: torch.from_numpy(v) for k, v in output.items()}], {"targets": [target]}))
    return records, batches


def directly(records: list[Record], batches: list[Batch]) -> tuple[list[float], Any]:
    """The same by pycocotools alone, from the json that COCO prescribes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, results = [], []
    for record in records:
        for box, label, area, crowd in zip(record.boxes, record.labels, record.area, record.iscrowd, strict=True):
            bbox = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            number = len(annotations) + 1
            annotations.append({"id": number, "image_id": record.image_id, "category_id": int(label), "bbox": bbox})
            annotations[-1] |= {"area": float(area), "iscrowd": int(crowd)}
    for (output,), batch in batches:
        for box, label, score in zip(*(output[k].numpy() for k in ("boxes", "labels", "scores")), strict=True):
            bbox = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            image_id = int(batch["targets"][0]["image_id"])
            results.append({"image_id": image_id, "category_id": int(label), "bbox": bbox, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": r.image_id, "height": 500, "width": 500} for r in records],
            "categories": [{"id": k, "name": n} for k, n in enumerate(CLASSES, 1)],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist(), evaluation.eval["precision"]


def seen(metric: Any, batches: list[Batch]) -> Any:
    for output, batch in batches:
        metric.update(output, batch)
    return metric


def test_the_twelve_numbers_are_pycocotools(capsys: pytest.CaptureFixture[str]) -> None:
    records, batches = random_set(60)
    expected, precision = directly(records, batches)
    results = seen(CocoMetric(CLASSES, records, per_class=True), batches).compute()
    assert list(results)[:12] == COCO_RESULTS
    assert [results[name] for name in COCO_RESULTS] == pytest.approx(expected, abs=1e-12)
    assert 0.05 < results["AP"] < results["AP50"] < 1
    for number, name in enumerate(CLASSES[:4]):
        assert results[f"AP/{name}"] == pytest.approx(precision[:, :, number, 0, 2].mean(), abs=1e-12)
    assert "AP/yak" not in results  # there is none
    assert sum(results[f"AP/{name}"] for name in CLASSES[:4]) / 4 == pytest.approx(results["AP"])
    classes = seen(CocoMetric(CLASSES, records), batches).by_class()
    assert {f"AP/{name}": own["AP"] for name, own in classes.items()} == {k: results[k] for k in results if "/" in k}
    assert sum(own["AP50"] for own in classes.values()) / 4 == pytest.approx(results["AP50"])
    json.dumps(results, allow_nan=False)
    assert capsys.readouterr().out == ""


def test_the_faster_backend_is_equal() -> None:
    pytest.importorskip("faster_coco_eval")
    for images, seed in ((200, 1), (3, 2)):
        records, batches = random_set(images, seed)
        slow, fast = (
            seen(CocoMetric(CLASSES, records, backend=b, per_class=True), batches).compute()  # type: ignore[arg-type]
            for b in ("pycocotools", "faster")
        )
        assert list(slow) == list(fast)
        assert list(fast.values()) == pytest.approx(list(slow.values()), abs=1e-12)


def target(image_id: int, boxes: list[list[float]], labels: list[int], **more: Any) -> dict[str, Any]:
    return {
        "image_id": torch.tensor(image_id),
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        **more,
    }


def detections(boxes: list[list[float]], labels: list[int], scores: list[float]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}


BACKENDS = ["pycocotools", "faster"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_perfect_no_and_senseless_detections(backend: Any) -> None:
    if backend == "faster":
        pytest.importorskip("faster_coco_eval")
    truth = {"targets": [target(1, [[0, 0, 20, 20], [30, 30, 70, 90]], [1, 2]), target(2, [], [])]}
    nothing = detections([], [], [])
    metric = CocoMetric(CLASSES, backend=backend)
    assert metric.compute() == dict.fromkeys(["AP", "AP50", "AP75", "AR1", "AR10", "AR100"], 0.0)  # nothing seen
    metric.update([nothing, nothing], truth)
    # The ground truth has no large box: `AP_large` and `AR_large` have no value.
    assert metric.compute() == {name: 0.0 for name in COCO_RESULTS if "large" not in name}
    metric.reset()
    metric.update([detections([[0, 0, 20, 20], [30, 30, 70, 90]], [1, 2], [0.9, 0.1]), nothing], truth)
    assert metric.compute() == {name: pytest.approx(1.0) for name in COCO_RESULTS if "large" not in name}
    metric.reset()
    metric.update([detections([[float("nan")] * 4, [0, 0, 20, 20]], [1, 1], [0.9, float("inf")]), nothing], truth)
    assert metric.compute()["AP"] == 0
    metric.reset()
    metric.update([detections([[0, 0, 20, 20]], [1], [0.9])], {"targets": [target(2, [], [])]})
    assert metric.compute()["AP"] == 0  # no ground truth at all


def test_targets_of_the_batches_are_the_ground_truth() -> None:
    """Crowds of the evaluation view are neither right nor wrong; areas are the objects' own."""
    found = [detections([[0, 0, 20, 20], [50, 50, 70, 70]], [1, 1], [0.5, 0.9])]
    crowd = {"ignored_boxes": torch.tensor([[40.0, 40, 90, 90]]), "ignored_labels": torch.tensor([1])}
    plain, ignoring = CocoMetric(CLASSES), CocoMetric(CLASSES)
    plain.update(found, {"targets": [target(1, [[0, 0, 20, 20]], [1])]})
    ignoring.update(found, {"targets": [target(1, [[0, 0, 20, 20]], [1], **crowd)]})
    assert plain.compute()["AP"] == pytest.approx(0.5)
    assert ignoring.compute()["AP"] == pytest.approx(1)
    large = CocoMetric(CLASSES)
    large.update(found, {"targets": [target(1, [[0, 0, 20, 20]], [1], area=torch.tensor([2000.0]))]})
    assert "AP_small" not in large.compute()
    assert "AP_medium" in large.compute()
    by_id = CocoMetric(CLASSES)
    without = {k: v for k, v in target(1, [[0, 0, 20, 20]], [1]).items() if k != "image_id"}
    by_id.update(found, {"targets": [without], "id": torch.tensor([8])})
    assert list(by_id.state()) == [8]


@pytest.mark.parametrize("kind", [CocoMetric, VocMetric])
def test_states_of_several_processes(kind: Any) -> None:
    records, batches = random_set(12)
    alone = seen(kind(CLASSES, records), batches)
    parts = [seen(kind(CLASSES, records), batches[i::3]) for i in range(3)]
    parts[2].update(*batches[0])  # an image that the engine repeats to fill a batch
    parts[2].update(*batches[0])
    parts[0].merge([p.state() for p in reversed(parts)])
    assert parts[0].compute() == alone.compute()
    parts[0].reset()
    assert not parts[0].state()


def test_an_image_that_is_not_known() -> None:
    records, batches = random_set(3)
    with pytest.raises(DataError, match="image id 7 is not in the ground truth that the metric was given"):
        seen(CocoMetric(CLASSES, records[:2]), batches)


def test_only_images_that_were_seen_count() -> None:
    records, batches = random_set(12)
    some = seen(CocoMetric(CLASSES, records), batches[:5]).compute()
    assert some == seen(CocoMetric(CLASSES, records[:5]), batches[:5]).compute()


def test_backends_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        TaskkdError, match=r"no COCO backend 'fast' \(did you mean 'faster'\?\); known: pycocotools, fast"
    ):
        CocoMetric(CLASSES, backend="fast")  # type: ignore[arg-type]
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "faster_coco_eval":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        TaskkdError, match=r"needs faster_coco_eval: pip install faster-coco-eval, or pip install taskkd"
    ):
        CocoMetric(CLASSES, backend="faster")


# ---- Pascal VOC


def test_average_precision_by_hand() -> None:
    # Right, wrong, right, wrong, wrong of four objects: recall 1/4, 1/4, 2/4, 2/4, 2/4.
    recall, precision = np.array([1, 1, 2, 2, 2]) / 4, np.array([1, 1 / 2, 2 / 3, 2 / 4, 2 / 5])
    # Area: a quarter at 1, a quarter at 2/3. Eleven points: 0, 0.1, 0.2 at 1; 0.3, 0.4, 0.5 at 2/3; the rest at 0.
    assert average_precision(recall, precision) == pytest.approx(1 / 4 + 1 / 6)
    assert average_precision(recall, precision, use_07_metric=True) == pytest.approx((3 + 3 * 2 / 3) / 11)
    assert (
        average_precision(np.zeros(0), np.zeros(0))
        == average_precision(np.zeros(0), np.zeros(0), use_07_metric=True)
        == 0
    )
    # A recall of exactly 3/10 counts at 0.3.
    assert average_precision(np.array([0.3]), np.array([1.0]), use_07_metric=True) == pytest.approx(4 / 11)


def voc_case() -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Class 1: four objects and a difficult one in two images; class 2 is difficult only, class 3 is not found."""
    first = target(1, [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], [1, 1, 3])
    first |= {
        "ignored_boxes": torch.tensor([[60.0, 0, 70, 10], [80, 0, 90, 10]]),
        "ignored_labels": torch.tensor([1, 2]),
    }
    second = target(2, [[0, 0, 10, 10], [20, 0, 30, 10]], [1, 1])
    found = [
        # right; on the difficult one, twice; the same object again; half of an object: IoU exactly 0.5
        detections(
            [[0, 0, 10, 10], [60, 0, 70, 10], [60, 1, 70, 10], [1, 0, 10, 10], [20, 0, 25, 10]],
            [1, 1, 1, 1, 1],
            [0.9, 0.95, 0.93, 0.8, 0.7],
        ),
        detections([[60, 0, 70, 10], [80, 0, 90, 10]], [1, 2], [0.6, 0.9]),
    ]
    return found, {"targets": [first, second]}


@pytest.mark.parametrize(("old", "name", "expected"), [
    # By score: right, wrong, right, wrong: recall 1/4, 1/4, 2/4, 2/4; precision 1, 1/2, 2/3, 1/2.
    (False, "VOC_AP50", 1 / 4 + 1 / 6),
    (True, "VOC07_AP50", (3 + 3 * 2 / 3) / 11),
])  # fmt: skip
def test_voc_by_hand(old: bool, name: str, expected: float) -> None:
    metric = VocMetric(CLASSES, use_07_metric=old, per_class=True)
    assert metric.compute() == {name: 0.0}
    metric.update(*voc_case())
    results = metric.compute()
    assert results == {
        name: pytest.approx(expected / 2),  # the mean over the two classes that occur
        f"{name}/cat": pytest.approx(expected),
        f"{name}/cow": 0.0,
    }


def test_voc_at_another_overlap() -> None:
    metric = VocMetric(CLASSES, iou=0.6)
    metric.update(*voc_case())
    assert metric.compute() == {"VOC_AP60": pytest.approx(1 / 4 / 2)}


def test_voc_area_is_near_cocos_at_the_same_overlap() -> None:
    records, batches = random_set(60)
    coco = seen(CocoMetric(CLASSES, records), batches).compute()["AP50"]
    assert seen(VocMetric(CLASSES, records), batches).compute()["VOC_AP50"] == pytest.approx(coco, abs=0.04)
