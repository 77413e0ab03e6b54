"""The methods for detectors, one file for each paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskkd.detection.methods.bckd import bckd
from taskkd.detection.methods.chen import chen
from taskkd.detection.methods.crosskd import crosskd
from taskkd.detection.methods.detr_distill import detr_distill
from taskkd.detection.methods.gdetkd import gdetkd
from taskkd.detection.methods.gid import gid
from taskkd.detection.methods.kd_detr import kd_detr
from taskkd.detection.methods.localization import localization
from taskkd.detection.methods.yolo_response import yolo_response
from taskkd.stages import Method

__all__ = [
    "METHODS",
    "bckd",
    "chen",
    "crosskd",
    "detr_distill",
    "gdetkd",
    "gid",
    "kd_detr",
    "localization",
    "yolo_response",
]

#: name -> `method(student, teacher, *, options) -> Method`
METHODS: dict[str, Callable[..., Method] | Any] = {
    "bckd": bckd,
    "chen": chen,
    "crosskd": crosskd,
    "detr_distill": detr_distill,
    "gdetkd": gdetkd,
    "gid": gid,
    "kd_detr": kd_detr,
    "localization": localization,
    "yolo_response": yolo_response,
}
