from pathlib import Path
from typing import Any

import pytest

from taskkd import recipes
from taskkd.errors import RecipeError
from taskkd.nlp import METHODS

GOOD = """schema: 1
task: nlp
data:
  files: {train: a.csv}
teacher: {model: some/name}
student: {layers: [0, 2]}
method:
  name: soft_targets
  temperature: 2
training: {learning_rate: 1e-4}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return path

    return write


def test_a_recipe_is_read_with_defaults_filled_in(recipe: Any) -> None:
    loaded = recipes.load_recipe(recipe(GOOD))
    assert loaded.name == "my"
    assert loaded.training.learning_rate == 1e-4
    assert recipes.method_options(loaded) == {"temperature": 2.0, "weight": 0.9, "task_weight": 0.1}


def test_what_is_dumped_is_read_again_the_same(recipe: Any, tmp_path: Path) -> None:
    loaded = recipes.load_recipe(recipe(GOOD), ["training.epochs=5", "data.labels=[no, yes]"])
    again = tmp_path / "again.yaml"
    again.write_text(recipes.dump_recipe(loaded))
    assert recipes.dump_recipe(recipes.load_recipe(again)) == again.read_text()
    assert recipes.load_recipe(again).data.labels == ["no", "yes"]  # YAML 1.2: not booleans


@pytest.mark.parametrize("name", recipes.packaged_recipes())
def test_every_packaged_recipe_is_valid(name: str) -> None:
    loaded = recipes.load_recipe(name)
    assert loaded.name == name.partition("/")[2]
    if loaded.method is not None:
        recipes.method_options(loaded)


@pytest.mark.parametrize("name", METHODS)
def test_every_default_of_a_method_survives_yaml(name: str, recipe: Any) -> None:
    import inspect

    defaults = {
        p.name: p.default for p in inspect.signature(METHODS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    loaded = recipes.load_recipe(recipe(GOOD.replace("soft_targets\n  temperature: 2", name)))
    assert recipes.method_options(loaded) == defaults
    path = recipe(recipes.dump_recipe(loaded))
    assert recipes.method_options(recipes.load_recipe(path)) == defaults
    assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(METHODS[name]).parameters.values())


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "temperature: 2",
            "temprature: 2",
            r"my\.yaml, line 9: unknown key 'method\.temprature' \(did you mean 'temperature'\?\)",
        ),
        ("training:", "traning:", r"line 10: unknown key 'traning' \(did you mean 'training'\?\)"),
        (
            "learning_rate: 1e-4",
            "learning_rat: 1",
            r"unknown key 'training\.learning_rat' \(did you mean 'learning_rate'",
        ),
        ("temperature: 2", "temperature: -2", r"line 9: method\.temperature: input should be greater than 0, got -2"),
        ("temperature: 2", "temperature: hot", r"method\.temperature: input should be a valid number.*'hot'"),
        ("layers: [0, 2]", "layers: 2", r"line 6: student\.layers: input should be a valid list"),
        ("layers: [0, 2]", "model: x, layers: [1]", r"student: exactly one of layers, config and model"),
        ("files: {train: a.csv}", "text: a", r"exactly one of files, sample and hub"),
        ("soft_targets", "soft_target", r"no method 'soft_target' \(did you mean 'soft_targets'\?\)"),
        ("task: nlp", "task: nlb", r"task 'nlb' is not known \(did you mean 'nlp'\?\)"),
        ("task: nlp", "task: nlp\ntask: nlp", r"duplicate key"),
        ("schema: 1", "schema: 2", r"schema: input should be 1"),
        ("some/name", "!!python/object/apply:os.system [ls]", r"the tag .*os\.system is refused"),
        ("some/name", "!include x.yaml", r"the tag !include is refused"),
        ("some/name", "[unclosed", r"my\.yaml, line"),
        ("teacher: {model: some/name}\n", "", r"the key 'teacher' is missing"),
        (GOOD, "- a\n- b\n", r"a recipe is a mapping of keys"),
        (GOOD, "", r"a recipe is a mapping of keys"),
    ],
)
def test_bad_recipes_end_in_a_sentence(recipe: Any, old: str, new: str, sentence: str) -> None:
    assert old in GOOD
    with pytest.raises(RecipeError, match=sentence):
        recipes.load_recipe(recipe(GOOD.replace(old, new)))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.epochs", "expected key=value"),
        ("training.epoch=3", r"unknown key 'training\.epoch' \(did you mean 'epochs'"),
        ("task.x=3", "'task' is a plain value"),
        ("training.epochs=[", "line 1"),
        ("training.epochs=many", r"training\.epochs: input should be a valid number"),
    ],
)
def test_bad_overrides_end_in_a_sentence(recipe: Any, override: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        recipes.load_recipe(recipe(GOOD), [override])


def test_overrides_have_types(recipe: Any) -> None:
    loaded = recipes.load_recipe(
        recipe(GOOD), ["student.layers=[1]", "training.learning_rate=1e-3", "seeds=[1,2]", "baseline=null"]
    )
    assert loaded.student.layers == [1]
    assert loaded.training.learning_rate == 1e-3
    assert loaded.seeds == [1, 2]
    assert loaded.baseline is None


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"no packaged recipe 'nlp/sentiment-distill' \(did you mean 'nlp/sentiment-distil'"
    ):
        recipes.load_recipe("nlp/sentiment-distill")
    with pytest.raises(RecipeError, match="no recipe file"):
        recipes.load_recipe(tmp_path / "none.yaml")
