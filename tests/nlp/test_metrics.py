import math
from typing import Any

import pytest
import torch

from taskkd.errors import RecipeError
from taskkd.nlp import task_loss
from taskkd.nlp.answers import Answers
from taskkd.nlp.entities import Tags
from taskkd.nlp.metrics import Classification, MaskedTokens, Regression, best_constant, chosen


def test_classification_by_hand() -> None:
    metric = Classification(3)
    logits = torch.eye(3)[[0, 0, 1, 2, 2, 0]]
    metric.update({"logits": logits}, {"labels": torch.tensor([0, 1, 1, 2, 0, -100])})
    found = metric.compute()
    assert found["accuracy"] == pytest.approx(3 / 5)
    # per class F1: 0 -> 2*1/(2+2), 1 -> 2*1/(2+1), 2 -> 2*1/(1+2)
    assert found["f1"] == pytest.approx((0.5 + 2 / 3 + 2 / 3) / 3)
    assert metric.by_class()["1"] == {"precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3), "samples": 2}
    assert list(Classification(2, ["no", "yes"]).by_class()) == ["no", "yes"]


def test_binary_f1_is_that_of_the_second_class() -> None:
    metric = Classification(2)
    metric.update({"logits": torch.eye(2)[[1, 1, 1, 0, 0]]}, {"labels": torch.tensor([1, 0, 1, 1, 0])})
    assert metric.compute()["binary_f1"] == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    assert "binary_f1" not in Classification(3).compute()


def test_the_best_constant_answer() -> None:
    labels = [1, 1, 1, 0, -100]
    assert best_constant("accuracy", Classification(2), labels) == pytest.approx(3 / 4)
    assert best_constant("binary_f1", Classification(2), labels) == pytest.approx(6 / 7)
    assert best_constant("f1", Classification(2), labels) == pytest.approx(3 / 7)
    assert best_constant("mcc", Classification(2), labels) == 0


@pytest.mark.parametrize(
    ("name", "metric", "nearest"),
    [
        ("binary_f1", Classification(2), "f1"),
        ("pearson", Regression(), "spearman"),
        ("precision", Tags(["O", "B-PER"]), "recall"),
        ("exact_match", Answers([]), "f1"),
        ("accuracy", MaskedTokens(), "accuracy"),
    ],
)
def test_every_metric_of_every_kind_may_be_chosen(name: str, metric: Any, nearest: str) -> None:
    assert chosen(name, metric) == name
    with pytest.raises(RecipeError, match=f"there is none.*choose of .*{nearest}"):
        chosen("perplex", metric)
    with pytest.raises(RecipeError, match="less of it is better"):
        chosen("perplexity", metric)


def test_matthews_is_the_correlation_of_two_classes() -> None:
    torch.manual_seed(0)
    labels, guesses = torch.randint(0, 2, (50,)), torch.randint(0, 2, (50,))
    metric = Classification(2)
    metric.update({"logits": torch.eye(2)[guesses]}, {"labels": labels})
    expected = torch.corrcoef(torch.stack([labels.double(), guesses.double()]))[0, 1].item()
    assert metric.compute()["mcc"] == pytest.approx(expected)


def test_merging_shares_equals_one_process() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 4), torch.randint(0, 4, (40,))
    scores = torch.randn(40)
    for make, target in ((lambda: Classification(4), labels), (Regression, scores)):
        whole, parts = make(), [make(), make()]
        out = logits if target is labels else logits[:, :1]
        whole.update({"logits": out}, {"labels": target})
        for i, part in enumerate(parts):
            part.update({"logits": out[i::2]}, {"labels": target[i::2]})
        merged = make()
        merged.merge([p.state() for p in parts])
        assert merged.compute() == pytest.approx(whole.compute())


def test_regression_by_hand() -> None:
    metric = Regression()
    metric.update(
        {"logits": torch.tensor([[1.0], [2.0], [4.0], [9.0]])}, {"labels": torch.tensor([1.0, 3.0, 3.0, math.nan])}
    )
    found = metric.compute()
    assert found["rmse"] == pytest.approx(math.sqrt(2 / 3))
    assert found["spearman"] == pytest.approx(1.5 / math.sqrt(2 * 1.5))  # ranks 0 1 2 against 0 1.5 1.5
    assert found["pearson"] == pytest.approx(torch.corrcoef(torch.tensor([[1.0, 2, 4], [1, 3, 3]]))[0, 1].item())


@pytest.mark.parametrize("metric", [Classification(2), Regression()])
def test_nothing_seen_is_zero_not_nan(metric: Classification | Regression) -> None:
    assert all(v == 0 for v in metric.compute().values())


def test_task_loss_is_the_mean_over_labelled_samples() -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    labels = torch.tensor([0, -100, 2, -100, 1])
    expected = torch.nn.functional.cross_entropy(logits[[0, 2, 4]], labels[[0, 2, 4]])
    assert task_loss({"logits": logits}, {"labels": labels}).item() == pytest.approx(expected.item())
    empty = task_loss({"logits": logits}, {"labels": torch.full((5,), -100)})
    empty.backward()
    assert empty.item() == 0
    assert torch.equal(logits.grad, torch.zeros(5, 3))


def test_task_loss_of_regression_leaves_nan_out() -> None:
    logits = torch.tensor([[1.0], [5.0]], requires_grad=True)
    loss = task_loss({"logits": logits}, {"labels": torch.tensor([3.0, math.nan])})
    loss.backward()
    assert loss.item() == 4.0
    assert logits.grad.tolist() == [[-4.0], [0.0]]
