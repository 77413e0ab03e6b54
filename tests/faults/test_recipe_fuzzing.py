"""Whatever a recipe file holds, it is a recipe or a sentence: never another exception, and never executed."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskkd import recipes
from taskkd.errors import RecipeError, TaskkdError

PACKAGED = recipes.packaged_recipes()
#: the shortest of each task
SEEDS = [min((t for n, t in PACKAGED.items() if n.startswith(task)), key=len) for task in recipes.TASKS]
CHARACTERS = st.sampled_from("{}[]:,&*!|>'\"%@`#-?\n\t \\~0123456789.eE+_xabnulltrueyes²٣éÿ\x85\u2028\ud7ff\U0001f600")
few, many = (
    settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    for n in (15, 400)
)

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=8)
)
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def read(text: str) -> Any:
    """The recipe, or None where a sentence says what is wrong."""
    try:
        data, lines = recipes._parse(text, "a.yaml")
        return recipes.validate(data, "a.yaml", lines)
    except RecipeError as error:
        message = str(error)
        assert message.startswith(("a.yaml", "by_task", "override", "recipe")), message
        assert message.rstrip().endswith((".", "?)")), message
        return None


def mutated_text(text: str, seed: int) -> str:
    """A recipe with lines and characters removed, doubled, moved or replaced."""
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text) + 1)
        to = min(len(text), at + draw.choice([0, 1, 1, 3, 20]))
        junk = draw.choice(
            ["", ":", "{", "[", "]", "- ", "&a ", "*a", "!!str ", "!x ", "'", "\t", "? ", "<<: ", "1e999", "\0"]
        )
        text = text[:at] + junk + text[to:]
    return text


def mutated_data(data: Any, value: Any, seed: int) -> Any:
    """A recipe in which a value, a key or a whole part is another."""
    data, draw = copy.deepcopy(data), random.Random(seed)
    here = data
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = draw.choice(keys)
        if isinstance(here[key], dict | list) and here[key] and draw.random() < 0.7:
            here = here[key]
            continue
        kind = draw.random()
        if kind < 0.6:
            here[key] = value
        elif kind < 0.8:
            del here[key]
        elif isinstance(here, dict):
            here[str(value)] = here.pop(key)
        return data


class Checks:
    def text(self, recipe: str, seed: int) -> None:
        found = read(mutated_text(recipe, seed))
        if found is not None:
            assert recipes.validate(found.model_dump(by_alias=True), "again").name == found.name

    def data(self, recipe: str, value: Any, seed: int) -> None:
        data, _ = recipes._parse(recipe, "a.yaml")
        try:
            found = recipes.validate(mutated_data(data, value, seed), "a.yaml")
        except RecipeError:
            return
        recipes.dump_recipe(found)

    def junk(self, text: str) -> None:
        read(text)

    def override(self, key: str, value: str) -> None:
        data, lines = recipes._parse(SEEDS[0], "a.yaml")
        try:
            recipes.validate(data, "a.yaml", lines, recipes.parse_overrides([f"{key}={value}"]))
        except TaskkdError as error:
            assert isinstance(error, RecipeError)  # noqa: PT017


CHECK = Checks()
KEYS = st.sampled_from(
    [
        "training.epochs",
        "student.layers",
        "method",
        "data.files.train",
        "terms.0.weight",
        "seeds",
        "by_task.cola",
        "a..b",
    ]
)
STRATEGIES = {
    "text": (st.sampled_from(SEEDS), st.integers(0, 2**32)),
    "data": (st.sampled_from(SEEDS), plain, st.integers(0, 2**32)),
    "junk": (st.text(CHARACTERS, max_size=60),),
    "override": (KEYS | st.text(max_size=12), st.text(CHARACTERS, max_size=20)),
}


@pytest.mark.parametrize("what", STRATEGIES)
def test_a_recipe_or_a_sentence(what: str) -> None:
    few(given(*STRATEGIES[what])(getattr(CHECK, what)))()


@pytest.mark.slow
@pytest.mark.parametrize("what", STRATEGIES)
def test_a_recipe_or_a_sentence_again_and_again(what: str) -> None:
    many(given(*STRATEGIES[what])(getattr(CHECK, what)))()


# ---- made to harm

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HARMFUL = {
    "a call": ("name: !!python/object/apply:os.system ['touch {mark}']", r"the tag .*python/object/apply:os.system"),
    "an object": ("name: !!python/object/new:subprocess.Popen [['touch', '{mark}']]", "the tag "),
    "a name": ("name: !!python/name:os.system ''", "the tag "),
    "a call as key": ("? !!python/object/apply:os.system ['touch {mark}']\n: 1", "is missing"),
    "a call in a list": ("seeds: [!!python/object/apply:os.system ['touch {mark}']]", "the tag "),
    "torchdistill's import": ("name: !import_call\n  key: os.system\n  init: ['touch {mark}']", "tag !import"),
    "billions of laughs": (LAUGHS, "more than 100,000 values"),
    "a list in itself": ("name: &a [*a]", "name: input should be"),
    "a mapping in itself": ("name: &a {{b: *a}}", "name: input should be"),
    "very deep": ("name: " + "[" * 5000 + "]" * 5000, "more than 100 brackets"),
    "deep by lines": ("name:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 1200)), "too deeply"),
    "very long": ("name: " + "x" * 1_000_001, "characters; a recipe has at most"),
    "two keys": ("name: a\nname: b", "duplicate key"),
    "the environment": ("${{HOME}}: 1", "is missing"),
    "another file": ("name: !include /etc/passwd", "the tag !include"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_what_is_made_to_harm_is_refused(name: str, tmp_path: Path) -> None:
    text, sentence = HARMFUL[name]
    mark = tmp_path / "executed"
    path = tmp_path / "my.yaml"
    path.write_text(f"schema: 1\ntask: nlp\n{text.format(mark=mark) if name != 'billions of laughs' else text}\n")
    with pytest.raises(RecipeError, match=sentence):
        recipes.load_recipe(path)
    assert not mark.exists()


def test_nothing_is_filled_in_from_the_environment() -> None:
    data, _ = recipes._parse("name: ${HOME}\n", "a.yaml")
    assert data == {"name": "${HOME}"}
