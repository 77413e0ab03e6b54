"""CIRKD: cross-image relational distillation (Yang C. et al. 2022), and the channels of its second version (2025)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from torch import nn

from taskkd.segmentation.methods.beside import feature_of, soft_terms
from taskkd.segmentation.methods.cirkd_memory import ChannelMemory, PixelMemory, Storage
from taskkd.segmentation.similarity import cross_image_similarity
from taskkd.segmentation.terms import Ignore, MapTerm
from taskkd.stages import Method, Stage
from taskkd.terms import Term

__all__ = ["cirkd"]


def cirkd(
    student: nn.Module,
    teacher: nn.Module,
    *,
    minibatch: Annotated[float, Ge(0)] = 1.0,
    pixel: Annotated[float, Ge(0)] = 0.1,
    region: Annotated[float, Ge(0)] = 0.1,
    kd: Annotated[float, Ge(0)] = 1.0,
    temperature: Annotated[float, Gt(0)] = 0.1,
    kd_temperature: Annotated[float, Gt(0)] = 1.0,
    pool: Annotated[int, Gt(0)] | None = None,
    pixels: Annotated[int, Gt(0)] = 20000,
    regions: Annotated[int, Gt(0)] = 2000,
    memory_limit: Annotated[float, Gt(0)] = 400.0,
    storage: Storage = "float16",
    channel: Annotated[float, Ge(0)] = 0.0,
    channel_memory: Annotated[float, Ge(0)] = 0.0,
    channel_mse: Annotated[float, Ge(0)] = 0.0,
    compat: Literal["official"] | None = None,
    ignore: Ignore = "padding",
    gather: bool = False,
) -> Method:
    """Similarities between pixels across images: of the batch, and to a memory of pixels and regions; soft targets.

    Source: Yang C., Zhou, An, Jiang, Xu, Zhang 2022, "Cross-Image Relational Knowledge Distillation for Semantic
    Segmentation", and their code: the weights are the defaults (on VOC `pixel=0.01`; SegFormer students
    `pixels=2000`). The second version (2025) is `minibatch=0, pixel=0, region=0, channel=1, channel_memory=0.1,
    channel_mse=100` or beside the first.

    Departures: the released code remembers the first pixels of an image for every class (`compat="official"`), is NaN
    on a crop without labels, where this is 0, and keeps its queues in fp32 without a limit: 0.78 GB for 19 classes of
    512 features, 6.1 GB for ADE20K's 150.

    Args:
        student, teacher: models with `views.feature` and `views.logits`.
        minibatch: of `cross_image_similarity`; the larger map is brought to the size of the smaller.
        pixel, region: of the memories, see `PixelMemory`.
        kd: of the soft targets on logits.
        temperature: of similarities.
        kd_temperature: of the soft targets and, once more, of similarities to a memory.
        pool: averages of so many pixels each way before `minibatch`, whose time falls with the fourth power of it.
            None: 1, and more for maps of more than 8192 pixels.
        pixels, regions: remembered for each class, at most.
        memory_limit: MB of both queues, which are as long as fits.
        storage: of the queues.
        channel, channel_memory, channel_mse: weights of the second version, see `ChannelMemory`.
        compat: "official": the released memory with its defects.
        ignore: pixels that do not count; the authors count all ("none"). The memories look at labelled pixels alone.
        gather: on several ranks `minibatch` is of the pixels of all of them, whose maps must be of one size; False: of
            each rank its own. The memories are of all ranks either way.
    """
    taps = feature_of(student, "student"), feature_of(teacher, "teacher")
    temperatures: dict[str, Any] = {"temperature": temperature, "kd_temperature": kd_temperature}
    terms: list[Term] = []
    if minibatch > 0:
        terms.append(
            MapTerm(
                "minibatch",
                cross_image_similarity,
                *taps,
                align="smaller",
                ignore=ignore,
                gather=gather,
                weight=minibatch,
                temperature=temperature,
                pool=pool,
            )
        )
    if pixel > 0 or region > 0:
        memory = PixelMemory(
            "memory",
            *taps,
            classes=len(student.classes),  # type: ignore[arg-type]
            pixels=pixels,
            regions=regions,
            limit=memory_limit,
            storage=storage,
            compat=compat,
            weights={"pixel": pixel, "region": region},
            align="smaller",
            **temperatures,
        )
        terms.append(memory)
    if channel > 0 or channel_memory > 0 or channel_mse > 0:
        weights = {"batch": channel, "memory": channel_memory, "mse": channel_mse}
        options: dict[str, Any] = {"storage": storage, "compat": compat, "ignore": ignore, **temperatures}
        terms.append(ChannelMemory("channels", *taps, weights=weights, align="smaller", **options))
    terms += soft_terms(student, teacher, kd, kd_temperature, ignore)
    return Method("cirkd", [Stage("distil", terms)], ("labels",))
