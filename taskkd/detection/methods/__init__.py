"""The methods for detectors, one file for each paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskkd.detection.methods.auto import auto
from taskkd.detection.methods.bckd import bckd
from taskkd.detection.methods.channel_wise import channel_wise
from taskkd.detection.methods.chen import chen
from taskkd.detection.methods.crosskd import crosskd
from taskkd.detection.methods.defeat import defeat
from taskkd.detection.methods.detr_distill import detr_distill
from taskkd.detection.methods.fbkd import fbkd
from taskkd.detection.methods.fgd import fgd
from taskkd.detection.methods.fgfi import fgfi
from taskkd.detection.methods.gdetkd import gdetkd
from taskkd.detection.methods.gid import gid
from taskkd.detection.methods.kd_detr import kd_detr
from taskkd.detection.methods.localization import localization
from taskkd.detection.methods.masked_generative import masked_generative
from taskkd.detection.methods.mimic import mimic
from taskkd.detection.methods.pearson_kd import pearson_kd
from taskkd.detection.methods.quantization_mimic import quantization_mimic
from taskkd.detection.methods.score_weighted import score_weighted
from taskkd.detection.methods.yolo_response import yolo_response
from taskkd.stages import Method

__all__ = [
    "METHODS",
    "auto",
    "bckd",
    "channel_wise",
    "chen",
    "crosskd",
    "defeat",
    "detr_distill",
    "fbkd",
    "fgd",
    "fgfi",
    "gdetkd",
    "gid",
    "kd_detr",
    "localization",
    "masked_generative",
    "mimic",
    "pearson_kd",
    "quantization_mimic",
    "score_weighted",
    "yolo_response",
]

#: name -> `method(student, teacher, *, options) -> Method`
METHODS: dict[str, Callable[..., Method] | Any] = {
    "auto": auto,
    "bckd": bckd,
    "channel_wise": channel_wise,
    "chen": chen,
    "crosskd": crosskd,
    "defeat": defeat,
    "detr_distill": detr_distill,
    "fbkd": fbkd,
    "fgd": fgd,
    "fgfi": fgfi,
    "gdetkd": gdetkd,
    "gid": gid,
    "kd_detr": kd_detr,
    "localization": localization,
    "masked_generative": masked_generative,
    "mimic": mimic,
    "pearson_kd": pearson_kd,
    "quantization_mimic": quantization_mimic,
    "score_weighted": score_weighted,
    "yolo_response": yolo_response,
}
