"""COCO's average precision and recall, and Pascal VOC's average precision, from batches as they come."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from taskkd.detection.records import Array, Record
from taskkd.errors import DataError, TaskkdError, nearest

__all__ = ["COCO_RESULTS", "CocoMetric", "VocMetric", "average_precision", "voc_ap"]

#: the twelve results, in pycocotools' order
COCO_RESULTS = [
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
]
OF_SIZES = [name for name in COCO_RESULTS if "_" in name]
BACKENDS = ("pycocotools", "faster")


class _Seen:
    """What a metric keeps: for each image its detections and its ground truth.

    Args:
        classes: names; label k is `classes[k - 1]`.
        ground_truth: records; default: the targets of the batches.
    """

    #: what is read of a batch
    columns = ("targets", "id")

    def __init__(self, classes: Sequence[str], ground_truth: Sequence[Record] | None) -> None:
        self.classes = list(classes)
        self._given = None if ground_truth is None else {r.image_id: _of_record(r) for r in ground_truth}
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        #: image id -> detections (k, 6): box, label, score; ground truth (n, 7): box, label, area, ignored
        self.images: dict[int, tuple[Array, Array]] = {}
        self._worked_out: tuple[list[float], Array] | None = None

    def update(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Count one batch.

        Args:
            output: for each image `boxes` (k, 4) xyxy in pixels of the image as it was given to the model, `labels`
                (k,) and `scores` (k,); detections that are not finite count as none.
            batch: with `targets`, as `DetectionDataset` gives them (with `ignored=True`, so that crowds are known);
                an image is told by its `image_id`, or by `id` of the batch. One that comes twice counts once.

        Raises:
            DataError: an image is not in the ground truth that was given.
        """
        self._worked_out = None
        for number, (found, target) in enumerate(zip(output, batch["targets"], strict=True)):
            image_id = int(target["image_id"]) if "image_id" in target else int(batch["id"][number])
            if self._given is None:
                truth = _of_target(target)
            elif image_id in self._given:
                truth = self._given[image_id]
            else:
                raise DataError(f"image id {image_id} is not in the ground truth that the metric was given.")
            self.images.setdefault(image_id, (_of_detections(found), truth))

    def state(self) -> dict[int, tuple[Array, Array]]:
        """The images of this process."""
        return self.images

    def merge(self, states: Sequence[dict[int, tuple[Array, Array]]]) -> None:
        """Take the images of all processes; one that several have counts once."""
        merged: dict[int, tuple[Array, Array]] = {}
        for state in states:
            for image_id, seen in state.items():
                merged.setdefault(image_id, seen)
        self.images, self._worked_out = merged, None


def _array(value: Any) -> Array:
    return np.asarray(value.detach().cpu().double() if isinstance(value, Tensor) else value, np.float64)


def _of_detections(found: Mapping[str, Any]) -> Array:
    boxes, labels, scores = (_array(found[key]) for key in ("boxes", "labels", "scores"))
    rows = np.concatenate([boxes.reshape(-1, 4), labels.reshape(-1, 1), scores.reshape(-1, 1)], 1)
    kept: Array = rows[np.isfinite(rows).all(1)]
    return kept


def _of_record(record: Record) -> Array:
    columns = [record.boxes, record.labels[:, None], record.area[:, None], record.iscrowd[:, None]]
    return np.concatenate(columns, 1).astype(np.float64)


def _of_target(target: Mapping[str, Any]) -> Array:
    rows = [_truths(target, "")]
    if "ignored_boxes" in target:
        ignored = _truths(target, "ignored_")
        ignored[:, 6] = 1
        rows.append(ignored)
    return np.concatenate(rows)


def _truths(target: Mapping[str, Any], prefix: str) -> Array:
    boxes = _array(target[f"{prefix}boxes"]).reshape(-1, 4)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    own = [target.get(f"{prefix}{name}") for name in ("labels", "area", "iscrowd")]
    labels, area, crowd = (
        default if value is None else _array(value)
        for value, default in zip(own, (np.ones(len(boxes)), area, np.zeros(len(boxes))), strict=True)
    )
    return np.concatenate([boxes, labels[:, None], area[:, None], crowd[:, None]], 1)


# ---- COCO


class CocoMetric(_Seen):
    """COCO's twelve numbers (Lin et al. 2014), worked out by pycocotools; a `Metric` of the trainer.

    Args:
        classes: names; label k is `classes[k - 1]`.
        ground_truth: records of what is evaluated on: boxes and areas in float64, with crowds, as pycocotools reads
            them from the file; default: the targets of the batches, in float32. Only images that were seen count.
        backend: "pycocotools", or "faster" for faster_coco_eval (the extra `faster`), which gives the same to 1e-12.
        per_class: also give the AP of each class, `AP/<class>`.

    Raises:
        TaskkdError: no such backend, or it is not installed.
    """

    def __init__(
        self,
        classes: Sequence[str],
        ground_truth: Sequence[Record] | None = None,
        *,
        backend: Literal["pycocotools", "faster"] = "pycocotools",
        per_class: bool = False,
    ) -> None:
        if backend not in BACKENDS:
            raise TaskkdError(f"no COCO backend {backend!r}{nearest(backend, BACKENDS)}; known: {', '.join(BACKENDS)}.")
        self.backend, self.per_class = backend, per_class
        _tools(backend)
        super().__init__(classes, ground_truth)

    def compute(self) -> dict[str, float]:
        """The results as fractions, by the names in `COCO_RESULTS`, and `AP/<class>`.

        pycocotools gives -1 where there is nothing to find. Here results of a size (`AP_small`, ...) or class that the
        ground truth lacks are left out, and the others are 0.0 where there is no ground truth at all.
        """
        stats, precision = self._evaluated()
        results = {
            name: max(value, 0.0)
            for name, value in zip(COCO_RESULTS, stats, strict=True)
            if value >= 0 or name not in OF_SIZES
        }
        for number, name in enumerate(self.classes if self.per_class else ()):
            own = precision[:, :, number, 0, -1]  # (thresholds of IoU, of recall, classes, sizes, numbers of boxes)
            if (own > -1).any():
                results[f"AP/{name}"] = float(own[own > -1].mean())
        return results

    def by_class(self) -> dict[str, dict[str, float]]:
        """`AP` and `AP50` of each class that the ground truth has."""
        precision = self._evaluated()[1]
        found = {}
        for number, name in enumerate(self.classes):
            own = precision[:, :, number, 0, -1]
            if (own > -1).any():
                found[name] = {"AP": float(own[own > -1].mean()), "AP50": float(own[0].mean())}
        return found

    def _evaluated(self) -> tuple[list[float], Array]:
        """The twelve numbers and the table of precisions, worked out once."""
        if self._worked_out is None:
            self._worked_out = self._evaluation()
        return self._worked_out

    def _evaluation(self) -> tuple[list[float], Array]:
        if not self.images:
            return [-1.0] * 12, -np.ones((10, 101, len(self.classes), 4, 3))
        data, evaluation = _tools(self.backend)
        with contextlib.redirect_stdout(io.StringIO()):
            truth, found = data(), data()
            truth.dataset = self._dataset(1)
            found.dataset = self._dataset(0)
            truth.createIndex()
            found.createIndex()
            result = evaluation(truth, found, "bbox")
            result.evaluate()
            result.accumulate()
            result.summarize()
        return [float(v) for v in result.stats[:12]], np.asarray(result.eval["precision"])

    def _dataset(self, part: Literal[0, 1]) -> dict[str, Any]:
        """The detections (0) or the ground truth (1) as COCO has them; ids count from 1, as 0 means unmatched."""
        order = sorted(self.images)
        rows = [(image_id, row) for image_id in order for row in self.images[image_id][part].tolist()]
        return {
            "images": [{"id": image_id} for image_id in order],
            "categories": [{"id": label, "name": name} for label, name in enumerate(self.classes, 1)],
            "annotations": [
                _annotation(number, image_id, row, is_truth=part == 1) for number, (image_id, row) in enumerate(rows, 1)
            ],
        }


def _annotation(number: int, image_id: int, row: Sequence[float], *, is_truth: bool) -> dict[str, Any]:
    x0, y0, x1, y1, label, last = row[:6]
    box = [x0, y0, x1 - x0, y1 - y0]
    entry = {"id": number, "image_id": image_id, "category_id": int(label), "bbox": box}
    if is_truth:
        return {**entry, "area": last, "iscrowd": int(row[6])}
    return {**entry, "area": box[2] * box[3], "score": last, "iscrowd": 0}


def _tools(backend: str) -> tuple[Any, Any]:
    """The classes of a data set and of its evaluation."""
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise TaskkdError(
            "backend='faster' needs faster_coco_eval: pip install faster-coco-eval, or pip install taskkd[faster]."
        ) from None
    return COCO, COCOeval_faster


# ---- Pascal VOC


class VocMetric(_Seen):
    """Pascal VOC's mean average precision (Everingham et al. 2010); a `Metric` of the trainer.

    Args:
        classes: names; label k is `classes[k - 1]`.
        ground_truth: as in `CocoMetric`; difficult objects are those with `iscrowd`.
        iou: overlap from which on a box is found.
        use_07_metric: the mean precision at eleven values of recall, as in 2007; default: the area under the curve,
            since 2010.
        per_class: also give the AP of each class.
    """

    def __init__(
        self,
        classes: Sequence[str],
        ground_truth: Sequence[Record] | None = None,
        *,
        iou: float = 0.5,
        use_07_metric: bool = False,
        per_class: bool = False,
    ) -> None:
        self.iou, self.use_07_metric, self.per_class = iou, use_07_metric, per_class
        super().__init__(classes, ground_truth)

    @property
    def name(self) -> str:
        """Of the result: `VOC_AP50`, `VOC07_AP50`, or another overlap in percent."""
        return f"VOC{'07' if self.use_07_metric else ''}_AP{round(100 * self.iou)}"

    def compute(self) -> dict[str, float]:
        """The mean over the classes that occur, as a fraction, 0.0 where none does; and `<name>/<class>`."""
        by_label = self._by_label()
        results = {self.name: sum(by_label.values()) / len(by_label) if by_label else 0.0}
        if self.per_class:
            results |= {f"{self.name}/{self.classes[label - 1]}": ap for label, ap in by_label.items()}
        return results

    def by_class(self) -> dict[str, dict[str, float]]:
        """The average precision of each class that occurs."""
        by_label = self._by_label()
        return {self.classes[label - 1]: {self.name: ap} for label, ap in by_label.items()}

    def _by_label(self) -> dict[int, float]:
        detections = {image_id: found for image_id, (found, _) in self.images.items()}
        truths = {image_id: truth for image_id, (_, truth) in self.images.items()}
        return voc_ap(detections, truths, iou=self.iou, use_07_metric=self.use_07_metric)


def voc_ap(
    detections: Mapping[int, Array],
    truths: Mapping[int, Array],
    *,
    iou: float = 0.5,
    use_07_metric: bool = False,
) -> dict[int, float]:
    """Average precision of each class as Pascal VOC's development kit has it.

    Detections of a class go by falling score; one is right if the ground truth of its class and image that it overlaps
    most is overlapped by `iou` or more and is not taken yet. One whose best is a difficult object counts as nothing.
    (py-faster-rcnn's port asks for more than `iou`.)

    Args:
        detections: by image id, (k, 6): x0, y0, x1, y1, label, score.
        truths: by image id, (n, 7): x0, y0, x1, y1, label, area, difficult.
        iou, use_07_metric: as in `VocMetric`.

    Returns:
        By label; labels of which there is no object that is not difficult are left out.
    """  # fmt: skip
    labels = sorted({int(label) for truth in truths.values() for label in truth[truth[:, 6] == 0, 4]})
    return {label: _voc_class(detections, truths, label, iou, use_07_metric) for label in labels}


def _voc_class(
    detections: Mapping[int, Array], truths: Mapping[int, Array], label: int, iou: float, use_07_metric: bool
) -> float:
    own = {image_id: truth[truth[:, 4] == label] for image_id, truth in truths.items()}
    total = sum(int((truth[:, 6] == 0).sum()) for truth in own.values())
    found = [
        (row[5], image_id, row[:4])
        for image_id in sorted(detections)
        for row in detections[image_id][detections[image_id][:, 4] == label]
    ]
    found.sort(key=lambda entry: -entry[0])  # stable: equal scores stay in the order of the images
    right = np.array(list(_matched(found, own, iou)), np.float64)
    right = right[~np.isnan(right)]
    hits = right.cumsum()
    return average_precision(hits / total, hits / np.arange(1, len(right) + 1), use_07_metric=use_07_metric)


def _matched(found: Sequence[tuple[float, int, Array]], truths: Mapping[int, Array], iou: float) -> Iterator[float]:
    """For each detection 1 (right), 0 (wrong) or NaN (to be ignored)."""
    taken: set[tuple[int, int]] = set()
    for _, image_id, box in found:
        truth = truths.get(image_id, np.zeros((0, 7)))
        overlaps = _overlaps(box, truth[:, :4])
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if best < 0 or overlaps[best] < iou:
            yield 0.0
        elif truth[best, 6]:
            yield float("nan")
        else:
            yield float((image_id, best) not in taken)
            taken.add((image_id, best))


def _overlaps(box: Array, others: Array) -> Array:
    """IoU of a box (4,) with others (n, 4)."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = sides.clip(0).prod(1)
    iou: Array = shared / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared)
    return iou


def average_precision(recall: Array, precision: Array, *, use_07_metric: bool = False) -> float:
    """Average precision of a curve; precision at a recall is the highest at that recall or above.

    Args:
        recall, precision: (k,) by falling score.
        use_07_metric: the mean at recall 0, 0.1, ..., 1 instead of the area under the curve.
    """  # fmt: skip
    if use_07_metric:
        highest = [precision[recall >= step / 10].max(initial=0.0) for step in range(11)]
        return float(sum(highest) / 11)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())
