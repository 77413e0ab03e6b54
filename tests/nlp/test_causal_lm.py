"""Causal language models: data, loss and metric written out, the methods, whole runs."""

import csv
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import taskkd as kd
from taskkd import losses, recipes, reports, runs
from taskkd.errors import DataError, RecipeError
from taskkd.nlp import METHODS, heads, models
from taskkd.nlp.kinds.base import Encoding
from taskkd.nlp.kinds.causal import CAUSAL_LM, next_token_loss
from taskkd.nlp.text import Row
from tests import tiny
from tests.nlp import wordpieces


def texts(count: int, seed: int) -> list[str]:
    """Words that follow each other in a fixed order, from any of them on: the next one can be learned."""
    rng = random.Random(seed)
    starts = [(rng.randrange(12), rng.randint(4, 9)) for _ in range(count)]
    return [" ".join(tiny.PLAIN[(s + i) % 12] for i in range(n)) for s, n in starts]


TEXTS = texts(120, seed=3)


def gpt2(vocabulary: int, layers: int = 2, seed: int = 0, hidden: int = 16) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=2, eos_token_id=3, **sizes)).eval()


def rows(texts: list[str], answers: list[str] | None = None) -> list[Row]:
    return [Row(t, answers[i] if answers else None, None, f"row {i}") for i, t in enumerate(texts)]


def batch(texts: list[str], answers: list[str] | None = None, tokenizer: Any = None, length: int = 32) -> Any:
    tokenizer = tokenizer or tiny.tokenizer()
    table = CAUSAL_LM.encode(rows(texts, answers), tokenizer, [], Encoding(length))
    return CAUSAL_LM.collator(tokenizer)([table[i] for i in range(len(table))])


def test_heads_of_decoders() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    )
    assert heads.head_of(gpt2(40)) is heads.head_of(llama) is heads.CAUSAL_LM
    student = models.student_from_layers(llama, [0, 3]).eval()
    assert student(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 40)
    assert models.student_from_layers(gpt2(40, 4), [1]).config.num_hidden_layers == 1


def test_every_token_is_its_label_and_of_prompts_none() -> None:
    plain = batch(["the film", "a warm music was great"])
    assert torch.equal(plain["labels"], plain["input_ids"].masked_fill(plain["attention_mask"] == 0, -100))
    asked = batch(["the film"], ["was great"])
    ids = tiny.tokenizer()("the film was great")["input_ids"]
    assert asked["input_ids"][0].tolist() == ids[:-1]  # [SEP] does not stand between, and there is no end token
    assert asked["labels"][0].tolist() == [-100, -100, -100, *ids[3:-1]]
    with pytest.raises(DataError, match=r"row 0: nothing is left of the answer: the prompt has 3 tokens"):
        batch(["the film"], ["was great"], length=3)
    left = tiny.tokenizer()
    left.padding_side = "left"
    assert batch(["the film", "the"], tokenizer=left)["labels"][1, 0] == -100


def test_padding_in_the_data_is_no_label() -> None:
    import datasets

    found = dict(tiny.tokenizer()(["the film", "a warm music was great"], padding="max_length", max_length=12))
    table = CAUSAL_LM.adopt(datasets.Dataset.from_dict(found), tiny.tokenizer(), [], Encoding(12), label=None)
    masked = torch.tensor(found["input_ids"]).masked_fill(torch.tensor(found["attention_mask"]) == 0, -100)
    assert torch.equal(torch.tensor(table["labels"]), masked)


def test_a_tokenizer_without_padding_pads_with_the_end() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="neither a padding nor an end-of-text token"):
        CAUSAL_LM.collator(tokenizer)
    tokenizer.eos_token = "[SEP]"
    assert CAUSAL_LM.collator(tokenizer).tokenizer.pad_token == "[SEP]"


def test_loss_and_metric_are_the_models_own() -> None:
    model, data = gpt2(24), batch(["the film was dull", "a warm plot", "music"])
    with torch.no_grad():
        output = model(**data)
    torch.testing.assert_close(next_token_loss(output, data), output.loss)
    metric = CAUSAL_LM.metric([], [])
    for i in range(3):
        metric.update({"logits": output.logits[i : i + 1]}, {"labels": data["labels"][i : i + 1]})
    found = metric.compute()
    assert found["perplexity"] == pytest.approx(math.exp(float(output.loss)), rel=1e-5)
    right = output.logits[:, :-1].argmax(-1) == data["labels"][:, 1:]
    assert found["accuracy"] == pytest.approx(float(right.sum() / (data["labels"][:, 1:] >= 0).sum()))
    nothing = {"labels": torch.full((1, 4), -100)}
    assert float(next_token_loss({"logits": torch.randn(1, 4, 24)}, nothing)) == 0.0


def value(method: Any, student: Any, teacher: Any, data: Any) -> float:
    distiller = kd.Distiller(student, kd.Frozen(teacher), method.stages[0].terms, task_weight=0.0)
    distiller.prepare(data)
    distiller.eval().training = True  # no dropout
    out = distiller(**data)["logits"].item()
    distiller.close()
    return out


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_generalized_kd_at_the_positions_before_an_answers_tokens(beta: float) -> None:
    student, teacher = gpt2(24).double(), gpt2(24, 3, seed=1).double()
    data = batch(["the film", "a warm plot was"], ["was great", "dull"])
    found = value(METHODS["generalized_kd"](student, teacher, beta=beta), student, teacher, data)
    inputs = {k: data[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        kept = data["labels"][:, 1:] >= 0
        s, t = (m(**inputs).logits[:, :-1][kept].softmax(-1) for m in (student, teacher))
    m = beta * t + (1 - beta) * s

    def kl(p: Any, q: Any) -> Any:
        return (p * (p / q).log()).sum(-1).mean()

    expected = kl(t, s) if beta == 0 else kl(s, t) if beta == 1 else beta * kl(t, m) + (1 - beta) * kl(s, m)
    assert found == pytest.approx(expected.item(), rel=1e-8)
    soft = METHODS["soft_targets"](student, teacher, temperature=1.0, weight=1.0, task_weight=0.0)
    if beta == 0:
        assert value(soft, student, teacher, data) == pytest.approx(found, rel=1e-8)


def test_universal_logits_of_one_tokenizer_and_two_vocabularies() -> None:
    student, teacher = gpt2(24).double(), gpt2(30, 3, seed=1).double()
    data = batch(["the film", "a warm plot was"], ["was great", "dull"])
    found = value(METHODS["universal_logits"](student, teacher), student, teacher, data)
    inputs = {k: data[k] for k in ("input_ids", "attention_mask")}
    sums = []
    with torch.no_grad():
        for i in range(2):
            kept = data["labels"][i, 1:] >= 0
            s, t = (
                m(**inputs).logits[i, :-1][kept].softmax(-1).sort(-1, descending=True)[0] for m in (student, teacher)
            )
            sums.append((F.pad(s, (0, 6)) - t).abs().sum(-1).mean())
    assert found == pytest.approx(torch.stack(sums).mean().item(), rel=1e-8)
    with pytest.raises(RecipeError, match="the student has a vocabulary of 24, the teacher of 30"):
        METHODS["generalized_kd"](student, teacher)
    with pytest.raises(
        RecipeError, match=r"the teacher, BertForSequenceClassification, is for sequence classification"
    ):
        METHODS["universal_logits"](student, tiny.teacher())


# ---- runs


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that has read sentences of this kind."""
    folder, tokenizer = tmp_path_factory.mktemp("decoder") / "teacher", tiny.tokenizer()
    model = gpt2(len(tokenizer), 3, hidden=32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        model(**batch(texts(32, seed=100 + step), tokenizer=tokenizer)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, teacher: Path) -> Path:
    (tmp_path / "train.txt").write_text("\n".join(TEXTS))
    path = tmp_path / "my.yaml"
    path.write_text(f"""schema: 1
task: nlp
data: {{files: {{train: {tmp_path}/train.txt}}, type: causal_lm}}
teacher: {{model: {teacher}}}
student: {{layers: [0, 2]}}
method: {{name: generalized_kd, beta: 0.5}}
training: {{epochs: 2, learning_rate: 3e-3, batch_size: 16}}
baseline: {{learning_rates: [3e-3], epochs: 1}}
""")
    return path


def run(recipe: Path, folder: Path, *overrides: str) -> runs.Result:
    return runs.run_recipe(recipes.load_recipe(recipe, overrides), folder, say=lambda _: None)


def test_a_run_on_a_text_file(recipe: Path, tmp_path: Path) -> None:
    loaded = recipes.load_recipe(recipe)
    assert loaded.teacher.cache is None  # logits of a whole vocabulary
    result = run(recipe, tmp_path / "run")
    assert [row["model"] for row in reports.rows(result.report)] == ["teacher", "student alone", "distilled"]
    test = result.report["distilled"]["distilled"]["0"]["test"]
    assert set(test) == {"accuracy", "perplexity", "loss"} and 1 < test["perplexity"] < 24
    assert runs.evaluate(tmp_path / "run")["perplexity"] == pytest.approx(test["perplexity"])
    ((continued, none, line),) = runs.predict(tmp_path / "run", ["the film"])
    assert (none, line) == (None, "the film") and isinstance(continued, str)


def test_prompts_and_answers_with_another_tokenizer(recipe: Path, tmp_path: Path) -> None:
    pieces = wordpieces.wordpiece(700)
    wordpieces.save(gpt2(len(pieces), 1), pieces, tmp_path / "student")
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["ask", "say"], *(t.split(" ", 1) for t in TEXTS)])
    changes = [
        f"data.files.train={tmp_path}/pairs.csv", "data.text=[ask, say]", f"student={{model: {tmp_path}/student}}",
        "method={name: universal_logits}", "baseline=null", "training.epochs=6",
    ]  # fmt: skip
    result = run(recipe, tmp_path / "run", *changes)
    history = result.report["distilled"]["distilled"]["0"]["history"]
    values = [h["loss_logits"] for h in history if "loss_logits" in h]
    assert values[-1] < values[0]
    with pytest.raises(RecipeError, match="a vocabulary of"):
        run(recipe, tmp_path / "other", *changes, "method={name: generalized_kd}")


def test_answers_of_two_tokenizers_are_aligned_by_order(recipe: Path, tmp_path: Path) -> None:
    """The term in a run is the loss on each side's answer tokens."""
    from taskkd.nlp.task import TASK

    pieces = wordpieces.wordpiece(700)
    wordpieces.save(gpt2(len(pieces), 1), pieces, tmp_path / "student")
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["ask", "say"], *([t, "a " + t] for t in TEXTS[:30])])
    own = recipes.load_recipe(
        recipe,
        [f"data.files.train={tmp_path}/pairs.csv", "data.text=[ask, say]", f"student={{model: {tmp_path}/student}}"],
    )
    data = TASK.load(own)
    old = TASK.teacher(own, data).eval()
    new = TASK.student(own, data, old, 0).eval()
    found = dict(data.collator([data.train[i] for i in range(4)]))
    terms = TASK.fit_terms(data, METHODS["universal_logits"](new, old).stages[0].terms)
    distiller = kd.Distiller(new, kd.Frozen(old), terms, task_weight=0.0)
    distiller.prepare(found)
    distiller.eval().training = True
    with torch.no_grad():
        s = new(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).logits
        t = old(input_ids=found["teacher_input_ids"], attention_mask=found["teacher_attention_mask"]).logits
    one = torch.zeros(found["input_ids"].shape, dtype=torch.bool)
    one[:, :-1] = found["labels"][:, 1:] >= 0
    two = found["teacher_next_mask"].bool()
    counts = [len(tiny.tokenizer()("a " + TEXTS[i], add_special_tokens=False)["input_ids"]) for i in range(30)]
    assert set(two.sum(1).tolist()) <= set(counts)
    expected = losses.universal_logits(s, t, mask=one, teacher_mask=two)
    assert distiller(**found)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_recipe_of_the_docs_runs(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", page, re.S) if "type: causal_lm" in b]
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(block)
    Path("corpus.txt").write_text("\n".join(TEXTS))
    result = run(Path("my.yaml"), tmp_path / "run", f"teacher.model={teacher}")
    assert result.report["metric"] == "accuracy"
