"""Semantic segmentation: torchvision, transformers, segmentation-models-pytorch; any network through tap names."""

from taskkd.deprecations import lookup
from taskkd.segmentation.datasets import SegmentationDataset, collate
from taskkd.segmentation.loss import PixelCrossEntropy
from taskkd.segmentation.methods import (
    METHODS,
    af_dcd,
    attention_transfer,
    channel_wise,
    cirkd,
    dist,
    domain_adaptive,
    dsd,
    ifvd,
    masked_generative,
    soft_targets,
    structured,
)
from taskkd.segmentation.metrics import SegmentationMetric
from taskkd.segmentation.models import build, load, save, wrap
from taskkd.segmentation.nuclei import nuclei
from taskkd.segmentation.readers import read_folder
from taskkd.segmentation.records import Annotations
from taskkd.segmentation.segmenter import Segmenter
from taskkd.segmentation.terms import MapTerm

__all__ = [
    "METHODS",
    "Annotations",
    "MapTerm",
    "PixelCrossEntropy",
    "SegmentationDataset",
    "SegmentationMetric",
    "Segmenter",
    "af_dcd",
    "attention_transfer",
    "build",
    "channel_wise",
    "cirkd",
    "collate",
    "dist",
    "domain_adaptive",
    "dsd",
    "ifvd",
    "load",
    "masked_generative",
    "nuclei",
    "read_folder",
    "save",
    "soft_targets",
    "structured",
    "wrap",
]

__getattr__ = lookup(__name__, __all__)
