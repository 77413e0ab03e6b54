"""Verification and identification: equal to the authors' code, and to what the definitions say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskkd.errors import DataError, TaskkdError
from taskkd.face import verification
from taskkd.face.verification import (
    THRESHOLDS,
    auc,
    identify,
    ijb_templates,
    ijb_verify,
    roc,
    squared_distances,
    tar_at_far,
    unit,
    verify,
)

CASES = Path(__file__).parents[1] / "parity" / "cases" / "face"


def case(name: str) -> dict[str, Any]:
    return dict(np.load(CASES / f"{name}.npz"))


def made(pairs: int, seed: int, size: int = 16, spread: float = 0.8) -> tuple[Any, Any]:
    """Distances of pairs, and whether they are of one person."""
    draw = np.random.default_rng(seed)
    one = draw.normal(size=(pairs, size))
    same = draw.random(pairs) < 0.5
    other = np.where(same[:, None], one + spread * draw.normal(size=(pairs, size)), draw.normal(size=(pairs, size)))
    return squared_distances(unit(one), unit(other)), same


def by_the_book(distances: Any, same: Any, folds: int) -> tuple[list[float], list[float]]:
    """The protocol in three loops."""
    parts = np.array_split(np.arange(len(same)), folds)
    accuracies, thresholds = [], []
    for part in parts:
        rest = np.setdiff1d(np.arange(len(same)), part)
        best = max(THRESHOLDS, key=lambda t: (np.mean((distances[rest] < t) == same[rest]), -t))
        thresholds.append(float(best))
        accuracies.append(np.count_nonzero((distances[part] < best) == same[part]) / len(part))
    return accuracies, thresholds


@pytest.mark.parametrize("name", ["lfw_hard_600", "random_order_301"])
def test_ten_folds_are_bit_equal(name: str) -> None:
    given = case(f"eval_{name}")
    rows = given["in_embeddings"]
    found = verify(squared_distances(rows[::2], rows[1::2]), given["in_issame"])
    assert (found.accuracies == given["out_accuracy"]).all()
    assert (found.thresholds == given["out_best_threshold"]).all()
    assert (found.accuracy, found.std) == (given["out_mean"], given["out_std"])
    assert (found.tpr[::10] == given["out_tpr"]).all()
    assert (found.fpr[::10] == given["out_fpr"]).all()


@pytest.mark.parametrize(("pairs", "folds"), [(200, 5), (47, 10), (10, 10), (9, 2)])
def test_folds_by_the_book(pairs: int, folds: int) -> None:
    distances, same = made(pairs, pairs)
    order = np.argsort(~same, kind="stable")  # sorted, as a list of all that are same and then all others
    for given, truth in ((distances, same), (distances[order], same[order])):
        found = verify(given, truth, folds)
        assert (found.accuracies.tolist(), found.thresholds.tolist()) == by_the_book(given, truth, folds)


def test_a_distance_at_the_threshold_is_not_below_it() -> None:
    distances = np.asarray([THRESHOLDS[100], THRESHOLDS[101]] * 2)
    found = verify(distances, [True, False] * 2, 2)
    assert found.thresholds.tolist() == [THRESHOLDS[101]] * 2
    assert found.accuracy == 1


def test_six_thousand_pairs_are_fast() -> None:
    distances, same = made(6000, 0)
    took = []
    for _ in range(5):
        start = time.process_time()
        verify(distances, same)
        took.append(time.process_time() - start)
    assert min(took) < 0.1


def test_all_embeddings_equal_is_chance() -> None:
    """A model that has collapsed."""
    found = verify(np.zeros(40), [True, False] * 20)
    assert found.accuracy == 0.5
    assert auc(np.zeros(40), [True, False] * 20) == 0.5
    assert tar_at_far(np.zeros(40), [True, False] * 20, [0.1]).tolist() == [0]
    assert identify(np.ones((3, 2)), np.ones((5, 2)), [0, 1, 2])["rank@1"] == 0


def test_pairs_that_cannot_be_verified() -> None:
    with pytest.raises(DataError, match="4 pairs in 10 folds"):
        verify(np.zeros(4), [True] * 4)
    with pytest.raises(DataError, match="pair 1: the distances are not finite"):
        verify([0.0, np.nan], [True, False], 2)
    with pytest.raises(DataError, match=r"labels \(3,\)"):
        verify([0.0, 1.0], [True, False, True], 2)
    with pytest.raises(DataError, match="2 pairs of the same person and 0 of different ones"):
        roc([0.0, 1.0], [True, True])
    with pytest.raises(TaskkdError, match="the same N and D"):
        squared_distances(np.zeros((2, 3)), np.zeros((2, 4)))


def test_the_points_of_the_roc_curve() -> None:
    draw = np.random.default_rng(0)
    same = draw.random(200) < 0.3
    scores = np.round(draw.normal(size=200) + same, 1)  # with ties
    fpr, tpr, thresholds = roc(scores, same)
    assert (fpr == [np.mean(scores[~same] >= t) for t in thresholds]).all()
    assert (tpr == [np.mean(scores[same] >= t) for t in thresholds]).all()
    assert thresholds.tolist() == [np.inf, *np.unique(scores)[::-1]]
    above = np.subtract.outer(scores[same], scores[~same])
    assert auc(scores, same) == pytest.approx(np.mean((above > 0) + 0.5 * (above == 0)))
    # negatives and positives: (0, 1), (0, 2), (0, 3), (1, 3), (2, 3), (3, 4); a straight line loses its inside
    scores, same = [9, 8, 7, 6, 5, 4, 4], [True, True, True, False, False, False, True]
    assert roc(scores, same, thin=True)[2].tolist() == [np.inf, 9, 7, 5, 4]


def test_rates_at_rates(caplog: pytest.LogCaptureFixture) -> None:
    draw = np.random.default_rng(1)
    same = np.arange(3000) < 1000
    scores = draw.normal(size=3000) + 1.5 * same
    wanted = [0.0, 0.01, 0.1, 1.0]
    found = tar_at_far(scores, same, wanted, warn=False)
    for far, tar in zip(wanted, found, strict=True):
        best = max(np.mean(scores[same] >= t) for t in [*scores, np.inf] if np.mean(scores[~same] >= t) <= far)
        assert tar == pytest.approx(best)
    assert not caplog.records
    tar_at_far(scores, same, [0.01, 0.001])
    assert "2000 pairs of different people are few for FAR 0.001:" in caplog.text


def test_templates_of_ijb() -> None:
    given = case("eval_ijb11")
    numbers, features = ijb_templates(given["in_feats"], given["in_template"], given["in_media"], given["in_score"])
    assert (numbers == given["out_unique_templates"]).all()
    assert features == pytest.approx(given["out_template_feats"], abs=1e-12)
    scores = ijb_verify(numbers, features, given["in_p1"], given["in_p2"])
    assert scores == pytest.approx(given["out_score"], abs=1e-12)
    targets = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    nearest = tar_at_far(scores, given["in_label"], targets, strict=False)
    strict = tar_at_far(scores, given["in_label"], targets)
    assert (nearest == given["out_tpr_nearest"]).all()
    assert (strict == given["out_tpr_strict"]).all()
    assert nearest[3:5].round(4).tolist() == [0.4273, 0.7909]
    assert strict[3].round(4) == 0.2091


def test_templates_by_the_definition() -> None:
    rows = np.asarray([[2.0, 0], [4, 0], [0, 1], [0, 5]])
    numbers, features = ijb_templates(rows, [9, 9, 9, 3], [1, 1, 2, 2])
    assert numbers.tolist() == [3, 9]
    assert features == pytest.approx(unit(np.asarray([[0, 5.0], [3, 1]])))
    _, weighted = ijb_templates(rows, [9, 9, 9, 3], [1, 1, 2, 2], [0.5, 0, 2, 1])
    assert weighted[1] == pytest.approx(unit(np.asarray([0.5, 2.0])))
    _, plain = ijb_templates(rows, [9, 9, 9, 3], [1, 1, 2, 2], norm_score=False)
    assert plain[1] == pytest.approx(unit(np.asarray([1.0, 1])))
    with pytest.raises(DataError, match="a pair names template 4"):
        ijb_verify(numbers, features, [3, 4], [9, 9])
    with pytest.raises(DataError, match=r"expected .N, D. features and N of each"):
        ijb_templates(rows, [9, 9], [1, 1])


def test_identification_as_the_authors() -> None:
    given = case("eval_ijb1n")
    found = identify(given["in_probe"], given["in_gallery"], given["in_mask"], fpir=[0.01, 0.1], legacy=True)
    assert found["rank@1"] == given["out_top1"] == pytest.approx(0.76667, abs=1e-5)
    assert found["rank@5"] == given["out_top5"]
    assert found["rank@10"] == given["out_top10"] == 1
    assert [found["tpir@1e-02"], found["tpir@1e-01"]] == pytest.approx(given["out_recall"])
    assert [found["threshold@1e-02"], found["threshold@1e-01"]] == pytest.approx(given["out_threshold"])


def test_open_set_identification_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(2)
    gallery = unit(draw.normal(size=(20, 8)))
    mates = np.where(np.arange(80) < 50, np.arange(80) % 20, -1)
    probes = unit(np.where((mates >= 0)[:, None], gallery[mates], 0) + 0.4 * draw.normal(size=(80, 8)))
    found = identify(probes, gallery, mates, fpir=[0.1, 1.0])
    scores = probes @ gallery.T
    strangers, known = scores[mates < 0].max(1), scores[mates >= 0]
    assert np.mean(strangers > found["threshold@1e-01"]) <= 0.1
    assert np.mean(strangers >= found["threshold@1e-01"]) > 0.1  # not lower than need be
    first = known.argmax(1) == mates[mates >= 0]
    own = known[np.arange(50), mates[mates >= 0]]
    assert found["tpir@1e-01"] == pytest.approx(np.mean(first & (own > found["threshold@1e-01"])))
    assert found["tpir@1e+00"] == found["rank@1"] == pytest.approx(first.mean())
    assert 0 < found["tpir@1e-01"] < 1
    monkeypatch.setattr(verification, "CHUNK", 60)  # three probes at a time
    assert identify(probes, gallery, mates, fpir=[0.1, 1.0]) == pytest.approx(found)
    known = mates >= 0
    whole = identify(probes[known], gallery, mates[known], fpir=[0.1], legacy=True)
    monkeypatch.undo()
    assert identify(probes[known], gallery, mates[known], fpir=[0.1], legacy=True) == pytest.approx(whole)
    with pytest.raises(DataError, match="FPIR 20 needs 1000 scores of different people, there are 950"):
        identify(probes[known], gallery, mates[known], fpir=[20.0], legacy=True)
    with pytest.raises(DataError, match="FPIR needs probes without a mate"):
        identify(probes[:50], gallery, mates[:50], fpir=[0.1])
    with pytest.raises(DataError, match="every probe needs a mate"):
        identify(probes, gallery, mates, legacy=True)
    with pytest.raises(DataError, match="mates are from -1 to 20"):
        identify(probes, gallery, np.where(mates == 3, 20, mates))
    with pytest.raises(DataError, match=r"expected .P, D., .G, D. and .P,."):
        identify(probes, gallery[:, :4], mates)
    with pytest.raises(DataError, match="is not finite"):
        identify(probes * np.nan, gallery, mates)
    with pytest.raises(DataError, match="there is no probe with a mate"):
        identify(probes, gallery, np.full(80, -1))
