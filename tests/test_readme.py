"""Every snippet of the README runs: its YAML, its commands, its Python; and the snippets of docs/."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taskkd as kd
from taskkd import losses, recipes
from taskkd.__main__ import main
from tests import glyphs, tiny

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
YAML = [text for kind, text in BLOCKS if kind == "yaml"]
COMMANDS = [line.partition("#")[0].strip() for kind, text in BLOCKS if not kind for line in text.splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the README speaks of, and a tiny teacher in place of a large one."""
    monkeypatch.chdir(tmp_path)
    tiny.save_teacher(tmp_path / "path" / "to" / "teacher")
    for name, seed in (("reviews", 1), ("more", 2), ("other", 3), ("train", 4), ("validation", 5)):
        tiny.write_csv(tmp_path / f"{name}.csv", tiny.sentences(60, seed), ("review", "stars"))
    for text in YAML:
        small = text.replace("bert-base-uncased", "path/to/teacher").replace("[0, 4, 8]", "[0, 2]")
        (tmp_path / "my.yaml").write_text(small)
    return tmp_path


def test_the_yaml_is_ten_lines_and_valid() -> None:
    (text,) = YAML
    assert len([line for line in text.splitlines() if line.strip()]) <= 10
    loaded = recipes.validate(recipes._parse(text, "README")[0], "README")
    assert loaded.data.text == "review"


def test_the_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [shlex.split(c) for c in COMMANDS if c.startswith("taskkd ")]
    assert {c[1] for c in commands} == {"check", "distill", "evaluate", "predict", "report", "export", "inspect"}
    for command in commands:
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, command


def test_the_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for command in COMMANDS:
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.M), command


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer2(self.layer1(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_the_python_runs(folder: Path, number: int) -> None:
    code = PYTHON[number]
    names: dict[str, Any] = {"torch": torch}
    if "train_dataset=" in code:
        from taskkd.nlp.text import read_rows, tokenized

        rows = read_rows("train.csv", "review", "stars")
        table = tokenized(rows, tiny.tokenizer(), ["negative", "positive"], max_length=32)
        names |= {"train_dataset": table, "eval_dataset": table}
    if "loader" in code:
        batches = [{"x": torch.randn(4, 3, 9, 9), "y": torch.randint(0, 4, (4,))} for _ in range(3)]
        names |= {"student": Net(4), "teacher": Net(8), "loader": batches, "epochs": 2}
    exec(compile(code, f"README python block {number}", "exec"), names)
    if "loader" in code:
        assert set(names["out"]) == {"loss", "task", "logits", "layer2"}
        assert not any(m._forward_hooks for m in names["student"].modules())
    if "train_dataset=" in code:
        assert (folder / "runs" / "trainer" / "student" / "model.safetensors").is_file()


def test_the_recipe_of_the_docs_runs(folder: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    block = re.findall(r"```yaml\n(.*?)```", text.partition("## Kinds of tasks")[0], re.S)[0]
    (folder / "terms.yaml").write_text(block)
    from taskkd import runs

    result = runs.run_recipe(recipes.load_recipe("terms.yaml"), folder / "run", say=lambda _: None)
    history = result.report["distilled"]["distilled"]["0"]["history"]
    assert {"loss_task", "loss_logits", "loss_hidden", "loss_early", "loss_relations"} <= set(history[0])
    assert "of them copies with replaced words" in result.report["data"]


def test_the_commands_of_the_docs_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_csv(folder / "train.csv", tiny.sentences(20), ("review", "stars"))
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    commands = [c for c in re.findall(r"^taskkd .*$", text, re.M) if "nlp/" not in c]
    assert commands
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, command
    assert len((folder / "copies.jsonl").read_text().splitlines()) > 20


def test_the_commands_of_the_papers_recipes_are_right() -> None:
    """They need a GPU and the hub; `tests/nlp/test_glue_recipes.py` runs the recipes in small."""
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    commands = [shlex.split(c) for c in re.findall(r"^taskkd .* nlp/.*$", text, re.M)]
    assert len(commands) > 3
    for _, verb, name, *rest in commands:
        assert verb in ("check", "distill")
        assert rest[-2:-1] in ([], ["--output-dir"]) or all("=" in word for word in rest)
        assert recipes.load_recipe(name, [word for word in rest if "=" in word]).task == "nlp"
    section = text.partition("## GLUE")[2].partition("## Augmented")[0]
    papers = {n for n in recipes.packaged_recipes() if "/glue-" in n or "/general-" in n or "/pretrain-" in n}
    assert papers == set(re.findall(r"`(nlp/[\w-]+)`", section))


@pytest.mark.parametrize("kind", ["token_classification", "question_answering", "masked_lm"])
def test_the_recipe_of_every_kind_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkd import runs
    from tests.nlp import people

    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text().partition("## Kinds of tasks")[2]
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.S) if f"type: {kind}" in b]
    (tmp_path / "my.yaml").write_text(block)
    recipe = recipes.load_recipe("my.yaml")
    people.save_teacher(kind, tmp_path / recipe.teacher.model)
    files = [f for f in recipe.data.files.model_dump().values() if f]
    for seed, name in enumerate(files):
        people.write(kind, tmp_path, Path(name).stem, people.facts(60, seed))
    result = runs.run_recipe(recipe, tmp_path / "run", say=lambda _: None)
    assert result.report["distilled"]["distilled"]["0"]["history"][0]["loss_logits"] >= 0


def test_every_kind_is_in_the_docs() -> None:
    from taskkd.nlp.kinds import KINDS

    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text().partition("## Kinds of tasks")[2]
    assert re.findall(r"^\| `(\w+)` \| [`]", text, re.M) == list(KINDS)


def test_every_schedule_of_the_docs_is_one() -> None:
    from taskkd.schedules import SCHEDULES, from_config

    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| `(\{.*?\})` \|", text, re.M)
    found = [recipes.parse_overrides([f"x={row}"])["x"] for row in rows]
    assert {next(iter(config)) for config in found} == set(SCHEDULES)
    for config in found:
        from_config(config)


ADVERSARIAL = (Path(__file__).parent.parent / "docs" / "methods" / "adversarial.md").read_text()
LOOP, *GAMES = re.findall(r"```python\n(.*?)```", ADVERSARIAL, re.S)


@pytest.mark.parametrize(("number", "terms"), [(0, ["gan"]), (1, ["map_student", "map_peer"]), (2, ["alike"])])
def test_the_adversarial_recipes_train(number: int, terms: list[str]) -> None:
    assert len(GAMES) == 3
    assert len([line for line in GAMES[number].splitlines() if line.strip()]) <= 15
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "kd": kd, "losses": losses}
    student, peer = glyphs.Net(8, 1), glyphs.Net(12, 2)
    networks = [student, peer] if number == 1 else [student]
    simple, labels = glyphs.glyphs(400, seed=5, noise=0.1)
    names |= {
        "student": student,
        "peer": peer,
        "teacher": glyphs.teacher(),
        "loader": [batch for _ in range(8) for batch in glyphs.batches()],
        "synthetic": torch.stack([simple[labels == c][:20] for c in range(glyphs.CLASSES)]),
    }
    exec(compile(GAMES[number], f"adversarial.md, recipe {number}", "exec"), names)
    distiller = names["distiller"]
    distiller.prepare(names["loader"][0])
    judges = [{k: v.clone() for k, v in distiller.terms[t].discriminator.state_dict().items()} for t in terms]
    before = [glyphs.accuracy(network) for network in networks]
    distiller.train()
    exec(compile(LOOP, "adversarial.md, the loop", "exec"), names)
    assert set(names["game_losses"]) == {f"{t}_discriminator" for t in terms}
    assert all(0 < v.item() < 10 for v in names["game_losses"].values())
    for term, judge in zip(terms, judges, strict=True):
        after = distiller.terms[term].discriminator.state_dict()
        assert all(not torch.equal(v, judge[k]) for k, v in after.items())
    for network, was in zip(networks, before, strict=True):
        assert glyphs.accuracy(network) > max(0.7, was + 0.3)
