"""How a recipe's data section becomes the data of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import xxhash
from torch.utils.data import Subset

from taskkd.augmentation import Augmented
from taskkd.detection.datasets import DetectionDataset, collate
from taskkd.detection.hub import read_hub
from taskkd.detection.readers import read
from taskkd.detection.records import Annotations
from taskkd.detection.schema import Data
from taskkd.detection.tiles import split, tiles
from taskkd.detection.transforms import build
from taskkd.detection.trees import tree_crowns
from taskkd.detection.voc import read_voc
from taskkd.splits import held_out, limited, shared_images

__all__ = ["DetectionData", "load"]

logger = logging.getLogger(__name__)
PARTS = ("train", "validation", "test")


@dataclass
class DetectionData:
    """The images of a run. `train` is augmented, the others are as they are.

    Args:
        annotations: of "train", "validation" and "test".
        config: what the recipe says of them.
    """

    annotations: dict[str, Annotations]
    config: Data

    def __post_init__(self) -> None:
        hold = self.config.hold
        own = DetectionDataset(self.annotations["train"], held=hold)
        self.train = Augmented(own, build(self.config.augment)) if self.config.augment else own
        self.validation = DetectionDataset(self.annotations["validation"], ignored=True, held=hold)
        self.test = DetectionDataset(self.annotations["test"], ignored=True, held=hold)

    #: detectors learn from boxes; there is no second stream
    unlabelled = None
    #: nothing is saved beside a student, which says itself what it is
    processing = None

    @property
    def classes(self) -> list[str]:
        """Names; label k is `classes[k - 1]`."""
        return self.annotations["train"].classes

    @property
    def everything(self) -> Any:
        """All that is trained on."""
        return self.train

    @property
    def further_tests(self) -> dict[str, Any]:
        """Test sets beside `test`: none."""
        return {}

    @property
    def collator(self) -> Any:
        """Makes a batch."""
        return collate

    full_length_collator = collator

    def first(self, table: Any, count: int) -> Any:
        """The first samples of a split."""
        return Subset(table, range(min(count, len(table))))

    def fingerprint(self) -> str:
        """A digest of all annotations, and of the names of their images (not of their pixels)."""
        digest = xxhash.xxh3_128()
        for part in PARTS:
            digest.update(repr((part, self.annotations[part].classes)).encode())
            for record in self.annotations[part].records:
                digest.update(repr((record.source.name, record.crop, record.size)).encode())
                for array in (record.boxes, record.labels, record.area, record.iscrowd):
                    digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        """One line with the numbers of images and boxes."""
        shown = [f"{part} {self.annotations[part].summary().partition(' of ')[0]}" for part in PARTS]
        names = ", ".join(self.classes[:6]) + (", ..." if len(self.classes) > 6 else "")
        return f"{'; '.join(shown)}; {len(self.classes)} classes ({names})"


def load(config: Data) -> DetectionData:
    """Read and divide the data of a recipe.

    What is missing of validation and test is held out from the training data.

    Raises:
        DataError: a file, class, box or split is wrong.
    """
    parts = _divided(config)
    for name in ("validation", "test"):
        if line := shared_images(parts["train"].records, parts[name].records):
            logger.warning("%s: %s", name, line)
    for part in parts.values():
        for note in part.notes:
            logger.info(note)
    return DetectionData(parts, config)


def _divided(config: Data) -> dict[str, Annotations]:
    """The three parts; what is missing of validation and test is held out from train."""
    given = _parts(config)
    if config.tiles is not None and config.sample is None:
        given = {name: part and _tiled(part, config, name) for name, part in given.items()}
    train = given.pop("train")
    assert train is not None
    cut = partial(split, seed=config.split_seed)
    sizes = {"validation": config.validation_size, "test": config.test_size}
    train, others = held_out(train, given, sizes, cut, len(train))
    return {"train": limited(train, config.train_size, len(train), cut), **others}


def _tiled(part: Annotations, config: Data, name: str) -> Annotations:
    own = config.tiles
    assert own is not None
    overlap = own.overlap if name == "train" else 0
    return replace(part, records=tiles(part.records, own.size, overlap=overlap))


# ---- reading


def _parts(config: Data) -> dict[str, Annotations | None]:
    if config.sample is not None:
        assert config.tiles is not None
        return dict(tree_crowns(config.tiles.size, overlap=config.tiles.overlap))
    if config.coco is not None:
        return _each(config, lambda name, classes: _coco(config, name, classes))
    if config.voc is not None:
        return _each(config, lambda name, classes: _voc(config, name, classes))
    return _each(config, lambda name, classes: _hub(config, name, classes))


def _each(config: Data, reader: Any) -> dict[str, Annotations | None]:
    source = config.coco or config.voc or config.hub
    found: dict[str, Annotations | None] = {"train": reader("train", config.classes)}
    classes = found["train"].classes if found["train"] is not None else None
    for name in PARTS[1:]:
        found[name] = reader(name, classes) if getattr(source, name) is not None else None
    return found


def _coco(config: Data, name: str, classes: Sequence[str] | None) -> Annotations:
    assert config.coco is not None
    images = config.coco.images
    folder = dict(images).get(name) if isinstance(images, dict) else images  # type: ignore[call-overload]
    return read(getattr(config.coco, name), folder, classes=classes, bad=config.bad)


def _voc(config: Data, name: str, classes: Sequence[str] | None) -> Annotations:
    own = config.voc
    assert own is not None
    folder: Any = own.folder
    if name == "test":
        folder = own.test_folder or (folder[-1] if isinstance(folder, list) else folder)
    return read_voc(folder, getattr(own, name), classes=classes, bad=config.bad)


def _hub(config: Data, name: str, classes: Sequence[str] | None) -> Annotations:
    own = config.hub
    assert own is not None
    return read_hub(
        own.name, getattr(own, name), subset=own.subset, image=own.image, objects=own.objects,
        box_format=own.box_format, classes=classes, bad=config.bad,
    )  # fmt: skip
