"""GLUE as a source of data, read from a small copy in the layout of the hub's data set."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from taskkd import recipes
from taskkd.errors import DataError, RecipeError
from taskkd.nlp.glue import GLUE_TASKS, Glue
from taskkd.nlp.task import TASK
from tests import tiny
from tests.nlp import glue_tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    tiny.save_teacher(folder / "teacher")
    glue_tree.write(folder / "glue")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def recipe(folder: Path, task: str, *overrides: str) -> Any:
    text = {
        "schema": 1,
        "task": "nlp",
        "data": {"glue": {"task": task, "path": str(folder / "glue")}, "max_length": 32, "validation_size": 12},
        "teacher": {"model": str(folder / "teacher"), "finetune": {}},
        "student": {"layers": [0, 2]},
        "method": {"name": "soft_targets"},
    }
    return recipes.validate(text, "test", None, recipes.parse_overrides(overrides))


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_every_task_is_read(task: str, folder: Path) -> None:
    loaded, own = recipe(folder, task), GLUE_TASKS[task]
    data = TASK.load(loaded)
    assert (len(data.train), len(data.validation), len(data.test)) == (28, 12, 16)
    assert data.labels == list(own.labels)
    assert loaded.data.type == ("classification" if own.labels else "regression")
    # Every label is the number that GLUE gives it: train and validation are one split, shuffled; test is in its order.
    given = datasets.load_dataset(str(folder / "glue"), task, split=own.test)
    assert list(data.test["labels"]) == pytest.approx(list(given["label"]))
    assert -1 not in data.test["labels"]
    assert TASK.main_metric(data) == own.metric
    pairs = not isinstance(own.text, str)
    separators = [row.count(3) for row in data.train["input_ids"]]
    assert set(separators) == {2 if pairs else 1}
    text = data.summary()
    assert "GLUE's own test labels are hidden: test is its validation set, validation is held out of its train" in text


def test_mismatched_text_is_a_second_test_set(folder: Path) -> None:
    data = TASK.load(recipe(folder, "mnli"))
    assert len(data.further_tests["mismatched"]) == 10
    assert "16 test, 10 mismatched test" in data.summary()
    assert set(data.mismatched["id"]).isdisjoint(data.test["id"])
    given = datasets.load_dataset(str(folder / "glue"), "mnli", split="validation_mismatched")
    assert list(data.mismatched["labels"]) == list(given["label"])
    assert TASK.load(recipe(folder, "rte")).further_tests == {}


def test_a_copy_without_label_names_has_numbers(tmp_path: Path) -> None:
    (tmp_path / "rte").mkdir()
    for split, labels in (("train", [0, 1, -1, 0]), ("validation", [1, 0])):
        texts = [f"text {i}" for i in range(len(labels))]
        table = datasets.Dataset.from_dict({"sentence1": texts, "sentence2": texts, "label": labels})
        table.to_parquet(tmp_path / "rte" / f"{split}.parquet")
    files = "".join(f"  - split: {s}\n    path: rte/{s}.parquet\n" for s in ("train", "validation"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: rte\n  data_files:\n{files}---\n")
    splits = Glue(task="rte", path=str(tmp_path)).read()
    assert [row.label for row in splits.train] == ["entailment", "not_entailment", None, "entailment"]
    assert [row.label for row in splits.test] == ["not_entailment", "entailment"]
    with pytest.raises(DataError, match=r"row 3: label 2 is none of 0 to 1"):
        GLUE_TASKS["rte"].row({"sentence1": "a", "sentence2": "b", "label": 2}, ["sentence1"], "label", "row 3")


def test_what_a_task_decides_cannot_be_other(folder: Path) -> None:
    with pytest.raises(RecipeError, match="type is 'regression' in GLUE's stsb, got 'classification'; leave it out"):
        recipe(folder, "stsb", "data.type=classification")
    with pytest.raises(RecipeError, match=r"text is 'sentence' in GLUE's sst2, got 'text'"):
        recipe(folder, "sst2", "data.text=text")
    with pytest.raises(RecipeError, match="exactly one of files, sample, hub and glue"):
        recipe(folder, "sst2", "data.files.train=a.csv")
    with pytest.raises(DataError, match="cannot be loaded"):
        TASK.load(recipe(folder, "sst2", f"data.glue.path={folder}/nothing"))


def test_lengths_and_sizes_unless_the_recipe_says_others() -> None:
    def data(task: str, **own: Any) -> Any:
        text = {"data": {"glue": {"task": task}, **own}, "teacher": {"model": "x"}, "student": {"layers": [0]}}
        return recipes.validate({"schema": 1, "task": "nlp", **text}, "test").data

    assert (data("sst2").max_length, data("rte").max_length) == (64, 128)
    assert data("sst2", max_length=128).max_length == 128
    assert (data("rte").validation_size, data("qqp").validation_size) == (0.1, 5000)
    assert (data("mrpc").metric, data("mrpc", metric="accuracy").metric) == ("binary_f1", "accuracy")


# ---- the metric that models are selected by


@pytest.mark.parametrize(
    ("task", "metric", "sentence"),
    [
        ("sst2", "acuracy", r"by 'acuracy', there is none \(did you mean 'accuracy'\?\); choose of accuracy, f1, bin"),
        ("mnli", "binary_f1", r"by 'binary_f1', there is none.*; choose of accuracy, f1, mcc"),
        ("stsb", "rmse", r"by 'rmse', less of it is better; choose of pearson, spearman"),
    ],
)
def test_a_metric_that_cannot_select_is_a_sentence(task: str, metric: str, sentence: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        TASK.load(recipe(folder, task, f"data.metric={metric}"))


def test_chance_is_that_of_the_chosen_metric(folder: Path) -> None:
    def chance(task: str, *overrides: str) -> tuple[float, Any]:
        data = TASK.load(recipe(folder, task, *overrides))
        return TASK.chance(data), data.validation["labels"]

    found, labels = chance("mrpc")
    share = sum(labels) / len(labels)
    assert found == pytest.approx(2 * share / (1 + share))  # the same answer, "equivalent", everywhere
    found, labels = chance("mrpc", "data.metric=accuracy")
    assert found == pytest.approx(max(share, 1 - share))
    assert chance("cola")[0] == 0
    assert chance("stsb")[0] == 0
    assert chance("stsb", "data.metric=pearson")[0] == 0
