"""Augmentation in recipes and on the command line."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForMaskedLM

from taskkd import plans, recipes, runs, steps
from taskkd.__main__ import main
from taskkd.errors import DataError, RecipeError
from taskkd.nlp import augment
from taskkd.nlp.augment import Augment, augmented
from taskkd.nlp.text import Row, read_rows
from taskkd.nlp.word_replacement import WordReplacement
from tests import tiny

VECTORS = {"great": [1, 0, 0], "lovely": [1, 0.1, 0], "superb": [1, 0.2, 0], "film": [0, 0, 1], "scene": [0, 0.1, 1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a masked LM of its vocabulary, and word vectors."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save_teacher(folder / "teacher")
    tokenizer = tiny.tokenizer()
    tokenizer.mask_token = "[MASK]"
    tokenizer.save_pretrained(folder / "mlm")
    BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(folder / "mlm")
    lines = [" ".join([word, *map(str, numbers)]) for word, numbers in VECTORS.items()]
    (folder / "vectors.txt").write_text("\n".join(lines) + "\n")
    tiny.write_csv(folder / "train.csv", tiny.sentences(120))
    return folder


def rows(*texts: str | tuple[str, str]) -> list[Row]:
    pairs = [(t, None) if isinstance(t, str) else t for t in texts]
    return [Row(a, b, "positive", f"row {i}") for i, (a, b) in enumerate(pairs)]


def test_no_copy_equals_a_held_out_text_or_another(folder: Path, tmp_path: Path) -> None:
    config = Augment(vectors=str(folder / "vectors.txt"), p=1.0, k=1, n=5)
    train = rows("great film", "lovely Film", "GREAT  film")
    copies = augmented(train, rows("Superb  scene"), config, teacher="", folder=tmp_path)
    assert copies == [Row("lovely scene", None, None, "row 0, a copy")]
    assert len(augmented(train, [], config, teacher="", folder=tmp_path)) == 2


def test_pairs_are_augmented_as_pairs(folder: Path, tmp_path: Path) -> None:
    config = Augment(vectors=str(folder / "vectors.txt"), p=1.0, k=1)
    pair, held = rows(("great", "film")), rows(("lovely", "film"))
    assert augmented(pair, held, config, teacher="", folder=tmp_path) == [Row("great", "scene", None, "row 0, a copy")]


def test_finished_copies_are_not_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = Augment(mlm=str(folder / "mlm"), neighbours=True, n=3)
    train = rows("great film", "a line\u2028separator is great")
    arguments: dict[str, Any] = {"teacher": str(folder / "teacher"), "folder": tmp_path}
    with caplog.at_level(logging.INFO, "taskkd"):
        first = augmented(train, [], config, **arguments)
    assert "up to 6 copies of 2 training texts; 3 words to be predicted by the masked LM" in caplog.text
    made: list[int] = []
    monkeypatch.setattr(augment, "replacement", lambda *_, **__: made.append(1))
    assert augmented(train, [], config, **arguments) == first
    assert not made
    for change in ({"seed": 1}, {"p": 0.5}, {"mlm": None}):
        with pytest.raises(AttributeError):  # what would be made anew is not there
            augmented(train, [], config.model_copy(update=change), **arguments)
    with pytest.raises(AttributeError):
        augmented(train[:1], [], config, **arguments)
    (tmp_path / "augmented").rename(tmp_path / "away")
    with pytest.raises(AttributeError):
        augmented(train, [], config, **arguments)


def recipe(folder: Path, *overrides: str) -> Any:
    text = {
        "schema": 1,
        "task": "nlp",
        "data": {"files": {"train": str(folder / "train.csv")}, "augment": {"n": 4, "neighbours": True}},
        "teacher": {"model": str(folder / "teacher")},
        "student": {"layers": [0, 2]},
        "method": {"name": "soft_targets"},
        "training": {"epochs": 1, "learning_rate": 3e-3},
        "baseline": None,
    }
    for key, value in recipes.parse_overrides(overrides).items():
        recipes.set_key(text, key, value)
    return recipes.validate(text, "test")


def test_a_run_distils_on_the_copies_and_an_interrupted_one_keeps_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(steps, "_teacher", stopped)
        with pytest.raises(KeyboardInterrupt):
            runs.run_recipe(recipe(folder), tmp_path / "run", say=lines.append)
    (file,) = (tmp_path / "run" / "augmented").iterdir()
    monkeypatch.setattr(WordReplacement, "texts", None)
    result = runs.run_recipe(recipe(folder), tmp_path / "run", say=lines.append)
    copies = len(file.read_text().splitlines())
    assert 0 < copies <= 4 * 96
    (said,) = {line for line in lines if line.startswith("data:")}
    assert "96 labelled" in said
    assert "of them copies with replaced words" in said
    used = int(said.partition("labelled, ")[2].partition(" ")[0])
    assert 0 < used <= copies
    outcome = result.report["distilled"]["distilled"]["0"]
    assert outcome["steps"] == -(-(96 + used) // 32)
    assert runs.evaluate(tmp_path / "run")["accuracy"] > 0.6


def test_check_says_what_copies_would_cost(folder: Path) -> None:
    plan = plans.check(recipe(folder, f"data.augment.mlm={folder}/mlm"))
    shown = dict(plan.summary)["data"]
    assert "0 unlabelled (a run adds up to 384 copies of 96 training texts; " in shown
    assert "words to be predicted by the masked LM)" in shown


@pytest.mark.parametrize(
    ("overrides", "error", "sentence"),
    [
        (["data.augment={n: 4}"], RecipeError, "words need a source: mlm, vectors or neighbours"),
        (["data.augment.p=2"], RecipeError, r"data\.augment\.p: .*less than or equal to 1"),
        (["data.augment.pp=2"], RecipeError, r"unknown key 'data\.augment\.pp' \(did you mean 'p'"),
        (["data.type=token_classification"], RecipeError, "augment replaces words of whole texts"),
        (["data.augment.vectors=none.txt"], DataError, r"word vectors none\.txt: No such file"),
        (["data.augment.mlm=/no/such/model"], DataError, "model '/no/such/model' cannot be loaded"),
    ],
)
def test_mistakes_in_recipes(
    folder: Path, tmp_path: Path, overrides: list[str], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        runs.run_recipe(recipe(folder, *overrides), tmp_path / "run", say=lambda _: None)


def test_a_masked_lm_without_its_head_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"has no masked LM head .* its guesses would be random"):
        augment.replacement(str(folder / "teacher"), None, None, n=1, p=0.4, k=3, seed=0)


def test_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["taskkd", "augment", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out = capsys.readouterr()
        return int(stop.value.code or 0), out.out, out.err

    source, out = str(folder / "train.csv"), str(tmp_path / "out.jsonl")
    options = ["--mlm", str(folder / "mlm"), "--vectors", str(folder / "vectors.txt"), "--n", "3", "--k", "4"]
    code, said, err = call(source, out, *options)
    assert code == 0, err
    lines = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert next(e["text"] for e in lines if e["of"] == 0) == tiny.sentences(1)[0][0]
    assert f"{len(lines) - 120} copies of 120 texts" in said.replace(",", "")
    assert len(read_rows(out, "text", None)) == len(lines)
    code, _, err = call(source, out, *options)
    assert code == 3
    assert "exists; give another name, or --overwrite" in err
    assert call(source, out, *options, "--overwrite", "--no-originals")[0] == 0
    assert len(Path(out).read_text().splitlines()) == len(lines) - 120
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"a": "great film", "b": "a scene"}\n')
    assert call(str(pairs), str(tmp_path / "p.jsonl"), "--text", "a", "--text", "b", *options)[0] == 0
    assert json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0]) == {
        "of": 0,
        "a": "great film",
        "b": "a scene",
    }
    code, _, err = call(source, str(tmp_path / "other.jsonl"))
    assert code == 2
    assert "a masked LM, word vectors, or both" in err
    code, _, err = call(source, str(tmp_path / "other.csv"), *options)
    assert code == 3
    assert "ends in .jsonl" in err
