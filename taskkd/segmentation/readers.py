"""Readers of images and masks: folders, Cityscapes, ADE20K, Pascal VOC, CamVid, HF data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from taskkd.errors import DataError, nearest
from taskkd.files import listed
from taskkd.hub import check_columns, images_of, load_split
from taskkd.images import Source, existing_folder, in_file
from taskkd.problems import Problems
from taskkd.segmentation.labels import ADE20K, CAMVID, CITYSCAPES, VOC, Labels, labels_of
from taskkd.segmentation.records import Annotations, Bad, Record, checked

__all__ = [
    "read_ade20k",
    "read_camvid",
    "read_cityscapes",
    "read_folder",
    "read_hub",
    "read_images",
    "read_voc",
]

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MASKS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".ppm")
Pairs = Iterator[tuple[Path, Path | None]]


def read_folder(
    images: str | Path,
    masks: str | Path | None,
    *,
    classes: Sequence[str] | Mapping[int | str, str] | str | Labels = (),
    ignore: Sequence[int | str] = (),
    bad: Bad = "error",
) -> Annotations:
    """Read a folder of images and one of masks with the same names (and any suffix of images).

    Args:
        images: searched with its folders within; `a/b.jpg` belongs to `a/b.png` of the masks.
        masks: None: the images have no labels.
        classes, ignore: see `labels_of`.
        bad: "error" stops at a missing mask, a file that is no image, sizes that differ or unknown values (those that
            need a look at the pixels when they are read); "skip" leaves such images out and counts them, which takes
            one pass over all of them.

    Raises:
        DataError: a folder is missing or empty, or as `bad` says; with the file.
    """  # fmt: skip
    folder = existing_folder(images)
    labels = classes if isinstance(classes, Labels) else _labels(classes, ignore, masks, str(images))
    if masks is None:
        return _annotations(str(folder), ((i, None) for i in _images(folder)), labels, bad)
    known = {f.relative_to(masks).with_suffix(""): f for f in _files(existing_folder(masks), MASKS)}

    def mask(image: Path) -> Path:
        name = image.relative_to(folder).with_suffix("")
        return known.get(name, Path(masks) / name.with_suffix(".png"))

    return _annotations(str(folder), ((i, mask(i)) for i in _images(folder)), labels, bad)


def read_images(folders: str | Path | Sequence[str | Path], *, bad: Bad = "error") -> Annotations:
    """Read images without labels.

    Args:
        folders: one or several, searched with the folders within.
        bad: as in `read_folder`.

    Raises:
        DataError: a folder is missing or empty.
    """
    names = [folders] if isinstance(folders, str | Path) else list(folders)
    pairs = ((image, None) for name in names for image in _images(existing_folder(name)))
    return _annotations(" and ".join(map(str, names)), pairs, Labels((), ()), bad)


def read_cityscapes(root: str | Path, part: str = "train", *, labelled: bool = True, bad: Bad = "error") -> Annotations:
    """Read Cityscapes (Cordts et al. 2016): its 34 labelIds become the 19 classes of its benchmark, else 255.

    Args:
        root: the folder with `leftImg8bit` and `gtFine` (or `gtCoarse`, for a part that `gtFine` lacks).
        part: "train", "val", "train_extra", ...
        labelled: False: masks are not looked for.
        bad: as in `read_folder`.

    Raises:
        DataError: as `read_folder`.
    """
    folder = _part(Path(root) / "leftImg8bit", part)
    fine = Path(root) / "gtFine" / part
    kind = "gtFine" if fine.is_dir() or not (Path(root) / "gtCoarse" / part).is_dir() else "gtCoarse"

    def pairs() -> Pairs:
        for image in _images(folder):
            name = image.name.replace("_leftImg8bit", f"_{kind}_labelIds")
            yield image, Path(root) / kind / part / image.relative_to(folder).parent / name if labelled else None

    return _annotations(str(folder), pairs(), CITYSCAPES, bad)


def read_ade20k(root: str | Path, part: str = "training", *, labelled: bool = True, bad: Bad = "error") -> Annotations:
    """Read ADE20K's scene parsing benchmark (Zhou et al. 2017): label - 1, and 0, anything else, is ignored.

    Args:
        root: ADEChallengeData2016, with `images` and `annotations`.
        part: "training" or "validation".
        labelled, bad: as in `read_cityscapes`.

    Raises:
        DataError: as `read_folder`.
    """  # fmt: skip
    folder = _part(Path(root) / "images", part)
    masks = Path(root) / "annotations" / part
    pairs = ((image, masks / f"{image.stem}.png" if labelled else None) for image in _images(folder))
    return _annotations(str(folder), pairs, ADE20K, bad)


def read_voc(
    root: str | Path, part: str = "train", *, masks: str | None = None, labelled: bool = True, bad: Bad = "error"
) -> Annotations:
    """Read Pascal VOC (Everingham et al. 2010), with or without the masks of SBD (Hariharan et al. 2011).

    Args:
        root: VOCdevkit/VOC2012, with `JPEGImages` and `ImageSets/Segmentation`.
        part: the list of images: "train", "val", "trainval", "train_aug", ...; a line is a name, or the paths of image
            and mask (of which the name is taken).
        masks: the folder of the masks; default: SegmentationClassAug for a list with "aug" in its name, else
            SegmentationClass. Masks are palette or grey PNG.
        labelled, bad: as in `read_cityscapes`.

    Raises:
        DataError: as `read_folder`.
    """
    folder = existing_folder(root)
    own = folder / (masks or ("SegmentationClassAug" if "aug" in part else "SegmentationClass"))
    pairs = (
        (folder / "JPEGImages" / f"{name}.jpg", own / f"{name}.png" if labelled else None)
        for name in _listed(folder / "ImageSets" / "Segmentation", part)
    )
    return _annotations(f"{folder}, {part}", pairs, VOC, bad)


def read_camvid(root: str | Path, part: str = "train", *, labelled: bool = True, bad: Bad = "error") -> Annotations:
    """Read CamVid (Brostow et al. 2008) as SegNet has divided it: folders `train` and `trainannot`, and so on.

    Args:
        root: the folder of these.
        part: "train", "val" or "test".
        labelled, bad: as in `read_cityscapes`.

    Raises:
        DataError: as `read_folder`.
    """  # fmt: skip
    masks = None if not labelled else Path(root) / f"{part}annot"
    return read_folder(_part(Path(root), part), masks, classes=CAMVID, bad=bad)


def read_hub(
    data: Any,
    split: str | None = None,
    *,
    subset: str | None = None,
    image: str = "image",
    annotation: str | None = "annotation",
    classes: Sequence[str] | Mapping[int | str, str] | str = (),
    ignore: Sequence[int | str] = (),
    bad: Bad = "error",
) -> Annotations:
    """Read a `datasets.Dataset`.

    Args:
        data: the data set, or the hub name or local folder of one.
        split, subset: of a named one.
        image: the column of images.
        annotation: the column of masks; None: the images have no labels.
        classes, ignore: see `labels_of`.
        bad: as in `read_folder`.

    Raises:
        DataError: it cannot be loaded, or a column is missing or holds no images; else as `read_folder`.
    """
    table = load_split(data, split, subset) if isinstance(data, str | Path) else data
    where = f"{data}, {split}" if isinstance(data, str | Path) else "data set"
    columns = (image,) if annotation is None else (image, annotation)
    check_columns(table, where, columns, columns)
    labels = _labels(classes, ignore, annotation, where)
    sources = images_of(table, image, where)
    masks: list[Source | None] = [None] * len(sources)
    if annotation is not None:
        masks = list(images_of(table, annotation, f"{where}, column {annotation}"))
    records = [Record(s, m, labels, number) for number, (s, m) in enumerate(zip(sources, masks, strict=True), 1)]
    problems = Problems(where, bad)
    return Annotations(checked(records, problems), list(labels.classes), problems.notes())


# ---- files


def _labels(classes: Any, ignore: Sequence[int | str], masks: Any, where: str) -> Labels:
    return Labels((), ()) if masks is None and not classes else labels_of(classes, ignore, where)


def _annotations(where: str, pairs: Pairs | Any, labels: Labels, bad: Bad) -> Annotations:
    problems = Problems(where, bad)
    records = []
    for number, (image, mask) in enumerate(pairs, 1):
        if missing := _missing(image, mask):
            problems.left_out("images", missing)
        else:
            records.append(Record(in_file(image), None if mask is None else in_file(mask), labels, number))
    return Annotations(checked(records, problems), list(labels.classes), problems.notes())


def _missing(image: Path, mask: Path | None) -> str:
    if not image.is_file():
        return f"{image}: no such image"
    if mask is not None and not mask.is_file():
        return f"{image}: its mask {mask} is missing"
    return ""


def _part(folder: Path, part: str) -> Path:
    if not (folder / part).is_dir():
        known = sorted(f.name for f in existing_folder(folder).iterdir() if f.is_dir())
        raise DataError(f"{folder}: no folder {part}{nearest(part, known)}; it has {', '.join(known)}.")
    return folder / part


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in suffixes and f.name[0] != ".")


def _images(folder: Path) -> list[Path]:
    # `taskkd predict` writes <name>.mask.png beside an image
    found = [f for f in _files(folder, IMAGES) if not f.name.endswith(".mask.png")]
    if not found:
        raise DataError(f"{folder}: there are no images ({', '.join(IMAGES)}).")
    return found


def _listed(lists: Path, part: str) -> list[str]:
    file = lists / f"{part}.txt"
    if not file.is_file():
        known = sorted(f.stem for f in existing_folder(lists).glob("*.txt"))
        raise DataError(f"{lists}: no list {part}.txt{nearest(part, known)}; it has {', '.join(known)}.")
    return [Path(line.split()[0]).stem for line in listed(file)]


#: readers of the layouts that need no more than a folder and a part
LAYOUTS: dict[str, Callable[..., Annotations]] = {
    "cityscapes": read_cityscapes,
    "ade20k": read_ade20k,
    "camvid": read_camvid,
}
