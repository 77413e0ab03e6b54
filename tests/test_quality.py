"""The quality tables: every row is a recipe that can be run, of as many steps as the student alone has."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from taskkd import recipes


def job(name: str, folder: Path, layers: int = 2) -> quality.Job:
    return quality.Job(name, layers, [0, 1], folder)


@pytest.mark.parametrize("name", quality.TABLES)
def test_every_row_is_a_recipe_of_as_many_steps(name: str, tmp_path: Path) -> None:
    table = quality.TABLES[name]
    alone = job(name, tmp_path).recipe(None)
    assert alone.baseline.epochs == table.epochs
    for row, way in table.rows.items():
        recipe = job(name, tmp_path).recipe(row)
        options = recipes.method_options(recipe)
        epochs = recipe.training.epochs + (options[way.first[0]] if way.first else 0)
        samples = table.labelled + recipe.data.unlabelled_size
        assert epochs * samples == pytest.approx(table.epochs * table.labelled)
        assert recipe.student == alone.student
        assert (recipe.data.unlabelled_size > 0) == (way.unlabelled is not None)


@pytest.mark.parametrize("layers", quality.LAYERS)
@pytest.mark.parametrize("name", quality.TABLES)
def test_methods_have_a_rate_that_the_student_alone_tries(name: str, layers: int, tmp_path: Path) -> None:
    table = quality.TABLES[name]
    tried = job(name, tmp_path, layers).recipe(None).baseline.learning_rates
    assert tried == table.alone[layers]
    for row in table.rows:
        rate = job(name, tmp_path, layers).recipe(row).training.learning_rate
        assert rate == table.rates[layers] and rate in tried


def test_banking77_is_cut_without_texts_on_both_sides(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "data"
    source.mkdir()
    rows = [{"text": f"question {i}", "category": str(i % 3)} for i in range(1100)]
    for name, part in (
        ("banking77_train", [*rows, {"text": "Question  7", "category": "1"}, {"text": "asked", "category": "0"}]),
        ("banking77_test", [{"text": "Asked", "category": "0"}]),
        ("clinc150", [{"text": "play music", "label": "music"}, {"text": "question 5", "label": "x"}]),
    ):
        with gzip.open(source / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(r) + "\n" for r in part)
    quality.write_banking77(source, folder, 60)
    parts = {p.stem: [json.loads(line)["text"] for line in p.open()] for p in folder.iterdir()}
    sizes = {name: len(texts) for name, texts in parts.items()}
    assert sizes == {
        "banking77_train": 60, "banking77_validation": 1000, "banking77_rest": 40, "banking77_test": 1, "clinc150": 1,
    }  # fmt: skip
    texts = [quality.plain(t) for part in parts.values() for t in part]
    assert len(texts) == len(set(texts))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"banking77_test.jsonl.gz is missing: name the folder with --source"):
        quality.write_banking77(tmp_path, tmp_path / "data", 60)


def report(part: str, values: list[float], **more: Any) -> dict[str, Any]:
    runs = {str(s): {"test": {"accuracy": v}, "setting": "0.0003", "steps": 600} for s, v in enumerate(values)}
    grouped = runs if part == "alone" else {"distilled": runs}
    return {"metric": "accuracy", "seeds": [0, 1], part: grouped, **more}


def test_a_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    page, own = tmp_path / "results.md", job("movie", tmp_path)
    first = report("alone", [0.7, 0.72], teacher={"test": {"accuracy": 0.8}}, data="1600 labelled, 0 unlabelled")
    reports = {"alone": first, "logits": report("distilled", [0.75, 0.77]), "lrc_bert": report("distilled", [0.7, 0.6])}
    page.write_text("# Results\n\n## NLP\n\nBy hand.\n")
    quality.publish(own, quality.markdown(own, reports), page)
    before = page.read_text()
    assert "| student alone (learning rates 0.0003, 0.0003) | 71.00 ± 1.00 | | |" in before
    assert "| logits (Hinton 2015) | 76.00 ± 1.00 | +5.00 ± 0.00 | gain |" in before
    assert "| LRC-BERT (Fu 2021) | 65.00 ± 5.00 | -6.00 ± 6.00 | no difference above 2 s.e. |" in before
    quality.publish(own, quality.markdown(own, reports | {"logits": report("distilled", [0.71, 0.72])}), page)
    after = page.read_text()
    assert after.count("<!-- quality.py nlp --data movie --student-layers 2 -->") == 1
    assert "By hand." in after and "76.00" not in after
