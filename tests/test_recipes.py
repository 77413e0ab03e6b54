from pathlib import Path
from typing import Any

import pytest

from taskkd import recipes
from taskkd.errors import RecipeError, TaskkdError
from taskkd.nlp import METHODS
from taskkd.schedules import Progress

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
        ("files: {train: a.csv}", "text: a", r"exactly one of files, sample, hub and glue"),
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


# ---- schedules in terms

TERM = "terms:\n  - {name: soft, loss: kl_divergence, student: out.logits, temperature: 2, weight: 3}\n"


def test_weights_and_options_may_be_schedules(recipe: Any) -> None:
    text = TERM.replace("temperature: 2", "temperature: {anneal: [1, 4], steps: 6}")
    text = text.replace("weight: 3", "weight: {warmup: 3, fraction: 0.5}")
    loaded = recipes.load_recipe(recipe(GOOD + text))
    (term,) = recipes.build_terms(loaded)
    assert [term.weight(Progress(s, 4)) for s in range(3)] == [1.5, 3.0, 3.0]
    assert [term.option_schedules["temperature"](Progress(s)) for s in (0, 4, 9)] == [1.0, 3.0, 4.0]
    again = recipes.load_recipe(recipe(recipes.dump_recipe(loaded)))
    assert again.terms == loaded.terms
    changed = recipes.load_recipe(recipe(GOOD + text), ["terms.soft.weight={cosine: 2}", "terms.soft.temperature=5"])
    (term,) = recipes.build_terms(changed)
    assert (term.weight(Progress(0, 4)), term.weight(Progress(4, 4))) == (2.0, 0.0)
    assert term.options["temperature"] == 5


@pytest.mark.parametrize("weight", ["3", "auto", "0.5"])
def test_plain_weights_stay(recipe: Any, weight: str) -> None:
    (term,) = recipes.build_terms(recipes.load_recipe(recipe(GOOD + TERM.replace("weight: 3", f"weight: {weight}"))))
    assert (term.automatic is not None) == (weight == "auto")
    assert weight == "auto" or term.weight(Progress()) == float(weight)


def test_an_automatic_weight_may_be_a_share(recipe: Any) -> None:
    (term,) = recipes.build_terms(recipes.load_recipe(recipe(GOOD + TERM.replace("weight: 3", "weight: {auto: 0.5}"))))
    assert term.automatic is not None
    assert term.automatic.share == 0.5
    with pytest.raises(RecipeError, match="the share of an automatic weight is a positive number, got 0"):
        recipes.load_recipe(recipe(GOOD + TERM.replace("weight: 3", "weight: {auto: 0}")))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("weight: 3", "weight: {warmp: 3}", r"terms\.0\.weight: a schedule is one name .*did you mean 'warmup'"),
        ("weight: 3", "weight: {warmup: 3, frac: 1}", r"no option 'frac' \(did you mean 'fraction'\?\)"),
        ("weight: 3", "weight: {warmup: 3, fraction: 2}", r"`fraction` must be in \[0, 1\], got 2\.$"),
        ("weight: 3", "weight: {value: 3, fraction: 1}", r"a schedule is one name with its value"),
        ("weight: 3", "weight: often", r"terms\.0\.weight: a weight is a number, 'auto' or a schedule .* got 'often'"),
        ("weight: 3", "weight: yes", r"a weight is a number, 'auto' or a schedule .* got 'yes'"),
        ("temperature: 2", "temperature: {anneal: 2}", r"terms\.0: temperature: schedule 'anneal' takes start and end"),
        ("temperature: 2", "temperature: {aneal: [1, 2]}", r"temperature: a schedule .*did you mean 'anneal'"),
    ],
)
def test_bad_schedules_end_in_a_sentence(recipe: Any, old: str, new: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        recipes.load_recipe(recipe(GOOD + TERM.replace(old, new)))


@pytest.mark.parametrize("side", ["adapter", "teacher_adapter"])
def test_adapters_are_named_by_kind(recipe: Any, side: str) -> None:
    text = GOOD + TERM.replace("weight: 3", f"weight: 3, {side}: linear")
    (term,) = recipes.build_terms(recipes.load_recipe(recipe(text)))
    assert (term.adapter_spec, term.teacher_adapter_spec)[side == "teacher_adapter"] == "linear"
    with pytest.raises(RecipeError, match=r"term 'soft': no adapter 'liner' \(did you mean 'linear'"):
        recipes.build_terms(recipes.load_recipe(recipe(text.replace("linear", "liner"))))


def test_what_cannot_follow_a_schedule_is_said(recipe: Any) -> None:
    loaded = recipes.load_recipe(recipe(GOOD + TERM.replace("temperature: 2", "dim: {constant: 1}")))
    with pytest.raises(TaskkdError, match="'dim' of `kl_divergence` cannot follow a schedule"):
        recipes.build_terms(loaded)


# ---- changes for a task of a benchmark

BENCHMARK = """schema: 1
task: nlp
data: {glue: {task: sst2}, augment: {neighbours: true}}
teacher: {model: some/name}
student: {layers: [0, 2]}
method: {name: tinybert}
by_task:
  cola: {method.intermediate_epochs: 50, data.augment.n: 30}
  mnli: {method.intermediate_epochs: 10}
"""


def test_changes_for_a_task_are_weaker_than_overrides(recipe: Any) -> None:
    def epochs(*overrides: str) -> tuple[float, int | None]:
        loaded = recipes.load_recipe(recipe(BENCHMARK), overrides)
        augment = loaded.data.augment
        return recipes.method_options(loaded)["intermediate_epochs"], augment.n if augment else None

    assert epochs() == (20, 20)
    assert epochs("data.glue.task=cola") == (50, 30)
    assert epochs("data.glue={task: mnli}") == (10, 20)
    assert epochs("method.intermediate_epochs=3", "data.glue.task=cola") == (3, 30)
    assert epochs("data.augment={mlm: x, n: 2}", "data.glue.task=cola") == (50, 2)
    assert epochs("data.glue.task=cola", "data.augment=null") == (50, None)
    assert epochs("data.glue=null", "data.files.train=cola.csv") == (20, 20)


def test_a_resolved_recipe_holds_the_values_for_its_task(recipe: Any) -> None:
    loaded = recipes.load_recipe(recipe(BENCHMARK), ["data.glue.task=cola", "data.augment.n=4"])
    text = recipes.dump_recipe(loaded)
    assert "by_task" not in text
    again = recipes.load_recipe(recipe(text))
    assert recipes.dump_recipe(again) == text
    assert (again.data.augment.n, recipes.method_options(again)["intermediate_epochs"]) == (4, 50)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("mnli:", "mlni:", r"my\.yaml: by_task: no task 'mlni' \(did you mean 'mnli', .*\); known: cola, sst2"),
        (
            "cola: {method.intermediate_epochs",
            "cola: {method.intermediate_epoch",
            r"by_task\.cola, line 8: unknown key 'method\.intermediate_epoch' \(did you mean 'intermediate_epochs'",
        ),
        ("epochs: 10", "epochs: -1", r"by_task\.mnli, line 9: method\.intermediate_epochs: input should be greater"),
        ("{method.intermediate_epochs: 10}", "10", r"by_task is a mapping of tasks to changes"),
        ("by_task", "by_tasks", r"unknown key 'by_tasks' \(did you mean 'by_task'"),
        ("task: sst2", "task: sst", r"line 3: data\.glue\.task: no task 'sst' in GLUE \(did you mean 'sst2'"),
    ],
)
def test_bad_changes_for_a_task_end_in_a_sentence(recipe: Any, old: str, new: str, sentence: str) -> None:
    assert BENCHMARK.count(old) == 1
    with pytest.raises(RecipeError, match=sentence):
        recipes.load_recipe(recipe(BENCHMARK.replace(old, new)))


def test_changes_for_a_task_cannot_be_overridden(recipe: Any) -> None:
    with pytest.raises(RecipeError, match="override the key itself"):
        recipes.load_recipe(recipe(BENCHMARK), ["by_task.cola={}"])
