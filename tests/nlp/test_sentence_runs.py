"""Whole runs of sentence-embedding distillation on a tiny teacher."""

import csv
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel

import taskkd as kd
from taskkd import plans, recipes, reports, runs
from taskkd.errors import CacheError, DataError, RecipeError
from taskkd.nlp.sentence import SentenceEncoder, load_sentence_encoder
from tests import tiny
from tests.nlp import wordpieces

SENTENCES = [text for text, _ in tiny.sentences(160, seed=4)]


def write(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trunk of the trained classifier: its embeddings tell good from bad."""
    folder = tmp_path_factory.mktemp("teacher") / "encoder"
    SentenceEncoder(tiny.teacher().bert, max_length=48).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, teacher: Path) -> Path:
    write(tmp_path / "train.csv", ["text"], [[t] for t in SENTENCES])
    path = tmp_path / "my.yaml"
    path.write_text(f"""schema: 1
task: nlp
data:
  files: {{train: {tmp_path}/train.csv}}
  type: sentence_embedding
teacher: {{model: {teacher}}}
student: {{config: {{num_hidden_layers: 2}}}}
method: {{name: embedding_mimic}}
training: {{epochs: 3, learning_rate: 3e-3, batch_size: 16}}
""")
    return path


def run(recipe: Path, folder: Path, *overrides: str, **options: Any) -> runs.Result:
    return runs.run_recipe(recipes.load_recipe(recipe, overrides), folder, say=lambda _: None, **options)


def values(result: runs.Result, name: str = "pairwise_spearman") -> dict[str, float]:
    return {row["model"]: row[name] for row in reports.rows(result.report)}


def test_a_recipe_from_start_to_report(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    result = run(recipe, folder, "training.epochs=10")
    found = values(result)
    assert list(found) == ["teacher", "undistilled", "distilled"]
    assert found["teacher"] == pytest.approx(1.0)
    assert found["distilled"] > found["undistilled"] + 0.3
    report = json.loads((folder / "report.json").read_text())
    assert report["distilled"]["distilled"]["0"]["test"]["teacher_cosine"] > 0.6
    assert report["data"] == "128 to train on, 0 unlabelled, 16 validation, 16 test; sentence embeddings"
    assert (folder / "curves.png").stat().st_size > 10_000
    student = load_sentence_encoder(str(folder / "student")).eval()
    assert (student.pooling, student.normalise, student.max_length) == ("mean", True, 48)
    batch = tiny.tokenizer()(SENTENCES[:4], padding=True, return_tensors="pt")
    assert torch.equal(
        student(**batch)["sentence_embedding"], result.student.eval()(**batch)["sentence_embedding"]
    )  # fmt: skip

    # Started again, nothing is trained again.
    monkeypatch.setattr(kd.Trainer, "train", None)
    assert run(recipe, folder, "training.epochs=10").report["distilled"] == result.report["distilled"]

    assert runs.evaluate(folder)["pairwise_spearman"] == pytest.approx(found["distilled"])
    write(tmp_path / "other.csv", ["text"], [[t] for t in SENTENCES[:20]])
    assert set(runs.evaluate(folder, str(tmp_path / "other.csv"))) == {"pairwise_spearman", "teacher_cosine"}
    (vector, none, text), (cosine, *_) = runs.predict(folder, ["the film", "the film\tthe film"])
    assert (none, text, cosine) == (None, "the film", "1.0000")
    assert torch.tensor(json.loads(vector)).norm() == pytest.approx(1.0, abs=1e-4)


def test_an_interrupted_start_is_not_measured_twice(recipe: Path, tmp_path: Path) -> None:
    alone = run(recipe, tmp_path / "run", "method=null")
    assert list(values(alone)) == ["teacher", "undistilled"]
    assert load_sentence_encoder(str(tmp_path / "run" / "student")).config.num_hidden_layers == 2
    with pytest.raises(RecipeError, match="neither a method nor a baseline"):
        run(recipe, tmp_path / "none", "method=null", "baseline=null")


def test_scored_pairs_decide(recipe: Path, tmp_path: Path, teacher: Path) -> None:
    rng, model, tokenizer = random.Random(0), load_sentence_encoder(str(teacher)).eval(), tiny.tokenizer()
    rows = []
    for _ in range(60):
        pair = rng.sample(SENTENCES, 2)
        with torch.no_grad():
            a, b = model(**tokenizer(pair, padding=True, return_tensors="pt"))["sentence_embedding"]
        rows.append([*pair, f"{float(a @ b) + rng.gauss(0, 0.02):.4f}"])
    for part, chosen in (("validation", rows[:30]), ("test", rows[30:])):
        write(tmp_path / f"{part}.csv", ["sentence1", "sentence2", "score"], chosen)
    scored = [f"data.scored_pairs.{part}={tmp_path}/{part}.csv" for part in ("validation", "test")]
    result = run(recipe, tmp_path / "run", *scored, "training.epochs=1")
    assert result.report["metric"] == "spearman"
    found = values(result, "spearman")
    assert 0.8 < found["teacher"] < 1
    assert {"spearman", "pairwise_spearman", "teacher_cosine"} <= set(
        result.report["distilled"]["distilled"]["0"]["test"]
    )
    again = runs.evaluate(tmp_path / "run", f"{tmp_path}/test.csv")
    assert again["spearman"] == pytest.approx(found["distilled"])
    write(tmp_path / "test.csv", ["sentence1", "sentence2", "score"], [["a", "b", ""]])
    with pytest.raises(DataError, match=r"test\.csv, line 2: the pair has no score in column 'score'"):
        run(recipe, tmp_path / "other", *scored)
    with pytest.raises(DataError, match="scored_pairs are what is evaluated on; there is other validation data too"):
        run(recipe, tmp_path / "another", *scored, f"data.files.validation={tmp_path}/train.csv")
    with pytest.raises(RecipeError, match="scored_pairs is for the type sentence_embedding, not for classification"):
        recipes.load_recipe(recipe, [*scored, "data.type=classification"])


@pytest.mark.parametrize("method", ["margin_mse", "candidate_kl", "embedding_mimic"])
def test_queries_and_candidates(recipe: Path, tmp_path: Path, method: str) -> None:
    rng = random.Random(0)
    write(
        tmp_path / "triples.csv", ["query", "positive", "negative"], [rng.sample(SENTENCES, 3) for _ in range(60)]
    )  # fmt: skip
    changes = [
        f"data.files.train={tmp_path}/triples.csv", "data.text=[query, positive, negative]",
        f"method={{name: {method}}}", "training.epochs=2",
    ]  # fmt: skip
    cached = run(recipe, tmp_path / "run", *changes)
    live = run(recipe, tmp_path / "live", *changes, "teacher.cache=null")
    assert values(cached)["distilled"] != values(cached)["undistilled"]
    a, b = (r.report["distilled"]["distilled"]["0"]["history"][0] for r in (cached, live))
    assert {k: a[k] for k in a if k.startswith("loss")} == pytest.approx(
        {k: b[k] for k in b if k.startswith("loss")}, rel=1e-3
    )


def test_a_cache_of_several_texts_sees_changed_text(teacher: Path, tmp_path: Path) -> None:
    from taskkd.nlp.kinds.sentences import TextsCollator

    tokenizer = tiny.tokenizer()

    def batch(texts: list[str], first: int) -> dict[str, Any]:
        rows = [dict(tokenizer(texts[i : i + 3])) | {"id": first + i // 3} for i in range(0, len(texts), 3)]
        return TextsCollator(tokenizer)(rows)

    both = batch(SENTENCES[:6], 0)
    assert both["input_ids"].shape[:2] == (2, 3)
    cached = kd.Cached(load_sentence_encoder(str(teacher)), tmp_path / "cache")
    cached.attach(["out.sentence_embedding"])
    cached.build([both], total=2)
    alone = batch(SENTENCES[3:6], 1)  # other padding
    found = cached(alone)["out.sentence_embedding"]
    torch.testing.assert_close(found, cached.live(both)["out.sentence_embedding"][1:])
    with pytest.raises(CacheError):
        cached(batch(SENTENCES[9:12], 1))


def test_terms_by_hand_and_a_student_of_another_size(recipe: Path, tmp_path: Path) -> None:
    narrow = "student={config: {num_hidden_layers: 1, hidden_size: 8, intermediate_size: 16}}"
    term = (
        "terms=[{name: similarity, loss: similarity_preserving, student: out.sentence_embedding, normalise: samples}]"
    )
    result = run(recipe, tmp_path / "run", narrow, "method=null", term)
    assert values(result)["distilled"] > values(result)["undistilled"]
    assert "teacher_cosine" not in result.report["distilled"]["distilled"]["0"]["test"]
    mapped = run(recipe, tmp_path / "mapped", narrow, "training.epochs=1")
    assert mapped.student.embedding_size == 8


def test_a_distilbert_student(recipe: Path, tmp_path: Path) -> None:
    result = run(recipe, tmp_path / "run", "student={layers: [0, 2], architecture: distilbert}", "training.epochs=1")
    assert type(result.student.encoder) is DistilBertModel
    with pytest.raises(RecipeError, match="architecture goes with layers"):
        recipes.load_recipe(recipe, ["student={model: x, architecture: distilbert}"])


def test_a_plan(recipe: Path) -> None:
    plan = plans.check(recipes.load_recipe(recipe))
    assert dict(plan.summary)["teacher's own pairwise_spearman"].startswith("1.0000")
    assert [t.name for t in plan.stages["distil"].terms] == ["embedding"]


def test_what_cannot_be_done_ends_in_a_sentence(recipe: Path, tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(RecipeError, match=r"teacher\.finetune: sentence_embedding has no labels to fine-tune on"):
        recipes.load_recipe(recipe, ["teacher.finetune={}"])
    with pytest.raises(RecipeError, match="a sentence encoder has no logits to compare; the method embedding_mimic"):
        run(recipe, tmp_path / "run", "method={name: soft_targets}")
    alike = load_sentence_encoder(str(teacher))
    torch.nn.init.zeros_(alike.encoder.encoder.layer[3].output.LayerNorm.weight)
    alike.save_pretrained(tmp_path / "alike")
    tiny.tokenizer().save_pretrained(tmp_path / "alike")
    with pytest.raises(RecipeError, match=r"have a mean cosine of 1\.0000: they tell nothing apart"):
        run(recipe, tmp_path / "other", f"teacher.model={tmp_path}/alike")


def test_one_call(tmp_path: Path, teacher: Path) -> None:
    model = load_sentence_encoder(str(teacher))
    result = kd.distill(
        [0, 2], str(teacher), SENTENCES, task="nlp", method="embedding_mimic", output_dir=tmp_path / "names",
        training={"epochs": 1},
    )  # fmt: skip
    assert result.student.config.num_hidden_layers == 2
    held = kd.distill(
        kd.nlp.student_from_layers(model, [1]), model, [{"text": t} for t in SENTENCES[:60]], SENTENCES[60:90],
        task="nlp", method="embedding_mimic", output_dir=tmp_path / "models", training={"epochs": 1},
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    assert held.report["metric"] == "pairwise_spearman"


@pytest.mark.parametrize("columns", [1, 2])
def test_a_student_with_another_tokenizer(recipe: Path, tmp_path: Path, columns: int) -> None:
    pieces = wordpieces.wordpiece(700)
    own = DistilBertModel(
        DistilBertConfig(vocab_size=len(pieces), dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    )  # fmt: skip
    wordpieces.save(own, pieces, tmp_path / "student")
    if columns == 2:
        rows = [list(pair) for pair in zip(SENTENCES[::2], SENTENCES[1::2], strict=True)]
        write(tmp_path / "train.csv", ["text", "other"], rows)
    changes = ["data.text=[text, other]"] if columns == 2 else []
    result = run(recipe, tmp_path / "run", f"student={{model: {tmp_path}/student}}", "training.epochs=8", *changes)
    assert result.student.normalise  # a plain transformer is pooled as the teacher is
    assert values(result)["teacher"] == pytest.approx(1.0)
    assert values(result)["distilled"] > 0.2
    test = runs.evaluate(tmp_path / "run")
    assert test["pairwise_spearman"] == pytest.approx(values(result)["distilled"])
    again = runs.evaluate(tmp_path / "run", f"{tmp_path}/train.csv")
    assert set(again) == {"pairwise_spearman", "teacher_cosine"}


@pytest.mark.slow
def test_a_real_student_of_three_layers(tmp_path: Path) -> None:
    """Acceptance B3: one epoch on 4,500 sentences raises the pairwise Spearman by .05 or more."""
    torch.set_num_threads(1)
    loaded = recipes.load_recipe("nlp/sentence-embedding", ["training.epochs=1"])
    found = values(runs.run_recipe(loaded, tmp_path / "run", say=lambda _: None))
    assert found["distilled"] >= found["undistilled"] + 0.05


def test_the_recipe_of_the_docs_runs(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", page, re.S) if "type: sentence_embedding" in b]
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(block)
    Path("sentences.txt").write_text("\n".join(SENTENCES))
    pairs = [[a, b, str(len(set(a.split()) & set(b.split())))] for a, b in itertools.pairwise(SENTENCES[:60])]
    for name in ("sts-dev.csv", "sts-test.csv"):
        write(Path(name), ["sentence1", "sentence2", "score"], pairs)
    result = run(Path("my.yaml"), tmp_path / "run", f"teacher.model={teacher}")
    assert result.report["metric"] == "spearman"
