"""taskkd: knowledge distillation for detection, segmentation, NLP and face recognition.

The public names are imported at first use, so that `import taskkd` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from taskkd._version import __version__

if TYPE_CHECKING:
    from taskkd import losses, schedules
    from taskkd.adversarial import Adversarial
    from taskkd.augmentation import Augmented
    from taskkd.caches import Cached
    from taskkd.distiller import Distiller
    from taskkd.recipes import distill
    from taskkd.stages import Method, Stage
    from taskkd.teachers import Frozen
    from taskkd.terms import Match, Run, Term
    from taskkd.trainer import Trainer

_WHERE = {
    "Adversarial": "taskkd.adversarial",
    "Augmented": "taskkd.augmentation",
    "Cached": "taskkd.caches",
    "Distiller": "taskkd.distiller",
    "Frozen": "taskkd.teachers",
    "Match": "taskkd.terms",
    "Method": "taskkd.stages",
    "Run": "taskkd.terms",
    "Stage": "taskkd.stages",
    "Term": "taskkd.terms",
    "Trainer": "taskkd.trainer",
    "distill": "taskkd.recipes",
}
_MODULES = ("adapters", "errors", "losses", "nlp", "schedules", "taps")

__all__ = [
    "Adversarial",
    "Augmented",
    "Cached",
    "Distiller",
    "Frozen",
    "Match",
    "Method",
    "Run",
    "Stage",
    "Term",
    "Trainer",
    "__version__",
    "distill",
    "losses",
    "schedules",
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
