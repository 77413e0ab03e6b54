"""Encoders and their heads outside of taskkd."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskkd.errors import TaskkdError
from taskkd.nlp.heads import CAUSAL_LM, MASKED_LM, QUESTION_ANSWERING, SENTENCE, SEQUENCE, TOKENS, head_of
from taskkd.nlp.models import label_names
from taskkd.nlp.sentence import SentenceEncoder
from taskkd.portable import Portable, Sample, Signature, is_library_class, of_own_class
from taskkd.taps import accepted_arguments

__all__ = ["portable"]

PIPELINES = {
    SEQUENCE: "text-classification",
    TOKENS: "token-classification",
    QUESTION_ANSWERING: "question-answering",
    MASKED_LM: "fill-mask",
    CAUSAL_LM: "text-generation",
    SENTENCE: "sentence-similarity",
}
EXAMPLES = ("a warm and funny film", "too long, and the second half of it is dull", "see it twice")


class Texts(nn.Module):
    """A model of tokens as a graph: its inputs in order, its outputs as a tuple."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, tuple(inputs), tuple(outputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(found[name] for name in self.outputs)


def portable(student: nn.Module, tokenizer: Any, max_length: int | None = None) -> Portable:
    """A student of task nlp, as it leaves a run.

    Args:
        student: in evaluation mode.
        tokenizer: of it.
        max_length: of texts in tokens; None: as the tokenizer says.
    """
    head = head_of(student)
    outputs = tuple(tap.removeprefix("out.") for tap in head.logits) or ("sentence_embedding",)
    inputs = _inputs(student, tokenizer)
    axes: dict[str, dict[int, str]] = {name: {0: "batch", 1: "length"} for name in inputs}
    by_token = head in (TOKENS, QUESTION_ANSWERING, MASKED_LM, CAUSAL_LM)
    axes |= {name: {0: "batch", **({1: "length"} if by_token else {})} for name in outputs}
    length = max_length or min(int(tokenizer.model_max_length), 512)
    sentence = isinstance(student, SentenceEncoder)
    inner: nn.Module = student.encoder if isinstance(student, SentenceEncoder) else student
    buildable = is_library_class(inner)
    own = "from taskkd.nlp import load_model\n\nmodel = load_model(folder).eval()"
    if not buildable:
        own = f"model = {type(student).__name__}.from_pretrained(folder).eval()  # your own class"
    load, use = _sentence_code(student, length) if isinstance(student, SentenceEncoder) else _code(head.suffix, length)

    def synthetic() -> list[Sample]:
        return [dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=length)) for text in EXAMPLES]

    def save(folder: Path) -> None:
        if not buildable:
            raise TaskkdError(of_own_class(inner))
        student.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)

    def reload(folder: Path) -> nn.Module:
        model: nn.Module = type(student).from_pretrained(folder, dtype=torch.float32)  # type: ignore[attr-defined]
        return model.eval()

    return Portable(
        student=student,
        title=f"{type(inner).__name__} for {head.title}",
        pipeline=PIPELINES[head],
        library="sentence-transformers" if sentence else "transformers",
        signature=Signature(
            graph=lambda model: Texts(model, inputs, outputs),
            inputs=inputs,
            outputs=outputs,
            axes=axes,
            arrange=lambda sample: tuple(sample[name].reshape(-1, sample[name].shape[-1]) for name in inputs),
        ),
        synthetic=synthetic,
        preprocessing={
            "tokenizer": "the files of AutoTokenizer in this folder",
            "max_length": length,
            "truncation": True,
            "inputs": list(inputs),
        },
        load=load,
        use=use,
        own=own,
        buildable=buildable,
        save=save,
        reload=reload,
        processing=tokenizer,
        classes=label_names(student),
    )


def _inputs(student: nn.Module, tokenizer: Any) -> tuple[str, ...]:
    """What the student takes of what the tokenizer gives."""
    taken = accepted_arguments(student.forward)(dict.fromkeys(tokenizer.model_input_names, 0))
    if isinstance(student, SentenceEncoder) and not student._takes_types:
        taken.pop("token_type_ids", None)
    return tuple(name for name in tokenizer.model_input_names if name in taken)


def _code(suffix: str, length: int) -> tuple[str, str]:
    """Lines that load a model of transformers, and that run it."""
    auto = f"AutoModel{suffix}"
    load = f"""from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder).eval()"""
    use = f"""import torch

texts = ["a warm and funny film", "a dull one"]
batch = tokenizer(texts, padding=True, truncation=True, max_length={length}, return_tensors="pt")
with torch.no_grad():
    output = model(**batch)"""
    return load, use


def _sentence_code(student: SentenceEncoder, length: int) -> tuple[str, str]:
    """The same for a sentence encoder, in plain transformers."""
    load = """from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder).eval()  # or sentence_transformers.SentenceTransformer(folder)"""
    pool = "states[:, 0]"
    if student.pooling == "mean":
        pool = "(states * mask).sum(1) / mask.sum(1).clamp(min=1)"
    lines = [
        "import torch",
        "",
        'texts = ["a warm and funny film", "a dull one"]',
        f'batch = tokenizer(texts, padding=True, truncation=True, max_length={length}, return_tensors="pt")',
        "with torch.no_grad():",
        "    states = model(**batch).last_hidden_state",
        'mask = batch["attention_mask"][..., None].float()',
        f"output = {pool}",
    ]
    if student.normalise:
        lines.append("output = torch.nn.functional.normalize(output)")
    return load, "\n".join(lines)
