"""taskkd: knowledge distillation for detection, segmentation, NLP and face recognition.

The public names are imported at first use, so that `import taskkd` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from taskkd._version import __version__

if TYPE_CHECKING:
    from taskkd import adapters, errors, gates, layer_maps, losses, schedules, taps
    from taskkd.adversarial import Adversarial
    from taskkd.attention import AttentionBasedFeatures, ChannelAttentive
    from taskkd.augmentation import Augmented
    from taskkd.averages import EMA, Snapshot
    from taskkd.banks import MemoryBank
    from taskkd.caches import Cached
    from taskkd.cohorts import Cohort, PeerAttention, mutual
    from taskkd.contrastive import ContrastiveRelation, ContrastiveRepresentation
    from taskkd.distiller import Distiller
    from taskkd.ensembles import Ensemble, LatentGate
    from taskkd.exports import export
    from taskkd.mixup import uncertainty_mixup
    from taskkd.recipes import distill
    from taskkd.stages import Method, Stage
    from taskkd.suppliers import SelfTeacher, Targets
    from taskkd.teachers import Frozen
    from taskkd.terms import Auto, Match, Run, Term
    from taskkd.trainer import Trainer

_WHERE = {
    "Adversarial": "taskkd.adversarial",
    "AttentionBasedFeatures": "taskkd.attention",
    "Augmented": "taskkd.augmentation",
    "Auto": "taskkd.terms",
    "Cached": "taskkd.caches",
    "ChannelAttentive": "taskkd.attention",
    "Cohort": "taskkd.cohorts",
    "ContrastiveRelation": "taskkd.contrastive",
    "ContrastiveRepresentation": "taskkd.contrastive",
    "Distiller": "taskkd.distiller",
    "EMA": "taskkd.averages",
    "Ensemble": "taskkd.ensembles",
    "Frozen": "taskkd.teachers",
    "LatentGate": "taskkd.ensembles",
    "Match": "taskkd.terms",
    "MemoryBank": "taskkd.banks",
    "Method": "taskkd.stages",
    "PeerAttention": "taskkd.cohorts",
    "Run": "taskkd.terms",
    "SelfTeacher": "taskkd.suppliers",
    "Snapshot": "taskkd.averages",
    "Stage": "taskkd.stages",
    "Targets": "taskkd.suppliers",
    "Term": "taskkd.terms",
    "Trainer": "taskkd.trainer",
    "distill": "taskkd.recipes",
    "export": "taskkd.exports",
    "mutual": "taskkd.cohorts",
    "uncertainty_mixup": "taskkd.mixup",
}
_MODULES = (
    "adapters",
    "detection",
    "errors",
    "face",
    "gates",
    "layer_maps",
    "losses",
    "nlp",
    "schedules",
    "segmentation",
    "taps",
)

__all__ = [
    "EMA",
    "Adversarial",
    "AttentionBasedFeatures",
    "Augmented",
    "Auto",
    "Cached",
    "ChannelAttentive",
    "Cohort",
    "ContrastiveRelation",
    "ContrastiveRepresentation",
    "Distiller",
    "Ensemble",
    "Frozen",
    "LatentGate",
    "Match",
    "MemoryBank",
    "Method",
    "PeerAttention",
    "Run",
    "SelfTeacher",
    "Snapshot",
    "Stage",
    "Targets",
    "Term",
    "Trainer",
    "__version__",
    "adapters",
    "distill",
    "errors",
    "export",
    "gates",
    "layer_maps",
    "losses",
    "mutual",
    "schedules",
    "taps",
    "uncertainty_mixup",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"taskkd.{name}")
    from taskkd.deprecations import lookup

    return lookup(__name__, [*_WHERE, *_MODULES])(name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
