"""Face recognition: margin heads, backbones, evaluation, and distillation on embeddings."""

from taskkd.deprecations import lookup
from taskkd.face.config import FaceConfig
from taskkd.face.datasets import FaceDataset, RandomFlip, TwoViews, collate
from taskkd.face.heads import MarginHead
from taskkd.face.methods import (
    METHODS,
    ada_distill,
    angular_distillation,
    ddl,
    ec_kd,
    ekd,
    embedding_mimic,
    grouped,
    margin_distillation,
    proxyless,
    relational,
    siamese_attention,
    triplet_distillation,
)
from taskkd.face.metrics import VerificationMetric
from taskkd.face.model import FaceModel
from taskkd.face.models import build, load, load_checkpoint, save, wrap
from taskkd.face.pairs import Pairs, make_pairs, read_pairs
from taskkd.face.partial_fc import PartialFC
from taskkd.face.readers import read_folder
from taskkd.face.recordio import read_recordio
from taskkd.face.records import Faces

__all__ = [
    "METHODS",
    "FaceConfig",
    "FaceDataset",
    "FaceModel",
    "Faces",
    "MarginHead",
    "Pairs",
    "PartialFC",
    "RandomFlip",
    "TwoViews",
    "VerificationMetric",
    "ada_distill",
    "angular_distillation",
    "build",
    "collate",
    "ddl",
    "ec_kd",
    "ekd",
    "embedding_mimic",
    "grouped",
    "load",
    "load_checkpoint",
    "make_pairs",
    "margin_distillation",
    "proxyless",
    "read_folder",
    "read_pairs",
    "read_recordio",
    "relational",
    "save",
    "siamese_attention",
    "triplet_distillation",
    "wrap",
]

__getattr__ = lookup(__name__, __all__)
