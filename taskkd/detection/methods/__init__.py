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
from taskkd.detection.methods.fbkd import fbkd
from taskkd.detection.methods.fgd import fgd
from taskkd.detection.methods.fgfi import fgfi
from taskkd.detection.methods.detr_distill import detr_distill
from taskkd.detection.methods.gdetkd import gdetkd
from taskkd.detection.methods.gid import gid
from taskkd.detection.methods.kd_detr import kd_detr
from taskkd.detection.methods.localization import localization
from taskkd.detection.methods.pearson_kd import pearson_kd
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
    "channel_wise",
    "chen",
    "defeat",
    "fbkd",
    "fgd",
    "fgfi",
    "gdetkd",
    "gid",
    "masked_generative",
    "mimic",
    "pearson_kd",
    "quantization_mimic",
    "score_weighted",
    "bckd",
    "chen",
    "crosskd",
    "detr_distill",
    "gdetkd",
    "gid",
    "kd_detr",
    "localization",
    "pearson_kd",
    "yolo_response",
]

#: name -> `method(student, teacher, *, options) -> Method`
METHODS: dict[str, Callable[..., Method] | Any] = {
    "auto": auto,
    "channel_wise": channel_wise,
    "defeat": defeat,
    "fbkd": fbkd,
    "fgd": fgd,
    "fgfi": fgfi,
    "masked_generative": masked_generative,
    "mimic": mimic,
    "pearson_kd": pearson_kd,
    "quantization_mimic": quantization_mimic,
    "score_weighted": score_weighted,
    "bckd": bckd,
    "chen": chen,
    "crosskd": crosskd,
    "detr_distill": detr_distill,
    "gdetkd": gdetkd,
    "gid": gid,
    "kd_detr": kd_detr,
    "localization": localization,
    "pearson_kd": pearson_kd,
    "yolo_response": yolo_response,
}
