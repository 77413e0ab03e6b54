"""Face recognition: margin heads, backbones, evaluation, and distillation on embeddings."""

from taskkd.face.config import FaceConfig
from taskkd.face.model import FaceModel
from taskkd.face.models import build, load, load_checkpoint, save, wrap

__all__ = ["FaceConfig", "FaceModel", "build", "load", "load_checkpoint", "save", "wrap"]
