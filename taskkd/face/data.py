"""How a recipe's data section becomes the data of a run: faces to train on, pairs to verify."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.nn import functional as F

from taskkd.augmentation import Augmented
from taskkd.errors import DataError, RecipeError
from taskkd.face.batches import EasyHard, GeneralPlusBalanced, IdentityBalanced
from taskkd.face.datasets import FaceDataset, RandomFlip, TwoViews, collate
from taskkd.face.pairs import Pairs, make_pairs, read_pairs
from taskkd.face.procedural import drawn_faces
from taskkd.face.readers import orl, read_folder, read_hub, read_images
from taskkd.face.recordio import read_recordio
from taskkd.face.records import Array, Faces, shared_identities, split, with_unlabelled
from taskkd.face.schema import Balanced, Data, Sample, Verification
from taskkd.face.transforms import build
from taskkd.face.verification import few_negatives
from taskkd.images import header_size, in_memory
from taskkd.splits import held_out, limited

__all__ = ["FaceData", "VerificationTable", "from_faces", "load"]

logger = logging.getLogger(__name__)


class VerificationTable(TwoViews):
    """Both views of every image of some pairs, which it knows.

    Args:
        pairs: the pairs.
        side: None, or the images are brought down to this side, and up again.
        gallery: (M, D) embeddings by image, where those on the right of pairs are another model's.
        held: keep decoded images in memory.
    """

    def __init__(
        self, pairs: Pairs, *, side: int | None = None, gallery: Tensor | None = None, held: bool = False
    ) -> None:
        super().__init__(FaceDataset(pairs.faces, labels=False, held=held))
        self.pairs, self.side, self.gallery = pairs, side, gallery

    @property
    def counted(self) -> int:
        """How many decisions the metric is of: pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if self.side is None:
            return sample
        image = sample["images"][None].float()
        small = F.interpolate(image, size=(self.side, self.side), mode="bilinear", antialias=True)
        back = F.interpolate(small, size=image.shape[2:], mode="bilinear")
        return {**sample, "images": back[0].round().clamp(0, 255).to(torch.uint8)}


@dataclass
class FaceData:
    """The faces of a run.

    Args:
        faces: what is trained on, with identities.
        pairs: verification sets by name: "validation", "test", and others that are reported beside it.
        config: what the recipe says of them.
        unlabelled: faces of unknown people, which the student is distilled on as well.
        hard: which of `faces` are hard, (N,) bool, for batches of easy and hard images.
        batch_size: of the training, for batches that are balanced as wholes.
        galleries: the teacher's embeddings of the images of test sets, by name, for asymmetric search.
    """

    faces: Faces
    pairs: dict[str, Pairs]
    config: Data
    unlabelled: Faces | None = None
    hard: Array | None = None
    galleries: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        held = self.config.hold
        self.train: Any = self._batched(self.faces)
        #: all that is distilled on
        self.everything: Any = (
            self.train if self.unlabelled is None else self._batched(with_unlabelled(self.faces, self.unlabelled))
        )
        for name, pairs in self.pairs.items():
            if sentence := few_negatives(int((~pairs.same).sum()), self.config.far):
                logger.info("%s: %s", name, sentence)
        self._tables = {name: VerificationTable(pairs, held=held) for name, pairs in self.pairs.items()}

    #: nothing is saved beside a student, which says itself what it is
    processing = None
    collator = staticmethod(collate)
    full_length_collator = collator

    def _batched(self, faces: Faces) -> Any:
        """The training's samples: flipped, augmented, in balanced batches, as the recipe says."""
        own: Any = FaceDataset(faces, held=self.config.hold)
        if not len(faces):
            return own
        batches, labels = self.config.batches, faces.labels
        if batches is None:
            if self.config.augment:
                flip = ["RandomHorizontalFlip"] if self.config.flip else []
                return Augmented(own, build([*flip, *self.config.augment]))
            return RandomFlip(own) if self.config.flip else own
        if isinstance(batches, Balanced):
            if batches.general == 0:
                return IdentityBalanced(own, labels, batches.identities * batches.images, batches.images)
            return GeneralPlusBalanced(
                own,
                labels,
                batches.general,
                batches.identities,
                batches.images,
                label_balanced=batches.label_balanced,
            )
        if self.hard is None:
            raise RecipeError("data.batches: nothing tells which images are hard; give `hard` (a list) or `below`.")
        return EasyHard(own, labels, self.hard, batches.identity, batches.pairs, label_pairs=batches.label_pairs)

    @property
    def identities(self) -> list[str]:
        """Names; label k is `identities[k]`."""
        return self.faces.identities

    @property
    def validation(self) -> VerificationTable:
        """What is validated on."""
        return self._tables["validation"]

    @property
    def test(self) -> VerificationTable:
        """What is tested on."""
        return self._tables["test"]

    @property
    def further_tests(self) -> dict[str, VerificationTable]:
        """Test sets beside `test`: others, the test at low resolution, the student among the teacher's embeddings."""
        found = {name: table for name, table in self._tables.items() if name not in ("validation", "test")}
        if self.config.low_resolution is not None:
            found["low_resolution"] = VerificationTable(self.pairs["test"], side=self.config.low_resolution)
        for name, gallery in self.galleries.items():
            title = "asymmetric" if name == "test" else f"{name}_asymmetric"
            found[title] = VerificationTable(self.pairs[name], gallery=gallery, held=self.config.hold)
        return found

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What a cache of embeddings depends on beside the images: nothing."""
        return {"size": self.faces.size}

    def first(self, table: VerificationTable, count: int) -> VerificationTable:
        """All of a verification set: a part of its images has few of its pairs."""
        return table

    def fingerprint(self) -> str:
        """A digest of identities, pairs, and of the names and sizes in bytes of files (not of their pixels)."""
        digest = xxhash.xxh3_128()
        digest.update(repr((self.identities, self.faces.size)).encode())
        parts = [self.faces, *([self.unlabelled] if self.unlabelled is not None else [])]
        for part in (*parts, *(p.faces for p in self.pairs.values())):
            digest.update(part.labels.tobytes())
            few = len(part) <= 200_000  # else the first and the last stand for all
            for source in part.sources if few else [part.sources[0], part.sources[-1]]:
                file = Path(source.name.partition(", ")[0])  # of a container: "train.rec, key 5"
                size = file.stat().st_size if file.is_file() else 0
                digest.update(f"{source.name} {size};".encode())
        for name, pairs in self.pairs.items():
            digest.update(name.encode() + pairs.left.tobytes() + pairs.right.tobytes() + pairs.same.tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        """One line with the numbers of images, identities and pairs."""
        others = "" if self.unlabelled is None else f"; {len(self.unlabelled)} unlabelled"
        shown = "; ".join(f"{name} {pairs.summary()}" for name, pairs in self.pairs.items())
        return f"train {self.faces.summary()}{others}; {shown}"


def load(config: Data, *, size: int | None = None) -> FaceData:
    """Read and divide the data of a recipe.

    Args:
        config: its data section.
        size: side that images are made square with where the section does not say.

    Raises:
        DataError: a file, identity or split is wrong.
        RecipeError: nothing tells which images are hard.
    """
    size = config.size or size
    if config.sample is not None and config.sample.name == "procedural":
        return _procedural(config, config.sample)
    unlabelled = None if config.unlabelled is None else read_images(config.unlabelled, size=size, bad=config.bad)
    train = _train(config, size)
    held: dict[str, Faces | None] = {"validation": None, "test": None}
    for part in held:
        if config.folder is not None and (name := getattr(config.folder, part)) is not None:
            held[part] = read_folder(name, size=size, bad=config.bad)
        elif config.hub is not None and (name := getattr(config.hub, part)) is not None:
            held[part] = _hub(config, name, size)
    given: dict[str, Pairs | Faces | None] = {**held}
    if config.validation is not None:
        given["validation"] = _verification(config.validation, size)
    named = {name: _verification(own, size) for name, own in config.tests.items()}
    if named:
        first = next(iter(named))
        given["test"] = named.pop(first)
    return from_faces(config, train, {**given, **named}, unlabelled)


def from_faces(
    config: Data, train: Faces, given: Mapping[str, Pairs | Faces | None], unlabelled: Faces | None = None
) -> FaceData:
    """The data of a run, of parts that are there already; see `load`.

    Args:
        config: what is done with them.
        train: with identities.
        given: "validation" and "test", and others to report: pairs, or faces that pairs are made of; None: people of
            `train` are held out.
        unlabelled: faces of unknown people.
    """
    sizes = {"validation": config.validation_size, "test": config.test_size}
    cut, count = partial(split, seed=config.split_seed), len(np.unique(train.labels[train.labels >= 0]))
    parts: dict[str, Pairs | Faces]
    train, parts = held_out(train, given, sizes, cut, count, "identities", least=2)  # pairs are of two people, too
    train = limited(train, config.train_size, len(train.identities), cut)
    for name, part in parts.items():
        if isinstance(part, Faces) and (line := shared_identities(train, part)):
            logger.warning("%s: %s", name, line)
    for note in train.notes:
        logger.info(note)
    pairs = {name: _paired(part, config, name) for name, part in parts.items()}
    return FaceData(train, pairs, config, unlabelled, _hard(config, train))


def _paired(part: Pairs | Faces, config: Data, name: str) -> Pairs:
    if isinstance(part, Pairs):
        return part
    try:
        return make_pairs(part, config.pairs, seed=config.split_seed, folds=config.folds)
    except DataError as error:
        raise DataError(f"data.{name}: {error}") from None


def _train(config: Data, size: int | None) -> Faces:
    """What is trained on with identities; none where all there is are unlabelled faces."""
    if config.folder is not None:
        return read_folder(config.folder.train, size=size, bad=config.bad)
    if config.recordio is not None:
        return read_recordio(config.recordio.train, size=size, bad=config.bad)
    if config.hub is not None:
        return _hub(config, config.hub.train, size)
    return orl(size or 112) if config.sample is not None else Faces([], np.zeros(0, dtype=np.int64), [], size)


def _hub(config: Data, part: str, size: int | None) -> Faces:
    own = config.hub
    assert own is not None
    return read_hub(own.name, part, subset=own.subset, image=own.image, label=own.label, size=size, bad=config.bad)


def _verification(own: Verification, size: int | None) -> Pairs:
    return read_pairs(own.bin or own.pairs or "", own.folder, size=size)


def _hard(config: Data, train: Faces) -> Array | None:
    """Which images are hard, where the recipe's batches want to know."""
    own = config.batches
    if own is None or own.kind != "easy_hard" or (own.hard is None and own.below is None):
        return None
    if own.hard is not None:
        try:
            names = Path(own.hard).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.batches.hard: {own.hard} cannot be read: {error}.") from None
        ends = {name.strip() for name in names if name.strip()}
        found = np.array([_named(source.name, ends) for source in train.sources], dtype=bool)
    else:
        sides = [max(header_size(source, number)) for number, source in enumerate(train.sources)]
        found = np.array(sides) < (own.below or 0)
    if found.all() or not found.any():
        raise DataError(
            f"data.batches: {int(found.sum())} of {len(found)} images are hard: expected some of either kind."
        )
    return found


def _named(path: str, ends: set[str]) -> bool:
    """Whether a list has a file, by the end of its path."""
    parts = Path(path).parts
    return any("/".join(parts[-n:]) in ends for n in range(1, len(parts) + 1))


# ---- drawn faces


def _drawn(first: int, identities: int, images: int, hard: float, seed: int) -> Faces:
    pixels, labels = drawn_faces(identities, images, hard=hard, seed=seed, first=first)
    size = pixels.shape[-1]
    head = f"P6 {size} {size} 255\n".encode()
    kind = "hard" if hard else "easy"
    sources = [
        in_memory(f"drawn/{label}/{kind}-{number}", head + np.ascontiguousarray(image.transpose(1, 2, 0)).tobytes())
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True))
    ]
    return Faces(sources, labels - first, [f"drawn {n}" for n in range(first, first + identities)])


def _both(easy: Faces, hard: Faces) -> Faces:
    labels = np.concatenate([easy.labels, hard.labels])
    return Faces([*easy.sources, *hard.sources], labels, easy.identities)


def _procedural(config: Data, sample: Sample) -> FaceData:
    """People who are nobody: to train on, to validate on, and to test on, hard images apart from easy ones."""
    seed, count = config.split_seed, sample.identities
    easy = _drawn(0, count, sample.images, 0.0, seed)
    train = easy if sample.train_on == "easy" else _both(easy, _drawn(0, count, sample.images, sample.hard, seed))
    first, others = count, max(2, count // 3)
    validation = _both(*(_drawn(first, others, 12, hard, seed) for hard in (0.0, sample.hard)))
    tests = {
        name: _drawn(first + others, 2 * others, 12, hard, seed)
        for name, hard in (("test", 0.0), ("hard", sample.hard))
    }
    marks = np.arange(len(train)) >= len(easy)
    pairs = {name: _paired(part, config, name) for name, part in {"validation": validation, **tests}.items()}
    return FaceData(train, pairs, config, hard=marks)
