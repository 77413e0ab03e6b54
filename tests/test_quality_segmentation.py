"""The quality table of segmentation: rows are recipes of as many steps, data is honest, the pair of the size said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import quality, segmentation_data
from benchmarks.quality_segmentation import ROWS, Nuclei
from taskkd import recipes
from taskkd.segmentation.data import load


def test_every_row_and_its_search_are_recipes_of_as_many_steps(tmp_path: Path) -> None:
    own = Nuclei([0, 1], tmp_path)
    alone = own.recipe(None)
    assert alone.baseline.epochs == alone.training.epochs
    for row, way in ROWS.items():
        recipe = own.recipe(row)
        assert (recipe.student, recipe.training, recipe.data) == (alone.student, alone.training, alone.data)
        assert recipes.method_options(recipe)
        for key, values in way.search.items():
            for value in values:
                data = recipe.model_dump(by_alias=True)
                recipes.set_key(data, key, value)
                recipes.validate(data, key)
    assert set(own.found) <= set(ROWS)
    assert own.recipe("soft_targets").method.model_extra == {"weight": 50.0}


def test_the_student_is_an_eighth_of_the_teacher_or_less() -> None:
    own = Nuclei([0], Path())
    sizes = [own.parameters(network) for network in own.networks]
    assert sizes[0] >= 8 * sizes[1]


def test_images_are_in_one_part_and_masks_have_three_classes(tmp_path: Path) -> None:
    instances = np.zeros((9, 256, 256), np.uint16)
    instances[:, 30:60, 50:80], instances[:, 60:90, 50:80] = 1, 2
    images = np.arange(9, dtype=np.uint8)[:, None, None].repeat(256, 1).repeat(256, 2)
    (tmp_path / "source").mkdir()
    np.savez(
        tmp_path / "source" / "dsb2018_gray256.npz",
        images=images,
        instances=instances,
        ids=np.array([str(i) for i in range(9)]),
    )
    out = tmp_path / "data" / "segmentation-nuclei"
    segmentation_data.write_nuclei(tmp_path / "source", out, (4, 2, 3))
    data = load(Nuclei([0], tmp_path).recipe(None).data)
    greys = []
    for part, count in (("train", 4), ("validation", 2), ("test", 3)):
        samples = [data.annotations[part].records[i] for i in range(count)]
        assert len(data.annotations[part].records) == count
        greys += [data_of(record) for record in samples]
    assert sorted(greys) == list(range(9))
    labels = data.test[0]["labels"]
    assert set(labels.unique().tolist()) == {0, 1, 2}
    assert labels[60, 60] == 2  # between two nuclei that touch
    assert (labels[40, 60], labels[100, 100]) == (1, 0)


def data_of(record: object) -> int:
    from taskkd.images import decode

    return int(decode(record.source, 0)[0, 0, 0])  # type: ignore[attr-defined]


def test_the_page_has_a_line_for_every_row() -> None:
    run = {"test": {"mIoU": 0.6, "IoU/border": 0.2}, "steps": 200, "setting": "0.004"}
    alone = {"metric": "mIoU", "seeds": [0, 1], "teacher": run, "data": "train 4 images", "alone": {"0": run, "1": run}}
    better = {**run, "test": {"mIoU": 0.65, "IoU/border": 0.3}}
    found = {"metric": "mIoU", "seeds": [0, 1], "distilled": {"distilled": {"0": better, "1": better}}}
    text = Nuclei([0, 1], Path()).markdown({"alone": alone, "dist": found})
    assert "| DIST (Huang 2022) | 65.00 ± 0.00 | +5.00 ± 0.00 | gain | 30.00 ± 0.00 | +10.00 ± 0.00 |" in text


#: of the runs that the page tells of: the teacher, then for each row the mean IoU and the IoU of the border, by seed
TEACHER = {"mIoU": 0.6812940541968415, "IoU/border": 0.3808707165953818}
MEASURED = {
    "alone": ([0.595646, 0.592952, 0.602805], [0.220801, 0.211962, 0.218978]),
    "soft_targets": ([0.615576, 0.642914, 0.635522], [0.255076, 0.321425, 0.294609]),
    "channel_wise": ([0.588649, 0.594442, 0.585491], [0.184242, 0.202011, 0.180496]),
    "structured": ([0.62063, 0.626676, 0.626833], [0.27963, 0.278225, 0.28375]),
    "ifvd": ([0.594286, 0.610127, 0.608502], [0.209905, 0.242071, 0.233627]),
    "cirkd": ([0.598903, 0.59471, 0.614861], [0.224309, 0.223341, 0.256842]),
    "dist": ([0.632451, 0.63559, 0.632284], [0.299811, 0.310668, 0.294172]),
}
DATA = "train 160 images; validation 54 images; test 120 images; 3 classes (background, nucleus, border)"


def report(name: str) -> dict[str, Any]:
    runs = {
        str(seed): {"test": {"mIoU": mean, "IoU/border": border}, "steps": 200, "setting": rate}
        for seed, mean, border, rate in zip(range(3), *MEASURED[name], ("0.008", "0.004", "0.008"), strict=True)
    }
    group = {"alone": runs} if name == "alone" else {"distilled": {"distilled": runs}}
    return {"metric": "mIoU", "seeds": [0, 1, 2], "teacher": {"test": TEACHER}, "data": DATA, **group}


def test_the_page_is_what_the_runs_gave(tmp_path: Path) -> None:
    """To the letter: the block in docs/results.md; whoever runs the table anew brings the numbers above along."""
    own, page = Nuclei([0, 1, 2], tmp_path), tmp_path / "results.md"
    quality.publish(own, own.markdown({name: report(name) for name in MEASURED}), page, heading=own.heading)
    block = page.read_text(encoding="utf-8").partition("## Segmentation\n\n")[2]
    assert block.startswith("<!-- quality.py segmentation -->") and "| DIST (Huang 2022) | 63.34" in block
    assert block in quality.RESULTS.read_text(encoding="utf-8")
    assert own.folder == tmp_path / "segmentation-nuclei"  # where runs of before are found
