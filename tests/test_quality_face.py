"""The quality tables of face recognition: rows are recipes of as many steps, and people are in one part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality_face as table
from taskkd import recipes
from taskkd.face.data import load
from taskkd.session import of_items


def steps(recipe: Any, data: Any) -> int:
    """How many optimiser steps its training has."""
    training = of_items(recipe.training, data.train)
    return int(len(data.train) // training.batch_size * training.epochs)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn faces without drawing them: black ones."""
    import numpy as np

    def black(identities: int, images: int, *, first: int = 0, **_: Any) -> Any:
        labels = np.repeat(np.arange(first, first + identities), images)
        return np.zeros((len(labels), 3, 2, 2), np.uint8), labels

    monkeypatch.setattr("taskkd.face.data.drawn_faces", black)


@pytest.mark.parametrize("kind", ["drawn", "ddl"])
def test_every_row_and_its_search_are_recipes_of_as_many_steps(kind: str, tmp_path: Path, few: None) -> None:
    own = table.TABLES[kind](seeds=[0, 1], out=tmp_path)
    alone = own.recipe(None)
    assert alone.baseline.epochs == alone.training.epochs
    wanted = steps(alone, load(alone.data))
    for row, way in own.rows.items():
        recipe = own.recipe(row)
        assert recipe.student == alone.student
        # two batches more or less, which a last one of half the size makes
        assert steps(recipe, load(recipe.data)) == pytest.approx(wanted, abs=2), row
        if recipe.data.batches is None:
            rate = {"learning_rate": alone.training.learning_rate}  # which a search may have found
            assert (recipe.training.model_copy(update=rate), recipe.data) == (alone.training, alone.data)
        if recipe.method is None:
            assert recipe.baseline.epochs == recipe.training.epochs
        else:
            assert recipes.method_options(recipe)
        assert way.against is None or own.recipe(way.against).data == recipe.data
        for key, values in way.search.items():
            for value in values:
                data = recipe.model_dump(by_alias=True)
                recipes.set_key(data, key, value)
                recipes.validate(data, key)
    assert set(own.found) <= set(own.rows)


def test_rows_of_the_table_of_orl_are_recipes(tmp_path: Path) -> None:
    own = table.Orl(seeds=[0], out=tmp_path)
    alone = own.recipe(None)
    assert alone.data.validation_size + alone.data.test_size < 40
    for row, way in own.rows.items():
        recipe = own.recipe(row)
        assert (recipe.training.epochs == alone.training.epochs) == ("training.epochs" not in way.changes)


@pytest.mark.parametrize(("kind", "times"), [("drawn", 7), ("orl", 7)])
def test_the_student_is_several_times_smaller_than_the_teacher(kind: str, times: float, tmp_path: Path) -> None:
    own = table.TABLES[kind](seeds=[0], out=tmp_path)
    large, small = map(own.parameters, own.networks)
    assert large >= times * small


def test_people_are_in_one_part_and_hard_images_apart_from_easy_ones(tmp_path: Path, few: None) -> None:
    data = load(table.Drawn(seeds=[0], out=tmp_path).recipe(None).data)
    assert len(data.identities) == 150
    people = [set(data.identities)]
    for name in ("validation", "test", "hard"):
        found = data.pairs[name]
        assert len(found) == 3000 and found.same.sum() == 1500
        people.append(set(found.faces.identities))
    assert not people[0] & people[1] and not people[1] & people[2] and not people[0] & people[2]
    assert people[2] == people[3]  # easy and hard images of the same people
    assert list(data.further_tests) == ["hard"]
    assert data.hard is not None and data.hard.mean() == 0.5


def test_both_sides_of_the_table_of_ddl_see_the_same_batches(tmp_path: Path) -> None:
    own = table.HardFaces(seeds=[0], out=tmp_path)
    alone, ddl = own.recipe(None).data.batches, own.recipe("ddl").data.batches
    assert alone.label_pairs and not ddl.label_pairs
    assert (alone.identity, alone.pairs) == (ddl.identity, ddl.pairs)


def test_the_page_has_a_line_for_every_row(tmp_path: Path) -> None:
    own = table.Drawn(seeds=[0, 1], out=tmp_path)
    test = {"accuracy": 0.95, "hard_accuracy": 0.8, "hard_tar@1e-02": 0.2}
    run = {"test": test, "steps": 184, "setting": "0.1"}
    alone = {
        "metric": "accuracy",
        "seeds": [0, 1],
        "teacher": run,
        "data": "train 3000 images",
        "alone": {"0": run, "1": run},
    }
    better = {**run, "test": {"accuracy": 0.98, "hard_accuracy": 0.88, "hard_tar@1e-02": 0.4}}
    found: dict[str, Any] = {}
    for row, way in own.rows.items():
        side = "alone" if way.method is None else "distilled"
        outcomes = {"0": better, "1": better}
        found[row] = {
            "metric": "accuracy",
            "seeds": [0, 1],
            side: outcomes if side == "alone" else {"distilled": outcomes},
        }
    text = own.markdown({"alone": alone, **found})
    for way in own.rows.values():
        assert f"| {way.title} " in text, way.title
    line = "| 98.00 ± 0.00 | +3.00 ± 0.00 | gain | 88.00 ± 0.00 | +8.00 ± 0.00 | 40.00 ± 0.00 | +20.00 ± 0.00 |"
    assert f"| ProxylessKD (Shi 2020) {line}" in text
    assert "| EKD (Huang 2022), against that | 98.00 ± 0.00 | +0.00 ± 0.00 |" in text
