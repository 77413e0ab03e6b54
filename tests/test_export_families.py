"""Every kind of student that leaves as a graph or as a folder of its library: tiny ones with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from taskkd import exports, portable
from taskkd.detection import models as detectors_of
from taskkd.detection.portable import portable as detector_as
from taskkd.face import models as faces
from taskkd.face.portable import portable as face_as
from taskkd.nlp import SentenceEncoder
from taskkd.nlp.portable import portable as text_as
from taskkd.segmentation import models as segmenters
from taskkd.segmentation.portable import portable as segmenter_as
from tests import families, tiny
from tests.detection import detectors, tiny_detr
from tests.segmentation.networks import NETWORKS
from tests.segmentation.test_models import CONFIGS, NAMES

WORDS = len(tiny.tokenizer())
BERT: dict[str, Any] = {**families.SIZES, "vocab_size": WORDS, "num_hidden_layers": 2, "max_position_embeddings": 64}
DECODER: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
TEXTS: dict[str, Callable[[], nn.Module]] = {
    "classification": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
    "tokens": lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT)),
    "answers": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**BERT)),
    "masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
    "sentences-mean": lambda: SentenceEncoder(hf.BertModel(hf.BertConfig(**BERT))),
    "sentences-cls": lambda: SentenceEncoder(hf.BertModel(hf.BertConfig(**BERT)), pooling="cls", normalise=False),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)),
    "deberta": lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**BERT, **families.RELATIVE)),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**BERT, **families.ENDS, local_attention=4, global_attn_every_n_layers=2)
    ),
}
FACES: dict[str, dict[str, Any]] = {
    "iresnet": {"architecture": "iresnet18", "layers": [1, 1], "width": 4, "size": 16},
    "mobilefacenet": {"architecture": "mobilefacenet", "size": 32},
    "timm": {"architecture": "timm:mobilenetv3_small_050", "size": 32},
}
OF_TRANSFORMERS = ("segformer", "upernet", "beit", "mobilevit", "mobilenet_v2")


def written(own: portable.Portable, format: str, folder: Path) -> exports.Exported:  # noqa: A002
    """What is written is compared with the live student; a difference is an error."""
    done = exports.Exported(folder, format, inputs="3 synthetic inputs")  # type: ignore[arg-type]
    folder.mkdir()
    exports._write(own, None, own.synthetic(), folder, done, exports.TOLERANCE)
    assert max(done.magnitudes.values()) > 0
    return done


def text(name: str) -> portable.Portable:
    torch.manual_seed(0)
    return text_as(TEXTS[name]().eval(), tiny.tokenizer())


def of_transformers(name: str) -> portable.Portable:
    # with as many channels as groups, a map of one pixel has no variance
    width = {"width": 64} if name == "deformable_detr" else {}
    model = tiny_detr.detector(name, **width).eval()
    if name in (
        "rt_detr",
        "rt_detr_v2",
        "d_fine",
    ):  # drawn so small that maps vanish, and all queries are picked by a tie
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
    return detector_as(model)


def of_torchvision(name: str) -> portable.Portable:
    model = detectors.DETECTORS[name]().eval()
    if name in ("retinanet", "fcos"):  # as if trained: they find something
        detectors.sharpened(model, 0)
        nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    model.description = detectors_of.describe(model, ["one", "two"])
    return detector_as(model)


def segmenter(name: str) -> portable.Portable:
    torch.manual_seed(0)
    if name in OF_TRANSFORMERS:
        model = segmenters.wrap(NETWORKS[name][0](3), NAMES)
    else:
        model = segmenters.build(CONFIGS[name.removeprefix("built-")][0], NAMES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
    return segmenter_as(model.eval())


def face(name: str) -> portable.Portable:
    return face_as(faces.build({**FACES[name], "embedding_size": 8}, seed=0).eval())


@pytest.mark.parametrize("name", TEXTS)
def test_texts_as_a_folder(name: str, tmp_path: Path) -> None:
    assert written(text(name), "hf", tmp_path / "out").difference < 1e-6


@pytest.mark.parametrize("name", tiny_detr.NAMES)
def test_detectors_of_transformers_as_a_folder(name: str, tmp_path: Path) -> None:
    assert written(of_transformers(name), "hf", tmp_path / "out").difference == 0


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_segmenters_of_transformers_as_a_folder(name: str, tmp_path: Path) -> None:
    assert written(segmenter(name), "hf", tmp_path / "out").difference < 1e-6


@pytest.mark.parametrize("name", FACES)
def test_face_models_as_a_folder(name: str, tmp_path: Path) -> None:
    assert written(face(name), "hf", tmp_path / "out").difference == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_texts_as_a_graph(name: str, tmp_path: Path) -> None:
    """Of any length and number, and padded."""
    own = text(name)
    done = written(own, "onnx", tmp_path / "out")
    assert done.exporter == "torch.onnx.export(dynamo=True), free: batch, length"
    padded = tiny.tokenizer()(["a film", "the music is quite lovely and warm"], padding=True, return_tensors="pt")
    live = portable.outputs_of(own.student, own.signature, own.signature.arrange(padded))
    found = portable.run_onnx(tmp_path / "out" / "model.onnx", dict(padded))
    for a, b in zip(live, found, strict=True):
        real = padded["attention_mask"].bool() if a.ndim > 1 and a.shape[1] == padded["input_ids"].shape[1] else ...
        torch.testing.assert_close(b[real], a[real], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_detr.NAMES)
def test_detectors_of_transformers_as_a_graph(name: str, tmp_path: Path) -> None:
    done = written(of_transformers(name), "onnx", tmp_path / "out")
    assert "free: batch" in done.exporter


@pytest.mark.slow
@pytest.mark.parametrize("name", detectors.DETECTORS)
def test_detectors_of_torchvision_as_a_graph(name: str, tmp_path: Path) -> None:
    done = written(of_torchvision(name), "onnx", tmp_path / "out")
    assert done.exporter == "torch.onnx.export(dynamo=False), free: height, width"
    assert done.magnitudes["scores"] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OF_TRANSFORMERS, *(f"built-{name}" for name in CONFIGS)])
def test_segmenters_as_a_graph(name: str, tmp_path: Path) -> None:
    own = segmenter(name)
    assert "free: batch" in written(own, "onnx", tmp_path / "out").exporter
    if own.library == "pytorch":
        assert written(own, "hf", tmp_path / "hf").difference == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FACES)
def test_face_models_as_a_graph(name: str, tmp_path: Path) -> None:
    assert written(face(name), "onnx", tmp_path / "out").exporter.endswith("free: batch")
