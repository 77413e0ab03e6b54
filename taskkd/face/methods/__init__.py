"""The methods for face recognition, one file for each paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskkd.face.methods.ada_distill import ada_distill
from taskkd.face.methods.angular_distillation import angular_distillation
from taskkd.face.methods.ddl import ddl
from taskkd.face.methods.ec_kd import ec_kd
from taskkd.face.methods.ekd import ekd
from taskkd.face.methods.embedding_mimic import embedding_mimic
from taskkd.face.methods.grouped import grouped
from taskkd.face.methods.margin_distillation import margin_distillation
from taskkd.face.methods.proxyless import proxyless
from taskkd.face.methods.relational import relational
from taskkd.face.methods.siamese_attention import siamese_attention
from taskkd.face.methods.triplet_distillation import triplet_distillation
from taskkd.stages import Method

__all__ = [
    "METHODS",
    "ada_distill",
    "angular_distillation",
    "ddl",
    "ec_kd",
    "ekd",
    "embedding_mimic",
    "grouped",
    "margin_distillation",
    "proxyless",
    "relational",
    "siamese_attention",
    "triplet_distillation",
]

#: name -> `method(student, teacher, *, options) -> Method`
METHODS: dict[str, Callable[..., Method] | Any] = {
    "ada_distill": ada_distill,
    "angular_distillation": angular_distillation,
    "ddl": ddl,
    "ec_kd": ec_kd,
    "ekd": ekd,
    "embedding_mimic": embedding_mimic,
    "grouped": grouped,
    "margin_distillation": margin_distillation,
    "proxyless": proxyless,
    "relational": relational,
    "siamese_attention": siamese_attention,
    "triplet_distillation": triplet_distillation,
}
