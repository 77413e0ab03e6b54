"""The recorder of attention: what it records, and that the model is as before (acceptance A3 of the NLP spec)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskkd as kd
from taskkd import losses
from taskkd.errors import TapError
from taskkd.taps import Taps, parse_tap
from tests import families

ALL = ["attention[0].scores", "attention[1].probabilities", "attention[-1].probabilities", "attention[2].value"]


def recorded(model: nn.Module, names: list[str], batch: dict[str, Any] | None = None) -> tuple[Any, dict[str, Tensor]]:
    batch = families.batch() if batch is None else batch
    taps = Taps(model, names)
    try:
        with taps.record():
            output = model(**batch)
        return output, taps.read(output, batch)
    finally:
        taps.close()


@pytest.mark.parametrize("name", families.ON_INTERFACE)
def test_recorded_attention_is_the_models_own(name: str) -> None:
    model, batch = families.build(name), families.batch()
    if name == "modernbert":  # its own eager attention is NaN for padded rows in float64, and its softmax is fp32
        batch = {k: v[:1] for k, v in batch.items()}
    atol = 1e-6 if name == "modernbert" else 1e-12
    before = model(**batch)[0]
    output, values = recorded(model, ALL, batch)
    assert torch.equal(output[0], before)
    model.set_attn_implementation("eager")
    own = model(**batch, output_attentions=True).attentions
    tokens = batch["input_ids"].shape
    assert values["attention[0].scores"].shape == (tokens[0], 4, 7, 7)
    for tap, layer in (("attention[1].probabilities", 1), ("attention[-1].probabilities", 2)):
        torch.testing.assert_close(values[tap], own[layer].double(), atol=atol, rtol=0)
    assert values["attention[2].value"].shape[:3] == (tokens[0], 4, 7)


@pytest.mark.parametrize("name", ["bert", "albert", "t5"])
def test_softmax_of_the_scores_over_real_tokens_is_the_probability(name: str) -> None:
    model, batch = families.build(name), families.batch()
    _, values = recorded(model, ["attention[1].scores", "attention[1].probabilities"])
    keys = batch["attention_mask"].bool()[:, None, None]
    softmax = values["attention[1].scores"].masked_fill(~keys, -torch.inf).softmax(-1)
    torch.testing.assert_close(softmax, values["attention[1].probabilities"], atol=1e-12, rtol=0)


def test_a_model_that_was_eager_stays_eager() -> None:
    model = families.build("bert")
    model.set_attn_implementation("eager")
    batch = families.batch()
    own = model(**batch, output_attentions=True)
    output, values = recorded(model, ["attention[0].probabilities"])
    assert torch.equal(output.logits, own.logits)
    torch.testing.assert_close(values["attention[0].probabilities"], own.attentions[0], atol=1e-12, rtol=0)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", families.OTHERS)
def test_models_with_an_attention_of_their_own_give_probabilities_only(name: str) -> None:
    model, batch = families.build(name), families.batch()
    with pytest.raises(TapError, match=r"attention\[0\]\.scores.*computes its attention by itself.*probabilities"):
        Taps(model, ["attention[0].scores"])
    own = model(**batch, output_attentions=True)
    output, values = recorded(model, ["attention[1].probabilities"])
    assert torch.equal(output[0], own[0])
    assert torch.equal(values["attention[1].probabilities"], own.attentions[1])
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_the_model_and_what_is_saved_of_it_are_as_before(tmp_path: Path) -> None:
    model = families.build("bert")
    model.save_pretrained(tmp_path / "before")
    before = model.config.to_dict()
    taps = Taps(model, ["attention[0].query"])
    model.save_pretrained(tmp_path / "while")
    twin = copy.deepcopy(model)
    taps.close()
    model.save_pretrained(tmp_path / "after")
    assert model.config._attn_implementation == "sdpa" and model.config.to_dict() == before
    for folder in ("while", "after"):
        assert "taskkd" not in (tmp_path / folder / "config.json").read_text()
        configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("before", folder)]
        assert configs[0] == configs[1]
    batch = families.batch()
    assert torch.equal(twin(**batch).logits, model(**batch).logits)  # a copy made meanwhile goes on


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_student_through_scores(checkpointing: bool) -> None:
    def gradients(model: Any, scores: Any) -> list[Tensor]:
        model.zero_grad()
        scores().square().mean().backward()
        return [p.grad for p in model.bert.encoder.layer[1].attention.self.query.parameters()]

    model, batch = families.build("bert").train(), families.batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def by_hand() -> Tensor:
        states = model(**batch, output_hidden_states=True).hidden_states[1]
        own = model.bert.encoder.layer[1].attention.self
        query, key = (f(states).view(2, 7, 4, 4).transpose(1, 2) for f in (own.query, own.key))
        return query @ key.transpose(2, 3) / 2

    expected = gradients(model, by_hand)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model, lambda: recorded(model, ["attention[1].scores"])[1]["attention[1].scores"])
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-10)


def test_a_teacher_stops_after_the_last_attention_that_is_needed() -> None:
    student, teacher = families.build("bert"), families.build("bert")
    ran: list[int] = []
    for i, layer in enumerate(teacher.bert.encoder.layer):
        layer.output.register_forward_hook(lambda *_, i=i: ran.append(i))
    term = kd.Match("value", losses.mse, "attention[1].value")
    distiller = kd.Distiller(student, kd.Frozen(teacher), [term], task_weight=0.0)
    distiller.prepare(families.batch())
    ran.clear()
    assert float(distiller(**families.batch())["value"]) < 1e-12
    assert ran == [0]
    distiller.close()
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"


def test_a_compiled_distiller_records_too() -> None:
    torch.manual_seed(1)
    student, teacher = families.build("bert").float(), families.build("bert").float()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.01 * torch.randn_like(p))
    terms = [kd.Match("scores", losses.mse, "attention[1].scores")]
    distiller = kd.Distiller(student, kd.Frozen(teacher), terms, task_weight=0.0)
    distiller.prepare(families.batch())
    plain = distiller(**families.batch())["loss"]
    compiled = torch.compile(distiller, fullgraph=True)(**families.batch())["loss"]
    assert float(plain.detach()) > 0
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-7)
    distiller.close()


def test_grammar() -> None:
    tap = parse_tap("attention[-2].scores[:, 0]")
    assert (tap.root, tap.call, tap.path) == ("attention", -2, "scores")
    assert tap.select(torch.zeros(2, 4, 7, 7)).shape == (2, 7, 7)
    with pytest.raises(TapError, match=r"no 'score' \(did you mean 'scores'|no 'score'.*scores"):
        parse_tap("attention[0].score")
    for text in ("attention", "attention[0]", "attention.scores", "attention[:, 0].scores"):
        with pytest.raises(TapError, match="number of the attention"):
            parse_tap(text)
    assert parse_tap("./attention[0]").root == "module"


def test_errors_say_what_there_is() -> None:
    with pytest.raises(TapError, match=r"attention\[7\]\.query.*computed 3 attentions.*0 to 2"):
        recorded(families.build("bert"), ["attention[7].query"])
    with pytest.raises(TapError, match=r"record transformers models; the student .Linear. is none"):
        Taps(nn.Linear(2, 2), ["attention[0].query"])


def test_grouped_queries_share_keys() -> None:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(**families.SIZES, num_key_value_heads=2)
    model, batch = hf.LlamaForCausalLM(config).double().eval(), families.batch()
    _, values = recorded(model, ["attention[1].probabilities", "attention[1].key"])
    model.set_attn_implementation("eager")
    own = model(**batch, output_attentions=True).attentions[1].double()  # softmax in fp32
    torch.testing.assert_close(values["attention[1].probabilities"], own, atol=1e-6, rtol=0)
    assert values["attention[1].key"].shape[1] == 2
