"""Contract 9: a cache equals the live teacher, and says so when it cannot."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taskkd as kd
from taskkd import caches, losses
from taskkd.caches import CACHE_KEY, Cached, weights_sha256
from taskkd.errors import CacheError
from taskkd.teachers import Frozen
from tests import small

TAPS = ["out.logits", "bert.encoder.layer.0", "bert.encoder.layer.1[:, 0]"]
LENGTHS = [[3, 7, 5], [2, 6, 4], [8, 3, 1]]  # three batches of three samples, each padded to its own length


def batches(**options: Any) -> list[dict[str, Tensor]]:
    return [small.tokens(lengths, first_id=3 * i, **options) for i, lengths in enumerate(LENGTHS)]


def regrouped(ids: list[int], pad_to: int | None = None) -> dict[str, Tensor]:
    """The samples of these ids in one batch, in this order, padded anew."""
    rows = {int(i): {k: v[r] for k, v in b.items()} for b in batches() for r, i in enumerate(b["id"])}
    lengths = [int(rows[i]["attention_mask"].sum()) for i in ids]
    out = small.tokens(lengths, pad_to)
    for r, i in enumerate(ids):
        for key in ("input_ids", "attention_mask"):
            out[key][r, : lengths[r]] = rows[i][key][: lengths[r]]
        out["id"][r], out["labels"][r] = i, rows[i]["labels"]
    return out


def model(seed: int = 2) -> nn.Module:
    return small.bert(2, 16, seed=seed)


def built(path: Path, taps: list[str] = TAPS, data: Iterable[Any] | None = None, **options: Any) -> Cached:
    cached = Cached(model(), path, **options)
    cached.attach(taps)
    cached.build(batches() if data is None else data, total=9, announce=lambda _: None)
    return cached


def reopened(path: Path, taps: list[str] = TAPS, teacher: nn.Module | None = None, **options: Any) -> Cached:
    cached = Cached(teacher or model(), path, **options)
    cached.attach(taps)
    return cached


def count_forwards(teacher: nn.Module) -> list[int]:
    counter = [0]

    def hook(*_: Any) -> None:
        counter[0] += 1

    teacher.register_forward_pre_hook(hook)
    return counter


def refuse(*_: Any) -> None:
    raise AssertionError("the teacher must not run")


# ---- cached equals live


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
@pytest.mark.parametrize(("ids", "pad_to"), [([0, 1, 2], None), ([8, 0, 4, 7], None), ([5], 12), ([6, 1, 3], 9)])
def test_cached_equals_live(tmp_path: Path, dtype: str, tolerance: float, ids: list[int], pad_to: int | None) -> None:
    built(tmp_path, dtype=dtype).close()
    cached, batch = reopened(tmp_path, dtype=dtype), regrouped(ids, pad_to)
    live = Frozen(model())
    live.attach(TAPS)
    expected = live(batch)
    cached.live.model.register_forward_pre_hook(refuse)
    values = cached(batch)
    assert len(cached) == 9
    padding = batch["attention_mask"] == 0
    for tap in TAPS:
        assert values[tap].shape == expected[tap].shape
        if tap == "bert.encoder.layer.0":  # ragged: rows are stored without padding and padded with 0
            assert values[tap][padding].eq(0).all()
            values[tap][padding] = expected[tap][padding].to(values[tap].dtype)
        torch.testing.assert_close(values[tap].float(), expected[tap], rtol=tolerance, atol=tolerance)


def test_a_fixed_shape_is_stored_as_it_is(tmp_path: Path) -> None:
    teacher = small.ConvNet()
    cached = Cached(teacher, tmp_path)
    cached.attach(["out.logits", "block"])
    data = [small.conv_batch(seed=s) for s in range(2)]
    cached.build(data, total=8, announce=lambda _: None)
    live = Frozen(teacher)
    live.attach(["out.logits", "block"])
    for batch in data:
        for tap, value in live(batch).items():
            torch.testing.assert_close(cached(batch)[tap], value)


def test_attention_grows_in_two_dimensions(tmp_path: Path) -> None:
    taps = ["attention[1].scores", "attention[0].query", "bert.encoder.layer.0"]
    built(tmp_path, taps)
    index = json.loads((tmp_path / "index.json").read_text())["taps"]
    assert [about["ragged"] for about in index.values()] == [[1, 2], [1], [0]]
    live = Frozen(model())
    live.attach(taps)
    batch = regrouped([6, 1, 4], 12)
    expected, found = live(batch), reopened(tmp_path, taps)(batch)
    mask = batch["attention_mask"].bool()
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    for tap, real in zip(taps, (pairs, mask[:, None, :, None], mask[:, :, None]), strict=True):
        assert found[tap].shape == expected[tap].shape
        torch.testing.assert_close(found[tap], expected[tap] * real, atol=1e-6, rtol=1e-5)
    size = sum(f.stat().st_size for f in tmp_path.rglob("tap-*.npy") if "offsets" not in f.name)
    said: list[str] = []
    fresh = Cached(model(), tmp_path / "again")
    fresh.attach(taps)
    lengths = [n for batch in LENGTHS for n in batch]
    fresh.build(batches(), total=9, lengths=lengths, announce=said.append)
    assert f"about {round((size + 9 * 16) / 1000)} kB" in said[0]


def test_texts_that_are_padded_on_the_left(tmp_path: Path) -> None:
    def leftward(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.flip(1) if v.ndim == 2 else v for k, v in batch.items()}

    taps = ["bert.embeddings.word_embeddings", "attention[0].scores"]
    cached = built(tmp_path, taps, [leftward(b) for b in batches()])
    batch = leftward(batches()[1])
    live = Frozen(model())
    live.attach(taps)
    expected, mask = live(batch), batch["attention_mask"].bool()
    found = cached(batch)
    torch.testing.assert_close(found[taps[0]], expected[taps[0]] * mask[:, :, None])
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    torch.testing.assert_close(found[taps[1]], expected[taps[1]] * pairs, atol=1e-6, rtol=1e-5)


def test_the_loss_is_that_of_the_live_teacher(tmp_path: Path) -> None:
    cached = built(tmp_path, ["out.logits", "bert.encoder.layer.0"])
    terms = [
        kd.Match("logits", losses.kl_divergence, "out.logits", temperature=2.0),
        kd.Match("h", losses.mse, "bert.encoder.layer.0", adapter="linear", mask="batch.attention_mask"),
    ]
    student = small.bert(1, 8, seed=1)
    live = kd.Distiller(copy.deepcopy(student), model(), copy.deepcopy(terms))
    disk = kd.Distiller(student, cached, terms)
    batch = regrouped([7, 2, 3, 0], pad_to=10)
    for pair in (live, disk):
        torch.manual_seed(5)
        pair.prepare(batch)
    expected, got = live(**batch), disk(**batch)
    for name in ("loss", "task", "logits", "h"):
        assert got[name].item() == pytest.approx(expected[name].item(), rel=1e-5)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_what_was_read_stays_on_disk(tmp_path: Path) -> None:
    """A memory map would grow with every row that was read, to the size of the cache."""
    cached = reopened(built(tmp_path).path)
    for batch in batches():
        cached(batch)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_several_shards(tmp_path: Path) -> None:
    cached = built(tmp_path, shard_size=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.json", "shard-00000", "shard-00001", "shard-00002"]
    whole = built(tmp_path.parent / "whole")
    batch = regrouped([8, 0, 4])
    for tap in TAPS:
        assert torch.equal(cached(batch)[tap], whole(batch)[tap])


def test_a_shard_of_wide_taps_has_fewer_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "SHARD_BYTES", 900)
    built(tmp_path).close()
    assert len(list(tmp_path.glob("shard-*"))) == 3
    assert len(reopened(tmp_path)) == 9


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    built(tmp_path, shard_size=3).close()
    cached = reopened(tmp_path)
    whole = cached(regrouped([6, 1, 4]))
    assert cached._shards is not None
    files = cached._shards[0]["tap-0.npy"]._files
    assert len(files.open) > 2
    files.most = 2
    again = cached(regrouped([6, 1, 4]))
    assert len(files.open) == 2
    assert all(torch.equal(whole[tap], again[tap]) for tap in TAPS)


def test_a_worker_looks_up_and_the_teacher_hands_on(tmp_path: Path) -> None:
    cached = built(tmp_path)
    batch: dict[str, Any] = regrouped([4, 1])
    expected = cached(batch)
    elsewhere = pickle.loads(pickle.dumps(cached))  # what a spawned worker gets
    batch[CACHE_KEY] = elsewhere.lookup(batch)
    cached._shards = cached._index = None  # type: ignore[assignment]  # nothing left to read from
    for tap in TAPS:
        assert torch.equal(cached(batch)[tap], expected[tap])


def test_a_pickle_leaves_the_model_behind(tmp_path: Path) -> None:
    cached = built(tmp_path)
    size = sum(p.numel() * p.element_size() for p in cached.live.model.parameters())
    assert len(pickle.dumps(cached)) < size / 2


def test_a_deep_copy_shares_it(tmp_path: Path) -> None:
    cached = built(tmp_path)
    assert copy.deepcopy({"teacher": cached})["teacher"] is cached


# ---- building


def test_a_full_cache_calls_the_teacher_zero_times(tmp_path: Path) -> None:
    built(tmp_path).close()
    teacher = model()
    cached = reopened(tmp_path, teacher=teacher)
    teacher.register_forward_pre_hook(refuse)
    cached.build(batches(), total=9, announce=refuse)
    pair = kd.Distiller(small.bert(2, 16), cached, [kd.Match("l", losses.kl_divergence, "out.logits")])
    pair.prepare(batches()[0])
    for batch in batches():
        pair(**batch)


def test_the_size_is_announced_before_anything_is_written(tmp_path: Path) -> None:
    sentences: list[str] = []

    def announce(sentence: str) -> None:
        assert not list(tmp_path.glob("shard*"))
        sentences.append(sentence)

    cached = reopened(tmp_path, ["out.logits"])
    cached.build(batches(), total=9, announce=announce)
    assert sentences == [f"teacher cache: 9 samples, about 252 B as float32 in {tmp_path}"]  # 9 * (3 * 4 + id + hash)


def test_the_announced_size_of_ragged_taps(tmp_path: Path) -> None:
    sentences: list[str] = []
    cached = reopened(tmp_path, ["bert.encoder.layer.0"], dtype="float16")
    cached.build(batches()[:1], total=3, announce=sentences.append)
    assert f"about {3 * 16 + (3 + 7 + 5) * 16 * 2} B as float16" in sentences[0]


def test_a_budget(tmp_path: Path) -> None:
    cached = reopened(tmp_path, budget=100)
    with pytest.raises(CacheError, match=r"cache .*: about .* kB are needed, 100 B are allowed or free"):
        cached.build(batches(), total=9, announce=lambda _: None)
    assert not list(tmp_path.glob("shard*"))


def test_progress_is_told(tmp_path: Path) -> None:
    seen: list[int] = []
    cached = reopened(tmp_path)
    cached.build(batches(), total=9, announce=lambda _: None, progress=seen.append)
    assert seen == [3, 6, 9]


def interrupted(data: list[Any], after: int) -> Iterable[Any]:
    yield from data[:after]
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_build_goes_on(tmp_path: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, data=interrupted(batches(), after), shard_size=3)
    teacher = model()
    counter = count_forwards(teacher)
    cached = reopened(tmp_path, teacher=teacher, shard_size=3)
    assert len(cached) == 3 * after
    started = counter[0]
    cached.build(batches(), total=9, announce=lambda _: None)
    assert counter[0] - started <= (3 - after) + 1  # one more to see which taps grow with padding
    whole = built(tmp_path.parent / "whole")
    for batch in batches():
        for tap in TAPS:
            torch.testing.assert_close(cached(batch)[tap], whole(batch)[tap])


def test_an_interrupted_build_goes_on_only_with_the_same_taps(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, data=interrupted(batches(), 1), shard_size=3)
    cached = reopened(tmp_path, ["out.logits"])
    with pytest.raises(CacheError, match=r"holds the taps .*'bert.encoder.layer.0'.* is not complete"):
        cached.build(batches(), total=9, announce=lambda _: None)


def test_a_staged_shard_of_a_killed_build_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.tmp").mkdir()
    (tmp_path / "shard-00000.tmp" / "tap-9.npy").write_bytes(b"rubbish")
    cached = built(tmp_path)
    assert len(cached) == 9
    assert not list(tmp_path.glob("*.tmp"))


def test_more_data_joins_a_cache(tmp_path: Path) -> None:
    built(tmp_path, data=batches()[:2]).close()
    cached = reopened(tmp_path)
    assert len(cached) == 6
    cached.build(batches(), total=9, announce=lambda _: None)
    assert len(cached) == 9
    cached(batches()[2])


def test_a_batch_as_long_as_the_model_allows(tmp_path: Path) -> None:
    """Which taps grow with padding must be found out without going beyond the position embeddings."""
    cached = Cached(small.bert(2, 16, positions=8), tmp_path)
    cached.attach(TAPS)
    cached.build([small.tokens([8, 5])], total=2, announce=lambda _: None)
    assert cached(small.tokens([8, 5]))["bert.encoder.layer.0"].shape == (2, 8, 16)


def test_nothing_to_build_from(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="there was nothing to build it from"):
        reopened(tmp_path).build([], total=0)


def test_ids_are_needed_and_unique(tmp_path: Path) -> None:
    cached = reopened(tmp_path)
    batch = batches()[0]
    with pytest.raises(
        CacheError, match=r"a cached teacher needs `id` in every batch \(int64, unique for each sample\)"
    ):
        cached.build([{k: v for k, v in batch.items() if k != "id"}], total=3)
    with pytest.raises(CacheError, match="sample id 0 occurs twice in the data; ids must be unique"):
        cached.build([batch, batch], total=6, announce=lambda _: None)
    twice = {**batch, "id": torch.tensor([4, 5, 4])}
    with pytest.raises(CacheError, match="sample id 4 occurs twice"):
        reopened(tmp_path / "other").build([twice], total=3, announce=lambda _: None)


@pytest.mark.parametrize(("dtype", "scale"), [("float32", float("nan")), ("float32", float("inf")), ("float16", 1e6)])
def test_a_teacher_that_is_not_finite(tmp_path: Path, dtype: str, scale: float) -> None:
    teacher = model()
    with torch.no_grad():
        teacher.classifier.bias.fill_(scale)
    cached = reopened(tmp_path, teacher=teacher, dtype=dtype)
    with pytest.raises(
        CacheError,
        match=rf"tap 'out.logits' of the teacher is not finite as {dtype} for some of the samples \[0, 1, 2\]",
    ):
        cached.build(batches(), total=9, announce=lambda _: None)
    assert not (tmp_path / "index.json").exists()


def test_what_cannot_be_cached(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"tap 'batch.labels' reads the batch, not the teacher; it cannot be cached"):
        reopened(tmp_path, ["batch.labels"])
    with pytest.raises(CacheError, match="a cache holds 'float32' or 'float16', not 'bfloat16'"):
        Cached(model(), tmp_path, dtype="bfloat16")  # type: ignore[arg-type]
    whole = reopened(tmp_path, ["bert.embeddings:in[input_ids]"])
    with pytest.raises(CacheError, match="is not a floating point tensor with a batch dimension"):
        whole.build(batches(), total=9)


# ---- stale, damaged or wrong


def test_a_stale_cache_is_refused(tmp_path: Path) -> None:
    built(tmp_path, preprocessing={"max_length": 64}).close()
    reopened(tmp_path, preprocessing={"max_length": 64})
    other = model()
    with torch.no_grad():
        other.classifier.bias[0] += 1e-3
    with pytest.raises(
        CacheError, match=r"is stale: it was built with another weights .*delete the folder or give another path"
    ):
        reopened(tmp_path, teacher=other, preprocessing={"max_length": 64})
    with pytest.raises(
        CacheError,
        match=r'stale: it was built with another preprocessing \(\{"max_length": 64\}, now \{"max_length": 32\}\)',
    ):
        reopened(tmp_path, preprocessing={"max_length": 32})
    with pytest.raises(CacheError, match=r"stale: it was built with another dtype \(float32, now float16\)"):
        reopened(tmp_path, preprocessing={"max_length": 64}, dtype="float16")


def test_a_tap_that_is_not_in_it(tmp_path: Path) -> None:
    built(tmp_path, ["out.logits"]).close()
    with pytest.raises(CacheError, match=r"holds the taps 'out.logits' but not 'bert.encoder.layer.0'"):
        reopened(tmp_path, ["out.logits", "bert.encoder.layer.0"])


def test_fewer_taps_than_are_in_it(tmp_path: Path) -> None:
    whole, batch = built(tmp_path), regrouped([3, 8])
    cached = reopened(tmp_path, [TAPS[2]])
    assert cached(batch).keys() == {TAPS[2]}
    assert torch.equal(cached(batch)[TAPS[2]], whole(batch)[TAPS[2]])


def test_a_changed_input_is_found_at_reading(tmp_path: Path) -> None:
    cached = built(tmp_path)
    batch = batches()[1]
    cached(batch)
    batch["input_ids"][1, 2] += 1
    with pytest.raises(CacheError, match="the teacher input of sample id 4 is not the one the cache was built with"):
        cached(batch)
    shuffled = batches()[1]
    shuffled["id"] = shuffled["id"].flip(0)
    with pytest.raises(CacheError, match="the teacher input of sample id 5"):
        cached(shuffled)
    masked = batches()[1]
    masked["attention_mask"][2, 3] = 0
    with pytest.raises(CacheError, match="the teacher input of sample id 5"):
        cached(masked)


def test_what_the_teacher_does_not_read_may_change(tmp_path: Path) -> None:
    cached = built(tmp_path)
    batch = batches()[1]
    batch["labels"] = 2 - batch["labels"]
    batch["input_ids"][0, 2:] = 17  # under the padding
    cached(batch)


def test_a_sample_that_is_not_in_it(tmp_path: Path) -> None:
    cached = built(tmp_path)
    batch = batches()[0]
    batch["id"][1] = 77
    with pytest.raises(
        CacheError, match=r"sample id 77 is not in it \(9 samples\); build it with all of the training data"
    ):
        cached(batch)


def test_without_ids(tmp_path: Path) -> None:
    cached = built(tmp_path)
    with pytest.raises(CacheError, match="a cached teacher needs `id` in every batch"):
        cached({k: v for k, v in batches()[0].items() if k != "id"})


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
@pytest.mark.parametrize("name", ["tap-1.npy", "tap-1.offsets.npy", "ids.npy", "hashes.npy"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str, name: str) -> None:
    built(tmp_path).close()
    file = tmp_path / "shard-00000" / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[-3] ^= 4
        file.write_bytes(data[:-5] if damage == "truncate" else data)
    with pytest.raises(CacheError, match=rf"file shard-00000/{name} is missing or damaged; delete the folder"):
        reopened(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', '{"key": {}, "shards": 3, "taps": {}}'])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    built(tmp_path).close()
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(CacheError, match=r"index.json cannot be read|is stale"):
        reopened(tmp_path)


def test_nothing_in_it_is_a_pickle(tmp_path: Path) -> None:
    built(tmp_path)
    for file in tmp_path.rglob("*.npy"):
        np.load(file, allow_pickle=False)
    json.loads((tmp_path / "index.json").read_text())


def test_an_empty_path_is_live_until_it_is_built(tmp_path: Path) -> None:
    cached = reopened(tmp_path / "new")
    batch = batches()[0]
    assert cached.prepare(batch).keys() == set(TAPS)
    with pytest.raises(CacheError, match=r"sample id 0 is not in it \(0 samples\)"):
        cached(batch)


def test_the_hash_of_weights_sees_buffers_and_names() -> None:
    norm = nn.BatchNorm1d(2)
    first = weights_sha256(norm)
    assert first == weights_sha256(copy.deepcopy(norm))
    norm.running_mean += 1  # type: ignore[operator]
    assert weights_sha256(norm) != first
    assert weights_sha256(nn.Sequential(nn.Linear(1, 1))) != weights_sha256(nn.ModuleDict({"a": nn.Linear(1, 1)}))
