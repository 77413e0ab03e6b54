"""The quality table of segmentation: rows are recipes of as many steps, data is honest, the pair of the size said."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import quality_segmentation as table
from benchmarks import segmentation_data
from taskkd import recipes
from taskkd.segmentation.data import load
from taskkd.segmentation.models import build


def test_every_row_and_its_search_are_recipes_of_as_many_steps(tmp_path: Path) -> None:
    own = table.Job([0, 1], tmp_path)
    alone = own.recipe(None)
    assert alone.baseline.epochs == alone.training.epochs
    for row, way in table.ROWS.items():
        recipe = own.recipe(row)
        assert (recipe.student, recipe.training, recipe.data) == (alone.student, alone.training, alone.data)
        assert recipes.method_options(recipe)
        for key, values in way.search.items():
            for value in values:
                data = recipe.model_dump(by_alias=True)
                recipes.set_key(data, key, value)
                recipes.validate(data, key)
    assert set(table.FOUND) <= set(table.ROWS)
    assert own.recipe("soft_targets").method.model_extra == {"weight": 50.0}


def test_the_student_is_an_eighth_of_the_teacher_or_less() -> None:
    sizes = [
        sum(p.numel() for p in build({**c, "weights": None}, table.CLASSES).parameters())
        for c in (table.TEACHER, table.STUDENT)
    ]
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
    data = load(table.Job([0], tmp_path).recipe(None).data)
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
    text = table.markdown(table.Job([0, 1], Path()), {"alone": alone, "dist": found})
    assert "| DIST (Huang 2022) | 65.00 ± 0.00 | +5.00 ± 0.00 | gain | 30.00 ± 0.00 | +10.00 ± 0.00 |" in text
