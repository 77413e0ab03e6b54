"""Object detection: detectors of torchvision and transformers, any other through tap names."""

from taskkd.deprecations import lookup
from taskkd.detection.datasets import DetectionDataset, collate
from taskkd.detection.methods import (
    METHODS,
    auto,
    bckd,
    channel_wise,
    chen,
    crosskd,
    defeat,
    detr_distill,
    fbkd,
    fgd,
    fgfi,
    gdetkd,
    gid,
    kd_detr,
    localization,
    masked_generative,
    mimic,
    pearson_kd,
    quantization_mimic,
    score_weighted,
    yolo_response,
)
from taskkd.detection.metrics import CocoMetric, VocMetric
from taskkd.detection.models import build, load, save
from taskkd.detection.readers import read
from taskkd.detection.records import Annotations
from taskkd.detection.teacher import DetectorTeacher
from taskkd.detection.terms import DetectionTerm, NeckTerm
from taskkd.detection.transformers_models import TransformersDetector
from taskkd.detection.trees import tree_crowns

__all__ = [
    "METHODS",
    "Annotations",
    "CocoMetric",
    "DetectionDataset",
    "DetectionTerm",
    "DetectorTeacher",
    "NeckTerm",
    "TransformersDetector",
    "VocMetric",
    "auto",
    "bckd",
    "build",
    "channel_wise",
    "chen",
    "collate",
    "crosskd",
    "defeat",
    "detr_distill",
    "fbkd",
    "fgd",
    "fgfi",
    "gdetkd",
    "gid",
    "kd_detr",
    "load",
    "localization",
    "masked_generative",
    "mimic",
    "pearson_kd",
    "quantization_mimic",
    "read",
    "save",
    "score_weighted",
    "tree_crowns",
    "yolo_response",
]

__getattr__ = lookup(__name__, __all__)
