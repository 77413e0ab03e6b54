"""taskkd: knowledge distillation for detection, segmentation, NLP and face recognition.

The public names are imported at first use, so that `import taskkd` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from taskkd._version import __version__

if TYPE_CHECKING:
    from taskkd import adapters, gates, layer_maps, losses, schedules
    from taskkd.attention import AttentionBasedFeatures, ChannelAttentive
    from taskkd.augmentation import Augmented
    from taskkd.banks import MemoryBank
    from taskkd.caches import Cached
    from taskkd.contrastive import ContrastiveRelation, ContrastiveRepresentation
    from taskkd.distiller import Distiller
    from taskkd.mixup import uncertainty_mixup
    from taskkd.recipes import distill
    from taskkd.stages import Method, Stage
    from taskkd.teachers import Frozen
    from taskkd.terms import Match, Run, Term
    from taskkd.trainer import Trainer

_WHERE = {
    "AttentionBasedFeatures": "taskkd.attention",
    "Augmented": "taskkd.augmentation",
    "Cached": "taskkd.caches",
    "ChannelAttentive": "taskkd.attention",
    "ContrastiveRelation": "taskkd.contrastive",
    "ContrastiveRepresentation": "taskkd.contrastive",
    "Distiller": "taskkd.distiller",
    "Frozen": "taskkd.teachers",
    "Match": "taskkd.terms",
    "MemoryBank": "taskkd.banks",
    "Method": "taskkd.stages",
    "Run": "taskkd.terms",
    "Stage": "taskkd.stages",
    "Term": "taskkd.terms",
    "Trainer": "taskkd.trainer",
    "distill": "taskkd.recipes",
    "uncertainty_mixup": "taskkd.mixup",
}
_MODULES = ("adapters", "errors", "gates", "layer_maps", "losses", "nlp", "schedules", "taps")

__all__ = [
    "AttentionBasedFeatures",
    "Augmented",
    "Cached",
    "ChannelAttentive",
    "ContrastiveRelation",
    "ContrastiveRepresentation",
    "Distiller",
    "Frozen",
    "Match",
    "MemoryBank",
    "Method",
    "Run",
    "Stage",
    "Term",
    "Trainer",
    "__version__",
    "adapters",
    "distill",
    "gates",
    "layer_maps",
    "losses",
    "schedules",
    "uncertainty_mixup",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"taskkd.{name}")
    from taskkd.errors import nearest

    raise AttributeError(f"taskkd has no {name!r}{nearest(name, [*_WHERE, *_MODULES])}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
