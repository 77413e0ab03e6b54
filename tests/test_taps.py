"""Taps: the grammar, what the hooks record, and what they leave behind (nothing)."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taskkd as kd
from taskkd import losses
from taskkd.errors import TapError, TaskkdError
from taskkd.taps import Taps, parse_tap
from tests import small

Pair = namedtuple("Pair", ["left", "right"])


class Fpn(nn.Module):
    """Levels under string keys, not in the order of their numbers, as users of torchvision's FPN may have them."""

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict([("1", x + 1), ("0", x), ("pool", x - 1)])


class Zoo(nn.Module):
    """Modules with all kinds of inputs and outputs; `twice` runs two times, `never` not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.fpn = Fpn()
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.out = nn.Identity()
        self.mixer = Mixer()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        levels = self.fpn(x)
        y = self.twice(self.twice(x))
        mixed = self.mixer(y, x, mask=levels["pool"])
        return {"logits": self.out(mixed[0]), "pair": Pair(x, y), "nothing": None, "levels": list(levels.values())}


class Mixer(nn.Module):
    def forward(self, a: Tensor, b: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
        return a + b, mask * 1


def read(model: nn.Module, names: Iterable[str], **batch: Any) -> dict[str, Any]:
    """One recorded run of a model."""
    taps = Taps(model, names)
    with taps.record():
        output = model(**batch)
    values = taps.read(output, batch)
    taps.close()
    return values


X = torch.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize(
    ("tap", "expected"),
    [
        ("fpn[0]", lambda zoo: X),  # the key "0", not the first item
        ("fpn[1]", lambda zoo: X + 1),
        ("fpn[2]", lambda zoo: X - 1),  # no such key: the position
        ("fpn[-1]", lambda zoo: X - 1),
        ("fpn[pool]", lambda zoo: X - 1),
        ("fpn[pool][:, 0]", lambda zoo: X[:, 0] - 1),
        ("fpn[0][..., 1:3]", lambda zoo: X[..., 1:3]),
        ("fpn[0][1, :]", lambda zoo: X[1]),
        ("fpn:in", lambda zoo: X),
        ("fpn:in[:, 1:]", lambda zoo: X[:, 1:]),
        ("twice@0", lambda zoo: zoo.twice(X)),
        ("twice@1", lambda zoo: zoo.twice(zoo.twice(X))),
        ("twice:in@1", lambda zoo: zoo.twice(X)),
        ("mixer:in", lambda zoo: zoo.twice(zoo.twice(X))),
        ("mixer:in[0]", lambda zoo: zoo.twice(zoo.twice(X))),
        ("mixer:in[1]", lambda zoo: X),
        ("mixer:in[mask]", lambda zoo: X - 1),
        ("mixer:in[mask][:, 2]", lambda zoo: X[:, 2] - 1),
        ("mixer[1]", lambda zoo: X - 1),
        ("./out", lambda zoo: zoo.twice(zoo.twice(X)) + X),
        ("out.logits", lambda zoo: zoo.twice(zoo.twice(X)) + X),
        ("out[logits]", lambda zoo: zoo.twice(zoo.twice(X)) + X),
        ("out.pair.left", lambda zoo: X),
        ("out.pair[1]", lambda zoo: zoo.twice(zoo.twice(X))),
        ("out.levels[0]", lambda zoo: X + 1),
        ("batch.x", lambda zoo: X),
        ("batch[x][:, :2]", lambda zoo: X[:, :2]),
    ],
)
def test_a_tap_names_one_tensor(tap: str, expected: Callable[[Zoo], Tensor]) -> None:
    zoo = Zoo()
    torch.testing.assert_close(read(zoo, [tap], x=X)[tap], expected(zoo), rtol=0, atol=0)


def test_out_is_the_whole_output() -> None:
    zoo = Zoo()
    assert read(zoo, ["out"], x=X)["out"].keys() == {"logits", "pair", "nothing", "levels"}


def test_a_shared_module_has_two_names() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(2, 2)))
    model.add_module("b", model.a)
    values = read(model, ["b@1"], input=torch.ones(1, 2))
    torch.testing.assert_close(values["b@1"], model.a(model.a(torch.ones(1, 2))))


@pytest.mark.parametrize("text", ["", "  ", "a[", "a]", "a[0", "[0]", "a:out", "a@b", "a:in@", "a..b[0]x"])
def test_what_is_not_in_the_grammar(text: str) -> None:
    with pytest.raises(TapError, match=r"is not a tap: expected a module path|has no module"):
        Taps(Zoo(), [text])


@pytest.mark.parametrize(
    ("tap", "sentence"),
    [
        ("fpm", "tap 'fpm': the student has no module 'fpm' (did you mean 'fpn'"),
        ("xyz", "the student has no module 'xyz'; `taskkd inspect` lists the names of a model."),
        (
            "fpn[pol]",
            "tap 'fpn[pol]': no item 'pol' in a mapping with the keys '1', '0', 'pool' (did you mean 'pool'?)",
        ),
        ("fpn[7]", "tap 'fpn[7]': no item '7' in a mapping with the keys '1', '0', 'pool'"),
        ("fpn[0][0]", "tap 'fpn[0][0]': [0] on a tensor of shape (3, 4) would pick a sample"),
        ("fpn[:, 0]", "a slice needs a tensor, found a mapping with the keys '1', '0', 'pool'"),
        ("fpn[0][:, 9]", "index 9 is out of bounds"),
        ("fpn[0][:, x]", "[:, x] is not a slice; expected integers, ':' and '...'"),
        ("mixer[5]", "no item '5' in a tuple of 2 items"),
        (
            "out.logit",
            "no item 'logit' in a mapping with the keys 'logits', 'pair', 'nothing', 'levels' (did you mean 'logits'",
        ),
        ("out.nothing", "'nothing' is None in this run; the model must be asked for it"),
        ("never", "tap 'never': module 'never' of the student did not run in this forward"),
        ("twice", "module 'twice' of the student ran 2 times in this forward; name the call: twice@0, twice@1"),
        ("twice@2", "module 'twice' of the student ran only 2 times"),
        ("out:in", "':in' and '@call' are for modules, 'out' is not one (a module so named is './out')"),
        ("batch@1", "':in' and '@call' are for modules, 'batch' is not one"),
        ("batch.y", "no item 'y' in a mapping with the keys 'x'"),
    ],
)
def test_errors_are_sentences(tap: str, sentence: str) -> None:
    with pytest.raises(TapError) as caught:
        read(Zoo(), [tap], x=X)
    assert sentence in str(caught.value)


def test_the_nearest_names_of_a_deep_module() -> None:
    model = nn.Sequential(
        OrderedDict(encoder=nn.ModuleDict({"layer": nn.ModuleList(nn.Linear(1, 1) for _ in range(4))}))
    )
    with pytest.raises(TapError, match=r"did you mean .*'encoder.layer.3'"):
        Taps(model, ["layer.3"], "teacher")
    assert not any(m._forward_hooks for m in model.modules())


def test_parsing_keeps_the_parts() -> None:
    tap = parse_tap("encoder.layer.3:in@2[mask][:, 0]")
    assert (tap.root, tap.path, tap.port, tap.call) == ("module", "encoder.layer.3", "in", 2)
    assert tap.selectors == ("mask", (slice(None), 0))
    assert parse_tap("outer.layer").root == "module"  # only the reserved words themselves are roots


# ---- hooks


def hooks(model: nn.Module) -> dict[str, int]:
    counts = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    return {n: c for n, c in counts.items() if c}


def test_one_hook_for_each_module_and_none_after_close() -> None:
    zoo = Zoo()
    taps = Taps(zoo, ["fpn[0]", "fpn[1]", "fpn[pool]", "twice@0", "twice@1", "fpn:in", "out.logits", "batch.x"])
    assert hooks(zoo) == {"fpn": 2, "twice": 1}  # output and input of fpn
    taps.close()
    assert hooks(zoo) == {}
    taps.close()


def test_the_output_of_a_tapped_model_is_its_own() -> None:
    zoo = Zoo()
    plain = zoo(X)
    taps = Taps(zoo, ["fpn[0]", "mixer:in[mask]"])
    with taps.record():
        assert torch.equal(zoo(X)["logits"], plain["logits"])
    assert torch.equal(zoo(X)["logits"], plain["logits"])


def test_nothing_is_seen_outside_record() -> None:
    zoo = Zoo()
    taps = Taps(zoo, ["fpn[0]"])
    with taps.record():
        zoo(X)
    zoo(X + 100)
    assert torch.equal(taps.read(None, {})["fpn[0]"], X)
    with pytest.raises(TapError, match="did not run"):
        taps.read(None, {})


def test_recorded_tensors_are_not_copied() -> None:
    model = small.ConvNet()
    seen: list[int] = []
    model.stem.register_forward_hook(lambda m, a, out: seen.append(out.data_ptr()))
    values = read(model, ["stem", "norm:in"], image=small.conv_batch()["image"])
    assert values["stem"].data_ptr() == values["norm:in"].data_ptr() == seen[0]


def distiller(model: nn.Module, *taps: str, **options: Any) -> kd.Distiller:
    terms = [kd.Match(f"t{i}", losses.mse, tap) for i, tap in enumerate(taps)]
    return kd.Distiller(model, copy.deepcopy(model), terms, **options)


@pytest.mark.parametrize("tap", ["norm", "block.norm", "relu:in", "block.relu:in"])
def test_a_tensor_overwritten_in_place_is_an_error_until_prepared(tap: str) -> None:
    model, batch = small.ConvNet(), small.conv_batch()
    pair = distiller(model, tap)
    with pytest.raises(
        TapError, match=r"a later in-place operation of the student overwrote this tensor; call `distiller.pre"
    ):
        pair(**batch)
    pair.prepare(batch)
    seen: list[Tensor] = []
    path, _, port = tap.partition(":")
    module = model.get_submodule(path)
    if port:
        module.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
    else:
        module.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    values = tapped_values(pair, batch)
    assert torch.equal(values[tap], seen[0])
    assert (values[tap] < 0).any()  # before the ReLU
    assert values[tap].requires_grad


def tapped_values(pair: kd.Distiller, batch: dict[str, Any]) -> dict[str, Tensor]:
    """What a term is given, by a term that keeps it."""
    kept: dict[str, Tensor] = {}
    (term,) = pair.terms.values()
    forward = term.forward

    def keep(run: kd.Run) -> Tensor:
        kept.update(run.student)
        return forward(run)

    term.forward = keep
    pair(**batch)
    return kept


def sum_of_mse(students: tuple[Tensor, ...], teachers: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([losses.mse(s, t) for s, t in zip(students, teachers, strict=True)]).sum()


def test_prepare_copies_only_what_is_overwritten() -> None:
    model, batch = small.ConvNet(), small.conv_batch()
    pair = kd.Distiller(model, copy.deepcopy(model), [kd.Match("m", sum_of_mse, ("stem", "norm", "head"))])
    pair.prepare(batch)
    seen: dict[str, int] = {}
    for name in ("stem", "norm", "head"):
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: seen.update({name: out.data_ptr()})
        )
    values = tapped_values(pair, batch)
    assert {n: values[n].data_ptr() == seen[n] for n in seen} == {"stem": True, "norm": False, "head": True}


def test_no_tensor_is_kept_after_a_step() -> None:
    model, batch = small.ConvNet(), small.conv_batch()
    pair = distiller(model, "norm", "block.conv", "out.logits")
    pair.prepare(batch)
    references: list[weakref.ref[Tensor]] = []
    for part in (model, pair.teacher.model):
        for name in ("norm", "block.conv", "head"):
            part.get_submodule(name).register_forward_hook(lambda m, a, out: references.append(weakref.ref(out)))
    result = pair(**batch)
    result["loss"].backward()
    pair.step()
    del result
    gc.collect()
    assert len(references) == 6
    assert all(r() is None for r in references)


def test_a_copied_model_has_its_own_hooks() -> None:
    model = Zoo()
    taps = Taps(model, ["fpn[0]"])
    other, others = copy.deepcopy((model, taps))
    with others.record():
        output = other(X)
    assert torch.equal(others.read(output, {})["fpn[0]"], X)
    with pytest.raises(TapError, match="did not run"):
        taps.read(output, {})
    others.close()
    assert (hooks(other), hooks(model)) == ({}, {"fpn": 1})


def test_a_tapped_model_can_be_pickled() -> None:
    model = Zoo()
    taps = Taps(model, ["fpn[0]", "twice:in@1[:, 0]"])
    other, others = pickle.loads(pickle.dumps((model, taps)))
    with others.record():
        output = other(X)
    assert torch.equal(others.read(output, {})["fpn[0]"], X)
    others.close()
    assert hooks(other) == {}
    assert torch.equal(pickle.loads(pickle.dumps(model))(X)["logits"], model(X)["logits"])


# ---- gradient checkpointing


class Checkpointed(nn.Module):
    """A body that may be recomputed in backward, and a head."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.stem = nn.Linear(4, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        x = self.body(x) if self.mode == "plain" else checkpoint(self.body, x, use_reentrant=self.mode == "reentrant")
        return {"logits": self.head(x)}


def gradients(mode: str, *taps: str) -> list[Tensor]:
    torch.manual_seed(3)
    student, teacher = Checkpointed(mode), Checkpointed("plain")
    terms = [kd.Match(f"t{i}", losses.mse, tap) for i, tap in enumerate(taps)]
    pair = kd.Distiller(student, teacher, terms, task_weight=0)
    batch = {"x": torch.randn(6, 4)}
    pair.prepare(batch)
    for _ in range(2):
        student.zero_grad()
        pair(**batch)["loss"].backward()
    return [p.grad for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "taps", [("body",), ("body.0", "body.2", "out.logits"), ("body.1",), ("body.2:in", "out.logits")]
)
def test_checkpointing_without_reentry_gives_the_same_gradients(taps: tuple[str, ...]) -> None:
    plain, recomputed = gradients("plain", *taps), gradients("non-reentrant", *taps)
    assert len(plain) == len(recomputed) > 0
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9)


def test_checkpointing_with_reentry_is_an_error() -> None:
    with pytest.raises(TapError, match=r"no gradient flows to the student from here.*`use_reentrant=False`"):
        gradients("reentrant", "body.0")
    with pytest.raises(TaskkdError, match=r"gradient checkpointing is the reentrant kind.*`use_reentrant=False`"):
        gradients("reentrant", "out.logits")


def test_a_module_whose_name_starts_with_batch_is_checked_too() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.batchnorm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.batchnorm(x)

    pair = kd.Distiller(Detached(), Detached(), [kd.Match("t", losses.mse, "batchnorm")], task_weight=0)
    with pytest.raises(TapError, match="tap 'batchnorm': no gradient flows"):
        pair(x=torch.randn(6, 4))
