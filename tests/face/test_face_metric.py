"""The metric of verification: in batches, over processes, between two models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from taskkd.errors import DataError, NonFiniteError, TaskkdError
from taskkd.face.metrics import VerificationMetric
from taskkd.face.pairs import Pairs
from taskkd.face.verification import squared_distances, verify
from taskkd.images import in_memory
from tests.face.files import png

CASE = dict(np.load(Path(__file__).parents[1] / "parity" / "cases" / "face" / "eval_fliptest_40.npz"))


def pairs_of(count: int) -> Pairs:
    images = [in_memory(f"image {n}", png(n)) for n in range(2 * count)]
    numbers = np.arange(2 * count)
    return Pairs(images, numbers[::2], numbers[1::2], numbers[:count] % 2 == 0)


def embeddings(pairs: Pairs, size: int = 6, seed: int = 0) -> Tensor:
    """(views, size), of which those of one person are alike."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(len(pairs.faces), size, generator=draw)
    images[1::2][torch.from_numpy(pairs.same)] = images[::2][torch.from_numpy(pairs.same)]
    return images.repeat_interleave(2, 0) + 0.7 * torch.randn(2 * len(images), size, generator=draw)


def test_the_authors_flip_test() -> None:
    """The embeddings of the case."""
    pairs = pairs_of(40)
    metric = VerificationMetric(pairs)
    views = torch.from_numpy(np.stack([CASE["out_emb"], CASE["out_emb_flip"]], 1).reshape(160, 12))
    metric.update(views, {"id": torch.arange(160)})
    found = metric.compute()
    assert pairs.same.tolist() == CASE["in_issame"].tolist()
    assert found["accuracy"] == CASE["out_acc"]
    assert found["accuracy_std"] == pytest.approx(CASE["out_std"], rel=1e-12)
    assert found["norm"] == pytest.approx(CASE["out_xnorm"], rel=1e-8)


def test_names_and_values() -> None:
    pairs = pairs_of(30)
    views = embeddings(pairs)
    metric = VerificationMetric(pairs, folds=5, far=(0.5, 1e-2))
    metric.update({"embeddings": views}, {"id": torch.arange(120)})
    found = metric.compute()
    assert list(found) == ["accuracy", "accuracy_std", "threshold", "auc", "tar@5e-01", "tar@1e-02", "norm"]
    summed = torch.nn.functional.normalize(views.double().reshape(60, 2, -1).sum(1), dim=1).numpy()
    want = verify(squared_distances(summed[::2], summed[1::2]), pairs.same, 5)
    assert (found["accuracy"], found["threshold"]) == (want.accuracy, want.thresholds.mean())
    assert 0.6 < found["accuracy"] < 1
    one = VerificationMetric(pairs, folds=5, flip=False)
    one.update(SimpleNamespace(embeddings=views[::2]), {"id": torch.arange(0, 120, 2)})
    plain = torch.nn.functional.normalize(views[::2].double(), dim=1).numpy()
    assert one.compute()["accuracy"] == verify(squared_distances(plain[::2], plain[1::2]), pairs.same, 5).accuracy
    metric.reset()
    with pytest.raises(DataError, match="120 of the 120 views"):
        metric.compute()


def test_shards_give_what_the_whole_gives() -> None:
    pairs = pairs_of(20)
    views = embeddings(pairs)
    whole = VerificationMetric(pairs)
    whole.update(views, {"id": torch.arange(80)})
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    shards = [VerificationMetric(pairs) for _ in range(3)]
    for number, ids in enumerate(order.split(13)):
        shards[number % 2].update(views[ids], {"id": ids})
    shards[1].update(views[:5] + 1e-4, {"id": torch.arange(5)})  # seen twice, as a shared last batch is
    states = [shard.state() for shard in shards]
    assert len(states[2][0]) == 0
    for shard in shards:
        shard.merge(states)
        assert shard.compute() == shards[0].compute()
    again = VerificationMetric(pairs)
    again.merge(states[:1] + [(ids[:-5], rows[:-5]) for ids, rows in states[1:2]])
    assert again.compute() == whole.compute()


def test_search_in_another_models_gallery() -> None:
    pairs = pairs_of(30)
    student, teacher = embeddings(pairs), embeddings(pairs, seed=5)
    of_teacher = VerificationMetric(pairs)
    of_teacher.update(teacher, {"id": torch.arange(120)})
    gallery = of_teacher.embeddings()
    assert gallery.norm(dim=1) == pytest.approx(np.ones(60))
    metric = VerificationMetric(pairs, gallery=3 * gallery)
    metric.update(student, {"id": torch.arange(120)})
    queries = metric.embeddings().numpy()
    want = verify(squared_distances(queries[pairs.left], gallery.numpy()[pairs.right]), pairs.same)
    assert metric.compute()["accuracy"] == want.accuracy
    itself = VerificationMetric(pairs, gallery=gallery)
    itself.update(teacher, {"id": torch.arange(120)})
    assert itself.compute() == pytest.approx(of_teacher.compute(), abs=1e-9)
    other = VerificationMetric(pairs, gallery=torch.ones(60, 4))
    other.update(student, {"id": torch.arange(120)})
    with pytest.raises(TaskkdError, match="of 6 numbers cannot search a gallery of 4: the model needs a projector"):
        other.compute()
    with pytest.raises(TaskkdError, match=r"the gallery is \(3, 4\): expected \(60, D\)"):
        VerificationMetric(pairs, gallery=torch.ones(3, 4))


def test_bad_batches() -> None:
    pairs = pairs_of(20)
    views = embeddings(pairs)
    metric = VerificationMetric(pairs)
    with pytest.raises(DataError, match="the batch has no `id`"):
        metric.update(views, {"images": views})
    with pytest.raises(DataError, match="ids 0 to 80: the views of the pairs' images are 0 to 79"):
        metric.update(torch.ones(81, 6), {"id": torch.arange(81)})
    with pytest.raises(TaskkdError, match=r"embeddings \(80, 6\) for 3 ids"):
        metric.update(views, {"id": torch.arange(3)})
    metric.update(views[:77], {"id": torch.arange(77)})
    with pytest.raises(
        DataError, match=r"3 of the 80 views .* the first: image 38 .image 38., flipped; go through all"
    ):
        metric.compute()
    metric.update(torch.full((3, 6), torch.nan), {"id": torch.arange(77, 80)})
    with pytest.raises(NonFiniteError, match="the embedding of image 38 is not finite"):
        metric.compute()


def test_a_model_that_gives_zeros_is_at_chance() -> None:
    metric = VerificationMetric(pairs_of(20))
    metric.update(torch.zeros(80, 4), {"id": torch.arange(80)})
    found = metric.compute()
    assert (found["accuracy"], found["auc"], found["norm"]) == (0.5, 0.5, 0)


def test_pairs_that_cannot_be_measured() -> None:
    with pytest.raises(DataError, match="expected pairs of both kinds, and one for each of 10 folds"):
        VerificationMetric(pairs_of(4))
    images = [in_memory("a", b""), in_memory("b", b"")]
    with pytest.raises(DataError, match="expected pairs of both kinds"):
        VerificationMetric(Pairs(images, [0] * 10, [1] * 10, [True] * 10))
