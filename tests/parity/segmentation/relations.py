"""Parity adapters of the segmentation losses: relations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from taskkd import losses
from taskkd.adapters import Conv1x1
from taskkd.losses.generation import kept_cells
from taskkd.segmentation.methods.af_dcd import OmniContrastive
from taskkd.segmentation.methods.cirkd_memory import ChannelMemory, PixelMemory
from taskkd.segmentation.methods.dsd import category_similarity, residual_attention
from taskkd.segmentation.methods.ifvd import intra_class_variation
from taskkd.segmentation.methods.masked_generative import MaskedGeneration
from taskkd.segmentation.parts import PartsTerm
from taskkd.segmentation.similarity import cross_image_similarity
from taskkd.segmentation.terms import labels_at
from taskkd.terms import Run

Arrays = Mapping[str, Tensor]
Params = Mapping[str, Any]


def pair(arrays: Arrays) -> tuple[Tensor, Tensor]:
    return arrays["in_s"], arrays["in_t"]


def labels_of(arrays: Arrays, ignore: int) -> dict[str, Tensor]:
    """A batch with their labels; ours are 255 where there is none."""
    label = arrays["in_label"].long()
    return {"labels": label.masked_fill(label == ignore, 255)}


def ifvd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = pair(arrays)
    labels = labels_at(labels_of(arrays, params["ignore"]), s.shape[2:])
    every = torch.ones_like(labels, dtype=torch.bool)
    return {"loss": intra_class_variation(s, t, labels=labels, classes=params["num_classes"], mask=every)}


def cirkd_minibatch(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    pool = 2 if params["pooling"] else 1
    return {"loss": cross_image_similarity(*pair(arrays), temperature=params["temperature"], pool=pool)}


def run_of(arrays: Arrays, batch: Mapping[str, Tensor]) -> Run:
    s, t = (x.double() for x in pair(arrays))
    return Run(batch, None, {"x": s}, {"x": t})


class Parts(nn.Module):
    """`term.parts` as a forward, so that it can be called with their weights in place of its own."""

    def __init__(self, term: PartsTerm) -> None:
        super().__init__()
        self.term = term

    def forward(self, run: Run) -> Mapping[str, Tensor]:
        return self.term.parts(run)


def with_weights(
    term: PartsTerm, arrays: Arrays, batch: Mapping[str, Tensor], names: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of a term that has their weights and buffers, `names` are their prefixes by ours; and its buffers."""
    run = run_of(arrays, batch)
    term.build(run)
    state = {}
    for ours in term.state_dict():
        prefix = next((p for p in names if ours.startswith(p)), None)
        theirs = None if prefix is None else arrays.get("w_" + names[prefix] + ours.removeprefix(prefix))
        assert theirs is not None or prefix is None, f"no weight for {ours}"
        if theirs is not None:
            state[f"term.{ours}"] = theirs if theirs.requires_grad else theirs.clone()
    return dict(functional_call(Parts(term.double()), state, (run,))), state


def drawer(arrays: Arrays) -> Callable[[int], Tensor]:
    """Their permutations in order, each as long as asked; where they drew none, any."""
    count = sum(name.startswith("in_perm") for name in arrays)
    drawn = iter([arrays[f"in_perm{i}"] for i in range(count)])

    def draw(length: int) -> Tensor:
        found = next(drawn, None)
        if found is None:
            assert count == 0
            return torch.arange(length)
        assert len(found) == length
        return found

    return draw


def cirkd_memory(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    term = PixelMemory(
        "memory",
        "x",
        "x",
        classes=params["num_classes"],
        pixels=params["pixel_memory"],
        regions=params["region_memory"],
        draw_pixels=params["pixel_contrast_size"],
        draw_regions=params["region_contrast_size"],
        temperature=params["T"],
        kd_temperature=params["T_kd"],
        storage="float32",  # doubles of doubles
        compat="official",
        draw=drawer(arrays),
    )
    names = {
        "layers.project.": "project_head.",
        "queues.pixel.rows": "teacher_pixel_queue",
        "queues.pixel.places": "pixel_queue_ptr",
        "queues.region.rows": "teacher_segment_queue",
        "queues.region.places": "segment_queue_ptr",
    }
    found, state = with_weights(term, arrays, labels_of(arrays, params["ignore_label"]), names)
    return {
        **found,
        "loss": found["pixel"] + 2 * found["region"],  # their gradient is of this
        "pixel_queue": state["term.queues.pixel.rows"],
        "segment_queue": state["term.queues.region.rows"],
        "pixel_ptr": state["term.queues.pixel.places"],
        "segment_ptr": state["term.queues.region.places"],
    }


def cirkdv2_channel(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    term = ChannelMemory(
        "channels",
        "x",
        "x",
        channels=params["channel_memory"],
        drawn=params["channel_contrast"],
        pushed=params["update"],
        temperature=params["T"],
        kd_temperature=params["T_kd"],
        storage="float32",
        compat="official",
        draw=drawer(arrays),
    )
    queue = {n: v[None] for n, v in arrays.items() if n == "w_teacher_channel_queue"}  # one class
    names = {
        "layers.project.": "project_head.",
        "queues.channel.rows": "teacher_channel_queue",
        "queues.channel.places": "channel_queue_ptr",
    }
    found, state = with_weights(term, {**arrays, **queue}, {}, names)
    return {
        "minibatch_channel": found["batch"],
        "memory_channel": found["memory"],
        "channel_mse": found["mse"],
        "loss": found["batch"] + 2 * found["memory"] + 3 * found["mse"],  # their gradient is of this
        "queue": state["term.queues.channel.rows"],
    }


def at_seg(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    return {"loss": losses.attention_transfer(*pair(arrays))}


def fitnet_seg(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = pair(arrays)
    weight = arrays["w_conv.weight"]
    regressor = Conv1x1(s.shape[1], t.shape[1])
    mapped = functional_call(regressor, {"map.weight": weight, "map.bias": weight.new_zeros(len(weight))}, (s,))
    return {"loss": losses.mse(mapped, t)}


def drawn(arrays: Arrays, masked: float) -> Callable[[Tensor], Tensor]:
    return lambda like: kept_cells(like, masked, draw=arrays.get("in_rand"))


def mgd_seg(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    term = MaskedGeneration("generation", "x", "x", masked=params["mask_ratio"])
    term.keep = drawn(arrays, params["mask_ratio"])  # type: ignore[method-assign]
    names = {"layers.align.": "align.", "layers.generator.": "generation."}
    found, _ = with_weights(term, arrays, {}, names)
    return {"loss": params["alpha"] * found["generation"]}


def afdcd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    term = OmniContrastive(
        "contrast",
        "x",
        "x",
        weights={},
        masked=params["mask_ratio"],
        mask="random" if params["rand_mask"] else "middle",
        contrast_temperature=params["tau"],
        groups=params["M"],
        pool=params["pool"] or 1,
        patch=tuple(params["patch"]),
    )
    if params["rand_mask"]:
        term.keep = drawn(arrays, params["mask_ratio"])  # type: ignore[method-assign]
    names = {"layers.align.": "align.", "layers.generator.": "projetor."}
    found, _ = with_weights(term, arrays, {}, names)
    contrast = found["contrast"] * params["M"]  # they sum over groups
    return {"fd": found["mimic"], "ctr": contrast, "loss": found["mimic"] + contrast}


def dsd_csd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    s, t = pair(arrays)
    return {"loss": category_similarity(s, t[:, : s.shape[1]])}  # their case has more channels


def dsd_psd(arrays: Arrays, params: Params) -> dict[str, Tensor]:
    sides = [[arrays[n] for n in sorted(arrays) if n.startswith(f"in_{side}")] for side in "st"]
    return {"loss": residual_attention(*sides)}


ADAPTERS: dict[str, Callable[..., Any]] = {
    "segmentation/afdcd": afdcd,
    "segmentation/at_seg": at_seg,
    "segmentation/cirkd_memory": cirkd_memory,
    "segmentation/cirkd_minibatch": cirkd_minibatch,
    "segmentation/cirkdv2_channel": cirkdv2_channel,
    "segmentation/dsd_csd": dsd_csd,
    "segmentation/dsd_psd": dsd_psd,
    "segmentation/fitnet_seg": fitnet_seg,
    "segmentation/ifvd": ifvd,
    "segmentation/mgd_seg": mgd_seg,
}
