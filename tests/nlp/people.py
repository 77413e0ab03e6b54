"""A small world of people, cities and jobs as text with tags and questions, and tiny models that learn it."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertTokenizer, DistilBertConfig

from taskkd.nlp.kinds import KINDS, Encoding
from taskkd.nlp.text import Row

FIRST, LAST = ["anna", "bruno", "clara", "david", "elena"], ["weber", "moreau", "silva", "novak", "lindgren"]
CITIES, JOBS = ["paris", "lisbon", "vienna", "oslo", "prague"], ["baker", "teacher", "painter", "doctor", "pilot"]
PLAIN = ["is", "a", "in", "from", "live", "works", "as", "the", "who", "where", "what", "does", "she", "do"]
PLAIN += ["which", "city", "job", "?", ".", ",", "and", "of", "old", "then", "came", "to"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TAGS = ["O", "B-LOC", "B-PER", "I-PER"]
ENCODING = Encoding(48, stride=8)


def tokenizer() -> Any:
    """Word pieces: the words of this world are whole, all others are letters."""
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = [*SPECIAL, *PLAIN, *FIRST, *LAST[:-1], "lind", "##gren", *CITIES, *JOBS]
    vocabulary = dict.fromkeys([*pieces, *letters, *(f"##{c}" for c in letters)])
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)}, model_max_length=64)


def facts(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {"first": rng.choice(FIRST), "last": rng.choice(LAST), "city": rng.choice(CITIES), "job": rng.choice(JOBS)}
        for _ in range(count)
    ]


def tagged(fact: dict[str, str]) -> tuple[list[str], list[str]]:
    """Words and tags of a sentence."""
    words = [fact["first"], fact["last"], "works", "as", "a", fact["job"], "in", fact["city"], "."]
    return words, ["B-PER", "I-PER", "O", "O", "O", "O", "O", "B-LOC", "O"]


def asked(fact: dict[str, str], number: int) -> dict[str, Any]:
    """A question of SQuAD; every third one cannot be answered."""
    context = f"{fact['first']} {fact['last']} works as a {fact['job']} . then she came to {fact['city']} ."
    question, answer = [("in which city ?", fact["city"]), ("what job ?", fact["job"]),
                        ("who is the old pilot of the ?", "")][number % 3]  # fmt: skip
    answers = [{"text": answer, "answer_start": context.index(answer)}] if answer else []
    return {"id": f"q{number}", "question": question, "context": context, "answers": answers}


def write_conll(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    lines = ["\n".join(f"{w} {t}" for w, t in zip(*tagged(fact), strict=True)) for fact in rows]
    path.write_text("\n\n".join(lines) + "\n")
    return path


def write_squad(path: Path, rows: Sequence[dict[str, str]], *, impossible: bool = True) -> Path:
    questions = [asked(fact, i) for i, fact in enumerate(rows) if impossible or i % 3 < 2]
    paragraphs = [
        {"context": q["context"], "qas": [{k: q[k] for k in ("id", "question", "answers")}]} for q in questions
    ]
    path.write_text(json.dumps({"version": "2.0", "data": [{"title": "people", "paragraphs": paragraphs}]}))
    return path


def write_lines(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("\n".join(" ".join(tagged(fact)[0]) for fact in rows) + "\n")
    return path


def write(kind: str, folder: Path, name: str, rows: Sequence[dict[str, str]]) -> Path:
    """A file of the kind's own format."""
    writers = {
        "token_classification": (write_conll, ".conll"),
        "question_answering": (write_squad, ".json"),
        "masked_lm": (write_lines, ".txt"),
    }
    make, suffix = writers[kind]
    return make(folder / f"{name}{suffix}", rows)


def rows_of(kind: str, count: int, seed: int = 0) -> list[Row]:
    known = KINDS[kind]
    found = []
    for i, fact in enumerate(facts(count, seed)):
        words, tags = tagged(fact)
        if kind == "token_classification":
            entry: dict[str, Any] = {"tokens": words, "tags": tags}
        elif kind == "question_answering":
            entry = asked(fact, i)
        else:
            entry = {"text": " ".join(words)}
        found.append(known.row(entry, known.text, known.label or None, f"row {i}"))
    return found


def model(kind: str, layers: int = 2, hidden: int = 32, seed: int = 0, family: str = "Bert") -> Any:
    """A random BERT or DistilBERT with the kind's head."""
    size = len(tokenizer())
    if family == "Bert":
        config: Any = BertConfig(
            vocab_size=size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=2 * hidden, max_position_embeddings=64,
        )  # fmt: skip
    else:
        config = DistilBertConfig(
            vocab_size=size, dim=hidden, n_layers=layers, n_heads=2, hidden_dim=2 * hidden, max_position_embeddings=64
        )
    if kind == "token_classification":
        config.id2label, config.label2id = dict(enumerate(TAGS)), {t: i for i, t in enumerate(TAGS)}
    torch.manual_seed(seed)
    return getattr(transformers, family + KINDS[kind].head.suffix)(config)


@cache
def teacher_state(kind: str) -> dict[str, torch.Tensor]:
    """The weights of a teacher that has learnt its task."""
    known, encode, network = KINDS[kind], tokenizer(), model(kind)
    encoding = Encoding(48, stride=8, no_answer=True, masking="static", mask_share=0.3)
    table = known.encode(rows_of(kind, 512, seed=1), encode, TAGS, encoding)
    collate, optimiser = known.collator(encode), torch.optim.AdamW(network.parameters(), lr=3e-3)
    rows = [{k: v for k, v in row.items() if k not in ("id", "word_mask", "context_mask")} for row in table]
    network.train()
    for step in range(160):
        start = step * 32 % (len(rows) - 31)
        loss = network(**collate(rows[start : start + 32])).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return network.state_dict()


def teacher(kind: str) -> Any:
    network = model(kind)
    network.load_state_dict(teacher_state(kind))
    return network.eval()


def save_teacher(kind: str, folder: Path) -> Path:
    teacher(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def byte_level_tokenizer() -> Any:
    """As RoBERTa's: pieces hold the space before a word, and there are no token types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [" ".join(tagged(fact)[0]) for fact in facts(50)]
    core.train_from_iterator(text, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    model = json.loads(core.to_str())["model"]
    return transformers.RobertaTokenizer(
        vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], model_max_length=128
    )
