"""How the values or colours of masks become labels 0..K-1, and 255 for what is ignored."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from taskkd.errors import DataError, nearest
from taskkd.images import Source

__all__ = ["ADE20K", "CAMVID", "CITYSCAPES", "IGNORE", "KNOWN", "VOC", "Labels", "labels_of"]

Array: TypeAlias = npt.NDArray[Any]
#: the label of pixels that count for nothing
IGNORE = 255
UNKNOWN = -2


@dataclass(frozen=True)
class Labels:
    """What the numbers or colours in masks mean.

    Args:
        classes: names; label k is `classes[k]`.
        values: label (or 255) by value; with `colours`, by red * 65536 + green * 256 + blue.
        colours: masks are read as colours instead of numbers.
    """

    classes: tuple[str, ...]
    values: tuple[tuple[int, int], ...]
    colours: bool = False

    def decode(self, source: Source) -> Array:
        """(H, W) uint8 labels of a mask: 0..K-1, and 255 where it is ignored.

        Raises:
            DataError: the file is missing or damaged, or has a value that is no class and not ignored.
        """
        codes = _codes(source, self.colours)
        if codes.dtype == np.uint8:  # a table of all values there can be
            found = self._labels(np.arange(256))[codes]
        else:
            found = self._labels(codes)
        unknown = found == UNKNOWN
        if unknown.any():
            y, x = (int(v[0]) for v in np.nonzero(unknown))
            raise DataError(f"{source.name}: {self._sentence(int(codes[y, x]), x, y, int(unknown.sum()))}")
        labels: Array = found.astype(np.uint8)
        return labels

    def _labels(self, codes: Array) -> Array:
        keys, labels = np.array(sorted(self.values), np.int64).T
        places = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
        found: Array = np.where(keys[places] == codes, labels[places].astype(np.int16), np.int16(UNKNOWN))
        return found

    def _sentence(self, code: int, x: int, y: int, count: int) -> str:
        shown = f"the colour #{code:06x}" if self.colours else f"the value {code}"
        known = ", ".join(f"#{k:06x}" if self.colours else str(k) for k, _ in self.values[:24])
        more = ", ..." if len(self.values) > 24 else ""
        return (
            f"{shown} at x {x}, y {y} (and {count - 1} more unknown pixels) is neither a class nor ignored; "
            f"known: {known}{more}."
        )


def _codes(source: Source, colours: bool) -> Array:
    """(H, W) numbers of a mask."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source.read())) as image:
            if colours:
                red, green, blue = np.asarray(image.convert("RGB")).astype(np.int64).transpose(2, 0, 1)
                codes: Array = red * 65536 + green * 256 + blue
                return codes
            mode, values = image.mode, np.asarray(image)
    except FileNotFoundError:
        raise DataError(f"{source.name}: no such mask.") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others, by format
        why = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{source.name}: the mask cannot be read: {why}.") from None
    if values.ndim == 3:
        bands = values[..., : 1 if mode in ("LA", "PA") else 3]
        if not (bands == bands[..., :1]).all():
            raise DataError(
                f"{source.name}: the mask has colours, but classes are given by number; give them by colour, "
                "as {'#804080': road}."
            )
        values = bands[..., 0]
    if values.dtype.kind == "f":
        raise DataError(f"{source.name}: the mask holds floating point numbers, expected whole ones or colours.")
    return values.astype(np.uint8) if values.dtype == bool else values


def labels_of(
    classes: Sequence[str] | Mapping[int | str, str] | str, ignore: Sequence[int | str] = (), where: str = "data"
) -> Labels:
    """What a recipe says of masks.

    Args:
        classes: names in the order of the values 0, 1, ...; or names by value (`{0: background, 255: nucleus}`) or by
            colour (`{"#804080": road}`), in the order that the labels shall have (values of the same name are one
            class); or the name of a known coding: "cityscapes" (labelIds, as GTA5 has them, too), "ade20k", "voc",
            "camvid".
        ignore: further values or colours that count for nothing. 255 and -1 always do where they are no class.
        where: for errors.

    Raises:
        DataError: an unknown coding, a value that is none, numbers and colours together, or no class.
    """
    if isinstance(classes, str):
        if classes not in KNOWN:
            known = ", ".join(KNOWN)
            raise DataError(f"{where}: no coding of classes {classes!r}{nearest(classes, KNOWN)}; known: {known}.")
        return _with_ignored(KNOWN[classes], {_code(v, where)[0]: IGNORE for v in ignore})
    pairs = list(classes.items()) if isinstance(classes, Mapping) else list(enumerate(classes))
    coded = [(*_code(value, where), str(name)) for value, name in pairs]
    ignored = [_code(value, where) for value in ignore]
    kinds = {colour for _, colour, _ in coded} | {colour for _, colour in ignored}
    if len(kinds) != 1 or not coded:
        raise DataError(f"{where}: classes and ignore are all numbers or all colours, and there is a class.")
    names = tuple(dict.fromkeys(name for _, _, name in coded))
    if len(names) > IGNORE:
        raise DataError(f"{where}: {len(names)} classes; there may be {IGNORE}.")
    if twice := {value for value, _ in ignored} & {value for value, _, _ in coded}:
        raise DataError(f"{where}: {min(twice)} is a class and ignored.")
    values = tuple((value, names.index(name)) for value, _, name in coded)
    return _with_ignored(Labels(names, values, kinds.pop()), {value: IGNORE for value, _ in ignored})


def _code(value: int | str, where: str) -> tuple[int, bool]:
    """The number of a value or colour, and whether it is a colour."""
    text = str(value).strip()
    try:
        if text.startswith("#") and len(text) == 7:
            return int(text[1:], 16), True
        return int(text), False
    except ValueError:
        raise DataError(f"{where}: {value!r} is neither a value of a mask nor a colour as '#804080'.") from None


def _with_ignored(labels: Labels, ignored: Mapping[int, int]) -> Labels:
    """Labels with further ignored values, which may be what was a class."""
    own = {} if labels.colours else {-1: IGNORE, IGNORE: IGNORE}
    return Labels(labels.classes, tuple((own | dict(labels.values) | dict(ignored)).items()), labels.colours)


def _named(names: str, values: Mapping[int, int] | None = None) -> Labels:
    classes = tuple(name.strip() for name in names.split(","))
    return _with_ignored(Labels(classes, tuple((values or {k: k for k in range(len(classes))}).items())), {})


_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
#: labelIds -1..34 -> the 19 trainIds
CITYSCAPES = _named(
    "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, "
    "rider, car, truck, bus, train, motorcycle, bicycle",
    dict.fromkeys(range(35), IGNORE) | {value: label for label, value in enumerate(_CITYSCAPES_IDS)},
)
#: 1..150 -> 0..149; 0 is ignored
ADE20K = _named(
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, "
    "table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, "
    "armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, "
    "chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, "
    "case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, "
    "book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, "
    "hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, "
    "dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, "
    "fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, "
    "minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, "
    "screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, "
    "monitor, bulletin board, shower, radiator, glass, clock, flag",
    {0: IGNORE} | {value: value - 1 for value in range(1, 151)},
)
#: 0..20; 255, the rims of objects, is ignored
VOC = _named(
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, "
    "motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
)
#: the 11 classes of SegNet; 11 is ignored
CAMVID = _named(
    "sky, building, pole, road, pavement, tree, sign symbol, fence, car, pedestrian, bicyclist",
    {k: k for k in range(11)} | {11: IGNORE},
)
KNOWN = {"cityscapes": CITYSCAPES, "ade20k": ADE20K, "voc": VOC, "camvid": CAMVID}
