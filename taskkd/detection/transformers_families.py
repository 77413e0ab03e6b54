"""Families of the detectors of `transformers`: where their tensors are, in the form of `taskkd.detection.views`.

Boxes of decoders are relative to the image without padding in all families, so that those of two can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from taskkd.detection.boxes import as_corners
from taskkd.detection.families import Family, Reader, Values
from taskkd.detection.sampling import own_regions
from taskkd.detection.shared import Normalisation, SharedImages
from taskkd.detection.views import Decoder, Dense

__all__ = ["Queries", "transformers_family"]

BASE = "model.model"


@dataclass(frozen=True)
class Queries:
    """The queries of a detector whose decoder may be run on others, too: the view "queries".

    Args:
        own: (queries, width) learned embeddings, or (batch, queries, 4) what a two-stage detector found in the image:
            boxes before the sigmoid.
        decode: such queries, any number of them -> predictions, from the encoder's result of this very run.
    """

    own: Tensor
    decode: Callable[[Tensor], Decoder]


def transformers_family(model: Any) -> Family:
    """The family of a wrapped detector.

    Views: "neck", "sources" (the maps that the decoder attends to, as wide as its queries), "decoder"; of RT-DETR and
    D-FINE also "dense" (the encoder's predictions at every pixel) and "regions"; of the others "queries".

    Args:
        model: a `TransformersDetector`.
    """
    kind, config = model.kind, model.config
    makers = {
        "detr": _detr,
        "conditional_detr": _detr,
        "deformable_detr": _deformable,
        "rt_detr": _rt_detr,
        "rt_detr_v2": _rt_detr,
        "d_fine": _rt_detr,
    }
    views, readers, notes = makers[config.model_type](config)
    notes = {"classes": int(config.num_labels), "activation": kind.activation, **notes}
    return Family(kind.title, views, readers, _run, Normalisation.of(model.transform), notes=notes)


def _run(model: Any, images: Any, parts: Collection[str], regions: list[Tensor] | None) -> None:
    model.run(images)


Parts = tuple[dict[str, tuple[str, ...]], dict[str, Reader], dict[str, Any]]


def _listed(taps: tuple[str, ...], values: Values, images: SharedImages) -> list[Tensor]:
    return [values[tap] for tap in taps]


def _in_precision(given: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    """What a decoder was called with, in the precision of its weights: under autocast it was of another."""
    return {k: v.to(weight.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


def _logit(x: Tensor) -> Tensor:
    """Inverse of the sigmoid, as `transformers` computes it."""
    x = x.clamp(0, 1)
    return (x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5)).log()


# ---- DETR and Conditional DETR: one map, learned queries


def _detr(config: Any) -> Parts:
    neck = (f"{BASE}.input_projection",)
    layers = tuple(f"{BASE}.decoder.layers.{i}" for i in range(config.decoder_layers - 1))
    views = {"neck": neck, "sources": neck, "decoder": ("live", BASE, *layers), "queries": ("live", "decoding")}
    read = partial(_listed, neck)
    readers: dict[str, Reader] = {
        "neck": read,
        "sources": read,
        "decoder": partial(_read_detr, layers),
        "queries": _queries_detr,
    }
    return views, readers, {"queries": (config.model_type, int(config.d_model))}


def _read_detr(layers: tuple[str, ...], values: Values, images: SharedImages) -> Decoder:
    model, base = values["live"], values[BASE]
    # each layer's predictions are made of its output behind the last norm, whether or not they are trained
    hidden = [model.model.decoder.layernorm(values[tap]) for tap in layers]
    return _detr_heads(
        model, torch.stack([*hidden, base.last_hidden_state], 1), getattr(base, "reference_points", None)
    )


def _detr_heads(model: Any, hidden: Tensor, reference: Tensor | None) -> Decoder:
    """Predictions of states (N, L, Q, d); Conditional DETR's boxes are offsets from reference points (Q, N, 2)."""
    boxes = model.bbox_predictor(hidden)
    if reference is not None:
        centre = _logit(reference.transpose(0, 1))[:, None]
        boxes = torch.cat([boxes[..., :2] + centre, boxes[..., 2:]], -1)
    activation = "sigmoid" if reference is not None else "softmax"
    return Decoder(model.class_labels_classifier(hidden), boxes.sigmoid(), activation, hidden)  # type: ignore[arg-type]


def _queries_detr(values: Values, images: SharedImages) -> Queries:
    model = values["live"]
    learned = model.model.query_position_embeddings.weight
    given = _in_precision(values["decoding"], learned)

    def decode(queries: Tensor) -> Decoder:
        memory = given["encoder_hidden_states"]
        position = queries.to(memory.dtype).expand(len(memory), *queries.shape[-2:])
        found = model.model.decoder(
            **{**given, "inputs_embeds": torch.zeros_like(position), "object_queries_position_embeddings": position}
        )
        layers = found.intermediate_hidden_states  # only of models that train on all layers
        hidden = found.last_hidden_state[:, None] if layers is None else layers.transpose(0, 1)
        return _detr_heads(model, hidden, getattr(found, "reference_points", None))

    return Queries(learned, decode)


# ---- Deformable DETR: maps of several strides, learned queries or (two-stage) boxes found by the encoder


def _deformable(config: Any) -> Parts:
    neck = tuple(f"{BASE}.input_proj.{i}" for i in range(config.num_feature_levels))
    views = {"neck": neck, "sources": neck, "decoder": ("live", BASE), "queries": ("live", "decoding")}
    read = partial(_listed, neck)
    readers: dict[str, Reader] = {
        "neck": read,
        "sources": read,
        "decoder": _read_deformable,
        "queries": _queries_deformable,
    }
    width = 4 if config.two_stage else 2 * int(config.d_model)
    return views, readers, {"queries": (config.model_type, width)}


def _read_deformable(values: Values, images: SharedImages) -> Decoder:
    return _deformable_heads(values["live"], values[BASE], values[BASE].init_reference_points)


def _deformable_heads(model: Any, found: Any, first: Tensor) -> Decoder:
    hidden, later = found.intermediate_hidden_states, found.intermediate_reference_points
    logits, boxes = [], []
    for i in range(hidden.shape[1]):
        state, reference = hidden[:, i], _logit(first if i == 0 else later[:, i - 1])
        box, known = model.bbox_embed[i](state), reference.shape[-1]
        boxes.append(torch.cat([box[..., :known] + reference, box[..., known:]], -1).sigmoid())
        logits.append(model.class_embed[i](state))
    return Decoder(torch.stack(logits, 1), torch.stack(boxes, 1), "sigmoid", hidden)


def _queries_deformable(values: Values, images: SharedImages) -> Queries:
    model = values["live"]
    base = model.model
    given = _in_precision(values["decoding"], base.level_embed)

    def decode(queries: Tensor) -> Decoder:
        memory = given["encoder_hidden_states"]
        if base.config.two_stage:
            queries = queries.to(memory.dtype).expand(len(memory), *queries.shape[-2:])
            reference = queries.sigmoid()
            queries = base.pos_trans_norm(base.pos_trans(base.get_proposal_pos_embed(queries)))
            position, content = queries.chunk(2, -1)
        else:
            queries = queries.to(memory.dtype).expand(len(memory), *queries.shape[-2:])
            position, content = queries.chunk(2, -1)
            reference = base.reference_points(position).sigmoid()
        found = base.decoder(
            **{
                **given,
                "inputs_embeds": content,
                "object_queries_position_embeddings": position,
                "reference_points": reference,
            }
        )
        return _deformable_heads(model, found, reference)

    two_stage = base.config.two_stage
    return Queries(_logit(given["reference_points"]) if two_stage else base.query_position_embeddings.weight, decode)


# ---- RT-DETR and D-FINE: a neck of three maps, queries picked from predictions at every pixel


def _rt_detr(config: Any) -> Parts:
    neck = (f"{BASE}.encoder",)
    sources = tuple(f"{BASE}.decoder_input_proj.{i}" for i in range(config.num_feature_levels))
    dense = (BASE, "decoding")
    views = {"neck": neck, "sources": sources, "decoder": (BASE, "live"), "dense": dense, "regions": dense}
    layer = int(getattr(config, "eval_idx", -1)) % config.decoder_layers  # D-FINE's only prediction in eval mode
    readers: dict[str, Reader] = {
        "neck": lambda values, images: list(values[neck[0]].last_hidden_state),
        "sources": partial(_listed, sources),
        "decoder": partial(_read_rt_detr, layer),
        "dense": _read_dense,
        "regions": lambda values, images: own_regions(_read_dense(values, images), images),
    }
    return views, readers, {}


def _read_rt_detr(evaluated: int, values: Values, images: SharedImages) -> Decoder:
    base = values[BASE]
    logits, boxes, hidden = (
        base.intermediate_logits,
        base.intermediate_reference_points,
        base.intermediate_hidden_states,
    )
    corners, edges = base.intermediate_predicted_corners, None
    if corners is not None:  # D-FINE: in training one prediction more, made before the first layer; states layer first
        count = corners.shape[1]
        logits, boxes = logits[:, -count:], boxes[:, -count:]
        hidden = (hidden if len(hidden) == count else hidden[evaluated : evaluated + count]).transpose(0, 1)
        corners = corners.unflatten(-1, (4, -1))
        edges = _edges(values["live"].model.decoder, base.initial_reference_points) * _frames(images)[..., None]
    if base.denoising_meta_values is not None:
        noise = int(base.denoising_meta_values["dn_num_split"][0])
        logits, boxes, hidden = (x[:, :, noise:] for x in (logits, boxes, hidden))
        corners, edges = (None if x is None else x[:, :, noise:] for x in (corners, edges))
    return Decoder(logits, boxes * _frames(images), "sigmoid", hidden, corners, edges)


def _edges(decoder: Any, reference: Tensor) -> Tensor:
    """Where D-FINE's bins put the sides of a box: (..., 4, bins), of the boxes (..., 4) that its decoder refines."""
    from transformers.models.d_fine.modeling_d_fine import weighting_function

    scale = decoder.reg_scale.abs()
    away = 0.5 + weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale) / scale
    centre, size = reference[..., :2, None], reference[..., 2:, None]
    return torch.cat([centre - away * size, centre + away * size], -2).detach()


def _frames(images: SharedImages) -> Tensor:
    """(batch, 1, 1, 4): what makes boxes relative to the padded batch relative to the image."""
    height, width = images.tensors.shape[2:]
    scale = [(width / w, height / h, width / w, height / h) for h, w in images.sizes]
    factors: Tensor = images.tensors.new_tensor(scale)[:, None, None]
    return factors


def _read_dense(values: Values, images: SharedImages) -> Dense:
    base = values[BASE]
    shapes = [(int(h), int(w)) for h, w in values["decoding"]["spatial_shapes_list"]]
    anchors = encoder_anchors(shapes, images.tensors)
    height, width = images.tensors.shape[2:]
    size = images.tensors.new_tensor([width, height, width, height])
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    raw = base.enc_outputs_coord_logits
    # where an anchor is not valid the model adds the largest number there is
    regression = torch.where(valid, raw - _exact_logit(anchors), torch.zeros_like(raw))
    boxes = as_corners(anchors) * size
    return Dense(
        base.enc_outputs_class, regression, [boxes] * len(raw), shapes, [h * w for h, w in shapes], "sigmoid",
        partial(_decode_dense, size), assign_centres, first=0,
    )  # fmt: skip


def encoder_anchors(shapes: list[tuple[int, int]], like: Tensor) -> Tensor:
    """(A, 4): what RT-DETR's encoder predicts boxes from, centre x, centre y, width, height relative to the batch.

    Args:
        shapes: (height, width) of each level.
        like: for device and dtype.
    """
    found = []
    for level, (h, w) in enumerate(shapes):
        y, x = torch.meshgrid(
            (torch.arange(h, device=like.device, dtype=like.dtype) + 0.5) / h,
            (torch.arange(w, device=like.device, dtype=like.dtype) + 0.5) / w,
            indexing="ij",
        )
        side = torch.full_like(x, 0.05 * 2.0**level)
        found.append(torch.stack([x, y, side, side], -1).flatten(0, 1))
    return torch.cat(found)


def _exact_logit(x: Tensor) -> Tensor:
    return (x / (1 - x)).log()


def _decode_dense(size: Tensor, regression: Tensor, anchors: Tensor) -> Tensor:
    from torchvision.ops import box_convert

    centred = (box_convert(anchors, "xyxy", "cxcywh") / size).clamp(1e-3, 1 - 1e-3)
    return as_corners((regression + _exact_logit(centred)).sigmoid()) * size


def assign_centres(boxes: Tensor, anchors: Tensor, level_sizes: list[int]) -> Tensor:
    """Anchors whose centre lies inside a box, the smallest of several; these detectors have no rule of their own.

    Args:
        boxes: (n, 4), n > 0; x1 y1 x2 y2.
        anchors: (A, 4).
        level_sizes: anchors of each level; not used.

    Returns:
        (A,) int64; -1: none.
    """
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    inside = ((centres[:, None] > boxes[:, :2]) & (centres[:, None] < boxes[:, 2:])).all(-1)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    smallest, index = torch.where(inside, area, float("inf")).min(1)
    return torch.where(smallest.isinf(), -1, index)
