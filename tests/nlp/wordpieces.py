"""WordPiece tokenizers of different vocabularies, made of the embedded sample, and tiny models for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from taskkd.nlp.text import sentiment_rows
from tests import tiny

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@cache
def texts() -> list[str]:
    return [row.text for row in sentiment_rows()][:1500]


@cache
def wordpiece(size: int, *, lowercase: bool = True, padding_side: str = "right") -> Any:
    """As BERT's, with `size` pieces."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator(texts(), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=64,
        padding_side=padding_side,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )


@cache
def byte_level(size: int) -> Any:
    """As RoBERTa's: no token types, another padding number."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts(), trainer)
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>", model_max_length=64, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def model(
    family: str,
    tokenizer: Any,
    head: str = "ForSequenceClassification",
    *,
    layers: int = 2,
    seed: int = 0,
    **config: Any,
) -> Any:
    """A tiny random model of a family ("Bert", "Roberta", "DistilBert") with the tokenizer's vocabulary."""
    sizes = {"num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": layers, "intermediate_size": 32}
    if family == "DistilBert":
        sizes = {"n_heads": 2, "dim": 16, "n_layers": layers, "hidden_dim": 32}
    positions = 66 if family == "Roberta" else 64
    own = getattr(transformers, f"{family}Config")(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=positions, pad_token_id=tokenizer.pad_token_id,
        **config,
    )  # fmt: skip
    torch.manual_seed(seed)
    return getattr(transformers, family + head)(own)


LABELS = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}


@cache
def teacher_state(family: str, tokenizer: Any, steps: int = 60) -> dict[str, torch.Tensor]:
    """The weights of a classifier of `tiny.sentences` that is right on nearly everything."""
    own = model(family, tokenizer, **LABELS)
    optimiser = torch.optim.AdamW(own.parameters(), lr=5e-3)
    rows = tiny.sentences(512, seed=1)
    for step in range(steps):
        chunk = rows[step * 32 % 512 :][:32]
        batch = tokenizer([t for t, _ in chunk], padding=True, return_tensors="pt")
        own(**batch, labels=torch.tensor([int(label == "positive") for _, label in chunk])).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return own.state_dict()


def teacher(family: str, tokenizer: Any) -> Any:
    own = model(family, tokenizer, **LABELS)
    own.load_state_dict(teacher_state(family, tokenizer))
    return own.eval()


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
