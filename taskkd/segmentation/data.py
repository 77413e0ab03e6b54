"""How a recipe's data section becomes the data of a run: labelled parts, and a stream of unlabelled images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import xxhash
from torch.utils.data import Subset

from taskkd.augmentation import Augmented
from taskkd.errors import DataError
from taskkd.segmentation import schema
from taskkd.segmentation.datasets import SegmentationDataset, WithUnlabelled, collate, collate_pairs
from taskkd.segmentation.nuclei import nuclei
from taskkd.segmentation.readers import LAYOUTS, read_folder, read_hub, read_images, read_voc
from taskkd.segmentation.records import Annotations, tiles
from taskkd.segmentation.schema import Data, Part, Source
from taskkd.segmentation.transforms import build
from taskkd.splits import divided, held_out, limited, shared_images

__all__ = ["SegmentationData", "from_annotations", "load", "read_part"]

logger = logging.getLogger(__name__)
PARTS: tuple[Part, ...] = ("train", "validation", "test")
#: how many masks are looked at to see whether the classes are those of the masks
LOOKED_AT = 8


@dataclass
class SegmentationData:
    """The images of a run. `train` and `unlabelled` are augmented, the others are as they are.

    Args:
        annotations: of "train", "validation", "test", and "unlabelled" where there is such a stream.
        config: what the recipe says of them.
        pairs: whether a sample that is left over at the end of an epoch is in its batch twice, see `collate_pairs`.
    """

    annotations: dict[str, Annotations]
    config: Data
    pairs: bool = False

    def __post_init__(self) -> None:
        hold, given = self.config.hold, self.annotations
        augment = build(self.config.augment) if self.config.augment else None
        own = SegmentationDataset(given["train"], training=True, held=hold)
        self.train: Any = Augmented(own, augment) if augment else own
        self.validation = SegmentationDataset(given["validation"], held=hold)
        self.test = SegmentationDataset(given["test"], held=hold)
        self.unlabelled: Any = None
        #: all that is distilled on: each labelled sample with its share of unlabelled ones
        self.everything: Any = self.train
        if "unlabelled" in given:
            others = SegmentationDataset(given["unlabelled"], training=True, held=hold)
            self.unlabelled = Augmented(others, augment) if augment else others
            count = self.config.unlabelled_per_sample
            self.everything = WithUnlabelled(own, others, augment, augment, count=count)

    #: nothing is saved beside a student, which says itself what it is
    processing = None

    @property
    def classes(self) -> list[str]:
        """Names; label k is `classes[k]`."""
        return self.annotations["train"].classes

    @property
    def further_tests(self) -> dict[str, Any]:
        """Test sets beside `test`: none."""
        return {}

    @property
    def collator(self) -> Any:
        """Makes a batch."""
        return collate_pairs if self.pairs else collate

    full_length_collator = collator

    def first(self, table: Any, count: int) -> Any:
        """The first samples of a split."""
        return Subset(table, range(min(count, len(table))))

    def fingerprint(self) -> str:
        """A digest of classes and of the names and sizes in bytes of all files (not of their pixels)."""
        digest = xxhash.xxh3_128()
        for name, part in self.annotations.items():
            digest.update(repr((name, part.classes)).encode())
            for record in part.records:
                names = [source.name for source in (record.source, record.mask) if source is not None]
                sizes = [Path(n).stat().st_size if Path(n).is_file() else 0 for n in names]
                digest.update(repr((names, sizes, record.crop, record.labels)).encode())
        return digest.hexdigest()

    def summary(self) -> str:
        """One line with the numbers of images and the classes."""
        shown = [f"{name} {len(part)} images" for name, part in self.annotations.items()]
        names = ", ".join(self.classes[:6]) + (", ..." if len(self.classes) > 6 else "")
        return f"{'; '.join(shown)}; {len(self.classes)} classes ({names})"


def load(config: Data) -> SegmentationData:
    """Read and divide the data of a recipe.

    What is missing of validation and test is held out from the training data. Unlabelled images that are validated or
    tested on are left out.

    Raises:
        DataError: a file, class or split is wrong.
    """
    return from_annotations(config, _given(config))


def from_annotations(config: Data, given: Mapping[str, Annotations | None]) -> SegmentationData:
    """The data of a run, of parts that are there already; see `load`.

    Args:
        config: what is done with them.
        given: "train", "validation" and "test"; None is held out from train.
    """
    parts = _divided(config, given)
    if config.unlabelled is not None:
        parts["unlabelled"] = _unlabelled(config, parts)
    for name in ("validation", "test"):
        if line := shared_images(parts["train"].records, parts[name].records):
            logger.warning("%s: %s", name, line)
    for part in parts.values():
        for note in part.notes:
            logger.info(note)
    if line := _one_class(parts["train"]):
        logger.warning(line)
    return SegmentationData(parts, config)


def _given(config: Data) -> dict[str, Annotations | None]:
    """Train, validation and test as they are read."""
    if config.sample is not None:
        assert config.tiles is not None
        return {**nuclei(config.tiles.size, overlap=config.tiles.overlap)}
    given = {str(part): read_part(config, part, config.bad) for part in PARTS}
    train = given["train"]
    if config.evaluation is not None and train is not None:
        given |= _evaluated(config, train.classes)
    return given


def _divided(config: Data, given: Mapping[str, Annotations | None]) -> dict[str, Annotations]:
    """Train, validation and test, in tiles where they are asked for."""
    found = _held_out(config, given)
    if config.tiles is not None and config.sample is None:
        overlaps = {"train": config.tiles.overlap}
        found = {
            name: replace(part, records=tiles(part.records, config.tiles.size, overlap=overlaps.get(name, 0)))
            for name, part in found.items()
        }
    train = found["train"]
    found["train"] = limited(train, config.train_size, len(train), partial(_split, seed=config.split_seed))
    return found


def _held_out(config: Data, given: Mapping[Any, Annotations | None]) -> dict[str, Annotations]:
    """All three parts; what is missing of validation and test is taken from train."""
    others = dict(given)
    train = others.pop("train")
    assert train is not None
    sizes = {"validation": config.validation_size, "test": config.test_size}
    train, found = held_out(train, others, sizes, partial(_split, seed=config.split_seed), len(train))
    return {"train": train, **found}


def _split(annotations: Annotations, shares: Sequence[float], seed: int) -> list[Annotations]:
    parts = divided(annotations.records, shares, seed=seed)
    return [Annotations(part, annotations.classes, annotations.notes if not n else []) for n, part in enumerate(parts)]


def _evaluated(config: Data, classes: list[str]) -> dict[str, Annotations | None]:
    """Validation and test of another source, from whose training part they are held out where they are missing."""
    assert config.evaluation is not None
    held = _held_out(config, {part: read_part(config.evaluation, part, config.bad) for part in PARTS})
    other = held["train"].classes
    if other != classes:
        differ = next(
            (f"{k}: {a!r} and {b!r}" for k, (a, b) in enumerate(zip(classes, other, strict=False)) if a != b), ""
        )
        raise DataError(
            f"data.evaluation has other classes than the training data, {len(other)} and {len(classes)}"
            + (f"; the first that differs is {differ}." if differ else ".")
        )
    return {"validation": held["validation"], "test": held["test"]}


def _unlabelled(config: Data, parts: dict[str, Annotations]) -> Annotations:
    """The second stream, with image ids of its own."""
    own = config.unlabelled
    if isinstance(own, Source):
        found = read_part(own, "train", config.bad, labelled=False)
        assert found is not None
    else:
        found = read_images(cast("str | list[str]", own), bad=config.bad)
    evaluated = {r.source.name for name in ("validation", "test") for r in parts[name].records}
    kept = [replace(r, mask=None) for r in found.records if r.source.name not in evaluated]
    if left := len(found) - len(kept):
        logger.info("%d of the %d unlabelled images are validated or tested on: left out.", left, len(found))
    if not kept:
        raise DataError("data.unlabelled: no image is left that is not validated or tested on.")
    if config.tiles is not None:
        kept = tiles(kept, config.tiles.size, overlap=config.tiles.overlap)
    start = 1 + max(r.image_id for part in parts.values() for r in part.records)
    return replace(found, records=[replace(r, image_id=start + n) for n, r in enumerate(kept)])


# ---- reading


def read_part(source: Source, part: Part, bad: Any, *, labelled: bool = True) -> Annotations | None:
    """A part of a source, or None where it has none."""
    kind = next(k for k in ("folder", "voc", "hub", *LAYOUTS) if getattr(source, k) is not None)
    own = getattr(source, kind)
    name = getattr(own, part)
    if name is None:
        return None
    if kind == "folder":
        images, masks = (Path(name) / _of(own, key, part) for key in ("images", "masks"))
        return read_folder(images, masks if labelled else None, classes=own.classes, ignore=own.ignore, bad=bad)
    if kind == "voc":
        return read_voc(own.folder, name, masks=own.masks, labelled=labelled, bad=bad)
    if kind == "hub":
        return read_hub(
            own.name, name, subset=own.subset, image=own.image, annotation=own.annotation if labelled else None,
            classes=own.classes, ignore=own.ignore, bad=bad,
        )  # fmt: skip
    return LAYOUTS[kind](own.folder, name, labelled=labelled, bad=bad)


def _of(own: schema.Folder, key: str, part: Part) -> str:
    """The folder of the images or masks of a part."""
    value = getattr(own, key)
    if not isinstance(value, dict):
        return str(value)
    if part not in value:
        raise DataError(f"data.folder.{key} has no {part}; it has {', '.join(value)}.")
    return str(value[part])


def _one_class(train: Annotations) -> str:
    """A sentence if the first masks have one class beside what is ignored, as where 255 is meant to be a class."""
    if len(train.classes) < 2:
        return ""
    masks = {r.mask.name: r for r in train.records if r.mask is not None}
    seen: set[int] = set()
    for record in list(masks.values())[:LOOKED_AT]:
        assert record.mask is not None
        seen |= set(record.labels.decode(record.mask).ravel().tolist())
    if len(seen - {255}) > 1 or 255 not in seen:
        return ""
    return (
        f"the first {min(len(masks), LOOKED_AT)} masks have no pixel of more than one class, all else is ignored. "
        "If 255 is a class, say so: classes: {0: background, 255: nucleus}."
    )
