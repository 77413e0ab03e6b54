"""A tiny trained text classifier with its tokenizer, and text that it can tell apart: for tests of whole runs."""

from __future__ import annotations

import csv
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

GOOD, BAD = ["great", "lovely", "superb", "warm"], ["awful", "dull", "weak", "cold"]
PLAIN = ["the", "film", "plot", "actor", "is", "was", "a", "quite", "very", "and", "scene", "music"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label): the label is which kind of word is in it."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.choice(["positive", "negative"])
        words = rng.choices(PLAIN, k=rng.randint(3, 9))
        words.insert(rng.randrange(len(words)), rng.choice(GOOD if label == "positive" else BAD))
        rows.append((" ".join(words), label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *PLAIN, *GOOD, *BAD])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def classifier(layers: int = 4, hidden: int = 16, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(SPECIAL) + len(PLAIN) + len(GOOD) + len(BAD), hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=2, intermediate_size=2 * hidden, max_position_embeddings=64,
            id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
        )
    )  # fmt: skip


@cache
def teacher_state() -> dict[str, torch.Tensor]:
    """The weights of a teacher that is right on nearly everything."""
    model, encode = classifier(), tokenizer()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = sentences(512, seed=1)
    model.train()
    for step in range(60):
        chunk = rows[step * 32 % 512 :][:32]
        batch = encode([t for t, _ in chunk], padding=True, return_tensors="pt")
        labels = torch.tensor([int(label == "positive") for _, label in chunk])
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.state_dict()


def teacher() -> BertForSequenceClassification:
    model = classifier()
    model.load_state_dict(teacher_state())
    return model.eval()


def save_teacher(folder: Path) -> Path:
    teacher().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
