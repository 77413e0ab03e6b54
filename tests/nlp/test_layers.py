"""Taps of hidden states equal what the model itself calls its hidden states."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from taskkd.errors import RecipeError
from taskkd.nlp.layers import attention_heads, hidden_size, hidden_taps
from taskkd.taps import Taps
from tests import families


def agree(model: nn.Module) -> None:
    names, batch = hidden_taps(model), families.batch()
    taps = Taps(model, names)
    with torch.no_grad(), taps.record():
        output = model(**batch, output_hidden_states=True)
    values = taps.read(output, batch)
    taps.close()
    assert len(names) == len(output.hidden_states)
    for name, own in zip(names, output.hidden_states, strict=True):
        assert torch.equal(values[name], own), name


@pytest.mark.parametrize("name", families.ON_INTERFACE | families.OTHERS)
def test_hidden_taps(name: str) -> None:
    model = families.build(name)
    agree(model)
    assert (hidden_size(model), attention_heads(model)) == (16, 4)


def test_hidden_taps_of_other_heads_groups_and_decoders() -> None:
    sizes = families.SIZES
    agree(hf.BertModel(hf.BertConfig(**sizes)).eval())
    agree(hf.BertForMaskedLM(hf.BertConfig(**sizes)).eval())
    agree(hf.ElectraForTokenClassification(hf.ElectraConfig(**sizes, embedding_size=16)).eval())
    agree(hf.AlbertModel(hf.AlbertConfig(**(sizes | {"num_hidden_layers": 5}), num_hidden_groups=2)).eval())
    gpt = hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=4, n_positions=40, bos_token_id=2, eos_token_id=3)
    agree(hf.GPT2LMHeadModel(gpt).eval())
    agree(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval())


def test_a_model_without_known_embeddings_is_told() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = hf.BertConfig(**families.SIZES)
            self.steps = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    with pytest.raises(RecipeError, match=r"no embedding module found beside 'steps.0'"):
        hidden_taps(Odd())
