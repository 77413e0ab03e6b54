"""One tiny random encoder of each family, in float64, and a batch for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 40,
}  # fmt: skip
ENDS = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
#: attention through transformers' interface
ON_INTERFACE: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES, pad_token_id=1)),
    "xlm_roberta": lambda: hf.XLMRobertaForSequenceClassification(hf.XLMRobertaConfig(**SIZES, pad_token_id=1)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=4, hidden_dim=32, max_position_embeddings=40)
    ),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**SIZES, embedding_size=8)),
    "albert": lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**SIZES, embedding_size=8)),
    "mobilebert": lambda: hf.MobileBertForSequenceClassification(
        hf.MobileBertConfig(**SIZES, embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8)
    ),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**SIZES, **ENDS, local_attention=4, global_attn_every_n_layers=2)
    ),
    "t5": lambda: hf.T5EncoderModel(hf.T5Config(vocab_size=50, d_model=16, d_kv=4, num_layers=3, num_heads=4, d_ff=32)),
}
#: attention of their own
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "deberta": lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**SIZES, **RELATIVE)),
    "mpnet": lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**SIZES)),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return (ON_INTERFACE | OTHERS)[name]().double().eval()


def batch() -> dict[str, Any]:
    """Two texts of 7 and 4 tokens."""
    ids = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
