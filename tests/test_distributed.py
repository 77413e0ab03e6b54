"""Two ranks (torchrun, gloo) train to what one process trains to; what goes wrong on one rank stops both."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests import ranks_job
from tests.engine import distance, run_job, weights

RANKS = ranks_job.__file__


def load(folder, name, rank=0):
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


def bert_of(folder):
    return transformers.BertForSequenceClassification.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """One launch does all checks of `ranks_job.CHECKS`."""
    folder = tmp_path_factory.mktemp("ranks")
    run_job("all", str(folder), ranks=2, script=RANKS)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in this process."""
    folder = tmp_path_factory.mktemp("alone")
    return lambda name: ranks_job.CHECKS[name](folder)


@pytest.mark.parametrize("name", ["plain", "accumulated", "without_search", "idle", "gathered"])
def test_two_ranks_train_to_the_weights_of_one_process(ranks, alone, name):
    one, first, second = alone(name), load(ranks, name, 0), load(ranks, name, 1)
    assert one["step"] == first["step"] == 3
    assert distance(first["weights"], second["weights"]) == 0.0
    assert distance(first["weights"], one["weights"]) <= 1e-9
    assert one["weights"]["student.classifier.weight"].dtype == torch.float64
    assert one["logs"][0].keys() == first["logs"][0].keys()
    for key, value in one["logs"][0].items():
        if key.startswith("loss"):
            assert first["logs"][0][key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("stage", ["0", "1"])
def test_two_ranks_train_every_stage_of_a_method_as_one_process_does(ranks, alone, stage):
    one, first, second = (found[stage] for found in (alone("staged"), *(load(ranks, "staged", r) for r in (0, 1))))
    assert distance(first["weights"], second["weights"]) == 0.0
    assert distance(first["weights"], one["weights"]) <= 1e-9
    assert len(one["logs"]) == 3
    for here, there in zip(one["logs"], first["logs"], strict=True):
        assert here.keys() == there.keys()
        assert here == pytest.approx(there, rel=1e-6)
    terms = {"0": "loss_hidden", "1": "loss_logits"}[stage]
    assert any(name.startswith(terms) for name in one["logs"][0])


@pytest.mark.parametrize("kind", ["mean", "contrast"])
def test_what_is_per_rank_is_that_of_one_process_if_gathered(ranks, alone, kind):
    one, first = alone("masked"), load(ranks, "masked")
    own, joined = f"{kind}, gather=False", f"{kind}, gather=True"
    assert distance(one[own], one[joined]) == 0.0
    assert distance(first[joined], one[joined]) <= 1e-9
    assert distance(first[own], one[own]) > 1e-6


def test_a_sharded_student_trains_as_one_process_does_and_is_saved_whole(ranks, alone):
    one, first, second = alone("sharded"), load(ranks, "sharded", 0), load(ranks, "sharded", 1)
    assert (one["spread"], first["spread"], second["spread"]) == (False, True, True)
    both = (first["losses"] + second["losses"]) / 2
    assert (both - one["losses"]).abs().max() <= 1e-12
    assert distance(first["weights"], one["weights"]) <= 1e-12
    assert distance(first["saved"], one["saved"]) <= 1e-12


@pytest.mark.slow
def test_the_trainer_under_fsdp2_goes_on_and_trains_as_one_process_does(tmp_path):
    run_job("fsdp", str(tmp_path), script=RANKS)
    run_job("fsdp", str(tmp_path), ranks=2, script=RANKS)
    one, two = load(tmp_path, "fsdp-1"), load(tmp_path, "fsdp-2")
    assert (one["spread"], two["spread"]) == (False, True)
    assert len(one["losses"]) == 6
    assert (one["losses"] - two["losses"]).abs().max() <= 1e-6
    ends = [weights(bert_of(tmp_path / f"run-{n}" / "checkpoint-6" / "student")) for n in (1, 2)]
    assert distance(*ends) <= 1e-6


def test_gradients_of_adapters_are_equal_on_both_ranks(ranks):
    first, second = load(ranks, "plain", 0)["gradients"], load(ranks, "plain", 1)["gradients"]
    assert len(first) == 3
    for one, other in zip(first, second, strict=True):
        assert len(one) == 4
        assert distance(one, other) == 0.0
        assert all(g.abs().max() > 0 for g in one.values())


def test_every_sample_is_evaluated_once(ranks, alone):
    one = alone("evaluation")
    for rank in (0, 1):
        found = load(ranks, "evaluation", rank)
        assert found["counted"] == one["counted"] == 11
        assert found["engine"]["eval_count"] == 11
        for which in ("streamed", "engine", "few"):
            assert found[which]["eval_accuracy"] == pytest.approx(one[which]["eval_accuracy"])
        assert found["streamed"]["eval_loss"] == pytest.approx(one["streamed"]["eval_loss"], abs=1e-6)
        assert found["few"]["eval_loss"] == pytest.approx(one["few"]["eval_loss"], abs=1e-6)


def test_a_checkpoint_of_two_ranks_resumes(ranks):
    found = load(ranks, "resumed")
    # step, total, the weight of the automatic term, none for the other
    assert found["whole"]["_extra_state"].tolist()[:2] == [6.0, 6.0]
    assert (found["whole"]["_extra_state"] < 0).tolist() == [False, False, False, True]
    assert distance(found["whole"], load(ranks, "resumed", 1)["whole"]) == 0.0
    assert {"rng_state_0.pth", "rng_state_1.pth", "manifest.json"} <= set(found["files"])
    assert distance(found["whole"], found["again"]) == 0.0


def test_a_cache_is_built_once_and_read_by_both(ranks, alone):
    one, found = alone("cached"), load(ranks, "cached")
    assert distance(found["built"], found["found"]) == 0.0
    assert distance(found["built"], one["built"]) <= 1e-6


@pytest.mark.parametrize("name", ["by_hand", "by_hand_with_search", "with_accelerate"])
def test_loops_without_the_trainer(ranks, alone, name):
    one, first, second = alone(name)["weights"], load(ranks, name, 0)["weights"], load(ranks, name, 1)["weights"]
    assert distance(first, second) == 0.0
    assert distance(first, one) <= 1e-6


@pytest.mark.parametrize("name", ["ema", "snapshot", "gate", "self", "cohort"])
def test_suppliers_on_two_ranks_train_as_one_process_does(ranks, alone, name):
    one, first, second = (found[name] for found in (alone("supplied"), *(load(ranks, "supplied", r) for r in (0, 1))))
    assert distance(first, second) == 0.0
    assert distance(first, one) <= 1e-5


def test_an_average_has_the_statistics_of_rank_0_on_both(ranks):
    assert distance(load(ranks, "averaged", 0), load(ranks, "averaged", 1)) == 0.0


def test_memories_take_in_the_samples_of_all_ranks(ranks, alone):
    one, first, second = alone("memories")["states"], load(ranks, "memories", 0), load(ranks, "memories", 1)
    assert len(one[0]) == 3  # two memories and the constant
    for mine, theirs, single in zip(first["states"], second["states"], one, strict=True):
        assert distance(mine, theirs) == 0.0
        assert distance(mine, single) <= 1e-5
    assert distance(one[0], one[1]) > 1e-3


def test_a_discriminator_is_the_same_on_both_ranks_and_trains_as_in_one_process(ranks, alone):
    one, first, second = alone("adversarial"), load(ranks, "adversarial", 0), load(ranks, "adversarial", 1)
    assert len(one["steps"]) == len(first["steps"]) == 4
    for alone_, here, there in zip(one["steps"], first["steps"], second["steps"], strict=True):
        assert distance(here, there) == 0.0
        assert distance(alone_, here) <= 1e-9
    assert distance(first["steps"][0], first["steps"][1]) > 0
    assert distance(one["weights"], first["weights"]) <= 1e-9
    assert first["logs"][0]["loss_adv_discriminator"] == pytest.approx(
        one["logs"][0]["loss_adv_discriminator"], rel=1e-5
    )


def test_a_discriminator_that_differs_on_two_ranks_becomes_that_of_the_first(ranks):
    first, second = load(ranks, "adversarial_by_hand", 0), load(ranks, "adversarial_by_hand", 1)
    for here, there in zip(first["steps"], second["steps"], strict=True):
        assert distance(here, there) == 0.0
    assert distance(first["weights"], second["weights"]) == 0.0


@pytest.mark.slow
def test_nan_on_one_rank_stops_both(tmp_path):
    done = run_job("nan", str(tmp_path), ranks=2, script=RANKS, check=False, timeout=120)
    assert done.returncode != 0
    found = [load(tmp_path, "nan", rank) for rank in (0, 1)]
    assert "another rank at step 2" in found[0]["sentence"]
    assert "'faulty' (weight 0.5) is nan at step 2, sample ids [20, 21, 22, 23]" in found[1]["sentence"]
    for rank in found:
        assert distance(rank["before"], rank["after"]) == 0.0


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_after_the_same_step(tmp_path):
    run_job("signal", str(tmp_path), ranks=2, script=RANKS, timeout=120)
    for rank in (0, 1):
        assert load(tmp_path, "signal", rank) == {"code": 143, "step": 3}
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint-3"]
