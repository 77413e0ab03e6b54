"""The papers' recipes, each run for two optimiser steps a stage on a small copy of GLUE (or plain text), offline.

The models have the shapes of the papers' in small: a teacher of 12 layers and 12 heads, students of 4 layers and half
the size, of 6 layers, a DistilBERT.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from transformers import BertConfig, DistilBertConfig

from taskkd import plans, recipes, runs
from taskkd.errors import DataError
from taskkd.nlp.glue import GLUE_TASKS
from taskkd.nlp.task import NlpTask
from tests import tiny
from tests.nlp import glue_tree
from tests.nlp.wordpieces import SPECIAL, save

PACKAGED = [n for n in recipes.packaged_recipes() if n.startswith(("nlp/glue-", "nlp/general-", "nlp/pretrain-"))]
GLUE = [name for name in PACKAGED if "/glue-" in name]


def tokenizer() -> Any:
    """BERT's own class, with the words of `tiny.sentences`; all others are letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = dict.fromkeys([*SPECIAL, *tiny.PLAIN, *tiny.GOOD, *tiny.BAD, *letters, *(f"##{c}" for c in letters)])
    return transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=512)


def bert(head: str, layers: int = 12, hidden: int = 24) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer()), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=12,
        intermediate_size=2 * hidden, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    return getattr(transformers, f"Bert{head}")(config)


def distilbert() -> Any:
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(tokenizer()), dim=24, n_layers=6, n_heads=12, hidden_dim=48)
    return transformers.DistilBertForMaskedLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipes name: a teacher, students, GLUE, plain text."""
    folder = tmp_path_factory.mktemp("papers")
    datasets.disable_progress_bars()
    save(bert("ForMaskedLM"), tokenizer(), folder / "teacher")
    save(bert("ForMaskedLM", 4, 12), tokenizer(), folder / "tinybert-4")
    save(bert("ForMaskedLM", 6), tokenizer(), folder / "tinybert-6")
    save(distilbert(), tokenizer(), folder / "distilbert")
    glue_tree.write(folder / "glue")
    (folder / "corpus.txt").write_text("\n".join(text for text, _ in tiny.sentences(80)) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _any_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher at chance is refused; these are random."""
    monkeypatch.setattr(NlpTask, "chance", lambda *_: -2.0)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test asks the network."""
    asked: list[Any] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            asked.append(address)
            raise OSError("no network in tests")
        connect(self, address)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(socket.socket, "connect", watched)
    yield
    assert asked == []


def small(name: str, folder: Path, *more: str) -> Any:
    """A packaged recipe with the small models and data, for two steps."""
    glue = [
        f"data.glue.path={folder}/glue", "data.validation_size=12", f"teacher.model={folder}/teacher",
        "teacher.finetune.max_steps=2", "baseline.learning_rates=[1e-4]",
    ]  # fmt: skip
    text = [
        f"data.files.train={folder}/corpus.txt", "data.validation_size=16", "data.test_size=16",
        f"teacher.model={folder}/teacher",
    ]  # fmt: skip
    augment = [f"data.augment={{mlm: {folder}/teacher, n: 2}}"]
    own = {
        "nlp/glue-tinybert-4": [f"student.model={folder}/tinybert-4", *augment],
        "nlp/glue-tinybert-6": [f"student.model={folder}/tinybert-6", *augment],
        "nlp/glue-lrc-bert": [f"student.model={folder}/tinybert-4"],
        "nlp/glue-distilbert-6": [f"student.model={folder}/distilbert"],
        "nlp/general-tinybert-4": ["student.config.hidden_size=12", "student.config.intermediate_size=24"],
    }.get(name, [])
    common = glue if name in GLUE else text
    return recipes.load_recipe(name, [*common, *own, "training.max_steps=2", *more])


def run(recipe: Any, folder: Path) -> tuple[runs.Result, dict[str, Any]]:
    """The result, and the steps on record."""
    result = runs.run_recipe(recipe, folder, say=lambda _: None)
    return result, json.loads((folder / "run.json").read_text())["finished"]


#: stages, student layers, and a term of the first stage for each recipe
EXPECTED = {
    "nlp/general-tinybert-4": (["general"], 4, "attention-3-11"),
    "nlp/glue-distilbert-6": (["distil"], 6, "logits"),
    "nlp/glue-lrc-bert": (["contrast", "all"], 4, "contrast-1-5"),
    "nlp/glue-patient-kd-3": (["distil"], 3, "patience"),
    "nlp/glue-patient-kd-6": (["distil"], 6, "patience"),
    "nlp/glue-tinybert-4": (["intermediate", "prediction"], 4, "attention-0-2"),
    "nlp/glue-tinybert-6": (["intermediate", "prediction"], 6, "hidden-5-11"),
    "nlp/pretrain-distilbert": (["distil"], 6, "hidden"),
}


#: of another size than one that runs here; GLUE's other kinds of tasks are run by them below
SIZES = ("nlp/glue-patient-kd-6", "nlp/glue-tinybert-6")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SIZES)) for n in PACKAGED])
def test_every_paper_runs(name: str, folder: Path, tmp_path: Path) -> None:
    stages, layers, term = EXPECTED[name]
    result, finished = run(small(name, folder), tmp_path / "run")
    outcomes = [v for k, v in finished.items() if "/stages/" in k]
    assert [k.rpartition("/")[2] for k in finished if "/stages/" in k] == [f"{i}-{s}" for i, s in enumerate(stages)]
    assert [outcome["steps"] for outcome in outcomes] == [2] * len(stages)
    assert f"loss_{term}" in outcomes[0]["history"][0]
    assert result.student.config.num_hidden_layers == layers
    if name in GLUE:
        assert finished["teacher"]["steps"] == 2
        assert finished["seed-0/alone-0.0001"]["steps"] == 2
        assert "validation is held out of its training set" in result.report["data"]
        assert set(result.report["teacher"]["test"]) >= {"accuracy", "binary_f1", "mcc"}
    if "glue-tinybert" in name:
        assert "copies with replaced words" in result.report["data"]
        assert {h["learning_rate"] for h in outcomes[0]["history"] if "loss" in h} == {5e-5}  # constant
        assert max(h["learning_rate"] for h in outcomes[1]["history"] if "loss" in h) == pytest.approx(3e-5)


def test_mnli_is_tested_twice(folder: Path, tmp_path: Path) -> None:
    recipe = small("nlp/glue-patient-kd-6", folder, "data.glue.task=mnli", "baseline=null")
    result, _ = run(recipe, tmp_path / "run")
    assert result.student.config.num_hidden_layers == 6
    found = result.report["distilled"]["distilled"]["0"]["test"]
    assert {"accuracy", "mismatched_accuracy"} <= set(found)
    assert result.report["test_samples"] == 16
    assert "10 mismatched test" in result.report["data"]


def test_regression_of_pairs_by_tinybert(folder: Path, tmp_path: Path) -> None:
    recipe = small("nlp/glue-tinybert-6", folder, "data.glue.task=stsb", "baseline=null")
    result, finished = run(recipe, tmp_path / "run")
    assert result.student.config.num_hidden_layers == 6
    assert result.report["metric"] == "spearman"
    assert result.student.config.num_labels == 1
    assert [v["steps"] for k, v in finished.items() if "/stages/" in k] == [2, 2]


def test_what_general_distillation_gives_starts_a_task(folder: Path, tmp_path: Path) -> None:
    run(small("nlp/general-tinybert-4", folder), tmp_path / "general")
    student = tmp_path / "general" / "student"
    started = small("nlp/glue-tinybert-4", folder, f"student.model={student}")
    task = recipes.task_named("nlp")
    model = task.student(started, task.load(started), None, 0)
    general = transformers.BertForMaskedLM.from_pretrained(student).state_dict()
    same = [k for k, v in model.state_dict().items() if k in general and torch.equal(v, general[k])]
    assert len(same) == sum(k.startswith("bert.") for k in general) > 60


def test_a_plan_says_how_long_each_stage_is(folder: Path) -> None:
    def said(name: str, *overrides: str) -> str:
        return dict(plans.check(small(name, folder, *overrides)).summary)["distillation"]

    tinybert, cola = "nlp/glue-tinybert-4", "data.glue.task=cola"
    more = "training.max_steps=null"
    assert said(tinybert, cola, more) == "50 epochs at 5e-05, then 3 epochs at 3e-05; 1 steps an epoch, batch 32"
    assert said("nlp/glue-lrc-bert").startswith("14.4 epochs at 5e-05, then 3.6 epochs at 5e-05; 2 steps an epoch, at")


# ---- what the recipes say


@pytest.mark.parametrize("name", GLUE)
@pytest.mark.parametrize("task", GLUE_TASKS)
def test_every_task_of_every_recipe_is_valid_and_survives_yaml(name: str, task: str, tmp_path: Path) -> None:
    text = recipes.dump_recipe(recipes.load_recipe(name, [f"data.glue.task={task}"]))
    path = tmp_path / f"{name.rpartition('/')[2]}.yaml"
    path.write_text(text)
    again = recipes.load_recipe(path)
    assert recipes.dump_recipe(again) == text
    assert again.data.glue.task == task


def options(name: str, task: str) -> tuple[Any, dict[str, Any]]:
    loaded = recipes.load_recipe(f"nlp/{name}", [f"data.glue.task={task}"])
    return loaded, recipes.method_options(loaded)


def test_the_papers_numbers_for_a_task() -> None:
    for size in "46":
        for task, epochs, copies in (("cola", 50, 30), ("mnli", 10, 10), ("sst2", 20, 20), ("rte", 20, 30)):
            loaded, own = options(f"glue-tinybert-{size}", task)
            assert (own["intermediate_epochs"], loaded.data.augment.n) == (epochs, copies)
    for task, rate, temperature, alpha, beta, normalise in (
        ("mnli", 5e-5, 10, 0.5, 100, False), ("rte", 1e-5, 10, 0.7, 500, True), ("sst2", 5e-5, 10, 0.5, 100, True)
    ):  # fmt: skip
        loaded, own = options("glue-patient-kd-6", task)
        assert loaded.training.learning_rate == rate
        assert [own[k] for k in ("temperature", "alpha", "beta", "normalise")] == [temperature, alpha, beta, normalise]
    assert options("glue-lrc-bert", "rte")[0].training.epochs == 90
    assert options("glue-lrc-bert", "qqp")[0].data.augment is None


@pytest.mark.parametrize("name", PACKAGED)
def test_a_recipe_says_in_a_line_what_it_is_and_costs(name: str) -> None:
    lines = recipes.packaged_recipes()[name].splitlines()
    assert "GPU" in lines[0]
    assert lines[0].endswith("; not run here)")
    assert len(lines) <= 40


def test_plain_text_is_asked_for() -> None:
    task = recipes.task_named("nlp")
    with pytest.raises(DataError, match=r"corpus\.txt: no such file"):
        task.load(recipes.load_recipe("nlp/general-tinybert-4"))
